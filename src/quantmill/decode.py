"""A quantized weight as numbers, by the native kernels, from arrays over mapped files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from quantmill import kernels
from quantmill.elements import FLOATS, RAW, from_float32, to_float32
from quantmill.formats import Format

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight as stored: codes in 32-bit words, scales, biases, and a global scale.

    BF16 comes as the integers of its bits. `dtypes` are the tags of scales and, where there are
    any, of biases. The global scale multiplies what the codes decode to, or, with `reciprocal`,
    divides it.
    """

    codes: Array
    scales: Array
    biases: Array | None
    global_scale: Array | None
    reciprocal: bool
    dtypes: Sequence[str]

    def at(self, index: int | slice) -> Packed:
        """One element, or some, of the first axis. Raises IndexError."""
        scale = self.global_scale
        if scale is not None and scale.size > 1:
            scale = scale[index]
        return replace(
            self,
            codes=self.codes[index],
            scales=self.scales[index],
            biases=None if self.biases is None else self.biases[index],
            global_scale=scale,
        )


@dataclass(frozen=True, slots=True)
class Decoded:
    """Numbers of `dtype`; those of BF16 as the integers of their bits."""

    array: Array
    dtype: str


def decode(packed: Packed, fmt: Format) -> Decoded | None:
    """The numbers, or None where the kernels are not in use or have no code for the parameters."""
    dtype = packed.dtypes[0] if fmt.has_bias else "BF16"
    if fmt.has_bias and (packed.biases is None or len(set(packed.dtypes)) > 1):
        return None
    biases = None if packed.biases is None else _raw(packed.biases)
    raw = kernels.dequantize(_raw(packed.codes), _raw(packed.scales), biases, dtype, fmt)
    if raw is None:
        return None
    *leading, words = packed.codes.shape
    shape = (*leading, fmt.columns(words))
    found = np.frombuffer(raw, np.uint8)
    if packed.global_scale is not None:
        scale = packed.global_scale.astype(np.float32)
        if packed.reciprocal:
            scale = np.float32(1) / scale
        # one for all, or one for each row, or for each expert of a stack
        ones = [1] * (len(shape) - scale.ndim)
        factors = scale.reshape((*scale.shape, *ones)) if scale.size > 1 else scale.reshape(())
        found = from_float32(to_float32(found, dtype).reshape(shape) * factors, dtype).reshape(-1)
    kind = RAW[dtype] if dtype == "BF16" else FLOATS[dtype]
    return Decoded(found.view(kind).reshape(shape), dtype)


def decode_float32(packed: Packed, fmt: Format) -> npt.NDArray[np.float32] | None:
    """The same numbers as float32, exactly; None where `decode` gives None."""
    found = decode(packed, fmt)
    if found is None:
        return None
    raw = np.ascontiguousarray(found.array).reshape(-1).view(np.uint8)
    return to_float32(raw, found.dtype).reshape(found.array.shape)


def _raw(array: Array) -> memoryview:
    """Its bytes; copied only where it is a part that is not contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
