"""The store on disk: blobs under their digest, manifests under their name (docs/store.md).

    <root>/blobs/sha256-<64 hex>
    <root>/manifests/<host>/<namespace>/<model>/<tag>

A blob is written to a temporary file, hashed on the way, synced and renamed; the manifest that
names it follows last, the same way. A reader sees a model whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from quantmill.digests import Digest, parse_digest
from quantmill.errors import BadName, Corrupt, NotFound, StoreError
from quantmill.files import Disk, translated
from quantmill.locking import locked
from quantmill.manifest import MAX_MANIFEST, Manifest, parse_manifest
from quantmill.names import ModelName, name_from_path

# Not a digest, so collectors take it for what it is; the prefix is the one Ollama uses.
TEMP_BLOB = "sha256-tmp-"
TEMP_MANIFEST = ".tmp-"
CHUNK = 1 << 20
"""Bytes read or hashed at once."""

SYNC_THREADS = 8
"""Files synced at once: on ext4 that takes a third of the time of one after the other."""

OWN_FOLDER = ".quantmill"
"""What Ollama has no counterpart of lies here: notes on unfinished work, blobs half fetched."""
UPLOADS = "uploads"  # notes on blobs half sent (uploadnotes.py)


def default_root(environ: Mapping[str, str]) -> Path:
    """QUANTMILL_STORE, else OLLAMA_MODELS, else `.ollama/models` in the user's home."""
    for variable in ("QUANTMILL_STORE", "OLLAMA_MODELS"):
        if environ.get(variable):
            return Path(environ[variable]).expanduser()
    return Path.home() / ".ollama" / "models"


