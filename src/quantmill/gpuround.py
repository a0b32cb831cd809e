"""The rounding profile `gpu`: what MLX's Metal kernels do, in software.

MLX rounds differently on a GPU than on a CPU, and Ollama quantizes on the GPU where there is one.
This module follows the Metal column of docs/formats.md as of MLX 0.32.2 (CUDA differs in its
treatment of zero blocks and of the nvfp4 scale), and was written from that description and the
kernels' source. It was not compared with a real GPU. Known to depend on the hardware and
fixed here as IEEE arithmetic has it: numbers below 2^-126, which a GPU may take for zero, and the
last digits of the logarithm that `nearest` rounds, which matter to a few F32 weights only.

Groups are independent, as in quantmill.quantize, whose conventions these are.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from quantmill.elements import (
    Bytes,
    Floats,
    count_non_finite,
    from_float32,
    refuse_overflow,
    to_float32,
)
from quantmill.formats import Format
from quantmill.weights import MAX_SCALE, Quantized, check_rounding, count_groups, no_groups

_EPSILON = np.float32(1e-7)
_LARGEST = {"nvfp4": np.float32(6), "mxfp4": np.float32(6), "mxfp8": np.float32(448)}
_LARGEST_EXPONENT = 127
_BIAS = 127
_NOT_A_SCALE = 0xFF

# Magnitudes above which the next E2M1 code is the nearest, or (True) from which on: ties are even.
_FP4_STEPS = (
    (0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True),
    (5.0, False),
)  # fmt: skip
_FP4_NAN = 7

_E4M3_LARGEST_CODE = 0x7E
_E4M3_LARGEST = 0x43E00000  # 448 as F32, from which on everything is 448
_E4M3_LEAST_NORMAL = 121 << 23  # 2^-6 as F32
_E4M3_ALIGNING = 141 << 23  # 2^14 as F32, whose last digit is the least E4M3 number, 2^-9
_E4M3_REBIAS = 120 << 23


@np.errstate(all="ignore")
def quantize_as_gpu(
    raw: memoryview,
    dtype: str,
    fmt: Format,
    *,
    rounding: str = "ceil",
    maximum: float | None = None,
) -> Quantized:
    """Quantize consecutive groups of weights as MLX's Metal kernels do.

    Arguments, results and errors are those of `quantmill.quantize.quantize`.
    """
    if not count_groups(raw, dtype, fmt):
        return no_groups(fmt)
    array = np.frombuffer(raw, np.uint8)
    if fmt.mode == "affine":
        found = _affine(array, dtype, fmt)
        refuse_overflow(array, found, dtype, fmt)
    else:
        found = _float(array, dtype, fmt, rounding, maximum)
    return replace(found, non_finite=count_non_finite(array, dtype))


def _float(raw: Bytes, dtype: str, fmt: Format, rounding: str, maximum: float | None) -> Quantized:
    groups = to_float32(raw, dtype).reshape(-1, fmt.group_size)
    ratio = np.fmax.reduce(np.abs(groups), axis=1) / _LARGEST[fmt.mode]
    if fmt.mode == "nvfp4":
        return _nvfp4(groups, ratio, maximum)
    check_rounding(rounding)
    return _mx(groups, ratio, fmt, rounding)


# -- affine ----------------------------------------------------------------------------------------


def _affine(raw: Bytes, dtype: str, fmt: Format) -> Quantized:
    groups = to_float32(raw, dtype).reshape(-1, fmt.group_size)
    top = np.float32(2**fmt.bits - 1)
    least: Floats = np.fmin.reduce(groups, axis=1)
    largest: Floats = np.fmax.reduce(groups, axis=1, initial=np.float32(0))
    negative = np.abs(least) > np.abs(largest)
    scale: Floats = np.maximum((largest - least) / top, _EPSILON)
    scale = np.where(negative, scale, -scale)
    edge: Floats = np.where(negative, least, largest)
    steps = _half_away(edge / scale)
    scale = np.where(steps == 0, scale, edge / steps)
    bias = np.where(steps == 0, np.float32(0), edge)
    codes = _half_away((groups - bias[:, None]) / scale[:, None])
    # The kernels have the upper limit only. No finite weight gets below 0: the edge is an end of
    # the group, and without a bias no weight is as far from zero as half a step. So the lower one
    # is for infinite weights alone. NaN, as a constant gets whose scale is 0, becomes the last.
    codes = np.fmax(np.fmin(codes, top), np.float32(0))
    packed = _pack(codes.astype(np.uint8), fmt.bits)
    return _views(packed, from_float32(scale, dtype), from_float32(bias, dtype))


def _half_away(values: Floats) -> Floats:
    """The nearest integers, those farther from zero on a tie."""
    whole = np.trunc(values)
    farther = np.abs(values - whole) >= np.float32(0.5)  # the difference is exact
    nearest: Floats = whole + np.copysign(farther.astype(np.float32), values)
    return nearest


# -- float formats ---------------------------------------------------------------------------------


def _nvfp4(groups: Floats, ratio: Floats, maximum: float | None) -> Quantized:
    encode = np.float32(1) if maximum is None else np.float32(MAX_SCALE) / np.float32(maximum)
    scales = _e4m3(np.abs(ratio * encode))  # without the sign that NaN has on some processors
    scaled = _scaled(groups, _e4m3_values(scales), encode)
    return _views(_pack(_e2m1(scaled), 4), scales, None)


def _mx(groups: Floats, ratio: Floats, fmt: Format, rounding: str) -> Quantized:
    logarithm = np.log2(ratio.astype(np.float64)).astype(np.float32)
    # a block of zeros has the logarithm -inf, and so the smallest scale
    powers = np.clip(_half_away(logarithm), -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    if rounding == "ceil":
        below = np.ldexp(np.float32(1), powers.astype(np.int32)) < ratio
        powers = powers + below  # far from the upper limit: no F32 over 6 is above 2^126
    scales = np.where(np.isfinite(ratio), powers + _BIAS, _NOT_A_SCALE).astype(np.uint8)
    values = np.ldexp(np.float32(1), scales.astype(np.int32) - _BIAS)
    scaled = _scaled(groups, values, np.float32(1))
    codes = _e4m3(scaled) if fmt.bits == 8 else _e2m1(scaled)
    return _views(_pack(codes, fmt.bits), scales, None)


def _scaled(groups: Floats, scales: Floats, encode: np.float32) -> Floats:
    """Weights times the reciprocal scale, which is 0 where the scale is."""
    factors = np.where(scales == 0, np.float32(0), encode / scales)
    return groups * factors[:, None]


def _e2m1(values: Floats) -> Bytes:
    """The nearest code, the even one on a tie, with the sign of its value: -0 is code 8."""
    magnitudes = np.abs(values)
    codes = np.where(np.signbit(values), np.uint8(8), np.uint8(0))
    for threshold, included in _FP4_STEPS:
        limit = np.float32(threshold)
        codes += magnitudes >= limit if included else magnitudes > limit
    codes[np.isnan(values)] = _FP4_NAN
    return codes


def _e4m3(values: Floats) -> Bytes:
    """The nearest code, the even one on a tie; from 448 on that of 448."""
    bits = values.view(np.uint32)
    magnitudes = bits & 0x7FFFFFFF
    aligned = magnitudes.view(np.float32) + np.uint32(_E4M3_ALIGNING).view(np.float32)
    subnormal = aligned.view(np.uint32) - _E4M3_ALIGNING
    normal = (magnitudes - _E4M3_REBIAS + 0x7FFFF + ((magnitudes >> 20) & 1)) >> 20
    codes = np.where(magnitudes < _E4M3_LEAST_NORMAL, subnormal, normal)
    codes = np.where(magnitudes >= _E4M3_LARGEST, _E4M3_LARGEST_CODE, codes)
    signed: Bytes = (codes | ((bits >> 24) & 0x80)).astype(np.uint8)
    return signed


def _e4m3_values(codes: Bytes) -> Floats:
    """What codes without a sign stand for."""
    exponents = (codes >> 3).astype(np.int32)
    digits = (codes & 7) + np.where(exponents == 0, 0, 8)
    values: Floats = np.ldexp(digits.astype(np.float32), np.maximum(exponents, 1) - 10)
    return values


def _views(codes: Bytes, scales: Bytes, biases: Bytes | None) -> Quantized:
    return Quantized(codes.data, scales.data, None if biases is None else biases.data)


# -- bytes -----------------------------------------------------------------------------------------


def _pack(codes: Bytes, bits: int) -> Bytes:
    """Codes as a stream of bits, the lowest bit of the first code first."""
    flat = codes.reshape(-1)
    if bits == 8:
        return flat
    if bits == 4:
        return flat[0::2] | (flat[1::2] << np.uint8(4))
    stream = np.unpackbits(flat[:, None], axis=1, count=bits, bitorder="little")
    return np.packbits(stream, bitorder="little")
