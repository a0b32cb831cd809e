"""Verify: recompute every digest, reread every header, check every relation. Changes nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace

from quantmill import mediatypes, strictjson
from quantmill.digests import Digest
from quantmill.errors import BadTensorFile, Corrupt, NotFound, QuantmillError
from quantmill.manifest import BlobRef
from quantmill.names import ModelName, as_name, as_names
from quantmill.pacing import default_workers
from quantmill.store import Store
from quantmill.stored import LEGACY_KEY, StoredTensor, describe_blob
from quantmill.tensorfile import LENGTH_BYTES, TensorFile, header_length, parse_header

MAX_JSON = 100 * 2**20
HEADER_GUESS = 4096
"""Bytes read at once: more than the header of a tensor blob has, as a rule."""


@dataclass(frozen=True, slots=True)
class Damage:
    """Something wrong: a kind for programs, what it is, and the models it hurts."""

    kind: str
    message: str
    digest: Digest | None
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Verified:
    """What was checked and what was found."""

    models: int
    blobs: int
    nbytes: int
    damage: tuple[Damage, ...]


@dataclass(slots=True)
class _Work:
    """Each blob once, with every reference to it, and what was found so far."""

    refs: dict[Digest, list[tuple[str, BlobRef]]] = field(default_factory=lambda: defaultdict(list))
    damage: list[Damage] = field(default_factory=list)


def verify(
    store: Store,
    names: str | ModelName | Iterable[str | ModelName] | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    workers: int | None = None,
) -> Verified:
    """Check the named models, or all models and every other blob in the store.

    `progress` is called with bytes done and bytes in all. `workers` threads hash blobs at once, one
    on each processor by default. Raises NotFound for a name that is not there; damage is returned,
    not raised.
    """
    everything = names is None
    chosen = [s.name for s in store.list_names()] if names is None else as_names(names)
    work = _Work()
    for name in chosen:
        _collect(store, name, work, strict=not everything)
    if everything:
        for blob in store.list_blobs():
            if blob.digest is not None:
                work.refs.setdefault(blob.digest, [])
    total = sum(_size_or_zero(store, digest) for digest in work.refs)
    nbytes = 0

    def check(digest: Digest) -> tuple[int, list[Damage]]:
        return _check_blob(store, digest, work.refs[digest])

    with ThreadPoolExecutor(workers or default_workers(), thread_name_prefix="verify") as pool:
        for size, damage in pool.map(check, sorted(work.refs)):
            nbytes += size
            work.damage += damage
            if progress:
                progress(nbytes, total)
    damage = [again for one in work.damage if (again := _unless_changed(store, one, work))]
    found = tuple(sorted(damage, key=lambda d: (d.models, d.message)))
    return Verified(len(chosen), len(work.refs), nbytes, found)


def _unless_changed(store: Store, damage: Damage, work: _Work) -> Damage | None:
    """What is left of a finding after manifests were replaced or removed while all was read."""
    if damage.kind != "blob_missing" or damage.digest is None:
        return damage
    if not work.refs[damage.digest]:
        return None  # unreferenced, and removed by others meanwhile
    models = []
    for name in damage.models:
        with suppress(NotFound, Corrupt):
            refs = store.get_manifest(as_name(name)).all_refs()
            if damage.digest in {ref.digest for ref in refs}:
                models.append(name)
    return replace(damage, models=tuple(models)) if models else None


def _collect(store: Store, name: ModelName, work: _Work, *, strict: bool) -> None:
    try:
        manifest = store.get_manifest(name)
    except NotFound:
        if strict:
            raise
        return
    except Corrupt as error:
        work.damage.append(Damage(error.kind, error.message, None, (name.display,)))
        return
    for ref in manifest.all_refs():
        work.refs[ref.digest].append((name.display, ref))
    if manifest.config is None:
        problem = f"manifest of {name.display}: no config"
        work.damage.append(Damage("bad_manifest", problem, None, (name.display,)))


def _size_or_zero(store: Store, digest: Digest) -> int:
    try:
        return store.blob_size(digest)
    except QuantmillError:
        return 0


def _check_blob(
    store: Store, digest: Digest, uses: list[tuple[str, BlobRef]]
) -> tuple[int, list[Damage]]:
    """Bytes read, and what is wrong with a blob or with an entry that names it."""
    models = tuple(sorted({model for model, _ in uses}))
    try:
        size = store.blob_size(digest)
        actual = store.hash_blob(digest)
        if actual == digest:
            return size, _check_uses(store, digest, size, uses)
        what = f"blob {digest.short}{_called(uses)} has the content of {actual.short}"
        return size, [Damage("digest_mismatch", what, digest, models)]
    except QuantmillError as error:
        kind = "blob_missing" if error.kind == "not_found" else error.kind
        what = f"blob {digest.short}{_called(uses)} is missing" if kind == "blob_missing" else (
            error.message
        )  # fmt: skip
        return 0, [Damage(kind, what, digest, models)]


def _check_uses(
    store: Store, digest: Digest, size: int, uses: list[tuple[str, BlobRef]]
) -> list[Damage]:
    """Each entry that names the blob; a finding names only the models it is about."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for model, ref in uses:
        try:
            _check_ref(store, ref, size)
        except QuantmillError as error:
            found[error.kind, error.message].add(model)
    return [
        Damage(kind, message, digest, tuple(sorted(models)))
        for (kind, message), models in found.items()
    ]


