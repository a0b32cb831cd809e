"""A small coverage-guided fuzzer: `python tests/fuzz.py SECONDS [TARGET ...]`.

Inputs that reach new lines are kept and changed further. Whatever the bytes, a parser gives a value
or an error raised on purpose, soon. Seeds lie in tests/data/corpus, a folder for each target; what
reached further is kept beside them, a line for each input, and a later run begins with it. What
makes a parser fail is written into the folder of that target, to become a test.
"""

from __future__ import annotations

import hashlib
import random
import socket
import sys
import tempfile
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import httpx2

import quantmill
from checkpoints import SMALL, write_checkpoint
from quantmill import ggufheader, imatrix, registry, tensorfile
from quantmill.addresses import is_public, origin_of, redirect_target, registry_origin
from quantmill.challenges import parse_challenges
from quantmill.creation import plan
from quantmill.digests import digest_of, parse_digest
from quantmill.errors import QuantmillError
from quantmill.manifest import parse_manifest
from quantmill.modelfile import decode_modelfile, parse_modelfile
from quantmill.names import name_from_path, parse_name
from quantmill.partials import Partial
from quantmill.patience import Patience, Temporary
from quantmill.pulling import described_refs
from quantmill.source import Source, SourceTensor
from quantmill.spans import Span, parse_content_range, parse_uploaded
from quantmill.store import Store
from quantmill.strictjson import BadJson, parse

CORPUS = Path(__file__).parent / "data" / "corpus"
SOURCE = str(Path(quantmill.__file__).parent)
SLOW_SECONDS = 5.0
LONGEST = 1 << 16
KEPT = Path(__file__).parent / "data" / "corpus-kept"
LONGEST_KEPT = 2048

WORDS = [
    b"{}", b"[]", b"null", b'"', b":", b",", b"../", b"/", b"\0", b"\xff", b"-1", b"1e999", b"NaN",
    b"9" * 30, b"[" * 2000, b'{"a":' * 500, b"\xed\xa0\x80", b"sha256:", b"data_offsets", b"shape",
    b"dtype", b"BF16", b"F4", b"\x00\x00\x00\x00\x00\x00\x00\x80", b"\xff" * 8, b"weight_map",
    b"quantization_config", b"quant_method", b"bits", b"group_size", b"general.architecture",
]  # fmt: skip

HEADERS = [
    b"bytes ", b"-", b"/*", b"0-0", b"Bearer ", b"Basic ", b"realm=", b"service=", b"scope=", b"\\",
    b"HTTP/1.1 ", b"\r\n", b"\r\n\r\n", b"Location: ", b"Content-Length: ", b"Content-Range: ",
    b"Transfer-Encoding: chunked", b"WWW-Authenticate: ", b"Retry-After: ", b"Content-Encoding: ",
    b"Docker-Content-Digest: ", b"Fri, 31 Dec 9999 23:59:59 GMT", b"https://", b"http://[::1", b"@",
    b"//", b"206", b"302", b"401", b"503", b"%2e%2e", b"\xb2", b"xn--", b":99999", b"0\r\n\r\n",
]  # fmt: skip
"""Words of HTTP, for the targets that read it."""

MATCHED = Source(
    {"model_type": "qwen3_moe"},
    {
        name: SourceTensor(name, "BF16", shape)
        for name, shape in {
            "lm_head.weight": (4, 4),
            "model.layers.0.mlp.experts.0.up_proj.weight": (4, 2),
            "model.layers.0.mlp.experts.1.up_proj.weight": (4, 2),
            "model.layers.0.mlp.experts.gate_proj.weight": (2, 4, 2),
            "model.layers.0.self_attn.q_proj.weight": (4, 4),
        }.items()
    },
)
"""What importance matrices are matched with."""

Parser = Callable[[bytes], object]


def _tensor_file(data: bytes) -> object:
    length = tensorfile.header_length(data[: tensorfile.LENGTH_BYTES], len(data), "x")
    start = tensorfile.LENGTH_BYTES
    return tensorfile.parse_header(data[start : start + length], len(data), "x")


def _name(data: bytes) -> object:
    text = data.decode("utf-8", "surrogateescape")
    for parser in (parse_digest, name_from_path):
        try:
            parser(text)
        except QuantmillError:
            continue
    return parse_name(text)


