"""The commands that care for a store: `verify`, `cp`, `rm` and `prune`."""

from __future__ import annotations

from typing import Annotated

import typer

from quantmill import terminal
from quantmill.arguments import (
    DryRepairOption,
    FromOption,
    InsecureOption,
    JsonOption,
    NameArgument,
    NamesArgument,
    OptionalNameArgument,
    PullOption,
    RepairOption,
    StoreOption,
    WorkersOption,
    parse_model_name,
    store_at,
)
from quantmill.errors import BadRequest

EXIT_DAMAGE = 1


def verify(
    name: OptionalNameArgument = None,
    repair: RepairOption = False,
    source: FromOption = None,
    pull: PullOption = False,
    insecure: InsecureOption = False,
    dry_run: DryRepairOption = False,
    workers: WorkersOption = None,
    store: StoreOption = None,
    json_output: JsonOption = False,
) -> None:
    """Recompute every digest, header and relation of one model, or of the whole store.

    Exit code 1 when something is damaged, and stays so.
    """
    from quantmill import repairing, report, verification

    if not repair and (source or pull or insecure or dry_run):
        raise BadRequest(
            "--from, --pull, --insecure and --dry-run belong to --repair", hint="add --repair"
        )
    if source and pull:
        raise BadRequest("--from and --pull exclude each other", hint="give one")
    names, where = None if name is None else [parse_model_name(name)], store_at(store)
    with terminal.progress(not json_output) as bar:
        found = verification.verify(
            where,
            names,
            bar and (lambda done, total: bar(done, total, "verifying")),
            workers=workers,
        )
    lines = report.damage_lines(found)
    repaired = None
    if repair:
        from quantmill.refetching import Known

        known = Known(where, source, pull, insecure)
        repaired = repairing.plan_repair(where, found, known)
        lines += report.repair_lines(repaired, planned=True)
        if lines and not json_output:
            terminal.print_lines(lines)  # before anything is done
        lines = []
        if not dry_run:
            repaired = repairing.repair(where, repaired, known)
    if json_output:
        terminal.print_json(report.verified_json(found, repaired))
    else:
        taken = None if dry_run else repaired
        lines += report.repair_lines(taken or (), planned=False)
        terminal.print_lines([*lines, report.verified_line(found, taken)])
    if found.damage and not (repaired and all(step.done for step in repaired)):
        raise typer.Exit(EXIT_DAMAGE)


def copy(
    source: NameArgument,
    target: Annotated[str, typer.Argument(metavar="NEW")],
    store: StoreOption = None,
    json_output: JsonOption = False,
) -> None:
    """Give a model a second name; no data is copied."""
    from quantmill import pruning

    old, new = parse_model_name(source), parse_model_name(target)
    pruning.copy(store_at(store), old, new)
    if json_output:
        terminal.print_json({"source": old.display, "target": new.display})
    else:
        terminal.print_lines([f"copied {old.display} to {new.display}"])


def remove(
    names: NamesArgument,
    store: StoreOption = None,
    json_output: JsonOption = False,
) -> None:
    """Remove models, and blobs that nothing else uses."""
    from quantmill import pruning, report

    removed = pruning.remove(store_at(store), [parse_model_name(name) for name in names])
    if json_output:
        terminal.print_json(report.removed_json(removed))
    else:
        terminal.print_lines(report.removed_lines(removed))


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
    done = act(store_at(store), older_than)
    if json_output:
        terminal.print_json(report.prune_json(done, dry_run=dry_run))
    else:
        terminal.print_lines(report.prune_lines(done, dry_run=dry_run))
