"""Formats within a budget of bytes: never above it, near the best, no worse than one for all."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantmill.allocation import Allocation, Item, Option, allocate, uniform
from quantmill.errors import BadRequest
from quantmill.formats import Format

FORMATS = [Format("affine", bits, group) for bits in (2, 3, 4) for group in (32, 64)]

OPTION = st.builds(
    Option,
    st.sampled_from([None, *FORMATS]),
    st.integers(1, 60),
    st.floats(0, 10).map(lambda cost: round(cost, 3)),
)
ITEMS = st.lists(
    st.lists(OPTION, min_size=1, max_size=5, unique_by=lambda option: option.format),
    min_size=1,
    max_size=5,
).map(lambda lists: [Item(f"t{i}", tuple(options)) for i, options in enumerate(lists)])


def smallest(items: list[Item]) -> int:
    return sum(min(option.nbytes for option in item.options) for item in items)


def largest_step(items: list[Item]) -> float:
    """No step of an item saves more than its dearest option costs over its cheapest."""
    return max(
        max(o.cost for o in item.options) - min(o.cost for o in item.options) for item in items
    )


@given(ITEMS, st.integers(0, 100))
def test_the_budget_is_kept_and_the_best_is_near(items: list[Item], spare: int) -> None:
    """Beside all assignments of small cases: within the bound that the method is known to have."""
    budget = smallest(items) + spare
    found = allocate(items, budget)
    assert found.nbytes == sum(option.nbytes for option in found.choices.values()) <= budget
    assert found.cost == pytest.approx(sum(option.cost for option in found.choices.values()))
    assert found.choices.keys() == {item.name for item in items}
    best = min(
        sum(option.cost for option in options)
        for options in product(*(item.options for item in items))
        if sum(option.nbytes for option in options) <= budget
    )
    assert found.bound - 1e-9 <= best <= found.cost + 1e-9
    assert found.cost <= best + largest_step(items) + 1e-9


@given(ITEMS, st.integers(0, 60), st.integers(0, 60))
def test_a_larger_budget_costs_no_more_but_for_a_step(
    items: list[Item], spare: int, more: int
) -> None:
    """The bound falls with the budget; the cost may rise by less than one step."""
    small = allocate(items, smallest(items) + spare)
    large = allocate(items, smallest(items) + spare + more)
    assert large.bound <= small.bound + 1e-9
    assert large.cost <= small.cost + largest_step(items) + 1e-9


@given(ITEMS, st.integers(0, 100))
def test_one_format_for_all_is_never_better(items: list[Item], spare: int) -> None:
    """Every uniform assignment within the budget is a candidate."""
    budget = smallest(items) + spare
    found = allocate(items, budget)
    for fmt in FORMATS:
        one = uniform(items, fmt)
        if one is not None and sum(option.nbytes for option in one.values()) <= budget:
            assert found.cost <= sum(option.cost for option in one.values()) + 1e-12


@given(ITEMS, st.integers(0, 100))
def test_the_order_of_anything_does_not_matter(items: list[Item], spare: int) -> None:
    """Items and options in any order give the same assignment."""
    budget = smallest(items) + spare
    shuffled = [Item(i.name, tuple(reversed(i.options))) for i in reversed(items)]
    assert same(allocate(items, budget), allocate(shuffled, budget))


def same(first: Allocation, second: Allocation) -> bool:
    return dict(first.choices) == dict(second.choices) and first.uniform == second.uniform


@given(ITEMS, st.integers(1, 50))
def test_a_budget_that_nothing_fits_into_is_refused(items: list[Item], missing: int) -> None:
    """The error names the least."""
    least = smallest(items)
    with pytest.raises(BadRequest, match=f"{least:,} bytes") as caught:
        allocate(items, least - missing)
    assert caught.value.kind == "budget_too_small"


@given(ITEMS)
def test_a_budget_for_everything_says_that_no_more_helps(items: list[Item]) -> None:
    """Each item has its cheapest option then."""
    found = allocate(items, 10_000)
    assert found.exhausted
    least = [min(option.cost for option in item.options) for item in items]
    assert found.cost == pytest.approx(sum(least)) == pytest.approx(found.bound)


def test_a_sensitive_tensor_gets_the_bits() -> None:
    """Twice the cost for the same bytes decides."""
    four, three = Format("affine", 4, 64), Format("affine", 3, 64)
    items = [
        Item(name, (Option(three, 30, 4 * weight), Option(four, 40, weight)))
        for name, weight in (("quiet", 0.1), ("loud", 0.2))
    ]
    found = allocate(items, 75)
    assert {name: option.format for name, option in found.choices.items()} == {
        "quiet": three, "loud": four,
    }  # fmt: skip
    assert (found.nbytes, found.uniform, found.exhausted) == (70, None, False)
    assert allocate(items, 80).uniform == four


def test_nonsense_is_refused() -> None:
    """No options, and a name twice."""
    option = Option(None, 1, 0.0)
    with pytest.raises(BadRequest, match="nothing to choose"):
        allocate([Item("a", ())], 1)
    with pytest.raises(BadRequest, match="is there twice"):
        allocate([Item("a", (option,)), Item("a", (option,))], 2)
    with pytest.raises(BadRequest, match="format twice"):
        allocate([Item("a", (option, option))], 2)
