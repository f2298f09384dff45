"""The client's checks, one by one: what a receipt must say, when evidence is renewed, what is judged here."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from fides_plugins import Query
from fides_plugins.attestation.evidence import Evidence
from fides_plugins.attestation.receipt import Receipt, open_receipt
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.attestation.request import to_text
from fides_plugins.bundle import Bundle
from fides_plugins.cli import app
from fides_plugins.client import TorchServeClient, TritonClient
from fides_plugins.client.calls import Reply
from fides_plugins.client.receipts import Brought, Pending, ReceiptChecker
from fides_plugins.client.torchserve import decode_json, encode_json
from fides_plugins.client.trust import EvidenceFile, EvidenceUrl, Trust
from fides_plugins.enclave.verifier import Verifier
from fides_plugins.errors import FidesError, InputError, ServerError
from fides_plugins.protection import Protection
from fides_plugins.settings import Settings
from fides_plugins.testing import fake_logits, linear_onnx, memory_bundle, switch_top_two
from fides_plugins.types import softmax
from tests.support.clients import JudgingClient
from tests.support.pki import NOW_S
from tests.support.refusals import code
from tests.support.verifiers import IDENTITY, Hardware, digits_bundle, receipt_keys

ROWS = fake_logits(2)
OUTPUT = softmax(ROWS)


class Wire:
    """The evidence of a verifier in this process, and how often it was asked for."""

    challenges = True

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier
        self.fetched = 0

    def fetch(self, challenge: bytes) -> Evidence:
        self.fetched += 1
        return Evidence.from_json(self.verifier.evidence(challenge).to_json())


class Setting:
    """A verifier, a client that trusts it, and the clocks of both."""

    def __init__(self, hardware: Hardware, scheme: Any = "hpke", **policy: Any) -> None:
        self.hardware = hardware
        self.bundle = memory_bundle()
        self.verifier = hardware.verifier(self.bundle)
        self.wire = Wire(self.verifier)
        self.now, self.ticks = NOW_S, 0.0
        rules = hardware.policy(self.bundle, **policy)
        self.trust = Trust(rules, self.wire, roots=hardware.roots, clock=lambda: self.now)
        self.checker = ReceiptChecker(self.trust, IDENTITY, scheme, self.bundle, clock=lambda: self.ticks)

    def receipt(self, pending: Pending) -> Receipt:
        commitment = self.checker.commitment(OUTPUT) if self.checker.scheme == "commitment" else ""
        answer = self.verifier.answer(pending.text, ROWS, commitment)
        return open_receipt(answer.receipt, receipt_keys(self.verifier))

    def signed(self, receipt: Receipt) -> str:
        """The receipt signed with the enclave's own key: what only a broken enclave would sign."""
        return to_text(receipt.sign(self.verifier._signing, self.verifier.key_id))


@pytest.fixture(scope="module")
def hardware() -> Hardware:
    return Hardware()


@pytest.fixture
def setting(hardware: Hardware) -> Setting:
    return Setting(hardware)


