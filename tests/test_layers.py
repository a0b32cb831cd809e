"""Layers built from open models: `mlx.nn` modules that compute what the weights say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten, tree_map

from quantmill import layers
from quantmill.errors import Corrupt, NotFound
from quantmill.formats import FORMAT_NAMES, parse_format
from quantmill.layers import ExpertLinear
from quantmill.load import open_model
from quantmill.model import Model

TOLERANCE = 1e-5
"""Of float32 products with values around 1, computed once packed and once decoded."""

FORMATS = [None, *FORMAT_NAMES]
QUANTIZED_ONLY = pytest.mark.parametrize("name", FORMAT_NAMES)
ROWS, COLUMNS, EXPERTS = 8, 128, 3


@pytest.fixture(autouse=True)
def cpu() -> Any:
    """All comparisons are made on the CPU."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def random(*shape: int, seed: int = 0, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, 0.3, shape).astype(np.float32), dtype)


def packed(name: str, weight: mx.array) -> list[mx.array]:
    """Codes, scales and perhaps biases in the format of this name: MLX's own."""
    fmt = parse_format(name)
    return list(mx.quantize(weight, fmt.group_size, fmt.bits, mode=fmt.mode))


def decode(name: str, parts: Sequence[mx.array]) -> mx.array:
    """The floats that codes in the format of this name stand for, as float32."""
    fmt = parse_format(name)
    bias = parts[2] if len(parts) > 2 else None
    found = mx.dequantize(parts[0], parts[1], bias, fmt.group_size, fmt.bits, fmt.mode)
    return found.astype(mx.float32)


def flat(tree: Any) -> dict[str, Any]:
    """The arrays of a module by their paths."""
    return dict(tree_flatten(tree))


def tensors(path: str, parts: Sequence[mx.array]) -> dict[str, mx.array]:
    endings = (".weight", ".scales", ".biases")
    return {f"{path}{end}": part for end, part in zip(endings, parts, strict=False)}


def stored(path: str, weight: mx.array, name: str | None) -> dict[str, mx.array]:
    """A weight in a format, or plain."""
    return tensors(path, [weight] if name is None else packed(name, weight))


def opened(folder: Path, arrays: Mapping[str, mx.array], name: str | None = None) -> Model:
    """A model of these tensors, its config naming the format."""
    fmt = parse_format(name) if name else None
    config = {"mode": fmt.mode, "bits": fmt.bits, "group_size": fmt.group_size} if fmt else None
    (folder / "config.json").write_text(json.dumps({"quantization": config} if config else {}))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(arrays))
    return open_model(folder)


def close(found: mx.array, expected: mx.array) -> bool:
    if found.shape != expected.shape:
        return False
    return bool(mx.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE))


def identical(found: mx.array, expected: mx.array) -> bool:
    return found.dtype == expected.dtype and bool(mx.array_equal(found, expected))


X = random(2, 5, COLUMNS, seed=9)
W = random(ROWS, COLUMNS)
BIAS = random(ROWS, seed=7)


# -- linear ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [None, BIAS], ids=["plain", "bias"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_linear_layer_multiplies_by_its_weight(
    tmp_path: Path, name: str | None, bias: mx.array | None
) -> None:
    """The product is that with the decoded weight, plus the learned bias where there is one."""
    learned = {} if bias is None else {"m.bias": bias}
    model = opened(tmp_path, stored("m", W, name) | learned, name)
    weight = model.dequantize("m.weight").astype(mx.float32)
    expected = X @ weight.T + (0 if bias is None else bias)
    assert close(layers.linear(model, "m")(X), expected)


@pytest.mark.parametrize("bias", [False, True])
@QUANTIZED_ONLY
def test_a_quantized_layer_is_the_one_mlx_builds(tmp_path: Path, name: str, bias: bool) -> None:
    """The result is to the bit that of the layer MLX itself makes of the weight."""
    dense = nn.Linear(COLUMNS, ROWS, bias=bias)
    fmt = parse_format(name)
    dense.weight = W
    theirs = nn.QuantizedLinear.from_linear(dense, fmt.group_size, fmt.bits, fmt.mode)
    learned = {"m.bias": dense.bias} if bias else {}
    ours = layers.linear(opened(tmp_path, stored("m", W, name) | learned, name), "m")
    assert identical(ours(X), theirs(X))


