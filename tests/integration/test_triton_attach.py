"""A stranger's repository: attach, serve unchanged clients, switch a live server, survive kills, detach."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from fides_plugins.errors import ServerError
from fides_plugins.launch.triton import TritonServer, is_available
from fides_plugins.serving.triton.attach import attach, detach
from fides_plugins.serving.triton.operator.api import InferenceRefused, TritonApi
from fides_plugins.serving.triton.operator.check import check
from fides_plugins.serving.triton.operator.watch import Event, Watcher, watch_forever
from fides_plugins.serving.triton.plan import AttachOptions
from fides_plugins.testing import fake_logits
from fides_plugins.types import softmax
from tests.support.command_line import fides
from tests.support.triton_models import STRANGER_CONFIG, image_bundle, images, stranger_repository, tree_digest

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not is_available(), reason="no Triton server for this platform"),
]

LOGITS = fake_logits(4, seed=31)
PIXELS = images(LOGITS)
N_CLIENTS = 4


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_bundle(tmp_path_factory.mktemp("attach-bundle") / "bundle")


# --- a server started with the one flag ------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Iterator[TritonServer]:
    """The stranger's repository before and after: `flowers` taken over, `roses` protected under other names."""
    root = tmp_path_factory.mktemp("stranger")
    repository = stranger_repository(root / "repository")
    roses = STRANGER_CONFIG.replace('"flowers"', '"roses"').replace("flower_labels.txt", "labels/of roses.txt")
    stranger_repository(repository, roses, model="roses")
    (repository / "roses" / "labels").mkdir()
    (repository / "roses" / "flower_labels.txt").rename(repository / "roses" / "labels" / "of roses.txt")
    before = tree_digest(repository)
    attach(repository, "flowers", AttachOptions(bundle))
    for mode in ("flag", "correct", "reject"):
        attach(repository, "roses", AttachOptions(bundle, serve_as=f"roses_{mode}", settings={"mode": mode}))
    with TritonServer(repository, config_name="fides", auto_complete=False) as running:
        yield running
    for name in ("flowers", "roses_flag", "roses_correct", "roses_reject"):
        detach(repository, name)
    assert tree_digest(repository) == before


def unchanged_client(protocol: str, server: TritonServer, model: str) -> Any:
    """What the stranger's clients do: the model's own names, nothing of ours."""
    module = tritonclient.http if protocol == "http" else tritonclient.grpc
    with module.InferenceServerClient(server.http_address if protocol == "http" else server.grpc_address) as client:
        tensor = module.InferInput("pixels_in", list(PIXELS.shape), "FP32")
        tensor.set_data_from_numpy(PIXELS)
        raw = client.infer(model, [tensor])
        classes = client.infer(model, [tensor], outputs=[module.InferRequestedOutput("scores", class_count=2)])
        metadata = client.get_model_metadata(model, **({} if protocol == "http" else {"as_json": True}))
    response = raw.get_response()
    names = [o["name"] for o in response["outputs"]] if protocol == "http" else [o.name for o in response.outputs]
    tensors = [(t["name"], t["datatype"], t["shape"]) for part in ("inputs", "outputs") for t in metadata[part]]
    return names, raw.as_numpy("scores").tobytes(), classes.as_numpy("scores").tolist(), metadata["versions"], tensors


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_unchanged_clients_get_equal_answers(served: TritonServer, protocol: str) -> None:
    protected = unchanged_client(protocol, served, "flowers")
    assert protected == unchanged_client(protocol, served, "flowers__base")
    names, _, classes, versions, _ = protected
    assert names == ["scores"]
    assert versions == ["3"]
    assert classes[0][0].endswith(f":flower {LOGITS[0].argmax()}".encode())


