"""The rounding profile `gpu`: byte for byte the description's, clause by clause.

No GPU had a part in these tests: they compare with the description of MLX's kernels only.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import settings

import reference
import reference_gpu
from arithmetic import (
    Array,
    Parts,
    affine_formats,
    all_dtypes,
    all_formats,
    any_pieces,
    as_bytes,
    differing,
    differing_pieces,
    mx_formats,
    parts_of,
    raw,
)
from hard_data import NAMES, hard_data
from quantmill.elements import absolute_maximum
from quantmill.errors import BadRequest, BadWeights
from quantmill.formats import (
    MXFP4,
    MXFP8,
    NVFP4,
    Format,
)
from quantmill.gpuround import quantize_as_gpu
from quantmill.quantize import quantize
from reference import NUMPY, Packed

INT2_32, INT4_32 = Format("affine", 2, 32), Format("affine", 4, 32)
F32 = np.float32

roundings = pytest.mark.parametrize("rounding", ["ceil", "nearest"])


def by_gpu(x: Array, dtype: str, fmt: Format, **options: Any) -> Parts:
    return parts_of(quantize_as_gpu(raw(x).data, dtype, fmt, **options))


def by_cpu(x: Array, dtype: str, fmt: Format, **options: Any) -> Parts:
    return parts_of(quantize(raw(x).data, dtype, fmt, **options))


def by_reference(x: Array, fmt: Format, **options: Any) -> Packed:
    return reference_gpu.quantize(x, fmt.mode, fmt.bits, fmt.group_size, **options)


def codes_of(found: Parts, fmt: Format) -> Array:
    """Codes in rows of one group."""
    words = found.weight.view("<u4").reshape(1, -1)
    return reference.unpack(words, fmt.bits).reshape(-1, fmt.group_size)


def numbers(part: Array | None, dtype: str) -> list[float]:
    """Stored scales or biases as numbers."""
    assert part is not None
    return [float(value) for value in part.view(NUMPY[dtype]).astype(np.float64)]


def filled(values: list[float], size: int, dtype: str = "F32") -> Array:
    """One group that begins with these values and holds zeros otherwise."""
    return np.array(values + [0.0] * (size - len(values))).astype(NUMPY[dtype])


def in_words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@np.errstate(over="ignore")
def overflowing(groups: Array) -> Array:
    """Which groups have a range, zero included, that float32 cannot hold."""
    values = groups.astype(F32)
    infinite: Array = np.isinf(np.maximum(values.max(axis=1), 0) - values.min(axis=1))
    return infinite


def some_groups(name: str, dtype: str, fmt: Format, most: int) -> Array:
    """At most so many groups of hard data, from all over the set; affine ones within range."""
    groups = hard_data(name, dtype).reshape(-1, fmt.group_size)
    if fmt.mode == "affine":
        groups = groups[~overflowing(groups)]
    step = -(-len(groups) // most)
    return groups[::step]


# -- against the reference -------------------------------------------------------------------------


@all_dtypes
@affine_formats
def test_affine_equals_reference(dtype: str, fmt: Format) -> None:
    """Every hard data set gets the described codes, scales and biases."""
    different = {}
    for name in NAMES:
        groups = some_groups(name, dtype, fmt, 120)
        different[name] = differing(by_gpu(groups, dtype, fmt), by_reference(groups, fmt))
    assert {name: parts for name, parts in different.items() if parts} == {}


@all_dtypes
@mx_formats
@roundings
def test_mx_equals_reference(dtype: str, fmt: Format, rounding: str) -> None:
    """Every hard data set gets the described bytes, whichever way exponents are rounded."""
    different = {}
    for name in NAMES:
        groups = some_groups(name, dtype, fmt, 2000)
        found = by_gpu(groups, dtype, fmt, rounding=rounding)
        different[name] = differing(found, by_reference(groups, fmt, rounding=rounding))
    assert {name: parts for name, parts in different.items() if parts} == {}


@all_dtypes
@pytest.mark.parametrize("maximum", [None, "own", 4.0, 1e-3, 6e4])
def test_nvfp4_equals_reference(dtype: str, maximum: float | str | None) -> None:
    """Every hard data set gets the described bytes, with any global scale and with none."""
    different = {}
    for name in NAMES:
        groups = some_groups(name, dtype, NVFP4, 2000)
        scale = absolute_maximum(raw(groups), dtype) if isinstance(maximum, str) else maximum
        found = by_gpu(groups, dtype, NVFP4, maximum=scale)
        different[name] = differing(found, by_reference(groups, NVFP4, maximum=scale))
    assert {name: parts for name, parts in different.items() if parts} == {}


# -- affine, clause by clause ----------------------------------------------------------------------


@all_dtypes
def test_negative_group_reaches_up_to_zero(dtype: str) -> None:
    """The range of an all-negative group ends at 0, where the CPU's ends at its maximum."""
    x = np.repeat([-4.0, -3.0], 16).astype(NUMPY[dtype])
    found = by_gpu(x, dtype, INT4_32)
    assert codes_of(found, INT4_32).tolist() == [[0] * 16 + [4] * 16]
    assert numbers(found.scales, dtype) == [float(NUMPY[dtype](F32(4) / F32(15)))]
    assert numbers(found.biases, dtype) == [-4.0]
    on_cpu = by_cpu(x, dtype, INT4_32)
    assert codes_of(on_cpu, INT4_32).tolist() == [[0] * 16 + [15] * 16]


