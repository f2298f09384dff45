"""The sequence test over long benign sequences, and under attack: `python benchmarks/monitor_study.py [P.npz]`.

A detector is trained on one half of the rows and scores the other. Each sequence then draws its own calibration
rows and its own traffic from those benign scores, with replacement, so that both are exchangeable by construction;
under attack the traffic is `switch`. Prints how many of 1,000 benign sequences of 10,000 rows raised an alarm at
an error of 1e-3, beside the same number for the classical bets on p-values of one fixed calibration set, and how
many requests an attack took at 1e-6.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from fides_plugins.statistics.conformal import Calibration
from fides_plugins.training.attacks import default_registry
from fides_plugins.training.detector.detection import train_on
from fides_plugins.training.evaluation.evaluate import LearnedDetection
from fides_plugins.training.evaluation.monitor_study import first_alarms
from fides_plugins.training.evaluation.synthetic import synthetic_pair
from fides_plugins.training.predictions import load_predictions


def p_values(
    benign: np.ndarray, traffic: np.ndarray, calibration: int, sequences: int, length: int, seed: int
) -> np.ndarray:
    """(length, sequences) p-values, each sequence against calibration rows of its own."""
    rng = np.random.default_rng(seed)
    p = np.empty((length, sequences))
    for s in range(sequences):
        p[:, s] = Calibration(rng.choice(benign, calibration)).p_value(rng.choice(traffic, length))
    return p


def fixed_alarms(p: np.ndarray, error: float) -> int:
    """Sequences that alarm when power bets are placed on the p-values as they are."""
    k = np.linspace(0.5, 0.95, 10)
    wealth = np.zeros((p.shape[1], len(k)))
    top = np.zeros(p.shape[1])
    for row in p:
        wealth += np.log(k) + (k - 1) * np.log(row)[:, None]
        top = np.maximum(top, np.exp(np.minimum(wealth, 700)).mean(axis=1))
    return int((top >= 1.0 / error).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("predictions", type=Path, nargs="?", help="without it, a made-up pair of 10 classes")
    parser.add_argument("--calibration", type=int, default=1000, help="calibration rows of each sequence")
    parser.add_argument("--sequences", type=int, default=1000)
    parser.add_argument("--length", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = load_predictions(arguments.predictions) if arguments.predictions else synthetic_pair(8000, 10, signal=4.0)
    fit, held_out = rows.split(0.5, arguments.seed)
    judge = LearnedDetection.of_artifacts(train_on(fit, seed=arguments.seed))
    lies, _ = default_registry().output("switch").apply(held_out.service, np.random.default_rng(arguments.seed))
    benign = judge.score(held_out.service, held_out.verification)
    attacked = judge.score(lies, held_out.verification)
    n, sequences = arguments.calibration, arguments.sequences
    quiet = p_values(benign, benign, n, sequences, arguments.length, arguments.seed)
    alarms = int(np.isfinite(first_alarms(quiet, n, sequences, 1e-3)).sum())
    print(f"{sequences:,} benign sequences of {arguments.length:,} rows at 1e-3: {alarms} alarmed", end="; ")
    print(f"bets against the fixed calibration: {fixed_alarms(quiet, 1e-3)}")
    lied = p_values(benign, attacked, n, sequences, 200, arguments.seed + 1)
    delays = first_alarms(lied, n, sequences, 1e-6)
    print(f"`switch` at 1e-6: median {np.median(delays):.0f} requests, 95% within {np.percentile(delays, 95):.0f}")


if __name__ == "__main__":
    main()
