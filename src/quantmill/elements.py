"""Elements of BF16, F16 and F32 in NumPy: conversions and counts, for what the kernels do not do.

Arrays of bytes have one dimension and hold little-endian elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from quantmill.errors import BadRequest
from quantmill.formats import Format
from quantmill.weights import CodedRows, Quantized, too_large

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

RAW = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
"""Integers as wide as the elements of a dtype."""

FLOATS = {"F16": np.float16, "F32": np.float32}
"""NumPy's own floats: BF16 is none of them."""

_EXPONENT_MASK = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}


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


def _e4m3() -> Floats:
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    values = np.where(
        exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * np.exp2(exponent.astype(float) - 10)
    )
    values[(codes & 127) == 127] = np.nan
    return np.where(codes < 128, values, -values).astype(np.float32)


E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
"""The number that each E2M1 code without a sign stands for."""

E4M3: Floats = _e4m3()
"""The number that each E4M3 byte stands for."""

_TABLES: Mapping[str, Floats] = {
    "uint": np.arange(256, dtype=np.float32),
    "e2m1": np.concatenate([E2M1, -E2M1]),
    "e4m3": E4M3,
}


def decode(rows: CodedRows, dtype: str) -> memoryview:
    """The rows' numbers as elements of `dtype`: what the kernel of that name does, in NumPy."""
    codes = np.frombuffer(rows.codes, np.uint8).reshape(-1, rows.columns)

    def spread(part: memoryview) -> Floats:
        groups = np.frombuffer(part, np.float32).reshape(-1, -(-rows.columns // rows.group))
        return np.repeat(groups, rows.group, axis=1)[:, : rows.columns]

    values = _TABLES[rows.element][codes]
    with np.errstate(over="ignore", invalid="ignore"):
        if rows.zeros is not None:
            values -= spread(rows.zeros)
        values *= spread(rows.scales)
        if rows.biases is not None:
            values += spread(rows.biases)
    return rounded(values, dtype)


def rounded(values: Floats, dtype: str) -> memoryview:
    """As `from_float32`, but with one NaN: the sign and bits of others depend on the processor."""
    values = np.where(np.isnan(values), np.float32(np.nan), values)
    return from_float32(values.reshape(-1), dtype).data


def refuse_overflow(raw: Bytes, found: Quantized, dtype: str, fmt: Format) -> None:
    """Raise `too_large` where a group of finite weights got a scale or bias that is not finite."""
    broken = _non_finite(np.frombuffer(found.scales, np.uint8), dtype)
    if found.biases is not None:
        broken = broken | _non_finite(np.frombuffer(found.biases, np.uint8), dtype)
    if broken.any():
        groups = _non_finite(raw, dtype).reshape(-1, fmt.group_size)
        if (broken & ~groups.any(axis=1)).any():
            raise too_large()
