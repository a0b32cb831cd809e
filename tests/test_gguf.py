"""GGUF files as a source: names, values, config, tokenizer; a real model; files that lie."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants
from tokenizers import Tokenizer

import ggufs
from ggufs import (
    EXPERTS,
    FFN,
    GEMMA3,
    HEADS,
    HIDDEN,
    KEYS,
    KV_HEADS,
    LAYERS,
    LLAMA,
    MOE,
    QWEN3,
    VOCAB,
    WIDTH,
    Floats,
    convert_gemma,
    convert_llama,
    interleave,
    model,
    stored,
    unchanged,
    weights,
    write_gguf,
)
from quantmill.checkpoint import Checkpoint
from quantmill.creation import create, plan, plan_for
from quantmill.elements import to_bf16
from quantmill.errors import BadRequest, BadSource
from quantmill.formats import DTYPE_BYTES
from quantmill.ggufsource import PIECE, GgufCheckpoint, open_gguf
from quantmill.opening import open_source
from quantmill.recipes import Request
from quantmill.source import OpenSource
from quantmill.store import Store
from quantmill.verification import verify

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


def raw(source: OpenSource, name: str) -> bytes:
    """All bytes of a tensor."""
    tensor = source.source.tensors[name]
    buffer = bytearray(tensor.nbytes)
    source.read_into(tensor, 0, memoryview(buffer))
    return bytes(buffer)


def floats(source: OpenSource, name: str) -> Floats:
    """All values of a tensor, in its shape."""
    tensor = source.source.tensors[name]
    found = np.frombuffer(raw(source, name), np.uint8)
    if tensor.dtype == "BF16":
        values = (found.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = found.view({"F16": np.float16, "F32": np.float32}[tensor.dtype]).astype(np.float32)
    return values.reshape(tensor.shape)


def as_bf16(values: Floats) -> bytes:
    return to_bf16(np.ascontiguousarray(values).reshape(-1).view(np.uint8), "F32").tobytes()


def config_of(source: OpenSource) -> dict[str, Any]:
    found = json.loads(source.read_file("config.json"))
    assert isinstance(found, dict)
    return found


def llama(
    path: Path, kind: str = "BF16", *, tied: bool = True, keys: dict[str, Any] | None = None,
    **more: Any,
) -> Path:  # fmt: skip
    """A small llama as a GGUF file."""
    found = stored(model(LLAMA, tied=tied), kind, convert_llama)
    return write_gguf(path, "llama", found, {**KEYS, **(keys or {})}, **more)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.gguf"


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_float_model_comes_back_bit_for_bit(path: Path, kind: str, tied: bool) -> None:
    """Names, shapes and every value of a llama survive the way into GGUF and back."""
    expected = model(LLAMA, tied=tied)
    with open_gguf(llama(path, kind, tied=tied)) as opened:
        assert list(opened.source.tensors) == sorted(expected)
        for name, (_, values) in expected.items():
            assert opened.source.tensors[name].shape == values.shape
            assert opened.source.tensors[name].dtype == kind, name
            assert floats(opened, name).tobytes() == values.tobytes(), name
        assert config_of(opened)["tie_word_embeddings"] is tied


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"])
def test_a_block_quantized_model_is_decoded_to_bf16(path: Path, kind: str) -> None:
    """Opened for numbers, matrices are what the library decodes, in BF16, rows put back."""
    number, found = GGMLQuantizationType[kind], model(LLAMA)
    with open_gguf(llama(path, kind), decode=True) as opened:
        for name, (_, values) in found.items():
            tensor = opened.source.tensors[name]
            assert tensor.dtype == "BF16"
            if values.ndim == 1:
                assert floats(opened, name).tobytes() == values.tobytes()
                continue
            decoded = quants.dequantize(quants.quantize(values, number), number)
            assert raw(opened, name) == as_bf16(decoded), name


def test_bf16_rounds_to_nearest_even(path: Path) -> None:
    """A decoded value half-way between two BF16 values goes to the even one."""
    values = np.zeros((VOCAB, HIDDEN), np.float32)
    values[:, 0] = 127  # the scale of a Q8_0 block is then 1
    block = quants.quantize(values, GGMLQuantizationType.Q8_0)
    block.view(np.float16).reshape(VOCAB, -1)[:, 0] = np.float16(1 + 2**-8 + 2**-10)
    expected = quants.dequantize(block, GGMLQuantizationType.Q8_0)
    tensors = stored(model(LLAMA), "Q8_0", convert_llama)
    write_gguf(path, "llama", tensors)
    with open_gguf(path, decode=True) as opened:
        start = opened.source.tensors["model.embed_tokens.weight"].start
    data = bytearray(path.read_bytes())
    data[start : start + block.nbytes] = block.tobytes()
    path.write_bytes(data)
    with open_gguf(path, decode=True) as opened:
        assert raw(opened, "model.embed_tokens.weight") == as_bf16(expected)


def test_query_and_key_biases_are_put_back_too(path: Path) -> None:
    """The rotary permutation reaches biases, and the config says that there are some."""
    bias = {"q": weights((HEADS * WIDTH,), 1), "k": weights((KV_HEADS * WIDTH,), 2)}
    tensors = stored(model(LLAMA), "BF16", convert_llama)
    for n in range(LAYERS):
        tensors[f"blk.{n}.attn_q.bias"] = (interleave(bias["q"], HEADS), "F32")
        tensors[f"blk.{n}.attn_k.bias"] = (interleave(bias["k"], KV_HEADS), "F32")
    with open_gguf(write_gguf(path, "llama", tensors)) as opened:
        for which, values in bias.items():
            name = f"model.layers.1.self_attn.{which}_proj.bias"
            assert (floats(opened, name) == values).all()
        assert config_of(opened)["attention_bias"] is True


@pytest.mark.parametrize(
    ("arch", "parts", "convert", "class_name", "model_type"),
    [
        ("qwen2", LLAMA, unchanged, "Qwen2ForCausalLM", "qwen2"),
        ("qwen3", QWEN3, unchanged, "Qwen3ForCausalLM", "qwen3"),
        ("gemma", LLAMA, convert_gemma, "GemmaForCausalLM", "gemma"),
        ("gemma2", (GEMMA3[0], {}, GEMMA3[2]), convert_gemma, "Gemma2ForCausalLM", "gemma2"),
        ("gemma3", GEMMA3, convert_gemma, "Gemma3ForCausalLM", "gemma3_text"),
    ],
)
def test_other_architectures_come_back_bit_for_bit(
    path: Path, arch: str, parts: Any, convert: Callable[[str, Floats], Floats],
    class_name: str, model_type: str,
) -> None:  # fmt: skip
    """Each architecture has its own names, and what its converter did to values is undone."""
    expected = model(parts)
    special: dict[str, dict[str, Any]] = {
        "gemma2": {
            "attention.sliding_window": 32, "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        "gemma3": {"attention.sliding_window": 32},
    }  # fmt: skip
    tensors = {
        name: (values.astype(np.float32), kind)
        for name, (values, kind) in stored(expected, "BF16", convert).items()
    }
    write_gguf(
        path, arch, tensors, {**KEYS, "attention.key_length": WIDTH, **special.get(arch, {})}
    )
    with open_gguf(path) as opened:
        assert list(opened.source.tensors) == sorted(expected)
        assert {t.dtype for t in opened.source.tensors.values()} == {"BF16"}
        for name, (_, values) in expected.items():
            close = np.abs(floats(opened, name) - values)
            # adding 1 costs a norm its smallest bits
            assert close.max() <= (2**-24 if convert is convert_gemma else 0), name
        config = config_of(opened)
        assert (config["architectures"], config["model_type"]) == ([class_name], model_type)
        assert config["head_dim"] == WIDTH


def test_phi3_keeps_its_fused_projections(path: Path) -> None:
    """Queries, keys and values stay one tensor, gate and up another, as in the checkpoint."""
    fused = {
        "self_attn.qkv_proj": ("attn_qkv", ((HEADS + 2 * KV_HEADS) * WIDTH, HIDDEN)),
        "self_attn.o_proj": ("attn_output", (HIDDEN, HIDDEN)),
        "mlp.gate_up_proj": ("ffn_up", (2 * FFN, HIDDEN)),
        "mlp.down_proj": ("ffn_down", (HIDDEN, FFN)),
    }
    expected = model((ggufs.NORMS, {}, fused), tied=False)
    tensors = stored(expected, "F16")
    for which, factor in (("long", 4.0), ("short", 1.5)):
        values = np.full(WIDTH // 2, factor, np.float32)
        tensors[f"rope_factors_{which}.weight"] = (values, "F32")
    keys = {**KEYS, "rope.scaling.original_context_length": 64, "rope.dimension_count": WIDTH // 2}
    with open_gguf(write_gguf(path, "phi3", tensors, keys)) as opened:
        for name, (_, values) in expected.items():
            assert (floats(opened, name) == values).all()
        config = config_of(opened)
    assert config["rope_scaling"]["long_factor"] == [4.0] * 8
    assert config["rope_scaling"]["short_factor"] == [1.5] * 8
    assert config["partial_rotary_factor"] == 0.5
    assert config["original_max_position_embeddings"] == 64


def test_stacked_experts_become_experts(path: Path) -> None:
    """A stack of experts is cut into one tensor each, which the plan stacks as for any source."""
    expected = model(MOE)
    tensors = stored(expected, "Q8_0")
    stacks = {}
    for n in range(LAYERS):
        for part, shape in (
            ("gate", (FFN, HIDDEN)),
            ("up", (FFN, HIDDEN)),
            ("down", (HIDDEN, FFN)),
        ):
            stack = weights((EXPERTS, *shape), 100 + n)
            tensors[f"blk.{n}.ffn_{part}_exps.weight"] = (stack, "Q8_0")
            stacks[f"model.layers.{n}.mlp.experts.{{}}.{part}_proj.weight"] = stack
        tensors[f"blk.{n}.ffn_gate_inp.weight"] = (weights((EXPERTS, HIDDEN), n), "F32")
    keys = {
        **KEYS, "expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": FFN
    }  # fmt: skip
    q8 = GGMLQuantizationType.Q8_0
    with open_gguf(write_gguf(path, "qwen3moe", tensors, keys), decode=True) as opened:
        for name, stack in stacks.items():
            decoded = quants.dequantize(quants.quantize(stack, q8), q8)
            for n in range(EXPERTS):
                assert raw(opened, name.format(n)) == as_bf16(decoded[n])
        planned = {t.name: t.shape for t in plan_for(opened.source, Request("int8")).tensors}
        config = config_of(opened)
    assert planned["model.layers.1.mlp.experts.down_proj.weight"] == (EXPERTS, HIDDEN, FFN)
    assert (config["num_experts"], config["num_experts_per_tok"]) == (EXPERTS, 2)


def test_a_shared_expert_gate_gets_its_dimension_back(path: Path) -> None:
    """Converters store the gate of a shared expert as a vector; the checkpoint has a matrix."""
    shared = {
        f"mlp.shared_expert.{part}_proj": (f"ffn_{part}_shexp", shape)
        for part, shape in (("gate", (FFN, HIDDEN)), ("up", (FFN, HIDDEN)), ("down", (HIDDEN, FFN)))
    }
    gate = {"mlp.shared_expert_gate": ("ffn_gate_inp_shexp", (HIDDEN,))}
    tensors = stored(model((MOE[0], {}, {**MOE[2], **shared, **gate})), "BF16")
    for n in range(LAYERS):
        for part, shape in (
            ("gate", (FFN, HIDDEN)),
            ("up", (FFN, HIDDEN)),
            ("down", (HIDDEN, FFN)),
        ):
            tensors[f"blk.{n}.ffn_{part}_exps.weight"] = (weights((EXPERTS, *shape), n), "BF16")
    keys = {
        **KEYS, "expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": FFN,
        "expert_shared_feed_forward_length": FFN,
    }  # fmt: skip
    with open_gguf(write_gguf(path, "qwen2moe", tensors, keys)) as opened:
        name = "model.layers.0.mlp.shared_expert_gate.weight"
        assert opened.source.tensors[name].shape == (1, HIDDEN)


def test_small_tensors_stay_f32_where_bf16_would_change_them(path: Path) -> None:
    """One norm that BF16 cannot hold keeps every tensor stored as F32 in F32."""
    tensors = stored(model(LLAMA), "Q8_0", convert_llama)
    tensors["output_norm.weight"] = (np.full(HIDDEN, 1 + 2**-20, np.float32), "F32")
    with open_gguf(write_gguf(path, "llama", tensors), decode=True) as opened:
        dtypes = {name: t.dtype for name, t in opened.source.tensors.items()}
        assert dtypes["model.norm.weight"] == "F32"
        assert dtypes["model.layers.0.input_layernorm.weight"] == "F32"
        assert dtypes["model.layers.0.mlp.up_proj.weight"] == "BF16"
        assert (floats(opened, "model.norm.weight") == np.float32(1 + 2**-20)).all()


@pytest.mark.parametrize("decode", [False, True])
def test_reading_in_pieces_gives_the_whole(path: Path, decode: bool) -> None:
    """Bytes of any offset and length are those of the whole tensor, the permuted ones too."""
    random = np.random.default_rng(5)
    with open_gguf(llama(path, "Q4_0"), decode=decode) as opened:
        for name in ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"):
            tensor, whole = opened.source.tensors[name], raw(opened, name)
            for _ in range(200):
                start, end = sorted(random.integers(0, tensor.nbytes + 1, 2).tolist())
                buffer = bytearray(end - start)
                opened.read_into(tensor, start, memoryview(buffer))
                assert buffer == whole[start:end]


def test_reading_past_the_end_is_refused(path: Path) -> None:
    """A tensor ends where its shape says."""
    with open_gguf(llama(path)) as opened:
        tensor = opened.source.tensors["model.norm.weight"]
        with pytest.raises(BadSource, match="ends before byte"):
            opened.read_into(tensor, 2, memoryview(bytearray(tensor.nbytes)))


# -- config ----------------------------------------------------------------------------------------


def llama3_factors(factor: float, width: int = WIDTH, base: float = 500000.0) -> Floats:
    """The rotary factors of a Llama 3 model, from the definition."""
    found = []
    for n in range(0, width, 2):
        wave = 2 * math.pi * base ** (n / width)
        smooth = min(max((8192 / wave - 1) / 3, 0), 1)
        found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered_from_its_factors(path: Path, factor: float) -> None:
    """The tensor of rotary factors becomes rope_scaling, and the plan says where it went."""
    tensors = stored(model(LLAMA), "BF16", convert_llama)
    tensors["rope_freqs.weight"] = (llama3_factors(factor), "F32")
    write_gguf(path, "llama", tensors, {**KEYS, "rope.freq_base": 500000.0})
    with open_gguf(path) as opened:
        assert config_of(opened)["rope_scaling"] == {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        }  # fmt: skip
        assert not any("rope" in name for name in opened.source.tensors)
    left_out = {f.name: f.reason for f in plan(path).files if f.media_type is None}
    assert "rope_scaling" in left_out["m.gguf:rope_freqs.weight"]


def test_unknown_rotary_factors_are_refused(path: Path) -> None:
    """Factors that no config can express are not dropped in silence."""
    tensors = stored(model(LLAMA), "BF16", convert_llama)
    tensors["rope_freqs.weight"] = (np.linspace(1, 3, WIDTH // 2, dtype=np.float32), "F32")
    with pytest.raises(BadSource, match="rotary factors") as caught:
        open_gguf(write_gguf(path, "llama", tensors))
    assert caught.value.kind == "unsupported_gguf_rope"


def test_linear_and_yarn_scaling_are_carried_over(path: Path) -> None:
    """Rotary scaling that is stored as keys becomes rope_scaling."""
    keys = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    with open_gguf(llama(path, keys=keys)) as opened:
        expected = {"type": "linear", "rope_type": "linear", "factor": 8.0}
        assert config_of(opened)["rope_scaling"] == expected
    keys = {
        "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
    }  # fmt: skip
    with open_gguf(llama(path, keys=keys)) as opened:
        assert config_of(opened)["rope_scaling"]["original_max_position_embeddings"] == 64


# -- a real model ----------------------------------------------------------------------------------


def test_smollm_has_the_tensors_its_config_asks_for(smollm: Path) -> None:
    """Names and shapes are complete for a llama with this config."""
    with open_gguf(smollm, decode=True) as opened:
        config, tensors = config_of(opened), opened.source.tensors
        hidden, ffn, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
        kv = config["num_key_value_heads"] * config["head_dim"]
        expected = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
        for n in range(config["num_hidden_layers"]):
            shapes = {
                "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
                "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden),
                "self_attn.v_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
                "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
                "mlp.down_proj": (hidden, ffn),
            }  # fmt: skip
            expected |= {f"model.layers.{n}.{k}.weight": v for k, v in shapes.items()}
        assert {name: t.shape for name, t in tensors.items()} == expected
        assert {t.dtype for t in tensors.values()} == {"BF16"}


def test_smollm_has_the_published_config(smollm: Path) -> None:
    """The rebuilt config says what the model's own says."""
    with open_gguf(smollm, decode=True) as opened:
        assert config_of(opened) == {
            "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 1,
            "eos_token_id": 2, "head_dim": 64, "hidden_act": "silu", "hidden_size": 576,
            "intermediate_size": 1536, "max_position_embeddings": 8192, "mlp_bias": False,
            "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30,
            "num_key_value_heads": 3, "pad_token_id": 2, "rms_norm_eps": 1e-05,
            "rope_theta": 100000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "vocab_size": 49152,
        }  # fmt: skip
        generation = json.loads(opened.read_file("generation_config.json"))
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_smollm_has_the_values_the_library_decodes(smollm: Path) -> None:
    """Every tensor equals the library's own reading with the permutation undone."""
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    layer = {gguf: name for name, (gguf, _) in LLAMA[2].items()} | {
        gguf: name for name, gguf in LLAMA[0].items()
    }
    with open_gguf(smollm, decode=True) as opened:
        for tensor in GGUFReader(smollm).tensors:
            values = quants.dequantize(tensor.data, tensor.tensor_type)
            stem = tensor.name.removesuffix(".weight")
            if stem not in names:
                _, n, part = stem.split(".", 2)
                name = f"model.layers.{n}.{layer[part]}.weight"
                heads = {"attn_q": 9, "attn_k": 3}.get(part)
                if heads:
                    pairs = values.reshape(heads, 32, 2, -1)
                    values = np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], 1).reshape(-1, 576)
            else:
                name = f"{names[stem]}.weight"
            assert raw(opened, name) == as_bf16(values), name


