"""The arithmetic: byte for byte MLX's, MLX 0.32.1's where asked, and the description's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from arithmetic import (
    MX,
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
from quantmill.elements import absolute_maximum, count_non_finite, to_bf16
from quantmill.errors import BadRequest, BadWeights
from quantmill.formats import (
    AFFINE_BITS,
    MXFP4,
    MXFP8,
    NVFP4,
    Format,
)
from quantmill.quantize import quantize
from quantmill.weights import MAX_SCALE
from reference import NUMPY, Packed
from vectors import DATA, cases, suite

recorded_cases = [c for c in suite("quant_numeric") if c["op"] == "quantize"]


def ours(x: Array, dtype: str, fmt: Format, **options: Any) -> Parts:
    return parts_of(quantize(raw(x).data, dtype, fmt, **options))


def by_reference(x: Array, fmt: Format, **options: Any) -> Packed:
    return reference.quantize(x, fmt.mode, fmt.bits, fmt.group_size, **options)


def to_mlx(x: Array) -> Any:
    if x.dtype == ml_dtypes.bfloat16:
        return mx.array(x.view(np.uint16)).view(mx.bfloat16)
    return mx.array(x)


def from_mlx(array: Any) -> Array:
    if array.dtype == mx.bfloat16:
        return np.asarray(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.asarray(array)


def global_scale(maximum: float | None) -> dict[str, Any]:
    return {} if maximum is None else {"global_scale": mx.array(maximum, mx.float32)}


def by_mlx(x: Array, fmt: Format, maximum: float | None = None) -> Packed:
    parts = mx.quantize(
        to_mlx(x),
        group_size=fmt.group_size,
        bits=fmt.bits,
        mode=fmt.mode,
        **global_scale(maximum),
        stream=mx.cpu,
    )
    words, scales, *biases = map(from_mlx, parts)
    return Packed(words, scales, biases[0] if biases else None)


def decoded_by_mlx(packed: Packed, fmt: Format, maximum: float | None = None) -> Array:
    values = mx.dequantize(
        to_mlx(packed.words),
        to_mlx(packed.scales),
        None if packed.biases is None else to_mlx(packed.biases),
        group_size=fmt.group_size,
        bits=fmt.bits,
        mode=fmt.mode,
        **global_scale(maximum),
        stream=mx.cpu,
    )
    return from_mlx(values)


def rows_of(x: Array, fmt: Format) -> Array:
    """The same elements in the shortest rows that MLX takes."""
    return x.reshape(-1, max(fmt.group_size, 32))


def wrapped(rows: Array, fmt: Format) -> Array:
    """Which groups of an mx format have an exponent below -127, which MLX's byte wraps around."""
    ratio = np.abs(rows.astype(np.float32)).max(axis=1) / np.float32(reference.LARGEST[fmt.mode])
    rounded = ratio.astype(rows.dtype).astype(np.float64)
    selected: Array = (rounded > 0) & (rounded <= 2.0**-128)
    return selected


@np.errstate(over="ignore")
def overflowing(rows: Array) -> Array:
    """Which rows have a range that float32 cannot hold."""
    values = rows.astype(np.float32)
    infinite: Array = np.isinf(values.max(axis=1) - values.min(axis=1))
    return infinite


def representable(name: str, dtype: str, fmt: Format) -> Array:
    """Hard data without the groups for which MLX has no usable answer."""
    rows = rows_of(hard_data(name, dtype), fmt)
    if fmt.mode == "affine":
        rows = rows[~overflowing(rows)]
    elif fmt in MX:
        rows = rows[~wrapped(rows, fmt)]
    assert len(rows) > 0
    return rows


# -- recorded results ------------------------------------------------------------------------------


def vector_format(document: dict[str, Any]) -> Format:
    return Format(document["mode"], document["bits"], document["group_size"])


