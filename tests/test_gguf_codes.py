"""GGUF files whose codes are kept: every type of block, bit for bit; a real model; bad scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, quants
from safetensors.numpy import save_file

from ggufs import (
    EXPERTS,
    FFN,
    HIDDEN,
    KEYS,
    LAYERS,
    LLAMA,
    MOE,
    Floats,
    convert_llama,
    deinterleave,
    model,
    stored,
    weights,
    write_blocks,
    write_gguf,
)
from quantmill.coding import recoded
from quantmill.creation import create, plan, plan_for
from quantmill.errors import BadPlan, BadRequest, BadWeights
from quantmill.formats import Format
from quantmill.ggmlblocks import split
from quantmill.ggufcodes import EXACT
from quantmill.ggufsource import open_gguf
from quantmill.load import open_model
from quantmill.model import Model
from quantmill.planner import parse_override
from quantmill.planreport import plan_rows, plan_summary
from quantmill.plans import RECODE, Options, Plan, TensorSpec
from quantmill.recipes import Request
from quantmill.store import Store
from quantmill.verification import verify
from quantmill.weights import Quantized

Bytes = npt.NDArray[np.uint8]

HALF = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
        "Q4_K": (0, 2), "Q5_K": (0, 2), "TQ1_0": (52,), "TQ2_0": (64,)}  # fmt: skip
"""Where a block has numbers in F16."""

WIDE = {
    "block_count": 1, "context_length": 128, "embedding_length": 256, "feed_forward_length": 512,
    "attention.head_count": 4, "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-6,
}  # fmt: skip
"""A llama whose rows hold whole blocks of any type."""

SHAPES = {
    "token_embd": (6, 256), "blk.0.attn_q": (256, 256), "blk.0.attn_k": (128, 256),
    "blk.0.attn_v": (128, 256), "blk.0.attn_output": (256, 256), "blk.0.ffn_gate": (512, 256),
    "blk.0.ffn_up": (512, 256), "blk.0.ffn_down": (256, 512),
}  # fmt: skip
NAMES = {f"blk.0.{gguf}": f"model.layers.0.{name}" for name, (gguf, _) in LLAMA[2].items()} | {
    "token_embd": "model.embed_tokens"
}
HEADS_OF = {"blk.0.attn_q": 4, "blk.0.attn_k": 2}


def random_blocks(kind: str, shape: tuple[int, ...], seed: int) -> Bytes:
    """Rows of blocks with any codes and any finite scales that do not overflow F16."""
    random, row = np.random.default_rng(seed), EXACT[kind]
    blocks = shape[-1] // row.elements
    raw = random.integers(0, 256, (*shape[:-1], blocks, row.nbytes), dtype=np.uint8)
    for at in HALF.get(kind, ()):
        exponent = random.integers(0, 23, raw.shape[:-1])  # subnormal to 2**8
        half = exponent << 10 | random.integers(0, 2**10, raw.shape[:-1])
        half |= random.integers(0, 2, raw.shape[:-1]) << 15
        raw[..., at : at + 2] = half.astype("<u2")[..., None].view(np.uint8)
    if kind == "MXFP4":
        raw[..., 0] = random.integers(0, 251, raw.shape[:-1])
    if kind == "NVFP4":
        raw[..., :4] = random.integers(0, 127, (*raw.shape[:-1], 4))
    return raw.reshape(*shape[:-1], -1)


def decoded(raw: Bytes, kind: str) -> Floats:
    """What the gguf library reads."""
    found = quants.dequantize(raw, GGMLQuantizationType[kind])
    return np.asarray(found, np.float32)


def exact(opened: Model, name: str) -> Floats:
    """A stored weight in float32: codes times scales, plus biases, nothing rounded before."""
    parts, params = opened.parts(name), opened.params(name)
    assert params is not None
    fmt = params.format
    assert parts.scales is not None
    scales, biases = parts.scales, parts.biases
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    found = mx.dequantize(
        parts.weight, scales, biases, fmt.group_size, fmt.bits, fmt.mode, dtype=mx.float32
    )
    return np.asarray(found)


def wide_llama(path: Path, kind: str) -> dict[str, Floats]:
    """A file of random blocks; checkpoint name → the numbers that the library reads there."""
    tensors = {n: (random_blocks(kind, s, i), kind) for i, (n, s) in enumerate(SHAPES.items())}
    norms = dict.fromkeys(("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"))
    plain = {f"{n}.weight": (weights((256,), i), "F32") for i, n in enumerate(norms)}
    write_blocks(path, "llama", {f"{n}.weight": t for n, t in tensors.items()}, plain, WIDE)
    return {
        f"{NAMES[n]}.weight": deinterleave(decoded(raw, kind), HEADS_OF.get(n, 0))
        for n, (raw, _) in tensors.items()
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.gguf"


# -- every type ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EXACT)
def test_kept_codes_are_the_numbers_the_library_reads(kind: str, path: Path, store: Store) -> None:
    """Random blocks of each type go through create; codes * scale + bias is equal in float32."""
    expected = wide_llama(path, kind)
    made = create("m", path, store=store)
    assert not verify(store).damage
    with open_model("m", store=store) as opened:
        for name, values in expected.items():
            assert np.array_equal(exact(opened, name), values), name
            params = opened.params(name)
            assert params is not None
            assert params.format == EXACT[kind].format
    planned = {t.name: t for t in made.plan.tensors}
    assert {planned[name].scheme for name in expected} == {f"GGUF {kind}"}
    assert {planned[name].transform for name in expected} == {RECODE}


@pytest.mark.parametrize("kind", EXACT)
def test_the_table_has_the_librarys_block_sizes(kind: str) -> None:
    """Elements and bytes of a block are what the gguf library has for the type."""
    row = EXACT[kind]
    assert GGML_QUANT_SIZES[GGMLQuantizationType[kind]] == (row.elements, row.nbytes)


def test_types_that_no_format_holds_are_not_in_the_table() -> None:
    """Groups of 16, and codes that look up a table: no affine format has their numbers."""
    assert not {"Q2_K", "Q3_K", "Q6_K", "IQ4_NL", "IQ4_XS"} & EXACT.keys()


@pytest.mark.parametrize("kind", ["Q5_1", "Q4_K", "NVFP4"])
def test_the_size_of_a_piece_changes_nothing(kind: str, path: Path) -> None:
    """Blocks read row by row give the same codes, scales and biases as all at once."""
    wide_llama(path, kind)
    with open_gguf(path) as opened:
        source = opened.source.tensors["model.layers.0.mlp.down_proj.weight"]
        specs = {t.name: t for t in plan_for(opened.source, Request()).tensors}
        spec = specs[source.name]
        at_once, in_rows = (
            joined(spec, recoded(spec, [source], opened.read_into, n)) for n in (1 << 30, 1)
        )
    assert at_once == in_rows
    assert len(at_once[0]) == 256 * 512 * EXACT[kind].format.bits // 8


def joined(spec: TensorSpec, pieces: Any) -> tuple[bytes, bytes, bytes]:
    found: list[Quantized] = list(pieces)
    return (
        b"".join(p.weight for p in found),
        b"".join(p.scales for p in found),
        b"".join(p.biases or b"" for p in found),
    )


def test_experts_are_stacked_with_their_codes(path: Path, store: Store) -> None:
    """A stack of experts keeps codes and scales, one blob for all projections of a layer."""
    tensors, stacks = stored(model(MOE), "Q8_0"), {}
    for n in range(LAYERS):
        shapes = {"gate": (FFN, HIDDEN), "up": (FFN, HIDDEN), "down": (HIDDEN, FFN)}
        for seed, (part, shape) in enumerate(shapes.items()):
            stack = weights((EXPERTS, *shape), 100 + 3 * n + seed)
            tensors[f"blk.{n}.ffn_{part}_exps.weight"] = (stack, "Q8_0")
            stacks[f"model.layers.{n}.mlp.experts.{part}_proj.weight"] = stack
        tensors[f"blk.{n}.ffn_gate_inp.weight"] = (weights((EXPERTS, HIDDEN), n), "F32")
    keys = {
        **KEYS, "expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": FFN
    }  # fmt: skip
    made = create("m", write_gguf(path, "qwen3moe", tensors, keys), store=store)
    q8 = GGMLQuantizationType.Q8_0
    with open_model("m", store=store) as opened:
        for name, stack in stacks.items():
            assert np.array_equal(exact(opened, name), decoded(quants.quantize(stack, q8), "Q8_0"))
    assert "model.layers.1.mlp.experts" in {b.name for b in made.plan.blobs}


# -- what the plan says ----------------------------------------------------------------------------


def mixed(path: Path) -> Path:
    """A llama in Q4_0 with one matrix of a type that no format holds."""
    tensors = stored(model(LLAMA), "Q4_0", convert_llama)
    blocks = np.random.default_rng(1).integers(0, 256, (HIDDEN, FFN // 32 * 18), dtype=np.uint8)
    blocks.reshape(-1, 18)[:, :2] = np.array([0.01], "<f2").view(np.uint8)
    raw = {"blk.0.ffn_down.weight": (blocks, "IQ4_NL")}
    rest = {n: t for n, t in tensors.items() if n not in raw}
    return write_blocks(path, "llama", raw, rest, KEYS)


def whys(found: Plan) -> dict[str, tuple[str, str, str]]:
    return {row[0]: (row[2], row[3], row[5]) for row in plan_rows(found)}


def test_the_plan_says_what_becomes_of_each_type(path: Path) -> None:
    """Kept where a format holds the codes, decoded to BF16 where none does, with the reason."""
    found = plan(mixed(path))
    rows = whys(found)
    assert rows["model.layers.0.mlp.up_proj.weight"] == (
        "GGUF Q4_0", "int4 g32", "GGUF Q4_0, codes and scales kept",
    )  # fmt: skip
    assert rows["model.layers.0.mlp.down_proj.weight"] == (
        "GGUF IQ4_NL", "BF16", "GGUF IQ4_NL decoded; no format holds its codes",
    )  # fmt: skip
    assert rows["model.norm.weight"] == ("BF16", "keep", "not part of a quantized weight")
    summary = "\n".join(plan_summary(found))
    assert "1 weight: GGUF IQ4_NL, decoded to BF16" in summary
    assert "14 weights: GGUF Q4_0, codes and scales kept" in summary


def test_asking_for_a_format_decodes(path: Path, store: Store) -> None:
    """-q and --requantize give the same model, and the plan speaks of the second rounding."""
    mixed(path)
    first = create("a", path, store=store, quantize="int8")
    again = create("b", path, store=store, requantize="int8")
    assert first.digest == again.digest
    rows = whys(first.plan)
    assert rows["model.layers.0.mlp.up_proj.weight"] == (
        "GGUF Q4_0", "int8", "GGUF Q4_0 decoded; as requested",
    )  # fmt: skip
    assert "a second rounding" in "\n".join(plan_summary(first.plan))


def test_requantize_bf16_only_decodes(path: Path, store: Store) -> None:
    """Every weight becomes the library's numbers in BF16, and every tensor has that dtype."""
    made = create("m", llama_q4(path), store=store, requantize="bf16")
    assert {t.dtype for t in made.plan.tensors} == {"BF16"}
    assert {t.format for t in made.plan.tensors} == {None}


