"""Add what an adapter changes to weights, in float32 and always in the same order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from quantmill.elements import from_float32, to_float32
from quantmill.plans import LowRank, TensorSpec
from quantmill.source import SourceTensor

Floats = npt.NDArray[np.float32]
Read = Callable[[SourceTensor, int, memoryview], None]

_CACHED = 1 << 16
"""Elements that are summed at once, so that sums stay in the processor's cache."""


def merged(
    spec: TensorSpec,
    pieces: Iterable[memoryview],
    tensors: Mapping[str, SourceTensor],
    read: Read,
) -> Iterator[memoryview]:
    """The pieces of a weight, as elements of `spec.dtype`, with `spec.added` added.

    Products are summed one rank after the other, without a library for matrices: those sum in an
    order that depends on the processor, and bytes may not.
    """
    rows, columns = spec.shape[-2:]
    at, member = 0, -1
    factors: _Factors | None = None
    for piece in pieces:
        raw = np.frombuffer(piece, np.uint8)
        values = to_float32(raw, spec.dtype).copy()
        done = 0
        while done < values.size:
            current, inside = divmod(at + done, rows * columns)
            if current != member:
                low = spec.added[current]
                member, factors = current, _Factors(low, tensors, read) if low else None
            end = min(values.size, done + rows * columns - inside)
            if factors is not None:
                _add(values[done:end], inside, columns, factors)
            done = end
        at += values.size
        yield from_float32(values, spec.dtype).data


class _Factors:
    """The two factors of a change, as float32."""

    def __init__(self, low: LowRank, tensors: Mapping[str, SourceTensor], read: Read) -> None:
        left, right = (_matrix(tensors[name], read) for name in (low.left, low.right))
        self.left = np.ascontiguousarray(left.T if low.transposed else left)
        self.right = np.ascontiguousarray(right.T if low.transposed else right)
        self.scale = np.float32(low.scale)


def _matrix(tensor: SourceTensor, read: Read) -> Floats:
    raw = np.empty(tensor.nbytes, np.uint8)
    read(tensor, 0, raw.data)
    return to_float32(raw, tensor.dtype).reshape(tensor.shape)


def _add(values: Floats, start: int, columns: int, factors: _Factors) -> None:
    """Add to `values`, which begin at element `start` of the matrix."""
    at = 0
    while at < values.size:
        row, column = divmod(start + at, columns)
        if column or values.size - at < columns:  # a part of a row
            end = min(values.size, at + columns - column)
            part = _product(factors, row, row + 1)[0, column : column + end - at]
        else:
            count = min((values.size - at) // columns, max(1, _CACHED // columns))
            end = at + count * columns
            part = _product(factors, row, row + count).reshape(-1)
        values[at:end] += part
        at = end


def _product(factors: _Factors, first: int, last: int) -> Floats:
    """Rows `first` to `last` of the change."""
    left = factors.left[first:last]
    total = np.zeros((last - first, factors.right.shape[1]), np.float32)
    one = np.empty_like(total)
    for rank in range(left.shape[1]):
        np.multiply(left[:, rank, None], factors.right[rank], out=one)
        np.add(total, one, out=total)
    return np.multiply(total, factors.scale, out=total)


def held_bytes(spec: TensorSpec, tensors: Mapping[str, SourceTensor]) -> int:
    """Bytes of factors that merging holds, at most: those of one member are read whole."""
    names = [(low.left, low.right) for low in spec.added if low]
    largest = max((sum(tensors[n].elements for n in pair) for pair in names), default=0)
    # as they are read, in float32, turned around; one member's stay until the next one's are there
    return (12 if len(names) == 1 else 24) * largest
