"""Open a source of whatever kind: a checkpoint directory or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, Self

from quantmill.checkpoint import SUFFIX, list_folder, open_checkpoint, refuse_link_outside
from quantmill.errors import BadSource
from quantmill.source import Source, SourceTensor

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


def open_source(
    path: str | Path, *, follow_links: bool = False, decode: bool = False
) -> OpenSource:
    """Open a checkpoint directory, a GGUF file, or a directory whose only weights are such a file.

    With `decode` the weights of a GGUF file show as numbers, whatever it stores. Raises BadSource
    as `open_checkpoint` and `open_gguf` do.
    """
    found = _gguf_file(Path(path), follow_links)
    if found is None:
        return open_checkpoint(path, follow_links=follow_links)
    from quantmill.ggufsource import open_gguf

    return open_gguf(found, decode=decode)


def _gguf_file(path: Path, follow_links: bool) -> Path | None:
    if not path.is_dir():
        return path if path.name.endswith(GGUF_SUFFIX) and path.exists() else None
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
