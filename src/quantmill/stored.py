"""What a tensor blob holds: its header and metadata made into weights with formats and shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from quantmill.companions import LEGACY_KEY, Weight, gather
from quantmill.errors import Corrupt
from quantmill.formats import FLOAT_DTYPES, Format, mode_default
from quantmill.quantparams import LOAD_BITS, LOAD_GROUPS, fitting, recorded
from quantmill.tensorfile import TensorEntry, TensorFile

__all__ = ["LEGACY_KEY", "StoredTensor", "describe_blob", "recorded_format"]


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
    Kind `ambiguous_parameters`: no type is recorded, and several formats explain the shapes.
    """
    entries = file.entries
    weights = {w.codes: w for w in gather(entries)[0].values()}
    used = {part for w in weights.values() for part in w.companions}
    parts = {n: _companions(weights.get(n), entries) for n in entries if n not in used}
    return [_describe(name, found, file, where) for name, found in parts.items()]


def _companions(
    weight: Weight | None, entries: Mapping[str, TensorEntry]
) -> dict[str, TensorEntry]:
    """The scale, bias and global scale of a weight; {} for anything else."""
    if weight is None:
        return {}
    names = {"scale": weight.scale, "bias": weight.bias, "global": weight.global_scale}
    return {role: entries[name] for role, name in names.items() if name is not None}


def _describe(
    name: str, parts: Mapping[str, TensorEntry], file: TensorFile, where: str
) -> StoredTensor:
    weight = file.entries[name]
    nbytes = weight.nbytes + sum(part.nbytes for part in parts.values())
    recorded = recorded_format(name, file.metadata, where)
    if not parts:
        packed = weight.dtype == "U32" and len(weight.shape) > 1 and name != LEGACY_KEY
        if packed and (recorded is not None or name.endswith(".weight")):
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

    Raises Corrupt for a type that nothing is known about, or parameters it cannot have.
    """
    try:
        said = recorded(name, metadata)
    except Corrupt as error:
        raise Corrupt(f"{where}: {error.message}", kind=error.kind) from None
    if not said:
        return None
    mode = said[0].mode or "affine"
    known = mode_default(mode)
    found = Format(mode, said[0].bits or known.bits, said[0].group_size or known.group_size)
    affine = found.bits in LOAD_BITS and found.group_size in LOAD_GROUPS
    if not (affine if found.has_bias else found == known):
        raise _bad(where, name, f"recorded type {found.name} g{found.group_size} does not exist")
    return found


def _inferred(weight: TensorEntry, parts: Mapping[str, TensorEntry], where: str) -> Format:
    """The one format that the shapes and the scales' dtype allow."""
    words, groups = _last(weight), _last(parts["scale"])
    in_bytes = parts["scale"].dtype == "U8"
    found = fitting(words, groups, "U8" if in_bytes else "F32", has_bias=not in_bytes)
    if in_bytes and not found:
        raise _bad(where, weight.name, f"{words} words and {groups} byte scales fit no format")
    if len(found) == 1:
        return found[0]
    names = ", ".join(f"{f.name} g{f.group_size}" for f in found) or "no format"
    kind = "ambiguous_parameters" if found else "bad_relation"
    raise _bad(where, weight.name, f"no type recorded; the shapes fit {names}", kind)


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
    if scale.dtype not in (FLOAT_DTYPES if fmt.has_bias else {"U8"}):
        raise _bad(where, weight.name, f"{fmt.name} cannot have {scale.dtype} scales")
    if fmt.has_bias != (bias is not None):
        raise _bad(where, weight.name, f"{fmt.name} {'needs' if fmt.has_bias else 'has no'} biases")
    if bias is not None and (bias.shape, bias.dtype) != (scale.shape, scale.dtype):
        raise _bad(where, weight.name, "biases and scales differ in shape or dtype")
    extra = parts.get("global")
    if extra is not None and (fmt.mode != "nvfp4" or extra.dtype != "F32"):
        raise _bad(where, weight.name, f"a global scale of {extra.dtype} does not fit {fmt.name}")


def _bad(where: str, tensor: str, what: str, kind: str = "bad_relation") -> Corrupt:
    return Corrupt(f"{where}: tensor {tensor!r}: {what}", kind=kind)
