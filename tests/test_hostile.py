"""Whole checkpoints that lie, through the whole of `create`: refused, and the store as it was."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from checkpoints import SMALL, write_checkpoint
from quantmill.creation import create
from quantmill.errors import BadSource, Corrupt, QuantmillError
from quantmill.load import open_model
from quantmill.manifest import manifest_bytes
from quantmill.mlxlm import write_files
from quantmill.names import parse_name
from quantmill.pruning import prune
from quantmill.store import OWN_FOLDER, Store
from quantmill.verification import verify
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


@pytest.mark.parametrize("name", ["../escape.json", "a/../../escape.json", "/escape.json"])
def test_a_file_name_in_a_manifest_never_leads_out(store: Store, tmp_path: Path, name: str) -> None:
    """A manifest whose entry is called like a path outside is not written there."""
    manifest = store.get_manifest(parse_name("there"))
    assert manifest.config is not None
    refs = [replace(r, name=name) if r.name == "config.json" else r for r in manifest.blobs]
    extra = [r for r in manifest.blobs if r.name == "config.json"]
    store.put_manifest(parse_name("evil"), manifest_bytes(manifest.config, [*refs, *extra]))
    with open_model("evil", store=store) as model, pytest.raises(Corrupt, match="leads out"):
        write_files(model, tmp_path / "out" / "deep")
    assert not list(tmp_path.rglob("escape.json"))


def test_a_manifest_with_another_size_is_damage(store: Store) -> None:
    """A size that is not the blob's is found by verify, and the model is named."""
    manifest = store.get_manifest(parse_name("there"))
    assert manifest.config is not None
    refs = [replace(ref, size=ref.size + 1) for ref in manifest.blobs]
    store.put_manifest(parse_name("evil"), manifest_bytes(manifest.config, refs))
    found = verify(store).damage
    assert len(found) == len({ref.digest for ref in refs})
    assert {damage.models for damage in found} == {("evil:latest",)}


def test_a_device_is_no_weight_file(tmp_path: Path) -> None:
    """A link to a device that never ends is refused at once, even where links are followed."""
    source = write_checkpoint(tmp_path / "source", SMALL)
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to("/dev/zero")
    with pytest.raises(BadSource, match=r"model\.safetensors"):
        create("new", source, store=Store(tmp_path / "store"), follow_links=True)


def test_a_name_too_long_for_the_disk_is_an_error_in_words(store: Store, tmp_path: Path) -> None:
    """A host of 350 characters is a valid name and no file name: told as an error, not a crash."""
    name = f"{'h' * 350}/ns/m:t"
    with pytest.raises(QuantmillError, match="too long"):
        store.get_manifest(parse_name(name))
    with pytest.raises(QuantmillError, match="too long"):
        create(name, tmp_path / "there", store=store)
