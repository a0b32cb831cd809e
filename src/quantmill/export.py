"""Export: a stored model as a directory that other tools open.

`mlx-lm`: parameter names, per-module quantization in config.json, shards with an index, as
`mlx_lm.load` reads them. `hf`: decoded safetensors under the stored names; a model of components
becomes a diffusers directory again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from quantmill import mlxlm, pipelines, strictjson
from quantmill.errors import BadRequest, Corrupt
from quantmill.files import translated
from quantmill.formats import DTYPE_BYTES, Format, parse_request
from quantmill.model import Model
from quantmill.source import CONFIG, MODEL_INDEX, QUANTIZATION_CONFIG
from quantmill.tensorfile import lay_out

SHARD_BYTES = 5 << 30
"""A shard is closed before it would grow beyond this; a larger tensor has one of its own."""

TARGETS = ("mlx-lm", "hf")

_TAGS = {
    mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32", mx.uint8: "U8", mx.uint16: "U16",
    mx.uint32: "U32", mx.uint64: "U64", mx.int8: "I8", mx.int16: "I16", mx.int32: "I32",
    mx.int64: "I64", mx.bool_: "BOOL", mx.complex64: "C64",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: shard file names, tensors and bytes of tensor data.

    `decoded` are weights whose codes the layout has no place for.
    """

    folder: Path
    shards: tuple[str, ...]
    tensors: int
    nbytes: int
    decoded: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor to write: the array is made when its turn comes and let go of afterwards."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    array: Callable[[], npt.NDArray[Any]]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPE_BYTES[self.dtype]