def test_smollm_has_its_tokenizer(smollm: Path) -> None:
    """Text comes back from its tokens; digits stand alone; special tokens are one token."""
    with open_gguf(smollm) as opened:
        tokenizer = Tokenizer.from_str(opened.read_file("tokenizer.json").decode())
    for text in (
        "Hello, world!",
        " two  spaces\n\ttab",
        "naïve café 日本語 🙂",
        "it's 12345 o'clock",
    ):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("2024").tokens == list("2024")
    assert tokenizer.encode("The capital of France").ids == [504, 3575, 282, 4649]
    ids = tokenizer.encode("<|im_start|>user<|im_end|>").ids
    assert (ids[0], ids[-1], len(ids)) == (1, 2, 3)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user"
    assert tokenizer.get_vocab_size() == 49152


def test_smollm_has_its_chat_template(smollm: Path) -> None:
    """The template is in both places where runtimes look, and renders."""
    with open_gguf(smollm) as opened:
        text = opened.read_file("chat_template.jinja").decode()
        config = json.loads(opened.read_file("tokenizer_config.json"))
    assert config["chat_template"] == text
    special = {k: config[f"{k}_token"] for k in ("bos", "eos", "unk", "pad")}
    assert special == {
        "bos": "<|im_start|>", "eos": "<|im_end|>", "unk": "<|endoftext|>", "pad": "<|im_end|>"
    }  # fmt: skip
    assert config["add_bos_token"] is False
    shown = jinja2.Template(text).render(messages=FRANCE, add_generation_prompt=True)
    assert shown.endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_smollm_goes_into_the_store(smollm: Path, tmp_path: Path) -> None:
    """A GGUF file is created like any checkpoint, the same bytes with any number of workers."""
    store = Store(tmp_path)
    made = create("smol", smollm, store=store, quantize="int4", workers=3)
    again = create("smol", smollm, store=store, quantize="int4", workers=1)
    assert (made.digest, made.new_blobs > 0) == (again.digest, True)
    names = {ref.name for ref in store.get_manifest(made.name).blobs}
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not verify(store).damage


