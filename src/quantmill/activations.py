"""What the linear layers of a model are given: second moments and Gram matrices of their inputs.

They say how much each column of a weight matters for what the layer computes, and are what
quantizers are calibrated with. One pass, block by block (forward.py); the layers of a block that
share an input (query, key and value; gate and up) share its statistic, which is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from quantmill import blas

if TYPE_CHECKING:
    from quantmill.forward import Given
    from quantmill.model import Model

Progress = Callable[[int, int], None]
"""Told of blocks done and of blocks in all, the head counted as one."""

_Double = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean of x_j² over the tokens that a weight's layer was given.

    `values` is float32 [columns], or [experts, columns] for a stack of experts, and `tokens` int64
    [] or [experts]: how many tokens there were. Without tokens the values are zeros.
    """

    values: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int64]


EXPERT_TOKENS = 32
"""An expert that saw fewer tokens counts columns as all experts of its layer together do."""


def of_expert(
    values: Sequence[npt.NDArray[np.float32]], tokens: Sequence[int], member: int
) -> _Double:
    """An expert's means of squares, float64 [columns], of those of all and of what each saw.

    One that saw fewer than EXPERT_TOKENS has the mean over all tokens that its layer saw.
    """
    if tokens[member] >= EXPERT_TOKENS or len(tokens) == 1:
        return values[member].astype(np.float64)
    total = np.zeros(values[0].shape)
    for own, count in zip(values, tokens, strict=True):
        total += own.astype(np.float64) * count
    return total / max(1, sum(tokens))


@dataclass(frozen=True, slots=True)
class Gram:
    """X'X of the tokens X [tokens, columns] that a weight's layer was given.

    `products` is float64 [columns, columns], or [experts, columns, columns] for a stack; `tokens`
    int64 [] or [experts], to divide by. Products of some windows in float32, their sum in float64.
    """

    products: _Double
    tokens: npt.NDArray[np.int64]


class _Sums:
    """Sums over the steps of a block: one for each input, of its rows' `measure`."""

    def __init__(self, measure: Callable[[npt.NDArray[np.float32]], Any]) -> None:
        self._measure = measure
        self._found: dict[tuple[str, ...], tuple[_Double, npt.NDArray[np.int64]]] = {}

    def add(self, step: Sequence[Given]) -> None:
        for given in step:
            value = self._measure(given.values)
            stack = () if given.experts is None else (given.experts,)
            if given.names not in self._found:
                empty = np.zeros((*stack, *value.shape)), np.zeros(stack, np.int64)
                self._found[given.names] = empty
            total, tokens = self._found[given.names]
            place = ... if given.expert is None else given.expert
            total[place] += value
            tokens[place] += len(given.values)

    def take(self) -> Iterator[tuple[tuple[str, ...], _Double, npt.NDArray[np.int64]]]:
        found, self._found = self._found, {}
        for names, (total, tokens) in found.items():
            yield names, total, tokens


def second_moments(
    model: Model, windows: npt.NDArray[np.integer[Any]], *, progress: Progress | None = None
) -> dict[str, Moments]:
    """Mean squares of the inputs of every linear layer, by the name of its weight in `model`.

    `windows` are token ids [windows, length]. Sums are float64. A tied embedding has the statistic
    of the head that it is; an untied one, norms and weights that are no linear layers have none.
    Experts have their own tokens only: [experts, columns] under the name of a stack, [columns]
    for experts that are stored singly (absent where they got no token).

    Raises what `forward.Forward` does.
    """
    found: dict[str, Moments] = {}
    for sums in _passed(model, windows, _Sums(_squares), progress):
        for names, total, tokens in sums.take():
            count = np.maximum(tokens, 1)[..., None]
            made = Moments((total / count).astype(np.float32), tokens)
            found |= dict.fromkeys(names, made)
    return found


def gram_matrices(
    model: Model, windows: npt.NDArray[np.integer[Any]], *, progress: Progress | None = None
) -> Iterator[dict[str, Gram]]:
    """Gram matrices of the inputs, block by block and at last the head's, by weight name.

    Weights that share an input have the same `Gram`. What one block needs is in memory until the
    next is asked for. Arguments, names and errors are those of `second_moments`.
    """
    for sums in _passed(model, windows, _Sums(_gram), progress):
        found: dict[str, Gram] = {}
        for names, total, tokens in sums.take():
            found |= dict.fromkeys(names, Gram(total, tokens))
        yield found


class Passes:
    """Passes of one model, made once for each choice of tokens: for who quantizes it repeatedly.

    Means of squares are kept. Gram matrices are kept with `products` alone, since all of a model's
    are as large as it is, or larger.
    """

    def __init__(self, *, products: bool = False) -> None:
        self._keeps_products = products
        self._moments: dict[bytes, dict[str, Moments]] = {}
        self._products: dict[bytes, list[dict[str, Gram]]] = {}
        self._whole: set[bytes] = set()

    def second_moments(
        self,
        model: Model,
        windows: npt.NDArray[np.integer[Any]],
        *,
        progress: Progress | None = None,
    ) -> dict[str, Moments]:
        """As the function of this name."""
        key = _key(windows)
        if key not in self._moments:
            self._moments[key] = second_moments(model, windows, progress=progress)
        return self._moments[key]

    def gram_matrices(
        self,
        model: Model,
        windows: npt.NDArray[np.integer[Any]],
        *,
        progress: Progress | None = None,
    ) -> Iterator[dict[str, Gram]]:
        """As the function of this name."""
        key = _key(windows)
        kept = self._products.setdefault(key, [])
        yield from tuple(kept)
        if key in self._whole:
            return
        for number, block in enumerate(gram_matrices(model, windows, progress=progress)):
            if number < len(kept):  # another asked for so many, and for no more
                continue
            if self._keeps_products:
                kept.append(block)
            yield block
        if self._keeps_products:
            self._whole.add(key)


def _key(windows: npt.NDArray[np.integer[Any]]) -> bytes:
    return repr(windows.shape).encode() + windows.astype(np.int64).tobytes()


def _squares(values: npt.NDArray[np.float32]) -> _Double:
    wide = values.astype(np.float64)
    found: _Double = np.einsum("tj,tj->j", wide, wide)
    return found


def _gram(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return values.T @ values


def _passed(
    model: Model,
    windows: npt.NDArray[np.integer[Any]],
    sums: _Sums,
    progress: Progress | None,
) -> Iterator[_Sums]:
    """The sums after each block and after the head."""
    blas.preload()  # before anything loads MLX
    from quantmill.forward import Forward

    forward = Forward(model, windows)
    blocks = len(forward)
    for index in range(blocks + 1):
        if index < blocks:
            forward.step(index, sums.add)
        else:
            forward.finish(sums.add)
        if progress is not None:
            progress(index + 1, blocks + 1)
        yield sums
