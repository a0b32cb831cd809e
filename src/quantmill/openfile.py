"""One file of a source, open for reading: bytes at an offset, and whether it changed meanwhile."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from quantmill.errors import BadSource


class OpenFile:
    """An open file that errors call `name`; it may be read from any thread.

    `size` is in bytes, as it was on opening; `identity` changes with every write to the file.
    Raises OSError where the file cannot be opened.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        # non-blocking, or opening a named pipe would wait for a writer
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        found = os.fstat(self._fd)
        self.size, self._mtime_ns = found.st_size, found.st_mtime_ns
        # no program can set the time of the last change, whatever it does with the others
        self.identity = ":".join(
            str(n)
            for n in (
                found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns,
            )
        )  # fmt: skip
        self.is_regular = stat.S_ISREG(found.st_mode)

    def close(self) -> None:
        """Close the file; closing it again does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, offset: int, length: int) -> bytes:
        """So many bytes from `offset` on; raises BadSource if the file ends before."""
        parts = []
        while length:
            part = os.pread(self._fd, length, offset)
            if not part:
                raise self._changed()
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on; raises BadSource if the file ends before."""
        done = 0
        while done < len(buffer):
            count = _read_at(self._fd, buffer[done:], offset + done)
            if count == 0:
                raise self._changed()
            done += count

    def check_unchanged(self) -> None:
        """Raise BadSource if the file was written to since it was opened."""
        now = os.fstat(self._fd)
        if (now.st_size, now.st_mtime_ns) != (self.size, self._mtime_ns):
            raise self._changed()

    def _changed(self) -> BadSource:
        return BadSource(
            f"{self.name} changed while it was read",
            kind="source_changed",
            hint="wait until the download has finished, then run the command again",
        )


def _read_at(fd: int, buffer: memoryview, offset: int) -> int:
    """Read into a buffer, at most its length; the count of bytes read."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    part = os.pread(fd, len(buffer), offset)  # older macOS: one copy more
    buffer[: len(part)] = part
    return len(part)
