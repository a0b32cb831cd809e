"""Forward passes block by block: the logits of mlx-lm's own, the memory of one block."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import fixture, write_checkpoint
from quantmill import mlxlm
from quantmill.creation import create
from quantmill.errors import BadPlan, BadRequest, Corrupt
from quantmill.load import open_model
from quantmill.model import Model
from quantmill.store import Store

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (quantmill[run])")

from mlx_lm.models import llama

from quantmill.forward import TOKENS_AT_ONCE, Forward, Given

DENSE = ["hf-llama-bf16", "hf-llama-f16", "hf-qwen3-tied-bf16", "hf-gemma3-bf16"]
EXPERTS = ["hf-qwen3-moe-bf16", "hf-qwen3_5-moe-bf16"]
CODED = ["hf-gpt-oss-mxfp4", "hf-deepseek-v3-fp8-block"]
DIRECTORIES = ["mlx-affine-4bit-gs64", "mlx-mxfp4", "mlx-mixed_4_6", "mlx-qwen3-moe-4bit"]
WINDOWS = np.random.default_rng(0).integers(0, 250, (7, 200))
"""More tokens than go through a block together, in windows that do not divide that number."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


def stored(store: Store, name: str, quantize: str | None) -> Model:
    made = create(f"{name}:{quantize or 'none'}".lower(), fixture(name), store=store,
                  quantize=quantize)  # fmt: skip
    return open_model(made.name, store=store)


def logits_by_blocks(model: Model, windows: Any = WINDOWS) -> Any:
    forward = Forward(model, windows)
    for index in range(len(forward)):
        forward.step(index)
    return np.array(forward.logits(forward.finish()))


def assert_equal_but_for_rounding(found: Any, expected: Any) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


def whole(model: Model, windows: Any = WINDOWS) -> Any:
    """Logits of mlx-lm's module with all weights at once, in float32."""
    module, _ = mlxlm.build(model, mx.float32)
    return np.array(module(mx.array(windows)))


# -- logits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [None, "int4", "nvfp4"])
@pytest.mark.parametrize("name", [*DENSE, *EXPERTS])
def test_logits_by_blocks_are_those_of_the_whole_model(
    store: Store, name: str, quantize: str | None
) -> None:
    """Weights a block at a time give the logits of mlx-lm's module with all of them."""
    assert WINDOWS.size > TOKENS_AT_ONCE
    model = stored(store, name, quantize)
    assert_equal_but_for_rounding(logits_by_blocks(model), whole(model))


@pytest.mark.parametrize("name", CODED)
def test_models_made_of_coded_checkpoints(store: Store, name: str) -> None:
    """Stacks with biases, matrices that mlx-lm splits: as the whole model has them."""
    model = stored(store, name, None)
    assert_equal_but_for_rounding(logits_by_blocks(model), whole(model))


@pytest.mark.parametrize("name", DIRECTORIES)
def test_directories_are_models_too(name: str) -> None:
    """Nothing needs to be imported first."""
    model = open_model(fixture(name))
    assert_equal_but_for_rounding(logits_by_blocks(model), whole(model))


def test_without_the_kernels_mlx_dequantizes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same logits where the native kernels have no code for the parameters."""
    model = stored(store, "hf-llama-bf16", "int4")
    expected = logits_by_blocks(model)
    monkeypatch.setattr("quantmill.denseweights.decode_float32", lambda *_: None)
    assert_equal_but_for_rounding(logits_by_blocks(model), expected)


@pytest.mark.parametrize("name", ["hf-qwen3-tied-bf16", "hf-qwen3-moe-bf16"])
def test_products_of_numpy_and_of_mlx_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever library is the faster one here."""
    model = open_model(fixture(name))
    found = []
    for numpy in (True, False):
        monkeypatch.setattr("quantmill.cpulanes.on_cpu", lambda choice=numpy: choice)
        found.append(logits_by_blocks(model))
    assert_equal_but_for_rounding(*found)


