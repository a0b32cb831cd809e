"""Sending one blob to a registry: as a whole or in parts, to the registry or where it says.

Registries of the OCI distribution API take short blobs in one request and long ones in parts; an
upload that broke goes on where the registry says it has got to, in the next run of the command too.
Ollama's registry is asked as Ollama asks it. It may name storage that takes the blob whole, or each
part, and then wants to know their digests at the end. Storage never sees a login.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlencode, urlsplit, urlunsplit

from quantmill.addresses import origin_of, redirect_target
from quantmill.digests import Digest
from quantmill.errors import RegistryError
from quantmill.manifest import BlobRef
from quantmill.moving import Meter
from quantmill.patience import Temporary, Tries
from quantmill.registry import Registry
from quantmill.spans import parse_uploaded
from quantmill.store import Store
from quantmill.uploadnotes import UploadNote

OLLAMA_PARTS = 16
OLLAMA_LEAST, OLLAMA_MOST = 100 * 2**20, 1000 * 2**20
"""Ollama's registry gets so many parts of a blob, within these sizes, as Ollama sends them."""

DONE = frozenset({200, 201, 202, 204})
_STARTED = frozenset({201, 202})
_ELSEWHERE = 307
_OVER = frozenset({"not_found", "refused"})
"""Kinds of errors that mean that an upload is not known any more, or cannot be gone on with."""

_OCTETS = {"Content-Type": "application/octet-stream"}
_SIGNED = "x-signed-header-"
_FRAMING = frozenset(
    {"host", "content-length", "transfer-encoding", "connection", "te", "trailer", "upgrade",
     "expect", "keep-alive"}
)  # fmt: skip
"""Headers that say where a request goes and how long it is: nobody else decides that."""


@dataclass(frozen=True, slots=True)
class Direct:
    """Storage that takes a blob whole: its address, and headers that were signed with it."""

    url: str
    headers: Mapping[str, str]


@dataclass(slots=True)
class _Upload:
    """An upload under way: where the next part goes, how many bytes have arrived.

    It is not `sure` after a failure, and `doubtful` when it goes on after one. `sums` are the MD5
    digests of its parts, None where not all are known; `apart` is whether storage got one.
    """

    url: str
    at: int
    least: int = 0
    sure: bool = True
    doubtful: bool = False
    direct: Direct | None = None
    apart: bool = False
    sums: list[bytes] | None = field(default_factory=list)

    @property
    def etag(self) -> str | None:
        """What storage knows the parts by, when they have been put together."""
        if not self.sums:
            return None
        joined = hashlib.md5(b"".join(self.sums), usedforsecurity=False).hexdigest()
        return f"{joined}-{len(self.sums)}"


