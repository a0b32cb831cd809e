"""Which tensors are quantized, and to what."""

# `vectors.cases` returns Any, which strict mypy takes for an untyped decorator.

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantmill.errors import BadRequest, BadSource
from quantmill.formats import (
    AFFINE_BITS,
    AFFINE_GROUPS,
    INT4,
    INT8,
    MXFP4,
    MXFP8,
    NVFP4,
    Format,
    eight_bit,
    parse_format,
)
from quantmill.policy import (
    ARCHITECTURES,
    RULES,
    Decision,
    Policy,
    architecture,
    decide,
    decide_draft,
    is_aligned,
    is_eligible,
    select_policy,
    use_more_bits,
)
from vectors import cases, suite

FLOAT_FORMATS = [NVFP4, MXFP4, MXFP8]
FORMATS = [Format("affine", b, g) for b in AFFINE_BITS for g in AFFINE_GROUPS] + FLOAT_FORMATS
DEFAULT = Policy()

_TENSOR_CASES = [c["input"] for c in suite("tensor_policy") if c["op"] == "tensor_quant"]
_VECTOR_NAMES = sorted({tensor["tensor"] for tensor in _TENSOR_CASES})
_POLICIES = sorted({select_policy(tensor["config"] or {}) for tensor in _TENSOR_CASES}, key=repr)
_PIECES = [
    "model", "backbone", "language_model", "vision_model", "audio_tower", "mtp", "layers", "0", "3",
    "31", "self_attn", "mlp", "mixer", "moe", "experts", "shared_experts", "shared_expert",
    "switch_mlp", "gate", "router", "q_proj", "k_proj", "v_proj", "g_proj", "gate_proj", "proj",
    "up_proj", "down_proj", "out_proj", "embed_tokens", "embeddings", "lm_head", "norm", "bias",
]  # fmt: skip

policies = st.sampled_from(_POLICIES)
names = st.one_of(
    st.sampled_from(_VECTOR_NAMES),
    st.lists(st.sampled_from(_PIECES), max_size=7).map(lambda parts: ".".join([*parts, "weight"])),
    st.text(max_size=40),
)
shapes = st.lists(
    st.one_of(st.integers(0, 300), st.sampled_from([512, 1024, 4096])), max_size=4
).map(tuple)
# Two or three dimensions of whole groups of 64: groups of 32 and 64 fit alike.
fitting_shapes = st.lists(st.integers(1, 16).map(lambda n: 64 * n), min_size=2, max_size=3)


def _decide(tensor: dict[str, Any]) -> Decision:
    chosen = decide_draft if tensor.get("draft") else decide
    policy = select_policy(tensor["config"] or {})
    return chosen(policy, tensor["tensor"], tensor["shape"], parse_format(tensor["quantize"]))


@cases("tensor_policy", "tensor_quant")
def test_vectors_tensor(case: dict[str, Any]) -> None:
    """A tensor gets the type of the vector."""
    decision = _decide(case["input"])
    assert (decision.format and decision.format.name) == case["expect"]["quant"]
    assert decision.rule
    assert decision.reason


@cases("tensor_policy", "policy")
def test_vectors_policy(case: dict[str, Any]) -> None:
    """A config selects the policy and the numbers of the vector, or names what is wrong."""
    expect = case["expect"]
    if "error" in expect:
        with pytest.raises(BadSource, match=r"config\.json") as caught:
            select_policy(case["input"]["config"])
        assert caught.value.kind == expect["error"]["kind"]
        return
    found = select_policy(case["input"]["config"])
    wanted = Policy(
        expect["policy"],
        expect.get("num_layers", 0),
        expect.get("num_experts", 0),
        tuple(expect.get("dense_layers", ())),
    )
    assert found == wanted


@cases("tensor_policy", "more_bits")
def test_vectors_more_bits(case: dict[str, Any]) -> None:
    """The promoted layers are those of the vector, and none lies outside the model."""
    layers, middle_end = case["input"]["num_layers"], case["input"].get("middle_end")
    promoted = [i for i in range(-2, layers) if use_more_bits(i, layers, middle_end)]
    assert promoted == case["expect"]["promoted_layers"]


@cases("tensor_policy", "aligned")
def test_vectors_aligned(case: dict[str, Any]) -> None:
    """A shape fits a format exactly when the vector says so; an unknown type never gets there."""
    shape, quantize = case["input"]["shape"], case["input"]["quantize"]
    if quantize == "bogus":
        with pytest.raises(BadRequest):
            parse_format(quantize)
        quantize = "mxfp8"  # the vector assumes groups of 32
    assert is_aligned(shape, parse_format(quantize)) == case["expect"]["aligned"]


@cases("tensor_policy", "eligible")
def test_vectors_eligible(case: dict[str, Any]) -> None:
    """A name may be quantized exactly when the vector says so."""
    tensor, component = case["input"]["tensor"], case["input"]["component"]
    assert is_eligible(tensor, component) == case["expect"]["eligible"]


