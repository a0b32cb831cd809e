"""The commands that talk to registries."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantmill import terminal
from quantmill.arguments import (
    InsecureOption,
    JsonOption,
    NameArgument,
    QuietOption,
    StoreOption,
)

if TYPE_CHECKING:
    from quantmill.moving import Moving
    from quantmill.store import Store


def _store(path: Path | None) -> Store:
    from quantmill.store import Store

    return Store(path)


def _label(verb: str, event: Moving) -> str:
    return f"{verb} {event.digest.short}, {event.blobs}/{event.blobs_total} blobs"


def pull(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    insecure: InsecureOption = False,
    store: StoreOption = None,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Fetch a model from a registry; what the store holds already is not fetched again."""
    from quantmill import pulling, report

    started = time.monotonic()
    with terminal.progress(not quiet and not json_output) as bar:
        done = pulling.pull(
            name,
            store=_store(store),
            insecure=insecure,
            progress=bar and (lambda e: bar(e.bytes, e.bytes_total, _label("fetching", e))),
        )
    if json_output:
        terminal.print_json(report.pulled_json(done))
    elif not quiet:
        terminal.print_lines(report.pulled_lines(done, time.monotonic() - started))


def push(
    name: NameArgument,
    target: Annotated[
        str | None, typer.Argument(metavar="[AS]", help="Name in the registry, if another.")
    ] = None,
    insecure: InsecureOption = False,
    store: StoreOption = None,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Send a model to a registry; what the registry holds already is not sent again."""
    from quantmill import pushing, report

    started = time.monotonic()
    with terminal.progress(not quiet and not json_output) as bar:
        done = pushing.push(
            name,
            target,
            store=_store(store),
            insecure=insecure,
            progress=bar and (lambda e: bar(e.bytes, e.bytes_total, _label("sending", e))),
        )
    if json_output:
        terminal.print_json(report.pushed_json(done))
    elif not quiet:
        terminal.print_lines(report.pushed_lines(done, time.monotonic() - started))