def test_positive_group_does_not_reach_down_to_zero() -> None:
    """The range of an all-positive group begins at its minimum, as on the CPU."""
    x = np.repeat([4.0, 3.0], 16).astype(F32)
    found = by_gpu(x, "F32", INT4_32)
    assert codes_of(found, INT4_32).tolist() == [[0] * 16 + [15] * 16]
    assert differing(found, by_cpu(x, "F32", INT4_32)) == []


def test_constant_negative_group() -> None:
    """A constant negative group gets the first code and its value as bias."""
    found = by_gpu(np.full(32, -3.0, F32), "F32", INT4_32)
    assert codes_of(found, INT4_32).tolist() == [[0] * 32]
    assert numbers(found.scales, "F32") == [float(F32(3) / F32(15))]
    assert numbers(found.biases, "F32") == [-3.0]


@affine_formats
def test_huge_constant_group(fmt: Format) -> None:
    """A positive constant too large for any step gets scale -0, itself as bias, the last code."""
    # Nothing depends on the code, as each decodes to the bias; the CPU gives the first.
    x = np.full(fmt.group_size, 2.0**110, F32)
    found, on_cpu = by_gpu(x, "F32", fmt), by_cpu(x, "F32", fmt)
    assert (codes_of(found, fmt) == 2**fmt.bits - 1).all()
    assert (codes_of(on_cpu, fmt) == 0).all()
    assert found.scales.view("<u4").tolist() == [0x80000000]
    assert numbers(found.biases, "F32") == [2.0**110]
    assert [as_bytes(found.scales), as_bytes(found.biases)] == [
        as_bytes(on_cpu.scales),
        as_bytes(on_cpu.biases),
    ]
    below = by_gpu(-x, "F32", fmt)  # whose range reaches up to 0
    assert (codes_of(below, fmt) == 0).all()
    assert numbers(below.scales, "F32") != [0.0]


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_affine_zero_group(zero: float) -> None:
    """A group of zeros gets the smallest scale, negative, no bias and codes 0."""
    found = by_gpu(np.full(32, zero, F32), "F32", INT4_32)
    assert found.weight.view("<u4").tolist() == [0] * 4
    assert found.scales.view("<u4").tolist() == in_words("b3d6bf95")
    assert found.biases is not None
    assert found.biases.view("<u4").tolist() == [0]


@pytest.mark.parametrize(
    ("value", "gpu", "cpu"),
    [(0.5, 15, 14), (1.5, 14, 14), (2.5, 13, 12), (13.5, 2, 2), (14.5, 1, 0), (12.5, 3, 2)],
)
def test_code_ties_go_away_from_zero(value: float, gpu: int, cpu: int) -> None:
    """A weight midway between two codes gets the larger one, not the even one."""
    x = filled([15.0, value], 32)
    assert codes_of(by_gpu(x, "F32", INT4_32), INT4_32)[0, 1] == gpu
    assert codes_of(by_cpu(x, "F32", INT4_32), INT4_32)[0, 1] == cpu