@settings(max_examples=15)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(0, 1 << 30))
def test_any_shape_of_windows(count: int, length: int, seed: int) -> None:
    """One window or many, one token or many."""
    windows = np.random.default_rng(seed).integers(0, 320, (count, length))
    model = open_model(fixture("hf-gemma3-bf16"))
    assert_equal_but_for_rounding(logits_by_blocks(model, windows), whole(model, windows))


def test_the_same_pass_gives_the_same_bits(store: Store) -> None:
    """Nothing depends on what ran before."""
    model = stored(store, "hf-qwen3-moe-bf16", "int4")
    assert logits_by_blocks(model).tobytes() == logits_by_blocks(model).tobytes()


# -- inputs of linear layers -----------------------------------------------------------------------


def inputs_of(model: Model) -> list[Given]:
    found: list[Given] = []
    forward = Forward(model, WINDOWS)
    for index in range(len(forward)):
        forward.step(index, found.extend)
    forward.finish(found.extend)
    return found


@pytest.mark.parametrize("name", DENSE)
def test_every_matrix_of_a_block_and_the_head_are_seen(store: Store, name: str) -> None:
    """All tokens of each linear layer, once, under the name the model has for its weight."""
    model = stored(store, name, None)
    tokens: dict[str, int] = {}
    for given_ in inputs_of(model):
        for weight in given_.names:
            assert given_.values.dtype == np.float32
            assert model.shape(weight)[-1] == given_.values.shape[1]
            tokens[weight] = tokens.get(weight, 0) + len(given_.values)
    tied = "lm_head.weight" not in model
    matrices = {n for n in model if len(model.shape(n)) > 1 and (tied or "embed" not in n)}
    assert tokens == dict.fromkeys(matrices, WINDOWS.size)


def test_layers_with_one_input_are_told_of_together(store: Store) -> None:
    """Query, key and value read the same numbers, and so do gate and up."""
    names = {given_.names for given_ in inputs_of(stored(store, "hf-llama-bf16", None))}
    block = "model.layers.0."
    heads = tuple(f"{block}self_attn.{kind}_proj.weight" for kind in "qkv")
    assert heads in names
    assert (f"{block}mlp.gate_proj.weight", f"{block}mlp.up_proj.weight") in names


@pytest.mark.parametrize("opened", ["stored", "directory"])
def test_experts_see_their_own_tokens(store: Store, opened: str) -> None:
    """Each token goes to as many experts as the router chooses; stacks and single experts alike."""
    name = "hf-qwen3-moe-bf16"
    model = stored(store, name, None) if opened == "stored" else open_model(fixture(name))
    chosen = int(model.config["num_experts_per_tok"])
    rows = 0
    for given_ in inputs_of(model):
        first = given_.names[0]
        if "layers.0.mlp.experts" not in first or "down" in first:
            continue
        rows += len(given_.values)
        assert len(given_.names) == 2
        assert all(weight in model for weight in given_.names)
        assert (given_.expert is None) == (opened == "directory")
        assert given_.experts in {None, model.config["num_local_experts"]}
    assert rows == WINDOWS.size * chosen


def test_the_input_is_what_the_layer_multiplies(store: Store) -> None:
    """The inputs of a block's last matrix times its weight are what mlx-lm adds to the stream."""
    model = stored(store, "hf-llama-bf16", "int8")
    module, _ = mlxlm.build(model, mx.float32)
    layer: Any = module.model.layers[0]
    hidden = module.model.embed_tokens(mx.array(WINDOWS))
    attended = hidden + layer.self_attn(layer.input_layernorm(hidden), "causal")
    expected = np.array(layer(hidden, "causal") - attended)
    name = "model.layers.0.mlp.down_proj.weight"
    seen = [g.values for g in inputs_of(model) if name in g.names]
    weight = np.array(model.dequantize(name).astype(mx.float32))
    found = (np.concatenate(seen) @ weight.T).reshape(expected.shape)
    # `dequantize` rounds to the scales' dtype, the pass does not
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


# -- errors ----------------------------------------------------------------------------------------


