"""Error feedback: what MLX decodes from it, and that it loses less of what inputs see."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from quantmill import kernels
from quantmill.decode import Packed, decode, decode_float32
from quantmill.elements import to_float32
from quantmill.errors import BadRequest
from quantmill.feedbackarrays import Place, Tiles
from quantmill.formats import Format, parse_format
from quantmill.gptq import prepare, quantize_with_feedback
from quantmill.quantize import quantize
from quantmill.searching import choose, search

Array = npt.NDArray[np.float32]
FORMATS = ["int4", "int8", "affine-3", "affine-6", "nvfp4", "mxfp4", "mxfp8"]
ROWS, COLUMNS = 24, 256


def rtn(group: Array, fmt: Format, _: Array, dtype: str) -> tuple[Any, Any]:
    """MLX's own scales and biases for a group."""
    assert dtype == "F32"
    found = quantize(memoryview(np.ascontiguousarray(group).tobytes()), dtype, fmt)
    kind = np.float32 if fmt.has_bias else np.uint8
    biases = None if found.biases is None else np.frombuffer(found.biases, np.float32)
    return np.frombuffer(found.scales, kind), biases


def decoded(found: Any, fmt: Format) -> Array:
    """What MLX makes of codes, scales and biases."""
    kind = np.float32 if fmt.has_bias else np.uint8
    codes = mx.array(np.frombuffer(found.weight, np.uint32).reshape(ROWS, -1))
    scales = mx.array(np.frombuffer(found.scales, kind).reshape(ROWS, -1))
    biases = None
    if found.biases is not None:
        biases = mx.array(np.frombuffer(found.biases, np.float32).reshape(ROWS, -1))
    values = mx.dequantize(
        codes, scales, biases, group_size=fmt.group_size, bits=fmt.bits, mode=fmt.mode,
        dtype=mx.float32,
    )  # fmt: skip
    return np.array(values)


