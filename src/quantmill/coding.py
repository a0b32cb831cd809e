"""Coded weights as numbers, or as MLX's affine codes: what layouts and parts mean, in NumPy.

A weight is a number of matrices (the experts of a stack, or one) whose rows are outputs. Each is
read a few rows at a time; only where a layout runs across the rows, as GPTQ's and AWQ's do, are the
codes of a whole matrix held. Formulas and layouts: docs/sources.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from quantmill import kernels
from quantmill.elements import E4M3, decode, from_float32, rounded, to_float32
from quantmill.errors import BadWeights
from quantmill.formats import DTYPE_BYTES
from quantmill.ggmlblocks import split
from quantmill.ggufcodes import EXACT
from quantmill.plans import (
    BIAS,
    CODES,
    COLUMNS,
    DIVIDES,
    GGML,
    GLOBAL,
    INDEX,
    MLX_GLOBAL,
    SCALE,
    ZERO,
    Coding,
    TensorSpec,
)
from quantmill.source import SourceTensor
from quantmill.weights import MAX_SCALE, CodedRows, Quantized

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Read = Callable[[SourceTensor, int, memoryview], None]

TRANSPOSED = frozenset({"gptq", "awq"})
"""Layouts whose rows are the inputs: a matrix is read whole."""

# Rows that a layout stores together.
_ROW_STEP = {"awq": 8, "nibble_rows": 2}
# The output that each half byte of AWQ's words belongs to, the lowest first.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of a matrix: codes, and what they mean group by group.

    `codes` are unsigned, [rows, columns]: signed ones are counted from the smallest, which `zero`
    makes up for. `scale`, `zero` and `bias` have a row for each or one for all, and a column for
    each group or one for all; `zero` and `bias` may be None. `group` is the width of a group, 0 for
    a whole row.
    """

    codes: npt.NDArray[np.uint8]
    scale: Array
    scale_dtype: str
    zero: npt.NDArray[np.int32] | None
    bias: Array | None
    group: int


def numbers(
    spec: TensorSpec, sources: Sequence[SourceTensor], read: Read, nbytes: int
) -> Iterator[memoryview]:
    """The weight as elements of `spec.dtype`, in pieces of whole rows and about `nbytes` bytes."""
    assert spec.coding is not None
    for matrix, rows in _pieces(spec, sources, read, nbytes):
        yield matrix.numbers(rows, spec.dtype)


def recoded(
    spec: TensorSpec, sources: Sequence[SourceTensor], read: Read, nbytes: int
) -> Iterator[Quantized]:
    """The weight in a format of MLX's with the codes and scales that it has.

    Scales are repeated where they serve more than a group of the format; biases of affine formats
    are zero points times scales, rounded to `spec.dtype`. Raises BadWeights for columns in an order
    of their own.
    """
    assert spec.format is not None
    assert spec.coding is not None
    if spec.coding.layout == GGML:
        yield from _from_blocks(spec, sources, read, nbytes)
        return
    for matrix, rows in _pieces(spec, sources, read, nbytes):
        if not spec.format.has_bias:
            yield _as_mxfp8(rows, spec.format.group_size)
            continue
        matrix.check_order(spec.name)
        codes, zero = rows.codes, rows.zero
        assert zero is not None
        scales = np.broadcast_to(rows.scale, (codes.shape[0], rows.scale.shape[1]))
        product = -(to_float32(_bytes(scales), rows.scale_dtype).reshape(scales.shape) * zero)
        biases = from_float32(np.ascontiguousarray(product, np.float32), spec.dtype)
        groups = codes.shape[1] // spec.format.group_size
        times = groups // scales.shape[1]
        yield Quantized(
            pack(codes, spec.format.bits).data,
            _bytes(np.repeat(scales, times, axis=1)).data,
            _bytes(np.repeat(biases.view(scales.dtype).reshape(product.shape), times, axis=1)).data,
        )


