"""Posts alerts to an HTTP endpoint, with retries and a bounded queue that never blocks serving.

`fides_record` puts an alert on the queue and returns; a thread of its own posts. When the endpoint is
slow or down the queue fills, further alerts are counted as dropped, and serving goes on as before.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import logging
import os
import queue
import random
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from fides_plugins import Query, SettingsError, Verdict, hookimpl
from fides_plugins.types import STATUS_TEXTS

if TYPE_CHECKING:
    from fides_plugins.settings import Settings

NAME = "webhook"
SIGNATURE_HEADER = "X-Fides-Signature"
#: Rows described in one alert; the counts cover all of them.
MAX_ROWS = 50
#: Answers worth another try.
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
logger = logging.getLogger("fides_webhook")


class Webhook:
    """Options: `url`, `statuses`, `queue_size`, `attempts`, `backoff_s`, `timeout_s`, `secret_env`.

    `secret_env` names an environment variable; with it every alert carries an HMAC-SHA256 of its body.

    Attributes
    ----------
    counts:
        Alerts sent, dropped (queue full) and failed (all attempts used), and attempts retried.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._url = ""
        self._statuses: tuple[str, ...] = ("attacked",)
        self._attempts = 5
        self._backoff_s = 0.5
        self._timeout_s = 3.0
        self._secret = b""
        self._queue: queue.Queue[bytes] = queue.Queue(1000)
        self._closing = threading.Event()
        self._idle = threading.Event()
        self._thread: threading.Thread | None = None

    @hookimpl
    def fides_configure(self, settings: Settings) -> None:
        """Read the options and start the thread."""
        options = settings.plugins.options.get(NAME, {})
        self._url = str(options.get("url", ""))
        if urlsplit(self._url).scheme not in ("http", "https"):
            raise SettingsError(f"{NAME} has no address to post to.", "Set plugins.options.webhook.url.")
        statuses = options.get("statuses", self._statuses)
        self._statuses = tuple(s.strip() for s in (statuses.split(",") if isinstance(statuses, str) else statuses))
        unknown = set(self._statuses) - set(STATUS_TEXTS)
        if unknown:
            raise SettingsError(f"{NAME} knows no status {sorted(unknown)}; there are {list(STATUS_TEXTS)}.")
        self._attempts = int(options.get("attempts", self._attempts))
        self._backoff_s = float(options.get("backoff_s", self._backoff_s))
        self._timeout_s = float(options.get("timeout_s", self._timeout_s))
        if options.get("secret_env"):
            self._secret = os.environ.get(str(options["secret_env"]), "").encode()
            if not self._secret:
                raise SettingsError(f"The environment variable {options['secret_env']} of {NAME} is empty.")
        self._queue = queue.Queue(int(options.get("queue_size", 1000)))
        self._closing.clear()
        self._thread = threading.Thread(target=self._work, name=NAME, daemon=True)
        self._thread.start()

    @hookimpl
    def fides_unconfigure(self) -> None:
        """Give what is queued two seconds to leave."""
        deadline = time.monotonic() + 2.0
        while time.monotonic() < deadline and not (self._queue.empty() and self._idle.is_set()):
            time.sleep(0.01)
        self._closing.set()

    @hookimpl
    def fides_record(self, query: Query, verdict: Verdict) -> None:
        """Queue one alert for a batch with rows of the wanted statuses."""
        wanted = np.isin(verdict.status, [STATUS_TEXTS.index(s) for s in self._statuses])
        if not wanted.any():
            return
        body = json.dumps(_alert(query, verdict, np.flatnonzero(wanted))).encode()
        try:
            self._queue.put_nowait(body)
        except queue.Full:
            self.counts["dropped"] += 1

    def _work(self) -> None:
        while not self._closing.is_set():
            try:
                body = self._queue.get(timeout=0.1)
            except queue.Empty:
                self._idle.set()
                continue
            self._idle.clear()
            self.counts["sent" if self._deliver(body) else "failed"] += 1

    def _deliver(self, body: bytes) -> bool:
        for attempt in range(self._attempts):
            if attempt:
                self.counts["retried"] += 1
                # Full jitter, so that many servers do not come back to a recovering endpoint together.
                if self._closing.wait(random.uniform(0, self._backoff_s * 2 ** (attempt - 1))):
                    return False
            status = self._post(body)
            if 200 <= status < 300:
                return True
            if status and status not in RETRIED:
                break
        logger.error("an alert could not be delivered to %s", urlsplit(self._url).hostname)
        return False

    def _post(self, body: bytes) -> int:
        """HTTP status; 0 when there was no answer."""
        parts = urlsplit(self._url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        headers = {"Content-Type": "application/json"}
        if self._secret:
            headers[SIGNATURE_HEADER] = hmac.new(self._secret, body, hashlib.sha256).hexdigest()
        connection = kind(parts.hostname or "", parts.port, timeout=self._timeout_s)
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("POST", target, body=body, headers=headers)
            response = connection.getresponse()
            response.read(65536)
            return int(response.status)
        except (OSError, http.client.HTTPException) as error:
            logger.warning("posting an alert failed: %s", type(error).__name__)
            return 0
        finally:
            connection.close()


def _alert(query: Query, verdict: Verdict, rows: np.ndarray[Any, Any]) -> dict[str, Any]:
    return {
        "time": time.time(),
        "model": query.model_name,
        "counts": verdict.counts(),
        "rows": [
            {
                "row": int(row),
                "request_id": query.request_ids[row] if query.request_ids else "",
                "status": str(verdict.status_text[row]),
                "score": _number(verdict.score[row]),
                "p_value": _number(verdict.p_value[row]),
                "service_label": int(verdict.service_label[row]),
                "verified_label": int(verdict.verified_label[row]),
                "label": int(verdict.label[row]),
                "reason": str(verdict.reason[row]),
            }
            for row in rows[:MAX_ROWS]
        ],
    }


def _number(value: np.float32) -> float | None:
    return float(value) if np.isfinite(value) else None