@pytest.mark.parametrize("name", FORMATS)
def test_linear_layers_are_classes_of_mlx(tmp_path: Path, name: str | None) -> None:
    """Without a global scale the class is MLX's own."""
    found = layers.linear(opened(tmp_path, stored("m", W, name), name), "m")
    assert type(found) is (nn.QuantizedLinear if name else nn.Linear)


def test_nothing_is_copied(tmp_path: Path) -> None:
    """The parameters of a layer are the arrays of the model."""
    model = opened(tmp_path, stored("m", W, "int4"), "int4")
    found = layers.linear(model, "m")
    assert found.weight is model.parts("m.weight").weight
    assert found.scales is model.parts("m.weight").scales


def test_a_dense_bias_takes_the_weights_dtype(tmp_path: Path) -> None:
    """A float32 bias of a BF16 weight becomes BF16, so the output does too."""
    arrays = {"m.weight": W.astype(mx.bfloat16), "m.bias": BIAS}
    found = layers.linear(opened(tmp_path, arrays), "m")
    assert identical(found.bias, BIAS.astype(mx.bfloat16))
    assert found(X.astype(mx.bfloat16)).dtype == mx.bfloat16


# -- global scales ---------------------------------------------------------------------------------

PER_ROW = mx.linspace(0.2, 3, ROWS)
GLOBALS = [
    pytest.param(".weight.global_scale", mx.array(0.375), 0.375, id="one"),
    pytest.param(".weight.global_scale", mx.array([0.375]), 0.375, id="vector of one"),
    pytest.param(".weight.global_scale", PER_ROW, PER_ROW, id="per row"),
    pytest.param(".weight_scale_2", mx.array(0.375), 0.375, id="ModelOpt"),
    pytest.param(".weight_global_scale", mx.array(4.0), 0.25, id="reciprocal"),
    pytest.param(".weight_global_scale", 1 / PER_ROW, PER_ROW, id="reciprocal per row"),
]


def scaled(folder: Path, ending: str, scale: mx.array, **more: mx.array) -> Model:
    arrays = stored("m", W, "nvfp4") | {f"m{ending}": scale}
    return opened(folder, arrays | {f"m.{name}": array for name, array in more.items()}, "nvfp4")


def nvfp4_weight() -> mx.array:
    return decode("nvfp4", packed("nvfp4", W))


@pytest.mark.parametrize(("ending", "scale", "factor"), GLOBALS)
def test_a_global_scale_multiplies_the_product(
    tmp_path: Path, ending: str, scale: mx.array, factor: float | mx.array
) -> None:
    """Every spelling of the global scale multiplies outputs, before the bias is added."""
    model = scaled(tmp_path, ending, scale, bias=BIAS)
    expected = (X @ nvfp4_weight().T) * factor + BIAS
    assert close(layers.linear(model, "m")(X), expected)


def test_packed_codes_of_compressed_tensors(tmp_path: Path) -> None:
    """Codes called `weight_packed` with a dividing global scale make a layer."""
    codes, scales = packed("nvfp4", W)
    arrays = {"m.weight_packed": codes, "m.weight_scale": scales}
    model = opened(tmp_path, arrays | {"m.weight_global_scale": mx.array([4.0])}, "nvfp4")
    assert close(layers.linear(model, "m")(X), X @ nvfp4_weight().T * 0.25)


def test_a_global_scale_keeps_the_dtype(tmp_path: Path) -> None:
    """A float32 scale and bias do not turn BF16 activations into float32."""
    model = scaled(tmp_path, ".weight.global_scale", PER_ROW, bias=BIAS)
    assert layers.linear(model, "m")(X.astype(mx.bfloat16)).dtype == mx.bfloat16


def test_a_scaled_layer_is_a_quantized_layer(tmp_path: Path) -> None:
    """Code that looks for MLX's quantized classes finds the scaled ones."""
    model = scaled(tmp_path, ".weight.global_scale", PER_ROW)
    assert isinstance(layers.linear(model, "m"), nn.QuantizedLinear)
    assert isinstance(layers.embedding(model, "m"), nn.QuantizedEmbedding)


# -- embedding -------------------------------------------------------------------------------------

TOKENS = mx.array([[1, 7, 0], [3, 3, 2]])


@pytest.mark.parametrize("name", FORMATS)
def test_an_embedding_gives_rows(tmp_path: Path, name: str | None) -> None:
    """The rows are those of the decoded table, bit for bit."""
    model = opened(tmp_path, stored("m", W.astype(mx.bfloat16), name), name)
    found = layers.embedding(model, "m")(TOKENS)
    assert identical(found, model.dequantize("m.weight")[TOKENS])