class Uploads:
    """Sends blobs, any number at a time.

    Blobs longer than `part` go in parts of that size. A registry that is `ollamas` is asked for
    Ollama's own ways as well; others see nothing of them.
    """

    def __init__(
        self, registry: Registry, store: Store, meter: Meter, part: int, *, ollamas: bool
    ) -> None:
        self._registry, self._store, self._meter = registry, store, meter
        self._part, self._ollamas = part, ollamas

    def forget(self, ref: BlobRef) -> None:
        """A blob is there: an upload of it that an earlier run left is of no use."""
        if ref.size > self._part:
            self._note(ref).remove()

    def send(self, ref: BlobRef, neighbour: str | None) -> str:
        """Mount a blob from a neighbour or send it; says which.

        Raises RegistryError, Corrupt.
        """
        if ref.size <= self._part:
            return self._send(ref, neighbour, None)
        note = self._note(ref)
        try:
            how = self._send(ref, neighbour, note)
            note.remove()
            return how
        finally:
            note.close()

    def _note(self, ref: BlobRef) -> UploadNote:
        registry = self._registry
        return UploadNote(self._store, registry.origin, registry.repository, ref.digest)

    def _send(self, ref: BlobRef, neighbour: str | None, note: UploadNote | None) -> str:
        patience = self._registry.patience
        tries, best = Tries(patience, self._registry.stop), 0
        upload = self._noted(ref, note.read()) if note else None
        while True:
            try:
                if upload is not None and not upload.sure:
                    upload = self._found_again(ref, upload)
                if upload is None:
                    upload = self._start(ref, neighbour)
                    if upload is None:
                        return "mounted"
                self._meter.set(ref.digest, upload.at)
                if upload.at - best >= patience.counts:
                    best = upload.at
                    tries.forgive()
                self._send_rest(ref, upload, note)
                return "sent"
            except Temporary as error:
                tries.failed(error)
                upload = _after_failure(ref, upload)
            except RegistryError as error:
                # parts that were lost or came twice show in the digest, and an end whose answer was
                # lost in an upload that is gone: once more from the start
                if upload is None or not upload.doubtful or error.kind not in _OVER:
                    raise
                upload = None

    # -- the start ---------------------------------------------------------------------------------

    def _start(self, ref: BlobRef, neighbour: str | None) -> _Upload | None:
        """Begin an upload; None where the registry takes the blob from elsewhere instead."""
        if self._ollamas:
            headers = {"X-Redirect-Uploads": "2", "X-Content-Length": str(ref.size)}
            return self._post(ref, {"digest": str(ref.digest)}, headers)
        if neighbour is not None:
            try:
                return self._post(ref, {"mount": str(ref.digest), "from": neighbour}, {})
            except RegistryError as error:
                if error.kind not in {"unauthorized", "forbidden", "not_found", "refused"}:
                    raise
        return self._post(ref, {}, {})

    def _post(
        self, ref: BlobRef, query: Mapping[str, str], asked: Mapping[str, str]
    ) -> _Upload | None:
        url = _with_query(self._registry.url("blobs/uploads/"), query)
        headers = {"Content-Length": "0", **asked}
        with self._registry.exchange(
            "POST", url, _what(ref.digest), headers=headers, accepted=_STARTED
        ) as answer:
            if answer.status_code == 201 and query:
                return None
            stated = answer.headers.get("oci-chunk-min-length", "")
            least = int(stated) if stated.isdecimal() and len(stated) < 12 else 0
            direct = _direct(url, answer.headers) if asked else None
            return _Upload(_location(url, answer.headers), 0, least, direct=direct)

    # -- what is sent ------------------------------------------------------------------------------

    def _send_rest(self, ref: BlobRef, upload: _Upload, note: UploadNote | None) -> None:
        if upload.direct is not None:
            self._send_directly(ref, upload, upload.direct)
        else:
            part = max(self._part_of(ref), upload.least)
            if note:
                note.write(upload.url)
            while (ref.size > part or self._ollamas) and upload.at < ref.size:
                self._send_part(ref, upload, min(part, ref.size - upload.at))
                if note and upload.apart:  # the registry cannot say how far storage has got
                    note.remove()
                elif note:
                    note.write(upload.url)
        rest, start = ref.size - upload.at, upload.at
        named = {"digest": str(ref.digest)} | ({"etag": upload.etag} if upload.etag else {})
        with self._registry.exchange(
            "PUT", _with_query(upload.url, named), _what(ref.digest),
            headers=_OCTETS | {"Content-Length": str(rest)},
            content=(lambda: self._pieces(ref, start, ref.size)) if rest else None, accepted=DONE,
        ):  # fmt: skip
            return

    def _part_of(self, ref: BlobRef) -> int:
        if not self._ollamas:
            return self._part
        return min(max(ref.size // OLLAMA_PARTS, OLLAMA_LEAST), OLLAMA_MOST)

    def _send_directly(self, ref: BlobRef, upload: _Upload, direct: Direct) -> None:
        """The whole blob to storage; nothing where that is done already."""
        if upload.at == ref.size:
            return
        length = {"content-type": _OCTETS["Content-Type"], "content-length": str(ref.size)}
        self._registry.deliver(
            direct.url, _what(ref.digest), headers={**length, **direct.headers},
            content=lambda: self._pieces(ref, 0, ref.size),
        )  # fmt: skip
        upload.at = ref.size

    def _send_part(self, ref: BlobRef, upload: _Upload, count: int) -> None:
        start, end = upload.at, upload.at + count
        length = _OCTETS | {"Content-Length": str(count)}
        headers = length | {"Content-Range": f"{start}-{end - 1}"}
        accepted = DONE
        if self._ollamas:
            headers["X-Redirect-Uploads"] = "1"
            accepted |= {_ELSEWHERE}
        body = _Summed(lambda: self._pieces(ref, start, end))
        content = body if self._ollamas else body.pieces  # the sum takes time, too
        with self._registry.exchange(
            "PATCH", upload.url, _what(ref.digest), headers=headers,
            content=content, accepted=accepted,
        ) as answer:  # fmt: skip
            told, storage = answer.headers, None
            if answer.status_code == _ELSEWHERE:
                storage = _as_given(upload.url, told.get("location"))
                session = told.get("docker-upload-location")
                url = redirect_target(upload.url, session) if session else upload.url
            else:
                arrived = parse_uploaded(told.get("range", f"0-{end - 1}"))
                if arrived != end:
                    raise Temporary(
                        f"{self._registry.origin.shown} has lost bytes in {_what(ref.digest)}"
                    )
                url = _location(upload.url, told)
        if storage is not None:
            self._send_part_to(storage, ref, upload, body, length)
        if self._ollamas and upload.sums is not None:
            upload.sums.append(body.md5)
        upload.url, upload.at = url, end

    def _send_part_to(
        self, url: str, ref: BlobRef, upload: _Upload, body: _Summed, headers: Mapping[str, str]
    ) -> None:
        if upload.sums is None:  # how it was cut before is not known, and storage goes by that
            raise self._registry.error(f"sends a part of {_what(ref.digest)} elsewhere", "refused")
        upload.apart = True
        self._registry.deliver(url, _what(ref.digest), headers=headers, content=body)

    def _pieces(self, ref: BlobRef, start: int, end: int) -> Iterator[bytes]:
        """Bytes to send, counted as they go."""
        self._meter.set(ref.digest, start)
        for piece in self._store.blob_chunks(ref.digest, start, end):
            yield piece
            self._meter.add(ref.digest, len(piece))

    # -- going on ----------------------------------------------------------------------------------

    def _noted(self, ref: BlobRef, url: str | None) -> _Upload | None:
        """An upload that an earlier run left, as far as it got; None where it is of no use."""
        if url is None:
            return None
        try:
            return self._registry.patiently(lambda: self._found_again(ref, _Upload(url, 0)))
        except RegistryError:  # the note may be wrong; what else is wrong shows at the start
            return None

    def _found_again(self, ref: BlobRef, upload: _Upload) -> _Upload | None:
        """An upload that broke, as far as the registry got; None where it must start anew."""
        if ref.size <= self._part:
            return None
        try:
            with self._registry.exchange(
                "GET", upload.url, _what(ref.digest), accepted=DONE
            ) as answer:
                arrived = parse_uploaded(answer.headers.get("range", ""))
                if arrived is None or arrived > ref.size:
                    return None
                url = _location(upload.url, answer.headers)
                sums: list[bytes] | None = None if arrived else []
                return _Upload(url, arrived, upload.least, doubtful=True, sums=sums)
        except RegistryError as error:
            if error.kind not in _OVER:
                raise
            return None


class _Summed:
    """Bytes to send, and the MD5 digest of those that were sent last."""

    def __init__(self, pieces: Callable[[], Iterator[bytes]]) -> None:
        self.pieces = pieces
        self._sum = hashlib.md5(usedforsecurity=False)

    def __call__(self) -> Iterator[bytes]:
        self._sum = hashlib.md5(usedforsecurity=False)
        for piece in self.pieces():
            self._sum.update(piece)
            yield piece

    @property
    def md5(self) -> bytes:
        """Of all bytes of the last time."""
        return self._sum.digest()


def _after_failure(ref: BlobRef, upload: _Upload | None) -> _Upload | None:
    """What is gone on with after a failure that may pass; None: from the start."""
    if upload is None or (upload.direct is not None and upload.at < ref.size):
        return None  # an address that is signed may be good for once
    if upload.direct is not None or upload.apart:
        upload.doubtful = True  # only what was on its way is sent again
    else:
        upload.sure = False
    return upload


def _what(digest: Digest) -> str:
    return f"the upload of blob {digest.short}"


def _direct(url: str, headers: Mapping[str, str]) -> Direct | None:
    """Storage that takes the blob; raises RegistryError for an address not to be followed."""
    given = headers.get("x-direct-upload-url")
    if not given:
        return None
    # no relative ones: the address is signed as it is written
    redirect_target(url, given if origin_of(given) else None)
    signed = {
        name.lower().removeprefix(_SIGNED): value
        for name, value in headers.items()
        if name.lower().startswith(_SIGNED)
    }
    return Direct(given, {n: v for n, v in signed.items() if n and n not in _FRAMING})


def _as_given(url: str, location: str | None) -> str:
    """An address that may be signed, letter for letter; raises RegistryError as for a redirect."""
    target = redirect_target(url, location)
    return location if location and origin_of(location) else target


def _location(url: str, headers: Mapping[str, str]) -> str:
    """Where an upload goes on: Ollama's registry has a header of its own for it."""
    given = headers.get("docker-upload-location") or headers.get("location")
    return redirect_target(url, given) if given else url


def _with_query(url: str, query: Mapping[str, str]) -> str:
    parts = urlsplit(url)
    kept = [pair for pair in parts.query.split("&") if pair.partition("=")[0] not in query]
    joined = "&".join(filter(None, [*kept, urlencode(query)]))
    return urlunsplit((parts.scheme, parts.netloc, parts.path, joined, ""))
