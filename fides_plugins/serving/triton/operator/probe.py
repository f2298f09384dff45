"""Find the protected models of a running server, and send real inferences through their steps.

Everything is learned from the server's own API, so that a check or a watch needs no access to the
repository.
"""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fides_plugins.errors import InputError, ServerError
from fides_plugins.oip import numpy_dtype
from fides_plugins.pipeline import VerifyOutcome
from fides_plugins.serving.triton import wire
from fides_plugins.serving.triton.config import short_name
from fides_plugins.serving.triton.operator.api import InferenceRefused, TritonApi, UnknownModel

#: Length given to a free axis of a generated input.
FREE_AXIS = 32
#: Rows of given data that are tried: of so many benign ones, one with a p-value of at least 0.5 is as good as certain.
TRIED_ROWS = 64
_FALLBACK = "fides_fallback"
_VALIDATE = "fides_validate"


@dataclass(frozen=True)
class Protected:
    """A protected model as the server has it loaded.

    Attributes
    ----------
    name:
        Name of the ensemble.
    config:
        Its configuration as the server's JSON.
    base, verify, validate, fallback:
        Names of its steps; `fallback` is empty where the repository has none.
    degraded:
        Whether the fallback stands in for verification right now.
    """

    name: str
    config: Mapping[str, Any]
    base: str
    verify: str
    validate: str
    fallback: str
    degraded: bool

    @property
    def steps(self) -> tuple[str, str, str]:
        """The three steps of full protection."""
        return (self.base, self.verify, self.validate)


