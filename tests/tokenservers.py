"""A server that gives out tokens for docker-registry, as the distribution's token scheme says."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID

from quantmill.credentials import Login
from registries import Handler, Misbehaving, misbehaving

SERVICE, ISSUER = "registry.test", "tokens.test"
SECONDS = 60


@dataclass
class TokenServer:
    """Who asked for what; anybody may pull, and push with the login."""

    login: Login
    key: rsa.RSAPrivateKey = field(
        default_factory=lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048)
    )
    seconds: int = SECONDS
    asked: list[tuple[str | None, list[str]]] = field(default_factory=list)
    host: str = ""

    @cached_property
    def certificate(self) -> bytes:
        """The key's certificate, signed by itself: one, since each making differs in its time."""
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, ISSUER)])
        now = datetime.now(UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self.key.public_key())
            .serial_number(1)
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self.key, hashes.SHA256())
        )
        return made.public_bytes(serialization.Encoding.DER)

    def answer(self, request: Handler) -> None:
        query = parse_qs(urlsplit(request.path).query)
        given, scopes = request.headers.get("Authorization"), query.get("scope", [])
        self.asked.append((given, scopes))
        if given is not None and given != self.login.basic:
            request.reply(401, b'{"message": "wrong password"}')
            return
        access = []
        for scope in scopes:
            kind, name, actions = scope.split(":")
            allowed = [a for a in actions.split(",") if a == "pull" or given is not None]
            access.append({"type": kind, "name": name, "actions": allowed})
        request.reply(200, json.dumps({"token": self.token(access)}).encode())

    def token(self, access: list[dict[str, Any]]) -> str:
        now = int(time.time())
        head = {"typ": "JWT", "alg": "RS256",
                "x5c": [base64.b64encode(self.certificate).decode()]}  # fmt: skip
        body = {"iss": ISSUER, "sub": self.login.username, "aud": SERVICE, "iat": now,
                "nbf": now - 5, "exp": now + self.seconds, "jti": str(len(self.asked)),
                "access": access}  # fmt: skip
        text = f"{_encoded(head)}.{_encoded(body)}"
        signature = self.key.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256())
        return f"{text}.{_base64(signature)}"

    def config(self, folder: Path) -> str:
        """What docker-registry's configuration says of it; its certificate goes into a folder."""
        bundle = folder / "tokens.pem"
        bundle.write_bytes(
            x509.load_der_x509_certificate(self.certificate).public_bytes(
                serialization.Encoding.PEM
            )
        )
        return (
            f"auth: {{token: {{realm: 'http://{self.host}/token', service: {SERVICE}, "
            f"issuer: {ISSUER}, rootcertbundle: {bundle}}}}}\n"
        )


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _encoded(value: dict[str, Any]) -> str:
    return _base64(json.dumps(value).encode())


@contextmanager
def token_server(login: Login) -> Iterator[TokenServer]:
    """A token server that runs inside this block."""
    found = TokenServer(login)
    server: Misbehaving
    with misbehaving(found.answer) as server:
        found.host = server.host
        yield found
