"""GGUF architectures: which are understood, and how their tensors are called in a checkpoint.

The gguf library maps checkpoint names to GGUF names; here its map is walked backwards, from the
names that transformers uses. What the converters do to values is a fact of each architecture, so
one without a row here is refused, even where the library knows its names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from quantmill.errors import BadRequest, BadSource

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"

_EDGES = ("model.embed_tokens", "model.norm", "lm_head")
_ATTENTION = tuple(f"self_attn.{part}_proj" for part in "qkvo")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_FUSED = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
_PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
_FOUR_NORMS = (*_PRE_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
_PLAIN = ("mlp.c_fc", "mlp.c_proj")
_SINKS = "self_attn.sinks"
_EXPERTS = ("mlp.gate", *(f"mlp.experts.{part}_proj" for part in ("gate", "up", "down")))
_SHARED = (
    "mlp.shared_expert_gate",
    *(f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")),
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """A row: names in config.json, modules of a layer, and what converters do to values.

    `permuted` means the rows of the query and key projections are interleaved for ggml's rotary
    embedding. `norm_shift` is what was added to the weights of every norm. `stacked` means that
    experts are stacks in the checkpoint too. `layer_norm` means norms that subtract the mean.
    """

    class_name: str
    model_type: str
    modules: tuple[str, ...]
    permuted: bool = False
    norm_shift: int = 0
    stacked: bool = False
    layer_norm: bool = False


ARCHITECTURES: Mapping[str, Architecture] = {
    # Mistral checkpoints are converted to `llama` too, and computed alike
    "llama": Architecture(
        "LlamaForCausalLM", "llama", (*_PRE_NORMS, *_ATTENTION, *_GATED), permuted=True
    ),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", (*_PRE_NORMS, *_ATTENTION, *_GATED)),
    "qwen2moe": Architecture(
        "Qwen2MoeForCausalLM", "qwen2_moe", (*_PRE_NORMS, *_ATTENTION, *_EXPERTS, *_SHARED)
    ),
    "qwen3": Architecture(
        "Qwen3ForCausalLM", "qwen3", (*_PRE_NORMS, *_ATTENTION, *_HEAD_NORMS, *_GATED)
    ),
    "qwen3moe": Architecture(
        "Qwen3MoeForCausalLM", "qwen3_moe", (*_PRE_NORMS, *_ATTENTION, *_HEAD_NORMS, *_EXPERTS)
    ),
    "gemma": Architecture(
        "GemmaForCausalLM", "gemma", (*_PRE_NORMS, *_ATTENTION, *_GATED), norm_shift=1
    ),
    "gemma2": Architecture(
        "Gemma2ForCausalLM", "gemma2", (*_FOUR_NORMS, *_ATTENTION, *_GATED), norm_shift=1
    ),
    "gemma3": Architecture(
        "Gemma3ForCausalLM", "gemma3_text", (*_FOUR_NORMS, *_ATTENTION, *_HEAD_NORMS, *_GATED),
        norm_shift=1,
    ),
    "phi3": Architecture(
        "Phi3ForCausalLM", "phi3", (*_PRE_NORMS, *_FUSED)
    ),
    "granite": Architecture(
        "GraniteForCausalLM", "granite", (*_PRE_NORMS, *_ATTENTION, *_GATED), permuted=True
    ),
    "smollm3": Architecture(
        "SmolLM3ForCausalLM", "smollm3", (*_PRE_NORMS, *_ATTENTION, *_GATED), permuted=True
    ),
    "olmo2": Architecture(
        "Olmo2ForCausalLM", "olmo2", (*_POST_NORMS, *_ATTENTION, *_HEAD_NORMS, *_GATED)
    ),
    "starcoder2": Architecture(
        "Starcoder2ForCausalLM", "starcoder2", (*_PRE_NORMS, *_ATTENTION, *_PLAIN), layer_norm=True
    ),
    # converters part the gates of the checkpoint's stacks from the rest, as mlx-lm does
    "gpt-oss": Architecture(
        "GptOssForCausalLM", "gpt_oss",
        (*_PRE_NORMS, *_ATTENTION, _SINKS, "mlp.router", *_EXPERTS[1:]), stacked=True,
    ),
}  # fmt: skip

ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors whose content belongs into config.json."""

# Types of checkpoints that converters give another's name to, and the modules only these have.
_CONVERTED_AS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "mistral": ("llama", ()),
    "mixtral": (
        "llama",
        ("block_sparse_moe.gate", *(f"block_sparse_moe.experts.w{n}" for n in (1, 2, 3))),
    ),
}

_PERMUTED = ("self_attn.q_proj", "self_attn.k_proj")
_EXPERT = "mlp.experts."


