"""Checks a linear layer's claimed output with random projections, as Slalom does.

A linear layer z = x W + b costs D x K multiplications a row. With a secret random vector r, z.r must equal
x.(W r) + b.r, which costs D + K once W r is known; a changed z passes only if its error happens to be
orthogonal to r (Freivalds 1977; Tramer and Boneh, "Slalom", ICLR 2019, section 3).

With `claimed` empty the claimed output is the service's answer itself: the service is a linear head on
the tensor `input`, and its logits are known from its probabilities up to a constant per row, so r is
made orthogonal to the constant. Otherwise `claimed` names a tensor of the query: activations that the
service hands out and the host passes on.
"""

from __future__ import annotations

import hashlib
import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fides_plugins import Detection, InputError, Prediction, Query, SettingsError, hookimpl

if TYPE_CHECKING:
    from fides_plugins.bundle import Bundle
    from fides_plugins.settings import Settings

NAME = "freivalds"
logger = logging.getLogger("fides_freivalds")
#: Secret projections made at start; a request uses some that nobody can foresee.
POOL = 64
#: Smallest probability whose logarithm is still exact enough to stand for a logit.
FLOOR = 1e-30
Float64 = NDArray[np.float64]


class LinearCheck:
    """Freivalds' check of z = x W + b, for many rows at once.

    Parameters
    ----------
    weight:
        (D, K).
    bias:
        (K,).
    repetitions:
        Different projections per request, 1 to `POOL`; a wrong row must be near-orthogonal to all to pass.
    up_to_constant:
        Whether z is known only up to a constant per row.

    Notes
    -----
    Entries of r are Gaussian, so the residual of a row with error e is N(0, |e|^2): it lies within
    tolerance t |z| with probability at most sqrt(2 / pi) t |z| / |e| per repetition (`miss_bound`).

    Raises
    ------
    SettingsError
        If `repetitions` is outside 1 to `POOL`.
    """

    def __init__(self, weight: Float64, bias: Float64, repetitions: int = 2, up_to_constant: bool = False) -> None:
        if not 1 <= repetitions <= POOL:
            raise SettingsError(f"{NAME}: repetitions is {repetitions}.", f"Give a number from 1 to {POOL}.")
        self.weight, self.bias = weight, bias
        self.repetitions = repetitions
        self.up_to_constant = up_to_constant
        # A generator seeded by the operating system: its state is this process's secret.
        self._rng = np.random.default_rng()
        r = self._rng.standard_normal((weight.shape[1], POOL))
        if up_to_constant:
            r -= r.mean(axis=0)
        self._r, self._wr, self._br = r, weight @ r, bias @ r

    def residual(self, x: Float64, z: Float64) -> Float64:
        """(N,) largest |z.r - x.(W r) - b.r| over the repetitions, relative to |z|; x (N, D), z (N, K)."""
        # Without replacement: a projection drawn twice would check nothing new.
        chosen = np.random.default_rng().choice(POOL, self.repetitions, replace=False)
        difference = np.abs(z @ self._r[:, chosen] - x @ self._wr[:, chosen] - self._br[chosen]).max(axis=1)
        centred = z - z.mean(axis=1, keepdims=True) if self.up_to_constant else z
        return np.asarray(difference / np.maximum(np.linalg.norm(centred, axis=1), 1e-12))

    def exact(self, x: Float64, z: Float64) -> Float64:
        """(N,) the same residual by recomputing the layer, for rows that cannot be projected."""
        expected = x @ self.weight + self.bias
        return np.asarray(np.abs(z - expected).max(axis=1) / np.maximum(np.linalg.norm(expected, axis=1), 1e-12))

    def miss_bound(self, change: Float64, tolerance: float) -> Float64:
        """(N,) upper bound of the chance that an error of relative size `change` (N,), |e| / |z|, passes."""
        per_repetition = np.sqrt(2 / np.pi) * tolerance / np.maximum(change, np.finfo(np.float64).tiny)
        return np.asarray(np.minimum(per_repetition, 1.0) ** self.repetitions)


