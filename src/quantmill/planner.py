"""From a source to its plan. No weight data is read here, and no clock, disk or environment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from quantmill.adapters import FOLDER, Adapter, read_adapter
from quantmill.classify import FLOAT, PREQUANTIZED, Kind
from quantmill.coded import Coded, Recognised
from quantmill.errors import BadPlan, BadRequest
from quantmill.formats import FLOAT_DTYPES, MXFP8, Format, dtype_bytes, parse_format
from quantmill.ggufcodes import EXACT, scheme_of
from quantmill.plans import (
    CAST,
    STACK,
    BlobSpec,
    Dropped,
    LowRank,
    Options,
    Override,
    Plan,
    TensorSpec,
)
from quantmill.policy import (
    Decision,
    Policy,
    component_policy,
    decide,
    decide_draft,
    is_aligned,
    select_policy,
)
from quantmill.prequantized import Planned, decoded, kept, ordered_coded
from quantmill.rules import Rules
from quantmill.schemes import recognise
from quantmill.source import COMPONENT, DRAFT, Part, Source, SourceTensor
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
    whose parts do not belong together and for expert tensors that do not form a stack, BadRequest
    for a rule that fits no tensor.
    """
    options = options or Options()
    policy = select_policy(source.config)
    rules = Rules(options.overrides)
    found = _plan(source, version, _Chooser(kind, policy, options, rules, draft, decode, prefix))
    rules.refuse_unused([t.name for t in found.tensors])
    return found


def _plan(source: Source, version: str, chooser: _Chooser, adapter: Part | None = None) -> Plan:
    """The plan for a whole model or a part of one: rules may fit tensors of other parts only."""
    kind, options = chooser.kind, chooser.options
    recognised = recognise(source)
    if adapter is not None:
        items: list[_Item] = [*recognised.plain, *recognised.coded.values()]
        shapes = {item.name: item.shape for item in items}
        with_it = read_adapter(adapter.source, adapter.source.config, shapes)
        chooser = replace(chooser, adapter=with_it)
    blobs = tuple(_prefixed(b, chooser.prefix) for b in _plan_blobs(recognised, kind, chooser))
    _refuse_collisions(blobs)
    ignored = (Dropped(t.name, f"in {t.file} but not in the index") for t in source.ignored)
    dropped = sorted([*recognised.dropped, *ignored], key=lambda d: d.name)
    fmt = kind.format
    if kind.name == PREQUANTIZED and not chooser.decode:
        fmt = _shared_format(recognised)
    return Plan(
        version, str(source.fingerprint), kind.name, chooser.policy.name, fmt, options, blobs,
        tuple(dropped), source.files, source.nbytes,
    )  # fmt: skip


def plan_part(
    part: Part,
    kind: Kind,
    options: Options | None = None,
    *,
    version: str,
    decode: bool = False,
    adapter: Part | None = None,
) -> Plan:
    """The plan of one part of a model: outputs have its prefix, sources its folder before them.

    What an `adapter` changes is added to the weights before they are quantized.
    """
    own = part.source
    policy = (
        component_policy(part.name, own.config)
        if part.role == COMPONENT
        else select_policy(own.config)
    )
    is_draft = part.role == DRAFT
    options = options or Options()
    rules = Rules(options.overrides)
    chooser = _Chooser(kind, policy, options, rules, is_draft, decode, part.prefix)
    found = _plan(own, version, chooser, adapter)
    blobs = [
        replace(b, tensors=tuple(_sourced(t, part.folder) for t in b.tensors)) for b in found.blobs
    ]
    dropped = [replace(d, name=part.folder + d.name) for d in found.dropped]
    return replace(found, blobs=tuple(blobs), dropped=tuple(dropped))


def _sourced(spec: TensorSpec, folder: str) -> TensorSpec:
    if not folder:
        return spec
    return replace(spec, sources=tuple(folder + name for name in spec.sources))


def merge_plans(source: Source, parts: Sequence[Part], plans: Sequence[Plan]) -> Plan:
    """One plan of those that `plan_part` made for `parts` of `source`, in the same order.

    Its format is what all parts but a draft have, a draft alone aside. Raises BadPlan and
    BadRequest as `make_plan` does.
    """
    first = plans[0]
    blobs = tuple(blob for one in plans for blob in one.blobs)
    _refuse_collisions(blobs)
    names = [t.name for blob in blobs for t in blob.tensors]
    Rules(first.options.overrides).refuse_unused(names)
    main = [p for part, p in zip(parts, plans, strict=True) if part.role != DRAFT]
    formats = {p.format for p in main or plans} - {None}
    dropped = sorted((d for p in plans for d in p.dropped), key=lambda d: d.name)
    return Plan(
        first.version, str(source.fingerprint), _shared(p.kind for p in plans),
        _shared(p.policy for p in plans), formats.pop() if len(formats) == 1 else None,
        first.options, blobs, tuple(dropped), source.files, source.nbytes,
    )  # fmt: skip


