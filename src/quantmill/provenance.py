"""Notes on where the models of a store came from, so that what is damaged can be had again.

    <root>/.quantmill/provenance/<64 hex digits of the manifest's digest>.jsonl

A line is `{"recipe": …}` for what `create` was asked, or `{"registry": "host/namespace/model:tag"}`
for a registry that the model was pulled from or pushed to. A note is a hint: what it leads to is
taken by its digest alone, and a note that cannot be written or read is no error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmill import strictjson
from quantmill.digests import Digest
from quantmill.errors import BadName, StoreError
from quantmill.names import ModelName, parse_name
from quantmill.store import Store

if TYPE_CHECKING:  # what plans models is heavy, and `pull` and `push` have no use for it
    from quantmill.recipes import Recipe

_MAX_BYTES = 1 << 22
_RECIPE, _REGISTRY = "recipe", "registry"


def note_recipe(store: Store, manifest: Digest, recipe: Recipe) -> None:
    """Note what a model was made from."""
    from quantmill.recipes import as_record

    _note(store, manifest, {_RECIPE: as_record(recipe)})


def note_registry(store: Store, manifest: Digest, name: ModelName) -> None:
    """Note a registry that holds a model, by the model's name there."""
    _note(store, manifest, {_REGISTRY: str(name.resolved)})


def recipes(store: Store, manifest: Digest) -> list[Recipe]:
    """What the model was made from, the latest first."""
    from quantmill.recipes import from_record

    said = [line.get(_RECIPE) for line in _lines(store, manifest)]
    found = [from_record(record) for record in said if isinstance(record, dict)]
    return [recipe for recipe in reversed(found) if recipe is not None]


def registries(store: Store, manifest: Digest) -> list[ModelName]:
    """Names in registries that hold the model, the latest first."""
    found = []
    for line in _lines(store, manifest):
        said = line.get(_REGISTRY)
        with suppress(BadName):
            if isinstance(said, str):
                found.append(parse_name(said))
    return found[::-1]


def _note(store: Store, manifest: Digest, line: Mapping[str, Any]) -> None:
    with suppress(StoreError):
        if line not in list(_lines(store, manifest)):
            append_line(store, store.provenance_of(manifest), line)


def _lines(store: Store, manifest: Digest) -> Iterator[Mapping[str, Any]]:
    return lines_of(store, store.provenance_of(manifest), _MAX_BYTES)


def append_line(store: Store, path: Path, line: Mapping[str, Any]) -> None:
    """Add a line to a file of notes. Raises StoreError."""
    # the first line end shuts off a line that was torn
    store.disk.append(path, b"\n" + strictjson.canonical(line) + b"\n")


def lines_of(store: Store, path: Path, most: int) -> Iterator[Mapping[str, Any]]:
    """Lines of a file of notes that make sense; none of a file above `most` bytes or unreadable."""
    with suppress(StoreError):
        found = store.disk.read_file(path, most)
        for line in filter(None, found.splitlines()):
            with suppress(strictjson.BadJson):
                yield strictjson.parse_object(line)
