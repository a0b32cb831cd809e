"""Quantizers and dequantizers written from docs/formats.md, to compare with: slow, obvious, no MLX.

All arithmetic runs in float32; `_in` rounds a result to the weights' dtype wherever the description
says so. Weights are 2-D arrays whose rows are whole numbers of groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

NUMPY = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
"""Dtype tag of a tensor file → numpy dtype."""

_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*_POSITIVE, *(-value for value in _POSITIVE))
"""Value of each fp4 code."""

LARGEST = {"nvfp4": 6.0, "mxfp4": 6.0, "mxfp8": 448.0}
SMALLEST_EXPONENT, LARGEST_EXPONENT = -127, 127

_F32 = np.float32


@dataclass(frozen=True, slots=True)
class Packed:
    """32-bit words of codes, one scale per group, and for affine formats one bias per group."""

    words: Array
    scales: Array
    biases: Array | None


def _in(dtype: Any, values: Array) -> Array:
    """Float32 values rounded to `dtype`, as float32."""
    return values.astype(dtype).astype(_F32)


# -- bit streams -----------------------------------------------------------------------------------


def pack(codes: Array, bits: int) -> Array:
    """Rows of codes as 32-bit words: a stream of bits, the lowest bit of the first code first."""
    stream = (codes[..., None].astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    rows = stream.reshape(len(codes), -1)
    return np.packbits(rows, axis=1, bitorder="little").view("<u4")


def unpack(words: Array, bits: int) -> Array:
    """The codes of rows of 32-bit words."""
    stream = np.unpackbits(words.astype("<u4").view(np.uint8), axis=1, bitorder="little")
    weights = 1 << np.arange(bits)
    codes: Array = (stream.reshape(len(words), -1, bits) * weights).sum(axis=-1)
    return codes.astype(np.uint8)


# -- E4M3 ------------------------------------------------------------------------------------------


def _e4m3_value(byte: int) -> float:
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return float(sign * mantissa / 8 * 2.0**-6)
    return float(sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7))


E4M3 = np.array([_e4m3_value(byte) for byte in range(256)], _F32)
"""Value of each E4M3 byte."""


def encode_e4m3(values: Array) -> Array:
    """The nearest E4M3 byte, the even one on a tie; beyond 448 (and for NaN) that of 448."""
    finite = E4M3[:0x7F].astype(np.float64)
    magnitudes = np.abs(values.astype(np.float64))
    inside = magnitudes < 448.0
    magnitudes = np.where(inside, magnitudes, 0.0)
    below = np.searchsorted(finite, magnitudes, side="right") - 1
    middle = (finite[below] + finite[below + 1]) / 2
    up = (magnitudes > middle) | ((magnitudes == middle) & (below % 2 == 1))
    codes = np.where(inside, below + up, 0x7E)
    return (codes + np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)


# -- quantizers ------------------------------------------------------------------------------------


@np.errstate(all="ignore")
def affine(x: Array, bits: int, group: int) -> Packed:
    """Codes 0..2^bits-1 on a line through one end of each group, such that zero has a code."""
    dtype = x.dtype
    w = x.astype(_F32).reshape(-1, group)
    smallest, largest = w.min(axis=1), w.max(axis=1)
    top = _F32(2**bits - 1)
    negative = np.abs(smallest) > np.abs(largest)
    scale = np.maximum((largest - smallest) / top, _F32(1e-7))
    scale = np.where(negative, scale, -scale)
    edge = np.where(negative, smallest, largest)
    steps = np.rint(edge / scale)
    scale = np.where(steps != 0, edge / steps, scale)
    bias = np.where(steps != 0, edge, _F32(0))
    codes = np.clip(np.rint((w - bias[:, None]) / scale[:, None]), 0, top)
    rows = len(x)
    words = pack(codes.astype(np.uint8).reshape(rows, -1), bits)
    return Packed(
        words, scale.reshape(rows, -1).astype(dtype), bias.reshape(rows, -1).astype(dtype)
    )


def _nearest_fp4(y: Array, dtype: Any) -> Array:
    """Index of the first of the nearest values, by distances rounded to `dtype`; 0 for NaN."""
    codes = np.zeros(y.shape, np.uint8)
    nearest = _in(dtype, np.abs(_in(dtype, y - _F32(E2M1[0]))))
    for code, value in enumerate(E2M1):
        distance = _in(dtype, np.abs(_in(dtype, y - _F32(value))))
        closer = distance < nearest
        codes[closer], nearest[closer] = code, distance[closer]
    return codes


@np.errstate(all="ignore")
def nvfp4(x: Array, maximum: float | None = None) -> Packed:
    """Fp4 codes, an E4M3 scale for every 16; `maximum` is the global scale as MLX takes it."""
    dtype = x.dtype
    w = x.astype(_F32).reshape(-1, 16)
    encode = _F32(1) if maximum is None else _F32(2688) / _F32(maximum)
    ratio = _in(dtype, np.abs(w).max(axis=1) / _F32(6))
    scales = encode_e4m3(ratio * encode)
    y = _in(dtype, w / E4M3[scales][:, None]) * encode
    codes = _nearest_fp4(y, _F32)
    return Packed(pack(codes.reshape(len(x), -1), 4), scales.reshape(len(x), -1), None)


def mx_ratio(x: Array, mode: str) -> Array:
    """What the scale of each group of 32 has to cover: its maximum over the largest code, in T."""
    largest = np.abs(x.astype(_F32).reshape(-1, 32)).max(axis=1)
    return _in(x.dtype, largest / _F32(LARGEST[mode]))


def mx_exponents(ratio: Array, dtype: Any, rounding: str) -> Array:
    """The exponent of each group's scale before any limit; 0 for a group of zeros."""
    if rounding == "nearest":
        logarithm = np.log2(ratio.astype(np.float64)).astype(_F32)
        exponents = np.rint(_in(dtype, logarithm))
    else:
        fraction, exponents = np.frexp(ratio)  # fraction in [1/2, 1)
        exponents = np.where(fraction == 0.5, exponents - 1, exponents)
    return np.where(ratio == 0, 0, exponents).astype(np.int32)


