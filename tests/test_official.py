"""Checkpoints that compressed-tensors itself makes: the import decodes to what the library decodes.

The library and torch are large and no part of the usual test environment: without them the tests
are skipped, unless QUANTMILL_OFFICIAL is set.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from quantmill.creation import create
from quantmill.load import open_model
from quantmill.model import Model
from quantmill.store import Store

NEEDED = ("torch", "compressed_tensors", "safetensors")
MISSING = [name for name in NEEDED if find_spec(name) is None]

pytestmark = [
    pytest.mark.skipif(
        bool(MISSING) and not os.environ.get("QUANTMILL_OFFICIAL"),
        reason=f"not installed: {', '.join(MISSING)}",
    ),
]

Floats = npt.NDArray[np.float32]

LINEARS = {
    "model.layers.0.self_attn.q_proj": (64, 256),
    "model.layers.0.self_attn.k_proj": (48, 256),
    "model.layers.0.mlp.down_proj": (200, 384),
    "model.layers.0.mlp.experts.0.up_proj": (64, 256),
    "model.layers.0.mlp.experts.1.up_proj": (64, 256),
    "lm_head": (32, 256),
}
"""Module path → rows and columns of its weight; the last is not quantized."""
QUANTIZED = tuple(LINEARS)[:-1]


@dataclass(frozen=True)
class Made:
    """A checkpoint of the library, and what the library decodes its weights to."""

    folder: Path
    weights: Mapping[str, Floats]
    plain: Mapping[str, Floats]
    spans: Mapping[str, float]
    """What a whole range of integer codes covers, by the largest scale; 0 for other weights."""


@dataclass(frozen=True)
class Official:
    """A preset of the library for weights of a dtype; `others` are presets of further modules."""

    preset: str
    dtype: str = "bfloat16"
    others: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.preset}-{self.dtype}" + ("-mixed" if self.others else "")


# -- making checkpoints ----------------------------------------------------------------------------


def module_tree(torch: Any, dtype: str) -> Any:
    """Linear layers under their paths, with a norm and small random weights."""
    torch.manual_seed(7)
    root = torch.nn.Module()
    for path, (rows, columns) in LINEARS.items():
        *parents, name = path.split(".")
        at = root
        for parent in parents:
            if not hasattr(at, parent):
                at.add_module(parent, torch.nn.Module())
            at = getattr(at, parent)
        linear = torch.nn.Linear(columns, rows, bias=False)
        torch.nn.init.normal_(linear.weight, 0.01, 0.05)
        at.add_module(name, linear)
    root.model.add_module("norm", torch.nn.LayerNorm(256, bias=False))
    return root.to(getattr(torch, dtype))


def calibrate(torch: Any, module: Any) -> None:
    """Scales and zero points from the smallest and largest weight that share them."""
    helpers = import_module("compressed_tensors.quantization.utils")
    arguments = module.quantization_scheme.weights
    weight = module.weight.detach()
    rows, columns = weight.shape
    if arguments.strategy == "block":
        high, wide = arguments.block_structure
        padded = torch.nn.functional.pad(weight, (0, -columns % wide, 0, -rows % high))
        grouped = (
            padded.unflatten(0, (-1, high)).unflatten(-1, (-1, wide)).transpose(1, 2).flatten(2)
        )
    elif arguments.strategy in {"group", "tensor_group"}:
        grouped = weight.unflatten(-1, (-1, arguments.group_size))
    else:
        grouped = weight[:, None] if arguments.strategy == "channel" else weight.flatten()[None]
    smallest, largest = grouped.amin(-1), grouped.amax(-1)
    total = None
    if arguments.strategy == "tensor_group":
        total = helpers.generate_gparam(weight.amin().float(), weight.amax().float())
        module.weight_global_scale.data = total
    scale, zero = helpers.calculate_qparams(smallest, largest, arguments, global_scale=total)
    module.weight_scale.data = scale.reshape(module.weight_scale.shape)
    if hasattr(module, "weight_zero_point"):
        shape, dtype = module.weight_zero_point.shape, module.weight_zero_point.dtype
        module.weight_zero_point.data = zero.reshape(shape).to(dtype)
    for name in ("input_scale", "input_global_scale"):
        if hasattr(module, name):
            getattr(module, name).data.fill_(0.5)


def quantized_model(torch: Any, official: Official) -> tuple[Any, Any]:
    """The model compressed by the library, and the compressor that knows its config."""
    quantization = import_module("compressed_tensors.quantization")
    compressors = import_module("compressed_tensors.compressors")
    presets = {official.preset: ["Linear"]}
    for module, preset in official.others:
        presets.setdefault(preset, []).append(f"re:.*{module}$")
    schemes = [
        quantization.preset_name_to_scheme(preset, targets) for preset, targets in presets.items()
    ]
    groups = {f"group_{index}": scheme for index, scheme in enumerate(schemes)}
    config = quantization.QuantizationConfig(config_groups=groups, ignore=["lm_head"])
    model = module_tree(torch, official.dtype)
    quantization.apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            calibrate(torch, module)
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    return model, compressor


def make(folder: Path, official: Official) -> Made:
    """A directory as the library writes it, and the library's own decoding of it in float32."""
    torch = import_module("torch")
    model, compressor = quantized_model(torch, official)
    folder.mkdir()
    stored = {name: value.contiguous() for name, value in model.state_dict().items()}
    import_module("safetensors.torch").save_file(stored, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    compressor.update_config(str(folder))
    modules = dict(model.named_modules())
    weights, spans = {}, {}
    for path in QUANTIZED:
        module = modules[path]
        scale, arguments = module.weight_scale, module.quantization_scheme.weights
        is_integer = arguments.type == "int"
        spans[f"{path}.weight"] = float(scale.max()) * 2**arguments.num_bits if is_integer else 0.0
        if scale.dtype in {torch.bfloat16, torch.float16}:  # no rounding on the library's side
            scale.data = scale.data.to(torch.float32)
    compressor.decompress_model(model)
    for path in QUANTIZED:
        weights[f"{path}.weight"] = modules[path].weight.detach().to(torch.float32).numpy()
    plain = {
        name: stored[name].to(torch.float32).numpy()
        for name in ("lm_head.weight", "model.norm.weight")
    }
    return Made(folder, weights, plain, spans)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Official], Made]:
    """The checkpoint of some settings, made once."""
    if MISSING:
        pytest.fail(f"QUANTMILL_OFFICIAL is set, but there is no {', '.join(MISSING)}")
    known: dict[Official, Made] = {}

    def find(official: Official) -> Made:
        if official not in known:
            known[official] = make(tmp_path_factory.mktemp("official") / "model", official)
        return known[official]

    return find


