"""What the columns of a weight count in a search, as numbers: computed from what a plan names.

Sums are float64, in one order whatever the processor: bytes depend on them.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from quantmill.elements import to_float32
from quantmill.plans import Weighting
from quantmill.source import OpenSource, SourceTensor

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_ROWS_AT_ONCE = 1 << 20
"""Elements of a matrix that are read at once."""


def importance(weighting: Weighting | None, columns: int, checkpoint: OpenSource) -> Floats:
    """What each of `columns` columns counts, float32 [columns], the largest in [1, 2).

    All count 1 without a weighting, and where the numbers make no sense (all zero, not finite): a
    norm may be damaged, and the search must not be worse for it. docs/fidelity.md has the formula.
    """
    equal = np.ones(columns, np.float32)
    if weighting is None:
        return equal
    tensors = checkpoint.source.tensors
    norm = _read(tensors[weighting.norm], checkpoint).astype(np.float64)
    found = np.square(norm + weighting.offset)
    if weighting.shift:
        shift = np.square(_read(tensors[weighting.shift], checkpoint).astype(np.float64))
        if shift.shape != found.shape:
            return equal
        found = found + shift
    if weighting.through:
        energies = [_energies(tensors[name], found, checkpoint) for name in weighting.through]
        found = energies[0]
        for more in energies[1:]:
            found = found * more
    if weighting.repeats > 1:
        blocks = found.reshape(-1, 1, weighting.head)
        found = np.repeat(blocks, weighting.repeats, axis=1).reshape(-1)
    return scaled(found) if found.shape == (columns,) else equal


def scaled(found: Doubles) -> Floats:
    """The same importance as float32 [columns], the largest in [1, 2); equal where it is no such.

    A power of two changes no digit of any number.
    """
    largest = float(np.max(found, initial=0.0))
    if not 0 < largest < math.inf:
        return np.ones(found.shape, np.float32)
    made: Floats = np.ldexp(found, 1 - math.frexp(largest)[1]).astype(np.float32)
    return made


def _energies(tensor: SourceTensor, squares: Doubles, checkpoint: OpenSource) -> Doubles:
    """For each row of a matrix the sum over its columns of weight squared times `squares`."""
    rows, columns = tensor.shape
    if columns != squares.size:
        return np.zeros(rows)
    found = np.empty(rows)
    step = max(1, _ROWS_AT_ONCE // columns)
    for start in range(0, rows, step):
        end = min(rows, start + step)
        values = _read(tensor, checkpoint, start * columns, end * columns)
        terms = np.square(values.astype(np.float64)).reshape(-1, columns) * squares
        total = np.zeros(end - start)
        for column in np.ascontiguousarray(terms.T):  # one after the other, on any processor
            total += column
        found[start:end] = total
    return found


def _read(
    tensor: SourceTensor, checkpoint: OpenSource, start: int = 0, end: int | None = None
) -> Floats:
    """Elements of a tensor from `start` to `end`, as float32."""
    end = tensor.elements if end is None else end
    width = tensor.nbytes // max(1, tensor.elements)
    buffer = bytearray((end - start) * width)
    checkpoint.read_into(tensor, start * width, memoryview(buffer))
    return to_float32(np.frombuffer(buffer, np.uint8), tensor.dtype)
