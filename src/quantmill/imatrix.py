"""Importance matrices of llama.cpp: read from both forms of file, and matched with a checkpoint.

`llama-imatrix` runs a text through a model and sums up, for every matrix, the squares of what its
columns are multiplied with. It writes a GGUF file: for the matrix NAME the tensors NAME.in_sum2
[matrices, columns], sums of x², and NAME.counts [matrices, 1], tokens; one matrix, or one for each
expert. What it wrote before, usually called .dat, is a list of entries in little-endian numbers:

    int32 entries, then for each: int32 length, name, int32 calls, int32 values, float32 [values]
    int32 last call; int32 length, the text's name         (either may be absent)

where values are means times calls, and experts lie one behind the other. Layouts are those of
llama.cpp's tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp. Nothing in a file is believed
further than it has bytes for it.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantmill.activations import Moments
from quantmill.digests import Digest
from quantmill.errors import BadSource
from quantmill.formats import FLOAT_DTYPES, FP8_E4M3_DTYPES, FP8_E5M2_DTYPES
from quantmill.ggufcodes import read_raw_blocks
from quantmill.ggufheader import MAGIC, GgufTensor, parse_header
from quantmill.ggufnames import imatrix_modules
from quantmill.openfile import OpenFile
from quantmill.source import MODEL, Source, SourceTensor

Read = Callable[[int, int], bytes]
"""Bytes at an offset, never fewer than asked for."""

_Floats = npt.NDArray[np.float32]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_TYPE, _DATASETS = "general.type", "imatrix.datasets"
_CHUNKS, _CHUNK_SIZE = "imatrix.chunk_count", "imatrix.chunk_size"

# A file of floats alone has no other types; the numbers are those of ggml.
_BLOCKS = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2)}

_MAX_NAME = 2**10
_SMALLEST_ENTRY = 17
_MAX_COUNT = 2.0**53
_PIECE = 2**20

_NUMERIC = FLOAT_DTYPES | FP8_E4M3_DTYPES | FP8_E5M2_DTYPES


@dataclass(frozen=True, slots=True)
class Imatrix:
    """What a file says, by the names that llama.cpp has for the weights (`blk.0.attn_q.weight`).

    `entries` hold means of x²: float32 [columns], or [experts, columns] with tokens int64
    [experts]. In the older form, `counts_calls`, all experts lie in one row [experts * columns],
    `tokens` are calls (pieces of text), and means are right up to one factor for each entry: what
    a call summed up has changed over time. `chunks` of `chunk_size` tokens were read of the texts
    `datasets`; None where the file does not say.
    """

    file: str
    digest: Digest
    entries: Mapping[str, Moments]
    datasets: tuple[str, ...] = ()
    chunks: int | None = None
    chunk_size: int | None = None
    counts_calls: bool = False


@dataclass(frozen=True, slots=True)
class Matched:
    """An importance matrix by a checkpoint's names, and the entries that none of them is."""

    moments: Mapping[str, Moments]
    unused: tuple[str, ...]


def read_imatrix(path: str | Path) -> Imatrix:
    """Read an importance matrix in either form.

    Raises BadSource, naming the file and the entry, for a file that cannot be read, is damaged, or
    holds counts or sums that are none (negative, not finite).
    """
    path = Path(path)
    try:
        opened = OpenFile(path, path.name)
    except OSError as error:
        raise _bad(str(path), error.strerror or "cannot be opened") from None
    try:
        if not opened.is_regular:
            raise _bad(path.name, "is not a regular file")
        found = parse_imatrix(opened.read, opened.size, path.name, _digest(opened))
        opened.check_unchanged()
        return found
    finally:
        opened.close()


def parse_imatrix(read: Read, size: int, name: str, digest: Digest) -> Imatrix:
    """The importance matrix in a file of `size` bytes that errors call `name`.

    Raises BadSource as `read_imatrix` does.
    """
    if size >= len(MAGIC) and read(0, len(MAGIC)) == MAGIC:
        return _from_gguf(read, size, name, digest)
    return _from_dat(_Forward(read, size, name), digest)


def _digest(opened: OpenFile) -> Digest:
    found = hashlib.sha256()
    for at in range(0, opened.size, _PIECE):
        found.update(opened.read(at, min(_PIECE, opened.size - at)))
    return Digest(found.hexdigest())


