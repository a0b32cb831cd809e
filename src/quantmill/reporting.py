"""The commands that compare and describe models: `diff` and `report`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from quantmill import terminal
from quantmill.arguments import (
    JsonOption,
    NamesArgument,
    StoreOption,
    parse_model_name,
    store_at,
)
from quantmill.errors import BadRequest

EXIT_DIFFERENT = 1


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A stored model, or a source.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The same.")],
    store: StoreOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show what differs between two models or sources: tensors, how far apart they are, files.

    Exit code 1 when anything differs.
    """
    from quantmill import differences, diffreport

    with terminal.progress(not json_output) as bar:
        found = differences.diff(
            a, b, store=store_at(store),
            progress=bar and (lambda done, total, name: bar(done, total, f"comparing {name}")),
        )  # fmt: skip
    if json_output:
        terminal.print_json(diffreport.diff_json(found))
    else:
        rows = diffreport.diff_rows(found)
        if rows:
            terminal.print_table(diffreport.DIFF_COLUMNS, rows)
            terminal.print_lines([""])
        terminal.print_lines(diffreport.diff_lines(found))
    if not found.equal:
        raise typer.Exit(EXIT_DIFFERENT)


_MAX_EVALUATION = 1 << 26


def report(
    names: NamesArgument,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="The page to write; - is stdout."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="SOURCE",
            help="What errors are measured against: a source or a stored model. Without it what "
            "each model was made from.",
        ),
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(
            "--eval", metavar="FILE", help="JSON of an evaluation to show; may be repeated."
        ),
    ] = None,
    store: StoreOption = None,
    json_output: JsonOption = False,
) -> None:
    """Write one page about models: sizes, formats, errors of all tensors, decisions, reasons."""
    if output is None and not json_output:
        raise BadRequest(
            "no page is named", hint="-o report.html writes it; --json prints the data"
        )
    if output == "-" and json_output:
        raise BadRequest("--json and -o - both print on stdout", hint="give one")
    from quantmill import modelreport

    models = [parse_model_name(name) for name in dict.fromkeys(names)]
    evaluations = [found for path in evaluation or () for found in _evaluations(path)]
    with terminal.progress(not json_output) as bar:
        described = modelreport.describe_models(
            store_at(store), models, against=against, evaluations=evaluations,
            progress=bar and (lambda done, total, name: bar(done, total, f"comparing {name}")),
        )  # fmt: skip
    if json_output:
        from quantmill.reportdata import report_json

        terminal.print_json(report_json(described))
    if output is not None:
        from quantmill.reportpage import report_page

        _write(output, report_page(described), quiet=json_output)


def _write(output: str, page: bytes, *, quiet: bool) -> None:
    if output == "-":
        terminal.print_part(page.decode("utf-8"))
        return
    from quantmill.report import bytes_text
    from quantmill.wholefile import write_whole

    write_whole(Path(output), page)
    if not quiet:
        print(f"wrote {output}, {bytes_text(len(page))}", file=sys.stderr)


def _evaluations(path: Path) -> Sequence[Mapping[str, Any]]:
    """The evaluations in a file: an object, or a list of them; raises BadRequest."""
    from quantmill.files import translated

    with translated(path), path.open("rb") as file:
        data = file.read(_MAX_EVALUATION + 1)
    try:
        whole = data if len(data) <= _MAX_EVALUATION else b""
        # what is no number in JSON must not become one in ours
        found = json.loads(whole, parse_constant=lambda _: None, parse_float=_finite)
    except (ValueError, RecursionError):
        found = None
    documents = found if isinstance(found, list) else [found]
    if not all(isinstance(one, dict) for one in documents):
        raise BadRequest(f"{path} is no JSON of an evaluation", hint="`eval --json` prints one")
    return documents


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None
