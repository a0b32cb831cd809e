"""The command line: arguments to one library call, one report, one exit code."""

from __future__ import annotations

import json
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from quantmill import conversation, evaluating, reporting, sharing, terminal, upkeep
from quantmill.arguments import (
    SOURCE_HELP,
    BpwOption,
    CalibrationOption,
    ComponentOption,
    Device,
    DeviceOption,
    DraftOption,
    DraftQuantizeOption,
    ExportRequantizeOption,
    ForOption,
    GlobalScaleOption,
    GroupOption,
    ImatrixOption,
    JsonOption,
    LinksOption,
    LoraOption,
    MemoryOption,
    Method,
    MethodOption,
    ModelfileOption,
    NameArgument,
    NonFiniteOption,
    Profile,
    ProfileOption,
    QuantizeOption,
    QuietOption,
    RequantizeOption,
    RestartOption,
    Rounding,
    RoundingOption,
    SizeOption,
    SourceArgument,
    StoreOption,
    TensorOption,
    WorkersOption,
    parse_model_name,
    store_at,
)
from quantmill.errors import BadRequest, QuantmillError
from quantmill.version import __version__

if TYPE_CHECKING:
    from quantmill.creation import Created
    from quantmill.execute import Progress
    from quantmill.modelfile import Modelfile
    from quantmill.plans import Options
    from quantmill.recipes import Target

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143

app = typer.Typer(
    name="quantmill",
    help="Turn open-weight checkpoints into small, fast models in a store that Ollama reads.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _options(
    tensor: list[str] | None,
    profile: Profile,
    method: Method,
    e8m0: Rounding,
    global_scale: bool,
    allow_non_finite: bool,
    calibration: Path | None,
    imatrix: Path | None,
) -> Options:
    from quantmill.planner import parse_override
    from quantmill.plans import Options

    overrides = tuple(parse_override(text) for text in tensor or ())
    text, matrix = (str(path) if path else None for path in (calibration, imatrix))
    return Options(
        overrides, profile.value, e8m0.value, global_scale, allow_non_finite, method.value,
        text, matrix,
    )  # fmt: skip


# -- commands --------------------------------------------------------------------------------------


