"""Pull: a model from a registry into the store.

The manifest is read first and written last. What the store holds is not fetched; what it lacks is
fetched in parts, several at a time, and gets its name when all its bytes have been hashed.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantmill import provenance, strictjson
from quantmill.addresses import registry_origin
from quantmill.blobwriter import Pending
from quantmill.credentials import Credential, find_login
from quantmill.digests import Digest
from quantmill.errors import Corrupt, NoSpace, RegistryError
from quantmill.manifest import BlobRef, Manifest, parse_manifest
from quantmill.moving import Meter, Report
from quantmill.names import ModelName, as_name
from quantmill.pacing import default_workers
from quantmill.partials import Partial
from quantmill.patience import Patience, Temporary, Tries
from quantmill.registry import Registry
from quantmill.spans import Span, in_parts, missing
from quantmill.store import Store

STREAMS = 4
"""Connections that move bytes at the same time."""

PART = 64 * 2**20
"""Blobs longer than this are fetched in parts of this size."""

PROBE = 2**20
"""The first part of a long blob: the answer shows whether the registry sends parts at all."""

NOTED = 8 * 2**20
"""After so many bytes it is noted what has arrived."""

_OF_ONE_BLOB = frozenset({"not_found", "wrong_size", "digest_mismatch"})
"""Kinds of errors that say nothing about the other blobs of a repository."""

FindLogin = Callable[[str], Credential | None]


@dataclass(frozen=True, slots=True)
class Pulled:
    """What `pull` did. `fetched` blobs were not in the store; `resumed` bytes came earlier."""

    name: ModelName
    digest: Digest
    size: int
    blobs: int
    fetched: int
    fetched_bytes: int
    resumed: int


def pull(
    name: str | ModelName,
    *,
    store: Store | str | Path | None = None,
    insecure: bool = False,
    progress: Report | None = None,
    patience: Patience | None = None,
    find: FindLogin = find_login,
) -> Pulled:
    """Fetch a model from the registry that its name says, and give it that name in the store.

    `insecure` allows plain HTTP. Raises BadName, BadRequest, RegistryError, StoreError. What an
    interrupted call has fetched is used by the next.
    """
    name = as_name(name)
    store = store if isinstance(store, Store) else Store(store)
    with _registry_of(name, insecure, patience, find) as registry:
        raw = registry.manifest(name.parts[-1])
        refs = described_refs(raw, name, registry.origin.shown)
        with store.writing():
            return _into_store(registry, store, name, raw, refs, progress)


def fetch(
    name: ModelName,
    refs: Sequence[BlobRef],
    store: Store,
    *,
    insecure: bool = False,
    patience: Patience | None = None,
    find: FindLogin = find_login,
) -> None:
    """Fetch blobs from the repository of a model, whatever its manifest says by now.

    The store's lock is held. Raises what `pull` raises; blobs that the repository lacks, or has
    damaged, are passed over.
    """
    with _registry_of(name, insecure, patience, find) as registry:
        try:
            _Fetching(registry, store, name, Meter(refs, None)).all(refs)
            return
        except RegistryError as error:
            if error.kind not in _OF_ONE_BLOB:
                raise
    for ref in refs:  # the first failure has stopped the others
        if not store.holds(ref.digest, ref.size):
            with _registry_of(name, insecure, patience, find) as registry:
                try:
                    _Fetching(registry, store, name, Meter([ref], None)).all([ref])
                except RegistryError as error:
                    if error.kind not in _OF_ONE_BLOB:
                        raise


def _registry_of(
    name: ModelName, insecure: bool, patience: Patience | None, find: FindLogin
) -> Registry:
    origin = registry_origin(name, insecure=insecure)
    host, namespace, model, _ = name.parts
    return Registry(
        origin, f"{namespace}/{model}", login=lambda: find(host), patience=patience,
        connections=2 * STREAMS,
    )  # fmt: skip


def _into_store(
    registry: Registry,
    store: Store,
    name: ModelName,
    raw: bytes,
    refs: list[BlobRef],
    progress: Report | None,
) -> Pulled:
    meter = Meter(refs, progress)
    lacking = _lacking(store, refs, meter)
    needed = sum(ref.size for ref in lacking)
    fetch = _Fetching(registry, store, name, meter)
    free = store.free_bytes()
    if free is not None and needed - _there(store, lacking) > free:
        raise NoSpace(
            f"{name.display} needs {needed} more bytes, {free} are free",
            hint="free some space and run the same command again",
        )
    fetch.all(lacking)
    for ref in refs:  # another program may have collected one meanwhile
        if store.blob_size(ref.digest) != ref.size:
            raise Corrupt(f"blob {ref.digest.short} of {name.display} has the wrong size")
    manifest = Manifest(None, (), raw)
    store.put_manifest(name, raw)  # also where it is there: it may not be durable
    provenance.note_registry(store, manifest.digest, name)
    resumed = fetch.resumed
    return Pulled(
        store.spelling(name), manifest.digest, sum(r.size for r in refs), len(refs), len(lacking),
        needed - resumed, resumed,
    )  # fmt: skip


def _there(store: Store, refs: Iterable[BlobRef]) -> int:
    """Bytes on disk of what an earlier call began."""
    infos = [store.disk.info(store.partials / ref.digest.file_name) for ref in refs]
    return sum(512 * info.st_blocks for info in infos if info)


# -- the manifest ----------------------------------------------------------------------------------


def described_refs(raw: bytes, name: ModelName, host: str) -> list[BlobRef]:
    """The blobs that a manifest from outside names, each once; raises RegistryError."""
    shown = f"{name.display}, as {host} sends it"
    try:
        manifest = parse_manifest(raw, shown)
        document = strictjson.parse_object(raw)
    except Corrupt as error:
        raise RegistryError(error.message, kind="bad_manifest") from None
    if manifest.config is None or not manifest.blobs:
        raise _bad(shown, _what_else(document))
    found: dict[Digest, BlobRef] = {}
    for ref in manifest.all_refs():
        if ref.name is not None and not _stays_below(ref.name):
            raise _bad(shown, f"the entry name {ref.name!r} leads out of the model")
        if found.setdefault(ref.digest, ref).size != ref.size:
            raise _bad(shown, f"blob {ref.digest.short} has two sizes")
    return list(found.values())


def _what_else(document: dict[str, Any]) -> str:
    if "manifests" in document:
        return "it lists images for several platforms and is no model"
    return "it has no config or no entries, so it is no model"


def _stays_below(path: str) -> bool:
    return "\0" not in path and "\\" not in path and not {"", ".", ".."} & set(path.split("/"))


def _bad(shown: str, what: str) -> RegistryError:
    return RegistryError(f"manifest of {shown}: {what}", kind="bad_manifest")


def _lacking(store: Store, refs: list[BlobRef], meter: Meter) -> list[BlobRef]:
    """Blobs that the store does not hold, or not undamaged, the largest first."""

    def look(ref: BlobRef) -> bool:
        held = store.holds(ref.digest, ref.size)
        if held:
            meter.finished(ref.digest)
        return held

    with ThreadPoolExecutor(default_workers(), "look") as pool:
        held = list(pool.map(look, refs))
    store.keep(ref.digest for ref, there in zip(refs, held, strict=True) if there)
    lacking = [ref for ref, there in zip(refs, held, strict=True) if not there]
    return sorted(lacking, key=lambda ref: (-ref.size, ref.digest))


# -- the blobs -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Blob:
    """A blob being fetched."""

    ref: BlobRef
    partial: Partial | None = None
    parts: int = 0
    resumed: int = 0
    hashed: Digest | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What a piece of work leads to: more work, or a blob that is complete."""

    more: tuple[Callable[[], _Outcome], ...] = ()
    finished: tuple[_Blob, Pending] | None = None


