"""What `auto` found for a source, so that a `create` that goes on need not measure again.

    <root>/.quantmill/journals/<64 hex digits>.auto.jsonl

One line, the recipe that measuring gave. The name is the digest of everything that depends on: the
version, what was asked, the text, and the identities of the source files, which change with every
write. A note that cannot be written or read costs time only.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, replace

from quantmill.calibration import calibration_for
from quantmill.digests import digest_of
from quantmill.errors import StoreError
from quantmill.provenance import append_line, lines_of
from quantmill.recipes import Recipe, as_record, from_record
from quantmill.source import OpenSource
from quantmill.store import Store
from quantmill.version import __version__

_MAX_BYTES = 64 * 2**20
_LAYOUT = 1


class Resolution:
    """The note on one request for `auto`."""

    def __init__(self, store: Store, recipe: Recipe, source: OpenSource) -> None:
        self._store, self._recipe = store, recipe
        target = recipe.request.target
        asked = as_record(recipe), asdict(target) if target else None
        files = sorted({source.identity(tensor) for tensor in source.source.tensors.values()})
        said = repr((_LAYOUT, __version__, asked, calibration_for(recipe.options), files))
        self._path = store.journals / f"{digest_of(said.encode()).hex}.auto.jsonl"

    def find(self) -> Recipe | None:
        """The recipe that was found before, None where nothing was, or nothing that makes sense."""
        for line in reversed(list(lines_of(self._store, self._path, _MAX_BYTES))):
            found = from_record(line)
            if found is not None and found.options.automatic is not None:
                return replace(self._recipe, request=found.request, options=found.options)
        return None

    def keep(self, found: Recipe) -> None:
        """Note what was found."""
        with suppress(StoreError):
            append_line(self._store, self._path, as_record(found))
