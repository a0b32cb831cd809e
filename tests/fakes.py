"""Stand-ins around a store: a tiny model, a failing disk, a power cut, another process, a pace."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantmill import creation, mediatypes
from quantmill.blobwriter import Pending
from quantmill.digests import digest_of
from quantmill.errors import StoreError
from quantmill.files import Disk, translated
from quantmill.locking import LOCK_FILE
from quantmill.manifest import BlobRef, manifest_bytes
from quantmill.names import parse_name
from quantmill.pacing import pace
from quantmill.store import OWN_FOLDER, Store

if TYPE_CHECKING:
    import pytest


def write_file(path: Path, data: bytes = b"{}") -> Path:
    """A file with these bytes, and its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def finished(store: Store, data: bytes) -> Pending:
    """A blob that is written and not committed."""
    with store.new_blob() as writer:
        writer.write(data)
        return writer.finish()


def put(store: Store, *contents: bytes) -> list[BlobRef]:
    """Commit blobs of these contents together."""
    store.commit([finished(store, data) for data in contents])
    return [BlobRef(mediatypes.LICENSE, digest_of(data), len(data)) for data in contents]


def put_model(store: Store, name: str, *contents: bytes) -> bytes:
    """A model of these blobs, the first one its config; returns the manifest's bytes."""
    config, *refs = put(store, *contents)
    raw = manifest_bytes(config, refs)
    store.put_manifest(parse_name(name), raw)
    return raw


def files(store: Store) -> dict[str, bytes]:
    """Every file of the store, the lock and journals aside."""
    return {
        path.relative_to(store.root).as_posix(): path.read_bytes()
        for path in sorted(store.root.rglob("*"))
        if path.is_file() and path.name != LOCK_FILE and OWN_FOLDER not in path.parts
    }


class FaultyDisk(Disk):
    """A disk that counts its operations and fails number `fail_at`, or all from there on.

    `done` lists operations and paths in order, the failed ones too. `lose_unsynced` undoes what a
    power cut at this moment might undo.
    """

    def __init__(
        self, fail_at: int | None = None, *, forever: bool = False, code: int = errno.EIO
    ) -> None:
        self.done: list[tuple[str, Path]] = []
        self._fail_at, self._forever, self._code = fail_at, forever, code
        self._unsynced: set[Path] = set()
        self._before_rename: dict[Path, bytes | None] = {}

    @property
    def operations(self) -> list[str]:
        """The operations in order, without their paths."""
        return [operation for operation, _ in self.done]

    def _step(self, operation: str, path: Path) -> None:
        number = len(self.done)
        self.done.append((operation, path))
        if self._fail_at is None or number < self._fail_at:
            return
        if self._forever or number == self._fail_at:
            with translated(path):
                raise OSError(self._code, os.strerror(self._code))

    def create(self, folder: Path, prefix: str) -> tuple[Path, int]:
        self._step("create", folder)
        path, fd = super().create(folder, prefix)
        self._unsynced.add(path)
        return path, fd

    def write(self, fd: int, data: memoryview, offset: int, path: Path) -> None:
        try:
            self._step("write", path)
        except StoreError:  # a failing write may have written something
            super().write(fd, data[: len(data) // 2], offset, path)
            raise
        super().write(fd, data, offset, path)

    def append(self, path: Path, data: bytes) -> None:
        self._step("append", path)
        super().append(path, data)

    def close(self, fd: int, path: Path) -> None:
        super().close(fd, path)  # a descriptor is gone even when its close fails
        self._step("close", path)

    def sync(self, path: Path) -> None:
        self._step("sync", path)
        super().sync(path)
        self._unsynced.discard(path)

    def sync_folder(self, folder: Path) -> None:
        self._step("sync_folder", folder)
        Disk.sync(Disk(), folder)
        self._before_rename = {p: b for p, b in self._before_rename.items() if p.parent != folder}

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename", target)
        self._before_rename.setdefault(target, target.read_bytes() if target.is_file() else None)
        super().rename(source, target)
        if source in self._unsynced:
            self._unsynced ^= {source, target}

    def remove(self, path: Path) -> None:
        self._step("remove", path)
        super().remove(path)

    def touch(self, path: Path) -> None:
        self._step("touch", path)
        super().touch(path)

    def make_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            self._step("make_folder", folder)
        super().make_folder(folder)

    def lose_unsynced(self, *, renames: bool) -> None:
        """Empty the files that were not synced; with `renames`, take back those not synced."""
        for path in self._unsynced:
            if path.exists():
                path.write_bytes(b"")
        for path, before in self._before_rename.items() if renames else ():
            path.unlink(missing_ok=True)
            if before is not None:
                path.write_bytes(before)


_HOLD = """
import sys
from quantmill.store import Store
with Store(sys.argv[1]).writing():
    print("writing", flush=True)
    sys.stdin.read()
"""


@contextmanager
def writer_elsewhere(root: Path) -> Iterator[None]:
    """Another process writes to the store at `root` inside this block."""
    command = [sys.executable, "-c", _HOLD, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == b"writing\n"
        yield
        child.stdin.close()


def paces(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """Whole tensors and pieces of a few rows, by one worker and by three: a label and workers."""
    for piece_bytes in (1 << 20, 16384):
        monkeypatch.setattr(
            creation, "pace", lambda *a, n=piece_bytes: replace(pace(*a), piece_bytes=n)
        )
        for workers in (1, 3):
            yield f"{workers}-{piece_bytes}", workers
