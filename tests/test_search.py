"""Scales and biases searched for: the same bytes from everyone, and never more error than MLX's."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import reference_search
from arithmetic import (
    FORMATS,
    Array,
    Parts,
    affine_formats,
    all_dtypes,
    all_formats,
    differing,
    parts_of,
    raw,
)
from hard_data import DTYPES, NAMES, hard_data
from quantmill import kernels
from quantmill.errors import BadRequest, BadWeights
from quantmill.formats import DTYPE_BYTES, INT4, INT8, MXFP4, MXFP8, NVFP4, Format
from quantmill.quantize import quantize
from quantmill.searchedarrays import search_arrays
from quantmill.searching import choose, search
from reference import NUMPY

NATIVE = [k.name for k in kernels.list_kernels() if k.supported and k.name != kernels.MLX]
FASTEST = NATIVE[-1]
COLUMNS = 384


def by(
    name: str, x: Array, dtype: str, fmt: Format, h: Array, first: int = 0, stored: str = ""
) -> Parts:
    """One implementation's result, or with the name `arrays` that of NumPy."""
    stored = stored or dtype
    if name == "arrays":
        return parts_of(search_arrays(raw(x).data, dtype, stored, fmt, raw(h).data, first))
    native: Any = importlib.import_module("quantmill._native")
    groups = raw(x).size // DTYPE_BYTES[dtype] // fmt.group_size
    scale_bytes = groups * DTYPE_BYTES[fmt.scale_dtype(stored)]
    codes = np.full(groups * fmt.group_size * fmt.bits // 8, 0xA5, np.uint8)
    scales = np.full(scale_bytes, 0xA5, np.uint8)
    biases = np.full(scale_bytes if fmt.has_bias else 0, 0xA5, np.uint8)
    non_finite, _ = native.search(
        raw(x), dtype, stored, fmt.mode, fmt.bits, fmt.group_size, raw(h), first,
        codes, scales, biases, name,
    )  # fmt: skip
    return Parts(codes, scales, biases if fmt.has_bias else None, non_finite)


def importance(seed: int = 0) -> Array:
    """One number for each column: some of them 0, whole groups of 0 at both ends."""
    random = np.random.default_rng(seed)
    h = np.exp(random.normal(0, 1.5, COLUMNS)).astype(np.float32)
    h[random.random(COLUMNS) < 0.1] = 0
    h[:32], h[-128:] = 0, 0
    return h


def rows_of(name: str, dtype: str, fmt: Format, most: int = 128) -> Array:
    """Rows of a hard data set with no affine range that float32 does not hold."""
    rows = hard_data(name, dtype)
    rows = rows[:: -(-len(rows) // most)]
    if fmt.mode != "affine":
        return rows
    groups = rows.astype(np.float32).reshape(len(rows), -1, fmt.group_size)
    with np.errstate(over="ignore"):
        fits = np.isfinite(groups.max(axis=2) - groups.min(axis=2)).all(axis=1)
    found: Array = rows[fits]
    return found


def decoded(found: Parts, dtype: str, fmt: Format) -> Array:
    """What MLX's dequantize gives of scales in float32 [groups, group size]."""

    def array(part: Array, kind: str, width: int) -> mx.array:
        rows = part.view({"BF16": np.uint16, "U32": np.uint32, "U8": np.uint8}.get(kind)
                         or NUMPY[kind])  # fmt: skip
        made = mx.array(rows.reshape(-1, width))
        if kind in {"U32", "U8"}:
            return made
        return (made.view(mx.bfloat16) if kind == "BF16" else made).astype(mx.float32)

    scale = fmt.scale_dtype(dtype)
    width = max(fmt.group_size, 32)
    words = array(found.weight, "U32", width * fmt.bits // 32)
    scales = array(found.scales, scale, width // fmt.group_size)
    biases = None if found.biases is None else array(found.biases, scale, 1)
    kind: dict[str, Any] = {"group_size": fmt.group_size, "bits": fmt.bits, "mode": fmt.mode}
    with mx.stream(mx.cpu):
        values = mx.dequantize(words, scales, biases, **kind, dtype=mx.float32)
    return np.asarray(values).reshape(-1, fmt.group_size)


def errors(x: Array, found: Parts, dtype: str, fmt: Format, h: Array) -> Array:
    """Weighted errors of groups, in the order of docs/formats.md."""
    w = x.reshape(-1, fmt.group_size)
    weights = reference_search.importance_of_groups(h, 0, len(w), fmt.group_size)
    return reference_search.weighted_error(w, decoded(found, dtype, fmt), weights)


# -- the same bytes --------------------------------------------------------------------------------


@all_dtypes
@all_formats
def test_everyone_equals_the_description(dtype: str, fmt: Format) -> None:
    """On hard data every kernel, and NumPy in their place, does what docs/formats.md says."""
    different = []
    h = importance()
    for data in NAMES:
        x = rows_of(data, dtype, fmt)
        expected = reference_search.search(x, fmt.mode, fmt.bits, fmt.group_size, h, 128)
        for name in [*NATIVE, "arrays"]:
            found = by(name, x, dtype, fmt, h, 128)
            different += [(name, data, part) for part in differing(found, expected)]
    assert different == []


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("fmt", [INT4, INT8, Format("affine", 2, 128), NVFP4],
                         ids=lambda f: f.label)  # fmt: skip
def test_choosing_equals_the_description(stored: str, fmt: Format) -> None:
    """Parameters for float32 weights that are stored in another dtype."""
    random = np.random.default_rng(2)
    x = random.normal(0, 0.1, (67, fmt.group_size)).astype(np.float32)
    h = importance()[128 : 128 + fmt.group_size].copy()
    scales, biases = choose(x.data, fmt, h.data, stored)
    rows = x if fmt.group_size >= 32 else x[:66].reshape(-1, 32)
    expected = reference_search.search(
        rows, fmt.mode, fmt.bits, fmt.group_size, h, stored=stored if fmt.has_bias else None
    )
    kept = expected.scales.nbytes  # the reference takes nvfp4 in pairs of groups
    assert bytes(scales)[:kept] == expected.scales.tobytes()
    assert scales.nbytes == len(x) * DTYPE_BYTES[fmt.scale_dtype(stored)]
    assert (biases is None) == (expected.biases is None)
    for name in [*NATIVE, "arrays"]:
        found = by(name, x, "F32", fmt, h, stored=stored)
        assert found.scales.tobytes() == bytes(scales), name
        if expected.biases is not None and found.biases is not None:
            assert found.biases.tobytes() == expected.biases.tobytes(), name


@st.composite
def any_groups(draw: st.DrawFn) -> tuple[str, Format, Array, Array]:
    """Weights with exponents in a random window and importance of any size."""
    dtype, fmt = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(FORMATS))
    count = draw(st.sampled_from([2, 4, 16, 18, 32, 34, 70])) * fmt.group_size
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    powers = draw(st.sampled_from([(-6, -4), (-20, 3), (-140, -120), (-24, -10), (8, 15)]))
    values = random.normal(0, 1, count) * np.exp2(random.uniform(*powers, count))
    values = np.clip(values, -6e4, 6e4)
    spread = draw(st.sampled_from([0.0, 1.0, 5.0, 20.0]))
    h = np.exp(random.normal(0, spread, 3 * fmt.group_size)).astype(np.float32)
    h[random.random(h.size) < draw(st.sampled_from([0.0, 0.3, 0.95]))] = 0
    return dtype, fmt, values.astype(np.float32).astype(NUMPY[dtype]), h


@given(any_groups())
def test_no_group_gets_worse(case: tuple[str, Format, Array, Array]) -> None:
    """The weighted error of codes times scales is never above that of MLX's own codes."""
    dtype, fmt, x, h = case
    own = parts_of(quantize(raw(x).data, dtype, fmt))
    found = by(FASTEST, x, dtype, fmt, h)
    with np.errstate(invalid="ignore"):  # MLX's own may decode to infinity, where importance is 0
        before, after = (errors(x, parts, dtype, fmt, h) for parts in (own, found))
    assert ((after <= before) | np.isnan(before)).all()
    for a, b in zip(found[:3], own[:3], strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or a.shape == b.shape


@given(any_groups(), st.integers(-40, 40))
def test_importance_is_relative(case: tuple[str, Format, Array, Array], power: int) -> None:
    """A power of two times all importance changes nothing, nor does the implementation."""
    dtype, fmt, x, h = case
    expected = by("exact", x, dtype, fmt, h)
    with np.errstate(over="ignore"):
        scaled = np.ldexp(h, power)
    assume((np.ldexp(scaled, -power) == h).all())  # unless float32 does not hold it
    for name in NATIVE:
        assert differing(by(name, x, dtype, fmt, scaled), expected) == [], name


@given(
    st.sampled_from(FORMATS),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any),
    st.sampled_from(["normal", "zero groups", "tiny", "one-hot", "heavy tail"]),
)
def test_pieces_give_the_whole(fmt: Format, dtype: str, sizes: list[int], data: str) -> None:
    """Groups given in pieces, each with its first column, get what they get together."""
    groups = rows_of(data, dtype, fmt).reshape(-1, fmt.group_size)[: sum(sizes)]
    h, before, parts = importance(), 0, []
    for part in np.split(groups, np.cumsum(sizes)[:-1]):
        first = before * fmt.group_size % COLUMNS
        parts.append(parts_of(search(raw(part).data, dtype, fmt, h.data, first)))
        before += len(part)
    whole = parts_of(search(raw(groups).data, dtype, fmt, h.data))
    biases = [part.biases for part in parts if part.biases is not None]
    joined = Parts(
        np.concatenate([part.weight for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate(biases) if biases else None,
        0,
    )
    assert differing(joined, whole) == []


@given(any_groups(), st.data())
def test_any_kernel_in_any_pieces_gives_the_same(
    case: tuple[str, Format, Array, Array], data: st.DataObject
) -> None:
    """Cut between any two groups, each piece by another implementation: the bytes of the whole."""
    dtype, fmt, x, h = case
    groups = x.reshape(-1, fmt.group_size)
    whole = by("exact", x, dtype, fmt, h)
    cut = data.draw(st.integers(0, len(groups)))
    names = data.draw(st.permutations([*NATIVE, "arrays"]))[:2]
    pieces = [
        by(name, part.reshape(-1), dtype, fmt, h, first)
        for name, part, first in (
            (names[0], groups[:cut], 0),
            (names[1], groups[cut:], cut * fmt.group_size % h.size),
        )
        if len(part)
    ]
    for index in range(3):
        parts = [piece[index] for piece in pieces]
        if parts[0] is not None:
            joined = b"".join(np.asarray(part).tobytes() for part in parts)
            assert joined == np.asarray(whole[index]).tobytes()


def test_threads_share_nothing() -> None:
    """Eight threads at once get what one gets, from every kernel."""
    x, h = rows_of("normal", "BF16", INT4), importance()
    with ThreadPoolExecutor(8) as pool:
        for name in NATIVE:
            alone = by(name, x, "BF16", INT4, h)
            for found in pool.map(lambda _, n=name: by(n, x, "BF16", INT4, h), range(16)):
                assert differing(found, alone) == []


# -- what it is for --------------------------------------------------------------------------------


@all_dtypes
@all_formats
def test_the_error_falls(dtype: str, fmt: Format) -> None:
    """On weights like a model's the weighted error is well below that of rounding to nearest."""
    random = np.random.default_rng(1)
    x = random.normal(0, 0.02, (64, COLUMNS)).astype(np.float32).astype(NUMPY[dtype])
    h = np.exp(random.normal(0, 1, COLUMNS)).astype(np.float32)
    own = parts_of(quantize(raw(x).data, dtype, fmt))
    found = parts_of(search(raw(x).data, dtype, fmt, h.data))
    ratio = errors(x, found, dtype, fmt, h).sum() / errors(x, own, dtype, fmt, h).sum()
    if fmt == MXFP8:
        assert differing(found, own) == []
    else:
        assert ratio < (0.97 if fmt == MXFP4 else 0.85)


def test_no_importance_counts_all_weights_alike() -> None:
    """A group without importance gets what importance 1 everywhere gives it."""
    for fmt in FORMATS:
        x = rows_of("normal", "BF16", fmt)
        nothing, one = (np.full(128, value, np.float32) for value in (0, 1))
        found = by(FASTEST, x, "BF16", fmt, nothing)
        assert differing(found, by(FASTEST, x, "BF16", fmt, one)) == []


@all_dtypes
@all_formats
def test_groups_that_are_not_finite_stay_as_they_are(dtype: str, fmt: Format) -> None:
    """NaN and infinities are counted, and their groups get MLX's bytes; others are searched."""
    x = rows_of("normal", dtype, fmt)[:5].copy().reshape(-1, fmt.group_size)
    clean = x.copy()
    bad = [0, 2, len(x) - 1]
    for row, value in zip(bad, (np.nan, np.inf, -np.inf), strict=True):
        x[row, 5:7] = np.array(value).astype(NUMPY[dtype])
    h = importance()
    own = parts_of(quantize(raw(x).data, dtype, fmt))
    expected = by("exact", clean, dtype, fmt, h)
    for name in [*NATIVE, "arrays"]:
        found = by(name, x, dtype, fmt, h)
        assert found.non_finite == own.non_finite == 6
        for part, plain, other in zip(found[:3], own[:3], expected[:3], strict=True):
            if part is None or plain is None or other is None:
                continue
            wanted = other.copy().reshape(len(x), -1)
            wanted[bad] = plain.reshape(len(x), -1)[bad]
            assert part.tobytes() == wanted.tobytes(), name


@affine_formats
def test_equal_weights_stay_as_they_are(fmt: Format) -> None:
    """Groups whose weights are all equal have nothing to gain."""
    x = np.repeat(np.array([0.0, 3.0, -0.1, 1e-30], ml_dtypes.bfloat16), fmt.group_size)
    own = parts_of(quantize(raw(x).data, "BF16", fmt))
    h = np.ones(fmt.group_size, np.float32)
    for name in [*NATIVE, "arrays"]:
        assert differing(by(name, x, "BF16", fmt, h), own) == [], name


# -- choosing and refusing -------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [INT4, INT8, NVFP4, MXFP4, MXFP8], ids=lambda f: f.label)
def test_without_the_extension_numpy_does_the_work(
    fmt: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QUANTMILL_KERNELS=mlx gives the same bytes."""
    x, h = rows_of("small normal", "BF16", fmt), importance()
    usual = parts_of(search(raw(x).data, "BF16", fmt, h.data))
    rows = x[:, : fmt.group_size].astype(np.float32).copy()
    chosen = choose(rows.data, fmt, h[: fmt.group_size].data, "BF16")
    kernels._chosen.cache_clear()
    monkeypatch.setenv(kernels.VARIABLE, kernels.MLX)
    try:
        assert differing(parts_of(search(raw(x).data, "BF16", fmt, h.data)), usual) == []
        again = choose(rows.data, fmt, h[: fmt.group_size].data, "BF16")
        assert [None if a is None else bytes(a) for a in again] == [
            None if a is None else bytes(a) for a in chosen
        ]
    finally:
        monkeypatch.undo()
        kernels._chosen.cache_clear()


def test_no_weights_become_nothing() -> None:
    """An empty piece has empty results."""
    h = np.ones(64, np.float32)
    found = search(memoryview(b""), "BF16", INT4, h.data)
    assert (found.weight.nbytes, found.scales.nbytes, found.non_finite) == (0, 0, 0)
    assert found.biases is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F64"}, "F64"),
        ({"raw": memoryview(bytes(130))}, "whole groups"),
        ({"fmt": Format("affine", 7, 64)}, "no format"),
        ({"importance": np.ones(65, np.float32).data}, "whole groups"),
        ({"importance": memoryview(b"")}, "whole groups"),
        ({"importance": np.full(64, -1, np.float32).data}, "negative"),
        ({"importance": np.full(64, np.nan, np.float32).data}, "finite"),
        ({"first": 32}, "begins at 32"),
        ({"first": 64}, "begins at 64"),
    ],
)
def test_calls_that_do_not_fit_raise(change: dict[str, Any], message: str) -> None:
    """What makes no sense is refused before anything is computed."""
    call: dict[str, Any] = {
        "raw": memoryview(bytes(128)), "dtype": "BF16", "fmt": INT4,
        "importance": np.ones(64, np.float32).data, "first": 0,
    }  # fmt: skip
    search(**call)
    with pytest.raises(BadRequest, match=message):
        search(**call | change)


def test_scales_of_no_float_dtype_are_refused() -> None:
    """Parameters can be chosen for the dtypes that weights have."""
    with pytest.raises(BadRequest, match="U8"):
        choose(memoryview(bytes(256)), INT4, np.ones(64, np.float32).data, "U8")


@pytest.mark.parametrize("name", ["native", "arrays"])
def test_weights_that_are_too_large_are_refused(name: str) -> None:
    """Finite weights with an infinite scale, in their own dtype or the stored one."""
    h = np.ones(64, np.float32)
    x = np.ones(64, np.float32)
    x[1], x[2] = 3e38, -3e38

    def run(stored: str) -> object:
        if name == "native":
            return choose(x.data, INT4, h.data, stored)
        return search_arrays(raw(x).data, "F32", stored, INT4, raw(h).data, 0)

    with pytest.raises(BadWeights, match="too large"):
        run("F32")
    x[1], x[2] = 3e6, -3e6
    run("BF16")
    with pytest.raises(BadWeights, match="too large"):
        run("F16")
