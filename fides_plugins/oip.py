"""The Open Inference Protocol (KServe v2) over HTTP: the one codec of clients, hosts, the verifier and operators.

A body is JSON. Where the binary extension is used, the bytes of tensors follow it, and the header `JSON_LENGTH`
says where the JSON ends. Readers take bodies from anybody: what does not fit together is refused, and how long a
body may be is for the caller to bound. Standard library and numpy only, because model servers load this.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fides_plugins.errors import InputError, ServerError

#: Header with the length of the JSON in front of binary tensors.
JSON_LENGTH = "Inference-Header-Content-Length"
#: The one type of variable width: numpy has it as objects.
BYTES = "BYTES"
#: The types that have a fixed width, by their names in the protocol.
OIP_TYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_NAMES = {dtype: name for name, dtype in OIP_TYPES.items()}
_MAX_RANK = 8
_VERSION = "1"

Side = Literal["inputs", "outputs"]
#: A body, and the headers that go with it.
Body = tuple[bytes, dict[str, str]]


def oip_type(dtype: np.dtype[Any]) -> str:
    """Name of a numpy type of fixed width in the protocol.

    Raises
    ------
    InputError
        For other types.
    """
    name = _NAMES.get(np.dtype(dtype).newbyteorder("<"))
    if name is None:
        raise InputError(f"Tensors of type {dtype} are not supported.", f"Use one of {', '.join(OIP_TYPES)}.")
    return name


def numpy_dtype(name: str) -> np.dtype[Any]:
    """numpy's type for a name of the protocol; objects for BYTES.

    Raises
    ------
    InputError
        If numpy has no such type (BF16) or the name is unknown.
    """
    return np.dtype(np.object_) if name == BYTES else _fixed(name)


def _fixed(name: str) -> np.dtype[Any]:
    if name not in OIP_TYPES:
        raise InputError(f"Tensors of type {name[:16]!r} are not supported.", f"Use one of {', '.join(OIP_TYPES)}.")
    return OIP_TYPES[name]


def tensor_bytes(array: NDArray[Any]) -> bytes:
    """The bytes of a tensor of fixed width: little-endian, row-major."""
    return np.ascontiguousarray(array, dtype=OIP_TYPES[oip_type(array.dtype)]).tobytes()


def tensor_from_bytes(data: bytes, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The read-only array that `tensor_bytes` came from.

    Raises
    ------
    InputError
        If the type has no fixed width, a dimension is negative, the length does not fit, or no array can have the
        shape.
    """
    wanted, count = _fixed(dtype), 1
    for dimension in shape:
        if dimension < 0:
            raise InputError(f"The shape {list(shape)} has a negative dimension.")
        count *= dimension
    expected = count * wanted.itemsize
    if len(data) != expected:
        raise InputError(f"A tensor of type {dtype} and shape {list(shape)} has {expected} bytes, not {len(data)}.")
    try:
        return np.frombuffer(data, dtype=wanted).reshape(shape)
    except ValueError:
        # Without a row every length fits, but numpy multiplies the other dimensions all the same.
        raise InputError(f"No tensor of type {dtype} can have the shape {list(shape)}.") from None


def encode_bytes(array: NDArray[Any]) -> bytes:
    """The bytes of a BYTES tensor: per element its length (4 bytes, little-endian), then the element; text is UTF-8."""
    parts = [v if isinstance(v, bytes) else str(v).encode() for v in array.ravel().tolist()]
    return b"".join(len(p).to_bytes(4, "little") + p for p in parts)


def decode_bytes(data: bytes) -> NDArray[Any]:
    """The elements of a BYTES tensor, flat, as an object array of `bytes`.

    Raises
    ------
    InputError
        If the data end within an element.
    """
    elements, position = [], 0
    while position < len(data):
        start = position + 4
        position = start + int.from_bytes(data[position:start], "little")
        if start > len(data) or position > len(data):
            raise InputError("A BYTES tensor ends within an element.")
        elements.append(data[start:position])
    return _objects(elements)