def vector_array(tensor: dict[str, Any]) -> Array:
    dtypes: dict[str, Any] = {**NUMPY, "U8": np.uint8, "U32": np.uint32}
    content = np.frombuffer(bytes.fromhex(tensor["data_hex"]), dtypes[tensor["dtype"]])
    return content.reshape(tensor["shape"])


def vector_packed(document: dict[str, Any]) -> Packed:
    parts = [vector_array(document[k]) if k in document else None for k in ("scale", "bias")]
    flat = [None if part is None else part.reshape(-1, part.shape[-1]) for part in parts]
    words = vector_array(document["weight"])
    assert flat[0] is not None
    return Packed(words.reshape(-1, words.shape[-1]), flat[0], flat[1])


def check_vector(case: dict[str, Any]) -> None:
    tensor, expected = case["input"]["tensor"], vector_packed(case["expect"])
    found = ours(vector_array(tensor), tensor["dtype"], vector_format(case["input"]))
    assert differing(found, expected) == []


@cases("quant_numeric", "quantize")
def test_vector(case: dict[str, Any]) -> None:
    """Codes, scales and biases are those recorded from MLX."""
    check_vector(case)


@cases("quant_numeric", "quantize", odd=True)
def test_odd_vector(case: dict[str, Any]) -> None:
    """MLX's surprising results are kept: its bytes are what loaders know."""
    check_vector(case)


@pytest.mark.parametrize("case", recorded_cases, ids=lambda c: c["id"])
def test_reference_decodes_vector(case: dict[str, Any]) -> None:
    """The reference decodes what was recorded to the recorded values."""
    fmt = vector_format(case["input"])
    values = reference.dequantize(vector_packed(case["expect"]), fmt.mode, fmt.bits, fmt.group_size)
    assert raw(values.astype("<f4")).tobytes().hex() == case["expect"]["dequantized_f32_hex"]


@cases("quant_numeric", "dequantize")
def test_reference_decodes_codes(case: dict[str, Any]) -> None:
    """The reference decodes every code and scale byte to the recorded value."""
    fmt = vector_format(case["input"])
    values = reference.dequantize(vector_packed(case["input"]), fmt.mode, fmt.bits, fmt.group_size)
    assert raw(values.astype("<f4")).tobytes().hex() == case["expect"]["dequantized_f32_hex"]


@cases("quant_numeric", "decode_e4m3")
def test_reference_decodes_e4m3(case: dict[str, Any]) -> None:
    """The reference's table of E4M3 values is the recorded one."""
    codes = np.frombuffer(bytes.fromhex(case["input"]["codes_hex"]), np.uint8)
    values = reference.E4M3[codes].astype(ml_dtypes.bfloat16)
    assert raw(values).tobytes().hex() == case["expect"]["bf16_hex"]


def test_reference_e4m3_round_trip() -> None:
    """Every E4M3 byte but NaN encodes its own value."""
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
    assert reference.encode_e4m3(reference.E4M3[codes]).tolist() == codes.tolist()


RAMP = [(i - 16) / 4 for i in range(32)]
RISING = [(i + 1) / 8 for i in range(32)]
TIES = [0, 0.25, 0.5, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6]
TIES += [-0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5, -6, -0.1, 0.1]
TIES += [0.0] * 12
INT4_32, INT8_32 = Format("affine", 4, 32), Format("affine", 8, 32)

