"""Source and request to plan: the peers' vectors, overrides, and what must hold for every plan."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from departures import DEPARTURES
from quantmill.classify import FLOAT, Kind, classify
from quantmill.errors import BadPlan, BadRequest, BadSource, QuantmillError
from quantmill.formats import DTYPE_BYTES, FORMAT_NAMES, INT4, INT8, NVFP4, parse_format
from quantmill.planner import make_plan, parse_override
from quantmill.plans import Options, Plan, TensorSpec, plan_from_json, plan_to_json
from sources import source_of, vector_source
from vectors import cases

LAYER = "model.layers.0"
BF16_MODEL = {
    "model.embed_tokens.weight": ("BF16", (256, 128)),
    f"{LAYER}.input_layernorm.weight": ("BF16", (128,)),
    f"{LAYER}.self_attn.q_proj.weight": ("BF16", (128, 128)),
    f"{LAYER}.self_attn.v_proj.weight": ("BF16", (128, 128)),
    f"{LAYER}.mlp.down_proj.weight": ("BF16", (128, 256)),
    "lm_head.weight": ("F32", (256, 128)),
}


def plan_of(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], quantize: str | None, **options: Any
) -> Plan:
    source = source_of(tensors)
    return make_plan(source, classify(source, quantize), Options(**options), version="test")


def spec_named(plan: Plan, name: str) -> TensorSpec:
    return next(t for t in plan.tensors if t.name == name)


# -- vectors ---------------------------------------------------------------------------------------


def planned(case: dict[str, Any]) -> Plan:
    given_input = case["input"]
    source = vector_source(given_input)
    if "requested" in given_input:
        kind = classify(source, given_input["requested"])
    else:
        quantize = given_input["quantize"]
        kind = Kind(given_input["kind"], parse_format(quantize) if quantize else None)
    prefix = given_input.get("tensor_prefix", "")
    return make_plan(
        source, kind, version="test", draft=given_input.get("draft", False), prefix=prefix
    )


def expected_error(expect: dict[str, Any]) -> str | None:
    """The kind of error, whether the reference meets it while planning or only while writing."""
    if "error" in expect:
        return str(expect["error"]["kind"])
    stored = [blob["stored"] for blob in expect["blobs"]]
    return next((str(s["error"]["kind"]) for s in stored if "error" in s), None)


def check_tensor(case: dict[str, Any], expected: dict[str, Any], spec: TensorSpec) -> None:
    assert spec.name == expected["name"]
    assert list(spec.sources) == expected["sources"]
    assert spec.transform == expected["transform"]
    assert (spec.format.name if spec.format else None) == expected["quantize"]
    first = case["input"]["tensors"][expected["sources"][0]]
    assert list(spec.shape) == (expected["out_shape"] or first["shape"])
    if expected["transform"] != "decode_stack_fp8":  # there the vector gives the undecoded dtype
        assert spec.dtype == (expected["out_dtype"] or first["dtype"])


@cases("plan", "plan", without=DEPARTURES)
def test_plans_equal_the_vectors(case: dict[str, Any]) -> None:
    """Blobs, tensors, transforms, formats and metadata are those of the reference, in its order."""
    expect = case["expect"]
    if kind := expected_error(expect):
        with pytest.raises(QuantmillError) as caught:
            planned(case)
        assert caught.value.kind == kind
        return
    plan = planned(case)
    assert [b.name for b in plan.blobs] == [b["name"] for b in expect["blobs"]]
    for blob, expected in zip(plan.blobs, expect["blobs"], strict=True):
        assert dict(blob.metadata) == (expected["stored"]["metadata"] or {})
        if expected["metadata"] is not None:
            assert dict(blob.metadata) == expected["metadata"]
        for spec, tensor in zip(blob.tensors, expected["tensors"], strict=True):
            check_tensor(case, tensor, spec)
        stored = sorted(part for spec in blob.tensors for part in spec.stored)
        assert [
            {"name": name, "dtype": dtype, "shape": list(shape)} for name, dtype, shape in stored
        ] == expected["stored"]["tensors"]
    if "kind" in expect:
        assert plan.kind == expect["kind"]
        assert (plan.format.name if plan.format else None) == expect["quantize"]


# -- overrides -------------------------------------------------------------------------------------


def test_an_override_decides_before_the_policy() -> None:
    """A tensor whose name fits a rule gets the rule's format, with the rule as its reason."""
    plan = plan_of(BF16_MODEL, "int4", overrides=(parse_override("*.q_proj.weight=mxfp8"),))
    spec = spec_named(plan, f"{LAYER}.self_attn.q_proj.weight")
    assert (spec.format, spec.rule) == (parse_format("mxfp8"), "override")
    assert "*.q_proj.weight" in spec.reason


