"""The arithmetic seam: raw weights in; packed codes, scales and biases out.

Everything is exact with `mlx.core.quantize` on MLX's CPU backend (docs/formats.md), with one
addition: a group of an mx format so small that MLX's scale byte would wrap around gets the
smallest scale instead. Groups are independent, so a tensor may be given in pieces of any number of
groups and the concatenated results are the same. kernels.py does the work; mlxquantize.py where it
cannot, and gpuround.py follows another rounding.
"""

from __future__ import annotations

import struct
from typing import Protocol

from quantmill import kernels
from quantmill.formats import Format
from quantmill.weights import MAX_SCALE, Quantized, check_rounding, count_groups, no_groups


class Arithmetic(Protocol):
    """One way to quantize: this module's, gpuround's, or MLX's on a GPU."""

    def __call__(
        self, raw: memoryview, dtype: str, fmt: Format, *, rounding: str, maximum: float | None
    ) -> Quantized:
        """See `quantize`."""


def quantize(
    raw: memoryview,
    dtype: str,
    fmt: Format,
    *,
    rounding: str = "ceil",
    maximum: float | None = None,
) -> Quantized:
    """Quantize consecutive groups of weights, by the native kernels or, without them, by MLX.

    `raw` holds little-endian elements of `dtype` (BF16, F16 or F32), a whole number of groups.
    `maximum` is the absolute maximum of the whole tensor where an nvfp4 global scale is wanted.
    Scales and biases of affine formats have the weights' dtype; float formats have byte scales.
    Raises BadRequest for other dtypes or a partial group, BadWeights where finite weights are too
    large for a finite affine scale.
    """
    if not count_groups(raw, dtype, fmt):
        return no_groups(fmt)
    is_mx = fmt.mode in {"mxfp4", "mxfp8"}
    if is_mx:
        check_rounding(rounding)
    encode = 1.0 if maximum is None else _quotient(MAX_SCALE, maximum)
    # rounding to nearest is MLX's logarithm, which the kernels have no copy of
    found = None if is_mx and rounding == "nearest" else kernels.quantize(raw, dtype, fmt, encode)
    if found is not None:
        return found
    from quantmill.mlxquantize import quantize_on_cpu

    return quantize_on_cpu(raw, dtype, fmt, rounding=rounding, maximum=maximum)


def _quotient(dividend: float, divisor: float) -> float:
    """The quotient of two numbers as F32 arithmetic has it; infinite where that overflows.

    Rounding first to F64 and then to F32 is harmless: F64 has more than twice the digits.
    """
    divisor = _as_f32(divisor)
    return _as_f32(dividend / divisor) if divisor else float("inf")


def _as_f32(value: float) -> float:
    try:
        found: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return float("inf")
    return found


def scan(raw: memoryview, dtype: str) -> tuple[int, float]:
    """Count of NaN and infinities, and the largest magnitude; BF16, F16 or F32."""
    found = kernels.scan(raw, dtype)
    if found is not None:
        return found
    import numpy as np

    from quantmill.elements import absolute_maximum, count_non_finite

    array = np.frombuffer(raw, np.uint8)
    return count_non_finite(array, dtype), absolute_maximum(array, dtype)
