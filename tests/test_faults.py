"""Every file operation of every command that writes fails, or is the last: the store stays whole.

`make sweep` takes each operation in turn; the suite a few of them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from checkpoints import write_checkpoint
from fakes import files, finished, put, put_model, write_file
from powercuts import CUTS, FAILURES, ModelDisk, PowerCut
from quantmill.creation import create
from quantmill.errors import NotFound, QuantmillError
from quantmill.pruning import copy, prune, remove
from quantmill.store import Store
from quantmill.verification import verify

FULL = bool(os.environ.get("QUANTMILL_SWEEP"))
STRIDE = 1 if FULL else 9
"""Of so many operations the suite takes one, beginning with another one in each sweep."""

TINY = {
    "model.embed_tokens.weight": ("BF16", (4, 64)),
    "model.layers.0.mlp.up_proj.weight": ("BF16", (4, 64)),
}


@dataclass(frozen=True)
class Command:
    """What is there before a command, and the command."""

    prepare: Callable[[Store, Path], object]
    run: Callable[[Store, Path], object]
    writes_blobs: bool = False


def _create(quantize: str | None) -> Callable[[Store, Path], object]:
    return lambda store, source: create("m", source, store=store, quantize=quantize, workers=1)


def _two_models(store: Store, source: Path) -> None:
    put_model(store, "m", b"config", b"shared", b"own")
    put_model(store, "other", b"config of other", b"shared")


def _loose(store: Store, source: Path) -> None:
    _two_models(store, source)
    put(store, b"loose", b"loose too")
    finished(store, b"without a name")
    write_file(store.journals / "0.jsonl", b"{}\n")
    write_file(store.manifests / "h/n/m/.tmp-1")


def _damaged(store: Store, source: Path) -> None:
    """A model with a blob that is cut short, and the same model again from there."""
    made = create("m", source, store=store, quantize="int8")
    ref = store.get_manifest(made.name).tensor_refs()[0]
    os.truncate(store.blob_path(ref.digest), 10)


def _nothing(store: Store, source: Path) -> None:
    pass


COMMANDS = {
    "create": Command(_nothing, _create("int8"), True),
    "create, replacing": Command(_create(None), _create("int8"), True),
    "create, again": Command(_create("int8"), _create("int8"), True),
    "cp": Command(_two_models, lambda s, _: copy(s, "m", "new/name:tag")),
    "cp, replacing": Command(_two_models, lambda s, _: copy(s, "m", "other")),
    "rm": Command(_two_models, lambda s, _: remove(s, "m")),
    "prune": Command(_loose, lambda s, _: prune(s, 0)),
}


def names(store: Store) -> dict[str, bytes]:
    """Every name and the bytes of its manifest."""
    return {s.name.display: store.get_manifest(s.name).raw for s in store.list_names()}


def check(store: Store, *allowed: dict[str, bytes]) -> None:
    """The store shows one of the allowed states, and nothing in it is damaged."""
    assert names(store) in allowed
    assert not verify(store, workers=1).damage


def attempt(
    command: Command, root: Path, source: Path, how: str, at: int, before: ModelDisk | None = None
) -> ModelDisk:
    """Run a command on a disk that fails, and leave what the disk would leave."""
    disk, failed = ModelDisk(root, how, at, before), False
    try:
        command.run(Store(root, disk), source)
    except PowerCut:
        pass
    except NotFound:  # `rm` of a name that is gone already
        failed = command is not COMMANDS["rm"]
    except QuantmillError:
        failed = True
    assert disk.hit or not failed
    disk.settle(at)
    return disk


def complete(
    command: Command, store: Store, source: Path, before: ModelDisk | None = None
) -> ModelDisk:
    """The same command on a healthy disk; what is durable of it then."""
    disk = ModelDisk(store.root, CUTS[1], before=before)
    try:
        command.run(Store(store.root, disk), source)
    except NotFound:  # the name is gone already
        assert command is COMMANDS["rm"]
    return disk


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("source") / "s", TINY)


@dataclass(frozen=True)
class Case:
    """A command with the store before and after it."""

    command: Command
    folder: Path
    source: Path
    before: dict[str, bytes]
    after: dict[str, bytes]
    last: dict[str, bytes]
    operations: int

    def fresh(self) -> Store:
        """A store as it is before the command."""
        root = self.folder / "root"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self.folder / "before", root)
        return Store(root)


@pytest.fixture(params=sorted(COMMANDS))
def case(request: pytest.FixtureRequest, tmp_path: Path, source: Path) -> Case:
    command = COMMANDS[request.param]
    before = Store(tmp_path / "before")
    before.root.mkdir()
    command.prepare(before, source)
    shutil.copytree(before.root, tmp_path / "after")
    disk = ModelDisk(tmp_path / "after")
    after = Store(tmp_path / "after", disk)
    command.run(after, source)
    found = disk.done
    prune(after, 0)
    return Case(command, tmp_path, source, names(before), names(after), files(after), found)


def rounds(case: Case, first: int) -> Iterator[int]:
    """Operations to fail at, until the command completes: threads take turns, so counts vary."""
    at = 1 + first % STRIDE
    while at <= case.operations + 3 * FULL:
        yield at
        at += STRIDE


def ends_right(case: Case, store: Store, before: ModelDisk) -> None:
    """Run again it is done, even if the power is cut then; pruned it is what it would have been."""
    complete(case.command, store, case.source, before).settle(1)
    check(store, case.after)
    prune(store, 0)
    assert files(store) == case.last


@pytest.mark.parametrize("how", FAILURES)
def test_a_failing_operation_leaves_before_or_after(case: Case, how: str) -> None:
    """Whichever operation fails, once or with all that follow, the same command gets done later."""
    for at in rounds(case, len(how)):
        store = case.fresh()
        disk = attempt(case.command, store.root, case.source, how, at)
        check(store, case.before, case.after)
        if how == "once" and case.command.writes_blobs and disk.last_operation != "remove":
            assert not [b for b in store.list_blobs() if b.digest is None]
        ends_right(case, store, disk)


@pytest.mark.parametrize("how", CUTS)
def test_a_crash_leaves_before_or_after(case: Case, how: str) -> None:
    """Killed, or without power, after any operation: every name is old or new, all blobs whole."""
    for at in rounds(case, len(how)):
        store = case.fresh()
        disk = attempt(case.command, store.root, case.source, how, at)
        check(store, *([case.before, case.after] if disk.hit else [case.after]))
        ends_right(case, store, disk)


@pytest.mark.parametrize("how", CUTS)
def test_a_crash_of_the_second_run_leaves_before_or_after(case: Case, how: str) -> None:
    """Crashed, run again and crashed there: still old or new, and the third run gets done."""
    for at in rounds(case, len(how) + 4):
        store = case.fresh()
        first = attempt(case.command, store.root, case.source, how, at)
        second = 1 + (at * 7 + len(how)) % case.operations
        again = CUTS[(at + len(how)) % 3]
        disk = attempt(case.command, store.root, case.source, again, second, first)
        check(store, case.before, case.after)
        ends_right(case, store, disk)


def test_what_is_done_is_durable(case: Case) -> None:
    """A power cut right after a command has said that it is done takes nothing back."""
    for how in CUTS[1:]:
        store = case.fresh()
        attempt(case.command, store.root, case.source, how, 0)
        check(store, case.after)


def test_prune_after_a_crash_removes_nothing_that_may_come_back(case: Case) -> None:
    """A command is killed, blobs are pruned, the power is cut: what has a name then is whole."""
    for at in rounds(case, 1):
        for seed in range(40 if case.command is COMMANDS["rm"] else 2):
            store = case.fresh()
            killed = attempt(case.command, store.root, case.source, "kept", at)
            disk = ModelDisk(store.root, "torn", before=killed)
            prune(Store(store.root, disk), 0)
            disk.settle(seed)
            check(store, case.before, case.after)


def test_verify_writes_nothing(tmp_path: Path, source: Path) -> None:
    """Verify passes no operation to the disk, damage or not."""
    store = Store(tmp_path)
    _damaged(store, source)
    disk = ModelDisk(tmp_path)
    assert verify(Store(tmp_path, disk)).damage
    assert disk.done == 0


def test_a_damaged_blob_is_replaced_or_stays(tmp_path: Path, source: Path) -> None:
    """While `create` puts right what is damaged, a crash leaves it damaged or whole, no worse."""
    folder = tmp_path / "before"
    _damaged(Store(folder), source)
    (damage,) = verify(Store(folder)).damage
    counting = ModelDisk(folder)
    at, operations = 1 + STRIDE // 2, 60
    while at < operations:
        root = tmp_path / "root"
        shutil.copytree(folder, root)
        disk = attempt(COMMANDS["create"], root, source, CUTS[at % 3], at)
        assert verify(Store(root)).damage in ((), (damage,))
        complete(COMMANDS["create"], Store(root), source)
        assert not verify(Store(root)).damage
        shutil.rmtree(root)
        operations = disk.done + 1 if not disk.hit else operations
        at += STRIDE
    assert counting.done == 0
