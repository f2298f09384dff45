"""Read Triton model configurations and say whether a model can be protected.

Configurations are read with `tritonclient`'s protobuf classes. A user's file is never rewritten:
comments and fields that this protobuf does not know would be lost.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fides_plugins.bundle import Bundle, InputSpec
from fides_plugins.errors import ServerError
from fides_plugins.oip import BYTES, numpy_dtype
from fides_plugins.serving.triton.decoders import ImageDecoder

CONFIG_FILE = "config.pbtxt"
#: Output types that can carry class scores.
_FLOAT_TYPES = ("FP16", "FP32", "FP64")
_STRING = r""" "(?:\\.|[^"\\])*" | '(?:\\.|[^'\\])*' """
#: What `without_name` must tell apart in a config.pbtxt: comments, a field `name`, other strings, brackets.
_TOKEN = re.compile(rf"\#.* | (?P<name>\bname\b[\s:]*(?:{_STRING})) | {_STRING} | [][{{}}<>]", re.VERBOSE)


def short_name(name: str) -> str:
    """The protocol's name of a type for the one in configurations: `FP32` for `TYPE_FP32`, BYTES for `TYPE_STRING`."""
    short = name.removeprefix("TYPE_")
    return BYTES if short == "STRING" else short


@dataclass(frozen=True)
class Tensor:
    """One input or output as a configuration declares it, without the batch axis of a batching model."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    optional: bool = False
    ragged: bool = False
    label_file: str = ""

    @property
    def entry(self) -> dict[str, Any]:
        """As an entry of a configuration's JSON."""
        return {
            "name": self.name,
            "data_type": f"TYPE_{'STRING' if self.dtype == BYTES else self.dtype}",
            "dims": list(self.dims),
            "optional": self.optional,
            "allow_ragged_batch": self.ragged,
            "label_filename": self.label_file,
        }


@dataclass(frozen=True)
class ModelInfo:
    """What attach needs to know about the model to be protected.

    Attributes
    ----------
    name:
        Folder and name of the model.
    max_batch_size:
        0 for a model whose tensors are declared whole.
    inputs, outputs:
        Declared tensors.
    version:
        The one served version that is protected.
    """

    name: str
    max_batch_size: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    version: int


def _protobuf() -> tuple[Any, Any, Any]:
    try:
        from google.protobuf import json_format, text_format
        from tritonclient.grpc import model_config_pb2
    except ImportError:
        raise ServerError(
            "Reading Triton configurations needs the package tritonclient.",
            "Install it with: pip install 'fides-plugins[triton]'.",
        ) from None
    return model_config_pb2.ModelConfig, text_format, json_format


def parse_text(text: str, what: str) -> Any:
    """A `ModelConfig` from the text of a config.pbtxt; unknown fields are passed over.

    Raises
    ------
    ServerError
        If the text is no model configuration.
    """
    kind, text_format, _ = _protobuf()
    try:
        return text_format.Parse(text, kind(), allow_unknown_field=True)
    except text_format.ParseError as error:
        raise ServerError(f"{what} is not a valid model configuration: {error}.") from None


def parse_json(config: Mapping[str, Any]) -> Any:
    """A `ModelConfig` from a server's JSON."""
    kind, _, json_format = _protobuf()
    return json_format.ParseDict(dict(config), kind(), ignore_unknown_fields=True)


def to_text(config: Any) -> str:
    """A `ModelConfig` as the text of a config.pbtxt."""
    return str(_protobuf()[1].MessageToString(config))


def to_json(config: Any) -> dict[str, Any]:
    """A `ModelConfig` as the JSON that a load request takes."""
    return dict(_protobuf()[2].MessageToDict(config, preserving_proto_field_name=True))


def without_name(text: str) -> str:
    """The text of a config.pbtxt without its top-level `name`, everything else as it is.

    Works on the text, so that comments and fields of newer Tritons survive. `name` fields deeper down
    (of tensors, of instance groups) stay.
    """
    depth = 0

    def kept(token: re.Match[str]) -> str:
        nonlocal depth
        depth += (token[0] in "{[<") - (token[0] in "}]>")
        return "" if token["name"] and depth == 0 else token[0]

    return _TOKEN.sub(kept, text)


