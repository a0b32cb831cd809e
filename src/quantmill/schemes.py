"""How quantizers store weights: one row for each scheme, and which one every weight is stored in.

Recognition goes by names, dtypes and shapes of the tensors that are there; config.json settles what
they leave open and must not contradict them. What comes out says which tensors make up a weight,
what its codes stand for, and which MLX format holds it without loss, if one does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from quantmill.classify import quantization_entries
from quantmill.coded import (
    AWQ,
    COMPRESSED,
    E8M0,
    FP8_SCALES,
    GPTQ,
    INT32,
    MODELOPT,
    Coded,
    Found,
    Recognised,
    check_global,
    contradiction,
    stated_method,
)
from quantmill.companions import Weight, gather
from quantmill.errors import BadSource, Corrupt
from quantmill.floatcodes import read_blocks, read_float4, read_fp8
from quantmill.formats import FLOAT_DTYPES, FP8_E4M3_DTYPES
from quantmill.ggufcodes import read_raw_blocks
from quantmill.integercodes import read_bytes, read_nibble_rows, read_packed, read_transposed
from quantmill.plans import (
    BIAS,
    CODES,
    DIVIDES,
    GLOBAL,
    MLX_GLOBAL,
    MULTIPLIES,
    SCALE,
    Coding,
    Dropped,
)
from quantmill.quantconfig import read_quant_config
from quantmill.quantparams import resolve
from quantmill.source import QUANTIZATION_CONFIG, Source, SourceTensor
from quantmill.strictjson import parse_object


@dataclass(frozen=True, slots=True)
class Scheme:
    """A row: endings and dtypes of codes and scales, the methods a config may name, the reader."""

    name: str
    codes: str
    dtypes: frozenset[str]
    scales: tuple[str, ...]
    scale_dtypes: frozenset[str]
    methods: frozenset[str]
    read: Callable[[Found], Coded]


_ANY = frozenset({""})

SCHEMES = (
    Scheme("gpt-oss mxfp4", "_blocks", frozenset({"U8"}), ("_scales",), E8M0,
           frozenset({"mxfp4"}), read_blocks),
    Scheme("GPTQ, AWQ", ".qweight", INT32, (".scales",), FLOAT_DTYPES, GPTQ | AWQ, read_transposed),
    Scheme("compressed-tensors 4-bit floats", ".weight_packed", frozenset({"U8"}),
           (".weight_scale",), FP8_E4M3_DTYPES | E8M0, COMPRESSED, read_float4),
    Scheme("compressed-tensors packed integers", ".weight_packed", INT32,
           (".weight_scale",), FLOAT_DTYPES, COMPRESSED, read_packed),
    Scheme("signed bytes", ".weight", frozenset({"I8"}), (".weight_scale",),
           FLOAT_DTYPES, COMPRESSED | MODELOPT, read_bytes),
    Scheme("ModelOpt 4-bit floats", ".weight", frozenset({"U8", "U32"}), (".weight_scale",),
           FP8_E4M3_DTYPES | E8M0, MODELOPT | COMPRESSED, read_float4),
    Scheme("ModelOpt 4-bit integers", ".weight", frozenset({"U8"}), (".weight_scale",),
           FLOAT_DTYPES, MODELOPT, read_nibble_rows),
    Scheme("FP8", "", FP8_E4M3_DTYPES, FP8_SCALES, FLOAT_DTYPES | E8M0,
           _ANY, read_fp8),
)  # fmt: skip
"""Tried in this order for every tensor; the first row that fits reads it."""

# Names that only quantizers write, of schemes that are not read, and why.
_REFUSED = (
    (".absmax", "bitsandbytes weights, whose layout depends on the library's version"),
    (".quant_map", "bitsandbytes weights"),
    (".SCB", "bitsandbytes 8-bit weights"),
    (".W_q", "HQQ weights"),
    (".codebooks", "AQLM weights"),
    (".svdquant_lora_a", "SVDQuant weights"),
    ("_blocks", "MXFP4 blocks without scales"),
    (".qweight", "packed weights without scales and zero points"),
    (".weight_packed", "packed weights without scales that fit"),
    (".qzeros", "zero points without codes"),
    (".weight_scale_2", "a global scale without its weight"),
    (".weight_scale_inv", "an FP8 scale without its weight"),
)


# -- recognition -----------------------------------------------------------------------------------


def recognise(source: Source) -> Recognised:
    """Sort a source's tensors into coded weights, plain tensors, and activation scales.

    Raises BadSource, naming the tensor, for codes without scales, scales without codes, parts whose
    shapes or dtypes do not belong together, a config that contradicts them, and known schemes that
    cannot be read.
    """
    tensors, method = source.tensors, stated_method(source)
    _refuse_rotated(source)
    coded: dict[str, Coded] = {}
    used: set[str] = set()
    dropped: list[Dropped] = []
    for tensor in tensors.values():
        found = _read(source, tensor, method)
        if found is None:
            continue
        _add(coded, found)
        used |= {part.name for part in found.parts.values()} | set(found.unused)
        dropped += [Dropped(name, _why_unused(name)) for name in found.unused]
    rest = {n: t for n, t in tensors.items() if n not in used}
    for found in _mlx_weights(source, rest, coded):
        _add(coded, found)
        used |= {part.name for part in found.parts.values()}
    plain = tuple(t for n, t in tensors.items() if n not in used)
    for tensor in plain:
        _refuse_codes(tensor)
    return Recognised({n: coded[n] for n in sorted(coded)}, plain, tuple(dropped))


def _refuse_rotated(source: Source) -> None:
    """Refuse weights that only fit inputs which a runtime transforms first."""
    for entry in quantization_entries(source.config):
        if entry.get("transform_config"):
            raise BadSource(
                "config.json: transform_config says that weights are rotated and that inputs must "
                "be as well",
                kind="unsupported_source",
                hint="start from the original, unquantized checkpoint",
            )


def _read(source: Source, tensor: SourceTensor, method: str) -> Coded | None:
    raw = read_raw_blocks(tensor)
    if raw is not None:
        return raw
    for row in SCHEMES:
        if not tensor.name.endswith(row.codes) or tensor.dtype not in row.dtypes:
            continue
        module = tensor.name.removesuffix(row.codes) if row.codes else tensor.name
        names = (module + ending for ending in row.scales)
        scale = next((source.tensors[n] for n in names if n in source.tensors), None)
        if scale is None or scale.dtype not in row.scale_dtypes:
            continue
        if row.read is read_fp8:
            module = module.removesuffix(".weight")
        found = Found(source, module, tensor, scale, method)
        if method and row.methods != _ANY and method not in row.methods:
            raise contradiction(f"the method {method}", tensor)
        return row.read(found)
    return None


def _why_unused(name: str) -> str:
    if name.endswith(".weight_shape"):
        return "the shape of a packed weight: taken from the header's shapes"
    return "activation scale: not used for weights"


def _add(coded: dict[str, Coded], found: Coded) -> None:
    if found.name in coded:
        first, second = coded[found.name].parts[CODES].name, found.parts[CODES].name
        raise BadSource(
            f"{first!r} and {second!r} are both codes of {found.name!r}",
            kind="output_name_collision",
        )
    coded[found.name] = found


def _mlx_weights(
    source: Source, tensors: Mapping[str, SourceTensor], others: Collection[str]
) -> Iterator[Coded]:
    """MLX's codes with their scales and biases, under whatever names (companions.py).

    `others` are weights that have all their parts already.
    """
    weights, orphans = gather(tensors)
    config = None
    for orphan in orphans:
        if orphan.weight in others:
            raise BadSource(
                f"tensor {orphan.name!r} is one {orphan.role.value} too many for {orphan.weight!r}",
                kind="output_name_collision",
            )
        raise BadSource(
            orphan.problem, kind="orphaned_companion", hint="a file is missing, or was renamed"
        )
    for weight in weights.values():
        codes = tensors[weight.codes]
        if weight.scale is None:
            continue
        if codes.dtype != "U32":
            if not weight.name.endswith(".weight"):
                continue  # a learned parameter that happens to be called like a scale
            raise BadSource(
                f"tensor {codes.name!r} is {codes.dtype} {list(codes.shape)}, which does not go "
                f"with its scale {weight.scale!r}",
                kind="missing_fp8_scale" if codes.dtype in FP8_E4M3_DTYPES else "bad_relation",
                hint="no known scheme stores weights like this",
            )
        if config is None:
            config = read_quant_config(source.config, _native_config(source))
        scale, bias = tensors[weight.scale], tensors[weight.bias] if weight.bias else None
        try:
            params = resolve(weight.name, codes, scale, bias, {}, config)
        except Corrupt as error:
            raise BadSource(error.message, kind=error.kind, hint=error.hint) from None
        fmt = params.format
        parts = {CODES: codes, SCALE: scale} | ({BIAS: bias} if bias else {})
        if weight.global_scale:
            check_global(tensors[weight.global_scale], list(codes.shape[:-1]))
            parts[GLOBAL] = tensors[weight.global_scale]
        element = {"affine": "uint", "mxfp8": "e4m3"}.get(fmt.mode, "e2m1")
        coding = Coding(
            tuple(parts), element, "stream", fmt.bits, (1, fmt.group_size),
            global_scale=_global_meaning(weight),
        )  # fmt: skip
        shape = (*codes.shape[:-1], fmt.columns(codes.shape[-1]))
        yield Coded(
            weight.name, f"mlx {fmt.label}", parts, coding, shape,
            scale.dtype if fmt.has_bias else "BF16", fmt, True, fmt.metadata(),
        )  # fmt: skip


def _global_meaning(weight: Weight) -> str:
    if weight.is_mlx_global:
        return MLX_GLOBAL
    return DIVIDES if weight.reciprocal else MULTIPLIES


def _native_config(source: Source) -> Mapping[str, object] | None:
    text = source.texts.get(QUANTIZATION_CONFIG)
    return parse_object(text.encode(), constants=True) if text else None


# 64-bit integers are indices, which embeddings of positions are stored with.
_CODE_DTYPES = frozenset({"U8", "I8", "U16", "I16", "U32", "I32"})


def _refuse_codes(tensor: SourceTensor) -> None:
    """Raise BadSource for a tensor that can only be a part of quantized weights."""
    name = tensor.name
    if tensor.dtype in FP8_E4M3_DTYPES:
        raise BadSource(
            f"FP8 tensor {name!r} has no scale ({' or '.join(FP8_SCALES)})",
            kind="missing_fp8_scale",
        )
    why = next((why for ending, why in _REFUSED if name.endswith(ending)), None)
    is_matrix = name.endswith(".weight") and len(tensor.shape) > 1
    if why is None and is_matrix and tensor.dtype in _CODE_DTYPES:
        why = f"{tensor.dtype} codes without scales"
    if why is not None:
        raise BadSource(
            f"tensor {name!r} shows {why}, which cannot be imported",
            kind="unsupported_source",
            hint="start from the original, unquantized checkpoint",
        )