@app.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    source: SourceArgument = None,
    quantize: QuantizeOption = None,
    requantize: RequantizeOption = None,
    target_bpw: BpwOption = None,
    target_size: SizeOption = None,
    reader: ForOption = None,
    group_size: GroupOption = None,
    tensor: TensorOption = None,
    modelfile: ModelfileOption = None,
    draft: DraftOption = None,
    draft_quantize: DraftQuantizeOption = None,
    merge_lora: LoraOption = None,
    profile: ProfileOption = Profile.MLX_CPU,
    device: DeviceOption = Device.CPU,
    method: MethodOption = Method.RTN,
    calibration: CalibrationOption = None,
    imatrix: ImatrixOption = None,
    e8m0: RoundingOption = Rounding.CEIL,
    global_scale: GlobalScaleOption = False,
    allow_non_finite: NonFiniteOption = False,
    follow_links: LinksOption = False,
    workers: WorkersOption = None,
    memory: MemoryOption = None,
    restart: RestartOption = False,
    store: StoreOption = None,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Import a checkpoint under NAME, quantized on the way. A repository is fetched first."""
    from quantmill import creation

    target = parse_model_name(name)
    options = _options(
        tensor, profile, method, e8m0, global_scale, allow_non_finite, calibration, imatrix
    )
    parsed, folder = _inputs(source, draft, modelfile)
    started = time.monotonic()
    with terminal.progress(not quiet and not json_output) as bar:
        created = creation.create(
            target, folder, store=store_at(store),
            quantize=quantize, requantize=requantize, group_size=group_size, options=options,
            fit=_target(target_bpw, target_size, reader),
            modelfile=parsed, draft=draft, draft_quantize=draft_quantize, merge_lora=merge_lora,
            device=device.value, workers=workers, memory=_memory(memory), restart=restart,
            follow_links=follow_links,
            progress=bar and (lambda e: bar(e.bytes, e.bytes_total, _count(e))),
            fetching=bar and (lambda done, total, what: bar(done, total, f"fetching {what}")),
            measuring=bar,
        )  # fmt: skip
    _tell_created(created, parsed, time.monotonic() - started, quiet, json_output)


def _inputs(
    source: str | None, draft: str | None, modelfile: Path | None
) -> tuple[Modelfile | None, str | Path]:
    """The Modelfile where one is given, and the source that it or the command line names."""
    from quantmill import creation

    if modelfile is None:
        if source is None:
            raise BadRequest(
                "no checkpoint given", hint="name its directory, or a Modelfile with -f"
            )
        return None, source
    parsed, folder = creation.read_modelfile(modelfile)
    _refuse_two(source, folder, "SOURCE is {} but the Modelfile's FROM means {}")
    named = parsed.draft or None
    _refuse_two(draft, named, "--draft is {} but the Modelfile's DRAFT means {}")
    return parsed, folder


def _tell_created(
    created: Created, parsed: Modelfile | None, seconds: float, quiet: bool, as_json: bool
) -> None:
    from quantmill import planreport

    lines = parsed.ignored if parsed else ()
    if not quiet:
        ignored = [f"the Modelfile's {what} is ignored" for what in lines]
        terminal.warn([*ignored, *planreport.created_warnings(created)])
    if as_json:
        terminal.print_json(planreport.created_json(created, lines))
    elif not quiet:
        terminal.print_lines(planreport.created_lines(created, seconds))


def _target(bits: float | None, size: str | None, reader: str | None) -> Target | None:
    """What --quantize auto is to fit; None where nothing is said of it."""
    from quantmill.pacing import parse_memory
    from quantmill.recipes import Target

    if bits is None and size is None and reader is None:
        return None
    try:
        nbytes = parse_memory(size) if size is not None else None
    except ValueError:
        raise BadRequest(f"{size!r} is no size", hint="for example 6GB or 4GiB") from None
    return Target(bits, nbytes, reader) if reader else Target(bits, nbytes)


def _memory(text: str | None) -> int | None:
    from quantmill.pacing import parse_memory

    try:
        return parse_memory(text) if text else None
    except ValueError:
        raise BadRequest(f"{text!r} is no amount of memory", hint="for example 800MB") from None


def _count(event: Progress) -> str:
    return f"{event.tensors}/{event.tensors_total} tensors"


def _refuse_two(given: str | None, named: str | Path | None, what: str) -> None:
    if given is not None and named is not None and Path(given).resolve() != Path(named).resolve():
        raise BadRequest(what.format(given, named), hint="give one of them")


@app.command()
def plan(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=SOURCE_HELP)],
    quantize: QuantizeOption = None,
    requantize: RequantizeOption = None,
    target_bpw: BpwOption = None,
    target_size: SizeOption = None,
    reader: ForOption = None,
    group_size: GroupOption = None,
    tensor: TensorOption = None,
    draft: DraftOption = None,
    draft_quantize: DraftQuantizeOption = None,
    merge_lora: LoraOption = None,
    profile: ProfileOption = Profile.MLX_CPU,
    method: MethodOption = Method.RTN,
    calibration: CalibrationOption = None,
    imatrix: ImatrixOption = None,
    e8m0: RoundingOption = Rounding.CEIL,
    global_scale: GlobalScaleOption = False,
    allow_non_finite: NonFiniteOption = False,
    follow_links: LinksOption = False,
    store: StoreOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show what `create` would do with every tensor of SOURCE, and write nothing."""
    from quantmill import creation, planreport

    options = _options(
        tensor, profile, method, e8m0, global_scale, allow_non_finite, calibration, imatrix
    )
    with terminal.progress(not json_output, counted="steps") as bar:
        planned = creation.plan(
            source,
            quantize=quantize,
            requantize=requantize,
            group_size=group_size,
            options=options,
            draft=draft,
            draft_quantize=draft_quantize,
            fit=_target(target_bpw, target_size, reader),
            merge_lora=merge_lora,
            store=store_at(store),
            follow_links=follow_links,
            measuring=bar,
        )
    free = store_at(store).free_bytes()
    if json_output:
        terminal.print_json(planreport.plan_json(planned, free))
        return
    terminal.print_table(planreport.PLAN_COLUMNS, planreport.plan_rows(planned))
    terminal.print_lines(["", *planreport.plan_summary(planned, free)])


