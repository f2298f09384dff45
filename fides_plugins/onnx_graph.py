"""What an ONNX file holds, read from its bytes before anything runs it.

onnxruntime loads *external data* from files beside the model, or, for a model in memory, beside the process: weights
that no digest covers. And a graph may loop for ever. Both are seen here, in the protobuf itself, without a library that
the serving path would not need otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from fides_plugins.errors import BundleError

#: Operators that run a graph of their own as often as they like.
CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})
#: What detector and re-classifier are made of. None of them runs longer than its tensors are large, and none makes a
#: large tensor from a few numbers as Expand, Tile, Range or ConstantOfShape do.
JUDGING_OPERATORS = frozenset(
    name
    for names in (
        "Abs Add And ArgMax ArgMin BatchNormalization Cast Ceil Clip Concat Constant Cos Div Elu Equal Erf Exp Flatten",
        "Floor Gather GatherElements GatherND Gemm Greater GreaterOrEqual HardSigmoid Identity LayerNormalization",
        "LeakyRelu Less LessOrEqual Log LogSoftmax MatMul Max Mean Min Mod Mul Neg Not Or Pad Pow PRelu Reciprocal",
        "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum",
        "ReduceSumSquare Relu Reshape Round Selu Shape Sigmoid Sign Sin Slice Softmax Softplus Split Sqrt Squeeze Sub",
        "Sum Tanh TopK Transpose Unsqueeze Where Xor ai.onnx.ml:LinearClassifier ai.onnx.ml:LinearRegressor",
        "ai.onnx.ml:Normalizer ai.onnx.ml:Scaler ai.onnx.ml:TreeEnsemble ai.onnx.ml:TreeEnsembleClassifier",
        "ai.onnx.ml:TreeEnsembleRegressor",
    )
    for name in names.split()
)

#: Messages of onnx.proto that can hold nodes or tensors: field number to the message it holds.
MESSAGES: dict[str, dict[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        **{5: "TensorProto", 6: "GraphProto", 10: "TensorProto", 11: "GraphProto"},
        **{22: "SparseTensorProto", 23: "SparseTensorProto"},
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {},
}
#: Fields that matter by themselves: NodeProto's op_type and domain, TensorProto's external_data and data_location.
OP_TYPE, DOMAIN, EXTERNAL_DATA, DATA_LOCATION = 4, 7, 13, 14
_MAX_DEPTH = 64


@dataclass
class GraphContents:
    """What `read_contents` found.

    Attributes
    ----------
    operators:
        Of every node, in functions and in graphs within graphs too; those outside of ONNX's own set as
        `domain:operator`.
    external:
        Whether some tensor lies outside the file.
    """

    operators: set[str] = field(default_factory=set)
    external: bool = False


def read_contents(data: bytes, name: str) -> GraphContents:
    """Operators of an ONNX model, and whether it is complete.

    Parameters
    ----------
    data:
        The file's bytes.
    name:
        For messages.

    Raises
    ------
    BundleError
        If the bytes are no ONNX model.
    """
    found = GraphContents()
    try:
        _walk(memoryview(data), "ModelProto", found, 0)
    except (IndexError, ValueError):
        raise BundleError(
            f"{name} cannot be loaded by onnxruntime: it is no ONNX model.", "Make the bundle again with `fides fit`."
        ) from None
    return found


def _walk(message: memoryview, kind: str, found: GraphContents, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError("graphs within graphs without end")
    texts = {OP_TYPE: "", DOMAIN: ""}
    for number, value in _fields(message):
        inner = MESSAGES[kind].get(number)
        if inner is not None and isinstance(value, memoryview):
            _walk(value, inner, found, depth + 1)
        elif kind == "NodeProto" and number in texts and isinstance(value, memoryview):
            texts[number] = bytes(value).decode()
        elif kind == "TensorProto" and (number == EXTERNAL_DATA or (number == DATA_LOCATION and value != 0)):
            found.external = True
    if kind == "NodeProto":
        operator, domain = texts[OP_TYPE], texts[DOMAIN]
        found.operators.add(operator if domain in ("", "ai.onnx") else f"{domain}:{operator}")


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field, as protobuf's wire format has them: a whole number, or the bytes of the rest."""
    position, end = 0, len(message)
    while position < end:
        tag, position = _varint(message, position)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire == 2:
            length, position = _varint(message, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:  # groups: ONNX has none, and they would hide what they hold
            raise ValueError("a field of an unknown type")
        if number == 0 or length > end - position:
            raise ValueError("a field that does not fit")
        yield number, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number without an end")
