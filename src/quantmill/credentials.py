"""Logins of registries: the keyring or a file of our own, else those that Docker's config holds.

A login is kept in the system's keyring where the package keyring is installed and has one, and
otherwise in a file that only its owner may read. In the same place stands which hosts, other than
Ollama's own, are shown signatures of Ollama's key. Docker's config and its credential helpers are
read, never written.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import subprocess
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantmill import strictjson
from quantmill.errors import RegistryError
from quantmill.names import DEFAULT_HOST
from quantmill.ollamakey import OllamaKey, key_file

_SERVICE = "quantmill"
_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_HELPER_SECONDS = 30
_LARGEST = 1 << 20
_DOCKER_HUB = "index.docker.io"
_DOCKER_HUB_HOSTS = frozenset({"docker.io", "registry-1.docker.io", _DOCKER_HUB})


@dataclass(frozen=True, slots=True)
class Login:
    """A user and a password or access token; the latter stays out of every printed form.

    `token_server` is a host, with its port unless that is the usual one, that the user lets see
    the password besides the registry, since it gives out the registry's tokens.
    """

    username: str
    password: str = field(repr=False)
    token_server: str | None = None

    @property
    def basic(self) -> str:
        """Value of an Authorization header."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


@dataclass(frozen=True, slots=True)
class IdentityToken:
    """What Docker keeps in place of a password where a token server gave it one: good for tokens.

    It stays out of every printed form.
    """

    token: str = field(repr=False)


Kept = Login | OllamaKey
"""What is kept for a host: its login, or that it is shown signatures of Ollama's key."""

Credential = Kept | IdentityToken


def find_login(host: str) -> Credential | None:
    """What there is for a host, written as in a model's name; None where there is nothing.

    Ollama's own host gets signatures of its key where no login was kept for it. Raises
    RegistryError for files that cannot be read, or that others may read.
    """
    host = host.lower()
    found = _from_keyring(host) or _own_logins().get(host) or _from_docker(host)
    return found or (OllamaKey(key_file()) if host == DEFAULT_HOST else None)


def save_login(host: str, login: Kept) -> str:
    """Keep a login, or the use of the key; returns where: `keyring`, or the path of the file.

    Raises RegistryError where the file cannot be written.
    """
    host, ring = host.lower(), _keyring()
    if ring is not None:
        try:
            ring.set_password(_SERVICE, host, json.dumps(_document_of(login)))
        except Exception as error:  # each backend has errors of its own; none may quote the secret
            warnings.warn(f"the keyring refuses ({type(error).__name__})", stacklevel=2)
        else:
            _write_own({k: v for k, v in _own_logins().items() if k != host})
            return "keyring"
    _write_own(_own_logins() | {host: login})
    return str(own_file())


def remove_login(host: str) -> bool:
    """Forget a login of ours; whether there was one. Docker's stay."""
    host, ring, found = host.lower(), _keyring(), False
    if ring is not None and _from_keyring(host) is not None:
        with suppress(Exception):
            ring.delete_password(_SERVICE, host)
            found = True
    own = _own_logins()
    if host in own:
        _write_own({k: v for k, v in own.items() if k != host})
        found = True
    return found


# -- ours ------------------------------------------------------------------------------------------


