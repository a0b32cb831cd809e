"""Plans for checkpoints that are quantized already: producers' packings as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from quantmill.classify import FP8_BLOCK, recorded_metadata
from quantmill.errors import BadSource
from quantmill.formats import FP8_E4M3_DTYPES, MXFP8
from quantmill.plans import (
    DECODE_FP8,
    DECODE_STACK_FP8,
    RECIPROCAL_F32,
    RELABEL_U8,
    REPACK_FP4,
    SCALAR_F32,
    STACK,
    BlobSpec,
    Dropped,
    TensorSpec,
)
from quantmill.policy import Policy, decide
from quantmill.source import Source, SourceTensor
from quantmill.stacks import blob_of, ordered_members, split_experts, stack_blobs, stacked


@dataclass(frozen=True, slots=True)
class Packing:
    """How one producer names and stores a quantized weight; endings follow the module's name."""

    name: str
    weight: str
    scale: str
    bias: str | None
    global_scale: str | None
    global_transform: str | None
    unused: tuple[str, ...]
    nvfp4: bool


_ACTIVATION_SCALES = (".input_scale", ".input_global_scale")

PACKINGS = (
    Packing("mlx", ".weight", ".scales", ".biases", None, None, (), False),
    Packing(
        "compressed-tensors nvfp4", ".weight_packed", ".weight_scale", None,
        ".weight_global_scale", RECIPROCAL_F32, _ACTIVATION_SCALES, True,
    ),
    Packing(
        "modelopt nvfp4", ".weight", ".weight_scale", None,
        ".weight_scale_2", SCALAR_F32, _ACTIVATION_SCALES, True,
    ),
)  # fmt: skip
"""Tried in this order; the first whose weight and scale are both there wins."""

FP8_SCALES = ("_scale_inv", "_scale")
"""Endings of an FP8 weight's block scales; both multiply. The first found wins."""

_PASSED = ("passed_through", "not part of a quantized weight")


def _copy(tensor: SourceTensor, name: str | None = None) -> TensorSpec:
    rule, reason = _PASSED
    return TensorSpec(
        name or tensor.name, (tensor.name,), None, tensor.dtype, tensor.shape, None, rule, reason
    )


# -- weights that are packed already ---------------------------------------------------------------


def plan_prequantized(source: Source) -> tuple[list[BlobSpec], tuple[Dropped, ...]]:
    """Blobs in the order of their names, and the activation scales that nothing reads."""
    recorded = recorded_metadata(source.config)
    used: set[str] = set()
    blobs: list[BlobSpec] = []
    dropped: list[Dropped] = []
    for tensor in source.tensors.values():
        packing = find_packing(tensor, source.tensors)
        if packing is None:
            continue
        base = tensor.name.removesuffix(packing.weight)
        specs = _fused(packing, base, source.tensors)
        used |= {name for spec in specs for name in spec.sources}
        for ending in packing.unused:
            if base + ending in source.tensors:
                used.add(base + ending)
                dropped.append(Dropped(base + ending, "activation scale: not used for weights"))
        blobs.append(BlobSpec(f"{base}.weight", tuple(specs), _packed_metadata(packing, recorded)))
    plain = (t for t in source.tensors.values() if t.name not in used)
    blobs += [blob_of(t.name, [_copy(t)]) for t in plain]
    return sorted(blobs, key=lambda b: b.name), tuple(dropped)


def find_packing(tensor: SourceTensor, tensors: Mapping[str, SourceTensor]) -> Packing | None:
    """The packing whose weight this tensor is, None for any other tensor."""
    for packing in PACKINGS:
        base = tensor.name.removesuffix(packing.weight)
        if base != tensor.name and base + packing.scale in tensors:
            return packing
    return None


def _fused(packing: Packing, base: str, tensors: Mapping[str, SourceTensor]) -> list[TensorSpec]:
    out, reason = f"{base}.weight", f"{packing.name}, copied without loss"

    def part(source: SourceTensor, name: str, transform: str | None) -> TensorSpec:
        dtype, shape = _transformed(source, transform)
        return TensorSpec(
            name, (source.name,), transform, dtype, shape, None, "prequantized", reason
        )

    weight, scale = tensors[base + packing.weight], tensors[base + packing.scale]
    relabel = RELABEL_U8 if packing.nvfp4 and scale.dtype in FP8_E4M3_DTYPES else None
    repack = REPACK_FP4 if packing.nvfp4 and _is_fp4_bytes(weight) else None
    specs = [part(weight, out, repack), part(scale, f"{out}.scale", relabel)]
    if packing.bias and base + packing.bias in tensors:
        specs.append(part(tensors[base + packing.bias], f"{out}.bias", None))
    if packing.global_scale and base + packing.global_scale in tensors:
        found = tensors[base + packing.global_scale]
        specs.append(part(found, f"{out}.global_scale", packing.global_transform))
    return specs


def _is_fp4_bytes(weight: SourceTensor) -> bool:
    return weight.dtype == "U8" and len(weight.shape) in {2, 3} and weight.shape[-1] % 4 == 0


