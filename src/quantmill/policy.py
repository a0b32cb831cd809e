"""Which tensors are quantized, and to what: ordered rules from a tensor's name and shape.

A config selects a policy; the policy decides tensor by tensor, and each decision carries its
reason. The generic rules serve most architectures; the others add a few before those. What is
said of the affine 4-bit format holds for every affine width below 8 (docs/formats.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeVar

from quantmill.errors import BadSource
from quantmill.experts import is_routing_gate, is_stacked_expert, layer_index
from quantmill.formats import AFFINE_GROUPS, Format, eight_bit

_T = TypeVar("_T", int, str, list[Any], dict[str, Any])

MIN_ELEMENTS = 1024
"""Tensors with fewer elements are not worth quantizing."""

ARCHITECTURES: Mapping[str, tuple[str, ...]] = {
    "qwen3.5": (
        "Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration",
        "Qwen3NextForCausalLM", "Qwen3NextForConditionalGeneration",
        "Qwen3NextMoeForCausalLM", "Qwen3NextMoeForConditionalGeneration",
    ),
    "gemma4": (
        "Gemma4ForCausalLM", "Gemma4ForConditionalGeneration", "Gemma4AssistantForCausalLM",
        "Gemma4UnifiedForCausalLM", "Gemma4UnifiedForConditionalGeneration",
        "Gemma4UnifiedAssistantForCausalLM",
        "gemma4_unified", "gemma4_unified_text", "gemma4_unified_assistant",
    ),
    "laguna": ("LagunaForCausalLM",),
    "glimmer": ("MuseGlimmerForConditionalGeneration",),
    "cohere2moe": ("Cohere2MoeForCausalLM",),
    "nemotron_h": (
        "NemotronHForCausalLM", "NemotronH_Nano_VL_V2", "NemotronH_Nano_Omni_Reasoning_V3",
    ),
}  # fmt: skip
"""Policy name -> the architecture keys it serves; every other key gets the default policy."""

_POLICY_OF = {key: name for name, keys in ARCHITECTURES.items() for key in keys}

# Config fields a policy reads, in order of preference; the first that is not zero counts.
_LAYER_FIELDS = {
    "gemma4": ("num_hidden_layers", "text_config.num_hidden_layers"),
    "glimmer": ("num_hidden_layers", "text_config.num_hidden_layers"),
    "cohere2moe": ("num_hidden_layers",),
    "nemotron_h": ("num_hidden_layers", "llm_config.num_hidden_layers"),
    "laguna": ("num_hidden_layers",),
}
_EXPERT_FIELDS = {"gemma4": ("num_experts", "text_config.num_experts")}
_LAGUNA_LAYERS = 40

# Name patterns. "Any of these is contained" or, where the name says so, a start or an end.
_LM_HEAD_END = "lm_head.weight"
_EXPERT_BIAS = (
    "_proj_bias"  # gpt-oss: experts.gate_up_proj_bias [experts, rows], which is no matrix
)
_AUDIO = ("audio_tower", "embed_audio")
_VISION = ("vision", "visual")
_SENSITIVE = (".v_proj", ".k_proj", "down_proj")
_QWEN35_KEPT_ENDS = tuple(f".linear_attn.in_proj_{part}.weight" for part in ("a", "b", "ba"))
_GLIMMER_ATTENTION = tuple(f".self_attn.{part}_proj" for part in "qokv")
_GLIMMER_BY_LAYER = (".self_attn.gate_proj", ".self_attn.output_gate_proj", ".mlp.down_proj")
_NEMOTRON_KEPT_STARTS = ("vision_model.", "mlp1.", "sound_encoder.", "sound_projection.")
_NEMOTRON_KEPT_ENDS = (".mixer.gate.weight", ".mixer.conv1d.weight")
_NEMOTRON_EMBEDDING_ENDS = ("embeddings.weight", _LM_HEAD_END)
_NEMOTRON_ATTENTION_ENDS = tuple(f".mixer.{part}_proj.weight" for part in "qkvo")
_NEMOTRON_BY_LAYER_ENDS = (
    ".mixer.out_proj.weight",
    ".mixer.down_proj.weight",
    ".mixer.shared_experts.down_proj.weight",
)
_LAGUNA_ATTENTION = tuple(f".self_attn.{part}_proj.weight" for part in "qkvog")
_LAGUNA_DENSE = tuple(f".mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
_LAGUNA_MLP_ENDS = tuple(f"{part}_proj.weight" for part in ("gate", "up", "down"))
_LAGUNA_EXPERTS = (".mlp.shared_expert.", ".mlp.experts.")
_LAGUNA_SHARED_DOWN = ".mlp.shared_expert.down_proj.weight"

_KEPT_WHOLE = ("vae", "component")
_MODULATION = ("modulation", "adaln", "adaLN", "_mod.", ".mod.")
_COMPONENT_INPUTS = (
    "proj_in.", "img_in.", "txt_in.", "x_in.", "vector_in.", "guidance_in.", "caption_projection.",
)  # fmt: skip
_COMPONENT_OUTPUTS = (
    "proj_out.", "final_layer.", "all_final_layer.", "linear_out.", "text_projection.",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules a model gets, and the numbers they need from its config."""

    name: str = "default"
    layers: int = 0
    experts: int = 0
    dense_layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """A tensor's format (None keeps source precision), the rule that gave it, and why."""

    format: Format | None
    rule: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Tensor:
    """The facts a rule looks at."""

    policy: Policy
    name: str
    shape: Sequence[int]
    base: Format


