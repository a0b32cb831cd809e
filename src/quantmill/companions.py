"""Names of tensors: which is a weight, which is the scale, bias or global scale of one.

Producers spell the companions of a weight `<n>` in many ways. One table, `_RULES`, turns every
spelling into one canonical form: `<n>`, `<n>_scale`, `<n>_qbias`, `<n>.global_scale`. Nothing but
names is looked at here, and their order never matters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from quantmill.experts import parse_expert

LEGACY_KEY = "data"
"""The only key of the oldest blobs; the layer's name says what the blob holds."""

_WEIGHT = ".weight"


class Role(Enum):
    """What a tensor is to its weight; the value names it in messages."""

    CODES = "codes"
    SCALE = "scale"
    BIAS = "quantization bias"
    GLOBAL = "global scale"
    RECIPROCAL = "reciprocal global scale"


_CANONICAL = {
    Role.CODES: "",
    Role.SCALE: "_scale",
    Role.BIAS: "_qbias",
    Role.GLOBAL: ".global_scale",
    Role.RECIPROCAL: ".global_scale",
}


class _When(Enum):
    """When a name with a telling ending is a companion rather than a parameter of its own."""

    ALWAYS = 1
    BASE = 2  # its weight is there, or is called `.weight`, as no learned parameter's owner is
    SCALED = 3  # its weight has a scale


@dataclass(frozen=True, slots=True)
class _Rule:
    """A spelling: `ending` replaced by one of `bases` gives the weight's name."""

    ending: str
    role: Role
    when: _When
    bases: tuple[str, ...] = ("",)


_PLURAL = (_WEIGHT, "")  # mlx-lm's names replace `.weight`; stacked experts may lack it

# The first rule whose ending fits decides what a name is, so an ending stands before its own
# endings. Of two spellings of one companion the earlier in this table wins: dot-child singular
# (Ollama), canonical, plural (mlx-lm), then the names of other producers.
_RULES = (
    _Rule(".weight_packed", Role.CODES, _When.ALWAYS, (_WEIGHT,)),
    _Rule(".weight.global_scale", Role.GLOBAL, _When.BASE, (_WEIGHT,)),
    _Rule(".global_scale", Role.GLOBAL, _When.SCALED, ("", _WEIGHT)),
    _Rule(".weight_scale_2", Role.GLOBAL, _When.BASE, (_WEIGHT,)),
    _Rule(".weight_global_scale", Role.RECIPROCAL, _When.BASE, (_WEIGHT,)),
    _Rule(".scale", Role.SCALE, _When.BASE),
    _Rule("_scale", Role.SCALE, _When.BASE),
    _Rule(".scales", Role.SCALE, _When.ALWAYS, _PLURAL),
    _Rule(".bias", Role.BIAS, _When.SCALED),
    _Rule(".qbias", Role.BIAS, _When.BASE),
    _Rule("_qbias", Role.BIAS, _When.BASE),
    _Rule(".biases", Role.BIAS, _When.SCALED, _PLURAL),
)


