"""The lock between processes that write to a store and those that remove from it.

An advisory lock on one file, held by the system for a process: it goes when the process does,
however that ends, so there is no stale lock. Readers take none. Ollama knows nothing of it
(docs/store.md).
"""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantmill.errors import Busy, StoreError
from quantmill.files import Disk

LOCK_FILE = ".quantmill.lock"

_MOUNTS = "/proc/self/mountinfo"
_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ceph", "lustre", "beegfs", "gpfs"}
    | {"fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs", "fuse.rclone"}
)
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})


@contextmanager
def locked(disk: Disk, root: Path, *, exclusive: bool) -> Iterator[None]:
    """Hold the store's lock: with other writers, or, `exclusive`, alone.

    Waits for a remover; raises Busy where `exclusive` and another process holds the lock, and
    StoreError of kind `no_locks` where the file system has none.
    """
    disk.make_folder(root)
    path = root / LOCK_FILE
    if exclusive:
        _warn_of_network(root)
    fd = _acquired(disk, path, exclusive=exclusive)
    try:
        yield
    finally:
        disk.close(fd, path)  # lets the lock go


def _acquired(disk: Disk, path: Path, *, exclusive: bool) -> int:
    while True:
        try:
            fd = disk.lock(path, exclusive=exclusive)
        except BlockingIOError:
            raise Busy(
                f"another process is writing to {path.parent}",
                hint="wait until it has finished, then run the command again",
            ) from None
        except OSError as error:
            raise _refused(path, error) from None
        if disk.is_same(fd, path):
            return fd
        disk.close(fd, path)  # the file was removed meanwhile: others would lock another one


def _refused(path: Path, error: OSError) -> StoreError:
    if error.errno not in _NO_LOCKS:
        return StoreError(f"{path}: {error.strerror}", kind="io")
    kind = file_system(path.parent)
    return StoreError(
        f"{path}: the file system{f' ({kind})' if kind else ''} has no locks: {error.strerror}",
        kind="no_locks",
        hint="keep the store on a local disk, or mount the network's with locks",
    )


def _warn_of_network(root: Path) -> None:
    kind = file_system(root)
    if kind in _NETWORK:
        warnings.warn(
            f"{root} is on a network file system ({kind}), where the lock may not be seen by other "
            "machines: remove nothing while one of them writes to this store",
            stacklevel=2,
        )


def file_system(folder: Path, mounts: str = _MOUNTS) -> str | None:
    """The type of the file system a folder is on; None where the system does not tell."""
    try:
        with open(mounts, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError:
        return None
    place, best, found = os.path.realpath(folder), -1, None
    for line in lines:
        left, _, right = line.partition(" - ")
        fields, kinds = left.split(), right.split()
        if len(fields) < 5 or not kinds:
            continue
        point = fields[4].encode("utf-8", "surrogateescape").decode("unicode_escape")
        inside = place == point or place.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= best:  # a later mount covers an earlier one
            best, found = len(point), kinds[0]
    return found
