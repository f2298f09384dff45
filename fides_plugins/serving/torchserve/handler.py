"""The TorchServe handler: runs the original one and validates what its `inference()` returned.

TorchServe calls `initialize(context)` once and `handle(data, context)` per batch. The original handler
does its own work in both; its `inference()` is intercepted (see `original`), so that pre- and
postprocessing, and with them the response's schema, stay its own. An error of the original handler
passes unchanged; an error of Fides never fails a request by itself.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fides_plugins.builtin.remote import NAME as REMOTE
from fides_plugins.errors import FidesError, SettingsError
from fides_plugins.observation.metrics import MetricsBackend
from fides_plugins.protection import INTERNAL
from fides_plugins.serving.http import RowVerdict, envelope, headers, only_split, per_request, refusal
from fides_plugins.serving.torchserve.answer import AnswerReader
from fides_plugins.serving.torchserve.body import BodyParser, make_parser
from fides_plugins.serving.torchserve.body_capture import Bodies
from fides_plugins.serving.torchserve.envelopes import items_per_request, stand_outside
from fides_plugins.serving.torchserve.judge import InferenceJudge
from fides_plugins.serving.torchserve.metrics import TorchServeMetrics
from fides_plugins.serving.torchserve.options import HostOptions, read_section
from fides_plugins.serving.torchserve.original import Found, Original, find_handler, protect, require_wrappable
from fides_plugins.serving.torchserve.receipts import Receipts
from fides_plugins.serving.torchserve.row_counts import row_counts
from fides_plugins.settings import Settings
from fides_plugins.types import Status

logger = logging.getLogger("fides_plugins")

#: Asks for the verdict in the body: an HTTP header, or an extra key of the inputs over gRPC.
ENVELOPE_KEY = "x-fides-envelope"

#: In the names of a workflow's nodes, and nowhere else by default.
_NODE = "__"

NOT_CALLED = "the handler did not call inference()"
NO_ROWS = "the input or the output of inference() cannot be read"
EXPLAINED = "explanations and descriptions are not verified"
REFUSED = "the handler refused this request itself"
STREAMED = "streamed answers are not verified"
ANOTHER = "the answer names another class than inference() gave"
UNREADABLE = "the class in the answer cannot be read where `answer` says it is"
MIXED = f"{NOT_CALLED}; a request of its batch asked for an explanation"


class FidesHandler:
    """What `handlers/fides_handler.py` hands to TorchServe.

    Attributes
    ----------
    judge, original:
        Set by `initialize`.
    """

    judge: InferenceJudge
    original: Original

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: list[tuple[int | None, int, list[RowVerdict]]] = []
        self._unread: list[str] = []
        self._collecting = False
        self._request_ids: tuple[str, ...] = ()
        self._parser: BodyParser | None = None
        self._receipts: Receipts | None = None
        self._envelope: Any = None
        self._warned = False
        stand_outside(FidesHandler)

    @property
    def settings(self) -> Settings:
        """Shared settings of this worker."""
        return self.judge.protection.settings

    def initialize(self, context: Any) -> None:
        """Load the original handler and the protection.

        Raises
        ------
        RuntimeError
            If the configuration cannot work. TorchServe reports this type as a failed load.
        """
        metrics = TorchServeMetrics()
        try:
            self.options, self.judge, found, self._parser = prepare(
                context.model_yaml_config, context.system_properties["model_dir"], context.model_name, metrics
            )
            self._reader = AnswerReader(self.options.answer, self.judge.protection.class_names)
            self.original = protect(found, self._capture if self._parser is None else None)
        except FidesError as error:
            raise RuntimeError(f"Fides cannot protect this model: {error}") from error
        self.original.initialize(context)
        if self.options.metrics and context.metrics is not None:
            metrics.start(context.metrics)
        logger.info("Fides protects %s in mode %s", found.description, self.settings.mode)
        if _NODE in context.model_name:
            logger.warning("%s is a node of a workflow: only refusals reach clients, no headers", context.model_name)

    def enclose(self, envelope: type) -> None:
        """Put a service envelope around the original handler, once; see `envelopes`."""
        if self._envelope is None:
            self._envelope = envelope(self.original.handle)
            self.original.handle = self._envelope.handle

    def handle(self, data: Any, context: Any) -> Any:
        """Answer one batch: the original's answer, with verdicts in headers, bodies and statuses."""
        n_requests = len(context.request_ids or data)
        visible = self.settings.mode != "observe"
        wanted = [self._wants_envelope(data, context, i) for i in range(n_requests)] if visible else []
        explained = {i: EXPLAINED for i in range(n_requests) if _asks(context, i)}
        if visible:
            # Before the handler runs, because a streamed answer leaves while it runs. Nothing is trusted yet.
            for index in range(n_requests):
                _mark(context, index, RowVerdict(Status.INDETERMINATE, reason=STREAMED))
        bodies = None
        with self._lock:
            self._calls, self._unread = [], []
        self._request_ids = tuple(str(context.get_request_id(i)) for i in range(n_requests))
        self._receipts = Receipts(context, n_requests) if REMOTE in self.settings.plugins.options else None
        try:
            if self._parser is not None:
                bodies = Bodies(self.judge, self._parser, data, self._request_ids, explained)
            self._collecting = self._parser is None
            answer = self.original.handle(data, context)
        finally:
            self._collecting = False
        try:
            if bodies is not None:
                verdicts, answer = bodies.judge(answer)
            else:
                streamed = {i: STREAMED for i in range(n_requests) if _streamed(context, i)}
                verdicts = self._verdicts({**streamed, **explained}, n_requests, data)
            verdicts = self._compared(answer, context, verdicts)
            answered = self._answer(answer, context, verdicts, wanted) if visible else answer
            if self._receipts is not None:
                self._receipts.write(context)
        except Exception:  # host boundary: the answer exists, and only policy may hold it back
            logger.exception("the protection failed")
            verdicts = self.judge.unjudged(n_requests, INTERNAL, self._request_ids)
            answered = self._answer(answer, context, verdicts, []) if visible else answer
        refused = next((v for v in verdicts if v.refused), None)
        if visible and refused is not None and self._hands_on_any_body(context):
            raise _prediction_exception(refused)
        return answered

    def _hands_on_any_body(self, context: Any) -> bool:
        """Whether TorchServe hands a body on whatever status it has, so that only a failed batch withholds anything.

        So it does inside a workflow, whose nodes it names `workflow__node`, and in the Open Inference Protocol's gRPC,
        which reads tensors in every body.
        """
        of_tensors = type(self._envelope).__name__ == "KServev2Envelope"
        return _NODE in context.model_name or (of_tensors and not _over_http(context, 0))

    def _capture(self, call: Callable[[], Any], data: Any, micro_batch: int | None) -> Any:
        """Around each `inference()` of the original handler."""
        if not self._collecting:
            return call()
        pending = self.judge.begin(data, self._request_ids, self._receipts)
        output = call()
        rows, output, problem = self.judge.judge(pending, output)
        if self._receipts is not None and pending.query is not None:
            self._receipts.collect(pending.outcome())
        with self._lock:
            if not rows:
                self._unread.append(problem or NO_ROWS)
                rows = [self.judge.failed(self._unread[-1])]
            self._calls.append((micro_batch, len(self._calls), rows))
        return output

    def _verdicts(self, exempt: Mapping[int, str], n_requests: int, data: Sequence[Any]) -> list[RowVerdict]:
        """One verdict per request; `exempt`: requests without a class output to verify, and why."""
        with self._lock:
            calls = sorted(self._calls, key=lambda c: (c[0] or 0, c[1]))
        n_rows = sum(len(rows) for _, _, rows in calls)
        others = [i for i in range(n_requests) if i not in exempt]
        if not n_rows and others and not self._warned:
            self._warned = True
            logger.warning("%s; its answers cannot be judged", NOT_CALLED)
        reason = ""
        if len(self._unread) == n_rows:
            # Nothing of the batch could be read: its requests say why, however many there are.
            reason = self._unread[0] if self._unread else MIXED if EXPLAINED in exempt.values() else NOT_CALLED
            self.judge.unjudged(len(others), reason, [self._request_ids[i] for i in others])
        elif self._unread:
            self.judge.unjudged(len(self._unread), self._unread[0])
        # A handler hands over the rows of the whole batch, or leaves out those that it answers otherwise.
        counts = [c | {0} if i in exempt else c for i, c in enumerate(self._counts(data, n_requests, n_rows))]
        split = only_split(counts, n_rows) if exempt else None
        verdicts = per_request(
            [rows for _, _, rows in calls],
            n_requests,
            self.options.rows,
            self.options.rows_per_request,
            unjudged=lambda why: self.judge.failed(reason or why),
            # TorchServe's own micro-batching cuts the batch into parts.
            layout="parts" if any(micro is not None for micro, _, _ in calls) else self.options.calls,
            counts=counts,
        )
        for index, why in exempt.items():
            # Any client may ask for an explanation by a header, whether the handler knows such a thing or not: that
            # hides no attack.
            if why == EXPLAINED and verdicts[index].status is Status.ATTACKED:
                continue
            if split is not None and split[index]:
                # Its row is counted and logged already, with the others.
                verdicts[index] = RowVerdict(Status.INDETERMINATE, reason=why)
            else:
                (verdicts[index],) = self.judge.unjudged(1, why, [self._request_ids[index]], exempt=True)
        return verdicts

    def _compared(self, answer: Any, context: Any, verdicts: list[RowVerdict]) -> list[RowVerdict]:
        """The verdicts once the class that each final body names was compared with the label that was judged.

        What `postprocess()` and `handle()` do after `inference()` is code of the service like the model. Only answers
        that would be handed out as good are compared.
        """
        if not isinstance(answer, list) or len(answer) != len(verdicts):
            return verdicts
        corrects = self.settings.mode == "correct"
        made = list(verdicts)
        for index, verdict in enumerate(verdicts):
            if verdict.status not in (Status.TRUSTED, Status.ATTACKED):
                continue
            # A parser reads the final body.
            by_body = self._parser is not None
            labels = (verdict.label,) if by_body else verdict.labels
            made[index] = replace(verdict, judged="answer" if by_body else "inference")
            good = verdict.status is Status.TRUSTED or (verdict.corrected and corrects)
            if not good or verdict.refused or _streamed(context, index) or _refused_by_handler(context, index):
                continue
            agrees = self._reader.agrees(answer[index], labels)
            if agrees:
                made[index] = replace(verdict, judged="answer")
            elif agrees is False:
                lie = self.judge.lied(len(labels), self._request_ids[index], ANOTHER)
                made[index] = replace(lie, judged="answer")
            elif self._reader.required and labels:
                made[index] = self.judge.failed(UNREADABLE)
        return made

    def _counts(self, data: Sequence[Any], n_requests: int, n_rows: int) -> list[frozenset[int]]:
        """The numbers of rows that each request may have made."""
        declared = self.options.rows_per_request
        if declared is not None or n_requests == n_rows == 1:
            return [frozenset({declared or 1})] * n_requests
        items = items_per_request(self._envelope, n_requests)
        return [row_counts(item, None if items is None else items[i]) for i, item in enumerate(data)]

    def _wants_envelope(self, data: Any, context: Any, index: int) -> bool:
        """Whether this request's verdict goes into the body; takes our own key out of gRPC inputs."""
        item = data[index] if isinstance(data, list) and index < len(data) else None
        asked = isinstance(item, MutableMapping) and item.pop(ENVELOPE_KEY, None) is not None
        if _NODE in context.model_name:
            # A client's headers reach every node of a workflow, and a body goes to the next one.
            return self.options.envelope == "always"
        properties = context.get_all_request_header(index)
        asked = asked or any(str(k).lower() == ENVELOPE_KEY for k in properties)
        rule = self.options.envelope
        over_http = _over_http(context, index)
        return rule == "always" or (rule == "grpc" and not over_http) or (rule in ("request", "grpc") and asked)

    def _answer(self, answer: Any, context: Any, verdicts: Sequence[RowVerdict], wanted: Sequence[bool]) -> Any:
        """Write headers, refusals and envelopes for every request of the batch."""
        if not isinstance(answer, list) or len(answer) != len(verdicts):
            return answer  # TorchServe refuses it whole, with 503
        items = list(answer)
        for index, verdict in enumerate(verdicts):
            if _streamed(context, index):
                continue
            if _refused_by_handler(context, index):
                _mark(context, index, RowVerdict(Status.INDETERMINATE, reason=REFUSED))
                continue
            _mark(context, index, verdict)
            if verdict.refused:
                context.set_response_status(verdict.http_status, "Refused by Fides", index)
                context.set_response_header(index, "content-type", "application/json")
                items[index] = refusal(verdict)
            elif wanted and wanted[index]:
                items[index] = envelope(items[index], verdict, self.judge.protection.class_names)
        return items


