"""Importance matrices of llama.cpp: both forms, files that lie, and names of checkpoints."""

from __future__ import annotations

import hashlib
import struct
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ggufs
from imatrices import Entry, dat_imatrix, dat_name, entry, write_gguf_imatrix
from quantmill.digests import digest_of
from quantmill.errors import BadSource
from quantmill.ggufnames import ARCHITECTURES, module_names
from quantmill.ggufsource import open_gguf
from quantmill.imatrix import Imatrix, moments_for, parse_imatrix, read_imatrix
from quantmill.source import MODEL, Part, Source, SourceTensor, joined

PLAIN = {"blk.0.attn_q.weight": entry(64), "blk.1.ffn_down.weight": entry(96, seed=1)}
EXPERTS = {"blk.0.ffn_gate_exps.weight": entry(32, (40, 0, 600))}


def read(data: bytes) -> Imatrix:
    return parse_imatrix(lambda at, n: data[at : at + n], len(data), "x", digest_of(data))


def source(kind: str, shapes: Mapping[str, tuple[int, ...]], **more: Any) -> Source:
    tensors = {name: SourceTensor(name, "BF16", shape) for name, shape in sorted(shapes.items())}
    return Source({"model_type": kind, **more}, tensors)


# -- reading ---------------------------------------------------------------------------------------


def test_the_gguf_form_is_read(tmp_path: Path) -> None:
    """Means of every entry, tokens of every expert, and what the file says of itself."""
    path = write_gguf_imatrix(tmp_path / "m.gguf", PLAIN | EXPERTS, datasets=("a", "b"))
    found = read_imatrix(path)
    assert set(found.entries) == {*PLAIN, *EXPERTS}
    for name, expected in PLAIN.items():
        assert np.array_equal(found.entries[name].values, expected.means[0])
        assert found.entries[name].values.dtype == np.float32
        assert found.entries[name].tokens.shape == ()
        assert found.entries[name].tokens == 640
    stack = found.entries["blk.0.ffn_gate_exps.weight"]
    assert np.array_equal(stack.values, EXPERTS["blk.0.ffn_gate_exps.weight"].means)
    assert not stack.values[1].any()
    assert stack.tokens.tolist() == [40, 0, 600]
    assert stack.tokens.dtype == np.int64
    assert (found.datasets, found.chunks, found.chunk_size) == (("a", "b"), 3, 512)
    assert found.digest.hex == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (found.file, found.counts_calls) == ("m.gguf", False)


def test_the_older_form_is_read(tmp_path: Path) -> None:
    """Calls are divided out; experts lie one behind the other."""
    path = tmp_path / "imatrix.dat"
    path.write_bytes(dat_imatrix(PLAIN | EXPERTS))
    found = read_imatrix(path)
    assert set(found.entries) == {*PLAIN, *EXPERTS}
    for name, expected in PLAIN.items():
        assert np.allclose(found.entries[name].values, expected.means[0], rtol=1e-6)
        assert found.entries[name].tokens == 2
    assert found.entries["blk.0.ffn_gate_exps.weight"].values.shape == (96,)
    assert (found.datasets, found.chunks, found.chunk_size) == (("wiki.train.raw",), 3, None)
    assert found.counts_calls


@pytest.mark.parametrize(
    ("trailer", "chunks", "datasets"),
    [
        (b"", None, ()),
        (struct.pack("<i", 7), 7, ()),
        (struct.pack("<ii", 7, 0), 7, ()),
        (struct.pack("<i", 7) + b"\4\0\0\0t\xe9xt", 7, ("t\ufffdxt",)),
    ],
)
def test_the_older_form_may_end_early(
    trailer: bytes, chunks: int | None, datasets: tuple[str, ...]
) -> None:
    """The oldest files end after the entries, later ones with the last call or a text's name."""
    found = read(dat_imatrix(PLAIN, trailer=trailer))
    assert (found.chunks, found.datasets) == (chunks, datasets)


