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

    A file that is one part of several stands for all of them, which must lie beside it.
    With `decode` the weights of a GGUF file show as numbers, whatever it stores. Raises BadSource
    as `open_checkpoint` and `open_gguf` do.
    """
    found = _gguf_parts(Path(path), follow_links)
    if found is None:
        return open_checkpoint(path, follow_links=follow_links)
    from quantmill.ggufsource import open_gguf

    return open_gguf(found[0], decode=decode, parts=found)


def _gguf_parts(path: Path, follow_links: bool) -> list[Path] | None:
    """The GGUF file that `path` means, or all parts of it; None where it means a directory."""
    if not path.is_dir():
        if not path.name.endswith(GGUF_SUFFIX) or not path.exists():
            return None
        return _with_siblings(path.parent, path.name, path.name, follow_links)
    names = list_folder(path)
    found = sorted(name for name in names if name.endswith(GGUF_SUFFIX))
    if not found or any(name.endswith(SUFFIX) for name in names):
        return None
    from quantmill.ggufheader import part_names

    if not set(found) <= set(part_names(found[0])):
        raise BadSource(
            f"{path} holds {len(found)} GGUF files that are not parts of one model: "
            f"{', '.join(found)}",
            kind="ambiguous_source",
            hint="give the path of one of them",
        )
    return _with_siblings(path, found[0], "", follow_links)


def _with_siblings(folder: Path, name: str, given: str, follow_links: bool) -> list[Path]:
    """All parts of the model that the file is one of; `given` was named by the user himself."""
    from quantmill.ggufheader import part_names

    names = part_names(name)
    present = set(list_folder(folder)) if len(names) > 1 else {name}
    for part in names:
        if part not in present:
            raise BadSource(
                f"{folder / part} is missing, one of {len(names)} parts of a model",
                kind="missing_shard",
                hint="the download is incomplete; fetch the file",
            )
        if part != given:
            refuse_link_outside(folder, folder / part, part, follow_links)
    return [folder / part for part in names]
