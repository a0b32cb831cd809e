"""config.json and generation_config.json, rebuilt from a GGUF file's metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantmill.errors import BadSource
from quantmill.ggufheader import GgufHeader, bad_gguf
from quantmill.ggufnames import EMBEDDING, OUTPUT, ROPE_FACTORS, Architecture, architecture_of

_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}

# Llama 3's rotary scaling is stored as one factor per frequency. All published models share these.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_SAME = 1e-3

# Layers of the one size whose attention is scaled by the width instead of by the head.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
_GEMMA3_PATTERN = 6

_WITH_BIAS_KEY = frozenset(
    {"llama", "qwen3", "qwen3_moe", "granite", "smollm3", "olmo2", "gpt_oss"}
)
_WITH_MLP_BIAS_KEY = frozenset({"llama", "granite", "smollm3"})

# The one step at which published models of this kind leave out rotary embeddings.
_SMOLLM3_STEP = 4

_WINDOW = "attention.sliding_window"
_EPSILONS = {
    False: ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    True: ("norm_epsilon", "attention.layer_norm_epsilon"),
}

_TORCH = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention heads and their width."""

    queries: int
    keys: int
    width: int


class Metadata:
    """The keys of one architecture; whatever is absent or of a wrong type is an error by name."""

    def __init__(self, header: GgufHeader, file: str) -> None:
        self.file, self._all = file, header.metadata
        self.name = self._all.get("general.architecture")
        self.row: Architecture = architecture_of(self.name, file)

    def number(self, key: str, default: float | None = None) -> Any:
        """A positive number of this architecture."""
        return self._positive(f"{self.name}.{key}", default, (int, float))

    def whole(self, key: str, default: int | None = None) -> int:
        """A positive whole number of this architecture."""
        found: int = self._positive(f"{self.name}.{key}", default, (int,))
        return found

    def has(self, key: str) -> bool:
        """Whether this architecture's key is there."""
        return f"{self.name}.{key}" in self._all

    def get(self, key: str) -> Any:
        """Any key by its full name, None when absent."""
        return self._all.get(key)

    def token_id(self, which: str) -> int | None:
        """The id of the `bos`, `eos`, `eot`, `padding` or `unknown` token."""
        found = self._all.get(f"tokenizer.ggml.{which}_token_id")
        if found is not None and (type(found) is not int or found < 0):
            raise bad_gguf(self.file, f"tokenizer.ggml.{which}_token_id is {found!r}")
        return found

    def _positive(self, key: str, default: float | None, kinds: tuple[type, ...]) -> Any:
        found = self._all.get(key, default)
        if type(found) not in kinds or not 0 < found < math.inf:
            problem = "is missing" if found is None else f"is {_brief(found)}"
            raise bad_gguf(self.file, f"{key} {problem}")
        return found


def _brief(value: Any) -> str:
    return "an array" if isinstance(value, tuple) else repr(value)