def test_entries_of_no_calls_have_no_tokens() -> None:
    """Old versions rounded calls down to 0 and multiplied by that; such an entry says nothing."""
    data = struct.pack("<i", 1) + dat_name("blk.0.attn_q.weight") + struct.pack("<ii", 0, 2)
    found = read(data + bytes(8)).entries["blk.0.attn_q.weight"]
    assert found.tokens == 0
    assert found.values.tolist() == [0, 0]


COUNTS = st.lists(st.integers(0, 2**24), min_size=1, max_size=4).filter(any)
SIZES = st.tuples(st.integers(1, 40), COUNTS)


@given(st.dictionaries(st.text("abz.019é", min_size=1, max_size=20), SIZES, min_size=1))
def test_whatever_is_written_in_the_older_form_is_read(
    sizes: dict[str, tuple[int, list[int]]],
) -> None:
    """Any names, sizes and counts come back, and a file cut anywhere is an error."""
    entries = {name: entry(n, counts) for name, (n, counts) in sizes.items()}
    data = dat_imatrix(entries)
    found = read(data)
    assert list(found.entries) == sorted(entries)
    for name, kept in entries.items():
        got = found.entries[name].values.reshape(kept.sums.shape)
        seen = np.asarray(kept.counts) > 0
        assert np.allclose(got[seen], kept.means[seen], rtol=1e-5)
        assert np.allclose(got[~seen], 1)
    body = len(data) - 8 - len("wiki.train.raw")
    for cut in range(0, body, max(1, body // 40)):
        with pytest.raises(BadSource):
            read(data[:cut])


@given(st.binary(max_size=200), st.booleans())
def test_noise_is_an_error_by_name(noise: bytes, entries: bool) -> None:
    """Bytes that are no importance matrix end in BadSource that names the file."""
    data = struct.pack("<i", 1) + noise if entries else noise
    message = "x: "
    try:
        read(data)
    except BadSource as error:
        message = error.message
    assert message.startswith("x: ")


def dat(name: bytes, calls: int, count: int, values: bytes) -> bytes:
    head = struct.pack("<ii", 1, len(name)) + name
    return head + struct.pack("<ii", calls, count) + values


def floats(*values: float) -> bytes:
    return np.asarray(values, "<f4").tobytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "number of entries would take 4 bytes, and the file has 0"),
        (struct.pack("<i", 0) + bytes(100), "claims 0 entries"),
        (struct.pack("<i", -1) + bytes(100), "claims -1 entries"),
        (struct.pack("<i", 2**31 - 1) + bytes(100), "claims 2147483647 entries"),
        (struct.pack("<ii", 1, 2**30) + bytes(100), "name of 1073741824 bytes"),
        (struct.pack("<ii", 1, -5) + bytes(100), "name of -5 bytes"),
        (struct.pack("<ii", 1, 0) + bytes(100), "name of 0 bytes"),
        (dat(b"\xff", 1, 1, floats(1)), "entry 1: invalid UTF-8"),
        (dat(b"a", -1, 1, floats(1)), "'a': -1 is no count of calls"),
        (dat(b"a", 1, 0, floats(1)), "'a' claims 0 values"),
        (dat(b"a", 1, -4, floats(1)), "'a' claims -4 values"),
        (dat(b"a", 1, 2**31 - 1, floats(1)), "'a' would take 8589934588 bytes"),
        (dat(b"a", 1, 2, floats(1)), "'a' would take 8 bytes, and the file has 4"),
        (dat(b"a", 1, 2, floats(1, np.nan)), "'a': nan is no sum of squares"),
        (dat(b"a", 1, 2, floats(1, np.inf)), "'a': inf is no sum of squares"),
        (dat(b"a", 1, 2, floats(1, -2)), "'a': -2.0 is no sum of squares"),
        (dat(b"a", 0, 2, floats(1, 2)), "'a' has sums of 0 tokens"),
        (dat(b"a", 1, 1, floats(1)) + struct.pack("<i", -1), "last call is -1"),
        (dat(b"a", 1, 1, floats(1)) + b"12", "last call would take 4 bytes"),
        (dat(b"a", 1, 1, floats(1)) + struct.pack("<ii", 1, 9), "name would take 9 bytes"),
        (dat(b"a", 1, 1, floats(1)) + struct.pack("<ii", 1, -9), "name would take -9 bytes"),
        (dat(b"a", 1, 1, floats(1)) + struct.pack("<iix", 1, 0), "1 bytes follow its end"),
    ],
)
def test_older_files_that_lie_are_refused(data: bytes, message: str) -> None:
    """Every number is believed as far as the file has bytes for it; the error names the entry."""
    tracemalloc.start()
    try:
        with pytest.raises(BadSource, match=message) as raised:
            read(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert raised.value.message.startswith("x: ")
    assert raised.value.kind == "bad_imatrix"
    assert peak < 2**20


def test_an_entry_that_appears_twice_is_refused() -> None:
    """Which of the two would count is nobody's guess."""
    one = dat(b"a", 1, 1, floats(1))[4:]
    with pytest.raises(BadSource, match="entry 'a' appears twice"):
        read(struct.pack("<i", 2) + one + one)


BAD_GGUF: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"kind": "model"}, "is no importance matrix: its general.type is 'model'"),
    "none": ({"kind": None}, "is no importance matrix: its general.type is None"),
    "empty": ({"entries": {}}, "has no entries"),
    "counts alone": (
        {"more": {"b.counts": np.ones(1, np.float32)}}, "entry 'b' has no in_sum2",
    ),
    "sums alone": ({"more": {"b.in_sum2": np.ones(4, np.float32)}}, "entry 'b' has no counts"),
    "type": (
        {"more": {"b.in_sum2": np.ones(4, np.float16), "b.counts": np.ones(1, np.float32)}},
        "entry 'b': in_sum2 is F16",
    ),
    "uneven": (
        {"more": {"b.in_sum2": np.ones(4, np.float32), "b.counts": np.ones(3, np.float32)}},
        r"entry 'b': sums \[4\] do not go with 3 counts",
    ),
    "half": ({"entries": {"b": Entry(np.ones((1, 4), np.float32), (0.5,))}}, "'b': 0.5 is no"),
    "negative": ({"entries": {"b": Entry(np.ones((1, 4), np.float32), (-1,))}}, "'b': -1.0 is no"),
    "nan count": (
        {"entries": {"b": Entry(np.ones((1, 4), np.float32), (float("nan"),))}}, "'b': nan is no",
    ),
    "large": ({"entries": {"b": Entry(np.ones((1, 4), np.float32), (1e30,))}}, "is no count"),
    "nan sum": (
        {"entries": {"b": Entry(np.full((1, 4), np.nan, np.float32), (1,))}}, "nan is no sum",
    ),
    "minus": ({"entries": {"b": Entry(np.full((1, 4), -1, np.float32), (1,))}}, "-1.0 is no sum"),
    "of none": (
        {"entries": {"b": Entry(np.ones((2, 4), np.float32), (0, 1))}}, "'b' has sums of 0 tokens",
    ),
    "datasets": ({"datasets": (), "keys": {"imatrix.datasets": "a"}}, "no list of texts"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(BAD_GGUF))