def test_the_last_fitting_override_wins() -> None:
    """Of several rules that fit a name the one given last decides."""
    rules = (parse_override("*=int8"), parse_override("*.q_proj.weight=keep"))
    plan = plan_of(BF16_MODEL, "int4", overrides=rules)
    assert spec_named(plan, f"{LAYER}.self_attn.q_proj.weight").format is None
    assert spec_named(plan, f"{LAYER}.self_attn.v_proj.weight").format == INT8


def test_an_override_works_without_a_requested_format() -> None:
    """One tensor can be quantized while all others keep their precision."""
    plan = plan_of(BF16_MODEL, None, overrides=(parse_override("lm_head.weight=affine-3:32"),))
    chosen = [t.name for t in plan.tensors if t.format]
    assert chosen == ["lm_head.weight"]


def test_a_pattern_that_cannot_fit_a_tensor_keeps_it_and_says_so() -> None:
    """A wildcard that also covers a norm leaves the norm as it is, visibly."""
    plan = plan_of(BF16_MODEL, "int4", overrides=(parse_override("*=int8"),))
    spec = spec_named(plan, f"{LAYER}.input_layernorm.weight")
    assert (spec.format, spec.rule) == (None, "override_misfit")
    assert "1 dimensions" in spec.reason


def test_a_named_tensor_that_cannot_be_quantized_is_refused() -> None:
    """A rule that names a tensor outright and cannot be followed is an error."""
    rule = parse_override(f"{LAYER}.input_layernorm.weight=int4")
    with pytest.raises(BadPlan, match="input_layernorm"):
        plan_of(BF16_MODEL, "int4", overrides=(rule,))


def test_an_override_that_fits_nothing_is_refused_with_a_near_name() -> None:
    """A misspelt rule is an error that offers the name that was probably meant."""
    with pytest.raises(BadRequest) as caught:
        plan_of(BF16_MODEL, "int4", overrides=(parse_override("lm_haed.weight=int8"),))
    assert caught.value.kind == "unused_override"
    assert "lm_head.weight" in str(caught.value.hint)


def test_a_part_of_a_name_is_offered_as_a_pattern() -> None:
    """A rule without wildcards that is only part of names gets them in the hint."""
    with pytest.raises(BadRequest) as caught:
        plan_of(BF16_MODEL, "int4", overrides=(parse_override("q_proj=int8"),))
    assert "'*q_proj*'" in str(caught.value.hint)


@pytest.mark.parametrize("text", ["", "a", "=int4", "a=", "a=int3", "a=int4:x", "a=nvfp4:64"])
def test_a_malformed_override_is_refused(text: str) -> None:
    """Anything but PATTERN=FORMAT with a known format and group size is an error."""
    with pytest.raises(BadRequest):
        parse_override(text)


def test_overrides_can_split_an_expert_group() -> None:
    """Projections of one group with different formats go into a blob each."""
    experts = {
        f"{LAYER}.mlp.experts.{i}.{p}.weight": ("BF16", (64, 64))
        for i in range(2)
        for p in ("up_proj", "gate_proj")
    }
    rule = parse_override("*experts.up_proj.weight=keep")
    plan = plan_of(experts, "int8", overrides=(rule,))
    group = f"{LAYER}.mlp.experts"
    assert [b.name for b in plan.blobs] == [f"{group}.gate_proj.weight", f"{group}.up_proj.weight"]


