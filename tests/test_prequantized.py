"""Checkpoints that are quantized already: fixtures of the official tools, and random ones.

`packers.py` writes the random ones from the formats' published descriptions.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints import FIXTURES, fixture, load_arrays
from packers import CASES, Case, Checkpoint
from quantmill import kernels
from quantmill.creation import Created, create, plan
from quantmill.errors import BadPlan, BadRequest, BadSource, BadWeights
from quantmill.load import open_model
from quantmill.model import Model
from quantmill.planner import parse_override
from quantmill.plans import (
    CODES,
    DECODING,
    RECODE,
    ZERO,
    Options,
    TensorSpec,
    plan_from_json,
    plan_to_json,
)
from quantmill.store import Store
from quantmill.verification import verify

Array = npt.NDArray[Any]

KINDS: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}


@dataclass(frozen=True)
class Imported:
    """A stored model with what was planned for it."""

    created: Created
    model: Model

    def weights(self) -> dict[str, TensorSpec]:
        """The specs of codes or numbers, by name."""
        return {t.name: t for t in self.created.plan.tensors if t.role == CODES}


def imported(folder: Path, root: Path, **choices: Any) -> Imported:
    store = Store(root)
    created = create("m", folder, store=store, **choices)
    assert not verify(store).damage
    return Imported(created, open_model("m", store=store))


def as_float32(array: mx.array) -> Array:
    return np.asarray(array.astype(mx.float32))


def exactly(model: Model, name: str) -> Array:
    """Codes times scales plus biases, from what is stored, rounded to float32 only at the end."""
    parts = model.parts(name)
    assert parts.params is not None
    assert parts.scales is not None
    fmt = parts.params.format
    codes = np.asarray(parts.weight)
    stream = np.unpackbits(codes.view(np.uint8), axis=-1, bitorder="little")
    bits = stream.reshape(*codes.shape[:-1], -1, fmt.bits)
    numbers = np.packbits(bits, axis=-1, bitorder="little")[..., 0].astype(np.float64)
    scales = as_float32(parts.scales).repeat(fmt.group_size, axis=-1)
    assert parts.biases is not None
    biases = as_float32(parts.biases).repeat(fmt.group_size, axis=-1)
    found: Array = (numbers * scales + biases).astype(np.float32)
    return found


# -- fixtures of the official tools ----------------------------------------------------------------

# How each is stored, and how far decoding it may be from the tool's own decode, in units of the
# largest magnitude. BF16 arithmetic of affine codes rounds twice, so what their codes and scales
# stand for is compared in float32 as well; mxfp8 has 4 significant bits.
FIXTURE_FORMATS = {
    "ct-int4-w4a16": ("int4 g128", 2**-7),
    "ct-int8-w8a8": ("int8 g128", 2**-7),
    "ct-mxfp4": ("mxfp4", 0.0),
    "ct-nvfp4": ("nvfp4", 0.0),
    "modelopt-nvfp4": ("nvfp4", 0.0),
    "ct-fp8-block": ("mxfp8", 2**-4),
    "ct-fp8-channel": ("mxfp8", 2**-4),
    "hf-deepseek-v3-fp8-block": ("mxfp8", 2**-4),
    "mlx-affine-4bit-gs64": ("int4", 0.0),
    "mlx-affine-8bit-gs64": ("int8", 0.0),
    "mlx-dot-child-affine4": ("int4", 0.0),
    "mlx-f16-affine-4bit-gs32": ("int4 g32", 0.0),
    "mlx-mxfp4": ("mxfp4", 0.0),
    "mlx-mxfp8": ("mxfp8", 0.0),
    "mlx-nvfp4": ("nvfp4", 0.0),
    "mlx-mixed_4_6": ("affine-6 int4", 0.0),
    "mlx-qwen3-moe-4bit": ("int4 int8", 0.0),
    "mlx-qwen3_5-moe-nvfp4": ("int8 nvfp4", 0.0),
    "mlx-mixed-naming-orphans": ("int8 nvfp4", 0.0),
    "hf2q-mixed": ("affine-3 affine-6 int4 int8", 0.0),
    "hf-gpt-oss-mxfp4": ("mxfp4", 0.0),
}


def expected_of(name: str, file: str = "expected.safetensors") -> dict[str, Array]:
    path = FIXTURES / name / file
    return {n: as_float32(a) for n, a in load_arrays(path).items()} if path.exists() else {}


def decoded(model: Model, name: str) -> Array:
    """The weight by the name a fixture's truth has for it."""
    if name in model:
        return as_float32(model.dequantize(name))
    if f"{name}.weight" in model:  # gpt-oss: the truth is transposed, [experts, in, out]
        return as_float32(model.dequantize(f"{name}.weight")).swapaxes(-1, -2)
    stem, _, projection = name.removesuffix(".weight").rpartition(".")
    group, _, index = stem.rpartition(".")
    return as_float32(model.dequantize(f"{group}.{projection}.weight", int(index)))


