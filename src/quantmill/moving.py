"""What is moved to and from registries, as it is told to whoever watches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from quantmill.digests import Digest
from quantmill.manifest import BlobRef


@dataclass(frozen=True, slots=True)
class Moving:
    """Progress: bytes of one blob and of all; blobs that are done, those that were there too."""

    digest: Digest
    blob_bytes: int
    blob_size: int
    bytes: int
    bytes_total: int
    blobs: int
    blobs_total: int


Report = Callable[[Moving], None]


class Meter:
    """Adds up what has been moved, and tells whoever wants to know."""

    def __init__(self, refs: Iterable[BlobRef], report: Report | None) -> None:
        self._sizes = {ref.digest: ref.size for ref in refs}
        self._moved = dict.fromkeys(self._sizes, 0)
        self._total, self._sum = sum(self._sizes.values()), 0
        self._report, self._lock, self._finished = report, threading.Lock(), 0

    def set(self, digest: Digest, count: int) -> None:
        """So many bytes of this blob are there."""
        self.add(digest, count - self._moved[digest])

    def add(self, digest: Digest, count: int) -> None:
        """So many more bytes of this blob are there; fewer, where some were lost."""
        with self._lock:
            self._moved[digest] += count
            self._sum += count
            self._tell(digest)

    def finished(self, digest: Digest) -> None:
        """All of this blob is there."""
        with self._lock:
            self._finished += 1
            self._sum += self._sizes[digest] - self._moved[digest]
            self._moved[digest] = self._sizes[digest]
            self._tell(digest)

    def _tell(self, digest: Digest) -> None:
        if self._report is not None:
            self._report(
                Moving(digest, self._moved[digest], self._sizes[digest], self._sum, self._total,
                       self._finished, len(self._sizes))
            )  # fmt: skip
