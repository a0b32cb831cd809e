"""The file operations under the store: the one place where it touches the disk.

Everything that is read or made durable goes through these few calls, so that a test can count them,
fail them or forget what was not synced. Errors of the system come out as StoreError, naming the
path.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeGuard

from quantmill.errors import Corrupt, NoSpace, NotFound, StoreError

FILE_MODE = 0o644
FOLDER_MODE = 0o755
PRIVATE_MODE = 0o600

_NOTHING = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP})
"""What a path that leads to nothing fails with."""

_TRIES = 100
"""How often a folder that others remove is made again."""


class Disk:
    """The real disk."""

    # -- reading -----------------------------------------------------------------------------------

    def free(self, folder: Path) -> int:
        """Bytes that can be written where a folder is."""
        with translated(folder):
            return shutil.disk_usage(folder).free

    def scan(self, folder: Path) -> list[Path]:
        """What lies in a folder, by name; nothing where there is no such folder."""
        with translated(folder):
            try:
                with os.scandir(folder) as entries:
                    return sorted(folder / entry.name for entry in entries)
            except (FileNotFoundError, NotADirectoryError):
                return []

    def info(self, path: Path, *, follow: bool = True) -> os.stat_result | None:
        """What a name is, links followed; None where it is nothing, or a link that leads nowhere.

        Other failures are StoreError: what cannot be looked at may be there.
        """
        with translated(path):
            try:
                return path.stat(follow_symlinks=follow)
            except OSError as error:
                if error.errno in _NOTHING:
                    return None
                raise

    @contextmanager
    def reading(self, path: Path) -> Iterator[int]:
        """A descriptor of a regular file, to read from; raises NotFound, or Corrupt for others."""
        with translated(path):
            # without waiting: a pipe would have it wait for a writer
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise Corrupt(f"{path} is not a regular file")
            yield fd
        finally:
            os.close(fd)

    def read(self, fd: int, count: int, offset: int, path: Path) -> bytes:
        """Read at most so many bytes, fewer perhaps; none at the end."""
        with translated(path):
            return os.pread(fd, count, offset)

    def read_into(self, fd: int, buffer: memoryview, offset: int, path: Path) -> int:
        """Read into a buffer, less than it holds perhaps; how many bytes, 0 at the end."""
        with translated(path):
            return os.preadv(fd, [buffer], offset)

    def read_file(self, path: Path, limit: int) -> bytes:
        """A whole file, or its first `limit` bytes; raises NotFound, or Corrupt for no file."""
        parts, at = [], 0
        with self.reading(path) as fd:
            most = os.fstat(fd).st_size + 1  # one more, so that a file that grows is not cut
            while at < limit and (part := self.read(fd, min(most, limit - at), at, path)):
                parts.append(part)
                at += len(part)
        return b"".join(parts)

    # -- writing -----------------------------------------------------------------------------------

    def create(self, folder: Path, prefix: str) -> tuple[Path, int]:
        """A new file with a name of its own, open for writing: its path and descriptor."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        path = folder / f"{prefix}{os.urandom(8).hex()}"
        with translated(folder):
            for attempt in range(_TRIES):
                try:
                    self.make_folder(folder)
                    return path, os.open(path, flags, FILE_MODE)
                except (FileNotFoundError, NotFound):
                    # another process removed the folder, empty, in between
                    if attempt == _TRIES - 1:
                        raise
        raise AssertionError

    def open(self, folder: Path, name: str) -> tuple[Path, int]:
        """A file of this name, created where it is absent, for reading and writing."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self.make_folder(folder)
        path = folder / name
        with translated(path):
            return path, os.open(path, flags, FILE_MODE)

    def write(self, fd: int, data: memoryview, offset: int, path: Path) -> None:
        """Write all of `data` from `offset` on."""
        with translated(path):
            while data:
                count = os.pwrite(fd, data, offset)
                data, offset = data[count:], offset + count

    def truncate(self, fd: int, size: int, path: Path) -> None:
        """Make a file this long: cut it, or add zeros."""
        with translated(path):
            os.ftruncate(fd, size)

    def append(self, path: Path, data: bytes) -> None:
        """Add to the end of a file, which is created, with its folder, where it is absent."""
        self.make_folder(path.parent)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        with translated(path):
            fd = os.open(path, flags, FILE_MODE)
            try:
                while data:  # at once as a rule, so that lines of two processes do not mix
                    data = data[os.write(fd, data) :]
            finally:
                os.close(fd)

    def lock(self, path: Path, *, exclusive: bool) -> int:
        """A descriptor that holds an advisory lock on a file, which is created where it is absent.

        A shared lock is waited for; an exclusive one that others hold is BlockingIOError. Other
        errors of the system come out as they are: what they mean depends on the file system.
        """
        import fcntl

        flags = os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            fd = os.open(path, os.O_RDWR | flags, FILE_MODE)
        except PermissionError:  # of another user, in a store that several share
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def claim(self, fd: int, path: Path) -> bool:
        """Lock an open file for this process; False where another process or descriptor has it."""
        import fcntl

        with translated(path):
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    def is_same(self, fd: int, path: Path) -> bool:
        """Whether a path leads to the file that a descriptor is of."""
        with translated(path):
            try:
                return os.path.samestat(os.fstat(fd), path.stat())
            except FileNotFoundError:
                return False

    def close(self, fd: int, path: Path) -> None:
        """Close a descriptor that `create`, `open` or `lock` gave."""
        with translated(path):
            os.close(fd)

    def sync(self, path: Path) -> None:
        """Wait until the file's content is on stable storage."""
        with translated(path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _full_sync(fd)
            finally:
                os.close(fd)

    def sync_folder(self, folder: Path) -> None:
        """Wait until the folder's entries are on stable storage."""
        self.sync(folder)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file its final name, replacing what was there."""
        with translated(target):
            os.replace(source, target)

    def remove(self, path: Path) -> None:
        """Remove a file; one that is gone already is no error."""
        with translated(path):
            path.unlink(missing_ok=True)

    def touch(self, path: Path) -> None:
        """Set a file's time to now: collectors with an age limit then leave it alone.

        A file of another user, as in a store that several share, keeps its time.
        """
        with translated(path), suppress(PermissionError):
            os.utime(path)

    def make_folder(self, folder: Path) -> None:
        """Create a folder and its parents, each made durable in its own parent."""
        if is_folder(self.info(folder)):
            return
        with translated(folder):
            self.make_folder(folder.parent)
            self.new_folder(folder)
            self.sync(folder.parent)

    def new_folder(self, folder: Path) -> None:
        """Create one folder, not durable yet; one that another process made is no error."""
        with translated(folder):
            folder.mkdir(FOLDER_MODE, exist_ok=True)

    def remove_folder(self, folder: Path) -> bool:
        """Remove a folder if it is empty; whether it was."""
        try:
            folder.rmdir()
        except OSError:
            return False
        return True

    def make_private(self, fd: int, path: Path) -> None:
        """Let nobody but the owner read or write a file that `open` gave."""
        with translated(path):
            os.fchmod(fd, PRIVATE_MODE)


def is_file(found: os.stat_result | None) -> TypeGuard[os.stat_result]:
    """Whether what `Disk.info` found is a regular file."""
    return found is not None and stat.S_ISREG(found.st_mode)


def is_folder(found: os.stat_result | None) -> TypeGuard[os.stat_result]:
    """Whether what `Disk.info` found is a folder."""
    return found is not None and stat.S_ISDIR(found.st_mode)


def _full_sync(fd: int) -> None:
    """Fsync; on Apple systems the drive's own cache must be flushed as well."""
    try:
        import fcntl

        full = getattr(fcntl, "F_FULLFSYNC", None)
        if full is not None:
            fcntl.fcntl(fd, full)
            return
    except OSError:  # not every file system there knows it
        pass
    os.fsync(fd)


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn system errors about `path` into StoreError, NotFound or NoSpace."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise NoSpace(
                f"{path}: {reason}", hint="free some space and run the same command again"
            ) from None
        if error.errno == errno.ENOENT:
            raise NotFound(f"{path}: {reason}") from None
        raise StoreError(f"{path}: {reason}", kind="io") from None
