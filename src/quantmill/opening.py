"""Open a source of whatever kind: a checkpoint or diffusers directory, or a GGUF file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from quantmill.checkpoint import SUFFIX, list_folder, open_checkpoint, refuse_link_outside
from quantmill.errors import BadSource, QuantmillError
from quantmill.source import MODEL_INDEX, OpenSource

GGUF_SUFFIX = ".gguf"


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


def open_source(
    path: str | Path, *, follow_links: bool = False, decode: bool = False
) -> OpenSource:
    """Open a checkpoint directory, a GGUF file, or a directory whose only weights are such a file.

    A GGUF file that is one part of several stands for all of them, which must lie beside it; with
    `decode` its weights show as numbers, whatever it stores. A directory with a model_index.json
    is one of components. Raises BadSource as `open_checkpoint`, `open_components` and `open_gguf`
    do.
    """
    if os.path.isfile(Path(path) / MODEL_INDEX):
        from quantmill.components import open_components

        return open_components(Path(path), follow_links=follow_links)
    found = _gguf_parts(Path(path), follow_links)
    if found is None:
        return open_checkpoint(path, follow_links=follow_links)
    from quantmill.ggufsource import open_gguf

    return open_gguf(found[0], decode=decode, parts=found)


def _gguf_parts(path: Path, follow_links: bool) -> list[Path] | None:
    """The GGUF file that `path` means, or all parts of it; None where it means a directory."""
    if not os.path.isdir(path):  # of any text at all, unlike Path.is_dir
        if not path.name.endswith(GGUF_SUFFIX) or not os.path.exists(path):
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