# -- tokenizers ------------------------------------------------------------------------------------

CONTROL, USER, BYTE = 3, 4, 6


def spm(path: Path, **more: Any) -> Path:
    """A small llama with a SentencePiece vocabulary."""
    pieces: list[tuple[str, float, int]] = [
        ("<unk>", 0.0, 2), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<0x21>", 0.0, BYTE),
        ("\u2581a", -1.0, 1), ("bc", -2.0, 1), ("ab", -0.5, 1), ("\u2581", -3.0, 1),
        ("a", -4.0, 1), ("b", -5.0, 1), ("c", -6.0, 1), ("<tool>", 0.0, USER),
    ]  # fmt: skip
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [p[0] for p in pieces],
        "tokenizer.ggml.scores": [p[1] for p in pieces],
        "tokenizer.ggml.token_type": [p[2] for p in pieces],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0, **more,
    }  # fmt: skip
    return llama(path, **keys)


def tokenizer_of(path: Path) -> Any:
    with open_gguf(path) as opened:
        return Tokenizer.from_str(opened.read_file("tokenizer.json").decode())


def test_sentencepiece_joins_the_best_pair_first(path: Path) -> None:
    """Scores decide which pairs are joined, unknown characters become bytes, BOS goes first."""
    tokenizer = tokenizer_of(spm(path))
    assert tokenizer.encode("abc").tokens == ["<s>", "\u2581", "ab", "c"]
    assert tokenizer.encode("abc", add_special_tokens=False).ids == [7, 6, 10]
    assert tokenizer.encode("a!", add_special_tokens=False).tokens == ["\u2581a", "<0x21>"]
    assert tokenizer.encode("<tool>", add_special_tokens=False).ids == [11]
    assert tokenizer.decode(tokenizer.encode("a bc!").ids) == "a bc!"


