"""What flows between hooks: frozen, batched, read-only.

Every object describes a batch of N rows over K classes. Arrays are float32 and C-contiguous where they
hold probabilities, and every array is read-only, so that no plug-in can change what another one sees.
Constructors validate shapes and raise `InputError`; a single bad *row* is not an error of the batch:
it is marked in a mask, and that row alone becomes `error` or `indeterminate`. Objects that hold arrays compare
by identity (`eq=False`): comparing two arrays gives an array, not one truth value.
"""

from fides_plugins.types.answers import Prediction, Verification
from fides_plugins.types.arrays import (
    SUM_TOLERANCE,
    BoolArray,
    Float32Array,
    Float64Array,
    IntArray,
    OutputKind,
    Rows,
    softmax,
)
from fides_plugins.types.attack import Attack
from fides_plugins.types.opinions import Detection, Reclassification
from fides_plugins.types.query import ROWS_ONLY, Query, SignedRows
from fides_plugins.types.verdict import STATUS_TEXTS, Status, Verdict

__all__ = [
    "ROWS_ONLY",
    "STATUS_TEXTS",
    "SUM_TOLERANCE",
    "Attack",
    "BoolArray",
    "Detection",
    "Float32Array",
    "Float64Array",
    "IntArray",
    "OutputKind",
    "Prediction",
    "Query",
    "Reclassification",
    "Rows",
    "SignedRows",
    "Status",
    "Verdict",
    "Verification",
    "softmax",
]