def _transformed(source: SourceTensor, transform: str | None) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape after a transform; checks what the transform needs."""
    if transform == REPACK_FP4:
        return "U32", (*source.shape[:-1], source.shape[-1] // 4)
    if transform == RELABEL_U8:
        return "U8", source.shape
    if transform in {SCALAR_F32, RECIPROCAL_F32}:
        check_scalar_f32(source.name, source.dtype, source.shape)
        return "F32", source.shape
    return source.dtype, source.shape


def check_scalar_f32(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Raise BadSource unless this is one F32 element, of whatever rank."""
    if dtype.upper() != "F32":
        raise BadSource(f"global scale {name!r} has dtype {dtype}, not F32", kind="not_f32")
    if any(n != 1 for n in shape):
        raise BadSource(f"global scale {name!r} has shape {list(shape)}", kind="non_scalar")


def _packed_metadata(packing: Packing, recorded: Mapping[str, str]) -> dict[str, str]:
    if not packing.nvfp4:
        return dict(recorded)
    group = recorded.get("group_size") or ("16" if packing.weight == ".weight_packed" else None)
    return {"quant_type": "nvfp4"} | ({"group_size": group} if group else {})


# -- block FP8 -------------------------------------------------------------------------------------


def plan_block_fp8(source: Source, policy: Policy) -> list[BlobSpec]:
    """FP8 weights decoded and quantized to mxfp8 where the policy says so, all else copied.

    Plain and FP8 tensors come in name order, then stacks of plain experts, then of FP8 experts.
    """
    tensors = source.tensors
    scales = {t.name: s for t in tensors.values() if (s := _fp8_scale(t, tensors))}
    consumed = {s.name for s in scales.values()}
    singles, fp8_stacks = split_experts(tensors[name] for name in scales)
    plain, plain_stacks = split_experts(
        t for t in tensors.values() if t.name not in scales and t.name not in consumed
    )
    blobs = [blob_of(t.name, [_decoded(t, scales[t.name], policy)]) for t in singles]
    blobs += [blob_of(t.name, [_copy(t)]) for t in plain]
    blobs.sort(key=lambda b: b.name)
    for group in sorted(plain_stacks):
        blobs += stack_blobs(group, _plain_stack(group, plain_stacks[group]))
    for group in sorted(fp8_stacks):
        blobs += stack_blobs(group, _fp8_stack(group, fp8_stacks[group], scales, policy))
    return blobs


def _fp8_scale(tensor: SourceTensor, tensors: Mapping[str, SourceTensor]) -> SourceTensor | None:
    if tensor.dtype not in FP8_E4M3_DTYPES:
        return None
    for ending in FP8_SCALES:
        if tensor.name + ending in tensors:
            return tensors[tensor.name + ending]
    raise BadSource(
        f"FP8 tensor {tensor.name!r} has no scale ({' or '.join(FP8_SCALES)})",
        kind="missing_fp8_scale",
    )


def check_block_scale(weight: SourceTensor, scale: SourceTensor) -> None:
    """Raise BadSource unless the scale has one element per 128x128 block of the weight."""
    if len(weight.shape) < 2:
        raise BadSource(f"FP8 tensor {weight.name!r} is not a matrix", kind="bad_block_scale_shape")
    *leading, rows, columns = weight.shape
    expected = (*leading, -(-rows // FP8_BLOCK[0]), -(-columns // FP8_BLOCK[1]))
    if scale.shape != expected:
        raise BadSource(
            f"{scale.name!r} has shape {list(scale.shape)}; {list(expected)} is needed for "
            f"{weight.name!r} of shape {list(weight.shape)}",
            kind="bad_block_scale_shape",
        )


def _decoded(weight: SourceTensor, scale: SourceTensor, policy: Policy) -> TensorSpec:
    check_block_scale(weight, scale)
    decision = decide(policy, weight.name, weight.shape, MXFP8)
    return TensorSpec(
        weight.name, (weight.name, scale.name), DECODE_FP8, "BF16", weight.shape,
        decision.format, decision.rule, f"FP8 decoded; {decision.reason}",
    )  # fmt: skip


def _plain_stack(
    group: str, projections: Mapping[str, Mapping[int, SourceTensor]]
) -> list[TensorSpec]:
    return [
        TensorSpec(stack.name, names, STACK, stack.dtype, stack.shape, None, *_PASSED)
        for stack, names in stacked(group, projections)
    ]


def _fp8_stack(
    group: str,
    projections: Mapping[str, Mapping[int, SourceTensor]],
    scales: Mapping[str, SourceTensor],
    policy: Policy,
) -> list[TensorSpec]:
    specs = []
    for stack, names in stacked(group, projections, partial(_equal_fp8_members, scales)):
        decision = decide(policy, stack.name, stack.shape, MXFP8)
        sources = (*names, *(scales[name].name for name in names))
        specs.append(
            TensorSpec(
                stack.name, sources, DECODE_STACK_FP8, "BF16", stack.shape,
                decision.format, decision.rule, f"FP8 decoded; {decision.reason}",
            )
        )  # fmt: skip
    return specs


def _equal_fp8_members(
    scales: Mapping[str, SourceTensor],
    group: str,
    projection: str,
    members: Mapping[int, SourceTensor],
    count: int,
) -> Sequence[SourceTensor]:
    try:
        ordered = ordered_members(group, projection, members, count)
    except BadSource as error:
        if error.kind != "mismatched_expert_layout":
            raise
        raise BadSource(error.message, kind="mismatched_fp8_weight_layout") from None
    layouts = {(scales[m.name].dtype, scales[m.name].shape) for m in ordered}
    if len(layouts) > 1:
        raise BadSource(
            f"{group}: the FP8 scales of {projection} differ between experts",
            kind="mismatched_fp8_scale_layout",
        )
    check_block_scale(ordered[0], scales[ordered[0].name])
    return ordered