def weights(seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(0, 0.05, (ROWS, COLUMNS)).astype(np.float32)


def inputs(seed: int = 1) -> npt.NDArray[np.float64]:
    """Inputs whose columns go together, as activations do."""
    chance = np.random.default_rng(seed)
    hidden = chance.normal(0, 1, (2000, 40))
    mixed = hidden @ chance.normal(0, 1, (40, COLUMNS)) + chance.normal(0, 0.3, (2000, COLUMNS))
    return np.asarray(mixed * np.exp(chance.normal(0, 1, COLUMNS)), np.float64)


@pytest.mark.parametrize("word", FORMATS)
def test_without_correlation_it_is_rounding(word: str) -> None:
    """Where no column says anything of another there is nothing to make up for."""
    fmt, w = parse_format(word), weights()
    found = quantize_with_feedback(w, fmt, "F32", prepare(np.eye(COLUMNS)), rtn)
    plain = quantize(memoryview(w.tobytes()), "F32", fmt)
    assert bytes(found.scales) == bytes(plain.scales)
    np.testing.assert_array_equal(decoded(found, fmt), decoded(plain, fmt))


@pytest.mark.parametrize("word", FORMATS)
def test_outputs_are_nearer_than_by_rounding(word: str) -> None:
    """The error of the layer's outputs shrinks, though that of the weights may grow."""
    fmt, w, x = parse_format(word), weights(), inputs()
    found = quantize_with_feedback(w, fmt, "F32", prepare(x.T @ x), rtn)
    plain = decoded(quantize(memoryview(w.tobytes()), "F32", fmt), fmt)
    lost, lost_by_rounding = (
        float(np.sum(((values - w).astype(np.float64) @ x.T) ** 2))
        for values in (decoded(found, fmt), plain)
    )
    assert lost < 0.6 * lost_by_rounding


@pytest.mark.parametrize("word", FORMATS)
def test_outputs_are_nearer_than_by_search(word: str) -> None:
    """The same inputs' diagonal alone, which the search weighs columns by, gives more error."""
    fmt, w, x = parse_format(word), weights(), inputs()
    gram = x.T @ x
    found = decoded(quantize_with_feedback(w, fmt, "F32", prepare(gram), searched), fmt)
    diagonal = memoryview(np.diag(gram).astype(np.float32).tobytes())
    aware = decoded(search(memoryview(w.tobytes()), "F32", fmt, diagonal), fmt)
    lost, lost_by_search = (
        float(np.einsum("ij,jk,ik->", off, gram, off, optimize=True))
        for off in (found - w.astype(np.float64), aware - w.astype(np.float64))
    )
    assert lost < 0.8 * lost_by_search


def test_what_counts_most_is_rounded_first() -> None:
    """Groups by what their columns count together, their columns by what each counts."""
    diagonal = np.random.default_rng(4).permutation(np.repeat(np.arange(0.0, 64), 4))
    feedback = prepare(np.diag(diagonal))
    for size in (16, 32, 64, 128):
        order = feedback.way(size).order.reshape(-1, size)
        assert np.all(order // size == order[:, :1] // size)
        assert np.all(np.diff(diagonal[order], axis=1) <= 0)
        assert np.all(np.diff(diagonal[order].sum(axis=1)) <= 0)
        same = np.diff(diagonal[order], axis=1) == 0
        assert np.all(np.diff(order, axis=1)[same] > 0)


def test_columns_that_nothing_enters_change_nothing() -> None:
    """Inputs that are always 0 neither fail nor disturb the other columns."""
    fmt, w, x = parse_format("int4"), weights(), inputs()
    x[:, 10:20] = 0
    found = decoded(quantize_with_feedback(w, fmt, "F32", prepare(x.T @ x), rtn), fmt)
    assert np.all(np.isfinite(found))
    assert float(np.max(np.abs(found - w))) < 0.1


def test_equal_input_gives_equal_bytes() -> None:
    """Nothing is drawn by chance."""
    fmt, w, x = parse_format("int4"), weights(), inputs()
    one, two = (quantize_with_feedback(w, fmt, "F32", prepare(x.T @ x), rtn) for _ in range(2))
    assert bytes(one.weight) == bytes(two.weight)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_not_finite_are_told(bad: float) -> None:
    """One error and not a model of NaN."""
    gram = np.eye(4)
    gram[1, 2] = bad
    with pytest.raises(BadRequest, match="not finite"):
        prepare(gram)
    with pytest.raises(BadRequest, match="not finite"):
        prepare(-np.eye(4))


# -- exactness -------------------------------------------------------------------------------------


def searched(group: Array, fmt: Format, importance: Array, dtype: str) -> tuple[Any, Any]:
    """The search's scales and biases."""
    raw = memoryview(np.ascontiguousarray(group).tobytes())
    scales, biases = choose(raw, fmt, memoryview(importance.tobytes()), dtype)
    return np.asarray(scales), None if biases is None else np.asarray(biases)


KINDS = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


def stored_arrays(found: Any, fmt: Format, dtype: str, rows: int) -> tuple[Any, Any, Any]:
    """Codes in words, scales and biases, a row each."""
    kind = KINDS[dtype] if fmt.has_bias else np.uint8
    parts = (found.weight, np.uint32), (found.scales, kind), (found.biases, kind)
    codes, scales, biases = (
        None if raw is None else np.frombuffer(raw, as_).reshape(rows, -1) for raw, as_ in parts
    )
    return codes, scales, biases


def values_of(found: Any, fmt: Format, dtype: str, rows: int) -> Array:
    """What decode.py makes of it, scales taken as float32; MLX says the same."""
    codes, scales, biases = stored_arrays(found, fmt, dtype, rows)
    if fmt.has_bias:
        scales, biases = (
            to_float32(part.reshape(-1).view(np.uint8), dtype).reshape(part.shape)
            for part in (scales, biases)
        )
    own = decode_float32(Packed(codes, scales, biases, None, False, ["F32", "F32"]), fmt)
    assert own is not None
    more = mx.array(biases) if fmt.has_bias else None
    with mx.stream(mx.cpu):
        theirs = mx.dequantize(
            mx.array(codes), mx.array(scales), more, fmt.group_size, fmt.bits, mode=fmt.mode,
            dtype=mx.float32,
        )  # fmt: skip
    np.testing.assert_array_equal(own, np.array(theirs))
    return own


def unpacked(found: Any, fmt: Format, rows: int) -> npt.NDArray[np.uint8]:
    bits = np.unpackbits(np.frombuffer(found.weight, np.uint8), bitorder="little")
    codes = np.packbits(bits.reshape(rows, -1, fmt.bits), axis=2, bitorder="little")
    return codes[..., 0]


def expected_codes(x: Array, scale: Array, bias: Array, fmt: Format) -> Any:
    """docs/formats.md, Error feedback, for one column."""
    with np.errstate(all="ignore"):
        inverse = np.float32(1) / scale
        if fmt.has_bias:
            step = np.nan_to_num((x - bias) * inverse, posinf=np.inf, neginf=-np.inf)
            return np.rint(np.clip(step, 0, 2**fmt.bits - 1)).astype(np.uint8)
        size = np.where(scale == 0, 0, np.nan_to_num(np.abs(x) * inverse))
    largest, kind = (
        (448, ml_dtypes.float8_e4m3fn) if fmt.bits == 8 else (6, ml_dtypes.float4_e2m1fn)
    )
    code = np.minimum(size, largest).astype(np.float32).astype(kind).view(np.uint8)
    return np.where((code > 0) & np.signbit(x), code | (1 << (fmt.bits - 1)), code)


def hard_weights(kind: str, bits: int) -> Array:
    """Rows that something is odd about."""
    chance = np.random.default_rng(7)
    w = weights(3)
    if kind == "zeros":
        w[:8], w[8:16, 64:192] = 0, 0
    elif kind == "constants":
        w[:] = chance.normal(0, 1, (ROWS, 1))
        w[3] = -0.0
    elif kind == "huge":
        w *= np.float32(1e36)
    elif kind == "tiny":
        # what MXFP8 decodes to has a limit: BF16's least number is 2^-133
        w *= np.float32(1e-33 if bits == 8 else 1e-41)
    elif kind == "outliers":
        w[:, ::37] *= 1000
    return w


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("word", [*FORMATS, "affine-2", "affine-5"])
@pytest.mark.parametrize(
    "kind", ["plain", "zeros", "constants", "huge", "tiny", "outliers", "dead"]
)
def test_what_is_carried_on_is_what_decoding_gives(word: str, dtype: str, kind: str) -> None:
    """Codes and scales follow from decoded values alone, in the order that the page fixes."""
    fmt, x = parse_format(word), inputs()
    w = hard_weights(kind, fmt.bits)
    if kind == "huge" and dtype == "F16" and fmt.has_bias:
        return  # no such scale
    if kind == "dead":
        x[:, 10:20], x[:, 64:128] = 0, 0
    feedback = prepare(x.T @ x)
    found = quantize_with_feedback(w, fmt, dtype, feedback, searched)
    values, codes = values_of(found, fmt, dtype, ROWS), unpacked(found, fmt, ROWS)
    _, scales, biases = stored_arrays(found, fmt, dtype, ROWS)
    way, size = feedback.way(fmt.group_size), fmt.group_size
    current = w[:, way.order]
    for place, column in enumerate(way.order):
        scale, bias = parameters(scales, biases, column // size, fmt, dtype)
        if place % size == 0:
            inside, counts = current[:, place:][:, :size], way.importance[place:][:size]
            expected = parameters(*searched(inside, fmt, counts, dtype), 0, fmt, dtype)
            np.testing.assert_array_equal([scale, bias], expected)
        np.testing.assert_array_equal(
            codes[:, column], expected_codes(current[:, place], scale, bias, fmt)
        )
        error = w[:, column] - values[:, column]
        current[:, place + 1 :] += error[:, None] * way.factors[place, place + 1 :]
    assert np.all(np.isfinite(values))
    if fmt.bits < 8 and not fmt.has_bias:
        assert not np.any(codes == 8)  # no -0


def parameters(
    scales: Any, biases: Any, group: int, fmt: Format, dtype: str
) -> tuple[Array, Array]:
    """A group's scales and biases as numbers."""

    def some(part: Any, kind: Any) -> Any:
        rows = np.ascontiguousarray(part).reshape(-1).view(kind).reshape(ROWS, -1)
        return np.ascontiguousarray(rows[:, group])

    if fmt.has_bias:
        scale, bias = (
            to_float32(some(part, KINDS[dtype]).view(np.uint8), dtype) for part in (scales, biases)
        )
        return scale, bias
    byte = some(scales, np.uint8)
    kind = ml_dtypes.float8_e4m3fn if fmt.mode == "nvfp4" else ml_dtypes.float8_e8m0fnu
    return byte.view(kind).astype(np.float32), np.zeros(len(byte), np.float32)


@pytest.mark.parametrize("word", FORMATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_spoil_their_group_alone(word: str, bad: float) -> None:
    """They are counted, and every other row and group is what it was, or as good."""
    fmt, w, x = parse_format(word), weights(), inputs()
    feedback = prepare(x.T @ x)
    clean = quantize_with_feedback(w, fmt, "BF16", feedback, searched)
    w[5, 70], w[5, 71] = bad, bad
    found = quantize_with_feedback(w, fmt, "BF16", feedback, searched)
    assert (clean.non_finite, found.non_finite) == (0, 2)
    values, before = (values_of_any(one, fmt) for one in (found, clean))
    others = np.arange(ROWS) != 5
    np.testing.assert_array_equal(values[others], before[others])
    group = 70 // fmt.group_size
    groups = feedback.way(fmt.group_size).order[:: fmt.group_size] // fmt.group_size
    at = int(np.flatnonzero(groups == group)[0])
    by_group, was, own = (array[5].reshape(-1, fmt.group_size) for array in (values, before, w))
    np.testing.assert_array_equal(by_group[groups[:at]], was[groups[:at]])
    after = groups[at + 1 :]
    assert np.all(np.isfinite(by_group[after]))
    assert float(np.max(np.abs(by_group[after] - own[after]), initial=0)) < 0.5


def values_of_any(found: Any, fmt: Format) -> Array:
    """As decode.py has them, NaN or not."""
    codes, scales, biases = stored_arrays(found, fmt, "BF16", ROWS)
    got = decode(Packed(codes, scales, biases, None, False, ["BF16", "BF16"]), fmt)
    assert got is not None
    raw = np.ascontiguousarray(got.array).reshape(-1).view(np.uint8)
    return to_float32(raw, "BF16").reshape(ROWS, -1)


@pytest.mark.parametrize("word", ["int4", "nvfp4", "mxfp8"])
def test_rows_are_independent(word: str) -> None:
    """However a matrix is cut, and by however many threads it is made, its bytes are the same."""
    fmt, x = parse_format(word), inputs()
    w = np.random.default_rng(2).normal(0, 0.05, (2100, COLUMNS)).astype(np.float32)
    feedback = prepare(x.T @ x)
    whole = quantize_with_feedback(w, fmt, "BF16", feedback, searched)
    threaded = quantize_with_feedback(w, fmt, "BF16", feedback, searched, threads=3)
    assert bytes(whole.weight) == bytes(threaded.weight)
    assert bytes(whole.scales) == bytes(threaded.scales)
    cuts = [0, 1, 64, 1000, 1024, 1100, 2100]
    parts = [
        quantize_with_feedback(w[start:end], fmt, "BF16", feedback, searched)
        for start, end in itertools.pairwise(cuts)
    ]
    assert bytes(whole.weight) == b"".join(bytes(part.weight) for part in parts)
    assert bytes(whole.scales) == b"".join(bytes(part.scales) for part in parts)


# -- kernels ---------------------------------------------------------------------------------------

NATIVE = [k.name for k in kernels.list_kernels() if k.supported]


def hard_tiles(fmt: Format, seed: int) -> tuple[Tiles, Array, Array, Array]:
    """Tiles of odd numbers with scales, biases and factors that need not belong to them."""
    chance = np.random.default_rng(seed)
    w = chance.normal(0, 0.05, (130, 256)).astype(np.float32)
    w[:, ::7] *= np.float32(1e3)
    w[3:9, 100:140], w[9, 40:90] = 0, -0.0
    w[0, 5], w[1, 70], w[2, 130], w[64, 0] = np.nan, np.inf, -np.inf, 3e38
    w[70:74] = np.ldexp(w[70:74], -130)
    scale = np.exp(chance.normal(-4, 3, 130)).astype(np.float32)
    bias = chance.normal(0, 0.2, 130).astype(np.float32)
    scale[:6] = 0, np.nan, np.inf, 1e-42, 1e38, 2e-45
    if fmt.has_bias:
        scale[6:40] *= -1
        bias[40:43] = np.nan, np.inf, -np.inf
    factors = chance.normal(0, 0.3, (256, 256)).astype(np.float32)
    factors[5], factors[20, 25:40] = 1e38, 0
    return Tiles.of(w, fmt), scale, bias, factors


def ran(name: str, fmt: Format, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """One implementation's codes, errors and current weights after two groups."""
    monkeypatch.setenv(kernels.VARIABLE, name)
    tiles, scale, bias, factors = hard_tiles(fmt, fmt.bits)
    size = fmt.group_size
    places = np.random.default_rng(3).permutation(size).astype(np.uint8)
    tiles.round(Place(0, 256 - size, places), scale, bias, factors)
    tiles.carry((0, size), (size, 256), factors)
    tiles.round(Place(size, 0, places), scale[::-1].copy(), bias, factors)
    tiles.carry((0, 2 * size), (2 * size, 256), factors)
    # one NaN: its sign and bits depend on the processor
    arrays = [np.where(np.isnan(a), np.float32(7), a) for a in (tiles.errors, tiles.current)]
    return [tiles.codes.tobytes(), *(array.tobytes() for array in arrays)]


@pytest.mark.parametrize("word", [*FORMATS, "affine-2", "affine-5"])
def test_every_kernel_gives_the_same_bytes(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """NumPy's form included, for numbers that no search would give as well."""
    fmt = parse_format(word)
    expected = ran(kernels.MLX, fmt, monkeypatch)
    for name in NATIVE:
        found = ran(name, fmt, monkeypatch)
        assert [a == b for a, b in zip(found, expected, strict=True)] == [True] * 3, name


def test_kernels_refuse_arrays_that_do_not_fit() -> None:
    """No memory but the arrays' own is touched."""
    fmt = parse_format("int4")
    tiles, scale, bias, factors = hard_tiles(fmt, 1)
    places = np.arange(64, dtype=np.uint8)
    wrong = [
        (Place(0, 0, places), factors[:, :128].copy(), "factors"),
        (Place(256, 0, places), factors, "no group"),
        (Place(0, 256, places), factors, "no group"),
        (Place(0, 0, places[:32]), factors, "wrong number of places"),
        (Place(0, 0, places + np.uint8(1)), factors, "no such place"),
    ]
    for place, given, what in wrong:
        with pytest.raises(ValueError, match=what):
            tiles.round(place, scale, bias, given)
    with pytest.raises(ValueError, match="no such columns"):
        tiles.carry((0, 64), (64, 272), factors)
    with pytest.raises(ValueError, match="multiple"):
        tiles.carry((0, 64), (64, 72), factors)


def test_shapes_that_do_not_fit_are_told() -> None:
    """Partial groups, or the Gram matrix of another layer."""
    with pytest.raises(BadRequest, match="do not fit"):
        quantize_with_feedback(weights(), parse_format("int4"), "F32", prepare(np.eye(64)), rtn)
    with pytest.raises(BadRequest, match="do not fit"):
        quantize_with_feedback(
            weights()[:, :96], parse_format("int4"), "F32", prepare(np.eye(96)), rtn
        )
