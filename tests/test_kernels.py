"""The native kernels: every implementation gives MLX's bytes, on any data, and back."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from arithmetic import FORMATS, Array, Parts, all_dtypes, all_formats, as_bytes, differing, parts_of
from checkpoints import fixture
from hard_data import DTYPES, NAMES, hard_data
from quantmill import kernels
from quantmill.creation import create
from quantmill.elements import absolute_maximum, count_non_finite, from_float32
from quantmill.errors import BadRequest, BadWeights
from quantmill.formats import DTYPE_BYTES, INT4, INT8, MXFP4, MXFP8, NVFP4, Format
from quantmill.mlxquantize import quantize_on_cpu
from quantmill.quantize import quantize
from quantmill.store import Store
from reference import NUMPY

NATIVE = [k.name for k in kernels.list_kernels() if k.supported and k.name != kernels.MLX]
FASTEST = NATIVE[-1]
NON_FINITE = {"nan": [np.nan], "-nan": [-np.nan], "inf": [np.inf], "-inf": [-np.inf],
              "both": [np.inf, -np.inf], "nan and inf": [np.nan, np.inf]}  # fmt: skip

each_kernel = pytest.mark.parametrize("name", NATIVE)


def by(name: str, x: Array, dtype: str, fmt: Format, encode: float = 1.0) -> Parts:
    """One implementation's result, whatever the choice for this process is."""
    raw = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    groups = raw.size // DTYPE_BYTES[dtype] // fmt.group_size
    scale_bytes = groups * DTYPE_BYTES[fmt.scale_dtype(dtype)]
    codes = np.full(groups * fmt.group_size * fmt.bits // 8, 0xA5, np.uint8)
    scales = np.full(scale_bytes, 0xA5, np.uint8)
    biases = np.full(scale_bytes if fmt.has_bias else 0, 0xA5, np.uint8)
    non_finite, _ = native().quantize(
        raw, dtype, fmt.mode, fmt.bits, fmt.group_size, encode, codes, scales, biases, name
    )
    return Parts(codes, scales, biases if fmt.has_bias else None, non_finite)


def native() -> Any:
    return importlib.import_module("quantmill._native")


def values_by(name: str, found: Parts, dtype: str, fmt: Format) -> bytes:
    """What one implementation decodes codes to."""
    count = found.weight.size * 8 // fmt.bits
    out = np.full(count * DTYPE_BYTES[dtype], 0xA5, np.uint8)
    biases = np.empty(0, np.uint8) if found.biases is None else found.biases
    native().dequantize(
        found.weight, found.scales, biases, dtype, fmt.mode, fmt.bits, fmt.group_size, out, name
    )
    return out.tobytes()


def by_mlx(x: Array, dtype: str, fmt: Format, maximum: float | None = None) -> Parts:
    raw = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return parts_of(quantize_on_cpu(raw.data, dtype, fmt, maximum=maximum))


def finite_range(x: Array, dtype: str, fmt: Format) -> Array:
    """Groups whose range float32 holds: the others are refused for affine formats."""
    groups = x.reshape(-1, max(fmt.group_size, 32))
    if fmt.mode != "affine":
        return groups
    wide = groups.astype(np.float32)
    with np.errstate(over="ignore"):
        narrow: Array = groups[np.isfinite(wide.max(axis=1) - wide.min(axis=1))]
    return narrow


def decoded_by_mlx(found: Parts, dtype: str, fmt: Format) -> bytes:
    def array(part: Array, kind: str, width: int) -> mx.array:
        rows = part.view({"BF16": np.uint16, "U32": np.uint32}.get(kind, NUMPY.get(kind, np.uint8)))
        made = mx.array(rows.reshape(-1, width))
        return made.view(mx.bfloat16) if kind == "BF16" else made

    scale = fmt.scale_dtype(dtype)
    words = array(found.weight, "U32", fmt.group_size * fmt.bits // 32)
    scales = array(found.scales, scale, 1)
    biases = None if found.biases is None else array(found.biases, scale, 1)
    with mx.stream(mx.cpu):
        values = mx.dequantize(
            words, scales, biases, group_size=fmt.group_size, bits=fmt.bits, mode=fmt.mode
        )
        values = values.view(mx.uint16) if values.dtype == mx.bfloat16 else values
        return np.asarray(values).tobytes()


# -- the same bytes --------------------------------------------------------------------------------


@all_dtypes
@all_formats
def test_every_kernel_equals_mlx(dtype: str, fmt: Format) -> None:
    """Codes, scales and biases of every hard data set are MLX's, whichever kernel made them."""
    different = []
    for data in NAMES:
        x = finite_range(hard_data(data, dtype), dtype, fmt)
        expected = by_mlx(x, dtype, fmt)
        for name in NATIVE:
            found = by(name, x, dtype, fmt)
            different += [(name, data, part) for part in differing(found, expected)]
            assert found.non_finite == 0
    assert different == []


@all_dtypes
@all_formats
@pytest.mark.parametrize("what", NON_FINITE)
def test_non_finite_weights_become_what_mlx_makes_of_them(
    dtype: str, fmt: Format, what: str
) -> None:
    """NaN and infinities are counted, and their groups get MLX's bytes."""
    x = hard_data("normal", dtype)[:4].copy()
    for row, place in enumerate((0, 37, 64, 127 - len(NON_FINITE[what]))):
        values = np.array(NON_FINITE[what])
        x[row, place : place + values.size] = values.astype(NUMPY[dtype])
    x[3] = np.array(NON_FINITE[what])[0].astype(NUMPY[dtype])
    expected = by_mlx(x, dtype, fmt)
    assert expected.non_finite > 0
    for name in NATIVE:
        found = by(name, x, dtype, fmt)
        assert differing(found, expected) == [], name
        assert found.non_finite == expected.non_finite


@all_dtypes
def test_every_kernel_equals_mlx_with_a_global_scale(dtype: str) -> None:
    """The same for nvfp4 with a scale for the whole tensor, its own or another maximum."""
    different = []
    for data in NAMES:
        x = hard_data(data, dtype)
        own = absolute_maximum(x.reshape(-1).view(np.uint8), dtype)
        for maximum in (own, 4.0, 1e-3):
            if maximum < 1e-30:
                continue
            encode = float(np.float32(2688) / np.float32(maximum))
            expected = by_mlx(x, dtype, NVFP4, maximum)
            for name in NATIVE:
                found = by(name, x, dtype, NVFP4, encode)
                different += [(name, data, maximum, p) for p in differing(found, expected)]
    assert different == []


def every_magnitude(dtype: str) -> Array:
    """Each finite 16-bit magnitude as the largest of a group of 128, with random smaller ones."""
    random = np.random.default_rng(5)
    top = 0x7F80 if dtype == "BF16" else 0x7C00
    bits = random.integers(0, np.arange(1, top + 1)[:, None], (top, 128)).astype(np.uint16)
    bits[np.arange(top), random.integers(128, size=top)] = np.arange(top)
    signs = random.integers(0, 2, bits.shape, np.uint16) << 15
    return (bits | signs).view(NUMPY[dtype])


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("fmt", [INT4, INT8, Format("affine", 3, 32), MXFP8, MXFP4, NVFP4],
                         ids=lambda f: f.label)  # fmt: skip
def test_every_maximum(dtype: str, fmt: Format) -> None:
    """Every finite 16-bit value as a group's maximum gets MLX's bytes from every kernel."""
    x = finite_range(every_magnitude(dtype), dtype, fmt)
    expected = by_mlx(x, dtype, fmt)
    for name in NATIVE:
        assert differing(by(name, x, dtype, fmt), expected) == [], name


# -- any data --------------------------------------------------------------------------------------


@st.composite
def any_weights(draw: st.DrawFn) -> tuple[str, Format, Array]:
    """Groups of random bits, their exponents in a random window: mostly finite, never usual."""
    dtype, fmt = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(FORMATS))
    groups = draw(st.sampled_from([1, 2, 3, 31, 32, 33, 64, 97]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind: Any = np.uint32 if dtype == "F32" else np.uint16
    low, high = {"BF16": (7, 0xFF), "F16": (10, 0x1F), "F32": (23, 0xFF)}[dtype]
    first = draw(st.integers(0, high - 1))
    last = draw(st.integers(first, min(high, first + draw(st.sampled_from([0, 1, 4, 300])))))
    shape = groups * fmt.group_size
    exponents = random.integers(first, last + 1, shape).astype(kind) << low
    bits = exponents | random.integers(0, 1 << low, shape).astype(kind)
    bits |= random.integers(0, 2, shape).astype(kind) << (8 * bits.itemsize - 1)
    bits[random.random(shape) < draw(st.sampled_from([0, 0, 0.5, 0.97]))] = 0
    return dtype, fmt, bits.view(NUMPY[dtype])


@given(any_weights(), st.sampled_from([1.0, 1.0, 12.5, 3e5]))
def test_all_kernels_agree(weights: tuple[str, Format, Array], encode: float) -> None:
    """On any bits at all, and any number of groups, every kernel does what the plainest does."""
    dtype, fmt, x = weights
    encode = encode if fmt == NVFP4 else 1.0
    expected = by("exact", x, dtype, fmt, encode)
    for name in NATIVE[1:]:
        found = by(name, x, dtype, fmt, encode)
        assert differing(found, expected) == [], name
        assert found.non_finite == expected.non_finite
    if fmt.mode != "affine" or np.isfinite(x.astype(np.float32)).all():
        value = dtype if fmt.has_bias else "BF16"
        decoded = [values_by(name, expected, value, fmt) for name in NATIVE]
        assert same_numbers(decoded, value)


def same_numbers(decoded: list[bytes], dtype: str) -> bool:
    """Whether all are the same bytes, but for the bits of what is no number."""
    arrays = [np.frombuffer(part, NUMPY[dtype]) for part in decoded]
    with np.errstate(invalid="ignore"):
        nan = [np.isnan(a.astype(np.float32)) for a in arrays]
    first = arrays[0][~nan[0]].tobytes()
    return all(
        (n == nan[0]).all() and a[~n].tobytes() == first for a, n in zip(arrays, nan, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@all_formats
def test_a_million_weights(dtype: str, fmt: Format) -> None:
    """Weights like a model's, enough of them that rounding accidents would show."""
    values = np.random.default_rng(11).standard_normal(1 << 18, dtype=np.float32)
    x = from_float32(values * np.float32(0.02), dtype).view(NUMPY[dtype])
    expected = by_mlx(x, dtype, fmt)
    for name in NATIVE:
        assert differing(by(name, x, dtype, fmt), expected) == [], name


@each_kernel
def test_neighbouring_memory_stays_as_it_is(name: str) -> None:
    """A kernel writes its results and nothing beside them."""
    for fmt in FORMATS:
        x = hard_data("normal", "BF16").reshape(-1)[: 5 * fmt.group_size]
        expected = by(name, x, "BF16", fmt)
        room = np.full(1 << 16, 0xA5, np.uint8)
        ends = np.cumsum([p.size for p in (expected.weight, expected.scales)])
        codes, scales = room[64 : 64 + ends[0]], room[1024 + ends[0] : 1024 + ends[1]]
        biases = room[8192 : 8192 + (expected.scales.size if fmt.has_bias else 0)]
        raw = x.view(np.uint8)
        native().quantize(
            raw, "BF16", fmt.mode, fmt.bits, fmt.group_size, 1.0, codes, scales, biases, name
        )
        assert codes.tobytes() == expected.weight.tobytes()
        codes[:], scales[:], biases[:] = 0xA5, 0xA5, 0xA5
        assert (room == 0xA5).all(), fmt.label


# -- the way back ----------------------------------------------------------------------------------


@all_dtypes
@all_formats
def test_every_kernel_decodes_like_mlx(dtype: str, fmt: Format) -> None:
    """Codes made from hard data decode to MLX's values, bit for bit."""
    value = dtype if fmt.has_bias else "BF16"
    for data in NAMES:
        x = finite_range(hard_data(data, dtype), dtype, fmt)
        found = by(FASTEST, x, dtype, fmt)
        expected = decoded_by_mlx(found, value, fmt)
        for name in NATIVE:
            assert same_numbers([values_by(name, found, value, fmt), expected], value), (name, data)


@pytest.mark.parametrize("fmt", [NVFP4, MXFP4, MXFP8], ids=lambda f: f.label)
def test_every_scale_byte_and_code_decodes_like_mlx(fmt: Format) -> None:
    """All 256 scales with all codes, those that are no numbers among them."""
    scales = np.arange(256, dtype=np.uint8).repeat(256 // fmt.group_size)
    codes: Array = np.tile(np.arange(256, dtype=np.uint8), 256)
    if fmt.bits == 4:
        codes = (codes[0::2] & np.uint8(15)) | (codes[1::2] << np.uint8(4))
    found = Parts(np.ascontiguousarray(codes), scales, None, 0)
    expected = decoded_by_mlx(found, "BF16", fmt)
    for name in NATIVE:
        assert values_by(name, found, "BF16", fmt) == expected, name


@all_dtypes
def test_odd_scales_and_biases_decode_like_mlx(dtype: str) -> None:
    """Affine scales and biases of any bits, infinite ones and NaN among them."""
    random = np.random.default_rng(3)
    for fmt in (f for f in FORMATS if f.has_bias):
        groups = 512
        kind: Any = np.uint32 if dtype == "F32" else np.uint16
        scales, biases = (
            random.integers(0, np.iinfo(kind).max, groups, kind, endpoint=True).view(np.uint8)
            for _ in range(2)
        )
        codes = random.integers(0, 256, groups * fmt.group_size * fmt.bits // 8).astype(np.uint8)
        found = Parts(codes, scales, biases, 0)
        expected = decoded_by_mlx(found, dtype, fmt)
        for name in NATIVE:
            assert same_numbers([values_by(name, found, dtype, fmt), expected], dtype), name


@all_dtypes
def test_scanning_counts_and_compares(dtype: str) -> None:
    """The scan finds what NumPy finds, in hard data and with NaN and infinities in it."""
    for data in NAMES:
        x = hard_data(data, dtype).reshape(-1).copy()
        raw = x.view(np.uint8)
        assert native().scan(raw, dtype) == (0, absolute_maximum(raw, dtype))
        x[::7] = np.nan
        x[3] = -np.inf
        assert native().scan(raw, dtype) == (count_non_finite(raw, dtype), np.inf)


# -- choosing --------------------------------------------------------------------------------------


@pytest.fixture
def _chosen_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The choice of kernels is made again in the test, and after it."""
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    kernels._chosen.cache_clear()
    yield
    kernels._chosen.cache_clear()


@pytest.mark.usefixtures("_chosen_anew")
@pytest.mark.parametrize("name", [*NATIVE, kernels.MLX])
def test_the_variable_chooses(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """QUANTMILL_KERNELS names what works, the listing says so, and the bytes stay the same."""
    x = hard_data("normal", "BF16")
    raw = x.reshape(-1).view(np.uint8).data
    usual = parts_of(quantize(raw, "BF16", INT4))
    monkeypatch.setenv(kernels.VARIABLE, name)
    assert kernels.in_use() == name
    assert [k.name for k in kernels.list_kernels() if k.used] == [name]
    ran: list[str] = []
    real = native().quantize

    def noted(*arguments: Any) -> Any:
        ran.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(native(), "quantize", noted)
    assert differing(parts_of(quantize(raw, "BF16", INT4)), usual) == []
    assert ran == ([] if name == kernels.MLX else [name])


@pytest.mark.usefixtures("_chosen_anew")
def test_the_best_supported_one_is_the_default() -> None:
    """Without the variable the last supported implementation works."""
    assert kernels.in_use() == FASTEST == native().best()


@pytest.mark.usefixtures("_chosen_anew")
def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt implementation is an error that lists the names."""
    monkeypatch.setenv(kernels.VARIABLE, "avx1024")
    with pytest.raises(BadRequest, match="avx1024") as caught:
        kernels.in_use()
    assert "portable" in str(caught.value.hint)


@pytest.mark.usefixtures("_chosen_anew")
def test_a_name_this_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An implementation for another processor is an error, not an illegal instruction."""
    monkeypatch.setattr(native(), "implementations", lambda: [("portable", "", True),
                                                              ("other", "", False)])  # fmt: skip
    monkeypatch.setenv(kernels.VARIABLE, "other")
    with pytest.raises(BadRequest, match="does not support other"):
        kernels.in_use()


ABSENT = """
import sys, warnings
sys.modules["quantmill._native"] = None
from quantmill.cli import main
sys.argv = ["quantmill", *sys.argv[1:]]
main()
"""


def without_extension(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ABSENT, *map(str, arguments)],
        capture_output=True, text=True, check=False, env=os.environ | environment,
    )  # fmt: skip


@pytest.mark.parametrize("fmt", ["int4", "mxfp8", "nvfp4"])
def test_without_the_extension_mlx_does_the_work(fmt: str, tmp_path: Any) -> None:
    """Where it cannot be loaded, one warning says so and the model has the same digest."""
    source = fixture("hf-llama-bf16")
    made = create("m", source, store=Store(tmp_path / "here"), quantize=fmt)
    done = without_extension("create", "m", source, "-q", fmt, "--store", tmp_path / "there")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning:") == 1
    assert "MLX's own quantizer does the work" in done.stderr
    assert f"manifest {made.digest.short}" in done.stdout


def test_a_wish_without_the_extension_is_an_error() -> None:
    """Asking for an implementation by name is not answered by another one."""
    done = without_extension("kernels", QUANTMILL_KERNELS="portable")
    assert done.returncode == 2
    assert "cannot be loaded" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_listing_without_the_extension() -> None:
    """`quantmill kernels` still answers: MLX is what there is."""
    done = without_extension("kernels")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].startswith("mlx")


# -- what the module refuses -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: "F64"}, "unknown dtype"),
        ({2: "affine", 3: 7}, "unknown format"),
        ({4: 16}, "unknown format"),
        ({0: np.zeros(130, np.uint8)}, "whole number of groups"),
        ({6: np.zeros(3, np.uint8)}, "room for codes"),
        ({7: np.zeros(3, np.uint8)}, "room for scales"),
        ({8: np.zeros(3, np.uint8)}, "room for biases"),
        ({9: "none"}, "no implementation"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_calls_that_do_not_fit_raise(change: dict[int, Any], message: str) -> None:
    """Sizes and words are checked before anything is computed."""
    call: list[Any] = [
        np.zeros(128, np.uint8), "BF16", "affine", 4, 64, 1.0,
        np.zeros(32, np.uint8), np.zeros(2, np.uint8), np.zeros(2, np.uint8), "portable",
    ]  # fmt: skip
    native().quantize(*call)
    for place, value in change.items():
        call[place] = value
    with pytest.raises(ValueError, match=message):
        native().quantize(*call)


def test_results_need_writable_room() -> None:
    """Read-only memory is refused as a place for results."""
    room = np.zeros(32, np.uint8)
    room.flags.writeable = False
    with pytest.raises(TypeError):
        native().quantize(
            np.zeros(128, np.uint8), "BF16", "affine", 4, 64, 1.0,
            room, np.zeros(2, np.uint8), np.zeros(2, np.uint8), "portable",
        )  # fmt: skip


def test_overflow_is_told_apart_from_infinite_weights() -> None:
    """Finite weights with an infinite scale are refused beside a group that holds infinity."""
    x = np.ones((2, 64), ml_dtypes.bfloat16)
    x[0, 3] = np.inf
    raw = x.reshape(-1).view(np.uint8)
    found = quantize(raw.data, "BF16", INT4)
    assert found.non_finite == 1
    x[1, 5], x[1, 6] = 3e38, -3e38
    with pytest.raises(BadWeights, match="too large"):
        quantize(raw.data, "BF16", INT4)


def test_threads_share_nothing() -> None:
    """Eight threads at once get what one gets, from every kernel."""
    sets = [hard_data(name, "BF16") for name in ("normal", "tiny", "random bits", "e4m3 scales")]
    with ThreadPoolExecutor(8) as pool:
        for name in NATIVE:
            alone = [by(name, x, "BF16", MXFP8) for x in sets]
            together = list(pool.map(lambda x, n=name: by(n, x, "BF16", MXFP8), sets * 8))
            for index, found in enumerate(together):
                assert differing(found, alone[index % len(sets)]) == []


def test_the_reference_agrees_with_the_kernels() -> None:
    """The description in docs/formats.md, as NumPy, gives the fastest kernel's bytes."""
    x = hard_data("heavy tail", "BF16")
    for fmt in FORMATS:
        expected = reference.quantize(x, fmt.mode, fmt.bits, fmt.group_size)
        assert as_bytes(by(FASTEST, x, "BF16", fmt).weight) == as_bytes(expected.words), fmt.label
