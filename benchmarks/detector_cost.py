"""Size and time of detector and re-classifier on one thread, beside the verification model's: `make bench`.

The three are timed turn by turn, so what slows the machine slows all of them alike. A shared machine is at times half
as fast as a second before: every round gives medians, and the quietest round is shown beside the one in the middle.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.bundle import Bundle
from fides_plugins.training.evaluation.synthetic import synthetic_pair

BUNDLE = Path(__file__).resolve().parent.parent / "model_repository" / "fides_verify" / "bundle"


def measure(bundle: Bundle, n: int, rounds: int, calls: int) -> dict[str, Any]:
    """Seconds of one call on n rows, by part: medians of the quietest round and of the one in the middle."""
    manifest = bundle.manifest
    assert manifest.detector is not None
    assert manifest.reclassifier is not None
    assert manifest.verification is not None
    pair = synthetic_pair(n, bundle.n_classes)
    rows = {"service": pair.service.copy(), "verification": pair.verification.copy()}
    verifier = bundle.model(manifest.verification)
    free = verifier.inputs[0]
    shape = [n, *(manifest.input.shape[1:] if manifest.input else ())]
    images = np.random.default_rng(0).random([size or 1 for size in shape], dtype=np.float32)
    parts = [
        (bundle.model(manifest.detector), rows),
        (bundle.model(manifest.reclassifier), rows),
        (verifier, {free.name: images}),
    ]
    times = np.empty((rounds, calls, len(parts)))
    for turn in np.ndindex(rounds, calls):
        for part, (model, feed) in enumerate(parts):
            began = time.perf_counter()
            model.run(feed)
            times[(*turn, part)] = time.perf_counter() - began
    medians = np.median(times, axis=1)
    by_speed = medians[np.argsort(medians.sum(axis=1))]
    return {"rows": n, "quietest": _seconds(by_speed[0]), "middle": _seconds(by_speed[rounds // 2])}


def _seconds(medians: NDArray[np.float64]) -> dict[str, float]:
    detector, reclassifier, verification = medians.tolist()
    both = detector + reclassifier
    return {
        "detector": detector,
        "reclassifier": reclassifier,
        "both": both,
        "verification model": verification,
        "ratio": both / verification,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=200, help="calls in a round")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    bundle = Bundle.load(arguments.bundle)
    size = sum(len(bundle.file(f"{name}.onnx")) for name in ("detector", "reclassifier"))
    found = [measure(bundle, n, arguments.rounds, arguments.calls) for n in (1, 64)]
    print(f"K = {bundle.n_classes}, one thread; detector and re-classifier: {size:,} bytes")
    for line in found:
        for which in ("quietest", "middle"):
            micro = ", ".join(f"{name} {1e6 * value:.0f} us" for name, value in line[which].items() if name != "ratio")
            print(
                f"{line['rows']:>3} rows, {which} round: {micro}; both / verification model {line[which]['ratio']:.2f}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps({"bytes": size, "times": found}, indent=1))


if __name__ == "__main__":
    main()
