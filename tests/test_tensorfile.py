"""Tensor files: the peers' vectors, files that lie, and what must hold for every header."""

from __future__ import annotations

import hashlib
import json
import math
import tracemalloc
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.numpy import load

from quantmill.classify import classify
from quantmill.errors import BadSource, BadTensorFile
from quantmill.formats import DTYPE_BYTES
from quantmill.tensorfile import (
    LENGTH_BYTES,
    MAX_HEADER,
    TensorFile,
    header_length,
    lay_out,
    parse_header,
)
from sources import source_of
from vectors import DATA, cases

MALFORMED = DATA / "malformed-files"
MALFORMED_CASES: dict[str, Any] = json.loads((MALFORMED / "CASES.json").read_text("utf-8"))


def parsed(data: bytes) -> TensorFile:
    """What a file of these bytes holds."""
    length = header_length(data[:LENGTH_BYTES], len(data), "a.safetensors")
    header = data[LENGTH_BYTES : LENGTH_BYTES + length]
    return parse_header(header, len(data), "a.safetensors")


def one_tensor(entry: str, data: bytes = b"") -> bytes:
    """A file whose only tensor is described by this JSON."""
    header = b'{"w":' + entry.encode() + b"}"
    return len(header).to_bytes(LENGTH_BYTES, "little") + header + data


# -- vectors ---------------------------------------------------------------------------------------


@cases("blob_io", "pack")
def test_files_equal_the_vectors(case: dict[str, Any]) -> None:
    """Tensors and metadata give the header and the digest that Ollama's writer gives."""
    given_input, expect = case["input"], case["expect"]
    tensors = [(t["name"], t["dtype"], tuple(t["shape"])) for t in given_input["list"]]
    head, _ = lay_out(tensors, given_input["metadata"] or {})
    data = head + b"".join(bytes.fromhex(t["data_hex"]) for t in given_input["list"])
    assert head[LENGTH_BYTES:].decode() == expect["header_text"].ljust(expect["header_len"])
    assert hashlib.sha256(data).hexdigest() == expect["sha256"]


@cases("blob_io", "unwrap")
def test_damaged_files_are_refused(case: dict[str, Any]) -> None:
    """A file that is cut short is refused for that reason."""
    with pytest.raises(BadTensorFile) as caught:
        parsed(bytes.fromhex(case["input"]["file_hex"]))
    assert caught.value.kind == case["expect"]["error"]["kind"]


# -- files that lie --------------------------------------------------------------------------------

# Well-formed headers: what is wrong with two of them shows elsewhere.
ACCEPTED = {
    "control_ok",
    "control_unaligned_header",
    "dtype_f8_e5m2",
    "name_traversal",
    "values_nan_inf",
    "zero_size_tensor",
}
# The others name the tensor at fault, where it is not the whole file.
AT_FAULT = {
    "dtype_missing": "model.norm.weight",
    "dtype_unknown": "model.norm.weight",
    "duplicate_tensor_key": "w",
    "offsets_hole": "model.norm.weight",
    "offsets_negative": "model.norm.weight",
    "offsets_overlap": "model.norm.weight",
    "offsets_past_end": "model.norm.weight",
    "offsets_reversed": "model.norm.weight",
    "shape_negative": "model.norm.weight",
    "shape_overflow": "model.norm.weight",
    "shape_size_mismatch": "model.norm.weight",
    "truncated_in_data": "model.norm.weight",
}


def malformed(name: str) -> bytes:
    return (MALFORMED / f"{name}.safetensors").read_bytes()


def test_every_malformed_file_has_a_case() -> None:
    """The files and the list of what is wrong with them belong together."""
    assert {path.stem for path in MALFORMED.glob("*.safetensors")} == MALFORMED_CASES.keys()


@pytest.mark.parametrize("name", sorted(ACCEPTED))
def test_honest_files_are_accepted(name: str) -> None:
    """A header that describes its file exactly is read as the official library reads it."""
    data = malformed(name)
    entries = parsed(data).entries.values()
    assert {e.name: (e.dtype, list(e.shape), data[e.start : e.end]) for e in entries} == {
        key: (t["dtype"], t["shape"], bytes(t["data"]))
        for key, t in deserialize(data)  # type: ignore[no-untyped-call]
    }


