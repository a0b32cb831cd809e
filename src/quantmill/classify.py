"""What kind of checkpoint this is, from tensor names, dtypes and config.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantmill.errors import BadPlan, BadRequest, BadSource
from quantmill.formats import (
    FP8_E4M3_DTYPES,
    FP8_E5M2_DTYPES,
    MXFP8,
    Format,
    parse_request,
    recorded_format,
)
from quantmill.source import RAW_BLOCKS, Source, SourceTensor

FLOAT = "float"
PREQUANTIZED = "prequantized"
BLOCK_FP8 = "block-fp8"

FP8_BLOCK = (128, 128)
"""Rows and columns that share a scale, where FP8 checkpoints say nothing else."""

_CONFIG_KEYS = ("quantization", "quantization_config", "compression_config")


@dataclass(frozen=True, slots=True)
class Kind:
    """The kind of a source and the format its weights will have on the whole, if one is known."""

    name: str
    format: Format | None


def classify(
    source: Source, requested: str | None, group_size: int | None = None, *, decode: bool = False
) -> Kind:
    """The kind of `source`, with the format asked for. Names and dtypes decide (schemes.py knows).

    `decode` means that weights which are quantized already shall be decoded first. Raises
    BadRequest for an unknown format, or for `decode` where nothing is quantized; BadSource for FP8
    variants that cannot be read, and where nothing says how large the blocks of FP8 weights are;
    BadPlan when a format is asked for weights that are already quantized.
    """
    asked = parse_request(requested, group_size)
    recorded = recorded_metadata(source.config)  # a config of the wrong shape fails here
    tensors = source.tensors
    e5m2 = _first(tensors, lambda t: t.name.endswith(".weight") and t.dtype in FP8_E5M2_DTYPES)
    if e5m2:
        raise BadSource(
            f"tensor {e5m2.name!r} has dtype {e5m2.dtype}, which is not supported",
            kind="unsupported_fp8_variant",
        )
    packed = _first(tensors, lambda t: is_packed(t, tensors))
    if packed:
        if decode and packed.blocks:
            raise BadPlan(
                f"tensor {packed.name!r} is there as blocks of a GGUF file, not as numbers",
                kind="raw_blocks",
                hint="open the file for decoding",
            )
        if decode:
            return Kind(PREQUANTIZED, asked)
        if asked:
            raise _requantize(packed, asked, "requantize_prequantized")
        return Kind(PREQUANTIZED, _shared_format(source, recorded.get("quant_type")))
    fp8 = _first(tensors, lambda t: _is_fp8_weight(t, tensors))
    if fp8:
        if asked and not decode:
            raise _requantize(fp8, asked, "requantize_fp8")
        if _is_blocked(fp8, tensors) and fp8_block_size(source.config) is None:
            raise BadSource(
                "config.json: FP8 weights without weight_block_size",
                kind="missing_weight_block_size",
            )
        return Kind(BLOCK_FP8, asked if decode else MXFP8)
    if decode and not any(t.blocks for t in tensors.values()):
        raise BadRequest(
            "the weights are not quantized, so nothing can be quantized again",
            kind="nothing_to_requantize",
            hint="use --quantize",
        )
    return Kind(FLOAT, asked)


def _is_fp8_weight(tensor: SourceTensor, tensors: Mapping[str, SourceTensor]) -> bool:
    """Whether this is a weight of FP8 codes; stacks of experts may lack `.weight`."""
    if tensor.dtype not in FP8_E4M3_DTYPES:
        return False
    return tensor.name.endswith(".weight") or f"{tensor.name}_scale_inv" in tensors


def _is_blocked(weight: SourceTensor, tensors: Mapping[str, SourceTensor]) -> bool:
    """Whether an FP8 weight's scale is neither one number nor one for each row or byte group."""
    scale = next(
        (tensors[n] for n in (f"{weight.name}_scale_inv", f"{weight.name}_scale") if n in tensors),
        None,
    )
    if scale is None or scale.elements == 1 or scale.dtype == "U8":
        return False
    return scale.name.endswith("_inv") and scale.shape[-1:] != (1,)


