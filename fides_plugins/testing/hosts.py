"""The contract of a host: whatever serves a model, the same answers get the same verdicts and the same corrections.

`host_cases()` are services, deployments and what clients send; `check_host` asks a host all of it and compares with a
`Protection` in this process. A host is deployed by its own means; only `Ask` has to be written for the test.

Example
-------
>>> for case in host_cases():                                                       # doctest: +SKIP
...     with my_host(case.service, case.bundle(), case.settings) as ask:
...         check_host(case, ask)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from fides_plugins.bundle import Bundle
from fides_plugins.hookspecs import hookimpl
from fides_plugins.protection import Protection
from fides_plugins.settings import Mode, Settings
from fides_plugins.testing.fakes import INPUT_NAME, fake_logits, memory_bundle, switch_top_two
from fides_plugins.types import Detection, Float32Array, OutputKind, Prediction, softmax

K = 10
#: The last logit of a row that the service lies about, and of one that it answers with NaN.
LIE, NOT_A_NUMBER = -7.5, -8.5
#: Names a plug-in that raises in `fides_detect`, and one whose p-values are zero: `plugins.load` takes them.
FAILING, ALWAYS_SURE = "fides_plugins.testing.hosts:Failing", "fides_plugins.testing.hosts:AlwaysSure"


@dataclass(frozen=True)
class Answered:
    """What a client got for one request of n rows.

    Attributes
    ----------
    status:
        n status texts; empty where the host shows none (mode `observe`).
    output:
        The class output, of whatever shape it came; None where the request was refused.
    """

    status: tuple[str, ...]
    output: NDArray[Any] | None


#: Sends inputs (n, K) float32 as one request.
Ask = Callable[[Float32Array], Answered]


@dataclass(frozen=True)
class HostCase:
    """A service and the settings that protect it."""

    settings: Settings
    kind: OutputKind = "logits"
    shape: tuple[int, ...] = (K,)
    dtype: str = "float32"
    temperature: float = 1.0

    @property
    def name(self) -> str:
        """Fit to be a model's name."""
        plugin = "_".join(p.rpartition(":")[2] for p in self.settings.plugins.load)
        axes = "x".join(map(str, self.shape))
        s = self.settings
        text = f"{s.mode}_{s.on_error}_{self.kind}_{axes}_{self.dtype}_t{self.temperature:g}_{plugin}"
        return text.rstrip("_").replace(".", "p")

    def service(self, inputs: Float32Array) -> NDArray[Any]:
        """The class output (n, *shape) that the service gives for inputs (n, K)."""
        rows = np.array(inputs)
        probabilities = switch_top_two(softmax(rows), np.flatnonzero(rows[:, -1] == LIE).tolist())
        values = probabilities if self.kind == "probabilities" else self.temperature * np.log(probabilities)
        values[rows[:, -1] == NOT_A_NUMBER] = np.nan
        return np.ascontiguousarray(values.astype(self.dtype).reshape(len(rows), *self.shape))

    def bundle(self) -> Bundle:
        """What protects the service; `testing.make_bundle` with the same arguments writes it to a folder."""
        return memory_bundle(**self.bundle_options())

    def bundle_options(self) -> dict[str, Any]:
        """Arguments of `memory_bundle` and `make_bundle`."""
        service = {"output_kind": self.kind, "temperature": self.temperature}
        return {"n_classes": K, "output_kind": self.kind, "service": service}


def host_cases() -> Iterator[HostCase]:
    """Every mode, both rules for errors, kinds, shapes, types, a temperature, and plug-ins that misbehave."""
    for mode, on_error in product(get_args(Mode), ("open", "closed")):
        yield HostCase(Settings(mode=mode, on_error=on_error))
    shapes: tuple[tuple[int, ...], ...] = ((K, 1, 1), (1, K))
    for kind, shape in product(get_args(OutputKind), shapes):
        yield HostCase(Settings(mode="correct"), kind, shape)
    yield HostCase(Settings(mode="correct"), temperature=2.0)
    yield HostCase(Settings(mode="correct"), dtype="float16")
    yield HostCase(Settings(mode="correct"), "probabilities", dtype="float64")
    for plugin in (FAILING, ALWAYS_SURE):
        yield HostCase(Settings.from_mapping({"mode": "reject", "on_error": "closed", "plugins": {"load": plugin}}))


def host_requests(one_row: bool = False) -> list[Float32Array]:
    """What clients send: honest rows, lies among them, rows that become NaN, no row at all.

    `one_row`: for a host whose requests have one row each.
    """
    rows = fake_logits(8, K, seed=6)
    rows[[1, 4], -1], rows[6, -1] = LIE, NOT_A_NUMBER
    if one_row:
        return [row[None] for row in rows]
    return [rows, rows[:1], rows[1:2], rows[6:7], rows[:0]]


def check_host(case: HostCase, ask: Ask, one_row: bool = False) -> None:
    """Ask a host everything, and compare.

    Raises
    ------
    AssertionError
        Naming the request and what differs from a protection in this process.
    """
    protection = Protection.load(case.settings, bundle=case.bundle(), concurrent=False)
    for index, rows in enumerate(host_requests(one_row)):
        query, output = protection.query({INPUT_NAME: rows}, len(rows)), case.service(rows)
        verdict = protection.judge(query, output, protection.verify(query))
        wanted, verdict = protection.correct(output, verdict)
        answered = ask(rows)
        where = f"{case.name}, request {index} of {len(rows)} row(s)"
        if verdict.refused.any():
            assert answered.output is None, f"{where}: an answer was handed out that policy refuses"
            continue
        assert answered.output is not None, f"{where}: a good answer was refused"
        if case.settings.mode != "observe":
            assert list(answered.status) == verdict.status_text.tolist(), f"{where}: {answered.status}"
        got = np.asarray(answered.output).reshape(wanted.shape)
        exact = got.dtype == wanted.dtype
        same = np.array_equal(got, wanted, equal_nan=True) if exact else np.allclose(got, wanted, equal_nan=True)
        assert same, f"{where}: {got} instead of {wanted}"
    protection.close()


class Failing:
    """A detector that raises."""

    @hookimpl
    def fides_detect(self, service: Prediction) -> Detection:
        raise RuntimeError("on purpose")


class AlwaysSure:
    """A detector whose p-values are zero, as a `Detection` may hold them."""

    @hookimpl
    def fides_detect(self, service: Prediction) -> Detection:
        n = service.n_rows
        return Detection(np.ones(n), np.ones(n, dtype=np.bool_), "always sure", p_value=np.zeros(n))
