"""Identifying oneself to a registry: what a challenge is met with, and what a refusal means.

The login goes to the registry, and to the server it names for tokens when that is the same host, or
known to belong to it (addresses.py). Tokens go to the registry alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from quantmill import strictjson
from quantmill.addresses import Origin, may_have_password, origin_of
from quantmill.challenges import Challenge, parse_challenges
from quantmill.credentials import Login
from quantmill.errors import RegistryError

_Fetch = Callable[[str, Mapping[str, str]], bytes]


class Tokens:
    """The value of the Authorization header for one registry, found when it is first asked for."""

    def __init__(self, origin: Origin, login: Callable[[], Login | None], fetch: _Fetch) -> None:
        self._origin, self._find, self._fetch = origin, login, fetch
        self._lock = threading.RLock()
        self._header: str | None = None
        self._login: Login | None = None
        self._looked = False

    def header(self) -> str | None:
        """What is sent with every request to the registry, None before it asks."""
        return self._header

    @property
    def known(self) -> bool:
        """Whether there is a login for the registry."""
        return self._looked and self._login is not None

    def hide(self, text: str) -> str:
        """The text, empty where it repeats something secret."""
        login = self._login
        secrets = [login.password, login.basic.partition(" ")[2]] if login else []
        if self._header:
            secrets.append(self._header.partition(" ")[2])
        return "" if any(secret in text for secret in secrets) else text

    def meet(self, headers: Sequence[str], sent: str | None) -> bool:
        """Find an answer to a challenge; False where there is none that was not refused already.

        Requests that were refused at the same time share one answer.
        """
        with self._lock:
            if self._header is not None and self._header != sent:
                return True
            found = self._answer(parse_challenges(headers))
            if found is None or found == sent:
                return False
            self._header = found
            return True

    def _answer(self, challenges: Sequence[Challenge]) -> str | None:
        if not self._looked:
            self._login, self._looked = self._find(), True
        by_scheme = {challenge.scheme: challenge for challenge in reversed(challenges)}
        if "bearer" in by_scheme:
            return "Bearer " + self._token(by_scheme["bearer"].parameters)
        if "basic" in by_scheme and self._login is not None:
            return self._login.basic
        return None

    def _token(self, parameters: Mapping[str, str]) -> str:
        realm = parameters.get("realm", "")
        server = origin_of(realm)
        if server is None:
            raise self._bad("names no address for tokens")
        parts = urlsplit(realm)
        query = parse_qsl(parts.query, keep_blank_values=True)
        if "service" in parameters:
            query.append(("service", parameters["service"]))
        query += [("scope", scope) for scope in parameters.get("scope", "").split()]
        url = urlunsplit((parts.scheme, parts.netloc, parts.path or "/", urlencode(query), ""))
        headers = {}
        if self._login is not None and may_have_password(self._origin, server):
            headers["Authorization"] = self._login.basic
        try:
            answer = strictjson.parse_object(self._fetch(url, headers))
        except strictjson.BadJson:
            raise self._bad("gives out no token that can be read") from None
        token = answer.get("token") or answer.get("access_token")
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise self._bad("gives out no token that can be read")
        return token

    def _bad(self, what: str) -> RegistryError:
        return RegistryError(f"{self._origin.shown} {what}", kind="bad_token_server")


def refusal(host: str, status: int, told: str, what: str, tokens: Tokens) -> RegistryError:
    """The error that an answer means; `told` is the beginning of its body."""
    said = tokens.hide(_said(told))
    tail = f": {said}" if said else ""
    if status == 401:
        refused = "does not accept the login" if tokens.known else "asks for a login"
        return RegistryError(
            f"{host} {refused} for {what}{tail}", kind="unauthorized",
            hint=f"quantmill login {host}",
        )  # fmt: skip
    if status == 403:
        return RegistryError(
            f"{host} forbids {what}{tail}", kind="forbidden",
            hint=f"`quantmill login {host}` with a user who may",
        )  # fmt: skip
    if status == 404:
        return RegistryError(
            f"{host} has no {what}{tail}", kind="not_found",
            hint="check the name; a private model needs `quantmill login`",
        )  # fmt: skip
    return RegistryError(f"{host} answers {status} about {what}{tail}", kind="refused")


def _said(body: str) -> str:
    """The first message in an error document of a registry, made safe to print."""
    try:
        document = strictjson.parse_object(body.encode())
    except strictjson.BadJson:
        return ""
    errors = document.get("errors")
    first = errors[0] if isinstance(errors, list) and errors else document
    message = first.get("message") or first.get("error") if isinstance(first, dict) else None
    if not isinstance(message, str):
        return ""
    return "".join(c if c.isprintable() else " " for c in message[:200]).strip()
