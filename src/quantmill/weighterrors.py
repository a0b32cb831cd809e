"""How far the weights of a model are from those of a reference: one error for each weight.

Nothing is run: it works for any model, and says less than a comparison of what models answer. Sums
are those of float64 over fixed runs of float32 numbers, added exactly, so that pieces, threads and
processors do not change them; memory does not grow with the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantmill.errors import NotFound
from quantmill.names import ModelName
from quantmill.openweights import OpenWeights, SourceWeights, StoredWeights, open_weights
from quantmill.origins import origin_of
from quantmill.store import Store

RUN_ELEMENTS = 1 << 16
"""Numbers that are summed at once: few enough for a processor's cache."""


@dataclass(frozen=True, slots=True)
class WeightError:
    """Sums over a weight ŵ and its reference w, of the same shape.

    `squared_error` is sum((w - ŵ)²), `squared_norm` sum(w²), `largest` the largest |w - ŵ|.
    `identical` means that all numbers have the same bits; of weights that were not read, since
    their bytes are the same, the sums are 0. NaN and infinities make sums NaN. `floats` is False
    for integers and F64, which are no weights.
    """

    weights: int
    squared_error: float
    squared_norm: float
    product: float
    own_squared_norm: float
    largest: float
    identical: bool
    floats: bool = True

    @property
    def relative(self) -> float | None:
        """sum((w - ŵ)²) / sum(w²), the normalised squared error; None where it has no value.

        One over it is the signal-to-noise ratio of the quantizer.
        """
        if self.identical:
            return 0.0
        return _quotient(self.squared_error, self.squared_norm)

    @property
    def cosine(self) -> float | None:
        """sum(w·ŵ) / sqrt(sum(w²)·sum(ŵ²)); None where one of them is zero or not finite."""
        if self.identical:
            return 1.0
        norms = math.sqrt(self.squared_norm) * math.sqrt(self.own_squared_norm)
        found = _quotient(self.product, norms)
        return None if found is None else max(-1.0, min(1.0, found))


@dataclass(frozen=True, slots=True)
class Compared:
    """A weight of both sides. `error` is None where the shapes differ or one has no numbers.

    `same_bytes` tells that both lie in the same place of the same blob, which was not read.
    """

    name: str
    error: WeightError | None
    same_bytes: bool = False


@dataclass(frozen=True, slots=True)
class WeightErrors:
    """All weights by name: of both sides, of the model alone, of the reference alone."""

    model: str
    reference: str
    compared: tuple[Compared, ...]
    only_model: tuple[str, ...]
    only_reference: tuple[str, ...]

    @property
    def relative(self) -> float | None:
        """The relative squared error of all weights that were read, taken together."""
        errors = (one.error for one in self.compared)
        found = [error for error in errors if error is not None and error.floats]
        if all(error.identical for error in found):
            return 0.0 if found else None
        return _quotient(
            math.fsum(error.squared_error for error in found),
            math.fsum(error.squared_norm for error in found),
        )