def test_code_below_tie() -> None:
    """A quotient just below a half rounds down, although adding a half in F32 would reach 1."""
    below = np.nextafter(F32(0.5), F32(0))
    x = filled([-15.0, -15.0 + 1.0], 32)
    x[2:] = F32(-15)
    x[3] = F32(0)
    found = by_gpu(x, "F32", INT4_32)
    assert codes_of(found, INT4_32)[0, :4].tolist() == [0, 1, 0, 15]
    tiny = np.array([-1e-7] + [0.0] * 31, F32) * below  # a quotient of -below: no step, no bias
    found = by_gpu(tiny, "F32", INT4_32)
    assert found.weight.view("<u4").tolist() == [0] * 4
    assert numbers(found.biases, "F32") == [0.0]


@pytest.mark.parametrize(
    ("low", "high", "gpu", "cpu"),
    [(-6.5, 8.5, 8.5 / -9, 8.5 / -8), (-8.5, 6.5, -8.5 / -9, -8.5 / -8), (-7, 8, -1.0, -1.0)],
)
def test_edge_ties_go_away_from_zero(low: float, high: float, gpu: float, cpu: float) -> None:
    """An edge midway between two steps counts the more steps, and the scale shrinks to match."""
    x = filled([low, high], 32)
    assert numbers(by_gpu(x, "F32", INT4_32).scales, "F32") == [float(F32(gpu))]
    assert numbers(by_cpu(x, "F32", INT4_32).scales, "F32") == [float(F32(cpu))]


def test_half_a_step_is_a_step() -> None:
    """An edge of half a step, which the CPU takes for zero, becomes the scale and the bias."""
    half = F32(1e-7) / 2
    found = by_gpu(filled([float(half)], 32), "F32", INT4_32)
    assert numbers(found.scales, "F32") == [-float(half)]
    assert numbers(found.biases, "F32") == [float(half)]
    assert codes_of(found, INT4_32).tolist() == [[0] + [1] * 31]
    on_cpu = by_cpu(filled([float(half)], 32), "F32", INT4_32)
    assert numbers(on_cpu.biases, "F32") == [0.0]


def test_codes_have_an_upper_limit() -> None:
    """A weight past the last code, as a shrunken scale makes one, gets the last code."""
    found = by_gpu(filled([-6.5, 8.5], 32), "F32", INT4_32)
    assert (-6.5 - 8.5) / numbers(found.scales, "F32")[0] > 15.5
    assert codes_of(found, INT4_32)[0, 0] == 15


@pytest.mark.parametrize("fmt", [INT2_32, INT4_32, Format("affine", 3, 64)], ids=str)
def test_lower_limit_is_never_needed(fmt: Format) -> None:
    """No finite weight rounds to a code below 0, so none of its bits reach its neighbours."""
    rng = np.random.default_rng(11)
    magnitudes = np.exp2(rng.uniform(-40, 3, (4000, fmt.group_size)))
    x = (magnitudes * rng.choice([-1, 1], magnitudes.shape)).astype(F32)
    x[::3] = -np.abs(x[::3])
    x[1::3] *= F32(1e-7)
    found = by_gpu(x, "F32", fmt)
    scales, biases = found.scales.view(F32), found.biases
    assert biases is not None
    quotients = (x - biases.view(F32)[:, None]) / scales[:, None]
    assert quotients.min() > -0.5
    assert codes_of(found, fmt).max() == 2**fmt.bits - 1


@affine_formats
def test_packing(fmt: Format) -> None:
    """Codes are a stream of bits, the first code lowest, for every width and group size."""
    top = 2**fmt.bits - 1
    rng = np.random.default_rng(3)
    steps = rng.integers(0, top + 1, (8, fmt.group_size))
    steps[:, 0], steps[:, -1] = 0, top
    found = by_gpu((steps - top).astype(F32), "F32", fmt)
    assert codes_of(found, fmt).tolist() == steps.tolist()
    stream = sum(int(code) << (fmt.bits * k) for k, code in enumerate(steps.reshape(-1)))
    assert int.from_bytes(found.weight.tobytes(), "little") == stream


# -- float formats, row by row ---------------------------------------------------------------------

TIES = [0, 0.25, 0.5, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6]
TIES += [-0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, -6, -0.1, 0.1]
TIES += [0.0] * 12
TIED_WORDS = "64422100 eccaa876 000008fe 0"
RAMP = [(i - 16) / 4 for i in range(32)]
RAMP_MXFP8 = "f5f6f7f8 f1f2f3f4 eaeceef0 d8e0e4e8 64605800 6e6c6a68 73727170 77767574"

