"""A disk that knows what would be left of it: after a failed operation, a kill, a power cut.

The model of a power cut: content is durable once its file was synced, a name once its folder was.
Everything since may be there, be gone, or be there in part.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from quantmill.files import Disk, translated
from quantmill.locking import LOCK_FILE

FAILURES = ("once", "from there on")
CUTS = ("kept", "dropped", "torn")
"""What becomes of what was not synced when everything stops: a kill keeps it all."""


class PowerCut(BaseException):
    """Everything stops here: nobody tidies up."""


@dataclass(eq=False)
class Node:
    """A file or folder, whatever it is called: its durable content, and the last one known."""

    is_folder: bool
    durable: bytes = b""
    last: bytes | None = None


Names = dict[Path, Node]


class ModelDisk(Disk):
    """A real folder, and a model of what of it is durable.

    Operation number `at`, from 1 on, fails or is the last one, as `how` says. Nothing is really
    synced, so that many rounds take little time. `done` counts operations that change something,
    or, with `reads`, those that only look. What a killed command, on the disk `before`, did not
    sync is not durable here either.
    """

    def __init__(
        self,
        root: Path,
        how: str = "kept",
        at: int = 0,
        before: ModelDisk | None = None,
        *,
        reads: bool = False,
    ) -> None:
        self.done, self.hit, self._reads = 0, False, reads
        self.last_operation = ""
        self._root, self._how, self._at = root, how, at
        self._guard = threading.RLock()
        self._fds: set[int] = set()
        self._names: Names = {}
        for path in sorted(root.rglob("*")):
            data = b"" if path.is_dir() else path.read_bytes()
            self._names[path] = Node(path.is_dir(), data)
        self._durable: Names = dict(self._names)
        self._pending: list[tuple[Path, dict[Path, Node | None]]] = []
        if before is not None and before._how not in CUTS[1:]:
            self._names, self._durable = before._names, before._durable
            self._pending = before._pending

    # -- counting ----------------------------------------------------------------------------------

    @contextmanager
    def _step(
        self,
        operation: str,
        path: Path,
        half: Callable[[], object] | None = None,
        *,
        read: bool = False,
    ) -> Iterator[None]:
        with self._guard:
            if read != self._reads:
                yield
                return
            if self.hit and self._how in CUTS:
                raise PowerCut
            self.done += 1
            if (
                self._how in FAILURES
                and self._at
                and (self.done == self._at or (self._how == FAILURES[1] and self.done > self._at))
            ):
                self.hit, self.last_operation = True, operation
                if half:
                    half()
                with translated(path):
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
            yield
            if self.done == self._at and self._how in CUTS:
                self.hit, self.last_operation = True, operation
                raise PowerCut

    def _change(self, folder: Path, changes: dict[Path, Node | None]) -> None:
        for path, node in changes.items():
            if node is None:
                self._names.pop(path, None)
            else:
                self._names[path] = node
        self._pending.append((folder, changes))

    def _remember(self, path: Path) -> None:
        """Keep the content of a file that is about to lose its name."""
        node = self._names.get(path)
        if node and not node.is_folder and path.is_file():
            node.last = path.read_bytes()

    # -- reading -----------------------------------------------------------------------------------

    def scan(self, folder: Path) -> list[Path]:
        with self._step("scan", folder, read=True):
            return super().scan(folder)

    def info(self, path: Path, *, follow: bool = True) -> os.stat_result | None:
        with self._step("info", path, read=True):
            return super().info(path, follow=follow)

    @contextmanager
    def reading(self, path: Path) -> Iterator[int]:
        with self._step("reading", path, read=True):
            pass
        with super().reading(path) as fd:
            yield fd

    def read(self, fd: int, count: int, offset: int, path: Path) -> bytes:
        with self._step("read", path, read=True):
            return super().read(fd, count, offset, path)

    def read_into(self, fd: int, buffer: memoryview, offset: int, path: Path) -> int:
        with self._step("read", path, read=True):
            return super().read_into(fd, buffer, offset, path)

    # -- operations --------------------------------------------------------------------------------

    def create(self, folder: Path, prefix: str) -> tuple[Path, int]:
        self.make_folder(folder)
        with self._step("create", folder):
            path, fd = super().create(folder, prefix)
            self._fds.add(fd)
            self._change(folder, {path: Node(False)})
        return path, fd

    def open(self, folder: Path, name: str) -> tuple[Path, int]:
        self.make_folder(folder)
        with self._step("open", folder / name):
            new = not (folder / name).exists()
            path, fd = super().open(folder, name)
            self._fds.add(fd)
            if new:
                self._change(folder, {path: Node(False)})
        return path, fd

    def truncate(self, fd: int, size: int, path: Path) -> None:
        with self._step("truncate", path):
            super().truncate(fd, size, path)

    def make_private(self, fd: int, path: Path) -> None:
        with self._step("make_private", path):
            super().make_private(fd, path)

    def claim(self, fd: int, path: Path) -> bool:
        with self._step("claim", path):
            return super().claim(fd, path)

    def write(self, fd: int, data: memoryview, offset: int, path: Path) -> None:
        def half() -> None:
            os.pwrite(fd, data[: len(data) // 2], offset)

        with self._step("write", path, half):
            super().write(fd, data, offset, path)

    def append(self, path: Path, data: bytes) -> None:
        self.make_folder(path.parent)
        with self._step("append", path):
            new = not path.exists()
            super().append(path, data)
            if new:
                self._change(path.parent, {path: Node(False)})

    def lock(self, path: Path, *, exclusive: bool) -> int:
        with self._step("lock", path):
            fd = super().lock(path, exclusive=exclusive)
            self._fds.add(fd)
        return fd

    def close(self, fd: int, path: Path) -> None:
        with self._guard:
            self._fds.discard(fd)
            os.close(fd)  # a descriptor is gone even when its close fails
        with self._step("close", path):
            pass

    def sync(self, path: Path) -> None:
        with self._step("sync", path), translated(path):
            if not path.is_dir():
                self._names[path].durable = path.read_bytes()
                return
            path.stat()
            for folder, changes in self._pending:
                if folder == path:
                    _apply(self._durable, changes)
            self._pending = [one for one in self._pending if one[0] != path]

    def rename(self, source: Path, target: Path) -> None:
        with self._step("rename", target):
            self._remember(target)
            super().rename(source, target)
            self._change(target.parent, {source: None, target: self._names[source]})

    def remove(self, path: Path) -> None:
        with self._step("remove", path):
            self._remember(path)
            super().remove(path)
            if path in self._names:
                self._change(path.parent, {path: None})

    def touch(self, path: Path) -> None:
        with self._step("touch", path):
            super().touch(path)

    def new_folder(self, folder: Path) -> None:
        with self._step("new_folder", folder):
            super().new_folder(folder)
            self._change(folder.parent, {folder: Node(True)})

    def remove_folder(self, folder: Path) -> bool:
        with self._step("remove_folder", folder):
            removed = super().remove_folder(folder)
            if removed:
                self._change(folder.parent, {folder: None})
        return removed

    # -- afterwards --------------------------------------------------------------------------------

    def settle(self, seed: int) -> None:
        """Leave the folder as it would be found after the cut."""
        for fd in self._fds:
            with suppress(OSError):
                os.close(fd)
        if self._how not in CUTS[1:]:
            return
        chance = random.Random(seed)
        torn = self._how == "torn"
        for path in self._names:
            self._remember(path)
        state = dict(self._durable)
        count = len(self._pending)
        # any of them may be there, in particular the later ones without the earlier
        there = [torn and chance.random() < 0.5 for _ in range(count)]
        if torn and chance.random() < 0.5:
            first, end = sorted(chance.randrange(count + 1) for _ in range(2))
            there = [first <= number < end for number in range(count)]
        for (_, changes), kept in zip(self._pending, there, strict=True):
            if kept:
                _apply(state, changes)
        shutil.rmtree(self._root)
        self._root.mkdir()
        for path, node in sorted(state.items()):
            if not path.parent.is_dir():
                continue
            if node.is_folder:
                path.mkdir()
            elif path.name != LOCK_FILE:
                path.write_bytes(_left(node, chance) if torn else node.durable)


def _apply(state: Names, changes: dict[Path, Node | None]) -> None:
    for path, node in changes.items():
        if node is None:
            state.pop(path, None)
        else:
            state[path] = node


def _left(node: Node, chance: random.Random) -> bytes:
    """What a file may hold whose last content was not synced."""
    last = node.durable if node.last is None else node.last
    if last == node.durable:
        return last
    cut = chance.randrange(len(last) + 1)
    return chance.choice([node.durable, last, last[:cut], last[:cut] + bytes(len(last) - cut)])
