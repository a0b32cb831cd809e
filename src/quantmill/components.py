"""Open a diffusers directory: each folder that model_index.json lists, as part of one source."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from quantmill import pipelines
from quantmill.checkpoint import SIDE_LAYOUT, Checkpoint, Layout, list_folder
from quantmill.errors import BadSource
from quantmill.parts import OpenParts, naming
from quantmill.source import COMPONENT, MODEL_INDEX, OpenSource, Part, Source, SourceFile, joined

_COMPONENT_LAYOUT = Layout(pipelines.choose_shards, pipelines.INDEXES)


def open_components(path: Path, *, follow_links: bool = False) -> OpenParts:
    """Open a directory with a model_index.json and read the headers of all its components.

    Raises BadSource or BadTensorFile, naming the component and the file or tensor.
    """
    with ExitStack() as stack:
        root = Checkpoint(path, follow_links=follow_links, layout=SIDE_LAYOUT)
        stack.push(root)
        raw = root.read_file(MODEL_INDEX)
        index = pipelines.parse_index(raw)
        opened: dict[str, OpenSource] = {"": root}
        parts, files = [], [*_root_files(root.source), *_unlisted(path, index)]
        for name, kind in pipelines.listed_folders(index).items():
            one, weights = _open_folder(path, name, kind, follow_links)
            stack.push(one)
            folder = f"{name}/"
            opened[folder] = one
            if weights:
                source = replace(one.source, files=tuple(_own_files(one.source)))
                parts.append(Part(name, COMPONENT, source, folder, folder))
            else:
                files += [replace(f, name=folder + f.name) for f in one.source.files]
        if not parts:
            raise BadSource(
                f"{path}: {MODEL_INDEX} lists no folder with weights",
                kind="no_weights",
                hint="give the directory that holds model_index.json and the components",
            )
        found = OpenParts(joined(parts, index, files, {MODEL_INDEX: raw.decode("utf-8")}), opened)
        stack.pop_all()
    return found


def _open_folder(root: Path, name: str, kind: str, follow_links: bool) -> tuple[Checkpoint, bool]:
    """A listed folder, and whether it holds weights."""
    folder = root / name
    if not os.path.isdir(folder):  # of any text at all, unlike Path.is_dir
        raise BadSource(
            f"{MODEL_INDEX} lists {name!r} ({kind}), and there is no such folder in {root}",
            kind="missing_component",
            hint="the download is incomplete: fetch the folder, or list it as [null, null]",
        )
    weights = pipelines.has_weights(name, kind, list_folder(folder))
    layout = _COMPONENT_LAYOUT if weights else SIDE_LAYOUT
    with naming(name):
        return Checkpoint(folder, follow_links=follow_links, layout=layout, home=root), weights


def _root_files(source: Source) -> Iterator[SourceFile]:
    """Of the directory itself model_index.json is kept: all else belongs to other layouts."""
    for file in source.files:
        if file.name == MODEL_INDEX:
            yield file
        else:
            yield replace(file, media_type=None, reason="not in a folder of a component")


def _unlisted(root: Path, index: dict[str, object]) -> Iterator[SourceFile]:
    listed = pipelines.listed_folders(index)
    for entry in os.scandir(root):
        if entry.is_dir() and entry.name not in listed and not entry.name.startswith("."):
            yield SourceFile(f"{entry.name}/", 0, None, f"not listed in {MODEL_INDEX}")


def _own_files(source: Source) -> Iterator[SourceFile]:
    for file in source.files:
        if ".safetensors.index." in file.name:  # of a variant that is not read
            yield replace(file, media_type=None, reason="index of weights that are not read")
        else:
            yield file