def model_info(name: str, config: Any, versions: Sequence[int], wanted: int | None) -> ModelInfo:
    """What attach needs, or a refusal.

    Parameters
    ----------
    config:
        A `ModelConfig`.
    versions:
        Numbers of the version folders; empty when only the server is known.
    wanted:
        A version that the user pinned.

    Raises
    ------
    ServerError
        If the model is decoupled, declares no tensors, or serves several versions and none is pinned.
    """
    if config.model_transaction_policy.decoupled:
        raise ServerError(
            f"{name!r} is a decoupled model: it may answer a request any number of times, and an ensemble "
            "cannot join such answers with a verification.",
            "Protect a model that answers each request once.",
        )
    if not config.input or not config.output:
        raise ServerError(
            f"The configuration of {name!r} does not declare its inputs and outputs.",
            "Start the server, which completes it, and use --from-server URL.",
        )
    return ModelInfo(
        name,
        int(config.max_batch_size),
        tuple(_tensor(t, optional=t.optional, ragged=t.allow_ragged_batch) for t in config.input),
        tuple(_tensor(t, label_file=t.label_filename) for t in config.output),
        _version(name, config, versions, wanted),
    )


def queue_problem(config: Any) -> tuple[str, str]:
    """What makes Triton refuse requests of this model (a `ModelConfig`) at once, and the remedy; or two empty texts.

    Such a refusal comes while the steps of the ensemble around the model are being started. Triton 2.51 crashes
    then, or never answers, depending on the order of the steps. A refusal of a model inside the protected model,
    where that is an ensemble itself, comes as an answer and is harmless; so does a time-out in the queue.
    """
    if config.WhichOneof("scheduling_choice") == "sequence_batching":
        return (
            "has sequence_batching: its answer depends on earlier requests, which a verification model does not see, "
            "and a request without a correlation id would end the whole server inside an ensemble.",
            "Protect a model without it.",
        )
    batching = config.dynamic_batching
    policies = [batching.default_queue_policy, *batching.priority_queue_policy.values()]
    if any(policy.max_queue_size for policy in policies):
        return (
            "has a max_queue_size in its queue policy: a full queue would end the whole server inside an ensemble.",
            "Bound the waiting time instead: timeout_action: REJECT with default_timeout_microseconds. Or protect an "
            "ensemble with this model as its one step; clients then get the 503 as before.",
        )
    return "", ""


def _tensor(entry: Any, **more: Any) -> Tensor:
    from tritonclient.grpc import model_config_pb2

    dtype = short_name(model_config_pb2.DataType.Name(entry.data_type))
    return Tensor(entry.name, dtype, tuple(int(d) for d in entry.dims), **more)


def _version(name: str, config: Any, versions: Sequence[int], wanted: int | None) -> int:
    policy = config.version_policy
    known = sorted(versions)
    if policy.WhichOneof("policy_choice") == "specific":
        served = sorted(int(v) for v in policy.specific.versions)
    elif policy.WhichOneof("policy_choice") == "all":
        served = known
    else:
        served = known[-int(policy.latest.num_versions or 1) :]
    if wanted is not None:
        if served and wanted not in served:
            raise ServerError(f"Version {wanted} of {name!r} is not served; served: {served}.")
        return wanted
    if not served:
        raise ServerError(f"{name!r} has no version folder.", "Name the version with --version.")
    if len(served) > 1:
        raise ServerError(
            f"{name!r} serves the versions {served}; an ensemble answers for one of them only.",
            "Say which with --version; requests for another version would then not be served.",
        )
    return served[0]


def local_versions(folder: Path) -> list[int]:
    """Numbers of the version folders of a model."""
    return [int(p.name) for p in folder.iterdir() if p.is_dir() and p.name.isdigit() and not p.name.startswith("0")]


def class_output(info: ModelInfo, bundle: Bundle, wanted: str) -> Tensor:
    """The output that holds one number per class.

    Raises
    ------
    ServerError
        If there is none, or several and none was named, or the class count differs from the bundle's.
    """
    k = bundle.n_classes
    names = [o.name for o in info.outputs]
    if wanted:
        found = [o for o in info.outputs if o.name == wanted]
        if not found:
            raise ServerError(f"{info.name!r} has no output {wanted!r}; it has {names}.")
        if found[0].dtype not in _FLOAT_TYPES:
            raise ServerError(f"The output {wanted!r} has the type {found[0].dtype}; a class output holds floats.")
        if not _fits(found[0], k, info.max_batch_size):
            raise ServerError(
                f"The output {wanted!r} of {info.name!r} has the shape {list(found[0].dims)}, "
                f"but the bundle has {k} classes.",
                "Make a bundle for this model with `fides fit`.",
            )
        return found[0]
    found = [o for o in info.outputs if o.dtype in _FLOAT_TYPES and _fits(o, k, info.max_batch_size)]
    if not found:
        shapes = ", ".join(f"{o.name} {o.dtype} {list(o.dims)}" for o in info.outputs)
        raise ServerError(
            f"{info.name!r} has no class output: none of its outputs ({shapes}) holds {k} floats per row.",
            "Protect a model that gives logits or probabilities, with a bundle made for it.",
        )
    if len(found) > 1:
        raise ServerError(
            f"Several outputs of {info.name!r} could hold the classes: {[o.name for o in found]}.",
            "Say which with --output.",
        )
    return found[0]


