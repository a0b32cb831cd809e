"""LoRA adapters added to weights on import: PEFT's files and mlx-lm's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from checkpoints import SMALL, fixture, load_arrays, write_checkpoint
from quantmill.creation import Created, create, plan
from quantmill.errors import BadPlan, BadSource
from quantmill.load import open_model
from quantmill.model import Model
from quantmill.store import Store

Array = npt.NDArray[Any]

Q_PROJ = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
EMBED = "model.embed_tokens"


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).normal(0, 0.1, shape).astype(np.float32)


def write_peft(folder: Path, tensors: dict[str, Array], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def peft_pair(module: str, rows: int, columns: int, rank: int = 4) -> dict[str, Array]:
    start = f"base_model.model.{module}"
    return {
        f"{start}.lora_A.weight": normal(1, rank, columns),
        f"{start}.lora_B.weight": normal(2, rows, rank),
    }


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "base", SMALL)


def imported(base: Path, adapter: Path, root: Path, **choices: Any) -> tuple[Created, Model]:
    store = Store(root)
    created = create("m", base, store=store, merge_lora=adapter, **choices)
    return created, open_model("m", store=store)


def floats(folder: Path) -> dict[str, Array]:
    arrays = load_arrays(folder / "model.safetensors")
    import mlx.core as mx

    return {n: np.asarray(a.astype(mx.float32)) for n, a in arrays.items()}


def stored(model: Model, name: str) -> Array:
    import mlx.core as mx

    return np.asarray(model.dequantize(name).astype(mx.float32))


def in_bf16(values: Array) -> Array:
    found: Array = values.astype(ml_dtypes.bfloat16).astype(np.float32)
    return found


def close(got: Array, values: Array) -> None:
    """Equal but for sums in another order, which may round to the next BF16 number."""
    np.testing.assert_allclose(got, in_bf16(values), rtol=2**-7, atol=2**-20)
    assert (got == in_bf16(values)).mean() > 0.99


def test_peft_factors_are_added(base: Path, tmp_path: Path) -> None:
    """A weight becomes itself plus alpha over rank times B A; the others stay, bit for bit."""
    pair = peft_pair(Q_PROJ, 128, 128)
    adapter = write_peft(tmp_path / "a", pair)
    created, model = imported(base, adapter, tmp_path / "s")
    before, (a, b) = floats(base), pair.values()
    close(stored(model, f"{Q_PROJ}.weight"), before[f"{Q_PROJ}.weight"] + 2.0 * (b @ a))
    for name, values in before.items():
        if Q_PROJ not in name:
            np.testing.assert_array_equal(stored(model, name), values)
    assert [s.name for s in created.plan.tensors if any(s.added)] == [f"{Q_PROJ}.weight"]


def test_what_is_added_does_not_depend_on_the_pieces(base: Path, tmp_path: Path) -> None:
    """Threads and memory change no byte of a merged model."""
    adapter = write_peft(
        tmp_path / "a", peft_pair(Q_PROJ, 128, 128) | peft_pair(DOWN, 128, 128, 16)
    )
    digests = {
        imported(base, adapter, tmp_path / f"s{workers}", workers=workers, quantize="int4")[
            0
        ].digest
        for workers in (1, 2, 3)
    }
    assert len(digests) == 1


def test_sums_are_made_in_a_fixed_order(base: Path, tmp_path: Path) -> None:
    """The result is that of adding one rank after the other in float32, to the last bit."""
    pair = peft_pair(Q_PROJ, 128, 128, 7)
    _, model = imported(base, write_peft(tmp_path / "a", pair, r=7, lora_alpha=14), tmp_path / "s")
    a, b = pair.values()
    total = np.zeros((128, 128), np.float32)
    for rank in range(7):
        total = total + b[:, rank, None] * a[rank]
    values = floats(base)[f"{Q_PROJ}.weight"] + total * np.float32(2)
    np.testing.assert_array_equal(stored(model, f"{Q_PROJ}.weight"), in_bf16(values))


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"use_rslora": True}, 4.0),
        ({"lora_alpha": 2}, 0.5),
        ({"alpha_pattern": {"self_attn.q_proj": 16}}, 4.0),
        ({"alpha_pattern": {"v_proj": 16}}, 2.0),
    ],
)
def test_the_scale_is_the_configs(
    config: dict[str, Any], scale: float, base: Path, tmp_path: Path
) -> None:
    """Alpha, its patterns and rank-stabilised scaling are followed."""
    pair = peft_pair(Q_PROJ, 128, 128)
    _, model = imported(base, write_peft(tmp_path / "a", pair, **config), tmp_path / "s")
    a, b = pair.values()
    close(stored(model, f"{Q_PROJ}.weight"), floats(base)[f"{Q_PROJ}.weight"] + scale * (b @ a))


def test_embeddings_and_named_adapters(base: Path, tmp_path: Path) -> None:
    """An embedding's factors are transposed, and the adapter's own name in names is no matter."""
    start = f"base_model.model.{EMBED}"
    a, b = normal(3, 4, 64), normal(4, 128, 4)
    tensors = {
        f"{start}.lora_embedding_A.default": a,
        f"{start}.lora_embedding_B.default": b,
    }
    _, model = imported(base, write_peft(tmp_path / "a", tensors), tmp_path / "s")
    close(stored(model, f"{EMBED}.weight"), floats(base)[f"{EMBED}.weight"] + 2.0 * (b @ a).T)


def test_transposed_layers(tmp_path: Path) -> None:
    """`fan_in_fan_out` weights are [in, out], so their change is transposed as well."""
    name = "transformer.h.0.attn.c_attn"
    base = write_checkpoint(tmp_path / "base", {f"{name}.weight": ("BF16", (64, 192))})
    pair = {
        f"base_model.model.{name}.lora_A.weight": normal(5, 4, 64),
        f"base_model.model.{name}.lora_B.weight": normal(6, 192, 4),
    }
    adapter = write_peft(tmp_path / "a", pair, fan_in_fan_out=True)
    _, model = imported(base, adapter, tmp_path / "s")
    a, b = pair.values()
    close(stored(model, f"{name}.weight"), floats(base)[f"{name}.weight"] + 2.0 * (b @ a).T)


def test_whole_tensors_that_were_trained_are_taken(base: Path, tmp_path: Path) -> None:
    """A trained copy of a tensor replaces the model's."""
    import mlx.core as mx

    values = mx.array(normal(7, 128)).astype(mx.bfloat16)
    norm = "model.layers.0.input_layernorm"
    adapter = write_peft(tmp_path / "a", peft_pair(Q_PROJ, 128, 128))
    tensors = load_arrays(adapter / "adapter_model.safetensors")
    tensors[f"base_model.model.{norm}.modules_to_save.default.weight"] = values
    mx.save_safetensors(str(adapter / "adapter_model.safetensors"), tensors)
    _, model = imported(base, adapter, tmp_path / "s")
    np.testing.assert_array_equal(
        stored(model, f"{norm}.weight"), np.asarray(values.astype(mx.float32))
    )