# values, format, options; words and scales by hand from the thresholds and the table
GOLDEN: dict[str, tuple[list[float], Format, dict[str, Any], str, str]] = {
    "ties mxfp4": (TIES, MXFP4, {}, TIED_WORDS, "7f"),
    "ties mxfp4 nearest": (TIES, MXFP4, {"rounding": "nearest"}, TIED_WORDS, "7f"),
    "ties nvfp4": (TIES, NVFP4, {}, TIED_WORDS, "38 38"),
    "ramp mxfp4": (RAMP, MXFP4, {}, "ccdddeee 89aaabcc 43222100 66555444", "7f"),
    "ramp mxfp8": (RAMP, MXFP8, {}, RAMP_MXFP8, "79"),
    "zeros mxfp4": ([0.0] * 32, MXFP4, {}, "0 0 0 0", "0"),
    "zeros mxfp8": ([0.0] * 32, MXFP8, {}, "0 0 0 0 0 0 0 0", "0"),
    "zeros mxfp8 nearest": ([0.0] * 32, MXFP8, {"rounding": "nearest"}, "0 0 0 0 0 0 0 0", "0"),
    "zeros nvfp4": ([0.0] * 32, NVFP4, {}, "0 0 0 0", "0 0"),
    "negative zeros mxfp4": ([-0.0] * 32, MXFP4, {}, "88888888 " * 4, "0"),
    "negative zeros mxfp8": ([-0.0] * 32, MXFP8, {}, "80808080 " * 8, "0"),
    "negative zeros nvfp4": ([-0.0] * 32, NVFP4, {}, "88888888 " * 4, "0 0"),
}


@pytest.mark.parametrize("case", GOLDEN)
@all_dtypes
def test_golden(case: str, dtype: str) -> None:
    """Values that a table can be applied to by hand get those bytes, in any dtype."""
    values, fmt, options, words, scales = GOLDEN[case]
    found = by_gpu(np.array(values).astype(NUMPY[dtype]), dtype, fmt, **options)
    assert found.weight.view("<u4").tolist() == in_words(words)
    assert found.scales.tolist() == in_words(scales)
    assert found.biases is None


def fp4_cases() -> list[tuple[float, int]]:
    at_and_around = {
        0.25: (0, 0, 1), 0.75: (1, 2, 2), 1.25: (2, 2, 3), 1.75: (3, 4, 4), 2.5: (4, 4, 5),
        3.5: (5, 6, 6), 5.0: (6, 6, 7),
    }  # fmt: skip
    cases = [(0.0, 0), (1e-30, 0), (0.5, 1), (1.0, 2), (1.5, 3), (2.0, 4), (3.0, 5), (6.0, 7)]
    for threshold, codes in at_and_around.items():
        value = F32(threshold)
        around = (np.nextafter(value, F32(0)), value, np.nextafter(value, F32(9)))
        cases += [(float(v), code) for v, code in zip(around, codes, strict=True)]
    return cases


@pytest.mark.parametrize(("value", "code"), fp4_cases())
@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=str)
def test_fp4_thresholds(value: float, code: int, fmt: Format) -> None:
    """At a middle of two values the even code is taken, on either side the nearer; both signs."""
    found = by_gpu(np.tile(filled([6.0, value, -value], 16), 2), "F32", fmt)
    assert codes_of(found, fmt)[0, 1:3].tolist() == [code, code + 8]


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=str)
def test_negative_underflow_is_minus_zero(fmt: Format) -> None:
    """A negative weight that rounds to zero keeps its sign: code 8, which the CPU never gives."""
    x = np.tile(filled([6.0, -0.1, -0.0, 0.0], 16), 2)
    assert codes_of(by_gpu(x, "F32", fmt), fmt)[0, 1:4].tolist() == [8, 8, 0]
    assert codes_of(by_cpu(x, "F32", fmt), fmt)[0, 1:4].tolist() == [0, 0, 0]


def test_fp4_above_five_is_six() -> None:
    """Quotients above 5, up to infinite ones, become 6 with their sign."""
    x = filled([3e38, -3e38, 3e4, -5.1 * 448, 4.9 * 448], 16)
    found = by_gpu(x, "F32", NVFP4)
    assert found.scales.tolist() == [0x7E]  # 448, the largest there is
    assert codes_of(found, NVFP4)[0, :5].tolist() == [7, 15, 7, 15, 6]
    found = by_gpu(filled([3e38, -3e38, 1e4], 16), "F32", NVFP4, maximum=1e-3)
    assert codes_of(found, NVFP4)[0, :3].tolist() == [7, 15, 7]
    on_cpu = by_cpu(filled([3e38, -3e38, 1e4], 16), "F32", NVFP4, maximum=1e-3)
    assert codes_of(on_cpu, NVFP4)[0, :3].tolist() != [7, 15, 7]


