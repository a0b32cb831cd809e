"""From a source to its plan. No weight data is read here, and no clock, disk or environment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from quantmill.classify import BLOCK_FP8, PREQUANTIZED, Kind
from quantmill.errors import BadPlan, BadRequest
from quantmill.formats import FLOAT_DTYPES, Format, dtype_bytes, parse_format
from quantmill.packings import plan_block_fp8, plan_prequantized
from quantmill.plans import CAST, STACK, BlobSpec, Dropped, Options, Override, Plan, TensorSpec
from quantmill.policy import (
    Decision,
    Policy,
    component_policy,
    decide,
    decide_draft,
    is_aligned,
    select_policy,
)
from quantmill.source import COMPONENT, DRAFT, Part, Source, SourceTensor
from quantmill.stacks import blob_of, split_experts, stack_blobs, stacked

KEEP = "keep"

_WEIGHT_DTYPES = FLOAT_DTYPES | {"F64"}


def parse_override(text: str) -> Override:
    """A rule from `PATTERN=FORMAT`.

    PATTERN is a shell pattern over whole tensor names; FORMAT is `keep` or a format name, with
    `:GROUP` after it where the group size is not the usual one. Raises BadRequest.
    """
    pattern, found, name = text.rpartition("=")
    if not found or not pattern or not name:
        raise BadRequest(
            f"{text!r} is not PATTERN=FORMAT", hint="for example --tensor '*.v_proj.weight=int8'"
        )
    if name.strip().lower() == KEEP:
        return Override(pattern, None)
    name, colon, group = name.partition(":")
    if colon and not group.isdecimal():
        raise BadRequest(f"{group!r} is not a group size, in {text!r}")
    return Override(pattern, parse_format(name, int(group) if colon else None))


def make_plan(
    source: Source,
    kind: Kind,
    options: Options | None = None,
    *,
    version: str,
    draft: bool = False,
    prefix: str = "",
) -> Plan:
    """Decide what becomes of every tensor of `source`.

    `draft` applies the rules for draft models; `prefix` goes before every name written. Raises
    BadPlan when two outputs would share a name or a rule cannot be applied, BadSource for expert
    tensors that do not form a stack, BadRequest for a rule that fits no tensor.
    """
    found = plan_source(source, kind, options, version=version, draft=draft, prefix=prefix)
    _refuse_unused(found.options.overrides, found.blobs)
    return found


def plan_source(
    source: Source,
    kind: Kind,
    options: Options | None = None,
    *,
    version: str,
    draft: bool = False,
    prefix: str = "",
    policy: Policy | None = None,
) -> Plan:
    """Like `make_plan`, for a part of a model: rules may fit tensors of other parts only.

    `policy` replaces the one that the config selects.
    """
    options = options or Options()
    policy = policy or select_policy(source.config)
    unused: tuple[Dropped, ...] = ()
    if kind.name == PREQUANTIZED:
        found, unused = plan_prequantized(source)
    elif kind.name == BLOCK_FP8:
        found = plan_block_fp8(source, policy)
    else:
        found = _plan_float(source, kind.format, policy, options, draft, prefix)
    blobs = tuple(_prefixed(blob, prefix) for blob in found)
    _refuse_collisions(blobs)
    ignored = (Dropped(t.name, f"in {t.file} but not in the index") for t in source.ignored)
    dropped = sorted([*unused, *ignored], key=lambda d: d.name)
    return Plan(
        version, str(source.fingerprint), kind.name, policy.name, kind.format, options, blobs,
        tuple(dropped), source.files, source.nbytes,
    )  # fmt: skip


def plan_part(part: Part, kind: Kind, options: Options | None = None, *, version: str) -> Plan:
    """The plan of one part of a model: outputs have its prefix, sources its folder before them."""
    policy = component_policy(part.name, part.source.config) if part.role == COMPONENT else None
    draft = part.role == DRAFT
    found = plan_source(
        part.source, kind, options, version=version, draft=draft, prefix=part.prefix, policy=policy
    )
    blobs = [
        replace(b, tensors=tuple(_sourced(t, part.folder) for t in b.tensors)) for b in found.blobs
    ]
    dropped = [replace(d, name=part.folder + d.name) for d in found.dropped]
    return replace(found, blobs=tuple(blobs), dropped=tuple(dropped))


def _sourced(spec: TensorSpec, folder: str) -> TensorSpec:
    return replace(spec, sources=tuple(folder + name for name in spec.sources))


def merge_plans(source: Source, plans: Sequence[Plan]) -> Plan:
    """One plan of those that `plan_part` made for the parts of `source`, in the same order.

    Its format is what all parts but a draft have, a draft alone aside. Raises BadPlan and
    BadRequest as `make_plan` does.
    """
    first = plans[0]
    blobs = tuple(blob for one in plans for blob in one.blobs)
    _refuse_collisions(blobs)
    _refuse_unused(first.options.overrides, blobs)
    main = [p for part, p in zip(source.parts, plans, strict=True) if part.role != DRAFT]
    formats = {p.format for p in main or plans} - {None}
    dropped = sorted((d for p in plans for d in p.dropped), key=lambda d: d.name)
    return Plan(
        first.version, str(source.fingerprint), _shared(p.kind for p in plans),
        _shared(p.policy for p in plans), formats.pop() if len(formats) == 1 else None,
        first.options, blobs, tuple(dropped), source.files, source.nbytes,
    )  # fmt: skip


def _shared(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words))


# -- float sources ---------------------------------------------------------------------------------


def _plan_float(
    source: Source, base: Format | None, policy: Policy, options: Options, draft: bool, prefix: str
) -> list[BlobSpec]:
    chooser = _chooser(base, policy, options, draft, prefix)
    plain, stacks = split_experts(source.tensors.values())
    blobs = [blob_of(tensor.name, [chooser(tensor, None)]) for tensor in plain]
    for group in sorted(stacks):
        blobs += stack_blobs(group, [chooser(*s) for s in stacked(group, stacks[group])])
    return blobs


def _chooser(
    base: Format | None, policy: Policy, options: Options, draft: bool, prefix: str
) -> Callable[[SourceTensor, tuple[str, ...] | None], TensorSpec]:
    """A function from a tensor (and the names stacked into it) to its spec."""
    by_policy = decide_draft if draft else decide

    def choose(tensor: SourceTensor, stacked_names: tuple[str, ...] | None) -> TensorSpec:
        if stacked_names:
            dtype_bytes(tensor.dtype)
        written = replace(tensor, name=prefix + tensor.name)  # as the user's rules see it
        decision = _decide(written, base, options.overrides, lambda b: by_policy(
            policy, tensor.name, tensor.shape, b
        ))  # fmt: skip
        fmt = decision.format
        # anything that is not a plain float is cast before it is quantized (docs/formats.md)
        cast = fmt is not None and tensor.dtype not in FLOAT_DTYPES
        if cast and stacked_names:
            raise BadPlan(f"{tensor.name!r}: experts of dtype {tensor.dtype} cannot be quantized")
        return TensorSpec(
            name=tensor.name,
            sources=stacked_names or (tensor.name,),
            transform=STACK if stacked_names else CAST if cast else None,
            dtype="BF16" if cast else tensor.dtype,
            shape=tensor.shape,
            format=fmt,
            rule=decision.rule,
            reason=decision.reason,
            global_scale=options.global_scale and fmt is not None and fmt.mode == "nvfp4",
        )

    return choose


def _decide(
    tensor: SourceTensor,
    base: Format | None,
    overrides: Sequence[Override],
    by_policy: Callable[[Format], Decision],
) -> Decision:
    for override in reversed(overrides):  # the last rule given wins
        if fnmatchcase(tensor.name, override.pattern):
            return _overridden(tensor, override)
    if base is None:
        return Decision(None, "not_asked", "no format asked for")
    decision = by_policy(base)
    if decision.format is not None and tensor.dtype not in _WEIGHT_DTYPES:
        return Decision(None, "not_float", f"{tensor.dtype} values are not weights")
    return decision


def _overridden(tensor: SourceTensor, override: Override) -> Decision:
    fmt, asked = override.format, f"--tensor {override.pattern}"
    if fmt is None:
        return Decision(None, "override", f"kept by {asked}")
    problem = _misfit(tensor, fmt)
    if problem is None:
        return Decision(fmt, "override", f"{fmt.label} by {asked}")
    if override.pattern == tensor.name:  # named outright: the user means it
        raise BadPlan(f"tensor {tensor.name!r} cannot be {fmt.label}: {problem}")
    return Decision(None, "override_misfit", f"{asked} does not fit: {problem}")


def _misfit(tensor: SourceTensor, fmt: Format) -> str | None:
    if tensor.dtype not in _WEIGHT_DTYPES:
        return f"its dtype is {tensor.dtype}"
    if len(tensor.shape) < 2:
        return f"it has {len(tensor.shape)} dimensions"
    if not tensor.elements:
        return "it is empty"
    if not is_aligned(tensor.shape, fmt):
        return f"last dim {tensor.shape[-1]} is not a multiple of {fmt.group_size}"
    return None


# -- checks ----------------------------------------------------------------------------------------


def _prefixed(blob: BlobSpec, prefix: str) -> BlobSpec:
    if not prefix:
        return blob
    tensors = tuple(replace(t, name=prefix + t.name) for t in blob.tensors)
    return replace(blob, name=prefix + blob.name, tensors=tensors)


def _refuse_collisions(blobs: Iterable[BlobSpec]) -> None:
    for what, names in (
        ("blobs", [b.name for b in blobs]),
        ("tensors", [part[0] for b in blobs for t in b.tensors for part in t.stored]),
    ):
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        if twice:
            raise BadPlan(f"two {what} would be called {twice[0]!r}", kind="output_name_collision")


def _refuse_unused(overrides: Iterable[Override], blobs: Iterable[BlobSpec]) -> None:
    names = [t.name for b in blobs for t in b.tensors]
    for override in overrides:
        if not any(fnmatchcase(name, override.pattern) for name in names):
            raise BadRequest(
                f"--tensor {override.pattern!r} fits no tensor",
                kind="unused_override",
                hint=_closest(override.pattern, names),
            )


def _closest(pattern: str, names: Sequence[str]) -> str | None:
    """A hint: the pattern with wildcards where it is part of a name, else a name much like it."""
    from difflib import get_close_matches

    if any(pattern in name for name in names):
        return f"a pattern stands for the whole name: try '*{pattern}*'"
    close = get_close_matches(pattern, names, n=1)
    return f"did you mean {close[0]!r}?" if close else None
