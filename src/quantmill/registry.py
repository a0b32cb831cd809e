"""A registry of the OCI distribution API, spoken to over HTTP.

One `Registry` is one repository on one host. Requests carry a login or token to that host alone;
redirects are followed one by one and checked; bodies are read in small pieces, never decoded, never
further than announced. Failures are `Temporary`, or RegistryError where another try is pointless.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.request import getproxies

from quantmill import mediatypes
from quantmill.addresses import Origin, is_loopback, is_public, origin_of, redirect_target
from quantmill.credentials import Credential
from quantmill.digests import Digest, digest_of
from quantmill.errors import BadRequest, RegistryError
from quantmill.patience import Cancelled, Patience, Temporary, Tries
from quantmill.registrytokens import Tokens, refusal, withheld
from quantmill.spans import Span, parse_content_range
from quantmill.version import __version__
from quantmill.watching import Pace, Watch

if TYPE_CHECKING:
    import httpx2

MAX_HOPS = 10
MAX_MANIFEST = 16 * 2**20
"""The most bytes of a manifest that are read from a network."""

_MAX_TOLD = 4096
_CONNECTED = "connection.connect_tcp.complete"
"""What the client calls the step after which it has a connection, and has sent nothing."""

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TEMPORARY = frozenset({408, 425, 429, 500, 502, 503, 504})
_STORED = frozenset({200, 201, 202, 204})
_T = TypeVar("_T")
Content = Callable[[], Iterator[bytes]]


def require_client() -> None:
    """Raise BadRequest with the way to install it when the HTTP client is missing."""
    try:
        import httpx2  # noqa: F401
    except ImportError:
        raise BadRequest(
            "registries need the HTTP client httpx2",
            kind="missing_extra",
            hint="pip install 'quantmill[registry]'",
        ) from None
    for name in ("httpx2", "httpcore2"):  # they write addresses, signatures included, to the log
        logging.getLogger(name).setLevel(logging.WARNING)


@dataclass(frozen=True, slots=True)
class Body:
    """What a blob's answer holds: the span it covers and its bytes, in pieces."""

    span: Span
    pieces: Iterator[bytes]


