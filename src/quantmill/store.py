"""The store on disk: blobs under their digest, manifests under their name (docs/store.md).

    <root>/blobs/sha256-<64 hex>
    <root>/manifests/<host>/<namespace>/<model>/<tag>

A blob is written to a temporary file, hashed on the way, synced and renamed; the manifest that
names it follows last, the same way. A reader sees a model whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from quantmill.blobwriter import CHUNK, BlobWriter, Pending
from quantmill.digests import Digest, parse_digest
from quantmill.errors import BadName, Corrupt, NotFound, StoreError
from quantmill.files import Disk, is_file, is_folder
from quantmill.locking import locked
from quantmill.manifest import MAX_MANIFEST, Manifest, parse_manifest
from quantmill.names import ModelName, name_from_path

TEMP_MANIFEST = ".tmp-"
SYNC_THREADS = 8
"""Files synced at once: on ext4 that takes a third of the time of one after the other."""

OWN_FOLDER = ".quantmill"
"""What Ollama has no counterpart of lies here: notes on unfinished work, blobs half fetched."""


def default_root(environ: Mapping[str, str]) -> Path:
    """QUANTMILL_STORE, else OLLAMA_MODELS, else `.ollama/models` in the user's home."""
    for variable in ("QUANTMILL_STORE", "OLLAMA_MODELS"):
        if environ.get(variable):
            return Path(environ[variable]).expanduser()
    return Path.home() / ".ollama" / "models"


@dataclass(frozen=True, slots=True)
class BlobFile:
    """A file in the blobs folder; `digest` is None for temporary and foreign files."""

    path: Path
    digest: Digest | None
    size: int
    age: float


@dataclass(frozen=True, slots=True)
class StoredName:
    """A manifest file: its name, bytes on disk and time of the last change (seconds)."""

    name: ModelName
    path: Path
    modified: float


