"""The search for scales and biases written from docs/formats.md, to compare with: slow and plain.

Weights are 2-D arrays of a dtype in rows of whole groups; importance is one float32 for each column
of a matrix as wide as `importance`, in which the weights begin at column `first`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

import reference
from reference import E2M1, E4M3, NUMPY, Packed, pack, unpack

Array = npt.NDArray[Any]

_F32, _F64 = np.float32, np.float64


def in_order(terms: Array) -> Array:
    """Sums of rows of float64, every term added to those before it."""
    sums: Array = np.add.accumulate(terms.astype(_F64), axis=1)[:, -1]
    return sums


def weighted_error(w: Array, values: Array, h: Array) -> Array:
    """The error of every group [groups, group size] as the search counts it."""
    off = (w.astype(_F32) - values.astype(_F32)).astype(_F64)
    return in_order((off * off) * h.astype(_F64))


def importance_of_groups(importance: Array, first: int, groups: int, size: int) -> Array:
    """Importance of every weight [groups, group size]; 1 where a group has none."""
    columns = (first + np.arange(groups * size)) % importance.size
    h = importance[columns].reshape(groups, size).copy()
    h[(h == 0).all(axis=1)] = 1
    return h


def _to(dtype: Any, values: Array) -> Array:
    return values.astype(dtype).astype(_F32)


@np.errstate(all="ignore")
def search(
    x: Array, mode: str, bits: int, group: int, importance: Array, first: int = 0,
    stored: str | None = None,
) -> Packed:  # fmt: skip
    """Any format. `stored` is the dtype of affine scales for float32 weights."""
    own = reference.quantize(x.reshape(-1, max(group, 32)), mode, bits, group)
    w = x.reshape(-1, group)
    h = importance_of_groups(importance, first, len(w), group)
    codes = unpack(own.words, bits).reshape(-1, group)
    dtype = x.dtype if stored is None else NUMPY[stored]
    if mode == "affine":
        assert own.biases is not None
        found = _Lines(w.astype(_F32), h, bits, dtype).best(
            codes, _to(dtype, own.scales.reshape(-1)), _to(dtype, own.biases.reshape(-1))
        )
        codes, scales, biases = found
        return Packed(pack(codes, bits), scales.astype(dtype), biases.astype(dtype))
    scales = own.scales.reshape(-1)
    if mode != "mxfp8":
        codes, scales = _bytes(w.astype(_F32), h, mode, codes, scales)
    joined = codes.reshape(-1, max(group, 32))
    return Packed(pack(joined, bits), scales, None)


class _Lines:
    """All groups of an affine format at once."""

    def __init__(self, w: Array, h: Array, bits: int, dtype: Any) -> None:
        self.w, self.h, self.dtype = w, h.astype(_F64), dtype
        self.n = _F32(2**bits - 1)

    def best(self, codes: Array, scales: Array, biases: Array) -> tuple[Array, Array, Array]:
        w = self.w
        self.codes, self.scales, self.biases = codes.copy(), scales.copy(), biases.copy()
        self.error = weighted_error(w, self.values(codes.astype(_F32), scales, biases), self.h)
        mn, mx = w.min(axis=1), w.max(axis=1)
        self.searched = (mx > mn) & np.isfinite(w).all(axis=1)
        self.searched &= np.isfinite(scales) & np.isfinite(biases)
        self.follow(scales, biases)
        for i in range(3):
            for j in range(3):
                kept = np.array([1, 0.95, 0.9, 0.85, 0.8], _F32)[i + j]
                cut = np.array([0, 0.05, 0.1], _F32)[i]
                self.follow(kept * (mx - mn) / self.n, mn + cut * (mx - mn))
        return self.codes, self.scales, self.biases

    def values(self, q: Array, s: Array, b: Array) -> Array:
        return q * s[:, None] + b[:, None]

    def follow(self, s: Array, b: Array) -> None:
        """A line, and the two fitted after it."""
        alive = self.searched
        for _ in range(3):
            s, b = _to(self.dtype, s), _to(self.dtype, b)
            r = _F32(1) / s
            last = _to(self.dtype, self.n * s + b)
            alive = alive & np.isfinite(s) & np.isfinite(b) & np.isfinite(r) & (s != 0)
            alive &= np.isfinite(last)
            step = np.clip((self.w - b[:, None]) * r[:, None], _F32(0), self.n)
            q = np.rint(np.where(alive[:, None], step, _F32(0)))
            self.offer(q, s, b, alive)
            s, b, positive = self.fitted(q)
            alive = alive & positive

    def offer(self, q: Array, s: Array, b: Array, alive: Array) -> None:
        error = weighted_error(self.w, self.values(q, s, b), self.h)
        better = alive & (error < self.error)
        self.error[better] = error[better]
        self.scales[better], self.biases[better] = s[better], b[better]
        self.codes[better] = q[better].astype(np.uint8)

    def fitted(self, q: Array) -> tuple[Array, Array, Array]:
        w, h, q = self.w.astype(_F64), self.h, q.astype(_F64)
        big_h, big_x, big_q = in_order(h), in_order(h * w), in_order(h * q)
        big_p, big_y = in_order((h * q) * q), in_order((h * q) * w)
        d = big_h * big_p - big_q * big_q
        s = (big_h * big_y - big_q * big_x) / d
        b = (big_p * big_x - big_q * big_y) / d
        return s.astype(_F32), b.astype(_F32), d > 0


def _bytes(w: Array, h: Array, mode: str, codes: Array, scales: Array) -> tuple[Array, Array]:
    """nvfp4 and mxfp4: the bytes around MLX's own."""
    values_of = E4M3 if mode == "nvfp4" else np.ldexp(_F32(1), np.arange(256) - 127)
    table = np.array(E2M1, _F32)
    error = weighted_error(w, table[codes] * values_of[scales][:, None], h)
    own, codes, scales = scales.astype(int), codes.copy(), scales.copy()
    finite = np.isfinite(w).all(axis=1)
    for step in range(-3, 8) if mode == "nvfp4" else [-1]:
        byte = own + step
        least, largest = (1, 126) if mode == "nvfp4" else (0, 255)
        alive = finite & (byte >= least) & (byte <= largest) & (step != 0)
        scale = values_of[np.where(alive, byte, 1)]
        y = np.minimum(np.abs(w) * (_F32(1) / scale)[:, None], _F32(6))
        tried = _nearest_even(y)
        tried = np.where(np.signbit(w) & (tried > 0), tried + 8, tried).astype(np.uint8)
        found = weighted_error(w, table[tried] * scale[:, None], h)
        better = alive & (found < error)
        error[better], codes[better] = found[better], tried[better]
        scales[better] = byte[better]
    return codes, scales


def _nearest_even(y: Array) -> Array:
    """Codes 0 to 7 of the nearest E2M1 magnitude, the even one of two that are as near."""
    values = np.array(E2M1[:8], _F64)
    middles = (values[1:] + values[:-1]) / 2
    code = np.searchsorted(middles, y.astype(_F64), side="left")  # the lower one on a tie
    tie = np.isin(y.astype(_F64), middles)
    return np.where(tie & (code % 2 == 1), code + 1, code)
