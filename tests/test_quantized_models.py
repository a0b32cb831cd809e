"""Imported quantized checkpoints run: their logits are those of the official tools' own decode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from checkpoints import FIXTURES, fixture, load_arrays
from packers import Checkpoint, Tensor
from quantmill import mlxlm
from quantmill.creation import create
from quantmill.errors import BadRequest
from quantmill.export import export
from quantmill.load import open_model
from quantmill.model import Model
from quantmill.store import Store

mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (quantmill[run])")

from mlx_lm.utils import load_model  # noqa: E402

TOKENS = [1, 17, 80, 255, 3]


def imported(source: Path, root: Path, **choices: Any) -> Model:
    store = Store(root)
    made = create("m", source, store=store, **choices)
    return open_model(made.name, store=store)


def logits(module: nn.Module) -> np.ndarray[Any, Any]:
    module.set_dtype(mx.float32)
    return np.asarray(module(mx.array([TOKENS])))


GPT_OSS = "hf-gpt-oss-mxfp4"


def first_layer(name: str, folder: Path) -> Path:
    """A fixture cut down to its first layer, of which all decoded weights are known.

    gpt-oss needs two kinds of attention, and gets its first layer twice.
    """
    raw = (fixture(name) / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    tensors = {}
    for tensor, entry in json.loads(raw[8:start]).items():
        if tensor != "__metadata__" and ".layers.1." not in tensor:
            first, last = (start + offset for offset in entry["data_offsets"])
            tensors[tensor] = Tensor(entry["dtype"], tuple(entry["shape"]), raw[first:last])
    config = json.loads((fixture(name) / "config.json").read_text())
    if name == GPT_OSS:
        tensors |= twice(tensors)
    else:
        config["num_hidden_layers"] = 1
    return Checkpoint(config, tensors, {}, lossless=False).write(folder)


def twice(layer: dict[str, Any]) -> dict[str, Any]:
    """The tensors of the first layer as those of a second."""
    return {n.replace(".layers.0.", ".layers.1."): t for n, t in layer.items()}


def officially_decoded(name: str, source: Path, folder: Path) -> nn.Module:
    """mlx-lm's model of the weights as the official library decodes them."""
    folder.mkdir()
    arrays = load_arrays(source / "model.safetensors")
    truth = load_arrays(FIXTURES / name / "expected.safetensors")
    truth = {n: a for n, a in truth.items() if ".layers.1." not in n}
    if name == GPT_OSS:  # transformers transposes them; mlx-lm has rows as they are
        truth = {f"{n}.weight": a.swapaxes(-1, -2) for n, a in truth.items()}
        truth |= twice(truth)
    marks = ("_scale", "_packed", "_blocks", "weight_shape")
    plain = {n: a for n, a in arrays.items() if n not in truth and not any(m in n for m in marks)}
    mx.save_safetensors(str(folder / "model.safetensors"), plain | truth)
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(mlxlm.normalised(config)))
    return load_model(folder)[0]


# How far logits may be from those of the official decode, in units of the largest. Codes that are
# copied, or weights that were only decoded, leave nothing but float32's rounding; BF16 rounds the
# official decode of integers once, and mxfp8 has four significant bits.
BOUNDS = {
    ("ct-nvfp4", None): 1e-5,
    ("modelopt-nvfp4", None): 1e-5,
    ("ct-mxfp4", None): 1e-5,
    ("hf-gpt-oss-mxfp4", None): 1e-5,
    ("ct-int4-w4a16", None): 5e-3,
    ("ct-int8-w8a8", None): 5e-3,
    ("ct-fp8-block", None): 0.1,
    ("ct-fp8-channel", None): 0.1,
    ("ct-int4-w4a16", "bf16"): 1e-5,
    ("ct-int8-w8a8", "bf16"): 1e-5,
    ("ct-fp8-block", "bf16"): 1e-5,
    ("ct-fp8-channel", "bf16"): 1e-5,
    ("hf-deepseek-v3-fp8-block", "bf16"): 1e-5,
    ("hf-deepseek-v3-fp8-block", None): 0.1,
}


