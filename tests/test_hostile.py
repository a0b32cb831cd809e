"""Whole checkpoints that lie, through the whole of `create`: refused, and the store as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from checkpoints import SMALL, write_checkpoint
from quantmill.creation import create
from quantmill.errors import QuantmillError
from quantmill.pruning import prune
from quantmill.store import OWN_FOLDER, Store
from vectors import DATA

FILES = json.loads((DATA / "malformed-files" / "CASES.json").read_text())
FOLDERS = json.loads((DATA / "malformed-dirs" / "CASES.json").read_text())

ACCEPTED_FILES = {"control_ok", "control_unaligned_header", "name_traversal", "zero_size_tensor"}
ACCEPTED_FOLDERS = {"control-sharded", "experts-control"}
NON_FINITE = {"values_nan_inf", "weights-nan-inf"}
"""Copied exactly without a format, refused by name with one."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store that holds a model already."""
    found = Store(tmp_path / "store")
    create("there", write_checkpoint(tmp_path / "there", SMALL), store=found, quantize="int8")
    return found


def content(store: Store) -> dict[str, bytes]:
    return {
        str(path.relative_to(store.root)): path.read_bytes()
        for path in sorted(store.root.rglob("*"))
        if path.is_file() and OWN_FOLDER not in path.parts
    }


def check(store: Store, source: Path, quantize: str | None, *, accepted: bool) -> None:
    before = content(store)
    if accepted:
        made = create("new", source, store=store, quantize=quantize)
        assert store.get_manifest(made.name).digest == made.digest
        return
    with pytest.raises(QuantmillError) as caught:
        create("new", source, store=store, quantize=quantize)
    assert caught.value.exit_code == 3
    prune(store, 0)  # blobs that were finished before the fault was met may wait for another try
    assert content(store) == before


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("case", sorted(FILES))
def test_a_malformed_file_ends_as_its_index_says(
    store: Store, tmp_path: Path, case: str, quantize: str | None
) -> None:
    """A lying tensor file is refused and leaves no trace; odd but honest ones are imported."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    shutil.copy(DATA / "malformed-files" / f"{case}.safetensors", source / "model.safetensors")
    accepted = case in ACCEPTED_FILES or (case in NON_FINITE and quantize is None)
    assert accepted == ("refuse" not in FILES[case]["import_must"].split("; or")[0]) or (
        case in NON_FINITE
    )
    check(store, source, quantize, accepted=accepted)


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("case", sorted(FOLDERS))
def test_a_malformed_directory_ends_as_its_index_says(
    store: Store, case: str, quantize: str | None
) -> None:
    """A checkpoint that is wrong as a whole is refused and leaves no trace."""
    # ModelOpt's weights are recognised by their tensors; what is quantized is not quantized again
    unless_asked = case in NON_FINITE or case == "modelopt-no-sidecar"
    accepted = case in ACCEPTED_FOLDERS or (unless_asked and quantize is None)
    check(store, DATA / "malformed-dirs" / case, quantize, accepted=accepted)


def test_a_tensor_name_is_never_a_path(store: Store, tmp_path: Path) -> None:
    """A tensor called like a path outside is stored under its digest, nowhere else."""
    source = write_checkpoint(tmp_path / "source", {"../../../escape": ("F32", (4,))})
    before = {p for p in tmp_path.rglob("*") if store.root not in p.parents}
    create("new", source, store=store)
    assert {p for p in tmp_path.rglob("*") if store.root not in p.parents} == before
