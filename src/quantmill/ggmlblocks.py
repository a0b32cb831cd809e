"""GGUF's blocks taken apart into codes, scales and biases as MLX has them, in NumPy.

A function for each row of ggufcodes.py. Where ggml subtracts a zero point z, a power of two, from
the code, the bias is -z * scale. Within a block ggml has the first half of some numbers in the
lower half bytes and the second half in the upper ones; MLX alternates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from quantmill.errors import BadWeights

Bytes = npt.NDArray[np.uint8]
Scales = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Split:
    """Blocks taken apart: unsigned codes, scales and biases, each in a row for each block.

    Scales are F16 or F32, or the bytes of a format of small floats, which has no biases.
    """

    codes: Bytes
    scales: Scales
    biases: Scales | None


def split(kind: str, raw: Bytes) -> Split:
    """Blocks of this type, one in each row.

    Raises BadWeights where a scale or bias is not finite, as F16 has them: the format would give
    other numbers than the block does.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        found = _SPLITS[kind](raw)
    if found.biases is None:
        finite = (found.scales < _FIRST_NO_SCALE[kind]).all()
    else:
        finite = np.isfinite(found.scales).all() and np.isfinite(found.biases).all()
    if not finite:
        raise BadWeights(
            f"a block of type {kind} has a scale that is no finite number, or too large a one",
            hint="--requantize bf16 decodes the file's weights",
        )
    return found


# Bytes from here on are not the powers of two or numbers that ggml takes them for.
_FIRST_NO_SCALE = {"MXFP4": 255, "NVFP4": 127}


def _q4_0(raw: Bytes) -> Split:
    scale, codes = _fields(raw, 2)
    return _signed(_halves(codes, 16), scale, 8)


def _q4_1(raw: Bytes) -> Split:
    scale, minimum, codes = _fields(raw, 2, 2)
    return Split(_halves(codes, 16), scale.view("<f2"), minimum.view("<f2"))


def _q5_0(raw: Bytes) -> Split:
    scale, high, codes = _fields(raw, 2, 4)
    return _signed(_halves(codes, 16) | _fifth_bits(high), scale, 16)


def _q5_1(raw: Bytes) -> Split:
    scale, minimum, high, codes = _fields(raw, 2, 2, 4)
    codes = _halves(codes, 16) | _fifth_bits(high)
    return Split(codes, scale.view("<f2"), minimum.view("<f2"))


def _q8_0(raw: Bytes) -> Split:
    scale, codes = _fields(raw, 2)
    return _signed(codes ^ np.uint8(128), scale, 128)


def _q4_k(raw: Bytes) -> Split:
    scale, minimum, factors, codes = _fields(raw, 2, 2, 12)
    return Split(_halves(codes, 32), *_products(scale, minimum, factors))


def _q5_k(raw: Bytes) -> Split:
    scale, minimum, factors, high, codes = _fields(raw, 2, 2, 12, 32)
    bits = (high[:, None, :] >> np.arange(8, dtype=np.uint8)[:, None]) & np.uint8(1)
    codes = _halves(codes, 32) | (bits << np.uint8(4)).reshape(len(raw), -1)
    return Split(codes, *_products(scale, minimum, factors))


def _tq1_0(raw: Bytes) -> Split:
    """Five ternary digits to a byte, the largest first, as a fraction of 256."""
    parts = _fields(raw, 32, 16, 4)
    digits = []
    for part, count in zip(parts, (5, 5, 4), strict=False):
        powers = np.array([3**n for n in range(count)], np.uint8)
        digits.append((part[:, None, :] * powers[:, None]).reshape(len(raw), -1))
    codes = (np.concatenate(digits, axis=1).astype(np.uint16) * np.uint16(3)) >> np.uint16(8)
    return _signed(codes.astype(np.uint8), parts[3], 1)


def _tq2_0(raw: Bytes) -> Split:
    codes, scale = _fields(raw, 64)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    codes = (codes.reshape(len(raw), 2, 1, 32) >> shifts) & np.uint8(3)
    return _signed(codes.reshape(len(raw), -1), scale, 1)


def _mxfp4(raw: Bytes) -> Split:
    scale, codes = _fields(raw, 1)
    return Split(_halves(codes, 16), scale, None)


def _nvfp4(raw: Bytes) -> Split:
    scale, codes = _fields(raw, 4)
    return Split(_halves(codes, 8), scale, None)


_SPLITS: Mapping[str, Callable[[Bytes], Split]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "TQ1_0": _tq1_0, "TQ2_0": _tq2_0,
    "MXFP4": _mxfp4, "NVFP4": _nvfp4,
}  # fmt: skip


# -- parts of a block ------------------------------------------------------------------------------


def _fields(raw: Bytes, *widths: int) -> list[Bytes]:
    """The columns of these widths and, last, the rest."""
    return [np.ascontiguousarray(part) for part in np.split(raw, np.cumsum(widths), axis=1)]


def _halves(packed: Bytes, run: int) -> Bytes:
    """Codes of runs of bytes: those in the lower halves of a run, then those in the upper ones."""
    runs = packed.reshape(len(packed), -1, 1, run)
    both = np.concatenate([runs & np.uint8(15), runs >> np.uint8(4)], axis=2)
    return both.reshape(len(packed), -1)


def _fifth_bits(high: Bytes) -> Bytes:
    return np.unpackbits(high, axis=1, bitorder="little") << np.uint8(4)


def _signed(codes: Bytes, scale: Bytes, zero: int) -> Split:
    scales = scale.view("<f2")
    return Split(codes, scales, scales * np.float16(-zero))


def _products(scale: Bytes, minimum: Bytes, factors: Bytes) -> tuple[Scales, Scales]:
    """Scales and biases of the eight groups of a block of K-types.

    Twelve bytes hold eight factors of the scale and eight of the minimum, of six bits each: whole
    ones with the upper bits of others above them, and the lower bits of those.
    """
    first, second, low = (factors[:, at : at + 4] for at in (0, 4, 8))
    of_scale = np.concatenate(
        [first & np.uint8(63), (low & np.uint8(15)) | (first >> np.uint8(6)) << np.uint8(4)], axis=1
    )
    of_minimum = np.concatenate(
        [second & np.uint8(63), (low >> np.uint8(4)) | (second >> np.uint8(6)) << np.uint8(4)],
        axis=1,
    )
    scales = scale.view("<f2").astype(np.float32) * of_scale
    return scales, minimum.view("<f2").astype(np.float32) * -of_minimum.astype(np.float32)
