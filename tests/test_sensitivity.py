"""What quantizing one tensor does: measured in one format, in proportion to the error in others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from checkpoints import fixture
from quantmill import mlxlm
from quantmill.creation import create
from quantmill.errors import BadPlan
from quantmill.formats import Format
from quantmill.load import open_model
from quantmill.model import Model
from quantmill.plans import AWARE, RTN, Options, Override
from quantmill.store import Store
from quantmill.windows import random_tokens

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (quantmill[run])")

from quantmill.activations import second_moments
from quantmill.branches import divergences
from quantmill.sensitivity import Measuring, Sensitivity, Subject

WINDOWS = random_tokens(250, 2, 64, seed=4)
FORMATS = tuple(Format("affine", bits, group) for bits in (2, 3, 4, 8) for group in (32, 64))
UP = Subject(
    "model.layers.0.mlp.up_proj.weight", ("model.layers.0.mlp.up_proj.weight",), "BF16", FORMATS
)
DOWN = Subject(
    "model.layers.1.mlp.down_proj.weight", ("model.layers.1.mlp.down_proj.weight",), "BF16", FORMATS
)
HEAD = Subject("lm_head.weight", ("lm_head.weight",), "BF16", FORMATS)


def model() -> Model:
    return open_model(fixture("hf-llama-bf16"))


def measuring(method: str = AWARE) -> Measuring:
    moments = second_moments(model(), WINDOWS)
    return Measuring(model(), WINDOWS, [UP, DOWN, HEAD], moments, method=method)


def test_each_tensor_is_measured_alone_at_three_bits() -> None:
    """The divergence of the probe is that of the variant with this tensor changed."""
    one = measuring()
    found = one.sensitivities()
    for subject in (UP, DOWN, HEAD):
        assert subject.probe == Format("affine", 3, 64)
        change = one.change(subject, subject.matrices[0], subject.probe)
        (value,) = divergences(model(), WINDOWS, [{subject.matrices[0]: change}])
        assert found[subject.name].divergence == value > 0
        assert found[subject.name].cost(subject.probe) == pytest.approx(value)
        assert found[subject.name].cost(None) == 0


def test_more_bits_and_smaller_groups_cost_less() -> None:
    """Errors fall with the bits, for a search and for rounding; the search's are smaller."""
    searched = measuring().sensitivities()[UP.name].errors
    rounded = measuring(RTN).sensitivities()[UP.name].errors
    for errors in (searched, rounded):
        for group in (32, 64):
            by_bits = [errors[Format("affine", bits, group)] for bits in (2, 3, 4, 8)]
            assert by_bits == sorted(by_bits, reverse=True)
        assert errors[Format("affine", 4, 32)] < errors[Format("affine", 4, 64)]
    assert all(searched[fmt] <= rounded[fmt] for fmt in FORMATS)


def test_what_other_formats_cost_is_near_what_they_do() -> None:
    """The prediction from the error, beside the divergence measured in that format."""
    one = measuring()
    found = one.sensitivities()
    fmt = Format("affine", 4, 64)
    for subject in (UP, DOWN, HEAD):
        (value,) = one.divergences([{subject.name: fmt}])
        assert found[subject.name].cost(fmt) == pytest.approx(value, rel=0.35)


def test_the_same_numbers_in_one_pass_or_several() -> None:
    """Nothing depends on how many branches fit into memory."""
    assert measuring().sensitivities(most_bytes=1) == measuring().sensitivities()


def test_what_is_measured_is_what_create_stores(tmp_path: Path) -> None:
    """Rounded to nearest, decoded: the numbers of a stored model."""
    store, fmt = Store(tmp_path), Format("affine", 4, 64)
    options = Options((Override(UP.name, fmt),))
    create("m", fixture("hf-llama-bf16"), store=store, options=options)
    stored = open_model("m", store=store)
    parts = stored.parts(UP.name)
    assert parts.scales is not None
    assert parts.biases is not None
    expected: Any = mx.dequantize(
        parts.weight, parts.scales.astype(mx.float32), parts.biases.astype(mx.float32), 64, 4
    )
    plain = mx.array(model().dequantize(UP.name)).astype(mx.float32)
    found = measuring(RTN).change(UP, UP.matrices[0], fmt)(plain)
    np.testing.assert_array_equal(np.array(found), np.array(expected))


def test_experts_are_one_tensor() -> None:
    """A stack is quantized whole, each expert with what its own tokens say."""
    opened = open_model(fixture("hf-qwen3-moe-bf16"))
    matrix = "model.layers.0.mlp.switch_mlp.down_proj.weight"
    assert len(mlxlm.stored_names(opened)[matrix]) == 4
    subject = Subject("stack", (matrix,), "BF16", FORMATS)
    moments = second_moments(opened, WINDOWS)
    found = Measuring(opened, WINDOWS, [subject], moments).sensitivities()["stack"]
    assert found.divergence > 0
    assert found.errors[Format("affine", 8, 32)] < found.errors[Format("affine", 2, 64)]


def test_a_tensor_without_an_error_costs_nothing() -> None:
    """Zeros, say: no division by no error."""
    probe = Format("affine", 3, 64)
    assert Sensitivity(probe, 1e-9, dict.fromkeys(FORMATS, 0.0)).cost(FORMATS[0]) == 0


def test_a_tensor_that_fits_no_group_is_refused() -> None:
    """It could not be quantized at all."""
    with pytest.raises(BadPlan, match="no format"):
        _ = Subject("a", ("a",), "BF16", ()).probe
