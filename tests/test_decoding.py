"""Codes of other quantizers as numbers: every kernel gives the bytes of the arithmetic in NumPy."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arithmetic import Array, all_dtypes
from hard_data import DTYPES
from quantmill import elements, kernels
from quantmill.coding import pack, unpack, unpack_words
from quantmill.formats import DTYPE_BYTES
from quantmill.weights import CodedRows

NATIVE = [k.name for k in kernels.list_kernels() if k.supported and k.name != kernels.MLX]
ELEMENTS = ("uint", "e2m1", "e4m3")
NAN = {"BF16": 0x7FC0, "F16": 0x7E00, "F32": 0x7FC00000}

# As bits of float32: zeros, the smallest and the largest of every kind, infinities, NaN of several
# payloads, and what becomes a tie or a denormal number in 16 bits.
HARD = np.array(
    [0, 0x80000000, 1, 0x80000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000,
     0xFF800000, 0x7F800001, 0x7FC12345, 0xFFFFFFFF, 0x33000000, 0x38800000, 0x477FE000, 0x3F808000,
     0x3F800001, 0x00008000, 0x3A83126F],
    np.uint32,
).view(np.float32)  # fmt: skip

all_elements = pytest.mark.parametrize("element", ELEMENTS)


def native() -> Any:
    return importlib.import_module("quantmill._native")


def raw(part: Array | None) -> memoryview | None:
    return None if part is None else np.ascontiguousarray(part).reshape(-1).view(np.uint8).data


def rows_of(
    element: str,
    codes: npt.NDArray[np.uint8],
    group: int,
    scales: Array,
    zeros: Array | None = None,
    biases: Array | None = None,
) -> CodedRows:
    """Codes of [rows, columns] with float32 parameters of [rows, groups]."""
    bytes_, scale = raw(codes), raw(scales)
    assert bytes_ is not None
    assert scale is not None
    return CodedRows(element, codes.shape[1], group, bytes_, scale, raw(zeros), raw(biases))


def by(name: str, rows: CodedRows, dtype: str) -> bytes:
    """One implementation's result; memory around it must stay as it is."""
    size = rows.codes.nbytes * DTYPE_BYTES[dtype]
    room = np.full(size + 128, 0xA5, np.uint8)
    nothing = memoryview(b"")
    native().decode(
        rows.codes, rows.scales,
        nothing if rows.zeros is None else rows.zeros,
        nothing if rows.biases is None else rows.biases,
        rows.element, dtype, rows.columns, rows.group, room[64 : 64 + size], name,
    )  # fmt: skip
    assert (room[:64] == 0xA5).all()
    assert (room[64 + size :] == 0xA5).all()
    return room[64 : 64 + size].tobytes()


def all_codes(element: str) -> npt.NDArray[np.uint8]:
    return np.arange(16 if element == "e2m1" else 256, dtype=np.uint8)


@all_dtypes
@all_elements
def test_every_code_with_every_hard_scale(element: str, dtype: str) -> None:
    """All codes, NaN among them, times scales of every kind, with and without zeros and biases."""
    codes = np.tile(all_codes(element), (HARD.size, 1))
    scales = HARD[:, None]
    others = [None, *(np.roll(scales, shift) for shift in (0, 3, 10))]
    for zeros in others:
        for biases in others:
            rows = rows_of(element, codes, codes.shape[1], scales, zeros, biases)
            expected = elements.decode(rows, dtype)
            for name in NATIVE:
                assert by(name, rows, dtype) == expected, name


