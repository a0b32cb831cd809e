"""Errors of weights against a formula written down once more, for every kind of open weights."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from checkpoints import FIXTURES, SMALL, fixture, write_checkpoint
from quantmill import kernels, provenance
from quantmill.creation import create
from quantmill.errors import NotFound
from quantmill.load import open_model
from quantmill.names import parse_name
from quantmill.openweights import SourceWeights, open_weights, to_numbers
from quantmill.store import Store
from quantmill.weighterrors import RUN_ELEMENTS, WeightError, error_of, weight_errors
from test_adapters import peft_pair, write_peft

QUERY = "model.layers.0.self_attn.q_proj.weight"
EXPERTS = {
    f"model.layers.0.mlp.experts.{n}.{p}_proj.weight": ("BF16", (128, 64 if p == "down" else 128))
    for n in range(3)
    for p in ("gate", "up", "down")
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", SMALL | EXPERTS)


def cut(values: npt.NDArray[Any], *sizes: int) -> Iterator[npt.NDArray[Any]]:
    """The values in pieces of the sizes given, and the rest."""
    at = 0
    for size in sizes:
        yield values[at : at + size]
        at += size
    yield values[at:]


def expected(ours: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> tuple[float, float, float]:
    """Relative squared error, largest error and cosine, by the definitions."""
    w, v = theirs.astype(np.float64).ravel(), ours.astype(np.float64).ravel()
    relative = float(((w - v) ** 2).sum() / (w**2).sum())
    return relative, float(np.abs(w - v).max()), float(w @ v / np.sqrt((w @ w) * (v @ v)))


@pytest.mark.parametrize("name", ["int4", "nvfp4", "mxfp8", "affine-3"])
def test_errors_are_those_of_the_definition(store: Store, source: Path, name: str) -> None:
    """Every weight of a model against its source: what NumPy says of MLX's own arrays."""
    create("m", source, store=store, quantize=name)
    found = weight_errors("m", source, store=store)
    assert (found.only_model, found.only_reference) == ((), ())
    originals = mx.load(str(source / "model.safetensors"))
    assert isinstance(originals, dict)
    checked = 0
    with open_model("m", store=store) as model:
        assert [one.name for one in found.compared] == list(model)
        for one in found.compared:
            if one.name not in originals:
                continue  # a stack of experts
            ours = np.array(model.dequantize(one.name).astype(mx.float32))
            theirs = np.array(originals[one.name].astype(mx.float32))
            assert one.error is not None
            assert one.error.weights == theirs.size
            told = (one.error.relative, one.error.largest, one.error.cosine)
            assert told == pytest.approx(expected(ours, theirs), rel=1e-12)
            checked += one.error.relative != 0.0
    assert checked == 2


def test_stacked_experts_meet_those_they_were_made_of(store: Store, source: Path) -> None:
    """Experts of a source are compared in the stack that they become, expert by expert."""
    create("m", source, store=store, quantize="int4")
    compared = {one.name: one.error for one in weight_errors("m", source, store=store).compared}
    error = compared["model.layers.0.mlp.experts.up_proj.weight"]
    assert error is not None
    originals = mx.load(str(source / "model.safetensors"))
    assert isinstance(originals, dict)
    names = [f"model.layers.0.mlp.experts.{n}.up_proj.weight" for n in range(3)]
    theirs = np.stack([np.array(originals[name].astype(mx.float32)) for name in names])
    with open_model("m", store=store) as model:
        stack = model.dequantize("model.layers.0.mlp.experts.up_proj.weight")
    ours = np.array(stack.astype(mx.float32))
    told = (error.relative, error.largest, error.cosine)
    assert told == pytest.approx(expected(ours, theirs), rel=1e-12)


