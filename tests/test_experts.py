"""Names of expert tensors."""

# `vectors.cases` returns Any, which strict mypy takes for an untyped decorator.

from __future__ import annotations

from typing import Any

import pytest

from quantmill.errors import BadSource
from quantmill.experts import (
    ExpertName,
    group_prefix,
    is_routing_gate,
    is_stacked_expert,
    layer_index,
    parse_expert,
)
from vectors import cases


@cases("expert_group", "expert")
def test_vectors_name_facts(case: dict[str, Any]) -> None:
    """A name's group, layer and role are those of the vector."""
    name, expect = case["input"]["name"], case["expect"]
    facts = {
        "group": group_prefix(name),
        "layer": layer_index(name),
        "expert_weight": is_stacked_expert(name),
        "routing_gate": is_routing_gate(name),
    }
    assert facts == {key: expect[key] for key in facts}


@cases("expert_group", "expert")
def test_vectors_per_expert(case: dict[str, Any]) -> None:
    """A per-expert name splits into group, index and projection; other names into nothing."""
    name, expect = case["input"]["name"], case["expect"]
    if "parse_error" in expect:
        assert expect["per_expert"]
        with pytest.raises(BadSource) as caught:
            parse_expert(name)
        assert caught.value.kind == expect["parse_error"]
        assert name in caught.value.message
        return
    parts = ExpertName(expect["group"], expect["expert_index"], expect["projection"])
    assert parse_expert(name) == (parts if expect["per_expert"] else None)


@pytest.mark.parametrize("digits", [19, 5000])
def test_absurdly_long_numbers_are_no_index(digits: int) -> None:
    """A number that no model could mean is treated as text instead of failing."""
    number = "1" * digits
    assert layer_index(f"model.layers.{number}.mlp.up_proj.weight") is None
    assert parse_expert(f"model.layers.1.mlp.experts.{number}.up_proj.weight") is None


def test_only_ascii_digits_count() -> None:
    """Digits of other scripts neither number a layer nor an expert."""
    assert layer_index("model.layers.٣.mlp.up_proj.weight") is None
    assert group_prefix("model.layers.٣.mlp.experts.1.up_proj.weight") is None
    assert parse_expert("model.layers.3.mlp.experts.٣.up_proj.weight") is None


def test_layer_needs_a_leading_dot() -> None:
    """A bare `layers.0.` gives no layer, yet still heads an expert group."""
    assert layer_index("layers.0.mlp.experts.1.up_proj.weight") is None
    assert group_prefix("layers.0.mlp.experts.1.up_proj.weight") == "layers.0.mlp.experts"


def test_a_missing_projection_is_not_an_empty_one() -> None:
    """Two dots in a row do not make a projection without a name."""
    with pytest.raises(BadSource, match="projection"):
        parse_expert("model.layers.1.mlp.experts.1..weight")


def test_a_later_marker_may_match() -> None:
    """A marker in the wrong place does not hide one that heads a group."""
    name = "model.layers.1.moe.experts.0.mlp.experts.up_proj.weight"
    assert group_prefix(name) == "model.layers.1.moe.experts"
    assert parse_expert(name) == ExpertName("model.layers.1.moe.experts", 0, "mlp.experts.up_proj")


@pytest.mark.parametrize(
    "layer",
    [
        "layers.0",
        "model.layers.1",
        "model.language_model.layers.2",
        "model.language_model.backbone.layers.2",
        "language_model.layers.3",
        "language_model.model.layers.40",
        "language_model.backbone.layers.3",
        "backbone.layers.5",
        "mtp.layers.6",
    ],
)
@pytest.mark.parametrize("kind", ["mlp", "moe", "mixer"])
def test_known_containers_head_a_group(layer: str, kind: str) -> None:
    """Experts of every known container are grouped, and of an unknown one are not."""
    name = f"{layer}.{kind}.experts.7.up_proj.weight"
    assert parse_expert(name) == ExpertName(f"{layer}.{kind}.experts", 7, "up_proj")
    assert group_prefix(f"other.{name}") is None


@pytest.mark.parametrize("end", ["bias", "scale", "qbias"])
def test_companions_of_stacked_experts_are_no_weights(end: str) -> None:
    """A stack's bias, scales and quantization biases are not expert weights."""
    assert is_stacked_expert("model.layers.1.mlp.experts.down_proj.weight")
    assert not is_stacked_expert(f"model.layers.1.mlp.experts.down_proj.{end}")
