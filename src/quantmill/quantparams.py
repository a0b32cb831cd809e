"""The parameters of a quantized tensor, and who said so.

Blob metadata, config.json, quantization_config.json and model_index.json each may say something
about a tensor, and each may be wrong. The packed shapes decide which of them is believed: of those
that fit, a config's entry for the module comes first, then the blob's metadata, then defaults
(docs/loading.md). What nobody says and the shapes leave open is an error, never a guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from quantmill.errors import BadRequest, Corrupt
from quantmill.formats import FLOAT_DTYPES, INT8, Format, mode_default, parse_format
from quantmill.quantconfig import QuantConfig, Section, Written, label, lookup_keys

LOAD_BITS = (1, 2, 3, 4, 5, 6, 8)
LOAD_GROUPS = (16, 32, 64, 128)
"""Affine parameters that are read; what is written is narrower (formats.is_valid)."""

# 32-bit words of codes for each byte scale
_FLOAT_RATIOS = {2: "nvfp4", 4: "mxfp4", 8: "mxfp8"}

BLOB, OVERRIDE, DEFAULT = "blob metadata", "config override", "config default"
MODEL_INDEX, SHAPES = "model index", "shapes"


class Stored(Protocol):
    """A tensor as a header describes it."""

    @property
    def dtype(self) -> str:
        """Dtype tag."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Stored shape: words, not codes."""


@dataclass(frozen=True, slots=True)
class Params:
    """The format of a tensor; `source` is one of BLOB, OVERRIDE, DEFAULT, MODEL_INDEX, SHAPES."""

    format: Format
    source: str


# -- what blobs say ------------------------------------------------------------------------------


def recorded(name: str, metadata: Mapping[str, str]) -> list[Written]:
    """What a blob's metadata says about a tensor: its own keys with the blob's behind, then those.

    Raises Corrupt for a type that nothing is known about.
    """
    own = {k: metadata.get(f"{name}.{k}", "") for k in ("quant_type", "group_size", "bits")}
    whole = {k: metadata.get(k, "") for k in own}
    found = []
    for said in ({k: own[k] or whole[k] for k in own}, whole):
        if said["quant_type"]:
            group = _number(said["group_size"]) or _number(whole["group_size"])
            found.append(_typed(name, said["quant_type"], _number(said["bits"]), group))
    return list(dict.fromkeys(found))


def _typed(name: str, kind: str, bits: int | None, group: int | None) -> Written:
    if kind.strip().lower() == "affine":
        return Written("affine", bits, group)
    try:
        known = parse_format(kind)
    except BadRequest:
        raise _contradiction(name, f"recorded type {kind!r} is unknown") from None
    return Written(known.mode, bits or known.bits, group)


def _number(text: str) -> int | None:
    """A positive number as metadata records it; any other text says nothing."""
    return int(text) or None if text.isdecimal() and len(text) < 10 else None


# Weights at least this many times as large as their scales were called Q8.
_Q8_RATIO = 12


