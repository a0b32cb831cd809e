"""Raw weights and what quantizing makes of them: little-endian bytes, whoever does the work.

Needs no NumPy, nor do the native kernels: a `create` that uses them starts fast and stays small.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantmill.errors import BadRequest, BadWeights
from quantmill.formats import DTYPE_BYTES, FLOAT_DTYPES, Format

ROUNDINGS = ("ceil", "nearest")
"""How the exponent of an mx scale is rounded: up, as MLX does since 0.32.2, or to nearest."""

MAX_SCALE = 448.0 * 6.0
"""Largest product of an E4M3 scale and an E2M1 code: what a global scale maps a maximum to."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """Raw bytes of the codes (packed in 32-bit words), scales and biases.

    `non_finite` counts weights that are NaN or infinite.
    """

    weight: memoryview
    scales: memoryview
    biases: memoryview | None
    non_finite: int = 0


@dataclass(frozen=True, slots=True)
class CodedRows:
    """Rows of another quantizer's codes, a byte each, and the parameters of their groups.

    A number is (element - zero) * scale + bias, every operation rounded to F32. `element` says what
    a code stands for: `uint`, `e2m1` or `e4m3`. Scales, zeros and biases are F32 in raw bytes, one
    of each for `group` columns of a row, or for fewer at its end; None for no zeros or biases.
    """

    element: str
    columns: int
    group: int
    codes: memoryview
    scales: memoryview
    zeros: memoryview | None
    biases: memoryview | None


def no_groups(fmt: Format) -> Quantized:
    """What no weights become."""
    nothing = memoryview(b"")
    return Quantized(nothing, nothing, nothing if fmt.has_bias else None)


def count_groups(raw: memoryview, dtype: str, fmt: Format) -> int:
    """How many groups these are; raises BadRequest for other dtypes or a partial group."""
    if dtype not in FLOAT_DTYPES:
        raise BadRequest(f"dtype {dtype} cannot be quantized", kind="unsupported_dtype")
    count = raw.nbytes // DTYPE_BYTES[dtype]
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
