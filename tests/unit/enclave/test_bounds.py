"""What one request to the verifier may hold: sizes by the bundle's input, and counts before anything is parsed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fides_plugins.attestation.refusal import Refusal
from fides_plugins.bundle import InputSpec
from fides_plugins.enclave import protocol
from fides_plugins.enclave.bounds import RequestBounds, request_bounds
from fides_plugins.enclave.connections import ServerLimits
from fides_plugins.enclave.http import WorkQueue
from fides_plugins.enclave.limits import ByteBudget
from fides_plugins.errors import InputError
from fides_plugins.oip import tensor_from_bytes

ROWS = 64


def bounds(dtype: str = "float32", *axes: int | None) -> RequestBounds:
    return request_bounds(InputSpec(name="image", dtype=dtype, shape=(None, *(axes or (1, 8, 8)))), ROWS)


def longest(dtype: str) -> np.ndarray[Any, Any]:
    """The largest batch of the numbers that are longest in JSON."""
    kind = np.dtype(dtype)
    value: Any = np.iinfo(kind).min or np.iinfo(kind).max if kind.kind in "iu" else -np.finfo(kind).tiny
    return np.full((ROWS, 1, 8, 8), value, kind)


def entry(tensor: np.ndarray[Any, Any]) -> dict[str, Any]:
    name = {"f": "FP", "i": "INT", "u": "UINT"}[tensor.dtype.kind] + str(8 * tensor.dtype.itemsize)
    return {"name": "image", "shape": list(tensor.shape), "datatype": name}


@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8", "int8", "int64"])
@pytest.mark.parametrize("flat", [False, True])
def test_the_largest_batch_fits_in_json_and_in_binary(dtype: str, flat: bool) -> None:
    allowed, tensor = bounds(dtype), longest(dtype)
    data = tensor.ravel().tolist() if flat else tensor.tolist()
    text = json.dumps({"inputs": [{**entry(tensor), "data": data}], "parameters": {"fides_request": "A" * 900}})
    assert len(text) <= allowed.body_bytes
    np.testing.assert_array_equal(protocol.parse_request(text.encode(), None, allowed).tensors["image"], tensor)
    raw = tensor.tobytes()
    head = json.dumps({"inputs": [{**entry(tensor), "parameters": {"binary_data_size": len(raw)}}]}).encode()
    assert len(head + raw) <= allowed.body_bytes
    np.testing.assert_array_equal(protocol.parse_request(head + raw, len(head), allowed).tensors["image"], tensor)


def test_bounds_follow_the_input_and_have_ceilings() -> None:
    small, large, free = bounds(), bounds("float32", 3, 4096, 4096), bounds("float32", None, 8)
    assert small.values == ROWS * 64
    assert small.lists == 1 + ROWS * (1 + 1 + 8)
    assert small.body_bytes < 256 << 10
    assert large.body_bytes == free.body_bytes == 24 << 20
    chosen = request_bounds(InputSpec(name="image", dtype="float32", shape=(None, 1, 8, 8)), ROWS, 1 << 20)
    # A chosen size is for binary: what JSON may become stays what the input needs.
    assert chosen.body_bytes == 1 << 20
    assert (chosen.json_bytes, chosen.values) == (small.json_bytes, small.values)


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs":[' + b"[]," * 20_000 + b"[]]}",
        b'{"x":[' + b"{}," * 20_000 + b"{}]}",
        b'{"inputs":[{"name":"image","shape":[1],"datatype":"FP32","data":[' + b"1," * 20_000 + b"1]}]}",
        b'{"id":"\\ud83d\\ude00' + b"a" * 100_000 + b'"}',
        '{"id":"😀'.encode() + b"a" * 100_000 + b'"}',
        b'{"id":"' + b"a" * 10_000_000 + b'"}',
    ],
    ids=["lists", "objects", "numbers", "escapes", "wide text", "long text"],
)  # fmt: skip
def test_json_that_grows_is_refused_before_it_is_parsed(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", lambda text: pytest.fail("parsed"))
    for tail in (b"", b"binary"):
        with pytest.raises(InputError, match=r"^(The JSON|JSON of)"):
            protocol.parse_request(body + tail, len(body) if tail else None, bounds())


def test_texts_among_the_data_are_refused_before_numpy_widens_them() -> None:
    document = {"inputs": [{"name": "image", "shape": [200], "datatype": "FP32", "data": ["a" * 50_000, *"b" * 199]}]}
    with pytest.raises(InputError, match="data of an input"):
        protocol.parse_request(json.dumps(document).encode(), None, bounds())


@pytest.mark.parametrize("shape", [(2**31 - 1, 2**31 - 1, 0), (0, *(2**31 - 1,) * 4)])
def test_shapes_that_no_array_can_have_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="can have the shape"):
        tensor_from_bytes(b"", "FP32", shape)
    document = {"name": "image", "shape": list(shape), "datatype": "FP32", "parameters": {"binary_data_size": 0}}
    text = json.dumps({"inputs": [document]}).encode()
    with pytest.raises(InputError, match="can have the shape"):
        protocol.parse_request(text, len(text), bounds())


def test_a_budget_is_kept_and_comes_back() -> None:
    budget = ByteBudget(100 << 20)
    for _ in range(3):
        budget.take(50 << 20, b"one")
        budget.take(50 << 20, b"other")
        with pytest.raises(Refusal) as caught:
            budget.take(1, b"third")
        assert caught.value.code == "request-memory"
        budget.give(50 << 20, b"one")
        budget.give(50 << 20, b"other")


def test_no_peer_fills_the_budget_alone() -> None:
    budget = ByteBudget(100)
    budget.take(50, b"greedy")
    with pytest.raises(Refusal):
        budget.take(1, b"greedy")
    budget.take(50, b"honest")


def test_the_body_of_a_refused_request_is_freed_at_once() -> None:
    """An error that its own traceback holds would keep the body until Python looks for cycles."""

    def refused_call() -> tuple[Callable[[], None], weakref.ref[Any]]:
        body = np.zeros(10)

        def call() -> None:
            raise InputError(f"{len(body)} numbers are refused.")

        return call, weakref.ref(body)

    async def refuse() -> weakref.ref[Any]:
        queue = WorkQueue(ServerLimits())
        call, left = refused_call()
        with contextlib.suppress(InputError):
            await queue.run(call)
        del call
        await asyncio.sleep(0.05)
        queue.close()
        return left

    gc.collect()
    gc.disable()
    try:
        assert asyncio.run(refuse())() is None
    finally:
        gc.enable()