def test_changes_are_added_before_quantizing(base: Path, tmp_path: Path) -> None:
    """The codes are those of the merged weight, not of the base's."""
    adapter = write_peft(tmp_path / "a", peft_pair(Q_PROJ, 128, 128))
    _, whole = imported(base, adapter, tmp_path / "s")
    _, model = imported(base, adapter, tmp_path / "q", quantize="int8")
    name = f"{Q_PROJ}.weight"
    merged = stored(whole, name)
    assert np.abs(stored(model, name) - merged).max() < np.abs(merged).max() / 100


def test_mlx_lms_fusing_gives_the_same_weights(tmp_path: Path) -> None:
    """An adapter in mlx-lm's files changes weights as mlx-lm's own fuse does."""
    import mlx.core as mx
    from mlx_lm.tuner.lora import LoRALinear

    source = fixture("hf-llama-f32")
    names = [n for n in load_arrays(source / "model.safetensors") if n.endswith("q_proj.weight")]
    weight = load_arrays(source / "model.safetensors")[names[0]]
    from mlx import nn

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = weight
    layer = LoRALinear.from_base(linear, r=8, scale=3.0)
    layer.lora_b = mx.array(normal(8, 8, weight.shape[0]))
    module = names[0].removesuffix(".weight")
    adapter = tmp_path / "a"
    adapter.mkdir()
    mx.save_safetensors(
        str(adapter / "adapters.safetensors"),
        {f"{module}.lora_a": layer.lora_a, f"{module}.lora_b": layer.lora_b},
    )
    (adapter / "0000100_adapters.safetensors").write_bytes(b"an earlier state, never opened")
    said = {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 3.0}}
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    _, model = imported(source, adapter, tmp_path / "s")
    fused = np.asarray(layer.fuse().weight)
    np.testing.assert_allclose(stored(model, names[0]), fused, rtol=2**-18, atol=2**-22)


