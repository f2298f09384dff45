"""verify -> detect -> policy -> reclassify -> record, on one batch.

Hosts reach it through a `Protection`, which adds reading, writing and metrics; the batch run and `fides
attach triton` use it directly. `verify` and `validate` are two calls because the service answers in between:
on Triton they run in two processes, and the second rebuilds the outcome of the first. `run` is both.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fides_plugins.bundle import Bundle
from fides_plugins.errors import PluginError, SettingsError
from fides_plugins.guard import Failure, GuardedHook, PartialAnswer
from fides_plugins.manager import FidesPluginManager, create_plugin_manager
from fides_plugins.policy import decide, failed_verdict, make_verdict
from fides_plugins.settings import Settings
from fides_plugins.types import Detection, Prediction, Query, Reclassification, Rows, Verdict, Verification

logger = logging.getLogger("fides_plugins")

#: Called with the name of a stage (verify, detect, reclassify, record) and the seconds it took.
StageObserver = Callable[[str, float], None]


@dataclass(frozen=True)
class VerifyOutcome:
    """What `Pipeline.verify` found: the joined references, or None, and who failed."""

    verification: Verification | None
    failures: tuple[Failure, ...] = ()

    def rows(self, index: Rows) -> VerifyOutcome:
        """The outcome for some of the rows."""
        failures = tuple(f if f.rows is None else replace(f, rows=f.rows[index]) for f in self.failures)
        return VerifyOutcome(None if self.verification is None else self.verification.rows(index), failures)


class Pipeline:
    """Everything between a service's answer and a verdict.

    Parameters
    ----------
    settings, bundle, manager:
        As loaded; `from_settings` does all of it.

    Attributes
    ----------
    plugin_errors:
        Failures by plug-in name since start.
    on_stage:
        Optional observer of stage times.
    """

    def __init__(self, settings: Settings, bundle: Bundle | None, manager: FidesPluginManager) -> None:
        self.settings = settings
        self.bundle = bundle
        self.manager = manager
        self.plugin_errors: Counter[str] = Counter()
        self.on_stage: StageObserver | None = None
        self._timeout_s = settings.timeout_ms / 1000.0
        self._verify = self._hook("fides_verify", _check_verification)
        self._detect = self._hook("fides_detect", _check_detection)
        self._reclassify = self._hook("fides_reclassify", _check_reclassification)
        self._record = self._hook("fides_record", lambda raw, arguments: None)

    @classmethod
    def from_settings(
        cls, settings: Settings, base: str | Path = ".", extra: Mapping[str, Any] | None = None
    ) -> Pipeline:
        """Load the bundle and the plug-ins.

        Parameters
        ----------
        base:
            Folder that a relative `settings.bundle` starts from.
        extra:
            More plug-ins, by name.

        Raises
        ------
        FidesError
            If the bundle or a needed plug-in cannot be loaded.
        """
        if not settings.bundle:
            raise SettingsError("No bundle is set.", "Set `bundle` to the folder that `fides fit` wrote.")
        bundle = Bundle.load(Path(base) / settings.bundle)
        return cls(settings, bundle, create_plugin_manager(settings, bundle, extra))

    @property
    def n_classes(self) -> int:
        """K of the bundle; 0 without one."""
        return 0 if self.bundle is None else self.bundle.n_classes

    def verify(self, query: Query) -> VerifyOutcome:
        """Ask all verifiers at once, within the time-out. Never raises for what a plug-in does."""
        results, failures = self._timed("verify", self._verify.call_all, {"query": query})
        widths = {r.n_classes for r in results} | ({self.n_classes} if self.bundle is not None else set())
        if len(widths) > 1:
            failures.append(
                Failure("verification", "fides_verify", "contract", f"class counts differ: {sorted(widths)}")
            )
            results = [r for r in results if r.n_classes == self.n_classes]
        return VerifyOutcome(Verification.join(results) if results else None, tuple(failures))

    def validate(self, query: Query, service: Prediction, outcome: VerifyOutcome, *, record: bool = True) -> Verdict:
        """Judge the service's answer with a verification outcome, and record the verdict.

        Never raises for what a plug-in or the service does: what cannot be judged is `indeterminate`
        or `error` in the verdict. `record=False`: the caller shows the verdict, or keeps it to itself.
        """
        problem = self._mismatch(query, service, outcome)
        if problem:
            verdict = failed_verdict(self.settings, service.n_rows, service.n_classes, problem)
            return self.record(query, verdict) if record else verdict
        verification, failures = outcome.verification, list(outcome.failures)
        detections: list[Detection] = []
        if verification is not None and service.n_rows:
            arguments = {"query": query, "service": service, "verification": verification}
            detections, failed = self._timed("detect", self._detect.call_all, arguments)
            failures += failed
        decision = decide(self.settings, service, verification, detections, failures)
        correction: Reclassification | None = None
        attacked = decision.attacked
        if verification is not None and attacked.any():
            arguments = {
                "query": query.rows(attacked),
                "service": service.rows(attacked),
                "verification": verification.rows(attacked),
                "detection": decision.detection.rows(attacked),
            }
            # A failure here cannot undo the alarm: the rows stay attacked, and it is counted and logged.
            correction, _ = self._timed("reclassify", self._reclassify.call_first, arguments)
        verdict = make_verdict(self.settings, service, verification, decision, correction)
        return self.record(query, verdict) if record else verdict

    def run(self, query: Query, service: Prediction) -> Verdict:
        """`verify` and `validate` in one call."""
        return self.validate(query, service, self.verify(query))

    def record(self, query: Query, verdict: Verdict) -> Verdict:
        """Show the observers a verdict, and give it back."""
        if verdict.n_rows and self._record.plugins:
            self._timed("record", self._record.call_all, {"query": query, "verdict": verdict})
        return verdict

    def close(self) -> None:
        """Tell the plug-ins that the host stops."""
        for implementation in self.manager.hook.fides_unconfigure.get_hookimpls():
            try:
                implementation.function()
            except Exception:  # foreign code at shutdown: nothing depends on it any more
                logger.exception("plug-in %r failed in fides_unconfigure", implementation.plugin_name)

    def _mismatch(self, query: Query, service: Prediction, outcome: VerifyOutcome) -> str:
        if self.bundle is not None and service.n_classes != self.n_classes:
            return f"the service answered with {service.n_classes} classes, the bundle has {self.n_classes}"
        if service.n_rows != query.n_rows:
            return f"the service answered {service.n_rows} rows for {query.n_rows} inputs"
        verification = outcome.verification
        if verification is not None and (verification.n_rows, verification.n_classes) != (
            service.n_rows,
            service.n_classes,
        ):
            return (
                f"the reference has {verification.n_rows} rows of {verification.n_classes} classes, "
                f"the service {service.n_rows} of {service.n_classes}"
            )
        return ""

    def _hook(self, name: str, check: Callable[[Any, Mapping[str, Any]], Any]) -> GuardedHook:
        return GuardedHook(self.manager, name, check, self.settings, self.plugin_errors, self.manager.inline_plugins)

    def _timed(self, stage: str, call: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        start = time.perf_counter()
        try:
            return call(arguments, self._timeout_s)
        finally:
            if self.on_stage is not None:
                self.on_stage(stage, time.perf_counter() - start)


def _expect(
    kind: type[Verification | Detection | Reclassification], argument: str
) -> Callable[[Any, Mapping[str, Any]], Any]:
    """A check that an answer is a `kind` with as many rows as the hook's `argument`."""

    def check(raw: Any, arguments: Mapping[str, Any]) -> Any:
        if not isinstance(raw, kind):
            raise PluginError(f"it returned {type(raw).__name__}, not {kind.__name__}")
        if raw.n_rows != arguments[argument].n_rows:
            raise PluginError(f"it returned {raw.n_rows} rows for {arguments[argument].n_rows}")
        return raw

    return check


_check_verification = _expect(Verification, "query")


def _check_detection(raw: Any, arguments: Mapping[str, Any]) -> Detection | PartialAnswer:
    """Rows that a detector judged without a score fail, and those alone; with no other row, it has failed."""
    detection: Detection = _expect(Detection, "service")(raw, arguments)
    if not detection.unscored.any():
        return detection
    detail = "it gave a score that is not a finite number"
    if detection.unscored.all():
        raise PluginError(detail)
    return PartialAnswer(detection, detection.unscored, detail)


def _check_reclassification(raw: Any, arguments: Mapping[str, Any]) -> Reclassification:
    correction: Reclassification = _expect(Reclassification, "service")(raw, arguments)
    expected = arguments["service"].probabilities.shape
    if correction.probabilities.shape != expected:
        raise PluginError(f"it returned shape {correction.probabilities.shape}, expected {expected}")
    return correction