def _in_checkpoint(file: str) -> Parser:
    folder = Path(tempfile.mkdtemp(prefix="quantmill-fuzz-"))
    write_checkpoint(folder, SMALL)

    def planned(data: bytes) -> object:
        (folder / file).write_bytes(data)
        return plan(folder, quantize="int4")

    return planned


def _gguf(data: bytes) -> object:
    def read(offset: int, count: int) -> bytes:
        return data[offset : offset + count]

    blocks = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18)}
    return ggufheader.parse_header(read, len(data), blocks, "x")


def _imatrix(data: bytes) -> object:
    def read(offset: int, count: int) -> bytes:
        assert 0 <= offset <= offset + count <= len(data)
        return data[offset : offset + count]

    found = imatrix.parse_imatrix(read, len(data), "x", digest_of(data))
    with suppress(QuantmillError):
        imatrix.moments_for(found, MATCHED)
    return found


def _header(data: bytes) -> object:
    """One header's value, as each parser of headers reads it."""
    text = data.decode("latin-1")
    found, after = parse_content_range(text), registry.seconds_until(text)
    assert found is None or 0 <= found[0].start < found[0].end <= (found[1] or found[0].end)
    assert after is None or after >= 0
    for challenge in parse_challenges(text.split("\n")):
        assert challenge.scheme == challenge.scheme.lower()
    return parse_uploaded(text), is_public(text), origin_of(text)


def _location(data: bytes) -> object:
    """What an HTTPS address may lead to is another one, which the client can ask for."""
    target = redirect_target("https://r.test/v2/a/m/blobs/x", data.decode("latin-1"))
    found = origin_of(target)
    assert found is not None
    assert found.scheme == "https"
    with suppress(httpx2.InvalidURL, UnicodeError):  # as they are met in a request
        asked = httpx2.URL(target)
        host = asked.raw_host.decode().strip("[]").lower()
        assert (host, asked.port or 443) == (found.host, found.port)
    return target


class _Here(registry.Registry):
    """A registry that is asked on this machine only, wherever its answers lead."""

    def _request(self, method: str, url: str, *rest: Any, **named: Any) -> Any:
        if origin_of(url) != self.origin:
            raise self.error("leads elsewhere")
        return super()._request(method, url, *rest, **named)


def _answer() -> Parser:
    """Whole answers of a registry: to the question for a manifest, and for a part of a blob."""
    server, answer = socket.create_server(("127.0.0.1", 0)), [b""]

    def serve() -> None:
        while True:
            connection, _ = server.accept()
            with connection, suppress(OSError):
                connection.recv(1 << 16)
                connection.sendall(answer[0])

    threading.Thread(target=serve, daemon=True).start()
    name = parse_name(f"127.0.0.1:{server.getsockname()[1]}/a/m")
    once = Patience(tries=1, stall=1, connect=1)
    asked = _Here(registry_origin(name), "a/m", patience=once)
    asked.__enter__()  # for as long as the process lives
    digest, part = digest_of(b"?"), Span(2, 9)

    def read(data: bytes) -> object:
        answer[0] = data
        with suppress(Temporary, QuantmillError), asked.blob(digest, 10, part) as body:
            assert sum(map(len, body.pieces)) <= 10
        return described_refs(asked.manifest("t"), name, "host")

    return read


def _spans() -> Parser:
    """The list of what is there of a blob half fetched."""
    store = Store(tempfile.mkdtemp(prefix="quantmill-fuzz-"))
    store.partials.mkdir(parents=True)
    place = store.partials / digest_of(b"?").file_name
    place.write_bytes(bytes(1000))

    def read(data: bytes) -> object:
        place.with_name(f"{place.name}.spans").write_bytes(data)
        partial = Partial(store, digest_of(b"?"), 1000)
        partial.close()
        assert 0 <= partial.there <= 1000
        return partial.have

    return read


