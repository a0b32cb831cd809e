"""Blobs that are being fetched: a file with holes, and a list of what of it is there.

    <root>/.quantmill/partial/sha256-<hex>          the bytes, each in its place
    <root>/.quantmill/partial/sha256-<hex>.spans    lines `<start> <end>` of what has been written

The list is a hint: before a blob gets its name all its bytes are read and hashed.
"""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

from quantmill.blobwriter import CHUNK, Pending
from quantmill.digests import Digest
from quantmill.errors import Busy, StoreError
from quantmill.files import is_file
from quantmill.spans import Span, missing
from quantmill.store import Store

_LONGEST_LIST = 1 << 22
_MOST_HOLES = 1000


class Partial:
    """One blob on its way, held by this process alone; raises Busy when another one has it."""

    def __init__(self, store: Store, digest: Digest, size: int) -> None:
        self.digest, self.size = digest, size
        self._disk, self._lock = store.disk, threading.Lock()
        self._path, self._fd = self._opened(store)
        self._list = self._path.with_name(f"{self._path.name}.spans")
        self.have = self._listed()
        self._closed = False

    @property
    def there(self) -> int:
        """How many bytes are there."""
        return self.size - sum(span.size for span in missing(self.size, self.have))

    def _opened(self, store: Store) -> tuple[Path, int]:
        while True:
            path, fd = store.disk.open(store.partials, self.digest.file_name)
            try:
                if not self._disk.claim(fd, path):
                    raise Busy(
                        f"another process is fetching blob {self.digest.short}",
                        hint="wait until it has finished, then run the command again",
                    )
                if self._disk.is_same(fd, path):
                    if is_file(os.fstat(fd)):
                        return path, fd
                    raise StoreError(f"{path} is no file", hint="remove it")
            except BaseException:
                self._disk.close(fd, path)
                raise
            self._disk.close(fd, path)  # whoever had it has just finished: it is a blob now

    def _listed(self) -> list[Span]:
        """The spans of the list that the file is long enough for; none where it is no list."""
        try:
            info = self._disk.info(self._list, follow=False)
            if info is not None and not is_file(info):
                self._disk.remove(self._list)  # a link would be followed, a pipe waited for
                return []
            lines = self._disk.read_file(self._list, _LONGEST_LIST).split(b"\n")
        except StoreError:  # a hint that cannot be read costs time only
            return []
        length = min(os.fstat(self._fd).st_size, self.size)
        found = []
        for line in lines[:-1]:  # a last line without its end may be cut
            numbers = line.split()
            if len(numbers) == 2 and all(n.isdigit() and len(n) < 20 for n in numbers):
                span = Span(int(numbers[0]), int(numbers[1]))
                if span.size > 0 and span.end <= length:
                    found.append(span)
        # each hole costs a request; connections that break leave a few
        return found if len(missing(self.size, found)) <= _MOST_HOLES else []

    def write(self, data: bytes, offset: int) -> None:
        """Put bytes in their place."""
        self._disk.write(self._fd, memoryview(data), offset, self._path)

    def note(self, span: Span, *, listed: bool = True) -> None:
        """Remember that these bytes are there; in the list, too, where a crash may follow."""
        with self._lock:
            self.have.append(span)
            if listed and not self._closed:
                self._disk.append(self._list, b"%d %d\n" % (span.start, span.end))

    def restart(self) -> None:
        """Forget everything."""
        with self._lock:
            self.have.clear()
            self._disk.remove(self._list)
            self._disk.truncate(self._fd, 0, self._path)

    def found_digest(self) -> Digest:
        """The digest of the bytes in the file, all read."""
        found, buffer, at = hashlib.sha256(), memoryview(bytearray(CHUNK)), 0
        while at < self.size:
            count = self._disk.read_into(self._fd, buffer[: self.size - at], at, self._path)
            if not count:
                break
            found.update(buffer[:count])
            at += count
        return Digest(found.hexdigest())

    def finish(self) -> Pending:
        """The complete blob, to be committed; its digest must have been compared."""
        self._disk.truncate(self._fd, self.size, self._path)
        return Pending(self.digest, self.size, self._path)

    def committed(self) -> None:
        """The blob has its name: nothing stays here."""
        self._disk.remove(self._list)
        self.close()

    def close(self) -> None:
        """Let the file go; what is there stays for the next time."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._disk.close(self._fd, self._path)
