"""The kit for plug-in authors: `check_plugin` finds each way of breaking the contract, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fides_plugins import Detection, Prediction, Reclassification, Status, Verification, hookimpl
from fides_plugins.errors import PluginError
from fides_plugins.testing import (
    BATCH_SIZES,
    CLASS_COUNTS,
    check_plugin,
    fake_logits,
    fake_query,
    fake_service,
    memory_bundle,
    switch_top_two,
)


class Good:
    """Implements every hook as the contract wants it."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.seen = 0

    @hookimpl
    def fides_configure(self, settings: Any, bundle: Any) -> None:
        self.events.append(f"configure {bundle.n_classes} {settings.plugins.options}")

    @hookimpl
    def fides_unconfigure(self) -> None:
        self.events.append("unconfigure")

    @hookimpl
    def fides_verify(self, query: Any) -> Any:
        (tensor,) = query.inputs.values()
        return Verification.single(np.full(tensor.shape, 1.0 / tensor.shape[1]), "uniform")

    @hookimpl
    def fides_detect(self, service: Any, verification: Any) -> Any:
        differs = service.label != verification.label
        return Detection(differs, differs, "differs", valid=service.valid & verification.valid)

    @hookimpl
    def fides_reclassify(self, verification: Any) -> Any:
        return Reclassification(verification.probabilities, "reference", valid=verification.valid)

    @hookimpl
    def fides_record(self, query: Any, verdict: Any) -> None:
        self.seen += verdict.n_rows


def test_a_good_plugin_is_checked_through_every_hook_class_count_and_batch_size() -> None:
    plugin = Good()

    report = check_plugin(plugin, name="good", options={"level": 3})

    assert report.ok
    called = {(c.hook, c.n_rows, c.n_classes) for c in report.calls}
    for hook in ("fides_verify", "fides_detect", "fides_record"):
        assert {(hook, n, k) for n in BATCH_SIZES for k in CLASS_COUNTS} <= called
    # An empty batch has no attacked row, so nobody is asked for a correction.
    assert ("fides_reclassify", 0, 10) not in called
    assert ("fides_reclassify", 7, 1000) in called
    assert plugin.events[:2] == ["configure 2 {'good': {'level': 3}}", "unconfigure"]
    assert all(c.answered for c in report.calls if c.hook != "fides_record")
    assert report.notes == []


def test_a_class_is_made_anew_for_each_number_of_classes() -> None:
    made = []

    class Counted(Good):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    check_plugin(Counted)

    assert len(made) == len(CLASS_COUNTS)


def test_answering_none_everywhere_is_allowed() -> None:
    class Silent:
        @hookimpl
        def fides_verify(self, query: Any) -> None:
            return None

        @hookimpl
        def fides_detect(self, service: Any) -> None:
            return None

    report = check_plugin(Silent)

    assert report.ok
    assert not any(c.answered for c in report.calls)
    said = "12 calls, no answer; nothing was checked by its answers."
    assert report.notes == [f"fides_detect: {said}", f"fides_verify: {said}"]


def _verify(answer: Any) -> Any:
    class Plugin:
        @hookimpl
        def fides_verify(self, query: Any) -> Any:
            return answer(query)

    return Plugin


def _detect(answer: Any) -> Any:
    class Plugin:
        @hookimpl
        def fides_detect(self, query: Any, service: Any, verification: Any) -> Any:
            return answer(query, service, verification)

    return Plugin


def _write(query: Any) -> None:
    next(iter(query.inputs.values()))[...] = 0


def _write_below(query: Any, service: Any, verification: Any) -> None:
    array = service.probabilities
    while array.base is not None:
        array = array.base
    array.flags.writeable = True
    array[...] = 0


def _slow(query: Any, service: Any, verification: Any) -> None:
    time.sleep(0.03)


def _slow_record() -> Any:
    class Plugin:
        @hookimpl
        def fides_record(self, verdict: Any) -> None:
            time.sleep(0.15)

    return Plugin


def _raises_in(hook: str) -> Any:
    def broken(self: Any) -> None:
        raise ValueError("out of order")

    broken.__name__ = hook
    both = {hook: hookimpl(broken), "fides_record": hookimpl(_nothing)}
    return type("Plugin", (), both)


def _nothing(self: Any) -> None:
    return None


def _unsteady() -> Any:
    """Goes wrong only when called from several threads at once."""

    class Plugin:
        busy = False

        @hookimpl
        def fides_detect(self, query: Any) -> None:
            if self.busy:
                raise RuntimeError("one at a time, please")
            self.busy = True
            time.sleep(0.05)
            self.busy = False

    return Plugin


