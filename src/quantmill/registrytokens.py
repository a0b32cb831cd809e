"""Identifying oneself to a registry: what a challenge is met with, and what a refusal means.

The login goes to the registry, and to the server it names for tokens when that is the same host, or
known to belong to it (addresses.py); an identity token goes to such a server alone, and what
Ollama's key has signed to the registry's own host. Tokens go to the registry alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from urllib.parse import parse_qsl, quote_plus, urlencode, urlsplit, urlunsplit

from quantmill import strictjson
from quantmill.addresses import Origin, may_have_password, origin_of
from quantmill.challenges import Challenge, parse_challenges
from quantmill.credentials import Credential, IdentityToken, Login
from quantmill.errors import RegistryError
from quantmill.names import DEFAULT_HOST
from quantmill.ollamakey import OllamaKey, signable

_Fetch = Callable[[str, Mapping[str, str], bytes | None], bytes]
_CLIENT = "quantmill"
_FORM = {"Content-Type": "application/x-www-form-urlencoded"}


class Tokens:
    """The value of the Authorization header for one registry, found when it is first asked for."""

    def __init__(
        self, origin: Origin, login: Callable[[], Credential | None], fetch: _Fetch
    ) -> None:
        self._origin, self._find, self._fetch = origin, login, fetch
        self._lock = threading.RLock()
        self._header: str | None = None
        self._login: Credential | None = None
        self._looked = False
        self._signed = ""
        self.withheld: str | None = None
        """A token server that was not shown the password it may have wanted."""

    def header(self) -> str | None:
        """What is sent with every request to the registry, None before it asks."""
        return self._header

    @property
    def known(self) -> bool:
        """Whether there is a login for the registry, or a key that it is shown."""
        if isinstance(self._login, OllamaKey):
            return self._login.exists()
        return self._looked and self._login is not None

    @property
    def by_key(self) -> bool:
        """Whether the registry has asked, and is one that is shown Ollama's key."""
        return isinstance(self._login, OllamaKey)

    def hide(self, text: str) -> str:
        """The text, empty where it repeats something secret."""
        signature = self._signed.rpartition(":")[2]  # the public key before it is no secret
        secrets = [self._header.partition(" ")[2] if self._header else "", signature]
        match self._login:
            case Login(password=password) as login:
                secrets += [password, login.basic.partition(" ")[2]]
            case IdentityToken(token=token):
                secrets += [token, quote_plus(token)]
        return "" if any(secret and secret in text for secret in secrets) else text

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
        if "basic" in by_scheme and isinstance(self._login, Login):
            return self._login.basic
        return None

    def _token(self, parameters: Mapping[str, str]) -> str:
        realm = parameters.get("realm", "")
        server = origin_of(realm)
        if server is None:
            raise self._bad("names no address for tokens")
        try:
            answer = strictjson.parse_object(self._asked(server, realm, parameters))
        except strictjson.BadJson:
            raise self._bad("gives out no token that can be read") from None
        token = answer.get("token") or answer.get("access_token")
        if not isinstance(token, str) or not token.isascii() or not token.isprintable():
            raise self._bad("gives out no token that can be read")
        return token

    def _asked(self, server: Origin, realm: str, parameters: Mapping[str, str]) -> bytes:
        """What the token server answers to one who shows it no more than it may see."""
        login, headers = self._login, {}
        url = _token_url(realm, parameters)
        allowed = login.token_server if isinstance(login, Login) else None
        trusted = may_have_password(self._origin, server, allowed)
        self.withheld = None if trusted or login is None else server.shown
        match login:
            case OllamaKey():
                if server != self._origin:
                    raise self._bad(
                        f"names {server.shown} for tokens, which is not shown the key",
                        f"`quantmill logout {self._origin.shown}` does without the key",
                    )
                if login.exists():
                    url = signable(url)
                    headers["Authorization"] = self._signed = login.sign("GET", url)
            case IdentityToken() if trusted:
                form = _refresh_form(login, parameters)
                length = {"Content-Length": str(len(form))}
                return self._fetch(_without_fragment(realm), _FORM | length, form)
            case Login() if trusted:
                headers["Authorization"] = login.basic
        return self._fetch(url, headers, None)

    def _bad(self, what: str, hint: str | None = None) -> RegistryError:
        return RegistryError(f"{self._origin.shown} {what}", kind="bad_token_server", hint=hint)


def _token_url(realm: str, parameters: Mapping[str, str]) -> str:
    """Where a token is asked for, what it is to be good for among the query."""
    parts = urlsplit(realm)
    query = parse_qsl(parts.query, keep_blank_values=True)
    if "service" in parameters:
        query.append(("service", parameters["service"]))
    query += [("scope", scope) for scope in parameters.get("scope", "").split()]
    return urlunsplit((parts.scheme, parts.netloc, parts.path or "/", urlencode(query), ""))


def _without_fragment(url: str) -> str:
    return urlsplit(url)._replace(fragment="").geturl()


def _refresh_form(login: IdentityToken, parameters: Mapping[str, str]) -> bytes:
    """The request for a token as OAuth 2.0 has it: an identity token is one that is refreshed."""
    asked = {key: parameters[key] for key in ("service", "scope") if key in parameters}
    given = {"grant_type": "refresh_token", "client_id": _CLIENT, "refresh_token": login.token}
    return urlencode(given | asked).encode()


def refusal(host: str, status: int, told: str, what: str, tokens: Tokens) -> RegistryError:
    """The error that an answer means; `told` is the beginning of its body."""
    said = tokens.hide(_said(told))
    tail = f": {said}" if said else ""
    if tokens.by_key and status in {401, 403}:
        return _key_refused(host, status, f"{what}{tail}", tokens)
    if tokens.withheld and status in {401, 403}:
        return withheld(host, tokens.withheld, f" for {what}{tail}")
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


def withheld(host: str, server: str, tail: str = "") -> RegistryError:
    """A registry does not let the user in whose password its token server was not shown."""
    return RegistryError(
        f"{host} has its tokens given out by {server}, which was not shown the password{tail}",
        kind="unauthorized",
        hint=f"`quantmill login {host} --tokens-from {server}` where that server may see it",
    )


def _key_refused(host: str, status: int, what: str, tokens: Tokens) -> RegistryError:
    """A registry that goes by keys does not let the user in; `what` ends with what it says."""
    command = "quantmill login" if host == DEFAULT_HOST else f"quantmill login {host} --key"
    if not tokens.known:
        said, hint = "asks for Ollama's key", f"`{command}` makes one and says where to add it"
    elif status == 401:
        said, hint = "does not accept the key", f"add it to the account: `{command}` shows it"
    else:
        said = "does not let the key's owner in"
        hint = f"push below a name of your own; `{command}` shows the key to add to its account"
    kind = "unauthorized" if status == 401 else "forbidden"
    return RegistryError(f"{host} {said} for {what}", kind=kind, hint=hint)


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