@pytest.mark.parametrize("scheme", ["hpke", "commitment"])
def test_a_good_receipt_gives_the_reference_once(hardware: Hardware, scheme: str) -> None:
    setting = Setting(hardware, scheme)
    pending = setting.checker.begin(ROWS)
    text = setting.signed(setting.receipt(pending))
    np.testing.assert_allclose(setting.checker.check(pending, text, OUTPUT), softmax(ROWS), atol=1e-6)
    assert code(lambda: setting.checker.check(pending, text, OUTPUT)) == "receipt-replay"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"nonce": bytes(32)}, "receipt-nonce"),
        ({"session": b"\x01" * 16}, "receipt-session"),
        ({"boot_id": bytes(16)}, "receipt-start"),
        ({"tee": "sgx"}, "receipt-evidence"),
        ({"input_digest": bytes(32)}, "receipt-input"),
        ({"input_dtype": "FP64"}, "receipt-input"),
        ({"input_shape": (1, 20)}, "receipt-input"),
        ({"preprocessing": "resized"}, "receipt-input"),
        ({"bundle_digest": bytes(32)}, "receipt-bundle"),
        ({"bundle_version": 0}, "receipt-bundle-version"),
        ({"model": "other"}, "receipt-model"),
        ({"classes": bytes(32)}, "receipt-classes"),
        ({"judge": bytes(32)}, "receipt-judge"),
        ({"scheme": "commitment", "service_digest": bytes(32)}, "receipt-scheme"),
        ({"output_shape": (2, 11)}, "receipt-output"),
        ({"output_shape": (3, 10)}, "receipt-output"),
        ({"output_dtype": "FP64"}, "receipt-output"),
        ({"output": bytes(128)}, "receipt-sealed"),
        ({"profile": "fides-receipt/1+development"}, "receipt-signature"),
    ],
)
def test_what_a_receipt_says_must_fit(hardware: Hardware, change: dict[str, Any], expected: str) -> None:
    setting = Setting(hardware, minimum_bundle_version=1)
    pending = setting.checker.begin(ROWS)
    receipt = dataclasses.replace(setting.receipt(pending), **change)
    assert code(lambda: setting.checker.check(pending, setting.signed(receipt), OUTPUT)) == expected


OTHERS = {
    "request-model": {"name": "other"},
    "request-classes": {"class_names": tuple(f"class {i}" for i in reversed(range(10)))},
    "request-judge": {"n_calibration": 499},
}


@pytest.mark.parametrize(("expected", "change"), OTHERS.items(), ids=list(OTHERS))
def test_another_models_verifier_answers_nobody_elses_clients(
    hardware: Hardware, expected: str, change: dict[str, Any]
) -> None:
    """The policy trusts both bundles; the host serves the other one's function and shows its verifier."""
    setting = Setting(hardware)
    reversing = memory_bundle(**change)
    files = {name: reversing.file(name) for name in reversing.file_names}
    files["verification.onnx"] = linear_onnx(np.eye(10, dtype=np.float32)[::-1].copy())
    other = Bundle.in_memory(reversing.manifest, files)
    both = {"bundle_digests": [setting.bundle.digest, other.digest]}
    setting.wire.verifier = hardware.verifier(other)
    rules = hardware.policy(setting.bundle, models={"fake": both, "other": both})
    trust = Trust(rules, setting.wire, roots=hardware.roots, clock=lambda: setting.now)
    pending = ReceiptChecker(trust, IDENTITY, "hpke", setting.bundle).begin(ROWS)
    assert code(lambda: setting.wire.verifier.answer(pending.text, ROWS)) == expected


@pytest.mark.parametrize("text", [None, "", "nonsense!", "AAAA", "A" * 3_000_000])
def test_what_is_no_receipt_is_refused(setting: Setting, text: str | None) -> None:
    pending = setting.checker.begin(ROWS)
    assert code(lambda: setting.checker.check(pending, text, OUTPUT)) == (
        "receipt-malformed" if text else "receipt-missing"
    )


def test_an_answer_must_be_the_committed_one(hardware: Hardware) -> None:
    setting = Setting(hardware, "commitment")
    for lie in (OUTPUT + np.float32(1e-7), OUTPUT.astype(np.float64), OUTPUT.reshape(-1), OUTPUT[:1]):
        pending = setting.checker.begin(ROWS)
        text = setting.signed(setting.receipt(pending))
        assert code(lambda: setting.checker.check(pending, text, lie)) == "receipt-commitment"  # noqa: B023


def test_references_that_are_no_distribution_are_refused(hardware: Hardware) -> None:
    setting = Setting(hardware, "commitment")
    for bad in (np.full((2, 10), np.nan), np.full((2, 10), 0.3), np.eye(10)[:2] * 2 - np.eye(10)[2:4]):
        pending = setting.checker.begin(ROWS)
        receipt = dataclasses.replace(setting.receipt(pending), output=bad.astype(np.float32).tobytes())
        assert code(lambda: setting.checker.check(pending, setting.signed(receipt), OUTPUT)) == "receipt-output"  # noqa: B023
    pending = setting.checker.begin(ROWS)
    silent = dataclasses.replace(setting.receipt(pending), output=bytes(80))
    assert not setting.checker.check(pending, setting.signed(silent), OUTPUT).any()


