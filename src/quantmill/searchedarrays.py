"""The search for scales and biases in NumPy, where the native kernels are not used.

Bit for bit what they do (docs/formats.md, Search), a hundred times slower. Arrays have a group in
every column, so that a sum in the order of the weights is a sum of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from quantmill.elements import (
    E4M3,
    RAW,
    Floats,
    from_float32,
    refuse_overflow,
    to_float32,
)
from quantmill.formats import Format
from quantmill.quantize import quantize
from quantmill.weights import Quantized

Doubles = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
_F32 = np.float32

_CUT = [_F32(i / 20) for i in range(3)]
_KEPT = [_F32((20 - i) / 20) for i in range(5)]
_BELOW, _ABOVE, _LARGEST_BYTE = 3, 7, 126
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], _F32)
_GROUPS = 1 << 14
"""Groups at a time: their arrays take some hundred megabytes."""


@np.errstate(all="ignore")
def search_arrays(
    raw: memoryview, dtype: str, stored: str, fmt: Format, importance: memoryview, first: int
) -> Quantized:
    """What `quantmill.kernels.search` does. Raises BadWeights as it does."""
    own = quantize(raw, dtype, fmt)
    weights = np.frombuffer(raw, np.uint8)
    made = _Result(own, dtype, stored, fmt)
    if made.biases is not None and stored != dtype:
        refuse_overflow(weights, made.quantized(), stored, fmt)
    if fmt.mode == "mxfp8":
        return own
    columns = np.frombuffer(importance, np.float32).reshape(-1, fmt.group_size)
    x = to_float32(weights.view(RAW[dtype]), dtype).reshape(-1, fmt.group_size)
    for start in range(0, len(x), _GROUPS):
        part = slice(start, min(start + _GROUPS, len(x)))
        numbers = first // fmt.group_size + np.arange(part.start, part.stop)
        h = columns[numbers % len(columns)].T
        h = np.where((h == 0).all(axis=0), _F32(1), h)
        finite = np.asarray(np.isfinite(x[part]).all(axis=1))
        groups = _Groups(np.where(finite, x[part].T, _F32(0)), h.astype(np.float64), finite)
        (_search_lines if fmt.has_bias else _search_bytes)(groups, made, part)
    return made.quantized()


@dataclass(frozen=True, slots=True)
class _Groups:
    """Weights and importance [group size, groups], and which groups are searched."""

    x: Floats
    h: Doubles
    open: Flags

    def error(self, values: Floats) -> Doubles:
        off = (self.x - values).astype(np.float64)
        return _sum(off * off * self.h)


def _sum(terms: Doubles) -> Doubles:
    """In order: NumPy's own sums have another one."""
    total = np.zeros(terms.shape[1])
    for row in terms:
        total += row
    return total