@pytest.mark.parametrize("name", FORMATS)
def test_an_embedding_serves_as_tied_head(tmp_path: Path, name: str | None) -> None:
    """`as_linear` is the linear layer of the same weight."""
    model = opened(tmp_path, stored("m", W, name), name)
    found = layers.embedding(model, "m").as_linear(X)
    assert identical(found, layers.linear(model, "m")(X))


@pytest.mark.parametrize(("ending", "scale", "factor"), GLOBALS)
def test_a_global_scale_multiplies_rows_of_the_table(
    tmp_path: Path, ending: str, scale: mx.array, factor: float | mx.array
) -> None:
    """Rows are those of the decoded table, each with its own factor."""
    model = scaled(tmp_path, ending, scale)
    found = layers.embedding(model, "m")(TOKENS)
    assert identical(found, model.dequantize("m.weight")[TOKENS])


@pytest.mark.parametrize(("ending", "scale", "factor"), GLOBALS)
def test_a_global_scale_reaches_the_tied_head(
    tmp_path: Path, ending: str, scale: mx.array, factor: float | mx.array
) -> None:
    """The head's logits are multiplied as the rows are."""
    model = scaled(tmp_path, ending, scale)
    expected = (X @ nvfp4_weight().T) * factor
    assert close(layers.embedding(model, "m").as_linear(X), expected)


def test_a_quantized_embedding_tells_its_size(tmp_path: Path) -> None:
    """Rows and logical columns are there under MLX's names."""
    found = layers.embedding(opened(tmp_path, stored("m", W, "int4"), "int4"), "m")
    assert (found.num_embeddings, found.dims) == (ROWS, COLUMNS)


# -- experts ---------------------------------------------------------------------------------------

MLP = "model.layers.0.mlp"
PATH = f"{MLP}.experts.up_proj"
STACK = random(EXPERTS, ROWS, COLUMNS, seed=3)
EXPERT_BIAS = random(EXPERTS, ROWS, seed=4)
CHOSEN = mx.array([[0, 2], [1, 1], [2, 0], [0, 1]])
TOKEN_ROWS = random(4, 1, 1, COLUMNS, seed=5)


def single(name: str | None, *, bias: bool = False) -> dict[str, mx.array]:
    """Each expert's tensors on their own."""
    found: dict[str, mx.array] = {}
    for index in range(EXPERTS):
        path = f"{MLP}.experts.{index}.up_proj"
        found |= stored(path, STACK[index], name)
        found |= {f"{path}.bias": EXPERT_BIAS[index]} if bias else {}
    return found


def bare(name: str | None) -> dict[str, mx.array]:
    """A stack whose name does not end in `.weight`."""
    parts = [STACK] if name is None else packed(name, STACK)
    return {f"{PATH}{end}": p for end, p in zip(("", ".scale", ".bias"), parts, strict=False)}


LAYOUTS = {
    "stacked": lambda name: stored(PATH, STACK, name),
    "without .weight": bare,
    "switch_mlp": lambda name: stored(PATH.replace("experts", "switch_mlp"), STACK, name),
    "single": single,
}


def looped(model_weights: mx.array, factor: mx.array | float = 1, bias: bool = False) -> mx.array:
    """What the chosen experts make of each row, one expert after the other."""
    factors = mx.broadcast_to(mx.array(factor), (EXPERTS,))
    rows = []
    for row, chosen in enumerate(np.array(CHOSEN)):
        indices = [int(e) for e in chosen]
        outputs = [TOKEN_ROWS[row, 0] @ model_weights[e].T * factors[e] for e in indices]
        added = [EXPERT_BIAS[e] if bias else mx.zeros(ROWS) for e in indices]
        rows.append(mx.stack([y + b for y, b in zip(outputs, added, strict=True)]))
    return mx.stack(rows)


def decoded_stack(name: str | None) -> mx.array:
    return STACK if name is None else decode(name, packed(name, STACK))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("name", FORMATS)
def test_experts_equal_a_loop_over_them(tmp_path: Path, name: str | None, layout: Any) -> None:
    """However a stack is stored, each row goes through the experts it chose."""
    found = layers.experts(opened(tmp_path, layout(name), name), PATH)
    assert close(found(TOKEN_ROWS, CHOSEN), looped(decoded_stack(name)))


