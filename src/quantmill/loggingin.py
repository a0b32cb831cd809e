"""Log in to a registry: try the password there, then keep it; log out: forget it.

Where Ollama's key stands for a login, there is nothing to try before the key belongs to an account:
the key is made where there is none, and shown.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantmill.addresses import registry_origin
from quantmill.credentials import Login, remove_login, save_login
from quantmill.errors import BadName, BadRequest
from quantmill.names import DEFAULT_HOST, ModelName, is_valid_part
from quantmill.ollamakey import OllamaKey, key_file, make_key
from quantmill.patience import Patience
from quantmill.registry import Registry


@dataclass(frozen=True, slots=True)
class LoggedIn:
    """Where one is logged in, and where the login is kept."""

    host: str
    kept_in: str


@dataclass(frozen=True, slots=True)
class KeyShown:
    """The key a registry is shown, whether it is new, and where that is kept (None: by default)."""

    host: str
    key_file: str
    public_key: str
    made: bool
    kept_in: str | None


def takes_key_alone(host: str | None) -> bool:
    """Whether a host is Ollama's own, which knows no passwords; raises BadName."""
    return (_registry(host).resolved.host or "").lower() == DEFAULT_HOST


def login_with_key(host: str | None = None) -> KeyShown:
    """Have a registry shown what Ollama's key signs, and make the key where there is none.

    Raises BadName, BadRequest without the package that makes keys, and RegistryError for a key that
    cannot be used or files that cannot be written. The registry itself is not asked.
    """
    shown = (_registry(host).resolved.host or "").lower()
    key = OllamaKey(key_file())
    made = make_key(key.path)
    line = key.public_line()
    if shown == DEFAULT_HOST:
        remove_login(shown)  # a password would come before the key
        kept_in = None
    else:
        kept_in = save_login(shown, key)
    return KeyShown(shown, str(key.path), line, made, kept_in)


def login(
    host: str | None,
    login: Login,
    *,
    insecure: bool = False,
    patience: Patience | None = None,
) -> LoggedIn:
    """Keep a login that the registry accepts; raises RegistryError where it does not.

    BadRequest is for a login that can be none, BadName for a host that is none.
    """
    name = _registry(host)
    if not login.username or not login.password:
        raise BadRequest("a login needs a user and a password")
    if ":" in login.username or not (login.username + login.password).isprintable():
        raise BadRequest("a user has no colon, and neither part control characters")
    if login.token_server is not None:
        _registry(login.token_server)
    origin = registry_origin(name, insecure=insecure)
    with Registry(origin, "", login=lambda: login, patience=patience) as registry:
        registry.patiently(registry.check_login)
    shown = name.resolved.host or ""
    return LoggedIn(shown, save_login(shown, login))


def logout(host: str | None) -> tuple[str, bool]:
    """Forget a login; returns the host and whether there was one."""
    shown = _registry(host).resolved.host or ""
    return shown, remove_login(shown)


def _registry(host: str | None) -> ModelName:
    """A name at the host, which may be written as an address."""
    scheme, found, address = (host or DEFAULT_HOST).rstrip("/").rpartition("://")
    if not is_valid_part("host", address):
        raise BadName(
            f"{host!r} is no address of a registry",
            hint="write a host, and a port after a colon if it needs one",
        )
    return ModelName("model", host=address, scheme=scheme if found else None)