def weight_errors(
    model: OpenWeights | str | Path | ModelName,
    reference: OpenWeights | str | Path | ModelName | None = None,
    *,
    store: Store | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> WeightErrors:
    """The error of every weight of a model against a reference.

    Each may be open already, or the name of a stored model, a checkpoint directory, a GGUF file.
    Without a reference a stored model is compared with what it was made from, as noted of it.
    Weights in the same blobs are known to be equal and not read. `progress` is
    told of bytes of the model done, of all, and of a name. Raises what `open_weights` raises,
    and NotFound where no reference is given and none is known or there any more.
    """
    with ExitStack() as stack:
        own = _opened(model, store, stack)
        other = _opened(reference if reference is not None else _source(own, store), store, stack)
        names = [name for name in sorted(own.facts) if name in other.facts]
        total = sum(own.facts[name].nbytes for name in names)
        compared, done = [], 0
        for name in names:
            if progress:
                progress(done, total, name)
            compared.append(compare(own, other, name))
            done += own.facts[name].nbytes
        return WeightErrors(
            own.where, other.where, tuple(compared),
            tuple(sorted(own.facts.keys() - other.facts)),
            tuple(sorted(other.facts.keys() - own.facts)),
        )  # fmt: skip


def _opened(
    one: OpenWeights | str | Path | ModelName, store: Store | None, stack: ExitStack
) -> OpenWeights:
    if isinstance(one, (str, Path, ModelName)):
        return stack.enter_context(open_weights(one, store))
    return one


def _source(model: OpenWeights, store: Store | None) -> OpenWeights:
    """What a stored model was made from."""
    if not isinstance(model, StoredWeights):
        raise NotFound(f"{model.where} is no stored model", hint="name a reference")
    origin = origin_of(store or Store(), model.manifest)
    if origin.recipe is None:
        raise NotFound(f"{model.where}: {origin.problem}", hint="name a reference")
    return SourceWeights(origin.recipe, store or Store())


def compare(model: OpenWeights, reference: OpenWeights, name: str) -> Compared:
    """One weight that both have; nothing is read where both lie in the same blobs."""
    facts, other = model.facts[name], reference.facts[name]
    place = model.identity(name)
    if place is not None and place == reference.identity(name):
        count = math.prod(facts.shape)
        return Compared(name, WeightError(count, 0.0, 0.0, 0.0, 0.0, 0.0, True), True)
    if facts.shape != other.shape:
        return Compared(name, None)
    pieces, others = model.pieces(name), reference.pieces(name)
    if pieces is None or others is None:
        return Compared(name, None)
    return Compared(name, error_of(pieces, others))


def error_of(
    pieces: Iterator[npt.NDArray[Any]], reference: Iterator[npt.NDArray[Any]]
) -> WeightError:
    """The error of numbers that come in pieces of any sizes, as many of them on both sides."""
    count, largest, identical, floats = 0, 0.0, True, True
    sums: list[tuple[float, float, float, float]] = []
    with np.errstate(all="ignore"):  # NaN and infinities are told in the result
        for ours, theirs in zip(_runs(pieces), _runs(reference), strict=True):
            assert ours.size == theirs.size
            count += ours.size
            identical = identical and _same_bits(ours, theirs)
            floats = floats and ours.dtype == theirs.dtype == np.float32
            own, other = ours.astype(np.float64), theirs.astype(np.float64)
            apart = other - own
            largest = max(largest, float(np.max(np.abs(apart), initial=0.0)), key=_nan_last)
            sums.append(
                (_sum(apart * apart), _sum(other * other), _sum(other * own), _sum(own * own))
            )
    error, norm, product, own_norm = (_total([part[at] for part in sums]) for at in range(4))
    return WeightError(count, error, norm, product, own_norm, largest, identical, floats)


def _same_bits(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    if one.dtype != other.dtype:
        return False
    bits = np.uint32 if one.dtype == np.float32 else np.uint64
    return bool(np.array_equal(one.view(bits), other.view(bits)))


def _nan_last(value: float) -> tuple[bool, float]:
    """Orders NaN above every number."""
    return math.isnan(value), value


def _sum(values: npt.NDArray[np.float64]) -> float:
    return float(np.add.reduce(values))


def _total(values: list[float]) -> float:
    """The exact sum, rounded once; NaN where it, or one of the values, is not finite."""
    try:
        return math.fsum(values) if all(map(math.isfinite, values)) else math.nan
    except OverflowError:
        return math.nan


def _quotient(value: float, by: float) -> float | None:
    if not (math.isfinite(value) and math.isfinite(by)) or not by:
        return None
    return value / by


def _runs(pieces: Iterator[npt.NDArray[Any]]) -> Iterator[npt.NDArray[Any]]:
    """The same numbers in runs of RUN_ELEMENTS, the last one shorter."""
    kept: list[npt.NDArray[Any]] = []
    held = 0
    for piece in pieces:
        start = 0
        if held:
            start = min(piece.size, RUN_ELEMENTS - held)
            kept.append(piece[:start].copy())
            held += start
            if held < RUN_ELEMENTS:
                continue
            yield np.concatenate(kept)
            kept, held = [], 0
        whole = start + (piece.size - start) // RUN_ELEMENTS * RUN_ELEMENTS
        for first in range(start, whole, RUN_ELEMENTS):
            yield piece[first : first + RUN_ELEMENTS]
        if whole < piece.size:
            kept, held = [piece[whole:].copy()], piece.size - whole
    if held:
        yield np.concatenate(kept)
