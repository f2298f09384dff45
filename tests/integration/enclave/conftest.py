"""One world for all tests of the lying host: starting Triton takes longer than most of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fides_plugins.bundle import Bundle
from fides_plugins.launch.triton import TritonServer
from tests.support.enclave_world import World, enclave_repository
from tests.support.lying_host import LyingHost
from tests.support.triton_models import image_bundle
from tests.support.verifiers import Hardware, RunningVerifier


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("enclave")
    hardware = Hardware()
    bundle = Bundle.load(image_bundle(root / "bundle"))
    verifier = hardware.verifier(bundle)
    with (
        RunningVerifier(verifier) as running,
        LyingHost(running.http) as back,
        TritonServer(enclave_repository(root / "repository", back.url), auto_complete=False) as triton,
        LyingHost(triton.http_address) as front,
    ):
        yield World(hardware, root / "bundle", bundle, verifier, running.http, triton, front, back)


@pytest.fixture
def honest_again(world: World) -> Iterator[None]:
    yield
    world.front.honest()
    world.back.honest()
    world.back.target = world.verifier_url
