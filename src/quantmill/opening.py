"""Open a source of whatever kind: a checkpoint or diffusers directory, or a GGUF file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, Self

from quantmill.checkpoint import SUFFIX, list_folder, open_checkpoint, refuse_link_outside
from quantmill.errors import BadSource, QuantmillError
from quantmill.source import MODEL_INDEX, Source, SourceTensor

GGUF_SUFFIX = ".gguf"


class OpenSource(Protocol):
    """What `create` needs of an open source, whatever file format it is in."""

    @property
    def source(self) -> Source:
        """What the source says about itself."""

    def read_into(self, tensor: SourceTensor, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from `offset` on; callable from any thread."""

    def identity(self, tensor: SourceTensor) -> str:
        """What tells the file that holds the tensor from any other, and from any later state."""

    def read_file(self, name: str) -> bytes:
        """The content of a side file."""

    def check_unchanged(self) -> None:
        """Raise BadSource if what was opened is no longer what it was."""

    def close(self) -> None:
        """Close all files."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


Report = Callable[[int, int, str], None]
"""Told of a download: bytes done, bytes in all, a label."""


def locate(source: str | Path, fetching: Report | None = None) -> Path:
    """The path that `source` is, or where the hub's repository of that name was fetched to.

    A path that exists is never taken for a repository's name. Raises BadSource as `hub.fetch` does.
    """
    path = Path(source)
    if isinstance(source, Path) or os.path.exists(source):
        return path
    from quantmill.hub import fetch, parse_hub_name

    name = parse_hub_name(source)
    if name is None:
        return path
    try:
        return fetch(name, fetching)
    except QuantmillError as error:
        what = f"there is no directory {source!r}, and on the hub: {error.message}"
        raise type(error)(what, kind=error.kind, hint=error.hint) from None


def open_source(path: str | Path, *, follow_links: bool = False) -> OpenSource:
    """Open a checkpoint directory, a GGUF file, or a directory whose only weights are such a file.

    A directory with a model_index.json is one of components. Raises BadSource as
    `open_checkpoint`, `open_components` and `open_gguf` do.
    """
    if os.path.isfile(Path(path) / MODEL_INDEX):
        from quantmill.components import open_components

        return open_components(Path(path), follow_links=follow_links)
    found = _gguf_file(Path(path), follow_links)
    if found is None:
        return open_checkpoint(path, follow_links=follow_links)
    from quantmill.ggufsource import open_gguf

    return open_gguf(found)


def _gguf_file(path: Path, follow_links: bool) -> Path | None:
    if not os.path.isdir(path):  # of any text at all, unlike Path.is_dir
        return path if path.name.endswith(GGUF_SUFFIX) and os.path.exists(path) else None
    names = list_folder(path)
    found = sorted(name for name in names if name.endswith(GGUF_SUFFIX))
    if not found or any(name.endswith(SUFFIX) for name in names):
        return None
    if len(found) > 1:
        raise BadSource(
            f"{path} holds {len(found)} GGUF files: {', '.join(found)}",
            kind="ambiguous_source",
            hint="give the path of one of them",
        )
    refuse_link_outside(path, path / found[0], found[0], follow_links)
    return path / found[0]