def prepare(
    config: Mapping[str, Any] | None,
    model_dir: str | Path,
    model_name: str,
    metrics: MetricsBackend | None = None,
) -> tuple[HostOptions, InferenceJudge, Found, BodyParser | None]:
    """Read the section, import the original handler and load the protection, without calling anything.

    Raises
    ------
    FidesError
        If this cannot work: a wrong key, a handler that cannot be imported or has nothing to wrap.
    """
    options, settings = read_section(config, model_dir)
    found = find_handler(options.handler)
    parser = None if options.parser is None else make_parser(options.parser)
    if parser is None:
        require_wrappable(found)
    elif settings.mode == "correct" and parser.replace is None:
        raise SettingsError("`mode: correct` needs a function `replace` in the parser.")
    judge = InferenceJudge(settings, model_name, options.concurrent, metrics if options.metrics else None)
    return options, judge, found, parser


def _mark(context: Any, index: int, verdict: RowVerdict) -> None:
    ours = headers(verdict)
    existing = context.get_response_headers(index)
    for name in [n for n in existing if n.startswith("x-fides-") and n not in ours]:
        del existing[name]
    for name, value in ours.items():
        context.set_response_header(index, name, value)


def _asks(context: Any, index: int) -> bool:
    """Whether a request is for an explanation or a description.

    TorchServe puts these into one batch with predictions. Its own handlers let the first request decide
    for all; others look at each. So what a request asked for exempts that request alone.
    """
    if not context.request_processor:
        return False
    return any(context.get_request_header(index, what) == "True" for what in ("explain", "describe"))


def _over_http(context: Any, index: int) -> bool:
    return "url_path" in context.get_all_request_header(index)


def _prediction_exception(refused: RowVerdict) -> Exception:
    """What makes TorchServe fail a whole batch with a status and a text of ours."""
    from ts.utils.util import PredictionException

    made: Exception = PredictionException(refusal(refused)["message"], refused.http_status)
    return made


def _streamed(context: Any, index: int) -> bool:
    return bool(context.request_processor and context.get_response_headers(index).get("ts_stream_next"))


def _refused_by_handler(context: Any, index: int) -> bool:
    """Whether the handler refused a request itself; over gRPC no status reaches the client, so its answer is judged."""
    code, _ = context.get_response_status(index)
    return _over_http(context, index) and isinstance(code, int) and code >= 400