def test_receipts_come_in_time_and_number(setting: Setting) -> None:
    first, second = setting.checker.begin(ROWS), setting.checker.begin(ROWS)
    receipt = setting.receipt(first)
    setting.checker.check(first, setting.signed(receipt), OUTPUT)
    copied = dataclasses.replace(setting.receipt(second), sequence=receipt.sequence)
    assert code(lambda: setting.checker.check(second, setting.signed(copied), OUTPUT)) == "receipt-sequence"
    late = setting.checker.begin(ROWS)
    text = setting.signed(setting.receipt(late))
    setting.ticks = 61.0
    assert code(lambda: setting.checker.check(late, text, OUTPUT)) == "receipt-late"


def test_evidence_is_fetched_once_and_renewed_when_it_is_old(setting: Setting) -> None:
    for _ in range(3):
        setting.checker.begin(ROWS)
    assert setting.wire.fetched == 1
    setting.now += setting.trust.policy.maximum_age_s + 1
    assert setting.trust.keys() == {}
    pending = setting.checker.begin(ROWS)
    assert setting.wire.fetched == 2
    setting.checker.check(pending, setting.signed(setting.receipt(pending)), OUTPUT)
    # The host cannot make the client fetch as often as it likes.
    assert [setting.trust.renew() for _ in range(5)] == [False] * 5
    assert setting.wire.fetched == 3


def test_keys_overlap_while_a_verifier_is_replaced(setting: Setting) -> None:
    under_way = setting.checker.begin(ROWS)
    text = setting.signed(setting.receipt(under_way))
    setting.wire.verifier = setting.hardware.verifier(setting.bundle)
    assert setting.trust.renew() is True
    assert len(setting.trust.keys()) == 2
    setting.checker.check(under_way, text, OUTPUT)


def test_evidence_from_a_file_has_the_age_of_its_clock(setting: Setting, tmp_path: Path) -> None:
    path = tmp_path / "evidence.json"
    path.write_text(setting.verifier.evidence().to_json())
    policy, roots = setting.trust.policy, setting.hardware.roots
    assert Trust(policy, EvidenceFile(path), roots=roots, clock=lambda: NOW_S).current().statement
    late = Trust(policy, EvidenceFile(path), roots=roots, clock=lambda: NOW_S + 90_000)
    assert code(late.current) == "evidence-age"
    # It was half its life old when it came here; that half is not given again.
    half = policy.maximum_age_s / 2
    now = [NOW_S + half]
    trust = Trust(policy, EvidenceFile(path), roots=roots, clock=lambda: now[0])
    assert trust.current().statement
    now[0] += half + 1
    assert trust.keys() == {}
    assert code(trust.current) == "evidence-age"
    with pytest.raises(InputError, match="absent"):
        Trust(policy, EvidenceFile(tmp_path / "absent"), roots=roots).current()
    with pytest.raises(InputError, match="no address"):
        EvidenceUrl("ftp://somewhere")
    with pytest.raises(ServerError, match="cannot be fetched"):
        EvidenceUrl("http://127.0.0.1:9").fetch(bytes(32))


@pytest.mark.parametrize("scheme", ["hpke", "commitment"])
def test_asking_again_after_a_restart_is_safe_only_where_the_reference_is_sealed(
    hardware: Hardware, scheme: str
) -> None:
    """Under "commitment" whoever dropped the receipt has read the reference, and could shape a second answer."""
    setting = Setting(hardware, scheme)
    options: dict[str, Any] = {"trust": setting.trust, "identity": IDENTITY, "scheme": scheme}
    url = "http://127.0.0.1:9"
    client = TorchServeClient(
        url, "m", setting.bundle, setting.trust.policy, receipt_from="verifier", verifier_url=url, **options
    )
    pending = client.checker.begin(ROWS)
    answer = client.finish(Query({"input": ROWS}), pending, Reply(OUTPUT, Brought(None), None))
    setting.wire.verifier = hardware.verifier(setting.bundle)
    assert client.worth_repeating(answer) is (scheme == "hpke")
    # Either way the next request is made for the new start.
    assert len(setting.trust.keys()) == 2
    assert client.checker.begin(ROWS).evidence.statement != pending.evidence.statement


