"""The data of `report` as JSON values (docs/cli.md), and what of an evaluation can be shown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from quantmill.diffreport import error_json
from quantmill.report import share_json

if TYPE_CHECKING:
    from quantmill.modelreport import KindTotal, ReportModel, ReportTensor

_MAX_NUMBERS = 60
_MAX_COLUMNS = 400


def report_json(models: Sequence[ReportModel]) -> dict[str, Any]:
    """Everything on the page."""
    from quantmill.version import __version__

    return {"quantmill": __version__, "models": [_model_json(model) for model in models]}


def _model_json(model: ReportModel) -> dict[str, Any]:
    facts, origin = model.facts, model.origin
    return {
        "name": facts.name.display,
        "digest": f"sha256:{facts.digest}",
        "size": facts.size,
        "modified": facts.modified.isoformat(timespec="seconds"),
        "format": facts.format or None,
        "weights": facts.weights,
        "bits_per_weight": round(facts.bits_per_weight, 4),
        "info": dict(facts.info),
        "recorded": dict(facts.recorded),
        "source": origin.source,
        "options": list(origin.options),
        "policy": origin.plan.policy if origin.plan else None,
        "undecided": origin.problem,
        "reference": model.reference,
        "unmeasured": model.unmeasured,
        "relative_error": model.relative,
        "formats": [share_json(share) for share in facts.shares],
        "kinds": [_kind_json(kind) for kind in model.kinds],
        "tensors": [_tensor_json(tensor) for tensor in model.tensors],
        "only_reference": list(model.only_reference),
        "evaluation": model.evaluation,
    }


def _kind_json(kind: KindTotal) -> dict[str, Any]:
    return {
        "kind": kind.kind,
        "tensors": kind.tensors,
        "weights": kind.weights,
        "bytes": kind.nbytes,
        "relative_error": kind.relative,
    }


def _tensor_json(tensor: ReportTensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "layer": tensor.place.layer,
        "kind": tensor.place.kind,
        "format": tensor.label,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "bytes": tensor.nbytes,
        "bits_per_weight": round(tensor.bits_per_weight, 4),
        "rule": tensor.rule,
        "reason": tensor.reason,
        "error": error_json(tensor.error),
    }


# -- evaluations -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many tokens have a divergence between each edge and the next."""

    edges: tuple[float, ...]
    counts: tuple[float, ...]


def histogram_of(evaluation: Mapping[str, Any]) -> Histogram | None:
    """The field `kl_histogram: {edges, counts}`; None where it is absent or makes no sense."""
    said = evaluation.get("kl_histogram")
    if not isinstance(said, dict):
        return None
    edges, counts = said.get("edges"), said.get("counts")
    if not (isinstance(edges, list) and isinstance(counts, list)):
        return None
    if not 1 <= len(counts) <= _MAX_COLUMNS or len(edges) != len(counts) + 1:
        return None
    if not all(map(_is_number, [*edges, *counts])) or min(counts) < 0:
        return None
    if any(one >= other for one, other in pairwise(edges)):
        return None
    return Histogram(tuple(map(float, edges)), tuple(map(float, counts)))


def numbers_of(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of an evaluation by their names for people; those of objects within it as well."""
    found = {}
    for path, value in _flat(evaluation, ()):
        found[" ".join(path).replace("_", " ")] = value
        if len(found) == _MAX_NUMBERS:
            break
    return found


def _flat(
    document: Mapping[str, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], float]]:
    for key, value in document.items():
        if key == "kl_histogram":
            continue
        if isinstance(value, dict) and len(path) < 2:
            yield from _flat(value, (*path, str(key)))
        elif _is_number(value):
            yield (*path, str(key)), value


def _is_number(value: object) -> bool:
    return type(value) in {int, float} and math.isfinite(float(str(value)))