def steps_of(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps of an ensemble's configuration; none for other models."""
    return list(config.get("ensemble_scheduling", {}).get("step", []))


def recognise(config: Mapping[str, Any], known: Mapping[str, str]) -> Protected | None:
    """The protected model that this configuration describes; None if it is another model.

    Parameters
    ----------
    known:
        Every model of the server's index, to its state.
    """
    steps = steps_of(config)
    names = [str(s["model_name"]) for s in steps]
    verify = next((s["model_name"] for s in steps if wire.REFERENCES in s.get("output_map", {})), "")
    judge = next((n for n in names if n.endswith((_VALIDATE, _FALLBACK)) or "fides_validate" in n), "")
    if not judge:
        return None
    degraded = not verify
    if degraded and not judge.endswith(_FALLBACK):
        return None
    stem = judge.removesuffix(_FALLBACK) if degraded else ""
    validate = stem + _VALIDATE if degraded else judge
    verify = verify or stem + "fides_verify"
    fallback = judge if degraded else validate.removesuffix(_VALIDATE) + _FALLBACK
    bases = [n for n in names if n not in (verify, validate, fallback)]
    if len(bases) != 1:
        return None
    fallback = fallback if known.get(fallback) == "READY" else ""
    return Protected(str(config["name"]), config, bases[0], verify, validate, fallback, degraded)


def find_protected(api: TritonApi, model: str = "") -> list[Protected]:
    """Protected models that the server has ready; only `model` if it is given.

    Raises
    ------
    UnknownModel
        If the server's repository has no `model`.
    ServerError
        If the server cannot be reached, or `model` is not protected.
    """
    index = {str(e.get("name")): str(e.get("state", "")) for e in api.index()}
    if model and model not in index:
        raise UnknownModel(f"The server has no model {model!r}.", f"It has: {', '.join(sorted(index))}.")
    ready = [n for n, state in index.items() if state == "READY"]
    if model and model not in ready:
        raise ServerError(f"The server has no ready model {model!r}.", f"Ready: {', '.join(ready)}.")
    found = [p for n in ([model] if model else ready) if (p := recognise(api.config(n), index)) is not None]
    if model and not found:
        raise ServerError(
            f"{model!r} is served, but not protected.",
            "Attach it: fides attach triton REPOSITORY MODEL --bundle BUNDLE.",
        )
    return found


def sample_inputs(config: Mapping[str, Any], data: Mapping[str, NDArray[Any]] | None = None) -> dict[str, NDArray[Any]]:
    """One row for every input of a model.

    Parameters
    ----------
    data:
        Real values by input name, used instead of generated ones.

    Generated floats are uniform in [0, 1), integers are 0 or 1, encoded inputs are a small PNG image, and
    free axes have the length 32.
    """
    rng = np.random.default_rng(0)
    batching = int(config.get("max_batch_size", 0)) > 0
    found: dict[str, NDArray[Any]] = {}
    for entry in config.get("input", []):
        name = str(entry["name"])
        if data is not None and name in data:
            found[name] = data[name]
            continue
        if entry.get("optional"):
            continue
        dims = [int(d) for d in entry["dims"]]
        if not batching and len(dims) > 1 and dims[0] < 0:
            dims[0] = 1
        shape = [1] * batching + [FREE_AXIS if d < 0 else d for d in dims]
        dtype = numpy_dtype(short_name(str(entry["data_type"])))
        if dtype == np.object_:
            found[name] = np.full(shape, None, dtype=np.object_)
            found[name].fill(sample_png())
        elif dtype.kind == "f":
            found[name] = rng.random(shape).astype(dtype)
        else:
            found[name] = rng.integers(0, 2, shape).astype(dtype)
    return found


def sample_batches(
    config: Mapping[str, Any], data: Mapping[str, NDArray[Any]] | None = None
) -> Iterator[dict[str, NDArray[Any]]]:
    """The first rows of `data` in batches that the model takes, with generated rows beside them where it has none.

    Raises
    ------
    InputError
        If the arrays hold no row, or not the same number of rows.
    """
    inputs = sample_inputs(config, data)
    given = {name for name in inputs if name in (data or {})}
    if not given or not divisible(config):
        yield inputs
        return
    rows = {name: len(inputs[name]) if inputs[name].ndim else 0 for name in sorted(given)}
    n_rows = max(rows.values())
    if n_rows == 0 or len(set(rows.values())) > 1:
        found = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise InputError(f"The arrays of the data have these rows: {found}.", "Give each as many, and one at least.")
    last = min(n_rows, TRIED_ROWS)
    step = int(config.get("max_batch_size", 0)) or last
    for start in range(0, last, step):
        rows_here = min(step, last - start)
        yield {
            name: array[start : start + rows_here] if name in given else np.repeat(array, rows_here, axis=0)
            for name, array in inputs.items()
        }


def divisible(config: Mapping[str, Any]) -> bool:
    """Whether the first axis of every input counts rows, which may come one by one."""
    free = [len(e["dims"]) > 1 and int(e["dims"][0]) < 0 for e in config.get("input", [])]
    return int(config.get("max_batch_size", 0)) > 0 or all(free)


def sample_png(size: int = 32) -> bytes:
    """A grey gradient as a PNG file, written without an image library."""
    rows = b"".join(b"\0" + bytes((x * 255) // (size - 1) for x in range(size)) for _ in range(size))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def sample_references(config: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The tensors of a verification that nobody answered, for a model `fides_validate`."""
    entry = next(e for e in config["input"] if e["name"] == wire.REFERENCES)
    return dict(wire.pack_outcome(VerifyOutcome(None), 1, int(entry["dims"][-1])))


def as_probe(references: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The same tensors with the mark that keeps a probe's verdict out of the records."""
    return {**references, wire.VERIFICATION: wire.mark_probe(references[wire.VERIFICATION])}


@dataclass(frozen=True)
class InferenceProbe:
    """What one real inference through one model showed.

    Attributes
    ----------
    alive:
        The model answered, even if with a refusal of its own.
    timed_out:
        No answer came in time.
    detail:
        The error in the server's words; empty when it answered.
    """

    model: str
    alive: bool
    seconds: float
    timed_out: bool = False
    detail: str = ""
    outputs: Mapping[str, NDArray[Any]] | None = None


def probe(api: TritonApi, model: str, inputs: Mapping[str, NDArray[Any]], timeout_s: float) -> InferenceProbe:
    """One inference; never raises for what the server does."""
    start = time.perf_counter()
    try:
        outputs = api.infer(model, inputs, timeout_s=timeout_s)
    except InferenceRefused as error:
        detail = error.message
        own = detail.startswith("fides:") or " fides: " in detail
        return InferenceProbe(model, own, time.perf_counter() - start, detail=detail)
    except TimeoutError:
        return InferenceProbe(model, False, time.perf_counter() - start, True, f"no answer within {timeout_s:g} s")
    except (OSError, ServerError) as error:
        return InferenceProbe(model, False, time.perf_counter() - start, detail=str(error))
    return InferenceProbe(model, True, time.perf_counter() - start, outputs=outputs)