def test_experts_have_changes_of_their_own(tmp_path: Path) -> None:
    """In a stack, each expert gets what the adapter adds to it, and the others nothing."""
    names = [f"model.layers.0.mlp.experts.{i}.up_proj" for i in range(3)]
    base = write_checkpoint(tmp_path / "base", {f"{n}.weight": ("BF16", (64, 128)) for n in names})
    pair = peft_pair(names[1], 64, 128)
    _, model = imported(base, write_peft(tmp_path / "a", pair), tmp_path / "s")
    a, b = pair.values()
    before, stack = floats(base), stored(model, "model.layers.0.mlp.experts.up_proj.weight")
    for index in (0, 2):
        np.testing.assert_array_equal(stack[index], before[f"{names[index]}.weight"])
    close(stack[1], before[f"{names[1]}.weight"] + 2.0 * (b @ a))


def test_fp8_weights_are_decoded_and_then_changed(tmp_path: Path) -> None:
    """On an FP8 base the change is added to the decoded numbers."""
    name = "model.layers.0.self_attn.q_proj"
    pair = peft_pair(name, 128, 128)
    source = fixture("ct-fp8-channel")
    adapter = write_peft(tmp_path / "a", pair)
    _, model = imported(source, adapter, tmp_path / "s", requantize="bf16")
    _, plain = imported(
        source, write_peft(tmp_path / "b", pair, lora_alpha=0), tmp_path / "t", requantize="bf16"
    )
    a, b = pair.values()
    close(stored(model, f"{name}.weight"), stored(plain, f"{name}.weight") + 2.0 * (b @ a))


def test_quantized_weights_are_not_changed_in_place(tmp_path: Path) -> None:
    """Codes that are kept cannot have anything added; the hint says what to do."""
    name = "model.layers.0.self_attn.q_proj"
    adapter = write_peft(tmp_path / "a", peft_pair(name, 128, 128))
    with pytest.raises(BadPlan, match="quantized already") as caught:
        plan(fixture("ct-nvfp4"), merge_lora=adapter)
    assert "--requantize" in str(caught.value.hint)


# -- what does not fit -----------------------------------------------------------------------------

GOOD = peft_pair(Q_PROJ, 128, 128)
FIRST, SECOND = GOOD


@pytest.mark.parametrize(
    ("tensors", "config", "kind"),
    [
        ({FIRST: GOOD[FIRST]}, {}, "half_an_adapter"),
        ({SECOND: GOOD[SECOND]}, {}, "half_an_adapter"),
        (peft_pair("model.layers.9.self_attn.q_proj", 128, 128), {}, "adapter_does_not_fit"),
        (peft_pair(Q_PROJ, 64, 128), {}, "adapter_does_not_fit"),
        (GOOD | {"base_model.model.lm_head.weight": normal(9, 4, 4)}, {}, "adapter_does_not_fit"),
        (GOOD, {"use_dora": True}, "unsupported_adapter"),
        (GOOD, {"peft_type": "IA3"}, "unsupported_adapter"),
        (GOOD, {"lora_alpha": "8"}, "bad_adapter"),
        (GOOD, {"lora_alpha": float("nan")}, "bad_adapter"),
        (GOOD, {"alpha_pattern": {"(a+)+$": 4}}, "unsupported_adapter"),
        (
            GOOD | {f"base_model.model.{Q_PROJ}.lora_magnitude_vector": normal(9, 128)},
            {},
            "unsupported_adapter",
        ),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused(
    tensors: dict[str, Array], config: dict[str, Any], kind: str, base: Path, tmp_path: Path
) -> None:
    """Other methods, missing halves, wrong shapes and unknown modules are refused by name."""
    with pytest.raises(BadSource) as caught:
        plan(base, merge_lora=write_peft(tmp_path / "a", tensors, **config))
    assert caught.value.kind == kind


def test_folders_that_are_no_adapters_are_refused(base: Path, tmp_path: Path) -> None:
    """A missing directory, config or weights file is told, pickles with the reason."""
    adapter = write_peft(tmp_path / "a", GOOD)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(BadSource, match="adapter_config"):
        plan(base, merge_lora=adapter)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(BadSource, match="pickle"):
        plan(base, merge_lora=adapter)
    with pytest.raises(BadSource) as caught:
        plan(base, merge_lora=tmp_path / "absent")
    assert caught.value.kind == "not_an_adapter"


def test_an_adapter_goes_with_a_draft(base: Path, tmp_path: Path) -> None:
    """Model, draft and adapter are imported at once; the adapter changes the model alone."""
    adapter = write_peft(tmp_path / "a", GOOD)
    draft = write_checkpoint(
        tmp_path / "d", SMALL, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    )
    created, _ = imported(base, adapter, tmp_path / "s", draft=draft)
    assert [s.name for s in created.plan.tensors if any(s.added)] == [f"{Q_PROJ}.weight"]
    assert not any("adapter" in s.name for s in created.plan.tensors)