def test_an_architecture_without_a_pass_is_named(minilm: Path) -> None:
    """An embedding model has no next token; the hint says what can be compared."""
    with pytest.raises(BadPlan, match="bert") as caught:
        Forward(open_model(minilm), WINDOWS)
    assert "weights" in (caught.value.hint or "")


def between_blocks(change: str) -> Any:
    def call(self: Any, inputs: Any, cache: Any = None, input_embeddings: Any = None) -> Any:
        h = self.embed_tokens(inputs)
        for layer in self.layers:
            if change == "in place":
                h *= 2
            elif change == "new array":
                h = h * 2
            elif change == "skipped":
                continue
            h = layer(h, "causal", cache=None)
        return self.norm(h)

    return call


@pytest.mark.parametrize("change", ["in place", "new array", "skipped"])
def test_what_happens_between_blocks_is_not_lost(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An architecture that does something between its blocks is refused, never computed wrong."""
    monkeypatch.setattr(llama.LlamaModel, "__call__", between_blocks(change))
    with pytest.raises(BadPlan, match="block by block for the architecture llama"):
        Forward(open_model(fixture("hf-llama-bf16")), WINDOWS)


def test_tokens_of_another_model_are_refused() -> None:
    """MLX would read beyond the table."""
    model = open_model(fixture("hf-llama-bf16"))
    with pytest.raises(BadRequest, match="token 320 is not among its 320"):
        Forward(model, np.array([[1, 320]]))
    with pytest.raises(BadRequest, match="two axes"):
        Forward(model, np.array([1, 2]))


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "tiny", blocks=2, width=64)


def test_weights_that_are_missing_or_left_over_are_named(tiny: Path) -> None:
    """A config with more or fewer blocks than there are weights for."""
    config = json.loads((tiny / "config.json").read_text())
    for blocks, what in ((3, "layers.2.* missing|there is no 'model.layers.2"), (1, "layers.1.")):
        (tiny / "config.json").write_text(json.dumps({**config, "num_hidden_layers": blocks}))
        with pytest.raises(Corrupt, match=what):
            logits_by_blocks(open_model(tiny), WINDOWS % 32)


# -- memory ----------------------------------------------------------------------------------------


def write_llama(folder: Path, *, blocks: int, width: int) -> Path:
    wide = 3 * width
    shapes = {"model.embed_tokens.weight": (32, width), "model.norm.weight": (width,)}
    for index in range(blocks):
        block = f"model.layers.{index}"
        for name in "qkvo":
            shapes[f"{block}.self_attn.{name}_proj.weight"] = (width, width)
        for name in ("gate", "up"):
            shapes[f"{block}.mlp.{name}_proj.weight"] = (wide, width)
        shapes[f"{block}.mlp.down_proj.weight"] = (width, wide)
        for name in ("input", "post_attention"):
            shapes[f"{block}.{name}_layernorm.weight"] = (width,)
    config = {
        "model_type": "llama", "hidden_size": width, "intermediate_size": wide, "vocab_size": 32,
        "num_hidden_layers": blocks, "num_attention_heads": 4, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }  # fmt: skip
    return write_checkpoint(folder, {n: ("BF16", s) for n, s in shapes.items()}, config)


PROGRAM = """
import resource, sys
import numpy as np
from quantmill.forward import Forward
from quantmill.load import open_model
forward = Forward(open_model(sys.argv[1]), np.ones((1, 8), int))
for index in range(len(forward)):
    forward.step(index)
forward.logits(forward.finish()).tolist()
unit = 1 if sys.platform == "darwin" else 1024
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
"""

# A process counts as its own what the one that started it held: so a small one starts it.
STARTER = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"


def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path: Path) -> None:
    """Sixteen blocks of 14 MB in float32 take little more than two of them."""
    peaks = []
    for blocks in (2, 16):
        folder = write_llama(tmp_path / str(blocks), blocks=blocks, width=512)
        command = [sys.executable, "-S", "-c", STARTER, sys.executable, "-c", PROGRAM, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 40e6
