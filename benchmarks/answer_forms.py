"""False alarms on rows that fit never saw, judged by a real Triton, for every way a service may write its answer.

For each number of classes, very sure and very unsure services, and each form of answer (probabilities, logits,
log-probabilities, probabilities in float16 and in six decimals), a service of random weights is fitted by
`fit_service` and served behind `fides attach`; ten seeds by default. A row of the table pools the seeds of one
combination: the share of benign rows called attacked at a budget of 1%, with the 95% interval that a budget kept
exactly would give (both the calibration and the test rows are drawn at random). Prints a Markdown table.

`python benchmarks/answer_forms.py --seeds 10`: about forty minutes on two cores, two runs side by side.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fides_plugins.launch.triton import TritonServer
from fides_plugins.serving.triton.attach import attach
from fides_plugins.serving.triton.plan import AttachOptions
from fides_plugins.training.data import Dataset
from fides_plugins.training.detector import adversarial
from fides_plugins.training.fit import FitOptions, fit_service
from fides_plugins.training.service.teachers import OnnxTeacher

FEATURES, HIDDEN = 16, 48
FIT_ROWS, TEST_ROWS = 1600, 2000
BUDGET = 0.01
#: Few attacks and rounds, because what is measured is the reading of answers and not the detector.
ATTACKS = ("switch",)
adversarial.GanOptions = partial(adversarial.GanOptions, rounds=2, generator=False)  # type: ignore[misc]
CLASSES = (2, 10, 214)
#: What logits are multiplied by: the median top probability is then above 0.999, or near that of a guess.
SCALES = {"sure": 12.0, "unsure": 0.25}
#: Operators behind the logits, and the type of the answer.
FORMS: dict[str, tuple[tuple[str, ...], str]] = {
    "logits": ((), "float32"),
    "probabilities": (("Softmax",), "float32"),
    "log-probabilities": (("LogSoftmax",), "float32"),
    "float16": (("Softmax", "Float16"), "float16"),
    "six decimals": (("Softmax", "SixDecimals"), "float32"),
}
TRITON_TYPES = {"float16": "FP16", "float32": "FP32"}
SERVICE = "from fides_plugins.serving.triton.onnx_service import TritonPythonModel\n"


@dataclass(frozen=True)
class Combination:
    """One service: how many classes, how sure, in which form it answers."""

    n_classes: int
    sureness: str
    form: str

    @property
    def name(self) -> str:
        """Name of the served model."""
        return f"k{self.n_classes}_{self.sureness}_{self.form}".replace(" ", "_").replace("-", "_")


def service_onnx(what: Combination, seed: int) -> bytes:
    """A network with two layers of random weights, and the operators of the form behind it."""
    rng = np.random.default_rng((seed, what.n_classes))
    arrays = {
        "w1": rng.normal(0, FEATURES**-0.5, (FEATURES, HIDDEN)),
        "w2": rng.normal(0, SCALES[what.sureness] * HIDDEN**-0.5 * 2, (HIDDEN, what.n_classes)),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["step0"]),
    ]
    operators, dtype = FORMS[what.form]
    constants = [numpy_helper.from_array(np.asarray(v, np.float32), n) for n, v in arrays.items()]
    last = "step0"
    for index, operator in enumerate(operators, 1):
        step = f"step{index}"
        if operator == "Float16":
            nodes.append(helper.make_node("Cast", [last], [step], to=TensorProto.FLOAT16))
        elif operator == "SixDecimals":
            constants.append(numpy_helper.from_array(np.float32(1e6), "million"))
            nodes.append(helper.make_node("Mul", [last, "million"], ["larger"]))
            nodes.append(helper.make_node("Round", ["larger"], ["whole"]))
            nodes.append(helper.make_node("Div", ["whole", "million"], [step]))
        else:
            nodes.append(helper.make_node(operator, [last], [step], axis=1))
        last = step
    nodes.append(helper.make_node("Identity", [last], ["scores"]))
    kind = TensorProto.FLOAT16 if dtype == "float16" else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "service",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", FEATURES])],
        [helper.make_tensor_value_info("scores", kind, ["N", what.n_classes])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def rows(n: int, seed: int) -> NDArray[np.float32]:
    """Inputs (n, FEATURES)."""
    return np.random.default_rng(seed).normal(0, 1, (n, FEATURES)).astype(np.float32)


def deploy(what: Combination, seed: int, root: Path) -> float:
    """Fit a bundle and attach it to a model in the repository; the held-out agreement."""
    graph = service_onnx(what, seed)
    # Row 0 of the seed belongs to fit, row 1 to the test: no row is in both.
    data = Dataset(rows(FIT_ROWS, 2 * seed))
    options = FitOptions(transfer_rows=1, epochs=6, max_cost=4.0, max_size=4.0, agreement=0.9)
    report = fit_service(
        OnnxTeacher(graph, "service.onnx"), data, root / what.name, seed=seed, options=options, attacks=ATTACKS
    )
    folder = root / "repository" / what.name
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.onnx").write_bytes(graph)
    (folder / "1" / "model.py").write_text(SERVICE)
    dtype = TRITON_TYPES[FORMS[what.form][1]]
    (folder / "config.pbtxt").write_text(
        'backend: "python"\nmax_batch_size: 2048\n'
        f'input [ {{ name: "x" data_type: TYPE_FP32 dims: [ {FEATURES} ] }} ]\n'
        f'output [ {{ name: "scores" data_type: TYPE_{dtype} dims: [ {what.n_classes} ] }} ]\n'
    )
    settings = {"mode": "flag", "false_alarm_rate": str(BUDGET)}
    attach(root / "repository", what.name, AttachOptions(root / what.name, settings=settings))
    return report.agreement


def one_seed(seed: int, combinations: list[Combination]) -> Iterator[tuple[Combination, float, float]]:
    """Combination, agreement and share of false alarms, from one server that serves them all."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        agreed = {}
        for what in combinations:
            began = time.perf_counter()
            agreed[what] = deploy(what, seed, root)
            print(
                f"seed {seed} {what.name}: fitted in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True
            )
        loaded = [f"{what.name}{part}" for what in combinations for part in ("__base", "__fides")]
        server = TritonServer(
            root / "repository", explicit=True, load=loaded, config_name="fides", auto_complete=False,
            env={"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        with server as running:
            for what in combinations:
                seen = running.api.infer(f"{what.name}__fides", {"x": rows(TEST_ROWS, 2 * seed + 1)})["FIDES_STATUS"]
                assert set(seen.ravel()) <= {b"trusted", b"attacked"}, set(seen.ravel())
                yield what, agreed[what], float((seen.ravel() == b"attacked").mean())


def main() -> None:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--forms", nargs="*", default=list(FORMS))
    parser.add_argument("--classes", nargs="*", type=int, default=list(CLASSES))
    chosen = parser.parse_args()
    combinations = [Combination(*c) for c in product(chosen.classes, SCALES, chosen.forms)]
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(chosen.first, chosen.first + chosen.seeds):
        for what, agreed, alarms in one_seed(seed, combinations):
            found.setdefault(what.name, []).append((agreed, alarms))
        if chosen.json:
            chosen.json.write_text(json.dumps(found))
    calibration_rows = int(0.45 * 0.5 * FIT_ROWS)
    spread = 1.96 * np.sqrt(BUDGET * (1 - BUDGET) * (1 / calibration_rows + 1 / TEST_ROWS) / chosen.seeds)
    low, high = BUDGET - spread, BUDGET + spread
    print(f"Kept exactly, a budget of {BUDGET:.0%} gives {low:.2%} to {high:.2%} over {chosen.seeds} seeds.\n")
    print("| classes | service | form | agreement | false alarms | lowest, highest seed |")
    print("|---:|---|---|---:|---:|---|")
    for what in combinations:
        agreed, alarms = (np.array(v) for v in zip(*found[what.name], strict=True))
        print(
            f"| {what.n_classes} | {what.sureness} | {what.form} | {agreed.mean():.3f} | {alarms.mean():.2%} "
            f"| {alarms.min():.2%}, {alarms.max():.2%} |"
        )


if __name__ == "__main__":
    main()
