"""The command line: arguments to one library call, one report, one exit code."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from quantmill.errors import BadRequest, QuantmillError
from quantmill.version import __version__

if TYPE_CHECKING:
    from quantmill.execute import Progress
    from quantmill.names import ModelName
    from quantmill.plans import Options
    from quantmill.store import Store

EXIT_DAMAGE = 1
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

app = typer.Typer(
    name="quantmill",
    help="Turn open-weight checkpoints into small, fast models in a store that Ollama reads.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Rounding(StrEnum):
    """How mx exponents are rounded."""

    CEIL = "ceil"
    NEAREST = "nearest"


# -- options that several commands share -----------------------------------------------------------

_complete_dir: dict[str, Any] = {"file_okay": False, "dir_okay": True}


def _complete_name(incomplete: str) -> list[str]:
    """Names in the store, for shell completion."""
    from quantmill.store import Store

    names = [stored.name.display for stored in Store().list_names()]
    return [name for name in names if name.startswith(incomplete)]


def _complete_format(incomplete: str) -> list[str]:
    from quantmill.formats import FORMAT_NAMES

    return [name for name in FORMAT_NAMES if name.startswith(incomplete)]


StoreOption = Annotated[
    Path | None,
    typer.Option(
        "--store",
        help="Store directory. Else QUANTMILL_STORE, OLLAMA_MODELS, ~/.ollama/models.",
        **_complete_dir,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
QuantizeOption = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        "-q",
        metavar="FORMAT",
        help="int4, int8, nvfp4, mxfp4, mxfp8 or affine-2, -3, -5, -6. "
        "Without it weights keep their precision.",
        autocompletion=_complete_format,
    ),
]
GroupOption = Annotated[
    int | None,
    typer.Option("--group-size", metavar="N", help="Affine formats: weights per scale (64)."),
]
TensorOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tensor",
        metavar="PATTERN=FORMAT",
        help="Format of tensors whose name fits the pattern; `keep` means source precision. "
        "May be given more than once, the last fitting rule wins.",
    ),
]
RoundingOption = Annotated[
    Rounding, typer.Option("--e8m0", help="Rounding of mxfp4 and mxfp8 scale exponents.")
]
GlobalScaleOption = Annotated[
    bool, typer.Option("--global-scale", help="Give nvfp4 tensors a scale of their own as well.")
]
NonFiniteOption = Annotated[
    bool, typer.Option("--allow-non-finite", help="Quantize weights that hold NaN or infinity.")
]
LinksOption = Annotated[
    bool, typer.Option("--follow-links", help="Read links that lead out of the checkpoint.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", autocompletion=_complete_name)]


def _options(
    tensor: list[str] | None, e8m0: Rounding, global_scale: bool, allow_non_finite: bool
) -> Options:
    from quantmill.planner import parse_override
    from quantmill.plans import Options

    overrides = tuple(parse_override(text) for text in tensor or ())
    return Options(overrides, e8m0.value, global_scale, allow_non_finite)


def _store(path: Path | None) -> Store:
    from quantmill.store import Store

    return Store(path)


def _name(text: str) -> ModelName:
    from quantmill.names import parse_name

    return parse_name(text)


# -- output ----------------------------------------------------------------------------------------


class _ReaderGone(BaseException):
    """Whoever read stdout has seen enough."""


def _print_lines(lines: Sequence[str]) -> None:
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        # what is still buffered must not be flushed into the closed pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise _ReaderGone from None


def _print_json(document: Any) -> None:
    _print_lines([json.dumps(document, indent=2)])


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns; the last one is not padded, so that nothing is cut or folded."""
    cells = [[c.upper() for c in columns], *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    _print_lines(
        ["  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    )


def _warn(lines: Sequence[str]) -> None:
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)


@contextmanager
def _progress(shown: bool) -> Iterator[Callable[[Progress], None] | None]:
    """A live bar on stderr: tensors, bytes, rate, time left. Nothing where nobody looks."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    with Bar(
        TextColumn("{task.fields[tensors]}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task("", total=None, tensors="")

        def update(event: Progress) -> None:
            done = f"{event.tensors}/{event.tensors_total} tensors"
            bar.update(task, total=event.bytes_total, completed=event.bytes, tensors=done)

        yield update


# -- commands --------------------------------------------------------------------------------------


@app.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    source: Annotated[
        Path | None, typer.Argument(metavar="[SOURCE]", help="Checkpoint directory.")
    ] = None,
    quantize: QuantizeOption = None,
    group_size: GroupOption = None,
    tensor: TensorOption = None,
    modelfile: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="MODELFILE", help="Modelfile with FROM and more."),
    ] = None,
    e8m0: RoundingOption = Rounding.CEIL,
    global_scale: GlobalScaleOption = False,
    allow_non_finite: NonFiniteOption = False,
    follow_links: LinksOption = False,
    workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Threads; bytes do not depend on it.")
    ] = None,
    store: StoreOption = None,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Import a checkpoint directory under NAME, quantized on the way."""
    from quantmill import creation, report

    target = _name(name)
    options = _options(tensor, e8m0, global_scale, allow_non_finite)
    parsed, folder = creation.read_modelfile(modelfile) if modelfile else (None, source)
    if source is not None and parsed is not None and folder is not None:
        _refuse_two_sources(source, folder)
    if folder is None:
        raise BadRequest("no checkpoint given", hint="name its directory, or a Modelfile with -f")
    started = time.monotonic()
    with _progress(not quiet and not json_output) as progress:
        created = creation.create(
            target,
            folder,
            store=_store(store),
            quantize=quantize,
            group_size=group_size,
            options=options,
            modelfile=parsed,
            workers=workers,
            follow_links=follow_links,
            progress=progress,
        )
    ignored = [f"the Modelfile's {what} is ignored" for what in parsed.ignored] if parsed else []
    if not quiet:
        _warn([*ignored, *report.created_warnings(created)])
    if json_output:
        _print_json(
            report.created_json(created) | {"ignored": list(parsed.ignored if parsed else ())}
        )
    elif not quiet:
        _print_lines(report.created_lines(created, time.monotonic() - started))


def _refuse_two_sources(source: Path, folder: Path) -> None:
    if source.resolve() != folder.resolve():
        raise BadRequest(
            f"SOURCE is {source} but the Modelfile's FROM means {folder}", hint="give one of them"
        )


@app.command()
def plan(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Checkpoint directory.")],
    quantize: QuantizeOption = None,
    group_size: GroupOption = None,
    tensor: TensorOption = None,
    e8m0: RoundingOption = Rounding.CEIL,
    global_scale: GlobalScaleOption = False,
    allow_non_finite: NonFiniteOption = False,
    follow_links: LinksOption = False,
    store: StoreOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show what `create` would do with every tensor of SOURCE, and write nothing."""
    from quantmill import creation, report

    options = _options(tensor, e8m0, global_scale, allow_non_finite)
    planned = creation.plan(
        source,
        quantize=quantize,
        group_size=group_size,
        options=options,
        follow_links=follow_links,
    )
    free = _store(store).free_bytes()
    if json_output:
        _print_json(report.plan_json(planned, free))
        return
    _print_table(report.PLAN_COLUMNS, report.plan_rows(planned))
    _print_lines(["", *report.plan_summary(planned, free)])


def _list(store: StoreOption = None, json_output: JsonOption = False) -> None:
    """List the models in the store."""
    from quantmill import facts, report

    models = facts.list_models(_store(store))
    if json_output:
        _print_json(report.list_json(models))
        return
    _print_table(report.LIST_COLUMNS, report.list_rows(models))
    _warn([m.problem for m in models if m.problem])


app.command("list")(_list)
app.command("ls", hidden=True)(_list)


@app.command()
def show(
    name: NameArgument,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="Also every tensor: format, group size, shape, bytes.")
    ] = False,
    store: StoreOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show what a stored model is made of."""
    from quantmill import facts, report

    found = facts.show(_store(store), _name(name))
    if json_output:
        _print_json(report.show_json(found, tensors=tensors))
        return
    rows = report.show_rows(found)
    width = max(len(label) for label, _ in rows)
    _print_lines([f"{label.ljust(width)}  {text}" for label, text in rows])
    if tensors:
        _print_lines([""])
        _print_table(report.TENSOR_COLUMNS, report.tensor_rows(found))


@app.command()
def verify(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", autocompletion=_complete_name)
    ] = None,
    store: StoreOption = None,
    json_output: JsonOption = False,
) -> None:
    """Recompute every digest, header and relation of one model, or of the whole store.

    Exit code 1 when something is damaged.
    """
    from quantmill import report, verification

    names = None if name is None else [_name(name)]
    found = verification.verify(_store(store), names)
    if json_output:
        _print_json(report.verified_json(found))
    else:
        _print_lines(report.verified_lines(found))
    if found.damage:
        raise typer.Exit(EXIT_DAMAGE)


@app.command("cp")
def copy(
    source: NameArgument,
    target: Annotated[str, typer.Argument(metavar="NEW")],
    store: StoreOption = None,
    json_output: JsonOption = False,
) -> None:
    """Give a model a second name; no data is copied."""
    from quantmill import pruning

    old, new = _name(source), _name(target)
    pruning.copy(_store(store), old, new)
    if json_output:
        _print_json({"source": old.display, "target": new.display})
    else:
        _print_lines([f"copied {old.display} to {new.display}"])


@app.command("rm")
def remove(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", autocompletion=_complete_name)],
    store: StoreOption = None,
    json_output: JsonOption = False,
) -> None:
    """Remove models, and blobs that nothing else uses."""
    from quantmill import pruning, report

    removed = pruning.remove(_store(store), [_name(name) for name in names])
    if json_output:
        _print_json(report.removed_json(removed))
    else:
        _print_lines(report.removed_lines(removed))


@app.command()
def prune(
    older_than: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Spare younger files.")
    ] = 3600.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show, remove nothing.")] = False,
    store: StoreOption = None,
    json_output: JsonOption = False,
) -> None:
    """Remove blobs that no model names, and what interrupted commands left."""
    from quantmill import pruning, report

    act = pruning.plan_prune if dry_run else pruning.prune
    done = act(_store(store), older_than)
    if json_output:
        _print_json(report.prune_json(done, dry_run=dry_run))
    else:
        _print_lines(report.prune_lines(done, dry_run=dry_run))


def _version(wanted: bool) -> None:
    if wanted:
        _print_lines([f"quantmill {__version__}"])
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version


# -- exit codes ------------------------------------------------------------------------------------


class _Terminated(BaseException):
    """SIGTERM, made into an exception so that unfinished files are removed."""


def _terminate(*_: object) -> NoReturn:
    raise _Terminated


def main() -> None:
    """Entry point: run a command, turn errors into one line, a hint and an exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code; errors are printed, not raised."""
    as_json = "--json" in arguments
    try:
        result = app(list(arguments) or ["--help"], standalone_mode=False)
        sys.stdout.flush()
    except QuantmillError as error:
        _print_error(error, as_json=as_json)
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return _stopped("interrupted", EXIT_INTERRUPTED, as_json=as_json)
    except typer.TyperException as error:
        hint = "quantmill COMMAND --help lists the options"
        usage = BadRequest(_usage_text(error), kind="usage", hint=hint)
        _print_error(usage, as_json=as_json)
        return usage.exit_code
    except _Terminated:
        return _stopped("terminated", EXIT_TERMINATED, as_json=as_json)
    except _ReaderGone:
        return 0
    return result if isinstance(result, int) else 0


def _usage_text(error: typer.TyperException) -> str:
    """The message with the parameter it is about, where the error knows how to say it."""
    describe = getattr(error, "format_message", None)
    return str(describe() if describe else error)


def _stopped(how: str, code: int, *, as_json: bool) -> int:
    error = QuantmillError(
        how,
        kind=how,
        hint="finished blobs stay for the next run; `quantmill prune` removes them",
    )
    error.exit_code = code
    _print_error(error, as_json=as_json)
    return code


def _print_error(error: QuantmillError, *, as_json: bool) -> None:
    if as_json:
        from quantmill.report import error_json

        print(json.dumps(error_json(error)), file=sys.stderr)
        return
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