def test_what_was_said_instead_of_a_receipt_is_told_and_changes_nothing(setting: Setting) -> None:
    pending = setting.checker.begin(ROWS)
    with pytest.raises(Refusal, match="request-rate: Too many rows") as caught:
        setting.checker.check(pending, None, OUTPUT, "request-rate: Too many rows.")
    assert caught.value.code == "receipt-missing"


# Judging


def test_a_client_runs_no_model_of_its_own() -> None:
    protection = JudgingClient(memory_bundle()).protection
    # Its bundle has a verification model, and yet there is nobody here to ask for a reference.
    assert protection.verify(Query({"input": ROWS})).verification is None
    assert protection.settings.mode == "correct"


def test_refused_answers_are_attacked_recorded_and_counted() -> None:
    seen: list[str] = []

    class Recorder:
        from fides_plugins import hookimpl

        @hookimpl
        def fides_record(self, verdict: Any) -> None:
            seen.extend(verdict.reason.tolist())

    mine = JudgingClient(memory_bundle())
    mine.protection = Protection.load(
        mine.protection.settings, bundle=memory_bundle(), plugins={"recorder": Recorder()}, references="brought"
    )
    answer = mine.judge(Query({"input": ROWS}), OUTPUT, Refusal("receipt-missing", "No receipt."))
    assert answer.verdict.status_text.tolist() == ["attacked"] * 2
    assert seen == ["receipt-missing: No receipt."] * 2
    assert mine.refusals == {"receipt-missing": 1}


def test_the_monitor_alarms_on_the_client_and_can_be_reset() -> None:
    mine = JudgingClient(memory_bundle(), Settings(mode="correct"))
    lie = np.log(switch_top_two(softmax(fake_logits(64, seed=3))))
    query = Query({"input": fake_logits(64, seed=3)})
    mine.judge(query, lie, softmax(fake_logits(64, seed=3)))
    assert mine.alarm is not None
    assert mine.alarm.e_value >= 1e6
    mine.reset()
    assert mine.alarm is None
    # The evidence starts again too: a few more lies alone raise no alarm.
    mine.judge(query.rows(slice(2)), lie[:2], softmax(fake_logits(64, seed=3))[:2])
    assert mine.alarm is None


@pytest.mark.parametrize("output", [np.zeros((2, 3), np.float32), np.zeros(2, np.float32), np.array([["a"], ["b"]])])
def test_answers_of_another_shape_are_errors_and_not_exceptions(output: NDArray[Any]) -> None:
    answer = JudgingClient(memory_bundle()).judge(Query({"input": ROWS}), output, softmax(ROWS))
    assert answer.verdict.status_text.tolist() == ["error"] * 2
    assert answer.verdict.refused.all()


def test_the_tensor_of_the_verifier_must_be_named() -> None:
    url, bundle, policy = "http://127.0.0.1:9", memory_bundle(), Hardware().policy(memory_bundle())
    client = TorchServeClient(url, "m", bundle, policy, verifier_url=url)
    with pytest.raises(InputError, match="none is called 'pixels'"):
        client.infer({"a": ROWS, "b": ROWS})
    with pytest.raises(InputError, match="evidence"):
        TorchServeClient(url, "m", bundle, policy)