def test_gguf_files_that_lie_are_refused(case: str, tmp_path: Path) -> None:
    """Pairs that do not fit, counts and sums that are none; the error names file and entry."""
    settings, message = BAD_GGUF[case]
    path = write_gguf_imatrix(tmp_path / "m.gguf", **{"entries": PLAIN, **settings})
    with pytest.raises(BadSource, match=message) as raised:
        read_imatrix(path)
    assert raised.value.message.startswith("m.gguf: ")


def test_tensors_on_the_same_bytes_cannot_fill_memory(tmp_path: Path) -> None:
    """Entries that all claim the same large part of the file are refused before they are read."""
    more = {"pad": np.ones(4000, np.float32)}
    path = write_gguf_imatrix(
        tmp_path / "m.gguf", {f"b{n}": entry(500) for n in range(4)}, more=more
    )
    data = bytearray(path.read_bytes())
    for n in range(4):  # in the directory: name, dimensions, their sizes, type, start
        at = data.index(f"b{n}.in_sum2".encode()) + len(f"b{n}.in_sum2") + 4
        data[at : at + 8] = struct.pack("<Q", 4000)
        data[at + 12 : at + 20] = bytes(8)
    with pytest.raises(BadSource, match="larger together than the file"):
        read(bytes(data))


@pytest.mark.parametrize("cut", [0, 3, 4, 30, 200, -1])
def test_a_gguf_file_that_ends_early_is_refused(cut: int, tmp_path: Path) -> None:
    """Cut in the magic, in the header, in the data."""
    path = write_gguf_imatrix(tmp_path / "m.gguf", PLAIN)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(BadSource, match=r"^m.gguf: "):
        read_imatrix(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A path that is not there, and a directory."""
    with pytest.raises(BadSource, match="No such file"):
        read_imatrix(tmp_path / "absent")
    with pytest.raises(BadSource, match="not a regular file"):
        read_imatrix(tmp_path)


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_every_matrix_of_every_architecture_has_its_entry(arch: str, tmp_path: Path) -> None:
    """What a GGUF file calls a matrix is found under the name that the checkpoint has for it."""
    row, experts = ARCHITECTURES[arch], 3
    shapes: dict[str, tuple[int, ...]] = {}
    entries: dict[str, Entry] = {}
    expected: dict[str, tuple[Any, Any]] = {}
    matrices = {
        theirs: ours
        for theirs, ours in module_names(arch, 2).items()
        if not ours.endswith(("norm", "sinks", "embed_tokens"))
    }
    for seed, (theirs, ours) in enumerate(matrices.items()):
        columns = 8 + seed
        many = ".experts." in ours
        kept = entry(columns, (5, 6, 7) if many else (640,), seed)
        entries[f"{theirs}.weight"] = kept
        if many and not row.stacked:
            for n in range(experts):
                name = ours.replace(".experts.", f".experts.{n}.") + ".weight"
                shapes[name], expected[name] = (4, columns), (kept.means[n], kept.counts[n])
        elif many:
            shapes[f"{ours}.weight"] = experts, 4, columns
            expected[f"{ours}.weight"] = kept.means, kept.counts
        else:
            shapes[f"{ours}.weight"] = 4, columns
            expected[f"{ours}.weight"] = kept.means[0], kept.counts[0]
    imatrix = read_imatrix(write_gguf_imatrix(tmp_path / "m.gguf", entries))
    matched = moments_for(imatrix, source(row.model_type, shapes))
    assert matched.unused == ()
    assert set(matched.moments) == set(shapes)
    for name, (means, tokens) in expected.items():
        assert np.array_equal(matched.moments[name].values, means)
        assert np.array_equal(matched.moments[name].tokens, tokens)


@pytest.mark.parametrize("older", [False, True])
def test_mixtral_is_a_llama_with_experts(older: bool, tmp_path: Path) -> None:
    """Its experts have names of their own, and in the older form lie one behind the other."""
    entries = {
        "blk.0.ffn_gate_exps.weight": entry(8, (5, 0, 7)),
        "blk.0.ffn_down_exps.weight": entry(6, (5, 0, 7)),
        "blk.0.ffn_gate_inp.weight": entry(8),
    }
    path = write_gguf_imatrix(tmp_path / "m.gguf", entries)
    if older:
        path.write_bytes(dat_imatrix(entries))
    start = "model.layers.0.block_sparse_moe."
    shapes = {f"{start}experts.{n}.w{k}.weight": (4, 6 if k == 2 else 8)
              for n in range(3) for k in (1, 2)}  # fmt: skip
    shapes[f"{start}gate.weight"] = 3, 8
    found = moments_for(read_imatrix(path), source("mixtral", shapes)).moments
    absent = set() if older else {f"{start}experts.1.w{k}.weight" for k in (1, 2)}
    assert set(found) == set(shapes) - absent
    for number, k in (("gate", 1), ("down", 2)):
        means = entries[f"blk.0.ffn_{number}_exps.weight"].means
        for n in (0, 2):
            got = found[f"{start}experts.{n}.w{k}.weight"]
            assert np.allclose(got.values, means[n], rtol=1e-6)
            assert got.tokens.shape == ()
            assert got.tokens == (1 if older else (5, 0, 7)[n])


@pytest.mark.parametrize("older", [False, True])
def test_stacks_have_values_for_every_expert(older: bool, tmp_path: Path) -> None:
    """One that saw no token is zeros; the older form does not tell, and has ones."""
    name = "model.layers.0.mlp.experts.gate_proj.weight"
    path = write_gguf_imatrix(tmp_path / "m.gguf", EXPERTS)
    if older:
        path.write_bytes(dat_imatrix(EXPERTS))
    found = moments_for(read_imatrix(path), source("qwen3_moe", {name: (3, 4, 32)})).moments[name]
    assert found.values.shape == (3, 32)
    assert found.values[1].tolist() == [float(older)] * 32
    assert found.tokens.tolist() == ([2, 2, 2] if older else [40, 0, 600])


def test_entries_without_a_counterpart_are_listed(tmp_path: Path) -> None:
    """Layers for further tokens, say, that the checkpoint lacks."""
    entries = PLAIN | {"blk.7.attn_q.weight": entry(64), "nonsense": entry(3)}
    imatrix = read_imatrix(write_gguf_imatrix(tmp_path / "m.gguf", entries))
    shapes = {"model.layers.0.self_attn.q_proj.weight": (64, 64)}
    matched = moments_for(imatrix, source("qwen2", shapes))
    assert matched.unused == ("blk.1.ffn_down.weight", "blk.7.attn_q.weight", "nonsense")


@pytest.mark.parametrize("head", ["output.weight", "token_embd.weight"])
def test_a_tied_embedding_has_what_was_measured_of_the_head(head: str, tmp_path: Path) -> None:
    """Files name it either way; an embedding that is no head is multiplied with nothing."""
    imatrix = read_imatrix(write_gguf_imatrix(tmp_path / "m.gguf", {head: entry(8)} | PLAIN))
    shapes = {
        "model.embed_tokens.weight": (16, 8),
        "model.layers.0.self_attn.q_proj.weight": (4, 64),
    }
    tied = moments_for(imatrix, source("llama", shapes))
    assert "model.embed_tokens.weight" in tied.moments
    untied = moments_for(imatrix, source("llama", shapes | {"lm_head.weight": (16, 8)}))
    assert "model.embed_tokens.weight" not in untied.moments
    assert ("lm_head.weight" in untied.moments) == (head == "output.weight")
    assert (head in untied.unused) == (head != "output.weight")


@pytest.mark.parametrize("start", ["", "model.", "language_model.model.", "model.language_model."])
def test_names_may_lie_deeper(start: str, tmp_path: Path) -> None:
    """Text models within others, whose type the text config says; towers beside are not meant."""
    imatrix = read_imatrix(write_gguf_imatrix(tmp_path / "m.gguf", PLAIN))
    name = f"{start}layers.0.self_attn.q_proj.weight"
    shapes = {name: (4, 64), "vision_tower.encoder.layers.0.self_attn.q_proj.weight": (4, 32)}
    text = {"model_type": "gemma3_text"}
    found = moments_for(imatrix, source("gemma3", shapes, text_config=text))
    assert set(found.moments) == {name}


def test_a_draft_model_beside_has_none(tmp_path: Path) -> None:
    """The file is of the model; names have the folder of its part."""
    imatrix = read_imatrix(write_gguf_imatrix(tmp_path / "m.gguf", PLAIN))
    name = "model.layers.0.self_attn.q_proj.weight"
    parts = [
        Part("m", MODEL, source("qwen3", {name: (4, 64)}), folder="a/"),
        Part("d", "draft", source("qwen3", {name: (4, 16)}), "draft.", "b/"),
    ]
    assert set(moments_for(imatrix, joined(parts, {})).moments) == {f"a/{name}"}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"model.layers.0.self_attn.q_proj.weight": (64, 128)},
         "entry 'blk.0.attn_q.weight' has 64 columns, tensor "
         "'model.layers.0.self_attn.q_proj.weight' 128"),
        ({"model.layers.0.mlp.experts.gate_proj.weight": (4, 4, 32)},
         "'blk.0.ffn_gate_exps.weight' has 3 experts, the source 4 experts"),
        ({f"model.layers.0.mlp.experts.{n}.gate_proj.weight": (4, 32) for n in (0, 4)},
         "has 3 experts, the source 5 experts"),
        ({"model.layers.0.mlp.experts.0.down_proj.weight": (4, 32)}, "not one of its"),
        ({"lm_head.weight": (4, 4)}, "not one of its 3 entries is in the source"),
    ],
)  # fmt: skip
def test_a_file_of_another_model_is_refused(
    shapes: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    """Columns and experts that are not as many name the entry, the tensor and both numbers."""
    imatrix = read_imatrix(write_gguf_imatrix(tmp_path / "m.gguf", PLAIN | EXPERTS))
    with pytest.raises(BadSource, match=message) as raised:
        moments_for(imatrix, source("qwen3_moe", shapes))
    assert raised.value.message.startswith("m.gguf: ")
    assert raised.value.hint == "the importance matrix is of another model"


def test_older_experts_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    """96 values are those of 3 experts, not of 5; of a matrix there are not as many columns."""
    data = read(dat_imatrix(EXPERTS))
    with pytest.raises(BadSource, match="has 96 values, the source 5 experts"):
        moments_for(data, source("qwen3_moe", {
            "model.layers.0.mlp.experts.gate_proj.weight": (5, 4, 32)}))  # fmt: skip


def test_architectures_without_gguf_names_are_refused(tmp_path: Path) -> None:
    """The error names the type and those that are understood."""
    imatrix = read_imatrix(write_gguf_imatrix(tmp_path / "m.gguf", PLAIN))
    with pytest.raises(BadSource, match="model of type 'bert'") as raised:
        moments_for(imatrix, source("bert", {}))
    assert "mixtral" in str(raised.value.hint)
    with pytest.raises(BadSource, match="model of type None"):
        moments_for(imatrix, Source({}, {}))


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_a_gguf_source_has_its_own_names_back(kind: str, tmp_path: Path) -> None:
    """Whether its codes are kept or it has numbers: columns are those of the numbers."""
    found = ggufs.model(ggufs.LLAMA)
    tokens = [f"t{n}" for n in range(ggufs.VOCAB)]
    more: dict[str, Any] = {"tokenizer.ggml.tokens": tokens, **ggufs.BYTES}
    tensors = ggufs.stored(found, kind, ggufs.convert_llama)
    path = ggufs.write_gguf(tmp_path / "m.gguf", "llama", tensors, **more)
    entries = {
        theirs: entry(values.shape[-1], seed=n)
        for n, (name, (theirs, values)) in enumerate(found.items())
        if name.endswith("_proj.weight")
    }
    imatrix = read_imatrix(write_gguf_imatrix(tmp_path / "imatrix.gguf", entries))
    with open_gguf(path) as opened:
        matched = moments_for(imatrix, opened.source)
    assert matched.unused == ()
    for name, (theirs, _) in found.items():
        if theirs in entries:
            assert np.array_equal(matched.moments[name].values, entries[theirs].means[0])