@pytest.mark.parametrize("name", sorted(MALFORMED_CASES.keys() - ACCEPTED))
def test_lying_files_are_refused(name: str) -> None:
    """A header that does not describe its file is refused, naming file and tensor at fault."""
    with pytest.raises(BadTensorFile) as caught:
        parsed(malformed(name))
    fault = repr(AT_FAULT[name]) if name in AT_FAULT else ""
    assert caught.value.message.startswith("a.safetensors: ")
    assert fault in caught.value.message


def test_fp8_of_the_unsupported_kind_is_refused_as_a_source() -> None:
    """E5M2 weights are a valid file and no valid source, and the tensor is named."""
    entries = parsed(malformed("dtype_f8_e5m2")).entries
    source = source_of({e.name: (e.dtype, e.shape) for e in entries.values()})
    with pytest.raises(BadSource, match=r"model\.layers\.0\.self_attn\.q_proj\.weight"):
        classify(source, None)


@pytest.mark.parametrize(
    "entry",
    [
        '{"dtype":"U8","shape":[true],"data_offsets":[0,1]}',
        '{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}',
        '{"dtype":"U8","shape":1,"data_offsets":[0,1]}',
        '{"dtype":"U8","shape":[1],"data_offsets":[0,1,1]}',
        '{"dtype":"U8","shape":[1],"data_offsets":null}',
        '{"dtype":["U8"],"shape":[1],"data_offsets":[0,1]}',
        '{"dtype":"U8","shape":[1],"data_offsets":[0,1],"dtype":"U8"}',
        "[]",
    ],
)
def test_entries_of_the_wrong_types_are_refused(entry: str) -> None:
    """Fields that are not exactly a dtype, a list of counts and two offsets are refused."""
    with pytest.raises(BadTensorFile):
        parsed(one_tensor(entry, b"\0"))


@pytest.mark.parametrize("name", ["", r"\ud800"])
def test_names_that_are_no_text_are_refused(name: str) -> None:
    """A tensor needs a name that a manifest can hold."""
    header = b'{"%s":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}' % name.encode()
    with pytest.raises(BadTensorFile, match="name"):
        parse_header(header, LENGTH_BYTES + len(header) + 1, "a.safetensors")


def test_null_metadata_is_no_metadata() -> None:
    """The null that MLX writes for empty metadata is read as none."""
    header = b'{"__metadata__":null}'
    assert parse_header(header, LENGTH_BYTES + len(header), "a.safetensors").metadata == {}


@pytest.mark.parametrize("name", ["header_len_2_63", "shape_overflow"])
def test_claimed_sizes_are_not_allocated(name: str) -> None:
    """A file that claims to be huge is refused without memory for what it claims."""
    data = malformed(name)
    tracemalloc.start()
    try:
        with pytest.raises(BadTensorFile):
            parsed(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize(("length", "reason"), [(0, "is 0"), (MAX_HEADER, "is the limit")])
def test_header_lengths_outside_the_limits_are_refused(length: int, reason: str) -> None:
    """A header of no bytes, or of as many as MLX refuses, is refused even if the file has them."""
    with pytest.raises(BadTensorFile, match=reason):
        header_length(length.to_bytes(LENGTH_BYTES, "little"), 2**40, "a.safetensors")


@pytest.mark.parametrize("length", [1, MAX_HEADER - 1])
def test_header_lengths_within_the_limits_are_accepted(length: int) -> None:
    """The limits themselves are exact, and a header may fill its file to the end."""
    prefix = length.to_bytes(LENGTH_BYTES, "little")
    assert header_length(prefix, LENGTH_BYTES + length, "a.safetensors") == length


def test_long_shapes_are_not_multiplied_out() -> None:
    """A million huge dimensions overflow at the second one, without a number of a million words."""
    entry = f'{{"dtype":"U8","shape":[{"9" * 18}{",9" * 1_000_000}],"data_offsets":[0,1]}}'
    with pytest.raises(BadTensorFile, match="overflows"):
        parsed(one_tensor(entry, b"\0"))


# -- properties ------------------------------------------------------------------------------------

NAMES = st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple)
TENSORS = st.lists(
    st.tuples(NAMES, st.sampled_from(sorted(DTYPE_BYTES)), SHAPES), unique_by=lambda t: t[0]
)
METADATA = st.dictionaries(
    st.text().filter(lambda key: key not in {"shape", "data_offsets"}), st.text()
)

Tensors = list[tuple[str, str, tuple[int, ...]]]


