"""The quantization formats: one table, and the packing arithmetic that follows from a row.

A format is an MLX mode with a bit width and a group size. Five of them have a canonical name
shared with Ollama; the other affine widths are called `affine-<bits>`.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantmill.errors import BadRequest

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1,
    "F8_E4M3": 1, "F8_E4M3FN": 1, "F8_E5M2": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes per element of every dtype tag a tensor file may carry (docs/formats.md)."""

FLOAT_DTYPES = frozenset({"F32", "F16", "BF16"})
"""Dtypes that are quantized as they are; scales and biases take the same dtype."""

FP8_E4M3_DTYPES = frozenset({"F8_E4M3", "F8_E4M3FN"})
FP8_E5M2_DTYPES = frozenset({"F8_E5M2", "F8_E5M2FNUZ"})

TRANSFORMABLE_DTYPES = frozenset(
    {"F32", "I32", "U32", "F64", "BF16", "F16", "U8", "I8"} | FP8_E4M3_DTYPES | FP8_E5M2_DTYPES
)
"""Dtypes a transform may read or write; others can only be copied."""


@dataclass(frozen=True, slots=True, order=True)
class Format:
    """A quantization format: MLX mode, bits per code, elements that share one scale."""

    mode: str
    bits: int
    group_size: int

    @property
    def name(self) -> str:
        """Canonical name, or `affine-<bits>` where there is none."""
        return _NAMES.get((self.mode, self.bits), f"{self.mode}-{self.bits}")

    @property
    def label(self) -> str:
        """Name with the group size where that is not the name's own default."""
        default = _default_group(self.mode)
        return self.name if self.group_size == default else f"{self.name} g{self.group_size}"

    @property
    def has_bias(self) -> bool:
        """Whether each group stores a bias beside its scale."""
        return self.mode == "affine"

    def scale_dtype(self, weight_dtype: str) -> str:
        """Dtype tag of the stored scales for a weight of `weight_dtype`."""
        return weight_dtype if self.mode == "affine" else "U8"

    def packed_columns(self, columns: int) -> int:
        """32-bit words per row of `columns` codes."""
        return columns * self.bits // 32

    def columns(self, packed_columns: int) -> int:
        """Codes per row of `packed_columns` words."""
        return packed_columns * 32 // self.bits

    def bits_per_weight(self, weight_dtype: str) -> float:
        """Stored bits per weight, scales and biases included."""
        scale_bits = 8 * DTYPE_BYTES[self.scale_dtype(weight_dtype)]
        return self.bits + scale_bits * (2 if self.has_bias else 1) / self.group_size

    def metadata(self) -> dict[str, str]:
        """What a blob records so that a loader need not guess.

        A width without a canonical name is recorded as mode plus `bits`.
        """
        named = (self.mode, self.bits) in _NAMES
        kind = {"quant_type": self.name if named else self.mode}
        return (
            kind
            | {"group_size": str(self.group_size)}
            | ({} if named else {"bits": str(self.bits)})
        )


INT4 = Format("affine", 4, 64)
INT8 = Format("affine", 8, 64)
NVFP4 = Format("nvfp4", 4, 16)
MXFP4 = Format("mxfp4", 4, 32)
MXFP8 = Format("mxfp8", 8, 32)

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)

_CANONICAL = {"int4": INT4, "int8": INT8, "nvfp4": NVFP4, "mxfp4": MXFP4, "mxfp8": MXFP8}
_NAMES = {(f.mode, f.bits): name for name, f in _CANONICAL.items()}
# `fp4` and `fp8` mean affine here, as everywhere in Ollama; the float formats have longer names.
_ALIASES = {"q4": "int4", "fp4": "int4", "q8": "int8", "fp8": "int8"}
_AFFINE = {f"affine-{bits}": Format("affine", bits, 64) for bits in AFFINE_BITS}

FORMAT_NAMES = (*_CANONICAL, *(n for n, f in _AFFINE.items() if (f.mode, f.bits) not in _NAMES))
"""Every name that `parse_format` understands, aliases aside."""


def _default_group(mode: str) -> int:
    return next(f.group_size for f in _CANONICAL.values() if f.mode == mode)


def mode_default(mode: str) -> Format:
    """The parameters MLX uses for a mode when none are given."""
    for known in _CANONICAL.values():
        if known.mode == mode:
            return known
    raise BadRequest(f"unknown quantization mode {mode!r}", kind="unsupported_quantize_type")


def is_valid(mode: str, bits: int, group_size: int) -> bool:
    """Whether MLX can quantize with these parameters, and its tests cover them."""
    if mode == "affine":
        return bits in AFFINE_BITS and group_size in AFFINE_GROUPS
    return Format(mode, bits, group_size) in _CANONICAL.values()


def parse_format(text: str, group_size: int | None = None) -> Format:
    """The format a user asked for by name; case and surrounding blanks do not matter.

    Raises BadRequest for a name outside FORMAT_NAMES and their aliases, or for a group size
    that the format does not have.
    """
    key = text.strip().lower()
    found = _CANONICAL.get(_ALIASES.get(key, key)) or _AFFINE.get(key)
    if found is None:
        raise BadRequest(
            f"unsupported quantize type {text!r}",
            kind="unsupported_quantize_type",
            hint=f"choose one of {', '.join(FORMAT_NAMES)}",
        )
    if group_size is None:
        return found
    if not is_valid(found.mode, found.bits, group_size):
        allowed = AFFINE_GROUPS if found.mode == "affine" else (found.group_size,)
        raise BadRequest(
            f"{found.name} has no group size {group_size}",
            kind="unsupported_group_size",
            hint=f"choose {', '.join(map(str, allowed))}",
        )
    return Format(found.mode, found.bits, group_size)


def parse_request(text: str | None, group_size: int | None = None) -> Format | None:
    """Like `parse_format`, with None or blank text meaning "do not quantize"."""
    if text is None or not text.strip():
        if group_size is not None:
            raise BadRequest("a group size needs a format", hint="add --quantize FORMAT")
        return None
    return parse_format(text, group_size)


def recorded_format(mode: str, bits: int) -> Format | None:
    """The canonical format that a config's (mode, bits) names, None where there is none.

    Modes other than affine have one width each, so `bits` counts for affine only.
    """
    if mode == "affine":
        name = _NAMES.get((mode, bits))
        return _CANONICAL[name] if name else None
    return _CANONICAL.get(mode)


def eight_bit(base: Format) -> Format:
    """The 8-bit format of the same family: affine keeps its group size, floats go to mxfp8."""
    return Format("affine", 8, base.group_size) if base.mode == "affine" else MXFP8


def dtype_bytes(dtype: str) -> int:
    """Bytes per element of a dtype that transforms handle.

    Raises BadRequest for tags outside TRANSFORMABLE_DTYPES.
    """
    if dtype not in TRANSFORMABLE_DTYPES:
        raise BadRequest(f"unsupported dtype {dtype!r}", kind="unsupported_dtype")
    return DTYPE_BYTES[dtype]
