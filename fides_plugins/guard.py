"""Call plug-ins so that none can hang, crash or silently pass.

Each plug-in is called alone, so that a failure is attributed to it. A call has a deadline; a plug-in
that fails several times in a row is left alone for a while (circuit breaker), so that a dead remote
verifier does not cost every request its whole time-out.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pluggy

from fides_plugins.errors import InputError, PluginError
from fides_plugins.settings import Settings
from fides_plugins.types import BoolArray

logger = logging.getLogger("fides_plugins")

FailureKind = Literal["raised", "timeout", "contract", "open", "busy", "input"]

#: Calls of one plug-in that may be under way at once; past that it is taken to hang.
MAX_CONCURRENT_CALLS = 16


@dataclass(frozen=True)
class Failure:
    """One plug-in's failure in one call. `text` is safe to show to a client: no path, no traceback.

    `rows`, (N,) bool, are those that it concerns; None is all of them.
    """

    plugin: str
    hook: str
    kind: FailureKind
    detail: str = ""
    rows: BoolArray | None = field(default=None, compare=False)

    @property
    def text(self) -> str:
        """One line for a verdict's reason."""
        what = {
            "raised": f"raised {self.detail}",
            "timeout": "gave no answer in time",
            "contract": f"broke the contract: {self.detail}",
            "open": "is left alone after repeated failures",
            "busy": "has too many calls under way",
            "input": f"refused the input: {self.detail}",
        }[self.kind]
        return f"plug-in {self.plugin!r} {what} in {self.hook}"


@dataclass(frozen=True, eq=False)
class PartialAnswer:
    """What a check returns for an answer that breaks the contract in `rows`, (N,) bool, and counts elsewhere."""

    answer: Any
    rows: BoolArray
    detail: str


class CircuitBreaker:
    """Opens after `breaker_failures` in a row, lets one call through again after `breaker_reset_s` seconds."""

    def __init__(self, settings: Settings) -> None:
        self._limit = settings.breaker_failures
        self._reset_s = settings.breaker_reset_s
        self._lock = threading.Lock()
        self._count = 0
        self._retry_at = 0.0

    def allows(self) -> bool:
        """Whether a call may be made now. While open, one caller per `reset_s` is let through to probe."""
        with self._lock:
            if self._count < self._limit:
                return True
            now = time.monotonic()
            if now < self._retry_at:
                return False
            self._retry_at = now + self._reset_s
            return True

    def succeeded(self) -> None:
        """Close the circuit."""
        with self._lock:
            self._count = 0

    def failed(self) -> None:
        """Count a failure; open the circuit when there were enough."""
        with self._lock:
            self._count += 1
            if self._count == self._limit:
                self._retry_at = time.monotonic() + self._reset_s


