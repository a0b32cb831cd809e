"""The native kernels: which implementations there are, which one works, and calls on raw bytes.

The extension `quantmill._native` holds several implementations of the same arithmetic, one for each
instruction set; all give the same bytes (docs/architecture.md). The fastest that this processor has
is used. QUANTMILL_KERNELS names another one; `mlx` does without the extension.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from quantmill.errors import BadRequest
from quantmill.formats import DTYPE_BYTES, FLOAT_DTYPES, Format, is_valid
from quantmill.weights import CodedRows, Quantized, too_large

VARIABLE = "QUANTMILL_KERNELS"
"""Environment variable: the name of an implementation."""

MLX = "mlx"
"""The name that means: without the extension, by MLX's own CPU quantizer."""

_NOTHING = memoryview(bytearray())


class NoKernels(UserWarning):
    """The extension cannot be loaded, and MLX does the work: same bytes, many times slower."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """An implementation: what it is, whether this processor has it, whether it is used."""

    name: str
    what: str
    supported: bool
    used: bool


def in_use() -> str:
    """Name of the implementation that works: `mlx` where the extension is absent or unwanted.

    Raises BadRequest for a name in QUANTMILL_KERNELS that does not exist or that this processor
    does not support. An extension that cannot be loaded is warned of once (NoKernels).
    """
    return _chosen(os.environ.get(VARIABLE, ""))


@cache
def _chosen(wanted: str) -> str:
    if wanted == MLX:
        return MLX
    native, problem = _load()
    if native is None:
        if wanted:
            raise BadRequest(f"{VARIABLE} is {wanted}, but {problem}", hint=f"unset {VARIABLE}")
        warnings.warn(
            f"{problem}; MLX's own quantizer does the work, with the same bytes and many times "
            "slower. Reinstall quantmill to build the extension.",
            NoKernels,
            stacklevel=2,
        )
        return MLX
    if not wanted:
        return str(native.best())
    supported = {name: fits for name, _, fits in native.implementations()}
    if wanted not in supported:
        known = ", ".join((MLX, *supported))
        raise BadRequest(f"{VARIABLE} is {wanted!r}", hint=f"choose one of {known}")
    if not supported[wanted]:
        raise BadRequest(
            f"this processor does not support {wanted}", hint=f"unset {VARIABLE}", kind="no_kernels"
        )
    return wanted


def _load() -> tuple[ModuleType | None, str]:
    """The extension, or None and the reason."""
    try:
        from quantmill import _native
    except ImportError as error:
        return None, f"the extension quantmill._native cannot be loaded ({error})"
    return _native, ""


def list_kernels() -> tuple[Kernels, ...]:
    """Every implementation, the plainest first, MLX's last."""
    used = in_use()
    native, problem = _load()
    found = native.implementations() if native else ()
    rows = [Kernels(name, what, fits, name == used) for name, what, fits in found]
    what = f"MLX's own quantizer ({problem})" if problem else "MLX's own quantizer"
    return (*rows, Kernels(MLX, what, True, used == MLX))


def quantize(raw: memoryview, dtype: str, fmt: Format, encode: float = 1.0) -> Quantized | None:
    """Quantize whole groups of BF16, F16 or F32, or None where the extension is not in use.

    `encode` is 2688 over the tensor's largest magnitude where an nvfp4 global scale is wanted.
    Raises BadWeights where finite weights are too large for a finite affine scale.
    """
    with_ = in_use()
    if with_ == MLX:
        return None
    from quantmill import _native

    codes, scales, biases = _room(raw, dtype, dtype, fmt)
    non_finite, overflows = _native.quantize(
        raw, dtype, fmt.mode, fmt.bits, fmt.group_size, encode,
        codes, scales, _NOTHING if biases is None else biases, with_,
    )  # fmt: skip
    if overflows:
        raise too_large()
    return Quantized(codes, scales, biases, non_finite)


def search(
    raw: memoryview, dtype: str, stored: str, fmt: Format, importance: memoryview, first: int
) -> Quantized | None:
    """Search scales and biases of whole groups, or None where the extension is not in use.

    `importance` holds a float32 in raw bytes for each column, `first` is the column that `raw`
    begins at; both are whole groups. Affine scales and biases have dtype `stored`: the weights', or
    any where those are F32. Raises BadWeights as `quantize` does.
    """
    with_ = in_use()
    if with_ == MLX:
        return None
    from quantmill import _native

    codes, scales, biases = _room(raw, dtype, stored, fmt)
    non_finite, overflows = _native.search(
        raw, dtype, stored, fmt.mode, fmt.bits, fmt.group_size, importance, first,
        codes, scales, _NOTHING if biases is None else biases, with_,
    )  # fmt: skip
    if overflows:
        raise too_large()
    return Quantized(codes, scales, biases, non_finite)


