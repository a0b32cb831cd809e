"""Notes on finished blobs, so that a `create` that is run again need not compute them again.

A line for each blob, in one file for each source: what was to be made of what, and the digest that
came out. What it was made of is named by the identities of the source files, which change with
every write; what was to be made, by everything in the plan that bytes depend on. A note is a hint:
the blob itself is read and checked before it is used (docs/store.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from quantmill import strictjson
from quantmill.digests import Digest, digest_of, parse_digest
from quantmill.errors import BadName, StoreError
from quantmill.plans import CALIBRATED, BlobSpec, Plan
from quantmill.source import OpenSource
from quantmill.store import Store

_MAX_BYTES = 64 * 2**20
_LAYOUT = 1


@dataclass(frozen=True, slots=True)
class Note:
    """A finished blob. `non_finite` counts NaN and infinities of its tensors, as `Written` does."""

    key: str
    digest: Digest
    size: int
    non_finite: Mapping[str, int] = field(default_factory=dict)


class Journal:
    """The notes on one source in a store."""

    def __init__(self, store: Store, plan: Plan, source: OpenSource) -> None:
        self._store, self._plan, self._source = store, plan, source
        self._path = store.journals / f"{digest_of(plan.fingerprint.encode()).hex}.jsonl"
        self._torn = False
        self._notes = self._read()

    def key(self, blob: BlobSpec) -> str:
        """What the blob is to be made of, and how."""
        tensors = self._source.source.tensors
        files = [
            self._source.identity(tensors[n]) for t in blob.tensors for n in (*t.reads, *t.depends)
        ]
        options = self._plan.options
        how: tuple[object, ...] = (options.profile, options.rounding, options.allow_non_finite)
        if any(spec.method in CALIBRATED for spec in blob.tensors):
            how = (*how, self._plan.calibration)
        return digest_of(repr((_LAYOUT, self._plan.version, how, blob, files)).encode()).hex

    def noted(self, key: str) -> Note | None:
        """The note with this key, and nothing looked at."""
        return self._notes.get(key)

    def find(self, key: str, blob: BlobSpec) -> Note | None:
        """The note on a blob that is there, read and found whole; None otherwise."""
        note = self._notes.get(key)
        if note is None or note.size != blob.size:
            return None
        if not self._store.holds(note.digest, note.size):
            return None
        header = blob.header
        return note if self._store.blob_start(note.digest, len(header))[0] == header else None

    def add(self, notes: Iterable[Note]) -> None:
        """Write down blobs that have their names in the store."""
        lines = [
            strictjson.canonical([n.key, str(n.digest), n.size, dict(n.non_finite)]) for n in notes
        ]
        if lines:
            start = [b""] if self._torn else []  # a torn line spoils no more than itself
            self._store.disk.append(self._path, b"\n".join([*start, *lines, b""]))
            self._torn = False

    def forget(self) -> None:
        """Start afresh: drop every note on this source."""
        self._notes = {}
        self._store.disk.remove(self._path)

    def _read(self) -> dict[str, Note]:
        """Lines that make sense; a crash may have left others."""
        try:
            data = self._store.disk.read_file(self._path, _MAX_BYTES)
        except StoreError:  # a hint that cannot be read costs time only
            return {}
        self._torn = not data.endswith(b"\n")
        return {note.key: note for note in map(_parsed, data.splitlines()) if note is not None}


def _parsed(line: bytes) -> Note | None:
    try:
        match strictjson.parse(line):
            case [str(key), str(digest), int(size), dict(counts)] if all(
                isinstance(n, int) for n in counts.values()
            ):
                return Note(key, parse_digest(digest), size, counts)
    except (strictjson.BadJson, BadName):
        pass
    return None
