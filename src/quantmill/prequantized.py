"""Plans for weights that a quantizer stored: copied, recoded without loss, or decoded.

One weight, or the experts of a stack: either way its parts become the specs of one stored weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantmill.coded import Coded
from quantmill.errors import BadSource
from quantmill.formats import FP8_E4M3_DTYPES
from quantmill.plans import (
    BIAS,
    CODES,
    DECODE,
    DECODE_FP8,
    DECODE_STACK_FP8,
    DIVIDES,
    GLOBAL,
    MLX_GLOBAL,
    MLX_GLOBAL_F32,
    MULTIPLIES,
    RECIPROCAL_F32,
    RECODE,
    RELABEL_U8,
    REPACK_FP4,
    REPACK_FP8,
    SCALAR_F32,
    SCALE,
    STACK,
    LowRank,
    TensorSpec,
)
from quantmill.policy import Decision
from quantmill.source import SourceTensor
from quantmill.stacks import ordered_members

_RULE = "prequantized"
_GLOBALS = {MULTIPLIES: SCALAR_F32, DIVIDES: RECIPROCAL_F32, MLX_GLOBAL: MLX_GLOBAL_F32}
_SUFFIX = {CODES: "", SCALE: ".scale", BIAS: ".bias", GLOBAL: ".global_scale"}


@dataclass(frozen=True, slots=True)
class Planned:
    """The specs of one stored weight, and what its blob records about them."""

    specs: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]


def kept(name: str, members: Sequence[Coded], *, stack: bool, note: str = "") -> Planned:
    """The weight in the format that holds it without loss; `note` ends the reason."""
    first = members[0]
    assert first.format is not None
    if first.copied:
        specs = tuple(
            _part(name, role, members, stack, note) for role in _SUFFIX if role in first.parts
        )
        return Planned(specs, first.metadata)
    dtype = first.parts[SCALE].dtype if SCALE in first.parts else first.decoded
    spec = TensorSpec(
        name, _sources(members), RECODE, dtype, _shape(members, stack=stack),
        first.format,
        _RULE, f"{first.scheme}, codes and scales kept{note}",
        scheme=first.scheme, coding=first.coding,
    )  # fmt: skip
    return Planned((spec,), first.format.metadata())


def decoded(
    name: str,
    members: Sequence[Coded],
    decision: Decision,
    *,
    stack: bool,
    added: tuple[LowRank | None, ...] = (),
) -> Planned:
    """The weight as numbers, quantized as decided, after what adapters add to its members."""
    first = members[0]
    transform = DECODE
    if first.is_fp8:
        transform = DECODE_STACK_FP8 if stack else DECODE_FP8
    fmt = decision.format
    spec = TensorSpec(
        name, _sources(members), transform, first.decoded, _shape(members, stack=stack), fmt,
        decision.rule, f"{first.scheme} decoded; {decision.reason}",
        scheme=first.scheme, coding=first.coding, added=added,
    )  # fmt: skip
    return Planned((spec,), fmt.metadata() if fmt else {})


def _sources(members: Sequence[Coded]) -> tuple[str, ...]:
    """Names of all parts: role by role, and within a role member by member."""
    return tuple(m.parts[role].name for role in members[0].coding.roles for m in members)


def _shape(members: Sequence[Coded], *, stack: bool) -> tuple[int, ...]:
    return (len(members), *members[0].shape) if stack else members[0].shape


def _part(name: str, role: str, members: Sequence[Coded], stack: bool, note: str) -> TensorSpec:
    """One tensor of a weight that is copied."""
    first = members[0]
    part = first.parts[role]
    dtype, shape, transform = _renamed(first, role, part)
    if stack:
        shape = (len(members),) if role == GLOBAL else (len(members), *shape)
        transform = transform or STACK
    return TensorSpec(
        name + _SUFFIX[role], tuple(m.parts[role].name for m in members), transform, dtype, shape,
        None, _RULE, f"{first.scheme}, copied without loss{note}", scheme=first.scheme,
        keeps=first.format if role == CODES else None, role=role,
    )  # fmt: skip


def _renamed(
    first: Coded, role: str, part: SourceTensor
) -> tuple[str, tuple[int, ...], str | None]:
    """Dtype, shape and transform of a part that is copied."""
    assert first.format is not None
    if role == CODES and part.dtype != "U32":
        words = first.format.packed_columns(first.shape[-1])
        repack = REPACK_FP8 if part.dtype in FP8_E4M3_DTYPES else REPACK_FP4
        return "U32", (*first.shape[:-1], words), repack
    if role == SCALE and part.dtype.startswith("F8_"):
        return "U8", part.shape, RELABEL_U8
    if role == GLOBAL:
        return "F32", part.shape, _GLOBALS[first.coding.global_scale]
    return part.dtype, part.shape, None


def ordered_coded(
    group: str, projection: str, members: Mapping[int, Coded], count: int
) -> list[Coded]:
    """The experts of one projection in index order, all stored alike.

    Raises BadSource, kind `missing_expert` or one that ends in `_layout`, naming two that differ.
    """
    try:
        ordered = ordered_members(group, projection, members, count)
    except BadSource as error:
        fp8 = any(m.is_fp8 for m in members.values())
        if error.kind != "mismatched_expert_layout" or not fp8:
            raise
        raise BadSource(error.message, kind="mismatched_fp8_weight_layout") from None
    first = ordered[0]
    for other in ordered[1:]:
        if other.layout != first.layout:
            what = "FP8 scales" if first.is_fp8 else "parts"
            raise BadSource(
                f"{group}: the {what} of {projection} differ between experts: those of "
                f"{first.parts[CODES].name!r} ({first.scheme}) and of "
                f"{other.parts[CODES].name!r} ({other.scheme})",
                kind="mismatched_fp8_scale_layout" if first.is_fp8 else "mismatched_expert_layout",
            )
    return ordered