# --- building blocks ---


def _has(name: str, parts: Sequence[str]) -> bool:
    return any(part in name for part in parts)


# First hit decides: rule id, test, reason.
_INELIGIBLE: tuple[tuple[str, Callable[[str], bool], str], ...] = (
    ("audio", lambda n: _has(n, _AUDIO), "audio stays at source precision"),
    ("embedding", lambda n: "embed" in n, "embedding stays at source precision"),
    ("norm", lambda n: "norm" in n or "ln_" in n, "norm stays at source precision"),
    ("bias", lambda n: n.endswith(".bias"), "bias stays at source precision"),
    ("not_a_weight", lambda n: not n.endswith(".weight"), "name does not end in .weight"),
)


def _ineligible(name: str) -> Decision | None:
    hits = (Decision(None, rule, why) for rule, test, why in _INELIGIBLE if test(name))
    return next(hits, None)


def is_eligible(name: str, component: str = "") -> bool:
    """Whether a tensor of this name may be quantized at all; a `vae` component never is."""
    return component != "vae" and _ineligible(name) is None


def is_aligned(shape: Sequence[int], fmt: Format) -> bool:
    """Whether the last dimension is made of whole groups."""
    return bool(shape) and shape[-1] % fmt.group_size == 0


def use_more_bits(index: int | None, layers: int, middle_end: int | None = None) -> bool:
    """Whether a layer is one of those that suffer most: both ends, and every third between.

    `middle_end` is the layer before which the every-third cadence stops; None means layer 7n/8.
    """
    if index is None or index < 0 or layers <= 0:
        return False
    first, last = layers // 8, 7 * layers // 8
    middle_end = last if middle_end is None else middle_end
    return index < first or index >= last or (index < middle_end and (index - first) % 3 == 2)


def _is_embedding(name: str) -> bool:
    return name.endswith("embed_tokens.weight") and "per_layer" not in name


def _by_layer(tensor: _Tensor) -> bool:
    return use_more_bits(layer_index(tensor.name), tensor.policy.layers)


def _word(name: str, parts: Sequence[str]) -> str:
    """The pattern that a name matches, as a word for a reason; "" without a match."""
    hit = next((part for part in parts if part in name), "")
    return hit.removesuffix(".weight").rpartition(".")[2]


def _unaligned(tensor: _Tensor, wanted: Format) -> Decision:
    if not tensor.shape:
        return Decision(None, "unaligned", "a scalar has no groups")
    why = f"last dim {tensor.shape[-1]} is not a multiple of {wanted.group_size}"
    return Decision(None, "unaligned", why)


def _as_requested(tensor: _Tensor) -> Decision:
    if not is_aligned(tensor.shape, tensor.base):
        return _unaligned(tensor, tensor.base)
    return Decision(tensor.base, "requested", "as requested")


def _promoted(tensor: _Tensor, why: str) -> Decision | None:
    """The 8-bit decision, None where its groups do not fit."""
    eight = eight_bit(tensor.base)
    if not is_aligned(tensor.shape, eight):
        return None
    return _as_requested(tensor) if eight == tensor.base else Decision(eight, "promoted", why)