def test_sentencepiece_without_a_leading_space(path: Path) -> None:
    """A file may say that text gets no space before it, and that no BOS goes first."""
    more = {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    tokenizer = tokenizer_of(spm(path, **more))
    assert tokenizer.encode("a bc").tokens == ["a", "\u2581", "bc"]
    assert tokenizer.decode(tokenizer.encode(" bc").ids) == " bc"


LETTERS = ["a", "b", "c", "1", "2", "3", "4", "\u0120", "ab", "12", "123", "<|x|>"]


def bpe(path: Path, pre: str, **more: Any) -> Path:
    """A small llama with a byte-level vocabulary."""
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": LETTERS, "tokenizer.ggml.token_type": [1] * 11 + [CONTROL],
        "tokenizer.ggml.merges": ["a b", "1 2", "12 3"], "tokenizer.ggml.bos_token_id": 11, **more,
    }  # fmt: skip
    return llama(path, **keys)


@pytest.mark.parametrize(
    ("pre", "digits"),
    [
        ("gpt-2", ["123", "4"]),
        ("olmo", ["123", "4"]),
        ("smollm", ["1", "2", "3", "4"]),
        ("llama-bpe", ["<|x|>", "123", "4"]),
        ("qwen2", ["1", "2", "3", "4"]),
        ("tekken", ["<|x|>", "1", "2", "3", "4"]),
        ("gpt-4o", ["123", "4"]),
    ],
)
def test_the_pre_tokenizer_decides_how_text_is_cut(path: Path, pre: str, digits: list[str]) -> None:
    """Each known pre-tokenizer cuts digits its own way; some put BOS first unless told not to."""
    tokenizer = tokenizer_of(bpe(path, pre))
    assert tokenizer.encode("1234").tokens == digits
    assert tokenizer.encode("ab<|x|>c", add_special_tokens=False).tokens == ["ab", "<|x|>", "c"]
    assert tokenizer.decode(tokenizer.encode("ab c 12").ids) == "ab c 12"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tokenizer.ggml.pre": "no-such"}, "'no-such' is not known"),
        ({"tokenizer.ggml.model": "t5"}, "type 't5'"),
    ],
)
def test_unknown_tokenizers_are_refused_by_name(
    path: Path, keys: dict[str, str], message: str
) -> None:
    """What text becomes is never guessed."""
    with pytest.raises(BadSource, match=message) as caught:
        open_gguf(bpe(path, **{"pre": "gpt-2", **keys}))
    assert caught.value.kind == "unsupported_gguf_tokenizer"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tokenizer.ggml.merges": ["a x"]}, "merge 'a x'"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "appear twice"),
        ({"tokenizer.ggml.token_type": [1]}, "token types"),
        ({"tokenizer.ggml.bos_token_id": 12}, "bos token is 12"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "not an array of str"),
    ],
)
def test_contradictory_vocabularies_are_refused(
    path: Path, keys: dict[str, Any], message: str
) -> None:
    """Tokens, types, merges and ids must fit together."""
    with pytest.raises(BadSource, match=message) as caught:
        open_gguf(bpe(path, "gpt-2", **keys))
    assert caught.value.kind == "bad_gguf"