def own_file() -> Path:
    """Where logins are kept without a keyring."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "quantmill" / "logins.json"


def _keyring() -> Any:
    """The keyring package where it has a keyring to offer, else None."""
    try:
        import keyring

        return keyring if keyring.get_keyring().priority > 0 else None
    except Exception:  # not installed, or its backend fails to load
        return None


def _from_keyring(host: str) -> Kept | None:
    ring = _keyring()
    if ring is None:
        return None
    try:
        kept = json.loads(ring.get_password(_SERVICE, host) or "null")
    except Exception:  # locked, or no longer there
        return None
    if isinstance(kept, list) and len(kept) == 2:  # as it was written first
        return _login(*kept)
    return _kept(kept) if isinstance(kept, dict) else None


def _document_of(kept: Kept) -> dict[str, Any]:
    if isinstance(kept, OllamaKey):
        return {"ollama_key": True}
    server = {"token_server": kept.token_server} if kept.token_server else {}
    return {"username": kept.username, "password": kept.password} | server


def _kept(document: Mapping[str, Any]) -> Kept | None:
    if document.get("ollama_key") is True:
        return OllamaKey(key_file())
    login, server = _login(document.get("username"), document.get("password")), None
    if isinstance(document.get("token_server"), str):
        server = document["token_server"]
    return replace(login, token_server=server) if login else None


def _login(username: Any, password: Any) -> Login | None:
    if isinstance(username, str) and isinstance(password, str) and username and password:
        return Login(username, password)
    return None


def _own_logins() -> dict[str, Kept]:
    path = own_file()
    try:
        if path.stat().st_mode & 0o077:
            raise RegistryError(
                f"{path} holds passwords and others may read it",
                kind="credentials_exposed",
                hint=f"chmod 600 {path}",
            )
        kept = _document(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    found = {host: _kept(value) for host, value in kept.items() if isinstance(value, dict)}
    return {host: login for host, login in found.items() if login}


def _write_own(logins: Mapping[str, Kept]) -> None:
    path = own_file()
    if not logins and not path.exists():
        return
    document = {host: _document_of(kept) for host, kept in logins.items()}
    temporary = path.with_name(f".{path.name}-{os.urandom(8).hex()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RegistryError(f"{path}: {error.strerror}", kind="io") from None


def _document(path: Path) -> dict[str, Any]:
    """A JSON object in a small file; an error names the file and never what it holds."""
    try:
        with path.open("rb") as file:
            return strictjson.parse_object(file.read(_LARGEST))
    except strictjson.BadJson as error:
        raise RegistryError(f"{path}: {error}", kind="bad_credentials_file") from None
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise RegistryError(f"{path}: {error.strerror}", kind="io") from None


# -- Docker's --------------------------------------------------------------------------------------


def docker_file() -> Path:
    """Docker's config: in DOCKER_CONFIG, else `.docker` in the user's home."""
    folder = os.environ.get("DOCKER_CONFIG")
    return (Path(folder) if folder else Path.home() / ".docker") / "config.json"


def _from_docker(host: str) -> Login | IdentityToken | None:
    try:
        config = _document(docker_file())
    except (FileNotFoundError, NotADirectoryError):
        return None
    key = f"https://{_DOCKER_HUB}/v1/" if host in _DOCKER_HUB_HOSTS else host
    helpers = config.get("credHelpers")
    helper = helpers.get(host) if isinstance(helpers, dict) else None
    helper = helper or config.get("credsStore")
    asked = _from_helper(helper, key) if isinstance(helper, str) and helper else None
    return asked or _from_auths(config.get("auths"), host)


def _from_auths(auths: Any, host: str) -> Login | IdentityToken | None:
    for key, entry in auths.items() if isinstance(auths, dict) else ():
        written = key.partition("://")[2] or key
        same = {written.partition("/")[0].lower(), host}
        if (len(same) == 1 or same <= _DOCKER_HUB_HOSTS) and isinstance(entry, dict):
            login = _from_entry(entry)
            if login:
                return login
    return None


def _from_entry(entry: Mapping[str, Any]) -> Login | IdentityToken | None:
    if entry.get("identitytoken"):  # it takes the place of the password beside it
        return _identity(entry["identitytoken"])
    auth = entry.get("auth")
    if not isinstance(auth, str) or not auth:
        return _login(entry.get("username"), entry.get("password"))
    try:
        username, _, password = base64.b64decode(auth, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return None
    return _login(username, password.rstrip("\0"))


def _identity(token: Any) -> IdentityToken | None:
    return IdentityToken(token) if isinstance(token, str) and token else None


def _from_helper(helper: str, key: str) -> Login | IdentityToken | None:
    if not _HELPER.fullmatch(helper):
        return None
    program = f"docker-credential-{helper}"
    try:
        done = subprocess.run(
            [program, "get"], input=key.encode(), capture_output=True, check=False,
            timeout=_HELPER_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        warnings.warn(f"{program}, which Docker's config names, cannot be run", stacklevel=2)
        return None
    if done.returncode:
        return None
    try:
        answer = strictjson.parse_object(done.stdout[:_LARGEST])
    except strictjson.BadJson:
        return None
    if answer.get("Username") == "<token>":
        return _identity(answer.get("Secret"))
    return _login(answer.get("Username"), answer.get("Secret"))