def llama_q4(path: Path) -> Path:
    return write_gguf(path, "llama", stored(model(LLAMA), "Q4_0", convert_llama))


def test_a_rule_with_a_format_decodes_and_one_that_keeps_does_not(path: Path) -> None:
    """--tensor NAME=FORMAT needs numbers; NAME=keep leaves codes alone."""
    llama_q4(path)
    name = "model.layers.0.mlp.up_proj.weight"
    rules = {f: Options((parse_override(f"{name}={f}"),)) for f in ("affine-2:32", "keep")}
    planned = {f: {t.name: t for t in plan(path, options=o).tensors} for f, o in rules.items()}
    assert planned["affine-2:32"][name].format == Format("affine", 2, 32)
    other = planned["affine-2:32"]["model.layers.1.mlp.up_proj.weight"]
    assert (other.format, other.dtype) == (None, "BF16")
    assert planned["keep"][name].transform == RECODE


def test_a_draft_model_is_decoded_by_its_own_format_alone(path: Path, store: Store) -> None:
    """A model and its draft keep their codes each, unless a format is asked for the one."""
    llama_q4(path)
    name = "model.layers.0.mlp.up_proj.weight"
    for asked, expected in ((None, "int4 g32"), ("int8", "int8")):
        made = create("m", path, store=store, draft=path, draft_quantize=asked)
        found = {t.name: t.format for t in made.plan.tensors}
        model_format, draft_format = found[name], found[f"draft.{name}"]
        assert model_format == Format("affine", 4, 32)
        assert draft_format is not None
        assert draft_format.label == expected


