"""A registry that speaks Ollama's protocol and checks what it is sent, and its storage."""

from __future__ import annotations

import base64
import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from quantmill.digests import digest_of
from registries import Handler, Misbehaving, misbehaving

SERVICE = "registry.test"
EMPTY = base64.b64encode(hashlib.sha256(b"").hexdigest().encode()).decode()


@dataclass
class Session:
    """An upload: the parts that have come, wherever they went."""

    size: int | None
    digest: str | None
    parts: list[bytes] = field(default_factory=list)
    step: int = 0


@dataclass
class OllamaRegistry:
    """What the registry and its storage know, and how they behave.

    `ways` is `direct` (whole blobs to storage), `apart` (parts to storage) or `here`. `mistakes`
    says what a client did that it must not do; tests look that it stays empty.
    """

    ways: str = "here"
    keys: set[str] = field(default_factory=set)
    anonymous: bool = False
    realm: str | None = None
    tokens: list[str] = field(default_factory=list)
    spent: set[str] = field(default_factory=set)
    nonces: list[str] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, bytes] = field(default_factory=dict)
    sessions: dict[str, Session] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    stored: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    storage_fails: list[int] = field(default_factory=list)
    commit_fails: list[int] = field(default_factory=list)
    answers_lost: list[int] = field(default_factory=list)
    direct_path: str = "/store/{id}"
    signed_headers: dict[str, str] = field(default_factory=dict)
    host: str = ""
    storage: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    # -- the registry ------------------------------------------------------------------------------

    def answer(self, request: Handler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        with self.lock:
            self.asked.append(f"{request.command} {request.path}")
            path = urlsplit(request.path)
            if path.path == "/v2/token":
                self._token(request, parse_qs(path.query))
            elif not self._let_in(request):
                return
            elif "/manifests/" in path.path:
                self._manifest(request, path.path, body)
            elif "/uploads/" in path.path:
                self._upload(request, path.path, parse_qs(path.query), body)
            else:
                found = self.blobs.get(path.path.rpartition("/")[2])
                status, head = 404 if found is None else 200, request.command == "HEAD"
                request.reply(status, b"" if head or found is None else found)

    def _let_in(self, request: Handler) -> bool:
        sent = request.headers.get("Authorization", "")
        token = sent.removeprefix("Bearer ")
        if sent.startswith("Bearer ") and token in self.tokens and token not in self.spent:
            return True
        realm = self.realm or f"http://{self.host}/v2/token"
        scope = "repository:a/m:pull,push repository:a/other:pull"
        request.reply(
            401, WWW_Authenticate=f'Bearer realm="{realm}",service="{SERVICE}",scope="{scope}"'
        )
        return False

    def _token(self, request: Handler, query: dict[str, list[str]]) -> None:
        sent = request.headers.get("Authorization")
        if query.get("service") != [SERVICE]:
            self.mistakes.append("the service is another one")
        if query.get("scope") != ["repository:a/m:pull,push", "repository:a/other:pull"]:
            self.mistakes.append("the scopes are other ones")
        if sent is None and self.anonymous:
            self._give(request)
            return
        if sent is None or not self._signed(request, sent, query):
            request.reply(401, b'{"errors": [{"message": "not signed by a known key"}]}')
            return
        self._give(request)

    def _give(self, request: Handler) -> None:
        self.tokens.append(f"token-{len(self.tokens)}")
        request.reply(200, b'{"token": "%s"}' % self.tokens[-1].encode())

    def _signed(self, request: Handler, sent: str, query: dict[str, list[str]]) -> bool:
        """Whether a known key has signed this very address, which is good for once and for now."""
        written, _, signature = sent.partition(":")
        key = load_ssh_public_key(f"ssh-ed25519 {written}".encode())
        assert isinstance(key, Ed25519PublicKey)
        address = f"http://{self.host}{request.path}"
        try:
            key.verify(base64.b64decode(signature), f"GET,{address},{EMPTY}".encode())
        except InvalidSignature:
            self.mistakes.append("the signature is wrong")
        (nonce,), (stamp,) = query["nonce"], query["ts"]
        if len(base64.urlsafe_b64decode(nonce + "==")) != 16 or "=" in nonce:
            self.mistakes.append("the nonce is no number of 16 bytes")
        if nonce in self.nonces:
            self.mistakes.append("the nonce comes twice")
        if abs(int(stamp) - time.time()) > 3600:
            self.mistakes.append("the time is another one")
        self.nonces.append(nonce)
        return written in self.keys

    def _manifest(self, request: Handler, path: str, body: bytes) -> None:
        if request.command == "PUT":
            self.manifests[path] = body
            request.reply(201)
        elif path in self.manifests:
            request.reply(200, self.manifests[path])
        else:
            request.reply(404)

    # -- uploads -----------------------------------------------------------------------------------

    def _upload(
        self, request: Handler, path: str, query: dict[str, list[str]], body: bytes
    ) -> None:
        if request.command == "POST":
            self._begin(request, path, query)
            return
        name, _, step = path.rpartition("/")[2].partition("-")
        session = self.sessions.get(name)
        if session is None or int(step) > session.step:
            request.reply(404)
        elif request.command == "PATCH":
            self._part(request, path, name, session, body)
        elif request.command == "GET":
            last = max(sum(map(len, session.parts)) - 1, 0)
            request.reply(204, Location=path, Range=f"0-{last}")
        elif int(step) != session.step:
            self.mistakes.append("an upload does not end where it had got to")
            request.reply(404)
        else:
            self._commit(request, query, session, body)

    def _begin(self, request: Handler, path: str, query: dict[str, list[str]]) -> None:
        name = str(len(self.asked))
        asks = request.headers.get("X-Redirect-Uploads")
        size = request.headers.get("X-Content-Length")
        if asks != "2" or size is None or "digest" not in query:
            self.mistakes.append("an upload begins without Ollama's headers")
        if query.get("digest", [""])[0] in self.blobs:
            request.reply(201)
            return
        self.sessions[name] = Session(int(size or 0), query.get("digest", [""])[0])
        headers = {"Location": f"{path}{name}-0"}
        if self.ways == "direct":
            shown = self.direct_path.format(id=name)
            away = shown.startswith("/store")
            headers["X_Direct_Upload_URL"] = f"{self.storage}{shown}" if away else shown
            for key, value in self.signed_headers.items():
                headers[f"X_Signed_Header_{key}"] = value
        request.reply(202, b"", **headers)

    def _part(self, request: Handler, path: str, name: str, session: Session, body: bytes) -> None:
        at = sum(map(len, session.parts))
        if request.headers["Content-Range"] != f"{at}-{at + len(body) - 1}":
            self.mistakes.append("a part is not the next one")
        if request.headers.get("X-Redirect-Uploads") != "1":
            self.mistakes.append("a part is sent without Ollama's header")
        session.step += 1
        if self.ways != "apart":
            session.parts.append(body)
            request.reply(202, Location=f"{path.rpartition('/')[0]}/{name}-{session.step}")
            return
        request.reply(
            307,
            Location=f"{self.storage}/part/{name}/{len(session.parts)}?X=%3a",
            Docker_Upload_Location=f"{path.rpartition('/')[0]}/{name}-{session.step}",
        )

    def _commit(
        self, request: Handler, query: dict[str, list[str]], session: Session, body: bytes
    ) -> None:
        if self.commit_fails:
            request.reply(self.commit_fails.pop(0))
            return
        if body:
            self.mistakes.append("an upload ends with a body")
        data = b"".join(session.parts)
        if self.ways != "direct":
            sums = b"".join(hashlib.md5(part).digest() for part in session.parts)
            expected = f"{hashlib.md5(sums).hexdigest()}-{len(session.parts)}"
            if query.get("etag") != [expected]:
                self.mistakes.append("the etag is another one")
        digest = query["digest"][0]
        if str(digest_of(data)) != digest or digest != session.digest:
            request.reply(400)
            return
        self.blobs[digest] = data
        self.sessions = {key: s for key, s in self.sessions.items() if s is not session}
        request.reply(self.answers_lost.pop(0) if self.answers_lost else 201)

    # -- storage -----------------------------------------------------------------------------------

    def store(self, request: Handler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        with self.lock:
            self.stored.append((request.path, dict(request.headers.items()), body))
            if "Authorization" in request.headers:
                self.mistakes.append("storage sees a login")
            if self.storage_fails:
                request.reply(self.storage_fails.pop(0))
                return
            path = urlsplit(request.path).path.split("/")
            name = path[path.index("part") + 1] if "part" in path else path[-1]
            self.sessions[name].parts.append(body)
            request.reply(200)


@contextmanager
def ollama_registry(**behaviour: object) -> Iterator[OllamaRegistry]:
    """A registry and its storage inside this block; by its end no mistake was made."""
    found = OllamaRegistry(**behaviour)  # type: ignore[arg-type]
    with misbehaving(found.answer) as registry, misbehaving(found.store) as storage:
        found.host, found.storage = registry.host, f"http://{storage.host}"
        yield found
        assert found.mistakes == []
        assert tokens_seen(storage) == []


def tokens_seen(server: Misbehaving) -> list[str]:
    """Logins and tokens that came to a server."""
    return [headers["Authorization"] for _, headers in server.seen if "Authorization" in headers]