class Freivalds:
    """Options: `weights` (an .npz with weight and bias), `sha256`, `input`, `claimed`, `tolerance`, `repetitions`."""

    def __init__(self) -> None:
        self._check: LinearCheck | None = None
        self._input = self._claimed = ""
        self._tolerance = 1e-4
        self._temperature = 1.0
        self._warned = False

    @hookimpl
    def fides_configure(self, settings: Settings, bundle: Bundle | None) -> None:
        """Load the weights and make the secret projections."""
        options = settings.plugins.options.get(NAME, {})
        weight, bias = _load(str(options.get("weights", "")), str(options.get("sha256", "")))
        declared = bundle.manifest.input.name if bundle is not None and bundle.manifest.input is not None else ""
        self._input = str(options.get("input", settings.input or declared))
        self._claimed = str(options.get("claimed", ""))
        self._tolerance = float(options.get("tolerance", self._tolerance))
        if bundle is not None:
            self._temperature = bundle.manifest.service.temperature
            if not self._claimed and weight.shape[1] != bundle.n_classes:
                raise SettingsError(f"The weights of {NAME} give {weight.shape[1]} classes, not {bundle.n_classes}.")
        self._check = LinearCheck(weight, bias, int(options.get("repetitions", 2)), up_to_constant=not self._claimed)

    @hookimpl
    def fides_detect(self, query: Query, service: Prediction) -> Detection | None:
        """Attacked where the claimed output is not the layer's; None where the host gives no such tensors."""
        check = self._check
        if check is None or not query.n_rows:
            return None
        wanted = {self._input, self._claimed} - {""}
        if not wanted <= set(query.inputs):
            if not self._warned:
                self._warned = True
                logger.warning(
                    "the host hands over %s, not %s: nothing is checked", sorted(query.inputs), sorted(wanted)
                )
            return None
        x = _rows(query.inputs[self._input])
        if x.shape[1] != check.weight.shape[0]:
            raise InputError(f"{self._input!r} has {x.shape[1]} values a row; the layer takes {check.weight.shape[0]}.")
        with np.errstate(invalid="ignore", over="ignore"):
            if self._claimed:
                residual = check.residual(x, _rows(query.inputs[self._claimed]))
            else:
                residual = self._of_answer(check, x, service)
            # A claim that is no number is a lie; an input that is no number cannot be judged.
            residual = np.where(np.isfinite(residual), residual, np.finfo(np.float64).max)
            score = residual / (residual + self._tolerance)
        judged = service.valid & np.isfinite(x).all(axis=1)
        return Detection(np.minimum(score, 1.0), residual > self._tolerance, source=NAME, valid=judged)

    def _of_answer(self, check: LinearCheck, x: Float64, service: Prediction) -> Float64:
        probabilities = service.probabilities.astype(np.float64)
        z = np.log(np.maximum(probabilities, FLOOR)) * self._temperature
        residual = check.residual(x, z)
        # A probability of zero hides its logit; such rows are recomputed, so that zeros hide nothing.
        hidden = (probabilities < FLOOR).any(axis=1)
        if hidden.any():
            expected = x[hidden] @ check.weight + check.bias
            shifted = (expected - expected.max(axis=1, keepdims=True)) / self._temperature
            true = np.exp(shifted)
            true /= true.sum(axis=1, keepdims=True)
            residual[hidden] = np.abs(true - probabilities[hidden]).max(axis=1)
        return residual


def _rows(array: NDArray[np.generic]) -> Float64:
    return np.asarray(array, dtype=np.float64).reshape(len(array), -1)


def _load(path: str, sha256: str) -> tuple[Float64, Float64]:
    if not path:
        raise SettingsError(f"{NAME} has no weights.", "Set plugins.options.freivalds.weights to an .npz file.")
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise SettingsError(f"The weights of {NAME} cannot be read: {error.strerror}.") from None
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        raise SettingsError(f"The weights of {NAME} were changed: their SHA-256 is not the one in the settings.")
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            weight = np.asarray(archive["weight"], dtype=np.float64)
            bias = np.asarray(archive["bias"], dtype=np.float64) if "bias" in archive else np.zeros(weight.shape[-1])
    except (ValueError, KeyError, OSError) as error:
        raise SettingsError(f"The weights of {NAME} are no .npz with `weight` and `bias`: {error}.") from None
    if weight.ndim != 2 or bias.shape != (weight.shape[1],):
        raise SettingsError(
            f"{NAME}: weight {weight.shape} and bias {bias.shape} do not fit; expected (D, K) and (K,)."
        )
    return weight, bias
