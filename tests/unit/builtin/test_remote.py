"""The plug-in `remote` inside a pipeline: what it passes on, its time-out, its circuit breaker."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fides_plugins.attestation.receipt import open_receipt
from fides_plugins.attestation.request import from_text, to_text
from fides_plugins.attestation.tensors import tensor_digest
from fides_plugins.builtin.remote import receipts_of
from fides_plugins.bundle import Bundle
from fides_plugins.enclave.verifier import VerifierOptions
from fides_plugins.errors import FidesError, InputError, ServerError
from fides_plugins.manager import create_plugin_manager
from fides_plugins.pipeline import Pipeline
from fides_plugins.settings import Settings
from fides_plugins.testing import fake_logits, memory_bundle
from fides_plugins.types import Prediction, Query, SignedRows, softmax
from tests.support.verifiers import IDENTITY_PUBLIC, Asked, Hardware, RunningVerifier, receipt_keys

ROWS = fake_logits(5)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return memory_bundle()


@pytest.fixture(scope="module")
def running(bundle: Bundle) -> Iterator[RunningVerifier]:
    with RunningVerifier(Hardware().verifier(bundle)) as verifier:
        yield verifier


def pipeline(bundle: Bundle, url: str, **settings: Any) -> Pipeline:
    plugins = {"blocked": ["verifier"], "options": {"remote": {"url": url}}, "entry_points": False}
    chosen = Settings.from_mapping({"plugins": plugins, "mode": "flag", **settings})
    return Pipeline(chosen, bundle, create_plugin_manager(chosen, bundle))


def query(*parts: SignedRows) -> Query:
    return Query({"pixels": ROWS}, signed=parts)


def test_each_request_of_a_batch_gets_its_own_receipt(bundle: Bundle, running: RunningVerifier) -> None:
    verifier = running.verifier
    digest = to_text(tensor_digest(np.zeros((2, 10), np.float32)))
    sealed = Asked(verifier, ROWS[:2])
    committed = Asked(verifier, ROWS[2:4], "commitment")
    made = query(SignedRows(2, sealed.text), SignedRows(2, committed.text, digest), SignedRows(1))
    host = pipeline(bundle, f"http://{running.http}")
    outcome = host.verify(made)
    assert outcome.failures == ()
    assert outcome.verification is not None
    # What the host may read it uses; what it may not read is not available to it.
    assert outcome.verification.available[:, 0].tolist() == [False, False, True, True, False]
    np.testing.assert_allclose(outcome.verification.references[2:4, 0], softmax(ROWS[2:4]), atol=1e-6)
    receipts = receipts_of(outcome.verification, 3)
    opened = [open_receipt(from_text(r, "receipt"), receipt_keys(verifier)) for r in receipts[:2]]
    assert [o.nonce for o in opened] == [sealed.request.nonce, committed.request.nonce]
    assert receipts[2] == ""
    verdict = host.validate(made, Prediction.from_output(ROWS, "logits"), outcome)
    assert verdict.status_text.tolist() == ["indeterminate"] * 2 + ["trusted"] * 2 + ["indeterminate"]


def test_requests_without_a_signature_are_not_judged(bundle: Bundle, running: RunningVerifier) -> None:
    host = pipeline(bundle, f"http://{running.http}")
    assert host.verify(query()).verification is None
    assert host.verify(query(SignedRows(5))).verification is None
    # Rows and requests that do not fit are not guessed at.
    with pytest.raises(InputError, match="3 rows for 5"):
        query(SignedRows(3, "x"))
    assert receipts_of(None, 2) == ("", "")


def test_a_refused_request_costs_nobody_else_anything(bundle: Bundle, running: RunningVerifier) -> None:
    host = pipeline(bundle, f"http://{running.http}", breaker_failures=1)
    good = Asked(running.verifier, ROWS[4:])
    for _ in range(3):
        outcome = host.verify(query(SignedRows(4, "nonsense"), SignedRows(1, Asked(running.verifier, ROWS[4:]).text)))
        assert outcome.failures == ()
        receipts = receipts_of(outcome.verification, 2)
        assert receipts[0] == ""
        assert receipts[1]
    assert good.text
    assert host.plugin_errors == {}


def test_a_client_over_its_rate_takes_nobody_elses_receipt(bundle: Bundle) -> None:
    greedy = Ed25519PrivateKey.generate()
    both = frozenset((IDENTITY_PUBLIC, greedy.public_key().public_bytes_raw()))
    verifier = Hardware().verifier(bundle, options=VerifierOptions(clients=both, rate=1e-3, burst=4))
    with RunningVerifier(verifier) as running:
        host = pipeline(bundle, f"http://{running.http}", breaker_failures=1, breaker_reset_s=60)
        for turn in range(3):
            first = SignedRows(4, Asked(verifier, ROWS[:4], identity=greedy).text)
            outcome = host.verify(query(first, SignedRows(1, Asked(verifier, ROWS[4:]).text)))
            assert outcome.failures == ()
            mine, others = receipts_of(outcome.verification, 2)
            assert bool(mine) is (turn == 0)
            assert others
    assert host.plugin_errors == {}


class Silent:
    """A server that accepts and does not answer, or answers with an error."""

    def __init__(self, status: int = 0, keep_alive_and_close: bool = False) -> None:
        self.calls = 0
        self.release = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_POST(self) -> None:
                outer.calls += 1
                self.rfile.read(int(self.headers["Content-Length"]))
                self.close_connection = keep_alive_and_close
                if not status:
                    outer.release.wait(10)
                self.send_response(status or 500)
                self.send_header("Content-Length", "0")
                self.end_headers()

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()


def test_a_hanging_verifier_costs_one_timeout_and_then_nothing(bundle: Bundle) -> None:
    silent = Silent()
    try:
        host = pipeline(bundle, silent.url, timeout_ms=600, breaker_failures=2, breaker_reset_s=60)
        kinds, times = [], []
        for _ in range(4):
            begin = time.monotonic()
            outcome = host.verify(query(SignedRows(5, "text")))
            times.append(time.monotonic() - begin)
            kinds.append(outcome.failures[0].kind)
            assert outcome.verification is None
        assert set(kinds[:2]) <= {"timeout", "raised"}
        assert kinds[2:] == ["open", "open"]
        assert max(times[:2]) < 5
        assert max(times[2:]) < min(times[:2])
        assert silent.calls == 2
        verdict = host.run(query(SignedRows(5, "text")), Prediction.from_output(ROWS, "logits"))
        assert (verdict.status == verdict.status[0]).all()
        assert "trusted" not in verdict.status_text
    finally:
        silent.close()


@pytest.mark.parametrize("status", [400, 408, 409, 429])
def test_a_refusal_of_one_request_says_nothing_about_the_verifier(bundle: Bundle, status: int) -> None:
    silent = Silent(status)
    try:
        host = pipeline(bundle, silent.url, breaker_failures=1, breaker_reset_s=60)
        for _ in range(3):
            outcome = host.verify(query(SignedRows(5, "text")))
            assert outcome.failures == ()
            assert receipts_of(outcome.verification, 1) == ("",)
    finally:
        silent.close()


def test_receipts_that_came_before_a_failure_are_handed_on(bundle: Bundle) -> None:
    """A request can be spent once: nobody could ask for these receipts again."""
    verifier = Hardware().verifier(bundle)
    running = RunningVerifier(verifier)
    with running:
        plugin = pipeline(bundle, f"http://{running.http}").manager.get_plugin("remote")
        ask, asked = plugin._ask, []

        def stops_after_the_first(*arguments: Any) -> Any:
            if asked:
                running.stop()
            asked.append(arguments)
            return ask(*arguments)

        plugin._ask = stops_after_the_first
        parts = [SignedRows(1, Asked(verifier, ROWS[i : i + 1]).text) for i in range(5)]
        first, *others = receipts_of(plugin.fides_verify(query(*parts)), 5)
    assert first
    assert others == [""] * 4
    with pytest.raises(ServerError):
        plugin.fides_verify(query(*parts))


@pytest.mark.parametrize("status", [500, 503])
def test_a_verifier_that_is_not_well_counts_as_failed(bundle: Bundle, status: int) -> None:
    silent = Silent(status)
    try:
        host = pipeline(bundle, silent.url, breaker_failures=2, breaker_reset_s=60)
        kinds = [host.verify(query(SignedRows(5, "text"))).failures[0].kind for _ in range(3)]
        assert kinds == ["raised", "raised", "open"]
    finally:
        silent.close()


def test_a_verifier_that_is_gone_is_a_failure(bundle: Bundle) -> None:
    first = RunningVerifier(Hardware().verifier(bundle))
    with first:
        host = pipeline(bundle, f"http://{first.http}", timeout_ms=5000)
        asked = Asked(first.verifier, ROWS)
        assert receipts_of(host.verify(query(SignedRows(5, asked.text))).verification, 1)[0]
    assert host.verify(query(SignedRows(5, asked.text))).failures[0].kind == "raised"


def test_a_connection_that_was_closed_while_idle_is_opened_again(bundle: Bundle) -> None:
    closing = Silent(status=400, keep_alive_and_close=True)
    try:
        plugin = pipeline(bundle, closing.url).manager.get_plugin("remote")
        for calls in (1, 2, 3):
            answer = plugin.fides_verify(query(SignedRows(5, "text")))
            assert receipts_of(answer, 1) == ("",)
            assert closing.calls == calls
            time.sleep(0.05)
    finally:
        closing.close()


@pytest.mark.parametrize("options", [{}, {"url": "here"}, {"url": "ftp://host"}, {"url": "http://host", "adress": "x"}])
def test_options_that_cannot_work_stop_the_start(bundle: Bundle, options: dict[str, str]) -> None:
    plugins = {"blocked": ["verifier"], "options": {"remote": options}}
    chosen = Settings.from_mapping({"plugins": plugins})
    with pytest.raises(FidesError, match="remote"):
        create_plugin_manager(chosen, bundle)