# values, dtype, format, options; words, scales and bias as bit patterns
GOLDEN: dict[str, tuple[list[float], str, Format, dict[str, Any], str, str, str | None]] = {
    "ramp int4": (
        RAMP, "F32", INT4_32, {},
        "43222100 87666544 cbaaa988 ffeeedcc", "3f000000", "c0800000",
    ),
    "ramp int4 BF16": (
        RAMP, "BF16", INT4_32, {},
        "43222100 87666544 cbaaa988 ffeeedcc", "3f00", "c080",
    ),
    "ramp int8": (
        RAMP, "F32", INT8_32, {},
        "19100800 3a322921 5b524a42 7c746b63 9d948c84 beb6ada5 dfd6cec6 fff8efe7",
        "3cf83e10", "c0800000",
    ),
    "rising int4": (
        RISING, "F32", INT4_32, {},
        "bccddeef 78899aab 44556677 00112233", "be888889", "40800000",
    ),
    "falling int4": (
        [-v for v in RISING], "F32", INT4_32, {},
        "bccddeef 78899aab 44556677 00112233", "3e888889", "c0800000",
    ),
    "zeros int4": ([0.0] * 32, "F32", INT4_32, {}, "0 0 0 0", "b3d6bf95", "00000000"),
    "ones int4": ([1.0] * 32, "F32", INT4_32, {}, "0 0 0 0", "b3d6bf95", "3f800000"),
    "ramp mxfp4 ceil": (
        RAMP, "F32", MXFP4, {},
        "ccddddee 099aabbc 33221100 65555444", "7f", None,
    ),
    "ramp mxfp4 nearest": (
        RAMP, "F32", MXFP4, {"rounding": "nearest"},
        "eeffffff 9abccdde 55443210 77777666", "7e", None,
    ),
    "ramp mxfp8 ceil": (
        RAMP, "F32", MXFP8, {},
        "f5f6f7f8 f1f2f3f4 eaeceef0 d8e0e4e8 64605800 6e6c6a68 73727170 77767574", "79", None,
    ),
    "ramp mxfp8 nearest": (
        RAMP, "F32", MXFP8, {"rounding": "nearest"},
        "fdfefefe f9fafbfc f2f4f6f8 e0e8ecf0 6c686000 76747270 7b7a7978 7e7e7d7c", "78", None,
    ),
    "ramp nvfp4": (
        RAMP, "F32", NVFP4, {},
        "deeeefff 99abccdd 54432210 77766665", "33 32", None,
    ),
    "ramp nvfp4 G=4": (
        RAMP, "F32", NVFP4, {"maximum": 4.0},
        "deeeefff 9aabccdd 54432210 77766665", "7e 7d", None,
    ),
    "ties mxfp4": (TIES, "F32", MXFP4, {}, "54321100 dcba9076 000000fe 0", "7f", None),
    "ties nvfp4": (TIES, "F32", NVFP4, {}, "54321100 dcba9076 000000fe 0", "38 38", None),
    "ties mxfp8": (
        TIES, "F32", MXFP8, {},
        "64605800 76726e6a e4d87c7a f6f2eeea 4dcdfcfa 0 0 0", "79", None,
    ),
    "zeros mxfp4": ([0.0] * 32, "F32", MXFP4, {}, "0 0 0 0", "7f", None),
    "zeros mxfp8": ([0.0] * 32, "F32", MXFP8, {}, "0 0 0 0 0 0 0 0", "7f", None),
    "zeros nvfp4": ([0.0] * 32, "F32", NVFP4, {}, "0 0 0 0", "00 00", None),
}  # fmt: skip


def patterns(part: Array | None, size: int) -> list[int] | None:
    return None if part is None else part.view(f"<u{size}").astype(int).tolist()