@pytest.mark.parametrize("path", [PATH, PATH.replace("experts", "switch_mlp")])
@pytest.mark.parametrize("layout", ["stacked", "switch_mlp", "single"])
def test_either_name_of_a_stack_finds_it(tmp_path: Path, path: str, layout: str) -> None:
    """A model's code may ask by either name, whichever the store has."""
    found = layers.experts(opened(tmp_path, LAYOUTS[layout]("int4"), "int4"), path)
    assert found.num_experts == EXPERTS


@pytest.mark.parametrize("path", [PATH, PATH.replace("experts", "switch_mlp")])
@pytest.mark.parametrize("where", ["experts", "switch_mlp"])
def test_a_stack_has_its_learned_bias(tmp_path: Path, path: str, where: str) -> None:
    """The bias beside the stack is added, by whichever name the stack is asked for."""
    at = PATH.replace("experts", where)
    model = opened(tmp_path, {**stored(at, STACK, "int4"), f"{at}.bias": EXPERT_BIAS}, "int4")
    expected = looped(decoded_stack("int4"), bias=True)
    assert close(layers.experts(model, path)(TOKEN_ROWS, CHOSEN), expected)


def test_single_experts_keep_their_learned_biases(tmp_path: Path) -> None:
    """Biases of single experts are stacked with their weights."""
    found = layers.experts(opened(tmp_path, single("int4", bias=True), "int4"), PATH)
    expected = looped(decoded_stack("int4"), bias=True)
    assert close(found(TOKEN_ROWS, CHOSEN), expected)


EACH = mx.array([0.5, 2.0, 3.0])


@pytest.mark.parametrize("scale", [mx.array(0.5), EACH, EACH[:, None]], ids=["one", "each", "col"])
def test_a_stack_has_its_global_scale(tmp_path: Path, scale: mx.array) -> None:
    """One number for the stack, or one for each expert, multiplies its outputs."""
    arrays = {**stored(PATH, STACK, "nvfp4"), f"{PATH}.weight.global_scale": scale}
    found = layers.experts(opened(tmp_path, arrays, "nvfp4"), PATH)(TOKEN_ROWS, CHOSEN)
    assert close(found, looped(decoded_stack("nvfp4"), scale.reshape(-1)))


def test_a_stack_may_have_a_scale_for_every_row(tmp_path: Path) -> None:
    """A global scale of experts by rows multiplies each expert's rows, as decoding does."""
    scale = mx.abs(random(EXPERTS, ROWS, seed=8)) + 0.5
    arrays = {**stored(PATH, STACK, "nvfp4"), f"{PATH}.weight.global_scale": scale}
    found = layers.experts(opened(tmp_path, arrays, "nvfp4"), PATH)(TOKEN_ROWS, CHOSEN)
    assert close(found, looped(decoded_stack("nvfp4") * scale[..., None]))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_single_experts_have_their_own_global_scales(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    """Scales of single experts are stacked with their weights."""
    own = {f"{MLP}.experts.{i}.up_proj.weight.global_scale": s.reshape(shape)
           for i, s in enumerate(EACH)}  # fmt: skip
    model = opened(tmp_path, single("nvfp4") | own, "nvfp4")
    found = layers.experts(model, PATH)(TOKEN_ROWS, CHOSEN)
    assert close(found, looped(decoded_stack("nvfp4"), EACH))


def test_ten_experts_and_more_are_in_numeric_order(tmp_path: Path) -> None:
    """Expert 10 follows expert 9, not expert 1."""
    arrays = {f"{MLP}.experts.{i}.up_proj.weight": mx.full((2, 4), float(i)) for i in range(12)}
    found = layers.experts(opened(tmp_path, arrays), PATH)
    assert found.weight[:, 0, 0].tolist() == list(range(12))


def other(name: str | None, shape: tuple[int, int] = (ROWS, COLUMNS)) -> dict[str, mx.array]:
    """Tensors of expert 1 in another way."""
    return stored(f"{MLP}.experts.1.up_proj", random(*shape), name)


ONE = f"{MLP}.experts.1.up_proj"
UNEVEN = {
    "another format": (other("mxfp4"), ()),
    "not quantized": (other(None), (f"{ONE}.scales",)),
    "another shape": (other("nvfp4", (ROWS + 1, COLUMNS)), ()),
    "a lone bias": ({f"{ONE}.bias": BIAS}, ()),
    "a lone global scale": ({f"{ONE}.weight.global_scale": mx.array(2.0)}, ()),
    "a gap": ({}, (f"{ONE}.weight", f"{ONE}.scales")),
}


@pytest.mark.parametrize(("added", "removed"), UNEVEN.values(), ids=UNEVEN.keys())
def test_experts_that_differ_are_not_stacked(
    tmp_path: Path, added: Mapping[str, mx.array], removed: Sequence[str]
) -> None:
    """Experts of one group that differ, or lack a number, are an error naming the group."""
    arrays = {n: a for n, a in (single("nvfp4") | dict(added)).items() if n not in removed}
    (tmp_path / "config.json").write_text("{}")  # the shapes say each format
    mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays)
    with pytest.raises(Corrupt, match=rf"the experts of '{PATH}'") as caught:
        layers.experts(open_model(tmp_path), PATH)
    assert caught.value.kind == "uneven_experts"


