"""Push: a model from the store to a registry.

Every blob is asked for first; one that the registry has is not sent, one that another of our
repositories there should have is mounted; uploading.py sends the others. The manifest comes last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from quantmill import mediatypes, provenance, strictjson
from quantmill.addresses import registry_origin
from quantmill.credentials import find_login
from quantmill.digests import Digest
from quantmill.errors import Corrupt, NotFound
from quantmill.manifest import BlobRef, Manifest
from quantmill.moving import Meter, Report
from quantmill.names import DEFAULT_HOST, ModelName, as_name
from quantmill.ollamakey import OllamaKey
from quantmill.patience import Patience
from quantmill.pulling import STREAMS, FindLogin
from quantmill.registry import Registry
from quantmill.store import Store
from quantmill.uploading import DONE, Uploads

PART = 64 * 2**20
"""Blobs longer than this are sent in parts of this size."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """What `push` did. `sent` blobs were moved, `mounted` came from a repository beside it."""

    name: ModelName
    digest: Digest
    size: int
    blobs: int
    sent: int
    sent_bytes: int
    mounted: int


def push(
    name: str | ModelName,
    target: str | ModelName | None = None,
    *,
    store: Store | str | Path | None = None,
    insecure: bool = False,
    progress: Report | None = None,
    patience: Patience | None = None,
    find: FindLogin = find_login,
) -> Pushed:
    """Send a stored model to the registry that its name says, or that `target` says.

    `insecure` allows plain HTTP. Raises BadName, BadRequest, NotFound, Corrupt, RegistryError.
    """
    name = as_name(name)
    target = name if target is None else as_name(target)
    store = store if isinstance(store, Store) else Store(store)
    manifest = store.get_manifest(name)
    refs = {ref.digest: ref for ref in manifest.all_refs()}
    for ref in refs.values():
        if store.blob_size(ref.digest) != ref.size:
            raise _damaged(ref, name)
    origin = registry_origin(target, insecure=insecure)
    host, namespace, model, tag = target.parts
    meter = Meter(refs.values(), progress)
    login = find(host)
    registry = Registry(
        origin, f"{namespace}/{model}", login=lambda: login, patience=patience,
        connections=2 * STREAMS,
    )  # fmt: skip
    # what goes by Ollama's key speaks its protocol; nobody else is asked for what Ollama added
    ollamas = host.lower() == DEFAULT_HOST or isinstance(login, OllamaKey)
    with registry:
        uploads = Uploads(registry, store, meter, PART, ollamas=ollamas)
        sending = _Sending(registry, uploads, store, name, meter)
        sending.neighbours = _neighbours(store, target, refs)
        sending.all(sorted(refs.values(), key=lambda ref: (-ref.size, ref.digest)))
        registry.patiently(lambda: _put_manifest(registry, tag, manifest))
    provenance.note_registry(store, manifest.digest, target)
    return Pushed(
        replace(target.resolved, scheme=None), manifest.digest,
        sum(ref.size for ref in refs.values()), len(refs),
        sending.sent, sending.sent_bytes, sending.mounted,
    )  # fmt: skip


def _damaged(ref: BlobRef, name: ModelName) -> Corrupt:
    return Corrupt(
        f"blob {ref.digest.short} of {name.display} is damaged",
        hint=f"`quantmill verify {name.display}` says more; pull or create the model again",
    )


def _neighbours(
    store: Store, target: ModelName, refs: Mapping[Digest, BlobRef]
) -> Mapping[Digest, str]:
    """For each blob a repository of the same registry whose model, stored here, names it too."""
    found: dict[Digest, str] = {}
    own = target.key[:3]
    for stored in store.list_names():
        host, namespace, model, _ = stored.name.parts
        if host.lower() != own[0] or (namespace.lower(), model.lower()) == own[1:]:
            continue
        with suppress(NotFound, Corrupt):
            for ref in store.get_manifest(stored.name).all_refs():
                if ref.digest in refs:
                    found.setdefault(ref.digest, f"{namespace}/{model}")
    return found


def _put_manifest(registry: Registry, tag: str, manifest: Manifest) -> None:
    with suppress(strictjson.BadJson):
        stated = strictjson.parse_object(manifest.raw).get("mediaType")
    kind = stated if stated == mediatypes.OCI_MANIFEST else mediatypes.MANIFEST
    headers = {"Content-Type": kind, "Content-Length": str(len(manifest.raw))}
    what = f"manifest {registry.repository}:{tag}"
    with registry.exchange(
        "PUT", registry.url(f"manifests/{tag}"), what, headers=headers,
        content=lambda: iter([manifest.raw]), accepted=DONE,
    ) as answer:  # fmt: skip
        named = answer.headers.get("docker-content-digest", str(manifest.digest))
        if named != str(manifest.digest):
            raise registry.error(f"took {what} for another one", "digest_mismatch")


class _Sending:
    """Sends blobs, several at a time."""

    def __init__(
        self,
        registry: Registry,
        uploads: Uploads,
        store: Store,
        name: ModelName,
        meter: Meter,
    ) -> None:
        self._registry, self._store, self._name, self._meter = registry, store, name, meter
        self._uploads = uploads
        self.neighbours: Mapping[Digest, str] = {}
        self.sent = self.sent_bytes = self.mounted = 0
        self._how: dict[str, list[int]] = defaultdict(list)

    def all(self, refs: list[BlobRef]) -> None:
        """Have the registry hold all these blobs. At the first failure everything stops."""
        with ThreadPoolExecutor(STREAMS, "send") as pool:
            futures = [pool.submit(self._bring, ref) for ref in refs]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                for future in futures:
                    future.cancel()
                self._registry.abort()
                raise
        self.sent, self.sent_bytes = len(self._how["sent"]), sum(self._how["sent"])
        self.mounted = len(self._how["mounted"])

    def _bring(self, ref: BlobRef) -> None:
        how = "there"
        if self._registry.patiently(lambda: self._is_there(ref)):
            self._uploads.forget(ref)
        else:
            if not self._store.holds(ref.digest, ref.size):
                raise _damaged(ref, self._name)
            how = self._uploads.send(ref, self.neighbours.get(ref.digest))
        self._how[how].append(ref.size)  # an append is atomic
        self._meter.finished(ref.digest)

    def _is_there(self, ref: BlobRef) -> bool:
        url, accepted = self._registry.url(f"blobs/{ref.digest}"), frozenset({200, 404})
        what = f"blob {ref.digest.short}"
        with self._registry.exchange("HEAD", url, what, accepted=accepted) as answer:
            return answer.status_code == 200
