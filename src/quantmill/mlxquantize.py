"""MLX does the work: where the native kernels are absent, for rounding they lack, and on a GPU.

The bytes on a CPU are those of the kernels, whose oracle MLX is; on a GPU they follow its own
rounding (docs/formats.md). Conventions are those of quantmill.quantize.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from quantmill.elements import (
    FLOATS,
    RAW,
    Bytes,
    count_non_finite,
    refuse_overflow,
    to_float32,
)
from quantmill.errors import BadRequest
from quantmill.formats import DTYPE_BYTES, Format
from quantmill.weights import Quantized, check_rounding, count_groups, no_groups

_FP4_MAX, _FP8_MAX = 6.0, 448.0
_FP4_TABLE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SMALLEST_EXPONENT, _LARGEST_EXPONENT = -127, 127
_BIAS = 127
# MLX wraps exponents below -127 to bytes from 234 up; float32 reaches -149.
_FIRST_WRAPPED_BYTE = 234


def gpu_name() -> str | None:
    """`metal` or `cuda`: the GPU that MLX has here, if any."""
    if mx.metal.is_available():
        return "metal"
    return "cuda" if mx.cuda.is_available() else None


def quantize_on_cpu(
    raw: memoryview,
    dtype: str,
    fmt: Format,
    *,
    rounding: str = "ceil",
    maximum: float | None = None,
) -> Quantized:
    """What `quantmill.quantize.quantize` does, by MLX's CPU backend."""
    if not count_groups(raw, dtype, fmt):  # where some of MLX's operations raise
        return no_groups(fmt)
    array = np.frombuffer(raw, np.uint8)
    with mx.stream(mx.cpu):  # whatever device the caller's own code uses
        if fmt.mode in {"mxfp4", "mxfp8"}:
            found = _quantize_mx(array, dtype, fmt, rounding)
        else:
            found = _by_mlx(array, dtype, fmt, maximum)
    return _checked(found, array, dtype, fmt)


def quantize_on_gpu(
    raw: memoryview,
    dtype: str,
    fmt: Format,
    *,
    rounding: str = "ceil",
    maximum: float | None = None,
) -> Quantized:
    """The same on MLX's GPU, Metal or CUDA, with its rounding.

    Raises BadRequest for `rounding` other than `ceil`, which is what MLX's kernels do.
    """
    check_rounding(rounding)
    if rounding != "ceil":
        raise BadRequest("a GPU rounds exponents up", hint="leave out --e8m0 or --device")
    if not count_groups(raw, dtype, fmt):
        return no_groups(fmt)
    array = np.frombuffer(raw, np.uint8)
    with mx.stream(mx.gpu):
        found = _by_mlx(array, dtype, fmt, maximum)
    return _checked(found, array, dtype, fmt)


def _checked(found: _Arrays, raw: Bytes, dtype: str, fmt: Format) -> Quantized:
    parts = [None if part is None else part.data for part in found]
    weight, scales, biases = parts
    assert weight is not None
    assert scales is not None
    made = Quantized(weight, scales, biases, count_non_finite(raw, dtype))
    if biases is not None:
        refuse_overflow(raw, made, dtype, fmt)
    return made


class _Arrays(NamedTuple):
    """Codes, scales and biases before they are checked."""

    weight: Bytes
    scales: Bytes
    biases: Bytes | None


def _to_mlx(raw: Bytes, dtype: str, width: int) -> Any:
    if dtype == "BF16":
        return mx.array(raw.view(np.uint16).reshape(-1, width)).view(mx.bfloat16)
    return mx.array(raw.view(FLOATS[dtype]).reshape(-1, width))


def _to_bytes(array: Any) -> Bytes:
    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.asarray(plain).reshape(-1).view(np.uint8)


