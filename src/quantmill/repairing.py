"""Repair: what `verify` found is had again where a provider has it, put aside where it is wrong.

A plan first, then what became of it. Nothing is dropped: bytes that are not what their name says
are moved to a folder of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from quantmill.digests import Digest
from quantmill.errors import Corrupt, NoSpace, NotFound, QuantmillError, StoreError
from quantmill.manifest import BlobRef, Manifest
from quantmill.names import as_name
from quantmill.store import Store
from quantmill.verification import Damage, Verified

REBUILD, QUARANTINE, REPORT = "rebuild", "quarantine", "report"
_REPLACEABLE = frozenset({"digest_mismatch", "blob_missing"})


class BlobProvider(Protocol):
    """Where blobs can be had again: the checkpoint they were made from, a registry."""

    @property
    def name(self) -> str:
        """What users call it."""

    @property
    def required(self) -> bool:
        """Whether the user named it: then its failure ends the repair."""

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


Providers = Callable[[Manifest], Sequence[BlobProvider]]
"""Who may have the blobs of a model."""


def nobody(manifest: Manifest) -> Sequence[BlobProvider]:
    """No provider for any model."""
    del manifest
    return ()


def plan_repair(store: Store, found: Verified, providers: Providers = nobody) -> tuple[Step, ...]:
    """A step for each finding, none of them taken."""
    return tuple(_step(store, damage, providers) for damage in found.damage)


def _step(store: Store, damage: Damage, providers: Providers) -> Step:
    action = REPORT
    detail = "made wrong, not damaged since: create the model again"
    froms = _names(store, damage.models, providers) if damage.kind in _REPLACEABLE else []
    if damage.digest is None:
        detail = "the manifest cannot be rebuilt: create the model again, or `quantmill rm` it"
    elif froms:
        action, detail = REBUILD, f"from {' or '.join(froms)}"
    elif damage.kind == "digest_mismatch":
        action, detail = QUARANTINE, f"to {store.quarantine}"
    elif damage.kind == "blob_missing":
        detail = (
            "no note says where the model is from: name its source with --from, allow --pull "
            "from the registry in its name, or create it again"
        )
    return Step(damage.digest, damage.message, damage.models, action, detail)


def _names(store: Store, models: Sequence[str], providers: Providers) -> list[str]:
    """What the providers for some models are called, each once."""
    found: dict[str, None] = {}
    for model in models:
        manifest = store.get_manifest(as_name(model))
        found |= dict.fromkeys(provider.name for provider in providers(manifest))
    return list(found)


def repair(store: Store, steps: Sequence[Step], providers: Providers = nobody) -> tuple[Step, ...]:
    """Take the steps; what became of each. Raises Busy where another process writes.

    A blob that cannot be had again is put aside where its bytes are wrong. Raises NoSpace, before
    the first byte, where the blobs cannot fit, and what a provider raises that the user named: then
    nothing was put aside.
    """
    wanted = {step.digest for step in steps if step.action == REBUILD and step.digest}
    why: dict[Digest, list[str]] = {}
    if wanted:
        with store.writing():
            why = _rebuild(store, steps, wanted, providers)
    done = []
    for step in steps:
        if step.digest is None or step.action == REPORT:
            done.append(step)
        elif step.action == REBUILD and _is_whole(store, step.digest):
            done.append(replace(step, done=True))
        else:
            done.append(_put_aside(store, step, step.digest, why.get(step.digest, [])))
    store.settle_blobs()  # what an earlier run did and could not sync, too
    return tuple(done)


def _rebuild(
    store: Store, steps: Sequence[Step], wanted: set[Digest], providers: Providers
) -> dict[Digest, list[str]]:
    """Have the providers give what is wanted; for each blob why some of them did not."""
    models = sorted({name for step in steps if step.action == REBUILD for name in step.models})
    manifests = [store.get_manifest(as_name(name)) for name in models]
    _require_space(store, {r.digest: r.size for m in manifests for r in m.all_refs()}, wanted)
    why: dict[Digest, list[str]] = {}
    for manifest in manifests:
        refs = {ref.digest: ref for ref in manifest.all_refs() if ref.digest in wanted}
        for provider in providers(manifest):
            missing = [ref for ref in refs.values() if not store.holds(ref.digest, ref.size)]
            if not missing:
                break
            problem = f"{provider.name} does not give it"
            try:
                provider.provide(store, manifest, missing)
            except QuantmillError as error:
                if provider.required or _of_the_store(error):
                    raise
                problem = f"{provider.name}: {error.message}"
            for ref in missing:
                why.setdefault(ref.digest, []).append(problem)
    return why


def _of_the_store(error: QuantmillError) -> bool:
    """Whether it is no trouble of a provider: a full disk, a failing one, another process."""
    return isinstance(error, StoreError) and not isinstance(error, Corrupt | NotFound)


def _require_space(store: Store, sizes: Mapping[Digest, int], wanted: set[Digest]) -> None:
    free = store.free_bytes()
    needed = sum(sizes.get(digest, 0) for digest in wanted)
    if free is not None and needed > free:
        raise NoSpace(
            f"{needed / 1e6:.1f} MB are needed in {store.root} for what is to be had again, "
            f"{free / 1e6:.1f} MB are free",
            hint="free some space and run the same command again",
        )


def _is_whole(store: Store, digest: Digest) -> bool:
    try:
        return store.hash_blob(digest) == digest
    except (NotFound, Corrupt):
        return False


def _put_aside(store: Store, step: Step, digest: Digest, why: Sequence[str]) -> Step:
    reasons = "; ".join(why)
    with store.removing():
        if _is_whole(store, digest):
            return replace(step, done=True)
        try:
            store.blob_size(digest)
        except NotFound:
            return replace(step, action=REPORT, detail=reasons or "it is gone")
        store.put_aside(digest)
    detail = f"to {store.quarantine}" + (f": {reasons}" if reasons else "")
    # a blob that no model names is no damage once it is away
    return replace(step, action=QUARANTINE, detail=detail, done=not step.models)