@pytest.mark.parametrize(
    ("plugin", "text"),
    [
        pytest.param(
            _verify(lambda q: np.zeros((q.n_rows, 10))),
            "returned ndarray; expected Verification or None",
            id="wrong type",
        ),
        pytest.param(
            _verify(lambda q: Verification.single(np.full((q.n_rows + 1, 2), 0.5), "x")),
            "returned 1 rows",
            id="a row too many",
        ),
        pytest.param(
            _verify(lambda q: Verification.single(np.full((q.n_rows, 10), 0.1), "x")),
            "10 classes",
            id="always ten classes",
        ),
        pytest.param(
            _detect(lambda q, s, v: Detection(np.full(s.n_rows, 2.0), s.valid, "x")),
            "outside [0, 1]",
            id="score above one",
        ),
        pytest.param(
            _detect(lambda q, s, v: Detection(s.probabilities, s.valid, "x")), "expected (rows,)", id="score per class"
        ),
        pytest.param(
            _detect(lambda q, s, v: Detection(np.full(s.n_rows, np.nan), s.valid, "x")),
            "N=1, K=2 gave 1 row(s) a score that is not a finite number",
            id="score that is no number",
        ),
        pytest.param(
            _detect(lambda q, s, v: s.probabilities.max() and None), "N=0, K=2 raised ValueError", id="empty batch"
        ),
        pytest.param(
            _detect(lambda q, s, v: [1][int(not v.valid.all())] and None), "raised IndexError", id="no reference"
        ),
        pytest.param(_verify(_write), "copy before you write", id="writes"),
        pytest.param(_detect(_write_below), "changed its argument `service`", id="writes below"),
        pytest.param(_slow_record(), "at most 100 ms", id="slow observer"),
        pytest.param(_raises_in("fides_configure"), "fides_configure raised ValueError: out of order", id="configure"),
        pytest.param(_raises_in("fides_unconfigure"), "fides_unconfigure raised ValueError", id="unconfigure"),
        pytest.param(_unsteady(), "from 4 threads at once", id="not for threads"),
    ],
)
def test_each_broken_promise_is_found_and_named(plugin: Any, text: str) -> None:
    with pytest.raises(PluginError) as caught:
        check_plugin(plugin, class_counts=(2, 10))
    assert text in str(caught.value)
    assert "'Plugin'" in str(caught.value)


def test_a_plugin_that_is_slower_than_its_author_promised_is_named() -> None:
    with pytest.raises(PluginError, match=r"'Plugin'(?s:.*)took"):
        check_plugin(_detect(_slow), class_counts=(2, 10), limits_ms={"fides_detect": 20.0})


def test_one_call_that_was_held_up_is_no_slow_plugin() -> None:
    class Plugin:
        calls = 0

        @hookimpl
        def fides_record(self, verdict: Any) -> None:
            type(self).calls += 1
            if self.calls == 1:
                time.sleep(0.15)

    report = check_plugin(Plugin, class_counts=(2,))
    # What is reported is the call that counted: four cases, none of them over the limit.
    assert len(report.calls) == 4
    assert max(call.milliseconds for call in report.calls) < 100


class Misspelt:
    @hookimpl
    def fides_detekt(self, query: Any) -> None:
        return None


class Stranger:
    @hookimpl
    def fides_detect(self, answer: Any) -> None:
        return None


@pytest.mark.parametrize(
    ("plugin", "text"), [(object(), "implements no hook"), (Misspelt, "'fides_detect'"), (Stranger, "answer")]
)
def test_what_fits_no_hook_is_named(plugin: object, text: str) -> None:
    assert text in check_plugin(plugin, raises=False).problems[0]


def test_the_bundle_in_memory_is_the_bundle_on_disk(tmp_path: Path) -> None:
    from fides_plugins.testing import make_bundle

    bundle = memory_bundle(5)

    assert bundle.digest == make_bundle(tmp_path / "fake", 5).digest
    # "A few kilobytes": the graphs and the manifest; the calibration scores are most of it.
    graphs = sum(len(bundle.file(n)) for n in bundle.file_names if n.endswith(".onnx"))
    assert graphs < 4096


def test_the_fixtures_give_fresh_objects_and_only_the_named_plugins(
    fides_manager: Any, fides_pipeline: Any, fides_bundle: Any
) -> None:
    manager = fides_manager(Good, Good)
    names = [p.name for p in manager.report.plugins]

    assert names[-2:] == ["Good", "Good-2"]
    assert not any("entry point" in p.source for p in manager.report.plugins)
    assert fides_manager() is not fides_manager()

    logits = fake_logits(6)
    honest = fake_service(logits)
    lie = Prediction(switch_top_two(honest.probabilities, rows=[2]), honest.valid)
    verdict = fides_pipeline(mode="correct", detector="divergence").run(fake_query(logits), lie)
    assert fides_bundle.n_classes == 10
    assert verdict.status.tolist() == [Status.TRUSTED] * 2 + [Status.ATTACKED] + [Status.TRUSTED] * 3
    assert verdict.label[2] == honest.label[2]


TEST_OF_A_STRANGER = """
from fides_plugins import hookimpl

class Closing:
    closed = []

    @hookimpl
    def fides_unconfigure(self):
        self.closed.append(True)

def test_one(fides_pipeline, fides_bundle):
    assert fides_pipeline(Closing, bundle=fides_bundle).n_classes == 10

def test_two():
    assert Closing.closed == [True]
"""


def test_pytest_finds_the_fixtures_by_their_entry_point_and_imports_little(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TEST_OF_A_STRANGER)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout

    code = "import sys, fides_plugins.pytest_plugin; print('onnxruntime' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "False"]