# -- in a module -----------------------------------------------------------------------------------


class Block(nn.Module):
    """A module of one layer of each kind."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.embed = layers.embedding(model, "embed")
        self.up = layers.linear(model, "up")
        self.switch = layers.experts(model, PATH)

    def __call__(self, tokens: mx.array, indices: mx.array) -> tuple[mx.array, mx.array]:
        x = self.embed(tokens)
        return self.switch(x[..., None, None, :], indices), self.up(x)


@pytest.fixture(params=["int4", "nvfp4", None])
def block(tmp_path: Path, request: pytest.FixtureRequest) -> Block:
    name = request.param
    arrays = stored("embed", W, name) | stored("up", W, name) | stored(PATH, STACK, name)
    return Block(opened(tmp_path, arrays | {"up.bias": BIAS}, name))


def test_parameters_are_a_tree_of_arrays(block: Block) -> None:
    """Each layer shows its arrays, and nothing else, as parameters."""
    quantized = isinstance(block.up, nn.QuantizedLinear)
    ends = ["weight", *(["scales"] if quantized else [])]
    if quantized and block.up.mode == "affine":
        ends.append("biases")
    expected = {f"{layer}.{end}" for layer in ("embed", "up", "switch") for end in ends}
    assert flat(block.parameters()).keys() == expected | {"up.bias"}


def test_parameters_do_not_train(block: Block) -> None:
    """Weights of a stored model are frozen."""
    assert flat(block.trainable_parameters()) == {}


def test_set_dtype_leaves_codes_alone(block: Block) -> None:
    """Changing the dtype of a module converts floats only."""
    before = flat(block.parameters())
    expected = {
        n: mx.bfloat16 if mx.issubdtype(a.dtype, mx.floating) else a.dtype
        for n, a in before.items()
    }
    block.set_dtype(mx.bfloat16)
    assert {n: a.dtype for n, a in flat(block.parameters()).items()} == expected


def test_update_replaces_arrays(block: Block) -> None:
    """Arrays given to a module are the ones it computes with."""
    indices = mx.broadcast_to(mx.array([0, 1]), (*TOKENS.shape, 2))
    block.update(tree_map(mx.zeros_like, block.parameters()))
    experts, dense = block(TOKENS, indices)
    assert not mx.any(experts).item()
    assert not mx.any(dense).item()


# -- what is missing -------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [layers.linear, layers.embedding, layers.experts])
@pytest.mark.parametrize("path", ["no.such", "m.weigh", ""])
def test_a_path_without_a_weight_is_not_found(tmp_path: Path, build: Any, path: str) -> None:
    """A path where the model has no weight is named, for every kind of layer."""
    model = opened(tmp_path, {"m.weight": W, "n.bias": BIAS})
    with pytest.raises(NotFound, match=f"'{path}'") as caught:
        build(model, path)
    assert caught.value.kind == "tensor_not_found"


def test_a_bias_alone_is_no_layer(tmp_path: Path) -> None:
    """A learned bias without a weight makes no layer."""
    with pytest.raises(NotFound, match="no weight at 'n'"):
        layers.linear(opened(tmp_path, {"m.weight": W, "n.bias": BIAS}), "n")


def test_a_dense_stack_is_an_expert_layer(tmp_path: Path) -> None:
    """Plain stacks make the same class, without scales."""
    found = layers.experts(opened(tmp_path, single(None)), PATH)
    assert isinstance(found, ExpertLinear)
    assert "scales" not in found
