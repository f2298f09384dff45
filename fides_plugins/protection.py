"""What protects one served model, whatever serves it: settings, bundle, plug-ins, codec, metrics, and every judgement.

A host is a reader and a writer around a `Protection`. It makes a `Query` of what was asked, starts `begin` (or calls
`verify_many`) beside the service model, and hands the service's class output to `judge` or `judge_many`. `correct`
then gives what to hand out, and `verdict.refused` says what not to. None of these raises for what a client, a plug-in
or the service does: what cannot be judged is `error` or `indeterminate` in the verdict, and the settings decide what
that means.

Example
-------
>>> protection = Protection.load(Settings(bundle="bundle"), host="mine")            # doctest: +SKIP
>>> query = protection.query({"image": rows}, len(rows))                            # doctest: +SKIP
>>> outcome = protection.begin(query)                                               # doctest: +SKIP
>>> output = service(rows)                                                          # doctest: +SKIP
>>> verdict = protection.judge(query, output, outcome())                            # doctest: +SKIP
>>> output, verdict = protection.correct(output, verdict)                           # doctest: +SKIP
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fides_plugins.bundle import Bundle
from fides_plugins.codec import OutputCodec
from fides_plugins.errors import BundleError, FidesError, InputError, SettingsError
from fides_plugins.guard import Failure
from fides_plugins.manager import create_plugin_manager
from fides_plugins.observation.metrics import MetricsBackend, MetricsRecorder
from fides_plugins.pipeline import Pipeline, VerifyOutcome
from fides_plugins.policy import exempt_verdict, failed_verdict, refused_verdict, without_corrections
from fides_plugins.settings import Settings
from fides_plugins.types import ROWS_ONLY, Prediction, Query, SignedRows, Verdict, Verification

logger = logging.getLogger("fides_plugins")

References = Literal["local", "brought"]
OnBadBundle = Literal["raise", "error"]

INTERNAL = "internal error of the protection; the server's log has it"
#: Built-ins that make references themselves; a host that is brought its references runs none of them.
_VERIFIERS = ("verifier", "remote")
#: A server may have several batches under way; more verifications than this wait for each other.
_THREADS = 4
#: Failures that one request's rows may have caused for the others of a merged call.
_ROW_CAUSED = ("raised", "contract", "input")


@dataclass(frozen=True, eq=False)
class Claim:
    """What a service answered to one request, among several that are judged together.

    Attributes
    ----------
    query, output, outcome:
        As for `Protection.judge`.
    probe:
        A host's own health probe: judged, and shown to no observer.
    """

    query: Query
    output: NDArray[Any]
    outcome: VerifyOutcome
    probe: bool = False


class Protection:
    """Everything between a host and its verdicts. Make one with `load`; several threads may use it at once.

    Attributes
    ----------
    settings, model_name:
        As loaded; the name that records and metrics carry.
    output:
        Reads and writes the service's class output.
    bundle:
        The loaded bundle; None where it could not be used.
    problem:
        Why every row is `error`; empty where the bundle is sound.
    """

    def __init__(
        self,
        settings: Settings,
        pipeline: Pipeline | None,
        recorder: MetricsRecorder | None = None,
        *,
        host: str = "",
        model_name: str = "",
        concurrent: bool = True,
        problem: str = "",
    ) -> None:
        self.settings = settings
        self.model_name = model_name
        self.problem = problem
        self.bundle = pipeline.bundle if pipeline is not None else None
        spec = self.bundle.manifest.service.codec if self.bundle is not None else OutputCodec()
        self.output = OutputCodec(settings.output_kind or spec.kind, spec.temperature)
        self._pipeline = pipeline
        self._recorder = recorder
        self._metadata = {"server": host} if host else {}
        if pipeline is not None and recorder is not None:
            recorder.attach(pipeline)
        parallel = concurrent and len(os.sched_getaffinity(0)) > 1
        self._threads = ThreadPoolExecutor(_THREADS, "fides-verify") if parallel else None

    @classmethod
    def load(
        cls,
        settings: Settings,
        base: str | Path = ".",
        *,
        host: str = "",
        model_name: str = "",
        bundle: Bundle | None = None,
        plugins: Mapping[str, Any] | None = None,
        metrics: MetricsBackend | None = None,
        alarm: bool = True,
        references: References = "local",
        on_bad_bundle: OnBadBundle = "raise",
        concurrent: bool = True,
    ) -> Protection:
        """Load bundle and plug-ins.

        Parameters
        ----------
        base:
            Folder that a relative `settings.bundle` starts from.
        host, model_name:
            Kind of server, for plug-ins, and the name under which it serves the model, unless the settings have one.
        bundle:
            One that is loaded already, instead of `settings.bundle`.
        plugins:
            More plug-ins, by name, besides those that the settings name.
        metrics, alarm:
            Where metrics go (None: nowhere), and whether they follow the sequence of verdicts with the service alarm.
        references:
            "local": plug-ins make them. "brought": the caller hands them to `judge`, so it never calls `verify`, and
            the built-in verifiers are not loaded.
        on_bad_bundle:
            "raise", or "error": a bundle that is missing or was changed does not stop the server, and every row
            is `error`. Wrong settings and plug-ins that cannot be loaded raise either way.
        concurrent:
            Let `begin` verify in a thread where there is more than one core.

        Raises
        ------
        FidesError
            If the bundle (see `on_bad_bundle`) or a needed plug-in cannot be loaded, or settings contradict the bundle.
        """
        if references == "brought":
            kept = settings.plugins.model_copy(update={"blocked": (*settings.plugins.blocked, *_VERIFIERS)})
            settings = settings.model_copy(update={"plugins": kept})
        name = settings.service_name or model_name
        recorder = MetricsRecorder(metrics, name, alarm) if metrics is not None else None
        pipeline, problem = None, ""
        try:
            if bundle is None and not settings.bundle:
                raise SettingsError("No bundle is set.", "Set `bundle` to the folder that `fides fit` wrote.")
            loaded = bundle or Bundle.load(Path(base) / settings.bundle)
            pipeline = Pipeline(settings, loaded, create_plugin_manager(settings, loaded, plugins))
        except BundleError as error:
            if on_bad_bundle == "raise":
                raise
            problem = error.cause_text
            logger.critical("The protection of %r is down: %s", name, error)
        return cls(settings, pipeline, recorder, host=host, model_name=name, concurrent=concurrent, problem=problem)

    @property
    def class_names(self) -> tuple[str, ...]:
        """K class names by label; empty without a bundle."""
        return () if self.bundle is None else self.bundle.class_names

    @property
    def input_name(self) -> str:
        """Name of the tensor that the verification model takes; empty where neither settings nor bundle say it."""
        declared = self.bundle.manifest.input if self.bundle is not None else None
        return self.settings.input or (declared.name if declared is not None else "")

    def query(
        self,
        inputs: Mapping[str, NDArray[Any]],
        n_rows: int,
        request_ids: Sequence[str] = (),
        signed: Sequence[SignedRows] = (),
    ) -> Query:
        """A query of those tensors that have one entry per row; without inputs where none has.

        Ids and signed requests are left out where they do not cover the rows.
        """
        rows = {name: a for name, a in inputs.items() if a.ndim and len(a) == n_rows}
        ids = tuple(request_ids) if len(request_ids) == n_rows else ()
        parts = tuple(signed) if sum(p.n_rows for p in signed) == n_rows else ()
        if not rows:
            rows, parts = {ROWS_ONLY: np.empty((n_rows, 0), dtype=np.float32)}, ()
        return Query(rows, ids, self.model_name, self._metadata, parts)

    def verify(self, query: Query) -> VerifyOutcome:
        """Ask all verifiers; see `begin` for a host that has something to do meanwhile."""
        if self._pipeline is None or not query.n_rows:
            return VerifyOutcome(None)
        try:
            return self._pipeline.verify(query)
        except Exception as error:
            logger.exception("verification failed")
            return VerifyOutcome(None, (Failure("protection", "fides_verify", "raised", type(error).__name__),))

    def begin(self, query: Query) -> Callable[[], VerifyOutcome]:
        """Start the verification; call the result once the service has answered."""
        if self._threads is None:
            outcome = self.verify(query)
            return lambda: outcome
        future: Future[VerifyOutcome] = self._threads.submit(self.verify, query)
        return future.result

    def verify_many(self, queries: Sequence[Query]) -> list[VerifyOutcome]:
        """One outcome per query, for requests that came together. Queries of the same tensors are verified in one call.

        Where that call fails because of rows, every query is asked alone: one client's input must not cost another
        its reference. A signed query is always asked alone, because its request can be spent once.
        """
        outcomes: list[VerifyOutcome] = [VerifyOutcome(None)] * len(queries)
        for group in _grouped([_tensors(q) for q in queries]):
            together = [queries[i] for i in group]
            merged = self.verify(Query.concat(together)) if len(group) > 1 else None
            if merged is None or any(f.kind in _ROW_CAUSED for f in merged.failures):
                parts = [self.verify(q) for q in together]
            else:
                parts = [merged.rows(span) for span in _spans([q.n_rows for q in together])]
            for index, part in zip(group, parts, strict=True):
                outcomes[index] = part
        if self._recorder is not None:
            # In a process that only verifies, nothing else publishes the failures of its plug-ins.
            self._recorder.refresh()
        return outcomes

    def judge(self, query: Query, output: NDArray[Any], outcome: VerifyOutcome, *, probe: bool = False) -> Verdict:
        """The verdict on a service's answer.

        Parameters
        ----------
        query:
            What was asked, N rows.
        output:
            The class output as the service gave it; see `OutputCodec.read`.
        outcome:
            From `verify`, `begin` or `verify_many`, or with a reference that was brought.
        probe:
            A health probe of the host's own, which no observer is shown.
        """
        reason = self.problem
        if self._pipeline is not None:
            try:
                service = self.output.read(output)
                return self._show(query, self._pipeline.validate(query, service, outcome, record=False), probe)
            except FidesError as error:
                reason = error.cause_text
            except Exception:
                logger.exception("the protection failed")
                reason = INTERNAL
        return self._show(query, failed_verdict(self.settings, query.n_rows, len(self.class_names), reason), probe)

    def judge_many(self, claims: Sequence[Claim]) -> list[Verdict]:
        """One verdict per claim. Claims that differ in their rows alone are judged in one call.

        A call costs much the same for one row and for many. If a plug-in fails in it, one client's rows may be the
        cause, and every claim is judged alone.
        """
        verdicts: dict[int, Verdict] = {}
        # One claim has nothing to be judged with, and `judge` reads it.
        read = [self._mergeable(claim) for claim in claims] if len(claims) > 1 else [(None, None)] * len(claims)
        for group in _grouped([key for key, _ in read]):
            services = [s for i in group if (s := read[i][1]) is not None]
            together = self._judge_together([claims[i] for i in group], services) if len(group) > 1 else None
            if together is not None:
                verdicts |= dict(zip(group, together, strict=True))
        return [
            verdicts[i] if i in verdicts else self.judge(c.query, c.output, c.outcome, probe=c.probe)
            for i, c in enumerate(claims)
        ]

    def unjudged(self, n_rows: int, reason: str, request_ids: Sequence[str] = (), *, exempt: bool = False) -> Verdict:
        """The verdict on rows that cannot be judged: `error`, shown to all observers.

        `exempt`: there is no class output to verify, so that the rows are `indeterminate` and always pass.
        """
        make = exempt_verdict if exempt else failed_verdict
        verdict = make(self.settings, n_rows, len(self.class_names), reason)
        return self._show(self.query({}, n_rows, request_ids), verdict)

    def refuse(self, query: Query, reason: str, *, withheld: bool = True) -> Verdict:
        """The verdict on an answer that a caller knows to be a lie: every row attacked, and refused if `withheld`."""
        verdict = refused_verdict(query.n_rows, len(self.class_names), reason)
        return self._show(query, verdict if withheld else replace(verdict, refused=np.zeros_like(verdict.refused)))

    def correct(self, output: NDArray[Any], verdict: Verdict) -> tuple[NDArray[Any], Verdict]:
        """The output to hand out: in the mode `correct` with its corrected rows, otherwise as it came.

        Where a correction cannot be written the rows stay attacked without one, and the verdict says so.
        """
        if self.settings.mode != "correct" or not verdict.corrected.any():
            return output, verdict
        try:
            return self.output.write(output, verdict), verdict
        except Exception:
            logger.exception("a correction cannot be written back")
            return output, self.uncorrected(verdict)

    def uncorrected(self, verdict: Verdict) -> Verdict:
        """The verdict, where the host could not hand its corrections out."""
        return without_corrections(self.settings, verdict, "no correction could be written")

    def close(self) -> None:
        """Stop the threads, tell the plug-ins, and write the last metrics."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
        if self._pipeline is not None:
            self._pipeline.close()
        if self._recorder is not None:
            self._recorder.close()

    def _show(self, query: Query, verdict: Verdict, probe: bool = False) -> Verdict:
        """Show a verdict to plug-ins and metrics."""
        if not probe:
            if self._pipeline is not None:
                self._pipeline.record(query, verdict)
            if self._recorder is not None:
                self._recorder.observe_verdict(verdict, query.request_ids)
        return verdict

    def _mergeable(self, claim: Claim) -> tuple[Any, Prediction | None]:
        """What claims must have in common to be judged in one call, and the answer as read.

        The key is None for a claim that is judged alone: a probe, or where the inputs are handed on, or a verifier
        shows evidence or failed.
        """
        verification = claim.outcome.verification
        if claim.probe or self._pipeline is None or verification is None or claim.outcome.failures:
            return None, None
        if claim.query.inputs.keys() != {ROWS_ONLY} or claim.query.signed or any(verification.evidence):
            return None, None
        try:
            service = self.output.read(claim.output)
        except FidesError:
            return None, None
        n, m, k = verification.references.shape
        if service.probabilities.shape != (n, k) or claim.query.n_rows != n:
            return None, None
        # Ids belong to rows: a client without any must not take the others' out of the records.
        return (m, k, verification.sources, bool(claim.query.request_ids)), service

    def _judge_together(self, claims: Sequence[Claim], services: Sequence[Prediction]) -> list[Verdict] | None:
        assert self._pipeline is not None  # claims without a pipeline have no key
        errors = self._pipeline.plugin_errors
        before = sum(errors.values())
        try:
            query = Query.concat([c.query for c in claims])
            references = Verification.concat([v for c in claims if (v := c.outcome.verification) is not None])
            whole = self._pipeline.validate(query, Prediction.concat(services), VerifyOutcome(references), record=False)
        except Exception:
            logger.exception("requests cannot be judged together")
            return None
        if sum(errors.values()) > before:
            return None
        self._show(query, whole)
        return [whole.rows(span) for span in _spans([c.query.n_rows for c in claims])]


def unverified(error: Exception, host: str) -> VerifyOutcome:
    """The outcome for rows whose input could not be read; its words are fit for a client."""
    return VerifyOutcome(None, (Failure(host, "fides_verify", "input", safe_text(error)),))


def safe_text(error: Exception) -> str:
    """What a client may read about an error: the text of an `InputError`, or a class name; never a path."""
    return error.cause_text if isinstance(error, InputError) else f"internal error ({type(error).__name__})"


def _tensors(query: Query) -> Any:
    """Queries with the same value can be verified in one call; None: alone."""
    if query.signed or not query.n_rows:
        return None
    # Ids belong to rows: a query without any must not take the others' away.
    return bool(query.request_ids), *((name, a.dtype.str, a.shape[1:]) for name, a in sorted(query.inputs.items()))


def _grouped(keys: Sequence[Any]) -> list[list[int]]:
    """Positions with the same key; each None is a group of its own."""
    groups: dict[Any, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(("alone", index) if key is None else ("key", key), []).append(index)
    return list(groups.values())


def _spans(lengths: Sequence[int]) -> list[slice]:
    ends = np.cumsum(lengths).tolist()
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