@dataclass(frozen=True, slots=True)
class Canonical:
    """Canonical name → raw name, sorted; and the raw names that lost, each with its winner.

    A loser whose content differs from the winner's is a conflict that the caller must report.
    """

    names: Mapping[str, str]
    dropped: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor with its companions, by raw names.

    `name` is canonical: `<module>.weight`, or a stacked expert's name without `.weight`. `codes` is
    the tensor itself, packed or not. `global_scale` multiplies what the codes decode to, unless
    `reciprocal`: then it divides.
    """

    name: str
    codes: str
    scale: str | None = None
    bias: str | None = None
    global_scale: str | None = None
    reciprocal: bool = False

    @property
    def is_mlx_global(self) -> bool:
        """Whether the global scale is MLX's own number, 2688 times the factor.

        mlx-lm writes it as `<m>.global_scale` beside `<m>.scales`; Ollama's is `<n>.global_scale`.
        """
        module = self.name.removesuffix(_WEIGHT)
        beside = module != self.name and self.global_scale == f"{module}.global_scale"
        return beside and self.scale is not None and self.scale.endswith(".scales")

    @property
    def companions(self) -> tuple[str, ...]:
        """Raw names of scale, bias and global scale, as far as they are there."""
        return tuple(n for n in (self.scale, self.bias, self.global_scale) if n is not None)


@dataclass(frozen=True, slots=True)
class Orphan:
    """A companion that belongs to nothing: its raw name, its role, and the weight it asks for.

    `missing` is what is not there: the weight itself, or the weight's scale.
    """

    name: str
    role: Role
    weight: str
    missing: Role

    @property
    def problem(self) -> str:
        """One sentence naming both tensors."""
        lack = "no such tensor" if self.missing is Role.CODES else "that tensor has no scale"
        return f"tensor {self.name!r} is the {self.role.value} of {self.weight!r}, but {lack}"


@dataclass(frozen=True, slots=True)
class LayerParts:
    """The tensors of a layer: its weight with companions, and the raw name of its dense bias."""

    weight: Weight
    bias: str | None

    @property
    def is_quantized(self) -> bool:
        """Whether the weight has scales."""
        return self.weight.scale is not None


@dataclass(frozen=True, slots=True)
class _Claim:
    """What a raw name is to a weight, and how strong its spelling is (lower wins)."""

    raw: str
    weight: str
    role: Role | None
    rank: tuple[int, int] = (-1, 0)

    @property
    def canonical(self) -> str:
        return self.weight if self.role is None else self.weight + _CANONICAL[self.role]


def loaded_name(layer: str, key: str) -> str:
    """The raw name of the tensor `key` of a blob: the oldest blobs are named by their layer."""
    return layer if key == LEGACY_KEY and layer else key


def canonicalise(names: Iterable[str]) -> Canonical:
    """One canonical name for each tensor, whatever spelling its producer used.

    Singular wins over canonical, that over plural. A layer's own `.bias` and a learned `.scale`
    keep their names: they are companions only of a tensor that is there.
    """
    won, dropped = _contest(names)
    return Canonical({c: won[c].raw for c in sorted(won)}, dropped)


def gather(names: Iterable[str]) -> tuple[dict[str, Weight], tuple[Orphan, ...]]:
    """Weights by canonical name, sorted, and the companions that belong to none, in name order.

    Every tensor that is no companion is a weight, so nothing is left out but the spellings that
    lost (`canonicalise(names).dropped`).
    """
    won, _ = _contest(names)
    companions: dict[str, dict[Role, str]] = {}
    weights = {}
    for claim in won.values():
        if claim.role in {None, Role.CODES}:
            weights[claim.weight] = claim.raw
        else:
            assert claim.role is not None
            companions.setdefault(claim.weight, {})[claim.role] = claim.raw
    found, orphans = {}, []
    for name in sorted(weights):
        found[name] = _weight(name, weights[name], companions.get(name, {}))
    for name, parts in companions.items():
        missing = Role.CODES if name not in found else Role.SCALE
        if missing is Role.CODES or Role.SCALE not in parts:
            orphans += [Orphan(raw, role, name, missing) for role, raw in parts.items()]
    return found, tuple(sorted(orphans, key=lambda o: o.name))


def _weight(name: str, codes: str, parts: Mapping[Role, str]) -> Weight:
    if Role.SCALE not in parts:  # what else there is has no meaning without: gather reports it
        return Weight(name, codes)
    direct, reciprocal = parts.get(Role.GLOBAL), parts.get(Role.RECIPROCAL)
    return Weight(
        name,
        codes,
        parts[Role.SCALE],
        parts.get(Role.BIAS),
        direct or reciprocal,
        reciprocal is not None,
    )


def _contest(names: Iterable[str]) -> tuple[dict[str, _Claim], dict[str, str]]:
    """The claim that won each canonical name, and the losers (raw name → winner's raw name)."""
    raw = sorted(set(names))
    there = set(raw) | {_based(n, _RULES[0])[0] for n in raw if n.endswith(_RULES[0].ending)}
    scales = [_claim(n, there, ()) for n in raw]
    scaled = {c.weight for c in scales if c.role is Role.SCALE}
    won: dict[str, _Claim] = {}
    claims = sorted((_claim(n, there, scaled) for n in raw), key=lambda c: (c.rank, c.raw))
    dropped = {}
    for claim in claims:
        winner = won.setdefault(claim.canonical, claim)
        if winner is not claim:
            dropped[claim.raw] = winner.raw
    return won, dict(sorted(dropped.items()))


def _claim(name: str, there: Collection[str], scaled: Collection[str]) -> _Claim:
    """What `name` is, given the tensors that are there and the weights that have a scale."""
    for rank, rule in enumerate(_RULES):
        if name.endswith(rule.ending):
            bases = _based(name, rule)
            wanted = scaled if rule.when is _When.SCALED else there
            index = next((i for i, base in enumerate(bases) if base in wanted), None)
            if index is None and not _stands_alone(rule, bases[0]):
                break
            index = index or 0
            return _Claim(name, bases[index], rule.role, (rank, index))
    return _Claim(name, name, None)


def _stands_alone(rule: _Rule, base: str) -> bool:
    """Whether the name is a companion even though its weight is not there."""
    # `x.weight.scale` without `x.weight` can only be a companion; `router.scale` is a parameter
    return rule.when is _When.ALWAYS or (rule.when is _When.BASE and base.endswith(_WEIGHT))


def _based(name: str, rule: _Rule) -> list[str]:
    """The names that the weight may have, the likeliest first."""
    stem = name[: -len(rule.ending)]
    bases = rule.bases
    if bases == _PLURAL and stem.endswith(_WEIGHT):
        bases = (_WEIGHT,)  # `m.weight.scales` is no spelling of the scale of `m.weight`
    return [stem + base for base in bases]


# -- layers ----------------------------------------------------------------------------------------

_STACKS = ("switch_mlp", "experts")


def layer_parts(weights: Mapping[str, Weight], path: str) -> LayerParts | None:
    """The tensors of the linear or embedding layer at `path`, None when it has no weight.

    An embedding has no use for the dense bias.
    """
    weight = weights.get(path + _WEIGHT)
    if weight is None:
        return None
    bias = weights.get(f"{path}.bias")
    return LayerParts(weight, bias.codes if bias else None)


def expert_parts(weights: Mapping[str, Weight], block: str, projection: str) -> tuple[Weight, ...]:
    """The experts' weights for one projection of the block at `block` (`model.layers.0.mlp`).

    One weight where they are stacked, under any of the names that generations of importers gave
    the stack; else one for each expert in the order of their numbers; () where there are none.
    """
    for stack in _STACKS:
        for ending in (_WEIGHT, ""):
            found = weights.get(f"{block}.{stack}.{projection}{ending}")
            if found is not None:
                return (found,)
    return tuple(weight for _, weight in sorted(_single(weights, block, projection)))


def _single(weights: Mapping[str, Weight], block: str, projection: str) -> list[tuple[int, Weight]]:
    prefix = f"{block}.experts."
    experts = [(parse_expert(name), w) for name, w in weights.items() if name.startswith(prefix)]
    return [(e.index, w) for e, w in experts if e is not None and e.projection == projection]
