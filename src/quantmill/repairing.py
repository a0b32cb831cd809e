"""Repair: what `verify` found is rebuilt where a provider has it, put aside where it is wrong.

A plan first, then what became of it. Nothing is dropped: bytes that are not what their name says
are moved to a folder of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from quantmill.digests import Digest
from quantmill.errors import NotFound, QuantmillError
from quantmill.manifest import BlobRef, Manifest
from quantmill.names import as_name
from quantmill.store import Store
from quantmill.verification import Verified

REBUILD, QUARANTINE, REPORT = "rebuild", "quarantine", "report"
_REPLACEABLE = frozenset({"digest_mismatch", "blob_missing"})


class BlobProvider(Protocol):
    """Where blobs can be had again: the checkpoint they were made from, a registry."""

    @property
    def name(self) -> str:
        """What users call it."""

    def provide(self, store: Store, manifest: Manifest, wanted: Sequence[BlobRef]) -> None:
        """Commit to the store such of the wanted blobs as it has; the store's lock is held.

        Blobs go in under the digest of their bytes, so a wrong one can do no harm.
        """


@dataclass(frozen=True, slots=True)
class Step:
    """What is to be done about one damaged blob or manifest, and whether it is whole since.

    `detail` says from where it is rebuilt, where it was put, or what to do.
    """

    digest: Digest | None
    message: str
    models: tuple[str, ...]
    action: str
    detail: str
    done: bool = False


def plan_repair(store: Store, found: Verified, provider: BlobProvider | None) -> tuple[Step, ...]:
    """A step for each finding, none of them taken."""
    steps = []
    for damage in found.damage:
        action = REPORT
        detail = "made wrong, not damaged since: create the model again"
        if damage.digest is None:
            detail = "the manifest cannot be rebuilt: create the model again, or `quantmill rm` it"
        elif damage.kind in _REPLACEABLE and damage.models and provider is not None:
            action, detail = REBUILD, f"from {provider.name}"
        elif damage.kind == "digest_mismatch":
            action, detail = QUARANTINE, f"to {store.quarantine}"
        elif damage.kind == "blob_missing":
            detail = "name the model's source with --from to rebuild it, or create it again"
        steps.append(Step(damage.digest, damage.message, damage.models, action, detail))
    return tuple(steps)


def repair(store: Store, steps: Sequence[Step], provider: BlobProvider | None) -> tuple[Step, ...]:
    """Take the steps; what became of each. Raises Busy where another process writes.

    A blob that cannot be rebuilt is put aside where its bytes are wrong. Raises what the provider
    raises: then nothing was put aside.
    """
    wanted = {step.digest for step in steps if step.action == REBUILD and step.digest}
    if wanted and provider is not None:
        with store.writing():
            _rebuild(store, steps, wanted, provider)
    done = []
    for step in steps:
        if step.digest is None or step.action == REPORT:
            done.append(step)
        elif step.action == REBUILD and _is_whole(store, step.digest):
            done.append(replace(step, done=True))
        else:
            done.append(_put_aside(store, step, step.digest))
    return tuple(done)


def _rebuild(
    store: Store, steps: Sequence[Step], wanted: set[Digest], provider: BlobProvider
) -> None:
    for name in sorted({name for step in steps if step.action == REBUILD for name in step.models}):
        manifest = store.get_manifest(as_name(name))
        refs = {ref.digest: ref for ref in manifest.all_refs() if ref.digest in wanted}
        missing = [ref for ref in refs.values() if not store.holds(ref.digest, ref.size)]
        if missing:
            provider.provide(store, manifest, missing)


def _is_whole(store: Store, digest: Digest) -> bool:
    try:
        return store.hash_blob(digest) == digest
    except QuantmillError:
        return False


def _put_aside(store: Store, step: Step, digest: Digest) -> Step:
    not_made = f"{step.detail.removeprefix('from ')} does not give it" * (step.action == REBUILD)
    with store.removing():
        if _is_whole(store, digest):
            return replace(step, done=True)
        try:
            store.blob_size(digest)
        except NotFound:
            return replace(step, action=REPORT, detail=not_made or "it is gone")
        store.put_aside(digest)
    detail = f"to {store.quarantine}" + (f": {not_made}" if not_made else "")
    # a blob that no model names is no damage once it is away
    return replace(step, action=QUARANTINE, detail=detail, done=not step.models)
