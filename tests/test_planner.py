"""Source and request to plan: the peers' vectors, overrides, and what must hold for every plan."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantmill.classify import FLOAT, Kind, classify
from quantmill.errors import BadPlan, BadRequest, BadSource, QuantmillError
from quantmill.formats import DTYPE_BYTES, FORMAT_NAMES, INT4, INT8, NVFP4, parse_format
from quantmill.plans import Options, Plan, TensorSpec, plan_from_json, plan_to_json
from quantmill.planner import make_plan, parse_override
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
    tensors: dict[str, tuple[str, tuple[int, ...]]], quantize: str | None, **options: Any
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


@cases("plan", "plan")
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
