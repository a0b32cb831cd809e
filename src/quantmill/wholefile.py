"""A file of the user's that is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from quantmill.errors import BadRequest, NotFound
from quantmill.files import Disk, is_file


def write_whole(path: Path, data: bytes, disk: Disk | None = None) -> None:
    """Write a file under a temporary name beside it, then give it its name, replacing a file.

    A link is followed. Raises BadRequest for what is no file (a directory, a device), NotFound for
    a folder that is not there, StoreError and NoSpace when the disk refuses.
    """
    disk = disk or Disk()
    target = Path(os.path.realpath(path))
    there = disk.info(target)
    if there is not None and not is_file(there):
        raise BadRequest(f"{path} is there and no file", hint="give another path; - is stdout")
    if disk.info(target.parent) is None:
        raise NotFound(f"{path}: there is no folder {target.parent}", hint="make it first")
    temporary, fd = disk.create(target.parent, f".{target.name}-")
    try:
        try:
            disk.write(fd, memoryview(data), 0, temporary)
        finally:
            disk.close(fd, temporary)
        disk.sync(temporary)
        disk.rename(temporary, target)
    except BaseException:
        disk.remove(temporary)
        raise
