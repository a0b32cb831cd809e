"""Every file operation of every command that writes fails, or is the last: the store stays whole.

`make sweep` takes each operation in turn and counts the rounds; the suite takes a few of them.
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
from quantmill import pulling
from quantmill.creation import create
from quantmill.errors import NotFound, QuantmillError
from quantmill.names import parse_name
from quantmill.patience import Patience
from quantmill.pruning import copy, prune, remove
from quantmill.pulling import pull
from quantmill.pushing import push
from quantmill.refetching import Known
from quantmill.repairing import plan_repair, repair
from quantmill.store import Store
from quantmill.verification import verify
from registries import misbehaving, serve_memory

FULL = bool(os.environ.get("QUANTMILL_SWEEP"))
STRIDE = 1 if FULL else 11
"""Of so many operations the suite takes one, beginning with another one in each sweep."""

TINY = {
    "model.embed_tokens.weight": ("BF16", (4, 64)),
    "model.layers.0.mlp.up_proj.weight": ("BF16", (4, 64)),
}


QUICK = Patience(tries=1, connect=2)


@dataclass(frozen=True)
class World:
    """What is outside of the store: a checkpoint, and names that a registry has."""

    source: Path
    remote: str
    other_remote: str


Action = Callable[[Store, World], object]


@dataclass(frozen=True)
class Command:
    """What is there before a command, and the command."""

    prepare: Action
    run: Action
    writes_blobs: bool = False


def _create(quantize: str | None) -> Action:
    return lambda store, world: create("m", world.source, store=store, quantize=quantize, workers=1)


def _pull(store: Store, world: World) -> None:
    pull(world.remote, store=store, patience=QUICK)


def _pull_another(store: Store, world: World) -> None:
    """The same name, and another model, half of whose blobs are the same."""
    pull(world.other_remote, store=store, patience=QUICK)
    other = store.get_manifest(parse_name(world.other_remote))
    store.put_manifest(parse_name(world.remote), other.raw)
    store.remove_manifest(parse_name(world.other_remote))


def _two_models(store: Store, world: World) -> None:
    put_model(store, "m", b"config", b"shared", b"own")
    put_model(store, "other", b"config of other", b"shared")


def _loose(store: Store, world: World) -> None:
    _two_models(store, world)
    put(store, b"loose", b"loose too")
    finished(store, b"without a name")
    write_file(store.journals / "0.jsonl", b"{}\n")
    write_file(store.manifests / "h/n/m/.tmp-1")


def _damaged(store: Store, world: World) -> None:
    """A model with a blob that is cut short, and the same model again from there."""
    made = create("m", world.source, store=store, quantize="int8")
    ref = store.get_manifest(made.name).tensor_refs()[0]
    os.truncate(store.blob_path(ref.digest), 10)


def _harm(store: Store) -> None:
    """One blob of the only model is bent, another one gone."""
    (stored,) = store.list_names()
    bent, gone = store.get_manifest(stored.name).tensor_refs()[:2]
    path = store.blob_path(bent.digest)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    store.blob_path(gone.digest).unlink()


def _created_and_harmed(store: Store, world: World) -> None:
    create("m", world.source, store=store, quantize="int8")
    _harm(store)


def _pulled_and_harmed(store: Store, world: World) -> None:
    _pull(store, world)
    _harm(store)


def _harmed_and_unknown(store: Store, world: World) -> None:
    """What was harmed is nowhere else."""
    _created_and_harmed(store, world)
    shutil.rmtree(store.provenance)


def _repair(store: Store, world: World) -> None:
    known = Known(store, patience=QUICK)
    repair(store, plan_repair(store, verify(store, workers=1), known), known)


def _nothing(store: Store, world: World) -> None:
    pass


COMMANDS = {
    "create": Command(_nothing, _create("int8"), True),
    "create, replacing": Command(_create(None), _create("int8"), True),
    "create, again": Command(_create("int8"), _create("int8"), True),
    "cp": Command(_two_models, lambda s, _: copy(s, "m", "new/name:tag")),
    "cp, replacing": Command(_two_models, lambda s, _: copy(s, "m", "other")),
    "pull": Command(_nothing, _pull, True),
    "pull, replacing": Command(_pull_another, _pull, True),
    "pull, again": Command(_pull, _pull, True),
    "repair from the source": Command(_created_and_harmed, _repair),
    "repair from the registry": Command(_pulled_and_harmed, _repair),
    "repair from nowhere": Command(_harmed_and_unknown, _repair),
    "rm": Command(_two_models, lambda s, _: remove(s, "m")),
    "rm, two": Command(_two_models, lambda s, _: remove(s, ["m", "other"])),
    "prune": Command(_loose, lambda s, _: prune(s, 0)),
}


def names(store: Store) -> dict[str, bytes]:
    """Every name and the bytes of its manifest."""
    return {s.name.display: store.get_manifest(s.name).raw for s in store.list_names()}


def damage_of(store: Store) -> frozenset[str]:
    """What `verify` finds."""
    return frozenset(f"{d.digest} {d.models}" for d in verify(store, workers=1).damage)


def check(case: Case, store: Store, *allowed: dict[str, bytes]) -> None:
    """The store shows one of the allowed states, and no damage but what is being repaired."""
    found = names(store)
    for name in {name for state in (found, *allowed) for name in state}:
        assert found.get(name) in [state.get(name) for state in allowed]
    damage = damage_of(store)
    if case.after in allowed and len(allowed) == 1:
        assert damage == case.unmended
    else:
        assert case.unmended <= damage <= case.damage
    aside = store.quarantine.iterdir() if store.quarantine.is_dir() else ()
    kept = {path.read_bytes() for path in aside}
    there = {b.path.read_bytes() for b in store.list_blobs()}
    assert case.unmended_bytes <= kept | there


def attempt(
    case: Case,
    how: str,
    at: int,
    before: ModelDisk | None = None,
    *,
    root: Path | None = None,
    reads: bool = False,
) -> ModelDisk:
    """Run a command on a disk that fails, and leave what the disk would leave."""
    if FULL:
        with open(os.environ["QUANTMILL_SWEEP"], "a") as counted:
            counted.write(".")
    root = root or case.root
    disk, failed = ModelDisk(root, how, at, before, reads=reads), False
    try:
        case.command.run(Store(root, disk), case.world)
    except PowerCut:
        pass
    except NotFound:  # `rm` of a name that is gone already
        failed = not case.name.startswith("rm")
    except QuantmillError:
        failed = True
    assert disk.hit or not failed
    disk.settle(at)
    return disk


def complete(case: Case, store: Store, before: ModelDisk | None = None) -> ModelDisk:
    """The same command on a healthy disk; what is durable of it then."""
    disk = ModelDisk(store.root, CUTS[1], before=before)
    healthy = Store(store.root, disk)
    try:
        case.command.run(healthy, case.world)
    except NotFound:  # the name, or one of two, is gone already: the answer names it
        assert case.name.startswith("rm")
        for name in set(names(store)) & (set(case.before) - set(case.after)):
            remove(healthy, name)
    return disk


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    source = write_checkpoint(tmp_path_factory.mktemp("source") / "s", TINY)
    elsewhere = Store(tmp_path_factory.mktemp("elsewhere"))
    with misbehaving(serve_memory()) as server:
        found = World(source, f"{server.host}/n/m:tag", f"{server.host}/n/other:tag")
        for name, quantize in ((found.remote, "int8"), (found.other_remote, None)):
            create(name, source, store=elsewhere, quantize=quantize)
            push(name, store=elsewhere)
        yield found


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts so small that blobs have several."""
    monkeypatch.setattr(pulling, "PART", 256)
    monkeypatch.setattr(pulling, "PROBE", 64)
    monkeypatch.setattr(pulling, "NOTED", 128)


