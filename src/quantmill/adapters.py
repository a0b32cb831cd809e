"""Low-rank adapters (LoRA): which weight each of them changes, and how.

Two ways of writing them are read: PEFT's adapter_config.json with adapter_model.safetensors, and
mlx-lm's with adapters.safetensors. Everything is decided from names, shapes and the config; the
arithmetic is in merging.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantmill.errors import BadSource
from quantmill.formats import FLOAT_DTYPES
from quantmill.plans import LowRank
from quantmill.source import Source, SourceTensor

ADAPTER_CONFIG = "adapter_config.json"
FOLDER = "adapter/"
"""Goes before the names of an adapter's tensors, where they lie among those of the model."""

_PEFT_PREFIX = "base_model.model."
# Endings in PEFT's files, the adapter's name (`default`) taken away.
_PEFT_LEFT, _PEFT_RIGHT = (
    (".lora_B.weight", ".lora_embedding_B"),
    (".lora_A.weight", ".lora_embedding_A"),
)
_MLX_LEFT, _MLX_RIGHT = ".lora_b", ".lora_a"
_UNREADABLE = (
    ("lora_magnitude_vector", "DoRA, which also scales columns"),
    (".lora_m", "DoRA, which also scales columns"),
    (".hada_", "LoHa"),
    (".lokr_", "LoKr"),
    (".vera_", "VeRA"),
    (".ia3_", "IA3"),
)


@dataclass(frozen=True, slots=True)
class Adapter:
    """Changes by the name of the weight; `replaced` are whole tensors that were trained along."""

    added: Mapping[str, LowRank]
    replaced: Mapping[str, SourceTensor]


