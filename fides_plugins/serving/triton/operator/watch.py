"""Keep protected models protected: find dead steps by real inferences, and bring them back.

A killed process of Triton's python backend is not restarted; the server goes on saying "ready", and
every request through the step fails after a second. `Watcher` notices within its probe's time-out. In
explicit mode it then
1. puts the fallback in the place of verification, so that requests are answered at once by policy
   (`on_error: open`: the service's answer, marked `error`; `closed`: refused),
2. restarts the dead step (a load with a changed parameter: a plain load would do nothing),
3. probes it, and puts full protection back.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import KW_ONLY, dataclass
from typing import Any

from numpy.typing import NDArray

from fides_plugins.errors import ServerError
from fides_plugins.serving.triton import wire
from fides_plugins.serving.triton.operator.alarm import alarm_findings
from fides_plugins.serving.triton.operator.api import NotExplicit, Statistics, TritonApi, UnknownModel, Unreachable
from fides_plugins.serving.triton.operator.probe import (
    InferenceProbe,
    Protected,
    as_probe,
    find_protected,
    probe,
    sample_inputs,
    sample_references,
    steps_of,
)

#: Time-out of the probe right after a load: the first inference of a process is slow.
FIRST_PROBE_S = 5.0
#: Failures of a step this soon after its reload are those of its predecessor.
FORGIVEN_S = 5.0
#: Longest time-out that a slow step's own compute time can lead to.
LONGEST_PROBE_S = 10.0
#: A step that is still dead after its reload is tried again after this time, which doubles each time.
FIRST_RETRY_S = 1.0
LAST_RETRY_S = 60.0


@dataclass(frozen=True)
class Event:
    """Something that the watcher saw or did.

    Attributes
    ----------
    kind:
        settled, dead, degraded, reloaded, restored, failed, unreachable or unprotected; alarm or alarm_unknown.
    model:
        The step or ensemble it happened to, or the service whose alarm it is.
    seconds:
        How long it took.
    """

    kind: str
    model: str
    seconds: float = 0.0
    detail: str = ""


@dataclass
class _Retry:
    wait_s: float = FIRST_RETRY_S
    not_before: float = 0.0


@dataclass(eq=False)
class Watcher:
    """Probes every protected model of one server.

    Attributes
    ----------
    model:
        Watch only this one; all by default.
    timeout_s:
        Time-out of one probe, seconds, or four times the step's mean compute time where that is longer. A
        step that gives no answer in this time and finishes no other request meanwhile is taken for dead;
        one that is only busy is left alone.
    heal:
        False only looks, for liveness checks.
    inputs:
        Real values by input name for probes, instead of generated ones.
    report:
        Called with every event.
    """

    api: TritonApi
    _: KW_ONLY
    model: str = ""
    timeout_s: float = 0.5
    heal: bool = True
    inputs: Mapping[str, NDArray[Any]] | None = None
    report: Callable[[Event], None] = lambda event: None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.forget()

    def look(self) -> bool:
        """Probe everything once, healing what is dead; True if all is protected at the end.

        Raises
        ------
        ServerError
            If the server cannot be reached, or nothing on it is protected.
        """
        models = find_protected(self.api, self.model)
        if not models:
            raise ServerError("The server has no protected model.", "Attach one with `fides attach triton`.")
        groups: dict[tuple[str, str], list[Protected]] = {}
        for item in models:
            groups.setdefault((item.verify, item.validate), []).append(item)
        sound = True
        for group in groups.values():
            sound = self._look_at(group) and sound
        return sound

    def report_alarms(self) -> bool:
        """Report every service alarm that is raised or cannot be seen; True if one is raised.

        Not a part of `look`: a dead step is brought back by a restart, which would only withdraw an alarm.
        """
        findings = alarm_findings(self.api, find_protected(self.api, self.model))
        for label, found in findings.items():
            if not found.good:
                kind = "alarm_unknown" if found.good is None else "alarm"
                self.report(Event(kind, label, 0.0, f"{found.detail} {found.remedy}"))
        return any(found.good is False for found in findings.values())

    def forget(self) -> None:
        """Drop what was learned about the server: it may come back as another one."""
        self._configs: dict[str, dict[str, Any]] = {}
        self._seen: dict[str, Statistics] = {}
        self._settled: set[str] = set()
        self._reloaded_at: dict[str, float] = {}
        self._retries: defaultdict[str, _Retry] = defaultdict(_Retry)

    def _look_at(self, group: list[Protected], patience_s: float = 0.0) -> bool:
        if self.heal:
            self._settle(group)
        dead = [] if self._base_sound(group[0].base) else [group[0].base]
        for look in (self._probe_verify, self._probe_validate):
            result = look(group[0], patience_s)
            if result.alive:
                continue
            self.report(Event("dead", result.model, result.seconds, result.detail))
            dead.append(result.model)
            if self.heal and self._retries[result.model].not_before <= self.clock():
                # At once, before looking further: every second counts for the requests that come in.
                self._degrade(group)
        if not self.heal:
            return not dead and not any(item.degraded for item in group)
        if not dead:
            return self._restore(group)
        reloaded = [self._reload(model) for model in dead]
        if not all(reloaded):
            return False
        return self._look_at([found for item in group for found in find_protected(self.api, item.name)], FIRST_PROBE_S)

    def _settle(self, group: list[Protected]) -> None:
        """Load the fallback and each ensemble once as they are, before anything is wrong.

        Loading an ensemble makes Triton look at the files of its steps and reload those that changed since the
        start; the caches that Python writes beside a model.py count as a change. That may take seconds. Done now,
        it delays no request, because the old instances go on serving.
        """
        for item in group:
            if item.name not in self._settled and not item.degraded:
                self._settled.add(item.name)
                if item.fallback and item.fallback not in self._settled:
                    self._settled.add(item.fallback)
                    self._load("settled", item.fallback)
                self._load("settled", item.name, item.config)

    def _base_sound(self, base: str) -> bool:
        """Whether the service model works; asked only when its requests fail, because it may be expensive."""
        now = self.api.statistics(base)
        before = self._seen.get(base, now)
        self._seen[base] = now
        if now.failed == before.failed or now.succeeded > before.succeeded:
            return True
        result = probe(self.api, base, sample_inputs(self._config(base), self.inputs), FIRST_PROBE_S)
        if result.alive or "not healthy" not in result.detail:
            # It may refuse this input for reasons of its own; only a dead process is ours to restart.
            return True
        self.report(Event("dead", base, result.seconds, result.detail))
        return False

    def _probe_verify(self, item: Protected, patience_s: float) -> InferenceProbe:
        inputs = sample_inputs(self._config(item.verify), self.inputs)
        result = self._probe(item.verify, inputs, patience_s)
        failing = self._failing(item.verify)
        if result.alive and failing:
            return InferenceProbe(item.verify, False, result.seconds, detail=f"{failing} request(s) failed")
        return result

    def _probe_validate(self, item: Protected, patience_s: float) -> InferenceProbe:
        config = self._config(item.validate)
        own = {**config, "input": [e for e in config["input"] if e["name"] not in wire.INTERNAL]}
        inputs = {**sample_inputs(own, self.inputs), **as_probe(sample_references(config))}
        return self._probe(item.validate, inputs, patience_s)

    def _config(self, model: str) -> dict[str, Any]:
        if model not in self._configs:
            self._configs[model] = self.api.config(model)
        return self._configs[model]

    def _probe(self, model: str, inputs: Mapping[str, NDArray[Any]], patience_s: float) -> InferenceProbe:
        before = self.api.statistics(model)
        timeout_s = max(self.timeout_s, patience_s, min(4 * before.mean_seconds, LONGEST_PROBE_S))
        result = probe(self.api, model, inputs, timeout_s)
        if result.timed_out and self.api.statistics(model).succeeded > before.succeeded:
            # It finishes other requests: a long queue, not a dead process.
            return InferenceProbe(model, True, result.seconds, True, "busy")
        return result

    def _failing(self, model: str) -> int:
        """Requests of `fides_verify` that failed since the last look; by itself it never fails one.

        With several instances one may be dead while probes meet another. Requests that were inside a
        process when it died fail a little after it was replaced, and are not held against the new one.
        """
        now = self.api.statistics(model)
        before = self._seen.get(model, now)
        self._seen[model] = now
        recent = self.clock() - self._reloaded_at.get(model, float("-inf")) < FORGIVEN_S
        return 0 if recent else max(0, now.failed - before.failed)

    def _reload(self, model: str) -> bool:
        retry = self._retries[model]
        if retry.not_before > self.clock():
            return False
        retry.not_before = self.clock() + retry.wait_s
        retry.wait_s = min(2 * retry.wait_s, LAST_RETRY_S)
        if not self._do("reloaded", model, lambda: self.api.reload(model)):
            return False
        self._reloaded_at[model] = self.clock()
        return True

    def _degrade(self, group: list[Protected]) -> None:
        for item in group:
            if item.fallback and not item.degraded:
                self._load("degraded", item.name, degraded_config(item))

    def _restore(self, group: list[Protected]) -> bool:
        for item in group:
            for step in (item.verify, item.validate):
                self._retries.pop(step, None)
            if item.degraded:
                config = full_config(item, self._config(item.verify), self._config(item.validate))
                if not self._load("restored", item.name, config):
                    return False
        return True

    def _load(self, kind: str, model: str, config: Mapping[str, Any] | None = None) -> bool:
        return self._do(kind, model, lambda: self.api.load(model, config))

    def _do(self, kind: str, model: str, action: Callable[[], None]) -> bool:
        """Report how `action` went; False where the server refused it. `NotExplicit` is raised: nothing can be done."""
        start = self.clock()
        try:
            action()
        except NotExplicit:
            raise
        except ServerError as error:
            self.report(Event("failed", model, self.clock() - start, str(error)))
            return False
        self.report(Event(kind, model, self.clock() - start))
        return True


def degraded_config(item: Protected) -> dict[str, Any]:
    """The ensemble's configuration with the fallback in the place of verification and validation."""
    config = deepcopy(dict(item.config))
    steps = []
    for step in steps_of(config):
        if step["model_name"] == item.verify:
            continue
        if step["model_name"] == item.validate:
            inputs = {k: v for k, v in step["input_map"].items() if k not in wire.INTERNAL}
            step = {**step, "model_name": item.fallback, "input_map": inputs}
        steps.append(step)
    config["ensemble_scheduling"]["step"] = steps
    return config