def heads_of(found: Metadata) -> Heads:
    """Counts and width of the attention heads."""
    queries = found.whole("attention.head_count")
    width = found.whole("attention.key_length", found.whole("embedding_length") // queries)
    if found.whole("attention.value_length", width) != width:
        raise bad_gguf(found.file, "attention values are not as wide as its keys")
    return Heads(queries, found.whole("attention.head_count_kv", queries), width)


def rebuild_config(
    found: Metadata, header: GgufHeader, dtype: str, factors: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """config.json as the model's own would be, in the spelling that transformers and mlx-lm read.

    `dtype` is the one of the matrices, `factors` the content of the ROPE_FACTORS tensors.
    """
    heads, row = heads_of(found), found.row
    _refuse_relatives(found)
    config = {
        "architectures": [row.class_name],
        "model_type": row.model_type,
        "hidden_size": found.whole("embedding_length"),
        "num_hidden_layers": found.whole("block_count"),
        "intermediate_size": found.whole("feed_forward_length"),
        "num_attention_heads": heads.queries,
        "num_key_value_heads": heads.keys,
        "head_dim": heads.width,
        "hidden_act": None if row.norm_shift else "gelu_pytorch_tanh" if row.layer_norm else "silu",
        "hidden_activation": "gelu_pytorch_tanh" if row.norm_shift else None,
        _EPSILONS[row.layer_norm][0]: found.number(_EPSILONS[row.layer_norm][1]),
        "rope_theta": float(found.number("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(found, heads, factors),
        "vocab_size": header.tensors[EMBEDDING].shape[0],
        "max_position_embeddings": found.whole("context_length"),
        "tie_word_embeddings": OUTPUT not in header.tensors,
        "torch_dtype": _TORCH[dtype],
    }
    config |= {key: found.token_id(which) for key, which in _IDS.items()}
    if row.model_type in _WITH_BIAS_KEY:
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    if row.layer_norm:
        config["use_bias"] = "blk.0.attn_q.bias" in header.tensors
    if row.model_type in _WITH_MLP_BIAS_KEY:
        config["mlp_bias"] = "blk.0.ffn_down.bias" in header.tensors
    if row.model_type in _SPECIFIC:
        config |= _SPECIFIC[row.model_type](found)
    return {key: value for key, value in config.items() if value is not None}


def _refuse_relatives(found: Metadata) -> None:
    """Raise BadSource for models that go by the name of another architecture."""
    relatives = {("llama", "expert_count"): "Mixtral", ("olmo2", _WINDOW): "Olmo 3"}
    for (name, key), what in relatives.items():
        if found.name == name and found.has(key):
            raise BadSource(
                f"{found.file}: GGUF files of {what} models cannot be imported",
                kind="unsupported_gguf_architecture",
            )


def rebuild_generation_config(found: Metadata) -> dict[str, Any]:
    """generation_config.json; {} when the file names no tokens."""
    config: dict[str, Any] = {key: found.token_id(which) for key, which in _IDS.items()}
    ends = [found.token_id("eos"), found.token_id("eot")]
    unique = list(dict.fromkeys(end for end in ends if end is not None))
    config["eos_token_id"] = unique if len(unique) > 1 else next(iter(unique), None)
    return {key: value for key, value in config.items() if value is not None}


# -- what only some architectures have -------------------------------------------------------------


def _moe(found: Metadata) -> dict[str, Any]:
    return {
        "num_experts": found.whole("expert_count"),
        "num_experts_per_tok": found.whole("expert_used_count"),
        "moe_intermediate_size": found.whole("expert_feed_forward_length"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen2_moe(found: Metadata) -> dict[str, Any]:
    shared = found.whole("expert_shared_feed_forward_length")
    return _moe(found) | {"shared_expert_intermediate_size": shared, "norm_topk_prob": False}


def _qwen3_moe(found: Metadata) -> dict[str, Any]:
    # no key says so; every runtime of these files normalizes
    return _moe(found) | {"norm_topk_prob": True}


def _gemma2(found: Metadata) -> dict[str, Any]:
    return {
        "attn_logit_softcapping": found.number("attn_logit_softcapping"),
        "final_logit_softcapping": found.number("final_logit_softcapping"),
        "query_pre_attn_scalar": _attention_scalar(found),
        "sliding_window": found.whole("attention.sliding_window"),
    }


def _gemma3(found: Metadata) -> dict[str, Any]:
    return {
        "query_pre_attn_scalar": _attention_scalar(found),
        "rope_local_base_freq": float(found.number("rope.freq_base_swa", 10000.0)),
        "sliding_window": found.whole("attention.sliding_window"),
        "sliding_window_pattern": found.whole("attention.sliding_window_pattern", _GEMMA3_PATTERN),
    }


def _attention_scalar(found: Metadata) -> int:
    heads = heads_of(found)
    if found.whole("block_count") == _SCALED_BY_WIDTH[str(found.name)]:
        return found.whole("embedding_length") // heads.queries
    return heads.width


def _phi3(found: Metadata) -> dict[str, Any]:
    context, width = found.whole("context_length"), heads_of(found).width
    original = found.whole("rope.scaling.original_context_length", context)
    return {
        "partial_rotary_factor": found.whole("rope.dimension_count", width) / width,
        "original_max_position_embeddings": original,
        "sliding_window": found.get("phi3.attention.sliding_window") or None,
    }


def _granite(found: Metadata) -> dict[str, Any]:
    return {
        "attention_multiplier": float(found.number("attention.scale")),
        "embedding_multiplier": float(found.number("embedding_scale")),
        "residual_multiplier": float(found.number("residual_scale")),
        "logits_scaling": float(found.number("logit_scale")),
    }


def _smollm3(found: Metadata) -> dict[str, Any]:
    del found
    return {"no_rope_layer_interval": _SMOLLM3_STEP}


def _gpt_oss(found: Metadata) -> dict[str, Any]:
    kinds = ("sliding_attention", "full_attention")
    layers = found.whole("block_count")
    return {
        "num_local_experts": found.whole("expert_count"),
        "num_experts_per_tok": found.whole("expert_used_count"),
        "intermediate_size": found.whole("expert_feed_forward_length"),
        "sliding_window": found.whole(_WINDOW),
        "layer_types": [kinds[n % 2] for n in range(layers)],
    }


_SPECIFIC = {
    "qwen2_moe": _qwen2_moe, "qwen3_moe": _qwen3_moe, "gemma2": _gemma2, "gemma3_text": _gemma3,
    "phi3": _phi3, "granite": _granite, "smollm3": _smollm3,
    "gpt_oss": _gpt_oss,
}  # fmt: skip


# -- rotary embedding ------------------------------------------------------------------------------


def _rope_scaling(
    found: Metadata, heads: Heads, factors: Mapping[str, Sequence[float]]
) -> dict[str, Any] | None:
    every, long, short = (factors.get(name) for name in ROPE_FACTORS)
    if every is not None:
        return _llama3_scaling(found, heads, every)
    if long is not None and short is not None and found.row.model_type == "phi3":
        return {
            "type": "longrope", "rope_type": "longrope",
            "long_factor": list(long), "short_factor": list(short),
        }  # fmt: skip
    if long is not None or short is not None:
        raise _unknown_scaling(found, "long and short rotary factors")
    kind = found.get(f"{found.name}.rope.scaling.type") or "none"
    if kind == "none":
        return None
    scaling = {
        "type": kind,
        "rope_type": kind,
        "factor": float(found.number("rope.scaling.factor")),
    }
    if kind == "yarn":
        return scaling | _yarn(found)
    if kind != "linear":
        raise _unknown_scaling(found, f"rotary scaling {kind!r}")
    return scaling


def _yarn(found: Metadata) -> dict[str, Any]:
    original = found.whole("rope.scaling.original_context_length")
    ends = {
        key: float(found.number(f"rope.scaling.yarn_{key}"))
        for key in ("beta_fast", "beta_slow")
        if found.has(f"rope.scaling.yarn_{key}")
    }
    # its published models do not round the ends of the range to whole dimensions
    exact = {"truncate": False} if found.row.model_type == "gpt_oss" else {}
    return {"original_max_position_embeddings": original, **ends, **exact}


def _llama3_scaling(
    found: Metadata, heads: Heads, stored: Sequence[float]
) -> dict[str, Any] | None:
    """The parameters whose factors are the stored ones; None where they scale nothing."""
    factor = max(stored)
    base = float(found.number("rope.freq_base", 10000.0))
    expected = [
        _llama3_factor(2 * math.pi * base ** (2 * n / heads.width), factor)
        for n in range(len(stored))
    ]
    close = all(math.isclose(a, b, rel_tol=_SAME) for a, b in zip(stored, expected, strict=True))
    if not close or len(stored) != heads.width // 2:
        raise _unknown_scaling(found, "rotary factors that are not those of Llama 3")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3} if factor != 1 else None


def _llama3_factor(wavelength: float, factor: float) -> float:
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    turns = _LLAMA3["original_max_position_embeddings"] / wavelength
    if turns > high:
        return 1.0
    if turns < low:
        return factor
    smooth = (turns - low) / (high - low)
    return 1 / ((1 - smooth) / factor + smooth)


def _unknown_scaling(found: Metadata, what: str) -> BadSource:
    return BadSource(
        f"{found.file}: {what} cannot be written as a config", kind="unsupported_gguf_rope"
    )
