"""A real model, all-MiniLM-L6-v2, through the main job."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from checkpoints import load_arrays
from quantmill.creation import create
from quantmill.facts import show
from quantmill.formats import FORMAT_NAMES
from quantmill.store import Store
from quantmill.verification import verify

DIGESTS = {
    "int8": "sha256:6d51654a468e2d73a2c270287853bd0e003814ef4d52326a2e6f11926f63c1ca",
    "int4": "sha256:fb183c45570866b4a14fd06af1536ff035cd9b79248910da767ac98a7d970cae",
}


@pytest.mark.parametrize("quantize", DIGESTS)
def test_the_model_has_the_same_digest_everywhere(
    minilm: Path, tmp_path: Path, quantize: str
) -> None:
    """The manifest digest of a real model is a constant of this version."""
    made = create("m", minilm, store=Store(tmp_path), quantize=quantize)
    assert str(made.digest) == DIGESTS[quantize]


@pytest.mark.parametrize("quantize", FORMAT_NAMES)
def test_every_weight_decodes_near_its_source(minilm: Path, tmp_path: Path, quantize: str) -> None:
    """MLX decodes what is stored, and the error is what the format's step allows."""
    store = Store(tmp_path)
    made = create("m", minilm, store=store, quantize=quantize)
    sources = load_arrays(minilm / "model.safetensors")
    manifest = store.get_manifest(made.name)
    checked = 0
    for ref in manifest.tensor_refs():
        parts = load_arrays(store.blob_path(ref.digest))
        name = str(ref.name)
        if f"{name}.scale" not in parts:
            continue
        fmt = next(t.format for t in made.plan.tensors if t.name == name)
        assert fmt is not None
        with mx.stream(mx.cpu):
            decoded = mx.dequantize(
                parts[name], parts[f"{name}.scale"], parts.get(f"{name}.bias"),
                group_size=fmt.group_size, bits=fmt.bits, mode=fmt.mode,
            ).astype(mx.float32)  # fmt: skip
        source = np.array(sources[name])
        error = np.abs(np.array(decoded) - source).reshape(-1, fmt.group_size)
        groups = np.abs(source).reshape(-1, fmt.group_size).max(axis=1)
        # one and a half steps of the coarsest rounding in a group; nvfp4 loses groups below 2^-7
        step = {2: 0.7, 3: 0.3, 4: 0.3, 5: 0.07, 6: 0.04, 8: 0.07}[fmt.bits]
        assert (error.max(axis=1) <= step * groups + 2**-7).all(), name
        checked += 1
    assert checked == 37
    assert not verify(store).damage
    assert show(store, made.name).format == quantize