def numbers(text: str | None) -> list[int] | None:
    return None if text is None else [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    """The worked examples of the format description hold."""
    values, dtype, fmt, options, words, scales, bias = GOLDEN[name]
    found = ours(np.array(values).astype(NUMPY[dtype]), dtype, fmt, **options)
    size = len(scales.split()[0]) // 2
    assert patterns(found.weight, 4) == numbers(words)
    assert patterns(found.scales, size) == numbers(scales)
    assert patterns(found.biases, size) == numbers(bias)


@all_dtypes
@mx_formats
def test_nearest_is_mlx_0_32_1(dtype: str, fmt: Format) -> None:
    """Rounding to nearest gives the bytes of the last MLX release that did so."""
    with np.load(DATA / "mlx-0.32.1-nearest.npz") as recorded:
        x = recorded[f"{dtype}.input"].view(NUMPY[dtype])
        expected = Packed(
            recorded[f"{dtype}.{fmt.mode}.weight"], recorded[f"{dtype}.{fmt.mode}.scales"], None
        )
    assert len(x) > 400
    assert differing(ours(x, dtype, fmt, rounding="nearest"), expected) == []


# -- hard data -------------------------------------------------------------------------------------


@all_dtypes
@all_formats
def test_equals_mlx(dtype: str, fmt: Format) -> None:
    """Every hard data set gets the bytes that MLX gives it."""
    different = {}
    for name in NAMES:
        rows = representable(name, dtype, fmt)
        different[name] = differing(ours(rows, dtype, fmt), by_mlx(rows, fmt))
    assert {name: parts for name, parts in different.items() if parts} == {}


@all_dtypes
@all_formats
def test_equals_reference(dtype: str, fmt: Format) -> None:
    """Every hard data set gets the described bytes, tiny groups the smallest scale."""
    different = {}
    for name in NAMES:
        rows = rows_of(hard_data(name, dtype), fmt)
        if fmt.mode == "affine":
            rows = rows[~overflowing(rows)]
        different[name] = differing(ours(rows, dtype, fmt), by_reference(rows, fmt))
    assert {name: parts for name, parts in different.items() if parts} == {}


@all_dtypes
@mx_formats
def test_nearest_equals_reference(dtype: str, fmt: Format) -> None:
    """Every hard data set gets the described bytes when exponents are rounded to nearest."""
    different = {}
    for name in NAMES:
        rows = rows_of(hard_data(name, dtype), fmt)
        found = ours(rows, dtype, fmt, rounding="nearest")
        different[name] = differing(found, by_reference(rows, fmt, rounding="nearest"))
    assert {name: parts for name, parts in different.items() if parts} == {}


@all_dtypes
@pytest.mark.parametrize("maximum", ["own", 4.0, 1e-3, 6e4])
def test_global_scale(dtype: str, maximum: float | str) -> None:
    """A global scale gives MLX's bytes and the described ones, larger or smaller than the data."""
    different = {}
    for name in NAMES:
        rows = rows_of(hard_data(name, dtype), NVFP4)
        scale = absolute_maximum(raw(rows), dtype) if isinstance(maximum, str) else maximum
        found = ours(rows, dtype, NVFP4, maximum=scale)
        different[name] = differing(found, by_mlx(rows, NVFP4, scale))
        different[name] += differing(found, by_reference(rows, NVFP4, maximum=scale))
    assert {name: parts for name, parts in different.items() if parts} == {}


@all_dtypes
def test_global_scale_covers_maximum(dtype: str) -> None:
    """With its own maximum as global scale, a tensor's largest block scale is the largest there."""
    x = hard_data("normal", dtype)
    found = ours(x, dtype, NVFP4, maximum=absolute_maximum(raw(x), dtype))
    assert reference.E4M3[found.scales].max() * 6 == MAX_SCALE


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@mx_formats
def test_wrapped_groups(dtype: str, fmt: Format) -> None:
    """Groups so tiny that MLX's exponent wraps to a huge one (or NaN) keep their values with us."""
    sets = [rows_of(hard_data(name, dtype), fmt) for name in NAMES]
    rows = np.concatenate([group[wrapped(group, fmt)] for group in sets])
    assert len(rows) > 100
    by_wrapping = np.abs(decoded_by_mlx(by_mlx(rows, fmt), fmt).astype(np.float32))
    assert ((by_wrapping > 1e30) | np.isnan(by_wrapping)).any(axis=1).all()

    found = ours(rows, dtype, fmt)
    assert (found.scales == 0).all()
    words = found.weight.view("<u4").reshape(len(rows), -1)
    kept = decoded_by_mlx(Packed(words, found.scales.reshape(-1, 1), None), fmt)
    error = np.abs(kept.astype(np.float64) - rows.astype(np.float64)).max()
    # half the widest gap between codes of values up to 2^-128 times the largest code
    assert error <= {MXFP4: 0.5, MXFP8: 8.0}[fmt] * 2.0**-127


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@mx_formats
def test_wrapped_among_others(dtype: str, fmt: Format) -> None:
    """A tiny group among huge ones, with MLX scale bytes alike, is the only one done again."""
    tiny, huge = np.zeros((1, 32)), np.zeros((1, 32))
    tiny[0, :3] = np.array([1, -0.5, 0.25]) * reference.LARGEST[fmt.mode] * 2.0**-130
    huge[0, :3] = [2.0**127, -(2.0**126), 1.0]
    rows = np.concatenate([huge, tiny, huge]).astype(NUMPY[dtype])
    found = ours(rows, dtype, fmt)
    assert found.scales[1] == 0
    assert (found.scales[[0, 2]] > 230).all()
    assert differing(ours(rows[[0, 2]], dtype, fmt), by_mlx(rows[[0, 2]], fmt)) == []
    assert differing(found, by_reference(rows, fmt)) == []


# -- decoding --------------------------------------------------------------------------------------


@all_dtypes
@all_formats
def test_reference_dequantizes_as_mlx(dtype: str, fmt: Format) -> None:
    """Unpacked by the reference, MLX's words and scales decode to MLX's values bit for bit."""
    different = []
    for name in NAMES:
        packed = by_mlx(representable(name, dtype, fmt), fmt)
        values = reference.dequantize(packed, fmt.mode, fmt.bits, fmt.group_size)
        if as_bytes(values) != as_bytes(decoded_by_mlx(packed, fmt)):
            different.append(name)
    assert different == []


@all_dtypes
def test_reference_dequantizes_global_scale_as_mlx(dtype: str) -> None:
    """With a global scale the reference decodes to MLX's float32 values bit for bit."""
    for name in ("normal", "heavy tail", "e4m3 scales"):
        rows = rows_of(hard_data(name, dtype), NVFP4)
        maximum = absolute_maximum(raw(rows), dtype)
        packed = by_mlx(rows, NVFP4, maximum)
        values = reference.dequantize_float(packed, "nvfp4", maximum)
        assert values.dtype == np.float32
        assert as_bytes(values) == as_bytes(decoded_by_mlx(packed, NVFP4, maximum)), name


bit_widths = st.sampled_from(AFFINE_BITS)


@given(bit_widths, st.integers(1, 4), st.randoms(use_true_random=False))
def test_packing_is_a_bit_stream(bits: int, words: int, random: Any) -> None:
    """Code k of a row is bits [k*bits, (k+1)*bits) of the row's bytes read as one number."""
    codes = np.array([[random.randrange(1 << bits) for _ in range(32 * words)] for _ in range(2)])
    packed = reference.pack(codes, bits)
    assert packed.shape == (2, words * bits)
    assert reference.unpack(packed, bits).tolist() == codes.tolist()
    for row, stream in zip(codes.tolist(), packed, strict=True):
        number = sum(code << (bits * k) for k, code in enumerate(row))
        assert int.from_bytes(stream.tobytes(), "little") == number


@given(bit_widths, st.data())
def test_every_word_is_codes(bits: int, data: st.DataObject) -> None:
    """Unpacking any words and packing the codes gives the words back."""
    content = data.draw(st.binary(min_size=4 * bits, max_size=4 * bits))
    words = np.frombuffer(content, "<u4").reshape(1, -1)
    assert reference.pack(reference.unpack(words, bits), bits).tolist() == words.tolist()


# -- pieces ----------------------------------------------------------------------------------------


@settings(deadline=None)
@any_pieces
def test_pieces(
    fmt: Format, dtype: str, sizes: list[int], name: str, scaled: bool, rounding: str
) -> None:
    """Any pieces of whole groups, an odd number of them too, join to the tensor's result."""
    assert (
        differing_pieces(
            ours, overflowing, fmt, dtype, sizes, name, scaled=scaled, rounding=rounding
        )
        == []
    )


@pytest.mark.parametrize("groups", [1, 3])
def test_nvfp4_odd_groups(groups: int) -> None:
    """A number of nvfp4 groups that MLX itself refuses is quantized all the same."""
    x = hard_data("normal", "BF16").reshape(-1)[: groups * 16].reshape(1, -1)
    with pytest.raises(ValueError, match="reshape"):
        mx.eval(by_mlx(x, NVFP4).words)
    found = ours(x, "BF16", NVFP4)
    assert (found.weight.size, found.scales.size) == (groups * 8, groups)
    assert differing(found, by_reference(x, NVFP4)) == []


@pytest.mark.parametrize("rounding", ["ceil", "nearest"])
@all_formats
def test_no_groups(fmt: Format, rounding: str) -> None:
    """No weights make no codes and no scales."""
    found = ours(np.zeros(0, np.float32), "F32", fmt, rounding=rounding)
    sizes = [part.size for part in (found.weight, found.scales, found.biases) if part is not None]
    assert sizes == ([0, 0, 0] if fmt.has_bias else [0, 0])


# -- looking at weights ----------------------------------------------------------------------------


def every_pattern(dtype: str) -> Array:
    """All values of a 16-bit dtype, many of a wider one; NaNs and infinities too."""
    rng = np.random.default_rng(7)
    if dtype in {"BF16", "F16"}:
        return np.arange(1 << 16, dtype=np.uint16).view(NUMPY[dtype])
    if dtype == "F32":
        high = np.arange(1 << 16, dtype=np.uint32) << 16
        low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
        return (high[:, None] | low).reshape(-1).view(np.float32)
    bits = rng.integers(0, 1 << 64, 1 << 14, dtype=np.uint64)
    usual = rng.normal(0, 1, 1 << 14)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e300, -1e300, 1e-300, 3.4e38, 3.39e38]
    return np.concatenate([bits.view(np.float64), usual, np.array(special)])