@pytest.mark.parametrize("nan", [np.nan, -np.nan])
@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=str)
def test_fp4_nan_is_seven(nan: float, fmt: Format) -> None:
    """NaN, which callers refuse, becomes code 7 whatever its sign."""
    found = by_gpu(np.tile(filled([6.0, nan, -1.0], 16), 2), "F32", fmt)
    assert codes_of(found, fmt)[0, :3].tolist() == [7, 7, 10]


@mx_formats
@roundings
def test_infinite_block(fmt: Format, rounding: str) -> None:
    """A block that holds an infinity, which callers refuse, gets scale byte 255 and zeros."""
    found = by_gpu(filled([np.inf, 5.0, -5.0], 32), "F32", fmt, rounding=rounding)
    assert found.scales.tolist() == [0xFF]
    assert codes_of(found, fmt)[0, 1:3].tolist() == [0, 1 << (fmt.bits - 1)]


def test_nvfp4_scale_of_nothing() -> None:
    """A block too small for any scale gets scale 0 and zeros with the weights' signs."""
    found = by_gpu(filled([6 * 2.0**-10, -(2.0**-9), -0.0, 1e-9], 16), "F32", NVFP4)
    assert found.scales.tolist() == [0]
    assert codes_of(found, NVFP4)[0, :4].tolist() == [0, 8, 8, 0]
    just = float(np.nextafter(F32(6 * 2.0**-10), F32(1)))
    assert by_gpu(filled([just], 16), "F32", NVFP4).scales.tolist() == [1]


def test_elements_are_multiplied_by_the_reciprocal() -> None:
    """Weights are not divided: with scale 1.875, exact middles land above and round up."""
    middles = [1.25, 2.5, 5.0, -1.25, -2.5, -5.0]
    x = filled([11.25] + [1.875 * middle for middle in middles], 16, "BF16")
    found = by_gpu(x, "BF16", NVFP4)
    assert found.scales.tolist() == [0x3F]
    assert codes_of(found, NVFP4)[0, :7].tolist() == [7, 3, 5, 7, 11, 13, 15]
    on_cpu = by_cpu(x, "BF16", NVFP4)
    assert codes_of(on_cpu, NVFP4)[0, :7].tolist() == [7, 2, 4, 6, 10, 12, 14]


@pytest.mark.parametrize(("largest", "gpu", "cpu"), [(1.4375, 108, 107), (2.875, 116, 115)])
def test_nvfp4_ratio_is_not_rounded(largest: float, gpu: int, cpu: int) -> None:
    """A BF16 maximum over 6 stays F32 before the global scale is applied."""
    x = np.tile(filled([largest], 16, "BF16"), 2)
    assert by_gpu(x, "BF16", NVFP4, maximum=7.0).scales.tolist() == [gpu] * 2
    assert by_cpu(x, "BF16", NVFP4, maximum=7.0).scales.tolist() == [cpu] * 2


@mx_formats
def test_mx_logarithm_is_not_rounded(fmt: Format) -> None:
    """The logarithm of a BF16 block's ratio stays F32 before its exponent is rounded."""
    largest = reference.LARGEST[fmt.mode] * 2.0**-100.6
    x = filled([largest], 32, "BF16")
    assert by_gpu(x, "BF16", fmt, rounding="nearest").scales.tolist() == [127 - 101]
    assert by_cpu(x, "BF16", fmt, rounding="nearest").scales.tolist() == [127 - 100]


@pytest.mark.parametrize(("power", "gpu", "cpu"), [(100.5, 101, 100), (-100.5, -101, -100)])
@mx_formats
def test_exponent_ties_go_away_from_zero(fmt: Format, power: float, gpu: int, cpu: int) -> None:
    """An exponent midway between two, which far from zero F32 cannot tell, goes away from zero."""
    x = filled([reference.LARGEST[fmt.mode] * 2.0**power], 32)
    assert by_gpu(x, "F32", fmt, rounding="nearest").scales.tolist() == [127 + gpu]
    assert by_cpu(x, "F32", fmt, rounding="nearest").scales.tolist() == [127 + cpu]


