"""The bridge to mlx-lm: our weights under its names, its architectures built from them.

mlx-lm's model classes rename, split and stack the tensors of a Hugging Face checkpoint in their
`sanitize`. That is done here to codes, scales and biases alike: quantization groups run along the
last axis, which `sanitize` leaves alone for matrices, so the same changes applied to each of them
give the same layers."""

from __future__ import annotations

import importlib.util
import re
import resource
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from quantmill.errors import BadPlan, BadRequest, Corrupt
from quantmill.formats import Format
from quantmill.model import Model, Parts
from quantmill.quantparams import SHAPES, Params
from quantmill.source import CONFIG, MODEL_INDEX

_STACK = re.compile(r"(.*\.experts)\.([^.]+)\.weight")
_CODES = mx.uint32
_MOST_FILES = 8192


@dataclass(frozen=True, slots=True)
class Named:
    """Arrays under mlx-lm's parameter names, and the format of every quantized module path.

    `decoded` are weights whose codes mlx-lm has no place for: they come as numbers.
    """

    weights: dict[str, mx.array]
    formats: Mapping[str, Format]
    decoded: tuple[str, ...] = ()


def require_mlx_lm() -> None:
    """Raise BadRequest with the way to install it when mlx-lm is missing."""
    if importlib.util.find_spec("mlx_lm") is None:
        raise BadRequest(
            "mlx-lm is not installed", kind="missing_extra", hint="pip install 'quantmill[run]'"
        )


# -- config ----------------------------------------------------------------------------------------

# Newer spelling in config.json → the one mlx-lm's classes read.
_FULL = "full_attention"
_PERIODS = {
    "sliding_attention": "sliding_window_pattern",
    "linear_attention": "full_attention_interval",
}
_RENAMED = {"num_local_experts": "num_experts", "dtype": "torch_dtype"}


