"""Where uploads of long blobs go on, noted so that the next run can ask for them.

    <root>/.quantmill/uploads/<hex>     the address of an upload, in one line

The name is the SHA-256 of registry, repository and digest. An address may hold what lets others go
on with the upload, so nobody but its owner can read the file. A note is a hint: the registry is
asked how much it has. Without one, as in a store that cannot be written to, a blob starts anew.
"""

from __future__ import annotations

import os
from contextlib import suppress

from quantmill.addresses import Origin, origin_of
from quantmill.digests import Digest, digest_of
from quantmill.errors import StoreError
from quantmill.files import Disk
from quantmill.store import Store

_LONGEST = 8192


class UploadNote:
    """The note on one blob on its way to a repository, held by this process alone.

    Nothing here fails: where the file cannot be had, or another process has it, there is no note.
    """

    def __init__(self, store: Store, origin: Origin, repository: str, digest: Digest) -> None:
        self._disk: Disk = store.disk
        self._origin = origin
        name = digest_of(f"{origin}/{repository}@{digest}".encode()).hex
        self._path, self._fd = store.uploads / name, -1
        with suppress(StoreError):
            if self._disk.info(self._path):
                self._take()

    def _take(self) -> None:
        """Open the file and hold it, unless another process does."""
        with suppress(StoreError):
            _, self._fd = self._disk.open(self._path.parent, self._path.name)
            with suppress(StoreError):
                own = os.fstat(self._fd).st_uid == os.geteuid()
                # whoever had it may have removed it; another user's may lead anywhere
                held = own and self._disk.claim(self._fd, self._path)
                if held and self._disk.is_same(self._fd, self._path):
                    self._disk.make_private(self._fd, self._path)
                    return
            self.close()

    def read(self) -> str | None:
        """The address that was noted, where it is one of the registry; else None."""
        try:
            data = self._disk.read_file(self._path, _LONGEST) if self._fd >= 0 else b""
            line, end, _ = data.decode("ascii").partition("\n")
        except (StoreError, UnicodeDecodeError):
            return None
        whole = bool(end) and line.isprintable() and " " not in line
        return line if whole and origin_of(line) == self._origin else None

    def write(self, url: str) -> None:
        """Note where the upload goes on; an address elsewhere is not noted."""
        if origin_of(url) != self._origin or len(url) >= _LONGEST:
            return
        if self._fd < 0:
            self._take()
        if self._fd >= 0:
            with suppress(StoreError):
                self._disk.write(self._fd, memoryview(f"{url}\n".encode()), 0, self._path)

    def remove(self) -> None:
        """The blob is there, or the upload cannot be gone on with: nothing stays."""
        if self._fd >= 0:
            with suppress(StoreError):
                self._disk.remove(self._path)
            self.close()

    def close(self) -> None:
        """Let the note go; what it says stays for the next time."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with suppress(StoreError):
                self._disk.close(fd, self._path)