@pytest.mark.parametrize(("name", "requantize"), BOUNDS, ids=str)
def test_logits_are_those_of_the_official_decode(
    name: str, requantize: str | None, tmp_path: Path
) -> None:
    """What is stored computes, in float32, what the tool's own decode of the checkpoint does."""
    source = first_layer(name, tmp_path / "m")
    ours, _ = mlxlm.build(imported(source, tmp_path / "s", requantize=requantize))
    expected = logits(officially_decoded(name, source, tmp_path / "dense"))
    off = np.abs(logits(ours) - expected).max() / np.abs(expected).max()
    assert off <= BOUNDS[name, requantize]


def test_biases_of_experts_are_no_matrices(tmp_path: Path) -> None:
    """[experts, rows] of gpt-oss: kept where weights are quantized again, so that mlx-lm builds it.

    A router near a tie may choose another expert, so that some logits are far off; most are not.
    """
    source = first_layer(GPT_OSS, tmp_path / "m")
    model = imported(source, tmp_path / "s", requantize="int8")
    biases = [name for name in model if name.endswith("_proj_bias")]
    assert biases
    assert all(model.params(name) is None for name in biases)
    ours, _ = mlxlm.build(model)
    expected = logits(officially_decoded(GPT_OSS, source, tmp_path / "dense"))
    off = np.abs(logits(ours) - expected) / np.abs(expected).max()
    assert np.median(off) < 0.01


IMPORTABLE = sorted(
    p.parent.name
    for p in FIXTURES.glob("*/expected.safetensors")
    if p.parent.name not in {"mlx-mixed-naming-orphans", "mlx-dot-child-affine4"}
)


@pytest.mark.parametrize("name", IMPORTABLE)
def test_stock_mlx_lm_opens_every_import(name: str, tmp_path: Path) -> None:
    """Exported for mlx-lm, each import is opened by mlx-lm itself and computes the same."""
    model = imported(fixture(name), tmp_path / "s")
    export(model, tmp_path / "out", "mlx-lm")
    theirs, _ = load_model(tmp_path / "out")
    ours, _ = mlxlm.build(model)
    np.testing.assert_array_equal(logits(ours), logits(theirs))


@pytest.mark.parametrize("name", ["ct-nvfp4", "modelopt-nvfp4"])
def test_global_scales_are_decoded_for_mlx_lm(name: str, tmp_path: Path) -> None:
    """mlx-lm has no place for them: such weights are written as numbers, and named."""
    model = imported(fixture(name), tmp_path / "s")
    written = export(model, tmp_path / "out", "mlx-lm")
    names = {n for n in model if model.params(n) is not None}
    assert set(written.decoded) == names
    arrays = load_arrays(tmp_path / "out" / "model.safetensors")
    for tensor in names:
        assert mx.array_equal(arrays[tensor], model.dequantize(tensor))


def test_such_weights_can_be_quantized_on_export(tmp_path: Path) -> None:
    """With a format, what mlx-lm has no place for is quantized again instead."""
    model = imported(fixture("ct-nvfp4"), tmp_path / "s")
    written = export(model, tmp_path / "out", "mlx-lm", requantize="int8")
    assert written.decoded
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"]["bits"] == 8
    theirs, _ = load_model(tmp_path / "out")
    ours, _ = mlxlm.build(model)
    got, expected = logits(theirs), logits(ours)
    assert np.abs(got - expected).max() <= 0.1 * np.abs(expected).max()


def test_decoded_layouts_take_no_format(tmp_path: Path) -> None:
    """--requantize means nothing to a layout of numbers."""
    model = imported(fixture("ct-nvfp4"), tmp_path / "s")
    with pytest.raises(BadRequest, match="hf"):
        export(model, tmp_path / "out", "hf", requantize="int8")


