"""Byte-level changes between a source tensor and what is stored or quantized.

Whole small tensors go through `apply`; big plain ones are streamed by execute.py, which needs no
transform for copying and stacking because both only put bytes one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from quantmill.errors import BadPlan, BadSource
from quantmill.formats import FP8_E4M3_DTYPES
from quantmill.plans import (
    DECODE_FP8,
    DECODE_STACK_FP8,
    MLX_GLOBAL_F32,
    RECIPROCAL_F32,
    RELABEL_U8,
    REPACK_FP4,
    SCALAR_F32,
    STACK,
)
from quantmill.weights import MAX_SCALE


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor in memory: raw little-endian bytes with their dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def apply(transform: str | None, name: str, sources: Sequence[Part]) -> Part:
    """The tensor `name` made from `sources`.

    Raises BadSource where the sources are not what the transform needs (kinds source_count,
    mixed_source_dtype, not_f32, non_scalar, zero_scale) and BadPlan for transforms that compute
    with weights and have no byte-level form (kind needs_numeric_path).
    """
    if transform in {DECODE_FP8, DECODE_STACK_FP8}:
        raise BadPlan(f"{name!r}: {transform} needs arithmetic", kind="needs_numeric_path")
    if transform == STACK:
        return _stack(name, sources)
    if len(sources) != 1:
        raise BadSource(f"{name!r} needs one source, not {len(sources)}", kind="source_count")
    source = replace(sources[0], name=name)
    if transform == REPACK_FP4:
        return replace(source, dtype="U32", shape=(*source.shape[:-1], source.shape[-1] // 4))
    if transform == RELABEL_U8:
        return replace(source, dtype="U8" if source.dtype in FP8_E4M3_DTYPES else source.dtype)
    if transform in {SCALAR_F32, RECIPROCAL_F32}:
        check_scalar_f32(sources[0].name, source.dtype, source.shape)
        return _reciprocal(source) if transform == RECIPROCAL_F32 else source
    return source


def _stack(name: str, sources: Sequence[Part]) -> Part:
    first = sources[0]
    for part in sources[1:]:
        if part.dtype != first.dtype:
            raise BadSource(
                f"{name!r}: {part.name!r} is {part.dtype}, {first.name!r} is {first.dtype}",
                kind="mixed_source_dtype",
            )
        if part.shape != first.shape:
            raise BadSource(f"{name!r}: shapes differ", kind="mixed_source_shape")
    shape = (len(sources), *first.shape)
    return Part(name, first.dtype, shape, b"".join(p.data for p in sources))


def _reciprocal(source: Part) -> Part:
    """1/v, computed in float32 as the formats define it."""
    assert math.prod(source.shape) == 1
    data = change_global(RECIPROCAL_F32, source.name, memoryview(source.data))
    return replace(source, data=data.tobytes())


def change_global(transform: str, name: str, data: memoryview) -> memoryview:
    """Global scales in float32, made into the factors that are stored (docs/formats.md).

    Raises BadSource, kind `zero_scale`, where one would be infinite.
    """
    value = np.frombuffer(data, "<f4")
    if transform == MLX_GLOBAL_F32:
        return (value / np.float32(MAX_SCALE)).view(np.uint8).data
    if not value.all():
        raise BadSource(f"global scale {name!r} is zero", kind="zero_scale")
    return (np.float32(1) / value).view(np.uint8).data


def check_scalar_f32(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Raise BadSource unless this is one F32 element, of whatever rank."""
    if dtype.upper() != "F32":
        raise BadSource(f"global scale {name!r} has dtype {dtype}, not F32", kind="not_f32")
    if any(n != 1 for n in shape):
        raise BadSource(f"global scale {name!r} has shape {list(shape)}", kind="non_scalar")
