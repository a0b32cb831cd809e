"""Raw weights: the conversions, checks and counts that every way to quantize shares.

Weights and what becomes of them are little-endian bytes in NumPy arrays of one dimension.
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

RAW = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
"""Integers as wide as the elements of a dtype."""

FLOATS = {"F16": np.float16, "F32": np.float32}
"""NumPy's own floats: BF16 is none of them."""

_EXPONENT_MASK = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}


@dataclass(frozen=True, slots=True)
class Quantized:
    """Raw little-endian bytes of the codes (packed in 32-bit words), scales and biases.

    `non_finite` counts weights that are NaN or infinite.
    """

    weight: Bytes
    scales: Bytes
    biases: Bytes | None
    non_finite: int = 0


def count_non_finite(raw: Bytes, dtype: str) -> int:
    """How many elements are NaN or infinite. `raw` holds little-endian BF16, F16 or F32."""
    return int(np.count_nonzero(_non_finite(raw, dtype)))


def _non_finite(raw: Bytes, dtype: str) -> npt.NDArray[np.bool_]:
    mask = _EXPONENT_MASK[dtype]
    found: npt.NDArray[np.bool_] = (raw.view(RAW[dtype]) & mask) == mask
    return found


def absolute_maximum(raw: Bytes, dtype: str) -> float:
    """The largest magnitude of finite elements; 0 for no elements."""
    # magnitudes of IEEE numbers order like their bits without the sign
    bits = raw.view(RAW[dtype])
    bits = bits & (np.iinfo(bits.dtype).max >> 1)
    largest = np.asarray([bits.max(initial=0)], dtype=bits.dtype)
    return float(to_float32(largest, dtype)[0])


def to_float32(raw: npt.NDArray[Any], dtype: str) -> Floats:
    """Elements of BF16, F16 or F32 as F32, exact; F32 ones are not copied."""
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(FLOATS[dtype]).astype(np.float32, copy=False)


def from_float32(values: Floats, dtype: str) -> Bytes:
    """F32 numbers as elements of BF16, F16 or F32, rounded to nearest, ties to even."""
    values = np.ascontiguousarray(values)
    if dtype == "BF16":
        return to_bf16(values.view(np.uint8), "F32")
    with np.errstate(over="ignore"):
        return values.astype(FLOATS[dtype], copy=False).view(np.uint8)


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


def count_groups(raw: Bytes, dtype: str, fmt: Format) -> int:
    """How many groups these are; raises BadRequest for other dtypes or a partial group."""
    if dtype not in RAW:
        raise BadRequest(f"dtype {dtype} cannot be quantized", kind="unsupported_dtype")
    count = raw.size // DTYPE_BYTES[dtype]
    if count % fmt.group_size:
        raise BadRequest(f"{count} elements are not whole groups of {fmt.group_size}")
    return count // fmt.group_size


def check_rounding(rounding: str) -> None:
    """Raise BadRequest for a word that is not in ROUNDINGS."""
    if rounding not in ROUNDINGS:
        raise BadRequest(f"unknown rounding {rounding!r}", hint="choose ceil or nearest")


def too_large() -> BadWeights:
    """The error for finite weights of an affine format that got an infinite scale or bias."""
    return BadWeights("values are too large: the scale would be infinite", kind="overflow")


def refuse_overflow(raw: Bytes, found: Quantized, dtype: str, fmt: Format) -> None:
    """Raise `too_large` where a group of finite weights got a scale or bias that is not finite."""
    broken = np.zeros(count_groups(raw, dtype, fmt), bool)
    for part in (found.scales, found.biases):
        if part is not None:
            broken |= _non_finite(part, dtype)
    if broken.any():
        groups = _non_finite(raw, dtype).reshape(-1, fmt.group_size)
        if (broken & ~groups.any(axis=1)).any():
            raise too_large()
