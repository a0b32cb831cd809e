"""Heat maps of a model's tensors: layers down, kinds across, as tables whose cells have colours.

A cell carries both numbers, its place on the scale of bits and on that of errors; the page's style
chooses between them, with no script.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantmill.diffreport import error_text
from quantmill.markup import NOTHING, Child, Markup, breakable, element
from quantmill.report import bytes_text, plural, shape_text

if TYPE_CHECKING:
    from quantmill.modelreport import ReportTensor

_FEWEST_BITS, _MOST_BITS = 2.0, 32.0


@dataclass(frozen=True, slots=True)
class Scale:
    """A logarithmic scale of errors: the smallest that is not 0, and the largest."""

    low: float
    high: float

    def share(self, error: float) -> float:
        """Where an error lies, from 0.08 to 1; 0 for none at all."""
        if error <= 0:
            return 0.0
        if self.high <= self.low:
            return 1.0
        share = math.log(max(error, self.low) / self.low) / math.log(self.high / self.low)
        return 0.08 + 0.92 * min(1.0, share)


def bits_share(bits: float) -> float:
    """Where a number of bits lies between 2 and 32, in powers of two: the same in every report."""
    if bits <= _FEWEST_BITS:
        return 0.0
    return min(1.0, math.log2(bits / _FEWEST_BITS) / math.log2(_MOST_BITS / _FEWEST_BITS))


def error_scale(tensors: Iterable[ReportTensor]) -> Scale | None:
    """The scale of all errors, None where nothing was measured."""
    errors = [tensor.error.relative for tensor in tensors if tensor.error is not None]
    found = [error for error in errors if error]
    if not found:
        return Scale(1.0, 1.0) if 0.0 in errors else None
    return Scale(min(found), max(found))


def legends(scale: Scale | None) -> list[Markup]:
    """What the colours mean."""
    found = [_legend("of-bits", "2 bits", "32 bits per weight")]
    if scale is not None:
        ends = f"{error_text(scale.low)}", f"{error_text(scale.high)} relative error"
        found.append(_legend("of-error", *ends))
    return found


def _legend(class_: str, low: str, high: str) -> Markup:
    ramp = element("i", aria_hidden="true")
    return element(
        "p", element("span", low), ramp, element("span", high), class_=f"legend {class_}"
    )


def heat_maps(tensors: Sequence[ReportTensor], scale: Scale | None) -> Iterator[tuple[str, Markup]]:
    """A table for each series of layers, most weights first, and one for what is in none."""
    series: dict[str, list[ReportTensor]] = defaultdict(list)
    for tensor in tensors:
        series[tensor.place.series].append(tensor)
    for name, found in sorted(
        series.items(), key=lambda item: (not item[0], -sum(t.weights for t in item[1]))
    ):
        yield name, _outside(found, scale) if not name else _table(name, found, scale)


def _table(series: str, tensors: Sequence[ReportTensor], scale: Scale | None) -> Markup:
    cells: dict[tuple[int, str], list[ReportTensor]] = defaultdict(list)
    for tensor in tensors:
        cells[tensor.place.layer or 0, tensor.place.part].append(tensor)
    layers = sorted({layer for layer, _ in cells})
    # matrices first: what is small is of less interest
    flat = {part: all(len(t.shape) < 2 for (_, p), found in cells.items() if p == part
                      for t in found) for _, part in cells}  # fmt: skip
    parts = sorted(flat, key=lambda part: (flat[part], part))
    caption = element("caption", f"{series}: {plural(len(layers), 'layer')}")
    head = [element("th", "Layer", scope="col")]
    head += [element("th", breakable(part), scope="col") for part in parts]
    body = [
        element(
            "tr",
            element("th", layer, scope="row"),
            [_cell(cells.get((layer, part), []), scale) for part in parts],
        )
        for layer in layers
    ]
    return element(
        "table", caption, element("thead", element("tr", head)), element("tbody", body),
        class_="map",
    )  # fmt: skip


def _outside(tensors: Sequence[ReportTensor], scale: Scale | None) -> Markup:
    tensors = sorted(tensors, key=lambda t: -t.nbytes)
    head = [element("th", scope="col")]
    head += [element("th", breakable(t.place.part), scope="col") for t in tensors]
    row = element("tr", element("th", scope="row"), [_cell([t], scale) for t in tensors])
    return element(
        "table", element("caption", "Outside the layers"),
        element("thead", element("tr", head)), element("tbody", row), class_="map",
    )  # fmt: skip


def _cell(tensors: Sequence[ReportTensor], scale: Scale | None) -> Markup:
    from quantmill.modelreport import together

    if not tensors:
        return element("td", class_="none", aria_label="no such tensor")
    weights = sum(t.weights for t in tensors)
    bits = 8 * sum(t.nbytes for t in tensors) / weights if weights else 0.0
    error = together(t.error for t in tensors) if scale else None
    style = f"--b:{bits_share(bits):.3g}"
    texts: list[Child] = [element("span", f"{bits:.3g}", class_="of-bits")]
    if scale is not None:
        style += "" if error is None else f";--e:{scale.share(error):.3g}"
        texts.append(element("span", _short(error), class_="of-error"))
    unknown = " unknown" if scale is not None and error is None else ""
    return element("td", texts, class_=f"heat{unknown}", style=style, title=_told(tensors, error))


def _short(error: float | None) -> str:
    if error is None:
        return NOTHING
    return f"{error:.1e}".replace("e-0", "e-") if error else "0"


def _told(tensors: Sequence[ReportTensor], error: float | None) -> str:
    """Everything about a cell in words."""
    first = tensors[0]
    name = first.name if len(tensors) == 1 else f"{first.name} and {len(tensors) - 1} more"
    weights, nbytes = sum(t.weights for t in tensors), sum(t.nbytes for t in tensors)
    labels = ", ".join(dict.fromkeys(t.label for t in tensors))
    parts = [
        labels, shape_text(first.shape) if len(tensors) == 1 else f"{weights:,} weights",
        bytes_text(nbytes), f"{8 * nbytes / weights if weights else 0:.3f} bits per weight",
    ]  # fmt: skip
    if error is not None:
        parts.append(f"relative error {error_text(error)}")
    if len(tensors) == 1 and first.reason:
        parts.append(first.reason)
    return f"{name}: {', '.join(parts)}"