# -- where the file is -----------------------------------------------------------------------------


def test_a_directory_with_one_gguf_file_is_that_file(path: Path) -> None:
    """A directory whose only weights are a GGUF file can be given instead of the file."""
    llama(path)
    assert plan(path.parent).fingerprint == plan(path).fingerprint


def test_two_gguf_files_in_a_directory_are_refused(path: Path) -> None:
    """Which of several files is meant must be said."""
    llama(path)
    (path.parent / "n.gguf").write_bytes(path.read_bytes())
    with pytest.raises(BadSource, match=r"m\.gguf, n\.gguf") as caught:
        open_source(path.parent)
    assert caught.value.kind == "ambiguous_source"


def test_safetensors_go_before_gguf(path: Path) -> None:
    """A directory with safetensors is a checkpoint directory, whatever else lies there."""
    llama(path)
    (path.parent / "model.safetensors").write_bytes(b"")
    (path.parent / "config.json").write_text("{}")
    with pytest.raises(BadSource, match=r"model\.safetensors"):
        open_source(path.parent)


def test_a_link_out_of_the_directory_is_refused(path: Path, tmp_path: Path) -> None:
    """A GGUF file in a directory may not be a link to somewhere else unless links are followed."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "x.gguf").symlink_to(llama(path))
    with pytest.raises(BadSource, match="outside the checkpoint"):
        open_source(folder)
    with open_source(folder, follow_links=True) as opened:
        assert opened.source.tensors


def test_both_kinds_of_source_have_the_same_surface() -> None:
    """What create asks of a source is what both offer."""
    surface = {name for name in vars(OpenSource) if name[0] != "_" and name != "source"}
    assert surface <= set(dir(Checkpoint)) & set(dir(GgufCheckpoint))


def test_a_changed_file_is_noticed(path: Path) -> None:
    """Writing to the file while it is read fails the creation."""
    with open_gguf(llama(path)) as opened:
        opened.check_unchanged()
        path.write_bytes(path.read_bytes() + b"x")
        with pytest.raises(BadSource, match="changed while it was read"):
            opened.check_unchanged()


def test_a_cut_file_is_noticed_while_it_is_read(path: Path) -> None:
    """Bytes that are gone are an error, never a crash."""
    with open_gguf(llama(path)) as opened:
        path.write_bytes(b"")
        with pytest.raises(BadSource, match="changed while it was read"):
            raw(opened, "model.norm.weight")


def test_without_the_library_the_extra_is_named(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has not installed the extra is told how to."""
    llama(path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BadRequest, match="gguf library") as caught:
        plan(path)
    assert caught.value.hint == "pip install 'quantmill[gguf]'"


