"""What all types do with their arrays."""

from __future__ import annotations

import numpy as np
import pytest

from fides_plugins import Detection, Prediction, Query, Reclassification, Verification

PREDICTION = Prediction.from_output(np.zeros((2, 3)), "logits")


@pytest.mark.parametrize(
    "array",
    [
        Query({"x": np.zeros((2, 3))}).tensor(),
        PREDICTION.probabilities,
        PREDICTION.valid,
        Verification.single(PREDICTION.probabilities, "v").references,
        Detection(np.zeros(2), np.zeros(2, bool), "d").score,
        Reclassification(PREDICTION.probabilities, "r").probabilities,
    ],
    ids=["query", "probabilities", "valid", "references", "score", "correction"],
)
def test_everything_is_read_only(array: np.ndarray):
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