def test_the_attacked_service_is_flagged_corrected_and_rejected(served: TritonServer) -> None:
    ask = {"inputs": {"pixels_in": PIXELS}, "parameters": {"attack": "0,2"}}
    flagged = served.api.infer("roses_flag__fides", **ask)
    assert [s.decode() for s in flagged["FIDES_STATUS"].ravel()] == ["attacked", "trusted", "attacked", "trusted"]
    assert flagged["scores"].tobytes() == served.api.infer("roses", **ask)["scores"].tobytes()
    corrected = served.api.infer("roses_correct", **ask)
    assert list(corrected) == ["scores"]
    np.testing.assert_allclose(softmax(corrected["scores"]), softmax(LOGITS), atol=0.02)
    assert corrected["scores"].argmax(axis=1).tolist() == LOGITS.argmax(axis=1).tolist()
    with pytest.raises(InferenceRefused, match=r"attacked: refused 2 of 4 row"):
        served.api.infer("roses_reject", **ask)
    assert served.api.infer("roses_reject", {"pixels_in": PIXELS})["scores"].shape == (4, 10)


def test_check_and_liveness_on_the_command_line(served: TritonServer) -> None:
    good = fides("check", "triton", served.http_address, "flowers")
    assert good.returncode == 0, good.stdout + good.stderr
    assert "verification" in good.stdout
    assert fides("watch", "triton", served.http_address, "--once").returncode == 0
    bare = fides("check", "triton", served.http_address, "roses")
    assert bare.returncode == 2
    assert "not protected" in bare.stderr
    assert "Traceback" not in bare.stderr


def test_ten_thousand_mixed_requests_add_up_and_leave_the_server_as_it_was(served: TritonServer) -> None:
    good, nan = PIXELS[:1], np.full_like(PIXELS[:1], np.nan)
    cases: list[tuple[dict[str, Any], set[int]]] = [
        ({"pixels_in": good}, {200}),
        ({"pixels_in": good.astype(np.float64)}, {400}),
        ({"pixels_in": good[:, :, :7]}, {400}),
        ({"pixels_in": nan}, {200}),
        ({"pixels_in": np.repeat(good, 17, axis=0)}, {400}),
        ({}, {400}),
        ({"no_such_input": good}, {400}),
        ({"pixels_in": PIXELS}, {200}),
    ]
    counts: Counter[int] = Counter()
    expected: Counter[int] = Counter()
    wrong: list[str] = []
    lock = threading.Lock()

    def client(share: range) -> None:
        for number in share:
            # Mostly good requests, so that the test also loads the steps.
            inputs, allowed = cases[number % 16] if number % 16 < len(cases) else cases[0]
            try:
                served.api.infer("flowers__fides" if number % 3 else "flowers", inputs)
                status = 200
            except InferenceRefused as error:
                status = error.status
                if "Traceback" in error.message or ".py" in error.message:
                    wrong.append(error.message)
            with lock:
                counts[status] += 1
                expected[min(allowed)] += 1
                if status not in allowed:
                    wrong.append(f"{sorted(inputs)}: {status}")

    def resident() -> int:
        from fides_plugins.launch.process import resident_bytes

        return resident_bytes(served.process.tree)

    total, warm = 10_000, 2_000
    client(range(warm))
    before = resident()
    shares = [range(warm + i, total, N_CLIENTS) for i in range(N_CLIENTS)]
    threads = [threading.Thread(target=client, args=(share,)) for share in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sum(counts.values()) == total
    assert counts == expected
    assert resident() < before * 1.05 + 20e6
    assert [f.what for f in check(served.api, "flowers") if not f.good] == []


# --- a running server, switched and killed under load -----------------------------------------------


@dataclass
class Load:
    """Requests of several clients in a loop until stopped: (start, end, what came back)."""

    ask: Callable[[], str]
    log: list[tuple[float, float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(N_CLIENTS)]

    def _run(self) -> None:
        while not self._stop.is_set():
            start = time.monotonic()
            try:
                answer = self.ask()
            except InferenceRefused as error:
                answer = f"{error.status} {error.message}"
            except OSError as error:
                answer = f"lost {error!r}"
            self.log.append((start, time.monotonic(), answer))
            time.sleep(0.005)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=30)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TritonServer, Path]]:
    repository = stranger_repository(tmp_path_factory.mktemp("live") / "repository")
    with TritonServer(repository, explicit=True, auto_complete=False) as running:
        yield running, repository