class Registry:
    """One repository of a registry."""

    def __init__(
        self,
        origin: Origin,
        repository: str,
        *,
        login: Callable[[], Credential | None] = lambda: None,
        patience: Patience | None = None,
        connections: int = 8,
    ) -> None:
        require_client()
        import httpx2

        self.origin, self.repository = origin, repository
        self.patience, self.stop = patience or Patience(), threading.Event()
        limit = self.patience
        # proxies and certificates of the environment; no proxy to this machine
        outside = not is_loopback(origin.host)
        self._proxied = outside and bool(getproxies())
        self._client = httpx2.Client(
            headers={"User-Agent": f"quantmill/{__version__}", "Accept-Encoding": "identity"},
            timeout=httpx2.Timeout(limit.stall, connect=limit.connect, pool=None),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),  # none are kept
            limits=httpx2.Limits(max_connections=connections),
            trust_env=outside,
        )
        self._tokens = Tokens(origin, login, self._fetch_token)
        self._watch = Watch(limit)
        self._answered = False

    def __enter__(self) -> Registry:
        self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: object, trace: TracebackType | None
    ) -> None:
        self._watch.close()
        self._client.close()

    def abort(self) -> None:
        """Stop all that is under way, from any thread."""
        self.stop.set()
        self._watch.break_all()

    def patiently(self, action: Callable[[], _T]) -> _T:
        """What the action returns, tried again as long as it fails for a time only."""
        tries = Tries(self.patience, self.stop)
        while True:
            try:
                return action()
            except Temporary as error:
                tries.failed(error)

    def url(self, path: str) -> str:
        """Address of a resource of the repository."""
        return f"{self.origin}/v2/{self.repository}/{path}"

    # -- what is asked for -------------------------------------------------------------------------

    def manifest(self, tag: str) -> bytes:
        """The manifest's bytes; raises RegistryError, of kind not_found where there is none."""
        return self.patiently(lambda: self._manifest(tag))

    def check_login(self) -> None:
        """Ask for nothing but access; raises RegistryError where the login is not accepted."""
        with self.exchange("GET", f"{self.origin}/v2/", "access"):
            if self._tokens.withheld:  # it may have let anybody in
                raise withheld(self.origin.shown, self._tokens.withheld)
            if not self._tokens.known:
                raise self.error("asks for no login", "no_login_needed")

    def _manifest(self, tag: str) -> bytes:
        accept = {"Accept": f"{mediatypes.MANIFEST}, {mediatypes.OCI_MANIFEST}"}
        what = f"{self.repository}:{tag}"
        with self.exchange("GET", self.url(f"manifests/{tag}"), what, headers=accept) as answer:
            raw = b"".join(self._pieces(answer, what, MAX_MANIFEST, exact=None))
            stated = answer.headers.get("docker-content-digest", "")
            if stated.startswith("sha256:") and stated != str(digest_of(raw)):
                raise self.error(f"sends a manifest of {what} that has another digest than it says",
                                 "digest_mismatch")  # fmt: skip
            return raw

    @contextmanager
    def blob(self, digest: Digest, size: int, span: Span) -> Iterator[Body]:
        """Bytes of a blob: those of the span, fewer from its start on, or the whole blob."""
        whole = span == Span(0, size)
        headers = {} if whole else {"Range": f"bytes={span.start}-{span.end - 1}"}
        what = f"blob {digest.short}"
        with self.exchange("GET", self.url(f"blobs/{digest}"), what, headers=headers) as answer:
            given = Span(0, size)
            if answer.status_code == 206:
                given = self._partial(answer.headers.get("content-range"), what, size, span)
            announced = answer.headers.get("content-length", "")
            if announced.isdecimal() and int(announced) != given.size:
                raise self.error(f"sends {announced} bytes of {what}, {given.size} are right",
                                 "wrong_size")  # fmt: skip
            yield Body(given, self._pieces(answer, what, given.size, exact=given.size))

    def _partial(self, header: str | None, what: str, size: int, asked: Span) -> Span:
        found = parse_content_range(header or "")
        if found is None or found[0].start != asked.start or found[0].end > asked.end:
            raise Temporary(f"{self.origin.shown} sends other bytes of {what} than were asked for")
        if found[1] not in {None, size}:
            raise self.error(f"says that {what} has {found[1]} bytes, the manifest says {size}",
                             "wrong_size")  # fmt: skip
        return found[0]

    # -- how it is asked ---------------------------------------------------------------------------

    @contextmanager
    def exchange(
        self,
        method: str,
        url: str,
        what: str,
        *,
        headers: Mapping[str, str] | None = None,
        content: Content | None = None,
        accepted: frozenset[int] = frozenset({200, 206}),
    ) -> Iterator[httpx2.Response]:
        """A request and the answer to it, whose status is one of those accepted.

        Reading is redirected as the registry says; a challenge is met once. Raises Temporary and
        RegistryError.
        """
        challenged = hops = 0
        while True:
            with self._request(method, url, dict(headers or {}), content, what) as answer:
                status = answer.status_code
                if status in accepted:
                    self._refuse_encoding(answer, what)
                    yield answer
                    return
                if status == 401 and not challenged and origin_of(url) == self.origin:
                    sent = answer.request.headers.get("authorization")
                    if self._tokens.meet(answer.headers.get_list("www-authenticate"), sent):
                        challenged = 1
                        continue
                if status not in _REDIRECTS or method not in {"GET", "HEAD"}:
                    raise self._refused(answer, what)
                url = redirect_target(url, answer.headers.get("location"))
                hops += 1
            if hops > MAX_HOPS:
                raise self.error(f"redirects {what} more than {MAX_HOPS} times", "bad_redirect")

    def deliver(self, url: str, what: str, *, headers: Mapping[str, str], content: Content) -> None:
        """PUT bytes to storage where the registry has them brought, without a login.

        The address may be signed and goes out as it came. Raises Temporary and RegistryError.
        """
        with self._request("PUT", url, dict(headers), content, what, bare=True) as answer:
            status, where = answer.status_code, origin_of(url)
            shown = where.shown if where else "its storage"
            if status in _TEMPORARY:
                after = seconds_until(answer.headers.get("retry-after"))
                raise Temporary(f"{shown}, storage of {self.origin.shown}, answers {status} "
                                f"about {what}", after)  # fmt: skip
            if status not in _STORED:
                raise RegistryError(
                    f"{shown}, where {self.origin.shown} has {what} brought, answers {status}",
                    kind="refused",
                )

    @contextmanager
    def _request(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        content: Content | None,
        what: str,
        bare: bool = False,
    ) -> Iterator[httpx2.Response]:
        """One request; a `bare` one gets no login, and its address no other spelling."""
        import httpx2

        if self.stop.is_set():
            raise Cancelled
        led_outside = self._guard(url)

        def trace(step: str, info: Mapping[str, Any]) -> None:
            self._watch.trace(step, info)
            if led_outside and step == _CONNECTED:
                self._guard_peer(info["return_value"], url)

        known = self._tokens.header() if origin_of(url) == self.origin else None
        if known is not None and not bare:
            headers["Authorization"] = known
        with self._watch.over() as pace:
            try:
                request = self._client.build_request(
                    method, url, headers=headers, extensions={"trace": trace},
                    content=pace.counted(content()) if content else None,
                )  # fmt: skip
                if bare:  # the client would resolve dots and escape characters
                    request.extensions = {**request.extensions, "target": _target(url)}
                answer = self._client.send(request, stream=True, auth=None)
            except (httpx2.TransportError, httpx2.InvalidURL, UnicodeError, OSError) as error:
                raise self._failure(error, url, what, pace) from None
            self._answered = True
            pace.connection = _socket(answer)
            answer.extensions["pace"] = pace
            try:
                yield answer
            finally:
                with suppress(Exception):
                    answer.close()

    def _pieces(
        self, answer: httpx2.Response, what: str, most: int, exact: int | None
    ) -> Iterator[bytes]:
        """The body as it comes: never more than `most` bytes, and `exact` where that is given."""
        import httpx2

        limit, count, pace = self.patience, 0, answer.extensions["pace"]
        since, before, clock = time.monotonic(), 0, time.monotonic
        try:
            for piece in pace.counted(answer.iter_raw()):
                count += len(piece)
                if count > most:
                    raise self.error(f"sends more than {most} bytes of {what}", "wrong_size")
                yield piece
                if clock() - since >= limit.stall:
                    if count - before < limit.least_rate * limit.stall:
                        raise Temporary(f"{self.origin.shown} sends {what} too slowly")
                    since, before = clock(), count
        except (httpx2.TransportError, httpx2.StreamError, OSError) as error:
            raise self._failure(error, str(answer.request.url), what, pace) from None
        if exact is not None and count < exact:
            raise Temporary(f"{self.origin.shown} sends {count} bytes of {what} instead of {exact}")

    def _refuse_encoding(self, answer: httpx2.Response, what: str) -> None:
        encoding = answer.headers.get("content-encoding", "identity").lower()
        if encoding not in {"", "identity"}:
            raise self.error(f"sends {what} encoded, which was not asked for", "bad_encoding")

    def _guard(self, url: str) -> bool:
        """Refuse an address inside a private network that a public host leads to.

        Whether it is one that must be public.
        """
        target = origin_of(url)
        if target is None or target == self.origin or target.host == self.origin.host:
            return False
        if not _public(self.origin):
            return False
        if not _public(target):
            raise self._leads_inside(target)
        return True

    def _guard_peer(self, stream: Any, url: str) -> None:
        """The same for the address that was connected to, before anything is sent to it.

        A name server may have changed its answer. A proxy is the user's own, and looks names up.
        """
        peer, target = stream.get_extra_info("server_addr"), origin_of(url)
        if self._proxied or target is None or not peer or is_public(str(peer[0])):
            return
        stream.close()
        raise self._leads_inside(target)

    def _leads_inside(self, target: Origin) -> RegistryError:
        return self.error(f"leads to {target.host}, a private address: refused", "bad_redirect")

    # -- failures ----------------------------------------------------------------------------------

    def error(self, message: str, kind: str = "registry", hint: str | None = None) -> RegistryError:
        """An error about this registry that another try does not mend."""
        return RegistryError(f"{self.origin.shown} {message}", kind=kind, hint=hint)

    def _failure(self, error: Exception, url: str, what: str, pace: Pace) -> Exception:
        """What a broken connection means; an address's query, which may be signed, stays out."""
        import httpx2

        if self.stop.is_set():
            return Cancelled()
        target = origin_of(url)
        host = target.shown if target else self.origin.shown
        if isinstance(error, httpx2.InvalidURL | httpx2.UnsupportedProtocol | UnicodeError):
            return self.error("answers with an address that makes no sense", "bad_redirect")
        cause = _system_cause(error)
        if isinstance(cause, ssl.SSLError):
            reason = getattr(cause, "verify_message", None) or cause.reason or "TLS failed"
            return RegistryError(
                f"{host}: no trusted connection: {reason}", kind="bad_certificate",
                hint="--insecure allows plain HTTP to a registry without TLS",
            )  # fmt: skip
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout) and not self._answered:
            reason = getattr(cause, "strerror", None) or "no answer"
            return RegistryError(
                f"{host} cannot be reached: {reason}", kind="registry_unreachable",
                hint="check the host's name, the port and the network",
            )  # fmt: skip
        if pace.broken:
            return Temporary(f"{host} is too slow about {what}")
        if isinstance(error, httpx2.TimeoutException):
            return Temporary(f"{host} has not answered in time about {what}")
        return Temporary(f"{host}: the connection broke during {what}")

    def _refused(self, answer: httpx2.Response, what: str) -> Exception:
        status, told = answer.status_code, ""
        with suppress(Exception):
            told = b"".join(self._pieces(answer, what, _MAX_TOLD, exact=None)).decode()
        if status in _TEMPORARY:
            after = seconds_until(answer.headers.get("retry-after"))
            return Temporary(f"{self.origin.shown} answers {status} about {what}", after)
        return refusal(self.origin.shown, status, told, what, self._tokens)

    # -- tokens ------------------------------------------------------------------------------------

    def _fetch_token(self, url: str, headers: Mapping[str, str], form: bytes | None) -> bytes:
        """The answer of a token server; headers and form hold only what that server may see."""
        target = origin_of(url)
        if target is None or (target.scheme == "http" and self.origin.scheme == "https"):
            raise self.error("names no safe address for tokens", "bad_redirect")
        method, content = "GET" if form is None else "POST", form and (lambda: iter([form]))
        with self._request(
            method, url, dict(headers), content or None, "a token", bare=True
        ) as answer:
            if answer.status_code != 200:
                raise self._refused(answer, "a token")
            self._refuse_encoding(answer, "a token")
            return b"".join(self._pieces(answer, "a token", 1 << 20, exact=None))


def _target(url: str) -> bytes:
    """Path and query of an address as they are written."""
    written = url.partition("://")[2].partition("#")[0]
    start = min((at for at in map(written.find, "/?") if at >= 0), default=len(written))
    rest = written[start:]
    return (rest if rest.startswith("/") else f"/{rest}").encode("ascii")


def _socket(answer: httpx2.Response) -> socket.socket | None:
    stream: Any = answer.extensions.get("network_stream")
    found = stream.get_extra_info("socket") if stream is not None else None
    return found if isinstance(found, socket.socket) else None


def _system_cause(error: BaseException | None) -> OSError | None:
    """The error of the system behind one of the client's."""
    for _ in range(10):
        if error is None or isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None


def seconds_until(header: str | None) -> float | None:
    """What Retry-After says, as seconds from now."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header.strip()[:9])
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def _public(origin: Origin) -> bool:
    """Whether all addresses of a host are of the public internet."""
    try:
        found = socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return bool(found) and all(is_public(str(address[4][0])) for address in found)