def read_adapter(
    source: Source, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Adapter:
    """What an adapter changes in a model whose weights have these shapes.

    `source` is the adapter's own, `config` its adapter_config.json. Raises BadSource for methods
    other than LoRA, for parts that are missing or do not fit, and for a module that the model does
    not have.
    """
    _check_method(config)
    for tensor in source.tensors.values():
        why = next((why for mark, why in _UNREADABLE if mark in tensor.name), None)
        if why:
            raise BadSource(
                f"adapter tensor {tensor.name!r} shows {why}; only LoRA can be merged",
                kind="unsupported_adapter",
            )
    added: dict[str, LowRank] = {}
    used: set[str] = set()
    for module, as_linear, factors in _pairs(source, config):
        name = _weight_of(module, shapes)
        low, parts = _turned(as_linear, factors, shapes[name])
        _check_shapes(low, parts, name, shapes[name])
        added[name] = low
        used |= {part.name for part in parts}
    replaced = {}
    for tensor in source.tensors.values():
        if tensor.name not in used:
            name = _replaced_name(tensor, shapes)
            replaced[name] = tensor
    if not added and not replaced:
        raise BadSource("the adapter holds no tensors", kind="no_weights")
    return Adapter(added, replaced)


def _check_method(config: Mapping[str, Any]) -> None:
    kind = str(config.get("peft_type", config.get("fine_tune_type", "lora"))).lower()
    if kind != "lora" or config.get("use_dora") is True:
        what = "DoRA" if kind == "lora" else kind
        raise BadSource(
            f"{ADAPTER_CONFIG}: {what} adapters cannot be merged, only LoRA",
            kind="unsupported_adapter",
            hint="merge it with the tool that trained it, then import the merged model",
        )


def _pairs(
    source: Source, config: Mapping[str, Any]
) -> Iterator[tuple[str, LowRank, tuple[SourceTensor, SourceTensor]]]:
    """Module, change and the two tensors it is made of, in name order."""
    names = {_bare(name): tensor for name, tensor in source.tensors.items()}
    for name in sorted(names):
        for left, right in ((_MLX_LEFT, _MLX_RIGHT), *zip(_PEFT_LEFT, _PEFT_RIGHT, strict=True)):
            if name.endswith(right) and name.removesuffix(right) + left not in names:
                raise _half(names[name], name.removesuffix(right) + left)
            if not name.endswith(left):
                continue
            module = name.removesuffix(left)
            if module + right not in names:
                raise _half(names[name], module + right)
            first, second = names[name], names[module + right]
            is_mlx = left == _MLX_LEFT
            scale = _mlx_scale(config) if is_mlx else _peft_scale(config, module, second)
            # Transposed factors come in the other order: of embeddings and of `fan_in_fan_out`
            # layers, whose weights are [in, out], PEFT changes the transposed weight.
            swapped = not is_mlx and (left == _PEFT_LEFT[1] or config.get("fan_in_fan_out") is True)
            parts = (second, first) if swapped else (first, second)
            low = LowRank(FOLDER + parts[0].name, FOLDER + parts[1].name, is_mlx or swapped, scale)
            yield module.removeprefix(_PEFT_PREFIX), low, parts


def _half(tensor: SourceTensor, missing: str) -> BadSource:
    return BadSource(
        f"adapter tensor {tensor.name!r} has no {missing!r} beside it", kind="half_an_adapter"
    )


def _bare(name: str) -> str:
    """The tensor's name without that of the adapter, which PEFT may put in."""
    return name.replace(".default.", ".").removesuffix(".default")


def _mlx_scale(config: Mapping[str, Any]) -> float:
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    return _number(scale if scale is not None else config.get("scale"), "lora_parameters.scale")


def _peft_scale(config: Mapping[str, Any], module: str, right: SourceTensor) -> float:
    """Alpha over the rank, or over its root."""
    rank = right.shape[0] if right.shape else 0
    if rank < 1:
        raise BadSource(f"adapter tensor {right.name!r} has no rank", kind="bad_adapter")
    patterns = config.get("alpha_pattern")
    alpha = config.get("lora_alpha")
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if not set(pattern) <= _PLAIN:
            raise BadSource(
                f"{ADAPTER_CONFIG}: alpha_pattern {pattern!r} is no plain name",
                kind="unsupported_adapter",
            )
        if module == pattern or module.endswith(f".{pattern}"):
            alpha = value
    number = _number(alpha, "lora_alpha")
    return number / (math.sqrt(rank) if config.get("use_rslora") is True else rank)


_PLAIN = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-")


def _number(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadSource(f"{ADAPTER_CONFIG}: {what} is {value!r}, not a number", kind="bad_adapter")
    return float(value)


def _weight_of(module: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The weight that the module's changes go to."""
    bare = module.removesuffix(".base_layer")
    for name in (bare, bare.removeprefix("model."), f"model.{bare}"):
        if f"{name}.weight" in shapes:
            return f"{name}.weight"
    raise BadSource(
        f"the adapter changes {module!r}, and the model has no {bare}.weight",
        kind="adapter_does_not_fit",
        hint="is it an adapter of this model?",
    )


def _turned(
    low: LowRank, parts: tuple[SourceTensor, SourceTensor], shape: tuple[int, ...]
) -> tuple[LowRank, tuple[SourceTensor, SourceTensor]]:
    """mlx-lm's factors of an embedding are not transposed; the shapes tell."""
    first, second = parts
    if not low.left.endswith(_MLX_LEFT) or (second.shape[:1] + first.shape[-1:]) != shape:
        return low, parts
    if (first.shape[-1:] + second.shape[:1]) == shape:  # a square matrix: a linear layer's
        return low, parts
    return LowRank(low.right, low.left, False, low.scale), (second, first)


def _check_shapes(
    low: LowRank,
    parts: tuple[SourceTensor, SourceTensor],
    name: str,
    shape: tuple[int, ...],
) -> None:
    shapes = [part.shape[::-1] if low.transposed else part.shape for part in parts]
    fits = (
        all(len(s) == 2 for s in (*shapes, shape))
        and (shapes[0][0], shapes[1][1]) == shape
        and shapes[0][1] == shapes[1][0]
    )
    if not fits:
        raise BadSource(
            f"adapter tensors {parts[0].name!r} {list(parts[0].shape)} and {parts[1].name!r} "
            f"{list(parts[1].shape)} do not fit {name!r} {list(shape)}",
            kind="adapter_does_not_fit",
        )
    for part in parts:
        if part.dtype not in FLOAT_DTYPES:
            raise BadSource(
                f"adapter tensor {part.name!r} is {part.dtype}, not BF16, F16 or F32",
                kind="bad_adapter",
            )


def _replaced_name(tensor: SourceTensor, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The tensor of the model that a trained copy stands for."""
    name = _bare(tensor.name).replace(".modules_to_save", "").removeprefix(_PEFT_PREFIX)
    for wanted in (name, name.removeprefix("model."), f"model.{name}"):
        if shapes.get(wanted) == tensor.shape and tensor.dtype in FLOAT_DTYPES:
            return wanted
    raise BadSource(
        f"adapter tensor {tensor.name!r} ({tensor.dtype} {list(tensor.shape)}) stands for no "
        "tensor of the model",
        kind="adapter_does_not_fit",
        hint="is it an adapter of this model? Extended vocabularies cannot be merged",
    )
