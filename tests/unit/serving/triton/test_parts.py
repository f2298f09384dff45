"""The parts of the Triton adapter that need no server: wire format, decoders, types, probes, watch."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fides_plugins.errors import InputError, ServerError, SettingsError
from fides_plugins.guard import Failure
from fides_plugins.pipeline import VerifyOutcome
from fides_plugins.serving.triton import wire
from fides_plugins.serving.triton.config import short_name
from fides_plugins.serving.triton.decoders import make_decoder
from fides_plugins.serving.triton.operator.api import NotExplicit, Statistics, TritonApi, UnknownModel, Unreachable
from fides_plugins.serving.triton.operator.check import _harm
from fides_plugins.serving.triton.operator.probe import recognise, sample_batches, sample_inputs, sample_png
from fides_plugins.serving.triton.operator.watch import Event, Watcher, degraded_config, full_config, watch_forever
from fides_plugins.statistics.monitor import EProcess
from fides_plugins.types import Verification, softmax


def outcome() -> VerifyOutcome:
    rng = np.random.default_rng(0)
    parts = [Verification.single(softmax(rng.normal(size=(3, 5))), source=name) for name in ("a", "b")]
    return VerifyOutcome(Verification.join(parts), (Failure("c", "fides_verify", "timeout"),))


def test_an_outcome_survives_the_wire() -> None:
    packed = wire.pack_outcome(outcome(), 3, 5)
    assert {n: a.shape[0] for n, a in packed.items()} == dict.fromkeys(wire.INTERNAL, 3)
    found = wire.unpack_outcome(*packed.values())
    want = outcome().verification
    assert found.verification is not None
    assert want is not None
    assert found.verification.references.tobytes() == want.references.tobytes()
    assert found.verification.sources == ("a", "b")
    assert found.failures == outcome().failures


def test_no_verification_stays_no_verification() -> None:
    packed = wire.pack_outcome(VerifyOutcome(None), 2, 4)
    assert packed[wire.REFERENCES].shape == (2, 1, 4)
    assert wire.unpack_outcome(*packed.values()) == VerifyOutcome(None)


def test_evidence_that_is_no_json_is_left_out() -> None:
    single = Verification.single(np.full((1, 2), 0.5), "a", evidence={"ms": 3, "raw": b"x"})
    packed = wire.pack_outcome(VerifyOutcome(single), 1, 2)
    found = wire.unpack_outcome(*packed.values()).verification
    assert found is not None
    assert dict(found.evidence[0]) == {"ms": 3}


@pytest.mark.parametrize(
    "text", [b"", b"no json", b"[]", b"{}", b'{"failures": [["a"]], "sources": []}', b'{"failures": 3, "sources": []}']
)
def test_a_forged_text_is_an_input_error(text: bytes) -> None:
    array = np.frombuffer(text, dtype=np.uint8)[None]
    with pytest.raises(InputError, match="cannot be read"):
        wire.unpack_outcome(np.full((1, 1, 2), 0.5), np.ones((1, 1)), array)


def test_only_the_marked_text_is_a_probe() -> None:
    text = wire.pack_outcome(outcome(), 3, 5)[wire.VERIFICATION]
    assert not wire.is_probe(text)
    assert wire.is_probe(wire.mark_probe(text))
    named = VerifyOutcome(None, (Failure('"probe": true', "h", "timeout"),))
    assert not wire.is_probe(wire.pack_outcome(named, 1, 5)[wire.VERIFICATION])


def test_types_of_configurations_are_the_protocols() -> None:
    assert [short_name(n) for n in ("TYPE_FP32", "FP32", "TYPE_STRING", "BYTES")] == ["FP32", "FP32", "BYTES", "BYTES"]


def test_the_sample_image_is_an_image() -> None:
    image = pytest.importorskip("PIL.Image")
    assert image.open(io.BytesIO(sample_png())).size == (32, 32)


def test_a_decoder_makes_the_declared_tensor() -> None:
    pytest.importorskip("PIL.Image")
    decode = make_decoder("image:size=16x24,mode=RGB,layout=NCHW,scale=255,mean=0.5,std=0.5")
    assert decode is not None
    found = decode(np.array([[sample_png()], [sample_png()]], dtype=np.object_))
    assert found.shape == (2, 3, 16, 24)
    assert found.dtype == np.float32
    assert -1.0 <= found.min() < -0.9
    assert 0.9 < found.max() <= 1.0
    with pytest.raises(InputError, match="not a JPEG or PNG"):
        decode(np.array([[b"GIF89a"]], dtype=np.object_))
    assert make_decoder("") is None


@pytest.mark.parametrize(
    "text", ["audio:rate=16000", "image:mode=RGB", "image:size=8", "image:size=8x8,mode=CMYK", "image:size=8x8,crop=4",
             "image:size=8x8,scale=0"]
)  # fmt: skip
def test_a_decoder_that_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(SettingsError):
        make_decoder(text)


def test_generated_inputs_fit_the_declaration() -> None:
    config = {
        "max_batch_size": 4,
        "input": [
            {"name": "a", "data_type": "TYPE_FP16", "dims": ["3", "-1"]},
            {"name": "b", "data_type": "TYPE_STRING", "dims": ["1"]},
            {"name": "c", "data_type": "TYPE_INT64", "dims": ["2"], "optional": True},
        ],
    }
    found = sample_inputs(config, {})
    assert set(found) == {"a", "b"}
    assert found["a"].shape == (1, 3, 32)
    assert found["a"].dtype == np.float16
    assert found["b"].shape == (1, 1)
    given = np.zeros((1, 3, 5), np.float16)
    assert sample_inputs(config, {"a": given})["a"] is given


STEPS: list[dict[str, Any]] = [
    {
        "model_name": "m__fides_verify",
        "model_version": 1,
        "input_map": {"x": "x"},
        "output_map": {n: n for n in wire.INTERNAL},
    },
    {"model_name": "m__base", "model_version": "3", "input_map": {"x": "x"}, "output_map": {"y": "service.y"}},
    {
        "model_name": "m__fides_validate",
        "model_version": "1",
        "input_map": {"y": "service.y", **{n: n for n in wire.INTERNAL}},
        "output_map": {"y": "y"},
    },
]
CONFIG = {"name": "m", "platform": "ensemble", "ensemble_scheduling": {"step": STEPS}}
READY = dict.fromkeys(("m", "m__base", "m__fides_verify", "m__fides_validate", "m__fides_fallback"), "READY")


def test_protection_is_recognised_degraded_and_restored() -> None:
    full = recognise(CONFIG, READY)
    assert full is not None
    assert (full.steps, full.fallback, full.degraded) == (
        ("m__base", "m__fides_verify", "m__fides_validate"),
        "m__fides_fallback",
        False,
    )
    degraded = recognise(degraded_config(full), READY)
    assert degraded is not None
    assert degraded.degraded
    assert degraded.steps == full.steps
    assert [s["model_name"] for s in degraded.config["ensemble_scheduling"]["step"]] == ["m__base", "m__fides_fallback"]
    verify = {"input": [{"name": "x"}]}
    assert full_config(degraded, verify, {})["ensemble_scheduling"]["step"] == STEPS
    assert CONFIG["ensemble_scheduling"] == {"step": STEPS}


def test_other_ensembles_and_models_are_not_ours() -> None:
    assert recognise({"name": "x", "backend": "python"}, READY) is None
    assert recognise({"name": "x", "ensemble_scheduling": {"step": STEPS[:1]}}, READY) is None


class ServerWithAStep:
    """A stand-in for the server's API whose verification is dead until its next reload."""

    def __init__(self, heals: bool = True) -> None:
        self.calls: list[str] = []
        self.dead = False
        self.heals = heals
        self.configs: dict[str, Any] = {
            "m": CONFIG,
            "m__base": {"name": "m__base", "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": ["2"]}]},
            "m__fides_verify": {"input": [{"name": "x", "data_type": "TYPE_FP32", "dims": ["2"]}]},
            "m__fides_validate": {
                "input": [
                    {"name": "y", "data_type": "TYPE_FP32", "dims": ["3"]},
                    {"name": wire.REFERENCES, "data_type": "TYPE_FP32", "dims": ["-1", "3"]},
                ]
            },
        }

    def index(self) -> list[dict[str, str]]:
        return [{"name": n, "state": s} for n, s in READY.items()]

    def config(self, model: str) -> Any:
        return self.configs.get(model, {"name": model})

    def statistics(self, model: str) -> Statistics:
        return Statistics(0, 0, 0.0)

    def infer(self, model: str, inputs: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        if self.dead and model == "m__fides_verify":
            raise TimeoutError
        return {}

    def load(self, model: str, config: Any = None) -> None:
        names = [s["model_name"] for s in (config or {}).get("ensemble_scheduling", {}).get("step", [])]
        self.calls.append(f"load {model} {'fallback' if 'm__fides_fallback' in names else ''}".strip())
        if config:
            self.configs[model] = config

    def reload(self, model: str) -> None:
        self.calls.append(f"reload {model}")
        if not self.heals:
            raise ServerError("Loading failed.")
        self.dead = False


def watcher(server: ServerWithAStep, events: list[Event], now: list[float], heal: bool = True) -> Watcher:
    api: Any = server
    return Watcher(api, heal=heal, report=events.append, clock=lambda: now[0])


def test_watch_degrades_reloads_and_restores_in_this_order() -> None:
    server, events = ServerWithAStep(), []
    watch = watcher(server, events, [0.0])
    assert watch.look()
    server.calls.clear()
    server.dead = True
    assert watch.look()
    assert server.calls == ["load m fallback", "reload m__fides_verify", "load m"]
    assert [e.kind for e in events][-4:] == ["dead", "degraded", "reloaded", "restored"]
    assert not recognise(server.configs["m"], READY).degraded  # type: ignore[union-attr]


def test_watch_that_cannot_heal_stays_degraded_and_waits_longer_each_time() -> None:
    server, events, now = ServerWithAStep(heals=False), [], [0.0]
    watch = watcher(server, events, now)
    server.dead = True
    tries = []
    for step in range(100):
        now[0] = step * 0.25
        assert not watch.look()
        if "reload m__fides_verify" in server.calls:
            tries.append(now[0])
            server.calls.clear()
    assert recognise(server.configs["m"], READY).degraded  # type: ignore[union-attr]
    assert tries == [0.0, 1.0, 3.0, 7.0, 15.0]


def test_a_liveness_look_changes_nothing() -> None:
    server, events = ServerWithAStep(), []
    watch = watcher(server, events, [0.0], heal=False)
    assert watch.look()
    server.dead = True
    assert not watch.look()
    assert server.calls == []


@pytest.mark.parametrize(
    ("statuses", "p_values", "why"),
    [
        (["trusted", "trusted"], [0.5, 1.0], ""),
        (["trusted"], [np.nan], ""),
        (["trusted", "attacked"], [0.9, 0.001], "attacked"),
        (["trusted", "trusted"], [0.9, 0.05], "0.05"),
    ],
)
def test_a_check_sends_only_rows_that_cannot_raise_the_alarm(
    statuses: list[str], p_values: list[float], why: str
) -> None:
    """Sent again and again, a trusted row of a small p-value is evidence like any sequence; see `EProcess`."""
    harm = _harm(statuses, np.array(p_values, np.float32))
    assert (why in harm) if why else not harm
    if not harm and not np.isnan(p_values).any():
        process = EProcess(1000)
        wealth = [float(process.step(np.array([p]))[0]) for p in p_values * 200]
        assert max(wealth) <= 1.0


def test_rows_are_tried_in_batches_that_the_model_takes_and_not_without_end() -> None:
    config = {"max_batch_size": 24, "input": [
        {"name": "a", "data_type": "TYPE_FP32", "dims": [2]}, {"name": "b", "data_type": "TYPE_FP32", "dims": [3]},
    ]}  # fmt: skip
    rows = np.arange(200, dtype=np.float32).reshape(100, 2)
    found = list(sample_batches(config, {"a": rows, "label": np.arange(7)}))
    assert [len(batch["a"]) for batch in found] == [24, 24, 16]
    assert np.concatenate([batch["a"] for batch in found]).tobytes() == rows[:64].tobytes()
    assert [batch["b"].shape for batch in found] == [(24, 3), (24, 3), (16, 3)]
    free = {"max_batch_size": 0, "input": [{"name": "a", "data_type": "TYPE_FP32", "dims": [-1, 2]}]}
    assert [len(batch["a"]) for batch in sample_batches(free, {"a": rows})] == [64]
    # Where no axis counts rows, the array is one request, whatever its shape.
    whole = {"max_batch_size": 0, "input": [{"name": "a", "data_type": "TYPE_FP32", "dims": [100, 2]}]}
    assert [len(batch["a"]) for batch in sample_batches(whole, {"a": rows})] == [100]
    for data in ({"a": rows, "b": np.zeros((3, 3))}, {"a": rows[:0]}, {"a": np.array(1.0)}):
        with pytest.raises(InputError, match="have these rows: a"):
            list(sample_batches(config, data))


def test_an_unreachable_server_is_a_server_error() -> None:
    with pytest.raises(ServerError, match="cannot be reached"):
        TritonApi("127.0.0.1:1").index()


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("", "http://[::1]:8002/metrics"),
        ("host:9002", "http://host:9002/metrics"),
        ("http://host/triton/metrics", "http://host:8002/triton/metrics"),
    ],
)
def test_the_metrics_are_where_they_are_said_to_be(given: str, asked: str) -> None:
    """`host:port` is how every other address is written; it was read as a scheme, and `none:8002` was asked."""
    assert TritonApi("http://[::1]:8000", metrics_url=given).metrics_url == asked
    with pytest.raises(ServerError, match="--metrics HOST:PORT"):
        TritonApi("127.0.0.1:1", metrics_url="127.0.0.1:1").metrics()


