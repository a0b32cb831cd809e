"""Log in to a registry: try the password there, then keep it; log out: forget it."""

from __future__ import annotations

from dataclasses import dataclass

from quantmill.addresses import registry_origin
from quantmill.credentials import Login, remove_login, save_login
from quantmill.errors import BadName, BadRequest
from quantmill.names import DEFAULT_HOST, ModelName, is_valid_part
from quantmill.patience import Patience
from quantmill.registry import Registry


@dataclass(frozen=True, slots=True)
class LoggedIn:
    """Where one is logged in, and where the login is kept."""

    host: str
    kept_in: str


def login(
    host: str | None,
    login: Login,
    *,
    insecure: bool = False,
    patience: Patience | None = None,
) -> LoggedIn:
    """Keep a login that the registry accepts; raises RegistryError where it does not."""
    name = _registry(host)
    if not login.username or not login.password:
        raise BadRequest("a login needs a user and a password")
    if ":" in login.username or not (login.username + login.password).isprintable():
        raise BadRequest("a user has no colon, and neither part control characters")
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
