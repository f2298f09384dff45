"""Detection on somebody's predictions, over several splits: `python benchmarks/detection_study.py P.npz`, or on a
made-up pair: `python benchmarks/detection_study.py --made-up 100 --seeds 1`.

Half of the rows fit a bundle, half judge it, for each seed; every attack is also judged by a detector that was
trained without it. Prints the means over seeds, beside plain disagreement and a threshold on KL at equal
false-alarm rates, and how many comparisons the bootstrap interval calls worse. For the file format see
`fides_plugins/training/predictions.py`. About six minutes a seed on one core for 10,000 rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from fides_plugins.training.attacks import default_registry
from fides_plugins.training.detector.detection import fit_predictions
from fides_plugins.training.evaluation.evaluate import evaluate
from fides_plugins.training.evaluation.synthetic import synthetic_pair
from fides_plugins.training.predictions import Predictions, load_predictions

MEASURES = ("accuracy", "auroc", "tpr_at_fpr_0.01", "tpr_at_fpr_0.05", "recovered_service", "recovered_truth")
#: Made-up pairs: classes to rows and signal.
MADE_UP = {2: (3000, 2.0), 10: (6000, 4.0), 100: (8000, 5.0), 1000: (3000, 6.5)}


def one_seed(rows: Predictions, seed: int, unseen: bool) -> dict[str, Any]:
    """Fit on one half, evaluate on the other."""
    fit, held_out = rows.split(0.5, seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fit.npz"
        arrays = {"service_probabilities": fit.service, "verification_probabilities": fit.verification}
        np.savez(path, **arrays, **({} if fit.labels is None else {"labels": fit.labels}))
        began = time.perf_counter()
        bundle = fit_predictions(path, Path(folder) / "bundle", seed=seed)
        seconds = time.perf_counter() - began
        found = evaluate(bundle, held_out, registry=default_registry(), fit_rows=fit, unseen=unseen, seed=seed)
    return {"seed": seed, "fit_seconds": round(seconds, 1), **found.result}


def table(results: list[dict[str, Any]], which: str) -> list[str]:
    """Lines of a Markdown table: means over seeds by attack."""
    side = {"attacks": "seen", "unseen": "unseen"}[which]
    lines = [
        f"| {side} attack | " + " | ".join(m.replace("_", " ") for m in MEASURES) + " | minus disagreement"
        " | minus KL at 1% | minus KL at 5% | worse |",
        "|---|" + "---:|" * (len(MEASURES) + 4),
    ]
    for name in results[0][which]:
        cells = [np.mean([r[which][name][m] for r in results if r[which][name][m] is not None]) for m in MEASURES]
        rules = [r["comparison"][side][name] for r in results]
        differences = [
            np.mean([c[rule]["difference"] for c in rules if c[rule]["difference"] is not None]) for rule in rules[0]
        ]
        worse = sum(c[rule]["no_worse"] is False for c in rules for rule in c)
        lines.append(
            f"| {name} | "
            + " | ".join(f"{c:.3f}" for c in cells)
            + " | "
            + " | ".join(f"{d:+.3f}" for d in differences)
            + f" | {worse} of {3 * len(results)} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("predictions", type=Path, nargs="?")
    source.add_argument("--made-up", type=int, choices=MADE_UP, help="classes of a made-up pair")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seen-only", action="store_true", help="do not train again without each attack")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.made_up:
        n_rows, signal = MADE_UP[arguments.made_up]
        rows = synthetic_pair(n_rows, arguments.made_up, signal=signal, seed=5)
    else:
        rows = load_predictions(arguments.predictions)
    results = []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        results.append(one_seed(rows, seed, not arguments.seen_only))
        monitor = results[-1]["monitor"]
        print(f"seed {seed}: fit {results[-1]['fit_seconds']} s, clean {results[-1]['clean']}")
        print(
            f"  requests to alarm { ({k: v['median'] for k, v in monitor.items() if isinstance(v, dict)}) }", flush=True
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    for which in ("attacks",) if arguments.seen_only else ("attacks", "unseen"):
        print("\n" + "\n".join(table(results, which)))


if __name__ == "__main__":
    main()
