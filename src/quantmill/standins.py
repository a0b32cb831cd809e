"""What stands in the place of mlx-lm's modules in a pass block by block (forward.py).

Layers that note what they are given, a table that is dequantized row by row, and blocks that note
how mlx-lm's code calls them and give back what they are told to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx import nn

from quantmill import cpulanes
from quantmill.denseweights import StoredWeight

Seen = tuple[str, mx.array, mx.array | None]
"""Path of a layer, its input, and for experts which of them each row is for."""


@dataclass(slots=True)
class Watch:
    """What the layers of the block at work were given, in the order of their calls in a thread."""

    on: bool = False
    here: threading.local = field(default_factory=threading.local)

    def note(self, path: str, x: mx.array, indices: mx.array | None = None) -> None:
        """Remember an input while someone wants to know."""
        if self.on:
            self.here.__dict__.setdefault("seen", []).append((path, x, indices))

    def take(self) -> list[Seen]:
        """What was noted since the last call."""
        found: list[Seen] = self.here.__dict__.pop("seen", [])
        return found


class Table(nn.Module):
    """An embedding: rows are dequantized when they are looked up, the whole for a tied head."""

    def __init__(self, stored: StoredWeight, path: str, watch: Watch) -> None:
        super().__init__()
        self._stored, self._path, self._watch = stored, path, watch
        self._dense: mx.array | None = None

    @property
    def weight(self) -> mx.array:
        """The table as float32 [rows, columns]; some heads multiply by it themselves."""
        if self._dense is None:
            self._dense = self._stored.dense()
        return self._dense

    def __call__(self, x: mx.array) -> mx.array:
        """The rows of some tokens."""
        return self._stored.rows(x)

    def as_linear(self, x: mx.array) -> mx.array:
        """Logits of hidden states, where the embedding is the head as well."""
        self._watch.note(self._path, x)
        return cpulanes.product(x, self.weight)


def replace_class(module: nn.Module, call: Callable[..., Any]) -> None:
    """Have a module called through `call`, which gets the class's own way to be called first."""
    kind = type(module)

    def __call__(self: Any, *args: Any, **others: Any) -> Any:  # noqa: N807
        return call(lambda *a, **o: kind.__call__(self, *a, **o), *args, **others)

    module.__class__ = type(kind.__name__, (kind,), {"__call__": __call__})


def watch_linear(module: nn.Module, path: str, watch: Watch) -> None:
    """Have a linear layer note its input; a plain one multiplies by `cpulanes.product`."""
    plain = type(module) is nn.Linear

    def call(own: Callable[..., mx.array], x: mx.array) -> mx.array:
        watch.note(path, x)
        if not plain:
            return own(x)
        y = cpulanes.product(x, module["weight"])
        return y + module["bias"] if "bias" in module else y

    replace_class(module, call)


def watch_experts(module: nn.Module, path: str, watch: Watch) -> None:
    """Experts one after the other: MLX's own product on a CPU takes a row at a time."""

    def call(own: object, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        del own, sorted_indices
        watch.note(path, x, indices)
        weight: mx.array = module["weight"]
        parts, places = [], []
        for expert, rows, values in by_expert(x, indices):
            parts.append(cpulanes.product(values, weight[expert]))
            places.append(rows)
        back = mx.array(np.argsort(np.concatenate(places)))
        y = mx.concatenate(parts)[back].reshape(*indices.shape, 1, weight.shape[1])
        return y + mx.expand_dims(module["bias"][indices], -2) if "bias" in module else y

    replace_class(module, call)


def by_expert(
    x: mx.array, indices: mx.array
) -> Iterator[tuple[int, npt.NDArray[np.int64], mx.array]]:
    """Expert, places among the flattened indices, and its rows [tokens, columns]."""
    columns = x.shape[-1]
    flat = mx.broadcast_to(x[..., 0, :], (*indices.shape, columns)).reshape(-1, columns)
    chosen = cpulanes.values(indices)[0].reshape(-1)
    for expert in np.unique(chosen):
        rows = np.flatnonzero(chosen == expert)
        yield int(expert), rows, flat[mx.array(rows)]


@dataclass(slots=True)
class Call:
    """What a block is called with beside the hidden states."""

    args: tuple[Any, ...]
    others: dict[str, Any]


class Odd(Exception):
    """An architecture does something between its blocks, which a pass by blocks would miss."""


class Stations:
    """What blocks do when mlx-lm's code calls them: note the call, or give back a result."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.calls: list[Call] = []
        self.first: mx.array | None = None
        self.last: mx.array | None = None
        self.running = False
        self._given: mx.array | None = None
        for index, block in enumerate(blocks):
            replace_class(block, self._station(index))

    def _station(self, index: int) -> Callable[..., Any]:
        def call(own: Callable[..., Any], h: mx.array, *args: Any, **others: Any) -> Any:
            if self.running:
                return own(h, *args, **others)
            if self.last is not None:  # the pass is over: what follows the blocks goes on with this
                return self.last
            return self._noted(index, h, Call(args, others))

        return call

    def _noted(self, index: int, h: mx.array, called: Call) -> mx.array:
        """A stand-in for the block's result: one number everywhere, which the next must be given.

        By its value and not only by being the same object, since MLX's arrays can be changed in
        place: `h *= 2` between two blocks must be noticed.
        """
        if index != len(self.calls):
            raise Odd
        if index == 0:
            self.first = h + 0  # of its own, whatever happens to the caller's
        elif h is not self._given or h[0, 0, 0].item() != index:
            raise Odd
        self.calls.append(called)
        self._given = mx.broadcast_to(mx.array(index + 1.0), h.shape)
        return self._given

    def record(self, run: Callable[[], Any], count: int) -> tuple[mx.array, list[Call]]:
        """The first block's input and every block's call, while `run` calls them in order."""
        self.calls, self.first, self.last = [], None, None
        run()
        found, first = self.calls, self.first
        self.calls, self.first, self._given = [], None, None
        if first is None or len(found) != count:
            raise Odd
        return first, found