@pytest.mark.parametrize("name", FIXTURE_FORMATS)
def test_fixtures_decode_as_their_tools_decode_them(name: str, tmp_path: Path) -> None:
    """What is stored stands for the official library's numbers, exactly or within the format."""
    formats, bound = FIXTURE_FORMATS[name]
    found = imported(fixture(name), tmp_path)
    labels = {(t.format or t.keeps) for t in found.weights().values()} - {None}
    assert " ".join(sorted(f.label for f in labels if f)) == formats
    truth = expected_of(name)
    assert truth
    for tensor, values in truth.items():
        got = decoded(found.model, tensor)
        assert np.abs(got - values).max() <= bound * np.abs(values).max(), tensor


@pytest.mark.parametrize("name", ["ct-int4-w4a16", "ct-int8-w8a8"])
def test_integer_codes_and_scales_are_kept_exactly(name: str, tmp_path: Path) -> None:
    """In float32 the stored codes, scales and biases give the tool's float32 decode bit for bit."""
    model = imported(fixture(name), tmp_path).model
    truth = expected_of(name, "expected_f32.safetensors")
    assert truth
    for tensor, values in truth.items():
        np.testing.assert_array_equal(exactly(model, tensor), values, err_msg=tensor)
        source = load_arrays(fixture(name) / "model.safetensors")
        scale = as_float32(source[f"{tensor}_scale"])
        parts = model.parts(tensor)
        assert parts.scales is not None
        stored = as_float32(parts.scales)
        np.testing.assert_array_equal(stored, np.broadcast_to(scale, stored.shape))


def test_four_bit_codes_of_compressed_tensors_are_the_same_bytes(tmp_path: Path) -> None:
    """Packed 4-bit codes need no change, so their bytes are the source's."""
    model = imported(fixture("ct-int4-w4a16"), tmp_path).model
    source = load_arrays(fixture("ct-int4-w4a16") / "model.safetensors")
    for name in (n for n in source if n.endswith("weight_packed")):
        stored = np.asarray(model[name.removesuffix("_packed")])
        np.testing.assert_array_equal(stored, np.asarray(source[name]).view(np.uint32))


COPIED = {
    "ct-nvfp4": (".weight_packed", ".weight_scale"),
    "ct-mxfp4": (".weight_packed", ".weight_scale"),
    "modelopt-nvfp4": (".weight", ".weight_scale"),
    "hf-gpt-oss-mxfp4": ("_blocks", "_scales"),
    "mlx-mxfp8": (".weight", ".scales"),
    "mlx-mixed_4_6": (".weight", ".scales"),
}


@pytest.mark.parametrize("name", COPIED)
def test_what_is_copied_has_the_bytes_of_its_source(name: str, tmp_path: Path) -> None:
    """Codes and scales that an MLX format has as well are stored byte for byte."""
    codes, scales = COPIED[name]
    model = imported(fixture(name), tmp_path).model
    source = load_arrays(fixture(name) / "model.safetensors")
    modules = [n.removesuffix(scales) for n in source if n.endswith(scales)]
    assert modules
    for module in modules:
        parts = model.parts(f"{module}.weight")
        assert parts.scales is not None
        for stored, original in ((parts.weight, codes), (parts.scales, scales)):
            assert raw_bytes(stored) == raw_bytes(source[module + original])