class _Fetching:
    """Fetches blobs, several parts at a time."""

    def __init__(self, registry: Registry, store: Store, name: ModelName, meter: Meter) -> None:
        self._registry, self._store, self._name, self._meter = registry, store, name, meter
        self._blobs: list[_Blob] = []
        self.resumed = 0

    def all(self, refs: Iterable[BlobRef]) -> None:
        """Fetch and commit these blobs. At the first failure everything stops."""
        self._blobs = [_Blob(ref) for ref in refs]
        waiting = deque(self._starter(blob) for blob in self._blobs)
        running: set[Future[_Outcome]] = set()
        with ThreadPoolExecutor(STREAMS, "fetch") as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < 2 * STREAMS:
                        running.add(pool.submit(waiting.popleft()))
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    outcomes = [future.result() for future in done]
                    for outcome in outcomes:
                        waiting.extendleft(reversed(outcome.more))
                    self._commit([o.finished for o in outcomes if o.finished])
            except BaseException:
                self._registry.abort()
                for future in running:
                    future.cancel()
                raise
            finally:
                pool.shutdown()
                for blob in self._blobs:
                    if blob.partial is not None:
                        blob.partial.close()

    def _commit(self, finished: list[tuple[_Blob, Pending]]) -> None:
        self._store.commit([pending for _, pending in finished])
        for blob, _ in finished:
            if blob.partial is not None:
                blob.partial.committed()
            self._meter.finished(blob.ref.digest)
            self.resumed += blob.resumed

    def _starter(self, blob: _Blob) -> Callable[[], _Outcome]:
        return lambda: self._start(blob)

    def _start(self, blob: _Blob) -> _Outcome:
        """Look what is there of a blob, and fetch the first part that is missing."""
        ref = blob.ref
        partial = blob.partial = blob.partial or Partial(self._store, ref.digest, ref.size)
        blob.resumed = partial.there
        self._meter.set(ref.digest, blob.resumed)
        lacking = missing(ref.size, partial.have)
        if lacking:
            first = lacking[0]
            if ref.size > PART:
                first = Span(first.start, min(first.end, first.start + PROBE))
            self._fetch(blob, partial, first, probe=True)
        rest = in_parts(missing(ref.size, partial.have), PART)
        blob.parts = len(rest)
        if not rest:
            return self._complete(blob, partial)
        return _Outcome(tuple(self._worker(blob, partial, span) for span in rest))

    def _worker(self, blob: _Blob, partial: Partial, span: Span) -> Callable[[], _Outcome]:
        def work() -> _Outcome:
            self._fetch(blob, partial, span, probe=False)
            with blob.lock:
                blob.parts -= 1
                last = blob.parts == 0
            return self._complete(blob, partial) if last else _Outcome()

        return work

    def _fetch(self, blob: _Blob, partial: Partial, span: Span, *, probe: bool) -> None:
        """Bring the bytes of a span, or the whole blob where the registry sends no parts."""
        size, host = blob.ref.size, self._registry.origin.shown
        patience = self._registry.patience
        tries, cursor = Tries(patience, self._registry.stop), _Cursor(span.start)
        best = span.start
        while cursor.at < span.end:
            try:
                asked = Span(cursor.at, span.end)
                with self._registry.blob(blob.ref.digest, size, asked) as body:
                    if body.span.start != asked.start or body.span.end > asked.end:
                        if not probe:
                            raise Temporary(f"{host} sends a blob in parts and then no longer")
                        span, cursor = body.span, _Cursor(0)
                        self._forget(blob, partial)
                    self._write(blob, partial, cursor, body.pieces)
                if cursor.at < span.end:
                    raise Temporary(f"{host} sends less of blob {blob.ref.digest.short} than asked")
            except Temporary as error:
                if cursor.at - best >= patience.counts:
                    tries.forgive()
                best = max(best, cursor.at)
                tries.failed(error)
            finally:
                # a blob that came at once is about to get its name
                cursor.note(partial, listed=cursor.at < size or cursor.noted > 0)
        if span == Span(0, size):
            blob.hashed = cursor.digest

    def _write(
        self, blob: _Blob, partial: Partial, cursor: _Cursor, pieces: Iterable[bytes]
    ) -> None:
        for piece in pieces:
            partial.write(piece, cursor.at)
            cursor.passed(piece)
            self._meter.add(blob.ref.digest, len(piece))
            if cursor.at - cursor.noted >= NOTED:
                cursor.note(partial)

    def _forget(self, blob: _Blob, partial: Partial) -> None:
        partial.restart()
        blob.resumed = 0
        self._meter.set(blob.ref.digest, 0)

    def _complete(self, blob: _Blob, partial: Partial) -> _Outcome:
        """Compare the digest of a blob that is all there."""
        found, blob.hashed = blob.hashed or partial.found_digest(), None
        if found == blob.ref.digest:
            return _Outcome(finished=(blob, partial.finish()))
        again = blob.resumed > 0  # what an earlier call left may be damaged
        self._forget(blob, partial)
        if again:
            return _Outcome((self._starter(blob),))
        raise RegistryError(
            f"{self._registry.origin.shown} sends bytes as blob {blob.ref.digest} of "
            f"{self._name.display} that have another digest",
            kind="digest_mismatch",
            hint="its copy is damaged: whoever owns the model must push it again",
        )


class _Cursor:
    """How far the writing of a span has got, and the hash of its bytes."""

    def __init__(self, start: int) -> None:
        self.at = self.noted = start
        self._hash = None if start else hashlib.sha256()

    @property
    def digest(self) -> Digest | None:
        """The digest of all bytes from the blob's start, None where the span starts elsewhere."""
        return Digest(self._hash.hexdigest()) if self._hash else None

    def passed(self, piece: bytes) -> None:
        """These bytes have been written."""
        self.at += len(piece)
        if self._hash is not None:
            self._hash.update(piece)

    def note(self, partial: Partial, *, listed: bool = True) -> None:
        """Have it remembered what has been written."""
        if self.at > self.noted:
            partial.note(Span(self.noted, self.at), listed=listed)
            self.noted = self.at