def is_packed(tensor: SourceTensor, tensors: Mapping[str, SourceTensor]) -> bool:
    """Whether this tensor shows that the checkpoint holds packed codes with scales."""
    raw_blocks = tensor.blocks and tensor.dtype == RAW_BLOCKS
    if raw_blocks or tensor.name.endswith((".scales", ".weight_packed", ".weight.scale")):
        return True
    if tensor.name.endswith("_scales"):
        return tensor.name.removesuffix("_scales") + "_blocks" in tensors
    base = tensor.name.removesuffix("_scale")
    weight = tensors.get(base) if tensor.name.endswith(".weight_scale") else None
    return weight is not None and weight.dtype in {"U8", "U32", "I8"}


def _first(
    tensors: Mapping[str, SourceTensor], test: Callable[[SourceTensor], bool]
) -> SourceTensor | None:
    return next((t for t in tensors.values() if test(t)), None)


def _requantize(found: SourceTensor, asked: Format, kind: str) -> BadPlan:
    return BadPlan(
        f"cannot requantize to {asked.name}: tensor {found.name!r} is already quantized",
        kind=kind,
        hint=f"--requantize {asked.name} decodes first, at a cost; better start from the original "
        "checkpoint",
    )


# -- what config.json says about quantization ------------------------------------------------------


def quantization_entries(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The quantization objects of a config, in the order in which they are asked.

    Raises BadSource when `bits`, `group_size` or `mode` has the wrong JSON type.
    """
    nested = config.get("text_config")
    for place in (config, nested if isinstance(nested, dict) else {}):
        for key in _CONFIG_KEYS:
            entry = place.get(key)
            if isinstance(entry, dict):
                _check_types(key, entry)
                yield entry


def _check_types(key: str, entry: Mapping[str, Any]) -> None:
    for name, kind in (("bits", int), ("group_size", int), ("mode", str), ("quant_method", str)):
        value = entry.get(name)
        if value is not None and type(value) is not kind:
            raise BadSource(
                f"config.json: {key}.{name} is {value!r}, not a {kind.__name__}",
                kind="invalid_config",
            )


def recorded_metadata(config: Mapping[str, Any]) -> dict[str, str]:
    """Blob metadata that the config's model-wide quantization entry stands for; {} for none.

    A missing mode means affine, as mlx-lm reads its own older files.
    """
    entry = next((e for e in list(quantization_entries(config)) if e.get("bits")), None)
    if entry is None:
        return {}
    found = recorded_format((entry.get("mode") or "affine").lower(), entry["bits"])
    if found is None:
        return {}
    group = entry.get("group_size") or 0
    return {"quant_type": found.name} | ({"group_size": str(group)} if group > 0 else {})


def _shared_format(source: Source, recorded: str | None) -> Format | None:
    """The one format all packed weights share, None when they differ or say nothing."""
    found: set[str | None] = set()
    for tensor in source.tensors.values():
        if tensor.name.endswith(".scales"):
            found.add(recorded)
        elif tensor.name.endswith(".weight_packed") or (
            tensor.name.endswith(".weight_scale") and is_packed(tensor, source.tensors)
        ):
            found.add("nvfp4")
    name = found.pop() if len(found) == 1 else None
    return parse_request(name)


def fp8_block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The block size of block-FP8 weights as the config states it, None when it does not."""
    for entry in quantization_entries(config):
        method = str(entry.get("quant_method", "")).lower()
        size = entry.get("weight_block_size") if method == "fp8" else None
        if size is None and (
            method == "compressed-tensors" or entry.get("format") == "float-quantized"
        ):
            size = _group_block(entry.get("config_groups"))
        if isinstance(size, str):  # as early versions of compressed-tensors wrote it
            size = [int(n) if n.isdecimal() and len(n) < 10 else n for n in size.split("x")]
        if (
            isinstance(size, list)
            and len(size) == 2
            and all(type(n) is int and n > 0 for n in size)
        ):
            return size[0], size[1]
    return None


def _group_block(groups: Any) -> Any:
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or group.get("format") != "float-quantized":
            continue
        if weights.get("num_bits") == 8 and str(weights.get("type", "")).lower() == "float":
            return weights.get("block_structure")
    return None