def test_switching_a_live_server_there_and_back_fails_no_request(live: tuple[TritonServer, Path], bundle: Path) -> None:
    server, repository = live
    before = tree_digest(repository)
    expected = server.api.infer("flowers", {"pixels_in": PIXELS})["scores"].tobytes()

    def ask() -> str:
        answer = server.api.infer("flowers", {"pixels_in": PIXELS})
        return "equal" if list(answer) == ["scores"] and answer["scores"].tobytes() == expected else "different"

    with Load(ask) as load:
        time.sleep(0.5)
        attach(repository, "flowers", AttachOptions(bundle, settings={"mode": "flag"}), live=server.http_address)
        switched = time.monotonic()
        time.sleep(1)
        assert server.api.config("flowers")["platform"] == "ensemble"
        verdict = server.api.infer("flowers__fides", {"pixels_in": PIXELS}, parameters={"attack": "1"})
        back = time.monotonic()
        detach(repository, "flowers", live=server.http_address)
        time.sleep(0.5)
    assert verdict["FIDES_STATUS"].ravel().tolist() == [b"trusted", b"attacked", b"trusted", b"trusted"]
    assert Counter(answer for *_, answer in load.log) == {"equal": len(load.log)}
    assert sum(switched < start and end < back for start, end, _ in load.log) > 20
    assert server.api.config("flowers")["platform"] == ""
    assert [m["name"] for m in server.api.index()] == ["flowers"]
    assert tree_digest(repository) == before


def kill_step(server: TritonServer, step: str) -> float:
    pids = server.stub_pids(step)
    assert pids, f"no process of {step}"
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return time.monotonic()


@pytest.mark.parametrize("on_error", ["open", "closed"])
def test_killed_steps_come_back_by_themselves_and_nothing_is_trusted_meanwhile(
    tmp_path: Path, bundle: Path, on_error: str
) -> None:
    repository = stranger_repository(tmp_path / "repository")
    attach(repository, "flowers", AttachOptions(bundle, settings={"mode": "flag", "on_error": on_error}))
    events: list[tuple[float, Event]] = []
    stop = threading.Event()
    # A server that lost a process of its own does not stop by itself; it need not have ten seconds for trying.
    with TritonServer(repository, explicit=True, config_name="fides", auto_complete=False, grace_s=1.0) as server:
        api = server.api
        watcher = Watcher(TritonApi(server.http_address), report=lambda e: events.append((time.monotonic(), e)))
        thread = threading.Thread(target=watch_forever, args=(watcher, 0.2, stop), daemon=True)
        thread.start()
        deadline = time.monotonic() + 30
        while not any(e.kind == "settled" and e.model == "flowers__fides" for _, e in list(events)):
            assert time.monotonic() < deadline, events
            time.sleep(0.1)

        def ask() -> str:
            found = api.infer("flowers__fides", {"pixels_in": PIXELS[:1]}, ["scores", "FIDES_STATUS"])
            return str(found["FIDES_STATUS"][0, 0].decode())

        with Load(ask) as load:
            for step in ("flowers__fides_verify", "flowers__fides_validate"):
                recovered = []
                # Time is bounded by other work on the machine too: the best of three kills counts for that.
                while len(recovered) < 3 and min(recovered, default=9.0) >= 3.0:
                    time.sleep(0.5)
                    recovered.append(_kill_and_survive(server, step, load, events, on_error))
                assert min(recovered) < 3.0, (step, recovered, events)
        stop.set()
        thread.join(timeout=10)
        assert [f.what for f in check(api, "flowers__fides") if not f.good] == []


