"""A weight as a quantizer stored it, and what the readers of all schemes need to say so.

Values and checks only: floatcodes.py and integercodes.py read schemes, schemes.py tells them apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from quantmill.classify import quantization_entries
from quantmill.errors import BadSource
from quantmill.formats import Format
from quantmill.plans import CODES, COLUMNS, Coding, Dropped
from quantmill.source import Source, SourceTensor

ACTIVATION_SCALES = (
    ".input_scale", ".input_global_scale", ".input_zero_point", ".output_scale",
    ".activation_scale",
)  # fmt: skip
"""Endings of tensors that only matter to arithmetic with quantized activations."""

E8M0 = frozenset({"U8", "F8_E8M0"})
INT32 = frozenset({"I32", "U32"})

FP8_SCALES = ("_scale_inv", "_scale")
"""Endings of an FP8 weight's scales; both multiply. The first found wins."""


# Methods that a config may name for a scheme.
COMPRESSED = frozenset({"compressed-tensors"})
MODELOPT = frozenset({"modelopt", "modelopt_fp4", "modelopt_mixed", "nvfp4"})
GPTQ = frozenset({"gptq", "gptqmodel", "auto-round", "intel/auto-round"})
AWQ = frozenset({"awq", "auto-round", "intel/auto-round"})


@dataclass(frozen=True, slots=True)
class Coded:
    """A weight as a quantizer stored it.

    `name` is the weight's own, `<module>.weight` or that of a stack; `parts` are its tensors by
    role. `shape` is logical: numbers, the rows being outputs. `decoded` is the dtype that its
    numbers have when decoded. `format` is the MLX format that holds the codes without loss, None
    where none does; with `copied` its bytes already are those of that format. `metadata` is what a
    blob of copied parts records. `unused` are tensors that belong to it and that nothing reads.
    """

    name: str
    scheme: str
    parts: Mapping[str, SourceTensor]
    coding: Coding
    shape: tuple[int, ...]
    decoded: str
    format: Format | None = None
    copied: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    @property
    def dtype(self) -> str:
        """Dtype tag of the codes."""
        return self.parts[CODES].dtype

    @property
    def is_fp8(self) -> bool:
        """Whether the codes are 8-bit floats that no MLX format holds as they are."""
        return self.coding.element == "e4m3" and self.format is None

    @property
    def layout(self) -> tuple[object, ...]:
        """What must be equal for weights to be stacked."""
        parts = {role: (t.dtype, t.shape) for role, t in self.parts.items()}
        return self.scheme, self.coding, self.shape, parts


@dataclass(frozen=True, slots=True)
class Recognised:
    """A source's tensors sorted out: coded weights by name, plain tensors, and what is dropped."""

    coded: Mapping[str, Coded]
    plain: tuple[SourceTensor, ...]
    dropped: tuple[Dropped, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """A tensor that a scheme's row fits, with what lies around it."""

    source: Source
    module: str
    codes: SourceTensor
    scale: SourceTensor
    method: str

    def part(self, *endings: str) -> SourceTensor | None:
        """Another tensor of the module."""
        names = (self.module + ending for ending in endings)
        return next((self.source.tensors[n] for n in names if n in self.source.tensors), None)


def family_of(found: Found) -> str:
    """Whose naming this is, for the scheme's name."""
    if found.codes.name.endswith(".weight_packed") or found.method in COMPRESSED:
        return "compressed-tensors"
    return "ModelOpt" if found.codes.dtype != "I8" or found.method in MODELOPT else "8-bit"


def block_of_scale(name: str, scale: SourceTensor, rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns that share one of these scales."""
    if scale.elements == 1:
        return 0, 0
    if scale.shape in {(rows,), (rows, 1)}:
        return 1, 0
    if scale.elements and scale.shape[:-1] == (rows,) and columns % scale.shape[-1] == 0:
        return 1, columns // scale.shape[1]
    raise BadSource(
        f"{scale.name!r} has shape {list(scale.shape)}, which does not divide {name!r} of shape "
        f"[{rows}, {columns}]",
        kind="bad_relation",
    )


def check_shape(name: str, part: SourceTensor, expected: tuple[int, ...]) -> None:
    """Raise BadSource where a part of the weight `name` has another shape."""
    if part.shape != expected:
        raise BadSource(
            f"{part.name!r} has shape {list(part.shape)}; {list(expected)} is needed for {name!r}",
            kind="bad_relation",
        )


def check_global(part: SourceTensor, leading: list[int]) -> None:
    """One F32 number, or one for each expert of a stack."""
    stacked = len(leading) == 2 and part.shape in {(leading[0],), (leading[0], 1, 1)}
    if part.dtype != "F32":
        raise BadSource(f"global scale {part.name!r} has dtype {part.dtype}", kind="not_f32")
    if part.elements != 1 and not stacked:
        raise BadSource(
            f"global scale {part.name!r} has shape {list(part.shape)}", kind="non_scalar"
        )


def unused_parts(found: Found) -> tuple[str, ...]:
    """Names of the module's tensors that nothing reads."""
    endings = (*ACTIVATION_SCALES, ".weight_shape")
    names = (found.module + ending for ending in endings)
    return tuple(n for n in names if n in found.source.tensors)


def stated_method(source: Source) -> str:
    """The method that the config names, "" for none."""
    for entry in quantization_entries(source.config):
        if entry.get("quant_method"):
            return str(entry["quant_method"]).lower()
    return ""


def contradiction(what: str, tensor: SourceTensor) -> BadSource:
    """The error for a config that says something else than the tensor does."""
    return BadSource(
        f"config.json speaks of {what}, but {tensor.name!r} ({tensor.dtype} "
        f"{list(tensor.shape)}) shows something else",
        kind="contradiction",
        hint="files of two checkpoints are mixed, or config.json was edited",
    )


def with_factors(found: Found, parts: dict[str, SourceTensor], columns: int) -> None:
    """Take in ModelOpt's factors of the inputs, where they were not merged into the layer before.

    Inputs are multiplied by them at run time, so the columns of the weight may be instead.
    """
    factors = found.part(".pre_quant_scale")
    if factors is not None:
        check_shape(found.codes.name, factors, (columns,))
        parts[COLUMNS] = factors
