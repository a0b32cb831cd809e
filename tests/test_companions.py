"""Names of weights and their companions: the peers' vectors, and what holds for every spelling."""

from __future__ import annotations

import json
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from departures import DEPARTURES
from quantmill.companions import (
    LayerParts,
    Orphan,
    Role,
    Weight,
    canonicalise,
    expert_parts,
    gather,
    layer_parts,
    loaded_name,
)
from vectors import DATA, cases

W = "m.weight"

# -- vectors ---------------------------------------------------------------------------------------


@cases("aux_names", "canonicalise")
def test_names_equal_the_vectors(case: dict[str, Any]) -> None:
    """Canonical names, and the spellings that are dropped, are those of the reference."""
    found = canonicalise(case["input"]["names"])
    assert dict(found.names) == case["expect"]["canonical"]
    assert list(found.dropped) == case["expect"]["dropped"]


@cases("aux_names", "canonicalise", odd=True)
def test_odd_names_equal_the_vectors_or_depart(case: dict[str, Any]) -> None:
    """A singular bias beats a plural one; a learned scale is no companion and keeps its name."""
    found = canonicalise(case["input"]["names"])
    if case["id"] in DEPARTURES:
        assert dict(found.names) == {n: n for n in case["input"]["names"]}
        return
    assert dict(found.names) == case["expect"]["canonical"]
    assert list(found.dropped) == case["expect"]["dropped"]


@cases("aux_names", "layer")
def test_layers_take_the_tensors_of_the_vectors(case: dict[str, Any]) -> None:
    """Weight, scales, both kinds of bias and the global scale of a layer are the reference's."""
    weights, _ = gather(case["input"]["names"])
    parts = layer_parts(weights, case["input"]["path"])
    expect = case["expect"]
    if parts is None:
        assert expect["type"] is None
        return
    assert expect["type"] == ("quantized" if parts.is_quantized else "dense")
    weight = parts.weight
    assert weight.codes == expect["weight"]
    assert weight.scale == expect.get("scales")
    assert weight.bias == expect.get("qbiases")
    assert weight.global_scale == expect.get("global_scale")
    if case["input"]["kind"] == "linear":
        assert parts.bias == expect["bias"]