def _bad(name: str, what: str, hint: str | None = None) -> BadSource:
    return BadSource(f"{name}: {what}", kind="bad_imatrix", hint=hint)


# -- the GGUF form ---------------------------------------------------------------------------------


def _from_gguf(read: Read, size: int, name: str, digest: Digest) -> Imatrix:
    header = parse_header(read, size, _BLOCKS, name)
    kind = header.metadata.get(_TYPE)
    if kind != "imatrix":
        raise _bad(name, f"is no importance matrix: its {_TYPE} is {kind!r}")
    pairs: dict[str, dict[str, GgufTensor]] = {}
    for tensor in header.tensors.values():
        for end in (_SUMS, _COUNTS):
            if tensor.name.endswith(end):
                pairs.setdefault(tensor.name.removesuffix(end), {})[end] = tensor
    # tensors may lie on the same bytes, so that each fits the file and all together do not
    if sum(t.nbytes for pair in pairs.values() for t in pair.values()) > size:
        raise _bad(name, "its tensors are larger together than the file")
    if not pairs:
        raise _bad(name, "has no entries")
    return Imatrix(
        name,
        digest,
        {entry: _from_sums(read, name, entry, pairs[entry]) for entry in sorted(pairs)},
        _texts(header.metadata.get(_DATASETS, ()), name),
        _whole(header.metadata, _CHUNKS, name),
        _whole(header.metadata, _CHUNK_SIZE, name),
    )


def _from_sums(read: Read, file: str, entry: str, pair: Mapping[str, GgufTensor]) -> Moments:
    for end in (_SUMS, _COUNTS):
        if end not in pair:
            raise _bad(file, f"entry {entry!r} has no {end[1:]}")
        if pair[end].kind != "F32":
            raise _bad(file, f"entry {entry!r}: {end[1:]} is {pair[end].kind}, not F32")
    sums, counts = (
        np.frombuffer(read(pair[end].start, pair[end].nbytes), "<f4") for end in (_SUMS, _COUNTS)
    )
    if sums.size % counts.size or (counts.size > 1 and len(pair[_SUMS].shape) != 2):
        raise _bad(
            file,
            f"entry {entry!r}: sums {list(pair[_SUMS].shape)} do not go with {counts.size} counts",
        )
    whole = (counts >= 0) & (counts <= _MAX_COUNT) & (np.floor(counts) == counts)
    if not whole.all():
        raise _bad(file, f"entry {entry!r}: {counts[~whole][0]} is no count of tokens")
    if counts.size == 1:
        return _means(file, entry, sums, counts[0])
    means = _means(file, entry, sums.reshape(counts.size, -1), counts[:, None])
    return Moments(means.values, means.tokens.reshape(-1))


def _means(file: str, entry: str, sums: _Floats, counts: Any) -> Moments:
    """Sums divided by counts that they broadcast with; zeros where there is nothing to count."""
    if not np.isfinite(sums).all() or (sums < 0).any():
        wrong = sums[~(np.isfinite(sums) & (sums >= 0))].flat[0]
        raise _bad(file, f"entry {entry!r}: {wrong} is no sum of squares")
    tokens = np.asarray(counts, np.int64)
    if np.where(tokens > 0, 0, sums).any():
        raise _bad(file, f"entry {entry!r} has sums of 0 tokens")
    values = (sums.astype(np.float64) / np.maximum(tokens, 1)).astype(np.float32)
    return Moments(values, tokens)


def _texts(value: object, name: str) -> tuple[str, ...]:
    if not isinstance(value, tuple) or not all(isinstance(text, str) for text in value):
        raise _bad(name, f"{_DATASETS} is no list of texts")
    return value


def _whole(metadata: Mapping[str, Any], key: str, name: str) -> int | None:
    found = metadata.get(key)
    if found is not None and (type(found) is not int or found < 0):
        raise _bad(name, f"{key} is {found if isinstance(found, int | float) else 'no number'}")
    return found


# -- the older form --------------------------------------------------------------------------------


