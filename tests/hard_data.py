"""Named weights that are hard to quantize alike: ties, extremes, denormals, every maximum.

Every set is an array of BF16, F16 or F32 in rows of 128 elements, finite, the same on every run.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from reference import E2M1, E4M3, NUMPY

Array = npt.NDArray[Any]
Rng = np.random.Generator

DTYPES = tuple(NUMPY)
WIDTH = 128

_BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
_MANTISSA = {"BF16": 7, "F16": 10, "F32": 23}
_LEAST_POWER = {"BF16": -133, "F16": -24, "F32": -149}
_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
_SIGN = {"BF16": 0x8000, "F16": 0x8000, "F32": 0x80000000}


def hard_data(name: str, dtype: str) -> Array:
    """The set of that name: rows of 128 elements of `dtype`."""
    return _hard_data(name, dtype).copy()


@cache
def _hard_data(name: str, dtype: str) -> Array:
    rng = np.random.default_rng(zlib.crc32(f"{name}/{dtype}".encode()))
    flat = _SETS[name](rng, dtype).reshape(-1)
    short = -flat.size % WIDTH
    values: Array = np.concatenate([flat, flat[:short]]).reshape(-1, WIDTH)
    assert np.isfinite(values.astype(np.float32)).all()
    return values


# -- building blocks -------------------------------------------------------------------------------


def _cast(values: Array, dtype: str) -> Array:
    """Values in `dtype`; those too large become the largest finite ones."""
    limit = float(_from_bits(np.array([_INFINITY[dtype] - 1]), dtype)[0])
    return np.clip(values.astype(np.float64), -limit, limit).astype(NUMPY[dtype])


def _from_bits(bits: Array, dtype: str) -> Array:
    return bits.astype(_BITS[dtype]).view(NUMPY[dtype])


def _neighbours(values: Array, dtype: str, reach: int) -> Array:
    """Positive values and the next `reach` values of `dtype` on both sides."""
    bits = _cast(values, dtype).view(_BITS[dtype]).astype(np.int64).reshape(-1, 1)
    around = (bits + np.arange(-reach, reach + 1)).reshape(-1)
    return _from_bits(around[(around >= 0) & (around < _INFINITY[dtype])], dtype)


def _powers(dtype: str) -> Array:
    """Every power of two of `dtype`, denormal ones included."""
    above = 16 if dtype == "F16" else 128
    return np.exp2(np.arange(_LEAST_POWER[dtype], above, dtype=np.float64))


def _with_maxima(rng: Rng, dtype: str, maxima: Array) -> Array:
    """Groups of 32 with these magnitudes as maxima of both halves, at random places and signs."""
    exact = np.abs(maxima).reshape(-1, 1, 1)
    share = rng.uniform(-1, 1, (len(maxima), 2, 16))
    groups = _cast(exact.astype(np.float64) * share, dtype)
    place = rng.integers(16, size=(len(maxima), 2, 1))
    signed = np.where(rng.random(place.shape) < 0.5, exact, -exact).astype(NUMPY[dtype])
    np.put_along_axis(groups, place, signed, axis=2)
    return groups


def _with_companion(values: Array, maximum: float, dtype: str) -> Array:
    """Groups of 16 that begin with `maximum` and hold these values and their negatives."""
    flat = np.stack([values, -values], axis=-1).reshape(-1)
    both = np.concatenate([flat, flat[: -flat.size % 15]]).reshape(-1, 15)
    first = np.full((len(both), 1), maximum).astype(NUMPY[dtype])
    return np.concatenate([first, both.astype(NUMPY[dtype])], axis=1)


# -- the sets --------------------------------------------------------------------------------------


def _normal(rng: Rng, dtype: str) -> Array:
    return _cast(rng.normal(0, 1, (64, WIDTH)), dtype)


def _small_normal(rng: Rng, dtype: str) -> Array:
    return _cast(rng.normal(0, 0.02, (64, WIDTH)), dtype)


def _heavy_tail(rng: Rng, dtype: str) -> Array:
    return _cast(rng.standard_t(1.2, (64, WIDTH)), dtype)


def _all_positive(rng: Rng, dtype: str) -> Array:
    return _cast(rng.uniform(0.5, 3, (32, WIDTH)), dtype)


def _all_negative(rng: Rng, dtype: str) -> Array:
    return -_all_positive(rng, dtype)


def _zero_groups(rng: Rng, dtype: str) -> Array:
    values = rng.normal(0, 1, (32, WIDTH // 16, 16))
    values[rng.random((32, WIDTH // 16)) < 0.5] = 0
    values[::4] = 0
    return _cast(values, dtype)


def _constant(rng: Rng, dtype: str) -> Array:
    levels = np.concatenate([rng.uniform(0.01, 100, 16), np.exp2(np.arange(-14, 15, 2.0))])
    levels = np.concatenate([levels, _powers(dtype)[::5]])
    return _cast(np.repeat(levels, WIDTH), dtype)


def _constant_negative(rng: Rng, dtype: str) -> Array:
    return -_constant(rng, dtype)


def _fp4_ties(rng: Rng, dtype: str) -> Array:
    steps = rng.integers(-24, 25, (64, WIDTH // 16, 16)) / 4.0
    steps[..., 0] = 6 * rng.choice([-1, 1], steps.shape[:-1])
    return _cast(steps * np.exp2(rng.integers(-8, 9, (64, 1, 1)).astype(np.float64)), dtype)


def _affine_ties(rng: Rng, dtype: str) -> Array:
    rows = []
    for bits in (2, 3, 4, 5, 6, 8):
        top = 2**bits - 1
        for low in (-top, -top // 2, 0):
            halves = rng.integers(0, 2 * top + 1, (4, WIDTH // 32, 32)) / 2.0 + low
            halves[..., 0], halves[..., 1] = low, low + top
            rows += [halves, -halves / 64]
    return _cast(np.concatenate(rows), dtype)


def _negative_zeros(rng: Rng, dtype: str) -> Array:
    values = rng.normal(0, 1, (16, WIDTH))
    values[rng.random(values.shape) < 0.6] = -0.0
    values[:4] = -0.0
    values[4:6, ::3] = 0.0
    return _cast(values, dtype)


def _denormals(rng: Rng, dtype: str) -> Array:
    bits = rng.integers(0, 1 << _MANTISSA[dtype], (32, WIDTH))
    bits[:4] >>= _MANTISSA[dtype] - 2
    return _from_bits(bits | rng.choice([0, _SIGN[dtype]], bits.shape), dtype)


def _tiny(rng: Rng, dtype: str) -> Array:
    bits = rng.integers(0, 12 << _MANTISSA[dtype], (64, WIDTH // 32, 32))
    bits >>= rng.integers(0, 5, (64, WIDTH // 32, 1))
    return _from_bits(bits | rng.choice([0, _SIGN[dtype]], bits.shape), dtype)


def _power_maxima(rng: Rng, dtype: str) -> Array:
    return _with_maxima(rng, dtype, _cast(_powers(dtype), dtype))


def _scale_boundaries(rng: Rng, dtype: str) -> Array:
    reach = {"BF16": 2, "F16": 4, "F32": 6}[dtype]
    edges = np.concatenate([6 * _powers(dtype), 448 * _powers(dtype)])
    return _with_maxima(rng, dtype, _neighbours(edges, dtype, reach))


def _half_exponents(rng: Rng, dtype: str) -> Array:
    """Maxima over 6 or 448 around the square roots that round to either exponent."""
    edges = np.concatenate([6 * _powers(dtype), 448 * _powers(dtype)]) * np.sqrt(2)
    return _with_maxima(rng, dtype, _neighbours(edges[::3], dtype, 3))


def _every_maximum(rng: Rng, dtype: str) -> Array:
    """Every finite magnitude as a maximum; for F32 every mantissa byte at every exponent."""
    every = np.arange(_INFINITY[dtype] >> (16 if dtype == "F32" else 0))
    if dtype == "F32":
        every = (every[::2] << 16) + rng.integers(0, 1 << 16, len(every[::2]))
    return _with_maxima(rng, dtype, _from_bits(every, dtype))


def _e4m3_scales(rng: Rng, dtype: str) -> Array:
    """Maxima over 6 around every E4M3 value and every middle of two."""
    values = E4M3[:0x7F].astype(np.float64)
    middles = (values[1:] + values[:-1]) / 2
    edges = np.concatenate([values, middles]) * 6
    return _with_maxima(rng, dtype, _neighbours(edges, dtype, 2))


def _random_bits(rng: Rng, dtype: str) -> Array:
    bits = rng.integers(0, _INFINITY[dtype], (128, WIDTH))
    return _from_bits(bits | rng.choice([0, _SIGN[dtype]], bits.shape), dtype)


def _near_overflow(rng: Rng, dtype: str) -> Array:
    least = _INFINITY[dtype] - (3 << _MANTISSA[dtype])
    bits = rng.integers(least, _INFINITY[dtype], (32, WIDTH))
    bits[::4, ::16] = _INFINITY[dtype] - 1
    signs = rng.choice([0, _SIGN[dtype]], bits.shape)
    signs[8:16], signs[16:24] = 0, _SIGN[dtype]
    return _from_bits(bits | signs, dtype)


def _huge(rng: Rng, dtype: str) -> Array:
    exponents = rng.uniform(8, 60, (64, WIDTH // 16, 1)) + rng.uniform(
        -20, 0, (64, WIDTH // 16, 16)
    )
    return _cast(np.exp2(exponents) * rng.choice([-1, 1], exponents.shape), dtype)


def _one_hot(rng: Rng, dtype: str) -> Array:
    values = np.zeros((2 * WIDTH, WIDTH))
    places = np.arange(2 * WIDTH)
    values[places, places % WIDTH] = rng.normal(0, 3, 2 * WIDTH)
    return _cast(values, dtype)


def _alternating(rng: Rng, dtype: str) -> Array:
    levels = np.concatenate([rng.uniform(0.01, 100, 24), np.exp2(np.arange(-12, 12.0))])
    return _cast(levels[:, None] * np.where(np.arange(WIDTH) % 2, -1, 1), dtype)


def _fp4_thresholds(rng: Rng, dtype: str) -> Array:
    table = np.array(E2M1[:8])
    middles = (table[1:] + table[:-1]) / 2
    around = _neighbours(np.concatenate([middles, table[1:]]), dtype, 3).astype(np.float64)
    scales = np.exp2(np.arange(-6.0, 7.0))
    return np.concatenate([_with_companion(around * s, 6 * s, dtype) for s in scales])


def _e4m3_thresholds(rng: Rng, dtype: str) -> Array:
    values = E4M3[:0x7F].astype(np.float64)
    middles = (values[1:] + values[:-1]) / 2
    around = _neighbours(np.concatenate([middles, values[1:]]), dtype, 2).astype(np.float64)
    around = around[around <= 448]
    return np.concatenate([_with_companion(around * s, 448 * s, dtype) for s in (1.0, 0.125)])


def _affine_thresholds(rng: Rng, dtype: str) -> Array:
    halves = np.arange(0.5, 15)
    around = _neighbours(halves, dtype, 3).astype(np.float64)
    rows = [_with_companion(around * s, 15 * s, dtype) for s in (1.0, 1 / 3, 0.1, -1.0)]
    return np.concatenate(rows)


_SETS: dict[str, Callable[[Rng, str], Array]] = {
    "normal": _normal,
    "small normal": _small_normal,
    "heavy tail": _heavy_tail,
    "all positive": _all_positive,
    "all negative": _all_negative,
    "zero groups": _zero_groups,
    "constant": _constant,
    "constant negative": _constant_negative,
    "fp4 ties": _fp4_ties,
    "affine ties": _affine_ties,
    "negative zeros": _negative_zeros,
    "denormals": _denormals,
    "tiny": _tiny,
    "power maxima": _power_maxima,
    "scale boundaries": _scale_boundaries,
    "half exponents": _half_exponents,
    "every maximum": _every_maximum,
    "e4m3 scales": _e4m3_scales,
    "random bits": _random_bits,
    "near overflow": _near_overflow,
    "huge": _huge,
    "one-hot": _one_hot,
    "alternating": _alternating,
    "fp4 thresholds": _fp4_thresholds,
    "e4m3 thresholds": _e4m3_thresholds,
    "affine thresholds": _affine_thresholds,
}

NAMES = tuple(_SETS)
"""Names of all sets."""
