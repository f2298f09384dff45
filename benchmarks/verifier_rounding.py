"""What `fides serve-verifier --decimals` costs in detection: honest rows trusted, changed answers seen.

    python benchmarks/verifier_rounding.py
    python benchmarks/verifier_rounding.py --json out.json

The digits service and bundle of `model_repository/`, on the held-out rows of its seed. Each reference is rounded
as the verifier rounds it and judged as a client judges it, at the default false-alarm rate of 1%. A changed answer
has its two best classes exchanged. Intervals are Wilson's, at 95%.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.bundle import Bundle
from fides_plugins.demo.digits import INPUT_NAME, load_digits_split
from fides_plugins.enclave.rounding import round_rows
from fides_plugins.onnx_model import OnnxModel
from fides_plugins.pipeline import VerifyOutcome
from fides_plugins.protection import Protection
from fides_plugins.settings import Settings
from fides_plugins.statistics.intervals import wilson
from fides_plugins.types import Float32Array, Prediction, Query, Status, Verification

ROOT = Path(__file__).resolve().parent.parent
SERVICE = ROOT / "model_repository" / "digits_base" / "1" / "model.onnx"
BUNDLE = ROOT / "model_repository" / "fides_verify" / "bundle"


def exchange_best(logits: Float32Array) -> Float32Array:
    """Each row with its two best classes exchanged."""
    changed = logits.copy()
    best = np.argsort(logits, axis=1)[:, -2:]
    np.put_along_axis(changed, best, np.take_along_axis(logits, best[:, ::-1], axis=1), axis=1)
    return changed


def share(hits: NDArray[np.bool_]) -> dict[str, Any]:
    """Hits of rows, and the interval of their share."""
    low, high = wilson(int(hits.sum()), len(hits))
    return {"hits": int(hits.sum()), "rows": len(hits), "low": low, "high": high}


def measure() -> list[dict[str, Any]]:
    """One line for each number of decimals."""
    bundle = Bundle.load(BUNDLE)
    spec = bundle.manifest.verification
    assert spec is not None
    images = load_digits_split(0).test.images
    service = OnnxModel(SERVICE.read_bytes())
    answers = service.run({service.inputs[0].name: images})["logits"]
    verifier = bundle.model(spec)
    output = verifier.run({verifier.inputs[0].name: images})[spec.output_name]
    reference = Prediction.from_output(output, spec.output_kind, spec.temperature).probabilities
    lines = []
    for decimals in (None, 4, 3, 2, 1):
        shown = reference if decimals is None else round_rows(reference, decimals)
        found: dict[str, Any] = {"decimals": decimals}
        for name, given, wanted in (
            ("honest trusted", answers, Status.TRUSTED),
            ("changed attacked", exchange_best(answers), Status.ATTACKED),
        ):
            client = Protection.load(Settings(mode="correct", on_error="closed"), bundle=bundle, references="brought")
            brought = VerifyOutcome(Verification.single(shown, "enclave"))
            verdict = client.judge(Query({INPUT_NAME: images}), given, brought)
            found[name] = share(verdict.status == wanted)
        lines.append(found)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    lines = measure()
    for line in lines:
        cells = [
            f"{name} {cell['hits']}/{cell['rows']} ({100 * cell['low']:.1f} to {100 * cell['high']:.1f}%)"
            for name, cell in line.items()
            if name != "decimals"
        ]
        print(f"decimals {line['decimals'] or 'all'}: {', '.join(cells)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
