"""One real inference through a served model, and what is wrong when it is not protected."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

import httpx

from fides_plugins.errors import InputError, ServerError
from fides_plugins.observation.metrics import VERDICTS
from fides_plugins.serving.finding import CheckFinding
from fides_plugins.serving.http import HEADER_REASON, HEADER_STATUS

_TIMEOUT_S = 60.0
_METRIC_WAIT_S = 3.0
_METRIC_PAUSE_S = 0.05
_NO_MODEL = "Register it, or correct the name."
METRIC_LINES = "Add `metrics_mode=prometheus` and `model_metrics_auto_detect=true` to config.properties."


def check(
    url: str,
    model: str,
    body: bytes,
    *,
    content_type: str = "application/json",
    management_url: str = "",
    metrics_url: str = "",
    token: str = "",
    repeat: int = 5,
) -> list[CheckFinding]:
    """Send `body` to a model and look at every step of its protection; findings in the order of looking.

    Parameters
    ----------
    url:
        Root of the inference API, such as http://localhost:8080.
    body:
        A real request; only the model's own handler knows what one looks like.
    management_url, metrics_url:
        Taken from `url` by TorchServe's usual ports (+1 and +2) when empty.
    token:
        Inference key, where token authorization is on.
    repeat:
        Requests to time, after the first one.

    Raises
    ------
    InputError
        If `url` is no http(s) URL.
    """
    try:
        root = httpx.URL(url)
    except httpx.InvalidURL:
        root = httpx.URL()
    known_port = root.port is None or 0 < root.port < 1 << 16
    if root.scheme not in ("http", "https") or not root.host or not known_port:
        raise InputError(f"{url!r} is no URL.", "Give one such as http://localhost:8080.")
    headers = {"content-type": content_type, **({"authorization": f"Bearer {token}"} if token else {})}
    metrics = metrics_url or f"{_neighbour(root, 2)}/metrics"
    before = _read_page(metrics)
    workers = _check_workers(management_url or _neighbour(root, 1), model, headers, before)
    inference, answer = _check_inference(f"{url.rstrip('/')}/predictions/{model}", body, headers, repeat)
    if answer is None:
        return [workers, inference]
    return [workers, inference, *_check_protection(answer, model, lambda: _read_page(metrics), before)]


def _check_workers(management_url: str, model: str, headers: Mapping[str, str], page: str | None) -> CheckFinding:
    try:
        answer = _ask(f"{management_url}/models/{model}", None, headers)
    except ServerError:
        remedy = "Give its address with --management."
        return CheckFinding("workers", None, "the management API cannot be reached", remedy)
    if answer.status_code == 404:
        # TorchServe keeps the last value of every metric, an alarm too, until it is restarted.
        past = "; its metrics are of the past" if page and _count_verdicts(page, model) else ""
        return CheckFinding("workers", False, f"no model {model!r} is registered{past}", _NO_MODEL)
    try:
        workers = answer.json()[0]["workers"]
        ready = sum(1 for w in workers if w["status"] == "READY")
    except (ValueError, LookupError, TypeError):
        return CheckFinding("workers", None, f"the management API answered {answer.status_code}")
    good = bool(workers) and ready == len(workers)
    remedy = "" if good else "Read model_log.log: a handler that fails to load is tried again for minutes."
    return CheckFinding("workers", good, f"{ready} of {len(workers)} ready", remedy)


def _check_inference(
    url: str, body: bytes, headers: Mapping[str, str], repeat: int
) -> tuple[CheckFinding, httpx.Response | None]:
    """The finding, and the answer where the model gave one."""
    seconds: list[float] = []
    try:
        answer = _ask(url, body, headers)
        for _ in range(repeat if answer.status_code in (200, 409) else 0):
            start = time.perf_counter()
            answer = _ask(url, body, headers)
            seconds.append(time.perf_counter() - start)
    except ServerError as error:
        return CheckFinding("inference", False, str(error), "Start the server, or correct the URL."), None
    if answer.status_code in (400, 401, 403) and b"oken" in answer.content:
        remedy = "Give the inference key with --token."
        return CheckFinding("inference", False, "token authorization is on", remedy), None
    if answer.status_code == 404:
        return CheckFinding("inference", False, "HTTP 404: there is no such model", _NO_MODEL), None
    good = answer.status_code in (200, 409)
    remedy = "" if good else "Send a body that the model's own handler accepts, and read model_log.log."
    median = statistics.median(seconds) if seconds else math.nan
    return CheckFinding("inference", good, f"HTTP {answer.status_code}", remedy, median), answer


def _check_protection(
    answer: httpx.Response, model: str, read_page: Callable[[], str | None], before: str | None
) -> tuple[CheckFinding, CheckFinding]:
    """The findings on the verdict and on the metrics; `before` is the metrics page before the inference."""
    status = answer.headers.get(HEADER_STATUS, "")
    counted = before is not None and _counts_more(read_page, model, _count_verdicts(before, model))
    if counted:
        metrics = CheckFinding("metrics", True, f"{VERDICTS.name} counts this model")
    elif before is None:
        metrics = CheckFinding("metrics", None, "the metrics page cannot be reached", METRIC_LINES)
    elif status:
        metrics = CheckFinding("metrics", False, f"{VERDICTS.name} does not count this model", METRIC_LINES)
    else:
        metrics = CheckFinding("metrics", None, "nothing of this model is counted")
    if status in ("trusted", "attacked"):
        return CheckFinding("verdict", True, f"{status}, in the response headers"), metrics
    if status:
        detail = f"{status}: {answer.headers.get(HEADER_REASON, 'no reason given')}"
        return CheckFinding("verdict", False, detail, "Read model_log.log; the answer could not be judged."), metrics
    if counted:
        detail = "none in the response, but it is counted: mode is `observe`"
        return CheckFinding("verdict", True, detail), metrics
    if before is None:
        detail = "no verdict, and no metrics to see whether mode is `observe`"
        return CheckFinding("verdict", False, detail, METRIC_LINES), metrics
    detail, remedy = "the model is not protected", "Run `fides attach torchserve` on its archive."
    if VERDICTS.name not in before:
        # No model of this server is counted, so the lines may be missing: without them `observe` looks like this too.
        detail += ", or its mode is `observe` and metrics are off"
        remedy += f" If that was done: {METRIC_LINES}"
    return CheckFinding("verdict", False, detail, remedy), metrics


def _counts_more(read_page: Callable[[], str | None], model: str, before: float) -> bool:
    """Whether the model's counter grows; it is written a little after the answer."""
    deadline = time.monotonic() + _METRIC_WAIT_S
    while (page := read_page()) is not None and time.monotonic() < deadline:
        if _count_verdicts(page, model) > before:
            return True
        time.sleep(_METRIC_PAUSE_S)
    return False


def _read_page(url: str) -> str | None:
    """The metrics page; None where there is none."""
    try:
        answer = _ask(url, None, {})
    except ServerError:
        return None
    return answer.text if answer.status_code == 200 else None


def _count_verdicts(page: str, model: str) -> float:
    """Sum of the verdict counters of a model."""
    pattern = rf'^{VERDICTS.name}{{[^}}]*ModelName="{re.escape(model)}"[^}}]*}} ([0-9.eE+]+)$'
    return sum(float(v) for v in re.findall(pattern, page, re.MULTILINE))


def _neighbour(root: httpx.URL, offset: int) -> str:
    port = (root.port or {"http": 80, "https": 443}[root.scheme]) + offset
    return str(root.copy_with(port=port, raw_path=b"/")).rstrip("/")


def _ask(url: str, body: bytes | None, headers: Mapping[str, str]) -> httpx.Response:
    """The answer to a GET, or to a POST where there is a body."""
    try:
        return httpx.request("GET" if body is None else "POST", url, content=body, headers=headers, timeout=_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerError(f"{urlsplit(url).netloc} cannot be reached: {error}.") from None