class _Workers:
    """Daemon threads that wait for the next call; one is started only when none is idle.

    Starting a thread costs a request about 0.1 ms, handing work to a waiting one a tenth of that. A plug-in
    that hangs for ever keeps its thread: it costs one of its own slots, and does not keep the process from
    ending, as a worker thread of `concurrent.futures` would.
    """

    def __init__(self) -> None:
        self._idle: queue.LifoQueue[queue.SimpleQueue[Callable[[], None]]] = queue.LifoQueue()

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work`, which must not raise, in a thread."""
        try:
            inbox = self._idle.get_nowait()
        except queue.Empty:
            inbox = queue.SimpleQueue()
            threading.Thread(target=self._serve, args=(inbox,), name="fides-plugin", daemon=True).start()
        inbox.put(work)

    def _serve(self, inbox: queue.SimpleQueue[Callable[[], None]]) -> None:
        while True:
            inbox.get()()
            self._idle.put(inbox)


class GuardedPlugin:
    """One plug-in's implementation of one hook."""

    def __init__(
        self, name: str, hook: str, call: Callable[..., Any], breaker: CircuitBreaker, workers: _Workers | None
    ) -> None:
        self.name = name
        self.hook = hook
        self.breaker = breaker
        self._workers = workers
        self._call = call
        self._slots = threading.BoundedSemaphore(MAX_CONCURRENT_CALLS)

    def start(
        self, arguments: Mapping[str, Any], done: queue.SimpleQueue[tuple[int, Any]], index: int
    ) -> Failure | None:
        """Begin a call whose outcome is put on `done` as (index, result or exception)."""
        if not self.breaker.allows():
            return Failure(self.name, self.hook, "open")
        if not self._slots.acquire(blocking=False):
            return Failure(self.name, self.hook, "busy")
        if self._workers is None:
            self._run(arguments, done, index)
        else:
            self._workers.submit(lambda: self._run(arguments, done, index))
        return None

    def _run(self, arguments: Mapping[str, Any], done: queue.SimpleQueue[tuple[int, Any]], index: int) -> None:
        try:
            done.put((index, self._call(**arguments)))
        except Exception as error:  # a plug-in may raise anything; it becomes a Failure of that plug-in
            done.put((index, error))
        finally:
            self._slots.release()


#: What came of one call: the checked answer, or None, and the failure of the call or of some of its rows.
_Outcome = tuple[Any, Failure | None]


class GuardedHook:
    """All implementations of one hook, in the order in which they are to be asked.

    Parameters
    ----------
    manager:
        The plug-in manager; implementations are taken from it now, later changes are not seen.
    hook:
        Name of the hook.
    check:
        Turns a raw result that is not None into the checked one, or into a `PartialAnswer`, raising
        `PluginError` or `InputError` if it breaks the contract.
    settings:
        When a plug-in is left alone, and for how long.
    errors:
        Counts failures by plug-in name.
    inline:
        Names of plug-ins called without a thread: built-ins whose time is bounded by arithmetic.
    """

    def __init__(
        self,
        manager: pluggy.PluginManager,
        hook: str,
        check: Callable[[Any, Mapping[str, Any]], Any],
        settings: Settings,
        errors: Counter[str],
        inline: frozenset[str] = frozenset(),
    ) -> None:
        self._hook = hook
        self._check = check
        self._errors = errors
        known = getattr(manager.hook, hook).get_hookimpls()
        implementations = [i for i in known if not (i.hookwrapper or i.wrapper)]
        plugins = [i.plugin for i in implementations]
        self.plugins: list[GuardedPlugin] = []
        workers = _Workers()
        for implementation in reversed(implementations):
            others = [p for p in plugins if p is not implementation.plugin]
            # One implementation with all wrappers around it, so that pluggy's rules hold for each call.
            caller = manager.subset_hook_caller(hook, remove_plugins=others)
            name = implementation.plugin_name
            breaker = CircuitBreaker(settings)
            self.plugins.append(GuardedPlugin(name, hook, _one(caller), breaker, None if name in inline else workers))

    def call_all(self, arguments: Mapping[str, Any], timeout_s: float) -> tuple[list[Any], list[Failure]]:
        """Ask every plug-in at once; checked answers that are not None, and failures, in plug-in order."""
        outcomes = self._call(self.plugins, arguments, timeout_s)
        answers = [answer for answer, _ in outcomes if answer is not None]
        return answers, [failure for _, failure in outcomes if failure is not None]

    def call_first(self, arguments: Mapping[str, Any], timeout_s: float) -> tuple[Any | None, list[Failure]]:
        """Ask one plug-in after the other until one answers, all within one deadline."""
        failures: list[Failure] = []
        deadline = time.monotonic() + timeout_s
        for plugin in self.plugins:
            ((answer, failure),) = self._call([plugin], arguments, max(0.0, deadline - time.monotonic()))
            if failure is not None:
                failures.append(failure)
            if answer is not None:
                return answer, failures
        return None, failures

    def _call(self, plugins: Sequence[GuardedPlugin], arguments: Mapping[str, Any], timeout_s: float) -> list[_Outcome]:
        done: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        outcomes: dict[int, _Outcome] = {}
        deadline = time.monotonic() + timeout_s
        for index, plugin in enumerate(plugins):
            failure = plugin.start(arguments, done, index)
            if failure is not None:
                outcomes[index] = None, failure
        while len(outcomes) < len(plugins):
            try:
                # An inline call is already done; `get` must return it even when no time is left.
                index, raw = done.get(timeout=max(1e-4, deadline - time.monotonic()))
            except queue.Empty:
                break
            outcomes[index] = self._outcome(plugins[index], raw, arguments)
        for index, plugin in enumerate(plugins):
            outcomes.setdefault(index, (None, Failure(plugin.name, self._hook, "timeout")))
            self._account(plugin, *outcomes[index])
        return [outcomes[i] for i in range(len(plugins))]

    def _outcome(self, plugin: GuardedPlugin, raw: Any, arguments: Mapping[str, Any]) -> _Outcome:
        if isinstance(raw, InputError):
            return None, Failure(plugin.name, self._hook, "input", str(raw))
        if isinstance(raw, BaseException):
            # The class name only: an exception's text may hold a path or a secret. The log has it all.
            logger.error("plug-in %r raised in %s", plugin.name, self._hook, exc_info=raw)
            return None, Failure(plugin.name, self._hook, "raised", type(raw).__name__)
        if raw is None:
            return None, None
        try:
            checked = self._check(raw, arguments)
        except (PluginError, InputError) as error:
            return None, self._broken(plugin, str(error))
        if isinstance(checked, PartialAnswer):
            return checked.answer, self._broken(plugin, checked.detail, checked.rows)
        return checked, None

    def _broken(self, plugin: GuardedPlugin, detail: str, rows: BoolArray | None = None) -> Failure:
        logger.error("plug-in %r broke the contract of %s: %s", plugin.name, self._hook, detail)
        return Failure(plugin.name, self._hook, "contract", detail, rows)

    def _account(self, plugin: GuardedPlugin, answer: Any, failure: Failure | None) -> None:
        if failure is not None:
            self._errors[plugin.name] += 1
        # A plug-in that answers for some rows works: one client's row must not cost all others their detector.
        if failure is None or answer is not None:
            plugin.breaker.succeeded()
        # A client's bad input says nothing about the plug-in's health, and a refused call is not a new failure.
        elif failure.kind in ("raised", "timeout", "contract"):
            plugin.breaker.failed()


def _one(caller: Any) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        results = caller(**arguments)
        return next((r for r in results if r is not None), None) if isinstance(results, list) else results

    return call