@pytest.mark.parametrize(
    ("ratio", "ceil", "nearest"),
    [
        (1.0, 0, 0),
        (1 + 2.0**-20, 1, 0),
        (1.4142, 1, 0),
        (1.4143, 1, 1),
        (1 - 2.0**-20, 0, 0),
        (0.7072, 0, 0),
        (0.7071, 0, -1),
        (2.0**-30, -30, -30),
        (2.0**-30 * 1.25, -29, -30),
        (2.0**-126 * 1.25, -125, -126),
        (2.0**-127, -127, -127),
        (2.0**-130, -127, -127),
        (2.0**-138, -127, -127),
    ],
)
@mx_formats
def test_exponents(fmt: Format, ratio: float, ceil: int, nearest: int) -> None:
    """The scale is the next power of two not below the ratio, or the nearest; at least 2^-127."""
    x = filled([reference.LARGEST[fmt.mode] * ratio], 32)
    assert by_gpu(x, "F32", fmt).scales.tolist() == [127 + ceil]
    assert by_gpu(x, "F32", fmt, rounding="nearest").scales.tolist() == [127 + nearest]


@pytest.mark.parametrize(("fmt", "byte"), [(MXFP4, 127 + 126), (MXFP8, 127 + 120)], ids=str)
def test_largest_exponent(fmt: Format, byte: int) -> None:
    """The largest F32 number has a finite scale far below the upper limit."""
    x = filled([float(np.finfo(F32).max)], 32)
    assert by_gpu(x, "F32", fmt).scales.tolist() == [byte]


@all_dtypes
@mx_formats
@roundings
def test_zero_blocks_have_byte_zero(dtype: str, fmt: Format, rounding: str) -> None:
    """A block of zeros among others gets scale byte 0, where the CPU gives 127."""
    blocks = np.zeros((3, 32), NUMPY[dtype])
    blocks[0, 5], blocks[2, 7] = 1.0, -1.0
    found = by_gpu(blocks, dtype, fmt, rounding=rounding)
    assert found.scales[1] == 0
    assert not codes_of(found, fmt)[1].any()
    on_cpu = by_cpu(blocks, dtype, fmt, rounding=rounding)
    assert on_cpu.scales[1] == 127
    assert differing(found, Packed(on_cpu.weight, found.scales, None)) == []
    assert found.scales[[0, 2]].tolist() == on_cpu.scales[[0, 2]].tolist()


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (448.0, 0x7E),
        (440.0, 0x7E),
        (432.0, 0x7E),
        (431.0, 0x7D),
        (400.0, 0x7C),
        (1.0, 0x38),
        (1.0625, 0x38),
        (1.1875, 0x3A),
        (1.125, 0x39),
        (2.0**-6, 0x08),
        (2.0**-7, 0x04),
        (2.0**-9, 0x01),
        (2.0**-10, 0x00),
        (1.5 * 2.0**-9, 0x02),
        (2.5 * 2.0**-9, 0x02),
        (7.5 * 2.0**-9, 0x08),
        (float(np.nextafter(F32(2.0**-10), F32(1))), 0x01),
        (0.0, 0x00),
    ],
)
def test_fp8_rounding(value: float, code: int) -> None:
    """E4M3 codes are the nearest, ties to even, subnormal ones too; the sign is always kept."""
    found = by_gpu(filled([448.0, value, -value], 32), "F32", MXFP8)
    assert found.scales.tolist() == [127]
    assert codes_of(found, MXFP8)[0, 1:3].tolist() == [code, code | 0x80]


@pytest.mark.parametrize("value", [449.0, 464.0, 480.0, 600.0])
def test_fp8_saturates(value: float) -> None:
    """Above 448, as the nearest exponent leaves some, a weight becomes 448, never NaN."""
    found = by_gpu(filled([600.0, value, -value], 32), "F32", MXFP8, rounding="nearest")
    assert found.scales.tolist() == [127]
    assert codes_of(found, MXFP8)[0, 1:3].tolist() == [0x7E, 0xFE]


@all_dtypes
def test_e4m3_scales_round_trip(dtype: str) -> None:
    """Every positive E4M3 value is found as the scale of a block with six times it as maximum."""
    scales = reference.E4M3[1:0x7F].astype(np.float64)
    x = np.zeros((len(scales), 16), NUMPY[dtype])
    x[:, 3] = scales * 6
    found = by_gpu(x, dtype, NVFP4)
    assert found.scales.tolist() == list(range(1, 0x7F))
    assert codes_of(found, NVFP4)[:, 3].tolist() == [7] * len(scales)


