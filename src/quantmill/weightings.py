"""How much each column of a weight counts in a search: which tensors say so, decided by names.

Where a weight's input comes straight from a norm, the norm's weights squared are the input's second
moments up to one factor; through another matrix they are carried along, as independent inputs of
equal size would be. docs/fidelity.md gives the formulas and where they are from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantmill.errors import BadPlan, BadRequest
from quantmill.formats import FLOAT_DTYPES, Format
from quantmill.plans import (
    CALIBRATED,
    CEIL,
    CPU_PROFILE,
    DECODING,
    RECODE,
    RTN,
    SEARCH,
    BlobSpec,
    Plan,
    TensorSpec,
    Weighting,
)
from quantmill.source import DRAFT, MODEL, Source

# Architectures whose attention and MLP read a norm of their own, and what is added to its weights.
_PRE_NORMS: Mapping[str, float] = {
    "llama": 0, "mistral": 0, "mixtral": 0, "qwen2": 0, "qwen2_moe": 0, "qwen3": 0, "qwen3_moe": 0,
    "phi3": 0, "granite": 0, "smollm3": 0, "gemma": 1, "gemma2": 1, "gemma3_text": 1,
}  # fmt: skip

# Encoders whose norms, with a bias, stand behind attention and MLP: each is what the next reads.
# Inputs that no norm gives have columns so alike here that equal weights gain in every format.
_POST_NORMS = frozenset({"bert", "roberta", "xlm-roberta", "camembert"})

_IN_LAYER = re.compile(r"(?P<layer>(?:.*\.)?layers\.[0-9]+\.)(?P<part>.+)\.weight")
_ATTENTION = re.compile(r"(?P<of>self_attn\.)(?P<what>q|k|v|qkv|o)_proj")
_MLP = re.compile(
    r"(?P<of>(?:mlp|mlp\.shared_expert|mlp\.experts\.[0-9]+|block_sparse_moe\.experts\.[0-9]+)\.)"
    r"(?P<what>gate_proj|up_proj|gate_up_proj|down_proj|w1|w2|w3)"
)
_IN_ENCODER = re.compile(
    r"(?P<model>(?:.*\.)?)encoder\.layer\.(?P<layer>[0-9]{1,6})\."
    r"(?:attention\.self\.(?:query|key|value)|(?P<middle>intermediate\.dense))\.weight"
)
_POOLER = "pooler.dense.weight"
_BEFORE_DOWN = {"down_proj": ("gate_proj", "up_proj"), "w2": ("w1", "w3")}
_NARROW = 4
"""Affine formats of so many bits or fewer get worse when every column of a decoder counts alike."""


def with_methods(plan: Plan, source: Source) -> Plan:
    """The plan with a method for every tensor that gets one, and what weighs its columns.

    A tensor whose columns cannot be weighed is searched with equal weights in formats that gain by
    that, and rounded to nearest in affine formats of 4 bits and fewer, which do not but in encoders
    like BERT. Raises BadRequest for an unknown method, or beside options of another rounding. A
    calibrated method is for the weights of the model itself: those of a draft model are searched.
    Raises BadPlan for a calibrated method of a pipeline.
    """
    options = plan.options
    if options.method == RTN:
        return plan
    if options.method not in {SEARCH, *CALIBRATED}:
        raise BadRequest(
            f"unknown method {options.method!r}", hint="choose rtn, search, aware or gptq"
        )
    if options.profile != CPU_PROFILE or options.rounding != CEIL or options.global_scale:
        raise BadRequest(
            f"the method {options.method} has a rounding of its own",
            hint="leave out --profile, --device, --e8m0 and --global-scale",
        )
    if options.method in CALIBRATED and source.is_pipeline:
        raise BadPlan(
            f"the method {options.method} needs a forward pass, which a pipeline has none of",
            kind="pipeline",
            hint="--method search needs none",
        )
    blobs = tuple(_blob(blob, source, options.method) for blob in plan.blobs)
    return replace(plan, blobs=blobs)


def _blob(blob: BlobSpec, source: Source, method: str) -> BlobSpec:
    return replace(blob, tensors=tuple(_spec(spec, source, method) for spec in blob.tensors))


def _spec(spec: TensorSpec, source: Source, method: str) -> TensorSpec:
    fmt = spec.format
    if fmt is None or spec.transform == RECODE or spec.global_scale:
        return spec
    found = _weightings(spec, source)
    narrow = is_worse_unweighed(fmt)
    worse = narrow and not found and not _gains_by_equal_weights(spec, source)
    if method in CALIBRATED and not _is_draft(spec, source):
        return replace(spec, method=method, weightings=found, fallback=RTN if worse else SEARCH)
    return spec if worse else replace(spec, method=SEARCH, weightings=found)


def is_worse_unweighed(fmt: Format) -> bool:
    """Whether a search in which all columns count the same does worse than rounding."""
    return fmt.mode == "affine" and fmt.bits <= _NARROW


def _is_draft(spec: TensorSpec, source: Source) -> bool:
    draft = source.draft
    return draft is not None and spec.sources[0].startswith(draft.folder)


def _gains_by_equal_weights(spec: TensorSpec, source: Source) -> bool:
    part, _ = _part_of(spec.sources[0], source)
    return _kind(_text_config(part)) in _POST_NORMS


def _weightings(spec: TensorSpec, source: Source) -> tuple[Weighting, ...]:
    """One for each matrix of the tensor; none where one of them cannot be weighed."""
    if spec.transform in DECODING:  # what its parts are called is no name of a weight
        return ()
    found = []
    for name in spec.sources:
        part, own = _part_of(name, source)
        weighting = _weighting(own, part)
        if weighting is None:
            return ()
        found.append(_placed(weighting, name.removesuffix(own)))
    return tuple(found)


def _part_of(name: str, source: Source) -> tuple[Source, str]:
    """The model that a source tensor is of, and its name there."""
    for part in source.parts:
        if part.role in {MODEL, DRAFT} and name.startswith(part.folder):
            own = name.removeprefix(part.folder)
            if own in part.source.tensors:
                return part.source, own
    return source, name


def _placed(weighting: Weighting, folder: str) -> Weighting:
    return replace(
        weighting,
        norm=folder + weighting.norm,
        shift=folder + weighting.shift if weighting.shift else "",
        through=tuple(folder + name for name in weighting.through),
    )


def _text_config(source: Source) -> Mapping[str, Any]:
    text = source.config.get("text_config")
    return text if isinstance(text, dict) and "model_type" in text else source.config


def _kind(config: Mapping[str, Any]) -> str:
    kind = config.get("model_type")
    return kind if isinstance(kind, str) else ""


def _weighting(name: str, source: Source) -> Weighting | None:
    config = _text_config(source)
    kind = _kind(config)
    if kind in _POST_NORMS:
        found = _of_encoder(name, config)
    elif kind in _PRE_NORMS:
        found = _of_decoder(name, config, source, _PRE_NORMS[kind])
    else:
        found = None
    if found is None or not all(_is_plain(n, source) for n in found.names):
        return None
    return found


def _of_encoder(name: str, config: Mapping[str, Any]) -> Weighting | None:
    """Query, key, value, the first half of the MLP and the pooler read a norm each."""
    inside = _IN_ENCODER.fullmatch(name)
    if inside is not None:
        model, number = inside["model"], int(inside["layer"])
        if inside["middle"]:
            return _normed(f"{model}encoder.layer.{number}.attention.output.LayerNorm")
        if number == 0:
            return _normed(f"{model}embeddings.LayerNorm")
        return _normed(f"{model}encoder.layer.{number - 1}.output.LayerNorm")
    layers = config.get("num_hidden_layers")
    if name.endswith(_POOLER) and isinstance(layers, int):
        model = name.removesuffix(_POOLER)
        return _normed(f"{model}encoder.layer.{layers - 1}.output.LayerNorm")
    return None


def _normed(norm: str) -> Weighting:
    return Weighting(f"{norm}.weight", shift=f"{norm}.bias")


def _of_decoder(
    name: str, config: Mapping[str, Any], source: Source, offset: float
) -> Weighting | None:
    inside = _IN_LAYER.fullmatch(name)
    if inside is not None:
        layer, part = inside["layer"], inside["part"]
        if attention := _ATTENTION.fullmatch(part):
            return _of_attention(layer, attention, config, source, offset)
        if mlp := _MLP.fullmatch(part):
            return _of_mlp(layer, mlp, source, offset)
    return _of_head(name, source, offset)


def _is_plain(name: str, source: Source) -> bool:
    found = source.tensors.get(name)
    return found is not None and found.dtype in FLOAT_DTYPES


def _of_head(name: str, source: Source, offset: float) -> Weighting | None:
    """An output head, or the embedding that is one as well, reads the last norm."""
    if name.endswith("embed_tokens.weight"):
        start = name.removesuffix("embed_tokens.weight")
        heads = [n for n in source.tensors if n.endswith("lm_head.weight")]
        return None if heads else Weighting(f"{start}norm.weight", offset)
    if name.endswith("lm_head.weight"):
        norms = [n for n in source.tensors if n.endswith("model.norm.weight")]
        return Weighting(norms[0], offset) if len(norms) == 1 else None
    return None


def _of_attention(
    layer: str, found: re.Match[str], config: Mapping[str, Any], source: Source, offset: float
) -> Weighting | None:
    norm = f"{layer}input_layernorm.weight"
    if found["what"] != "o":
        return Weighting(norm, offset)
    value = f"{layer}{found['of']}v_proj.weight"
    out = source.tensors.get(f"{layer}{found['of']}o_proj.weight")
    heads = config.get("num_key_value_heads", config.get("num_attention_heads"))
    if out is None or value not in source.tensors or not isinstance(heads, int) or heads < 1:
        return None
    rows, columns = source.tensors[value].shape[0], out.shape[-1]
    if rows % heads or columns % rows:
        return None
    return Weighting(norm, offset, (value,), rows // heads, columns // rows)


def _of_mlp(layer: str, found: re.Match[str], source: Source, offset: float) -> Weighting | None:
    norm = f"{layer}pre_feedforward_layernorm.weight"
    if norm not in source.tensors:
        norm = f"{layer}post_attention_layernorm.weight"
    before = _BEFORE_DOWN.get(found["what"])
    if before is None:
        return Weighting(norm, offset)
    through = tuple(f"{layer}{found['of']}{name}.weight" for name in before)
    return Weighting(norm, offset, through)
