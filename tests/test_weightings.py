"""What weighs the columns of a weight in a search: which tensors the plan names, what they give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import write_checkpoint
from quantmill.creation import plan
from quantmill.errors import BadRequest
from quantmill.importance import importance
from quantmill.opening import open_source
from quantmill.plans import Options, TensorSpec, Weighting, plan_from_json, plan_to_json

LLAMA: dict[str, Any] = {
    "model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
LAYER = "model.layers.0."
NORM, AFTER = f"{LAYER}input_layernorm.weight", f"{LAYER}post_attention_layernorm.weight"
TENSORS: dict[str, tuple[str, tuple[int, ...]]] = {
    "model.embed_tokens.weight": ("BF16", (64, 128)),
    "model.norm.weight": ("BF16", (128,)),
    NORM: ("BF16", (128,)),
    AFTER: ("F32", (128,)),
    f"{LAYER}self_attn.q_proj.weight": ("BF16", (128, 128)),
    f"{LAYER}self_attn.k_proj.weight": ("BF16", (64, 128)),
    f"{LAYER}self_attn.v_proj.weight": ("BF16", (64, 128)),
    f"{LAYER}self_attn.o_proj.weight": ("BF16", (128, 128)),
    f"{LAYER}mlp.gate_proj.weight": ("BF16", (192, 128)),
    f"{LAYER}mlp.up_proj.weight": ("F16", (192, 128)),
    f"{LAYER}mlp.down_proj.weight": ("BF16", (128, 192)),
}
SEARCH = Options(method="search")


def specs(
    folder: Path, config: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...]]],
    quantize: str = "int8",
) -> dict[str, TensorSpec]:  # fmt: skip
    write_checkpoint(folder, tensors, config)
    return {t.name: t for t in plan(folder, quantize=quantize, options=SEARCH).tensors}


def values(folder: Path, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    with open_source(folder) as opened:
        tensor = opened.source.tensors[name]
        raw = bytearray(tensor.nbytes)
        opened.read_into(tensor, 0, memoryview(raw))
    if tensor.dtype == "BF16":
        bits = np.frombuffer(raw, np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(tensor.shape).astype(np.float64)
    kind = {"F16": np.float16, "F32": np.float32}[tensor.dtype]
    return np.frombuffer(raw, kind).reshape(tensor.shape).astype(np.float64)


def found(folder: Path, spec: TensorSpec, member: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    with open_source(folder) as opened:
        weighting = spec.weightings[member] if spec.weightings else None
        return importance(weighting, spec.shape[-1], opened)


def same(got: Any, expected: Any) -> None:
    """Equal up to one factor, of which the largest is between 1 and 2."""
    assert 1 <= got.max() < 2
    np.testing.assert_allclose(got / got.max(), expected / expected.max(), rtol=1e-6)


def test_inputs_that_a_norm_gives_are_weighed_by_it(tmp_path: Path) -> None:
    """Attention by the norm before it, the MLP by its own, a tied embedding by the last one."""
    by_name = specs(tmp_path, LLAMA, TENSORS)
    for part, norm in (("self_attn.q_proj", NORM), ("self_attn.k_proj", NORM),
                       ("self_attn.v_proj", NORM), ("mlp.gate_proj", AFTER),
                       ("mlp.up_proj", AFTER)):  # fmt: skip
        spec = by_name[f"{LAYER}{part}.weight"]
        assert spec.method == "search"
        assert spec.weightings == (Weighting(norm),)
        same(found(tmp_path, spec), values(tmp_path, norm) ** 2)


def test_the_output_of_attention_is_weighed_through_the_values(tmp_path: Path) -> None:
    """Each head's columns by the energies of the value rows it reads, heads sharing them."""
    spec = specs(tmp_path, LLAMA, TENSORS)[f"{LAYER}self_attn.o_proj.weight"]
    energy = values(tmp_path, f"{LAYER}self_attn.v_proj.weight") ** 2 @ values(tmp_path, NORM) ** 2
    head = 32  # two key/value heads of 32 rows, each read by two query heads
    blocks = [energy[:head], energy[:head], energy[head:], energy[head:]]
    same(found(tmp_path, spec), np.concatenate(blocks))


