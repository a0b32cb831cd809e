"""What a tensor blob holds: its header and metadata made into weights with formats and shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from quantmill.errors import BadRequest, Corrupt
from quantmill.formats import Format, mode_default, parse_format
from quantmill.tensorfile import TensorEntry, TensorFile

# Endings of the parts of a quantized weight `<n>`: quantmill's and Ollama's, then mlx-lm's, whose
# names replace `.weight` instead of following it.
_SCALE, _BIAS, _GLOBAL = ".scale", ".bias", ".global_scale"
_PLURAL_SCALE, _PLURAL_BIAS = ".scales", ".biases"

LEGACY_KEY = "data"
"""The only key of the oldest blobs, whose scales lie in blobs of their own."""

_LOAD_BITS = (1, 2, 3, 4, 5, 6, 8)
_LOAD_GROUPS = (16, 32, 64, 128)
# 32-bit words of codes for each byte scale
_FLOAT_RATIOS = {2: "nvfp4", 4: "mxfp4", 8: "mxfp8"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A weight in a blob with its companions.

    `shape` is logical: codes, not words. `dtype` is the stored one. `format` is None for tensors
    that are not quantized; `nbytes` counts the companions too.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    format: Format | None
    nbytes: int

    @property
    def elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def describe_blob(file: TensorFile, where: str) -> list[StoredTensor]:
    """Every weight of a blob, in name order.

    Raises Corrupt, naming `where` and the tensor, when codes, scales, biases and metadata do not
    belong together: packed codes without scales, unknown types, shapes that no group size explains.
    """
    entries = file.entries
    parts = {name: _companions(name, entries) for name in entries}
    used = {e.name for found in parts.values() for e in found.values()}
    return [_describe(n, parts[n], file, where) for n in entries if n not in used]


def _companions(name: str, entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The scale, bias and global scale of a weight; {} for anything else."""
    base = name.removesuffix(".weight")
    names = {"scale": [name + _SCALE], "bias": [name + _BIAS], "global": [name + _GLOBAL]}
    if base != name:
        names["scale"].append(base + _PLURAL_SCALE)
        names["bias"].append(base + _PLURAL_BIAS)
    found = {
        role: entries[candidate]
        for role, candidates in names.items()
        for candidate in reversed(candidates)
        if candidate in entries
    }
    # without a scale, `<n>.bias` is a tensor in its own right
    return found if "scale" in found else {}


def _describe(
    name: str, parts: Mapping[str, TensorEntry], file: TensorFile, where: str
) -> StoredTensor:
    weight = file.entries[name]
    nbytes = weight.nbytes + sum(part.nbytes for part in parts.values())
    recorded = recorded_format(name, file.metadata, where)
    if not parts:
        if weight.dtype == "U32" and len(weight.shape) > 1 and name != LEGACY_KEY:
            raise _bad(where, name, "packed codes without scales")
        if recorded is not None and f"{name}.quant_type" in file.metadata:
            raise _bad(where, name, f"recorded as {recorded.name} but has no scales")
        return StoredTensor(name, weight.dtype, weight.shape, None, nbytes)
    fmt = recorded or _inferred(weight, parts, where)
    _check_parts(weight, parts, fmt, where)
    *leading, words = weight.shape
    shape = (*leading, fmt.columns(words))
    return StoredTensor(name, weight.dtype, shape, fmt, nbytes)


def recorded_format(name: str, metadata: Mapping[str, str], where: str) -> Format | None:
    """The format the metadata gives for a tensor: its own keys first, then those of the blob.

    Raises Corrupt for a type that nothing is known about.
    """
    kind = metadata.get(f"{name}.quant_type") or metadata.get("quant_type")
    if not kind:
        return None
    group = metadata.get(f"{name}.group_size") or metadata.get("group_size") or ""
    bits = metadata.get(f"{name}.bits") or metadata.get("bits") or ""
    try:
        known = mode_default("affine") if kind.lower() == "affine" else parse_format(kind)
    except BadRequest:
        raise _bad(where, name, f"recorded type {kind!r} is unknown") from None
    return Format(
        known.mode,
        int(bits) if bits.isdecimal() else known.bits,
        int(group) if group.isdecimal() and int(group) else known.group_size,
    )


def _inferred(weight: TensorEntry, parts: Mapping[str, TensorEntry], where: str) -> Format:
    """The one format that the shapes and the scales' dtype allow."""
    words, groups = _last(weight), _last(parts["scale"])
    if parts["scale"].dtype == "U8":
        mode = _FLOAT_RATIOS.get(words // groups if groups and words % groups == 0 else 0)
        if mode is None:
            raise _bad(where, weight.name, f"{words} words and {groups} byte scales fit no format")
        return mode_default(mode)
    fitting = [
        Format("affine", bits, group)
        for bits in _LOAD_BITS
        for group in _LOAD_GROUPS
        if words * 32 == groups * group * bits
    ]
    if len(fitting) != 1:
        names = ", ".join(f"{f.name} g{f.group_size}" for f in fitting) or "no format"
        raise _bad(where, weight.name, f"no type recorded; the shapes fit {names}")
    return fitting[0]


def _last(entry: TensorEntry) -> int:
    return entry.shape[-1] if entry.shape else 0


def _check_parts(
    weight: TensorEntry, parts: Mapping[str, TensorEntry], fmt: Format, where: str
) -> None:
    scale, bias = parts["scale"], parts.get("bias")
    if weight.dtype != "U32" or len(weight.shape) < 2:
        raise _bad(where, weight.name, f"has scales but is {weight.dtype} {list(weight.shape)}")
    codes, groups = _last(weight) * 32, _last(scale) * fmt.group_size * fmt.bits
    if codes != groups or scale.shape[:-1] != weight.shape[:-1]:
        raise _bad(
            where,
            weight.name,
            f"{fmt.label}: codes {list(weight.shape)} and scales {list(scale.shape)} do not fit",
        )
    if (scale.dtype == "U8") == fmt.has_bias:
        raise _bad(where, weight.name, f"{fmt.name} cannot have {scale.dtype} scales")
    if fmt.has_bias != (bias is not None):
        raise _bad(where, weight.name, f"{fmt.name} {'needs' if fmt.has_bias else 'has no'} biases")
    if bias is not None and (bias.shape, bias.dtype) != (scale.shape, scale.dtype):
        raise _bad(where, weight.name, "biases and scales differ in shape or dtype")
    extra = parts.get("global")
    if extra is not None and (fmt.mode != "nvfp4" or extra.dtype != "F32"):
        raise _bad(where, weight.name, f"a global scale of {extra.dtype} does not fit {fmt.name}")


def _bad(where: str, tensor: str, what: str) -> Corrupt:
    return Corrupt(f"{where}: tensor {tensor!r}: {what}", kind="bad_relation")