# -- comparing -------------------------------------------------------------------------------------


def numbers(model: Model, name: str, index: int | None = None) -> Floats:
    """A tensor as `decode` gives it, in float32."""
    found = model.decode(name, index)
    if found.dtype == np.uint16:
        found = found.view(ml_dtypes.bfloat16)
    return found.astype(np.float32)


def imported(model: Model, name: str) -> Floats:
    """A weight of the source, which may be one of a stack by now."""
    if name in model:
        return numbers(model, name)
    before, _, after = name.partition(".experts.")
    index, _, rest = after.partition(".")
    return numbers(model, f"{before}.experts.{rest}", int(index))


ROUNDING = {"bfloat16": 2.0**-9, "float16": 2.0**-12, "float32": 2.0**-24}
"""Largest relative error of rounding to a dtype, for numbers that are not tiny."""


def check(model: Model, source: Made, official: Official) -> None:
    """Every weight is that of the library but for rounding to the dtype it decodes to.

    The library rounds to BF16 where the format has 4-bit floats, so two neighbours may differ.
    Affine formats compute codes times scale plus bias in the scales' dtype: three roundings, of
    numbers that are at most as large as a whole range of codes.
    """
    unit = ROUNDING[official.dtype]
    for name, want in source.weights.items():
        got = imported(model, name)
        allowed = 3 * unit * source.spans[name] + 4 * ROUNDING["bfloat16"] * np.abs(want)
        assert got.shape == want.shape, name
        assert (np.abs(got - want) <= allowed).all(), name
    for name, want in source.plain.items():
        assert np.array_equal(numbers(model, name), want), name