def _promoted_embedding(tensor: _Tensor) -> Decision:
    """8 bits for an embedding or output head, or nothing: these are never narrower."""
    what = "lm_head" if tensor.name.endswith(_LM_HEAD_END) else "embedding"
    promoted = _promoted(tensor, f"{what} is sensitive: 8 bits")
    return promoted or _unaligned(tensor, eight_bit(tensor.base))


def _sensitive(tensor: _Tensor, what: str, *, promote: bool = True) -> Decision:
    promoted = _promoted(tensor, f"{what} is sensitive: 8 bits") if promote else None
    return promoted or _as_requested(tensor)


def _keep(rule: str, what: str) -> Decision:
    return Decision(None, rule, f"{what} stays at source precision")


def _can_promote(base: Format) -> bool:
    return eight_bit(base) != base


def _is_float4(base: Format) -> bool:
    return base.mode != "affine" and _can_promote(base)


# --- rules, one function per policy ---


def _generic(tensor: _Tensor) -> Decision:
    name, shape, base = tensor.name, tensor.shape, tensor.base
    if name.endswith(_EXPERT_BIAS):
        return _keep("bias", "bias of experts")
    stacked = is_stacked_expert(name)
    if not stacked and (ineligible := _ineligible(name)):
        return ineligible
    if len(shape) != 2 and not (stacked and len(shape) == 3):
        return Decision(None, "rank", f"rank {len(shape)} is not a matrix")
    if prod(shape) < MIN_ELEMENTS:
        return Decision(None, "small", f"fewer than {MIN_ELEMENTS} elements")
    if is_routing_gate(name):
        return _keep("routing_gate", "routing gate")
    if name.endswith(_LM_HEAD_END):
        return _promoted_embedding(tensor)
    if _has(name, _VISION):
        return _keep("vision", "vision")
    if not is_aligned(shape, base):
        return _unaligned(tensor, base)
    # Grouped kernels for the 4-bit float formats take one mode per expert stack.
    if (word := _word(name, _SENSITIVE)) and not (stacked and _is_float4(base)):
        return _sensitive(tensor, word)
    return _as_requested(tensor)


def _qwen35(tensor: _Tensor) -> Decision:
    if tensor.name.endswith(_QWEN35_KEPT_ENDS):
        return _keep("linear_attention", "linear attention gate")
    return _generic(tensor)


def _gemma4(tensor: _Tensor) -> Decision:
    name = tensor.name
    if _is_embedding(name):
        return _sensitive(tensor, "embedding")
    word = _word(name, _SENSITIVE)
    if word and _can_promote(tensor.base) and not _has(name, _VISION + _AUDIO):
        return _sensitive(tensor, word, promote=_gemma4_promotes(tensor))
    return _generic(tensor)


def _gemma4_promotes(tensor: _Tensor) -> bool:
    layers, experts = tensor.policy.layers, tensor.policy.experts
    # Beside 8 experts, keys and values are so small a part that 8 bits cost little everywhere.
    if layers and experts == 8 and _has(tensor.name, (".v_proj", ".k_proj")):
        return True
    return ".k_proj" not in tensor.name and _by_layer(tensor)


def _cohere2moe(tensor: _Tensor) -> Decision:
    name = tensor.name
    if _is_embedding(name) and len(tensor.shape) == 2:
        return _promoted_embedding(tensor)
    if name.endswith(".mlp.gate.weight"):
        return _keep("routing_gate", "routing gate")
    numbered = tensor.policy.layers > 0 and layer_index(name) is not None
    if numbered and _can_promote(tensor.base) and (word := _word(name, _SENSITIVE)):
        return _sensitive(tensor, word, promote=_by_layer(tensor))
    return _generic(tensor)


def _glimmer(tensor: _Tensor) -> Decision:
    if _has(tensor.name, _VISION):
        return _keep("vision", "vision")
    if _is_embedding(tensor.name):
        return _sensitive(tensor, "embedding")
    word = _word(tensor.name, _GLIMMER_ATTENTION + _GLIMMER_BY_LAYER)
    if word and _can_promote(tensor.base):
        promote = _has(tensor.name, _GLIMMER_ATTENTION) or _by_layer(tensor)
        return _sensitive(tensor, word, promote=promote)
    return _generic(tensor)