def request_body(
    inputs: Mapping[str, NDArray[Any]],
    *,
    parameters: Mapping[str, Any] | None = None,
    outputs: Collection[str] = (),
    binary: bool = True,
) -> Body:
    """An inference request.

    Parameters
    ----------
    inputs:
        Name to array; object and string arrays travel as BYTES.
    parameters:
        Of the request, handed on to the model.
    outputs:
        Wanted outputs; all by default.
    binary:
        Send and ask for tensors in binary. Every server understands JSON; most understand both.

    Raises
    ------
    InputError
        If a type is not of the protocol, or JSON cannot hold a number.
    """
    for name, array in inputs.items():
        # JSON has no NaN and no infinity; Python would write words that other parsers refuse.
        if not binary and array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputError(f"Input {name!r} holds numbers that are not finite.")
    given = {**(parameters or {}), **({"binary_data_output": True} if binary else {})}
    wanted = [{"name": n, **({"parameters": {"binary_data": True}} if binary else {})} for n in outputs]
    document = {**({"parameters": given} if given else {}), **({"outputs": wanted} if wanted else {})}
    return _body(document, "inputs", inputs, inputs if binary else ())


def answer_body(
    model: str, outputs: Mapping[str, NDArray[Any]], request_id: str = "", binary: Collection[str] = ()
) -> Body:
    """An inference's answer; `binary` names the outputs that travel in binary."""
    document = {"model_name": model, "model_version": _VERSION, **({"id": request_id} if request_id else {})}
    return _body(document, "outputs", outputs, binary)


def _body(document: dict[str, Any], side: Side, tensors: Mapping[str, NDArray[Any]], binary: Collection[str]) -> Body:
    entries, tail = [], []
    for name, array in tensors.items():
        text = array.dtype.kind in "OSU"
        kind = BYTES if text else oip_type(array.dtype)
        entry: dict[str, Any] = {"name": name, "shape": list(array.shape), "datatype": kind}
        if name in binary:
            tail.append(encode_bytes(array) if text else tensor_bytes(array))
            entry["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            entry["data"] = _words(array) if text else array.ravel().tolist()
        entries.append(entry)
    head = json.dumps({**document, side: entries}, separators=(",", ":")).encode()
    if not tail:
        return head, {"Content-Type": "application/json"}
    return b"".join([head, *tail]), {"Content-Type": "application/octet-stream", JSON_LENGTH: str(len(head))}


def _words(array: NDArray[Any]) -> list[str]:
    try:
        return [v.decode() if isinstance(v, bytes) else str(v) for v in array.ravel().tolist()]
    except UnicodeDecodeError:
        raise InputError("JSON cannot hold bytes that are no text.", "Send them in binary.") from None


def read_answer(body: bytes, json_length: str | None = None, names: Collection[str] = ()) -> dict[str, NDArray[Any]]:
    """Outputs of an inference by name; BYTES as object arrays of `bytes`.

    Parameters
    ----------
    body:
        The body.
    json_length:
        The header `JSON_LENGTH`; None where it is missing.
    names:
        Outputs to read; all by default.

    Raises
    ------
    ServerError
        If the body is not of the protocol.
    """
    try:
        text, tail = split_body(body, read_length(json_length))
        return read_tensors(read_json(text, "outputs"), "outputs", tail, names, texts=True)
    except InputError as error:
        raise ServerError(f"The answer is not of the Open Inference Protocol: {error.cause_text}") from None


def read_error(body: bytes) -> str:
    """The server's own words about what went wrong; empty where it has none."""
    try:
        words = read_json(body, "outputs").get("error")
    except InputError:
        return ""
    return words if isinstance(words, str) else ""


def first_text(tensors: Mapping[str, NDArray[Any]], name: str) -> str | None:
    """The first element of a BYTES tensor, as ASCII; None where there is none."""
    found = tensors.get(name)
    value = found.flat[0] if found is not None and found.size else None
    return value.decode("ascii", "replace") if isinstance(value, bytes) else None


def read_length(header: str | None) -> int | None:
    """The number in a header `JSON_LENGTH`; None where it is missing.

    Raises
    ------
    InputError
        If it is not a number.
    """
    if header is None:
        return None
    if not (header.isascii() and header.isdigit() and len(header) < 12):
        raise InputError(f"{JSON_LENGTH} is not a number.")
    return int(header)


def split_body(body: bytes, json_length: int | None) -> tuple[bytes, memoryview]:
    """The JSON of a body, and the binary tensors behind it.

    Raises
    ------
    InputError
        If the length does not fit the body.
    """
    if json_length is None:
        return body, memoryview(b"")
    if not 0 <= json_length <= len(body):
        raise InputError(f"{JSON_LENGTH} does not fit the body.")
    return body[:json_length], memoryview(body)[json_length:]


def read_json(text: bytes, side: Side) -> dict[str, Any]:
    """The JSON of a body; its `side`, where there is one, is a list.

    Raises
    ------
    InputError
        If it is anything else.
    """
    try:
        document = json.loads(text.decode())
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict) or not isinstance(document.get(side, []), list):
        raise InputError("The body is not a JSON object of the Open Inference Protocol.")
    return document


