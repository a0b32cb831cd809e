"""Open a GGUF model as a checkpoint: tensors under their original names, side files rebuilt.

A weight whose type of block an MLX format holds without loss shows as these blocks, its rows put
back in their order. Any other block-quantized tensor, and all of them where numbers are asked for,
shows as BF16, decoded by the gguf library while it is read. Float tensors keep their dtype, with
one exception: converters widen norms and other small tensors to F32, so all tensors stored as F32
show in the dtype of the matrices (of their scales, where codes are kept) if not one value changes
by that. Nothing in the file is trusted or executed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from quantmill import mediatypes
from quantmill.elements import Bytes, Floats, from_float32, to_float32
from quantmill.errors import BadSource
from quantmill.formats import DTYPE_BYTES
from quantmill.ggufcodes import EXACT
from quantmill.ggufconfig import Metadata, heads_of, rebuild_config, rebuild_generation_config
from quantmill.ggufheader import Blocks, GgufTensor, bad_gguf, join_parts, parse_header
from quantmill.ggufnames import EMBEDDING, ROPE_FACTORS, Naming, name_tensors, no_library
from quantmill.gguftokenizer import rebuild_tokenizer
from quantmill.openfile import OpenFile
from quantmill.source import (
    CONFIG,
    DECIDING_TEXTS,
    MAX_TEXT,
    RAW_BLOCKS,
    Source,
    SourceFile,
    SourceTensor,
)

PIECE = 1 << 18
"""Elements decoded at once; the library needs some twenty bytes for each."""

_WIDENED_BYTES = 64 * 2**20
"""Most bytes of F32 tensors that are looked at for a narrower dtype."""

_MAX_FACTORS = 2**12
_FLOATS = frozenset({"F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor of the checkpoint as a part of a stored one.

    `first` counts stored elements. `heads` other than 0 means the rows of every head are
    interleaved. `shift` was added to the stored values.
    """

    stored: GgufTensor
    first: int
    dtype: str
    columns: int
    rows: int
    heads: int = 0
    shift: int = 0


