"""The plan: every decision of a `create`, as plain data, before the first byte is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantmill.formats import DTYPE_BYTES, Format
from quantmill.source import SourceFile
from quantmill.tensorfile import lay_out

# Transforms: what happens to the bytes between source and quantization.
STACK = "stack_experts"
CAST = "cast_bf16"
REPACK_FP4 = "repack_fp4"
RELABEL_U8 = "relabel_u8"
REPACK_FP8 = "repack_fp8"
SCALAR_F32 = "scalar_f32"
MLX_GLOBAL_F32 = "mlx_global_f32"
RECIPROCAL_F32 = "reciprocal_f32"
DECODE_FP8 = "decode_fp8"
DECODE_STACK_FP8 = "decode_stack_fp8"
DECODE = "decode"
RECODE = "recode"

COPYING = frozenset({None, STACK, REPACK_FP4, REPACK_FP8, RELABEL_U8, SCALAR_F32})
"""Transforms that leave the bytes alone: they name dtype and shape anew, or put bytes in a row."""

DECODING = frozenset({DECODE_FP8, DECODE_STACK_FP8, DECODE})
"""Transforms that turn codes into numbers, as the spec's `coding` says."""


RTN, SEARCH, AWARE, GPTQ = "rtn", "search", "aware", "gptq"
"""How codes and scales are chosen: rounding to nearest as MLX does it; by a search for the least
weighted error, columns weighed by norms, or by what a pass of the model gives them; with error
feedback (docs/fidelity.md)."""

CALIBRATED = frozenset({AWARE, GPTQ})
"""Methods that need to know what the layers of the model are given."""

# What they are calibrated with.
RANDOM, TEXT, MIXED, IMATRIX = "random tokens", "text", "mixed", "imatrix"

CEIL = "ceil"
"""How exponents of mx formats are rounded: up, or to `nearest`."""

CPU_PROFILE = "mlx-cpu"
GPU_PROFILE = "gpu"
DEVICE_PROFILES = ("metal", "cuda")
"""Whose rounding (docs/formats.md): MLX's on a CPU, a GPU's in software, a GPU's own."""


@dataclass(frozen=True, slots=True)
class Override:
    """A user's rule: tensors whose name fits `pattern` get `format`, None meaning keep.

    Rules that `auto` found say `why`.
    """

    pattern: str
    format: Format | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Automatic:
    """What `auto` was asked for and found: divergences in nats per token.

    `predicted` and `measured` are of the formats chosen, `uniform_measured` of the best single
    format of no more bytes, `uniform`, where one fits. `tokens` is the digest of the windows
    measured with. `exhausted` says that a larger target would have changed nothing.
    """

    reader: str
    target: str
    predicted: float
    measured: float
    uniform: str
    uniform_measured: float | None
    tokens: str
    exhausted: bool = False


@dataclass(frozen=True, slots=True)
class Options:
    """What the user may choose. The defaults give the bytes of MLX on a CPU.

    `profile` is whose rounding is followed: `mlx-cpu`, `gpu` for that of MLX's Metal kernels in
    software, `metal` or `cuda` for that of the device that does the work. `method` is how codes and
    scales are chosen; `calibration` a text and `imatrix` a file of llama.cpp's for methods that are
    calibrated. `automatic` is where rules come from that `auto` found.
    """

    overrides: tuple[Override, ...] = ()
    profile: str = CPU_PROFILE
    rounding: str = CEIL
    global_scale: bool = False
    allow_non_finite: bool = False
    method: str = RTN
    calibration: str | None = None
    imatrix: str | None = None
    automatic: Automatic | None = None


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a calibrated method is given: a `kind` of evidence, all that bytes depend on.

    `windows` of `length` tokens are taken of each part: random ones from `seed`, and texts. `file`
    is the name of the user's file, `file_digest` that of its bytes. `version` is the method's own.
    `source` and `tokens` are digests of the source's weights and of all windows, "" while they are
    not known yet.
    """

    kind: str
    version: int
    seed: int = 0
    windows: int = 0
    length: int = 0
    file: str = ""
    file_digest: str = ""
    source: str = ""
    tokens: str = ""


# What a source tensor is to a coded weight.
CODES, SCALE, ZERO, BIAS = "codes", "scale", "zero", "bias"
GLOBAL, COLUMNS, INDEX, SHAPE = "global scale", "column factors", "group index", "shape"


# What a global scale does to the numbers it belongs to (docs/formats.md).
MULTIPLIES, DIVIDES, MLX_GLOBAL = "multiplies", "divides", "mlx"


GGML = "ggml"
"""The layout of a GGUF file's blocks."""


