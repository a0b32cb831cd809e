"""Where a registry is reached, and where its answers may lead.

HTTPS, unless the host is this machine or the user says so. A redirect never leads from HTTPS to
HTTP, nor from a public host into a private network.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from quantmill.errors import BadName, BadRequest, RegistryError
from quantmill.names import ModelName

_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[0-9a-z_][0-9a-z._-]*|[0-9a-f:.]*:[0-9a-f:.]*")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""IPv4 addresses as networks without IPv4 write them (RFC 6052)."""

_TOKEN_HOSTS = {("registry-1.docker.io", "auth.docker.io")}
"""Registries whose tokens come from another host of the same owner: it may have the password."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Scheme, host and port: what credentials belong to."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        """As it stands at the start of a URL."""
        return f"{self.scheme}://{self.shown}"

    @property
    def shown(self) -> str:
        """The host, with its port unless that is the usual one."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


def origin_of(url: str) -> Origin | None:
    """The origin of an HTTP URL; None for other URLs, and for those that carry a password.

    Hosts are of plain letters and digits: of others the system and the HTTP client may make two
    different ones, and what was checked would not be what is asked.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in _PORTS or not parts.hostname or "@" in parts.netloc:
        return None
    if not _HOST.fullmatch(parts.hostname):
        return None
    return Origin(parts.scheme, parts.hostname.lower(), port or _PORTS[parts.scheme])


def registry_origin(name: ModelName, *, insecure: bool = False) -> Origin:
    """Where the registry of a name is; raises BadName, or BadRequest for HTTP across a network."""
    host = name.resolved.host or ""
    scheme = name.scheme or ("http" if insecure or is_loopback(host.rpartition(":")[0] or host)
                             else "https")  # fmt: skip
    found = origin_of(f"{scheme}://{host}") if scheme in _PORTS else None
    if found is None:
        raise BadName(
            f"{scheme}://{host} is no address of a registry",
            hint="write http:// or https://, a host, and a port after a colon if it needs one",
        )
    if found.scheme == "http" and not insecure and not is_loopback(found.host):
        raise BadRequest(
            f"{found.host} would be reached without encryption",
            kind="insecure_registry",
            hint="--insecure allows plain HTTP",
        )
    return found


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its name alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, and any IPv4 address inside it too."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        elif found in _NAT64:
            found = ipaddress.IPv4Address(found.packed[-4:])
        elif found.sixtofour is not None or found.teredo is not None:
            return False  # ways around a router that nothing public needs
    return found.is_global and not found.is_multicast


def redirect_target(url: str, location: str | None) -> str:
    """The URL that an answer to `url` leads to; raises RegistryError for one not to be followed."""
    origin = origin_of(url)
    try:
        target = urljoin(url, location) if location else ""
    except ValueError:
        target = ""
    found = origin_of(target)
    host = origin.shown if origin else "the registry"
    if found is None or origin is None or not target.isprintable() or " " in target:
        raise RegistryError(
            f"{host} answers with an address that makes no sense", kind="bad_redirect"
        )
    if origin.scheme == "https" and found.scheme == "http":
        raise RegistryError(
            f"{host} leads to {found.host} without encryption: refused", kind="bad_redirect"
        )
    return target


def may_have_password(registry: Origin, token_server: Origin, allowed: str | None = None) -> bool:
    """Whether a login at the registry may be shown to the server that gives out its tokens.

    `allowed` is a server that the user named for it: over HTTPS, or on this machine.
    """
    if registry == token_server:
        return True
    safe = token_server.scheme == "https" or is_loopback(token_server.host)
    if safe and allowed is not None and token_server.shown == allowed.lower():
        return True
    return (
        token_server.scheme == "https"
        and token_server.port == _PORTS["https"]
        and (registry.host, token_server.host) in _TOKEN_HOSTS
    )
