"""The report as one HTML page that needs nothing else: no network, no script for what it says.

Style and script are files beside this one. Texts of models are hostile: markup.py escapes them, and
the page's policy lets no other script run, loads nothing, and sends nothing.
"""

from __future__ import annotations

import math
from base64 import b64encode
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from hashlib import sha256
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

from quantmill.diffreport import error_text
from quantmill.heatmap import Scale, bits_share, error_scale, heat_maps, legends
from quantmill.markup import NOTHING, Child, Markup, breakable, element, embedded_json, joined
from quantmill.report import bytes_text, plural, shape_text
from quantmill.reportdata import histogram_of, numbers_of, report_json

if TYPE_CHECKING:
    from quantmill.facts import FormatShare
    from quantmill.modelreport import KindTotal, ReportModel, ReportTensor
    from quantmill.reportdata import Histogram

_SHOWN_ERRORS = 12

_row, _cell, _head = partial(element, "tr"), partial(element, "td"), partial(element, "th")


def report_page(models: Sequence[ReportModel]) -> bytes:
    """The page in UTF-8; the same bytes for the same models."""
    names = [model.facts.name.display for model in models]
    script = _file("js")
    allowed = b64encode(sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{allowed}'; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'none'"
    )
    page = Template(_file("html")).substitute(
        policy=policy,
        title=joined(f"{', '.join(names)} - quantmill report"),
        style=_file("css"),
        body=_body(models, names),
        data=embedded_json(report_json(models)),
        script=script,
    )
    # a name may hold half a surrogate pair, which UTF-8 cannot
    return page.encode("utf-8", "backslashreplace")


def _file(suffix: str) -> str:
    return (files("quantmill") / f"reportpage.{suffix}").read_text(encoding="utf-8")


def _body(models: Sequence[ReportModel], names: Sequence[str]) -> Markup:
    evaluated = any(model.evaluation for model in models)
    sections: dict[str, tuple[str, Child]] = {
        "summary": ("Summary", _summary(models)),
        "map": ("Layers", _maps(models)),
        "sizes": ("Size by kind", _sizes(models)),
        "errors": ("Weight errors", _side(models, partial(_errors, largest=_largest(models)))),
        "decisions": ("Decisions", _side(models, _decisions)),
        "evaluation": ("Evaluation", _evaluations(models) if evaluated else _not_evaluated()),
        "tensors": ("All tensors", [_tensors(model) for model in models]),
    }
    from quantmill.version import __version__

    links = [element("a", title, href=f"#{key}") for key, (title, _) in sections.items()]
    navigation = element("nav", links, aria_label="Page")
    return Markup(
        element("header", element("h1", " · ".join(names)), navigation)
        + element(
            "main",
            [
                element("section", element("h2", title, id=f"{key}-title"), content, id=key,
                        aria_labelledby=f"{key}-title")
                for key, (title, content) in sections.items()
            ],
        )
        + element("footer", element("span", f"quantmill {__version__}"))
    )  # fmt: skip


def _scroll(content: Child, label: str, class_: str = "scroll") -> Markup:
    """What may be wider than the page; the keyboard can scroll it."""
    return element("div", content, class_=class_, tabindex=0, role="region", aria_label=label)


def _side(models: Sequence[ReportModel], show: Callable[[ReportModel], Child]) -> Markup:
    several = len(models) > 1
    return element(
        "div",
        [
            element(
                "div", element("h3", model.facts.name.display) if several else None, show(model)
            )
            for model in models
        ],
        class_="side",
    )


# -- summary ---------------------------------------------------------------------------------------


def _summary(models: Sequence[ReportModel]) -> list[Markup]:
    rows: dict[str, list[Child]] = defaultdict(lambda: [None] * len(models))
    for at, model in enumerate(models):
        for label, text in _facts(model).items():
            rows[label][at] = text
    head = _row(element("td"), [_head(m.facts.name.display, scope="col") for m in models])
    body = [
        _row(_head(label, scope="row"), [_cell(text if text else NOTHING) for text in texts])
        for label, texts in rows.items()
        if any(texts)
    ]
    return [
        _scroll(
            element("table", element("thead", head), element("tbody", body), class_="facts"),
            "Summary",
        ),
        element("h3", "Share of the bytes"),
        _side(models, _shares),
    ]