def size_of(tensors: Tensors) -> int:
    return sum(DTYPE_BYTES[dtype] * math.prod(shape) for _, dtype, shape in tensors)


@given(TENSORS, METADATA)
def test_what_is_laid_out_is_read_back(tensors: Tensors, metadata: dict[str, str]) -> None:
    """Reading a laid-out header gives the same entries, which follow one another in file order."""
    head, entries = lay_out(tensors, metadata)
    found = parse_header(head[LENGTH_BYTES:], len(head) + size_of(tensors), "a.safetensors")
    assert found.entries == entries
    assert found.metadata == metadata
    assert [(e.name, e.dtype, e.shape) for e in entries.values()] == tensors
    starts = [e.start for e in entries.values()]
    assert starts == [len(head) + size_of(tensors[:n]) for n in range(len(tensors))]


@given(TENSORS, METADATA)
def test_headers_are_padded_ascii(tensors: Tensors, metadata: dict[str, str]) -> None:
    """A header is ASCII, a multiple of 8 bytes, and its prefix gives its length."""
    head, _ = lay_out(tensors, metadata)
    assert head[LENGTH_BYTES:].isascii()
    assert len(head) % 8 == 0
    assert int.from_bytes(head[:LENGTH_BYTES], "little") == len(head) - LENGTH_BYTES


@given(TENSORS, METADATA)
def test_metadata_order_does_not_matter(tensors: Tensors, metadata: dict[str, str]) -> None:
    """Equal metadata gives equal bytes in whatever order it was filled."""
    other = dict(reversed(metadata.items()))
    assert lay_out(tensors, other)[0] == lay_out(tensors, metadata)[0]


@given(st.binary(), st.integers(0, 2**64))
def test_reading_any_bytes_raises_only_bad_tensor_file(header: bytes, size: int) -> None:
    """Whatever the header, the answer is a description or BadTensorFile."""
    with suppress(BadTensorFile):
        parse_header(header, size, "a.safetensors")


@given(TENSORS, METADATA, st.data())
def test_changed_headers_raise_only_bad_tensor_file(
    tensors: Tensors, metadata: dict[str, str], data: st.DataObject
) -> None:
    """A valid header with a few characters replaced is read or refused with BadTensorFile."""
    head, _ = lay_out(tensors, metadata)
    header = bytearray(head[LENGTH_BYTES:])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(header) - 1))
        header[at] = data.draw(st.sampled_from(b'0195-"{}[],:.eEtn\\ \xff'))
    with suppress(BadTensorFile):
        parse_header(bytes(header), len(head) + size_of(tensors), "a.safetensors")


@pytest.mark.parametrize("name", ["shape", "data_offsets"])
def test_metadata_that_breaks_ollama_is_refused(name: str) -> None:
    """The two keys that Ollama's extractor would take for a tensor's are never written."""
    with pytest.raises(ValueError, match=name):
        lay_out([], {name: "x"})


@pytest.mark.parametrize("names", [["a", "a"], [""], ["__metadata__"]])
def test_unusable_names_are_not_written(names: list[str]) -> None:
    """A name given twice, empty or reserved is refused before anything is laid out."""
    with pytest.raises(ValueError, match="empty, reserved or given twice"):
        lay_out([(name, "U8", (1,)) for name in names], {})


def test_names_are_escaped_as_ollama_does() -> None:
    """Characters that Ollama's writer escapes are escaped in names and metadata."""
    head, _ = lay_out([("<&>", "U8", (0,))], {"&": "<"})
    assert rb'"\u003c\u0026\u003e":{' in head
    assert rb'{"\u0026":"\u003c"}' in head


# -- second opinion --------------------------------------------------------------------------------


def test_the_official_library_reads_what_is_written() -> None:
    """The safetensors library gives back the arrays, in every dtype it shares with numpy."""
    kinds = {"F32": "<f4", "F16": "<f2", "U8": "u1", "I64": "<i8", "U32": "<u4", "BOOL": "?"}
    arrays = {
        f"t.{dtype}<&>é": np.arange(6).astype(kind).reshape(2, 3) for dtype, kind in kinds.items()
    }
    tensors = [(n, d, a.shape) for (n, a), d in zip(arrays.items(), kinds, strict=True)]
    head, _ = lay_out(tensors, {"quant_type": "int4"})
    found = load(head + b"".join(a.tobytes() for a in arrays.values()))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
