"""What the report page tells of models: sizes, formats, errors, decisions, evaluations. Plain data.

Decisions are those of the plan, made again from what the model was made from (origins.py).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantmill.errors import QuantmillError
from quantmill.facts import ModelFacts, show
from quantmill.names import ModelName
from quantmill.openweights import OpenWeights, SourceWeights, StoredWeights, open_weights
from quantmill.origins import Origin, origin_of
from quantmill.plans import CODES
from quantmill.store import Store
from quantmill.weighterrors import Compared, WeightError, WeightErrors, weight_errors

WHOLE = "(itself)"
"""The kind of a tensor whose name ends with the number of its layer."""

_LONGEST_INDEX = 9
_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands: `series` of layers ("" for none), number of the layer, kind in it."""

    series: str
    layer: int | None
    part: str

    @property
    def kind(self) -> str:
        """What tensors of all layers have in common: their name with a star for the number."""
        return self.part if self.layer is None else f"{self.series}.*.{self.part}"


def place_of(name: str) -> Place:
    """The place that a name says: its first number is the layer's, further ones become stars."""
    parts = name.removesuffix(_WEIGHT).split(".")
    for at, part in enumerate(parts):
        if at and _is_index(part):
            rest = ("*" if _is_index(other) else other for other in parts[at + 1 :])
            return Place(".".join(parts[:at]), int(part), ".".join(rest) or WHOLE)
    return Place("", None, ".".join(parts))


def _is_index(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _LONGEST_INDEX


@dataclass(frozen=True, slots=True)
class ReportTensor:
    """A weight. `rule` and `reason` are None where no plan tells them, `error` without reference.

    `label` names the format, or the dtype of what is not quantized. `shape` counts numbers.
    """

    name: str
    place: Place
    label: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    rule: str | None
    reason: str | None
    error: WeightError | None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored for each weight, scales and biases included; 0 for no weights."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0


@dataclass(frozen=True, slots=True)
class KindTotal:
    """All tensors of one kind, over the layers. `relative` is their relative squared error."""

    kind: str
    tensors: int
    weights: int
    nbytes: int
    relative: float | None


@dataclass(frozen=True, slots=True)
class ReportModel:
    """One model of a report. `unmeasured` says why there are no errors, None where there are."""

    facts: ModelFacts
    tensors: tuple[ReportTensor, ...]
    origin: Origin
    reference: str | None
    unmeasured: str | None
    only_reference: tuple[str, ...]
    relative: float | None
    evaluation: Mapping[str, Any] | None

    @property
    def kinds(self) -> tuple[KindTotal, ...]:
        """Tensors by kind, most bytes first."""
        found: dict[str, list[ReportTensor]] = defaultdict(list)
        for tensor in self.tensors:
            found[tensor.place.kind].append(tensor)
        totals = [_total(kind, tensors) for kind, tensors in found.items()]
        return tuple(sorted(totals, key=lambda total: (-total.nbytes, total.kind)))


def _total(kind: str, tensors: Sequence[ReportTensor]) -> KindTotal:
    errors = [tensor.error for tensor in tensors]
    weights, nbytes = sum(t.weights for t in tensors), sum(t.nbytes for t in tensors)
    return KindTotal(kind, len(tensors), weights, nbytes, together(errors))


def together(errors: Iterable[WeightError | None]) -> float | None:
    """The relative squared error of several weights as if they were one; None if one has none."""
    found = list(errors)
    known = [error for error in found if error is not None]
    if len(known) != len(found) or not known:
        return None
    if all(error.identical for error in known):
        return 0.0
    error, norm = sum(e.squared_error for e in known), sum(e.squared_norm for e in known)
    return error / norm if norm and math.isfinite(error) and math.isfinite(norm) else None


def describe_models(
    store: Store,
    names: Sequence[ModelName],
    *,
    against: str | Path | None = None,
    evaluations: Sequence[Mapping[str, Any]] = (),
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[ReportModel, ...]:
    """Everything the page shows of these models, in their order.

    Errors are those against `against`, a stored model or a source; without it against what each
    model was made from, where that is known and on this machine. `evaluations` are documents of
    `eval`, which belong to the models they name, else to the models in their order. Raises what
    `show` and `open_weights` raise; a source that is gone is told in the result.
    """
    found = []
    assigned = _assigned(names, evaluations)
    for name, evaluation in zip(names, assigned, strict=True):
        with ExitStack() as stack:
            facts = show(store, name)
            model = stack.enter_context(StoredWeights(name, store))
            origin = origin_of(store, model.manifest)
            errors: WeightErrors | None = None
            reference, unmeasured = _reference(stack, store, against, origin)
            if reference is not None:
                try:
                    errors = weight_errors(model, reference, progress=progress)
                except QuantmillError as error:
                    if against is not None:
                        raise
                    unmeasured = f"the source cannot be read as numbers: {error.message}"
            found.append(_described(facts, model, origin, errors, unmeasured, evaluation))
    return tuple(found)


def _described(
    facts: ModelFacts,
    model: StoredWeights,
    origin: Origin,
    errors: WeightErrors | None,
    unmeasured: str | None,
    evaluation: Mapping[str, Any] | None,
) -> ReportModel:
    compared: Mapping[str, Compared] = {one.name: one for one in errors.compared} if errors else {}
    specs = origin.plan.tensors if origin.plan else ()
    reasons = {spec.name: (spec.rule, spec.reason) for spec in specs if spec.role == CODES}
    tensors = []
    for name, weight in sorted(model.facts.items(), key=lambda item: natural(item[0])):
        rule, reason = reasons.get(name, (None, None))
        error = compared[name].error if name in compared else None
        tensors.append(
            ReportTensor(
                name, place_of(name), weight.label, weight.dtype, weight.shape, weight.nbytes,
                rule, reason, error,
            )
        )  # fmt: skip
    return ReportModel(
        facts, tuple(tensors), origin,
        errors.reference if errors else None, unmeasured,
        errors.only_reference if errors else (), errors.relative if errors else None, evaluation,
    )  # fmt: skip


def natural(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Orders names with their numbers as numbers: layer 2 before layer 10."""
    return tuple((_is_index(p), int(p) if _is_index(p) else 0, p) for p in name.split("."))


def _reference(
    stack: ExitStack, store: Store, against: str | Path | None, origin: Origin
) -> tuple[OpenWeights | None, str | None]:
    """What errors are measured against, or why there is nothing."""
    if against is not None:
        return stack.enter_context(open_weights(against, store)), None
    if origin.recipe is None:
        return None, f"{origin.problem}; --against names a reference"
    try:
        return stack.enter_context(SourceWeights(origin.recipe, store)), None
    except QuantmillError as error:
        return None, f"the source cannot be read as numbers: {error.message}"


def _assigned(
    names: Sequence[ModelName], evaluations: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any] | None]:
    """The evaluation of each model: one that names it, else the next that names none of them."""
    shown = {name.display for name in names}
    named = {str(one.get("model")): one for one in evaluations}
    others = iter([one for one in evaluations if str(one.get("model")) not in shown])
    return [named.get(name.display) or next(others, None) for name in names]
