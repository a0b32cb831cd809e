"""Quantization with error feedback: what rounding a column loses, the columns after it make up for.

The algorithm is GPTQ's (Frantar et al., arXiv 2210.17323), columns in their order so that groups
stay whole; scales and biases of a group are chosen by the weighted search on weights that make up
for the columns before them (docs/fidelity.md). Matrix products go through NumPy's BLAS: bytes are
the same on one machine, and may differ in the last bits of sums between processors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantmill.elements import E2M1, E4M3, to_float32
from quantmill.errors import BadRequest
from quantmill.formats import Format
from quantmill.weights import Quantized

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]

DAMPING = 0.01
"""Of the mean of the Gram matrix's diagonal so much is added to it, as Frantar et al. do."""

_BLOCK = 128
"""Columns whose errors are carried beyond them by one matrix product."""

Choose = Callable[[Floats, Format, Floats, str], tuple[Bytes, Bytes | None]]
"""Scales and biases, as they are stored, of one group of columns [rows, group] with its weights."""


@dataclass(frozen=True, slots=True)
class Feedback:
    """How the error of each column is carried on: the Gram matrix, prepared once for all weights
    that share an input.

    `importance` is its diagonal, float32 [columns]; `upper` the upper Cholesky factor of its
    inverse, float32 [columns, columns].
    """

    importance: Floats
    upper: Floats


def prepare(gram: Doubles, damping: float = DAMPING) -> Feedback:
    """Prepare a Gram matrix X'X of inputs, float64 [columns, columns].

    Columns whose input was always 0 are carried nowhere. Raises BadRequest for a matrix that no
    inputs have, since it is not finite or not positive.
    """
    gram = np.array(gram, np.float64)
    diagonal = np.einsum("ii->i", gram)
    if not np.all(np.isfinite(gram)) or np.any(diagonal < 0):
        raise BadRequest("the calibration gave activations that are not finite")
    dead = diagonal == 0
    mean = float(np.mean(diagonal[~dead])) if not dead.all() else 1.0
    importance = np.where(dead, 0, diagonal / mean).astype(np.float32)
    diagonal[dead] = mean
    diagonal += damping * mean
    try:
        # the upper factor of the inverse, by way of the matrix turned round: no inverse is taken
        lower = np.linalg.cholesky(gram[::-1, ::-1])
        upper = np.linalg.inv(lower)[::-1, ::-1]
    except np.linalg.LinAlgError:
        raise BadRequest(
            "the calibration gave too few different activations",
            hint="use more tokens",
        ) from None
    return Feedback(importance, np.ascontiguousarray(upper, np.float32))


def quantize_with_feedback(
    weights: Floats, fmt: Format, dtype: str, feedback: Feedback, choose: Choose
) -> Quantized:
    """Quantize a matrix, float32 [rows, columns], to what a tensor of `dtype` stores.

    Columns are a whole number of groups. `choose` picks scales and biases for a group.
    """
    rows, columns = weights.shape
    current = np.ascontiguousarray(weights, np.float32).copy()
    upper, group = feedback.upper, fmt.group_size
    codes = np.empty((rows, columns), np.uint8)
    scales: list[Bytes] = []
    biases: list[Bytes] = []
    for start in range(0, columns, _BLOCK):
        end = min(columns, start + _BLOCK)
        errors = np.empty((rows, end - start), np.float32)
        for first in range(start, end, group):
            last = first + group
            inside = np.ascontiguousarray(current[:, first:last])
            stored, shifts = choose(inside, fmt, feedback.importance[first:last], dtype)
            scales.append(stored.reshape(rows, -1))
            if shifts is not None:
                biases.append(shifts.reshape(rows, -1))
            rounding = _Rounding(fmt, dtype, stored, shifts)
            for column in range(first, last):
                values = current[:, column]
                codes[:, column], rounded = rounding(values)
                error = (values - rounded) / upper[column, column]
                current[:, column + 1 : end] -= np.outer(error, upper[column, column + 1 : end])
                errors[:, column - start] = error
        current[:, end:] -= errors @ upper[start:end, end:]
    return Quantized(
        _packed(codes, fmt.bits).data, _joined(scales), _joined(biases) if biases else None,
        int(np.count_nonzero(~np.isfinite(weights))),
    )  # fmt: skip


class _Rounding:
    """A column's codes and what they decode to, with the scales and biases of its group."""

    def __init__(self, fmt: Format, dtype: str, scales: Bytes, biases: Bytes | None) -> None:
        self._fmt = fmt
        if fmt.mode == "affine":
            assert biases is not None
            self._scale = to_float32(scales.reshape(-1), dtype)
            self._bias = to_float32(biases.reshape(-1), dtype)
        else:
            self._scale = _decoded_scales(fmt.mode, scales.reshape(-1))

    def __call__(self, values: Floats) -> tuple[Bytes, Floats]:
        with np.errstate(divide="ignore", invalid="ignore"):
            if self._fmt.mode == "affine":
                steps = (values - self._bias) / self._scale
                steps = np.where(np.isfinite(steps), steps, 0)
                code = np.clip(np.rint(steps), 0, (1 << self._fmt.bits) - 1).astype(np.uint8)
                return code, code * self._scale + self._bias
            ratio = np.where(self._scale > 0, values / self._scale, 0).astype(np.float32)
        # without signs, and E4M3 without its NaN
        code, grid = _nearest(ratio, E4M3[:127] if self._fmt.bits == 8 else E2M1)
        return code, grid * self._scale


def _decoded_scales(mode: str, scales: Bytes) -> Floats:
    if mode == "nvfp4":
        return E4M3[scales]
    return np.ldexp(np.float32(1), scales.astype(np.int32) - 127).astype(np.float32)


def _nearest(values: Floats, grid: Floats) -> tuple[Bytes, Floats]:
    """Codes and values of the nearest numbers of a grid, its sign in the next bit, ties to even."""
    sign = 1 << (grid.size - 1).bit_length()
    middles = (grid[1:] + grid[:-1]) / 2
    magnitude = np.abs(values)
    code = np.searchsorted(middles, magnitude, side="left")
    tie = (code < middles.size) & (magnitude == middles[np.minimum(code, middles.size - 1)])
    code += tie & (code % 2 == 1)
    found = np.copysign(grid[code], values)
    return (code + sign * np.signbit(values)).astype(np.uint8), found.astype(np.float32)


def _packed(codes: Bytes, bits: int) -> Bytes:
    """Codes as a stream of bits, the lowest first, which is how MLX packs each row."""
    if bits == 8:
        return codes.reshape(-1)
    unpacked = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(unpacked.reshape(-1), bitorder="little")


def _joined(groups: list[Bytes]) -> memoryview:
    """Scales of all groups, row by row."""
    return np.concatenate(groups, axis=1).reshape(-1).view(np.uint8).data
