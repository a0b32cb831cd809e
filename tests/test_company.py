"""Processes that write to one store and remove from it at once, and ones that are killed."""

from __future__ import annotations

from pathlib import Path

import crash
import together
from checkpoints import write_checkpoint
from fakes import put_model, writer_elsewhere
from quantmill.facts import list_models
from quantmill.store import Store
from quantmill.verification import verify
from registries import require_real_registry


def layers(count: int, seed: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {f"{seed}.{i}.mlp.down_proj.weight": ("BF16", (256, 256)) for i in range(count)}


def sources(folder: Path) -> list[tuple[Path, str]]:
    """Two checkpoints with layers in common."""
    return [
        (write_checkpoint(folder / "a", layers(20, "a")), "int4"),
        (write_checkpoint(folder / "b", layers(10, "a") | layers(10, "b")), "int4"),
    ]


def test_creates_and_prunes_at_once_hurt_nothing(tmp_path: Path) -> None:
    """Two creates in a loop, names removed and blobs pruned meanwhile: every create gets done."""
    done = together.work_together(tmp_path, sources(tmp_path), 2, pulling=False)
    assert min(done["create"], done["rm"], done["prune busy"]) > 0


def test_a_pull_among_creates_and_prunes_loses_nothing(tmp_path: Path) -> None:
    """All four at once on the same blobs: what ends well has its model (`make crash`: longer)."""
    require_real_registry()
    done = together.work_together(tmp_path, sources(tmp_path), 3)
    assert min(done["create"], done["pull"], done["rm"], done["prune busy"]) > 0


def test_a_create_that_is_killed_leaves_a_whole_store(tmp_path: Path) -> None:
    """Kill -9 at random moments: all that has a name is whole (`make crash`: a real model)."""
    source = write_checkpoint(tmp_path / "source", layers(40, "a"))
    tally = crash.kill_creates(tmp_path, source, 4)
    assert tally.finished


def test_a_pull_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    """Killed at random moments, and its registry too: nothing that had arrived comes again."""
    require_real_registry()
    source = write_checkpoint(tmp_path / "source", layers(40, "a"))
    tally = crash.kill_pulls(tmp_path, source, 4)
    assert tally.finished


def test_readers_wait_for_nobody(tmp_path: Path) -> None:
    """While others hold the lock, whichever way, listing and verifying go on."""
    store = Store(tmp_path)
    put_model(store, "m", b"config", b"blob")
    with writer_elsewhere(tmp_path):
        assert not verify(store).damage
    with store.removing():
        assert [m.name.model for m in list_models(store)] == ["m"]
        assert not verify(store).damage
