"""GGUF architectures against mlx-lm's classes: a model, its file as a converter writes it, logits.

Names and keys of the files are written out here; values are permuted as converters do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from ggufs import Floats, interleave, write_gguf
from quantmill import mlxlm
from quantmill.creation import create
from quantmill.errors import BadSource
from quantmill.formats import MXFP4
from quantmill.load import open_model
from quantmill.store import Store

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (quantmill[run])")

HIDDEN, FFN, HEADS, KV_HEADS, LAYERS, VOCAB, EXPERTS = 64, 96, 4, 2, 4, 24, 4
TOKENS = [1, 7, 20, 3, 3, 11, 0, 19]

COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "intermediate_size": FFN,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB,
    "rope_theta": 50000.0, "max_position_embeddings": 128,
}  # fmt: skip
KEYS: dict[str, Any] = {
    "block_count": LAYERS, "context_length": 128, "embedding_length": HIDDEN,
    "feed_forward_length": FFN, "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS, "rope.freq_base": 50000.0,
}  # fmt: skip

ATTENTION = {f"self_attn.{p}_proj": f"attn_{p}" for p in "qkv"} | {
    "self_attn.o_proj": "attn_output"
}
PRE = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
GATED = {f"mlp.{p}_proj": f"ffn_{p}" for p in ("gate", "up", "down")}


@dataclass(frozen=True)
class Case:
    """An architecture: its class and config, its GGUF keys, and its modules in both namings."""

    module: str
    class_name: str
    config: Mapping[str, Any]
    keys: Mapping[str, Any]
    names: Mapping[str, str]
    permuted: bool = False
    kinds: Mapping[str, str] = field(default_factory=dict)


CASES = {
    "granite": Case(
        "granite", "GraniteForCausalLM",
        {"rms_norm_eps": 1e-5, "attention_multiplier": 0.125, "embedding_multiplier": 12.0,
         "residual_multiplier": 0.22, "logits_scaling": 8.0, "attention_bias": False,
         "mlp_bias": False, "tie_word_embeddings": True},
        {"attention.layer_norm_rms_epsilon": 1e-5, "attention.scale": 0.125,
         "embedding_scale": 12.0, "residual_scale": 0.22, "logit_scale": 8.0},
        {**PRE, **ATTENTION, **GATED}, permuted=True,
    ),
    "smollm3": Case(
        "smollm3", "SmolLM3ForCausalLM",
        {"rms_norm_eps": 1e-6, "attention_bias": False, "mlp_bias": False,
         "tie_word_embeddings": True, "no_rope_layer_interval": 4},
        {"attention.layer_norm_rms_epsilon": 1e-6}, {**PRE, **ATTENTION, **GATED}, permuted=True,
    ),
    "olmo2": Case(
        "olmo2", "Olmo2ForCausalLM",
        {"rms_norm_eps": 1e-6, "attention_bias": False, "tie_word_embeddings": False},
        {"attention.layer_norm_rms_epsilon": 1e-6},
        {"post_attention_layernorm": "post_attention_norm",
         "post_feedforward_layernorm": "post_ffw_norm", "self_attn.q_norm": "attn_q_norm",
         "self_attn.k_norm": "attn_k_norm", **ATTENTION, **GATED},
    ),
    "starcoder2": Case(
        "starcoder2", "Starcoder2ForCausalLM",
        {"norm_epsilon": 1e-5, "tie_word_embeddings": True, "use_bias": True},
        {"attention.layer_norm_epsilon": 1e-5},
        {**PRE, **ATTENTION, "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
    ),
    "gpt-oss": Case(
        "gpt_oss", "GptOssForCausalLM",
        {"rms_norm_eps": 1e-5, "head_dim": 32, "num_local_experts": EXPERTS,
         "num_experts_per_tok": 2, "sliding_window": 4, "attention_bias": True,
         "tie_word_embeddings": False,
         "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
         "rope_scaling": {"rope_type": "yarn", "type": "yarn", "factor": 32.0, "truncate": False,
                          "original_max_position_embeddings": 64, "beta_fast": 32.0,
                          "beta_slow": 1.0}},
        {"attention.layer_norm_rms_epsilon": 1e-5, "attention.key_length": 32,
         "attention.value_length": 32, "expert_count": EXPERTS, "expert_used_count": 2,
         "expert_feed_forward_length": FFN, "attention.sliding_window": 4,
         "rope.scaling.type": "yarn", "rope.scaling.factor": 32.0,
         "rope.scaling.original_context_length": 64, "rope.scaling.yarn_beta_fast": 32.0,
         "rope.scaling.yarn_beta_slow": 1.0},
        {"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm",
         **ATTENTION, "mlp.router": "ffn_gate_inp",
         **{f"mlp.experts.{p}_proj": f"ffn_{p}_exps" for p in ("gate", "up", "down")}},
        kinds={f"ffn_{p}_exps": "MXFP4" for p in ("gate", "up", "down")},
    ),
}  # fmt: skip


def reference(case: Case) -> Any:
    """mlx-lm's own model with random weights that F16 holds."""
    module = import_module(f"mlx_lm.models.{case.module}")
    config = {"model_type": case.module, **COMMON, **case.config}
    found = module.Model(module.ModelArgs.from_dict(config))
    random = np.random.default_rng(3)
    flat: Any = tree_flatten(found.parameters())
    weights = []
    for name, array in flat:
        values = random.normal(0, 0.2, array.shape).astype(np.float16)
        if name.endswith("norm.weight"):
            values = (1 + values).astype(np.float16)
        weights.append((name, mx.array(values.astype(np.float32))))
    found.update(tree_unflatten(weights))
    return found


