"""Work on MLX's arrays that NumPy does on a CPU, in one thread for each processor.

On a CPU MLX computes everything but matrix products on one processor and exp, and what is made of
it, an element at a time; on Linux its matrix products are the reference BLAS's unless another was
loaded first (blas.py). NumPy's wheels bring a fast BLAS and vectorized functions. So in the threads
of `each` products, attention, sigmoid and tanh of float32 arrays are NumPy's, whatever code asks
MLX for them. On other devices everything stays MLX's, in the caller's thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quantmill import blas

_T = TypeVar("_T")
_Float = npt.NDArray[np.float32]

_MOST = 8
"""Threads at most: each holds the activations, or the logits, of what it works on."""

_SCORES = 1 << 18
"""Scores of attention that are computed together: they stay in a processor's own cache."""

_MLX = threading.Lock()
"""Held while MLX computes: NumPy's part, the longer one, goes on in other threads."""

_here = threading.local()


def on_cpu() -> bool:
    """Whether MLX's arrays are computed on a CPU."""
    return bool(mx.default_device() == mx.Device(mx.cpu))


def count() -> int:
    """Threads that `each` has: one for each processor this process may use, where NumPy computes.

    One alone where the threads of NumPy's BLAS cannot be told to stay out of each other's way.
    """
    if not on_cpu() or not blas.has_threads():
        return 1
    affinity = getattr(os, "sched_getaffinity", None)
    return min(_MOST, len(affinity(0)) if affinity else os.cpu_count() or 1)


def each(tasks: Sequence[Callable[[], _T]]) -> list[_T]:
    """Results of the tasks, in their order, `count()` of them at a time; raises what they raise.

    A task must have the same result when it is begun again, and must give back arrays that are
    computed already (`values`), as must be what it shares with others.
    """
    if not on_cpu():
        return [task() for task in tasks]
    with _replaced():
        if count() == 1 or len(tasks) < 2:
            return [_inside(task) for task in tasks]
        with blas.one_thread():
            found = list(_pool(count()).map(_tried, tasks))
    return [
        task() if isinstance(one, _Elsewhere) else one
        for task, one in zip(tasks, found, strict=True)
    ]


class _Elsewhere:
    """Stands for a result that a thread could not compute."""


@cache  # each thread of a process that uses MLX has streams that are never closed
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "quantmill-lane")


def _tried(task: Callable[[], _T]) -> _T | _Elsewhere:
    """The task's result, unless it uses an array that another thread made and has not computed."""
    try:
        return _inside(task)
    except RuntimeError as error:
        if "no Stream" not in str(error):
            raise
        return _Elsewhere()


def _inside(task: Callable[[], _T]) -> _T:
    _here.inside = True
    try:
        return task()
    finally:
        _here.inside = False


def values(*arrays: mx.array) -> list[npt.NDArray[Any]]:
    """MLX's arrays, computed, as NumPy's: views of the same memory."""
    with _MLX:
        mx.eval(*arrays)
    return [np.asarray(array) for array in arrays]


# -- instead of MLX's functions --------------------------------------------------------------------


def _is_ours(*arrays: mx.array) -> bool:
    return getattr(_here, "inside", False) and all(a.dtype == mx.float32 for a in arrays)


def product(x: mx.array, weight: mx.array) -> mx.array:
    """Rows times a transposed weight: [..., columns] and [rows, columns] give [..., rows]."""
    if not _is_ours(x, weight):
        return x @ weight.T
    left, right = values(x, weight)
    found = left.reshape(-1, left.shape[-1]) @ right.T
    return mx.array(found).reshape(*x.shape[:-1], weight.shape[0])


def _sigmoid(x: mx.array) -> mx.array:
    found = np.negative(values(x)[0])
    with np.errstate(over="ignore"):  # exp of much is infinite, one part of that is 0
        np.exp(found, out=found)
    found += 1
    np.reciprocal(found, out=found)
    return mx.array(found)