def full_config(item: Protected, verify: Mapping[str, Any], validate: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of full protection, from the degraded one and the configurations of both steps."""
    config = deepcopy(dict(item.config))
    between = {name: name for name in wire.INTERNAL}
    wanted = {str(e["name"]) for e in verify["input"]}
    steps: list[dict[str, Any]] = []
    for step in steps_of(config):
        if step["model_name"] == item.base:
            inputs = {k: v for k, v in step["input_map"].items() if k in wanted}
            # In the order of attach, which keeps an error of the service from ending the server.
            steps.append({"model_name": item.verify, "model_version": 1, "input_map": inputs, "output_map": between})
            steps.append(step)
        else:
            steps.append({**step, "model_name": item.validate, "input_map": {**step["input_map"], **between}})
    config["ensemble_scheduling"]["step"] = steps
    return config


def watch_forever(watcher: Watcher, interval_s: float, stop: threading.Event | None = None) -> None:
    """Look again and again until `stop` is set. What keeps it from looking is reported once, until it changes.

    Raises
    ------
    NotExplicit
        If the server does not run in explicit mode: nothing can be healed there.
    UnknownModel
        If the server never had the model; one that was watched may come back.
    """
    stopped = stop or threading.Event()
    reported, watched = "", False
    while not stopped.is_set():
        try:
            watcher.look()
            reported, watched = "", True
        except (OSError, ServerError) as error:
            if isinstance(error, NotExplicit) or (isinstance(error, UnknownModel) and not watched):
                raise
            kind = "unreachable" if isinstance(error, (OSError, Unreachable)) else "unprotected"
            if kind != reported:
                watcher.report(Event(kind, "", 0.0, str(error)))
            reported = kind
            watcher.forget()
        stopped.wait(interval_s)