@np.errstate(all="ignore")
def mx(x: Array, mode: str, rounding: str = "ceil") -> Packed:
    """Fp4 or E4M3 codes, a power of two for every 32, never below 2^-127."""
    dtype, rows = x.dtype, len(x)
    exponents = mx_exponents(mx_ratio(x, mode), dtype, rounding)
    exponents = np.clip(exponents, SMALLEST_EXPONENT, LARGEST_EXPONENT)
    scale = _in(dtype, np.ldexp(_F32(1), exponents))
    y = _in(dtype, x.astype(_F32).reshape(-1, 32) / scale[:, None])
    codes = _nearest_fp4(y, dtype) if mode == "mxfp4" else encode_e4m3(y)
    words = pack(codes.reshape(rows, -1), 4 if mode == "mxfp4" else 8)
    return Packed(words, (exponents + 127).astype(np.uint8).reshape(rows, -1), None)


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


# -- dequantizers ----------------------------------------------------------------------------------


@np.errstate(all="ignore")
def dequantize_affine(packed: Packed, bits: int, group: int) -> Array:
    """Code times scale, rounded to the scales' dtype, plus bias, rounded again."""
    assert packed.biases is not None
    dtype = packed.scales.dtype
    codes = unpack(packed.words, bits).astype(_F32)
    scales = np.repeat(packed.scales.astype(_F32), group, axis=1)
    biases = np.repeat(packed.biases.astype(_F32), group, axis=1)
    return (_in(dtype, codes * scales) + biases).astype(dtype)


@np.errstate(all="ignore")
def dequantize_float(packed: Packed, mode: str, maximum: float | None = None) -> Array:
    """Element times scale as BF16; as F32 where a global scale is given."""
    dtype = ml_dtypes.bfloat16 if maximum is None else _F32
    codes = unpack(packed.words, 8 if mode == "mxfp8" else 4)
    elements = E4M3[codes] if mode == "mxfp8" else np.array(E2M1, _F32)[codes]
    if mode == "nvfp4":
        scales = E4M3[packed.scales]
        if maximum is not None:
            scales = scales * (_F32(maximum) / _F32(2688))
    else:
        scales = np.ldexp(_F32(1), packed.scales.astype(np.int32) - 127)
    scales = np.repeat(_in(dtype, scales), 16 if mode == "nvfp4" else 32, axis=1)
    return (_in(dtype, elements) * scales).astype(dtype)


def dequantize(packed: Packed, mode: str, bits: int, group: int) -> Array:
    """Any format, without a global scale."""
    if mode == "affine":
        return dequantize_affine(packed, bits, group)
    return dequantize_float(packed, mode)