def export(
    model: Model,
    folder: str | Path,
    to: str,
    *,
    requantize: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Write an open model into a new directory, in the layout `to` ("mlx-lm" or "hf").

    Everything is written beside the directory first and renamed at the end: an interrupted export
    leaves no half directory. Tensors go through memory one at a time. Weights whose codes
    mlx-lm cannot hold (mlxlm.named_for) are written as numbers, or in the format `requantize`.
    Raises BadRequest when the directory is there already, BadPlan for what the layout cannot hold.
    """
    target, again = Path(folder), parse_request(requantize)
    if to not in TARGETS:
        raise BadRequest(f"unknown layout {to!r}", hint=f"choose {' or '.join(TARGETS)}")
    if again and to != "mlx-lm":
        raise BadRequest("the layout hf holds decoded weights", hint="leave out --requantize")
    if target.exists():
        raise BadRequest(f"{target} is there already", hint="name a directory that is not")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    with translated(target):
        partial.mkdir(parents=True)
    decoded: tuple[str, ...] = ()
    try:
        if to == "mlx-lm":
            written, decoded = _write_mlx_lm(model, partial, shard_bytes, again)
        else:
            written = _write_hf(model, partial, shard_bytes)
        with translated(target):
            partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Exported(target, *written, decoded)


_Written = tuple[tuple[str, ...], int, int]


def _write_mlx_lm(
    model: Model, folder: Path, shard_bytes: int, again: Format | None
) -> tuple[_Written, tuple[str, ...]]:
    mlxlm.allow_many_files()
    target, config = mlxlm.empty_model(model)
    named = mlxlm.named_for(model, target, again)
    model.forget()  # what is written is let go of: only the arrays not written yet are held
    tensors = [_lazy(name, named.weights) for name in sorted(named.weights)]
    logical = sum(_logical(t, named.formats) for t in tensors)
    mlxlm.write_files(model, folder)
    # mlx-lm leaves these out as well: they name a place, or a tower that its classes drop
    kept = {k: v for k, v in config.items() if k not in {"_name_or_path", "vision_config"}}
    if named.formats:
        kept["quantization"] = mlxlm.quantization_config(target, named.formats)
        kept["quantization_config"] = kept["quantization"]
    _write_json(folder / CONFIG, dict(sorted(kept.items())))
    written = _write_shards(folder, tensors, shard_bytes, {"total_parameters": logical})
    return written, named.decoded


def _logical(tensor: _Tensor, formats: Mapping[str, Format]) -> int:
    """Weights in a tensor; scales and quantization biases are not weights."""
    path, _, kind = tensor.name.rpartition(".")
    fmt = formats.get(path)
    if fmt is None or kind == "bias":
        return int(np.prod(tensor.shape, dtype=np.int64))
    if kind != "weight":
        return 0
    return int(np.prod(tensor.shape[:-1], dtype=np.int64)) * fmt.columns(tensor.shape[-1])


def _write_hf(model: Model, folder: Path, shard_bytes: int) -> _Written:
    if mlxlm.is_pipeline(model):
        return _write_components(model, folder, shard_bytes)
    tensors = [t for name in model for t in _decoded(model, name)]
    mlxlm.write_files(model, folder)
    _write_plain_config(folder, model.config)
    return _write_shards(folder, tensors, shard_bytes, {})


def _write_plain_config(folder: Path, config: Mapping[str, Any]) -> None:
    """A component's or model's config without what it says about quantization."""
    plain = {k: v for k, v in config.items() if k not in {"quantization", "quantization_config"}}
    if plain != config or not (folder / CONFIG).exists():
        _write_json(folder / CONFIG, plain)
    (folder / QUANTIZATION_CONFIG).unlink(missing_ok=True)


def _write_components(model: Model, folder: Path, shard_bytes: int) -> _Written:
    """Each component in its folder, under the file names that diffusers looks for."""
    mlxlm.write_files(model, folder)
    configs: dict[str, Mapping[str, Any]] = {}
    shards: list[str] = []
    tensors = nbytes = 0
    for name in mlxlm.component_names(model):
        prefix = f"{name}/"
        if name in {"", ".", ".."}:
            raise Corrupt(f"{model.where}: component {name!r} leads out of the model")
        (folder / name).mkdir(exist_ok=True)
        configs[name] = config = _json_file(model, prefix + CONFIG)
        if config:
            _write_plain_config(folder / name, config)
        found = [t for n in model if n.startswith(prefix) for t in _decoded(model, n, prefix)]
        stem = pipelines.weights_stem(config)
        files, count, size = _write_shards(folder / name, found, shard_bytes, {}, stem, "pt")
        shards += [prefix + file for file in files]
        tensors, nbytes = tensors + count, nbytes + size
    index = pipelines.exported_index(_json_file(model, MODEL_INDEX), configs)
    _write_json(folder / MODEL_INDEX, index)
    return tuple(shards), tensors, nbytes


def _json_file(model: Model, name: str) -> dict[str, Any]:
    if name not in model.files:
        return {}
    try:
        return strictjson.parse_object(model.read_file(name), constants=True)
    except strictjson.BadJson as error:
        raise Corrupt(f"{model.where}: {name}: {error}", kind="bad_json") from None


def _decoded(model: Model, name: str, prefix: str = "") -> Iterator[_Tensor]:
    """The weight as floats; a stack of experts as the single experts it was made of."""
    written = name.removeprefix(prefix)
    params, shape = model.params(name), model.shape(name)
    if params is None:
        dtype = model.dtype(name)
    else:
        dtype = model.scale_dtype(name) if params.format.has_bias else "BF16"
    if mlxlm.keeps_stacks(model.config) and params is not None and len(shape) == 3:
        # gpt-oss is published with stacks of transposed matrices, under names without `.weight`
        turned = (shape[0], shape[2], shape[1])
        plain = written.removesuffix(".weight")
        yield _Tensor(plain, dtype, turned, lambda: model.decode(name).swapaxes(1, 2))
        return
    stack = mlxlm.stack_name(written) if len(shape) == 3 else None
    if stack is None:
        yield _Tensor(written, dtype, shape, lambda: model.decode(name))
        return
    for index in range(shape[0]):
        yield _Tensor(
            f"{stack[0]}.{index}.{stack[1]}.weight",
            dtype,
            shape[1:],
            lambda i=index: model.decode(name, i),  # type: ignore[misc]
        )


def _lazy(name: str, weights: dict[str, mx.array]) -> _Tensor:
    """A tensor that is taken out of `weights` when it is written, so that its memory is freed."""

    def read() -> npt.NDArray[Any]:
        array = weights.pop(name)
        return np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)

    array = weights[name]
    return _Tensor(name, _TAGS[array.dtype], tuple(array.shape), read)


def _write_shards(
    folder: Path,
    tensors: Iterable[_Tensor],
    shard_bytes: int,
    metadata: Mapping[str, int],
    stem: str = "model",
    made_for: str = "mlx",
) -> _Written:
    shards: list[list[_Tensor]] = []
    size = 0
    for tensor in tensors:
        if not shards or size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    names = [
        f"{stem}.safetensors"
        if len(shards) == 1
        else f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    weight_map: dict[str, str] = {}
    for file, shard in zip(names, shards, strict=True):
        _write_shard(folder / file, shard, made_for)
        weight_map |= {tensor.name: file for tensor in shard}
    total = sum(t.nbytes for shard in shards for t in shard)
    index = {
        "metadata": {"total_size": total, **metadata},
        "weight_map": dict(sorted(weight_map.items())),
    }
    if len(names) > 1 or made_for == "mlx":  # diffusers takes an index for a sign of many shards
        _write_json(folder / f"{stem}.safetensors.index.json", index)
    return tuple(names), len(weight_map), total


def _write_shard(path: Path, tensors: list[_Tensor], made_for: str) -> None:
    header, _ = lay_out([(t.name, t.dtype, t.shape) for t in tensors], {"format": made_for})
    with translated(path), path.open("wb") as file:
        file.write(header)
        for tensor in tensors:
            file.write(np.ascontiguousarray(tensor.array()).data)
        file.flush()
        os.fsync(file.fileno())


def _write_json(path: Path, document: Any) -> None:
    with translated(path):
        path.write_text(json.dumps(document, indent=4) + "\n", encoding="utf-8")
