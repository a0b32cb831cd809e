"""Disks that are too small: known before the first byte, or found out midway without harm."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from checkpoints import write_checkpoint
from fakes import files
from quantmill.creation import create
from quantmill.errors import NoSpace
from quantmill.files import Disk, translated
from quantmill.pruning import prune
from quantmill.pulling import pull
from quantmill.pushing import push
from quantmill.refetching import Known
from quantmill.repairing import plan_repair, repair
from quantmill.store import Store
from quantmill.verification import verify
from registries import misbehaving, serve_memory

LAYERS = {f"layers.{i}.mlp.down_proj.weight": ("BF16", (256, 256)) for i in range(12)}
BIG = LAYERS | {f"layers.{i}.mlp.up_proj.weight": ("BF16", (256, 256)) for i in range(12)}
LARGE = 1 << 40


class SmallDisk(Disk):
    """A disk with room for so many bytes, that claims to have others free."""

    def __init__(self, root: Path, room: int, claimed: int | None = None) -> None:
        self._root, self._room, self._claimed = root, room, claimed

    def _used(self) -> int:
        sizes = []
        for path in self._root.rglob("*"):
            with suppress(FileNotFoundError):  # named by another thread meanwhile
                sizes.append(path.stat().st_size if path.is_file() else 0)
        return sum(sizes)

    def free(self, folder: Path) -> int:
        del folder
        return self._room - self._used() if self._claimed is None else self._claimed

    def write(self, fd: int, data: memoryview, offset: int, path: Path) -> None:
        if self._used() + len(data) > self._room:
            super().write(fd, data[: len(data) // 2], offset, path)
            with translated(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(fd, data, offset, path)


class Optimist(Disk):
    """A real disk that claims to have room for everything."""

    def free(self, folder: Path) -> int:
        del folder
        return LARGE


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", LAYERS)


def make(root: Path, source: Path, disk: Disk, name: str = "m") -> tuple[int, int]:
    made = create(name, source, store=Store(root, disk), quantize="int8", workers=1)
    return made.resumed, made.new_blobs


def test_too_little_space_is_told_before_the_first_byte(tmp_path: Path, source: Path) -> None:
    """Both figures are named, the exit code is 4, and nothing was written."""
    root = tmp_path / "store"
    with pytest.raises(NoSpace, match=r"0\.9 MB more are needed in .*, where 0\.3 MB") as caught:
        make(root, source, SmallDisk(root, 300_000))
    assert (caught.value.exit_code, caught.value.kind) == (4, "no_space")
    assert "prune" in (caught.value.hint or "")
    assert files(Store(root)) == {}


def full_midway(root: Path, source: Path, disk: Disk) -> int:
    """Fill the disk; how many blobs were finished by then."""
    with pytest.raises(NoSpace, match="No space left"):
        make(root, source, disk)
    store = Store(root)
    assert not store.list_names()
    assert all(blob.digest for blob in store.list_blobs())
    assert not store.stale_files() or list(store.journals.iterdir())
    assert not verify(store).damage
    return len([b for b in store.list_blobs() if b.size > 10_000])


def test_a_disk_that_fills_up_midway_keeps_what_is_finished(tmp_path: Path, source: Path) -> None:
    """No unfinished file stays, finished blobs do, and with more room the command goes on."""
    root = tmp_path / "store"
    finished = full_midway(root, source, SmallDisk(root, 400_000, LARGE))
    assert 0 < finished < len(LAYERS)
    assert make(root, source, SmallDisk(root, LARGE)) == (finished, len(LAYERS) - finished)


def test_what_is_there_already_needs_no_space(tmp_path: Path, source: Path) -> None:
    """What an earlier run finished, or another model has, is taken off before it is compared."""
    root = tmp_path / "store"
    full_midway(root, source, SmallDisk(root, 400_000, LARGE))
    assert make(root, source, SmallDisk(root, 1_000_000))[0] > 0
    assert make(root, source, SmallDisk(root, 1_100_000), "second") == (len(LAYERS), 0)
    prune(Store(root), 0)  # the notes go, the models stay
    # what is computed again lies beside the blobs until it is compared with them
    assert make(root, source, SmallDisk(root, LARGE, 100_000), "third") == (0, 0)


@pytest.fixture
def small_mount(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte; skips where none may be mounted."""
    place = tmp_path / "mount"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command here")
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_real_file_system_that_is_too_small(small_mount: Path, tmp_path: Path) -> None:
    """On a file system of one megabyte: told at first; filled up without harm; then gone on."""
    source = write_checkpoint(tmp_path / "source", BIG)
    with pytest.raises(NoSpace, match="more are needed"):
        make(small_mount, source, Disk())
    assert files(Store(small_mount)) == {}
    finished = full_midway(small_mount, source, Optimist())
    assert 0 < finished < len(BIG)
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_mount)], check=True)
    assert make(small_mount, source, Disk()) == (finished, len(BIG) - finished)
    assert not verify(Store(small_mount)).damage


def test_a_pull_into_a_real_file_system_that_is_too_small(
    small_mount: Path, tmp_path: Path
) -> None:
    """Told before the first byte; filled up, what has arrived stays and is not fetched again."""
    source, elsewhere = write_checkpoint(tmp_path / "source", BIG), Store(tmp_path / "elsewhere")
    with misbehaving(serve_memory()) as server:
        name = f"{server.host}/n/m"
        create(name, source, store=elsewhere, quantize="int8")
        push(name, store=elsewhere)
        with pytest.raises(NoSpace, match="more bytes"):
            pull(name, store=Store(small_mount))
        assert files(Store(small_mount)) == {}
        with pytest.raises(NoSpace, match="No space left"):
            pull(name, store=Store(small_mount, Optimist()))
        store = Store(small_mount)
        arrived = len(store.list_blobs())
        assert arrived > 0
        assert not store.list_names()
        assert not verify(store).damage
        subprocess.run(["mount", "-o", "remount,size=4m", str(small_mount)], check=True)
        done = pull(name, store=store)
        assert done.fetched == done.blobs - arrived
    assert files(store) == files(elsewhere)


def test_a_repair_in_a_real_file_system_that_is_too_small(
    small_mount: Path, tmp_path: Path
) -> None:
    """Told before the first byte; filled up, what was damaged is as it was or whole."""
    source = write_checkpoint(tmp_path / "source", LAYERS)
    store = Store(small_mount)
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_mount)], check=True)
    made = create("m", source, store=store, quantize="int8")
    gone = store.get_manifest(made.name).tensor_refs()
    for ref in gone:
        store.remove_blob(ref.digest)
    prune(store, 0)
    subprocess.run(["mount", "-o", "remount,size=512k", str(small_mount)], check=True)
    known = Known(store, str(source))
    steps = plan_repair(store, verify(store), known)
    with pytest.raises(NoSpace, match="are needed"):
        repair(store, steps, known)
    assert len(verify(store).damage) == len(gone)
    with pytest.raises(NoSpace, match="No space left"):
        repair(Store(small_mount, Optimist()), steps, known)
    found = {damage.kind for damage in verify(store).damage}
    assert found == {"blob_missing"}
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_mount)], check=True)
    assert all(step.done for step in repair(store, steps, known))
    assert not verify(store).damage