def _nemotron_h(tensor: _Tensor) -> Decision:
    name = tensor.name
    if name.startswith(_NEMOTRON_KEPT_STARTS):
        return _keep("encoder", "vision or sound encoder")
    if name.endswith(_NEMOTRON_KEPT_ENDS):
        return _keep("mixer", "mixer gate or convolution")
    if name.endswith(_NEMOTRON_EMBEDDING_ENDS):
        return _promoted_embedding(tensor)
    attention = name.endswith(_NEMOTRON_ATTENTION_ENDS)
    if _is_float4(tensor.base) and (attention or _nemotron_is_by_layer(name)):
        everywhere = attention or layer_index(name) is None
        return _sensitive(tensor, name.split(".")[-2], promote=everywhere or _by_layer(tensor))
    return _generic(tensor)


def _nemotron_is_by_layer(name: str) -> bool:
    expert = ".mixer.experts." in name and name.endswith(".down_proj.weight")
    return expert or name.endswith(_NEMOTRON_BY_LAYER_ENDS)


def _laguna(tensor: _Tensor) -> Decision:
    name, base = tensor.name, tensor.base
    if base.mode == "affine":
        return _generic(tensor)
    if _is_embedding(name) or name.endswith(_LM_HEAD_END):
        return _promoted_embedding(tensor)
    if name.endswith(".mlp.gate.weight"):
        return _keep("routing_gate", "routing gate")
    if _has(name, _LAGUNA_ATTENTION):
        return _uniform(tensor) if _can_promote(base) else _keep("attention", "attention")
    if _has(name, _LAGUNA_DENSE) and layer_index(name) in tensor.policy.dense_layers:
        return _uniform(tensor)
    return _laguna_experts(tensor)