def parameters_of(holder: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a request, an answer or a tensor; none where they are no object."""
    value = holder.get("parameters", {})
    return value if isinstance(value, dict) else {}


def read_tensors(
    document: Mapping[str, Any],
    side: Side,
    tail: bytes | memoryview = b"",
    names: Collection[str] = (),
    texts: bool = False,
) -> dict[str, NDArray[Any]]:
    """Tensors by name.

    Parameters
    ----------
    document, side:
        The JSON and which list of it.
    tail:
        Binary tensors; all of it must belong to one.
    names:
        Tensors to read; all by default.
    texts:
        Read BYTES tensors as well, as object arrays. They take many times their bytes in memory.

    Raises
    ------
    InputError
        If an entry is malformed, has an unsupported type, or its data do not fit type and shape.
    """
    what = side.removesuffix("s")
    tensors: dict[str, NDArray[Any]] = {}
    position = 0
    for entry in document.get(side, []):
        name, dtype, shape = _head(entry, what)
        size = parameters_of(entry).get("binary_data_size")
        start, position = position, position + (size if type(size) is int else 0)
        if size is not None and (type(size) is not int or not start <= position <= len(tail)):
            raise InputError(f"binary_data_size of {what} {name!r} does not fit the body.")
        if names and name not in names:
            continue
        if texts and dtype == BYTES:
            elements = None if size is None else decode_bytes(bytes(tail[start:position]))
            tensors[name] = _texts(entry.get("data"), elements, shape, what)
        elif size is None:
            tensors[name] = _from_json(entry.get("data"), dtype, shape, what)
        else:
            tensors[name] = tensor_from_bytes(bytes(tail[start:position]), dtype, shape)
    if position != len(tail):
        raise InputError(f"The body has bytes that belong to no {what}.")
    return tensors


def _head(entry: Any, what: str) -> tuple[str, str, tuple[int, ...]]:
    if not isinstance(entry, dict):
        raise InputError(f"An {what} is not a JSON object.")
    name, dtype, shape = entry.get("name"), entry.get("datatype"), entry.get("shape")
    if not isinstance(name, str) or not isinstance(dtype, str) or not isinstance(shape, list):
        raise InputError(f"An {what} lacks its name, datatype or shape.")
    if len(shape) > _MAX_RANK or any(type(d) is not int or not 0 <= d < 1 << 31 for d in shape):
        raise InputError(f"The shape of an {what} is not a list of at most {_MAX_RANK} counts.")
    return name, dtype, tuple(shape)


def _from_json(data: Any, dtype: str, shape: tuple[int, ...], what: str) -> NDArray[Any]:
    wanted = _fixed(dtype)
    try:
        # As they are first: numpy would make each text of a list as wide as the longest.
        if not set(map(type, np.array(data, dtype=object).ravel())) <= {int, float, bool}:
            raise TypeError
        given = np.asarray(data)
        kinds = {"f": "iuf", "b": "b"}.get(wanted.kind, "iu")
        fits = given.dtype.kind in kinds or not given.size
        if fits and wanted.kind in "iu" and given.size:
            # numpy 1 would wrap numbers around that the type cannot hold.
            fits = int(given.min()) >= np.iinfo(wanted).min and int(given.max()) <= np.iinfo(wanted).max
        if fits:
            return given.astype(wanted).reshape(shape)
    except (ValueError, TypeError, OverflowError, RecursionError):
        pass
    raise _misfit(dtype, shape, what)


def _texts(data: Any, elements: NDArray[Any] | None, shape: tuple[int, ...], what: str) -> NDArray[Any]:
    """A BYTES tensor from its decoded elements, or from the text of JSON."""
    try:
        if elements is None:
            words = np.array(data, dtype=object).ravel().tolist()
            if not all(isinstance(w, str) for w in words):
                raise TypeError
            elements = _objects([w.encode() for w in words])
        return elements.reshape(shape)
    except (ValueError, TypeError, RecursionError):
        raise _misfit(BYTES, shape, what) from None


def _misfit(dtype: str, shape: tuple[int, ...], what: str) -> InputError:
    return InputError(f"The data of an {what} is not {dtype} of the shape {list(shape)}.")


def _objects(elements: list[Any]) -> NDArray[Any]:
    found = np.empty(len(elements), dtype=np.object_)
    found[:] = elements
    return found
