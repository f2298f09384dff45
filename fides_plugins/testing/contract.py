"""`check_plugin`: run a plug-in against everything that `hookspecs.py` promises and demands.

The hooks are called directly, with one plug-in registered and without the pipeline's guard, so that
what the guard would turn into a status is reported here with its cause.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from fides_plugins.bundle import Bundle
from fides_plugins.errors import PluginError
from fides_plugins.manager import FidesPluginManager
from fides_plugins.policy import decide, make_verdict
from fides_plugins.settings import Settings
from fides_plugins.testing.fakes import fake_logits, fake_query, fake_service, memory_bundle, switch_top_two
from fides_plugins.types import Detection, Prediction, Query, Reclassification, Verification, softmax

#: Two classes, few, and as many as ImageNet has.
CLASS_COUNTS = (2, 10, 1000)
#: No row, one row, several rows.
BATCH_SIZES = (0, 1, 7)
#: What a hook may cost, milliseconds: the default time-out for the judging ones; an observer runs on the
#: request's own time and should only hand over.
TIME_LIMITS_MS: Mapping[str, float] = {
    "fides_verify": 1000.0,
    "fides_detect": 1000.0,
    "fides_reclassify": 1000.0,
    "fides_record": 100.0,
}
_RESULT_TYPES: Mapping[str, type[Verification | Detection | Reclassification]] = {
    "fides_verify": Verification,
    "fides_detect": Detection,
    "fides_reclassify": Reclassification,
}
_THREADS = 4

#: Makes a query of N rows for K classes: (n_rows, n_classes) -> Query.
QueryFactory = Callable[[int, int], Query]


@dataclass(frozen=True)
class CallTime:
    """One call: hook, N, K, whether it answered, milliseconds."""

    hook: str
    n_rows: int
    n_classes: int
    answered: bool
    milliseconds: float


@dataclass
class CheckReport:
    """What `check_plugin` found.

    Attributes
    ----------
    name:
        The plug-in's name.
    hooks:
        Hooks that it implements.
    problems:
        One sentence for each broken promise; empty when all is well.
    calls:
        Every timed call.
    notes:
        What a pass does not say: hooks that could have answered and never did.
    """

    name: str
    hooks: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)
    calls: list[CallTime] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.problems

    @property
    def notes(self) -> list[str]:
        """One sentence for each hook whose answers were never seen: allowed, and no proof that they are right."""
        notes = []
        for hook in self.hooks:
            answered = [c.answered for c in self.calls if c.hook == hook]
            if hook in _RESULT_TYPES and answered and not any(answered):
                notes.append(f"{hook}: {len(answered)} calls, no answer; nothing was checked by its answers.")
        return notes

    def slowest_ms(self, hook: str) -> float:
        """Milliseconds of the slowest timed call of `hook`; 0 if it was never called."""
        return max((c.milliseconds for c in self.calls if c.hook == hook), default=0.0)

    def add(self, text: str) -> None:
        """Note a problem, once."""
        if text not in self.problems:
            self.problems.append(text)


def check_plugin(
    plugin: Any,
    *,
    name: str = "",
    options: Mapping[str, Any] | None = None,
    class_counts: Sequence[int] = CLASS_COUNTS,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    make_query: QueryFactory | None = None,
    limits_ms: Mapping[str, float] | None = None,
    raises: bool = True,
) -> CheckReport:
    """Run a plug-in against the contract of its hooks.

    For every number of classes and of rows: results of the right type, row count, class count and
    range, or None; an empty batch; rows that the service or the verifier left invalid; no change to any
    argument; four calls at the same time; the time per call. `fides_configure` comes first and
    `fides_unconfigure` last, as in a server.

    Parameters
    ----------
    plugin:
        A class, an object or a module with hook implementations. A class is made anew for each number
        of classes; an object is configured again.
    name:
        The name under which it reads its options; by default its class's or module's name.
    options:
        Its options, as `settings.plugins.options[name]`.
    class_counts, batch_sizes:
        K and N to try. A plug-in for one model may name its own K.
    make_query:
        (n_rows, n_classes) -> Query, for plug-ins that need other inputs than the fake's.
    limits_ms:
        Milliseconds per call by hook, over `TIME_LIMITS_MS`. A call that takes longer is made once more.
    raises:
        Raise when there are problems; otherwise look at the report.

    Raises
    ------
    PluginError
        Listing every problem.
    """
    report = CheckReport(name or plugin_name(plugin))
    limits = {**TIME_LIMITS_MS, **(limits_ms or {})}
    make = make_query or (lambda n_rows, n_classes: fake_query(fake_logits(n_rows, n_classes)))
    for k in class_counts:
        bundle = memory_bundle(k, n_calibration=199)
        values = {"plugins": {"options": {report.name: dict(options or {})}}}
        manager = _start(plugin, report, Settings.from_mapping(values), bundle)
        if manager is None:
            break
        for n, sound in product(batch_sizes, (True, False)):
            for hook, arguments in _calls(make(n, k), k, sound) if sound or n > 1 else ():
                if hook in report.hooks:
                    _check_call(manager, hook, arguments, k, report, limits[hook])
        _check_threads(manager, k, make, report)
        _stop(manager, report)
    if raises and report.problems:
        raise PluginError(f"Plug-in {report.name!r} breaks its contract: " + " ".join(report.problems))
    return report


def _calls(query: Query, k: int, sound: bool = True) -> list[tuple[str, dict[str, Any]]]:
    """The hooks of a request with fresh arguments, of which every second row is a lie.

    Where it is not `sound`, some rows hold no answer of the service or of a verifier.
    """
    n = query.n_rows
    logits = fake_logits(n, k)
    lie = switch_top_two(fake_service(logits).probabilities, range(0, n, 2))
    valid, available = np.ones(n, np.bool_), np.ones((n, 2), np.bool_)
    if not sound:
        valid[0] = available[1] = available[-1, 0] = False
        lie[0] = 1.0 / k
    service = Prediction(lie, valid)
    verification = Verification(np.stack([softmax(logits)] * 2, axis=1), available, ("first", "second"))
    lies = np.arange(n) % 2 == 0
    detection = Detection(lies, lies, "combined", p_value=np.where(lies, 0.001, 0.5))
    settings = Settings(mode="correct")
    decision = decide(settings, service, verification, [detection], [])
    correction = Reclassification(verification.probabilities[decision.attacked], "reference")
    verdict = make_verdict(settings, service, verification, decision, correction)
    pair = {"query": query, "service": service, "verification": verification}
    calls: list[tuple[str, dict[str, Any]]] = [("fides_verify", {"query": query}), ("fides_detect", pair)]
    if n:  # the pipeline asks for a correction only where there is an attacked row
        calls.append(("fides_reclassify", {**pair, "detection": detection}))
    return [*calls, ("fides_record", {"query": query, "verdict": verdict})]


def plugin_name(plugin: Any) -> str:
    """The name of a plug-in that was given none: its class's or its module's."""
    name = getattr(plugin, "__name__", "") or type(plugin).__name__
    return str(name).rpartition(".")[2]


def _start(plugin: Any, report: CheckReport, settings: Settings, bundle: Bundle) -> FidesPluginManager | None:
    manager = FidesPluginManager()
    try:
        manager.add_plugin(plugin, report.name, "check_plugin")
    except PluginError as error:
        report.add(str(error))
        return None
    report.hooks = manager.report.plugins[0].hooks
    try:
        manager.hook.fides_configure(settings=settings, bundle=bundle)
    except Exception as error:  # foreign code may raise anything; it is what the report is for
        report.add(f"fides_configure raised {_text(error)}.")
        return None
    return manager


def _stop(manager: FidesPluginManager, report: CheckReport) -> None:
    try:
        manager.hook.fides_unconfigure()
    except Exception as error:  # as above
        report.add(f"fides_unconfigure raised {_text(error)}.")


def _check_call(
    manager: FidesPluginManager,
    hook: str,
    arguments: Mapping[str, Any],
    k: int,
    report: CheckReport,
    limit_ms: float,
) -> None:
    query: Query = arguments["query"]
    where = f"{hook} with N={query.n_rows}, K={k}"
    before = {name: _digest(value) for name, value in arguments.items()}
    for _ in range(2):
        # Other work on the machine can hold up one call; a slow plug-in is slow twice.
        start = time.perf_counter()
        try:
            results = getattr(manager.hook, hook)(**arguments)
        except Exception as error:  # as above
            hint = " (arguments are read-only: copy before you write)" if "read-only" in str(error) else ""
            report.add(f"{where} raised {_text(error)}{hint}.")
            return
        finally:
            for argument, value in arguments.items():
                if _digest(value) != before[argument]:
                    report.add(f"{where} changed its argument `{argument}`.")
        spent = (time.perf_counter() - start) * 1000.0
        if spent <= limit_ms:
            break
    report.calls.append(CallTime(hook, query.n_rows, k, bool(results), spent))
    if spent > limit_ms:
        report.add(f"{where} took {spent:.0f} ms; at most {limit_ms:.0f} ms are allowed.")
    if hook in _RESULT_TYPES:
        for result in results:
            problem = _result_problem(hook, result, query.n_rows, k)
            if problem:
                report.add(f"{where} {problem}.")


def _result_problem(hook: str, result: Any, n: int, k: int) -> str:
    wanted = _RESULT_TYPES[hook]
    if not isinstance(result, wanted):
        return f"returned {type(result).__name__}; expected {wanted.__name__} or None"
    if result.n_rows != n:
        return f"returned {result.n_rows} rows"
    if not isinstance(result, Detection):
        classes = result.probabilities.shape[1]
        return f"returned {classes} classes" if classes != k else ""
    if result.unscored.any():
        return (
            f"gave {int(result.unscored.sum())} row(s) a score that is not a finite number; "
            "say `valid=False` where there is no opinion"
        )
    return ""


def _check_threads(manager: FidesPluginManager, k: int, make_query: QueryFactory, report: CheckReport) -> None:
    """Several requests at once, as a server has them: nothing may raise that did not raise alone."""
    if report.problems:
        return
    requests = [_calls(make_query(5, k), k) for _ in range(_THREADS)]

    def run(calls: list[tuple[str, dict[str, Any]]]) -> None:
        for hook, arguments in calls:
            if hook in report.hooks:
                getattr(manager.hook, hook)(**arguments)

    with ThreadPoolExecutor(_THREADS) as pool:
        for outcome in [pool.submit(run, calls) for calls in requests]:
            error = outcome.exception()
            if error is not None:
                report.add(f"Called from {_THREADS} threads at once (K={k}), it raised {_text(error)}.")


def _digest(value: Any) -> str:
    """SHA-256 over every array and field of an argument."""
    state = hashlib.sha256()
    for name in sorted(vars(value)):
        content = getattr(value, name)
        state.update(name.encode())
        arrays = content.items() if isinstance(content, Mapping) else [("", content)]
        for key, item in arrays:
            state.update(str(key).encode())
            state.update(item.tobytes() if isinstance(item, np.ndarray) else repr(item).encode())
    return state.hexdigest()


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