def damaged(store: Store, digests: Iterable[Digest]) -> set[Digest]:
    """Which of these blobs do not have the content that their names promise.

    Missing ones are not among them. One thread on each processor reads.
    """

    def is_damaged(digest: Digest) -> bool:
        with suppress(NotFound):
            return store.hash_blob(digest) != digest
        return False

    wanted = sorted(set(digests))
    with ThreadPoolExecutor(default_workers(), thread_name_prefix="verify") as pool:
        return {d for d, bad in zip(wanted, pool.map(is_damaged, wanted), strict=True) if bad}


def _called(uses: list[tuple[str, BlobRef]]) -> str:
    names = sorted({ref.name for _, ref in uses if ref.name})
    return f" ({names[0]})" if names else ""


def _check_ref(store: Store, ref: BlobRef, size: int) -> None:
    shown = ref.name or ref.media_type
    if ref.size != size:
        raise Corrupt(f"{shown}: the manifest says {ref.size} bytes, the blob has {size}")
    if ref.media_type == mediatypes.TENSOR:
        try:
            describe_ref(store, ref)
        except Corrupt as error:
            # early blobs record no type; that shapes leave two open is no damage
            if error.kind != "ambiguous_parameters":
                raise
    elif ref.media_type in mediatypes.JSON_TYPES:
        try:
            strictjson.parse(store.read_blob(ref.digest, MAX_JSON), constants=True)
        except strictjson.BadJson as error:
            raise Corrupt(f"{shown}: {error}", kind="bad_json") from None


def read_tensor_file(store: Store, ref: BlobRef) -> TensorFile:
    """The checked header of a tensor blob; raises NotFound or Corrupt."""
    shown = ref.name or ref.digest.short
    start, size = store.blob_start(ref.digest, HEADER_GUESS)
    try:
        length = header_length(start[:LENGTH_BYTES], size, shown)
        end = LENGTH_BYTES + length
        if len(start) < end:
            start = b"".join(store.blob_chunks(ref.digest, 0, end))
        return parse_header(start[LENGTH_BYTES:end], size, shown)
    except BadTensorFile as error:
        raise Corrupt(error.message, kind="bad_tensor_file") from None


def describe_ref(store: Store, ref: BlobRef) -> list[StoredTensor]:
    """The weights of a tensor blob; raises NotFound or Corrupt.

    The entry's name must be that of its only weight, or the group its weights belong to.
    """
    found = describe_blob(read_tensor_file(store, ref), ref.name or ref.digest.short)
    names = [t.name for t in found]
    if not names:
        raise Corrupt(f"entry {ref.name!r} holds no tensor", kind="bad_relation")
    if len(names) == 1 and names[0] not in {ref.name, LEGACY_KEY} and not _in_group(names[0], ref):
        raise Corrupt(f"entry {ref.name!r} holds tensor {names[0]!r}", kind="bad_relation")
    return found


def _in_group(tensor: str, ref: BlobRef) -> bool:
    """Whether a lone tensor may stand in this entry: in a group of one, or as a component's."""
    name = ref.name or ""
    return tensor.startswith(f"{name}.") or name.endswith(f"/{tensor}")