# -- where CPU and GPU agree -----------------------------------------------------------------------


@np.errstate(all="ignore")
def has_affine_tie(groups: Array, fmt: Format) -> Array:
    """Which groups have an edge or a weight midway between two steps."""
    found = by_cpu(groups, "F32", fmt)
    assert found.biases is not None
    scale, bias = found.scales.view(F32)[:, None], found.biases.view(F32)[:, None]
    smallest, largest = groups.min(axis=1), groups.max(axis=1)
    step = np.maximum((largest - smallest) / F32(2**fmt.bits - 1), F32(1e-7))
    edge = np.maximum(np.abs(smallest), np.abs(largest))
    quotients = np.concatenate([(edge / step)[:, None], (groups - bias) / scale], axis=1)
    quotients = np.abs(quotients.astype(np.float64))
    tied: Array = (quotients - np.floor(quotients) == 0.5).any(axis=1)
    return tied


@np.errstate(over="ignore")
def has_no_scale(groups: Array) -> Array:
    """Which groups are a positive constant that is infinitely many of the smallest steps."""
    largest = groups.max(axis=1)
    constant: Array = (groups.min(axis=1) == largest) & np.isinf(largest / F32(1e-7))
    return constant


@all_dtypes
@affine_formats
def test_affine_agrees_with_cpu(dtype: str, fmt: Format) -> None:
    """Groups that are not all negative and have steps and no ties get MLX's own bytes."""
    compared = 0
    for name in NAMES:
        groups = some_groups(name, dtype, fmt, 300)
        values = groups.astype(F32)
        agreeing = (values.max(axis=1) >= 0) & ~has_affine_tie(values, fmt)
        groups = groups[agreeing & ~has_no_scale(values)]
        if len(groups):
            assert differing(by_gpu(groups, dtype, fmt), by_cpu(groups, dtype, fmt)) == [], name
        compared += len(groups)
    assert compared > 1000


@roundings
def test_mxfp8_agrees_with_cpu(rounding: str) -> None:
    """F32 weights get MLX's own mxfp8 bytes but for the scales of zero blocks and of ties."""
    compared = 0
    for name in NAMES:
        groups = some_groups(name, "F32", MXFP8, 3000)
        ratio = np.abs(groups).max(axis=1) / F32(448)
        logarithm = np.log2(ratio, where=ratio > 0, out=np.zeros_like(ratio))
        tied = (np.abs(logarithm) % 1 == 0.5) & (rounding == "nearest")
        groups = groups[(ratio > 0) & ~tied]
        found = by_gpu(groups, "F32", MXFP8, rounding=rounding)
        assert differing(found, by_cpu(groups, "F32", MXFP8, rounding=rounding)) == [], name
        compared += len(groups)
    assert compared > 10000