KEPT = {
    Official("W4A16"): ("affine", 4),
    Official("W4A16", "float16"): ("affine", 4),
    Official("W4A16_ASYM"): ("affine", 4),
    Official("W4A16_ASYM", "float32"): ("affine", 4),
    Official("W2A16", "float32"): ("affine", 2),
    Official("W3A16", "float32"): ("affine", 3),
    Official("W5A16", "float16"): ("affine", 5),
    Official("W6A16", "float32"): ("affine", 6),
    Official("W8A16", "float32"): ("affine", 8),
    Official("W8A8", "float32"): ("affine", 8),
    Official("W8A8", "float16"): ("affine", 8),
    Official("NVFP4"): ("nvfp4", 4),
    Official("NVFP4A16", "float32"): ("nvfp4", 4),
    Official("MXFP4"): ("mxfp4", 4),
    Official("MXFP8"): ("mxfp8", 8),
}
"""Presets that MLX's formats hold without loss, and the mode and bits that do."""


@pytest.mark.parametrize("official", KEPT, ids=str)
def test_codes_are_kept(
    made: Callable[[Official], Made], tmp_path: Path, official: Official
) -> None:
    """Presets that an MLX format holds come out in that format and decode to the same numbers."""
    source = made(official)
    store = Store(tmp_path)
    create("m", source.folder, store=store)
    with open_model("m", store=store) as model:
        for name in model:
            params = model.params(name)
            if params is not None:
                assert (params.format.mode, params.format.bits) == KEPT[official], name
        assert sum(model.params(name) is not None for name in model) == 4  # two experts are stacked
        check(model, source, official)


FP8 = [Official("FP8"), Official("FP8_DYNAMIC"), Official("FP8_BLOCK")]


@pytest.mark.parametrize("official", FP8, ids=str)
def test_fp8_is_decoded(
    made: Callable[[Official], Made], tmp_path: Path, official: Official
) -> None:
    """FP8 with scales of a tensor, a channel or a block decodes to the library's numbers."""
    source = made(official)
    store = Store(tmp_path)
    create("m", source.folder, store=store, requantize="bf16")
    with open_model("m", store=store) as model:
        check(model, source, official)


@pytest.mark.parametrize("official", FP8, ids=str)
def test_fp8_stays_close(
    made: Callable[[Official], Made], tmp_path: Path, official: Official
) -> None:
    """FP8 imported without a word of what to make of it is within the rounding of 8-bit floats."""
    source = made(official)
    store = Store(tmp_path)
    create("m", source.folder, store=store)
    with open_model("m", store=store) as model:
        for name, want in source.weights.items():
            allowed = np.abs(want) / 16 + np.abs(want).max() / 2**16
            assert (np.abs(imported(model, name) - want) <= allowed).all(), name


def test_mixed_precision(made: Callable[[Official], Made], tmp_path: Path) -> None:
    """Groups of a mixed checkpoint are told apart, each weight decoding as its own group says."""
    others = (("q_proj", "NVFP4"), ("k_proj", "W8A16"), ("down_proj", "FP8_DYNAMIC"))
    official = Official("W4A16_ASYM", "float32", others)
    source = made(official)
    config = json.loads((source.folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    store = Store(tmp_path)
    create("m", source.folder, store=store, requantize="bf16")
    with open_model("m", store=store) as model:
        check(model, source, official)