@st.composite
def any_rows(draw: st.DrawFn) -> tuple[CodedRows, str]:
    """Rows and groups of any size, parameters of any bits or like those of models."""
    element, dtype = draw(st.sampled_from(ELEMENTS)), draw(st.sampled_from(DTYPES))
    rows, columns = draw(st.integers(0, 4)), draw(st.integers(1, 1300))
    group = draw(st.one_of(st.integers(1, 130), st.just(columns), st.just(columns + 7)))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    codes = random.choice(all_codes(element), (rows, columns))
    usual = draw(st.booleans())

    def parameters() -> Array:
        shape = (rows, -(-columns // group))
        if usual:
            found: Array = random.standard_normal(shape, np.float32) * np.float32(0.01)
            return found
        return random.integers(0, 1 << 32, shape, np.uint32).view(np.float32)

    zeros, biases = (parameters() if draw(st.booleans()) else None for _ in range(2))
    return rows_of(element, codes, group, parameters(), zeros, biases), dtype


@given(any_rows())
def test_any_rows(case: tuple[CodedRows, str]) -> None:
    """Partial groups, groups of one column and of a row, no rows: the same bytes everywhere."""
    rows, dtype = case
    expected = elements.decode(rows, dtype)
    for name in NATIVE:
        assert by(name, rows, dtype) == expected, name
    assert kernels.decode(rows, dtype) == expected


@all_dtypes
def test_a_product_is_rounded_once(dtype: str) -> None:
    """Numbers are float64's products and sums of float32 values, rounded as often as is said."""
    random = np.random.default_rng(4)
    codes = random.integers(0, 256, (3, 640), np.uint8)
    scales = random.standard_normal((3, 5), np.float32)
    zeros = random.integers(0, 256, (3, 5)).astype(np.float32)
    steps = codes.astype(np.float64) - zeros.repeat(128, 1)  # exact in float32 as well
    products = (steps * scales.repeat(128, 1)).astype(np.float32)
    expected = elements.from_float32(products.reshape(-1), dtype).tobytes()
    for name in NATIVE:
        assert by(name, rows_of("uint", codes, 128, scales, zeros), dtype) == expected, name


@all_dtypes
def test_there_is_one_nan(dtype: str) -> None:
    """Whatever made it, NaN is quiet and positive, so no processor's habits are in the bytes."""
    codes = np.array([[0x7F, 0xFF, 0x00, 0x80, 0x01]], np.uint8)
    kind: Any = np.uint32 if dtype == "F32" else np.uint16
    for scale in (np.inf, -np.inf, np.nan, -np.nan):
        rows = rows_of("e4m3", codes, 5, np.array([[scale]], np.float32))
        numpy = elements.decode(rows, dtype).tobytes()
        for found in (numpy, *(by(name, rows, dtype) for name in NATIVE)):
            assert (np.frombuffer(found, kind)[:4] == NAN[dtype]).all()


def test_e2m1_has_two_zeros() -> None:
    """Code 8 is -0, as in every library that has the format."""
    rows = rows_of("e2m1", np.array([[0, 8]], np.uint8), 2, np.ones((1, 1), np.float32))
    assert elements.decode(rows, "BF16").tobytes() == bytes([0, 0, 0, 0x80])


def test_without_the_extension_there_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """None tells the caller to use NumPy."""
    monkeypatch.setattr(kernels, "in_use", lambda: kernels.MLX)
    rows = rows_of("uint", np.zeros((1, 4), np.uint8), 4, np.ones((1, 1), np.float32))
    assert kernels.decode(rows, "BF16") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({4: "int"}, "unknown element"),
        ({5: "F64"}, "unknown dtype"),
        ({6: 5}, "whole number of rows"),
        ({6: 0}, "no columns"),
        ({7: 0}, "no columns"),
        ({7: 2}, "number of scales"),
        ({1: np.zeros(0, np.uint8)}, "number of scales"),
        ({2: np.zeros(4, np.uint8)}, "number of zeros"),
        ({3: np.zeros(12, np.uint8)}, "number of biases"),
        ({8: np.zeros(15, np.uint8)}, "room for values"),
        ({9: "none"}, "no implementation"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_calls_that_do_not_fit_raise(change: dict[int, Any], message: str) -> None:
    """Sizes and words are checked before anything is computed."""
    nothing = np.zeros(0, np.uint8)
    call: list[Any] = [
        np.zeros(8, np.uint8), np.zeros(8, np.uint8), nothing, nothing, "e4m3", "BF16", 4, 4,
        np.zeros(16, np.uint8), "portable",
    ]  # fmt: skip
    native().decode(*call)
    for place, value in change.items():
        call[place] = value
    with pytest.raises(ValueError, match=message):
        native().decode(*call)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_packed_and_unpacked(bits: int) -> None:
    """Streams of bits and words of whole codes hold what the description of the layout says."""
    random = np.random.default_rng(bits)
    codes = random.integers(0, 1 << bits, (3, 64), np.uint8)
    stream = pack(codes, bits).reshape(3, -1)
    number = int.from_bytes(stream[1].tobytes(), "little")
    assert [number >> (bits * i) & ((1 << bits) - 1) for i in range(64)] == codes[1].tolist()
    np.testing.assert_array_equal(unpack(stream, bits, 64), codes)
    np.testing.assert_array_equal(unpack(stream, bits, 61), codes[:, :61])
    each = 32 // bits
    words = np.zeros((3, -(-64 // each)), np.uint32)
    for i in range(64):
        words[:, i // each] |= codes[:, i].astype(np.uint32) << np.uint32(bits * (i % each))
    np.testing.assert_array_equal(unpack_words(words, bits, 64), codes)