def _fits(tensor: Tensor, n_classes: int, max_batch_size: int) -> bool:
    dims = tensor.dims if max_batch_size or is_batchless(tensor, max_batch_size) else tensor.dims[1:]
    fixed = math.prod(d for d in dims if d > 0)
    return n_classes % fixed == 0 if any(d < 0 for d in dims) else fixed == n_classes


def is_batchless(output: Tensor, max_batch_size: int) -> bool:
    """Whether a class output has no row axis at all: one vector per request."""
    return max_batch_size == 0 and len(output.dims) == 1


def verified_input(
    info: ModelInfo, bundle: Bundle, wanted: str, decoder: ImageDecoder | None, batchless: bool
) -> tuple[Tensor, str]:
    """The input that the verification model takes, and the numpy type to cast it to ("" for none).

    Parameters
    ----------
    batchless:
        Whether the class output has no row axis; the inputs have none either then.

    Raises
    ------
    ServerError
        If it cannot be told, has a shape that the verification model does not take, or holds encoded
        bytes and no decoder is declared.
    """
    spec = bundle.manifest.input
    names = [i.name for i in info.inputs]
    name = wanted or (names[0] if len(names) == 1 else spec.name if spec is not None else "")
    found = next((i for i in info.inputs if i.name == name), None)
    if found is None:
        raise ServerError(
            f"{info.name!r} has the inputs {names}; which one the verification model takes is not known.",
            "Say it with --input.",
        )
    row = found.dims if info.max_batch_size or batchless else found.dims[1:]
    if found.dtype == BYTES:
        _check_decoded(found, row, decoder, spec)
        return found, ""
    if decoder is not None:
        raise ServerError(
            f"The input {found.name!r} holds {found.dtype} numbers; a decoder takes encoded bytes (TYPE_STRING).",
            "Leave --decode out.",
        )
    if spec is None:
        return found, ""
    if not _same_shape(row, spec.shape[1:]):
        rows = "" if info.max_batch_size else " and no row axis" if batchless else " after the row axis"
        raise ServerError(
            f"The input {found.name!r} has the shape {list(found.dims)}; the verification model takes "
            f"{_shape_text(spec.shape[1:])}{rows}.",
            "Use the bundle that was made for this model."
            if info.max_batch_size
            else "Use the bundle that was made for this model. With max_batch_size 0, input and output must both have "
            "a row axis, or neither.",
        )
    have = numpy_dtype(found.dtype)
    return found, "" if have.name == spec.dtype else spec.dtype


def _check_decoded(tensor: Tensor, row: tuple[int, ...], decoder: ImageDecoder | None, spec: InputSpec | None) -> None:
    if decoder is None:
        raise ServerError(
            f"The input {tensor.name!r} holds encoded bytes; the verification model needs a decoder.",
            "Declare it, for example: --decode image:size=224x224,mode=RGB,layout=NCHW,scale=255.",
        )
    if math.prod(d for d in row if d >= 0) != 1:
        raise ServerError(f"A row of the input {tensor.name!r} holds {list(row)} encoded images; one is expected.")
    if spec is not None and not _same_shape(decoder.row_shape, spec.shape[1:]):
        raise ServerError(
            f"The decoder makes rows of the shape {list(decoder.row_shape)}; the verification model takes "
            f"{_shape_text(spec.shape[1:])}.",
            "Correct size, mode and layout of --decode.",
        )


def _same_shape(have: Sequence[int], want: Sequence[int | None]) -> bool:
    return len(have) == len(want) and all(w is None or h < 0 or h == w for h, w in zip(have, want, strict=True))


def _shape_text(shape: Sequence[int | None]) -> list[int | str]:
    return ["any" if size is None else size for size in shape]