def _laguna_experts(tensor: _Tensor) -> Decision:
    name, layers = tensor.name, tensor.policy.layers
    cadence = use_more_bits(layer_index(name), layers, middle_end=layers // 2 - 4)
    wide = not _can_promote(tensor.base)
    if wide and ".mlp.experts." in name and name.endswith(".down_proj.weight"):
        return _keep("sensitive", "down_proj of this layer") if cadence else _uniform(tensor)
    if _LAGUNA_SHARED_DOWN in name:
        if wide:
            return _keep("sensitive", "shared expert's down_proj")
        return _generic(tensor) if cadence else _uniform(tensor)
    if name.endswith(_LAGUNA_MLP_ENDS) and _has(name, _LAGUNA_EXPERTS):
        return _uniform(tensor)
    return Decision(None, "not_listed", "not among the tensors laguna quantizes")


def _uniform(tensor: _Tensor) -> Decision:
    """The generic decision with the requested format in place of a promotion."""
    generic = _generic(tensor)
    return _as_requested(tensor) if generic.rule == "promoted" else generic


# Parts of a component that set the range of everything after them, small beside the blocks they
# serve. Matched against names without the component's; embeddings and norms (with the modulation
# that diffusers keeps in them: `norm1.linear`, `norm_out.linear`) are kept by the generic rules.
_COMPONENT_KEPT: tuple[tuple[str, Callable[[str], bool], str], ...] = (
    ("modulation", lambda n: _has(n, _MODULATION), "modulation"),
    ("time", lambda n: "time_" in n, "time conditioning"),
    ("input", lambda n: n.startswith(_COMPONENT_INPUTS), "input projection"),
    ("output", lambda n: n.startswith(_COMPONENT_OUTPUTS) or ".final_layer." in n, "output layer"),
    ("position", lambda n: "relative_attention_bias" in n, "position bias"),
    ("embedding", lambda n: n == "shared.weight", "embedding"),  # T5's token table
)


def _component(tensor: _Tensor) -> Decision:
    hits = (_keep(rule, what) for rule, test, what in _COMPONENT_KEPT if test(tensor.name))
    return next(hits, None) or _generic(tensor)


def _vae(tensor: _Tensor) -> Decision:
    del tensor
    return _keep("vae", "vae")


RULES: Mapping[str, Callable[[_Tensor], Decision]] = {
    "default": _generic,
    "qwen3.5": _qwen35,
    "gemma4": _gemma4,
    "cohere2moe": _cohere2moe,
    "glimmer": _glimmer,
    "nemotron_h": _nemotron_h,
    "laguna": _laguna,
    "component": _component,
    "vae": _vae,
}
"""Policy name -> the function that decides."""


def decide(policy: Policy, name: str, shape: Sequence[int], base: Format) -> Decision:
    """What the policy does with a tensor when the user asked for `base`."""
    return RULES[policy.name](_Tensor(policy, name, shape, base))


def may_quantize(policy: Policy, name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor may get a format of few bits where its effect is measured.

    Those that the policy quantizes, and the table of tokens, which the policy keeps only because
    nothing tells how much it matters.
    """
    base = Format("affine", 8, min(AFFINE_GROUPS))
    if not is_aligned(shape, base):
        return False
    if _is_embedding(name):
        return len(shape) == 2 and policy.name not in _KEPT_WHOLE and not _has(name, _VISION)
    return decide(policy, name, shape, base).format is not None


def decide_draft(policy: Policy, name: str, shape: Sequence[int], base: Format) -> Decision:
    """Like `decide` for a draft model, whose embedding and head are cheap to get wrong.

    `name` comes without the draft's prefix.
    """
    if _is_embedding(name) or name.endswith(_LM_HEAD_END):
        return _as_requested(_Tensor(policy, name, shape, base))
    return decide(policy, name, shape, base)


# --- config ---


def _wrong_type(path: str, kind: type) -> BadSource:
    words = {int: "an integer", str: "a string", list: "a list", dict: "an object"}
    return BadSource(f"config.json: {path!r} is not {words[kind]}", kind="invalid_config")


def _field(config: Mapping[str, Any], path: str, kind: type[_T]) -> _T:
    """The value at a dotted path; absent and null are the kind's empty value."""
    parent, _, key = path.rpartition(".")
    value = (_field(config, parent, dict) if parent else config).get(key)
    # `isinstance` would let true pass for an integer.
    if value is not None and type(value) is not kind:
        raise _wrong_type(path, kind)
    found: _T = kind() if value is None else value
    return found


def _items(config: Mapping[str, Any], path: str, kind: type[_T]) -> list[_T]:
    items = _field(config, path, list)
    for i, item in enumerate(items):
        if type(item) is not kind:
            raise _wrong_type(f"{path}[{i}]", kind)
    return items


def _first_number(config: Mapping[str, Any], paths: Sequence[str]) -> int:
    return next(filter(None, [_field(config, path, int) for path in paths]), 0)


def architecture(config: Mapping[str, Any]) -> str:
    """The key a policy is chosen by: first architecture, else model type, else "".

    Raises BadSource for a field of the wrong type.
    """
    listed = _items(config, "architectures", str)
    types = [_field(config, path, str) for path in ("model_type", "text_config.model_type")]
    return next(filter(None, listed[:1] + types), "")


def _with_dense_layers(policy: Policy, config: Mapping[str, Any]) -> Policy:
    kinds = _items(config, "mlp_layer_types", str)
    dense = {i for i, kind in enumerate(kinds) if kind == "dense"}
    dense.update(_items(config, "mlp_only_layers", int))
    layers = policy.layers or len(kinds) or _LAGUNA_LAYERS
    return replace(policy, layers=layers, dense_layers=tuple(sorted(dense)) or (0,))


_EXTRA_FIELDS = {"laguna": _with_dense_layers}


def select_policy(config: Mapping[str, Any]) -> Policy:
    """The policy for a config, with the numbers it reads there.

    Raises BadSource for a field of the wrong type.
    """
    name = _POLICY_OF.get(architecture(config), "default")
    layers = _first_number(config, _LAYER_FIELDS.get(name, ()))
    experts = _first_number(config, _EXPERT_FIELDS.get(name, ()))
    policy = Policy(name, layers, experts)
    extra = _EXTRA_FIELDS.get(name)
    return extra(policy, config) if extra else policy


def component_policy(component: str, config: Mapping[str, Any]) -> Policy:
    """The policy for a component of a pipeline.

    A vae, by whatever name, is kept whole: its errors are seen in every pixel. Text encoders of an
    architecture with a policy of its own get that, everything else the rules for components.
    """
    if "vae" in component.lower():
        return Policy("vae")
    found = select_policy(config)
    return Policy("component") if found.name == "default" else found
