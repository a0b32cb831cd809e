"""Quantizers written from the GPU column of docs/formats.md, to compare with: slow, obvious.

Like `reference`, with what differs on a GPU: everything in float32, ties and signs of the codes,
zero blocks, negative affine groups. Weights are 2-D arrays whose rows are whole numbers of groups.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from reference import E2M1, E4M3, LARGEST, Packed, encode_e4m3, pack

Array = npt.NDArray[Any]

_F32 = np.float32
_EVEN_FIRST = (0, 2, 4, 6, 1, 3, 5, 7)


def half_away(value: float) -> float:
    """The nearest integer, the one farther from zero on a tie."""
    # float64 holds every float32 plus a half; larger ones are integers
    rounded = math.floor(abs(value) + 0.5) if abs(value) < 2**24 else abs(value)
    return math.copysign(rounded, value)


# -- affine ----------------------------------------------------------------------------------------


@np.errstate(all="ignore")
def affine(x: Array, bits: int, group: int) -> Packed:
    """Codes on a line through one end of each group, the upper end being at least zero."""
    top = _F32(2**bits - 1)
    scales, biases, codes = [], [], []
    for w in x.astype(_F32).reshape(-1, group):
        smallest, largest = w.min(), max(_F32(0), w.max())
        negative = abs(smallest) > abs(largest)
        scale = max((largest - smallest) / top, _F32(1e-7))
        scale = scale if negative else -scale
        edge = smallest if negative else largest
        steps = _F32(half_away(edge / scale))
        scale = edge / steps if steps != 0 else scale
        bias = edge if steps != 0 else _F32(0)
        quotients = ((w - bias) / scale).astype(np.float64)
        found = np.copysign(np.floor(np.abs(quotients) + 0.5), quotients)
        assert not (found < 0).any(), "nothing is below the first code: no limit is needed there"
        codes.append(np.where(found < top, found, top))  # also for NaN
        scales.append(scale)
        biases.append(bias)
    rows = len(x)
    words = pack(np.array(codes).astype(np.uint8).reshape(rows, -1), bits)
    stored = [np.array(part, _F32).astype(x.dtype).reshape(rows, -1) for part in (scales, biases)]
    return Packed(words, stored[0], stored[1])


# -- float formats ---------------------------------------------------------------------------------


def encode_e2m1(values: Array) -> Array:
    """The nearest code, the even one on a tie, 6 beyond; bit 3 is the sign, also that of zero."""
    table = np.array(E2M1[:8])[list(_EVEN_FIRST)]
    magnitudes = np.minimum(np.abs(values.astype(np.float64)), 6)
    nearest = np.abs(magnitudes[..., None] - table).argmin(axis=-1)
    codes = np.array(_EVEN_FIRST)[nearest] + np.where(np.signbit(values), 8, 0)
    return np.where(np.isnan(values), 7, codes).astype(np.uint8)


def scaled(w: Array, scale: Array, encode: Any) -> Array:
    """Weights times the reciprocal of their group's scale; times zero where that is zero."""
    factors = [encode / s if s != 0 else _F32(0) for s in scale.astype(_F32)]
    return w * np.array(factors, _F32)[:, None]


@np.errstate(all="ignore")
def nvfp4(x: Array, maximum: float | None = None) -> Packed:
    """Fp4 codes, an E4M3 scale for every 16; `maximum` is the global scale as MLX takes it."""
    w = x.astype(_F32).reshape(-1, 16)
    encode = _F32(1) if maximum is None else _F32(2688) / _F32(maximum)
    scales = encode_e4m3(np.abs(np.abs(w).max(axis=1) / _F32(6) * encode))
    codes = encode_e2m1(scaled(w, E4M3[scales], encode))
    return Packed(pack(codes.reshape(len(x), -1), 4), scales.reshape(len(x), -1), None)


def exponent(ratio: np.float32, rounding: str) -> int:
    """The exponent of a scale for a maximum over the largest code, -127 for zero."""
    if ratio == 0:
        return -127
    if rounding == "nearest":
        found = int(half_away(float(_F32(math.log2(float(ratio))))))
    else:
        found = math.frexp(ratio)[1] - 2
        while 2.0**found < ratio:  # exact in float64
            found += 1
    return max(-127, min(127, found))


@np.errstate(all="ignore")
def mx(x: Array, mode: str, rounding: str = "ceil") -> Packed:
    """Fp4 or E4M3 codes, a power of two for every 32."""
    w = x.astype(_F32).reshape(-1, 32)
    ratios = np.abs(w).max(axis=1) / _F32(LARGEST[mode])
    known = {ratio: exponent(ratio, rounding) for ratio in set(ratios)}
    exponents = np.array([known[ratio] for ratio in ratios])
    y = scaled(w, np.ldexp(_F32(1), exponents), _F32(1))
    codes = encode_e2m1(y) if mode == "mxfp4" else encode_e4m3(y)
    words = pack(codes.reshape(len(x), -1), 4 if mode == "mxfp4" else 8)
    return Packed(words, (exponents + 127).astype(np.uint8).reshape(len(x), -1), None)


def quantize(
    x: Array,
    mode: str,
    bits: int,
    group: int,
    rounding: str = "ceil",
    maximum: float | None = None,
) -> Packed:
    """Any format."""
    if mode == "affine":
        return affine(x, bits, group)
    return nvfp4(x, maximum) if mode == "nvfp4" else mx(x, mode, rounding)
