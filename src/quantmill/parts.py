"""Several open sources as one: names lead to the source they came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Self

from quantmill.errors import QuantmillError
from quantmill.source import OpenSource, Source, SourceTensor


class OpenParts:
    """An open source made of others. `read_into` may be called from any thread.

    `opened` are the parts by the folder that goes before their names in `source`; closing this
    closes them all.
    """

    def __init__(self, source: Source, opened: Mapping[str, OpenSource]) -> None:
        self.source = source
        self._opened = dict(opened)
        self._tensors = {
            folder + t.name: (folder, t)
            for folder, one in opened.items()
            for t in one.source.tensors.values()
        }
        self._files = {
            folder + f.name: (folder, f.name)
            for folder, one in opened.items()
            for f in one.source.files
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files of all parts."""
        for one in self._opened.values():
            one.close()

    def read_into(self, tensor: SourceTensor, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from `offset` on; raises BadSource if they end."""
        folder, own = self._tensors[tensor.name]
        with naming(folder):
            self._opened[folder].read_into(own, offset, buffer)

    def identity(self, tensor: SourceTensor) -> str:
        """What tells the tensor's file from any other, and from any later state of its own."""
        folder, own = self._tensors[tensor.name]
        return self._opened[folder].identity(own)

    def read_file(self, name: str) -> bytes:
        """The content of a side file of some part."""
        folder, own = self._files[name]
        with naming(folder):
            return self._opened[folder].read_file(own)

    def check_unchanged(self) -> None:
        """Raise BadSource if a file of any part was written to since it was opened."""
        for folder, one in self._opened.items():
            with naming(folder):
                one.check_unchanged()


@contextmanager
def naming(folder: str) -> Iterator[None]:
    """Says in every error which part of a model it is about."""
    try:
        yield
    except QuantmillError as error:
        if not folder:
            raise
        what = f"{folder.rstrip('/')}: {error.message}"
        raise type(error)(what, kind=error.kind, hint=error.hint) from None