def _kill_and_survive(
    server: TritonServer, step: str, load: Load, events: list[tuple[float, Event]], on_error: str
) -> float:
    """Kill a step under load, check what clients saw, and return the seconds until full protection was back."""
    killed = kill_step(server, step)
    deadline = killed + 30
    while sum(t > killed and e.kind == "restored" for t, e in list(events)) < 2:
        assert time.monotonic() < deadline, events
        time.sleep(0.05)
    # Requests that were inside the dead process fail up to some seconds later; then all is as before.
    time.sleep(2.5)
    since = [(t, e) for t, e in events if t > killed]
    restored = max(t for t, e in since if e.kind == "restored")
    kinds = [e.kind for _, e in since]
    assert kinds.index("dead") < kinds.index("degraded") < kinds.index("reloaded") < kinds.index("restored")
    degraded = max(t for t, e in since if e.kind == "degraded")
    seen = [entry for entry in list(load.log) if entry[1] > killed]
    # Nobody waits for ever, and everybody is told what happened.
    assert max(end - start for start, end, _ in seen) < 10.0
    assert not [answer for *_, answer in seen if answer.startswith("lost")]
    failed = [answer for *_, answer in seen if answer.startswith("500")]
    assert all("not healthy" in answer for answer in failed), failed
    # Only requests that were inside the dead step fail, and those that queued behind them.
    assert len(failed) <= 3 * N_CLIENTS
    # One ensemble is restored before the other, and serves before the watch says so: until the reload only.
    reloaded = min(t for t, e in since if e.kind == "reloaded")
    meanwhile = [answer for start, end, answer in seen if start > degraded + 0.05 and end < reloaded]
    allowed = "error" if on_error == "open" else "503"
    assert all(answer.startswith((allowed, "500")) for answer in meanwhile), Counter(meanwhile)
    after = [answer for start, _, answer in seen if start > restored + 0.5]
    assert after
    assert set(after) == {"trusted"}
    return restored - killed


#: A model that declares its tensors in code, so that it needs no config.pbtxt.
SELF_DECLARED = """

    @staticmethod
    def auto_complete_config(config):
        config.set_max_batch_size(8)
        config.add_input({"name": "pixels_in", "data_type": "TYPE_FP32", "dims": [1, 8, 8]})
        config.add_output({"name": "scores", "data_type": "TYPE_FP32", "dims": [10]})
        return config
"""


def test_a_model_without_config_is_taken_from_the_server_and_check_names_a_dead_step(
    tmp_path: Path, bundle: Path
) -> None:
    repository = stranger_repository(tmp_path / "repository")
    (repository / "flowers" / "config.pbtxt").unlink()
    for version in ("1", "3"):
        code = repository / "flowers" / version / "model.py"
        # The delay's parameter is gone with the config.
        text = code.read_text().replace('["parameters"]', '.get("parameters", {})')
        code.write_text(text.rstrip() + SELF_DECLARED)
    before = tree_digest(repository)
    with pytest.raises(ServerError, match=r"no config\.pbtxt.*--from-server"):
        attach(repository, "flowers", AttachOptions(bundle))
    with TritonServer(repository) as server:
        attach(repository, "flowers", AttachOptions(bundle), from_server=server.http_address)
    with TritonServer(repository, explicit=True, config_name="fides", grace_s=1.0) as server:
        bare = server.api.infer("flowers__base", {"pixels_in": PIXELS})["scores"]
        assert server.api.infer("flowers", {"pixels_in": PIXELS})["scores"].tobytes() == bare.tobytes()
        kill_step(server, "flowers__fides_verify")
        dead = fides("check", "triton", server.http_address, "flowers", "--json")
        assert dead.returncode == 1, dead.stderr
        findings = {f["what"]: f for f in json.loads(dead.stdout)["findings"]}
        assert findings["service model"]["good"]
        assert not findings["verification"]["good"]
        assert "not healthy" in findings["verification"]["detail"]
        assert "fides watch triton" in findings["verification"]["remedy"]
        assert fides("watch", "triton", server.http_address, "--once").returncode == 1
        assert Watcher(server.api).look()
        assert fides("check", "triton", server.http_address, "flowers").returncode == 0
    detach(repository, "flowers")
    assert tree_digest(repository) == before
