"""A small coverage-guided fuzzer: `python tests/fuzz.py SECONDS [TARGET ...]`.

Inputs that reach new lines are kept and changed further. Whatever the bytes, a parser gives a value
or an error raised on purpose, soon. Seeds lie in tests/data/corpus; what makes a parser fail is
written into the folder of that target, to become a test.
"""

from __future__ import annotations

import hashlib
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import quantmill
from checkpoints import SMALL, write_checkpoint
from quantmill import ggufheader, tensorfile
from quantmill.creation import plan
from quantmill.digests import parse_digest
from quantmill.errors import QuantmillError
from quantmill.manifest import parse_manifest
from quantmill.modelfile import decode_modelfile, parse_modelfile
from quantmill.names import name_from_path, parse_name
from quantmill.strictjson import BadJson, parse

CORPUS = Path(__file__).parent / "data" / "corpus"
SOURCE = str(Path(quantmill.__file__).parent)
SLOW_SECONDS = 5.0
LONGEST = 1 << 16

WORDS = [
    b"{}", b"[]", b"null", b'"', b":", b",", b"../", b"/", b"\0", b"\xff", b"-1", b"1e999", b"NaN",
    b"9" * 30, b"[" * 2000, b'{"a":' * 500, b"\xed\xa0\x80", b"sha256:", b"data_offsets", b"shape",
    b"dtype", b"BF16", b"F4", b"\x00\x00\x00\x00\x00\x00\x00\x80", b"\xff" * 8, b"weight_map",
    b"quantization_config", b"quant_method", b"bits", b"group_size", b"general.architecture",
]  # fmt: skip

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


TARGETS: dict[str, Callable[[], Parser]] = {
    "tensorfile": lambda: _tensor_file,
    "manifest": lambda: lambda data: parse_manifest(data, "m"),
    "name": lambda: _name,
    "json": lambda: parse,
    "modelfile": lambda: lambda data: parse_modelfile(decode_modelfile(data)),
    "config": lambda: _in_checkpoint("config.json"),
    "index": lambda: _in_checkpoint("model.safetensors.index.json"),
    "gguf": lambda: _gguf,
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


def changed(data: bytes, chance: random.Random, corpus: list[bytes]) -> bytes:
    """A few changes: bits, words, numbers, pieces doubled, cut out or taken from another input."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(found) + 1)
        end = min(len(found), at + chance.randint(1, 16))
        match chance.randrange(6):
            case 0 if at < len(found):
                found[at] ^= 1 << chance.randrange(8)
            case 1:
                found[at:at] = chance.choice(WORDS)
            case 2:
                found[at:end] = chance.choice(WORDS)
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


def fuzz(target: str, seconds: float, seed: int = 1) -> Found:
    """Feed one parser for so long; stops at the first failure."""
    parser, chance, found = TARGETS[target](), random.Random(seed), Found()
    known: set[tuple[str, int]] = set()
    corpus, waiting = seeds(target), list(seeds(target))
    end = time.monotonic() + seconds
    while waiting or time.monotonic() < end:
        data = waiting.pop() if waiting else changed(chance.choice(corpus), chance, corpus)
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