def raw_bytes(array: mx.array) -> bytes:
    return np.asarray(array.view(mx.uint8)).tobytes()


FP8 = ("ct-fp8-block", "ct-fp8-channel", "hf-deepseek-v3-fp8-block")


@pytest.mark.parametrize("name", FP8)
def test_decoded_fp8_is_the_truth_rounded_once(name: str, tmp_path: Path) -> None:
    """Decoding to BF16 gives the float32 product of code and scale, rounded once."""
    model = imported(fixture(name), tmp_path, requantize="bf16").model
    truth = expected_of(name, "expected_f32.safetensors") or expected_of(name)
    for tensor, values in truth.items():
        once = values.astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(decoded(model, tensor), once, err_msg=tensor)


def test_partial_fp8_blocks_have_the_scale_of_their_block(tmp_path: Path) -> None:
    """160 rows in blocks of 128: the last 32 rows have the second row of scales."""
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    model = imported(fixture("hf-deepseek-v3-fp8-block"), tmp_path, requantize="bf16").model
    assert model.shape(name) == (160, 128)
    np.testing.assert_array_equal(
        decoded(model, name), expected_of("hf-deepseek-v3-fp8-block")[name]
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("mlx-dot-child-affine4", "mlx-affine-4bit-gs64"),
        ("mlx-mixed-naming-orphans", "mlx-qwen3_5-moe-nvfp4"),
    ],
)
def test_spellings_of_companions_make_no_difference(one: str, other: str, tmp_path: Path) -> None:
    """The same weights under other names give the same tensor blobs, digest for digest."""
    entries = []
    for name in (one, other):
        store = Store(tmp_path / name)
        made = create("m", fixture(name), store=store)
        entries.append([(r.name, r.digest) for r in store.get_manifest(made.name).tensor_refs()])
    assert entries[0] == entries[1]


def test_every_fixture_of_a_tool_is_listed() -> None:
    """A copied fixture with a truth of its own is tested."""
    quantized = {p.parent.name for p in FIXTURES.glob("*/expected.safetensors")}
    assert quantized == FIXTURE_FORMATS.keys()


# -- random checkpoints of every scheme ------------------------------------------------------------


