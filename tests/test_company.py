"""Processes that write to one store and remove from it at once, and ones that are killed."""

from __future__ import annotations

from pathlib import Path

import crash
from checkpoints import write_checkpoint
from fakes import put_model, writer_elsewhere
from quantmill.facts import list_models
from quantmill.store import Store
from quantmill.verification import verify


def layers(count: int, seed: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {f"{seed}.{i}.mlp.down_proj.weight": ("BF16", (256, 256)) for i in range(count)}


def test_creates_and_prunes_at_once_hurt_nothing(tmp_path: Path) -> None:
    """Two creates in a loop, names removed and blobs pruned meanwhile: every create gets done."""
    sources = [
        write_checkpoint(tmp_path / "a", layers(20, "a")),
        write_checkpoint(tmp_path / "b", layers(10, "a") | layers(10, "b")),
    ]
    done = crash.together(tmp_path, sources, 5)
    assert done["created"] > 0
    assert done["busy"] > 0


def test_a_create_that_is_killed_leaves_a_whole_store(tmp_path: Path) -> None:
    """Kill -9 at random moments: all that has a name is whole (`make crash`: two hundred times)."""
    source = write_checkpoint(tmp_path / "source", layers(40, "a"))
    assert crash.crash(tmp_path, source, 6) > 0


def test_readers_wait_for_nobody(tmp_path: Path) -> None:
    """While others hold the lock, whichever way, listing and verifying go on."""
    store = Store(tmp_path)
    put_model(store, "m", b"config", b"blob")
    with writer_elsewhere(tmp_path):
        assert not verify(store).damage
    with store.removing():
        assert [m.name.model for m in list_models(store)] == ["m"]
        assert not verify(store).damage