@dataclass(frozen=True, slots=True)
class Naming:
    """How one GGUF tensor is called in a checkpoint, and what to undo.

    `experts` means the tensor is a stack: its slices are `prefix`, index, `.` and `suffix`.
    `stacked` means it is a stack of experts in the checkpoint as well.
    `interleaved` is "q" or "k" for the rotary permutation, else empty.
    """

    prefix: str
    suffix: str = ""
    experts: bool = False
    interleaved: str = ""
    shift: int = 0
    stacked: bool = False

    @property
    def is_matrix(self) -> bool:
        """Whether this is the weight of a layer, not its bias or a norm."""
        name = self.suffix or self.prefix
        return name.endswith(".weight") and not name.endswith("norm.weight")


def architecture_of(name: object, file: str) -> Architecture:
    """The row of an architecture; raises BadSource for one that has none."""
    found = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if found is None:
        raise BadSource(
            f"{file}: GGUF files of architecture {name!r} cannot be imported",
            kind="unsupported_gguf_architecture",
            hint=f"understood are {', '.join(ARCHITECTURES)}",
        )
    return found


def module_names(gguf_name: str, layers: int) -> dict[str, str]:
    """GGUF module name → the module's name in transformers, both without `.weight`."""
    own = ARCHITECTURES[gguf_name].modules
    modules = [*_EDGES, *(f"model.layers.{n}.{m}" for n in range(layers) for m in own)]
    return {theirs: ours for ours, theirs in _gguf_names(gguf_name, layers, modules).items()}


def imatrix_modules(model_type: object, file: str) -> dict[str, str]:
    """The module's name in transformers → its GGUF name, of the first layer and of the edges.

    `model_type` is what config.json says. Raises BadSource, naming `file`, for a type of which
    there are no GGUF files that are understood, BadRequest without the gguf library.
    """
    types = {
        **{row.model_type: (name, ()) for name, row in ARCHITECTURES.items()},
        **_CONVERTED_AS,
    }
    if not isinstance(model_type, str) or model_type not in types:
        raise BadSource(
            f"{file}: its names cannot be matched with a model of type {model_type!r}",
            kind="unsupported_gguf_architecture",
            hint=f"understood are {', '.join(types)}",
        )
    gguf_name, more = types[model_type]
    own = (*ARCHITECTURES[gguf_name].modules, *more)
    return _gguf_names(gguf_name, 1, [*_EDGES, *(f"model.layers.0.{m}" for m in own)])


def _gguf_names(gguf_name: str, layers: int, modules: Iterable[str]) -> dict[str, str]:
    """The module's name in transformers → its GGUF name, of those that the architecture has."""
    try:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    except ImportError:
        raise no_library() from None
    arch = next(key for key, value in MODEL_ARCH_NAMES.items() if value == gguf_name)
    known = get_tensor_name_map(arch, layers)
    pairs = ((module, known.get_name(module)) for module in modules)
    return {ours: theirs for ours, theirs in pairs if theirs is not None}


def no_library() -> BadRequest:
    """What is said where the gguf library is needed and not installed."""
    return BadRequest(
        "GGUF files need the gguf library",
        kind="missing_extra",
        hint="pip install 'quantmill[gguf]'",
    )


def name_tensors(
    tensors: Mapping[str, object], gguf_name: str, layers: int, file: str
) -> dict[str, Naming]:
    """The checkpoint's name for every tensor but the rope factors.

    Raises BadSource for a tensor the architecture does not have, and for one it lacks.
    """
    modules, row = module_names(gguf_name, layers), ARCHITECTURES[gguf_name]
    found = {}
    for name in tensors:
        if name in ROPE_FACTORS:
            continue
        module, dot, kind = name.rpartition(".")
        if not dot or kind not in {"weight", "bias"} or module not in modules:
            raise BadSource(
                f"{file}: tensor {name!r} has no place in architecture {gguf_name!r}",
                kind="unsupported_gguf_tensor",
            )
        found[name] = _naming(modules[module], kind, row)
    for module in modules:
        if f"{module}.weight" not in found and f"{module}.weight" != OUTPUT:
            raise BadSource(
                f"{file}: tensor '{module}.weight' is missing",
                kind="missing_tensor",
                hint="the file is damaged, or one part of several that were renamed",
            )
    return found


def _naming(module: str, kind: str, row: Architecture) -> Naming:
    before, expert, projection = module.partition(_EXPERT)
    if module.endswith(_SINKS):
        return Naming(module)  # a parameter of its own; only GGUF calls it a weight
    if expert and row.stacked:
        return Naming(f"{module}.{kind}", stacked=True)
    if expert:
        return Naming(before + expert, f"{projection}.{kind}", experts=True)
    rotary = next((p for p in _PERMUTED if row.permuted and module.endswith(p)), "")
    interleaved = rotary.removeprefix("self_attn.")[:1]
    shift = row.norm_shift if module.endswith("norm") else 0
    return Naming(f"{module}.{kind}", interleaved=interleaved, shift=shift)
