"""Formats for a size: `auto` resolved into a recipe that says a format for every tensor.

Measured once, written down: what comes out is a recipe that could have been typed, so that plans,
repairs and interrupted runs need no measurement. docs/fidelity.md has the formulas.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmill.allocation import Allocation, Item, Option, allocate, uniform
from quantmill.errors import BadPlan, BadRequest
from quantmill.formats import FLOAT_DTYPES, Format, parse_format
from quantmill.plans import (
    AWARE,
    CAST,
    IMATRIX,
    SEARCH,
    Automatic,
    Calibration,
    Options,
    Override,
    Plan,
    TensorSpec,
)
from quantmill.policy import may_quantize, select_policy
from quantmill.readers import Reader, reader
from quantmill.recipes import DECODED, Recipe, Request, Target
from quantmill.rules import exactly
from quantmill.source import MODEL, OpenSource, Source

if TYPE_CHECKING:
    from quantmill.activations import Passes
    from quantmill.model import Model
    from quantmill.sensitivity import Measuring, Sensitivity, Subject
    from quantmill.windows import Tokens

WINDOWS, LENGTH = 4, 128
"""Tokens that divergences are measured on: windows of calibration text, and their length."""

Report = Callable[[int, int, str], None]
"""Told of steps done, steps in all, and what is being done."""

Planner = Callable[[Source, Request, Options | None], Plan]

_BASE, _BASE_GROUP = "int8", 32
"""The format by which the policy is asked for tensors that it quantizes."""


def resolved(
    recipe: Recipe,
    checkpoint: OpenSource,
    models: Callable[[], Model],
    plan_for: Planner,
    passes: Passes,
    report: Report | None = None,
) -> Recipe:
    """The recipe with the format that `auto` chose for every tensor, as rules, and what it found.

    `models` opens the unquantized model, whose `passes` they are; `plan_for` plans. Every tensor
    that may be quantized is measured (sensitivity.py), formats are allocated within the target
    (allocation.py), the result and the best uniform format are measured whole, and the one of less
    divergence is taken. Rules of the user go before those found.

    Raises BadRequest for a target that cannot be met and for a draft model, BadPlan for models
    without a forward pass.
    """
    target = recipe.request.target
    assert target is not None
    if recipe.draft is not None:
        raise BadRequest(
            "auto measures one model, and there is a draft model as well",
            hint="create the model first, then add --draft to the stored one",
        )
    chooser = _Chooser(recipe, target, reader(target.reader), checkpoint, plan_for)
    from quantmill.sensitivity import Measuring

    def told(what: str) -> Callable[[int, int], None]:
        return lambda done, total: report(done, total, what) if report else None

    with models() as model:
        windows = _windows(recipe.options, model)
        moments = _moments(recipe.options, model, windows, passes, told("weighing columns, blocks"))
        subjects, rest = chooser.subjects(model)
        measuring = Measuring(model, windows, subjects, moments, method=recipe.options.method)
        found = measuring.sensitivities(progress=told("measuring tensors, blocks"))
        items = chooser.items(subjects, found)
        return _decided(chooser, items, rest, measuring, windows, told("comparing, blocks"))


def _decided(
    chooser: _Chooser,
    items: _Items,
    rest: Sequence[TensorSpec],
    measuring: Measuring,
    windows: Tokens,
    progress: Callable[[int, int], None],
) -> Recipe:
    """The assignment that measures best of the one allocated and the best uniform one."""
    from quantmill.windows import tokens_digest

    allocation, budget = chooser.allocated(items, rest)
    one = _best_uniform(items.items, budget)
    choices = [items.formats(allocation.choices)]
    if one is not None and items.formats(one[1]) != choices[0]:
        choices.append(items.formats(one[1]))
    measured = measuring.divergences(choices, progress=progress)
    best = measured.index(min(measured))  # of equal ones the first
    said = Automatic(
        reader=chooser.reader.name,
        target=chooser.target.text,
        predicted=items.cost(choices[best]),
        measured=measured[best],
        uniform="" if one is None else one[0].label,
        uniform_measured=None if one is None else measured[-1],
        tokens=tokens_digest(windows),
        exhausted=allocation.exhausted and best == 0,
    )
    return chooser.recipe_for(choices[best], items, rest, said)


def _best_uniform(items: Sequence[Item], budget: int) -> tuple[Format, Mapping[str, Option]] | None:
    """The uniform assignment within the budget of least predicted cost."""
    formats = sorted({o.format for item in items for o in item.options if o.format is not None})
    found = []
    for fmt in formats:
        one = uniform(items, fmt)
        if one is not None and sum(o.nbytes for o in one.values()) <= budget:
            found.append((sum(o.cost for o in one.values()), fmt, one))
    if not found:
        return None
    _, fmt, one = min(found, key=lambda entry: entry[:2])
    return fmt, one


# -- what is measured with -------------------------------------------------------------------------


def _windows(options: Options, model: Model) -> Tokens:
    """Of the text that is calibrated with, or of the one that is always there.

    Random tokens where the model has no tokenizer, or the text is short.
    """
    from quantmill.calibrating import windows_of
    from quantmill.forward import empty_model
    from quantmill.mlxlm import tokenizer_for
    from quantmill.plans import RANDOM
    from quantmill.windows import default_text, text_of, text_tokens

    own = options.calibration
    _, config = empty_model(model)
    try:
        text = text_of(Path(own)) if own else default_text(calibrating=True)
        return text_tokens(tokenizer_for(model, config), text.text, LENGTH, WINDOWS)
    except (BadPlan, BadRequest) as error:
        if error.kind not in {"no_tokenizer", "no_default_text", "text_too_short"}:
            raise
    return windows_of(Calibration(RANDOM, 1, 0, WINDOWS, LENGTH), model, None)


def _moments(
    options: Options,
    model: Model,
    windows: Tokens,
    passes: Passes,
    progress: Callable[[int, int], None],
) -> Mapping[str, Any]:
    """Second moments: with --method aware those that the method itself uses."""
    from quantmill.calibrating import windows_of
    from quantmill.calibration import calibration_for

    own = calibration_for(options)
    if own is not None and options.method == AWARE and own.kind != IMATRIX:
        windows = windows_of(own, model, options.calibration)
    return passes.second_moments(model, windows, progress=progress)


# -- what is chosen from ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Items:
    """What the allocation is given; tensors that share a format are one item."""

    items: tuple[Item, ...]
    members: Mapping[str, tuple[str, ...]]
    sensitivities: Mapping[str, Sensitivity]

    def formats(self, choices: Mapping[str, Option]) -> dict[str, Format | None]:
        """The format of each tensor."""
        return {
            member: option.format
            for name, option in choices.items()
            for member in self.members[name]
        }

    def cost(self, formats: Mapping[str, Format | None]) -> float:
        """The divergence predicted, the sum over tensors."""
        return sum(self.sensitivities[name].cost(fmt) for name, fmt in formats.items())


class _Chooser:
    """The tensors of a source that a format is chosen for, and the rules that come out."""

    def __init__(
        self,
        recipe: Recipe,
        target: Target,
        by: Reader,
        checkpoint: OpenSource,
        plan_for: Planner,
    ) -> None:
        self.target, self.reader = target, by
        self._recipe, self._checkpoint, self._plan_for = recipe, checkpoint, plan_for
        self._source = checkpoint.source
        base = self._request(_BASE, _BASE_GROUP)
        free = [
            s.name for s in plan_for(self._source, base, recipe.options).tensors if self._is_free(s)
        ]
        if not free:
            raise BadRequest("auto has no tensor to choose a format for")
        wide = parse_format(_BASE, _BASE_GROUP)
        rules = tuple(Override(exactly(name), wide, "auto") for name in free)
        options = replace(recipe.options, overrides=(*rules, *recipe.options.overrides))
        self._plan = plan_for(self._source, base, options)
        # all with a format, so that what weighs their columns is known
        self._specs = {s.name: s for s in self._plan.tensors if s.rule == "auto"}

    def _request(self, word: str | None, group: int | None = None) -> Request:
        if self._recipe.request.decode:
            return Request(requantize=word or DECODED, group_size=group if word else None)
        return Request(quantize=word, group_size=group if word else None)

    def _is_free(self, spec: TensorSpec) -> bool:
        """Whether the policy, and no rule of the user's, decides about a tensor of numbers."""
        if spec.rule.startswith("override") or spec.dtype not in FLOAT_DTYPES:
            return False
        if spec.format is not None:
            return True
        own = next((p.source for p in self._source.parts if p.role == MODEL), self._source)
        policy = select_policy(own.config)
        return spec.rule == "embedding" and may_quantize(policy, spec.name, spec.shape)

    def subjects(self, model: Model) -> tuple[list[Subject], list[TensorSpec]]:
        """Tensors that can be measured, and those that mlx-lm makes something else of."""
        from quantmill import mlxlm
        from quantmill.sensitivity import Subject

        target, _ = mlxlm.empty_model(model)
        shapes = mlxlm.shapes_of(target)
        matrices = defaultdict(list)
        owner = {name: s for s in self._specs.values() for name in (s.name, *s.sources)}
        for matrix, names in mlxlm.stored_names(model).items():
            owners = {owner[name].name if name in owner else "" for name in names}
            if len(owners) == 1 and matrix in shapes:
                matrices[owners.pop()].append(matrix)
        found, rest = [], []
        for name, spec in self._specs.items():
            own = [shapes[matrix] for matrix in matrices[name]]
            same = {shape[-1] for shape in own} == {spec.shape[-1]}
            if same and sum(map(_elements, own)) == spec.elements and _splits_rows(name):
                formats = tuple(self._formats(spec))
                columns = self._columns(spec)
                found.append(Subject(name, tuple(matrices[name]), spec.dtype, formats, columns))
            else:
                rest.append(spec)
        if not found:
            raise BadPlan("auto has no tensor whose effect could be measured")
        return found, rest

    def _formats(self, spec: TensorSpec) -> list[Format]:
        return [f for f in self.reader.formats if spec.shape[-1] % f.group_size == 0]

    def _columns(self, spec: TensorSpec) -> tuple[Any, ...]:
        """What the method `search` counts columns by."""
        if self._recipe.options.method != SEARCH:
            return ()
        from quantmill.importance import importance

        columns = spec.shape[-1]
        return tuple(importance(w, columns, self._checkpoint) for w in spec.weightings)

    def items(self, subjects: Sequence[Subject], found: Mapping[str, Sensitivity]) -> _Items:
        """Bytes and predicted costs of every format that a tensor may have."""
        groups: dict[str, list[Subject]] = defaultdict(list)
        for subject in subjects:
            groups[self.reader.group(subject.name)].append(subject)
        items, members = [], {}
        for members_of in groups.values():
            name = members_of[0].name
            formats: set[Format | None] = set(members_of[0].formats)
            formats = formats.intersection(*(s.formats for s in members_of)) | {None}
            options = [
                Option(
                    fmt,
                    sum(self._bytes(s.name, fmt) for s in members_of),
                    sum(found[s.name].cost(fmt) for s in members_of),
                )
                for fmt in formats
            ]
            items.append(Item(name, tuple(options)))
            members[name] = tuple(s.name for s in members_of)
        return _Items(tuple(items), members, found)

    def _bytes(self, name: str, fmt: Format | None) -> int:
        spec = self._specs[name]
        if fmt is None and spec.transform == CAST:  # kept as it is, in the dtype of the source
            return sum(self._source.tensors[source].nbytes for source in spec.sources)
        return replace(spec, format=fmt, global_scale=False).nbytes

    def allocated(self, items: _Items, rest: Sequence[TensorSpec]) -> tuple[Allocation, int]:
        """The allocation, and the bytes that it had for its tensors."""
        subjects = set(items.sensitivities)
        fixed = [s for s in self._plan.tensors if s.name not in subjects and s not in rest]
        taken = sum(s.nbytes for s in fixed) + sum(self._rest_bytes(s) for s in rest)
        weights = sum(s.weights for s in self._plan.tensors)
        budget = self.target.data_bytes(weights) - taken
        if self.target.nbytes is not None:  # headers of blobs count as well
            budget -= self._plan.blob_bytes - sum(s.nbytes for s in self._plan.tensors)
        while True:
            try:
                found = allocate(items.items, budget)
            except BadRequest as error:
                raise self._too_small(error, items, taken, weights) from None
            recipe = self.recipe_for(items.formats(found.choices), items, rest, None)
            over = self.target.excess(self._plan_for(self._source, recipe.request, recipe.options))
            if over <= 0:
                return found, budget
            budget -= over  # headers that grew

    def _rest_bytes(self, spec: TensorSpec) -> int:
        return self._bytes(spec.name, self._fallback(spec))

    def _fallback(self, spec: TensorSpec) -> Format | None:
        """The format of what cannot be measured: the widest that the reader has."""
        return max(self._formats(spec), key=lambda f: (f.bits, f.group_size), default=None)

    def _too_small(self, error: BadRequest, items: _Items, taken: int, weights: int) -> BadRequest:
        if error.kind != "budget_too_small":
            return error
        least = taken + sum(min(o.nbytes for o in item.options) for item in items.items)
        return BadRequest(
            f"{self.target.text} cannot be met: the smallest possible is {least:,} bytes of data, "
            f"{8 * least / max(1, weights):.2f} bits per weight",
            kind="target_too_small",
            hint="a larger target; --for mlx-lm has formats of fewer bits than --for ollama"
            if self.reader.name != "mlx-lm"
            else "a larger target",
        )

    def recipe_for(
        self,
        formats: Mapping[str, Format | None],
        items: _Items,
        rest: Sequence[TensorSpec],
        said: Automatic | None,
    ) -> Recipe:
        """The recipe with a rule for each tensor, and as its own format the one of most bytes."""
        rules = [
            Override(exactly(name), fmt, _reason(items.sensitivities[name].cost(fmt), fmt))
            for name, fmt in sorted(formats.items())
        ]
        for spec in rest:
            why = "auto: cannot be measured alone, so as wide as can be"
            rules.append(Override(exactly(spec.name), self._fallback(spec), why))
        sizes: Counter[Format] = Counter()
        for name, fmt in formats.items():
            if fmt is not None:
                sizes[fmt] += self._bytes(name, fmt)
        common = max(sorted(sizes), key=lambda fmt: sizes[fmt], default=None)
        request = self._request(common.name, common.group_size) if common else self._request(None)
        options = self._recipe.options
        overrides = (*rules, *options.overrides)
        return replace(
            self._recipe,
            request=request,
            options=replace(options, overrides=overrides, automatic=said),
        )


def _reason(cost: float, fmt: Format | None) -> str:
    if fmt is None:
        return "auto: kept"
    return f"auto: KL {cost:.2g} at {fmt.bits} bits (g{fmt.group_size})"


def _elements(shape: Sequence[int]) -> int:
    found = 1
    for length in shape:
        found *= length
    return found


def _splits_rows(name: str) -> bool:
    """Whether what mlx-lm makes of a weight has its rows."""
    from quantmill.mlxlm import is_transposed

    return not is_transposed(name)