def _as_mxfp8(rows: Rows, group_size: int) -> Quantized:
    """FP8 codes with a power of two for each of their groups."""
    groups = np.arange(rows.codes.shape[1] // group_size) * group_size
    serving = groups // rows.group if rows.group else np.zeros_like(groups)
    scales = np.broadcast_to(rows.scale, (rows.codes.shape[0], rows.scale.shape[1]))
    return Quantized(_bytes(rows.codes).data, _bytes(scales[:, serving]).data, None)


def _from_blocks(
    spec: TensorSpec, sources: Sequence[SourceTensor], read: Read, nbytes: int
) -> Iterator[Quantized]:
    """Rows of a GGUF file's blocks, which have codes and scales side by side."""
    assert spec.format is not None
    assert spec.coding is not None
    fmt, columns = spec.format, spec.shape[-1]
    at_once = max(1, nbytes // (columns * DTYPE_BYTES[spec.dtype]))
    for source in sources:
        row_bytes = source.shape[-1]
        blocks = columns // EXACT[spec.coding.element].elements
        raw = np.empty(min(at_once * row_bytes, source.nbytes), np.uint8)
        for start in range(0, source.nbytes, raw.size):
            part = raw[: source.nbytes - start]
            read(source, start, part.data)
            found = split(spec.coding.element, part.reshape(-1, row_bytes // blocks))
            codes = found.codes.reshape(-1, columns)
            times = codes.size // fmt.group_size // found.scales.size
            scales, biases = (
                None if values is None else _bytes(np.repeat(values, times)).data
                for values in (found.scales, found.biases)
            )
            assert scales is not None
            yield Quantized(pack(codes, fmt.bits).data, scales, biases)


def held_bytes(spec: TensorSpec, tensors: Mapping[str, SourceTensor]) -> int:
    """Bytes that reading this weight holds besides pieces, at most: what it reads whole."""
    coding = spec.coding
    assert coding is not None
    (rows, columns), members = spec.shape[-2:], len(spec.sources) // len(coding.roles)
    matrices = max(1, math.prod(spec.shape[:-2]))  # a stack may be empty
    part = {role: tensors[spec.sources[i * members]] for i, role in enumerate(coding.roles)}
    held = 0
    if coding.layout in TRANSPOSED:  # and scales are turned around
        held += (part[CODES].nbytes + 2 * part[SCALE].nbytes) * members // matrices
    if ZERO in part:  # a byte, then 32-bit integers, with an offset, and masked
        held += 13 * rows * (-(-columns // coding.block[1]) if coding.block[1] else 1)
    # one matrix stays until the next one is there
    return held if matrices == 1 else 2 * held


def _pieces(
    spec: TensorSpec, sources: Sequence[SourceTensor], read: Read, nbytes: int
) -> Iterator[tuple[_Matrix, Rows]]:
    coding = spec.coding
    assert coding is not None
    rows, columns = spec.shape[-2:]
    members = len(sources) // len(coding.roles)
    leading = math.prod(spec.shape[:-2]) // members
    step = _ROW_STEP.get(coding.layout, 1)
    at_once = max(step, nbytes // max(1, columns * DTYPE_BYTES[spec.dtype]) // step * step)
    for member in range(members):
        parts = {role: sources[i * members + member] for i, role in enumerate(coding.roles)}
        for index in range(leading):
            matrix = _Matrix(coding, parts, (rows, columns), (index, leading), read)
            for first in range(0, rows, at_once):
                yield matrix, matrix.rows(first, min(rows, first + at_once))


class _Matrix:
    """One matrix of a coded weight; `place` is its index among the matrices in its tensors."""

    def __init__(
        self,
        coding: Coding,
        parts: Mapping[str, SourceTensor],
        shape: tuple[int, int],
        place: tuple[int, int],
        read: Read,
    ) -> None:
        self.coding = coding
        self._parts = parts
        self._shape = shape
        self._place = place
        self._read = read
        self._codes = self._words(CODES) if coding.layout in TRANSPOSED else None
        self._scale = self._transposed_scale() if coding.layout in TRANSPOSED else None
        self._zero = self._zero_points() if ZERO in parts else None
        self._global = self._global_scale() if GLOBAL in parts else None
        self._columns = self._floats(COLUMNS) if COLUMNS in parts else None
        self._index = self._group_index() if INDEX in parts else None

    # -- rows ------------------------------------------------------------------------------------

    def rows(self, first: int, last: int) -> Rows:
        """Codes and parameters of rows `first` to `last`."""
        scale = self._per_row(SCALE, first, last)
        bias = self._per_row(BIAS, first, last) if BIAS in self._parts else None
        codes, zero = self._codes_of(first, last), self._zero_of(first, last)
        if self.coding.element == "int":
            half = 1 << (self.coding.bits - 1)
            codes = codes ^ np.uint8(half)
            zero = np.full((1, 1), half, np.int32) + (0 if zero is None else zero)
        dtype = self._parts[SCALE].dtype
        return Rows(codes, scale, dtype, zero, bias, self.coding.block[1])

    def numbers(self, rows: Rows, dtype: str) -> memoryview:
        """What the codes decode to: products in float32, rounded once to `dtype`."""
        coded = self._coded(rows)
        if self._columns is None:
            return _decoded(coded, dtype)
        values = np.frombuffer(_decoded(coded, "F32"), np.float32).reshape(rows.codes.shape)
        return rounded(values * self._columns, dtype)

    def _coded(self, rows: Rows) -> CodedRows:
        """The same rows, with the parameters of every group in float32."""
        zero, bias = rows.zero, rows.bias
        if bias is not None:
            bias = to_float32(_bytes(bias), rows.scale_dtype).reshape(bias.shape)
        parts: list[Array | None] = [self._scale_values(rows), zero, bias]
        if self._index is not None:  # columns of a group apart: a group for each column
            parts = [
                p if p is None or p.shape[1] == 1 else np.take(p, self._index, axis=1)
                for p in parts
            ]
        count, columns = rows.codes.shape
        groups = max(part.shape[1] for part in parts if part is not None)
        group = columns if groups == 1 else rows.group if self._index is None else 1
        scales, zeros, biases = (
            None if p is None else _bytes(np.broadcast_to(p, (count, groups)).astype("<f4")).data
            for p in parts
        )
        assert scales is not None
        element = "uint" if self.coding.element == "int" else self.coding.element
        codes = _bytes(rows.codes).data
        return CodedRows(element, columns, group, codes, scales, zeros, biases)

    def check_order(self, name: str) -> None:
        """Raise BadWeights where columns of a group do not follow one another."""
        if self._index is not None:
            raise BadWeights(
                f"tensor {name!r}: {self._parts[INDEX].name!r} orders columns by activation, which "
                "config.json (desc_act false) denies",
                hint="--requantize decodes the weights, in whatever order they are",
            )

    def _scale_values(self, rows: Rows) -> Floats:
        """Scales as numbers, a global one taken in."""
        if rows.scale_dtype in {"F8_E4M3", "F8_E4M3FN"}:
            scale = E4M3[rows.scale]
        elif rows.scale_dtype in {"U8", "F8_E8M0"}:
            e4m3 = self.coding.element == "e2m1" and self.coding.block[1] == 16
            scale = E4M3[rows.scale] if e4m3 else _e8m0(rows.scale)
        else:
            scale = to_float32(_bytes(rows.scale), rows.scale_dtype).reshape(rows.scale.shape)
        if self._global is None:
            return scale
        if self.coding.global_scale == DIVIDES:
            return scale / self._global
        return scale * self._global

    @property
    def _groups(self) -> int:
        """Groups of a row; AWQ's gemv fills rows of scales up with zeros."""
        return -(-self._shape[1] // self.coding.block[1])

    # -- codes -----------------------------------------------------------------------------------

    def _codes_of(self, first: int, last: int) -> npt.NDArray[np.uint8]:
        layout, bits, columns = self.coding.layout, self.coding.bits, self._shape[1]
        count = last - first
        if layout == "gptq":
            assert self._codes is not None
            down = np.ascontiguousarray(self._codes[:, first:last].T)
            return unpack(down.view(np.uint8), bits, columns)
        if layout == "awq":
            assert self._codes is not None
            return _awq(self._codes[:, first // 8 : last // 8])
        if layout == "nibble_rows":
            both = self._raw_rows(CODES, first // 2, -(-last // 2), self._shape[0] // 2)
            return np.stack([both & 15, both >> 4], axis=1).reshape(count, columns)
        return self._row_codes(self._raw_rows(CODES, first, last, self._shape[0]), columns)

    def _row_codes(self, raw: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.uint8]:
        """Codes that follow one another in each row of bytes."""
        if self.coding.layout == "words":
            return unpack_words(raw.view("<u4"), self.coding.bits, count)
        return unpack(raw, self.coding.bits, count)

    # -- parts -----------------------------------------------------------------------------------

    def _per_row(self, role: str, first: int, last: int) -> Array:
        """Scales or biases of these rows, in their own dtype, one for each group."""
        if self._scale is not None:
            return self._scale[first:last]
        part, (height, _) = self._parts[role], self.coding.block
        kind = np.dtype(f"<u{DTYPE_BYTES[part.dtype]}")
        if height == 0:
            return self._whole(role).view(kind).reshape(1, -1)
        stored = -(-self._shape[0] // height)
        raw = self._raw_rows(role, first // height, -(-last // height), stored).view(kind)
        if height == 1:
            return raw[:, : self._groups] if self.coding.layout == "gemv" else raw
        return raw[np.arange(first, last) // height - first // height]

    def _transposed_scale(self) -> Array:
        part = self._parts[SCALE]
        kind = np.dtype(f"<u{DTYPE_BYTES[part.dtype]}")
        return np.ascontiguousarray(self._whole(SCALE).view(kind).reshape(part.shape).T)

    def _zero_of(self, first: int, last: int) -> npt.NDArray[np.int32] | None:
        if self._zero is not None:
            return self._zero if self._zero.shape[0] == 1 else self._zero[first:last]
        if self.coding.element != "uint" or BIAS in self._parts:
            return None
        return np.full((1, 1), self.coding.zero, np.int32)

    def _zero_points(self) -> npt.NDArray[np.int32]:
        """All zero points, [rows, groups]; one row where they are the same for all."""
        coding, part, rows = self.coding, self._parts[ZERO], self._shape[0]
        if part.dtype == "I8":
            signed = self._whole(ZERO).view(np.int8).astype(np.int32)
            signed = signed.reshape(1 if part.elements == 1 else rows, -1)
            return signed + coding.zero if coding.element == "uint" else signed
        words = self._words(ZERO)
        found: npt.NDArray[np.int32]
        if coding.layout == "gptq":
            found = unpack(words.view(np.uint8), coding.bits, rows).T.astype(np.int32)
        elif coding.layout == "awq":
            found = _awq(words).astype(np.int32)
        elif coding.layout == "gemv":
            found = unpack(words.view(np.uint8), coding.bits, self._groups).astype(np.int32)
        else:  # down the columns, in the layout of the codes
            down = np.ascontiguousarray(words.T).view(np.uint8)
            found = self._row_codes(down, rows).T.astype(np.int32)
        return (found + coding.zero_offset) & ((1 << coding.bits) - 1)

    def _global_scale(self) -> np.float32:
        found = self._whole(GLOBAL).view("<f4")
        value = np.float32(found[self._place[0] if found.size > 1 else 0])
        return value / np.float32(MAX_SCALE) if self.coding.global_scale == MLX_GLOBAL else value

    def _group_index(self) -> npt.NDArray[np.int32] | None:
        """The group of each column; None where the columns of a group follow one another."""
        index = self._whole(INDEX).view(np.int32)
        usual = np.arange(index.size) // self.coding.block[1]
        if (index == -1).all() or np.array_equal(index, usual):
            return None
        scale = self._parts[SCALE].shape
        groups = scale[0] if self.coding.layout in TRANSPOSED else scale[-1]
        if index.min() < 0 or index.max() >= groups:
            raise BadWeights(
                f"{self._parts[INDEX].name!r} names groups other than 0 to {groups - 1}"
            )
        return index

    def _words(self, role: str) -> npt.NDArray[np.uint32]:
        return self._whole(role).view("<u4").reshape(self._parts[role].shape)

    def _floats(self, role: str) -> Floats:
        return to_float32(self._whole(role), self._parts[role].dtype)

    def _whole(self, role: str) -> npt.NDArray[np.uint8]:
        """The bytes of a part: this matrix's share where the tensor has one for each."""
        part, (index, leading) = self._parts[role], self._place
        shared = role in {GLOBAL, COLUMNS, INDEX} or part.elements % leading or (part.elements == 1)
        nbytes = part.nbytes if shared else part.nbytes // leading
        return self._bytes_at(part, 0 if shared else index * nbytes, nbytes)

    def _raw_rows(self, role: str, first: int, last: int, rows: int) -> npt.NDArray[np.uint8]:
        """Stored rows `first` to `last` of a part that has `rows` in each matrix."""
        part, (index, leading) = self._parts[role], self._place
        nbytes = part.nbytes // (rows * leading)
        start = (index * rows + first) * nbytes
        return self._bytes_at(part, start, (last - first) * nbytes).reshape(last - first, nbytes)

    def _bytes_at(self, part: SourceTensor, start: int, nbytes: int) -> npt.NDArray[np.uint8]:
        found = np.empty(nbytes, np.uint8)
        self._read(part, start, found.data)
        return found


def _decoded(rows: CodedRows, dtype: str) -> memoryview:
    found = kernels.decode(rows, dtype)
    return decode(rows, dtype) if found is None else found


# -- packing ---------------------------------------------------------------------------------------


def _codes_of_bytes(bits: int) -> Array:
    """For each byte its codes, as one element that is copied at once."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (np.arange(256, dtype=np.uint8)[:, None] >> shifts) & np.uint8((1 << bits) - 1)
    found: npt.NDArray[Any] = codes.view(f"<u{len(shifts)}").reshape(-1)
    return found


_CODES_OF_BYTES = {bits: _codes_of_bytes(bits) for bits in (2, 4)}


def unpack(raw: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """Codes of each row of bytes: a stream of bits, the lowest first. [rows, count]"""
    if bits == 8:
        return raw[:, :count]
    if bits in _CODES_OF_BYTES:
        found: Array = np.take(_CODES_OF_BYTES[bits], raw).view(np.uint8)
        return found.reshape(raw.shape[0], -1)[:, :count]
    stream = np.unpackbits(raw, axis=1, count=count * bits, bitorder="little")
    codes = stream.reshape(raw.shape[0], count, bits)
    packed: npt.NDArray[np.uint8] = np.packbits(codes, axis=-1, bitorder="little")
    return packed.reshape(raw.shape[0], count)


def unpack_words(words: npt.NDArray[np.uint32], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """Codes of rows of 32-bit words that hold whole codes, the lowest first. [rows, count]"""
    if 32 % bits == 0:
        return unpack(np.ascontiguousarray(words).view(np.uint8), bits, count)
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    codes = (words[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    found: npt.NDArray[np.uint8] = codes.astype(np.uint8).reshape(words.shape[0], -1)
    return found[:, :count]


def pack(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Rows of codes as MLX has them: a stream of bits, the lowest first. One dimension."""
    if bits == 8:
        return np.ascontiguousarray(codes).reshape(-1)
    if bits == 4:
        pairs: Array = np.ascontiguousarray(codes).view("<u2")
        joined: npt.NDArray[np.uint8] = (pairs | (pairs >> 4)).astype(np.uint8)
        return joined.reshape(-1)
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    words = np.packbits(stream.reshape(codes.shape[0], -1), axis=1, bitorder="little")
    return _bytes(words)


def _awq(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint8]:
    """Codes of AWQ's words, [inputs or groups, eights of outputs], by output. [outputs, inputs]"""
    across = np.ascontiguousarray(words.T)
    found = np.empty((across.shape[0], 8, across.shape[1]), np.uint8)
    for place, output in enumerate(_AWQ_ORDER):
        found[:, output] = (across >> np.uint32(4 * place)) & np.uint32(15)
    return found.reshape(-1, across.shape[1])


def _e8m0(codes: Array) -> Floats:
    """Powers of two; 255 is not a number."""
    found = np.ldexp(np.float32(1), codes.astype(np.int32) - 127)
    return np.where(codes == 255, np.float32(np.nan), found).astype(np.float32)


def _bytes(array: Array) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