def test_an_adapter_is_added_to_the_decoded_numbers(
    path: Path, store: Store, tmp_path: Path
) -> None:
    """A LoRA adapter changes numbers, so the file is decoded for it."""
    module = "model.layers.0.self_attn.q_proj"
    first, second = (weights(shape, n) for n, shape in enumerate([(4, HIDDEN), (HIDDEN, 4)]))
    names = (f"base_model.model.{module}.lora_{part}.weight" for part in "AB")
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(dict(zip(names, (first, second), strict=True)), folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    create("m", llama_q4(path), store=store, merge_lora=folder)
    q4 = GGMLQuantizationType.Q4_0
    values, kind = stored(model(LLAMA), "Q4_0", convert_llama)["blk.0.attn_q.weight"]
    read = deinterleave(decoded(quants.quantize(values, q4), kind), 4)
    with open_model("m", store=store) as opened:
        assert opened.dtype(f"{module}.weight") == "BF16"
        found = np.asarray(opened.dequantize(f"{module}.weight").astype(mx.float32))
    assert np.abs(found - (read + second @ first)).max() <= 2**-7 * np.abs(found).max()


def test_a_file_of_floats_has_nothing_to_requantize(path: Path) -> None:
    """--requantize is refused where no tensor is quantized."""
    write_gguf(path, "llama", stored(model(LLAMA), "F16", convert_llama))
    with pytest.raises(BadRequest, match="not quantized"):
        plan(path, requantize="int4")


@pytest.mark.parametrize("request_", [Request("int4"), Request(requantize="int4")])
def test_blocks_are_never_taken_for_numbers(path: Path, request_: Request) -> None:
    """A file that was opened for its codes cannot be planned as if it had been decoded."""
    with open_gguf(llama_q4(path)) as opened, pytest.raises(BadPlan, match="tensor"):
        plan_for(opened.source, request_)


def test_norms_follow_the_dtype_of_the_scales(path: Path) -> None:
    """Beside F16 scales F32 norms become F16 where that changes none; config.json says float16."""
    with open_gguf(llama_q4(path)) as opened:
        assert opened.source.tensors["model.norm.weight"].dtype == "F16"
        assert opened.source.config["torch_dtype"] == "float16"


# -- scales that cannot be kept --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "at", "value"),
    [
        ("Q8_0", 0, np.float16(512)), ("Q4_0", 0, np.float16(8192)), ("Q5_0", 0, np.float16(4096)),
        ("Q8_0", 0, np.float16(np.nan)), ("Q4_1", 2, np.float16(np.inf)),
        ("Q4_K", 0, np.float16(np.inf)), ("TQ2_0", 64, np.float16(np.inf)),
        ("MXFP4", 0, np.uint8(255)), ("NVFP4", 3, np.uint8(127)),
    ],
)  # fmt: skip
def test_scales_without_a_bias_in_f16_are_refused(
    kind: str, at: int, value: Any, path: Path, store: Store
) -> None:
    """A scale too large for its bias is refused by tensor and nothing is stored; it decodes."""
    tensors = {f"{n}.weight": random_blocks(kind, s, 0) for n, s in SHAPES.items()}
    bad = tensors["blk.0.ffn_up.weight"].reshape(-1, EXACT[kind].nbytes)
    raw = np.frombuffer(value.tobytes(), np.uint8)
    bad[5, at : at + raw.size] = raw
    if kind == "Q4_K":
        bad[5, 4:16] = 255  # factors that are not 0
    norms = {f"{n}.weight": (weights((256,), 0), "F32")
             for n in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")}  # fmt: skip
    write_blocks(path, "llama", {n: (t, kind) for n, t in tensors.items()}, norms, WIDE)
    with pytest.raises(BadWeights, match=r"'model\.layers\.0\.mlp\.up_proj\.weight'") as caught:
        create("m", path, store=store)
    assert caught.value.hint == "--requantize bf16 decodes the file's weights"
    assert not store.list_names()
    create("m", path, store=store, requantize="bf16")


@pytest.mark.parametrize(("kind", "largest"), [("Q8_0", 511.75), ("Q4_0", 8188), ("Q5_0", 4094)])
def test_the_largest_scales_are_kept(kind: str, largest: float) -> None:
    """Up to the last scale whose bias F16 holds, biases are exact."""
    raw = random_blocks(kind, (1, 32), 0)
    raw[0, :2] = np.array([largest], "<f2").view(np.uint8)
    found = split(kind, raw)
    assert found.biases is not None
    zero = {"Q8_0": 128, "Q4_0": 8, "Q5_0": 16}[kind]
    assert float(found.biases[0, 0]) == -zero * largest


# -- a real model ----------------------------------------------------------------------------------


def test_smollm_keeps_its_codes(smollm: Path, store: Store) -> None:
    """SmolLM2 in Q4_1: exact in float32; in F16 arithmetic within two roundings of the library.

    F16 rounds code * scale and the sum: 2**-11 of each, or 2**-25 where they are subnormal.
    """
    made = create("m", smollm, store=store)
    assert made.plan.bits_per_weight < 6
    names = {"token_embd": "model.embed_tokens"} | {
        f"blk.{n}.{gguf}": f"model.layers.{n}.{name}"
        for n in range(30) for name, (gguf, _) in LLAMA[2].items()
    }  # fmt: skip
    checked = 0
    with open_model("m", store=store) as opened:
        for tensor in GGUFReader(smollm).tensors:
            module = names.get(tensor.name.removesuffix(".weight"))
            if module is None:
                continue
            heads = {"attn_q": 9, "attn_k": 3}.get(tensor.name.split(".")[-2], 0)
            values = deinterleave(decoded(np.asarray(tensor.data), tensor.tensor_type.name), heads)
            name = f"{module}.weight"
            assert np.array_equal(exact(opened, name), values), name
            biases = opened.parts(name).biases
            assert biases is not None
            spread = np.repeat(np.asarray(biases.astype(mx.float32)), 32, axis=-1)
            bound = 2**-11 * 1.001 * (np.abs(values - spread) + np.abs(values)) + 2**-24
            in_f16 = np.asarray(opened.decode(name), np.float32)
            assert (np.abs(in_f16 - values) <= bound).all(), name
            checked += 1
    assert checked == 211