class _Forward:
    """Reads a file from its beginning to its end."""

    def __init__(self, read: Read, size: int, name: str) -> None:
        self.name, self.left = name, size
        self._read, self._at = read, 0

    def take(self, length: int, what: str) -> bytes:
        if not 0 <= length <= self.left:
            raise _bad(
                self.name,
                f"{what} would take {length} bytes, and the file has {self.left} more",
                "it is no importance matrix of llama.cpp, or its download is incomplete",
            )
        found = self._read(self._at, length)
        self._at, self.left = self._at + length, self.left - length
        return found

    def number(self, what: str) -> int:
        found: int = struct.unpack("<i", self.take(4, what))[0]
        return found


def _from_dat(data: _Forward, digest: Digest) -> Imatrix:
    count = data.number("the number of entries")
    if not 0 < count <= data.left // _SMALLEST_ENTRY:
        raise _bad(data.name, f"is no importance matrix of llama.cpp: it claims {count} entries")
    entries: dict[str, Moments] = {}
    for number in range(1, count + 1):
        entry = _entry_name(data, number)
        if entry in entries:
            raise _bad(data.name, f"entry {entry!r} appears twice")
        entries[entry] = _entry(data, entry)
    calls = data.number("the last call") if data.left else None
    if calls is not None and calls < 0:
        raise _bad(data.name, f"its last call is {calls}")
    datasets: tuple[str, ...] = ()
    if data.left:
        # a path as some system spelt it, for people to read
        raw = data.take(data.number("the length of the text's name"), "the text's name")
        datasets = (raw.decode("utf-8", "replace"),) if raw else ()
    if data.left:
        raise _bad(data.name, f"{data.left} bytes follow its end")
    ordered = {entry: entries[entry] for entry in sorted(entries)}
    return Imatrix(data.name, digest, ordered, datasets, calls, counts_calls=True)


def _entry_name(data: _Forward, number: int) -> str:
    length = data.number(f"the length of entry {number}'s name")
    if not 0 < length <= _MAX_NAME:
        raise _bad(data.name, f"entry {number} claims a name of {length} bytes")
    try:
        return data.take(length, f"entry {number}'s name").decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad(data.name, f"entry {number}: invalid UTF-8 at byte {error.start}") from None


def _entry(data: _Forward, entry: str) -> Moments:
    calls = data.number(f"entry {entry!r}: its calls")
    if calls < 0:
        raise _bad(data.name, f"entry {entry!r}: {calls} is no count of calls")
    count = data.number(f"entry {entry!r}: its number of values")
    if count < 1:
        raise _bad(data.name, f"entry {entry!r} claims {count} values")
    raw = data.take(4 * count, f"entry {entry!r}")
    return _means(data.name, entry, np.frombuffer(raw, "<f4"), calls)


# -- a checkpoint's names --------------------------------------------------------------------------

_WEIGHT = ".weight"
_LAYER = re.compile(
    r"(?:(?:model|language_model)\.)*layers\.(?P<layer>[0-9]{1,6})\.(?P<module>.+)\.weight"
)
_EDGE = re.compile(r"(?:(?:model|language_model)\.)*(?P<module>embed_tokens|lm_head)\.weight")
_EXPERT = re.compile(r"(?P<before>.+\.experts)\.(?P<index>[0-9]{1,6})\.(?P<projection>.+)")
_EDGES = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
_FIRST, _FIRST_OURS = "blk.0.", "model.layers.0."
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"


@dataclass(frozen=True, slots=True)
class _Weight:
    """A weight of the checkpoint, and its index where it is one expert of many."""

    tensor: SourceTensor
    name: str
    expert: int | None = None


def moments_for(imatrix: Imatrix, source: Source) -> Matched:
    """The entries by the names of the source's tensors, of the model's where it has several parts.

    A stack of experts has values float32 [experts, columns] and tokens int64 [experts]; one that
    is stored singly, like any matrix, [columns] and []. A weight that saw no token is absent, an
    expert of a stack zeros. A tied embedding has what was measured of the head. Columns are those
    of the checkpoint as they are: no converter of these architectures puts them in another order
    (llama's permutation for rotary embeddings moves rows of query and key).

    Raises BadSource where the architecture is not known from GGUF files, where columns or experts
    are not as many as the source's, and where nothing fits: then the file is of another model.
    """
    weights = _weights(imatrix, source)
    found: dict[str, Moments] = {}
    unused = []
    for entry, means in imatrix.entries.items():
        if entry not in weights:
            unused.append(entry)
            continue
        for name, moments in _of_entry(imatrix.file, entry, means, weights[entry]).items():
            if moments.tokens.any():
                found[name] = moments
    if len(unused) == len(imatrix.entries):
        raise _other_model(imatrix.file, f"not one of its {len(unused)} entries is in the source")
    return Matched(found, tuple(unused))