def test_the_end_of_the_mlp_is_weighed_through_gate_and_up(tmp_path: Path) -> None:
    """The product of both energies, as of two independent inputs."""
    spec = specs(tmp_path, LLAMA, TENSORS)[f"{LAYER}mlp.down_proj.weight"]
    squares = values(tmp_path, AFTER) ** 2
    gate, up = (values(tmp_path, f"{LAYER}mlp.{n}_proj.weight") ** 2 @ squares
                for n in ("gate", "up"))  # fmt: skip
    same(found(tmp_path, spec), gate * up)


def test_an_offset_of_norms_is_added(tmp_path: Path) -> None:
    """Gemma's norms multiply by one more than their weights."""
    spec = specs(tmp_path, {**LLAMA, "model_type": "gemma"}, TENSORS)[
        f"{LAYER}self_attn.q_proj.weight"
    ]
    same(found(tmp_path, spec), (1 + values(tmp_path, NORM)) ** 2)


def test_a_head_of_its_own_is_weighed_and_not_the_embedding(tmp_path: Path) -> None:
    """An embedding that is no head is looked up, row by row: nothing weighs its columns."""
    tensors = {**TENSORS, "lm_head.weight": ("BF16", (64, 128))}
    by_name = specs(tmp_path, LLAMA, tensors)
    head = by_name["lm_head.weight"]
    assert head.format is None or head.weightings == (Weighting("model.norm.weight"),)
    assert not by_name["model.embed_tokens.weight"].weightings


BERT: dict[str, Any] = {"model_type": "bert", "num_hidden_layers": 2}
ENCODER: dict[str, tuple[str, tuple[int, ...]]] = {
    "embeddings.word_embeddings.weight": ("F32", (64, 128)),
    "pooler.dense.weight": ("F32", (128, 128)),
} | {
    f"encoder.layer.{n}.{name}.weight": ("F32", shape)
    for n in range(2)
    for name, shape in {
        **{f"attention.self.{p}": (128, 128) for p in ("query", "key", "value")},
        "attention.output.dense": (128, 128),
        "intermediate.dense": (192, 128),
        "output.dense": (128, 192),
    }.items()
} | {
    f"{norm}.{kind}": ("F32", (128,))
    for kind in ("weight", "bias")
    for norm in ("embeddings.LayerNorm", *(
        f"encoder.layer.{n}.{part}.LayerNorm"
        for n in range(2) for part in ("attention.output", "output")
    ))
}  # fmt: skip


@pytest.mark.parametrize("start", ["", "bert."])
@pytest.mark.parametrize("quantize", ["int4", "nvfp4", "int8"])
def test_inputs_in_an_encoder_are_weighed_by_the_norm_behind_the_last_half(
    tmp_path: Path, start: str, quantize: str
) -> None:
    """Weight and bias of that norm squared; what no norm gives counts alike, in any format."""
    tensors = {start + name: tensor for name, tensor in ENCODER.items()}
    by_name = specs(tmp_path, BERT, tensors, quantize)
    before = {
        "encoder.layer.0.attention.self.query": "embeddings",
        "encoder.layer.0.intermediate.dense": "encoder.layer.0.attention.output",
        "encoder.layer.1.attention.self.value": "encoder.layer.0.output",
        "encoder.layer.1.intermediate.dense": "encoder.layer.1.attention.output",
        "pooler.dense": "encoder.layer.1.output",
    }
    for name, norm in before.items():
        spec = by_name[f"{start}{name}.weight"]
        weight, bias = (f"{start}{norm}.LayerNorm.{kind}" for kind in ("weight", "bias"))
        assert (spec.method, spec.depends) == ("search", (weight, bias))
        same(found(tmp_path, spec), values(tmp_path, weight) ** 2 + values(tmp_path, bias) ** 2)
    for name in ("attention.output.dense", "output.dense"):
        spec = by_name[f"{start}encoder.layer.1.{name}.weight"]
        assert (spec.method, spec.weightings) == ("search", ())


