"""Kill `create` at random moments, again and again: `python tests/crash.py ROUNDS [CHECKPOINT]`.

After each kill the store must verify; now and then a run is let finish, must give the same model,
and blobs are pruned.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from checkpoints import write_checkpoint
from quantmill.creation import create
from quantmill.errors import Busy
from quantmill.pruning import prune
from quantmill.store import Store
from quantmill.verification import verify

CHILD = "from quantmill.cli import main; main()"
FINISHED_EVERY = 20
"""Of so many rounds one is not killed."""


def command(store: Store, source: Path, name: str = "m") -> list[str]:
    """A `create` of its own process."""
    return [sys.executable, "-c", CHILD, "create", name, str(source), "-q", "int4",
            "--store", str(store.root), "--quiet"]  # fmt: skip


def crash(folder: Path, source: Path, rounds: int, seed: int = 1) -> int:
    """Run the rounds; how many kills came while the command was at work."""
    chance, killed = random.Random(seed), 0
    whole = create("m", source, store=Store(folder / "whole"), quantize="int4")
    started = time.monotonic()
    subprocess.run(command(Store(folder / "timed"), source), check=True)
    usual = time.monotonic() - started
    store = Store(folder / "store")
    for number in range(1, rounds + 1):
        child = subprocess.Popen(command(store, source))
        if number % FINISHED_EVERY:
            time.sleep(chance.uniform(0.3, 1.0) * usual)
            child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
        damage = verify(store).damage
        assert not damage, damage
        for stored in store.list_names():
            assert store.get_manifest(stored.name).digest == whole.digest
        if number % FINISHED_EVERY == 0:
            assert store.list_names()
            store.remove_manifest(whole.name)
            prune(store, 0)
            assert not store.list_blobs()
        elif chance.random() < 0.2 and not store.list_names():
            prune(store, 0)
    return killed


def together(folder: Path, sources: list[Path], seconds: float) -> dict[str, int]:
    """Two creators and a remover at once, processes of their own; how often each got done."""
    store = Store(folder / "store")
    done = {"created": 0, "pruned": 0, "busy": 0}
    running: dict[str, subprocess.Popen[bytes]] = {}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for number, source in enumerate(sources):
            name = f"m{number}"
            child = running.get(name)
            if child is None or child.poll() is not None:
                if child is not None:
                    assert child.returncode == 0
                    done["created"] += 1
                    store.remove_manifest(store.list_names()[0].name)
                running[name] = subprocess.Popen(command(store, source, name))
        try:
            prune(store, 0)
            done["pruned"] += 1
        except Busy:
            done["busy"] += 1
        time.sleep(0.02)
    for child in running.values():
        assert child.wait() == 0
    assert not verify(store).damage
    return done


def main() -> None:
    """Rounds, and the checkpoint to create; a small one is made where none is given."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if len(sys.argv) > 2:
            source = Path(sys.argv[2])
        else:
            shape = {f"layers.{i}.mlp.down_proj.weight": ("BF16", (512, 512)) for i in range(40)}
            source = write_checkpoint(folder / "source", shape)
        rounds = int(sys.argv[1])
        print(f"{crash(folder, source, rounds)} of {rounds} runs killed at work; no damage")


if __name__ == "__main__":
    main()
