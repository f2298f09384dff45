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
from pathlib import Path
from typing import Any

from fides_plugins.builtin.remote import NAME as REMOTE
from fides_plugins.errors import FidesError, SettingsError
from fides_plugins.observation.metrics import MetricsBackend
from fides_plugins.protection import INTERNAL
from fides_plugins.serving.http import RowVerdict, envelope, headers, per_request, refusal
from fides_plugins.serving.torchserve.body import Bodies, BodyParser, make_parser
from fides_plugins.serving.torchserve.judge import InferenceJudge
from fides_plugins.serving.torchserve.metrics import TorchServeMetrics
from fides_plugins.serving.torchserve.options import HostOptions, read_section
from fides_plugins.serving.torchserve.original import Found, Original, find_handler, protect, require_wrappable
from fides_plugins.serving.torchserve.receipts import Receipts
from fides_plugins.settings import Settings
from fides_plugins.types import Status

logger = logging.getLogger("fides_plugins")

#: Asks for the verdict in the body: an HTTP header, or an extra key of the inputs over gRPC.
ENVELOPE_KEY = "x-fides-envelope"

NOT_CALLED = "the handler did not call inference()"
NO_ROWS = "the input or the output of inference() cannot be read"
EXPLAINED = "explanations and descriptions are not verified"
REFUSED = "the handler refused this request itself"
STREAMED = "streamed answers are not verified"
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
        self._warned = False

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
            self.original = protect(found, self._capture if self._parser is None else None)
        except FidesError as error:
            raise RuntimeError(f"Fides cannot protect this model: {error}") from error
        self.original.initialize(context)
        if self.options.metrics and context.metrics is not None:
            metrics.start(context.metrics)
        logger.info("Fides protects %s in mode %s", found.description, self.settings.mode)

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
            if self._parser is not None and len(explained) < n_requests:
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
                verdicts = self._verdicts({**streamed, **explained}, n_requests)
            answered = self._answer(answer, context, verdicts, wanted) if visible else answer
            if self._receipts is not None:
                self._receipts.write(context)
            return answered
        except Exception:  # host boundary: the answer exists, and only policy may hold it back
            logger.exception("the protection failed")
            failed = self.judge.unjudged(n_requests, INTERNAL, self._request_ids)
            return self._answer(answer, context, failed, []) if visible else answer

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

    def _verdicts(self, exempt: Mapping[int, str], n_requests: int) -> list[RowVerdict]:
        """One verdict per request; `exempt`: requests without a class output to verify, and why."""
        with self._lock:
            calls = sorted(self._calls, key=lambda c: (c[0] or 0, c[1]))
        n_rows = sum(len(rows) for _, _, rows in calls)
        others = [i for i in range(n_requests) if i not in exempt]
        if not n_rows and others and not self._warned:
            self._warned = True
            logger.warning("%s; its answers cannot be judged", NOT_CALLED)
        reason, nothing_read = "", len(self._unread) == n_rows
        if nothing_read:
            # Nothing of the batch could be read: its requests say why, however many there are.
            reason = self._unread[0] if self._unread else MIXED if EXPLAINED in exempt.values() else NOT_CALLED
            self.judge.unjudged(len(others), reason, [self._request_ids[i] for i in others])
        elif self._unread:
            self.judge.unjudged(len(self._unread), self._unread[0])
        # A handler hands over the rows of the whole batch, or leaves out those that it answers otherwise.
        whole = not nothing_read and n_rows == n_requests * (self.options.rows_per_request or 1)
        judged = range(n_requests) if whole else others
        made = per_request(
            [rows for _, _, rows in calls],
            len(judged),
            self.options.rows,
            self.options.rows_per_request,
            unjudged=lambda why: self.judge.failed(reason or why),
            # TorchServe's own micro-batching cuts the batch into parts.
            layout="parts" if any(micro is not None for micro, _, _ in calls) else self.options.calls,
        )
        verdicts = dict(zip(judged, made, strict=True))
        for index, why in exempt.items():
            if whole:
                # Its row is counted and logged already, with the others. Any client may ask for an explanation by a
                # header, whether the handler knows such a thing or not: that hides no attack.
                if why != EXPLAINED or verdicts[index].status is not Status.ATTACKED:
                    verdicts[index] = RowVerdict(Status.INDETERMINATE, reason=why)
            else:
                (verdicts[index],) = self.judge.unjudged(1, why, [self._request_ids[index]], exempt=True)
        return [verdicts[i] for i in range(n_requests)]

    def _wants_envelope(self, data: Any, context: Any, index: int) -> bool:
        """Whether this request's verdict goes into the body; takes our own key out of gRPC inputs."""
        item = data[index] if isinstance(data, list) and index < len(data) else None
        asked = isinstance(item, MutableMapping) and item.pop(ENVELOPE_KEY, None) is not None
        properties = context.get_all_request_header(index)
        asked = asked or any(str(k).lower() == ENVELOPE_KEY for k in properties)
        rule = self.options.envelope
        over_http = "url_path" in properties
        return rule == "always" or (rule == "grpc" and not over_http) or (rule in ("request", "grpc") and asked)

    def _answer(self, answer: Any, context: Any, verdicts: Sequence[RowVerdict], wanted: Sequence[bool]) -> Any:
        """Write headers, refusals and envelopes for every request of the batch."""
        if not isinstance(answer, list):
            return answer
        items = list(answer)
        for index, verdict in enumerate(verdicts):
            if _streamed(context, index):
                continue
            if _refused_by_handler(context, index):
                _mark(context, index, RowVerdict(Status.INDETERMINATE, reason=REFUSED))
                continue
            _mark(context, index, verdict)
            where = _positions(index, len(items), len(verdicts), self.options)
            if verdict.refused:
                context.set_response_status(verdict.http_status, "Refused by Fides", index)
                context.set_response_header(index, "content-type", "application/json")
                for position in where:
                    items[position] = refusal(verdict)
            elif wanted and wanted[index]:
                for position in where:
                    items[position] = envelope(items[position], verdict, self.judge.protection.class_names)
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


def _positions(index: int, n_items: int, n_requests: int, options: HostOptions) -> Sequence[int]:
    """Items of the handler's answer that belong to a request.

    A server-wide service envelope (such as `json`) lets a handler answer one item per row and joins
    them afterwards.
    """
    if n_items == n_requests:
        return (index,)
    declared = options.rows_per_request or 0
    if declared and n_items == declared * n_requests:
        return range(index * declared, (index + 1) * declared)
    # Without a declared number every request of the batch has the same verdict, so all items share its fate.
    return range(n_items)


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


def _streamed(context: Any, index: int) -> bool:
    return bool(context.request_processor and context.get_response_headers(index).get("ts_stream_next"))


def _refused_by_handler(context: Any, index: int) -> bool:
    code, _ = context.get_response_status(index)
    return isinstance(code, int) and code >= 400