@pytest.mark.parametrize("name", IMPORTABLE)
def test_every_import_is_exported_decoded(name: str, tmp_path: Path) -> None:
    """For Hugging Face, the numbers are the official library's, under its names."""
    model = imported(fixture(name), tmp_path / "s")
    export(model, tmp_path / "out", "hf")
    arrays = load_arrays(tmp_path / "out" / "model.safetensors")
    truth = load_arrays(FIXTURES / name / "expected.safetensors")
    for tensor, values in truth.items():
        got, expected = (np.asarray(a.astype(mx.float32)) for a in (arrays[tensor], values))
        assert np.abs(got - expected).max() <= 2**-4 * np.abs(expected).max(), tensor


def test_mlx_lms_own_global_scales_are_factors_of_2688(tmp_path: Path) -> None:
    """A `global_scale` beside plural scales is MLX's number; decoding divides it by 2688."""
    codes = mx.array(np.random.default_rng(0).integers(0, 2**32, (3, 8, 4), dtype=np.uint32))
    scales = mx.array(np.random.default_rng(1).integers(1, 100, (3, 8, 2), dtype=np.uint8))
    largest = mx.array([1.5, 2.5, 96.0])
    stem = "model.layers.0.mlp.switch_mlp.gate_proj"
    (tmp_path / "m").mkdir()
    arrays = {f"{stem}.weight": codes, f"{stem}.scales": scales, f"{stem}.global_scale": largest}
    mx.save_safetensors(str(tmp_path / "m" / "model.safetensors"), arrays)
    said = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    (tmp_path / "m" / "config.json").write_text(json.dumps({"quantization": said}))
    plain = mx.dequantize(codes, scales, group_size=16, bits=4, mode="nvfp4").astype(mx.float32)
    expected = (plain * (largest / 2688)[:, None, None]).astype(mx.bfloat16)
    store = Store(tmp_path / "s")
    made = create("m", tmp_path / "m", store=store)
    for model in (open_model(tmp_path / "m"), open_model(made.name, store=store)):
        assert mx.array_equal(model.dequantize(f"{stem}.weight"), expected)


CONVERSIONS: dict[str, dict[str, Any]] = {
    "affine 4": {"q_bits": 4, "q_group_size": 64},
    "affine 3 g32": {"q_bits": 3, "q_group_size": 32},
    "affine 8 g128": {"q_bits": 8, "q_group_size": 128},
    "mixed_4_6": {"quant_predicate": "mixed_4_6"},
    "nvfp4": {"q_mode": "nvfp4", "q_bits": 4, "q_group_size": 16},
    "mxfp4": {"q_mode": "mxfp4", "q_bits": 4, "q_group_size": 32},
    "mxfp8": {"q_mode": "mxfp8", "q_bits": 8, "q_group_size": 32},
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_what_mlx_lm_converts_decodes_as_mlx_lm_decodes_it(name: str, tmp_path: Path) -> None:
    """A checkpoint made by mlx-lm here is imported whole, and equals mlx-lm's own dequantizing."""
    from mlx.utils import tree_flatten
    from mlx_lm import convert
    from mlx_lm.utils import dequantize_model

    folder = tmp_path / "mlx"
    source = fixture("hf-llama-bf16")
    convert(str(source), str(folder), quantize=True, **CONVERSIONS[name])
    store = Store(tmp_path / "s")
    made = create("m", folder, store=store)
    assert {t.scheme.split()[0] for t in made.plan.tensors if t.scheme} == {"mlx"}
    model = open_model(made.name, store=store)
    theirs = dict(tree_flatten(dequantize_model(load_model(folder)[0]).parameters()))
    assert theirs.keys() == set(model)
    for tensor, values in theirs.items():
        assert mx.array_equal(model.dequantize(tensor), values), tensor
