"""GGUF files written by the tests with the gguf library, from weights as checkpoints have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFWriter, quants

Floats = npt.NDArray[np.float32]

HIDDEN, HEADS, KV_HEADS, WIDTH, FFN, VOCAB, LAYERS, EXPERTS = 64, 4, 2, 16, 96, 12, 2, 3

NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
FOUR_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
ATTENTION = {
    "self_attn.q_proj": ("attn_q", (HEADS * WIDTH, HIDDEN)),
    "self_attn.k_proj": ("attn_k", (KV_HEADS * WIDTH, HIDDEN)),
    "self_attn.v_proj": ("attn_v", (KV_HEADS * WIDTH, HIDDEN)),
    "self_attn.o_proj": ("attn_output", (HIDDEN, HEADS * WIDTH)),
}
GATED = {
    "mlp.gate_proj": ("ffn_gate", (FFN, HIDDEN)),
    "mlp.up_proj": ("ffn_up", (FFN, HIDDEN)),
    "mlp.down_proj": ("ffn_down", (HIDDEN, FFN)),
}

Parts = tuple[dict[str, str], dict[str, str], dict[str, Any]]

LLAMA: Parts = (NORMS, {}, {**ATTENTION, **GATED})
QWEN3: Parts = (NORMS, HEAD_NORMS, {**ATTENTION, **GATED})
GEMMA3: Parts = (FOUR_NORMS, HEAD_NORMS, {**ATTENTION, **GATED})
MOE: Parts = (NORMS, HEAD_NORMS, {**ATTENTION, "mlp.gate": ("ffn_gate_inp", (EXPERTS, HIDDEN))})

KEYS: Mapping[str, Any] = {
    "block_count": LAYERS, "context_length": 128, "embedding_length": HIDDEN,
    "feed_forward_length": FFN, "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS, "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 10000.0,
}  # fmt: skip

BYTES = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2"}


def weights(shape: tuple[int, ...], seed: int) -> Floats:
    """Small normal values that BF16 and F16 both hold exactly."""
    values = np.random.default_rng(seed).normal(0, 0.05, shape).astype(np.float32)
    short = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return short.astype(np.float16).astype(np.float32)


def interleave(weight: Floats, heads: int) -> Floats:
    """What a converter does to the query and key projections of the llama family."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def deinterleave(weight: Floats, heads: int) -> Floats:
    """The rows of a query or key projection as a checkpoint has them; others have no heads."""
    if not heads:
        return weight
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def model(parts: Parts, *, tied: bool = True) -> dict[str, tuple[str, Floats]]:
    """Checkpoint name → GGUF name and weights."""
    norms, head_norms, matrices = parts
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": ("token_embd.weight", (VOCAB, HIDDEN)),
        "model.norm.weight": ("output_norm.weight", (HIDDEN,)),
    }
    if not tied:
        found["lm_head.weight"] = ("output.weight", (VOCAB, HIDDEN))
    for n in range(LAYERS):
        rows: dict[str, tuple[str, tuple[int, ...]]] = {
            **{k: (v, (HIDDEN,)) for k, v in norms.items()},
            **{k: (v, (WIDTH,)) for k, v in head_norms.items()},
            **matrices,
        }
        for name, (gguf, shape) in rows.items():
            found[f"model.layers.{n}.{name}.weight"] = (f"blk.{n}.{gguf}.weight", shape)
    return {
        name: (gguf, weights(shape, seed))
        for seed, (name, (gguf, shape)) in enumerate(found.items())
    }


def convert_llama(name: str, weight: Floats) -> Floats:
    """A llama weight as its GGUF file has it."""
    heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else 0
    return interleave(weight, heads) if heads else weight


def convert_gemma(name: str, weight: Floats) -> Floats:
    """A gemma weight as its GGUF file has it."""
    return weight + 1 if name.endswith("norm.weight") else weight


def unchanged(name: str, weight: Floats) -> Floats:
    """A weight of an architecture whose values converters keep."""
    return weight


def write_gguf(
    path: Path,
    arch: str,
    tensors: Mapping[str, tuple[Floats, str]],
    keys: Mapping[str, Any] = KEYS,
    *,
    split: int = 0,
    empty_first: bool = False,
    **more: Any,
) -> Path:
    """A GGUF file, or parts of `split` tensors each. `keys` belong to the architecture."""
    writer = GGUFWriter(path, arch, split_max_tensors=split, small_first_shard=empty_first)
    _write(writer, {}, tensors, {**{f"{arch}.{k}": v for k, v in keys.items()}, **more})
    return path


def write_blocks(
    path: Path,
    arch: str,
    blocks: Mapping[str, tuple[npt.NDArray[np.uint8], str]],
    tensors: Mapping[str, tuple[Floats, str]],
    keys: Mapping[str, Any],
) -> Path:
    """A GGUF file in which some tensors are given as rows of blocks."""
    named = {f"{arch}.{key}": value for key, value in keys.items()}
    _write(GGUFWriter(path, arch), blocks, tensors, named)
    return path


def _write(
    writer: GGUFWriter,
    blocks: Mapping[str, tuple[npt.NDArray[np.uint8], str]],
    tensors: Mapping[str, tuple[Floats, str]],
    keys: Mapping[str, Any],
) -> None:
    for key, value in keys.items():
        _add(writer, key, value)
    for name, (raw, kind) in blocks.items():
        writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType[kind])
    for name, (values, kind) in tensors.items():
        number = GGMLQuantizationType[kind]
        writer.add_tensor(name, quants.quantize(values, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
        str: writer.add_string, list: writer.add_array,
    }  # fmt: skip
    adders[type(value)](key, value)


def stored(
    found: Mapping[str, tuple[str, Floats]],
    kind: str,
    convert: Callable[[str, Floats], Floats] = unchanged,
) -> dict[str, tuple[Floats, str]]:
    """GGUF name → values and type: vectors as F32, as converters store them, the rest as `kind`."""
    return {
        gguf: (convert(name, values), kind if values.ndim > 1 else "F32")
        for name, (gguf, values) in found.items()
    }
