"""Quantized checkpoints as other producers write them, from their published layouts.

One function per scheme draws codes and scales over their whole range, lays them out as the producer
does, extra tensors included, and says what every weight decodes to: computed in float64, rounded
once to float32. Nothing of quantmill is used. `CASES` lists the choices worth testing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from reference import E2M1, pack

Array = npt.NDArray[Any]
Modules = Mapping[str, tuple[int, int]]
"""Path of each module → rows (outputs) and columns (inputs) of its weight."""

DTYPES: dict[str, Any] = {
    "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64, "I32": np.int32, "I8": np.int8, "U8": np.uint8, "U32": np.uint32,
}  # fmt: skip
"""Dtype tag of a tensor file → NumPy dtype."""


@dataclass(frozen=True)
class Tensor:
    """A tensor as a file holds it, little-endian."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of one scheme.

    `expected` holds every tensor that an importer has to keep: what quantized weights decode to,
    as `<module>.weight` of [out, in] or [experts, out, in], and plain tensors under their names.
    `lossless`: some MLX format holds exactly these codes and scales, repeated where need be. Biases
    of affine formats are then zero points times scales, which may take a wider dtype than theirs.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    expected: dict[str, npt.NDArray[np.float32]]
    lossless: bool
    files: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """The directory that a producer would have written, in one tensor file."""
        folder.mkdir(parents=True, exist_ok=True)
        header: dict[str, Any] = {}
        end = 0
        for name, tensor in self.tensors.items():
            start, end = end, end + len(tensor.data)
            header[name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)
        with (folder / "model.safetensors").open("wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            file.writelines(tensor.data for tensor in self.tensors.values())
        for name, text in {"config.json": json.dumps(self.config), **self.files}.items():
            (folder / name).write_text(text, encoding="utf-8")
        return folder


def tensor(dtype: str, values: Array) -> Tensor:
    """Numbers as a tensor of this dtype, rounded to it."""
    return Tensor(dtype, values.shape, np.ascontiguousarray(values.astype(DTYPES[dtype])).tobytes())


# -- what is drawn ---------------------------------------------------------------------------------


def _scales(rng: np.random.Generator, shape: tuple[int, ...], dtype: str = "F32") -> Array:
    """Positive scales of many magnitudes, as float64 numbers that the dtype can hold."""
    found: Array = np.exp2(rng.uniform(-10, 2, shape)).astype(DTYPES[dtype]).astype(np.float64)
    return found


def _signed(rng: np.random.Generator, shape: tuple[int, ...], bits: int) -> Array:
    half = 1 << (bits - 1)
    return rng.integers(-half, half, shape)


def _e4m3(rng: np.random.Generator, shape: tuple[int, ...], *, positive: bool = False) -> Array:
    """Bytes of E4M3 numbers: any but NaN, or any greater than zero."""
    if positive:
        return rng.integers(1, 127, shape).astype(np.uint8)
    found = rng.integers(0, 254, shape).astype(np.uint8)  # 0x7f and 0xff are NaN
    found[found >= 127] += 1
    return found


def _exponents(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Bytes of E8M0 scales, away from the ends of bfloat16's range."""
    return rng.integers(32, 220, shape).astype(np.uint8)


def _fp8(codes: Array) -> Array:
    found: Array = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return found


def _fp4(codes: Array) -> Array:
    found: Array = np.array(E2M1)[codes]
    return found


def _e8m0(codes: Array) -> Array:
    found: Array = np.exp2(codes.astype(np.float64) - 127)
    return found


# -- packing ---------------------------------------------------------------------------------------


def _spread(scales: Array, shape: tuple[int, int], block: tuple[int, int]) -> Array:
    """A scale for each element: blocks begin at the first row and column, the last may be cut."""
    found: Array = scales.repeat(block[0], axis=-2).repeat(block[1], axis=-1)
    return found[..., : shape[0], : shape[1]]


def _nibbles(codes: Array) -> Array:
    """Two 4-bit codes to the byte along the last axis, the first one low."""
    found: Array = (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)
    return found


def _stream(codes: Array, bits: int) -> Array:
    """Rows as gapless streams of bits in 32-bit words, the last word filled with zeros."""
    fill = -codes.shape[-1] % 32
    padded = np.pad(codes, ((0, 0), (0, fill)))
    words: Array = pack(padded, bits)
    return words[:, : -(-codes.shape[-1] * bits // 32)].view(np.int32)


def _slots(codes: Array, bits: int, order: Sequence[int] | None = None) -> Array:
    """Rows as 32-bit words of whole codes: slot i of a word takes the `order[i]`-th of its codes.

    The highest bits of a word are left at zero where the width does not divide 32.
    """
    each = 32 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[-1] % each))).astype(np.uint32)
    grouped = padded.reshape(len(codes), -1, each)[..., list(order or range(each))]
    shifts = (np.arange(each) * bits).astype(np.uint32)
    words: Array = np.bitwise_or.reduce(grouped << shifts, axis=-1)
    return words.view(np.int32)


# -- assembling ------------------------------------------------------------------------------------


class _Draft:
    """A checkpoint being put together: tensors, what they decode to, and plain company."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.tensors: dict[str, Tensor] = {}
        self.expected: dict[str, npt.NDArray[np.float32]] = {}

    def add(self, name: str, dtype: str, values: Array) -> None:
        self.tensors[name] = tensor(dtype, values)

    def raw(self, name: str, dtype: str, codes: Array) -> None:
        """Bytes that are codes of an 8-bit dtype."""
        self.tensors[name] = Tensor(dtype, codes.shape, np.ascontiguousarray(codes).tobytes())

    def scalar(self, name: str, dtype: str = "F32", shape: tuple[int, ...] = ()) -> None:
        """One of the scales of activations or caches that producers write."""
        self.add(name, dtype, _scales(self.rng, shape, dtype))

    def decoded(self, module: str, values: Array) -> None:
        assert np.isfinite(values).all()
        self.expected[f"{module}.weight"] = values.astype(np.float32)

    def plain(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        """A tensor that is not quantized and has to come through unchanged."""
        values = self.rng.normal(0, 0.5, shape).astype(DTYPES[dtype])
        self.add(name, dtype, values)
        self.expected[name] = values.astype(np.float32)

    def company(self, dtype: str = "BF16") -> None:
        """What every model has beside its quantized weights: a norm, and a head left as it was."""
        self.plain("model.norm.weight", dtype, (32,))
        self.plain("lm_head.weight", dtype, (8, 32))

    def done(
        self, quantization: dict[str, Any], lossless: bool, files: dict[str, str] | None = None
    ) -> Checkpoint:
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": "bfloat16",
            "quantization_config": quantization,
        }
        return Checkpoint(config, self.tensors, self.expected, lossless, files or {})


def _check(fits: bool, why: str) -> None:
    if not fits:
        raise ValueError(why)


def _whole(columns: int, group: int) -> int:
    _check(columns % group == 0, f"{columns} columns are not whole groups of {group}")
    return columns // group


def _affine_holds(bits: int, columns: int, group: int) -> bool:
    """Whether MLX has an affine format for such codes, of which so many columns share a scale."""
    return bits != 7 and min(group, columns) % 32 == 0 and columns % 32 == 0


# -- compressed-tensors ----------------------------------------------------------------------------


def _arguments(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    """The settings of weights or activations in a group of the config."""
    return {
        "num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy,
        "group_size": None, "block_structure": None, "dynamic": False, "actorder": None,
        "observer": "minmax", "observer_kwargs": {}, "scale_dtype": None, "zp_dtype": None,
    } | more  # fmt: skip


def _compressed(
    form: str, groups: Sequence[Mapping[str, Any]], version: str = "0.19.0"
) -> dict[str, Any]:
    full = {"targets": ["Linear"], "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {f"group_{i}": full | dict(group) for i, group in enumerate(groups)},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": version,
    }


def _caches(draft: _Draft, modules: Modules) -> None:
    """Scales of a quantized key and value cache, which belong to the attention module."""
    for module in modules:
        parent, _, name = module.rpartition(".")
        if name in {"k_proj", "v_proj"}:
            draft.scalar(f"{parent}.{name[0]}_scale", "BF16", (1,))


def _scale_shape(strategy: str, out: int, columns: int, group: int) -> tuple[tuple[int, ...], int]:
    """Shape of a scale tensor, and how many columns share a scale."""
    if strategy == "group":
        return (out, _whole(columns, group)), group
    return ((out, 1), columns) if strategy == "channel" else ((1,), columns)


def _grid(scales: Array, shape: tuple[int, int]) -> Array:
    """The scale of each element, from one scale, one for each row, or one for each group."""
    if scales.size == 1:
        return np.broadcast_to(scales.reshape(1, 1), shape)
    return _spread(scales, shape, (1, shape[1] // scales.shape[1]))


def compressed_packed(
    rng: np.random.Generator,
    modules: Modules,
    *,
    bits: int = 4,
    group_size: int = 128,
    strategy: str = "group",
    symmetric: bool = True,
    scale: str = "BF16",
    dense: bool = True,
    g_idx: bool = False,
) -> Checkpoint:
    """Integers of 2 to 8 bits in 32-bit words.

    `dense` is the gapless packing of version 0.18 on; before, words held whole codes. `g_idx` says
    for each column which group it belongs to; versions that wrote it were not dense.
    """
    _check(not (dense and g_idx), "a version that writes g_idx packs whole codes")
    draft = _Draft(rng)
    packed, lossless = _stream if dense else _slots, not g_idx
    for module, (out, columns) in modules.items():
        shape, group = _scale_shape(strategy, out, columns, group_size)
        codes, scales = _signed(rng, (out, columns), bits), _scales(rng, shape, scale)
        half = 1 << (bits - 1)
        draft.add(f"{module}.weight_packed", "I32", packed(codes + half, bits))
        draft.add(f"{module}.weight_scale", scale, scales)
        draft.add(f"{module}.weight_shape", "I64", np.array([out, columns]))
        zeros = np.zeros(shape, np.int64)
        if not symmetric:
            zeros = _signed(rng, shape, bits)
            if strategy == "tensor":
                draft.add(f"{module}.weight_zero_point", "I8", zeros)
            else:
                words = packed((zeros + half).T, bits).T
                draft.add(f"{module}.weight_zero_point", "I32", words)
        each, zero = (_grid(values, (out, columns)) for values in (scales, zeros))
        if g_idx:
            groups = rng.permutation(np.arange(columns) // group)
            draft.add(f"{module}.weight_g_idx", "I32", groups)
            each, zero = (values[:, groups * group] for values in (each, zero))
        draft.decoded(module, (codes - zero) * each)
        lossless &= _affine_holds(bits, columns, group)
    _caches(draft, modules)
    draft.company()
    weights = _arguments(
        bits, "int", strategy, symmetric=symmetric,
        group_size=group_size if strategy == "group" else None,
        actorder="group" if g_idx else None,
    )  # fmt: skip
    form = "pack-quantized"
    config = _compressed(
        form, [{"weights": weights, "format": form}], "0.19.0" if dense else "0.13.0"
    )
    return draft.done(config, lossless)


def compressed_int8(
    rng: np.random.Generator,
    modules: Modules,
    *,
    strategy: str = "channel",
    group_size: int = 128,
    symmetric: bool = True,
    scale: str = "BF16",
) -> Checkpoint:
    """Integers of 8 bits as they are, zero points too; activations are 8-bit integers."""
    draft, lossless = _Draft(rng), True
    for module, (out, columns) in modules.items():
        shape, group = _scale_shape(strategy, out, columns, group_size)
        codes, scales = _signed(rng, (out, columns), 8), _scales(rng, shape, scale)
        draft.add(f"{module}.weight", "I8", codes)
        draft.add(f"{module}.weight_scale", scale, scales)
        zeros = np.zeros(shape, np.int64)
        if not symmetric:
            zeros = _signed(rng, shape, 8)
            draft.add(f"{module}.weight_zero_point", "I8", zeros)
        draft.scalar(f"{module}.input_scale", scale, (1,))
        each, zero = (_grid(values, (out, columns)) for values in (scales, zeros))
        draft.decoded(module, (codes - zero) * each)
        lossless &= _affine_holds(8, columns, group)
    _caches(draft, modules)
    draft.company()
    size = group_size if strategy == "group" else None
    scheme = {
        "weights": _arguments(8, "int", strategy, symmetric=symmetric, group_size=size),
        "input_activations": _arguments(8, "int", "tensor"),
        "format": "int-quantized",
    }
    return draft.done(_compressed("int-quantized", [scheme]), lossless)


def compressed_fp8(
    rng: np.random.Generator,
    modules: Modules,
    *,
    strategy: str = "channel",
    group_size: int = 128,
    block: tuple[int, int] = (128, 128),
    scale: str = "BF16",
    form: str = "float-quantized",
) -> Checkpoint:
    """E4M3 numbers; a scale for a tensor, a row, a group of a row, or a block."""
    draft = _Draft(rng)
    for module, (out, columns) in modules.items():
        codes = _e4m3(rng, (out, columns))
        if strategy == "block":
            scales = _scales(rng, (-(-out // block[0]), -(-columns // block[1])), scale)
            each = _spread(scales, (out, columns), block)
        else:
            shape, _ = _scale_shape(strategy, out, columns, group_size)
            scales = _scales(rng, shape, scale)
            each = _grid(scales, (out, columns))
        draft.raw(f"{module}.weight", "F8_E4M3", codes)
        draft.add(f"{module}.weight_scale", scale, scales)
        if strategy == "tensor":
            draft.scalar(f"{module}.input_scale", scale, (1,))
        draft.decoded(module, _fp8(codes) * each)
    _caches(draft, modules)
    draft.company()
    more: dict[str, Any] = {"group_size": group_size} if strategy == "group" else {}
    more |= {"block_structure": list(block)} if strategy == "block" else {}
    scheme = {"weights": _arguments(8, "float", strategy, **more), "format": form}
    if form == "float-quantized":
        kind, dynamic = ("tensor", False) if strategy == "tensor" else ("token", True)
        scheme["input_activations"] = _arguments(8, "float", kind, dynamic=dynamic)
    return draft.done(_compressed(form, [scheme]), lossless=False)


def compressed_nvfp4(
    rng: np.random.Generator, modules: Modules, *, activations: bool = True
) -> Checkpoint:
    """E2M1 codes, E4M3 scales of 16 columns, and a scale of the tensor that divides."""
    draft = _Draft(rng)
    for module, (out, columns) in modules.items():
        codes = rng.integers(0, 16, (out, columns))
        scales = _e4m3(rng, (out, _whole(columns, 16)), positive=True)
        whole = rng.uniform(4, 4000, 1).astype(np.float32)
        draft.add(f"{module}.weight_packed", "U8", _nibbles(codes))
        draft.raw(f"{module}.weight_scale", "F8_E4M3", scales)
        draft.add(f"{module}.weight_global_scale", "F32", whole)
        if activations:
            draft.scalar(f"{module}.input_global_scale", "F32", (1,))
        each = _grid(_fp8(scales), (out, columns))
        draft.decoded(module, _fp4(codes) * each / whole.astype(np.float64))
    _caches(draft, modules)
    draft.company()
    form, kind = "nvfp4-pack-quantized", "torch.float8_e4m3fn"
    more: dict[str, Any] = {"group_size": 16, "scale_dtype": kind}
    weights = _arguments(4, "float", "tensor_group", **more)
    inputs = _arguments(4, "float", "tensor_group", **more, dynamic="local")
    scheme = {"weights": weights, "format": form} | (
        {"input_activations": inputs} if activations else {}
    )
    return draft.done(_compressed(form, [scheme]), lossless=True)


def compressed_mx(rng: np.random.Generator, modules: Modules, *, bits: int = 4) -> Checkpoint:
    """E2M1 codes (4 bits) or E4M3 numbers (8 bits) with power-of-two scales of 32 columns."""
    draft = _Draft(rng)
    for module, (out, columns) in modules.items():
        scales = _exponents(rng, (out, _whole(columns, 32)))
        each = _grid(_e8m0(scales), (out, columns))
        if bits == 4:
            codes = rng.integers(0, 16, (out, columns))
            draft.add(f"{module}.weight_packed", "U8", _nibbles(codes))
            draft.decoded(module, _fp4(codes) * each)
        else:
            codes = _e4m3(rng, (out, columns))
            draft.raw(f"{module}.weight", "F8_E4M3", codes)
            draft.decoded(module, _fp8(codes) * each)
        draft.add(f"{module}.weight_scale", "U8", scales)
    _caches(draft, modules)
    draft.company()
    form = "mxfp4-pack-quantized" if bits == 4 else "mxfp8-quantized"
    weights = _arguments(bits, "float", "group", group_size=32, scale_dtype="torch.uint8")
    return draft.done(_compressed(form, [{"weights": weights, "format": form}]), lossless=True)


def compressed_mixed(rng: np.random.Generator, modules: Modules) -> Checkpoint:
    """Modules in turn in four formats, told apart by the patterns of the config's groups."""
    makers: Sequence[Callable[[np.random.Generator, Modules], Checkpoint]] = (
        lambda r, m: compressed_packed(r, m, bits=4, group_size=32),
        compressed_nvfp4,
        lambda r, m: compressed_fp8(r, m, strategy="channel"),
        lambda r, m: compressed_mx(r, m, bits=8),
    )
    draft, groups, lossless = _Draft(rng), [], True
    for index, maker in enumerate(makers):
        own = dict(list(modules.items())[index :: len(makers)])
        if not own:
            continue
        part = maker(rng, own)
        draft.tensors |= part.tensors
        draft.expected |= part.expected
        (group,) = part.config["quantization_config"]["config_groups"].values()
        escaped = [f"re:{module.replace('.', '[.]')}$" for module in own]
        groups.append(group | {"targets": escaped})
        lossless &= part.lossless
    return draft.done(_compressed("mixed-precision", groups), lossless)


# -- ModelOpt --------------------------------------------------------------------------------------


def _modelopt(
    draft: _Draft, algorithm: str, lossless: bool, group_size: int | None = None, **more: Any
) -> Checkpoint:
    """The two documents that ModelOpt writes; some exports have only the first."""
    draft.company()
    producer = {"name": "modelopt", "version": "0.47.0"}
    said: dict[str, Any] = {"quant_algo": algorithm, "kv_cache_quant_algo": None}
    said |= {"group_size": group_size} if group_size else {}
    said |= more | {"exclude_modules": ["lm_head"]}
    beside = {"hf_quant_config.json": json.dumps({"producer": producer, "quantization": said})}
    config = {"ignore": ["lm_head"], "quant_algo": algorithm, "producer": producer}
    kept = {key: value for key, value in more.items() if key == "quantized_layers"}
    return draft.done(config | kept | {"quant_method": "modelopt"}, lossless, beside)


def _modelopt_caches(draft: _Draft, modules: Modules) -> None:
    for module in modules:
        name = module.rpartition(".")[2]
        if name in {"k_proj", "v_proj"}:
            draft.scalar(f"{module}.{name[0]}_scale")


def _pre_quant(draft: _Draft, module: str, columns: int) -> Array:
    """The factors of a module's inputs, which are as good as factors of its columns."""
    factors = _scales(draft.rng, (columns,), "BF16")
    draft.add(f"{module}.pre_quant_scale", "BF16", factors)
    return factors


def modelopt_nvfp4(
    rng: np.random.Generator,
    modules: Modules,
    *,
    algorithm: str = "NVFP4",
    pre_quant_scale: bool = False,
) -> Checkpoint:
    """E2M1 codes, E4M3 scales, and a scale of the tensor that multiplies.

    Groups have 16 columns; W4A8_NVFP4_FP8, with activations in FP8, has groups of 32.
    """
    draft = _Draft(rng)
    group = 32 if algorithm == "W4A8_NVFP4_FP8" else 16
    for module, (out, columns) in modules.items():
        codes = rng.integers(0, 16, (out, columns))
        scales = _e4m3(rng, (out, _whole(columns, group)), positive=True)
        whole = np.float32(rng.uniform(2e-4, 0.2))
        draft.add(f"{module}.weight", "U8", _nibbles(codes))
        draft.raw(f"{module}.weight_scale", "F8_E4M3", scales)
        draft.add(f"{module}.weight_scale_2", "F32", np.array(whole))
        if algorithm != "W4A16_NVFP4":
            draft.scalar(f"{module}.input_scale")
        values = _fp4(codes) * _grid(_fp8(scales), (out, columns)) * float(whole)
        if pre_quant_scale:
            values = values * _pre_quant(draft, module, columns)
        draft.decoded(module, values)
    _modelopt_caches(draft, modules)
    more = {"has_zero_point": False, "pre_quant_scale": True} if pre_quant_scale else {}
    return _modelopt(draft, algorithm, not pre_quant_scale, group, **more)


def modelopt_fp8(
    rng: np.random.Generator, modules: Modules, *, algorithm: str = "FP8"
) -> Checkpoint:
    """E4M3 numbers: one scale (FP8), one for each row, or one for each block of 128 by 128."""
    draft = _Draft(rng)
    for module, (out, columns) in modules.items():
        codes, shape = _e4m3(rng, (out, columns)), (out, columns)
        if algorithm == "FP8":
            scales = _scales(rng, ())
            each = np.broadcast_to(scales, shape)
            draft.scalar(f"{module}.input_scale")
        elif algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
            scales = _scales(rng, (out,))
            each = np.broadcast_to(scales[:, None], shape)
        else:
            blocks = _scales(rng, (-(-out // 128), -(-columns // 128)))
            each, scales = _spread(blocks, shape, (128, 128)), blocks[:, None, :, None]
        draft.raw(f"{module}.weight", "F8_E4M3", codes)
        draft.add(f"{module}.weight_scale", "F32", scales)
        draft.decoded(module, _fp8(codes) * each)
    _modelopt_caches(draft, modules)
    return _modelopt(draft, algorithm, lossless=False)


def modelopt_int4(
    rng: np.random.Generator,
    modules: Modules,
    *,
    group_size: int = 128,
    pre_quant_scale: bool = False,
) -> Checkpoint:
    """W4A16_AWQ: two's-complement codes, those of two rows to the byte."""
    draft, lossless = _Draft(rng), not pre_quant_scale
    for module, (out, columns) in modules.items():
        _check(out % 2 == 0, f"{out} rows are not pairs")
        codes = _signed(rng, (out, columns), 4)
        scales = _scales(rng, (out, _whole(columns, group_size)))
        draft.add(f"{module}.weight", "U8", _nibbles((codes & 15).T).T)
        draft.add(f"{module}.weight_scale", "F32", scales)
        values = codes * _grid(scales, (out, columns))
        if pre_quant_scale:
            values = values * _pre_quant(draft, module, columns)
        draft.decoded(module, values)
        lossless &= _affine_holds(4, columns, group_size)
    _modelopt_caches(draft, modules)
    more = {"has_zero_point": False, "pre_quant_scale": True}
    return _modelopt(draft, "W4A16_AWQ", lossless, group_size, **more)


def modelopt_int8(
    rng: np.random.Generator, modules: Modules, *, pre_quant_scale: bool = False
) -> Checkpoint:
    """Integers of 8 bits with a scale for each row; smoothed models have factors of the inputs."""
    draft, lossless = _Draft(rng), not pre_quant_scale
    for module, (out, columns) in modules.items():
        codes, scales = _signed(rng, (out, columns), 8), _scales(rng, (out,))
        draft.add(f"{module}.weight", "I8", codes)
        draft.add(f"{module}.weight_scale", "F32", scales)
        values = codes * scales[:, None]
        if pre_quant_scale:
            draft.scalar(f"{module}.input_scale")
            values = values * _pre_quant(draft, module, columns)
        draft.decoded(module, values)
        lossless &= _affine_holds(8, columns, columns)
    _modelopt_caches(draft, modules)
    return _modelopt(draft, "W8A8_SQ_PER_CHANNEL" if pre_quant_scale else "W8A16", lossless)


def modelopt_mx(rng: np.random.Generator, modules: Modules, *, bits: int = 8) -> Checkpoint:
    """E4M3 numbers (8 bits) or E2M1 codes (4 bits) with power-of-two scales of 32 columns."""
    draft = _Draft(rng)
    for module, (out, columns) in modules.items():
        scales = _exponents(rng, (out, _whole(columns, 32)))
        each = _grid(_e8m0(scales), (out, columns))
        if bits == 8:
            codes = _e4m3(rng, (out, columns))
            draft.raw(f"{module}.weight", "F8_E4M3", codes)
            draft.decoded(module, _fp8(codes) * each)
        else:
            codes = rng.integers(0, 16, (out, columns))
            draft.add(f"{module}.weight", "U8", _nibbles(codes))
            draft.decoded(module, _fp4(codes) * each)
        draft.add(f"{module}.weight_scale", "U8", scales)
    return _modelopt(draft, *(("MXFP8", True, 32) if bits == 8 else ("mxfp4", True)))


def modelopt_mixed(rng: np.random.Generator, modules: Modules) -> Checkpoint:
    """MIXED_PRECISION: modules in turn in NVFP4, FP8 and 4-bit integers, listed one by one."""
    makers: Sequence[Callable[[np.random.Generator, Modules], Checkpoint]] = (
        modelopt_nvfp4,
        modelopt_fp8,
        lambda r, m: modelopt_int4(r, m, group_size=32),
    )
    draft, lossless = _Draft(rng), True
    layers: dict[str, Any] = {}
    for index, maker in enumerate(makers):
        own = dict(list(modules.items())[index :: len(makers)])
        if not own:
            continue
        part = maker(rng, own)
        draft.tensors |= part.tensors
        draft.expected |= part.expected
        said = json.loads(part.files["hf_quant_config.json"])["quantization"]
        kept = {
            k: v for k, v in said.items() if k not in {"exclude_modules", "kv_cache_quant_algo"}
        }
        layers |= dict.fromkeys(own, kept)
        lossless &= part.lossless
    return _modelopt(draft, "MIXED_PRECISION", lossless, quantized_layers=layers)


# -- FP8 blocks, MXFP4 stacks ----------------------------------------------------------------------


def _block_config(block: tuple[int, int] | None, scale: str, static: bool) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "static" if static else "dynamic",
        "weight_block_size": list(block) if block else None,
        "modules_to_not_convert": ["lm_head"],
    } | ({"scale_fmt": "ue8m0"} if scale in {"F8_E8M0", "U8"} else {})


def _block_scales(
    rng: np.random.Generator, shape: tuple[int, ...], scale: str
) -> tuple[Tensor, Array]:
    """Scales of blocks as a tensor, and as numbers; the dtypes of one byte hold exponents."""
    if scale in {"F8_E8M0", "U8"}:
        codes = _exponents(rng, shape)
        return Tensor(scale, shape, codes.tobytes()), _e8m0(codes)
    numbers = _scales(rng, shape, scale)
    return tensor(scale, numbers), numbers


def block_fp8(
    rng: np.random.Generator,
    modules: Modules,
    *,
    block: tuple[int, int] | None = (128, 128),
    scale: str = "F32",
    static: bool = False,
) -> Checkpoint:
    """E4M3 numbers with `weight_scale_inv`, which multiplies; `block` None is one scale for all."""
    draft, lossless = _Draft(rng), scale in {"F8_E8M0", "U8"}
    for module, (out, columns) in modules.items():
        codes = _e4m3(rng, (out, columns))
        rows, across = block or (out, columns)
        grid = (-(-out // rows), -(-columns // across)) if block else ()
        stored, scales = _block_scales(rng, grid, scale)
        draft.raw(f"{module}.weight", "F8_E4M3", codes)
        draft.tensors[f"{module}.weight_scale_inv"] = stored
        if static:
            draft.scalar(f"{module}.activation_scale")
        each = _spread(scales.reshape(grid or (1, 1)), (out, columns), (rows, across))
        draft.decoded(module, _fp8(codes) * each)
        lossless &= columns % 32 == 0 and across % 32 == 0
    draft.company()
    return draft.done(_block_config(block, scale, static), lossless)


def block_fp8_stacked(
    rng: np.random.Generator,
    modules: Modules,
    *,
    experts: int = 3,
    block: tuple[int, int] = (128, 128),
    scale: str = "F32",
    ending: str = "",
) -> Checkpoint:
    """Stacks of experts: `<module>` and `<module>_scale_inv`, or with `.weight` in both names.

    The stack keeps its name.
    """
    draft, lossless = _Draft(rng), scale in {"F8_E8M0", "U8"}
    for module, (out, columns) in modules.items():
        codes = _e4m3(rng, (experts, out, columns))
        grid = (experts, -(-out // block[0]), -(-columns // block[1]))
        stored, scales = _block_scales(rng, grid, scale)
        draft.raw(f"{module}{ending}", "F8_E4M3", codes)
        draft.tensors[f"{module}{ending}_scale_inv"] = stored
        values = _fp8(codes) * _spread(scales, (out, columns), block)
        draft.expected[f"{module}{ending}"] = values.astype(np.float32)
        lossless &= columns % 32 == 0 and block[1] % 32 == 0
    draft.company()
    return draft.done(_block_config(block, scale, static=False), lossless)


def gpt_oss(rng: np.random.Generator, modules: Modules, *, experts: int = 3) -> Checkpoint:
    """Stacks of experts in blocks of 32 E2M1 codes with power-of-two scales, and their biases."""
    draft = _Draft(rng)
    for module, (out, columns) in modules.items():
        groups = _whole(columns, 32)
        codes = rng.integers(0, 16, (experts, out, columns))
        scales = _exponents(rng, (experts, out, groups))
        blocks = _nibbles(codes).reshape(experts, out, groups, 16)
        draft.add(f"{module}_blocks", "U8", blocks)
        draft.add(f"{module}_scales", "U8", scales)
        draft.plain(f"{module}_bias", "BF16", (experts, out))
        draft.decoded(module, _fp4(codes) * _e8m0(scales).repeat(32, axis=-1))
    draft.company()
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.norm", "lm_head"]}
    return draft.done(config, lossless=True)


# -- AutoAWQ, GPTQ ---------------------------------------------------------------------------------

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq(
    rng: np.random.Generator,
    modules: Modules,
    *,
    version: str = "gemm",
    group_size: int = 128,
    zero_point: bool = True,
    bias: bool = False,
) -> Checkpoint:
    """Codes of 4 bits with plain zero points.

    `gemm` lies transposed, eight outputs to the word out of order; `gemv` lies as the weight does,
    its scales and zero points filled up with zeros. `group_size` -1 is a group for each row.
    """
    draft, lossless = _Draft(rng), True
    for module, (out, columns) in modules.items():
        _check(out % 8 == 0 and columns % 8 == 0, "rows and columns must be multiples of 8")
        group = columns if group_size == -1 else group_size
        shape = (out, _whole(columns, group))
        codes, scales = rng.integers(0, 16, (out, columns)), _scales(rng, shape, "F16")
        zeros = rng.integers(0, 16, shape) if zero_point else np.full(shape, 8)
        if version == "gemm":
            draft.add(f"{module}.qweight", "I32", _slots(codes.T, 4, _AWQ_ORDER))
            draft.add(f"{module}.scales", "F16", scales.T)
            if zero_point:
                draft.add(f"{module}.qzeros", "I32", _slots(zeros.T, 4, _AWQ_ORDER))
        else:
            several = max(1, 128 // group)
            wide = -(-shape[1] // (8 * several)) * 8 * several
            fill = ((0, 0), (0, wide - shape[1]))
            draft.add(f"{module}.qweight", "I32", _slots(codes, 4))
            draft.add(f"{module}.scales", "F16", np.pad(scales, fill))
            draft.add(f"{module}.qzeros", "I32", _slots(np.pad(zeros, fill), 4))
        if bias:
            draft.plain(f"{module}.bias", "F16", (out,))
        each, zero = (_grid(values, (out, columns)) for values in (scales, zeros))
        draft.decoded(module, (codes - zero) * each)
        lossless &= _affine_holds(4, columns, group)
    draft.company("F16")
    config = {
        "quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": zero_point,
        "version": version, "modules_to_not_convert": None,
    }  # fmt: skip
    return draft.done(config, lossless)


def gptq(
    rng: np.random.Generator,
    modules: Modules,
    *,
    bits: int = 4,
    group_size: int = 128,
    checkpoint_format: str | None = "gptq",
    symmetric: bool = True,
    order: str = "columns",
    scale: str = "F16",
    bias: bool = False,
    widths: Sequence[int] = (),
) -> Checkpoint:
    """Codes of 2, 3, 4 or 8 bits along the inputs, zero points along the outputs, both gapless.

    Zero points are stored less one, except in the format `gptq_v2`. `order`: `columns` for groups
    of adjacent columns, `static` for the same by a model that was quantized in another order,
    `activations` for groups of columns from anywhere, `absent` without a `g_idx`. `widths` gives
    modules in turn other widths, as `dynamic` rules do.
    """
    draft, lossless = _Draft(rng), order != "activations"
    less = 0 if checkpoint_format == "gptq_v2" else 1
    rules: dict[str, Any] = {"-:lm_head": {}}
    for index, (module, (out, columns)) in enumerate(modules.items()):
        width = widths[index % len(widths)] if widths else bits
        _check(out * width % 32 == 0 and columns * width % 32 == 0, "words must be full")
        group = columns if group_size == -1 else group_size
        shape = (out, _whole(columns, group))
        codes, scales = rng.integers(0, 1 << width, (out, columns)), _scales(rng, shape, scale)
        half = 1 << (width - 1)
        zeros = np.full(shape, half) if symmetric else rng.integers(less, 1 << width, shape)
        groups = np.arange(columns) // group
        if order == "activations":
            groups = rng.permutation(groups)
        draft.add(f"{module}.qweight", "I32", _stream(codes, width).T)
        draft.add(f"{module}.qzeros", "I32", _stream((zeros - less).T, width))
        draft.add(f"{module}.scales", scale, scales.T)
        if order != "absent":
            draft.add(f"{module}.g_idx", "I32", groups)
        if bias:
            draft.plain(f"{module}.bias", scale, (out,))
        draft.decoded(module, (codes - zeros[:, groups]) * scales[:, groups])
        if widths:
            rules[f"+:{module.replace('.', '[.]')}$"] = {"bits": width}
        lossless &= _affine_holds(width, columns, group)
    draft.company("F16")
    config: dict[str, Any] = {
        "quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": symmetric,
        "desc_act": order in {"activations", "static"}, "static_groups": order == "static",
        "true_sequential": True, "damp_percent": 0.01,
    }  # fmt: skip
    if checkpoint_format is not None:
        config["checkpoint_format"] = checkpoint_format
    if widths:
        config["dynamic"] = rules
    return draft.done(config, lossless)


# -- mlx-lm ----------------------------------------------------------------------------------------


def mlx(
    rng: np.random.Generator,
    modules: Modules,
    *,
    mode: str = "affine",
    bits: int = 4,
    group_size: int = 64,
    scale: str = "BF16",
    experts: int = 0,
) -> Checkpoint:
    """What mlx-lm saves: 32-bit words, scales, and for affine formats biases."""
    draft = _Draft(rng)
    for module, (out, columns) in modules.items():
        leading = (experts,) if experts else ()
        codes = rng.integers(0, 1 << bits, (*leading, out, columns)).astype(np.uint8)
        if mode == "mxfp8":
            codes = _e4m3(rng, codes.shape)
        words = pack(codes.reshape(-1, columns), bits).reshape(*leading, out, -1)
        draft.add(f"{module}.weight", "U32", words)
        shape = (*leading, out, _whole(columns, group_size))
        if mode == "affine":
            scales, biases = _scales(rng, shape, scale), _scales(rng, shape, scale)
            scales, biases = (
                scales * rng.choice((-1, 1), shape),
                biases * rng.choice((-1, 1), shape),
            )
            draft.add(f"{module}.scales", scale, scales)
            draft.add(f"{module}.biases", scale, biases)
            each, offset = (x.repeat(group_size, axis=-1) for x in (scales, biases))
            draft.decoded(module, codes * each + offset)
            continue
        scales = _e4m3(rng, shape, positive=True) if mode == "nvfp4" else _exponents(rng, shape)
        draft.add(f"{module}.scales", "U8", scales)
        numbers = _fp8(scales) if mode == "nvfp4" else _e8m0(scales)
        values = _fp8(codes) if mode == "mxfp8" else _fp4(codes)
        draft.decoded(module, values * numbers.repeat(group_size, axis=-1))
    draft.company(scale)
    said = {"group_size": group_size, "bits": bits, "mode": mode}
    found = draft.done(said, lossless=True)
    found.config["quantization"] = said
    return found


# -- all of them -----------------------------------------------------------------------------------

SCHEMES: dict[str, Callable[..., Checkpoint]] = {
    maker.__name__: maker
    for maker in (
        compressed_packed, compressed_int8, compressed_fp8, compressed_nvfp4, compressed_mx,
        compressed_mixed, modelopt_nvfp4, modelopt_fp8, modelopt_int4, modelopt_int8, modelopt_mx,
        modelopt_mixed, block_fp8, block_fp8_stacked, gpt_oss, awq, gptq, mlx,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A scheme with choices; rows and columns of its modules must be multiples of these."""

    scheme: str
    options: Mapping[str, Any]
    rows: int = 1
    columns: int = 1

    def __str__(self) -> str:
        return " ".join([self.scheme, *(f"{key}={value}" for key, value in self.options.items())])

    def make(self, rng: np.random.Generator, modules: Modules) -> Checkpoint:
        """A checkpoint of these modules. Raises ValueError for shapes that do not fit."""
        return SCHEMES[self.scheme](rng, modules, **self.options)


def _cases(scheme: str, rows: int = 1, columns: int = 1, **choices: Any) -> list[Case]:
    """A case for every combination of the choices."""
    return [
        Case(scheme, dict(zip(choices, options, strict=True)), rows, columns)
        for options in product(*choices.values())
    ]


_BOTH = (True, False)
_ZEROS: dict[str, Any] = {"symmetric": _BOTH}
_SMALL: dict[str, Any] = {"group_size": (32,)}

CASES: tuple[Case, ...] = (
    *_cases("compressed_packed", 1, 32, bits=tuple(range(2, 9)), dense=_BOTH, **_ZEROS, **_SMALL),
    *_cases("compressed_packed", 1, 256, group_size=(16, 64, 128, 256)),
    *_cases("compressed_packed", 1, 32, bits=(4, 8), scale=("F16", "F32"), **_ZEROS, **_SMALL),
    *_cases("compressed_packed", 1, 32, dense=(False,), g_idx=(True,), **_ZEROS, **_SMALL),
    *_cases("compressed_packed", bits=(3, 4, 8), strategy=("channel", "tensor"), **_ZEROS),
    *_cases("compressed_int8", strategy=("channel", "tensor"), scale=("BF16", "F32"), **_ZEROS),
    *_cases("compressed_int8", 1, 64, strategy=("group",), **_ZEROS, group_size=(64,)),
    *_cases("compressed_fp8", strategy=("channel", "tensor"), scale=("BF16", "F16", "F32")),
    *_cases("compressed_fp8", strategy=("channel", "tensor"), form=("naive-quantized",)),
    *_cases("compressed_fp8", strategy=("block",), block=((128, 128), (64, 32), (48, 80))),
    *_cases("compressed_fp8", 1, 64, strategy=("group",), group_size=(64,)),
    *_cases("compressed_nvfp4", 1, 16, activations=_BOTH),
    *_cases("compressed_mx", 1, 32, bits=(4, 8)),
    *_cases("compressed_mixed", 1, 32),
    *_cases("modelopt_nvfp4", 1, 32, algorithm=("NVFP4", "W4A16_NVFP4", "W4A8_NVFP4_FP8")),
    *_cases("modelopt_nvfp4", 1, 16, algorithm=("NVFP4_AWQ",), pre_quant_scale=(True,)),
    *_cases("modelopt_fp8", algorithm=("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "fp8_pb_wo")),
    *_cases("modelopt_int4", 2, 128, group_size=(32, 128), pre_quant_scale=_BOTH),
    *_cases("modelopt_int8", pre_quant_scale=_BOTH),
    *_cases("modelopt_mx", 1, 32, bits=(4, 8)),
    *_cases("modelopt_mixed", 2, 32),
    *_cases(
        "block_fp8",
        block=((128, 128), (64, 32), (40, 24), (1, 32), None),
        scale=("F32", "BF16", "F8_E8M0"),
    ),
    *_cases("block_fp8", block=((1, 32),), scale=("U8",)),
    *_cases("block_fp8", static=(True,)),
    *_cases(
        "block_fp8_stacked",
        block=((128, 128), (64, 32)),
        scale=("F32", "F8_E8M0"),
        ending=("", ".weight"),
    ),
    *_cases("gpt_oss", 1, 32),
    *_cases("awq", 8, 128, version=("gemm", "gemv"), group_size=(32, 64, 128)),
    *_cases("awq", 8, 8, group_size=(-1,)),
    *_cases("awq", 8, 32, zero_point=(False,), bias=_BOTH, **_SMALL),
    *_cases(
        "gptq", 32, 32, bits=(2, 3, 4, 8), checkpoint_format=(None, "gptq", "gptq_v2"),
        **_ZEROS, **_SMALL,
    ),
    *_cases(
        "gptq", 32, 32, bits=(3, 4), order=("static", "activations", "absent"), **_ZEROS, **_SMALL
    ),
    *_cases("gptq", 32, 32, group_size=(-1,), order=("columns", "activations")),
    *_cases("gptq", 32, 64, scale=("BF16",), group_size=(64,), bias=(True,)),
    *_cases("gptq", 32, 32, widths=((2, 3, 4, 8),), **_SMALL),
    *_cases("mlx", 1, 128, bits=(2, 3, 4, 5, 6, 8), group_size=(32, 64, 128)),
    *_cases("mlx", 1, 64, scale=("F16", "F32"), experts=(0, 3)),
    *_cases("mlx", 1, 16, mode=("nvfp4",), group_size=(16,)),
    *_cases("mlx", 1, 32, mode=("mxfp4",), **_SMALL),
    *_cases("mlx", 1, 32, mode=("mxfp8",), bits=(8,), **_SMALL),
)  # fmt: skip
"""The choices worth testing, of every scheme."""
