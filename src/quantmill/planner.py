"""From a source to its plan. No weight data is read here, and no clock, disk or environment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from quantmill.classify import FLOAT, PREQUANTIZED, Kind
from quantmill.coded import Coded, Recognised
from quantmill.errors import BadPlan, BadRequest
from quantmill.formats import FLOAT_DTYPES, MXFP8, Format, dtype_bytes, parse_format
from quantmill.ggufcodes import EXACT, scheme_of
from quantmill.plans import CAST, STACK, BlobSpec, Dropped, Options, Override, Plan, TensorSpec
from quantmill.policy import Decision, Policy, decide, decide_draft, is_aligned, select_policy
from quantmill.prequantized import Planned, decoded, kept, ordered_coded
from quantmill.schemes import recognise
from quantmill.source import Source, SourceTensor
from quantmill.stacks import (
    Projections,
    blob_of,
    expert_count,
    ordered_members,
    split_experts,
    stacked,
)

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
    decode: bool = False,
) -> Plan:
    """Decide what becomes of every tensor of `source`.

    `draft` applies the rules for draft models; `prefix` goes before every name written; `decode`
    makes numbers of weights that are quantized already, to be quantized as `kind` says. Raises
    BadPlan when two outputs would share a name or a rule cannot be applied, BadSource for weights
    whose parts do not belong together and for expert tensors that do not form a stack.
    """
    options = options or Options()
    policy = select_policy(source.config)
    recognised = recognise(source)
    chooser = _Chooser(kind, policy, options, draft, decode)
    found = _plan_blobs(recognised, kind, chooser)
    blobs = tuple(_prefixed(blob, prefix) for blob in found)
    _refuse_collisions(blobs)
    _refuse_unused(options.overrides, blobs)
    ignored = (Dropped(t.name, f"in {t.file} but not in the index") for t in source.ignored)
    dropped = sorted([*recognised.dropped, *ignored], key=lambda d: d.name)
    fmt = kind.format
    if kind.name == PREQUANTIZED and not decode:
        fmt = _shared_format(recognised)
    return Plan(
        version, str(source.fingerprint), kind.name, policy.name, fmt, options, blobs,
        tuple(dropped), source.files, source.nbytes,
    )  # fmt: skip


def _shared_format(recognised: Recognised) -> Format | None:
    """The one format that all quantized weights keep, None where they differ."""
    formats = {c.format.name if c.format else None for c in recognised.coded.values()}
    if len(formats) != 1 or None in formats:
        return None
    return next(iter(recognised.coded.values())).format


# -- blobs -----------------------------------------------------------------------------------------

_Item = SourceTensor | Coded


def _plan_blobs(recognised: Recognised, kind: Kind, chooser: _Chooser) -> list[BlobSpec]:
    """Single weights by name, then stacks of experts; FP8 stacks after the others, as Ollama."""
    items: list[_Item] = [*recognised.plain, *recognised.coded.values()]
    singles, stacks = split_experts(sorted(items, key=lambda item: item.name))
    blobs = [_single(item, chooser) for item in singles]
    plain: list[BlobSpec] = []
    coded: list[BlobSpec] = []
    for group in sorted(stacks):
        of_group, is_coded = _group_blobs(group, stacks[group], chooser)
        (coded if is_coded else plain).extend(of_group)
    blobs += plain + coded
    return sorted(blobs, key=lambda b: b.name) if kind.name == PREQUANTIZED else blobs


def _single(item: _Item, chooser: _Chooser) -> BlobSpec:
    if isinstance(item, SourceTensor):
        return blob_of(item.name, [chooser.plain(item, None)])
    planned = chooser.coded(item.name, [item], stack=False)
    return BlobSpec(item.name, planned.specs, planned.metadata)


def _group_blobs(
    group: str, projections: Projections[_Item], chooser: _Chooser
) -> tuple[list[BlobSpec], bool]:
    """One blob for the experts of a layer where its projections agree, else one for each."""
    count, is_coded = expert_count(projections), False
    planned: dict[str, Planned] = {}
    for projection in sorted(projections):
        members, name = projections[projection], f"{group}.{projection}.weight"
        coded = {i: m for i, m in members.items() if isinstance(m, Coded)}
        if len(coded) == len(members):
            is_coded = True
            ordered = ordered_coded(group, projection, coded, count)
            planned[name] = chooser.coded(name, ordered, stack=True)
        else:
            plain = ordered_members(group, projection, members, count)
            tensors = [m for m in plain if isinstance(m, SourceTensor)]
            spec = chooser.plain(*stacked(group, projection, tensors))
            metadata = spec.format.metadata() if spec.format else {}
            planned[name] = Planned((spec,), metadata)
    if len({tuple(sorted(p.metadata.items())) for p in planned.values()}) == 1:
        specs = tuple(spec for name in sorted(planned) for spec in planned[name].specs)
        return [BlobSpec(group, specs, next(iter(planned.values())).metadata)], is_coded
    return [BlobSpec(name, p.specs, p.metadata) for name, p in planned.items()], is_coded


# -- one weight ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Chooser:
    """What decides about a weight."""

    kind: Kind
    policy: Policy
    options: Options
    draft: bool
    decode: bool

    def plain(self, tensor: SourceTensor, stacked_names: tuple[str, ...] | None) -> TensorSpec:
        """The spec of a tensor of plain numbers, and the names stacked into it."""
        if stacked_names:
            dtype_bytes(tensor.dtype)
        asked = self.kind.name == FLOAT or self.decode
        decision = self._decide(tensor, self.kind.format if asked else None)
        if decision.rule == "not_asked" and not asked:
            decision = Decision(None, "passed_through", "not part of a quantized weight")
        if tensor.blocks:
            decision = _of_decoded(tensor, decision)
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
            global_scale=self._wants_global(fmt),
            scheme=scheme_of(tensor),
        )

    def coded(self, name: str, members: Sequence[Coded], *, stack: bool) -> Planned:
        """What becomes of a weight that is quantized already, or of the experts of a stack."""
        first = members[0]
        shape = (len(members), *first.shape) if stack else first.shape
        decision = self._coded_decision(SourceTensor(name, first.decoded, shape), first)
        if decision is None:
            return kept(name, members, stack=stack)
        planned = decoded(name, members, decision, stack=stack)
        if not self._wants_global(decision.format):
            return planned
        return replace(planned, specs=tuple(replace(s, global_scale=True) for s in planned.specs))

    def _coded_decision(self, tensor: SourceTensor, first: Coded) -> Decision | None:
        """How to quantize the decoded numbers; None where the codes are kept."""
        if self.decode:
            found = self._decide(tensor, self.kind.format)
            if found.rule == "not_asked":
                return Decision(None, "decoded", "kept as numbers")
            return found
        override = _fitting(tensor.name, self.options.overrides)
        if first.format is not None:
            if override and override.format and override.pattern == tensor.name:
                raise BadPlan(
                    f"cannot requantize tensor {tensor.name!r}: it is already quantized "
                    f"({first.scheme})",
                    kind="requantize_prequantized",
                    hint="--requantize decodes first, at a cost",
                )
            return None
        if override is not None:
            return _overridden(tensor, override)
        if first.is_fp8:
            return self._by_policy(tensor, MXFP8)
        return Decision(None, "decoded", "no format holds it as it is; --requantize makes it small")

    def _wants_global(self, fmt: Format | None) -> bool:
        return self.options.global_scale and fmt is not None and fmt.mode == "nvfp4"

    def _by_policy(self, tensor: SourceTensor, base: Format) -> Decision:
        by_policy = decide_draft if self.draft else decide
        return by_policy(self.policy, tensor.name, tensor.shape, base)

    def _decide(self, tensor: SourceTensor, base: Format | None) -> Decision:
        override = _fitting(tensor.name, self.options.overrides)
        if override is not None:
            return _overridden(tensor, override)
        if base is None:
            return Decision(None, "not_asked", "no format asked for")
        decision = self._by_policy(tensor, base)
        if decision.format is not None and tensor.dtype not in _WEIGHT_DTYPES:
            return Decision(None, "not_float", f"{tensor.dtype} values are not weights")
        return decision


def _fitting(name: str, overrides: Sequence[Override]) -> Override | None:
    """The last rule given that fits wins."""
    return next((o for o in reversed(overrides) if fnmatchcase(name, o.pattern)), None)


def _of_decoded(tensor: SourceTensor, decision: Decision) -> Decision:
    """The decision about a tensor of a GGUF file that is decoded while it is read."""
    why = decision.reason
    if decision.rule in {"not_asked", "passed_through"}:
        why = "kept as numbers" if tensor.blocks in EXACT else "no format holds its codes"
    return replace(decision, reason=f"{scheme_of(tensor)} decoded; {why}")


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