def up_to(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def random_checkpoint(case: Case, seed: int, rows: int = 40, columns: int = 128) -> Checkpoint:
    modules = {
        "model.layers.0.self_attn.q_proj": (up_to(rows, case.rows), up_to(columns, case.columns)),
        "model.layers.0.mlp.down_proj": (up_to(9, case.rows), up_to(2 * columns, case.columns)),
    }
    return case.make(np.random.default_rng(seed), modules)


def own_name(model: Model, name: str) -> str:
    """Stacks of experts may be called without `.weight`."""
    return name if name in model else name.removesuffix(".weight")


def rounded(values: Array, dtype: str) -> Array:
    found: Array = values.astype(KINDS[dtype]).astype(np.float32)
    return found


def check_numbers(model: Model, written: Checkpoint, *, factors: bool) -> None:
    """Every weight is what is expected, rounded once to the dtype it was decoded to.

    Where factors of the inputs take part, and for float32, the descriptions' float64 arithmetic
    rounds less often.
    """
    for name, values in written.expected.items():
        here = own_name(model, name)
        got, dtype = as_float32(model.dequantize(here)), model.dtype(here)
        if dtype == "F32" or factors:
            rtol = 2**-20 if dtype == "F32" else 2**-7
            np.testing.assert_allclose(got, values, rtol, atol=2**-22 * np.abs(values).max())
        else:
            np.testing.assert_array_equal(got, rounded(values, dtype), err_msg=name)


def has_factors(case: Case) -> bool:
    return bool(case.options.get("pre_quant_scale"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_scheme_decodes_to_its_numbers(case: Case, tmp_path: Path) -> None:
    """Decoded without quantizing, every weight is what its description says, rounded once."""
    written = random_checkpoint(case, seed=len(str(case)))
    model = imported(written.write(tmp_path / "m"), tmp_path / "s", requantize="bf16").model
    check_numbers(model, written, factors=has_factors(case))


# Decoding by MLX's arithmetic in 16 bits rounds codes times scales, then the sum; mxfp8 has four
# significant bits.
BOUNDS = {"affine": 2**-6, "mxfp8": 2**-4, "nvfp4": 2**-8, "mxfp4": 2**-8}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_scheme_is_stored_and_read_back(case: Case, tmp_path: Path) -> None:
    """Imported as usual, every weight is there, in its shape, and within its format's precision."""
    written = random_checkpoint(case, seed=1)
    found = imported(written.write(tmp_path / "m"), tmp_path / "s")
    for name, values in written.expected.items():
        here = own_name(found.model, name)
        params = found.model.params(here)
        got = as_float32(found.model.dequantize(here))
        if params is None:
            np.testing.assert_allclose(got, values, 2**-7, atol=2**-9 * np.abs(values).max())
        else:
            bound = BOUNDS[params.format.mode] * np.abs(values).max()
            assert np.abs(got - values).max() <= bound, name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_a_format_holds_is_kept_without_loss(case: Case, tmp_path: Path) -> None:
    """Integer codes stored in an affine format give the described numbers in float32, exactly."""
    written = random_checkpoint(case, seed=2)
    found = imported(written.write(tmp_path / "m"), tmp_path / "s")
    for name, spec in found.weights().items():
        if spec.transform != RECODE or spec.coding is None or ZERO in spec.coding.roles:
            continue
        if spec.format is not None and spec.format.has_bias:
            np.testing.assert_array_equal(exactly(found.model, name), written.expected[name])
        else:
            got = as_float32(found.model.dequantize(name))
            np.testing.assert_array_equal(got, written.expected[own_name(found.model, name)])


@cache
def cases_by_scheme() -> dict[str, list[Case]]:
    found: dict[str, list[Case]] = {}
    for case in CASES:
        found.setdefault(case.scheme, []).append(case)
    return found


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(sorted(cases_by_scheme())).flatmap(
        lambda scheme: st.sampled_from(cases_by_scheme()[scheme])
    ),
    st.integers(0, 2**32 - 1),
    st.integers(1, 300),
    st.integers(1, 6),
)
def test_random_checkpoints_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    case: Case, seed: int, rows: int, columns: int,
) -> None:  # fmt: skip
    """Any shape, any codes and scales of any scheme decode to their numbers."""
    written = random_checkpoint(case, seed, rows, 32 * columns)
    root = tmp_path_factory.mktemp("random")
    model = imported(written.write(root / "m"), root / "s", requantize="bf16").model
    check_numbers(model, written, factors=has_factors(case))


@pytest.mark.parametrize("case", [cases[0] for cases in cases_by_scheme().values()], ids=str)
def test_plans_of_every_scheme_survive_json(case: Case, tmp_path: Path) -> None:
    """A plan that went through JSON says the same about codes, layouts and roles."""
    found = plan(random_checkpoint(case, seed=9).write(tmp_path))
    assert plan_from_json(json.loads(json.dumps(plan_to_json(found)))) == found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_and_numpy_decode_alike(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the kernels decode or NumPy does, every scheme gives the same blobs."""
    folder = random_checkpoint(case, seed=3).write(tmp_path / "m")
    entries = []
    for root in ("kernels", "numpy"):
        store = Store(tmp_path / root)
        made = create("m", folder, store=store, requantize="bf16")
        entries.append([(r.name, r.digest) for r in store.get_manifest(made.name).tensor_refs()])
        monkeypatch.setattr(kernels, "decode", lambda *_: None)
    assert entries[0] == entries[1]


# -- experts ---------------------------------------------------------------------------------------

EXPERT_CASES = [
    "compressed_nvfp4 activations=True",
    "compressed_packed group_size=64",
    "compressed_fp8 strategy=block block=(128, 128)",
    "modelopt_nvfp4 algorithm=NVFP4",
    "modelopt_int4 group_size=32 pre_quant_scale=True",
    "block_fp8 block=(128, 128) scale=F32",
    "gptq bits=4 checkpoint_format=gptq symmetric=False group_size=32",
    "awq version=gemm group_size=32",
    "compressed_mx bits=8",
]


def case_called(name: str) -> Case:
    return next(c for c in CASES if str(c) == name)


def experts(case: Case, count: int = 3) -> Checkpoint:
    modules = {
        f"model.layers.1.mlp.experts.{index}.{projection}": (64, 128)
        for index in range(count)
        for projection in ("gate_proj", "up_proj", "down_proj")
    }
    return case.make(np.random.default_rng(7), modules)


@pytest.mark.parametrize("name", EXPERT_CASES)
def test_experts_are_stacked_with_their_scales(name: str, tmp_path: Path) -> None:
    """Single experts become one tensor per projection; each keeps its own numbers."""
    written = experts(case_called(name))
    found = imported(written.write(tmp_path / "m"), tmp_path / "s")
    group = "model.layers.1.mlp.experts"
    assert [b.name for b in found.created.plan.blobs if group in b.name] == [group]
    again = imported(tmp_path / "m", tmp_path / "d", requantize="bf16").model
    for projection in ("gate_proj", "up_proj", "down_proj"):
        stack = f"{group}.{projection}.weight"
        assert found.model.shape(stack) == (3, 64, 128)
        for index in range(3):
            values = written.expected[f"{group}.{index}.{projection}.weight"]
            params = found.model.params(stack)
            got = as_float32(found.model.dequantize(stack, index))
            bound = (BOUNDS[params.format.mode] if params else 2**-8) * np.abs(values).max()
            assert np.abs(got - values).max() <= bound
            np.testing.assert_array_equal(
                as_float32(again.dequantize(stack, index)), rounded(values, again.dtype(stack))
            )


def without(written: Checkpoint, part: str) -> Checkpoint:
    tensors = {n: t for n, t in written.tensors.items() if part not in n}
    return Checkpoint(written.config, tensors, written.expected, written.lossless, written.files)


@pytest.mark.parametrize("name", EXPERT_CASES)
def test_a_missing_expert_is_named(name: str, tmp_path: Path) -> None:
    """A gap in the experts of a quantized checkpoint is refused with group and number."""
    written = without(experts(case_called(name)), "experts.1.up_proj.")
    with pytest.raises(BadSource, match=r"experts: expert 1 has no up_proj") as caught:
        plan(written.write(tmp_path))
    assert caught.value.kind == "missing_expert"


def test_experts_that_are_stored_differently_are_refused(tmp_path: Path) -> None:
    """Experts in two schemes do not make a stack; both are named."""
    written = experts(case_called("compressed_nvfp4 activations=True"))
    other = experts(case_called("compressed_packed group_size=64"))
    mark = "experts.2.gate_proj."
    tensors = {n: t for n, t in written.tensors.items() if mark not in n}
    tensors |= {n: t for n, t in other.tensors.items() if mark in n}
    mixed = Checkpoint(written.config, tensors, {}, lossless=False)
    with pytest.raises(BadSource) as caught:
        plan(mixed.write(tmp_path))
    assert caught.value.kind == "mismatched_expert_layout"
    assert "experts.2.gate_proj" in caught.value.message


# -- asking for another format ---------------------------------------------------------------------


def test_a_format_is_refused_and_requantize_offered(tmp_path: Path) -> None:
    """--quantize does not touch quantized weights; the hint says how to insist."""
    with pytest.raises(BadPlan, match="already quantized") as caught:
        create("m", fixture("mlx-affine-4bit-gs64"), store=Store(tmp_path), quantize="int8")
    assert "--requantize int8" in str(caught.value.hint)
    assert not list((tmp_path / "blobs").glob("sha256-*"))


@pytest.mark.parametrize("name", ["ct-int4-w4a16", "ct-nvfp4", "hf-deepseek-v3-fp8-block"])
def test_requantizing_decodes_and_follows_the_policy(name: str, tmp_path: Path) -> None:
    """Decoded weights get the format asked for, as float ones would, and the plan says so."""
    found = imported(fixture(name), tmp_path, requantize="int8")
    formats = {t.format.name for t in found.weights().values() if t.format}
    assert formats == {"int8"}
    assert any("decoded" in t.reason for t in found.weights().values())
    for tensor, values in expected_of(name).items():
        assert np.abs(decoded(found.model, tensor) - values).max() <= 2**-6 * np.abs(values).max()


def test_requantizing_floats_is_refused(tmp_path: Path) -> None:
    """A checkpoint of plain numbers is not requantized but quantized."""
    with pytest.raises(BadRequest) as caught:
        create("m", fixture("hf-llama-bf16"), store=Store(tmp_path), requantize="int4")
    assert caught.value.kind == "nothing_to_requantize"


def test_both_requests_at_once_are_refused() -> None:
    """--quantize and --requantize cannot both be followed."""
    with pytest.raises(BadRequest, match="exclude each other"):
        plan(fixture("hf-llama-bf16"), quantize="int4", requantize="int4")


def test_plain_tensors_of_a_quantized_checkpoint_can_be_quantized(tmp_path: Path) -> None:
    """A rule that names a float tensor applies to it; codes beside it stay as they are."""
    rules = Options((parse_override("lm_head.weight=int8"),))
    found = imported(fixture("ct-nvfp4"), tmp_path, options=rules)
    specs = found.weights()
    assert specs["lm_head.weight"].format is not None
    assert {s.keeps.name for s in specs.values() if s.keeps} == {"nvfp4"}


def test_a_rule_for_a_quantized_tensor_is_refused() -> None:
    """Naming a quantized tensor outright asks for a second rounding, which needs --requantize."""
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(BadPlan, match="cannot requantize") as caught:
        plan(fixture("ct-nvfp4"), options=Options((parse_override(f"{name}=int8"),)))
    assert name in caught.value.message


def test_fp8_weights_can_be_kept_as_numbers(tmp_path: Path) -> None:
    """Keep, for an FP8 weight, is its numbers in BF16: no format holds its codes."""
    rules = Options((parse_override("*.mlp.up_proj.weight=keep"),))
    specs = imported(fixture("ct-fp8-channel"), tmp_path, options=rules).weights()
    kept = [s for n, s in specs.items() if n.endswith("mlp.up_proj.weight")]
    assert kept
    assert all(s.format is None and s.transform in DECODING for s in kept)


def test_a_group_index_that_config_denies_is_refused(tmp_path: Path) -> None:
    """GPTQ weights ordered by activation under `desc_act: false` are not stored wrongly."""
    case = case_called("gptq bits=4 order=activations symmetric=True group_size=32")
    written = random_checkpoint(case, seed=3)
    written.config["quantization_config"]["desc_act"] = False
    folder = written.write(tmp_path / "m")
    with pytest.raises(BadWeights, match="g_idx"):
        create("m", folder, store=Store(tmp_path / "s"))
    model = imported(folder, tmp_path / "t", requantize="bf16").model
    for name, values in written.expected.items():
        np.testing.assert_array_equal(
            as_float32(model.dequantize(name)), rounded(values, model.dtype(name))
        )


@pytest.mark.parametrize("wrong", [4, -2, 2**31 - 1])
def test_a_group_that_is_not_there_is_refused(wrong: int, tmp_path: Path) -> None:
    """An index of columns that names a group beyond the scales is told by name."""
    case = case_called("gptq bits=4 order=activations symmetric=True group_size=32")
    written = random_checkpoint(case, seed=3)
    name = next(n for n in written.tensors if n.endswith(".g_idx"))
    index = np.frombuffer(written.tensors[name].data, "<i4").copy()
    index[5] = wrong * 100 if wrong == 4 else wrong
    tensor = written.tensors[name]
    written.tensors[name] = type(tensor)(tensor.dtype, tensor.shape, index.tobytes())
    with pytest.raises(BadWeights, match="g_idx"):
        create("m", written.write(tmp_path / "m"), store=Store(tmp_path / "s"))


# -- what does not add up --------------------------------------------------------------------------


def _cut(written: Checkpoint, ending: str) -> str:
    """Make the first tensor with this ending one row shorter; its name."""
    name = next(n for n in written.tensors if n.endswith(ending))
    tensor = written.tensors[name]
    rows = max(1, tensor.shape[0] - 1) if tensor.shape else 1
    size = len(tensor.data) // max(1, math.prod(tensor.shape)) * rows * math.prod(tensor.shape[1:])
    shape = (rows, *tensor.shape[1:])
    written.tensors[name] = type(tensor)(tensor.dtype, shape, tensor.data[:size])
    return name


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("compressed_nvfp4 activations=True", ".weight_scale"),
        ("compressed_packed group_size=64", ".weight_scale"),
        ("compressed_packed bits=4 dense=True symmetric=False group_size=32", ".weight_zero_point"),
        ("compressed_int8 strategy=channel scale=BF16 symmetric=True", ".weight_scale"),
        ("compressed_fp8 strategy=block block=(128, 128)", ".weight_scale"),
        ("modelopt_nvfp4 algorithm=NVFP4", ".weight_scale"),
        ("block_fp8 block=(64, 32) scale=F32", ".weight_scale_inv"),
        ("gpt_oss", "_scales"),
        ("awq version=gemm group_size=32", ".qzeros"),
        ("gptq bits=4 checkpoint_format=gptq symmetric=True group_size=32", ".g_idx"),
        ("modelopt_int4 group_size=32 pre_quant_scale=True", ".pre_quant_scale"),
        ("mlx mode=mxfp4 group_size=32", ".scales"),
    ],
)
def test_a_part_of_another_shape_is_refused_by_name(name: str, ending: str, tmp_path: Path) -> None:
    """Scales, zero points and indexes that do not fit the codes are refused before any writing."""
    written = random_checkpoint(case_called(name), seed=4, rows=200)
    cut = _cut(written, ending)
    with pytest.raises(BadSource) as caught:
        plan(written.write(tmp_path))
    module = cut.removesuffix(ending)
    assert module in caught.value.message


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("compressed_nvfp4 activations=True", ".weight_global_scale"),
        ("compressed_packed group_size=64", ".weight_scale"),
        ("modelopt_nvfp4 algorithm=NVFP4", ".weight_scale_2"),
        ("compressed_int8 strategy=channel scale=BF16 symmetric=True", ".weight_scale"),
        ("block_fp8 block=(128, 128) scale=F32", ".weight_scale_inv"),
        ("gpt_oss", "_scales"),
        ("awq version=gemm group_size=32", ".scales"),
        ("gptq bits=4 checkpoint_format=gptq symmetric=True group_size=32", ".qzeros"),
        ("mlx bits=4 group_size=64", ".biases"),
        ("mlx mode=mxfp4 group_size=32", ".scales"),
    ],
)
def test_a_missing_part_is_refused(name: str, ending: str, tmp_path: Path) -> None:
    """Codes whose scales or zero points are missing are never taken for numbers."""
    written = random_checkpoint(case_called(name), seed=5)
    gone = next(n for n in written.tensors if n.endswith(ending))
    del written.tensors[gone]
    with pytest.raises(BadSource) as caught:
        plan(written.write(tmp_path))
    assert gone.removesuffix(ending) in caught.value.message


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("awq version=gemm group_size=32", {"quant_method": "gptq"}),
        ("gptq bits=4 checkpoint_format=gptq symmetric=True group_size=32", {"bits": 8}),
        (
            "gptq bits=4 checkpoint_format=gptq symmetric=True group_size=32",
            {"quant_method": "awq"},
        ),
        (
            "gptq bits=4 checkpoint_format=gptq symmetric=True group_size=32",
            {"checkpoint_format": "marlin"},
        ),
        ("compressed_nvfp4 activations=True", {"quant_method": "gptq"}),
        ("compressed_packed group_size=64", {"transform_config": {"R1": {}}}),
        ("compressed_int8 strategy=channel scale=BF16 symmetric=True", {"quant_method": "awq"}),
        ("gpt_oss", {"quant_method": "fp8"}),
        ("block_fp8 block=(64, 32) scale=F32", {"weight_block_size": [32, 32]}),
        ("mlx bits=4 group_size=64", {"bits": 8}),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(
    name: str, change: dict[str, Any], tmp_path: Path
) -> None:
    """Where config.json and the tensors disagree, neither is believed."""
    written = random_checkpoint(case_called(name), seed=6, rows=64)
    written.config["quantization_config"] |= change
    if "quantization" in written.config:
        written.config["quantization"] |= change
    with pytest.raises(BadSource):
        plan(written.write(tmp_path))


def test_bits_of_packed_integers_come_from_the_recorded_shape(tmp_path: Path) -> None:
    """Without any word in the config, `weight_shape` says how many codes there are."""
    written = random_checkpoint(case_called("compressed_packed group_size=64"), seed=8)
    written.config["quantization_config"]["config_groups"] = {}
    assert {t.format.label for t in plan(written.write(tmp_path)).tensors if t.format} == {"int4"}


def test_weights_that_nothing_describes_are_refused(tmp_path: Path) -> None:
    """Packed integers of unknown width are not guessed at."""
    written = random_checkpoint(case_called("compressed_packed group_size=64"), seed=8)
    written.config["quantization_config"]["config_groups"] = {}
    folder = without(written, ".weight_shape").write(tmp_path)
    with pytest.raises(BadSource) as caught:
        plan(folder)
    assert caught.value.kind == "unknown_width"


@pytest.mark.parametrize(("bits", "group_size"), [(1, 32), (1, 128), (2, 64), (3, 32), (5, 128)])
def test_uncommon_widths_of_mlx_are_kept(bits: int, group_size: int, tmp_path: Path) -> None:
    """Widths that MLX knows and no format name of Ollama's has come through as they are."""
    name = "model.layers.0.self_attn.q_proj"
    weight = mx.random.normal((64, 256), key=mx.random.key(0)).astype(mx.bfloat16)
    parts = mx.quantize(weight, group_size=group_size, bits=bits)
    (tmp_path / "m").mkdir()
    arrays = dict(zip((f"{name}.{p}" for p in ("weight", "scales", "biases")), parts, strict=True))
    mx.save_safetensors(str(tmp_path / "m" / "model.safetensors"), arrays)
    said = {"quantization": {"bits": bits, "group_size": group_size}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(said))
    model = imported(tmp_path / "m", tmp_path / "s").model
    expected = mx.dequantize(*parts, group_size=group_size, bits=bits)
    assert mx.array_equal(model.dequantize(f"{name}.weight"), expected)


def test_a_pattern_that_also_covers_codes_says_what_they_need() -> None:
    """Weights that a wildcard fits and that are quantized already are kept, visibly."""
    found = plan(fixture("ct-nvfp4"), options=Options((parse_override("*=int8"),)))
    codes = [t for t in found.tensors if t.keeps]
    assert codes
    assert all("*" in t.reason and "--requantize" in t.reason for t in codes)


@pytest.mark.parametrize("name", ["ct-nvfp4", "ct-int4-w4a16", "hf-deepseek-v3-fp8-block"])
def test_progress_ends_at_its_total(name: str, tmp_path: Path) -> None:
    """Bytes that are reported add up to the bytes that there are to read."""
    events: list[tuple[int, int]] = []
    create(
        "m",
        fixture(name),
        store=Store(tmp_path),
        progress=lambda e: events.append((e.bytes, e.bytes_total)),
    )
    assert max(events)[0] == max(events)[1]