@given(policies, names, shapes, st.sampled_from(FORMATS), st.booleans())
def test_chosen_format_always_fits(
    policy: Policy, name: str, shape: tuple[int, ...], base: Format, draft: bool
) -> None:
    """Whatever the name and shape, the format is the base or its 8-bit kin and its groups fit."""
    found = (decide_draft if draft else decide)(policy, name, shape, base).format
    assert found in {None, base, eight_bit(base)}
    assert found is None or is_aligned(shape, found)


def test_narrow_affine_formats_are_treated_like_int4() -> None:
    """On every vector name, affine below 8 bits keeps, promotes and quantizes where int4 does."""

    def treatment(policy: Policy, name: str, shape: tuple[int, ...], base: Format) -> str:
        found = decide(policy, name, shape, base).format
        return {None: "keep", base: "base", eight_bit(base): "eight"}[found]

    seen = set()
    for policy in _POLICIES:
        for name in _VECTOR_NAMES:
            for shape in [(4096, 4096), (8, 1024, 128), (8, 64), (128,)]:
                wanted = treatment(policy, name, shape, INT4)
                for base in (Format("affine", 3, 32), Format("affine", 6, 128)):
                    fits = is_aligned(shape, base)
                    assert not fits or treatment(policy, name, shape, base) == wanted
                seen.add(wanted)
    assert seen == {"keep", "base", "eight"}


@given(policies, names, fitting_shapes)
def test_affine_group_of_8_bits_is_its_own_promotion(
    policy: Policy, name: str, shape: list[int]
) -> None:
    """8-bit affine with another group size is kept or used, like int8, and never changed to it."""
    base = Format("affine", 8, 32)
    found = decide(policy, name, shape, base).format
    assert found in {None, base}
    assert (found is None) == (decide(policy, name, shape, INT8).format is None)


@pytest.mark.parametrize(
    ("name", "shape", "base", "rule", "reason"),
    [
        ("model.layers.0.mlp.gate.weight", (64, 64), INT4, "routing_gate", "routing gate stays"),
        ("model.layers.0.self_attn.v_proj.weight", (64, 64), INT4, "promoted", "v_proj is sens"),
        ("model.layers.0.self_attn.v_proj.weight", (64, 64), INT8, "requested", "as requested"),
        ("model.layers.0.self_attn.q_proj.weight", (64, 48), INT4, "unaligned", "48 is not a mul"),
        ("lm_head.weight", (64, 48), NVFP4, "unaligned", "48 is not a multiple of 32"),
        ("lm_head.weight", (64, 64), NVFP4, "promoted", "lm_head is sensitive: 8 bits"),
        ("model.embed_tokens.weight", (64, 64), INT4, "embedding", "embedding stays"),
        ("model.norm.weight", (64,), INT4, "norm", "norm stays"),
        ("model.audio_tower.norm.weight", (64,), INT4, "audio", "audio stays"),
        ("q_proj.bias", (64,), INT4, "bias", "bias stays"),
        ("q_proj.weights", (64, 64), INT4, "not_a_weight", ".weight"),
        ("conv.weight", (64, 3, 64), INT4, "rank", "rank 3"),
        ("q_proj.weight", (16, 32), MXFP4, "small", "fewer than 1024"),
        ("visual.q_proj.weight", (64, 64), INT4, "vision", "vision stays"),
    ],
)
def test_reasons(name: str, shape: tuple[int, ...], base: Format, rule: str, reason: str) -> None:
    """Each generic rule is named and says in a clause why it applied."""
    decision = decide(DEFAULT, name, shape, base)
    assert decision.rule == rule
    assert reason in decision.reason


def test_size_limit_is_inclusive() -> None:
    """1024 elements are enough to be quantized, 1023 are not."""
    assert decide(DEFAULT, "q_proj.weight", (32, 32), MXFP4).format == MXFP4
    assert decide(DEFAULT, "q_proj.weight", (31, 33), MXFP4).rule == "small"


def test_promotion_keeps_the_group_size() -> None:
    """An affine format is promoted to 8 bits of its own group size."""
    promoted = decide(DEFAULT, "m.v_proj.weight", (64, 32), Format("affine", 3, 32))
    assert promoted.format == Format("affine", 8, 32)


def test_per_layer_embeddings_are_no_embeddings_to_promote() -> None:
    """Gemma's per-layer embedding table stays as it is, beside the promoted main one."""
    gemma = Policy("gemma4", layers=30)
    assert decide(gemma, "model.embed_tokens.weight", (64, 64), INT4).format == INT8
    assert decide(gemma, "per_layer.embed_tokens.weight", (64, 64), INT4).rule == "embedding"


