"""Checkpoint directories written by the tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from quantmill.formats import DTYPE_BYTES
from quantmill.tensorfile import lay_out
from vectors import DATA

FIXTURES = DATA / "fixtures"


def fixture(name: str) -> Path:
    """The checkpoint directory of a copied fixture."""
    return FIXTURES / name / "checkpoint"


def tensor_bytes(dtype: str, shape: tuple[int, ...], seed: int = 0) -> bytes:
    """Plausible weights: normal, small; zeros for dtypes that are not floats."""
    values = np.random.default_rng(seed).normal(0, 0.05, shape).astype(np.float32)
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    kinds = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
    if dtype in kinds:
        return values.astype(kinds[dtype]).tobytes()
    return bytes(values.size * DTYPE_BYTES[dtype])


def write_tensor_file(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """A tensor file with plausible weights, the same for the same names."""
    header, _ = lay_out([(n, d, s) for n, (d, s) in tensors.items()], {})
    seeds = {name: sum(name.encode()) for name in tensors}
    data = b"".join(tensor_bytes(d, s, seeds[n]) for n, (d, s) in tensors.items())
    path.write_bytes(header + data)


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    config: Mapping[str, Any] | None = None,
    **files: str,
) -> Path:
    """A single-file checkpoint; `files` gives further files, with `__` for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    write_tensor_file(folder / "model.safetensors", tensors)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


SMALL = {
    "model.embed_tokens.weight": ("BF16", (64, 128)),
    "model.layers.0.input_layernorm.weight": ("BF16", (128,)),
    "model.layers.0.self_attn.q_proj.weight": ("BF16", (128, 128)),
    "model.layers.0.mlp.down_proj.weight": ("BF16", (128, 128)),
}
"""A model of a few kilobytes with something to quantize."""


def load_arrays(path: Path) -> dict[str, Any]:
    """The tensors of a file as MLX arrays, read by MLX."""
    arrays = mx.load(str(path), format="safetensors")
    assert isinstance(arrays, dict)
    return arrays