class GgufCheckpoint:
    """An open GGUF model. Use as a context manager; `read_into` may be called from any thread."""

    def __init__(self, paths: Sequence[Path], *, decode: bool = False) -> None:
        self.path = paths[0]
        self._decode = decode
        self._library = _library()
        self._parts: dict[str, OpenFile] = {}
        try:
            for path in paths:
                self._parts[path.name] = _open(path)
                if not self._parts[path.name].is_regular:
                    raise bad_gguf(path.name, "is not a regular file")
            self._files: dict[str, bytes] = {}
            self._views: dict[str, _View] = {}
            self.source = self._inventory()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> GgufCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; the source value stays usable."""
        for part in self._parts.values():
            part.close()

    def read_into(self, tensor: SourceTensor, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from `offset` on; raises BadSource if they end."""
        view, size = self._views[tensor.name], DTYPE_BYTES[tensor.dtype]
        end = offset + len(buffer)
        last = -(-end // size)
        if last > tensor.elements:
            raise BadSource(f"tensor {tensor.name!r} ends before byte {end}")
        for first in range(offset // size, last, PIECE):
            values = self._elements(view, first, min(first + PIECE, last))
            at = first * size
            part = values[max(offset - at, 0) : end - at]
            begin = max(at - offset, 0)
            buffer[begin : begin + part.size] = part.data

    def identity(self, tensor: SourceTensor) -> str:
        """What tells the file from any other, and from any later state of its own."""
        return self._parts[tensor.file].identity

    def read_file(self, name: str) -> bytes:
        """The content of a rebuilt side file."""
        if name not in self._files:
            raise BadSource(f"{self.path.name} has no {name}", kind="missing_shard")
        return self._files[name]

    def check_unchanged(self) -> None:
        """Raise BadSource if a file was written to since it was opened."""
        for part in self._parts.values():
            part.check_unchanged()

    # -- opening -----------------------------------------------------------------------------------

    def _inventory(self) -> Source:
        file = self.path.name
        blocks = self._library.blocks
        header = join_parts(
            {
                name: parse_header(part.read, part.size, blocks, name)
                for name, part in self._parts.items()
            }
        )
        found = Metadata(header, file)
        layers = found.whole("block_count")
        if layers > len(header.tensors):
            raise bad_gguf(file, f"it claims {layers} layers in {len(header.tensors)} tensors")
        naming = name_tensors(header.tensors, str(found.name), layers, file)
        for name in naming:
            self._library.refuse_unreadable(header.tensors[name])
        matrices = self._matrix_dtype(header.tensors, naming)
        narrow = self._narrowed(header.tensors, naming, matrices)
        tensors = dict(
            part for name, how in naming.items()
            for part in self._views_of(header.tensors[name], how, found, narrow)
        )  # fmt: skip
        factors = {n: self._factors(header.tensors[n]) for n in ROPE_FACTORS if n in header.tensors}
        embedding = self._dtype(header.tensors[EMBEDDING], naming[EMBEDDING], narrow)
        config = rebuild_config(found, header, embedding, factors)
        self._rebuild_files(found, config)
        files = [*self._side_files(), *(_explained(header.tensors[n]) for n in factors)]
        texts = {n: self._files[n].decode() for n in DECIDING_TEXTS if n in self._files}
        ordered = {name: tensors[name] for name in sorted(tensors)}
        return Source(config, ordered, tuple(sorted(files, key=lambda f: f.name)), (), texts)

    def _rebuild_files(self, found: Metadata, config: Mapping[str, Any]) -> None:
        documents = {CONFIG: config, "generation_config.json": rebuild_generation_config(found)}
        for name, value in documents.items():
            if value:
                self._files[name] = (json.dumps(value, indent=2) + "\n").encode()
        self._files |= rebuild_tokenizer(found)
        for name, data in self._files.items():
            if len(data) > MAX_TEXT:
                raise bad_gguf(found.file, f"its {name} would have {len(data)} bytes")

    def _side_files(self) -> Iterator[SourceFile]:
        for name, data in self._files.items():
            media_type = mediatypes.JSON if name.endswith(".json") else mediatypes.FILE
            yield SourceFile(name, len(data), media_type, "rebuilt from the metadata")

    def _views_of(
        self, stored: GgufTensor, how: Naming, found: Metadata, narrow: str | None
    ) -> Iterator[tuple[str, SourceTensor]]:
        dtype, blocks = self._dtype(stored, how, narrow), stored.kind if stored.block > 1 else ""
        shape, count = _checkpoint_shape(stored, how, found)
        heads = heads_of(found)
        interleaved = {"q": heads.queries, "k": heads.keys}.get(how.interleaved, 0)
        if interleaved and (shape[0] != interleaved * heads.width or heads.width % 2):
            raise bad_gguf(
                stored.file,
                f"tensor {stored.name!r} has {shape[0]} rows for {interleaved} heads of "
                f"{heads.width}",
            )
        if self._keeps_codes(stored, how):
            dtype, shape, stored = RAW_BLOCKS, *_as_bytes(shape, stored)
        elements = math.prod(shape)
        for n in range(count):
            name = f"{how.prefix}{n}.{how.suffix}" if how.experts else how.prefix
            first = n * elements
            columns = shape[-1] if len(shape) > 1 else 1
            self._views[name] = _View(
                stored, first, dtype, columns, shape[0], interleaved, how.shift
            )
            start = stored.start + first // stored.block * stored.block_bytes
            yield name, SourceTensor(name, dtype, shape, stored.file, start, blocks)

    def _keeps_codes(self, stored: GgufTensor, how: Naming) -> bool:
        """Whether a tensor shows as its blocks: a matrix, or a stack of them, of an exact type."""
        return how.is_matrix and not self._decode and stored.kind in EXACT

    def _keeps_small_floats(self, stored: GgufTensor, how: Naming) -> bool:
        return self._keeps_codes(stored, how) and not EXACT[stored.kind].format.has_bias

    def _dtype(self, stored: GgufTensor, how: Naming, narrow: str | None) -> str:
        """The dtype of a tensor's numbers, or of the scales where its codes are kept."""
        if stored.kind == "F32":
            return narrow or "F32"
        if self._keeps_codes(stored, how):
            return EXACT[stored.kind].dtype
        return stored.kind if stored.kind in _FLOATS else "BF16"

    def _matrix_dtype(self, tensors: Mapping[str, GgufTensor], naming: Mapping[str, Naming]) -> str:
        """The dtype of the matrices: BF16 if any is that or decoded, else F16, else F32."""
        found = {
            self._dtype(tensors[name], how, None)
            for name, how in naming.items()
            # small floats with byte scales go with numbers of any dtype
            if how.is_matrix and not self._keeps_small_floats(tensors[name], how)
        } or {"BF16"}
        return next((dtype for dtype in ("BF16", "F16") if dtype in found), "F32")

    def _narrowed(
        self, tensors: Mapping[str, GgufTensor], naming: Mapping[str, Naming], dtype: str
    ) -> str | None:
        """The dtype that all tensors stored as F32 can take without a change, None if not."""
        wide = [name for name in naming if tensors[name].kind == "F32"]
        if dtype == "F32" or sum(tensors[name].nbytes for name in wide) > _WIDENED_BYTES:
            return None
        for name in wide:
            stored = tensors[name]
            elements = math.prod(stored.shape)
            view = _View(stored, 0, "F32", elements, 1, 0, naming[name].shift)
            for first in range(0, elements, PIECE):
                raw = self._elements(view, first, min(first + PIECE, elements))
                if not _fits(raw.view(np.float32), dtype):
                    return None
        return dtype

    def _factors(self, stored: GgufTensor) -> list[float]:
        count = math.prod(stored.shape)
        if stored.kind != "F32" or len(stored.shape) != 1 or count > _MAX_FACTORS:
            raise bad_gguf(stored.file, f"tensor {stored.name!r} does not hold rotary factors")
        raw = self._elements(_View(stored, 0, "F32", count, 1), 0, count)
        values = [float(value) for value in raw.view(np.float32)]
        if not all(math.isfinite(value) and value > 0 for value in values):
            raise bad_gguf(stored.file, f"tensor {stored.name!r} does not hold rotary factors")
        return values

    # -- reading -----------------------------------------------------------------------------------

    def _elements(self, view: _View, first: int, last: int) -> Bytes:
        """Elements of a view, as bytes of its dtype."""
        stored, block = view.stored, view.stored.block
        raw, skip = [], None
        for begin, end in _runs(view, first, last):
            whole = begin // block
            if skip is None:
                skip = begin - whole * block
            count = -(-end // block) - whole
            at = stored.start + whole * stored.block_bytes
            raw.append(self._parts[stored.file].read(at, count * stored.block_bytes))
        data = np.frombuffer(b"".join(raw), np.uint8)
        if stored.kind == view.dtype and not view.shift:
            return data  # a block of one element: nothing to cut
        values = self._library.decode(data, stored.kind)
        values = values[skip or 0 :][: last - first]
        if view.shift:
            values = values - np.float32(view.shift)
        return from_float32(values, view.dtype)


def open_gguf(
    path: str | Path, *, decode: bool = False, parts: Sequence[Path] = ()
) -> GgufCheckpoint:
    """Open a GGUF file, or the `parts` of one that is split, and read the headers.

    With `decode` every weight shows as numbers, else those whose codes can be kept as blocks.
    Raises BadSource, naming the file, for a file that is damaged or not understood, BadRequest when
    the gguf library is not installed.
    """
    return GgufCheckpoint(parts or [Path(path)], decode=decode)


# -- elements --------------------------------------------------------------------------------------


def _runs(view: _View, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Stored elements, from and to, that are the view's elements `first` to `last`.

    Runs between the first and the last are whole rows.
    """
    if not view.heads:
        yield view.first + first, view.first + last
        return
    for row in range(first // view.columns, -(-last // view.columns)):
        begin = view.first + _interleaved(row, view.rows // view.heads) * view.columns
        at = row * view.columns
        yield begin + max(first - at, 0), begin + min(last - at, view.columns)


def _interleaved(row: int, width: int) -> int:
    """Where a converter put this row of a query or key projection.

    A head's rows come in two halves that rotate together; ggml wants the partners side by side.
    """
    head, within = divmod(row, width)
    half, pair = divmod(within, width // 2)
    return head * width + 2 * pair + half


def _fits(values: Floats, dtype: str) -> bool:
    """Whether no value changes in this dtype; NaN never fits."""
    again = to_float32(from_float32(values, dtype), dtype)
    return bool(np.array_equal(again, values))


def _as_bytes(shape: tuple[int, ...], stored: GgufTensor) -> tuple[tuple[int, ...], GgufTensor]:
    """A matrix and the tensor that stores it, with the bytes of its blocks for elements."""
    row = shape[-1] // stored.block * stored.block_bytes
    as_bytes = replace(stored, kind=RAW_BLOCKS, shape=(stored.nbytes,), block=1, block_bytes=1)
    return (*shape[:-1], row), as_bytes


def _checkpoint_shape(
    stored: GgufTensor, how: Naming, found: Metadata
) -> tuple[tuple[int, ...], int]:
    """The shape of each tensor that a stored one stands for, and how many there are."""
    shape = stored.shape
    if how.experts or how.stacked:
        count = found.whole("expert_count")
        if len(shape) != (2 if how.stacked and not how.is_matrix else 3) or shape[0] != count:
            raise bad_gguf(
                stored.file, f"tensor {stored.name!r} has shape {list(shape)} for {count} experts"
            )
        return (shape, 1) if how.stacked else (shape[1:], count)
    if how.prefix.endswith("shared_expert_gate.weight") and len(shape) == 1:
        return (1, *shape), 1  # converters drop the dimension
    if len(shape) != (2 if how.is_matrix else 1):
        raise bad_gguf(stored.file, f"tensor {stored.name!r} has shape {list(shape)}")
    return shape, 1


# -- the library -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Library:
    """What is used of gguf: the table of types and their decoders."""

    blocks: Blocks
    numbers: Mapping[str, Any]
    dequantize: Callable[[Any, Any], Any]

    def decode(self, data: Bytes, kind: str) -> Floats:
        """Whole blocks of one type as float32."""
        with np.errstate(all="ignore"):  # scales may be anything; what they give is judged later
            # one row: the library works on sixteen at a time
            found = self.dequantize(data.reshape(1, -1), self.numbers[kind])
        return np.asarray(found, np.float32).reshape(-1)

    def refuse_unreadable(self, tensor: GgufTensor) -> None:
        """Raise BadSource for a type that the library cannot decode."""
        problem = (
            "its values are not weights" if tensor.kind[0] == "I" and tensor.block == 1 else ""
        )
        try:
            self.decode(np.zeros(tensor.block_bytes, np.uint8), tensor.kind)
        except NotImplementedError:
            problem = problem or "the gguf library cannot decode it"
        if problem:
            raise BadSource(
                f"{tensor.file}: tensor {tensor.name!r} has type {tensor.kind}: {problem}",
                kind="unsupported_gguf_type",
            )


def _library() -> _Library:
    try:
        from gguf import GGML_QUANT_SIZES, quants
    except ImportError:
        raise no_library() from None
    blocks = {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    numbers = {kind.name: kind for kind in GGML_QUANT_SIZES}
    return _Library(blocks, numbers, quants.dequantize)


# -- files -----------------------------------------------------------------------------------------


def _open(path: Path) -> OpenFile:
    try:
        return OpenFile(path, path.name)
    except OSError as error:
        raise BadSource(f"{path}: {error.strerror}", kind="bad_gguf") from None


def _explained(stored: GgufTensor) -> SourceFile:
    """A tensor that becomes part of config.json, for the list of what is left out."""
    reason = "a tensor; config.json says the same as rope_scaling"
    return SourceFile(f"{stored.file}:{stored.name}", stored.nbytes, None, reason)
