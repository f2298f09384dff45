"""The one reader and writer of class outputs."""

from __future__ import annotations

import numpy as np
import pytest

from fides_plugins.codec import OutputCodec, class_rows
from fides_plugins.errors import InputError
from fides_plugins.policy import failed_verdict
from fides_plugins.settings import Settings
from fides_plugins.types import OutputKind, Status, Verdict, softmax

LOGITS = np.random.default_rng(0).normal(0, 3, (4, 5)).astype(np.float32)


def corrected(probabilities: np.ndarray, rows: list[bool]) -> Verdict:
    """A verdict that corrects these rows."""
    n = len(probabilities)
    label = probabilities.argmax(axis=1)
    return Verdict(
        status=np.where(rows, Status.ATTACKED, Status.TRUSTED),
        score=np.ones(n), p_value=np.ones(n), service_label=label, verified_label=label, label=label,
        probabilities=probabilities, corrected=rows, refused=np.zeros(n, dtype=bool),
        reason_codes=np.zeros(n, dtype=np.int64), reasons=("",),
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1, 1), (4, 1, 5), (4, 1, 1, 5)])
def test_one_class_axis_is_read_wherever_it_stands(shape: tuple[int, ...]) -> None:
    codec = OutputCodec("logits", 2.0)
    assert np.array_equal(codec.read(LOGITS.reshape(shape)).probabilities, softmax(LOGITS / np.float32(2)))
    assert codec.read(np.zeros((0, *shape[1:]), np.float32)).n_rows == 0


@pytest.mark.parametrize("shape", [(20,), (4, 5, 2), (2, 2, 5), (4, 1), ()])
def test_other_shapes_are_refused_with_a_remedy(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="shape"):
        class_rows(np.zeros(shape, dtype=np.float32))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("kind", ["logits", "probabilities"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_what_is_written_reads_as_the_correction(kind: OutputKind, temperature: float, dtype: type) -> None:
    codec = OutputCodec(kind, temperature)
    wanted = softmax(LOGITS[::-1])
    raw = (LOGITS if kind == "logits" else softmax(LOGITS)).astype(dtype).reshape(4, 5, 1, 1)
    written = codec.write(raw, corrected(wanted, [True, False, True, False]))
    assert written.dtype == dtype
    assert written.shape == raw.shape
    assert np.array_equal(written[1::2], raw[1::2])
    read = codec.read(written).probabilities
    assert np.allclose(read[::2], wanted[::2], atol=6e-3 if dtype == np.float16 else 1e-6)


def test_a_correction_in_logits_is_t_log_p_with_a_floor() -> None:
    wanted = np.array([[0.7, 0.3, 0.0]], dtype=np.float32)
    written = OutputCodec("logits", 2.0).write(np.zeros((1, 3), np.float64), corrected(wanted, [True]))
    assert written[0] == pytest.approx(2 * np.log([0.7, 0.3, 1e-7]), rel=1e-6)


@pytest.mark.parametrize(
    "output", [np.zeros((4, 5), np.int8), np.zeros((3, 5), np.float32), np.zeros((4, 6), np.float32)]
)
def test_a_correction_that_does_not_fit_is_refused(output: np.ndarray) -> None:
    with pytest.raises(InputError):
        OutputCodec().write(output, corrected(softmax(LOGITS), [True] * 4))


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_the_scale_for_losses_is_the_scale_that_is_read(kind: OutputKind) -> None:
    codec = OutputCodec(kind, 3.0)
    raw = LOGITS if kind == "logits" else softmax(LOGITS)
    assert np.allclose(softmax(codec.logits(raw)), codec.read(raw).probabilities, atol=1e-6)


def test_verdicts_come_apart_and_together_again() -> None:
    verdicts = [failed_verdict(Settings(), n, 3, f"reason {n}") for n in (1, 0, 2)]
    whole = Verdict.concat(verdicts)
    assert whole.reason.tolist() == ["reason 1", "reason 2", "reason 2"]
    assert whole.rows(slice(1, 3)).reason.tolist() == ["reason 2", "reason 2"]
    assert whole.rows(np.array([True, False, False])).status_text.tolist() == ["error"]