# -- spellings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([W, f"{W}.scale", f"{W}.bias"], Weight(W, W, f"{W}.scale", f"{W}.bias")),
        ([W, "m.scales", "m.biases"], Weight(W, W, "m.scales", "m.biases")),
        ([W, f"{W}_scale", f"{W}_qbias"], Weight(W, W, f"{W}_scale", f"{W}_qbias")),
        ([W, f"{W}.scale", f"{W}.qbias"], Weight(W, W, f"{W}.scale", f"{W}.qbias")),
        ([W, f"{W}.scale", "m.biases"], Weight(W, W, f"{W}.scale", "m.biases")),
        ([W, "m.scales", f"{W}.bias"], Weight(W, W, "m.scales", f"{W}.bias")),
        (
            [W, f"{W}.scale", f"{W}.global_scale"],
            Weight(W, W, f"{W}.scale", None, f"{W}.global_scale"),
        ),
        (
            [W, f"{W}_scale", f"{W}_scale_2"],
            Weight(W, W, f"{W}_scale", None, f"{W}_scale_2"),
        ),
        (
            [f"{W}_packed", f"{W}_scale", f"{W}_global_scale"],
            Weight(W, f"{W}_packed", f"{W}_scale", None, f"{W}_global_scale", reciprocal=True),
        ),
        (
            [
                "x.experts.up",
                "x.experts.up.scale",
                "x.experts.up.bias",
                "x.experts.up.global_scale",
            ],
            Weight(
                "x.experts.up",
                "x.experts.up",
                "x.experts.up.scale",
                "x.experts.up.bias",
                "x.experts.up.global_scale",
            ),
        ),
        (
            ["x.switch_mlp.up", "x.switch_mlp.up.scales", "x.switch_mlp.up.biases"],
            Weight(
                "x.switch_mlp.up",
                "x.switch_mlp.up",
                "x.switch_mlp.up.scales",
                "x.switch_mlp.up.biases",
            ),
        ),
        (
            [W, "m.scales", "m.global_scale"],
            Weight(W, W, "m.scales", None, "m.global_scale"),
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_every_spelling_gives_one_weight(names: list[str], expected: Weight) -> None:
    """Ollama's, mlx-lm's, ModelOpt's and compressed-tensors' names say the same thing."""
    assert gather(names) == ({expected.name: expected}, ())


@pytest.mark.parametrize(
    ("names", "winner"),
    [
        ([f"{W}.scale", f"{W}_scale", "m.scales"], f"{W}.scale"),
        ([f"{W}_scale", "m.scales"], f"{W}_scale"),
    ],
)
def test_singular_wins_over_canonical_over_plural(names: list[str], winner: str) -> None:
    """Of several spellings one wins whatever the order, and each loser names it."""
    for order in permutations([W, *names]):
        found = canonicalise(order)
        assert found.names == {W: W, f"{W}_scale": winner}
        assert found.dropped == {name: winner for name in names if name != winner}


def test_a_plain_weight_wins_over_packed_codes() -> None:
    """`weight` and `weight_packed` of one module are two spellings of one tensor."""
    assert canonicalise([f"{W}_packed", W]).dropped == {f"{W}_packed": W}


@pytest.mark.parametrize(
    "names",
    [
        [W, "m.bias"],
        [W, f"{W}.bias"],
        ["s.biases"],
        ["layers.0.router.scale", "layers.0.router.proj.weight"],
        [W, "m.scales", "m.bias"],
        [W, "m.global_scale"],
        ["logit_scale", "norm.scale"],
        [W, "m.input_scale", "m.input_global_scale"],
        [W, "m.weight_scale_inv"],
    ],
)
def test_dense_biases_and_learned_scales_are_weights_of_their_own(names: list[str]) -> None:
    """What only looks like a companion keeps its name and is not lost."""
    weights, orphans = gather(names)
    assert orphans == ()
    assert weights.keys() == set(names) - {"m.scales"}


def test_a_dense_bias_stands_beside_quantization_biases() -> None:
    """A quantized layer may have a bias of its own."""
    weights, _ = gather([W, "m.scales", "m.biases", "m.bias"])
    expected = LayerParts(Weight(W, W, "m.scales", "m.biases"), "m.bias")
    assert layer_parts(weights, "m") == expected
    assert weights[W].companions == ("m.scales", "m.biases")


@pytest.mark.parametrize(
    ("names", "orphan"),
    [
        (["m.scales"], Orphan("m.scales", Role.SCALE, W, Role.CODES)),
        ([f"{W}.scale"], Orphan(f"{W}.scale", Role.SCALE, W, Role.CODES)),
        ([W, f"{W}_qbias"], Orphan(f"{W}_qbias", Role.BIAS, W, Role.SCALE)),
        ([f"{W}_qbias"], Orphan(f"{W}_qbias", Role.BIAS, W, Role.CODES)),
        ([W, f"{W}.global_scale"], Orphan(f"{W}.global_scale", Role.GLOBAL, W, Role.SCALE)),
        ([W, f"{W}_scale_2"], Orphan(f"{W}_scale_2", Role.GLOBAL, W, Role.SCALE)),
    ],
)
def test_companions_without_their_weight_are_orphans(names: list[str], orphan: Orphan) -> None:
    """A companion whose weight, or whose weight's scale, is missing is named with that weight."""
    weights, orphans = gather(names)
    assert orphans == (orphan,)
    assert orphan.name not in weights
    assert repr(orphan.name) in orphan.problem
    assert repr(orphan.weight) in orphan.problem


def test_the_oldest_blobs_are_named_by_their_layer() -> None:
    """The key `data` says nothing: three layers with it are a weight, its scale and its bias."""
    layers = [W, f"{W}_scale", f"{W}_qbias"]
    names = [loaded_name(layer, "data") for layer in layers]
    assert gather(names) == ({W: Weight(W, layers[0], layers[1], layers[2])}, ())
    assert loaded_name("group", W) == W


# -- experts ---------------------------------------------------------------------------------------

BLOCK = "model.layers.0.mlp"


@pytest.mark.parametrize("stack", ["switch_mlp.up_proj", "experts.up_proj"])
@pytest.mark.parametrize("ending", [".weight", ""])
def test_stacked_experts_are_found_under_every_generation_of_names(stack: str, ending: str) -> None:
    """Stacks are called `switch_mlp` or `experts`, with or without `.weight`."""
    name = f"{BLOCK}.{stack}{ending}"
    weights, _ = gather([name, f"{name}.scale"])
    assert expert_parts(weights, BLOCK, "up_proj") == (weights[name],)
    assert expert_parts(weights, BLOCK, "down_proj") == ()


def test_single_experts_come_in_the_order_of_their_numbers() -> None:
    """Expert 10 follows expert 9, and other projections and shared experts stay out."""
    names = [f"{BLOCK}.experts.{i}.{p}.weight" for i in range(11) for p in ("up_proj", "gate_proj")]
    weights, _ = gather([*names, f"{BLOCK}.shared_experts.up_proj.weight"])
    found = expert_parts(weights, BLOCK, "up_proj")
    assert [w.name for w in found] == [f"{BLOCK}.experts.{i}.up_proj.weight" for i in range(11)]


# -- fixtures --------------------------------------------------------------------------------------


def fixture_names(name: str) -> list[str]:
    path = DATA / "fixtures" / name / "checkpoint" / "model.safetensors"
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sorted(header.keys() - {"__metadata__"})


@pytest.mark.parametrize(
    ("other", "plain"),
    [
        ("mlx-mixed-naming-orphans", "mlx-qwen3_5-moe-nvfp4"),
        ("mlx-dot-child-affine4", "mlx-affine-4bit-gs64"),
    ],
)
def test_renamed_checkpoints_have_the_same_canonical_names(other: str, plain: str) -> None:
    """Mixed and singular spellings give the weights of the plural original, none dropped."""
    assert canonicalise(fixture_names(other)).names.keys() == (
        canonicalise(fixture_names(plain)).names.keys()
    )
    assert canonicalise(fixture_names(other)).dropped == {}
    assert gather(fixture_names(other))[1] == ()


def test_orphan_plural_companions_find_their_singular_weight() -> None:
    """Aux tensors left under plural names are gathered although their siblings are singular."""
    weights, _ = gather(fixture_names("mlx-mixed-naming-orphans"))
    qkv = "language_model.model.layers.0.linear_attn.in_proj_qkv"
    gate = "language_model.model.layers.1.mlp.gate"
    assert weights[f"{qkv}.weight"].scale == f"{qkv}.scales"
    assert weights[f"{gate}.weight"].scale == f"{gate}.weight.scale"
    assert weights[f"{gate}.weight"].bias == f"{gate}.biases"


# -- every set of names ----------------------------------------------------------------------------

ENDINGS = (
    "", ".weight", ".bias", ".scale", ".scales", ".biases", "_scale", "_qbias", ".qbias",
    ".global_scale", ".weight_scale_2", ".weight_packed", ".weight_global_scale",
)  # fmt: skip
NAMES = st.lists(
    st.builds(
        "{}{}{}".format, st.sampled_from("ab"), st.sampled_from(ENDINGS), st.sampled_from(ENDINGS)
    ),
    max_size=12,
    unique=True,
)


@given(NAMES, st.randoms())
def test_the_order_of_names_never_matters(names: list[str], random: Any) -> None:
    """Maps and files may list tensors in any order: the answer is the same."""
    shuffled = random.sample(names, len(names))
    assert canonicalise(names) == canonicalise(shuffled)
    assert list(canonicalise(names).names) == list(canonicalise(shuffled).names)
    assert gather(names) == gather(shuffled)


@given(NAMES)
def test_no_tensor_is_lost(names: list[str]) -> None:
    """Every name is a weight, a companion, an orphan or dropped for a winner, and only one."""
    weights, orphans = gather(names)
    found = [part for w in weights.values() for part in (w.codes, *w.companions)]
    found += [o.name for o in orphans]
    lost = canonicalise(names).dropped

    assert sorted([*found, *lost]) == sorted(names)


@given(NAMES)
def test_canonical_names_are_canonical(names: list[str]) -> None:
    """Reading canonical names changes nothing."""
    once = canonicalise(names).names
    assert canonicalise(once).names == {name: name for name in once}
