"""Whether a plan fits into the free space of a store, before its first byte is written."""

from __future__ import annotations

from contextlib import suppress

from quantmill.errors import Corrupt, NoSpace, NotFound
from quantmill.journal import Journal
from quantmill.plans import BlobSpec, Plan
from quantmill.source import OpenSource
from quantmill.store import Store

_BLOCK = 4096
"""A file takes whole blocks."""


def require_space(store: Store, plan: Plan, checkpoint: OpenSource, others: int) -> None:
    """Raise NoSpace, naming both figures, where the blobs and `others` bytes cannot fit.

    What an earlier run finished, or a stored model has under the same name in the same size, is
    taken to be there already. Where that is wrong the disk fills up midway, which leaves nothing
    unfinished either.
    """
    free = store.free_bytes()
    needed = _blocks(others) + sum(_blocks(blob.size) for blob in plan.blobs)
    if free is None or needed <= free:
        return
    held = _likely_held(store)
    journal = Journal(store, plan, checkpoint)
    needed = _blocks(others)
    for blob in plan.blobs:
        size = blob.size
        if (blob.name, size) not in held and not _is_noted(store, journal, blob, size):
            needed += _blocks(size)
    if needed > free:
        raise NoSpace(
            f"{needed / 1e6:.1f} MB more are needed in {store.root}, where {free / 1e6:.1f} MB are "
            "free",
            hint="`quantmill prune` and `quantmill rm` free some; --store names another place",
        )


def _blocks(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _is_noted(store: Store, journal: Journal, blob: BlobSpec, size: int) -> bool:
    note = journal.noted(journal.key(blob))
    with suppress(NotFound, Corrupt):
        return note is not None and store.blob_size(note.digest) == note.size == size
    return False


def _likely_held(store: Store) -> set[tuple[str | None, int]]:
    found: set[tuple[str | None, int]] = set()
    for stored in store.list_names():
        with suppress(NotFound, Corrupt):
            for ref in store.get_manifest(stored.name).tensor_refs():
                with suppress(NotFound, Corrupt):
                    if store.blob_size(ref.digest) == ref.size:
                        found.add((ref.name, ref.size))
    return found
