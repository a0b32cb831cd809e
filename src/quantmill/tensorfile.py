"""Tensor files (safetensors): header bytes to values and back, with nothing taken on trust.

Layout: 8 bytes little-endian header length, that many bytes of JSON, then the data. docs/formats.md
gives the rules and their reasons. No file is opened here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantmill import strictjson
from quantmill.errors import BadTensorFile
from quantmill.formats import DTYPE_BYTES

LENGTH_BYTES = 8
MAX_HEADER = 100_000_000
"""Header lengths from here on are refused, as MLX does."""

METADATA = "__metadata__"
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
# Ollama's extractor reads `__metadata__` as if it were a tensor; these two names would break it.
_RESERVED_METADATA = {"shape", "data_offsets"}
_MAX_BYTES = 2**63


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: `start` and `end` are byte offsets from the file's beginning."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class TensorFile:
    """What a file's header says, checked against the file's size."""

    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def header_length(prefix: bytes, file_size: int, file: str) -> int:
    """The header's length from the first 8 bytes, refused before anything is read or allocated.

    Raises BadTensorFile when the file is too short or the length is 0, too large or beyond the end.
    """
    if len(prefix) < LENGTH_BYTES or file_size < LENGTH_BYTES:
        raise _bad(file, f"{file_size} bytes is too short for a header", "truncated_file")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if length == 0:
        raise _bad(file, "the header length is 0")
    if length >= MAX_HEADER:
        raise _bad(file, f"the header claims {length} bytes; {MAX_HEADER} is the limit")
    if length > file_size - LENGTH_BYTES:
        raise _bad(
            file,
            f"the header claims {length} bytes but the file has {file_size}: incomplete download?",
            "truncated_file",
        )
    return length


def parse_header(header: bytes, file_size: int, file: str) -> TensorFile:
    """The checked content of a header (without its 8-byte length prefix).

    Raises BadTensorFile naming `file` and the tensor when the header does not describe exactly
    `file_size` bytes: unknown dtypes, negative or overflowing shapes, ranges that overlap, leave
    gaps, point outside or differ from dtype times shape, duplicate or empty names.
    """
    try:
        document = strictjson.parse_object(header)
    except strictjson.BadJson as error:
        raise _bad(file, f"header: {error}") from None
    metadata = _metadata(document.pop(METADATA, None), file)
    base = LENGTH_BYTES + len(header)
    entries = [_entry(name, value, base, file) for name, value in document.items()]
    _check_cover(entries, base, file_size, file)
    return TensorFile({e.name: e for e in sorted(entries, key=lambda e: e.name)}, metadata)


def _metadata(value: Any, file: str) -> dict[str, str]:
    if value is None:  # MLX writes null for "no metadata"
        return {}
    if not isinstance(value, dict):
        raise _bad(file, f"{METADATA} is not an object")
    for key, text in value.items():
        if not isinstance(text, str):
            raise _bad(file, f"{METADATA} value {key!r} is not a string")
    return value


def _entry(name: str, value: Any, base: int, file: str) -> TensorEntry:
    if not name:
        raise _bad(file, "a tensor has an empty name")
    if not strictjson.is_text(name):
        raise _bad(file, f"tensor name {name!r} is not Unicode text")
    if not isinstance(value, dict) or not value.keys() >= _ENTRY_KEYS:
        missing = _ENTRY_KEYS - (value.keys() if isinstance(value, dict) else set())
        raise _bad(file, f"tensor {name!r} has no {', '.join(sorted(missing))}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _bad(file, f"tensor {name!r} has unknown dtype {dtype!r}", "unknown_dtype")
    if not _counts(shape):
        raise _bad(file, f"tensor {name!r} has an invalid shape {_shown(shape)}")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(file, f"tensor {name!r} has invalid data_offsets {_shown(offsets)}")
    size = _nbytes(shape, DTYPE_BYTES[dtype])
    if size is None:
        raise _bad(file, f"tensor {name!r}: shape {_shown(shape)} overflows")
    start, end = offsets
    if end - start != size:
        raise _bad(
            file,
            f"tensor {name!r}: data_offsets span {end - start} bytes, "
            f"{dtype} {_shown(shape)} needs {size}",
        )
    return TensorEntry(name, dtype, tuple(shape), base + start, base + end)


def _counts(value: Any) -> bool:
    """Whether this is a list of non-negative 64-bit integers (JSON true is not one)."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < _MAX_BYTES for n in value)


def _nbytes(shape: list[int], width: int) -> int | None:
    """Bytes of a tensor, None when they overflow 64 bits; a long shape is not multiplied out."""
    size = width
    for n in shape:
        size *= n
        if size >= _MAX_BYTES:
            return None
    return size


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_cover(entries: list[TensorEntry], base: int, file_size: int, file: str) -> None:
    position, before = base, "the header"
    for entry in sorted(entries, key=lambda e: (e.start, e.end)):
        if entry.start != position:
            what = "overlaps" if entry.start < position else "leaves a gap after"
            raise _bad(file, f"tensor {entry.name!r} {what} {before}")
        position, before = entry.end, f"tensor {entry.name!r}"
    if position > file_size:
        raise _bad(
            file,
            f"{before} ends at byte {position} but the file has {file_size}: incomplete download?",
            "truncated_file",
        )
    if position < file_size:
        raise _bad(file, f"{file_size - position} bytes after the last tensor")


def _bad(file: str, what: str, kind: str | None = None) -> BadTensorFile:
    return BadTensorFile(
        f"{file}: {what}", kind=kind, hint="the file is damaged; fetch it again from its source"
    )


def lay_out(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorEntry]]:
    """Length prefix and header for tensors (name, dtype, shape) stored in the order given.

    The bytes depend on the arguments alone: keys sorted, fields in the order dtype, shape,
    data_offsets, ASCII, `<`, `>` and `&` escaped as Ollama's writer does, no `__metadata__` when
    empty, spaces up to a multiple of 8. Raises ValueError for a name given twice and for metadata
    keys that Ollama's reader would mistake for a tensor.
    """
    if _RESERVED_METADATA & metadata.keys():
        raise ValueError(f"metadata must not use {sorted(_RESERVED_METADATA)}")
    position, spans = 0, {}
    for name, dtype, shape in tensors:
        if name in spans or name == METADATA or not name:
            raise ValueError(f"tensor name {name!r} is empty, reserved or given twice")
        end = position + math.prod(shape) * DTYPE_BYTES[dtype]
        spans[name] = TensorEntry(name, dtype, shape, position, end)
        position = end
    document: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    for span in spans.values():
        document[span.name] = {
            "dtype": span.dtype,
            "shape": list(span.shape),
            "data_offsets": [span.start, span.end],
        }
    header = _encode({key: document[key] for key in sorted(document)})
    base = LENGTH_BYTES + len(header)
    shifted = {
        s.name: TensorEntry(s.name, s.dtype, s.shape, base + s.start, base + s.end)
        for s in spans.values()
    }
    return len(header).to_bytes(LENGTH_BYTES, "little") + header, shifted


def _encode(document: dict[str, Any]) -> bytes:
    text = json.dumps(document, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("ascii") + b" " * (-len(text) % 8)