def _by_mlx(raw: Bytes, dtype: str, fmt: Format, maximum: float | None = None) -> _Arrays:
    width = max(fmt.group_size, 32)
    groups = raw.size // DTYPE_BYTES[dtype] // fmt.group_size
    short = -raw.size % (width * DTYPE_BYTES[dtype])
    if short:  # MLX takes nvfp4 in pairs of groups only: pad with a group of zeros, then cut
        raw = np.concatenate([raw, np.zeros(short, np.uint8)])
    parts = mx.quantize(
        _to_mlx(raw, dtype, width),
        group_size=fmt.group_size,
        bits=fmt.bits,
        mode=fmt.mode,
        global_scale=None if maximum is None else mx.array(maximum, mx.float32),
    )
    mx.eval(*parts)
    weight, *rest = (_to_bytes(part) for part in parts)
    scale_bytes = DTYPE_BYTES[fmt.scale_dtype(dtype)]
    rest = [part[: groups * scale_bytes] for part in rest]
    biases = rest[1] if fmt.has_bias else None
    return _Arrays(weight[: groups * fmt.group_size * fmt.bits // 8], rest[0], biases)


# -- mx formats: rounding choice and tiny groups ---------------------------------------------------


def _quantize_mx(raw: Bytes, dtype: str, fmt: Format, rounding: str) -> _Arrays:
    check_rounding(rounding)
    if rounding == "nearest":
        return _by_exponent(raw, dtype, fmt, None)
    found = _by_mlx(raw, dtype, fmt)
    if (found.scales >= _FIRST_WRAPPED_BYTE).any():
        return _with_smallest_scale(found, raw, dtype, fmt)
    return found


def _with_smallest_scale(found: _Arrays, raw: Bytes, dtype: str, fmt: Format) -> _Arrays:
    """The same result with wrapped groups done again at the smallest exponent."""
    groups = raw.view(RAW[dtype]).reshape(-1, fmt.group_size)
    magnitudes = (groups & (np.iinfo(groups.dtype).max >> 1)).max(axis=1)
    small = to_float32(magnitudes, dtype) < 1.0  # the same bytes mean huge exponents above
    wrapped = (found.scales >= _FIRST_WRAPPED_BYTE) & small
    if not wrapped.any():
        return found
    again = _by_exponent(
        np.ascontiguousarray(groups[wrapped]).reshape(-1).view(np.uint8),
        dtype,
        fmt,
        _SMALLEST_EXPONENT,
    )
    scales, weight = found.scales.copy(), found.weight.copy()
    scales[wrapped] = again.scales
    rows = weight.reshape(len(groups), -1)
    rows[wrapped] = again.weight.reshape(int(wrapped.sum()), -1)
    return _Arrays(weight, scales, None)


def _by_exponent(raw: Bytes, dtype: str, fmt: Format, exponent: int | None) -> _Arrays:
    """An mx format with the exponent given, or rounded to nearest as MLX did up to 0.32.1.

    Operations run in the weights' dtype, as MLX's own do: the quotient and its logarithm are
    rounded to that dtype before the exponent is.
    """
    x = _to_mlx(raw, dtype, fmt.group_size)
    largest = _FP4_MAX if fmt.mode == "mxfp4" else _FP8_MAX
    if exponent is None:
        ratio = mx.max(mx.abs(x), axis=-1) / largest
        rounded = np.asarray(mx.round(mx.log2(ratio)).astype(mx.float32))
        zero = np.asarray(ratio.astype(mx.float32)) == 0
        powers = np.where(zero | ~np.isfinite(rounded), 0, rounded)
        powers = np.clip(powers, _SMALLEST_EXPONENT, _LARGEST_EXPONENT).astype(np.int32)
    else:
        powers = np.full(x.shape[0], exponent, np.int32)
    scale = mx.array(np.ldexp(np.float32(1), powers)).astype(x.dtype)
    scaled = x / scale[:, None]
    codes = _fp4_codes(scaled) if fmt.mode == "mxfp4" else np.asarray(mx.to_fp8(scaled))
    return _Arrays(codes.reshape(-1), (powers + _BIAS).astype(np.uint8), None)


def _fp4_codes(scaled: Any) -> Bytes:
    """Index of the nearest E2M1 value, the first on a tie, two to a byte."""
    table = mx.array([*_FP4_TABLE, *(-v for v in _FP4_TABLE)], scaled.dtype)
    codes = np.asarray(mx.argmin(mx.abs(scaled[..., None] - table), axis=-1).astype(mx.uint8))
    pairs: Bytes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return np.ascontiguousarray(pairs)