@pytest.mark.parametrize("address", ["127.0.0.1:abc", "127.0.0.1:99999", "http://[::1", "ftp://x"])
def test_an_address_that_is_none_is_a_message(address: str) -> None:
    with pytest.raises(ServerError, match="Write host:port"):
        TritonApi(address)


@pytest.mark.parametrize(
    "fault", ["one array", "damaged", "cut off", "nothing in it", "no bytes", "objects", "no file"]
)
def test_data_that_cannot_be_read_are_a_message(tmp_path: Path, fault: str) -> None:
    from fides_plugins.cli.triton import _read_data

    file = tmp_path / ("rows.npy" if fault == "one array" else "rows.npz")
    rows = np.arange(4000.0).astype(np.object_) if fault == "objects" else np.arange(4000.0)
    if fault == "one array":
        np.save(file, rows)
    elif fault == "nothing in it":
        np.savez(file)
    elif fault == "no bytes":
        file.touch()
    elif fault != "no file":
        np.savez_compressed(file, x=rows)
        content = file.read_bytes()
        if fault == "cut off":
            file.write_bytes(content[: len(content) // 2])
        elif fault == "damaged":
            file.write_bytes(content[:200] + bytes(100) + content[300:])
    with pytest.raises(InputError, match=r"rows\.np[yz]"):
        _read_data(file)


def test_the_watch_ends_where_it_can_never_heal_and_says_once_what_it_waits_for() -> None:
    class Stubborn:
        def __init__(self, errors: list[Exception | None]) -> None:
            self.errors, self.events = errors, []  # type: ignore[var-annotated]
            self.report = self.events.append

        def look(self) -> None:
            if not self.errors:
                stop.set()
            elif (error := self.errors.pop(0)) is not None:
                raise error

        def forget(self) -> None: ...

    down, bare = Unreachable("It cannot be reached."), ServerError("It is not protected.")
    never = (NotExplicit("Loading 'm'"), UnknownModel("The server has no model 'x'."))
    for error in never:
        stop, watch = threading.Event(), Stubborn([down, error])
        with pytest.raises(type(error)):
            watch_forever(watch, 0, stop)  # type: ignore[arg-type]
    # A model that was watched may come back; what is waited for is said once.
    stop, watch = threading.Event(), Stubborn([down, down, None, never[1], bare, TimeoutError(), down])
    watch_forever(watch, 0, stop)  # type: ignore[arg-type]
    assert [e.kind for e in watch.events] == ["unreachable", "unprotected", "unreachable"]


def test_a_missing_wheel_is_said_in_one_line() -> None:
    code = (
        "import sys; sys.modules['pytriton'] = None\n"
        "from fides_plugins.launch.triton import TritonServer, is_available\n"
        "assert not is_available()\n"
        "TritonServer('.').start()\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ServerError: No Triton server is installed here" in found.stderr
    assert "pip install 'fides-plugins[triton]'" in found.stderr


def test_the_watch_and_the_steps_import_neither_torch_nor_clients() -> None:
    code = (
        "import sys\n"
        "from fides_plugins.serving.triton import wire, decoders, entry\n"
        "from fides_plugins.serving.triton.operator import watch, check\n"
        "print([m for m in ('torch', 'tritonclient', 'gevent', 'PIL', 'onnx') if m in sys.modules])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
