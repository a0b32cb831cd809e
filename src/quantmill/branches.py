"""How far a model's predictions move when some of its weights are others: many variants at once.

Every variant is the model with the weights of a few matrices changed. Up to the first of them it is
the model itself, so one pass goes through the blocks with the unchanged model, and a branch of it
begins where a variant does. For variants of one matrix each that is half of the work of a pass for
each; and a block's weights are made once for all branches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quantmill import blas, cpulanes
from quantmill.errors import BadRequest

if TYPE_CHECKING:
    from quantmill.divergence import Heads
    from quantmill.forward import Block, Forward, States
    from quantmill.model import Model

_Float = npt.NDArray[np.float32]
_Under = Callable[[], AbstractContextManager[None]]

Change = Callable[[mx.array], mx.array]
"""Makes of a weight in float32 another of the same shape."""

Variant = Mapping[str, Change]
"""What changes, by mlx-lm's names of weights."""

Progress = Callable[[int, int], None]
"""Told of steps done, and of steps in all."""

BRANCH_BYTES = 2 << 30
"""Hidden states of all branches together; more variants are measured in several passes."""


def divergences(
    model: Model,
    windows: npt.NDArray[np.integer[Any]],
    variants: Sequence[Variant],
    *,
    most_bytes: int = BRANCH_BYTES,
    progress: Progress | None = None,
) -> list[float]:
    """KL(model || variant) of the next token's distribution for each variant, in nats.

    The mean over all positions of `windows`, token ids [windows, length]. Everything is float32.
    A tied embedding changes as embedding and as head. Memory is that of a pass (forward.py), of
    some changed weights, and hidden states [variants, windows, length, hidden], of no more than
    `most_bytes` but for one variant.

    Raises what `forward.Forward` does, and BadRequest for a name that is no weight of the model.
    """
    blas.preload()  # before anything loads MLX
    found = [0.0] * len(variants)
    run = _Pass(model, windows)
    left = sorted(range(len(variants)), key=lambda place: run.start(variants[place]))
    fitting = max(1, most_bytes // run.state_bytes)
    steps, done = len(run.forward) + 1, 0

    def told(step: int, at_once: int) -> None:
        if progress is not None:
            progress(done * steps + step * at_once, len(variants) * steps)

    while left:
        now, left = left[:fitting], left[fitting:]
        run.begin({place: variants[place] for place in now})
        for index in range(len(run.forward)):
            run.step(index)
            told(index + 1, len(now))
        for place, value in run.finish():
            found[place] = value
        told(steps, len(now))
        done += len(now)
        run = _Pass(model, windows) if left else run
    return found


_EVERYWHERE = -1
"""The place before the first block: the embedding."""


class _Pass:
    """One pass of the model, and the branches of some variants."""

    def __init__(self, model: Model, windows: npt.NDArray[np.integer[Any]]) -> None:
        from quantmill.forward import Forward

        self.forward: Forward = Forward(model, windows)
        self._branches: dict[int, States] = {}
        self._variants: Mapping[int, Variant] = {}

    @property
    def state_bytes(self) -> int:
        """Of the hidden states of a branch."""
        return sum(states.nbytes for states in self.forward.states)

    def start(self, variant: Variant) -> int:
        """The block before which a variant is the model itself."""
        return min((self._place(name) for name in variant), default=len(self.forward))

    def _place(self, name: str) -> int:
        forward = self.forward
        if name == forward.embedding:
            return _EVERYWHERE
        if name == forward.head:
            return len(forward)
        block = forward.block_of(name)
        if block is None or block >= len(forward):
            raise BadRequest(f"{name!r} is no weight of a block, the embedding or the head")
        return block

    def begin(self, variants: Mapping[int, Variant]) -> None:
        """Branch off what has another embedding."""
        self._variants = variants
        name = self.forward.embedding
        for place, variant in variants.items():
            if name in variant:
                table = variant[name](self.forward.embedding_weight())
                self._branches[place] = self.forward.embedded(table)

    def step(self, index: int) -> None:
        """Send all through a block; variants that it is the first one of branch off."""
        self.forward.step(index, beside=lambda block: self._send(index, block))

    def _send(self, index: int, block: Block) -> None:
        places = [
            place
            for place, variant in self._variants.items()
            if place in self._branches or any(name in block.weights for name in variant)
        ]

        def ways() -> Iterator[tuple[States, dict[str, mx.array]]]:
            for place in places:
                variant = self._variants[place]
                states = self._branches.pop(place, block.before)
                yield (
                    states,
                    {
                        name: change(block.weights[name])
                        for name, change in variant.items()
                        if self.forward.block_of(name) == index
                    },
                )

        for place, states in zip(places, block.send(ways()), strict=True):
            self._branches[place] = states

    def finish(self) -> Iterator[tuple[int, float]]:
        """The divergence of each variant."""
        forward = self.forward
        plain = forward.states
        reference = np.concatenate(forward.finish())
        hidden = {
            place: np.concatenate(np.concatenate(forward.final(self._branches.pop(place, plain))))
            for place in self._variants
        }
        with_head = [place for place in hidden if forward.head in self._variants[place]]
        others = {place: hidden[place] for place in hidden if place not in with_head}
        if others:
            yield from self._means(reference, others, nullcontext)
        for place in with_head:
            head = self._variants[place][forward.head](forward.head_weight())
            mx.eval(head)
            under = partial(forward.with_head, head)
            yield from self._means(reference, {place: hidden[place]}, under)

    def _means(
        self, reference: _Float, hidden: Mapping[int, _Float], under: _Under
    ) -> Iterator[tuple[int, float]]:
        """Mean divergences of hidden states [positions, hidden] under a head, by place."""
        lanes = cpulanes.count()
        parts = _parts(len(reference), self.forward.vocabulary, lanes)
        total = np.zeros(len(hidden))
        self._share_weights(reference)
        for first in range(0, len(parts), lanes):
            some = parts[first : first + lanes]
            theirs = cpulanes.each([partial(self._said, reference[part]) for part in some])
            with under():
                self._share_weights(reference)
                sums = cpulanes.each(
                    [
                        partial(self._sums, [states[part] for states in hidden.values()], one)
                        for part, one in zip(some, theirs, strict=True)
                    ]
                )
            total += np.sum(sums, axis=0)
        yield from zip(hidden, (total / len(reference)).tolist(), strict=True)

    def _share_weights(self, states: _Float) -> None:
        """Compute what threads share: what MLX makes in one of them others cannot use."""
        mx.eval(self.forward.logits(states[:1]))

    def _said(self, states: _Float) -> tuple[_Float, Heads]:
        """Logits [positions, vocabulary], and what they say."""
        from quantmill.divergence import heads_of

        logits: _Float = cpulanes.values(self.forward.logits(states))[0]
        nobody = np.zeros(len(logits), np.int64)  # the token that came next is not asked
        return logits, heads_of(logits, nobody)

    def _sums(self, variants: Sequence[_Float], theirs: tuple[_Float, Heads]) -> list[float]:
        """Divergences summed over some positions, of the states of each variant."""
        from quantmill.divergence import divergence_of

        found = []
        for states in variants:
            ours, heads = self._said(states)
            found.append(float(divergence_of(ours, theirs[0], heads, theirs[1]).sum()))
        return found


def _parts(positions: int, vocabulary: int, lanes: int) -> list[slice]:
    """Positions in parts of nearly one size, as many for each thread."""
    from quantmill.divergence import positions_at_once

    most = positions_at_once(vocabulary)
    count = -(-positions // most)
    size = -(-positions // (-(-count // lanes) * lanes))
    return [slice(start, start + size) for start in range(0, positions, size)]