def test_cohere_promotes_only_a_matrix_of_embeddings() -> None:
    """An embedding of another rank falls to the generic rules, which keep it."""
    cohere = Policy("cohere2moe", layers=49)
    assert decide(cohere, "model.embed_tokens.weight", (64, 64), INT4).format == INT8
    assert decide(cohere, "model.embed_tokens.weight", (2, 64, 64), INT4).format is None


def test_nemotron_promotes_outside_numbered_layers() -> None:
    """A sensitive tensor without a layer number is promoted; a layer of the middle is not."""
    nemotron = Policy("nemotron_h", layers=52)
    name = "mixer.down_proj.weight"
    assert decide(nemotron, f"backbone.{name}", (64, 64), NVFP4).format == MXFP8
    assert decide(nemotron, f"backbone.layers.7.{name}", (64, 64), NVFP4).format == NVFP4


def test_laguna_cadence_ends_before_the_middle() -> None:
    """Of 40 layers, laguna promotes both ends and every third up to the 16th."""
    laguna = Policy("laguna", layers=40)
    name = "model.layers.{}.mlp.shared_expert.down_proj.weight"
    found = [decide(laguna, name.format(i), (64, 64), NVFP4).format for i in range(40)]
    promoted = [i for i, fmt in enumerate(found) if fmt == MXFP8]
    assert promoted == [0, 1, 2, 3, 4, 7, 10, 13, 35, 36, 37, 38, 39]


def test_draft_head_is_not_promoted() -> None:
    """A draft's embedding and head take the requested format; its other tensors the usual one."""
    assert decide_draft(DEFAULT, "lm_head.weight", (64, 64), INT4).format == INT4
    assert decide_draft(DEFAULT, "embed_tokens.weight", (64, 64), INT4).format == INT4
    assert decide_draft(DEFAULT, "lm_head.weight", (64, 48), INT4).rule == "unaligned"
    assert decide_draft(DEFAULT, "m.v_proj.weight", (64, 64), INT4).format == INT8


def test_scalars_are_never_quantized() -> None:
    """A tensor without dimensions stays as it is, even where a rule skips the rank filter."""
    gemma = Policy("gemma4", layers=30)
    found = decide(gemma, "model.layers.0.mlp.down_proj.weight", (), INT4)
    assert found == Decision(None, "unaligned", "a scalar has no groups")


def test_every_architecture_has_rules() -> None:
    """Each policy in the architecture table has a function, and no key is listed twice."""
    keys = [key for listed in ARCHITECTURES.values() for key in listed]
    assert RULES.keys() == {"default", "component", "vae", *ARCHITECTURES}
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({}, ""),
        ({"architectures": ["A", "B"], "model_type": "m"}, "A"),
        ({"architectures": [], "model_type": "m", "text_config": {"model_type": "t"}}, "m"),
        ({"architectures": None, "text_config": {"model_type": "t"}}, "t"),
    ],
)
def test_architecture_key(config: dict[str, Any], key: str) -> None:
    """The key is the first architecture, else the model type, else that of the text config."""
    assert architecture(config) == key


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"architectures": "Gemma4ForCausalLM"}, "architectures"),
        ({"architectures": [1]}, "architectures[0]"),
        ({"model_type": 1}, "model_type"),
        ({"model_type": "x", "text_config": []}, "text_config"),
        ({"model_type": "gemma4_unified", "num_experts": True}, "num_experts"),
        ({"model_type": "gemma4_unified", "num_hidden_layers": 24.0}, "num_hidden_layers"),
        (
            {"model_type": "gemma4_unified", "text_config": {"num_experts": "8"}},
            "text_config.num_experts",
        ),
        ({"architectures": ["LagunaForCausalLM"], "mlp_layer_types": "dense"}, "mlp_layer_types"),
        ({"architectures": ["LagunaForCausalLM"], "mlp_only_layers": [False]}, "mlp_only_layers"),
    ],
)
def test_wrong_config_types_name_the_field(config: dict[str, Any], field: str) -> None:
    """A field of the wrong type is an error that names config.json and the field."""
    with pytest.raises(BadSource, match=r"config\.json") as caught:
        select_policy(config)
    assert caught.value.kind == "invalid_config"
    assert field in caught.value.message


def test_fields_of_other_policies_are_not_read() -> None:
    """A policy looks only at the fields it needs, so strange ones elsewhere do no harm."""
    assert select_policy({"architectures": ["X"], "num_hidden_layers": "many"}) == DEFAULT


def test_dense_layers_come_from_both_lists() -> None:
    """Laguna's dense layers are those of either list, sorted, each once."""
    config = {
        "architectures": ["LagunaForCausalLM"],
        "mlp_layer_types": ["dense", "sparse", "dense"],
        "mlp_only_layers": [5, 2],
    }
    assert select_policy(config) == Policy("laguna", layers=3, dense_layers=(0, 2, 5))