def gguf_name(name: str, case: Case) -> str:
    """A checkpoint's name as the file has it."""
    stem, _, kind = name.rpartition(".")
    edges = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if stem in edges:
        return f"{edges[stem]}.{kind}"
    _, _, layer, rest = name.split(".", 3)
    if rest == "self_attn.sinks":
        return f"blk.{layer}.attn_sinks.weight"
    return f"blk.{layer}.{case.names[rest.removesuffix('.' + kind)]}.{kind}"


def written(path: Path, arch: str, case: Case, module: Any, kind: str) -> Path:
    """The file; what its blocks cannot hold is taken into the reference."""
    tensors: dict[str, tuple[Floats, str]] = {}
    rounded = []
    flat: Any = tree_flatten(module.parameters())
    for name, array in flat:
        values, theirs = np.asarray(array), gguf_name(name, case)
        matrix = values.ndim > 1 and theirs.endswith(".weight")
        as_kind = case.kinds.get(theirs.split(".")[-2], kind) if matrix else "F32"
        if kind == "F32":
            as_kind = "F32"
        number = GGMLQuantizationType[as_kind]
        exact = quants.dequantize(quants.quantize(values, number), number)
        rounded.append((name, mx.array(np.asarray(exact, np.float32).reshape(values.shape))))
        heads = HEADS if ".q_proj." in name else KV_HEADS if ".k_proj." in name else 0
        permuted = case.permuted and heads
        tensors[theirs] = (interleave(values, heads) if permuted else values, as_kind)
    module.update(tree_unflatten(rounded))
    return write_gguf(path, arch, tensors, {**KEYS, **case.keys})


def logits(module: nn.Module) -> Floats:
    module.set_dtype(mx.float32)
    return np.asarray(module(mx.array([TOKENS])))


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("arch", CASES)
def test_imported_models_compute_what_the_original_does(
    arch: str, kind: str, tmp_path: Path
) -> None:
    """Names, permutations and config are right: mlx-lm's class gives the original's logits."""
    case, store = CASES[arch], Store(tmp_path / "store")
    module = reference(case)
    create("m", written(tmp_path / "m.gguf", arch, case, module, kind), store=store)
    with open_model("m", store=store) as opened:
        imported, _ = mlxlm.build(opened)
        found, expected = logits(imported), logits(module)
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()
    assert np.ptp(expected) > 0.1


@pytest.mark.parametrize("arch", CASES)
def test_configs_are_those_of_transformers(arch: str, tmp_path: Path) -> None:
    """Every key of the original config has the same value, under the names of transformers."""
    transformers = pytest.importorskip("transformers")
    case, store = CASES[arch], Store(tmp_path / "store")
    path = written(tmp_path / "m.gguf", arch, case, reference(case), "F16")
    create("m", path, store=store)
    with open_model("m", store=store) as opened:
        config = dict(opened.config)
    expected = {**COMMON, **case.config, "architectures": [case.class_name]}
    assert {key: config[key] for key in expected} == expected
    known = transformers.AutoConfig.for_model(config["model_type"]).to_dict()
    theirs = set(known) | {"rope_theta", "rope_scaling", "attention_bias", "type"}
    assert set(case.config) <= theirs


def test_gpt_oss_keeps_its_experts_stacked_and_their_codes(tmp_path: Path) -> None:
    """Stacks of MXFP4 experts become mxfp4 as they are; router and sinks stay numbers."""
    case, store = CASES["gpt-oss"], Store(tmp_path / "store")
    path = written(tmp_path / "m.gguf", "gpt-oss", case, reference(case), "Q8_0")
    made = create("m", path, store=store)
    planned = {t.name: t for t in made.plan.tensors}
    stack = planned["model.layers.0.mlp.experts.down_proj.weight"]
    assert (stack.format, stack.shape) == (MXFP4, (EXPERTS, HIDDEN, FFN))
    assert stack.scheme == "GGUF MXFP4"
    assert planned["model.layers.0.self_attn.sinks"].shape == (HEADS,)
    assert planned["model.layers.0.mlp.experts.down_proj.bias"].shape == (EXPERTS, HIDDEN)


@pytest.mark.parametrize(
    ("arch", "key", "value", "message"),
    [
        ("olmo2", "attention.sliding_window", 4096, "Olmo 3"),
        ("gpt-oss", "expert_count", 5, "for 5 experts"),
        ("granite", "logit_scale", 0.0, "logit_scale is 0"),
        ("starcoder2", "attention.layer_norm_epsilon", 0.0, "layer_norm_epsilon is 0"),
    ],
)
def test_files_that_cannot_be_right_are_refused(
    arch: str, key: str, value: Any, message: str, tmp_path: Path
) -> None:
    """A relative of another kind, wrong counts and numbers that are none are told by name."""
    case = CASES[arch]
    changed = Case(
        case.module, case.class_name, case.config, {**case.keys, key: value}, case.names,
        case.permuted, case.kinds,
    )  # fmt: skip
    path = written(tmp_path / "m.gguf", arch, changed, reference(case), "F16")
    with pytest.raises(BadSource, match=message):
        create("m", path, store=Store(tmp_path / "store"))
