"""The header of a GGUF file: metadata and a directory of tensors, checked against the file's size.

A count or length in the file is believed only as far as the file has bytes for it, and nothing is
allocated for it before. The gguf library's own reader trusts them, so it is not used here.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from quantmill.errors import BadSource

MAGIC = b"GGUF"
VERSIONS = (2, 3)

MAX_HEADER = 256 * 2**20
"""Largest header that is read; the largest vocabularies need a tenth of it."""

MAX_ITEMS = 2**22
"""Most entries of one array, of the metadata, and of the tensor directory."""

_CHUNK = 2**20
_MAX_NAME = 2**10
_MAX_DIMS = 4
_MAX_ALIGNMENT = 2**20
_DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY, _BOOL, _F32 = 8, 9, 7, 6
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip

Blocks = Mapping[int, tuple[str, int, int]]
"""For every type number: its name, elements in a block, bytes of a block."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor as `file` stores it; `shape` is outermost first, `start` counts from byte 0."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    block: int
    block_bytes: int
    file: str


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Everything before the tensor data."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def bad_gguf(name: str, what: str, hint: str | None = None) -> BadSource:
    """A file that does not say what a GGUF file must say."""
    return BadSource(f"{name}: {what}", kind="bad_gguf", hint=hint)


def parse_header(
    read: Callable[[int, int], bytes], size: int, blocks: Blocks, name: str
) -> GgufHeader:
    """The header of a file of `size` bytes; `read` gives bytes at an offset, never fewer.

    Raises BadSource, naming the file, for anything that does not fit the file or these limits.
    """
    cursor = _Cursor(read, size, name)
    if cursor.take(4) != MAGIC:
        raise bad_gguf(name, "is not a GGUF file")
    version = cursor.scalar(4)
    if version not in VERSIONS:
        swapped = version & 0xFFFF == 0
        what = "its numbers are big-endian" if swapped else f"its version is {version}"
        raise bad_gguf(name, f"{what}, which is not supported")
    tensor_count, key_count = (cursor.count(what) for what in ("tensors", "keys"))
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.text("a key", _MAX_NAME)
        if key in metadata:
            raise bad_gguf(name, f"key {key!r} appears twice")
        metadata[key] = cursor.value(cursor.scalar(4), key)
    entries = [_directory_entry(cursor, blocks) for _ in range(tensor_count)]
    return GgufHeader(metadata, _place(entries, cursor, metadata))


# -- parts ---------------------------------------------------------------------------------------

_PART = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.gguf")
_SPLIT_NO, _SPLIT_COUNT, _SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"


def part_names(name: str) -> list[str]:
    """The names of all parts of a model that is split, in order; of one that is not, its own.

    Raises BadSource for a number beyond the count.
    """
    found = _PART.fullmatch(name)
    if found is None:
        return [name]
    stem, number, count = found[1], int(found[2]), int(found[3])
    if not 0 < number <= count:
        raise bad_gguf(name, f"there is no part {number} of {count}")
    return [f"{stem}-{n:05}-of-{count:05}.gguf" for n in range(1, count + 1)]


def join_parts(headers: Mapping[str, GgufHeader]) -> GgufHeader:
    """One header for the parts of a model: the first part's metadata and the tensors of all.

    `headers` are in the order of the parts' names. Raises BadSource, naming the file, where a part
    says that it is another one, or that there are more or fewer parts or tensors.
    """
    tensors: dict[str, GgufTensor] = {}
    for number, (file, header) in enumerate(headers.items()):
        _check_part(file, header.metadata, number, len(headers))
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise bad_gguf(file, f"tensor {name!r} is in {tensors[name].file} too")
            tensors[name] = tensor
    first = next(iter(headers.values()))
    for file, header in headers.items():
        stated = header.metadata.get(_SPLIT_TENSORS)
        if len(headers) > 1 and stated != len(tensors):
            raise bad_gguf(
                file,
                f"{_SPLIT_TENSORS} is {stated!r}; the {len(headers)} parts have {len(tensors)}",
                "the parts are not those of one model; fetch them again",
            )
    return GgufHeader(first.metadata, tensors)


def _check_part(file: str, metadata: Mapping[str, Any], number: int, count: int) -> None:
    stated = metadata.get(_SPLIT_COUNT, 1)
    if count == 1 and type(stated) is int and stated > 1:
        raise BadSource(
            f"{file} is one of {stated} parts, which its name does not say",
            kind="unsupported_gguf_parts",
            hint=f"parts are called NAME-00001-of-{stated:05}.gguf",
        )
    said = {_SPLIT_COUNT: count, _SPLIT_NO: number} if count > 1 else {}
    for key, expected in said.items():
        if metadata.get(key) != expected:
            raise bad_gguf(
                file,
                f"{key} is {metadata.get(key)!r}, but by its name it would be {expected}",
                "the file was renamed, or is part of another model",
            )


# -- tensors ---------------------------------------------------------------------------------------


