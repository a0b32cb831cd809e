"""Numbers of quantized weights, to compare with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from quantmill.denseweights import StoredWeight
from quantmill.model import Model


def in_float32(model: Model, name: str) -> npt.NDArray[np.float64]:
    """A quantized weight, decoded with its scales as float32, as products of matrices have it."""
    parts = model.parts(name)
    assert parts.params is not None
    stored = StoredWeight(parts.weight, parts.scales, parts.biases, parts.params.format)
    return np.asarray(stored.dense()).astype(np.float64)
