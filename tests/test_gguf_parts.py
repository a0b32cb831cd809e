"""GGUF models in several files: opened as one, and refused where the parts are not those of one."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from ggufs import KEYS, LLAMA, convert_llama, model, stored, write_gguf
from quantmill.creation import create, plan
from quantmill.errors import BadSource
from quantmill.opening import open_source
from quantmill.store import Store

TENSORS = len(stored(model(LLAMA), "Q4_0", convert_llama))
COUNT = -(-TENSORS // 8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that holds a llama in parts of eight tensors."""
    found = tmp_path / "parts"
    found.mkdir()
    tensors = stored(model(LLAMA), "Q4_0", convert_llama)
    write_gguf(found / "m.gguf", "llama", tensors, split=8)
    return found


def part(folder: Path, number: int) -> Path:
    return folder / f"m-{number:05}-of-{COUNT:05}.gguf"


def refused(path: Path) -> BadSource:
    with pytest.raises(BadSource) as caught:
        plan(path)
    return caught.value


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_parts_give_what_the_whole_gives(
    folder: Path, tmp_path: Path, quantize: str | None
) -> None:
    """Any part, or the directory, stands for the model: the same manifest as from one file."""
    store = Store(tmp_path / "store")
    assert len(list(folder.iterdir())) == COUNT > 2
    whole = write_gguf(
        tmp_path / "m.gguf", "llama", stored(model(LLAMA), "Q4_0", convert_llama), KEYS
    )
    expected = create("whole", whole, store=store, quantize=quantize).digest
    for n, given in enumerate((folder, *sorted(folder.iterdir()))):
        assert create(f"m{n}", given, store=store, quantize=quantize).digest == expected


def test_the_first_part_may_hold_no_tensor(tmp_path: Path) -> None:
    """Metadata may lie in a part of its own."""
    tensors = stored(model(LLAMA), "Q4_0", convert_llama)
    write_gguf(tmp_path / "m.gguf", "llama", tensors, split=8, empty_first=True)
    with open_source(tmp_path) as opened:
        files = {t.file for t in opened.source.tensors.values()}
    assert files == {p.name for p in tmp_path.iterdir() if "-00001-of-" not in p.name}


def test_every_part_has_an_identity_of_its_own(folder: Path) -> None:
    """Work that was finished is known by the part that it was made of."""
    with open_source(folder) as opened:
        tensors = opened.source.tensors.values()
        assert {t.file for t in tensors} == {p.name for p in folder.iterdir()}
        assert len({opened.identity(t) for t in tensors}) == COUNT


@pytest.mark.parametrize("number", [1, 2, COUNT])
def test_a_missing_part_is_named(folder: Path, number: int) -> None:
    """However the model is given, the part that is not there is named."""
    part(folder, number).unlink()
    for given in (folder, next(folder.iterdir())):
        error = refused(given)
        assert f"{part(folder, number).name} is missing" in error.message
        assert error.kind == "missing_shard"


def test_a_part_too_many_is_refused(folder: Path) -> None:
    """A number beyond the count, and a second model beside the first, are told by name."""
    extra = folder / f"m-{COUNT + 1:05}-of-{COUNT:05}.gguf"
    extra.write_bytes(part(folder, 1).read_bytes())
    assert f"no part {COUNT + 1} of {COUNT}" in refused(extra).message
    error = refused(folder)
    assert (error.kind, extra.name in error.message) == ("ambiguous_source", True)
    extra.rename(folder / "other.gguf")
    assert "other.gguf" in refused(folder).message


def test_renamed_parts_are_refused(folder: Path) -> None:
    """What a part says about its place goes before its name."""
    first, second, third = part(folder, 1), part(folder, 2), folder / "third"
    second.rename(third)
    part(folder, 3).rename(second)
    third.rename(part(folder, 3))
    error = refused(folder)
    assert second.name in error.message
    assert "split.no is 2" in error.message
    first.rename(folder / "alone.gguf")
    assert "which its name does not say" in refused(folder / "alone.gguf").message


@pytest.mark.parametrize(
    ("key", "message"), [("split.count", "split.count is 9"), ("split.tensors.count", "is 9")]
)
def test_wrong_counts_are_refused(folder: Path, key: str, message: str) -> None:
    """A part that speaks of other numbers of parts or tensors is not one of these."""
    path = part(folder, 2)
    data = bytearray(path.read_bytes())
    at = data.index(key.encode()) + len(key) + 4
    data[at : at + 2] = struct.pack("<H", 9)
    path.write_bytes(data)
    error = refused(folder)
    assert path.name in error.message
    assert message in error.message


def test_a_tensor_in_two_parts_is_refused(folder: Path) -> None:
    """Which of two tensors is meant is never guessed; both files are named."""
    first, second = part(folder, 1), part(folder, 2)
    whole = second.read_bytes()
    names = [name for name, _ in stored(model(LLAMA), "Q4_0", convert_llama).items()]
    mine = next(n for n in names[8:16] if "blk.0." in n)
    theirs = next(n for n in names[:8] if len(n) == len(mine))
    second.write_bytes(whole.replace(mine.encode(), theirs.encode()))
    error = refused(folder)
    assert second.name in error.message
    assert f"tensor {theirs!r} is in {first.name} too" in error.message


def test_a_part_that_changes_is_noticed(folder: Path) -> None:
    """Writing to any part while the model is read fails the creation."""
    with open_source(folder) as opened:
        path = part(folder, COUNT)
        path.write_bytes(path.read_bytes() + b"x")
        with pytest.raises(BadSource, match=f"{path.name} changed"):
            opened.check_unchanged()


def test_parts_that_are_links_or_pipes_are_refused(folder: Path, tmp_path: Path) -> None:
    """A part beside the one given may not lead elsewhere, nor be waited for."""
    part(folder, 2).rename(tmp_path / "elsewhere")
    part(folder, 2).symlink_to(tmp_path / "elsewhere")
    assert "outside the checkpoint" in refused(part(folder, 1)).message
    with open_source(part(folder, 1), follow_links=True) as opened:
        assert opened.source.tensors
    part(folder, 2).unlink()
    os.mkfifo(part(folder, 2))
    assert "not a regular file" in refused(folder).message