def _shared(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words))


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
    """What decides about a weight. Users' rules see names as they are written, `prefix` first."""

    kind: Kind
    policy: Policy
    options: Options
    rules: Rules
    draft: bool
    decode: bool
    prefix: str
    adapter: Adapter | None = None

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
        sources = stacked_names or (tensor.name,)
        added, sources = self._changes(tensor, sources)
        # anything that is not a plain float is cast before it is quantized (docs/formats.md)
        cast = fmt is not None and tensor.dtype not in FLOAT_DTYPES
        if cast and stacked_names:
            raise BadPlan(f"{tensor.name!r}: experts of dtype {tensor.dtype} cannot be quantized")
        return TensorSpec(
            name=tensor.name,
            sources=sources,
            transform=STACK if stacked_names else CAST if cast else None,
            dtype="BF16" if cast else tensor.dtype,
            shape=tensor.shape,
            format=fmt,
            rule=decision.rule,
            reason=decision.reason,
            global_scale=self._wants_global(fmt),
            scheme=scheme_of(tensor),
            added=added,
        )

    def _changes(
        self, tensor: SourceTensor, names: tuple[str, ...]
    ) -> tuple[tuple[LowRank | None, ...], tuple[str, ...]]:
        """What the adapter adds to these members, and their sources: its own where it has them."""
        if self.adapter is None:
            return (), names
        added = tuple(self.adapter.added.get(name) for name in names)
        if any(added) and tensor.dtype not in FLOAT_DTYPES:
            raise BadPlan(f"an adapter cannot be added to {tensor.name!r} of {tensor.dtype}")
        replaced = self.adapter.replaced
        for name in names:
            if name in replaced and replaced[name].dtype != tensor.dtype:
                raise BadPlan(
                    f"the adapter's {replaced[name].name!r} is {replaced[name].dtype}, the model's "
                    f"{name!r} is {tensor.dtype}",
                    kind="adapter_does_not_fit",
                )
        own = tuple(FOLDER + replaced[n].name if n in replaced else n for n in names)
        return added if any(added) else (), own

    def coded(self, name: str, members: Sequence[Coded], *, stack: bool) -> Planned:
        """What becomes of a weight that is quantized already, or of the experts of a stack."""
        first = members[0]
        shape = (len(members), *first.shape) if stack else first.shape
        tensor = SourceTensor(name, first.decoded, shape)
        decision = self._coded_decision(tensor, first)
        added, own = self._changes(tensor, tuple(member.name for member in members))
        if own != tuple(m.name for m in members) or (added and decision is None):
            raise BadPlan(
                f"the adapter changes {name!r}, which is quantized already ({first.scheme})",
                kind="requantize_prequantized",
                hint="--requantize decodes first; an adapter is best merged into float weights",
            )
        if decision is None:
            rule = self.rules.fitting(self.prefix + name)
            unmet = f"; --tensor {rule.pattern} needs --requantize" if rule and rule.format else ""
            return kept(name, members, stack=stack, note=unmet)
        planned = decoded(name, members, decision, stack=stack, added=added)
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
        override = self.rules.fitting(self.prefix + tensor.name)
        if first.format is not None:
            if override and override.format and override.pattern == self.prefix + tensor.name:
                raise BadPlan(
                    f"cannot requantize tensor {tensor.name!r}: it is already quantized "
                    f"({first.scheme})",
                    kind="requantize_prequantized",
                    hint="--requantize decodes first, at a cost",
                )
            return None
        if override is not None:
            return _overridden(tensor, override, self.prefix)
        if first.is_fp8:
            return self._by_policy(tensor, MXFP8)
        return Decision(None, "decoded", "no format holds it as it is; --requantize makes it small")

    def _wants_global(self, fmt: Format | None) -> bool:
        return self.options.global_scale and fmt is not None and fmt.mode == "nvfp4"

    def _by_policy(self, tensor: SourceTensor, base: Format) -> Decision:
        by_policy = decide_draft if self.draft else decide
        return by_policy(self.policy, tensor.name, tensor.shape, base)

    def _decide(self, tensor: SourceTensor, base: Format | None) -> Decision:
        override = self.rules.fitting(self.prefix + tensor.name)
        if override is not None:
            return _overridden(tensor, override, self.prefix)
        if base is None:
            return Decision(None, "not_asked", "no format asked for")
        decision = self._by_policy(tensor, base)
        if decision.format is not None and tensor.dtype not in _WEIGHT_DTYPES:
            return Decision(None, "not_float", f"{tensor.dtype} values are not weights")
        return decision


def _of_decoded(tensor: SourceTensor, decision: Decision) -> Decision:
    """The decision about a tensor of a GGUF file that is decoded while it is read."""
    why = decision.reason
    if decision.rule in {"not_asked", "passed_through"}:
        why = "kept as numbers" if tensor.blocks in EXACT else "no format holds its codes"
    return replace(decision, reason=f"{scheme_of(tensor)} decoded; {why}")


def _overridden(tensor: SourceTensor, override: Override, prefix: str) -> Decision:
    fmt, asked = override.format, f"--tensor {override.pattern}"
    if override.why:
        return Decision(fmt, "auto", override.why)
    if fmt is None:
        return Decision(None, "override", f"kept by {asked}")
    problem = _misfit(tensor, fmt)
    if problem is None:
        return Decision(fmt, "override", f"{fmt.label} by {asked}")
    if override.pattern == prefix + tensor.name:  # named outright: the user means it
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
