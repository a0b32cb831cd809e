"""Writing a blob: a temporary file, hashed on the way, that gets its name in `Store.commit`."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from quantmill.digests import Digest
from quantmill.errors import Corrupt, StoreError
from quantmill.files import Disk

# Not a digest, so collectors take it for what it is; the prefix is the one Ollama uses.
TEMP_BLOB = "sha256-tmp-"
CHUNK = 1 << 20
"""Bytes read or hashed at once."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A blob that is complete in a temporary file and waits for `Store.commit`."""

    digest: Digest
    size: int
    path: Path


class BlobWriter:
    """A blob being written. Leave the context without `finish` and nothing remains."""

    def __init__(self, disk: Disk, folder: Path) -> None:
        self._disk, self._hash, self._size = disk, hashlib.sha256(), 0
        self._path, fd = disk.create(folder, TEMP_BLOB)
        self._fd: int | None = fd
        self._finished = False

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._finished:
            with suppress(StoreError):  # why it was left says more than what clearing up met
                self._close()
            with suppress(StoreError):
                self._disk.remove(self._path)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self._disk.write(self._open_fd(), view, self._size, self._path)
        self._size += len(view)

    def write_ahead(self, data: bytes | memoryview, distance: int) -> None:
        """Write bytes `distance` beyond the end, to be taken in when everything before is there."""
        view = memoryview(data).cast("B")
        self._disk.write(self._open_fd(), view, self._size + distance, self._path)

    def take_in(self, count: int) -> None:
        """Append `count` bytes that `write_ahead` put there."""
        buffer = memoryview(bytearray(min(count, CHUNK)))
        while count:
            part = buffer[:count]
            done = self._disk.read_into(self._open_fd(), part, self._size, self._path)
            if not done:
                raise Corrupt(f"{self._path}: bytes that were written are not there")
            self._hash.update(part[:done])
            self._size += done
            count -= done

    def _open_fd(self) -> int:
        if self._fd is None:
            raise ValueError("write to a finished blob")
        return self._fd

    def finish(self) -> Pending:
        """Close the file and check its length; the blob gets its name in `Store.commit`."""
        self._close()
        found = self._disk.info(self._path)
        length = found.st_size if found else 0
        if length != self._size:
            raise Corrupt(f"{self._path}: wrote {self._size} bytes, the file has {length}")
        self._finished = True
        return Pending(Digest(self._hash.hexdigest()), self._size, self._path)

    def _close(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            self._disk.close(fd, self._path)
