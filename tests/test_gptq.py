"""Error feedback: what MLX decodes from it, and that it loses less of what inputs see."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from quantmill.errors import BadRequest
from quantmill.formats import Format, parse_format
from quantmill.gptq import prepare, quantize_with_feedback
from quantmill.quantize import quantize

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
