"""Rounding columns one after the other and carrying their errors on, docs/formats.md's way.

The native kernels do the work, NumPy where they are not used, with the same bytes. Matrices are
cut into tiles of 64 rows in which a column lies side by side, so that every operation runs along
rows, which are independent: how many there are, and who computes them, changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quantmill import kernels
from quantmill.elements import E2M1, E4M3
from quantmill.formats import Format

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

LANES = 64
"""Rows of a tile."""

_F32 = np.float32


@dataclass(frozen=True, slots=True)
class Place:
    """Where a group of columns lies, `first` in the order of rounding and `group` in that of codes.

    `places`, uint8 [group], says which place within the group each of its columns has.
    """

    first: int
    group: int
    places: Bytes


@dataclass(frozen=True, slots=True)
class Tiles:
    """Some rows on their way, the last tile filled up with rows of zeros.

    `errors` and `current` are float32 [tiles, columns, 64]: `errors` the weights, and for columns
    that are done what rounding took from them; `current` the weights with what columns before them
    gave. `codes` are the bytes of packed codes [rows, bytes of a row].
    """

    format: Format
    errors: Floats
    current: Floats
    codes: Bytes

    @staticmethod
    def of(rows: Floats, fmt: Format) -> Tiles:
        """Tiles of float32 weights [rows, columns]."""
        count, columns = rows.shape
        tiles = -(-count // LANES)
        padded = np.zeros((tiles * LANES, columns), np.float32)
        padded[:count] = rows
        turned = np.ascontiguousarray(padded.reshape(tiles, LANES, columns).transpose(0, 2, 1))
        codes = np.zeros((tiles * LANES, columns * fmt.bits // 8), np.uint8)
        return Tiles(fmt, turned, turned.copy(), codes)

    def group(self, first: int, rows: int) -> Floats:
        """Current weights of the group that begins at column `first`, [rows, group]."""
        part = self.current[:, first : first + self.format.group_size]
        return np.ascontiguousarray(part.transpose(0, 2, 1)).reshape(-1, part.shape[1])[:rows]

    def round(self, place: Place, scale: Floats, bias: Floats, factors: Floats) -> None:
        """Round the columns of a group, each after it got its share of the errors before it.

        `scale` and `bias` are float32 [rows].
        """
        size, tiles, first = self.format.group_size, len(self.errors), place.first
        scale, bias = _padded(scale, tiles, 1), _padded(bias, tiles, 0)
        arrays = place.places, scale, bias, factors, self.errors, self.current, self.codes
        columns = self.errors.shape[1]
        if kernels.round_columns(self.format, columns, first, place.group, arrays):
            return
        rule = _Rule(self.format, scale, bias)
        found = np.empty((tiles, size, LANES), np.uint8)
        for column, to in enumerate(place.places, first):
            found[:, to], values = rule(self.current[:, column])
            with np.errstate(invalid="ignore", over="ignore"):
                lost = self.errors[:, column] - values
                lost[~np.isfinite(lost)] = 0
                self.errors[:, column] = lost
                later = factors[column, column + 1 : first + size]
                self.current[:, column + 1 : first + size] += lost[:, None] * later[:, None]
        rows = np.ascontiguousarray(found.transpose(0, 2, 1)).reshape(-1, size)
        bits = self.format.bits
        start = place.group * bits // 8
        self.codes[:, start : start + size * bits // 8] = _packed(rows, bits)

    def carry(self, done: tuple[int, int], to: tuple[int, int], factors: Floats) -> None:
        """Add the errors of columns `done` times their factors to the columns `to`, in order."""
        arrays = factors, self.errors, self.current
        if kernels.carry(self.errors.shape[1], done, to, arrays):
            return
        with np.errstate(invalid="ignore", over="ignore"):
            for tile in range(len(self.errors)):
                current = self.current[tile, to[0] : to[1]]
                for column in range(*done):
                    current += factors[column, to[0] : to[1], None] * self.errors[tile, column]


def _padded(numbers: Floats, tiles: int, filling: int) -> Floats:
    found = np.full(tiles * LANES, filling, np.float32)
    found[: len(numbers)] = numbers
    return found.reshape(tiles, LANES)


class _Rule:
    """Codes of a column and what they decode to, with the scales and biases of its group."""

    def __init__(self, fmt: Format, scale: Floats, bias: Floats) -> None:
        self._fmt, self._scale, self._bias = fmt, scale, bias
        with np.errstate(divide="ignore", over="ignore"):
            self._inverse = _F32(1) / scale

    @np.errstate(invalid="ignore", over="ignore")
    def __call__(self, x: Floats) -> tuple[Bytes, Floats]:
        if self._fmt.mode == "affine":
            top = _F32((1 << self._fmt.bits) - 1)
            step = (x - self._bias) * self._inverse
            code = np.rint(np.clip(np.where(np.isnan(step), _F32(0), step), _F32(0), top))
            return code.astype(np.uint8), code * self._scale + self._bias
        size = np.abs(x) * self._inverse
        size = np.where(np.isnan(size) | (self._scale == 0), _F32(0), size)
        # without signs, and E4M3 without its NaN
        grid = E4M3[:127] if self._fmt.bits == 8 else E2M1
        code = _nearest(size, grid)
        negative = np.signbit(x) & (code > 0)
        values = np.where(negative, -grid[code], grid[code]) * self._scale
        return code + negative.astype(np.uint8) * np.uint8(1 << (self._fmt.bits - 1)), values


def _nearest(sizes: Floats, grid: Floats) -> Bytes:
    """Places of the nearest numbers of a grid, the even one on a tie, the last beyond it."""
    middles = (grid[1:] + grid[:-1]) / 2
    code = np.searchsorted(middles, sizes, side="left")
    tie = (code < middles.size) & (sizes == middles[np.minimum(code, middles.size - 1)])
    code += tie & (code % 2 == 1)
    return code.astype(np.uint8)


def _packed(codes: Bytes, bits: int) -> Bytes:
    """Codes [rows, group] as a stream of bits, the lowest first, as MLX packs each row."""
    if bits == 8:
        return codes
    unpacked = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(unpacked.reshape(len(codes), -1), axis=1, bitorder="little")
