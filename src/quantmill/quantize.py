"""The arithmetic seam: raw weights in; packed codes, scales and biases out.

Everything is exact with `mlx.core.quantize` on MLX's CPU backend (docs/formats.md), with one
addition: a group of an mx format so small that MLX's scale byte would wrap around gets the
smallest scale instead. Groups are independent, so a tensor may be given in pieces of any number of
groups and the concatenated results are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from quantmill.errors import BadRequest, BadWeights
from quantmill.formats import DTYPE_BYTES, Format

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

ROUNDINGS = ("ceil", "nearest")
"""How the exponent of an mx scale is rounded: up, as MLX does since 0.32.2, or to nearest."""

MAX_SCALE = 448.0 * 6.0
"""Largest product of an E4M3 scale and an E2M1 code: what a global scale maps a maximum to."""

_FP4_MAX, _FP8_MAX = 6.0, 448.0
_FP4_TABLE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SMALLEST_EXPONENT, _LARGEST_EXPONENT = -127, 127
_BIAS = 127
# MLX wraps exponents below -127 to bytes from 234 up; float32 reaches -149.
_FIRST_WRAPPED_BYTE = 234

_RAW = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
_FLOATS = {"F16": np.float16, "F32": np.float32}  # BF16 NumPy does not know
_EXPONENT_MASK = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}


@dataclass(frozen=True, slots=True)
class Quantized:
    """Raw little-endian bytes of the codes (packed in 32-bit words), scales and biases."""

    weight: Bytes
    scales: Bytes
    biases: Bytes | None


def piece_elements(fmt: Format) -> int:
    """Elements per call that keep the arithmetic's working memory near 50 MB.

    MLX composes the 4-bit float formats of whole-array operations at some 80 bytes an element.
    """
    return 1 << (18 if fmt.mode in {"nvfp4", "mxfp4"} else 20)


def count_non_finite(raw: Bytes, dtype: str) -> int:
    """How many elements are NaN or infinite. `raw` holds little-endian BF16, F16 or F32."""
    mask = _EXPONENT_MASK[dtype]
    bits = raw.view(_RAW[dtype])
    return int(np.count_nonzero((bits & mask) == mask))


def absolute_maximum(raw: Bytes, dtype: str) -> float:
    """The largest magnitude; 0 for no elements."""
    # magnitudes of IEEE numbers order like their bits without the sign
    bits = raw.view(_RAW[dtype])
    bits = bits & (np.iinfo(bits.dtype).max >> 1)
    largest = np.asarray([bits.max(initial=0)], dtype=bits.dtype)
    return float(to_float32(largest, dtype)[0])


def to_float32(raw: npt.NDArray[Any], dtype: str) -> Floats:
    """Elements of BF16, F16 or F32 as F32, exact; F32 ones are not copied."""
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(_FLOATS[dtype]).astype(np.float32, copy=False)


def from_float32(values: Floats, dtype: str) -> Bytes:
    """F32 numbers as elements of BF16, F16 or F32, rounded to nearest, ties to even."""
    values = np.ascontiguousarray(values)
    if dtype == "BF16":
        return to_bf16(values.view(np.uint8), "F32")
    with np.errstate(over="ignore"):
        return values.astype(_FLOATS[dtype], copy=False).view(np.uint8)


def to_bf16(raw: Bytes, dtype: str) -> Bytes:
    """Elements of F64 (or F32, F16) as BF16: rounded to F32, then to BF16, ties to even."""
    kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
    if dtype not in kinds:
        raise BadRequest(f"dtype {dtype} cannot be cast to BF16", kind="unsupported_dtype")
    with np.errstate(over="ignore", invalid="ignore"):
        values = raw.view(kinds[dtype]).astype(np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    rounded[np.isnan(values)] = 0x7FC0
    return rounded.view(np.uint8)


def quantize(
    raw: Bytes, dtype: str, fmt: Format, *, rounding: str = "ceil", maximum: float | None = None
) -> Quantized:
    """Quantize consecutive groups of weights.

    `raw` holds little-endian elements of `dtype` (BF16, F16 or F32), a whole number of groups.
    `maximum` is the absolute maximum of the whole tensor where an nvfp4 global scale is wanted.
    Scales and biases of affine formats have the weights' dtype; float formats have byte scales.
    Raises BadRequest for other dtypes or a partial group, BadWeights where finite weights are too
    large for a finite affine scale.
    """
    import mlx.core as mx

    if not count_groups(raw, dtype, fmt):  # where some of MLX's operations raise
        return Quantized(raw, raw, raw if fmt.has_bias else None)
    with mx.stream(mx.cpu):  # whatever device the caller's own code uses
        if fmt.mode in {"mxfp4", "mxfp8"}:
            return _quantize_mx(raw, dtype, fmt, rounding)
        found = _by_mlx(raw, dtype, fmt, maximum)
    if found.biases is not None:
        refuse_overflow(raw, found, dtype)
    return found


def count_groups(raw: Bytes, dtype: str, fmt: Format) -> int:
    """How many groups these are; raises BadRequest for other dtypes or a partial group."""
    if dtype not in _RAW:
        raise BadRequest(f"dtype {dtype} cannot be quantized", kind="unsupported_dtype")
    count = raw.size // DTYPE_BYTES[dtype]
    if count % fmt.group_size:
        raise BadRequest(f"{count} elements are not whole groups of {fmt.group_size}")
    return count // fmt.group_size


def check_rounding(rounding: str) -> None:
    """Raise BadRequest for a word that is not in ROUNDINGS."""
    if rounding not in ROUNDINGS:
        raise BadRequest(f"unknown rounding {rounding!r}", hint="choose ceil or nearest")


def refuse_overflow(raw: Bytes, found: Quantized, dtype: str) -> None:
    """Raise BadWeights where finite weights of an affine format got an infinite scale or bias."""
    parts = (found.scales, found.biases)
    broken = any(part is not None and count_non_finite(part, dtype) for part in parts)
    if broken and not count_non_finite(raw, dtype):
        raise BadWeights("values are too large: the scale would be infinite", kind="overflow")


# -- MLX -------------------------------------------------------------------------------------------


def _to_mlx(mx: Any, raw: Bytes, dtype: str, width: int) -> Any:
    if dtype == "BF16":
        return mx.array(raw.view(np.uint16).reshape(-1, width)).view(mx.bfloat16)
    return mx.array(raw.view(_FLOATS[dtype]).reshape(-1, width))


def _to_bytes(mx: Any, array: Any) -> Bytes:
    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.asarray(plain).reshape(-1).view(np.uint8)


def _by_mlx(raw: Bytes, dtype: str, fmt: Format, maximum: float | None = None) -> Quantized:
    import mlx.core as mx

    width = max(fmt.group_size, 32)
    groups = raw.size // DTYPE_BYTES[dtype] // fmt.group_size
    short = -raw.size % (width * DTYPE_BYTES[dtype])
    if short:  # MLX takes nvfp4 in pairs of groups only: pad with a group of zeros, then cut
        raw = np.concatenate([raw, np.zeros(short, np.uint8)])
    parts = mx.quantize(
        _to_mlx(mx, raw, dtype, width),
        group_size=fmt.group_size,
        bits=fmt.bits,
        mode=fmt.mode,
        global_scale=None if maximum is None else mx.array(maximum, mx.float32),
    )
    mx.eval(*parts)
    weight, *rest = (_to_bytes(mx, part) for part in parts)
    scale_bytes = DTYPE_BYTES[fmt.scale_dtype(dtype)]
    rest = [part[: groups * scale_bytes] for part in rest]
    biases = rest[1] if fmt.has_bias else None
    return Quantized(weight[: groups * fmt.group_size * fmt.bits // 8], rest[0], biases)


# -- mx formats: rounding choice and tiny groups ---------------------------------------------------


def _quantize_mx(raw: Bytes, dtype: str, fmt: Format, rounding: str) -> Quantized:
    check_rounding(rounding)
    if rounding == "nearest":
        return _by_exponent(raw, dtype, fmt, None)
    found = _by_mlx(raw, dtype, fmt)
    if (found.scales >= _FIRST_WRAPPED_BYTE).any():
        return _with_smallest_scale(found, raw, dtype, fmt)
    return found


def _with_smallest_scale(found: Quantized, raw: Bytes, dtype: str, fmt: Format) -> Quantized:
    """The same result with wrapped groups done again at the smallest exponent."""
    groups = raw.view(_RAW[dtype]).reshape(-1, fmt.group_size)
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
    return Quantized(weight, scales, None)


def _by_exponent(raw: Bytes, dtype: str, fmt: Format, exponent: int | None) -> Quantized:
    """An mx format with the exponent given, or rounded to nearest as MLX did up to 0.32.1.

    Operations run in the weights' dtype, as MLX's own do: the quotient and its logarithm are
    rounded to that dtype before the exponent is.
    """
    import mlx.core as mx

    x = _to_mlx(mx, raw, dtype, fmt.group_size)
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
    codes = _fp4_codes(mx, scaled) if fmt.mode == "mxfp4" else np.asarray(mx.to_fp8(scaled))
    return Quantized(codes.reshape(-1), (powers + _BIAS).astype(np.uint8), None)


def _fp4_codes(mx: Any, scaled: Any) -> Bytes:
    """Index of the nearest E2M1 value, the first on a tie, two to a byte."""
    table = mx.array([*_FP4_TABLE, *(-v for v in _FP4_TABLE)], scaled.dtype)
    codes = np.asarray(mx.argmin(mx.abs(scaled[..., None] - table), axis=-1).astype(mx.uint8))
    pairs: Bytes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return np.ascontiguousarray(pairs)