@dataclass(frozen=True, slots=True)
class Pending:
    """A blob that is complete in a temporary file and waits for `Store.commit`."""

    digest: Digest
    size: int
    path: Path


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
        while count:
            with translated(self._path):
                part = os.pread(self._open_fd(), min(count, CHUNK), self._size)
            if not part:
                raise Corrupt(f"{self._path}: bytes that were written are not there")
            self._hash.update(part)
            self._size += len(part)
            count -= len(part)

    def _open_fd(self) -> int:
        if self._fd is None:
            raise ValueError("write to a finished blob")
        return self._fd

    def finish(self) -> Pending:
        """Close the file and check its length; the blob gets its name in `Store.commit`."""
        self._close()
        with translated(self._path):
            length = self._path.stat().st_size
        if length != self._size:
            raise Corrupt(f"{self._path}: wrote {self._size} bytes, the file has {length}")
        self._finished = True
        return Pending(Digest(self._hash.hexdigest()), self._size, self._path)

    def _close(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            self._disk.close(fd, self._path)


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
            if folder.is_dir():
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
        try:
            found = self.blob_path(digest).lstat()
            if not stat.S_ISREG(found.st_mode) or found.st_size != size:
                return False
            return self.hash_blob(digest) == digest
        except (OSError, NotFound):
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
        with translated(self.blob_path(digest)):
            found = self.blob_path(digest).stat()
        if not stat.S_ISREG(found.st_mode):
            raise Corrupt(f"{self.blob_path(digest)} is not a regular file")
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
        with translated(path):
            handle = path.open("rb", buffering=0)
        with handle, translated(path):
            handle.seek(start)
            while start < end:
                part = handle.read(min(chunk, end - start))
                if not part:
                    raise Corrupt(f"blob {digest.short} ends at byte {start}, {end} are needed")
                start += len(part)
                yield part

    def blob_start(self, digest: Digest, count: int) -> tuple[bytes, int]:
        """The first `count` bytes of a blob, fewer if it is shorter, and its size in bytes.

        Raises NotFound, or Corrupt where the blob is not a file.
        """
        path = self.blob_path(digest)
        with translated(path):
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode):
                    raise Corrupt(f"{path} is not a regular file")
                return os.pread(fd, count, 0), found.st_size
            finally:
                os.close(fd)

    def hash_blob(self, digest: Digest) -> Digest:
        """The digest that the bytes on disk really have; raises NotFound or Corrupt."""
        self.blob_size(digest)  # opening a named pipe would wait for a writer
        found, buffer = hashlib.sha256(), memoryview(bytearray(CHUNK))
        path = self.blob_path(digest)
        with translated(path), path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                found.update(buffer[:count])
        return Digest(found.hexdigest())

    def remove_blob(self, digest: Digest) -> None:
        """Remove a blob; one that is gone already is no error."""
        self.disk.remove(self.blob_path(digest))

    @property
    def quarantine(self) -> Path:
        """Folder of files that were found under the name of a blob whose bytes they do not hold."""
        return self.root / OWN_FOLDER / "quarantine"

    def put_aside(self, digest: Digest) -> Path:
        """Move a damaged blob to the quarantine; where it is now."""
        self.disk.make_folder(self.quarantine)
        target = self.quarantine / f"{digest.file_name}-{os.urandom(4).hex()}"
        self.disk.rename(self.blob_path(digest), target)
        self.disk.sync_folder(self.quarantine)
        self.disk.sync_folder(self.blobs)
        return target

    def remove_if_old(self, file: BlobFile, older_than: float) -> bool:
        """Remove a file unless it is younger by now, or gone; whether it was removed.

        Who takes an unreferenced blob into use sets its time first: then it stays.
        """
        try:
            modified = file.path.lstat().st_mtime
        except OSError:
            return False
        if max(0.0, time.time() - modified) < older_than:
            return False
        self.disk.remove(file.path)
        return True

    def list_blobs(self) -> list[BlobFile]:
        """Every regular file in the blobs folder, in name order."""
        now, found = time.time(), []
        for entry in _scan(self.blobs):
            if entry.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):  # renamed or removed since the folder was read
                    info = entry.stat(follow_symlinks=False)
                    digest = _digest_or_none(entry.name)
                    age = max(0.0, now - info.st_mtime)
                    found.append(BlobFile(Path(entry.path), digest, info.st_size, age))
        return sorted(found, key=lambda b: b.path.name)

    # -- manifests ---------------------------------------------------------------------------------

    def spelling(self, name: ModelName) -> ModelName:
        """The name with each part spelled as an existing manifest spells it, case aside."""
        folder, parts = self.manifests, []
        for part in name.parts:
            names = {entry.name for entry in _scan(folder)}
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

    def _read_manifest(self, path: Path, shown: str) -> Manifest:
        try:
            info = path.stat()
            if not stat.S_ISREG(info.st_mode):  # not a model, as in `list_names`
                raise FileNotFoundError
            if info.st_size > MAX_MANIFEST:
                raise Corrupt(f"manifest of {shown} has {info.st_size} bytes, too many to read")
            return parse_manifest(path.read_bytes(), shown)
        except (FileNotFoundError, NotADirectoryError):
            raise _no_model(shown) from None
        except OSError as error:
            raise Corrupt(f"manifest of {shown}: {error.strerror}") from None

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
        self.disk.sync_folder(target.parent)

    def remove_manifest(self, name: ModelName) -> None:
        """Remove a name, and folders that are empty without it; raises NotFound."""
        path = self.manifest_path(name)
        if not path.is_file():
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
        for path in self._manifest_files():
            try:
                name = name_from_path(path.relative_to(self.manifests).as_posix())
            except BadName:
                continue
            with suppress(FileNotFoundError):  # removed since the folder was read
                found.append(StoredName(name, path, path.stat().st_mtime))
        return sorted(found, key=lambda s: s.name.parts)

    def _manifest_folders(self) -> list[list[Path]]:
        """The folders that lead to manifests, level by level."""
        levels = [[self.manifests]]
        for _ in range(3):
            levels.append(
                [
                    Path(entry.path)
                    for folder in levels[-1]
                    for entry in _scan(folder)
                    if _leads_to(entry, os.DirEntry.is_dir)
                ]
            )
        return levels

    def _manifest_files(self) -> Iterator[Path]:
        """Files four levels down."""
        for folder in self._manifest_folders()[-1]:
            for entry in _scan(folder):
                if _leads_to(entry, os.DirEntry.is_file):
                    yield Path(entry.path)

    @property
    def journals(self) -> Path:
        """Folder of the notes on finished blobs (journal.py)."""
        return self.root / OWN_FOLDER / "journals"

    @property
    def partials(self) -> Path:
        """Folder of blobs that are being fetched (partials.py)."""
        return self.root / OWN_FOLDER / "partial"

    def stale_files(self) -> list[BlobFile]:
        """Files that an interrupted `put_manifest` left, notes of all kinds, blobs half fetched."""
        now, found = time.time(), []
        unnamed = [p for p in self._manifest_files() if p.name.startswith(TEMP_MANIFEST)]
        folders = (self.journals, self.partials, self.root / OWN_FOLDER / UPLOADS)
        own = [Path(entry.path) for folder in folders for entry in _scan(folder)]
        for path in (*unnamed, *own):
            if path.is_file():
                with suppress(FileNotFoundError):  # renamed or removed since the folder was read
                    info = path.stat()
                    found.append(BlobFile(path, None, info.st_size, max(0.0, now - info.st_mtime)))
        return sorted(found, key=lambda b: b.path)

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


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    with translated(folder):
        try:
            with os.scandir(folder) as entries:
                return list(entries)
        except (FileNotFoundError, NotADirectoryError):
            return []


def _leads_to(entry: os.DirEntry[str], kind: Callable[[os.DirEntry[str]], bool]) -> bool:
    """Whether an entry is of a kind, links followed; a link in a circle is of none."""
    try:
        return kind(entry)
    except OSError:
        return False


def _digest_or_none(file_name: str) -> Digest | None:
    try:
        return parse_digest(file_name)
    except BadName:
        return None