def test_an_encoder_with_other_names_for_its_norms_has_equal_weights(tmp_path: Path) -> None:
    """Old checkpoints say gamma and beta."""
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for name, t in ENCODER.items()
    }
    spec = specs(tmp_path, BERT, renamed, "int4")["encoder.layer.0.intermediate.dense.weight"]
    assert (spec.method, spec.weightings) == ("search", ())


@pytest.mark.parametrize("config", [{"model_type": "unheard of"}, {"model_type": "starcoder2"}])
def test_without_weights_narrow_affine_formats_are_rounded(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    """Equal weights make 4 bits worse; 8 bits and the float formats gain by them."""
    name = f"{LAYER}self_attn.q_proj.weight"
    assert specs(tmp_path / "4", config, TENSORS, "int4")[name].method == "rtn"
    for quantize in ("int8", "nvfp4", "mxfp4"):
        spec = specs(tmp_path / quantize, config, TENSORS, quantize)[name]
        assert (spec.method, spec.weightings) == ("search", ())
        assert np.all(found(tmp_path / quantize, spec) == 1)


def test_each_expert_is_weighed_by_itself(tmp_path: Path) -> None:
    """The members of a stack have weightings of their own, in their order."""
    mlp = f"{LAYER}mlp."
    tensors = {name: t for name, t in TENSORS.items() if ".mlp." not in name}
    for expert in range(2):
        tensors |= {
            f"{mlp}experts.{expert}.gate_proj.weight": ("BF16", (64, 128)),
            f"{mlp}experts.{expert}.up_proj.weight": ("BF16", (64, 128)),
            f"{mlp}experts.{expert}.down_proj.weight": ("BF16", (128, 64)),
        }
    by_name = specs(tmp_path, {**LLAMA, "model_type": "qwen3_moe"}, tensors)
    (down,) = [s for name, s in by_name.items() if "down_proj" in name]
    assert [w.through[0] for w in down.weightings] == [
        f"{mlp}experts.{expert}.gate_proj.weight" for expert in range(2)
    ]
    squares = values(tmp_path, AFTER) ** 2
    for expert in range(2):
        energies = [
            values(tmp_path, name) ** 2 @ squares for name in down.weightings[expert].through
        ]
        same(found(tmp_path, down, expert), energies[0] * energies[1])


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_norm_that_makes_no_sense_weighs_nothing(tmp_path: Path, value: float) -> None:
    """Zeros, NaN and infinities leave all columns equal."""
    spec = specs(tmp_path, LLAMA, TENSORS)[f"{LAYER}mlp.gate_proj.weight"]
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    raw = values(tmp_path, AFTER).astype(np.float32).tobytes()
    assert data.count(raw) == 1
    path.write_bytes(data.replace(raw, np.full(128, value, np.float32).tobytes()))
    assert np.all(found(tmp_path, spec) == 1)


@pytest.mark.parametrize(
    "options",
    [
        Options(method="search", profile="gpu"),
        Options(method="search", rounding="nearest"),
        Options(method="search", global_scale=True),
        Options(method="magic"),
    ],
)
def test_methods_are_refused_beside_other_roundings(tmp_path: Path, options: Options) -> None:
    """A search has its own rounding; an unknown word is told."""
    write_checkpoint(tmp_path / "c", TENSORS, LLAMA)
    with pytest.raises(BadRequest):
        plan(tmp_path / "c", quantize="nvfp4", options=options)


def test_a_plan_with_weightings_comes_back_from_json(tmp_path: Path) -> None:
    """Everything decided is plain data."""
    for folder, tensors, config in (
        (tmp_path / "c", TENSORS, LLAMA),
        (tmp_path / "e", ENCODER, BERT),
    ):
        write_checkpoint(folder, tensors, config)
        made = plan(folder, quantize="int4", options=SEARCH)
        assert plan_from_json(plan_to_json(made)) == made
