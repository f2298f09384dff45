"""The host tampers with receipts, evidence, bundles and keys: each is refused with its own reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fides_plugins.attestation.cose import key_id
from fides_plugins.attestation.receipt import open_receipt
from fides_plugins.attestation.refusal import Refusal
from fides_plugins.attestation.request import from_text, to_text
from fides_plugins.attestation.wire import PARAMETER, RECEIPT_OUTPUT
from fides_plugins.bundle import Bundle
from fides_plugins.enclave.providers import DevelopmentProvider
from fides_plugins.enclave.verifier import Verifier, VerifierOptions
from fides_plugins.launch.triton import is_available
from tests.support.enclave_world import World, refused, rows
from tests.support.lying_host import Message
from tests.support.pki import NOW_S
from tests.support.triton_models import image_bundle
from tests.support.verifiers import IDENTITY_PUBLIC, Asked, RunningVerifier, receipt_keys

pytestmark = [
    pytest.mark.integration,
    pytest.mark.usefixtures("honest_again"),
    pytest.mark.skipif(not is_available(), reason="no Triton server for this platform"),
]


def with_receipt(change: Any) -> Any:
    def hook(message: Message) -> Message:
        message.tensors[RECEIPT_OUTPUT] = change(message.tensors[RECEIPT_OUTPUT])
        return message

    return hook


def without_receipt(message: Message) -> Message:
    del message.tensors[RECEIPT_OUTPUT]
    return message


def test_a_replayed_receipt_is_refused(world: World) -> None:
    query = {"image": rows(1)}
    with world.client() as client:
        assert client.infer(query).status_text.tolist() == ["trusted"]
        old = world.front.seen[-1]
        world.front.on_response = with_receipt(lambda receipt: old)
        assert refused(client, query) == "receipt-nonce"
    with world.client() as other:
        assert refused(other, query) == "receipt-nonce"


@pytest.mark.parametrize("hook", [without_receipt, with_receipt(lambda receipt: "")], ids=["dropped", "emptied"])
def test_a_missing_receipt_is_an_attack(world: World, hook: Any) -> None:
    world.front.on_response = hook
    with world.client() as client:
        assert refused(client, {"image": rows(2)}) == "receipt-missing"


def test_a_request_that_is_not_passed_on_is_an_attack(world: World) -> None:
    def drop(message: Message) -> Message:
        message.parameters.pop(PARAMETER, None)
        return message

    world.front.on_request = drop
    with world.client() as client:
        assert refused(client, {"image": rows(2)}) == "receipt-missing"


def test_another_input_cannot_be_shown_to_the_enclave(world: World) -> None:
    def swap(message: Message) -> Message:
        message.tensors["image"] = rows(1, seed=77)
        return message

    world.back.on_request = swap
    with world.client() as client:
        # The client signed for its own tensor, so the enclave refuses, and there is no receipt.
        assert refused(client, {"image": rows(1)}) == "receipt-missing"
        with pytest.raises(Refusal) as caught:
            world.verifier.answer(client.checker.begin(rows(1)).text, rows(1, seed=77))
        assert caught.value.code == "request-input"


def test_a_receipt_for_another_input_is_refused(world: World) -> None:
    """The host feeds both models another input, and asks the verifier with a second client's help."""
    other = rows(1, seed=77)
    accomplice = Asked(world.verifier, other)
    foreign = to_text(world.verifier.answer(accomplice.text, other).receipt)
    world.front.on_response = with_receipt(lambda receipt: foreign)
    with world.client() as client:
        assert refused(client, {"image": rows(1)}) == "receipt-nonce"


def test_another_bundle_is_refused(world: World, tmp_path: Path) -> None:
    swapped = Bundle.load(image_bundle(tmp_path / "other", bundle_version=2))
    assert swapped.digest != world.bundle.digest
    with RunningVerifier(world.hardware.verifier(swapped)) as running:
        # The host answers with the other verifier, and keeps the evidence of the first.
        with world.client() as client:
            assert client.infer({"image": rows(1)}).status_text.tolist() == ["trusted"]
            world.back.target, world.back.evidence_from = running.http, world.verifier_url
            assert refused(client, {"image": rows(1)}) == "receipt-missing"
        # Or shows that verifier's evidence.
        world.back.evidence_from = running.http
        with world.client() as client, pytest.raises(Refusal) as caught:
            client.infer({"image": rows(1)})
        assert caught.value.code == "evidence-bundle"


def test_an_old_bundle_is_refused(world: World) -> None:
    with world.client(trust=world.trust(minimum_bundle_version=2)) as client, pytest.raises(Refusal) as caught:
        client.infer({"image": rows(1)})
    assert caught.value.code == "evidence-bundle-version"


def test_another_program_is_refused(world: World) -> None:
    with RunningVerifier(world.hardware.verifier(world.bundle, measurement="patched")) as running:
        world.back.target = world.back.evidence_from = running.http
        with world.client() as client, pytest.raises(Refusal) as caught:
            client.infer({"image": rows(1)})
    assert caught.value.code == "evidence-measurement"


def test_another_enclaves_key_is_refused(world: World) -> None:
    """A receipt with the right contents, signed by a key of the host's or of another enclave."""
    stranger = Ed25519PrivateKey.generate()

    def resign(own_id: bool) -> Any:
        def change(receipt: str) -> str:
            opened = open_receipt(from_text(receipt, "receipt"), receipt_keys(world.verifier))
            identity = key_id(stranger.public_key().public_bytes_raw()) if own_id else world.verifier.key_id
            return to_text(opened.sign(stranger, identity))

        return change

    with world.client() as client:
        world.front.on_response = with_receipt(resign(own_id=True))
        assert refused(client, {"image": rows(1)}) == "receipt-key"
        world.front.on_response = with_receipt(resign(own_id=False))
        assert refused(client, {"image": rows(1)}) == "receipt-signature"


def test_development_evidence_is_refused(world: World) -> None:
    options = VerifierOptions(clients=frozenset((IDENTITY_PUBLIC,)))
    development = Verifier(world.bundle, DevelopmentProvider(), options, clock=lambda: NOW_S)
    with RunningVerifier(development) as running:
        world.back.target = world.back.evidence_from = running.http
        with world.client() as client, pytest.raises(Refusal) as caught:
            client.infer({"image": rows(1)})
        assert caught.value.code == "evidence-development"


def test_every_byte_of_a_receipt_matters(world: World) -> None:
    """Each byte is changed on the way from a real Triton to the client, one request per byte."""
    query = {"image": rows(1)}
    with world.client() as client:
        client.infer(query)
        length = len(from_text(world.front.seen[-1], "receipt"))
        codes: Counter[str] = Counter()
        for position in range(length):

            def flip(receipt: str, position: int = position) -> str:
                data = bytearray(from_text(receipt, "receipt"))
                data[position] ^= 0x01
                return to_text(bytes(data))

            world.front.on_response = with_receipt(flip)
            codes[refused(client, query)] += 1
    assert length > 400
    assert sum(codes.values()) == length
    assert set(codes) == {
        "receipt-malformed",
        "receipt-algorithm",
        "receipt-key",
        "receipt-unprotected",
        "receipt-signature",
    }
