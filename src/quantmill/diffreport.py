"""What `diff` found, as a JSON value (docs/cli.md) and as text lines."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from quantmill.report import Row, bytes_text, plural, shape_text

if TYPE_CHECKING:
    from collections.abc import Iterable

    from quantmill.differences import Differences, WeightDifference
    from quantmill.openweights import WeightFacts
    from quantmill.weighterrors import WeightError

_STATES = ("added", "removed", "changed", "equal")


def diff_json(found: Differences) -> dict[str, Any]:
    """The result of `diff`; tensors and files that are equal are counted and not listed."""
    return {
        "a": found.a,
        "b": found.b,
        "equal": found.equal,
        "relative_error": found.relative,
        "bytes": [_bytes(w.before for w in found.weights), _bytes(w.after for w in found.weights)],
        "counts": _counts(w.status for w in found.weights),
        "tensors": [_weight_json(w) for w in found.weights if w.status != "equal"],
        "file_counts": _counts(f.status for f in found.files),
        "files": [
            {"name": f.name, "status": f.status, "a": f.before, "b": f.after}
            for f in found.files
            if f.status != "equal"
        ],
    }


def _counts(states: Iterable[str]) -> dict[str, int]:
    counts = Counter(states)
    return {state: counts[state] for state in _STATES}


def _bytes(facts: Iterable[WeightFacts | None]) -> int:
    return sum(one.nbytes for one in facts if one)


def _weight_json(weight: WeightDifference) -> dict[str, Any]:
    return {
        "name": weight.name,
        "status": weight.status,
        "changes": list(weight.changes),
        "a": _facts_json(weight.before),
        "b": _facts_json(weight.after),
        "error": error_json(weight.error),
    }


def _facts_json(facts: WeightFacts | None) -> dict[str, Any] | None:
    if facts is None:
        return None
    return {
        "format": facts.label,
        "dtype": facts.dtype,
        "shape": list(facts.shape),
        "bytes": facts.nbytes,
    }


def error_json(error: WeightError | None) -> dict[str, Any] | None:
    """An error as numbers; null for those that have no value, as where weights are not finite."""
    if error is None:
        return None
    largest = error.largest
    return {
        "relative": error.relative,
        "largest": largest if abs(largest) < float("inf") else None,
        "cosine": error.cosine,
    }


DIFF_COLUMNS: Row = ("tensor", "what", "a", "b", "bytes a", "bytes b", "error", "largest", "cosine")


def diff_rows(found: Differences) -> list[Row]:
    """One row for each tensor that differs, as DIFF_COLUMNS names them."""
    return [_row(weight) for weight in found.weights if weight.status != "equal"]


def _row(weight: WeightDifference) -> Row:
    a, b = weight.before, weight.after
    shapes = a is not None and b is not None and a.shape != b.shape
    return (
        weight.name, weight.status,
        *(_side(one, shape=shapes or a is None or b is None) for one in (a, b)),
        *(bytes_text(one.nbytes) if one else "-" for one in (a, b)),
        *_error_cells(weight.error),
    )  # fmt: skip


def _side(facts: WeightFacts | None, *, shape: bool) -> str:
    if facts is None:
        return "-"
    return f"{facts.label} {shape_text(facts.shape)}" if shape else facts.label


def _error_cells(error: WeightError | None) -> tuple[str, str, str]:
    if error is None:
        return "-", "-", "-"
    cosine = "-" if error.cosine is None else f"{error.cosine:.6f}"
    return error_text(error.relative), error_text(error.largest), cosine


def error_text(value: float | None) -> str:
    """An error for people: three digits."""
    if value is None:
        return "-"
    return f"{value:#.3g}" if value else "0"


def diff_lines(found: Differences) -> list[str]:
    """Files that differ, and what it all comes to."""
    lines = [f"{f.status}: file {f.name}" for f in found.files if f.status != "equal"]
    if found.equal:
        count = plural(len(found.weights), "tensor")
        return [f"{found.a} and {found.b} are equal: {count}, {plural(len(found.files), 'file')}"]
    counts = _counts(w.status for w in found.weights)
    states = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
    before, after = (w.before for w in found.weights), (w.after for w in found.weights)
    size = f", {bytes_text(_bytes(before))} -> {bytes_text(_bytes(after))}"
    apart = "" if found.relative is None else f", relative error {error_text(found.relative)}"
    return [
        *lines,
        f"{found.a} -> {found.b}: {plural(len(found.weights), 'tensor')} ({states}){size}{apart}",
    ]
