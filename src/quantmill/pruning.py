"""Removing: names with `rm`, blobs that no manifest names with `prune`; and copying names."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from quantmill.digests import Digest
from quantmill.errors import Busy, Corrupt, NotFound, StoreError
from quantmill.files import is_folder
from quantmill.manifest import BlobRef, Manifest
from quantmill.names import ModelName, as_name, as_names
from quantmill.store import BlobFile, Store

GRACE_SECONDS = 3600.0
"""Files younger than this are kept: another program may be about to name them."""


@dataclass(frozen=True, slots=True)
class PrunePlan:
    """Files to remove, and how many unreferenced ones are too young to be removed yet."""

    blobs: tuple[BlobFile, ...]
    leftovers: tuple[BlobFile, ...]
    young: int

    @property
    def nbytes(self) -> int:
        """Bytes that removing frees."""
        return sum(f.size for f in (*self.blobs, *self.leftovers))


@dataclass(frozen=True, slots=True)
class Removed:
    """What `rm` did: names and blobs gone; `left` unreferenced blobs wait for prune."""

    names: tuple[ModelName, ...]
    blobs: int
    nbytes: int
    left: int


def referenced(store: Store) -> set[Digest]:
    """Every digest that some manifest names; raises Corrupt if one cannot be read."""
    return {ref.digest for manifest in _manifests(store) for ref in manifest.all_refs()}


def _manifests(store: Store) -> list[Manifest]:
    found = []
    for stored in store.list_names():
        with suppress(NotFound):  # removed meanwhile
            found.append(store.get_manifest(stored.name))
    return found


def plan_prune(store: Store, older_than: float = GRACE_SECONDS) -> PrunePlan:
    """Blobs no manifest names, and temporary files, older than `older_than` seconds.

    Raises Corrupt when a manifest cannot be read: what it names would look unreferenced.
    """
    there = store.list_blobs()  # before the manifests: what is named meanwhile is then seen
    try:
        manifests = _manifests(store)
    except Corrupt as error:
        raise Corrupt(
            error.message,
            kind=error.kind,
            hint="nothing is pruned while a manifest is unreadable; remove or replace that model",
        ) from None
    needed = {ref.digest for manifest in manifests for ref in manifest.all_refs()}
    notes = {store.provenance_of(manifest.digest) for manifest in manifests}
    loose = [blob for blob in there if blob.digest not in needed]
    loose += [file for file in store.stale_files() if file.path not in notes]
    old = [blob for blob in loose if blob.age >= older_than]
    return PrunePlan(
        tuple(b for b in old if b.digest is not None),
        tuple(b for b in old if b.digest is None),
        len(loose) - len(old),
    )


def prune(store: Store, older_than: float = GRACE_SECONDS) -> PrunePlan:
    """Plan and carry out; returns what was removed.

    Raises Busy while another process of quantmill writes to the store.
    """
    with store.removing():
        plan = plan_prune(store, older_than)
        if plan.blobs:
            store.settle_names()
        gone = {f for f in (*plan.blobs, *plan.leftovers) if store.remove_if_old(f, older_than)}
        _remove_empty_folders(store)
    kept = len(plan.blobs) + len(plan.leftovers) - len(gone)
    return PrunePlan(
        tuple(f for f in plan.blobs if f in gone),
        tuple(f for f in plan.leftovers if f in gone),
        plan.young + kept,
    )


def _remove_empty_folders(store: Store) -> None:
    def sweep(folder: Path, depth: int) -> None:
        for child in store.disk.scan(folder):
            if is_folder(store.disk.info(child, follow=False)):
                if depth > 1:
                    sweep(child, depth - 1)
                store.disk.remove_folder(child)

    sweep(store.manifests, 3)


def remove(store: Store, names: str | ModelName | Iterable[str | ModelName]) -> Removed:
    """Remove names, then the blobs that only they named.

    All names are looked up before the first is removed; raises NotFound, removing nothing, when
    one is missing. Blobs stay for a later prune where a manifest cannot be read or another process
    is writing.
    """
    spelled = [store.spelling(name) for name in as_names(names)]
    wanted = {name.key: name for name in spelled}
    candidates: set[Digest] = set()
    for name in wanted.values():
        try:
            candidates.update(ref.digest for ref in store.get_manifest(name).all_refs())
        except NotFound:
            with suppress(StoreError):  # a removal that was interrupted may not be durable yet
                store.settle_names()
            raise
        except Corrupt:  # a broken manifest can be removed; what it named is prune's business
            continue
    for name in wanted.values():
        _remove_name(store, name)
    try:
        with store.removing():
            loose = candidates - referenced(store)
            store.settle_names()
            removed = [_remove_blob(store, digest) for digest in sorted(loose)]
    except (Busy, Corrupt):
        return Removed(tuple(wanted.values()), 0, 0, len(candidates))
    sizes = [size for size in removed if size is not None]
    return Removed(tuple(wanted.values()), len(sizes), sum(sizes), 0)


def _remove_name(store: Store, name: ModelName) -> None:
    """Remove a name that was there a moment ago."""
    try:
        store.remove_manifest(name)
    except NotFound:
        # another process removed it just now, or its folder, which was empty without it
        store.settle_names()


def _remove_blob(store: Store, digest: Digest) -> int | None:
    """Bytes freed, None for a blob that was gone already."""
    try:
        size = store.blob_size(digest)
    except NotFound:
        return None
    store.remove_blob(digest)
    return size


def copy(store: Store, source: str | ModelName, target: str | ModelName) -> None:
    """Give the model a second name; the same blobs, no data moved.

    Replaces what `target` named before. Raises NotFound and Corrupt.
    """
    source, target = as_name(source), as_name(target)
    manifest = store.get_manifest(source)
    if store.spelling(source).key == store.spelling(target).key:
        return
    with store.writing():
        for ref in manifest.all_refs():
            _check_blob(store, ref, source)
        store.keep({ref.digest for ref in manifest.all_refs()})
        store.put_manifest(target, manifest.raw)


def _check_blob(store: Store, ref: BlobRef, name: ModelName) -> None:
    shown = f"blob {ref.digest.short} ({ref.name or ref.media_type}) of {name.display}"
    hint = f"`quantmill verify {name.display}` tells what is damaged"
    try:
        size = store.blob_size(ref.digest)
    except NotFound:
        raise NotFound(f"{shown} is missing", kind="blob_missing", hint=hint) from None
    if size != ref.size:
        raise Corrupt(f"{shown} has the wrong size", hint=hint)
