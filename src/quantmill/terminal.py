"""What the command line prints: lines, tables, JSON, a progress bar."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class ReaderGone(BaseException):
    """Whoever read stdout has seen enough."""


def print_lines(lines: Sequence[str]) -> None:
    """Lines on stdout; raises ReaderGone when nobody reads them."""
    print_part("\n".join(lines) + "\n")


def print_part(text: str) -> None:
    """Text that arrives in pieces; raises ReaderGone when nobody reads it."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        # what is still buffered must not be flushed into the closed pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ReaderGone from None


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    print_lines([json.dumps(document, indent=2)])


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns; the last one is not padded, so that nothing is cut or folded."""
    cells = [[c.upper() for c in columns], *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    print_lines(
        ["  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    )


def warn(lines: Sequence[str]) -> None:
    """Warnings on stderr, a line each."""
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)


@contextmanager
def progress(
    shown: bool, *, counted: str = "bytes"
) -> Iterator[Callable[[int, int, str], None] | None]:
    """A live bar on stderr: a label, bytes, rate, time left. Nothing where nobody looks.

    Gives a function of bytes done, bytes in all, and the label; with another word for what is
    `counted`, of steps, which have no rate.
    """
    if not shown or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    of_bytes: list[ProgressColumn] = [DownloadColumn(), TransferSpeedColumn()]
    of_steps: list[ProgressColumn] = [MofNCompleteColumn(), TextColumn(counted)]
    with Bar(
        TextColumn("{task.fields[label]}"),
        BarColumn(),
        *(of_bytes if counted == "bytes" else of_steps),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("", total=None, label="")

        def update(done: int, total: int, label: str) -> None:
            bar.update(task, total=total, completed=done, label=label)

        yield update


def lines_typed() -> Iterator[str]:
    """What the user types, line by line, until the end of input."""
    if sys.stdin.isatty():
        print("an empty line or Ctrl-D ends the conversation", file=sys.stderr)
    while True:
        try:
            line = input(">>> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if not line:
            return
        yield line
