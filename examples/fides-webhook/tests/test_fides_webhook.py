import hashlib
import hmac
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from fides_webhook import NAME, SIGNATURE_HEADER, Webhook

from fides_plugins import Prediction, SettingsError
from fides_plugins.testing import check_plugin, fake_logits, fake_query, switch_top_two


class Receiver:
    """A real HTTP endpoint that answers with the given statuses, then 204; `gate` makes it hang."""

    def __init__(self, *statuses):
        self.statuses = list(statuses)
        self.bodies, self.headers = [], []
        self.gate = threading.Event()
        self.gate.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.gate.wait(10)
                status = outer.statuses.pop(0) if outer.statuses else 204
                if status < 300:
                    outer.bodies.append(json.loads(body))
                    outer.headers.append((dict(self.headers), body))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/alerts"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.gate.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def receiver():
    made = Receiver()
    yield made
    made.close()


def options(receiver, **more):
    return {"plugins": {"options": {NAME: {"url": receiver.url, "backoff_s": 0.01, **more}}}}


def lie(logits, rows):
    return Prediction.from_output(switch_top_two(logits, rows=rows), "logits")


def wait_for(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_it_keeps_the_contract(receiver):
    report = check_plugin(Webhook, name=NAME, class_counts=(2, 10), options={"url": receiver.url})
    assert report.slowest_ms("fides_record") < 50


def test_an_attack_is_posted_with_its_rows(fides_pipeline, receiver):
    logits = fake_logits(5)
    pipeline = fides_pipeline(Webhook, mode="flag", **options(receiver))
    pipeline.run(fake_query(logits, request_ids=tuple("abcde"), model_name="digits"), lie(logits, [3]))
    wait_for(lambda: receiver.bodies)
    (alert,) = receiver.bodies
    assert alert["model"] == "digits"
    assert alert["counts"]["attacked"] == 1
    (row,) = alert["rows"]
    assert (row["row"], row["request_id"], row["status"]) == (3, "d", "attacked")
    assert row["label"] == row["verified_label"] == int(logits[3].argmax()) != row["service_label"]


def test_honest_traffic_posts_nothing(fides_pipeline, receiver):
    plugin = Webhook()
    logits = fake_logits(5)
    pipeline = fides_pipeline(plugin, mode="flag", **options(receiver))
    pipeline.run(fake_query(logits), Prediction.from_output(logits, "logits"))
    pipeline.close()
    assert receiver.bodies == []
    assert not plugin.counts


def test_failures_are_tried_again(fides_pipeline, receiver):
    receiver.statuses = [503, 429, 200]
    plugin = Webhook()
    logits = fake_logits(2)
    fides_pipeline(plugin, mode="flag", **options(receiver)).run(fake_query(logits), lie(logits, [0]))
    wait_for(lambda: plugin.counts["sent"] == 1)
    assert plugin.counts == {"sent": 1, "retried": 2}


def test_a_refusal_is_not_tried_again_and_attempts_end(fides_pipeline, receiver):
    plugin = Webhook()
    logits = fake_logits(2)
    pipeline = fides_pipeline(plugin, mode="flag", **options(receiver, attempts=3))
    receiver.statuses = [403]
    pipeline.run(fake_query(logits), lie(logits, [0]))
    wait_for(lambda: plugin.counts["failed"] == 1)
    assert plugin.counts["retried"] == 0
    receiver.statuses = [500] * 3
    pipeline.run(fake_query(logits), lie(logits, [0]))
    wait_for(lambda: plugin.counts["failed"] == 2)
    assert plugin.counts["retried"] == 2


def test_a_hanging_endpoint_never_blocks_serving(fides_pipeline, receiver):
    receiver.gate.clear()
    plugin = Webhook()
    logits = fake_logits(2)
    pipeline = fides_pipeline(plugin, mode="flag", **options(receiver, queue_size=5))
    start = time.perf_counter()
    for _ in range(50):
        assert pipeline.run(fake_query(logits), lie(logits, [0])).counts()["attacked"] == 1
    spent = time.perf_counter() - start
    # The endpoint hangs for 3 s (timeout_s) a post; 50 requests must not notice.
    assert spent < 2.0
    assert pipeline.plugin_errors == {}
    # One alert is under way, five wait, the rest is counted.
    assert plugin.counts["dropped"] in (44, 45)
    receiver.gate.set()
    wait_for(lambda: plugin.counts["sent"] == 50 - plugin.counts["dropped"])


def test_closing_sends_what_is_queued_and_is_quick_when_nobody_listens(fides_manager, fides_pipeline, receiver):
    plugin = Webhook()
    logits = fake_logits(2)
    pipeline = fides_pipeline(plugin, mode="flag", **options(receiver))
    for _ in range(20):
        pipeline.run(fake_query(logits), lie(logits, [0]))
    pipeline.close()
    assert plugin.counts["sent"] == 20
    dead = fides_pipeline(Webhook, mode="flag", **options(receiver, url="http://127.0.0.1:9/", backoff_s=60))
    dead.run(fake_query(logits), lie(logits, [0]))
    start = time.perf_counter()
    dead.close()
    assert time.perf_counter() - start < 3.0


def test_alerts_are_signed(fides_pipeline, receiver, monkeypatch):
    monkeypatch.setenv("HOOK_SECRET", "abc")
    logits = fake_logits(2)
    fides_pipeline(Webhook, mode="flag", **options(receiver, secret_env="HOOK_SECRET")).run(
        fake_query(logits), lie(logits, [0])
    )
    wait_for(lambda: receiver.headers)
    headers, body = receiver.headers[0]
    assert headers[SIGNATURE_HEADER] == hmac.new(b"abc", body, hashlib.sha256).hexdigest()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"url": ""}, "no address"),
        ({"url": "file:///etc/passwd"}, "no address"),
        ({"url": "http://h/", "statuses": "attackd"}, "attackd"),
        ({"url": "http://h/", "secret_env": "NOT_SET_HERE"}, "NOT_SET_HERE"),
    ],
)
def test_senseless_options_stop_the_start(fides_manager, values, text):
    with pytest.raises(SettingsError, match=text):
        fides_manager(Webhook, plugins={"options": {NAME: values}})
