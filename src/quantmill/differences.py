"""What differs between two models or sources: tensors, their content, and the files beside them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from quantmill.names import ModelName
from quantmill.openweights import WeightFacts, open_weights
from quantmill.store import Store
from quantmill.weighterrors import WeightError, WeightErrors, weight_errors

ADDED, REMOVED, CHANGED, EQUAL = "added", "removed", "changed", "equal"


@dataclass(frozen=True, slots=True)
class WeightDifference:
    """One weight: `before` in A, `after` in B, None where it is not there.

    `error` is that of B against A; None for a weight of one side, for shapes that differ, and for
    elements that stand for no numbers.
    """

    name: str
    before: WeightFacts | None
    after: WeightFacts | None
    error: WeightError | None
    same_bytes: bool = False

    @property
    def status(self) -> str:
        """ADDED, REMOVED, CHANGED or EQUAL: the same facts, and the same bits of every number."""
        if self.before is None:
            return ADDED
        if self.after is None:
            return REMOVED
        same = self.same_bytes or (self.error is not None and self.error.identical)
        return EQUAL if same and self.before == self.after else CHANGED

    @property
    def changes(self) -> tuple[str, ...]:
        """Which of `format`, `dtype`, `shape`, `bytes` and `content` differ, where both have it."""
        if self.before is None or self.after is None or self.status == EQUAL:
            return ()
        pairs = {
            "format": (self.before.label, self.after.label),
            "dtype": (self.before.dtype, self.after.dtype),
            "shape": (self.before.shape, self.after.shape),
            "bytes": (self.before.nbytes, self.after.nbytes),
        }
        found = [what for what, (one, other) in pairs.items() if one != other]
        same = self.same_bytes or (self.error is not None and self.error.identical)
        return (*found, *(() if same else ("content",)))


@dataclass(frozen=True, slots=True)
class FileDifference:
    """A file beside the weights, or what the manifest has instead, by digest; None: not there."""

    name: str
    before: str | None
    after: str | None

    @property
    def status(self) -> str:
        """ADDED, REMOVED, CHANGED or EQUAL."""
        if self.before is None:
            return ADDED
        if self.after is None:
            return REMOVED
        return EQUAL if self.before == self.after else CHANGED


@dataclass(frozen=True, slots=True)
class Differences:
    """Everything of A and B, in name order."""

    a: str
    b: str
    weights: tuple[WeightDifference, ...]
    files: tuple[FileDifference, ...]
    relative: float | None

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        states = [*(one.status for one in self.weights), *(one.status for one in self.files)]
        return all(state == EQUAL for state in states)


def diff(
    a: str | Path | ModelName,
    b: str | Path | ModelName,
    *,
    store: Store | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Differences:
    """Compare two stored models, checkpoint directories, GGUF files or repositories on the hub.

    Tensors in the same blobs are equal and not read; all others are read as numbers, a piece at a
    time. Of a source the names and numbers are those that `create` would store without a format.
    Raises what `open_weights` raises.
    """
    with ExitStack() as stack:
        one, other = (stack.enter_context(open_weights(what, store)) for what in (a, b))
        # errors of B, with A for the reference
        errors = weight_errors(other, one, progress=progress)
        weights = _weights(dict(one.facts), dict(other.facts), errors)
        files = [
            FileDifference(name, one.files.get(name), other.files.get(name))
            for name in sorted({*one.files, *other.files})
        ]
        return Differences(one.where, other.where, weights, tuple(files), errors.relative)


def _weights(
    before: dict[str, WeightFacts], after: dict[str, WeightFacts], errors: WeightErrors
) -> tuple[WeightDifference, ...]:
    compared = {one.name: one for one in errors.compared}
    found = []
    for name in sorted({*before, *after}):
        one = compared.get(name)
        error, same = (one.error, one.same_bytes) if one else (None, False)
        found.append(WeightDifference(name, before.get(name), after.get(name), error, same))
    return tuple(found)
