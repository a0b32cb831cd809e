"""Ollama's key: an Ed25519 key of OpenSSH in the user's home, whose signature stands for a login.

Ollama makes `~/.ollama/id_ed25519` when its server starts first; where there is none, `make_key`
makes the same. The key is read when a registry has asked for a token, and never leaves this module:
what goes out is the public key and a signature of the address that a token is asked from.
"""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from quantmill.errors import BadRequest, RegistryError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_LONGEST = 1 << 16
_NONCE_BYTES = 16
_EMPTY_BODY = base64.b64encode(hashlib.sha256(b"").hexdigest().encode()).decode()


@dataclass(frozen=True, slots=True)
class OllamaKey:
    """The key that lies in a file, where one lies there."""

    path: Path

    def exists(self) -> bool:
        """Whether there is something under the path of the file."""
        return os.path.lexists(self.path)

    def public_line(self) -> str:
        """The public key as a line of OpenSSH; raises BadRequest, RegistryError as `sign` does."""
        return _public_line(_loaded(self.path))

    def sign(self, method: str, url: str) -> str:
        """Value of an Authorization header that stands for a request without a body.

        Raises BadRequest without the package that can sign, RegistryError for a key that is
        protected, of another type, broken, or readable by others.
        """
        key = _loaded(self.path)
        signature = key.sign(f"{method},{url},{_EMPTY_BODY}".encode())
        return f"{_public_line(key).split()[1]}:{base64.b64encode(signature).decode()}"


def key_file() -> Path:
    """Where Ollama keeps the user's key."""
    return Path.home() / ".ollama" / "id_ed25519"


def signable(url: str) -> str:
    """The address with the time and a number used once, which make its signature good for once.

    Parameters are sorted and encoded as Ollama does it: the registry may write them down again.
    """
    parts = urlsplit(url)
    query = parse_qsl(parts.query, keep_blank_values=True)
    nonce = base64.urlsafe_b64encode(secrets.token_bytes(_NONCE_BYTES)).decode().rstrip("=")
    query += [("ts", str(int(time.time()))), ("nonce", nonce)]
    encoded = urlencode(sorted(query, key=lambda pair: pair[0]))
    return urlunsplit((parts.scheme, parts.netloc, parts.path, encoded, ""))


def make_key(path: Path) -> bool:
    """Make a key in a file for its owner alone, and the public key beside it; whether it was made.

    A file that is there stays as it is. Raises BadRequest without the package that makes keys,
    RegistryError where the files cannot be written.
    """
    if os.path.lexists(path):
        return False
    _require_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = path.with_name(f"{path.name}.pub")
    if os.path.lexists(public):
        raise RegistryError(
            f"{public} is there and the key {path.name} it belongs to is not",
            kind="bad_key",
            hint=f"bring {path} back, or move {public} away and run the same command again",
        )
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _write_new(path, private, 0o600):
            return False  # another process made one meanwhile
        _write_new(public, f"{_public_line(key)}\n".encode(), 0o644)
    except OSError as error:
        raise RegistryError(f"{path}: {error.strerror}", kind="io") from None
    return True


def _write_new(path: Path, data: bytes, mode: int) -> bool:
    """A file that appears whole, and never in place of another; whether it did."""
    temporary = path.with_name(f".{path.name}-{os.urandom(8).hex()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        with suppress(OSError):
            temporary.unlink()
    return True


def _require_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise BadRequest(
            "Ollama's key needs the package cryptography",
            kind="missing_extra",
            hint="pip install 'quantmill[ollama]'",
        ) from None


def _loaded(path: Path) -> Ed25519PrivateKey:
    """The key of a file; no error says more of it than the path."""
    _require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    data = _read(path)
    try:
        key = load_ssh_private_key(data, None)
    except TypeError:
        raise _bad(path, "is protected by a passphrase, which Ollama's key cannot be") from None
    except (ValueError, UnsupportedAlgorithm):
        raise _bad(path, "is no private key of OpenSSH that can be read") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise _bad(path, "is a key of another type than Ed25519")
    return key


def _read(path: Path) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait
        with os.fdopen(fd, "rb") as file:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise _bad(path, "is not a regular file")
            # OpenSSH's rule: only the owner's own files are judged
            if found.st_uid == os.getuid() and found.st_mode & 0o077:
                raise RegistryError(
                    f"{path} is a private key and others may read it",
                    kind="credentials_exposed",
                    hint=f"chmod 600 {path}",
                )
            return file.read(_LONGEST)
    except OSError as error:
        raise RegistryError(f"{path}: {error.strerror}", kind="io") from None


def _bad(path: Path, what: str) -> RegistryError:
    return RegistryError(
        f"{path} {what}",
        kind="bad_key",
        hint="move it away and `quantmill login` makes another; add that one to the account",
    )


def _public_line(key: Ed25519PrivateKey) -> str:
    from cryptography.hazmat.primitives import serialization

    return (
        key.public_key()
        .public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        .decode()
    )