def test_without_kernels_the_errors_are_the_same(
    store: Store, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX decodes the same numbers, so that not a bit of an error differs."""
    create("m", source, store=store, quantize="int4")
    found = weight_errors("m", source, store=store)
    monkeypatch.setattr(kernels, "dequantize", lambda *_: None)
    assert weight_errors("m", source, store=store) == found


def test_pieces_do_not_change_the_result() -> None:
    """However the two sides are cut, the sums are the same to the last bit."""
    generator = np.random.default_rng(1)
    size = 3 * RUN_ELEMENTS + 17
    ours, theirs = (generator.normal(size=size).astype(np.float32) for _ in range(2))
    whole = error_of(cut(ours), cut(theirs))
    assert whole == error_of(cut(ours, 5, RUN_ELEMENTS, 1, 0), cut(theirs, 2 * RUN_ELEMENTS, 9))
    told = (whole.relative, whole.largest, whole.cosine)
    assert told == pytest.approx(expected(ours, theirs), rel=1e-9)


def test_a_source_is_equal_to_what_keeps_it(store: Store, source: Path) -> None:
    """A model at source precision has no error anywhere, and says that the bits are the same."""
    create("m", source, store=store)
    found = weight_errors("m", source, store=store)
    assert all(one.error is not None and one.error.identical for one in found.compared)
    assert found.relative == 0.0
    assert {one.error.cosine for one in found.compared if one.error} == {1.0}


def test_what_lies_in_the_same_blobs_is_not_read(
    store: Store, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two names of one model are equal by their digests."""
    create("a", source, store=store, quantize="int4")
    create("b", source, store=store, quantize="int4")
    with open_weights("a", store) as one, open_weights("b", store) as other:
        for side in (one, other):
            monkeypatch.setattr(side, "pieces", pytest.fail)
        found = weight_errors(one, other)
    assert all(one.same_bytes for one in found.compared)


def test_weights_of_one_side_are_listed(store: Store, source: Path, tmp_path: Path) -> None:
    """Names that the other side lacks, and shapes that differ, have no error."""
    create("m", source, store=store)
    odd = {"model.layers.0.mlp.down_proj.weight": ("BF16", (64, 128)), "new": ("F32", (3,))}
    other = write_checkpoint(tmp_path / "other", odd)
    found = weight_errors("m", other, store=store)
    assert found.only_reference == ("new",)
    assert QUERY in found.only_model
    assert [(one.name, one.error) for one in found.compared] == [(next(iter(odd)), None)]
    assert found.relative is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_have_no_error(value: float) -> None:
    """NaN and infinities give no number where there is none, and no warning."""
    ours, theirs = np.ones(4, np.float32), np.array([1, value, 1, 1], np.float32)
    error = error_of(cut(ours), cut(theirs))
    assert (error.relative, error.cosine) == (None, None)
    assert not math.isfinite(error.largest)


def test_a_reference_of_zeros_has_no_relative_error() -> None:
    """Nothing can be divided by its norm; equal zeros are equal."""
    zeros, ones = np.zeros(3, np.float32), np.ones(3, np.float32)
    assert error_of(cut(ones), cut(zeros)).relative is None
    assert error_of(cut(zeros), cut(zeros)).relative == 0.0
    assert error_of(cut(zeros), cut(-zeros)).identical is False
    assert error_of(cut(zeros[:0]), cut(zeros[:0])) == WeightError(0, 0, 0, 0, 0, 0, True)


def test_integers_do_not_count_for_the_whole_model(store: Store, tmp_path: Path) -> None:
    """Position ids are compared, but are no weights: their squares would drown all others."""
    source = write_checkpoint(tmp_path / "s", SMALL | {"position_ids": ("I64", (4,))})
    create("m", source, store=store, quantize="int4")
    found = weight_errors("m", source, store=store)
    (ids,) = [one.error for one in found.compared if one.name == "position_ids"]
    assert ids is not None
    assert (ids.floats, ids.identical) == (False, True)


def test_a_quantized_directory_is_decoded(store: Store, tmp_path: Path) -> None:
    """mlx-lm's own directory of a model has its numbers, whatever its tensors are called."""
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (quantmill[run])")
    from quantmill.export import export

    create("m", fixture("hf-llama-bf16"), store=store, quantize="int4")
    with open_model("m", store=store) as model:
        assert model.quantization
        export(model, tmp_path / "out", "mlx-lm")
    found = weight_errors("m", tmp_path / "out", store=store)
    assert (found.only_model, found.only_reference, found.relative) == ((), (), 0.0)


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.iterdir()))
def test_every_source_has_the_names_of_its_model(store: Store, name: str) -> None:
    """Whatever producer, a source and the model made of it are compared weight by weight.

    Where create decodes codes to another dtype, or recodes them, it rounds; nothing else is lost.
    """
    create("m", fixture(name), store=store)
    found = weight_errors("m", fixture(name), store=store)
    assert (found.only_model, found.only_reference) == ((), ())
    errors = [one.error for one in found.compared]
    assert all(error is not None for error in errors)
    exact = not name.startswith(("ct-fp8", "ct-int", "hf-deepseek"))
    assert found.relative == 0.0 if exact else 0.0 < (found.relative or 0) < 1e-3


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_draft_model_is_compared_too(store: Store, quantize: str | None) -> None:
    """Under the names it is stored with; without formats nothing of either changes."""
    base, draft = fixture("hf-llama-bf16"), fixture("hf-qwen3-tied-bf16")
    create("m", base, store=store, draft=draft, draft_quantize=quantize)
    recipe = provenance.recipes(store, store.get_manifest(parse_name("m")).digest)[0]
    with SourceWeights(recipe, store) as source:
        found = (
            weight_errors("m", source, store=store)
            if quantize
            else weight_errors(source, "m", store=store)
        )
    assert (found.only_model, found.only_reference) == ((), ())
    drafts = [one.error for one in found.compared if one.name.startswith("draft.")]
    others = [one.error for one in found.compared if not one.name.startswith("draft.")]
    assert drafts
    assert all(error is not None and error.identical for error in others)
    assert all(error is not None and error.identical for error in drafts) == (quantize is None)


