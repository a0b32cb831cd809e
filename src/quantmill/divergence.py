"""How the next-token probabilities of two models differ, position by position.

Only hidden states are kept of a whole text; logits are there for some positions at a time. What is
asked of the reference alone is found once, however many models are compared with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quantmill import cpulanes
from quantmill.forward import Forward

_T = TypeVar("_T")
_Float = npt.NDArray[np.float32]
_Double = npt.NDArray[np.float64]
_Step = Callable[[int, int], None]

_POSITIONS = 512
_LOGITS = 1 << 23
"""Positions, and logits of a model, that are computed together: 32 MiB of float32."""

_CACHED = 1 << 18
"""Logits that are worked on together once they are there."""


def positions_at_once(vocabulary: int) -> int:
    """Positions whose logits over a vocabulary are computed together."""
    return max(1, min(_POSITIONS, _LOGITS // vocabulary))


@dataclass(frozen=True, slots=True)
class Passed:
    """A model after its blocks, and its head's input: float32 [windows, length, hidden]."""

    forward: Forward
    hidden: _Float


@dataclass(frozen=True, slots=True)
class Heads:
    """What a model's head says of positions, each array [positions].

    `top` is the likeliest token, int64, and `highest` its logit, float32; `total` the sum of
    exp(logit - highest) over the vocabulary, so that ln Z is `highest` + ln `total`; `surprise`
    -ln p(the token that came next), of no meaning at a window's last position. Both float64.
    """

    top: npt.NDArray[np.int64]
    highest: _Float
    total: _Double
    surprise: _Double

    @property
    def partition(self) -> _Double:
        """Ln Z: the logarithm of the sum of exp over all logits."""
        return self.highest.astype(np.float64) + np.log(self.total)

    def part(self, some: slice) -> Heads:
        """The same of some of the positions."""
        return Heads(self.top[some], self.highest[some], self.total[some], self.surprise[some])


@dataclass(slots=True)
class Reference:
    """What models are compared with: after its blocks, and what its head says of all positions.

    `windows` are the tokens that it was sent, [windows, length]; `heads` is found by the first
    comparison and used by the others.
    """

    passed: Passed
    windows: npt.NDArray[np.integer[Any]]
    heads: Heads | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures of every position, float64 [windows, length], the last axis shorter for surprises.

    `surprise` is -ln p(next token) of the model, `reference_surprise` of the reference, both
    [windows, length - 1]; `kl` sum p_ref (ln p_ref - ln p) over the vocabulary, in nats; `agrees`
    whether the likeliest token is the same, bool. None without a reference.
    """

    surprise: _Double
    reference_surprise: _Double | None = None
    kl: _Double | None = None
    agrees: npt.NDArray[np.bool_] | None = None


def measure(
    model: Passed, windows: npt.NDArray[np.integer[Any]], progress: _Step | None = None
) -> Measured:
    """A model's surprises at the tokens that it was sent, [windows, length]."""
    return Measured(_in_windows(_heads(model, windows, progress).surprise, windows)[:, :-1])


def compare(model: Passed, reference: Reference, progress: _Step | None = None) -> Measured:
    """Compare the heads' probabilities of the same tokens; both have the same vocabulary."""
    windows, following = reference.windows, _following(reference.windows)
    known = reference.heads

    def part(some: slice) -> tuple[Heads, Heads, _Double]:
        ours, theirs = _logits(model, some), _logits(reference.passed, some)
        heads = heads_of(ours, following[some])
        other = known.part(some) if known else heads_of(theirs, following[some])
        return heads, other, divergence_of(ours, theirs, heads, other)

    found = _in_parts(part, windows, [model, reference.passed], progress)
    heads = _joined([ours for ours, _, _ in found])
    others = reference.heads = known or _joined([theirs for _, theirs, _ in found])
    return Measured(
        _in_windows(heads.surprise, windows)[:, :-1],
        _in_windows(others.surprise, windows)[:, :-1],
        _in_windows(np.concatenate([kl for _, _, kl in found]), windows),
        _in_windows(heads.top == others.top, windows),
    )


# -- inside ----------------------------------------------------------------------------------------


def _heads(model: Passed, windows: npt.NDArray[np.integer[Any]], progress: _Step | None) -> Heads:
    following = _following(windows)

    def part(some: slice) -> Heads:
        return heads_of(_logits(model, some), following[some])

    return _joined(_in_parts(part, windows, [model], progress))


def _joined(parts: Sequence[Heads]) -> Heads:
    return Heads(
        np.concatenate([one.top for one in parts]),
        np.concatenate([one.highest for one in parts]),
        np.concatenate([one.total for one in parts]),
        np.concatenate([one.surprise for one in parts]),
    )


def _in_windows(figures: npt.NDArray[Any], windows: npt.NDArray[np.integer[Any]]) -> Any:
    return figures.reshape(windows.shape)


def _following(windows: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
    """The token after each position, [positions]; 0 after a window's last, where nobody asks."""
    found = np.zeros(windows.shape, np.int64)
    found[:, :-1] = windows[:, 1:]
    return found.reshape(-1)


def _in_parts(
    work: Callable[[slice], _T],
    windows: npt.NDArray[np.integer[Any]],
    models: Sequence[Passed],
    progress: _Step | None,
) -> list[_T]:
    """Results for some positions after the others, as many at a time as there are threads."""
    size = positions_at_once(models[0].forward.vocabulary)
    parts = [slice(start, start + size) for start in range(0, windows.size, size)]
    for model in models:  # once here, so that threads share weights that are computed
        mx.eval(model.forward.logits(model.hidden[0, :1]))
    lanes = cpulanes.count()
    found: list[_T] = []
    for first in range(0, len(parts), lanes):
        found += cpulanes.each([partial(work, part) for part in parts[first : first + lanes]])
        if progress is not None:
            progress(min(windows.size, size * len(found)), windows.size)
    return found


def _logits(model: Passed, some: slice) -> _Float:
    hidden = model.hidden.reshape(-1, model.hidden.shape[-1])[some]
    found: _Float = cpulanes.values(model.forward.logits(hidden))[0]
    return found


def _rows(logits: _Float) -> Iterator[slice]:
    """Some rows after the others, few enough to stay in a processor's own cache."""
    step = max(1, _CACHED // logits.shape[-1])
    return (slice(start, start + step) for start in range(0, len(logits), step))


def heads_of(logits: _Float, following: npt.NDArray[np.int64]) -> Heads:
    """What logits [positions, vocabulary] say, and of the tokens that came next [positions]."""
    top = logits.argmax(axis=-1)
    highest = logits[np.arange(len(logits)), top]
    total = np.empty(len(logits))
    for rows in _rows(logits):
        weights = np.exp(logits[rows] - highest[rows, None])
        total[rows] = weights.sum(axis=-1, dtype=np.float64)
    chosen = logits[np.arange(len(logits)), following].astype(np.float64)
    return Heads(top, highest, total, np.log(total) + (highest - chosen))


def divergence_of(ours: _Float, theirs: _Float, mine: Heads, other: Heads) -> _Double:
    """Sum p_ref (l_ref - l) - ln Z_ref + ln Z, with logits l: no logarithm of each p is needed."""
    apart = np.empty(len(ours))
    for rows in _rows(ours):
        weights = np.exp(theirs[rows] - other.highest[rows, None])
        weights *= theirs[rows] - ours[rows]
        apart[rows] = weights.sum(axis=-1, dtype=np.float64)
    return apart / other.total - other.partition + mine.partition
