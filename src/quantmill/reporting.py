"""The commands that compare and describe models: `diff` and `report`."""

from __future__ import annotations

from typing import Annotated

import typer

from quantmill import terminal
from quantmill.arguments import JsonOption, StoreOption, store_at

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