# -- sources that do not add up --------------------------------------------------------------------


def expert_names(*indexes: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {f"{LAYER}.mlp.experts.{i}.up_proj.weight": ("BF16", (64, 64)) for i in indexes}


@pytest.mark.parametrize(
    "indexes", [("0", "1", "3"), ("1",), ("0", "-1")], ids=["gap", "no first", "negative"]
)
def test_experts_must_be_numbered_without_gaps(indexes: tuple[str, ...]) -> None:
    """A stack with a missing or impossible expert is refused, naming group and expert."""
    with pytest.raises(BadSource, match=rf"{LAYER}.mlp.experts: expert") as caught:
        plan_of(expert_names(*indexes), None)
    assert caught.value.kind == "missing_expert"


def test_projections_must_have_the_same_experts() -> None:
    """A projection with fewer experts than its group is refused."""
    tensors = expert_names("0", "1") | {
        f"{LAYER}.mlp.experts.0.down_proj.weight": ("BF16", (64, 64))
    }
    with pytest.raises(BadSource, match="expert 1 has no down_proj"):
        plan_of(tensors, None)


def test_two_spellings_of_one_expert_are_refused() -> None:
    """`experts.1` and `experts.+1` cannot both be there."""
    with pytest.raises(BadSource, match="same expert"):
        plan_of(expert_names("0", "1", "+1"), None)


def test_generated_names_may_not_collide_with_tensors_of_the_source() -> None:
    """A source tensor called like a scale that quantization would write is an error."""
    name = f"{LAYER}.self_attn.q_proj.weight"
    with pytest.raises(BadPlan, match=r"q_proj\.weight\.scale"):
        plan_of({name: ("BF16", (128, 128)), f"{name}.scale": ("BF16", (1,))}, "int4")


def test_integer_tensors_are_never_quantized() -> None:
    """A tensor of integers keeps its dtype whatever it is called."""
    plan = plan_of({"model.position_ids.weight": ("I64", (1, 4096))}, "int8")
    assert plan.tensors[0].format is None


def test_f64_weights_are_cast_before_they_are_quantized() -> None:
    """A dtype that formats do not take goes through BF16, visibly in the plan."""
    plan = plan_of({f"{LAYER}.self_attn.q_proj.weight": ("F64", (64, 64))}, "int4")
    spec = plan.tensors[0]
    assert (spec.transform, spec.dtype, spec.format) == ("cast_bf16", "BF16", INT4)


# -- what holds for every plan ---------------------------------------------------------------------

SHAPES = st.sampled_from([(128,), (64, 64), (32, 96), (128, 48), (16, 256), (4, 64, 64), (0, 128)])
NAMES = st.sampled_from([
    "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "a.bias",
    *(f"model.layers.{i}.self_attn.{p}_proj.weight" for i in range(3) for p in "qkvo"),
    *(f"model.layers.{i}.mlp.{p}_proj.weight" for i in range(3) for p in ("up", "down")),
    "model.layers.0.mlp.experts.gate_up_proj", "model.visual.blocks.0.attn.qkv.weight",
])  # fmt: skip
MODELS = st.dictionaries(NAMES, st.tuples(st.sampled_from(["BF16", "F16", "F32"]), SHAPES)).flatmap(
    lambda plain: st.integers(0, 4).map(
        lambda experts: (
            plain
            | {
                f"model.layers.0.mlp.experts.{e}.{p}.weight": ("BF16", (64, 128))
                for e in range(experts)
                for p in ("gate_proj", "down_proj")
            }
        )
    )
)
REQUESTS = st.sampled_from([None, *FORMAT_NAMES])


@given(MODELS, REQUESTS)
def test_every_source_tensor_is_used_once(
    tensors: dict[str, tuple[str, tuple[int, ...]]], quantize: str | None
) -> None:
    """Nothing is dropped without a word and nothing is written twice."""
    plan = plan_of(tensors, quantize)
    used = Counter(name for spec in plan.tensors for name in spec.sources)
    assert used == Counter(list(tensors))
    assert not plan.dropped


@given(MODELS, REQUESTS)
def test_formats_fit_and_sizes_add_up(
    tensors: dict[str, tuple[str, tuple[int, ...]]], quantize: str | None
) -> None:
    """Groups divide rows, codes and scales cover the weights, and byte counts are exact."""
    for blob in plan_of(tensors, quantize).blobs:
        for spec in blob.tensors:
            if spec.format is None:
                continue
            (_, _, words), (_, _, groups) = spec.stored[:2]
            assert words[-1] * 32 == spec.shape[-1] * spec.format.bits
            assert groups[-1] * spec.format.group_size == spec.shape[-1]
        data = sum(spec.nbytes for spec in blob.tensors)
        assert blob.size == len(blob.header) + data


@given(MODELS, REQUESTS)
def test_a_plan_survives_json(
    tensors: dict[str, tuple[str, tuple[int, ...]]], quantize: str | None
) -> None:
    """A plan that went through JSON is the same plan, header bytes included."""
    plan = plan_of(tensors, quantize)
    again = plan_from_json(json.loads(json.dumps(plan_to_json(plan))))
    assert again == plan
    assert [b.header for b in again.blobs] == [b.header for b in plan.blobs]


@given(MODELS, REQUESTS, st.randoms(use_true_random=False))
def test_the_order_of_the_source_does_not_matter(
    tensors: dict[str, tuple[str, tuple[int, ...]]], quantize: str | None, random: Random
) -> None:
    """The same tensors found in another order give the same plan."""
    names = list(tensors)
    random.shuffle(names)
    assert plan_of({n: tensors[n] for n in names}, quantize) == plan_of(tensors, quantize)


@given(MODELS, REQUESTS)
def test_one_rule_changes_only_what_it_names(
    tensors: dict[str, tuple[str, tuple[int, ...]]], quantize: str | None
) -> None:
    """An override leaves every tensor it does not fit exactly as it was."""
    pattern = "*.q_proj.weight"
    if not any(fnmatchcase(name, pattern) for name in tensors):
        return
    before = {t.name: t for t in plan_of(tensors, quantize).tensors}
    rule = parse_override(f"{pattern}=keep")
    after = {t.name: t for t in plan_of(tensors, quantize, overrides=(rule,)).tensors}
    changed = {name for name in before if before[name] != after[name]}
    assert all(fnmatchcase(name, pattern) for name in changed)


def test_bits_per_weight_counts_scales_and_biases() -> None:
    """4-bit affine with groups of 64 costs 4.5 bits a weight from BF16 sources."""
    plan = plan_of({f"{LAYER}.self_attn.q_proj.weight": ("BF16", (128, 128))}, "int4")
    assert plan.bits_per_weight == INT4.bits_per_weight("BF16") == 4.5


def test_a_global_scale_is_planned_for_nvfp4_only() -> None:
    """`global_scale` adds one F32 to nvfp4 tensors and to no others."""
    tensors = {
        f"{LAYER}.self_attn.q_proj.weight": ("BF16", (128, 128)),
        f"{LAYER}.mlp.down_proj.weight": ("BF16", (128, 128)),
    }
    plan = plan_of(tensors, "nvfp4", global_scale=True)
    scaled = {t.name: t.format for t in plan.tensors if t.global_scale}
    assert scaled == {f"{LAYER}.self_attn.q_proj.weight": NVFP4}
    assert plan.tensors[-1].stored[-1][1:] == ("F32", ())


def test_a_kind_without_a_format_keeps_everything() -> None:
    """With no format asked for, each tensor is stored as it is, and says so."""
    plan = make_plan(source_of(BF16_MODEL), Kind(FLOAT, None), version="test")
    assert {t.rule for t in plan.tensors} == {"not_asked"}
    total = sum(DTYPE_BYTES[d] * math.prod(s) for d, s in BF16_MODEL.values())
    assert sum(t.nbytes for t in plan.tensors) == total == plan.source_bytes