def _directory_entry(cursor: _Cursor, blocks: Blocks) -> GgufTensor:
    """A tensor whose start still counts from the beginning of the data."""
    name = cursor.text("a tensor's name", _MAX_NAME)
    dims = cursor.scalar(4)
    if not 0 < dims <= _MAX_DIMS:
        raise bad_gguf(cursor.name, f"tensor {name!r} has {dims} dimensions")
    shape = tuple(cursor.scalar(10) for _ in range(dims))[::-1]
    number, start = cursor.scalar(4), cursor.scalar(10)
    if number not in blocks:
        raise bad_gguf(
            cursor.name,
            f"tensor {name!r} has the unknown type {number}",
            "a newer gguf may know it",
        )
    kind, block, block_bytes = blocks[number]
    if not all(shape) or shape[-1] % block:
        raise bad_gguf(cursor.name, f"tensor {name!r} of type {kind} has shape {list(shape)}")
    nbytes = math.prod(shape) // block * block_bytes
    return GgufTensor(name, kind, shape, start, nbytes, block, block_bytes, cursor.name)


def _place(
    entries: list[GgufTensor], cursor: _Cursor, metadata: Mapping[str, Any]
) -> dict[str, GgufTensor]:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    usable = type(alignment) is int and 0 < alignment <= _MAX_ALIGNMENT
    if not usable or alignment & (alignment - 1):
        raise bad_gguf(cursor.name, f"general.alignment is {alignment!r}")
    base = -(-cursor.at // alignment) * alignment
    found: dict[str, GgufTensor] = {}
    for entry in entries:
        if entry.name in found:
            raise bad_gguf(cursor.name, f"tensor {entry.name!r} appears twice")
        if base + entry.start + entry.nbytes > cursor.size:
            raise bad_gguf(
                cursor.name,
                f"tensor {entry.name!r} ends at byte {base + entry.start + entry.nbytes}, "
                f"the file at {cursor.size}",
                "the download is incomplete; fetch the file again",
            )
        found[entry.name] = replace(entry, start=base + entry.start)
    return found


# -- bytes -----------------------------------------------------------------------------------------


class _Cursor:
    """Reads forward through the header, a chunk at a time."""

    def __init__(self, read: Callable[[int, int], bytes], size: int, name: str) -> None:
        self.size, self.name, self.at = size, name, 0
        self._read, self._chunk, self._start = read, b"", 0

    @property
    def left(self) -> int:
        return min(self.size, MAX_HEADER) - self.at

    def take(self, length: int) -> bytes:
        if length > self.left:
            limit = self.size if self.size <= MAX_HEADER else MAX_HEADER
            raise bad_gguf(
                self.name,
                f"its header does not end within {limit} bytes",
                "the file is damaged or its download incomplete",
            )
        begin = self.at - self._start
        if begin + length > len(self._chunk):
            want = min(max(length, _CHUNK), self.size - self.at)
            self._chunk, self._start, begin = self._read(self.at, want), self.at, 0
        self.at += length
        return self._chunk[begin : begin + length]

    def scalar(self, kind: int) -> Any:
        return self._unpack(_SCALARS[kind], 1)[0]

    def count(self, what: str, smallest: int = 1) -> int:
        """A number of things of which each takes at least `smallest` bytes."""
        found: int = self.scalar(10)
        if found > min(MAX_ITEMS, self.left // smallest):
            raise bad_gguf(self.name, f"it claims {found} {what}")
        return found

    def text(self, what: str, limit: int = MAX_HEADER) -> str:
        length = self.scalar(10)
        if length > limit:
            raise bad_gguf(self.name, f"{what} claims {length} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise bad_gguf(self.name, f"{what}: invalid UTF-8 at byte {error.start}") from None

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.text(key)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise bad_gguf(self.name, f"{key} has the unknown type {kind}")
        return self._scalars(kind, 1)[0]

    def _array(self, key: str) -> tuple[Any, ...]:
        kind = self.scalar(4)
        if kind == _STRING:
            return tuple(self.text(key) for _ in range(self.count(f"entries in {key}", 8)))
        if kind not in _SCALARS:
            raise bad_gguf(self.name, f"{key} is an array of the unknown type {kind}")
        return self._scalars(kind, self.count(f"entries in {key}", struct.calcsize(_SCALARS[kind])))

    def _scalars(self, kind: int, count: int) -> tuple[Any, ...]:
        found = self._unpack(_SCALARS[kind], count)
        if kind == _BOOL:
            return tuple(bool(value) for value in found)
        return tuple(map(_shortest, found)) if kind == _F32 else found

    def _unpack(self, code: str, count: int) -> tuple[Any, ...]:
        layout = f"<{count}{code}"
        return struct.unpack(layout, self.take(struct.calcsize(layout)))


def _shortest(value: float) -> float:
    """The shortest decimal that is the same 32-bit float: 1e-05, not 9.999999747378752e-06."""
    if not math.isfinite(value):
        return value
    for digits in range(6, 9):
        short = float(f"{value:.{digits}g}")
        try:
            same: float = struct.unpack("<f", struct.pack("<f", short))[0]
        except OverflowError:
            continue
        if same == value:
            return short
    return value