@dataclass(frozen=True, slots=True)
class Coding:
    """How a source stores the numbers of a weight: all that decoding must know besides the bytes.

    `roles` says what each source of the spec is, a stack's members one after the other within each
    role. `element` is what a code stands for (docs/formats.md): `uint` less a zero point, `int`,
    `e2m1` or `e4m3`. `layout` is how codes of `bits` bits lie: a row of the weight after the other,
    as a `stream` of bits or whole codes in 32-bit `words`, or in the order of `gptq`, `awq`,
    `gemv` or `nibble_rows` (coding.py). With the layout GGML codes and scales lie together in
    blocks, and `element` is the type of block (ggufcodes.py). `block` rows and columns share a
    scale; 0 is all of them. `zero` is the zero point where no tensor holds one, `zero_offset` is
    added to those a tensor holds. `global_scale` is the meaning of a global scale: it MULTIPLIES,
    DIVIDES, or is MLX's own number.
    """

    roles: tuple[str, ...]
    element: str
    layout: str
    bits: int
    block: tuple[int, int]
    zero: int = 0
    zero_offset: int = 0
    global_scale: str = "multiplies"


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to a matrix: `scale` times the product of `left` and `right`.

    Both are names of source tensors, [rows, rank] and [rank, columns], stored so or `transposed`.
    """

    left: str
    right: str
    transposed: bool
    scale: float


@dataclass(frozen=True, slots=True)
class Weighting:
    """What weighs the columns of a matrix, by names of source tensors (docs/fidelity.md).

    The norm's weights, `offset` added, squared, and where it has a bias, `shift`, its square added;
    through matrices, the energies of their rows under these, multiplied with each other, each block
    of `head` rows `repeats` times.
    """

    norm: str
    offset: float = 0.0
    through: tuple[str, ...] = ()
    head: int = 0
    repeats: int = 1
    shift: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """All source tensors it names."""
        return (self.norm, *([self.shift] if self.shift else []), *self.through)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor to write.

    `dtype` and `shape` are those after `transform` and before quantization. `format` None keeps
    them. `rule` and `reason` say why. `scheme` is how the source stores the weight, "" for plain
    floats; `coding` is how to read it where that is not by copying. With the transform RECODE the
    codes become those of `format` without loss, and `dtype` is that of scales and biases. Codes
    that are copied are in the format that `keeps` names, and have their scales in specs of their
    own, by `role`. `added` is what adapters add before quantization, for each member of a stack.
    With the `method` SEARCH `weightings` says for each member what weighs its columns; they all
    count the same where there is none. With AWARE and GPTQ that is for tensors that the pass of the
    model turns out to give nothing, which are searched, or rounded where `fallback` says RTN.
    """

    name: str
    sources: tuple[str, ...]
    transform: str | None
    dtype: str
    shape: tuple[int, ...]
    format: Format | None
    rule: str
    reason: str
    global_scale: bool = False
    scheme: str = ""
    coding: Coding | None = None
    keeps: Format | None = None
    role: str = CODES
    added: tuple[LowRank | None, ...] = ()
    method: str = RTN
    weightings: tuple[Weighting, ...] = ()
    fallback: str = SEARCH

    @property
    def depends(self) -> tuple[str, ...]:
        """Names of source tensors that bytes depend on besides `reads`."""
        return tuple(name for w in self.weightings for name in w.names)

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of all source tensors that bytes depend on."""
        adapters = (name for low in self.added if low for name in (low.left, low.right))
        return (*self.sources, *adapters)

    @property
    def elements(self) -> int:
        """Number of elements before quantization."""
        return math.prod(self.shape)

    @property
    def weights(self) -> int:
        """Number of weights; scales and biases of other specs stand for none."""
        if self.role != CODES:
            return 0
        if self.keeps is None:
            return self.elements
        return math.prod(self.shape[:-1]) * self.keeps.columns(self.shape[-1])

    @property
    def is_decoded(self) -> bool:
        """Whether codes that the source has become numbers."""
        kept = self.transform == RECODE or self.keeps is not None or self.role != CODES
        return bool(self.scheme) and not kept

    @property
    def stored(self) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
        """Name, dtype and shape of everything written for this tensor, in file order."""
        fmt = self.format
        if fmt is None:
            return ((self.name, self.dtype, self.shape),)
        *leading, columns = self.shape
        groups = (*leading, columns // fmt.group_size)
        scale = fmt.scale_dtype(self.dtype)
        parts = [
            (self.name, "U32", (*leading, fmt.packed_columns(columns))),
            (f"{self.name}.scale", scale, groups),
        ]
        if fmt.has_bias:
            parts.append((f"{self.name}.bias", scale, groups))
        if self.global_scale:
            parts.append((f"{self.name}.global_scale", "F32", ()))
        return tuple(parts)

    @property
    def nbytes(self) -> int:
        """Bytes of data written, headers not counted."""
        return sum(math.prod(shape) * DTYPE_BYTES[dtype] for _, dtype, shape in self.stored)


@dataclass(frozen=True, slots=True)
class BlobSpec:
    """One tensor blob: its name in the manifest, its tensors in file order, what it records."""

    name: str
    tensors: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]

    @property
    def size(self) -> int:
        """Bytes of the finished file."""
        return len(self.header) + sum(t.nbytes for t in self.tensors)

    @property
    def header(self) -> bytes:
        """Length prefix and header of the finished file."""
        return lay_out([part for t in self.tensors for part in t.stored], self.metadata)[0]


@dataclass(frozen=True, slots=True)
class Dropped:
    """A source tensor that is not written, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The complete decision about a source. Equal sources and options give equal plans."""

    version: str
    fingerprint: str
    kind: str
    policy: str
    format: Format | None
    options: Options
    blobs: tuple[BlobSpec, ...]
    dropped: tuple[Dropped, ...]
    files: tuple[SourceFile, ...]
    source_bytes: int
    calibration: Calibration | None = None

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """All tensors in writing order."""
        return tuple(t for blob in self.blobs for t in blob.tensors)

    @property
    def blob_bytes(self) -> int:
        """Bytes of all tensor blobs."""
        return sum(blob.size for blob in self.blobs)

    @property
    def needed_bytes(self) -> int:
        """Disk space for a store that holds nothing of this model yet."""
        return self.blob_bytes + sum(f.size for f in self.files if f.media_type)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of data per weight, everything included."""
        weights = sum(t.weights for t in self.tensors)
        return 8 * sum(t.nbytes for t in self.tensors) / weights if weights else 0.0


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values; `plan_from_json` gives an equal plan back."""
    from pydantic import TypeAdapter

    found: dict[str, Any] = TypeAdapter(Plan).dump_python(plan, mode="json")
    return found


def plan_from_json(document: Mapping[str, Any]) -> Plan:
    """The plan that `plan_to_json` made; raises ValueError naming the field that does not fit."""
    from pydantic import TypeAdapter

    return TypeAdapter(Plan).validate_python(document)
