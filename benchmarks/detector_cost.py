"""Size and time of detector and re-classifier on one thread, beside the verification model's: `make bench`.

The three are timed turn by turn in one run, so a busy machine slows all of them; medians and their ratio.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from fides_plugins.bundle import Bundle
from fides_plugins.training.synthetic import synthetic_pair

BUNDLE = Path(__file__).resolve().parent.parent / "model_repository" / "fides_verify" / "bundle"


def measure(bundle: Bundle, n: int, rounds: int) -> dict[str, Any]:
    """Median seconds of one call on n rows, by part."""
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
    parts = {
        "detector": (bundle.model(manifest.detector), rows),
        "reclassifier": (bundle.model(manifest.reclassifier), rows),
        "verification model": (verifier, {free.name: images}),
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        for name, (model, feed) in parts.items():
            began = time.perf_counter()
            model.run(feed)
            times[name].append(time.perf_counter() - began)
    medians = {name: float(np.median(taken)) for name, taken in times.items()}
    both = medians["detector"] + medians["reclassifier"]
    return {"rows": n, **medians, "both": both, "ratio": both / medians["verification model"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=BUNDLE)
    parser.add_argument("--rounds", type=int, default=3000)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    bundle = Bundle.load(arguments.bundle)
    size = sum(len(bundle.file(f"{name}.onnx")) for name in ("detector", "reclassifier"))
    found = [measure(bundle, n, arguments.rounds) for n in (1, 64)]
    print(f"K = {bundle.n_classes}, one thread; detector and re-classifier: {size:,} bytes")
    for line in found:
        micro = {name: f"{1e6 * value:.0f} us" for name, value in line.items() if name not in ("rows", "ratio")}
        print(f"{line['rows']:>3} rows: {micro}, both / verification model {line['ratio']:.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"bytes": size, "times": found}, indent=1))


if __name__ == "__main__":
    main()