def _facts(model: ReportModel) -> dict[str, Child]:
    facts, origin = model.facts, model.origin
    half = 2 * sum(t.weights for t in model.tensors)
    stored = sum(t.nbytes for t in model.tensors)
    smaller = f", {half / stored:.2f} times smaller than 16 bits" if 0 < stored < half else ""
    return {
        "Size": f"{bytes_text(facts.size)} ({facts.size:,} bytes)",
        "Weights": f"{facts.weights:,}",
        "Bits per weight": f"{facts.bits_per_weight:.2f}{smaller}",
        "Format": facts.format or "source precision",
        "Architecture": str(facts.info.get("general.architecture") or facts.info.get("architecture")
                            or ""),
        "Made from": origin.source and element("span", breakable(origin.source), class_="name"),
        "Options": origin.options and element("code", " ".join(origin.options)),
        "Policy": origin.plan.policy if origin.plan else None,
        "Recorded": ", ".join(f"{key} {value}" for key, value in facts.recorded.items()),
        "Compared with": "what it was made from"
        if model.reference and model.reference == origin.source
        else model.reference and element("span", breakable(model.reference), class_="name"),
        "Relative error": error_text(model.relative) if model.relative is not None else None,
        "Manifest": element("code", f"sha256:{facts.digest}"),
        "Modified": f"{facts.modified:%Y-%m-%d %H:%M} UTC",
    }  # fmt: skip


def _shares(model: ReportModel) -> list[Markup]:
    shares = model.facts.shares
    total = sum(share.nbytes for share in shares) or 1
    bar = [
        element("span", style=_numbers(w=share.nbytes / total, b=_share_bits(share)))
        for share in shares
    ]
    rows = [
        _row(
            _head(element("span", class_="swatch", style=_numbers(b=_share_bits(share))),
                  share.label, scope="row"),
            _cell(plural(share.tensors, "tensor"), class_="number"),
            _cell(f"{share.weights:,} weights", class_="number"),
            _cell(bytes_text(share.nbytes), class_="number"),
            _cell(f"{100 * share.nbytes / total:.1f} %", class_="number"),
        )
        for share in shares
    ]  # fmt: skip
    table = element("table", element("tbody", rows), class_="formats")
    return [
        element("div", bar, class_="shares", aria_hidden="true"),
        _scroll(table, f"Formats of {model.facts.name.display}"),
    ]


def _share_bits(share: FormatShare) -> float:
    return bits_share(8 * share.nbytes / share.weights if share.weights else 0)


def _numbers(**values: float) -> str:
    """Custom properties of an element's style."""
    return ";".join(f"--{key}:{value:.4g}" for key, value in values.items())


# -- the heat map ----------------------------------------------------------------------------------


def _maps(models: Sequence[ReportModel]) -> list[Child]:
    scale = error_scale(tensor for model in models for tensor in model.tensors)
    intro = element(
        "p",
        "A row for each layer, a column for each kind of tensor. Point at a cell, or move with the "
        "arrow keys, for its exact values; they are in the table at the end as well.",
        class_="muted",
    )
    choice = None
    if scale is not None:
        choice = element(
            "fieldset",
            element("legend", "Colour"),
            [
                element("label", element("input", type="radio", name="metric", id=f"metric-{key}",
                                         checked=key == "bits"), element("span", text))
                for key, text in (("bits", "Bits per weight"), ("error", "Relative error"))
            ],
            class_="switch",
        )  # fmt: skip
    return [intro, choice, legends(scale), _side(models, partial(_map_of, scale=scale))]


def _map_of(model: ReportModel, scale: Scale | None) -> list[Markup]:
    name = model.facts.name.display
    return [
        element(
            "figure",
            _scroll(table, f"{name}: {series or 'outside the layers'}"),
            element("p", class_="readout", aria_live="polite"),
        )
        for series, table in heat_maps(model.tensors, scale)
    ]


# -- sizes, errors, decisions ----------------------------------------------------------------------


def _sizes(models: Sequence[ReportModel]) -> Markup:
    kinds: dict[str, list[KindTotal | None]] = {}
    for at, model in enumerate(models):
        for kind in model.kinds:
            kinds.setdefault(kind.kind, [None] * len(models))[at] = kind
    largest = max((k.nbytes for found in kinds.values() for k in found if k), default=0) or 1
    several = len(models) > 1
    above = [_head(m.facts.name.display, colspan=3, scope="colgroup") for m in models]
    labels = [[_head("Size", scope="col"), _head("Tensors", scope="col", class_="number"),
               _head("Bits", scope="col", class_="number")] for _ in models]  # fmt: skip
    head = [
        _row(element("td"), above) if several else None,
        _row(_head("Kind", scope="col"), labels),
    ]
    body = [
        _row(_head(breakable(name), scope="row", class_="name"),
             [_size_cells(kind, largest) for kind in found])
        for name, found in kinds.items()
    ]  # fmt: skip
    table = element("table", element("thead", head), element("tbody", body), class_="kinds")
    return _scroll(table, "Size by kind")