@all_dtypes
@pytest.mark.parametrize("fmt", [NVFP4, MXFP4], ids=str)
def test_fp4_agrees_with_cpu(dtype: str, fmt: Format) -> None:
    """Ordinary weights get MLX's own fp4 values, ties and the sign of zero aside."""
    x = hard_data("small normal", dtype)
    ours, theirs = by_gpu(x, dtype, fmt), by_cpu(x, dtype, fmt)
    assert as_bytes(ours.scales) == as_bytes(theirs.scales)
    codes, others = codes_of(ours, fmt), codes_of(theirs, fmt)
    different = (codes != others) & ~((codes == 8) & (others == 0))
    assert (codes[different] & 7).astype(int).tolist() == ((others[different] & 7) + 1).tolist()
    assert np.count_nonzero(different) < (codes.size // 1000 if dtype == "F32" else codes.size / 20)


# -- pieces ----------------------------------------------------------------------------------------


@settings(deadline=None)
@any_pieces
def test_pieces(
    fmt: Format, dtype: str, sizes: list[int], name: str, scaled: bool, rounding: str
) -> None:
    """Any pieces of whole groups, an odd number of them too, join to the tensor's result."""
    assert (
        differing_pieces(
            by_gpu, overflowing, fmt, dtype, sizes, name, scaled=scaled, rounding=rounding
        )
        == []
    )


@all_dtypes
@all_formats
def test_results_are_shaped_like_the_cpus(dtype: str, fmt: Format) -> None:
    """Codes, scales and biases are as many bytes as on the CPU, and the weights stay as given."""
    x = hard_data("normal", dtype)[:3]
    given_bytes = raw(x)
    given_bytes.flags.writeable = False
    ours, theirs = parts_of(quantize_as_gpu(given_bytes.data, dtype, fmt)), by_cpu(x, dtype, fmt)
    for name in ("weight", "scales", "biases"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert (mine is None) == (other is None), name
        assert mine is None or (mine.dtype, mine.shape) == (other.dtype, other.shape), name


@roundings
@all_formats
def test_no_groups(fmt: Format, rounding: str) -> None:
    """No weights make no codes and no scales."""
    found = by_gpu(np.zeros(0, F32), "F32", fmt, rounding=rounding)
    sizes = [part.size for part in (found.weight, found.scales, found.biases) if part is not None]
    assert sizes == ([0, 0, 0] if fmt.has_bias else [0, 0])


# -- refusals --------------------------------------------------------------------------------------


@all_dtypes
@all_formats
def test_partial_group(dtype: str, fmt: Format) -> None:
    """Weights that are not whole groups are refused."""
    x = np.ones(3 * fmt.group_size - 1, NUMPY[dtype])
    with pytest.raises(BadRequest, match=f"groups of {fmt.group_size}"):
        by_gpu(x, dtype, fmt)


@pytest.mark.parametrize("dtype", ["F64", "U8", "I32", "F8_E4M3", "bf16"])
@all_formats
def test_unsupported_dtype(dtype: str, fmt: Format) -> None:
    """Only BF16, F16 and F32 are quantized."""
    with pytest.raises(BadRequest, match=dtype) as caught:
        quantize_as_gpu(memoryview(bytes(1024)), dtype, fmt)
    assert caught.value.kind == "unsupported_dtype"


@mx_formats
def test_unknown_rounding(fmt: Format) -> None:
    """A rounding that does not exist is refused with the choices."""
    with pytest.raises(BadRequest, match="'floor'") as caught:
        by_gpu(hard_data("normal", "BF16"), "BF16", fmt, rounding="floor")
    assert caught.value.hint == "choose ceil or nearest"


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@affine_formats
def test_affine_overflow_is_exact(dtype: str, fmt: Format) -> None:
    """Groups near overflow are refused exactly where their range is infinite in float32."""
    groups = hard_data("near overflow", dtype).reshape(-1, fmt.group_size)
    too_large = overflowing(groups)
    assert 0 < np.count_nonzero(too_large) < len(groups)
    by_gpu(groups[~too_large], dtype, fmt)
    for group in groups[too_large]:
        with pytest.raises(BadWeights, match="too large") as caught:
            by_gpu(group, dtype, fmt)
        assert caught.value.kind == "overflow"


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@all_dtypes
@all_formats
def test_non_finite_is_left_to_the_caller(fmt: Format, dtype: str, value: float) -> None:
    """Infinities and NaN raise nothing: counting them is the caller's check."""
    x = hard_data("normal", dtype)[:4].astype(F32)
    x[2, 7] = value
    with np.errstate(invalid="ignore"):
        found = by_gpu(x.astype(NUMPY[dtype]), dtype, fmt)
    assert found.weight.size == x.size * fmt.bits // 8


# -- on its own ------------------------------------------------------------------------------------


def test_needs_no_mlx() -> None:
    """A machine without MLX can use the profile."""
    program = (
        "import sys; sys.modules['mlx'] = None; import numpy as np;"
        "from quantmill.formats import INT4, MXFP8;"
        "from quantmill.gpuround import quantize_as_gpu as q;"
        "print([q(memoryview(bytes(512)), 'BF16', f).weight.nbytes for f in (INT4, MXFP8)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[128, 256]"


def test_reference_codes_are_the_nearest() -> None:
    """The reference maps every fp4 value to its own code and rounds middles to even ones."""
    assert reference_gpu.encode_e2m1(np.array(reference.E2M1, F32)).tolist() == list(range(16))
    middles = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, np.nan, 7, -0.0], F32)
    assert reference_gpu.encode_e2m1(middles).tolist() == [0, 2, 2, 4, 4, 6, 6, 7, 7, 8]
    assert ml_dtypes.float4_e2m1fn is not None
    theirs = middles[:7].astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert reference_gpu.encode_e2m1(middles[:7]).tolist() == theirs.tolist()