def normalised(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the spellings that mlx-lm reads added where only newer ones are there.

    transformers 5 writes `rope_parameters`, `num_local_experts` and `dtype`; mlx-lm's classes
    look for `rope_theta`, `rope_scaling`, `num_experts` and `torch_dtype`. Stored quantization
    entries are left out: they describe the source, not these weights."""
    found = {k: v for k, v in config.items() if k not in {"quantization", "quantization_config"}}
    for new, old in _RENAMED.items():
        if new in found and old not in found:
            found[old] = found[new]
    rope = found.get("rope_parameters")
    if isinstance(rope, dict):
        _add_rope(found, rope)
    _add_layer_pattern(found)
    nested = found.get("text_config")
    if isinstance(nested, dict):
        found["text_config"] = normalised(nested)
    return found


def _add_layer_pattern(config: dict[str, Any]) -> None:
    """The period of full-attention layers, where `layer_types` spells out a regular pattern."""
    kinds = config.get("layer_types")
    if not isinstance(kinds, list) or _FULL not in kinds:
        return
    period = kinds.index(_FULL) + 1
    if any((kind == _FULL) != ((i + 1) % period == 0) for i, kind in enumerate(kinds)):
        return
    for other, key in _PERIODS.items():
        if other in kinds:
            config.setdefault(key, period)


def _add_rope(config: dict[str, Any], rope: Mapping[str, Any]) -> None:
    # models with several kinds of attention nest one entry for each kind
    plain = {k: v for k, v in rope.items() if not isinstance(v, dict)}
    if "rope_theta" in plain:
        config.setdefault("rope_theta", plain["rope_theta"])
    if plain.get("rope_type", "default") != "default":
        scaling = {k: v for k, v in plain.items() if k != "rope_theta"}
        config.setdefault("rope_scaling", scaling)
    for kind, key in (
        ("full_attention", "rope_theta"),
        ("sliding_attention", "rope_local_base_freq"),
    ):
        entry = rope.get(kind)
        if isinstance(entry, dict) and "rope_theta" in entry:
            config.setdefault(key, entry["rope_theta"])


# -- weights ---------------------------------------------------------------------------------------


def _classes(config: dict[str, Any], where: str) -> tuple[Any, Any]:
    from mlx_lm.utils import _get_classes

    if "model_type" not in config:
        raise BadPlan(f"{where}: config.json has no model_type", kind="unsupported_architecture")
    try:
        found: tuple[Any, Any] = _get_classes(config)
    except ValueError as error:
        raise BadPlan(
            f"{where}: {error}",
            kind="unsupported_architecture",
            hint="a newer mlx-lm may know it: pip install --upgrade mlx-lm",
        ) from None
    return found


def empty_model(model: Model) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's module for the model's config, its parameters not loaded, and that config.

    Raises BadRequest without mlx-lm, BadPlan for architectures it does not have.
    """
    require_mlx_lm()
    _refuse_pipeline(model)
    config = normalised(model.config)
    model_class, arguments = _classes(config, model.where)
    try:
        return model_class(arguments.from_dict(config)), config
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise BadPlan(
            f"{model.where}: mlx-lm cannot build {config['model_type']} from config.json: {error}",
            kind="unsupported_architecture",
        ) from None


def named_for(model: Model, target: nn.Module, again: Format | None = None) -> Named:
    """The model's arrays under the parameter names of `target`, still lazy.

    Weights that mlx-lm's layers cannot hold as they are come decoded to BF16: matrices that it
    splits and transposes, and nvfp4 with a global scale, which `again` quantizes to that format.
    Raises BadPlan and Corrupt.
    """
    parts, decoded = _unstacked(model, again)
    packed = {name: p for name, p in parts.items() if p.params is not None}
    formats = sorted({p.params.format for p in packed.values() if p.params})

    def renamed(pick: Callable[[Parts], mx.array | None]) -> dict[str, mx.array]:
        # `sanitize` may change the module it is called on, so each pass gets one of its own
        return _sanitized(empty_model(model)[0], _with(parts, packed, pick))

    main = _sanitized(target, {name: p.weight for name, p in parts.items()})
    scales = renamed(lambda p: p.scales)
    biases = renamed(_biases)
    marks = renamed(lambda p: _mark(p, formats))
    weights: dict[str, mx.array] = {}
    chosen: dict[str, Format] = {}
    for name, array in main.items():
        weights[name] = array
        if array.dtype != _CODES:
            continue
        path = name.removesuffix(".weight")
        mark: Any = marks[name].reshape(-1)[0].item()
        fmt = formats[int(mark)]
        chosen[path] = fmt
        weights[f"{path}.scales"] = scales[name]
        if fmt.has_bias:
            weights[f"{path}.biases"] = biases[name]
    return Named(weights, chosen, decoded)


def allow_many_files() -> None:
    """Let as many files be open as the system permits: an array not read yet holds its file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _biases(parts: Parts) -> mx.array | None:
    return parts.scales if parts.biases is None else parts.biases


def _mark(parts: Parts, formats: list[Format]) -> mx.array:
    """An array like the scales whose elements name the format: it shows where they end up."""
    assert parts.params is not None
    assert parts.scales is not None
    return mx.full(parts.scales.shape, formats.index(parts.params.format), mx.uint16)


def _with(
    parts: Mapping[str, Parts],
    packed: Mapping[str, Parts],
    pick: Callable[[Parts], mx.array | None],
) -> dict[str, Any]:
    return {name: pick(p) if name in packed else p.weight for name, p in parts.items()}


def stored_names(model: Model) -> dict[str, tuple[str, ...]]:
    """The weights of the model that each of mlx-lm's matrices is made of.

    One name for a matrix, one for each expert for a stack (the same name, where the model has them
    stacked). What `sanitize` does is found out by sending it marks in the place of weights: one
    column, filled with the number of the weight.
    """
    names = list(model)
    whole = keeps_stacks(model.config)
    marks: dict[str, mx.array] = {}
    for number, name in enumerate(names):
        shape = model.shape(name)
        kept = (*shape[:-1], 1) if len(shape) > 1 else shape
        stack = None if whole or len(shape) != 3 else stack_name(name)
        if stack is None:
            marks[name] = mx.full(kept, number, mx.float32)
            continue
        for index in range(shape[0]):
            marks[f"{stack[0]}.{index}.{stack[1]}.weight"] = mx.full(kept[1:], number, mx.float32)
    found: dict[str, tuple[str, ...]] = {}
    for name, mark in _sanitized(empty_model(model)[0], marks).items():
        if mark.ndim > 1 and mark.size:
            numbers: Any = mark.reshape(mark.shape[0] if mark.ndim > 2 else 1, -1)[:, 0].tolist()
            found[name] = tuple(names[int(number)] for number in numbers)
    return found


def _sanitized(target: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    if not hasattr(target, "sanitize"):
        return weights
    found: dict[str, mx.array] = target.sanitize(dict(weights))
    return found


# Weights that `sanitize` splits and transposes, so that groups no longer run along the last axis:
# latent attention's (DeepSeek, Kimi, GLM), which mlx-lm absorbs into two other matrices.
_TRANSPOSED = (".kv_b_proj.weight",)


def is_transposed(name: str) -> bool:
    """Whether mlx-lm's class transposes parts of a weight, whose rows are then no rows any more."""
    return name.endswith(_TRANSPOSED)


def shapes_of(target: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's parameters by name."""
    parameters: Any = tree_flatten(target.parameters())
    return {name: tuple(array.shape) for name, array in parameters}


# Files that describe the quantization of the source and not of what was made of it.
_STALE = frozenset({"hf_quant_config.json", "quant_config.json", "quantize_config.json"})

# Model types whose classes take stacks of experts as they are, under names with `.weight`.
_STACKED_TYPES = frozenset({"gpt_oss"})


def keeps_stacks(config: Mapping[str, Any]) -> bool:
    """Whether this model is published with stacks that single experts cannot be made of."""
    return config.get("model_type") in _STACKED_TYPES


def _unstacked(model: Model, again: Format | None) -> tuple[dict[str, Parts], tuple[str, ...]]:
    """Every weight; stacks that were made of single experts taken apart again, as views.

    mlx-lm's classes expect either single experts or the stacked form that some models are published
    in, whose names lack `.weight`.
    """
    found: dict[str, Parts] = {}
    decoded = []
    whole = keeps_stacks(model.config)
    for name in model:
        parts = model.parts(name)
        if parts.global_scale is not None:
            decoded.append(name)
            parts = _without_global(model, name, again)
        elif parts.params is not None and name.endswith(_TRANSPOSED):
            decoded.append(name)
            parts = Parts(model.dequantize_lazily(name))
        stack = None if whole else stack_name(name)
        if stack is None or parts.weight.ndim != 3:
            found[name] = parts
            continue
        for index in range(parts.weight.shape[0]):
            found[f"{stack[0]}.{index}.{stack[1]}.weight"] = parts.at(index)
    return found, tuple(decoded)


def _without_global(model: Model, name: str, again: Format | None) -> Parts:
    """The weight as numbers, or in a format that mlx-lm has a place for; computed when used."""
    numbers = model.dequantize_lazily(name)
    if again is None:
        return Parts(numbers)
    if numbers.shape[-1] % again.group_size:
        return Parts(numbers)
    with mx.stream(mx.cpu):
        made = mx.quantize(numbers, again.group_size, again.bits, mode=again.mode)
    biases = made[2] if again.has_bias else None
    return Parts(made[0], made[1], biases, params=Params(again, SHAPES))


def stack_name(name: str) -> tuple[str, str] | None:
    """Group and projection of a stack that was made of single experts, None for other names."""
    match = _STACK.fullmatch(name)
    return (match[1], match[2]) if match else None


def quantization_config(target: nn.Module, formats: Mapping[str, Format]) -> dict[str, Any]:
    """The `quantization` entry of config.json: the commonest format, then every module by path.

    Modules that could be quantized and are not are `false`, so that no reader needs a default.
    """
    counts = Counter(formats.values())
    common = max(sorted(counts), key=lambda f: counts[f])
    entry: dict[str, Any] = _parameters(common)
    leaves: Any = tree_flatten(target.leaf_modules(), is_leaf=nn.Module.is_module)
    for path, module in leaves:
        if path in formats:
            entry[path] = _parameters(formats[path])
        elif hasattr(module, "to_quantized"):
            entry[path] = False
    return entry


def _parameters(fmt: Format) -> dict[str, Any]:
    return {"group_size": fmt.group_size, "bits": fmt.bits, "mode": fmt.mode}


# -- building --------------------------------------------------------------------------------------


def build(model: Model, dtype: mx.Dtype | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's module filled with the model's weights, and its config.

    Layers that the stored model quantizes are quantized with its parameters, the others dense.
    `dtype` casts floating-point parameters (scales included). Raises BadPlan for architectures
    mlx-lm does not have, Corrupt when weights are missing or left over."""
    target, config = empty_model(model)
    named = named_for(model, target)

    def chosen(path: str, module: nn.Module) -> bool | dict[str, Any]:
        fmt = named.formats.get(path)
        if fmt is None or not hasattr(module, "to_quantized"):
            return False
        return _parameters(fmt)

    nn.quantize(target, class_predicate=chosen)
    target.eval()
    try:
        target.load_weights(list(named.weights.items()), strict=True)
    except ValueError as error:
        raise Corrupt(
            f"{model.where}: the weights do not fit mlx-lm's {config['model_type']}: {error}",
            kind="weights_do_not_fit",
        ) from None
    if dtype is not None:
        target.set_dtype(dtype)
    mx.eval(target.parameters())
    return target, config


def tokenizer_for(model: Model, config: Mapping[str, Any]) -> Any:
    """mlx-lm's tokenizer made from the model's own files.

    Raises BadPlan when there are none. Nothing in the files is executed.
    """
    from mlx_lm.tokenizer_utils import load

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(model, folder)
        eos = config.get("eos_token_id")
        try:
            return load(folder, {"trust_remote_code": False}, eos_token_ids=eos)
        except (OSError, ValueError, KeyError) as error:
            raise BadPlan(
                f"{model.where}: no usable tokenizer: {error}", kind="no_tokenizer"
            ) from None


def is_pipeline(model: Model) -> bool:
    """Whether the whole of a model made of components is open."""
    return MODEL_INDEX in model.files and CONFIG not in model.files


def component_names(model: Model) -> list[str]:
    """The components of such a model, sorted."""
    return sorted({name.partition("/")[0] for name in model if "/" in name})


def _refuse_pipeline(model: Model) -> None:
    if is_pipeline(model):
        names = component_names(model)
        raise BadPlan(
            f"{model.where} is made of components ({', '.join(names)}); mlx-lm has no such models",
            kind="pipeline",
            hint="`quantmill export NAME DIR --to hf` writes all, with --component only one",
        )


def write_files(model: Model, folder: Path) -> None:
    """Write the model's side files into a directory, those about the source's codes aside."""
    for name in model.files:
        if name in _STALE:
            continue
        target = folder / name
        if not target.resolve().is_relative_to(folder.resolve()):
            raise Corrupt(f"{model.where}: file name {name!r} leads out of the model")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(model.read_file(name))