def legacy_quantization(model_index: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    """The type that Ollama's component loader named, from layer names and sizes; "" for none.

    Kept as it was: today's int4 is called Q8, and Q4 when its scales are F32. Nothing but listings
    may rely on it; `resolve` goes by headers. Of several pairs the first in name order decides.
    """
    stated = model_index.get("quantization")
    if isinstance(stated, str) and stated:
        return stated
    names = sorted(sizes)
    if not any(name.endswith(".weight_scale") for name in names):
        return ""
    if not any(name.endswith(".weight_qbias") for name in names):
        return "NVFP4"
    for name in names:
        scale = f"{name}_scale"
        if name.endswith(".weight") and not {"_scale", "_qbias"} & _parts(name) and scale in sizes:
            return "Q4" if sizes[name] < _Q8_RATIO * sizes[scale] else "Q8"
    return "Q4"


def _parts(name: str) -> set[str]:
    return {part for part in ("_scale", "_qbias") if part in name}


# -- what the shapes say ---------------------------------------------------------------------------


def affine_consistent(words: int, groups: int, bits: int, group_size: int) -> bool:
    """Whether rows of `words` 32-bit words hold `groups` groups of codes of this width."""
    return min(words, groups, bits, group_size) > 0 and words * 32 == groups * group_size * bits


def bits_for_group_size(words: int, groups: int, group_size: int) -> int | None:
    """The affine width that makes the shapes fit this group size, None where none does."""
    fitting_bits = (b for b in LOAD_BITS if affine_consistent(words, groups, b, group_size))
    return next(fitting_bits, None) if group_size in LOAD_GROUPS else None


def fitting(words: int, groups: int, scale_dtype: str, has_bias: bool) -> list[Format]:
    """Every format that explains a row of `words` words of codes and `groups` scales."""
    if scale_dtype == "U8":
        ratio = words // groups if groups and words % groups == 0 else 0
        known = _FLOAT_RATIOS.get(ratio)
        return [mode_default(known)] if known and not has_bias else []
    if scale_dtype not in FLOAT_DTYPES or not has_bias:
        return []
    return sorted(
        Format("affine", bits, group)
        for group in LOAD_GROUPS
        if (bits := bits_for_group_size(words, groups, group))
    )


def infer(
    weight_shape: Sequence[int] | None, scale_shape: Sequence[int] | None, hint_bits: int = 0
) -> Format | None:
    """Ollama's reading of shapes alone: 4 or 8 bits affine, None where it is undecided.

    It takes mxfp4 for int4 and int4 g128 for int8 g64; `resolve` only mentions it.
    """
    words, groups = _last(weight_shape), _last(scale_shape)
    if words <= 0 or groups <= 0:
        return None
    four, eight = words * 8 // groups, words * 4 // groups
    if four == 32:
        return Format("affine", 4, 32)
    if eight == 64:
        return INT8
    if (four, eight) == (64, 32):
        return {4: Format("affine", 4, 64), 8: Format("affine", 8, 32)}.get(hint_bits)
    if (four in LOAD_GROUPS) == (eight in LOAD_GROUPS):
        return None
    return Format("affine", 4, four) if four in LOAD_GROUPS else Format("affine", 8, eight)


def _last(shape: Sequence[int] | None) -> int:
    return shape[-1] if shape else 0


# -- the decision ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Statement:
    """Something said about one tensor: where, in which words, and the formats it leaves."""

    source: str
    text: str
    fits: list[Format]


def resolve(
    name: str,
    weight: Stored,
    scale: Stored,
    bias: Stored | None,
    metadata: Mapping[str, str],
    config: QuantConfig | None = None,
    default: Written | None = None,
) -> Params:
    """The parameters of the quantized tensor `name`.

    Only formats that the shapes and dtypes allow are considered. Of what is said about this tensor
    the first that fits is taken: the config's entry for its module, its blob's `metadata`. Then the
    model's defaults: the config's, the model index's, and `default`, which is what other blobs of
    the model record. Then the shapes alone, if they leave one format.

    Raises Corrupt, kind `bad_relation`, naming what contradicts what: parts that do not belong
    together, an unknown recorded type, or statements about this tensor none of which fits. Kind
    `ambiguous_parameters` names the formats that are left when there are several.
    """
    fits = _fits(name, weight, scale, bias)
    said = [
        *(s for section in _sections(config) for s in _overrides(name, section, fits)),
        *(_Statement(BLOB, str(w), w.narrow(fits)) for w in recorded(name, metadata)),
    ]
    if said and not any(s.fits for s in said):
        first = said[0]
        raise _contradiction(
            name, f"{first.source} says {first.text}, {_stored(weight, scale)} fit {_listed(fits)}"
        )
    defaults = [
        *(_Statement(DEFAULT, "", s.model_wide.narrow(fits)) for s in _sections(config)),
        *(_Statement(MODEL_INDEX, "", w.narrow(fits)) for w in _index(config)),
        *(_Statement(BLOB, "", w.narrow(fits)) for w in (default,) if w),
    ]
    for statement in (*said, *defaults):
        left = [f for f in statement.fits if f in fits]
        if len(left) == 1:
            return Params(left[0], statement.source)
        fits = left or fits
    if len(fits) == 1:
        return Params(fits[0], SHAPES)
    raise _ambiguous(name, weight, scale, fits)


def _sections(config: QuantConfig | None) -> tuple[Section, ...]:
    return config.sections if config else ()


def _index(config: QuantConfig | None) -> tuple[Written, ...]:
    return (config.model_index,) if config and config.model_index else ()


def _overrides(name: str, section: Section, fits: list[Format]) -> Iterator[_Statement]:
    """A section's entry for the tensor, in mlx-lm's reading, then in mlx-native's."""
    key = next(
        (k for k in (name.removesuffix(".weight"), *lookup_keys(name)) if k in section.entries),
        None,
    )
    if key is not None:
        written = section.module(key, has_scales=True)
        text = str(written) if written else "not quantized"
        yield _Statement(OVERRIDE, text, written.narrow(fits) if written else [])
    found = section.overrides()
    key = next((k for k in lookup_keys(name) if k in found), None)
    if key is not None:
        yield _Statement(OVERRIDE, str(found[key]), found[key].narrow(fits))


def _fits(name: str, weight: Stored, scale: Stored, bias: Stored | None) -> list[Format]:
    """The formats that dtypes and shapes allow, at least one."""
    if weight.dtype != "U32" or len(weight.shape) < 2:
        raise _contradiction(name, f"has scales but is {weight.dtype} {list(weight.shape)}")
    if scale.shape[:-1] != weight.shape[:-1] or len(scale.shape) != len(weight.shape):
        raise _contradiction(name, f"{_stored(weight, scale)} do not fit each other")
    if bias is not None and (bias.shape, bias.dtype) != (scale.shape, scale.dtype):
        raise _contradiction(name, "biases and scales differ in shape or dtype")
    found = fitting(weight.shape[-1], scale.shape[-1], scale.dtype, bias is not None)
    if not found:
        biases = "with" if bias is not None else "without"
        raise _contradiction(name, f"{_stored(weight, scale)} {biases} biases fit no format")
    return found


def _stored(weight: Stored, scale: Stored) -> str:
    return f"codes {list(weight.shape)} and {scale.dtype} scales {list(scale.shape)}"


def _listed(formats: Iterable[Format]) -> str:
    return ", ".join(label(f) for f in formats)


def _contradiction(name: str, what: str) -> Corrupt:
    return Corrupt(f"tensor {name!r}: {what}", kind="bad_relation")


def _ambiguous(name: str, weight: Stored, scale: Stored, fits: list[Format]) -> Corrupt:
    peer = infer(weight.shape, scale.shape)
    return Corrupt(
        f"tensor {name!r}: no type recorded; {_stored(weight, scale)} fit {_listed(fits)}",
        kind="ambiguous_parameters",
        hint="say which in config.json: quantization, under the module's name"
        + (f" (Ollama takes it for {label(peer)})" if peer in fits else ""),
    )