# -- files that lie --------------------------------------------------------------------------------


def gguf_bytes(tensors: int = 0, keys: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def entry(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


LIES = {
    "empty": (b"", "does not end"),
    "magic": (b"GGML" + bytes(40), "not a GGUF file"),
    "version": (gguf_bytes(version=9), "version is 9"),
    "big-endian": (gguf_bytes(version=3 << 24), "big-endian"),
    "many tensors": (gguf_bytes(tensors=2**62), "claims 4611686018427387904 tensors"),
    "many keys": (gguf_bytes(keys=2**40), "claims"),
    "long key": (gguf_bytes(keys=1, rest=struct.pack("<Q", 2**50) + bytes(64)), "a key claims"),
    "text that is none": (
        gguf_bytes(keys=1, rest=struct.pack("<Q", 1) + b"\xff" + bytes(64)), "invalid UTF-8",
    ),
    "long text": (
        gguf_bytes(keys=1, rest=text("k") + struct.pack("<IQ", 8, 2**50)), "k claims",
    ),
    "long array": (
        gguf_bytes(keys=1, rest=text("k") + struct.pack("<IIQ", 9, 0, 2**60) + bytes(99)), "claims",
    ),
    "long array of texts": (
        gguf_bytes(keys=1, rest=text("k") + struct.pack("<IIQ", 9, 8, 2**20) + bytes(99)), "claims",
    ),
    "array of arrays": (
        gguf_bytes(keys=1, rest=text("k") + struct.pack("<IIQ", 9, 9, 1)), "unknown type 9",
    ),
    "value of no type": (
        gguf_bytes(keys=1, rest=text("k") + struct.pack("<II", 77, 0)), "unknown type 77",
    ),
    "key twice": (
        gguf_bytes(keys=2, rest=2 * (text("k") + struct.pack("<II", 4, 0))), "appears twice",
    ),
    "alignment": (
        gguf_bytes(keys=1, rest=text("general.alignment") + struct.pack("<II", 4, 3)), "alignment",
    ),
    "tensor twice": (gguf_bytes(2, rest=2 * entry("t", (1,), 0, 0) + bytes(64)), "appears twice"),
    "tensor of no type": (gguf_bytes(1, rest=entry("t", (1,), 999, 0)), "unknown type 999"),
    "tensor of no size": (gguf_bytes(1, rest=entry("t", (0,), 0, 0)), r"shape \[0\]"),
    "part of a block": (gguf_bytes(1, rest=entry("t", (33,), 8, 0)), r"shape \[33\]"),
    "huge tensor": (gguf_bytes(1, rest=entry("t", (2**62, 2**62), 0, 0)), "ends at byte"),
    "far away": (gguf_bytes(1, rest=entry("t", (1,), 0, 2**63) + bytes(64)), "ends at byte"),
    "five dimensions": (gguf_bytes(1, rest=entry("t", (1,) * 5, 0, 0)), "5 dimensions"),
    "four billion dimensions": (
        gguf_bytes(1, rest=text("t") + struct.pack("<I", 2**32 - 1) + bytes(64)), "dimensions",
    ),
    "no architecture": (gguf_bytes(), "architecture None"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_files_that_lie_are_refused_by_name(path: Path, lie: str) -> None:
    """Every count and offset is checked against the file before anything follows it."""
    data, message = LIES[lie]
    path.write_bytes(data)
    with pytest.raises(BadSource, match=message) as caught:
        plan(path)
    assert "m.gguf" in caught.value.message
    assert caught.value.kind in {"bad_gguf", "unsupported_gguf_architecture"}


def test_a_file_cut_anywhere_is_refused(path: Path) -> None:
    """However much of a file is missing, what is said is that it is damaged."""
    whole = bpe(path, "gpt-2").read_bytes()
    cuts = [*range(0, 4000, 37), *range(4000, len(whole) - 33, 4999), len(whole) - 33]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(BadSource) as caught:
            open_gguf(path)
        assert caught.value.kind == "bad_gguf", cut


def test_a_header_with_flipped_bytes_is_read_or_refused(path: Path) -> None:
    """No byte of a header can cause anything but an answer or a BadSource."""
    whole = bpe(path, "gpt-2").read_bytes()
    random = np.random.default_rng(7)
    for _ in range(300):
        data = bytearray(whole)
        for at in random.integers(4, 3500, 3).tolist():
            data[at] = int(random.integers(0, 256))
        path.write_bytes(data)
        try:
            with open_gguf(path) as opened:
                plan_for(opened.source, Request("int8"))
        except BadSource as error:
            assert error.kind  # noqa: PT017


@pytest.mark.parametrize("arch", ["falcon", "mamba", "no-such"])
def test_unknown_architectures_are_refused_by_name(path: Path, arch: str) -> None:
    """An architecture whose conversion is not known is never guessed."""
    write_gguf(path, arch, {"token_embd.weight": (weights((VOCAB, HIDDEN), 0), "F32")})
    with pytest.raises(BadSource, match=f"architecture '{arch}'") as caught:
        plan(path)
    assert caught.value.kind == "unsupported_gguf_architecture"


@pytest.mark.parametrize(
    ("change", "message", "kind"),
    [
        ({"blk.0.ffn_mystery.weight": (64, 64)}, "no place", "unsupported_gguf_tensor"),
        ({"blk.0.attn_norm.weight": None}, "is missing", "missing_tensor"),
        ({"blk.0.attn_q.weight": (48, 64)}, "48 rows for 4 heads", "bad_gguf"),
        ({"blk.0.ffn_up.weight": (4, 4, 64)}, "has shape", "bad_gguf"),
        ({"output_norm.weight": (4, 16)}, "has shape", "bad_gguf"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    path: Path, change: dict[str, tuple[int, ...] | None], message: str, kind: str
) -> None:
    """A tensor too many, one too few, or of the wrong shape is named."""
    tensors = stored(model(LLAMA), "F32", convert_llama)
    for name, shape in change.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = (weights(shape, 0), "F32")
    write_gguf(path, "llama", tensors)
    with pytest.raises(BadSource, match=message) as caught:
        open_gguf(path)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"block_count": 10**9}, "claims 1000000000 layers"),
        ({"attention.head_count": 0}, "head_count is 0"),
        ({"attention.head_count_kv": [1, 2]}, "is an array"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "is nan"),
        ({"embedding_length": "x"}, "is 'x'"),
        ({"rope.scaling.type": "strange", "rope.scaling.factor": 2.0}, "'strange'"),
        ({"expert_count": 8}, "Mixtral"),
    ],
)
def test_metadata_that_cannot_be_used_is_refused(
    path: Path, keys: dict[str, Any], message: str
) -> None:
    """A number that is absurd, missing or of the wrong type is named with its key."""
    with pytest.raises(BadSource, match=message):
        open_gguf(llama(path, keys=keys))


def test_parts_of_a_split_model_are_refused(path: Path) -> None:
    """A file that is one of several is not taken for the whole."""
    with pytest.raises(BadSource, match="one of 3 parts"):
        open_gguf(llama(path, **dict[str, Any]({"split.count": 3})))


def test_pipes_and_missing_files_are_refused(path: Path, tmp_path: Path) -> None:
    """A pipe is refused without waiting for a writer, an absent file like an absent directory."""
    os.mkfifo(path)
    with pytest.raises(BadSource, match="not a regular file"):
        plan(path)
    with pytest.raises(BadSource, match="does not exist"):
        plan(tmp_path / "absent.gguf")


def test_memory_does_not_grow_with_the_tensor(path: Path) -> None:
    """Reading a part decodes that part and no more, a piece at a time."""
    assert PIECE * DTYPE_BYTES["F32"] <= 2**20
    found = model(LLAMA)
    big = weights((VOCAB * 4000, HIDDEN), 1)
    found["model.embed_tokens.weight"] = ("token_embd.weight", big)
    write_gguf(path, "llama", stored(found, "Q8_0", convert_llama))
    with open_gguf(path, decode=True) as opened:
        tensor = opened.source.tensors["model.embed_tokens.weight"]
        buffer = memoryview(bytearray(2**20))
        tracemalloc.start()
        for offset in range(0, tensor.nbytes - 2**20, 2**20):
            opened.read_into(tensor, offset, buffer)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert tensor.nbytes > 5 * 2**20
    assert peak < 16 * 2**20