def _list(store: StoreOption = None, json_output: JsonOption = False) -> None:
    """List the models in the store."""
    from quantmill import facts, report

    models = facts.list_models(store_at(store))
    if json_output:
        terminal.print_json(report.list_json(models))
        return
    terminal.print_table(report.LIST_COLUMNS, report.list_rows(models))
    terminal.warn([m.problem for m in models if m.problem])


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

    found = facts.show(store_at(store), parse_model_name(name))
    if json_output:
        terminal.print_json(report.show_json(found, tensors=tensors))
        return
    rows = report.show_rows(found)
    width = max(len(label) for label, _ in rows)
    terminal.print_lines([f"{label.ljust(width)}  {text}" for label, text in rows])
    if tensors:
        terminal.print_lines([""])
        terminal.print_table(report.TENSOR_COLUMNS, report.tensor_rows(found))


app.command()(upkeep.verify)
app.command("cp")(upkeep.copy)
app.command("rm")(upkeep.remove)
app.command()(upkeep.prune)
app.command()(reporting.diff)
app.command()(reporting.report)


def _version(wanted: bool) -> None:
    if wanted:
        terminal.print_lines([f"quantmill {__version__}"])
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version


app.command("run")(conversation.run_model)
app.command()(conversation.serve)
app.command("eval")(evaluating.evaluate_model)
app.command()(sharing.pull)
app.command()(sharing.push)
app.command()(sharing.login)
app.command()(sharing.logout)


@app.command()
def export(
    name: NameArgument,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A directory not there yet.")],
    to: Annotated[str, typer.Option("--to", metavar="mlx-lm|hf", help="Layout.")] = "mlx-lm",
    component: ComponentOption = None,
    requantize: ExportRequantizeOption = None,
    store: StoreOption = None,
    json_output: JsonOption = False,
) -> None:
    """Write a model as a directory: for mlx-lm, or decoded for anything that reads safetensors."""
    from quantmill import report
    from quantmill.export import export as write
    from quantmill.load import open_model

    with open_model(name, component=component, store=store_at(store)) as model:
        written = write(model, folder, to, requantize=requantize)
    terminal.warn(report.exported_warnings(written))
    if json_output:
        terminal.print_json(report.exported_json(written))
    else:
        terminal.print_lines(report.exported_lines(written))


@app.command()
def doctor(json_output: JsonOption = False) -> None:
    """Show what is in use: versions, device, BLAS, optional parts."""
    from quantmill import blas

    chosen = blas.preload()
    from quantmill import report
    from quantmill.environment import describe

    facts = describe(chosen)
    if json_output:
        terminal.print_json(facts)
    else:
        terminal.print_lines(report.doctor_lines(facts))


@app.command("kernels")
def list_kernels(json_output: JsonOption = False) -> None:
    """List the implementations of the arithmetic, and which one this processor uses."""
    from quantmill import kernels, report

    found = kernels.list_kernels()
    if json_output:
        terminal.print_json(report.kernels_json(found))
    else:
        terminal.print_table(report.KERNEL_COLUMNS, report.kernel_rows(found))


# -- exit codes ------------------------------------------------------------------------------------


class _Terminated(BaseException):
    """SIGTERM, made into an exception so that unfinished files are removed."""


def _terminate(*_: object) -> NoReturn:
    raise _Terminated


def main() -> None:
    """Entry point: run a command, turn errors into one line, a hint and an exit code."""
    warnings.showwarning = lambda message, *_: terminal.warn([str(message)])
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
        return _stopped("interrupted", EXIT_INTERRUPTED, arguments)
    except typer.TyperException as error:
        hint = "quantmill COMMAND --help lists the options"
        usage = BadRequest(_usage_text(error), kind="usage", hint=hint)
        _print_error(usage, as_json=as_json)
        return usage.exit_code
    except _Terminated:
        return _stopped("terminated", EXIT_TERMINATED, arguments)
    except terminal.ReaderGone:
        return 0
    return result if isinstance(result, int) else 0


def _usage_text(error: typer.TyperException) -> str:
    """The message with the parameter it is about, where the error knows how to say it."""
    describe = getattr(error, "format_message", None)
    return str(describe() if describe else error)


def _stopped(how: str, code: int, arguments: Sequence[str]) -> int:
    left = "finished blobs stay for the next run; `quantmill prune` removes them"
    error = QuantmillError(
        how, kind=how, hint=left if {"create", "pull"} & {*arguments[:1]} else None
    )
    error.exit_code = code
    _print_error(error, as_json="--json" in arguments)
    return code


def _print_error(error: QuantmillError, *, as_json: bool) -> None:
    if as_json:
        from quantmill.report import error_json

        print(json.dumps(error_json(error)), file=sys.stderr)
        return
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