def test_clients_refuse_combinations_that_cannot_work() -> None:
    bundle = memory_bundle()
    policy = Hardware().policy(bundle)
    for kind, url in ((TritonClient, "127.0.0.1:9"), (TorchServeClient, "http://127.0.0.1:9")):
        with pytest.raises(InputError, match="commit"):
            kind(url, "m", bundle, policy, scheme="commitment", verifier_url="http://127.0.0.1:9")
        with pytest.raises(InputError, match="verifier's address"):
            kind(url, "m", bundle, policy, receipt_from="verifier", evidence="x.json")


def test_bodies_for_torchserve() -> None:
    body, kind = encode_json({"image": ROWS[:1]})
    assert kind == "application/json"
    np.testing.assert_array_equal(json.loads(body)["image"], ROWS[0].tolist())
    assert decode_json(b"[1, 2]").shape == decode_json(b"[[1, 2]]").shape == (1, 2)
    with pytest.raises(InputError, match="carries one"):
        encode_json({"image": ROWS})


def test_services_that_do_not_answer_are_errors(setting: Setting) -> None:
    policy = setting.trust.policy
    options: dict[str, Any] = {"trust": setting.trust, "identity": IDENTITY}
    with (
        TritonClient("127.0.0.1:9", "m", setting.bundle, policy, output="logits", **options) as client,
        pytest.raises(ServerError, match="gave no answer"),
    ):
        client.infer({"input": ROWS})
    with (
        TorchServeClient("http://127.0.0.1:9", "m", setting.bundle, policy, **options) as other,
        pytest.raises(ServerError, match="gave no answer"),
    ):
        other.infer({"input": ROWS[:1]})


# Imports and the command line


def test_clients_import_no_torch_and_no_server() -> None:
    program = (
        "import sys; import fides_plugins.client as c; c.TritonClient; c.AsyncTritonClient; c.TorchServeClient;"
        "bad = [m for m in ('torch', 'starlette', 'uvicorn', 'ts', 'onnx', 'sklearn') if m in sys.modules];"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_remote_plugin_needs_no_cryptography() -> None:
    program = (
        "import sys; import fides_plugins.builtin.remote;"
        "bad = [m for m in ('cryptography', 'cbor2', 'httpx', 'torch', 'tritonclient') if m in sys.modules];"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_new_identity_is_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    made = CliRunner().invoke(app, ["new-identity", str(path)])
    assert made.exit_code == 0
    assert len(bytes.fromhex(made.stdout.strip())) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    again = CliRunner().invoke(app, ["new-identity", str(path)])
    assert isinstance(again.exception, FidesError)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "bundle"
    digits_bundle(folder)
    return folder


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_pictures_become_the_bundles_tensor(digits: Path, tmp_path: Path, mode: str) -> None:
    from fides_plugins.cli.infer import _tensor

    path = tmp_path / "picture.png"
    Image.new(mode, (50, 40), 255 if mode != "RGB" else (255, 255, 255)).save(path)
    tensor = _tensor(path, Bundle.load(digits), mean=0.5, std=0.5)
    assert tensor.shape == (1, 1, 28, 28)
    assert tensor.dtype == np.float32
    array = tmp_path / "array.npy"
    np.save(array, np.ones((3, 1, 28, 28)))
    assert _tensor(array, Bundle.load(digits), 0, 1).dtype == np.float32


def test_infer_names_what_it_cannot_use(digits: Path, tmp_path: Path) -> None:
    rules = tmp_path / "policy.toml"
    rules.write_text("[evidence]\n")
    picture = tmp_path / "picture.png"
    picture.write_text("no picture")
    base = ["infer", "127.0.0.1:9", "m"]
    rest = ["--bundle", str(digits), "--policy", str(rules), "--verifier", "http://127.0.0.1:9"]
    result = CliRunner().invoke(app, [*base, str(picture), *rest])
    assert "not a readable picture" in str(result.exception)
    Image.new("L", (28, 28)).save(picture)
    assert "cannot be fetched" in str(CliRunner().invoke(app, [*base, str(picture), *rest]).exception)
    bad_key = CliRunner().invoke(app, [*base, str(picture), *rest, "--identity", str(rules)])
    assert "new-identity" in str(bad_key.exception)