def _other_model(file: str, what: str) -> BadSource:
    return _bad(file, what, "the importance matrix is of another model")


def _weights(imatrix: Imatrix, source: Source) -> dict[str, list[_Weight]]:
    """The weights that each entry is of, by its name."""
    part = next((part for part in source.parts if part.role == MODEL), None)
    own, folder = (part.source, part.folder) if part else (source, "")
    text = own.config.get("text_config")
    config = text if isinstance(text, dict) and "model_type" in text else own.config
    modules = imatrix_modules(config.get("model_type"), imatrix.file)
    found: dict[str, list[_Weight]] = {}
    for name, tensor in own.tensors.items():
        entry, expert = _entry_of(name, modules)
        if entry:
            found.setdefault(entry, []).append(_Weight(tensor, folder + name, expert))
    # the head of a tied model has its own name in some files, the embedding's in others
    if _OUTPUT not in found:
        found[_OUTPUT] = found.get(_EMBEDDING, [])
    else:
        found.pop(_EMBEDDING, None)
    return {entry: weights for entry, weights in found.items() if weights}


def _entry_of(name: str, modules: Mapping[str, str]) -> tuple[str, int | None]:
    """An entry's name and the place in it for one of the checkpoint's; "" where there is none."""
    if edge := _EDGE.fullmatch(name):
        module = modules.get(_EDGES[edge["module"]])
        return (module + _WEIGHT if module else ""), None
    inside = _LAYER.fullmatch(name)
    if inside is None:
        return "", None
    module, index = inside["module"], None
    if expert := _EXPERT.fullmatch(module):
        module, index = f"{expert['before']}.{expert['projection']}", int(expert["index"])
    theirs = modules.get(_FIRST_OURS + module)
    if theirs is None:
        return "", None
    return f"blk.{int(inside['layer'])}.{theirs.removeprefix(_FIRST)}{_WEIGHT}", index


def _of_entry(file: str, entry: str, means: Moments, weights: list[_Weight]) -> dict[str, Moments]:
    """What an entry says of each of its weights, by name."""
    singly = [w.expert for w in weights if w.expert is not None]
    stack = [w.tensor.shape[0] for w in weights if w.expert is None and len(w.tensor.shape) == 3]
    experts = max(singly) + 1 if singly else stack[0] if stack else None
    values, tokens = _by_expert(file, entry, means, experts)
    found = {}
    for weight in weights:
        columns = _columns(weight.tensor)
        if columns is not None and columns != values.shape[-1]:
            raise _other_model(
                file,
                f"entry {entry!r} has {values.shape[-1]} columns, tensor {weight.name!r} {columns}",
            )
        place = ... if weight.expert is None else weight.expert
        found[weight.name] = Moments(values[place], np.asarray(tokens[place]))
    return found


def _by_expert(
    file: str, entry: str, means: Moments, experts: int | None
) -> tuple[_Floats, npt.NDArray[np.int64]]:
    """Means [experts, columns] with tokens [experts], or [columns] with [] of one matrix."""
    stored = means.tokens.size if means.values.ndim > 1 else None
    if experts is None:
        if stored is not None:
            raise _other_model(file, f"entry {entry!r} has {stored} experts, the source a matrix")
        return means.values, means.tokens
    if stored is None and means.values.size % experts == 0:  # one behind the other
        return means.values.reshape(experts, -1), np.repeat(means.tokens.reshape(-1), experts)
    if stored != experts:
        has = f"{means.values.size} values" if stored is None else f"{stored} experts"
        raise _other_model(file, f"entry {entry!r} has {has}, the source {experts} experts")
    return means.values, means.tokens


def _columns(tensor: SourceTensor) -> int | None:
    """Numbers in a row; None where a shape counts packed codes."""
    blocks = read_raw_blocks(tensor)
    if blocks is not None:
        return blocks.shape[-1]
    return tensor.shape[-1] if tensor.dtype in _NUMERIC and tensor.shape else None