def _tanh(x: mx.array) -> mx.array:
    return mx.array(np.tanh(values(x)[0]))


def _attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None
) -> mx.array:
    """softmax(scale q k' + mask) v, as mx.fast.scaled_dot_product_attention defines it."""
    masked = isinstance(mask, mx.array)
    queries, keys, found_values, *more = values(q, k, v, *([mask] if masked else []))
    whole = more[0] if masked else None
    batch, heads, length, _ = queries.shape
    groups, seen = keys.shape[1:3]
    times = heads // groups
    if whole is not None:
        whole = np.broadcast_to(whole, (batch, heads, length, seen))
    found = np.empty((batch, heads, length, found_values.shape[-1]), np.float32)
    step = max(16, _SCORES // (times * seen))
    for b, group in np.ndindex(batch, groups):
        own = slice(group * times, (group + 1) * times)
        for start in range(0, length, step):
            rows = slice(start, min(start + step, length))
            last = seen
            if isinstance(mask, str):  # "causal": the last query sees all keys
                last = seen - length + rows.stop
            some = queries[b, own, rows] * np.float32(scale)
            scores = some.reshape(-1, some.shape[-1]) @ keys[b, group, :last].T
            scores = scores.reshape(times, -1, last)
            if isinstance(mask, str):
                scores += _triangle(rows.stop - rows.start, last)
            elif whole is not None:
                _apply(scores, whole[b, own, rows])
            scores -= scores.max(axis=-1, keepdims=True)
            np.exp(scores, out=scores)
            total = scores.sum(axis=-1)
            summed = scores.reshape(-1, last) @ found_values[b, group, :last]
            found[b, own, rows] = summed.reshape(times, -1, summed.shape[-1]) / total[..., None]
    return mx.array(found)


def _triangle(rows: int, columns: int) -> _Float:
    """What hides from each of the last `rows` positions those that come after it."""
    after = np.triu(np.ones((rows, columns), np.bool_), columns - rows + 1)
    return np.where(after, np.float32(-np.inf), np.float32(0))


def _apply(scores: _Float, mask: npt.NDArray[Any]) -> None:
    if mask.dtype == np.bool_:
        np.copyto(scores, np.finfo(np.float32).min, where=~mask)
    else:
        scores += mask


# -- putting them there ----------------------------------------------------------------------------


def _instead(ours: Callable[..., mx.array], theirs: Callable[..., mx.array], arrays: int) -> Any:
    """`ours` in the threads of `each` for float32 arrays and arguments that it knows."""

    def call(*args: Any, **others: Any) -> mx.array:
        known = {name: value for name, value in others.items() if value is not None}
        if len(args) != arrays or not _is_ours(*args) or known.keys() - {"scale", "mask"}:
            return theirs(*args, **others)
        if not isinstance(known.get("mask", "causal"), (str, mx.array)):
            return theirs(*args, **others)
        return ours(*args, **known)

    return call


_changes = threading.Lock()
_users = 0
_MLXS: tuple[tuple[Any, str, Callable[..., mx.array], int], ...] = (
    (mx.fast, "scaled_dot_product_attention", _attention, 3),
    (mx, "sigmoid", _sigmoid, 1),
    (mx, "tanh", _tanh, 1),
)
_originals = [getattr(where, name) for where, name, *_ in _MLXS]


@contextmanager
def _replaced() -> Iterator[None]:
    """MLX with those functions, and without compiling, which would never call them."""
    global _users  # noqa: PLW0603  (a process has one MLX)
    with _changes:
        _users += 1
        if _users == 1:
            mx.disable_compile()
            for (where, name, ours, arrays), theirs in zip(_MLXS, _originals, strict=True):
                setattr(where, name, _instead(ours, theirs, arrays))
    try:
        yield
    finally:
        with _changes:
            _users -= 1
            if _users == 0:
                for (where, name, *_), theirs in zip(_MLXS, _originals, strict=True):
                    setattr(where, name, theirs)
                mx.enable_compile()
