"""A Llama-shaped checkpoint of any size, with a config and a tokenizer that mlx-lm accepts.

    python benchmarks/synthetic.py FOLDER GIGABYTES [--fp8]

`--fp8` writes nothing but matrices of E4M3 codes with a scale for each 128 x 128 of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from quantmill.tensorfile import lay_out

HIDDEN, INNER, VOCABULARY, HEADS, KEY_HEADS = 2048, 5632, 32000, 32, 8
BLOCK = 128


def shapes(gigabytes: float) -> dict[str, tuple[int, ...]]:
    """Tensors of a Llama-like model of about this size in BF16, one layer at least."""
    layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN // HEADS * KEY_HEADS, HIDDEN),
        "self_attn.v_proj": (HIDDEN // HEADS * KEY_HEADS, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    each = 2 * sum(a * b for a, b in layer.values())
    count = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / each))
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for index in range(count):
        prefix = f"model.layers.{index}"
        found[f"{prefix}.input_layernorm.weight"] = (HIDDEN,)
        found[f"{prefix}.post_attention_layernorm.weight"] = (HIDDEN,)
        found |= {f"{prefix}.{name}.weight": shape for name, shape in layer.items()}
    return found


def write_checkpoint(folder: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """Write a checkpoint of random BF16 weights, a few megabytes at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    header, _ = lay_out([(name, "BF16", shape) for name, shape in tensors.items()], {})
    random = np.random.default_rng(0)
    layers = len({name.split(".")[2] for name in tensors if ".layers." in name})
    (folder / "config.json").write_text(json.dumps(config(layers)))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer()))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w0"}'
    )
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        for shape in tensors.values():
            count = int(np.prod(shape))
            for start in range(0, count, 1 << 22):
                part = min(1 << 22, count - start)
                values = random.standard_normal(part, dtype=np.float32) * np.float32(0.02)
                file.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())


def write_fp8_checkpoint(folder: Path, gigabytes: float) -> None:
    """Write matrices of block FP8, as DeepSeek stores them: random codes, none of them NaN."""
    folder.mkdir(parents=True, exist_ok=True)
    found = shapes(2 * gigabytes + 4e-9 * VOCABULARY * HIDDEN)
    matrices = {name: shape for name, shape in found.items() if name.endswith("_proj.weight")}
    random = np.random.default_rng(0)
    layers = len({name.split(".")[2] for name in matrices})
    method = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "fmt": "e4m3"}
    text = json.dumps(config(layers) | {"quantization_config": method})
    (folder / "config.json").write_text(text)
    parts = []
    for name, (rows, columns) in matrices.items():
        parts.append((name, "F8_E4M3", (rows, columns)))
        parts.append((f"{name}_scale_inv", "F32", (rows // BLOCK, columns // BLOCK)))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(lay_out(parts, {})[0])
        for _, dtype, shape in parts:
            if dtype == "F32":
                file.write((random.random(shape, np.float32) * np.float32(1e-4)).tobytes())
                continue
            codes = random.integers(0, 0x7F, shape, np.uint8)
            file.write((codes | random.integers(0, 2, shape, np.uint8) << 7).tobytes())


def config(layers: int) -> dict[str, object]:
    """A config.json for these shapes."""
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS,
        "num_hidden_layers": layers, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "max_position_embeddings": 2048,
    }  # fmt: skip


def tokenizer() -> dict[str, object]:
    """The smallest tokenizer.json there can be."""
    model = {"type": "WordLevel", "vocab": {"w0": 0, "w1": 1}, "unk_token": "w0"}
    nothing = dict.fromkeys(["truncation", "padding", "normalizer", "post_processor", "decoder"])
    return {
        "version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
        "model": model, **nothing,
    }  # fmt: skip


def make(folder: Path, gigabytes: float, *more: str) -> int:
    """Write the checkpoint in a process of its own; bytes of the weights file.

    A child's peak memory counts what its parent held when it was started, so the one that measures
    must stay small.
    """
    command = [sys.executable, __file__, str(folder), str(gigabytes), *more]
    subprocess.run(command, check=True)
    return (folder / "model.safetensors").stat().st_size


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("gigabytes", type=float)
    parser.add_argument("--fp8", action="store_true")
    options = parser.parse_args()
    if options.fp8:
        write_fp8_checkpoint(options.folder, options.gigabytes)
    else:
        write_checkpoint(options.folder, shapes(options.gigabytes))
