"""`diff`: every kind of difference is told, and equal things are equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints import SMALL, write_checkpoint
from quantmill.cli import run
from quantmill.creation import create
from quantmill.differences import diff
from quantmill.store import Store

NORM = "model.layers.0.input_layernorm.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"


def test_a_model_is_equal_to_itself_and_to_its_source(store: Store, source: Path) -> None:
    """The same blobs, and the same content in other files."""
    create("m", source, store=store)
    for other in ("m", source):
        found = diff("m", other, store=store)
        assert found.equal
        assert {one.changes for one in found.weights} == {()}


def test_formats_content_shapes_and_names_are_told(store: Store, tmp_path: Path) -> None:
    """Each weight says what became of it, and in which respects."""
    create("a", write_checkpoint(tmp_path / "a", SMALL), store=store, quantize="int8")
    tensors = dict(SMALL)
    del tensors["model.embed_tokens.weight"]
    tensors |= {NORM: ("BF16", (64,)), "z.weight": ("F32", (2, 2))}
    create("b", write_checkpoint(tmp_path / "b", tensors), store=store, quantize="int4")
    found = {one.name: one for one in diff("a", "b", store=store).weights}
    told = {name: (one.status, one.changes) for name, one in found.items()}
    assert told == {
        "model.embed_tokens.weight": ("removed", ()),
        NORM: ("changed", ("shape", "bytes", "content")),
        "model.layers.0.mlp.down_proj.weight": ("equal", ()),
        QUERY: ("changed", ("format", "bytes", "content")),
        "z.weight": ("added", ()),
    }
    error = found[QUERY].error
    assert error is not None
    assert 0.001 < (error.relative or 0) < 0.02


def test_errors_are_those_of_the_second_against_the_first(store: Store, source: Path) -> None:
    """The first is the reference: norms are its own."""
    create("m", source, store=store, quantize="int4")
    there, back = diff(source, "m", store=store), diff("m", source, store=store)
    one, other = (
        next(w.error for w in found.weights if w.name == QUERY) for found in (there, back)
    )
    assert one is not None
    assert other is not None
    assert one.squared_error == other.squared_error
    assert (one.squared_norm, one.own_squared_norm) == (other.own_squared_norm, other.squared_norm)


def test_files_that_differ_are_named(store: Store, source: Path, tmp_path: Path) -> None:
    """Side files are compared by digest, whichever side is a source."""
    create("m", source, store=store)
    (source / "generation_config.json").write_text("{}")
    (source / "config.json").write_text('{"model_type": "gemma"}')
    found = diff("m", source, store=store)
    states = [(file.name, file.status) for file in found.files]
    assert states == [("config.json", "changed"), ("generation_config.json", "added")]
    assert not found.equal


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = run(["diff", *map(str, arguments)])
    return code, capsys.readouterr().out


def test_the_exit_code_says_whether_anything_differs(
    store: Store, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 for equal, 1 for different, with a summary line last."""
    create("a", source, store=store, quantize="int4")
    create("b", source, store=store, quantize="int8")
    create("c", source, store=store, quantize="int4")
    code, out = command(capsys, "a", "c", "--store", store.root)
    assert (code, out) == (0, "a:latest and c:latest are equal: 4 tensors, 1 file\n")
    code, out = command(capsys, "a", "b", "--store", store.root)
    assert code == 1
    assert QUERY in out
    assert out.splitlines()[-1].startswith("a:latest -> b:latest: 4 tensors (1 changed, 3 equal)")


def test_the_json_counts_what_is_equal_and_lists_the_rest(
    store: Store, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One object for each tensor that differs, with both sides and the error."""
    create("a", source, store=store, quantize="int4")
    code, out = command(capsys, source, "a", "--store", store.root, "--json")
    found: dict[str, Any] = json.loads(out)
    assert (code, found["equal"], found["a"], found["b"]) == (1, False, str(source), "a:latest")
    assert found["counts"] == {"added": 0, "removed": 0, "changed": 2, "equal": 2}
    assert [t["name"] for t in found["tensors"]] == [
        "model.layers.0.mlp.down_proj.weight",
        QUERY,
    ]
    assert found["tensors"][1]["b"]["format"] == "int4"
    assert found["tensors"][1]["error"]["cosine"] > 0.99


def test_what_is_not_there_is_one_line(
    store: Store, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name that is neither a model nor a path is an error of exit code 1."""
    assert run(["diff", str(source), "nope", "--store", str(store.root)]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: nope is neither a stored model nor a checkpoint")