def _size_cells(kind: KindTotal | None, largest: int) -> list[Markup]:
    if kind is None:
        return [_cell(NOTHING), _cell(class_="number"), _cell(class_="number")]
    bits = 8 * kind.nbytes / kind.weights if kind.weights else 0
    return [
        _cell(bytes_text(kind.nbytes), class_="bar", style=_numbers(w=kind.nbytes / largest)),
        _cell(kind.tensors, class_="number"),
        _cell(f"{bits:.2f}", class_="number"),
    ]


def _largest(models: Sequence[ReportModel]) -> float:
    """The largest relative error: bars of all models have one scale, to be compared by."""
    errors = (t.error.relative for model in models for t in model.tensors if t.error)
    return max((error for error in errors if error), default=1.0)


def _errors(model: ReportModel, largest: float) -> list[Child]:
    if model.unmeasured is not None:
        return [element("p", f"Not measured: {model.unmeasured}.", class_="note")]
    known = [t for t in model.tensors if t.error is not None and t.error.relative is not None]
    apart = sorted(
        (t for t in known if t.error and not t.error.identical),
        key=lambda t: -(t.error.relative or 0) if t.error else 0,
    )
    same, unknown = len(known) - len(apart), len(model.tensors) - len(known)
    told = f"Relative squared error, Σ(w-ŵ)² / Σw², against {model.reference}, the largest first. "
    told += f"{plural(same, 'tensor')} of {len(model.tensors)} equal it bit for bit."
    if unknown:
        told += f" {plural(unknown, 'tensor')} cannot be compared."
    if model.only_reference:
        told += f" {plural(len(model.only_reference), 'tensor')} of it are not in the model: "
        told += ", ".join(model.only_reference[:5]) + (
            "…" if len(model.only_reference) > 5 else "."
        )
    found: list[Child] = [element("p", told, class_="muted")]
    if apart:
        found.append(_error_table(apart[:_SHOWN_ERRORS], largest))
    if len(apart) > _SHOWN_ERRORS:
        more = _error_table(apart[_SHOWN_ERRORS:], largest)
        count = len(apart) - _SHOWN_ERRORS
        found.append(element("details", element("summary", f"{count} more"), more))
    return found


def _error_table(shown: Sequence[ReportTensor], largest: float) -> Markup:
    head = [_head("Tensor", scope="col"), _head("Format", scope="col"),
            _head("Relative error", scope="col")]  # fmt: skip
    rows = []
    for tensor in shown:
        relative = (tensor.error.relative if tensor.error else None) or 0
        rows.append(
            _row(
                _head(breakable(tensor.name), scope="row", class_="name"),
                _cell(tensor.label),
                _cell(error_text(relative), class_="bar", style=_numbers(w=relative / largest)),
            )
        )
    table = element("table", element("thead", _row(head)), element("tbody", rows), class_="errors")
    return _scroll(table, "Weight errors, the largest first")


def _decisions(model: ReportModel) -> list[Child]:
    origin = model.origin
    if origin.plan is None:
        why = f"Why each tensor has its format cannot be told: {origin.problem}."
        return [element("p", why, class_="note")]
    groups: dict[tuple[str, str], list[ReportTensor]] = defaultdict(list)
    for tensor in model.tensors:
        groups[tensor.label, tensor.reason or "not part of the plan"].append(tensor)
    rows = [
        _row(
            _head(label, scope="row"),
            _cell(reason),
            _cell(len(found), class_="number"),
            _cell(bytes_text(sum(t.nbytes for t in found)), class_="number"),
            _cell(_examples(found), class_="name"),
        )
        for (label, reason), found in sorted(
            groups.items(), key=lambda item: -sum(t.nbytes for t in item[1])
        )
    ]
    titles = ("Stored as", "Because", "Tensors", "Bytes", "Which")
    head = [_head(t, scope="col", class_="number" if t in {"Tensors", "Bytes"} else None)
            for t in titles]  # fmt: skip
    table = element("table", element("thead", _row(head)), element("tbody", rows), class_="reasons")
    told = f"Policy {origin.plan.policy}; the plan was made again from what the model was made of."
    return [element("p", told, class_="muted"), _scroll(table, "Decisions")]


def _examples(tensors: Iterable[ReportTensor]) -> Markup:
    kinds = list(dict.fromkeys(tensor.place.kind for tensor in tensors))
    more = f" and {plural(len(kinds) - 3, 'kind')} more" if len(kinds) > 3 else ""
    return Markup(element("span", breakable(", ".join(kinds[:3]))) + more)