def test_an_adapter_belongs_to_the_source(store: Store, tmp_path: Path) -> None:
    """What a recipe merges is part of what the model is compared with."""
    base = write_checkpoint(tmp_path / "base", SMALL)
    adapter = write_peft(tmp_path / "lora", peft_pair("model.layers.0.self_attn.q_proj", 128, 128))
    create("m", base, store=store, merge_lora=adapter)
    recipe = provenance.recipes(store, store.get_manifest(parse_name("m")).digest)[0]
    with SourceWeights(recipe, store) as source:
        assert weight_errors("m", source, store=store).relative == 0.0
    assert weight_errors("m", base, store=store).relative != 0.0


def test_the_recorded_source_is_the_reference(store: Store, source: Path) -> None:
    """Without a reference a model is compared with what it was made from, while that is there."""
    create("m", source, store=store, quantize="int4")
    assert weight_errors("m", store=store) == weight_errors("m", source, store=store)
    shutil.rmtree(source)
    with pytest.raises(NotFound, match="is not on this machine"):
        weight_errors("m", store=store)


def test_large_integers_that_differ_are_not_equal() -> None:
    """Also those that a float64 does not tell apart."""
    one, other = np.array([2**53]), np.array([2**53 + 1])
    sides = [to_numbers(values, "I64") for values in (one, other, one)]
    first, second, third = (iter([side]) for side in sides if side is not None)
    found = [side for side in sides if side is not None]
    assert not error_of(first, second).identical
    assert error_of(third, iter(found[:1])).identical


def test_a_draft_that_is_damaged_is_not_left_out(store: Store) -> None:
    """A blob of it that is missing is an error, as one of the model is."""
    create("m", fixture("hf-llama-bf16"), store=store, draft=fixture("hf-qwen3-tied-bf16"))
    refs = store.get_manifest(parse_name("m")).tensor_refs()
    store.remove_blob(next(r.digest for r in refs if (r.name or "").startswith("draft.")))
    with pytest.raises(NotFound, match="missing"):
        open_weights("m", store)


def test_neither_a_model_nor_a_source_is_not_found(store: Store, tmp_path: Path) -> None:
    """The error names what was asked for."""
    with pytest.raises(NotFound, match="nothing-here"):
        open_weights("nothing-here", store)
