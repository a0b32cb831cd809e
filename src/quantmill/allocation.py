"""Which format each tensor gets within a budget of bytes: the least sum of predicted costs.

Costs and bytes of tensors are independent of each other, so the best assignments for a price of a
byte are found tensor by tensor (Lagrange's method; Everett 1963). All prices are gone through from
the highest: every step takes the next tensor one vertex further on the lower convex hull of its
(bytes, cost), which is what a bisection of the price comes to, exactly and without a tolerance.
What the steps leave of the budget is filled greedily. Nothing here depends on the order of anything
but names.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from quantmill.errors import BadRequest
from quantmill.formats import Format


@dataclass(frozen=True, slots=True)
class Option:
    """What a tensor may become: a format, or None to be kept; its bytes and predicted cost."""

    format: Format | None
    nbytes: int
    cost: float


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor, or some that must have the same format, and what it may become."""

    name: str
    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True)
class Allocation:
    """An option for each item, by name; bytes and cost in all.

    No assignment within the budget costs less than `bound`. `exhausted` says that a larger budget
    would change nothing. `uniform` is the format that all items have where that was found to be no
    worse than a mixture.
    """

    choices: Mapping[str, Option]
    nbytes: int
    cost: float
    bound: float
    exhausted: bool
    uniform: Format | None = None


def allocate(items: Sequence[Item], budget: int) -> Allocation:
    """The assignment of least cost that was found whose bytes are at most `budget`.

    Its cost exceeds the least possible by no more than what one step of one item saves. Of
    assignments in one format (items that do not have it are kept) that fit the budget none costs
    less. Ties go to fewer bytes, then to the format first in order (keep last), then to the name.

    Raises BadRequest with the kind `budget_too_small` where the smallest assignment is larger, and
    where an item has no options or a name comes twice.
    """
    ordered = sorted(items, key=lambda item: item.name)
    _check(ordered)
    ladders = {item.name: _ladder(item.options) for item in ordered}
    chosen = {name: ladder[0] for name, ladder in ladders.items()}
    left = budget - sum(option.nbytes for option in chosen.values())
    if left < 0:
        raise BadRequest(
            f"the smallest possible is {budget - left:,} bytes, the budget {budget:,}",
            kind="budget_too_small",
            hint="a larger target, or fewer tensors that are kept",
        )
    left, bound = _descend(ladders, chosen, left)
    _fill(ladders, chosen, left)
    exhausted = all(chosen[name] is ladder[-1] for name, ladder in ladders.items())
    found = _made(chosen, bound, exhausted)
    for fmt, one in sorted(_uniform(ordered).items()):
        other = _made(one, bound, False, fmt)
        if other.nbytes <= budget and (other.cost, other.nbytes) < (found.cost, found.nbytes):
            found = other
    return found


def uniform(items: Sequence[Item], fmt: Format) -> dict[str, Option] | None:
    """Every item in one format, kept where it does not have it; None where it can be neither."""
    return _uniform(items).get(fmt)


def _uniform(items: Sequence[Item]) -> dict[Format, dict[str, Option]]:
    formats = {o.format for item in items for o in item.options if o.format is not None}
    found: dict[Format, dict[str, Option]] = {}
    for fmt in formats:
        chosen: dict[str, Option] = {}
        for item in items:
            by_format = {option.format: option for option in item.options}
            option = by_format.get(fmt, by_format.get(None))
            if option is None:
                break
            chosen[item.name] = option
        else:
            found[fmt] = chosen
    return found


def _check(items: Sequence[Item]) -> None:
    for item in items:
        if not item.options:
            raise BadRequest(f"{item.name!r} has nothing to choose from")
        if len({option.format for option in item.options}) < len(item.options):
            raise BadRequest(f"{item.name!r} has a format twice")
    for first, second in itertools.pairwise(items):
        if first.name == second.name:
            raise BadRequest(f"{first.name!r} is there twice")


def _order(option: Option) -> tuple[int, float, bool, Format | None]:
    return option.nbytes, option.cost, option.format is None, option.format


def _ladder(options: Iterable[Option]) -> list[Option]:
    """Options by bytes, each of less cost than all before; the others are of no use."""
    found: list[Option] = []
    for option in sorted(options, key=_order):
        if not found or option.cost < found[-1].cost:
            found.append(option)
    return found


def _hull(ladder: Sequence[Option]) -> list[Option]:
    """The lower convex hull: steps save less and less cost for a byte."""
    found: list[Option] = []
    for option in ladder:
        while len(found) > 1 and _gain(found[-2], found[-1]) <= _gain(found[-2], option):
            found.pop()
        found.append(option)
    return found


def _gain(small: Option, large: Option) -> float:
    """Cost saved for each byte added."""
    return (small.cost - large.cost) / (large.nbytes - small.nbytes)


def _descend(
    ladders: Mapping[str, list[Option]], chosen: dict[str, Option], left: int
) -> tuple[int, float]:
    """Take the steps of all hulls from the most saving for a byte; bytes left and the bound.

    The first step that does not fit ends it: with the part of that step which fits this would be
    the solution where tensors can be divided, whose cost is the bound.
    """
    steps = []
    for place, (name, ladder) in enumerate(ladders.items()):
        hull, gain = _hull(ladder), math.inf
        for small, large in itertools.pairwise(hull):
            gain = min(gain, _gain(small, large))  # rounding must not turn two steps about
            steps.append((-gain, place, large.nbytes, name, small, large))
    for gain, _, _, name, small, large in sorted(steps, key=lambda step: step[:3]):
        extra = large.nbytes - small.nbytes
        if extra > left:
            return left, _cost(chosen) + gain * left
        chosen[name] = large
        left -= extra
    return left, _cost(chosen)


def _fill(ladders: Mapping[str, list[Option]], chosen: dict[str, Option], left: int) -> None:
    """While anything fits into what is left: the change that saves most for each byte."""
    while True:
        best: tuple[float, str, Option] | None = None
        for name, ladder in ladders.items():
            now = chosen[name]
            for option in ladder:
                if not now.nbytes < option.nbytes <= now.nbytes + left:
                    continue
                gain = _gain(now, option)
                if best is None or gain > best[0]:
                    best = gain, name, option
        if best is None:
            return
        _, name, option = best
        left -= option.nbytes - chosen[name].nbytes
        chosen[name] = option


def _cost(chosen: Mapping[str, Option]) -> float:
    return sum(option.cost for option in chosen.values())


def _made(
    chosen: Mapping[str, Option], bound: float, exhausted: bool, fmt: Format | None = None
) -> Allocation:
    nbytes = sum(option.nbytes for option in chosen.values())
    formats = {option.format for option in chosen.values() if option.format is not None}
    if fmt is None and len(formats) == 1 and not any(o.format is None for o in chosen.values()):
        fmt = formats.pop()
    return Allocation(chosen, nbytes, _cost(chosen), bound, exhausted, fmt)
