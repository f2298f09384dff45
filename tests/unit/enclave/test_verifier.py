"""The verifier without sockets: requests, bounds, the protocol's messages, and where evidence comes from."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fides_plugins.attestation import sealing
from fides_plugins.attestation.evidence import Evidence
from fides_plugins.attestation.receipt import open_receipt
from fides_plugins.attestation.request import from_text, to_text
from fides_plugins.attestation.tensors import tensor_digest
from fides_plugins.attestation.verify import new_challenge, verify_evidence
from fides_plugins.attestation.wire import PARAMETER, RECEIPT_OUTPUT
from fides_plugins.bundle import Bundle, InputSpec, Manifest
from fides_plugins.enclave import protocol
from fides_plugins.enclave.bounds import request_bounds
from fides_plugins.enclave.limits import RateLimit
from fides_plugins.enclave.providers import DevelopmentProvider
from fides_plugins.enclave.rounding import round_rows
from fides_plugins.enclave.verifier import Verifier, VerifierOptions
from fides_plugins.errors import BundleError, InputError
from fides_plugins.oip import JSON_LENGTH, tensor_from_bytes
from fides_plugins.testing import fake_logits, memory_bundle
from fides_plugins.types import softmax
from tests.support.pki import NOW_S
from tests.support.refusals import code
from tests.support.verifiers import IDENTITY_PUBLIC, Asked, Hardware, receipt_keys

ROWS = fake_logits(3)
BOUNDS = request_bounds(InputSpec(name="pixels", dtype="float32", shape=(None, 10)), 1024)


@pytest.fixture(scope="module")
def verifier(hardware: Hardware, bundle: Bundle) -> Verifier:
    return hardware.verifier(bundle)


# Answers


def test_an_answer_is_a_receipt_that_only_the_client_can_open(verifier: Verifier, bundle: Bundle) -> None:
    asked = Asked(verifier, ROWS)
    answer = verifier.answer(asked.text, ROWS)
    assert answer.reference is None
    receipt = open_receipt(answer.receipt, receipt_keys(verifier))
    opened = sealing.unseal(receipt.output, asked.key, sealing.context(asked.request.nonce, tensor_digest(ROWS)))
    reference = tensor_from_bytes(opened, "FP32", (3, 10))
    np.testing.assert_allclose(reference, softmax(ROWS), atol=1e-6)
    assert receipt.bundle_digest.hex() == bundle.digest
    assert receipt.bundle_version == 1
    assert (receipt.input_shape, receipt.input_dtype, receipt.tee) == ((3, 10), "FP32", "tdx")


def test_commitment_answers_are_readable_and_carry_the_digest(verifier: Verifier) -> None:
    digest = tensor_digest(np.zeros((3, 10), np.float32))
    answer = verifier.answer(Asked(verifier, ROWS, "commitment").text, ROWS, to_text(digest))
    receipt = open_receipt(answer.receipt, receipt_keys(verifier))
    assert receipt.service_digest == digest
    assert answer.reference is not None
    assert receipt.output == answer.reference.tobytes()


def test_receipts_count_and_references_repeat_bit_by_bit(verifier: Verifier) -> None:
    keys = receipt_keys(verifier)
    text = to_text(bytes(32))
    receipts = [
        open_receipt(verifier.answer(Asked(verifier, ROWS, "commitment").text, ROWS, text).receipt, keys)
        for _ in range(5)
    ]
    assert len({r.output for r in receipts}) == 1
    numbers = [r.sequence for r in receipts]
    assert numbers == list(range(numbers[0], numbers[0] + 5))


def test_requests_that_are_not_answered(hardware: Hardware, bundle: Bundle, verifier: Verifier) -> None:
    other = fake_logits(3, seed=9)
    spent = Asked(verifier, ROWS)
    verifier.answer(spent.text, ROWS)
    assert code(lambda: verifier.answer(spent.text, ROWS)) == "request-replay"
    assert code(lambda: verifier.answer(Asked(verifier, ROWS).text, other)) == "request-input"
    assert code(lambda: verifier.answer(Asked(verifier, ROWS, "commitment").text, ROWS)) == "request-commitment"
    stranger = Ed25519PrivateKey.generate()
    assert code(lambda: verifier.answer(Asked(verifier, ROWS, identity=stranger).text, ROWS)) == "request-client"
    assert code(lambda: verifier.answer(Asked(verifier, ROWS, key_id=bytes(32)).text, ROWS)) == "request-evidence"
    assert code(lambda: verifier.answer(Asked(verifier, ROWS, client_key=bytes(32)).text, ROWS)) == "request-client-key"
    restarted = hardware.verifier(bundle)
    assert code(lambda: restarted.answer(Asked(verifier, ROWS).text, ROWS)) == "request-evidence"
    sealed_only = hardware.verifier(
        bundle, options=VerifierOptions(clients=frozenset((IDENTITY_PUBLIC,)), schemes=("hpke",))
    )
    text = Asked(sealed_only, ROWS, "commitment").text
    assert code(lambda: sealed_only.answer(text, ROWS, to_text(bytes(32)))) == "request-scheme"
    with pytest.raises(InputError, match="shape"):
        verifier.answer(Asked(verifier, ROWS[:, :5]).text, ROWS[:, :5])
    many = np.zeros((2000, 10), np.float32)
    with pytest.raises(InputError, match="at most 1024"):
        verifier.answer(Asked(verifier, many).text, many)


def test_rounding_is_part_of_the_attested_configuration(hardware: Hardware, bundle: Bundle) -> None:
    options = VerifierOptions(clients=frozenset((IDENTITY_PUBLIC,)), decimals=2)
    rounding = hardware.verifier(bundle, options=options)
    reference = rounding.answer(Asked(rounding, ROWS, "commitment").text, ROWS, to_text(bytes(32))).reference
    assert reference is not None
    np.testing.assert_array_equal(reference, round_rows(softmax(ROWS), 2))
    statement = rounding.evidence().statement
    assert statement is not None
    assert statement.settings["decimals"] == 2
    assert statement.settings["clients"] == [IDENTITY_PUBLIC.hex()]


def test_clients_are_rate_limited_one_by_one(hardware: Hardware, bundle: Bundle) -> None:
    second = Ed25519PrivateKey.generate()
    slow = hardware.verifier(bundle, options=VerifierOptions(rate=0.001, burst=6))
    for _ in range(2):
        slow.answer(Asked(slow, ROWS).text, ROWS)
    assert code(lambda: slow.answer(Asked(slow, ROWS).text, ROWS)) == "request-rate"
    slow.answer(Asked(slow, ROWS, identity=second).text, ROWS)


def test_rows_without_an_answer_are_no_distribution(hardware: Hardware) -> None:
    broken = np.full((2, 10), np.nan, np.float32)
    broken[0] = ROWS[0]
    verifier = hardware.verifier(memory_bundle())
    answer = verifier.answer(Asked(verifier, broken, "commitment").text, broken, to_text(bytes(32)))
    assert answer.reference is not None
    assert answer.reference[0].sum() == pytest.approx(1, abs=1e-5)
    assert not answer.reference[1].any()


def test_a_bundle_must_have_a_verification_model_and_an_input(hardware: Hardware) -> None:
    whole = memory_bundle()
    files = {name: whole.file(name) for name in whole.file_names}
    for missing in ("verification", "input"):
        fields = {**whole.manifest.model_dump(), missing: None, "files": {}}
        with pytest.raises(BundleError):
            hardware.verifier(Bundle.in_memory(Manifest.model_validate(fields), files))


@pytest.mark.parametrize("tee", ["sgx", "tdx", "sev-snp"])
def test_evidence_for_challenges_is_trusted_and_vouches_for_receipts(
    hardware: Hardware, bundle: Bundle, tee: Any
) -> None:
    verifier = hardware.verifier(bundle, tee)
    challenge = new_challenge()
    document = Evidence.from_json(verifier.evidence(challenge).to_json())
    policy = hardware.policy(bundle, tee)
    trusted = verify_evidence(document, policy, NOW_S, challenge=challenge, roots=hardware.roots)
    assert trusted.statement is not None
    # However much evidence others asked for meanwhile: what was issued is not kept anywhere.
    for _ in range(1100):
        verifier._make_evidence(new_challenge())
    asked = Asked(verifier, ROWS, key_id=trusted.statement.key_id)
    keys = {trusted.statement.key_id: trusted.signing_key}
    assert open_receipt(verifier.answer(asked.text, ROWS).receipt, keys).tee == tee
    assert code(lambda: verifier.evidence(b"short")) == "request-challenge"


def test_what_is_refused_costs_the_client_nothing(hardware: Hardware, bundle: Bundle) -> None:
    """Whoever saw a client's requests can send them again, with other rows; the client's rate is not theirs to use."""
    options = VerifierOptions(clients=frozenset((IDENTITY_PUBLIC,)), rate=1e-6, burst=6)
    verifier = hardware.verifier(bundle, options=options)
    seen = Asked(verifier, ROWS)
    verifier.answer(seen.text, ROWS)
    for rows in (ROWS, np.zeros((1024, 10), np.float32)):
        for _ in range(50):
            assert code(lambda: verifier.answer(seen.text, rows)) in ("request-replay", "request-input")  # noqa: B023
    misshapen = np.zeros((1024, 3), np.float32)
    for _ in range(50):
        with pytest.raises(InputError, match="shape"):
            verifier.answer(Asked(verifier, misshapen).text, misshapen)
    verifier.answer(Asked(verifier, ROWS).text, ROWS)
    # And a request that came too soon is not spent: it is answered once there is room for it.
    early = Asked(verifier, ROWS)
    assert code(lambda: verifier.answer(early.text, ROWS)) == "request-rate"
    verifier._rate = RateLimit(1e-6, 6)
    verifier.answer(early.text, ROWS)


# The protocol


def test_http_bodies_in_json_and_in_binary(verifier: Verifier, bundle: Bundle) -> None:
    name = verifier.input.name
    entry = {"name": name, "shape": [3, 10], "datatype": "FP32"}
    for binary in (False, True):
        asked = Asked(verifier, ROWS)
        document: dict[str, Any] = {"id": "7\n", "parameters": {PARAMETER: asked.text}}
        if binary:
            raw = ROWS.tobytes()
            document["inputs"] = [{**entry, "parameters": {"binary_data_size": len(raw)}}]
            document["outputs"] = [{"name": RECEIPT_OUTPUT, "parameters": {"binary_data": True}}]
            text = json.dumps(document).encode()
            request = protocol.parse_request(text + raw, len(text), BOUNDS)
        else:
            document["inputs"] = [{**entry, "data": ROWS.tolist()}]
            request = protocol.parse_request(json.dumps(document).encode(), None, BOUNDS)
        body, headers = protocol.infer(verifier, bundle.manifest.name, request)
        length = int(headers[JSON_LENGTH]) if JSON_LENGTH in headers else None
        answer = json.loads(body[:length])
        assert answer["id"] == r"7\n"
        (output,) = answer["outputs"]
        if binary:
            assert length is not None
            receipt = body[length + 4 :].decode()
        else:
            receipt = output["data"][0]
        assert open_receipt(from_text(receipt, "receipt"), receipt_keys(verifier))


@pytest.mark.parametrize(
    "document",
    [
        [], "text", {"inputs": 7}, {"inputs": [7]}, {"inputs": [{"name": "x"}]},
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1], "data": []}]},
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1] * 9, "data": [1]}]},
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [True], "data": [1]}]},
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "data": ["1", "2"]}]},
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [3], "data": [1, 2]}]},
        {"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1], "data": ["a"]}]},
        {"inputs": [{"name": "x", "datatype": "UINT8", "shape": [1], "data": [-1]}]},
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "parameters": {"binary_data_size": 99}}]},
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2147483647], "data": [1]}]},
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}] * 5},
    ],
)  # fmt: skip
def test_malformed_bodies_are_refused(document: Any) -> None:
    with pytest.raises(InputError):
        protocol.parse_request(json.dumps(document).encode(), None, BOUNDS)


def test_lengths_that_do_not_fit_are_refused() -> None:
    for body, length in ((b"{}", 3), (b"{}", -1), (b"{}rest", 2), (b"[" * 100_000, None), (b"\xff", None)):
        with pytest.raises(InputError):
            protocol.parse_request(body, length, BOUNDS)


@given(st.binary(max_size=300), st.none() | st.integers(-5, 300))
@settings(max_examples=300, deadline=None)
def test_arbitrary_bodies_never_crash(body: bytes, length: int | None) -> None:
    try:
        request = protocol.parse_request(body, length, BOUNDS)
    except InputError:
        return
    assert isinstance(request.tensors, dict)


def test_unsigned_and_misaddressed_requests_are_refused(verifier: Verifier, bundle: Bundle) -> None:
    request = protocol.InferRequest({verifier.input.name: ROWS}, {})
    with pytest.raises(InputError, match="Only signed requests"):
        protocol.infer(verifier, bundle.manifest.name, request)
    with pytest.raises(InputError, match="no model"):
        protocol.infer(verifier, "other", request)
    with pytest.raises(InputError, match="exactly the input"):
        protocol.infer(verifier, bundle.manifest.name, protocol.InferRequest({}, {PARAMETER: "x"}))
    with pytest.raises(InputError, match="no model"):
        protocol.model_metadata(verifier, "other")
    with pytest.raises(InputError, match="no version"):
        protocol.check_version("2")


def test_keys_of_a_verifier_are_new_at_every_start(bundle: Bundle) -> None:
    first, second = (Verifier(bundle, DevelopmentProvider()) for _ in range(2))
    a, b = first.evidence().statement, second.evidence().statement
    assert a is not None
    assert b is not None
    assert len({a.signing_key, b.signing_key, a.encryption_key, b.encryption_key}) == 4
    assert a.boot_id != b.boot_id