TARGETS: dict[str, Callable[[], Parser]] = {
    "tensorfile": lambda: _tensor_file,
    "manifest": lambda: lambda data: parse_manifest(data, "m"),
    "name": lambda: _name,
    "json": lambda: parse,
    "modelfile": lambda: lambda data: parse_modelfile(decode_modelfile(data)),
    "config": lambda: _in_checkpoint("config.json"),
    "index": lambda: _in_checkpoint("model.safetensors.index.json"),
    "gguf": lambda: _gguf,
    "imatrix": lambda: _imatrix,
    "header": lambda: _header,
    "location": lambda: _location,
    "answer": _answer,
    "spans": _spans,
}


@dataclass
class Found:
    """What a run of one target came to."""

    runs: int = 0
    lines: int = 0
    kept: list[bytes] = field(default_factory=list)
    failure: tuple[bytes, str] | None = None


def lines_of(parser: Parser, data: bytes) -> set[tuple[str, int]]:
    """The lines of the library that reading some bytes goes through."""
    seen: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        del argument
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        if event == "line":
            seen.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        parser(data)
    except (QuantmillError, BadJson):
        pass
    finally:
        sys.settrace(before)
    return seen


def changed(data: bytes, chance: random.Random, corpus: list[bytes], words: list[bytes]) -> bytes:
    """A few changes: bits, words, numbers, pieces doubled, cut out or taken from another input."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(found) + 1)
        end = min(len(found), at + chance.randint(1, 16))
        match chance.randrange(6):
            case 0 if at < len(found):
                found[at] ^= 1 << chance.randrange(8)
            case 1:
                found[at:at] = chance.choice(words)
            case 2:
                found[at:end] = chance.choice(words)
            case 3:
                del found[at:end]
            case 4:
                found[at:at] = found[at:end] * chance.randint(1, 3)
            case _:
                other = chance.choice(corpus)
                start = chance.randrange(len(other) + 1)
                found[at:end] = other[start : start + chance.randint(1, 64)]
    return bytes(found[:LONGEST])


def seeds(target: str) -> list[bytes]:
    """The inputs a target begins with."""
    return [path.read_bytes() for path in sorted((CORPUS / target).glob("*"))] or [b"", b"{}"]


def kept(target: str) -> list[bytes]:
    """Inputs of earlier runs that reached further than the seeds."""
    path = KEPT / f"{target}.txt"
    return [b64decode(line) for line in path.read_text().split()] if path.exists() else []


def keep(target: str, inputs: list[bytes]) -> None:
    """Have a later run begin with these inputs, as far as they are short."""
    known = set(seeds(target))
    lines = [b64encode(i).decode() for i in inputs if i not in known and len(i) <= LONGEST_KEPT]
    if not lines:
        return
    KEPT.mkdir(exist_ok=True)
    (KEPT / f"{target}.txt").write_text("".join(f"{line}\n" for line in sorted(lines)))


def fuzz(target: str, seconds: float, seed: int = 1) -> Found:
    """Feed one parser for so long; stops at the first failure."""
    parser, chance, found = TARGETS[target](), random.Random(seed), Found()
    known: set[tuple[str, int]] = set()
    corpus, waiting = seeds(target), kept(target) + seeds(target)
    words = WORDS + HEADERS if target in {"header", "location", "answer"} else WORDS
    end = time.monotonic() + seconds
    while waiting or time.monotonic() < end:
        data = waiting.pop() if waiting else changed(chance.choice(corpus), chance, corpus, words)
        started = time.monotonic()
        try:
            lines = lines_of(parser, data)
        except Exception as error:
            found.failure = data, f"{type(error).__name__}: {error}"
            break
        if time.monotonic() - started > SLOW_SECONDS:
            found.failure = data, f"took {time.monotonic() - started:.0f} seconds"
            break
        found.runs += 1
        if not lines <= known:
            known |= lines
            corpus.append(data)
            found.kept.append(data)
    found.lines = len(known)
    return found


def main() -> int:
    """Fuzz the targets one after the other, each for its share of the time."""
    seconds, names = float(sys.argv[1]), sys.argv[2:] or list(TARGETS)
    failed = 0
    for name in names:
        found = fuzz(name, seconds / len(names), int(time.time()))
        print(f"{name}: {found.runs} inputs, {found.lines} lines, {len(found.kept)} kept")
        keep(name, found.kept)
        if found.failure:
            data, what = found.failure
            path = CORPUS / name / f"failure-{hashlib.sha256(data).hexdigest()[:12]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            print(f"{name}: {what}: {path}")
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
