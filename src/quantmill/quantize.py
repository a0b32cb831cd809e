"""The arithmetic seam: raw weights in; packed codes, scales and biases out.

Everything is exact with `mlx.core.quantize` on MLX's CPU backend (docs/formats.md), with one
addition: a group of an mx format so small that MLX's scale byte would wrap around gets the
smallest scale instead. Groups are independent, so a tensor may be given in pieces of any number of
groups and the concatenated results are the same. kernels.py does the work; mlxquantize.py where it
cannot, and gpuround.py follows another rounding.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from quantmill import kernels
from quantmill.formats import Format
from quantmill.weights import (
    MAX_SCALE,
    Bytes,
    Quantized,
    absolute_maximum,
    check_rounding,
    count_groups,
    count_non_finite,
)


class Arithmetic(Protocol):
    """One way to quantize: this module's, gpuround's, or MLX's on a GPU."""

    def __call__(
        self, raw: Bytes, dtype: str, fmt: Format, *, rounding: str, maximum: float | None
    ) -> Quantized:
        """See `quantize`."""


def quantize(
    raw: Bytes, dtype: str, fmt: Format, *, rounding: str = "ceil", maximum: float | None = None
) -> Quantized:
    """Quantize consecutive groups of weights, by the native kernels or, without them, by MLX.

    `raw` holds little-endian elements of `dtype` (BF16, F16 or F32), a whole number of groups.
    `maximum` is the absolute maximum of the whole tensor where an nvfp4 global scale is wanted.
    Scales and biases of affine formats have the weights' dtype; float formats have byte scales.
    Raises BadRequest for other dtypes or a partial group, BadWeights where finite weights are too
    large for a finite affine scale.
    """
    if not count_groups(raw, dtype, fmt):
        return Quantized(raw, raw, raw if fmt.has_bias else None)
    is_mx = fmt.mode in {"mxfp4", "mxfp8"}
    if is_mx:
        check_rounding(rounding)
    with np.errstate(over="ignore"):  # a tiny maximum: infinity, as in MLX
        encode = 1.0 if maximum is None else float(np.float32(MAX_SCALE) / np.float32(maximum))
    # rounding to nearest is MLX's logarithm, which the kernels have no copy of
    found = None if is_mx and rounding == "nearest" else kernels.quantize(raw, dtype, fmt, encode)
    if found is not None:
        return found
    from quantmill.mlxquantize import quantize_on_cpu

    return quantize_on_cpu(raw, dtype, fmt, rounding=rounding, maximum=maximum)


def scan(raw: Bytes, dtype: str) -> tuple[int, float]:
    """Count of NaN and infinities, and the largest magnitude; BF16, F16 or F32."""
    found = kernels.scan(raw, dtype)
    return found or (count_non_finite(raw, dtype), absolute_maximum(raw, dtype))