# -- evaluation ------------------------------------------------------------------------------------


def _not_evaluated() -> Markup:
    return element(
        "p",
        "Not evaluated. A page with --eval FILE shows how far the model's answers are from those "
        "of its source: errors of weights do not say that.",
        class_="muted",
    )


def _evaluations(models: Sequence[ReportModel]) -> list[Child]:
    values = [numbers_of(model.evaluation or {}) for model in models]
    labels = list(dict.fromkeys(label for found in values for label in found))
    head = _row(element("td"), [_head(m.facts.name.display, scope="col") for m in models])
    rows = [
        _row(_head(label, scope="row"),
             [_cell(f"{found[label]:.6g}" if label in found else NOTHING) for found in values])
        for label in labels
    ]  # fmt: skip
    table = element("table", element("thead", head), element("tbody", rows), class_="facts")
    return [_scroll(table, "Evaluation"), _side(models, _histogram)]


def _histogram(model: ReportModel) -> Markup | None:
    if model.evaluation is None:
        return element("p", "Not evaluated.", class_="muted")
    found = histogram_of(model.evaluation)
    if found is None:
        return element("p", "The evaluation has no histogram.", class_="muted")
    caption = "KL divergence from the reference, per token"
    return element("figure", element("figcaption", caption), _columns(found))


def _columns(histogram: Histogram) -> Markup:
    """Columns of one width: edges are as the evaluation chose them, often ever farther apart."""
    width, height, base = 640, 200, 168
    count, most = len(histogram.counts), max(histogram.counts) or 1
    step = width / count
    every = math.ceil(count / 6)
    shapes = []
    for at, value in enumerate(histogram.counts):
        tall = (base - 12) * value / most
        told = f"{histogram.edges[at]:.3g} to {histogram.edges[at + 1]:.3g}: {value:,.6g}"
        shapes.append(
            element("rect", element("title", told), class_="column", x=f"{at * step + 1:.2f}",
                    y=f"{base - tall:.2f}", width=f"{max(1.0, step - 2):.2f}", height=f"{tall:.2f}")
        )  # fmt: skip
        if at % every == 0:
            text = f"{histogram.edges[at]:.2g}"
            shapes.append(element("text", text, x=f"{at * step:.2f}", y=base + 18))
    axis = element("line", class_="axis", x1=0, x2=width, y1=base, y2=base)
    label = (
        f"Histogram of {count} columns, from {histogram.edges[0]:.3g} to {histogram.edges[-1]:.3g}"
    )
    return element("svg", shapes, axis, viewBox=f"0 0 {width} {height}", role="img",
                   aria_label=label)  # fmt: skip


# -- all tensors -----------------------------------------------------------------------------------

_COLUMNS = ("Tensor", "Format", "Shape", "Bytes", "Bits per weight", "Relative error",
            "Largest error", "Cosine", "Why")  # fmt: skip
_TEXTS = {"Tensor", "Format", "Shape", "Why"}


def _tensors(model: ReportModel) -> Markup:
    head = [_head(c, scope="col", class_=None if c in _TEXTS else "number") for c in _COLUMNS]
    rows = [_tensor_row(tensor) for tensor in model.tensors]
    table = element("table", element("thead", _row(head)), element("tbody", rows), class_="every")
    name = model.facts.name.display
    summary = element("summary", f"{plural(len(rows), 'tensor')} of {name}")
    return element("details", summary, _scroll(table, f"Tensors of {name}", "scroll tall"))


def _tensor_row(tensor: ReportTensor) -> Markup:
    error = tensor.error
    largest = error.largest if error and math.isfinite(error.largest) else None
    cosine = error.cosine if error else None
    numbers = [
        (tensor.nbytes, f"{tensor.nbytes:,}"),
        (tensor.bits_per_weight, f"{tensor.bits_per_weight:.2f}"),
        (error.relative if error else None, error_text(error.relative if error else None)),
        (largest, error_text(largest)),
        (cosine, "-" if cosine is None else f"{cosine:.6f}"),
    ]
    return _row(
        _head(breakable(tensor.name), scope="row", class_="name", data_v=tensor.name),
        _cell(tensor.label, data_v=tensor.label),
        _cell(shape_text(tensor.shape), data_v=tensor.weights),
        [_cell(text, class_="number", data_v=-1 if v is None else v) for v, text in numbers],
        _cell(tensor.reason or NOTHING, data_v=tensor.reason or ""),
    )
