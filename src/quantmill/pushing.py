"""Push: a model from the store to a registry.

Every blob is asked for first; one that the registry has is not sent, one that another of our
repositories there should have is mounted. Long blobs go in parts, and go on where the registry says
it has got to. The manifest comes last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlencode, urlsplit, urlunsplit

from quantmill import mediatypes, provenance, strictjson
from quantmill.addresses import redirect_target, registry_origin
from quantmill.credentials import find_login
from quantmill.digests import Digest
from quantmill.errors import Corrupt, NotFound, RegistryError
from quantmill.manifest import BlobRef, Manifest
from quantmill.moving import Meter, Report
from quantmill.names import ModelName, as_name
from quantmill.patience import Patience, Temporary, Tries
from quantmill.pulling import STREAMS, FindLogin
from quantmill.registry import Registry
from quantmill.spans import parse_uploaded
from quantmill.store import Store

PART = 64 * 2**20
"""Blobs longer than this are sent in parts of this size."""

_STARTED = frozenset({201, 202})
_DONE = frozenset({200, 201, 202, 204})
_OCTETS = {"Content-Type": "application/octet-stream"}


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
    registry = Registry(
        origin, f"{namespace}/{model}", login=lambda: find(host), patience=patience,
        connections=2 * STREAMS,
    )  # fmt: skip
    with registry:
        sending = _Sending(registry, store, name, meter, _neighbours(store, target, refs))
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
        content=lambda: iter([manifest.raw]), accepted=_DONE,
    ) as answer:  # fmt: skip
        named = answer.headers.get("docker-content-digest", str(manifest.digest))
        if named != str(manifest.digest):
            raise registry.error(f"took {what} for another one", "digest_mismatch")


@dataclass(slots=True)
class _Upload:
    """An upload under way: where the next part goes, how many bytes have arrived.

    It is not `sure` after a failure, and `resumed` where it went on after one.
    """

    url: str
    at: int
    least: int
    sure: bool = True
    resumed: bool = False


class _Sending:
    """Sends blobs, several at a time."""

    def __init__(
        self,
        registry: Registry,
        store: Store,
        name: ModelName,
        meter: Meter,
        neighbours: Mapping[Digest, str],
    ) -> None:
        self._registry, self._store, self._name, self._meter = registry, store, name, meter
        self._neighbours = neighbours
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
        if not self._registry.patiently(lambda: self._is_there(ref)):
            if not self._store.holds(ref.digest, ref.size):
                raise _damaged(ref, self._name)
            how = self._send(ref)
        self._how[how].append(ref.size)  # an append is atomic
        self._meter.finished(ref.digest)

    def _is_there(self, ref: BlobRef) -> bool:
        url, accepted = self._registry.url(f"blobs/{ref.digest}"), frozenset({200, 404})
        what = f"blob {ref.digest.short}"
        with self._registry.exchange("HEAD", url, what, accepted=accepted) as answer:
            return answer.status_code == 200

    def _send(self, ref: BlobRef) -> str:
        """Mount or send a blob; says which."""
        patience = self._registry.patience
        tries, best = Tries(patience, self._registry.stop), 0
        upload: _Upload | None = None
        while True:
            try:
                if upload is not None and not upload.sure:
                    upload = self._found_again(ref, upload)
                if upload is None:
                    upload = self._start(ref)
                    if upload is None:
                        return "mounted"
                self._meter.set(ref.digest, upload.at)
                if upload.at - best >= patience.counts:
                    best = upload.at
                    tries.forgive()
                self._send_rest(ref, upload)
                return "sent"
            except Temporary as error:
                tries.failed(error)
                if upload is not None:
                    upload.sure = False
            except RegistryError as error:
                # parts that were lost or came twice show in the digest: once more from the start
                if upload is None or not upload.resumed or error.kind != "refused":
                    raise
                upload = None

    def _start(self, ref: BlobRef) -> _Upload | None:
        """Begin an upload; None where the blob could be mounted instead."""
        neighbour = self._neighbours.get(ref.digest)
        if neighbour is not None:
            try:
                return self._post(ref, {"mount": str(ref.digest), "from": neighbour})
            except RegistryError as error:
                if error.kind not in {"unauthorized", "forbidden", "not_found", "refused"}:
                    raise
        return self._post(ref, {})

    def _post(self, ref: BlobRef, query: Mapping[str, str]) -> _Upload | None:
        url = _with_query(self._registry.url("blobs/uploads/"), query)
        what = f"the upload of blob {ref.digest.short}"
        headers = {"Content-Length": "0"}
        with self._registry.exchange(
            "POST", url, what, headers=headers, accepted=_STARTED
        ) as answer:
            if answer.status_code == 201 and query:
                return None
            stated = answer.headers.get("oci-chunk-min-length", "")
            least = int(stated) if stated.isdecimal() and len(stated) < 12 else 0
            return _Upload(_location(url, answer.headers), 0, least)

    def _send_rest(self, ref: BlobRef, upload: _Upload) -> None:
        part = max(PART, upload.least)
        while ref.size > part and upload.at < ref.size:
            self._send_part(ref, upload, min(part, ref.size - upload.at))
        rest = ref.size - upload.at
        headers = _OCTETS | {"Content-Length": str(rest)}
        url = _with_query(upload.url, {"digest": str(ref.digest)})
        start, what = upload.at, f"the upload of blob {ref.digest.short}"
        with self._registry.exchange(
            "PUT", url, what, headers=headers,
            content=(lambda: self._pieces(ref, start, ref.size)) if rest else None, accepted=_DONE,
        ):  # fmt: skip
            return

    def _send_part(self, ref: BlobRef, upload: _Upload, count: int) -> None:
        start, end = upload.at, upload.at + count
        headers = _OCTETS | {"Content-Length": str(count), "Content-Range": f"{start}-{end - 1}"}
        what = f"the upload of blob {ref.digest.short}"
        with self._registry.exchange(
            "PATCH", upload.url, what, headers=headers,
            content=lambda: self._pieces(ref, start, end), accepted=_DONE,
        ) as answer:  # fmt: skip
            arrived = parse_uploaded(answer.headers.get("range", f"0-{end - 1}"))
            if arrived != end:
                raise Temporary(f"{self._registry.origin.shown} has lost bytes in {what}")
            upload.url, upload.at = _location(upload.url, answer.headers), end

    def _pieces(self, ref: BlobRef, start: int, end: int) -> Iterator[bytes]:
        """Bytes to send, counted as they go."""
        self._meter.set(ref.digest, start)
        for piece in self._store.blob_chunks(ref.digest, start, end):
            yield piece
            self._meter.add(ref.digest, len(piece))

    def _found_again(self, ref: BlobRef, upload: _Upload) -> _Upload | None:
        """An upload that broke, as far as the registry got; None where it must start anew."""
        if ref.size <= PART:
            return None
        what = f"the upload of blob {ref.digest.short}"
        try:
            with self._registry.exchange("GET", upload.url, what, accepted=_DONE) as answer:
                arrived = parse_uploaded(answer.headers.get("range", ""))
                if arrived is None or arrived > ref.size:
                    return None
                url = _location(upload.url, answer.headers)
                return _Upload(url, arrived, upload.least, resumed=True)
        except RegistryError as error:
            if error.kind not in {"not_found", "refused"}:
                raise
            return None


def _location(url: str, headers: Mapping[str, str]) -> str:
    """Where an upload goes on: Ollama's registry has a header of its own for it."""
    given = headers.get("docker-upload-location") or headers.get("location")
    return redirect_target(url, given) if given else url


def _with_query(url: str, query: Mapping[str, str]) -> str:
    parts = urlsplit(url)
    joined = "&".join(filter(None, [parts.query, urlencode(query)]))
    return urlunsplit((parts.scheme, parts.netloc, parts.path, joined, ""))