@dataclass(frozen=True)
class Case:
    """A command with the store before and after it; `unmended` is the damage that stays."""

    name: str
    folder: Path
    world: World
    before: dict[str, bytes]
    after: dict[str, bytes]
    last: dict[str, bytes]
    operations: int
    damage: frozenset[str]
    unmended: frozenset[str]
    unmended_bytes: frozenset[bytes]

    @property
    def command(self) -> Command:
        return COMMANDS[self.name]

    @property
    def root(self) -> Path:
        return self.folder / "root"

    def fresh(self) -> Store:
        """A store as it is before the command."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.folder / "before", self.root)
        return Store(self.root)


def made_case(name: str, folder: Path, world: World, *, reads: bool = False) -> Case:
    command = COMMANDS[name]
    before = Store(folder / "before")
    before.root.mkdir()
    command.prepare(before, world)
    shutil.copytree(before.root, folder / "after")
    disk = ModelDisk(folder / "after", reads=reads)
    after = Store(folder / "after", disk)
    command.run(after, world)
    found = disk.done
    prune(after, 0)
    aside = after.quarantine.iterdir() if after.quarantine.is_dir() else ()
    return Case(
        name, folder, world, names(before), names(after), files(after), found, damage_of(before),
        damage_of(after), frozenset(path.read_bytes() for path in aside),
    )  # fmt: skip


@pytest.fixture(params=sorted(COMMANDS))
def case(request: pytest.FixtureRequest, tmp_path: Path, world: World) -> Case:
    return made_case(request.param, tmp_path, world)


def rounds(case: Case, first: int) -> Iterator[int]:
    """Operations to fail at, until the command completes: threads take turns, so counts vary."""
    at = 1 + first % STRIDE
    while at <= case.operations + 3 * FULL:
        yield at
        at += STRIDE


def ends_right(case: Case, store: Store, before: ModelDisk) -> None:
    """Run again it is done, even if the power is cut then; pruned it is what it would have been."""
    complete(case, store, before).settle(1)
    check(case, store, case.after)
    prune(store, 0)
    assert files(store) == case.last


@pytest.mark.parametrize("how", FAILURES)
def test_a_failing_operation_leaves_before_or_after(case: Case, how: str) -> None:
    """Whichever operation fails, once or with all that follow, the same command gets done later."""
    for at in rounds(case, len(how)):
        store = case.fresh()
        disk = attempt(case, how, at)
        check(case, store, case.before, case.after)
        if how == "once" and case.command.writes_blobs and disk.last_operation != "remove":
            assert not [b for b in store.list_blobs() if b.digest is None]
        ends_right(case, store, disk)


@pytest.mark.parametrize("name", sorted(COMMANDS))
@pytest.mark.parametrize("how", FAILURES)
def test_a_failing_look_leaves_before_or_after(
    name: str, how: str, tmp_path: Path, world: World
) -> None:
    """Where something cannot be read or looked at it is not taken to be absent."""
    case = made_case(name, tmp_path, world, reads=True)
    for at in rounds(case, len(how)):
        store = case.fresh()
        disk = attempt(case, how, at, reads=True)
        check(case, store, case.before, case.after)
        ends_right(case, store, disk)


@pytest.mark.parametrize("how", CUTS)
def test_a_crash_leaves_before_or_after(case: Case, how: str) -> None:
    """Killed, or without power, after any operation: every name is old or new, all blobs whole."""
    for at in rounds(case, len(how)):
        store = case.fresh()
        disk = attempt(case, how, at)
        check(case, store, *([case.before, case.after] if disk.hit else [case.after]))
        ends_right(case, store, disk)


@pytest.mark.parametrize("how", CUTS)
def test_a_crash_of_the_second_run_leaves_before_or_after(case: Case, how: str) -> None:
    """Crashed, run again and crashed there: still old or new, and the third run gets done."""
    for at in rounds(case, len(how) + 4):
        store = case.fresh()
        first = attempt(case, how, at)
        second = 1 + (at * 7 + len(how)) % case.operations
        again = CUTS[(at + len(how)) % 3]
        disk = attempt(case, again, second, first)
        check(case, store, case.before, case.after)
        ends_right(case, store, disk)


def test_what_is_done_is_durable(case: Case) -> None:
    """A power cut right after a command has said that it is done takes nothing back."""
    for how in CUTS[1:]:
        store = case.fresh()
        attempt(case, how, 0)
        check(case, store, case.after)


def test_prune_after_a_crash_removes_nothing_that_may_come_back(case: Case) -> None:
    """A command is killed, blobs are pruned, the power is cut: what has a name then is whole."""
    for at in rounds(case, 1):
        for seed in range(40 if case.name.startswith("rm") else 2):
            store = case.fresh()
            killed = attempt(case, "kept", at)
            disk = ModelDisk(store.root, "torn", before=killed)
            prune(Store(store.root, disk), 0)
            disk.settle(seed)
            check(case, store, case.before, case.after)


def test_verify_writes_nothing(tmp_path: Path, world: World) -> None:
    """Verify passes no operation to the disk that changes anything, damage or not."""
    store = Store(tmp_path)
    _damaged(store, world)
    disk = ModelDisk(tmp_path)
    assert verify(Store(tmp_path, disk)).damage
    assert disk.done == 0


def test_a_damaged_blob_is_replaced_or_stays(tmp_path: Path, world: World) -> None:
    """While `create` puts right what is damaged, a crash leaves it damaged or whole, no worse."""
    case = made_case("create", tmp_path, world)
    folder = tmp_path / "damaged"
    _damaged(Store(folder), world)
    (damage,) = verify(Store(folder)).damage
    at, operations = 1 + STRIDE // 2, 60
    while at < operations:
        root = tmp_path / "root"
        shutil.copytree(folder, root)
        disk = attempt(case, CUTS[at % 3], at)
        assert verify(Store(root)).damage in ((), (damage,))
        complete(case, Store(root))
        assert not verify(Store(root)).damage
        shutil.rmtree(root)
        operations = disk.done + 1 if not disk.hit else operations
        at += STRIDE