class _Result:
    """MLX's own codes and parameters, replaced group by group."""

    def __init__(self, own: Quantized, dtype: str, stored: str, fmt: Format) -> None:
        self.fmt, self.stored, self.non_finite = fmt, stored, own.non_finite
        rows = np.frombuffer(own.weight, np.uint8).reshape(-1, fmt.group_size * fmt.bits // 8)
        bits = np.unpackbits(rows, axis=1, bitorder="little").reshape(len(rows), -1, fmt.bits)
        self.codes = np.packbits(bits, axis=2, bitorder="little")[..., 0]
        scale = fmt.scale_dtype(dtype)
        self.scales = np.frombuffer(own.scales, np.uint8).copy()
        self.biases = None if own.biases is None else np.frombuffer(own.biases, np.uint8).copy()
        if self.biases is not None and stored != dtype:
            self.scales, self.biases = (
                from_float32(to_float32(part.view(RAW[scale]), scale), stored)
                for part in (self.scales, self.biases)
            )

    def numbers(self, part: slice) -> tuple[Floats, Floats]:
        assert self.biases is not None
        kind = RAW[self.stored]
        scale, bias = (
            to_float32(array.view(kind)[part], self.stored) for array in (self.scales, self.biases)
        )
        return scale, bias

    def quantized(self) -> Quantized:
        bits = np.unpackbits(self.codes[..., None], axis=2, bitorder="little", count=self.fmt.bits)
        weight = np.packbits(bits.reshape(-1), bitorder="little")
        biases = None if self.biases is None else self.biases.data
        return Quantized(weight.data, self.scales.data, biases, self.non_finite)


# -- affine ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Line:
    scale: Floats
    bias: Floats
    inverse: Floats
    usable: Flags

    def codes(self, x: Floats, top: np.float32) -> Floats:
        step = (x - self.bias) * self.inverse
        codes: Floats = np.rint(np.clip(step, _F32(0), top))
        return codes

    def values(self, codes: Floats) -> Floats:
        found: Floats = codes * self.scale + self.bias
        return found


def _rounded(values: Floats, dtype: str) -> Floats:
    raw = from_float32(values, dtype).view(RAW[dtype])
    return to_float32(raw, dtype).reshape(values.shape)


@dataclass(frozen=True, slots=True)
class _Lines:
    """How lines are made: the last code, and the dtype that scale and bias are stored in."""

    top: np.float32
    stored: str

    def line(self, scale: Floats, bias: Floats, candidates: Flags) -> _Line:
        scale, bias = _rounded(scale, self.stored), _rounded(bias, self.stored)
        inverse = _F32(1) / scale
        usable = candidates & (scale != 0)
        for part in (scale, bias, inverse, _rounded(self.top * scale + bias, self.stored)):
            usable &= np.isfinite(part)
        scale, bias = np.where(usable, scale, _F32(1)), np.where(usable, bias, _F32(0))
        return _Line(scale, bias, np.where(usable, inverse, _F32(1)), usable)

    def first(self, x: Floats, own: tuple[Floats, Floats], open_: Flags) -> Iterator[_Line]:
        yield self.line(*own, open_)
        least, largest = x.min(axis=0), x.max(axis=0)
        for below, above in product(range(3), range(3)):
            scale = _KEPT[below + above] * (largest - least) / self.top
            yield self.line(scale, least + _CUT[below] * (largest - least), open_)

    def fitted(
        self, q: Doubles, x: Doubles, h: Doubles, sums: tuple[Doubles, Doubles], usable: Flags
    ) -> _Line:
        """Weighted least squares for these codes."""
        weighted = h * q
        sum_h, sum_x = sums
        sum_q, sum_qq, sum_qx = _sum(weighted), _sum(weighted * q), _sum(weighted * x)
        determinant = sum_h * sum_qq - sum_q * sum_q
        scale = (sum_h * sum_qx - sum_q * sum_x) / determinant
        bias = (sum_qq * sum_x - sum_q * sum_qx) / determinant
        usable = usable & (determinant > 0)
        return self.line(scale.astype(_F32), bias.astype(_F32), usable)


def _search_lines(groups: _Groups, made: _Result, part: slice) -> None:
    x, h, stored = groups.x, groups.h, made.stored
    lines = _Lines(_F32(2**made.fmt.bits - 1), stored)
    own = made.numbers(part)
    open_ = groups.open & np.isfinite(own[0]) & np.isfinite(own[1]) & (x != x[0]).any(axis=0)
    start = _Line(*own, own[0], open_)
    lowest = groups.error(start.values(made.codes[part].T.astype(_F32)))
    found = np.zeros_like(open_)
    scale, bias = (array.copy() for array in own)
    codes = made.codes[part].T.copy()
    wide = x.astype(np.float64)
    sum_h, sum_x = _sum(h), _sum(h * wide)
    for first in lines.first(x, own, open_):
        line = first
        for _ in range(3):
            q = line.codes(x, lines.top)
            error = groups.error(line.values(q))
            better = line.usable & (error < lowest)
            lowest[better], scale[better], bias[better] = (
                array[better] for array in (error, line.scale, line.bias)
            )
            codes[:, better] = q[:, better].astype(np.uint8)
            found |= better
            line = lines.fitted(q.astype(np.float64), wide, h, (sum_h, sum_x), line.usable)
    made.codes[part][found] = codes.T[found]
    assert made.biases is not None
    for whole, array in ((made.scales, scale), (made.biases, bias)):
        kind = RAW[stored]
        whole.view(kind)[part][found] = from_float32(array[found], stored).view(kind)


# -- nvfp4, mxfp4 ----------------------------------------------------------------------------------


def _search_bytes(groups: _Groups, made: _Result, part: slice) -> None:
    own = made.scales[part].astype(np.int64)
    table: Callable[[Any], Floats] = _powers if made.fmt.mode == "mxfp4" else lambda b: E4M3[b]
    magnitudes = np.abs(groups.x)
    absolute = _Groups(magnitudes, groups.h, groups.open)
    lowest = absolute.error(_E2M1[made.codes[part].T & 7] * table(np.where(groups.open, own, 0)))
    steps = (-1,) if made.fmt.mode == "mxfp4" else range(-_BELOW, _ABOVE + 1)
    best, codes = own.copy(), made.codes[part].T.copy()
    for step in steps:
        if not step:
            continue
        byte = own + step
        least, largest = (0, 255) if made.fmt.mode == "mxfp4" else (1, _LARGEST_BYTE)
        usable = groups.open & (byte >= least) & (byte <= largest)
        scale = table(np.where(usable, byte, 127))
        inverse = (_F32(1) / np.where(usable, scale, _F32(1))).astype(_F32)
        sizes = _nearest(magnitudes * inverse)
        error = absolute.error(sizes * scale)
        better = usable & (error < lowest)
        lowest[better], best[better] = error[better], byte[better]
        found = np.searchsorted(_E2M1, sizes[:, better]).astype(np.uint8)
        negative = np.signbit(groups.x[:, better]) & (found > 0)
        codes[:, better] = found | (negative.astype(np.uint8) << 3)
    made.codes[part] = codes.T
    made.scales[part] = best.astype(np.uint8)


def _powers(byte: npt.NDArray[np.int64]) -> Floats:
    return np.ldexp(_F32(1), (byte - 127).astype(np.int32))


def _nearest(magnitudes: Floats) -> Floats:
    """The nearest E2M1 magnitudes, the even code on a tie."""
    sizes = np.minimum(magnitudes, _F32(6))
    unit = np.where(sizes < 2, _F32(0.5), np.where(sizes < 4, _F32(1), _F32(2)))
    return np.rint(sizes / unit) * unit