@all_dtypes
def test_count_non_finite(dtype: str) -> None:
    """NaN and infinities are counted, whatever their sign and payload."""
    values = every_pattern(dtype)
    with np.errstate(invalid="ignore"):  # ml_dtypes converts NaN aloud
        finite = np.isfinite(values)
    assert 0 < np.count_nonzero(~finite) < finite.size
    assert count_non_finite(raw(values), dtype) == np.count_nonzero(~finite)
    assert count_non_finite(raw(values[finite]), dtype) == 0
    assert count_non_finite(raw(values[:0]), dtype) == 0


@all_dtypes
def test_absolute_maximum(dtype: str) -> None:
    """The largest magnitude is found for either sign, and is 0 for no elements."""
    for name in NAMES:
        x = hard_data(name, dtype)
        assert absolute_maximum(raw(x), dtype) == np.abs(x.astype(np.float64)).max(), name
    assert absolute_maximum(raw(hard_data("normal", dtype)[:0]), dtype) == 0


@pytest.mark.parametrize("dtype", ["F16", "F32", "F64"])
def test_to_bf16(dtype: str) -> None:
    """Elements are rounded to F32 and then to BF16, ties to even, and NaN stays NaN."""
    values = every_pattern(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(np.float32).astype(ml_dtypes.bfloat16)
    found = to_bf16(raw(values), dtype).view(ml_dtypes.bfloat16)
    nan = np.isnan(values)
    assert nan.any()
    assert np.isnan(found[nan].astype(np.float32)).all()
    assert as_bytes(found[~nan]) == as_bytes(expected[~nan])


def test_to_bf16_rounds_twice() -> None:
    """An F64 just above the middle of two BF16 values rounds through F32, to the even one."""
    values = np.array([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-8 + 2.0**-23])
    assert to_bf16(raw(values), "F64").view(np.uint16).tolist() == [0x3F80, 0x3F81]


@pytest.mark.parametrize("dtype", ["BF16", "I32", "F8_E4M3"])
def test_to_bf16_refuses(dtype: str) -> None:
    """Other dtypes are not cast."""
    with pytest.raises(BadRequest, match=dtype) as caught:
        to_bf16(np.zeros(8, np.uint8), dtype)
    assert caught.value.kind == "unsupported_dtype"


# -- refusals --------------------------------------------------------------------------------------


@all_dtypes
@all_formats
def test_partial_group(dtype: str, fmt: Format) -> None:
    """Weights that are not whole groups are refused."""
    x = np.ones(3 * fmt.group_size - 1, NUMPY[dtype])
    with pytest.raises(BadRequest, match=f"groups of {fmt.group_size}"):
        ours(x, dtype, fmt)


@pytest.mark.parametrize("dtype", ["F64", "U8", "I32", "F8_E4M3", "bf16"])
@all_formats
def test_unsupported_dtype(dtype: str, fmt: Format) -> None:
    """Only BF16, F16 and F32 are quantized."""
    with pytest.raises(BadRequest, match=dtype) as caught:
        quantize(memoryview(bytes(1024)), dtype, fmt)
    assert caught.value.kind == "unsupported_dtype"


@mx_formats
def test_unknown_rounding(fmt: Format) -> None:
    """A rounding that does not exist is refused with the choices."""
    with pytest.raises(BadRequest, match="'floor'") as caught:
        ours(hard_data("normal", "BF16"), "BF16", fmt, rounding="floor")
    assert caught.value.hint == "choose ceil or nearest"


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@affine_formats
def test_affine_overflow(dtype: str, fmt: Format) -> None:
    """Finite weights whose range float32 cannot hold are refused, one group among many."""
    x = hard_data("normal", dtype)
    x[5, 7], x[5, 8] = 3e38, -3e38
    with pytest.raises(BadWeights, match="too large") as caught:
        ours(x, dtype, fmt)
    assert caught.value.kind == "overflow"


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@affine_formats
def test_affine_overflow_is_exact(dtype: str, fmt: Format) -> None:
    """Groups near overflow are refused exactly where their range is infinite in float32."""
    groups = hard_data("near overflow", dtype).reshape(-1, fmt.group_size)
    refused = []
    for group in groups:
        try:
            ours(group, dtype, fmt)
        except BadWeights:
            refused.append(True)
        else:
            refused.append(False)
    assert refused == overflowing(groups).tolist()
    assert len(set(refused)) == 2


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
@affine_formats
def test_non_finite_is_not_overflow(dtype: str, fmt: Format) -> None:
    """Infinite weights are not blamed on the scale: counting them is the caller's check."""
    x = hard_data("normal", dtype)
    x[5, 7] = np.inf
    found = ours(x, dtype, fmt)
    assert found.scales.size == x.size // fmt.group_size * x.itemsize


# -- the caller's MLX ------------------------------------------------------------------------------


@all_formats
def test_leaves_mlx_defaults(fmt: Format) -> None:
    """The caller's default device and stream are the same afterwards."""
    stream = mx.new_stream(mx.cpu)
    with mx.stream(stream):
        before = mx.default_device(), mx.default_stream(mx.cpu)
        assert before[1] == stream
        ours(hard_data("tiny", "BF16"), "BF16", fmt)
        assert (mx.default_device(), mx.default_stream(mx.cpu)) == before


@all_formats
def test_threads(fmt: Format) -> None:
    """Four threads at once get the bytes that one gets."""
    tensors = [hard_data(name, "BF16") for name in ("normal", "tiny", "huge", "e4m3 scales")]
    alone = [ours(x, "BF16", fmt) for x in tensors]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: ours(x, "BF16", fmt), tensors * 8))
    for index, found in enumerate(together):
        expected = alone[index % len(tensors)]
        assert differing(found, Packed(expected.weight, expected.scales, expected.biases)) == []