class Store:
    """A directory of blobs and manifests that Ollama reads and writes too."""

    def __init__(self, root: str | Path | None = None, disk: Disk | None = None) -> None:
        self.root = default_root(os.environ) if root is None else Path(root)
        self.disk = disk or Disk()
        self.blobs = self.root / "blobs"
        self.manifests = self.root / "manifests"

    def free_bytes(self) -> int | None:
        """Free space where the store is, or will be; None where that cannot be told."""
        for folder in (self.root, *self.root.absolute().parents):
            if is_folder(self.disk.info(folder)):
                return self.disk.free(folder)
        return None

    # -- blobs -------------------------------------------------------------------------------------

    def blob_path(self, digest: Digest) -> Path:
        """Where a blob lies, whether or not it is there."""
        return self.blobs / digest.file_name

    def new_blob(self) -> BlobWriter:
        """Start writing a blob whose digest is not known yet."""
        return BlobWriter(self.disk, self.blobs)

    def commit(self, pending: Iterable[Pending]) -> int:
        """Make complete blobs durable and give them their names; returns how many were new.

        All are synced first, then renamed, then the folder is synced once. A blob that is there
        already is kept as `keep` does; one whose bytes are not what its name says is replaced.
        """
        new: dict[Digest, Pending] = {}
        held: dict[Digest, Pending] = {}
        for blob in pending:
            if blob.digest in new or blob.digest in held:
                self.disk.remove(blob.path)
            elif self.holds(blob.digest, blob.size):
                held[blob.digest] = blob
            else:
                new[blob.digest] = blob
        if new:
            self.disk.make_folder(self.blobs)
        self._sync_all([blob.path for blob in new.values()])
        for blob in new.values():
            self.disk.rename(blob.path, self.blob_path(blob.digest))
        if new and not held:
            self.disk.sync_folder(self.blobs)
        self.keep(held)
        for blob in held.values():
            self.disk.remove(blob.path)
        return len(new)

    def keep(self, digests: Iterable[Digest]) -> None:
        """Make blobs that are there durable, and set their times to now.

        Whoever wrote them, Ollama or a command that was killed, may not have synced file or folder.
        The new time lets collectors with an age limit spare them.
        """
        paths = [self.blob_path(digest) for digest in digests]
        for path in paths:
            self.disk.touch(path)
        if paths:
            self._sync_all(paths)
            self.disk.sync_folder(self.blobs)

    def _sync_all(self, paths: list[Path]) -> None:
        """Sync files, several at once: the file system commits them together."""
        if len(paths) == 1:
            self.disk.sync(paths[0])
            return
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(min(SYNC_THREADS, len(paths) or 1), "sync") as pool:
            list(pool.map(self.disk.sync, paths))

    def holds(self, digest: Digest, size: int) -> bool:
        """Whether a blob is there whole: its size right and its digest recomputed."""
        found = self.disk.info(self.blob_path(digest), follow=False)
        if not is_file(found) or found.st_size != size:
            return False
        try:
            return self.hash_blob(digest) == digest
        except NotFound:  # removed meanwhile
            return False

    def refresh(self, digests: Iterable[Digest]) -> None:
        """Set blobs' times to now, where they are: collectors with an age limit spare them."""
        for digest in digests:
            with suppress(NotFound):
                self.disk.touch(self.blob_path(digest))

    def discard(self, pending: Iterable[Pending]) -> None:
        """Remove complete blobs that will not be committed, as far as they can be removed."""
        for blob in pending:
            with suppress(StoreError):  # the error that led here is the one to tell
                self.disk.remove(blob.path)

    def blob_size(self, digest: Digest) -> int:
        """Size of a blob in bytes; raises NotFound."""
        path = self.blob_path(digest)
        found = self.disk.info(path)
        if found is None:
            raise NotFound(f"{path}: {os.strerror(errno.ENOENT)}")
        if not is_file(found):
            raise Corrupt(f"{path} is not a regular file")
        return found.st_size

    def read_blob(self, digest: Digest, limit: int) -> bytes:
        """A whole blob of at most `limit` bytes; raises NotFound or Corrupt."""
        return b"".join(self.blob_chunks(digest, 0, self._bounded(digest, limit)))

    def _bounded(self, digest: Digest, limit: int) -> int:
        size = self.blob_size(digest)
        if size > limit:
            raise Corrupt(f"blob {digest.short} has {size} bytes; {limit} is the limit here")
        return size

    def blob_chunks(
        self, digest: Digest, start: int, end: int, chunk: int = CHUNK
    ) -> Iterator[bytes]:
        """The bytes from `start` to `end`, at most `chunk` at a time; raises NotFound, Corrupt."""
        path = self.blob_path(digest)
        with self.disk.reading(path) as fd:
            while start < end:
                part = self.disk.read(fd, min(chunk, end - start), start, path)
                if not part:
                    raise Corrupt(f"blob {digest.short} ends at byte {start}, {end} are needed")
                start += len(part)
                yield part

    def blob_start(self, digest: Digest, count: int) -> tuple[bytes, int]:
        """The first `count` bytes of a blob, fewer if it is shorter, and its size in bytes.

        Raises NotFound, or Corrupt where the blob is not a file.
        """
        path = self.blob_path(digest)
        with self.disk.reading(path) as fd:
            return self.disk.read(fd, count, 0, path), os.fstat(fd).st_size

    def hash_blob(self, digest: Digest) -> Digest:
        """The digest that the bytes on disk really have; raises NotFound or Corrupt."""
        found, buffer, at = hashlib.sha256(), memoryview(bytearray(CHUNK)), 0
        path = self.blob_path(digest)
        with self.disk.reading(path) as fd:
            while count := self.disk.read_into(fd, buffer, at, path):
                found.update(buffer[:count])
                at += count
        return Digest(found.hexdigest())

    def remove_blob(self, digest: Digest) -> None:
        """Remove a blob; one that is gone already is no error."""
        self.disk.remove(self.blob_path(digest))

    @property
    def quarantine(self) -> Path:
        """Folder of files that were found under the name of a blob whose bytes they do not hold."""
        return self.root / OWN_FOLDER / "quarantine"

    def settle_blobs(self) -> None:
        """Make durable which blobs have their names, and which are aside, whoever did it."""
        for folder in (self.quarantine, self.blobs):
            with suppress(NotFound):  # there is none
                self.disk.sync_folder(folder)

    def put_aside(self, digest: Digest) -> Path:
        """Move a damaged blob to the quarantine, durable after `settle_blobs`; where it is now."""
        self.disk.make_folder(self.quarantine)
        for folder in (self.root, self.root / OWN_FOLDER):  # a killed command may have made them
            self.disk.sync_folder(folder)
        target = self.quarantine / f"{digest.file_name}-{os.urandom(4).hex()}"
        self.disk.rename(self.blob_path(digest), target)
        return target

    def remove_if_old(self, file: BlobFile, older_than: float) -> bool:
        """Remove a file unless it is younger by now, or gone; whether it was removed.

        Who takes an unreferenced blob into use sets its time first: then it stays.
        """
        found = self.disk.info(file.path, follow=False)
        if found is None or max(0.0, time.time() - found.st_mtime) < older_than:
            return False
        self.disk.remove(file.path)
        return True

    def list_blobs(self) -> list[BlobFile]:
        """Every regular file in the blobs folder, in name order."""
        now, found = time.time(), []
        for path in self.disk.scan(self.blobs):
            info = self.disk.info(path, follow=False)
            if is_file(info):  # else renamed or removed since the folder was read, or a link
                age = max(0.0, now - info.st_mtime)
                found.append(BlobFile(path, _digest_or_none(path.name), info.st_size, age))
        return found

    # -- manifests ---------------------------------------------------------------------------------

    def spelling(self, name: ModelName) -> ModelName:
        """The name with each part spelled as an existing manifest spells it, case aside."""
        folder, parts = self.manifests, []
        for part in name.parts:
            names = {path.name for path in self.disk.scan(folder)}
            same = sorted(n for n in names if n.lower() == part.lower())
            parts.append(part if part in names or not same else same[0])
            folder = folder / parts[-1]
        host, namespace, model, tag = parts
        return ModelName(model, tag, namespace, host, name.scheme)

    def manifest_path(self, name: ModelName) -> Path:
        """Where a name's manifest lies, whether or not it is there."""
        return self.manifests / self.spelling(name).path

    def get_manifest(self, name: ModelName) -> Manifest:
        """The manifest of a name; raises NotFound or Corrupt."""
        return self._read_manifest(self.manifest_path(name), name.display)

    def manifest_time(self, name: ModelName) -> float:
        """When a name got its manifest, in seconds; raises NotFound."""
        info = self.disk.info(self.manifest_path(name))
        if info is None:
            raise _no_model(name.display)
        return info.st_mtime

    def _read_manifest(self, path: Path, shown: str) -> Manifest:
        info = self.disk.info(path)
        if not is_file(info):  # not a model, as in `list_names`
            raise _no_model(shown)
        if info.st_size > MAX_MANIFEST:
            raise Corrupt(f"manifest of {shown} has {info.st_size} bytes, too many to read")
        return parse_manifest(self._read_small(path, shown), shown)

    def _read_small(self, path: Path, shown: str) -> bytes:
        try:
            return self.disk.read_file(path, MAX_MANIFEST)
        except NotFound:
            raise _no_model(shown) from None
        except Corrupt:
            raise
        except StoreError as error:
            raise Corrupt(f"manifest of {shown}: {error.message}") from None

    def put_manifest(self, name: ModelName, raw: bytes) -> None:
        """Point a name to a manifest, durably and at once. The blobs it names are durable by now.

        The folders on the way are synced too: a command that was killed may have made them.
        """
        target = self.manifest_path(name)
        path, fd = self.disk.create(target.parent, TEMP_MANIFEST)
        try:
            try:
                self.disk.write(fd, memoryview(raw), 0, path)
            finally:
                self.disk.close(fd, path)
            self.disk.sync(path)
            for folder in (self.root, self.manifests, *reversed(target.parent.parents[:2])):
                self.disk.sync_folder(folder)
            self.disk.rename(path, target)
        except BaseException:
            with suppress(StoreError):
                self.disk.remove(path)
            raise
        with suppress(NotFound):  # somebody has removed the name already, and its folder
            self.disk.sync_folder(target.parent)

    def remove_manifest(self, name: ModelName) -> None:
        """Remove a name, and folders that are empty without it; raises NotFound."""
        path = self.manifest_path(name)
        if not is_file(self.disk.info(path)):
            raise _no_model(name.display)
        self.disk.remove(path)
        self.disk.sync_folder(path.parent)
        for folder in list(path.parents)[:3]:
            if not self.disk.remove_folder(folder):
                break

    def settle_names(self) -> None:
        """Make durable what was done to names, by whomever: then blobs may go that none names.

        A removal that was not synced may be undone by a power cut; the name would then be back.
        """
        for level in reversed(self._manifest_folders()):
            for folder in level:
                with suppress(NotFound):  # gone, or none has been made yet
                    self.disk.sync_folder(folder)

    def list_names(self) -> list[StoredName]:
        """Every name with a manifest, sorted; hidden and malformed names are passed over.

        Links are followed, as reading a manifest follows them: what a link leads to is a model, and
        its blobs are in use.
        """
        found = []
        for path, info in self._manifest_files():
            with suppress(BadName):
                name = name_from_path(path.relative_to(self.manifests).as_posix())
                found.append(StoredName(name, path, info.st_mtime))
        return sorted(found, key=lambda s: s.name.parts)

    def _manifest_folders(self) -> list[list[Path]]:
        """The folders that lead to manifests, level by level."""
        levels = [[self.manifests]]
        for _ in range(3):
            below = [path for folder in levels[-1] for path in self.disk.scan(folder)]
            levels.append([path for path in below if is_folder(self.disk.info(path))])
        return levels

    def _manifest_files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Files four levels down. What cannot be looked at is an error: it may be a manifest."""
        for folder in self._manifest_folders()[-1]:
            for path in self.disk.scan(folder):
                info = self.disk.info(path)
                if is_file(info):
                    yield path, info

    @property
    def journals(self) -> Path:
        """Folder of the notes on finished blobs (journal.py)."""
        return self.root / OWN_FOLDER / "journals"

    @property
    def partials(self) -> Path:
        """Folder of blobs that are being fetched (partials.py)."""
        return self.root / OWN_FOLDER / "partial"

    @property
    def uploads(self) -> Path:
        """Folder of the notes on blobs half sent (uploadnotes.py)."""
        return self.root / OWN_FOLDER / "uploads"

    @property
    def provenance(self) -> Path:
        """Folder of the notes on where models came from (provenance.py)."""
        return self.root / OWN_FOLDER / "provenance"

    def provenance_of(self, manifest: Digest) -> Path:
        """Where the notes on a model lie, whether or not there are any."""
        return self.provenance / f"{manifest.hex}.jsonl"

    def stale_files(self) -> list[BlobFile]:
        """Temporary files that an interrupted `put_manifest` left, and what lies in own folders."""
        now = time.time()
        found = [f for f in self._manifest_files() if f[0].name.startswith(TEMP_MANIFEST)]
        for folder in (self.journals, self.partials, self.provenance, self.uploads):
            infos = [(path, self.disk.info(path)) for path in self.disk.scan(folder)]
            found += [(path, info) for path, info in infos if is_file(info)]
        return [
            BlobFile(path, None, info.st_size, max(0.0, now - info.st_mtime))
            for path, info in sorted(found)
        ]

    # -- lock --------------------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold off removal while blobs are written that no manifest names yet."""
        with locked(self.disk, self.root, exclusive=False):
            yield

    @contextmanager
    def removing(self) -> Iterator[None]:
        """Be alone while blobs are removed; raises Busy when another process writes."""
        with locked(self.disk, self.root, exclusive=True):
            yield


def _no_model(shown: str) -> NotFound:
    return NotFound(f"no model named {shown}", hint="`quantmill list` shows what is there")


def _digest_or_none(file_name: str) -> Digest | None:
    try:
        return parse_digest(file_name)
    except BadName:
        return None
