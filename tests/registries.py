"""Registries on this machine: Debian's docker-registry, and one that misbehaves on request."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from quantmill import mediatypes
from quantmill.digests import Digest, digest_of
from quantmill.manifest import BlobRef, manifest_bytes

# bcrypt of the password below, which is all that docker-registry understands
PASSWORD = "correct horse"
_HTPASSWD = "alice:$2b$05$PBCD41BfhEkuG1mlUU9kJOQWtlGWzp7beX15VIfK99DErWmL.LfNO\n"


def require_real_registry() -> str:
    """The program docker-registry; skips, in CI fails, without it."""
    found = shutil.which("docker-registry")
    if found is None:
        assert not os.environ.get("CI"), "docker-registry must be installed in CI"
        pytest.skip("docker-registry is not installed (Debian package docker-registry)")
    return found


class RealRegistry:
    """A docker-registry process on a loopback port of its own, with its files in `folder`."""

    def __init__(self, folder: Path, *, login: bool = False, access: str = "") -> None:
        self._program = require_real_registry()
        self._folder, self._log = folder, folder / "registry.log"
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        (folder / "htpasswd").write_text(_HTPASSWD)
        by_password = f"auth: {{htpasswd: {{realm: test, path: {folder / 'htpasswd'}}}}}\n"
        (folder / "config.yml").write_text(
            "version: 0.1\nlog: {level: info, accesslog: {disabled: false}}\n"
            f"storage: {{filesystem: {{rootdirectory: {folder / 'data'}}}}}\n"
            f"http: {{addr: '127.0.0.1:{self.port}', secret: of-the-tests}}\n"
            + (by_password if login else access)
        )
        self._child: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                [self._program, "serve", self._folder / "config.yml"], stdout=log, stderr=log
            )
        for _ in range(200):
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.05)
        raise AssertionError(self._log.read_text())

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None

    def requests(self, start: str) -> int:
        """How many requests began so, by the registry's access log."""
        return self._log.read_text().count(f'"{start}')

    def sent_bytes(self, path: str) -> int:
        """Bytes of the answers to GETs with this in their path, by the registry's log."""
        answers = re.findall(r'"GET (\S+) HTTP/1.1" \d+ (\d+) ', self._log.read_text())
        return sum(int(count) for asked, count in answers if path in asked)

    def blob_file(self, digest: Digest) -> Path:
        blobs = self._folder / "data" / "docker" / "registry" / "v2" / "blobs" / "sha256"
        return blobs / digest.hex[:2] / digest.hex / "data"


@contextmanager
def real_registry(folder: Path, *, login: bool = False, access: str = "") -> Iterator[RealRegistry]:
    """A docker-registry that runs inside this block; `access` is what its config says of that."""
    found = RealRegistry(folder, login=login, access=access)
    try:
        yield found
    finally:
        found.kill()


Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """One request to a misbehaving registry."""

    protocol_version = "HTTP/1.1"
    server: Misbehaving

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        self.server.seen.append((self.path, dict(self.headers.items())))
        self.server.answer(self)

    do_HEAD = do_POST = do_PUT = do_PATCH = do_GET  # noqa: N815

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        """A complete answer; underscores in header names stand for dashes."""
        self.send_response(status)
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        for key, value in ({"Content-Length": str(len(body))} | named).items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def asked(self, size: int) -> tuple[int, int] | None:
        """The range that the request asks for, None for everything."""
        text = self.headers.get("Range")
        if text is None:
            return None
        start, last = text.removeprefix("bytes=").split("-")
        return int(start), min(int(last) + 1, size)


class Misbehaving(ThreadingHTTPServer):
    """A registry on a loopback port whose every answer is written by the test."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.ended = answer, threading.Event()
        self.seen: list[tuple[str, dict[str, str]]] = []

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is expected."""


@contextmanager
def misbehaving(answer: Answer) -> Iterator[Misbehaving]:
    """A registry that answers so, inside this block."""
    server = Misbehaving(answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


def model_of(*contents: bytes) -> tuple[bytes, dict[str, bytes]]:
    """A manifest of these blobs, the first its config, and the blobs by digest."""
    refs = [BlobRef(mediatypes.LICENSE, digest_of(data), len(data)) for data in contents]
    blobs = {str(digest_of(data)): data for data in contents}
    return manifest_bytes(refs[0], refs[1:]), blobs


def serve_model(manifest: bytes, blobs: dict[str, bytes], blob: Answer | None = None) -> Answer:
    """An answer that serves a model, its blobs by `blob` where that is given."""

    def answer(request: Handler) -> None:
        if "/manifests/" in request.path:
            request.reply(200, manifest)
        elif blob is not None:
            blob(request)
        else:
            serve_well(request, blobs[request.path.rpartition("/")[2]])

    return answer


def serve_well(request: Handler, data: bytes) -> None:
    """What a good registry answers."""
    asked = request.asked(len(data))
    if asked is None:
        request.reply(200, data)
    else:
        start, end = asked
        request.reply(206, data[start:end], Content_Range=f"bytes {start}-{end - 1}/{len(data)}")


def serve_memory(kept: dict[str, bytes] | None = None) -> Answer:
    """An answer of a registry that keeps what it is sent, by path, without any check."""
    kept = {} if kept is None else kept

    def answer(request: Handler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        path, _, query = request.path.partition("?")
        if request.command == "POST":
            request.reply(202, Location=f"{path}one")
        elif request.command == "PUT":
            digest = query.rpartition("digest=")[2].replace("%3A", ":")
            kept[path.replace("uploads/one", digest)] = body
            request.reply(201)
        elif path == "/v2/":
            asked = {} if "Authorization" in request.headers else {"WWW_Authenticate": "Basic"}
            request.reply(401 if asked else 200, b"{}", **asked)
        elif path not in kept:
            request.reply(404)
        else:
            request.reply(200, b"" if request.command == "HEAD" else kept[path])

    return answer
