"""How the next-token probabilities of two models differ, position by position.

Only hidden states are kept of a whole text; logits are there for some positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quantmill.forward import Forward, lanes

_Float = npt.NDArray[np.float32]

_POSITIONS = 512
_LOGITS = 1 << 23
"""Positions, and logits of a model, that are computed together: 32 MiB of float32."""


@dataclass(frozen=True, slots=True)
class Passed:
    """A model after its blocks, and its head's input: float32 [windows, length, hidden]."""

    forward: Forward
    hidden: _Float


@dataclass(frozen=True, slots=True)
class Measured:
    """Figures of every position, float64 [windows, length], the last axis shorter for surprises.

    `surprise` is -ln p(next token) of the model, `reference_surprise` of the reference, both
    [windows, length - 1]; `kl` sum p_ref (ln p_ref - ln p) over the vocabulary, in nats; `agrees`
    whether the likeliest token is the same, bool. None without a reference.
    """

    surprise: npt.NDArray[np.float64]
    reference_surprise: npt.NDArray[np.float64] | None = None
    kl: npt.NDArray[np.float64] | None = None
    agrees: npt.NDArray[np.bool_] | None = None


def measure(
    model: Passed,
    reference: Passed | None,
    windows: npt.NDArray[np.integer[Any]],
    progress: Callable[[int, int], None] | None = None,
) -> Measured:
    """Compare the heads' probabilities of the same tokens; both have the same vocabulary."""
    count, length = windows.shape
    following = np.zeros(windows.size, np.int32)  # what follows a window's last token is not asked
    following.reshape(count, length)[:, :-1] = windows[:, 1:]
    size = max(1, min(_POSITIONS, _LOGITS // model.forward.vocabulary))
    starts = list(range(0, windows.size, size))
    streams = lanes()
    found: list[list[npt.NDArray[Any]]] = []
    for first in range(0, len(starts), len(streams)):
        lazy = []
        for start, lane in zip(starts[first : first + len(streams)], streams, strict=False):
            with mx.stream(lane):
                lazy.append(_figures(model, reference, slice(start, start + size), following))
        mx.eval(lazy)
        found += [[np.array(figure) for figure in figures] for figures in lazy]
        if progress is not None:
            progress(min(windows.size, starts[first] + size * len(lazy)), windows.size)
    joined = [np.concatenate(parts).reshape(count, length) for parts in zip(*found, strict=True)]
    surprise = joined[0][:, :-1].astype(np.float64)
    if reference is None:
        return Measured(surprise)
    other = joined[1][:, :-1].astype(np.float64)
    return Measured(surprise, other, joined[2].astype(np.float64), joined[3].astype(np.bool_))


def _figures(
    model: Passed, reference: Passed | None, part: slice, following: npt.NDArray[np.int32]
) -> list[mx.array]:
    """Surprise; with a reference also its surprise, the divergence and whether the tops agree."""
    tokens = mx.array(following[part])[:, None]
    ours = _log_probabilities(model, part)
    surprise = -mx.take_along_axis(ours, tokens, axis=-1)[:, 0]
    if reference is None:
        return [surprise]
    theirs = _log_probabilities(reference, part)
    kl = (mx.exp(theirs) * (theirs - ours)).sum(axis=-1)
    agrees = mx.argmax(ours, axis=-1) == mx.argmax(theirs, axis=-1)
    return [surprise, -mx.take_along_axis(theirs, tokens, axis=-1)[:, 0], kl, agrees]


def _log_probabilities(model: Passed, part: slice) -> mx.array:
    """Natural logarithms of the next token's probabilities, float32 [positions, vocabulary]."""
    hidden = model.hidden.reshape(-1, model.hidden.shape[-1])[part]
    logits = model.forward.logits(hidden)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