def _room(
    raw: memoryview, dtype: str, stored: str, fmt: Format
) -> tuple[memoryview, memoryview, memoryview | None]:
    """Room for codes, scales and biases, the latter of dtype `stored`, of the groups in `raw`."""
    groups = raw.nbytes // DTYPE_BYTES[dtype] // fmt.group_size
    scale_bytes = groups * DTYPE_BYTES[fmt.scale_dtype(stored)]
    codes = memoryview(bytearray(groups * fmt.group_size * fmt.bits // 8))
    biases = memoryview(bytearray(scale_bytes)) if fmt.has_bias else None
    return codes, memoryview(bytearray(scale_bytes)), biases


def dequantize(
    codes: memoryview,
    scales: memoryview,
    biases: memoryview | None,
    dtype: str,
    fmt: Format,
) -> memoryview | None:
    """Values of whole groups as raw bytes, or None where the extension is not in use.

    `dtype` is that of affine scales, biases and values; float formats always give BF16. None also
    for parameters that the kernels have no code for (`is_valid` of quantmill.formats).
    """
    with_ = in_use()
    if with_ == MLX or dtype not in FLOAT_DTYPES:
        return None
    if not is_valid(fmt.mode, fmt.bits, fmt.group_size):
        return None
    from quantmill import _native

    values = memoryview(bytearray(codes.nbytes * 8 // fmt.bits * DTYPE_BYTES[dtype]))
    _native.dequantize(
        codes, scales,
        _NOTHING if biases is None else biases,
        dtype, fmt.mode, fmt.bits, fmt.group_size, values, with_,
    )  # fmt: skip
    return values


def decode(rows: CodedRows, dtype: str) -> memoryview | None:
    """The rows' numbers as raw bytes, or None where the extension is not in use.

    `dtype` is BF16, F16 or F32; NaN comes out quiet and positive.
    """
    with_ = in_use()
    if with_ == MLX:
        return None
    from quantmill import _native

    values = memoryview(bytearray(rows.codes.nbytes * DTYPE_BYTES[dtype]))
    _native.decode(
        rows.codes, rows.scales,
        _NOTHING if rows.zeros is None else rows.zeros,
        _NOTHING if rows.biases is None else rows.biases,
        rows.element, dtype, rows.columns, rows.group, values, with_,
    )  # fmt: skip
    return values


def round_columns(fmt: Format, columns: int, first: int, group: int, arrays: Sequence[Any]) -> bool:
    """Round a group of columns with error feedback; False where the extension is not in use.

    `arrays` are those of `RoundTask` in native/kernels.h, places first, of any shape; errors,
    current weights and codes are changed in place.
    """
    with_ = in_use()
    if with_ == MLX:
        return False
    from quantmill import _native

    flat = (array.reshape(-1) for array in arrays)
    places, scales, biases, factors, errors, current, codes = flat
    _native.round_columns(
        fmt.mode, fmt.bits, fmt.group_size, columns, first, group,
        places, scales, biases, factors, errors, current, codes, with_,
    )  # fmt: skip
    return True


def carry(columns: int, done: tuple[int, int], to: tuple[int, int], arrays: Sequence[Any]) -> bool:
    """Add errors of columns `done` to columns `to`; False where the extension is not in use.

    `arrays` are factors, errors and current weights, which change in place (`CarryTask`).
    """
    with_ = in_use()
    if with_ == MLX:
        return False
    from quantmill import _native

    factors, errors, current = (array.reshape(-1) for array in arrays)
    _native.carry(columns, done[0], done[1], to[0], to[1], factors, errors, current, with_)
    return True


def scan(raw: memoryview, dtype: str) -> tuple[int, float] | None:
    """Count of NaN and infinities, and the largest magnitude, NaN aside; None as above."""
    if in_use() == MLX:
        return None
    from quantmill import _native

    non_finite, largest = _native.scan(raw, dtype)
    return non_finite, largest
