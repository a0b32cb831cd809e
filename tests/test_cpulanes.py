"""NumPy in MLX's place on a CPU: the same functions, in several threads, for the pass alone."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantmill import blas, cpulanes

pytestmark = pytest.mark.skipif(not cpulanes.on_cpu(), reason="MLX computes on a GPU here")


def arrays(seed: int, *shapes: tuple[int, ...]) -> list[mx.array]:
    random = np.random.default_rng(seed)
    return [mx.array(random.standard_normal(shape).astype(np.float32) * 3) for shape in shapes]


def inside(work: Callable[[], mx.array]) -> Any:
    """The result of one task, as float64."""
    return cpulanes.each([lambda: cpulanes.values(work())[0].astype(np.float64)])[0]


def assert_close(found: Any, expected: mx.array) -> None:
    wanted = np.array(expected).astype(np.float64)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 1e-5 * max(1.0, np.abs(wanted).max())


@settings(max_examples=25)
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 70),
    st.sampled_from([None, "causal", "added", "allowed"]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_attention_is_mlxs(
    batch: int, groups: int, times: int, length: int, mask: str | None, longer: bool, seed: int
) -> None:
    """Heads that share keys, any mask, more keys than queries, whatever fits a cache."""
    seen = length + (5 if longer else 0)
    q, k, v = arrays(
        seed, (batch, groups * times, length, 8), (batch, groups, seen, 8), (batch, groups, seen, 4)
    )
    said: Any = mask
    if mask in {"added", "allowed"}:
        allowed = np.random.default_rng(seed).random((length, seen)) < 0.7
        allowed[:, 0] = True
        said = mx.array(allowed if mask == "allowed" else np.where(allowed, 0, -50.0))
        said = said if mask == "allowed" else said.astype(mx.float32)
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=said)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpulanes, "_SCORES", 1 << (seed % 3 * 5))
        found = inside(lambda: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=said))
    assert_close(found, expected)


def test_what_it_does_not_know_is_left_to_mlx() -> None:
    """Sinks, other dtypes, other shapes of arguments."""
    q, k, v, sinks = arrays(0, (1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8), (2,))
    attend = mx.fast.scaled_dot_product_attention
    expected = attend(q, k, v, scale=0.3, mask="causal", sinks=sinks)
    attended = inside(
        lambda: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask="causal", sinks=sinks)
    )
    assert_close(attended, expected)
    whole = mx.array([-3, 0, 4])
    assert_close(inside(lambda: mx.sigmoid(whole)), mx.sigmoid(whole))


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_functions_are_mlxs_without_a_warning(name: str) -> None:
    """Also where exp is too large for float32."""
    x = mx.array(np.array([-1e4, -100.0, -1, 0, 0.5, 100, 1e4], np.float32))
    assert_close(inside(lambda: getattr(mx, name)(x)), getattr(mx, name)(x))


def test_compiled_functions_call_them_too() -> None:
    """mlx-lm's activations are compiled: within a pass they are not."""
    from mlx import nn

    x = arrays(0, (64,))[0]
    expected = nn.silu(x)
    assert_close(inside(lambda: nn.silu(x)), expected)
    assert_close(np.array(nn.silu(x)), expected)


def test_mlx_is_itself_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """In other threads meanwhile, and afterwards in all."""
    x = arrays(0, (8,))[0]
    own = mx.sigmoid

    def forbidden(x: mx.array) -> mx.array:
        raise AssertionError

    def task() -> bool:
        found: list[Any] = []
        other = threading.Thread(target=lambda: found.append(np.array(mx.sigmoid(mx.ones(3)))))
        other.start()
        other.join()
        return len(found) == 1 and mx.sigmoid is not own

    monkeypatch.setattr(cpulanes, "_sigmoid", forbidden)
    assert cpulanes.each([task]) == [True]
    assert mx.sigmoid is own
    assert np.isfinite(np.array(mx.sigmoid(x))).all()


def test_results_come_in_the_order_of_tasks() -> None:
    """However many there are; what a task raises is raised."""
    assert cpulanes.each([partial(pow, n, 2) for n in range(20)]) == [n * n for n in range(20)]

    def fail() -> int:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cpulanes.each([lambda: 1, fail, lambda: 3])
    assert cpulanes.each([]) == []


def test_arrays_that_another_thread_left_uncomputed_are_computed_there() -> None:
    """MLX ties what is not computed yet to a thread: such a task is done by the caller."""
    lazy = mx.arange(5) * 2

    def task(more: int) -> list[int]:
        found: list[int] = cpulanes.values(lazy + more)[0].tolist()
        return found

    found = cpulanes.each([partial(task, n) for n in range(3)])
    assert [row[0] for row in found] == [0, 1, 2]
    assert found[0] == [0, 2, 4, 6, 8]


def test_products_have_one_thread_meanwhile_and_as_many_as_before_afterwards() -> None:
    """OpenBLAS is asked, in blocks within blocks too."""
    threads = blas._threads()
    if threads is None:
        assert not os.environ.get("CI"), "NumPy's own wheel must be installed in CI"
        pytest.skip("NumPy has another BLAS here")
    before = threads[0]()
    with blas.one_thread():
        with blas.one_thread():
            assert threads[0]() == 1
        assert threads[0]() == 1
    assert threads[0]() == before
