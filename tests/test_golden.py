"""What Ollama's own importer stores for the same checkpoints (tests/data/golden/README.md)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints import fixture
from quantmill.creation import create
from quantmill.manifest import BlobRef, Manifest
from quantmill.store import Store
from quantmill.verification import read_tensor_file, verify
from vectors import DATA

GOLDEN = sorted((DATA / "golden").glob("*.json"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


def test_every_fixture_has_its_golden_stores() -> None:
    """Eight float fixtures with no format and each of five, nine quantized ones: none is lost."""
    assert len(GOLDEN) == 8 * 6 + 9


def stored_tensors(store: Store, ref: BlobRef) -> dict[str, Any]:
    data = store.blob_path(ref.digest).read_bytes()
    return {
        entry.name: {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "sha256": hashlib.sha256(data[entry.start : entry.end]).hexdigest(),
        }
        for entry in read_tensor_file(store, ref).entries.values()
    }


def config_of(store: Store, manifest: Manifest) -> Any:
    assert manifest.config is not None
    return json.loads(store.read_blob(manifest.config.digest, 1 << 20))


@pytest.mark.parametrize("path", GOLDEN, ids=[p.stem for p in GOLDEN])
def test_the_stored_model_is_the_one_ollama_makes(store: Store, path: Path) -> None:
    """Entries, media types, config, metadata and every tensor's bytes equal Ollama's."""
    golden = json.loads(path.read_text())
    quantize = None if golden["quantize"] == "none" else golden["quantize"]
    made = create(f"golden:{path.stem}", fixture(golden["fixture"]), store=store, quantize=quantize)
    manifest = store.get_manifest(made.name)
    assert config_of(store, manifest) == golden["config"]
    assert manifest.config is not None
    assert manifest.config.media_type == golden["config_mediaType"]
    expected = golden["layers"]
    assert [(r.name, r.media_type) for r in manifest.blobs] == [
        (layer["name"], layer["mediaType"]) for layer in expected
    ]
    for ref, layer in zip(manifest.blobs, expected, strict=True):
        if "digest" in layer:
            assert (str(ref.digest), ref.size) == (layer["digest"], layer["size"])
        if "tensors" in layer:
            assert stored_tensors(store, ref) == layer["tensors"]
            metadata = dict(read_tensor_file(store, ref).metadata)
            assert metadata == (layer["metadata"] or {})
    assert not verify(store, [made.name]).damage
