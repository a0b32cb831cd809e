"""Recognising schemes: whatever the tensors and the config, an answer or a clear error."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from packers import CASES, Case
from quantmill.creation import plan_for
from quantmill.errors import BadSource, QuantmillError
from quantmill.formats import DTYPE_BYTES
from quantmill.recipes import Request
from quantmill.schemes import recognise
from quantmill.source import Source, SourceTensor
from sources import source_of

MODULES = st.sampled_from([
    "m", "model.layers.0.mlp.experts.0.up_proj", "model.layers.0.mlp.experts.1.up_proj",
    "model.layers.0.mlp.experts.gate_up_proj", "lm_head", "",
])  # fmt: skip
ENDINGS = st.sampled_from([
    "", ".weight", ".bias", ".scales", ".biases", ".global_scale", ".weight_packed",
    ".weight_scale", ".weight_global_scale", ".weight_zero_point", ".weight_g_idx",
    ".weight_shape", ".weight_scale_2", ".pre_quant_scale", ".input_scale", ".weight_scale_inv",
    "_scale_inv", "_blocks", "_scales",
    ".qweight", ".qzeros", ".g_idx", ".weight.scale", ".weight.bias", ".weight.global_scale",
])  # fmt: skip
SIZES = st.sampled_from([0, 1, 2, 4, 8, 16, 32, 33, 64, 128, 160])
SHAPES = st.lists(SIZES, max_size=4).map(tuple)
TENSORS = st.dictionaries(
    st.tuples(MODULES, ENDINGS).map("".join),
    st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), SHAPES),
    min_size=1, max_size=8,
)  # fmt: skip
NUMBERS = st.sampled_from([None, 0, 1, 3, 4, 8, -1, 32, 64, 128, True, "4", 2**70])
GROUPS = st.fixed_dictionaries({}, optional={
    "weights": st.fixed_dictionaries({}, optional={
        "num_bits": NUMBERS, "block_structure": st.lists(NUMBERS, max_size=3),
        "type": st.just("float"),
    }),
    "format": st.sampled_from(["float-quantized", "pack-quantized", 4]),
})  # fmt: skip
ENTRIES = st.fixed_dictionaries({}, optional={
    "quant_method": st.sampled_from(
        ["gptq", "awq", "fp8", "compressed-tensors", "modelopt", "x", 5]
    ),
    "bits": NUMBERS, "group_size": NUMBERS, "mode": st.sampled_from(["affine", "nvfp4", "", 3]),
    "weight_block_size": st.lists(NUMBERS, max_size=3), "desc_act": st.booleans(),
    "checkpoint_format": st.sampled_from(["gptq", "gptq_v2", "marlin", None, 4]),
    "version": st.sampled_from(["gemm", "gemv", "0.18.0", "0.9", "1." + "9" * 5000, 7]),
    "config_groups": st.dictionaries(st.just("g"), st.one_of(GROUPS, st.just(3))),
    "transform_config": st.sampled_from([{}, {"a": 1}, None]),
    "m": st.sampled_from([False, True, {}]),
    "dynamic": st.sampled_from([{}, {"a": {"desc_act": True}}, {"a": 1}, 4]),
})  # fmt: skip
CONFIGS = st.fixed_dictionaries(
    {},
    optional={"quantization_config": ENTRIES, "quantization": ENTRIES, "text_config": st.just({})},
)
VALUES = st.dictionaries(
    MODULES.map(lambda m: f"{m}.weight_shape"),
    st.lists(st.integers(-1, 200), max_size=3).map(tuple),
)


def planned_or_refused(source: Source, requantize: str | None) -> None:
    try:
        plan = plan_for(source, Request(requantize=requantize))
    except QuantmillError:
        return
    used = {name for spec in plan.tensors for name in spec.reads}
    assert used | {d.name for d in plan.dropped} == source.tensors.keys()
    for spec in plan.tensors:
        assert spec.nbytes >= 0
        assert spec.format is None or spec.shape[-1] % spec.format.group_size == 0


@settings(max_examples=500)
@given(TENSORS, CONFIGS, VALUES, st.sampled_from([None, "int4", "bf16"]))
@example({"m.weight_packed": ("I32", (4, 4)), "m.weight_scale": ("BF16", (4, 0))}, {}, {}, None)
def test_any_source_is_planned_or_refused(
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    config: dict[str, Any],
    values: dict[str, tuple[int, ...]],
    requantize: str | None,
) -> None:
    """No combination of tensors and config makes anything but a plan or a named error."""
    found = {n: SourceTensor(n, d, s) for n, (d, s) in sorted(tensors.items()) if n}
    planned_or_refused(Source(config, found, values=values), requantize)


def described(case: Case, experts: bool) -> Source:
    """A checkpoint of the scheme as its headers describe it."""
    stem = "model.layers.0.mlp.experts.{}.up_proj" if experts else "model.layers.{}.mlp.up_proj"
    rows, columns = -(-40 // case.rows) * case.rows, -(-128 // case.columns) * case.columns
    made = case.make(np.random.default_rng(0), {stem.format(i): (rows, columns) for i in (0, 1)})
    tensors = {n: SourceTensor(n, t.dtype, t.shape) for n, t in sorted(made.tensors.items())}
    values = {
        n: tuple(int(v) for v in np.frombuffer(t.data, "<i8"))
        for n, t in made.tensors.items()
        if n.endswith(".weight_shape") and t.dtype == "I64"
    }
    return Source(made.config, tensors, values=values)


@settings(max_examples=500)
@given(st.sampled_from(CASES), st.booleans(), st.data(), st.sampled_from([None, "mxfp4", "bf16"]))
def test_a_change_to_any_scheme_is_planned_or_refused(
    case: Case, experts: bool, data: st.DataObject, requantize: str | None
) -> None:
    """Another dtype, shape or config entry, or a missing tensor: a plan or a named error."""
    source = described(case, experts)
    tensors = dict(source.tensors)
    name = data.draw(st.sampled_from(sorted(tensors)))
    old = tensors[name]
    what = data.draw(st.sampled_from(["drop", "dtype", "shape", "config", "value"]))
    config = json.loads(json.dumps(source.config))
    values = dict(source.values)
    if what == "drop":
        del tensors[name]
    elif what == "dtype":
        tensors[name] = replace(old, dtype=data.draw(st.sampled_from(sorted(DTYPE_BYTES))))
    elif what == "shape":
        tensors[name] = replace(old, shape=data.draw(SHAPES))
    elif what == "value" and values:
        values[data.draw(st.sampled_from(sorted(values)))] = data.draw(
            st.lists(st.integers(-1, 2**40), max_size=3).map(tuple)
        )
    else:
        config.setdefault("quantization_config", {}).update(data.draw(ENTRIES))
    planned_or_refused(Source(config, tensors, values=values), requantize)


CHANGED_SHAPES = (
    (), (0,), (1,), (128,), (0, 0), (1, 1), (0, 128), (40, 0), (40, 1), (128, 40), (3, 40, 128),
    (0, 4, 4), (40, 4, 16), (4, 40, 1, 16),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_single_change_is_planned_or_refused(case: Case) -> None:
    """Each tensor of a module in turn gets each dtype, many shapes, and is left out."""
    source = described(case, experts=False)
    for name, old in source.tensors.items():
        if ".layers.0." not in name:
            continue
        changed: list[SourceTensor | None] = [replace(old, shape=s) for s in CHANGED_SHAPES]
        changed += [replace(old, dtype=dtype) for dtype in sorted(DTYPE_BYTES)]
        for new in (*changed, None):
            tensors = {n: t for n, t in source.tensors.items() if n != name}
            if new is not None:
                tensors = dict(sorted((tensors | {name: new}).items()))
            planned_or_refused(Source(source.config, tensors, values=source.values), None)


def test_a_float_weight_with_a_scale_is_refused() -> None:
    """Numbers that still wait for their scale are not imported as they are."""
    source = source_of({"m.weight": ("BF16", (64, 64)), "m.weight_scale": ("F32", (64, 1))})
    with pytest.raises(BadSource, match=r"m\.weight"):
        recognise(source)


def test_learned_scales_are_no_quantization() -> None:
    """Parameters called `.scale` or `_scale` beside no codes stay what they are."""
    names = ["model.router.scale", "model.logit_scale", "model.layers.0.layer_scale"]
    source = source_of(dict.fromkeys(names, ("F32", (1,))))
    assert [t.name for t in recognise(source).plain] == sorted(names)
