"""Schemes whose codes are small floats: 4 bits of NVIDIA's and of OCP's kind, and FP8."""

from __future__ import annotations

from quantmill.classify import FP8_BLOCK, fp8_block_size, recorded_metadata
from quantmill.coded import (
    E8M0,
    FP8_SCALES,
    Coded,
    Found,
    block_of_scale,
    check_global,
    check_shape,
    family_of,
    unused_parts,
    with_factors,
)
from quantmill.errors import BadSource
from quantmill.formats import FLOAT_DTYPES, FP8_E4M3_DTYPES, MXFP4, MXFP8, NVFP4
from quantmill.plans import CODES, COLUMNS, DIVIDES, GLOBAL, MULTIPLIES, SCALE, Coding
from quantmill.source import SourceTensor


def read_float4(found: Found) -> Coded:
    """4-bit floats two to a byte, the lower index in the lower half, as MLX has them."""
    codes, scale = found.codes, found.scale
    per_element = {"U8": 2, "U32": 8}[codes.dtype]
    *leading, last = codes.shape or (0,)
    columns = last * per_element
    name = f"{found.module}.weight"
    # a byte scale may be E4M3 or E8M0: the number of scales tells, and so does a global scale
    total = found.part(".weight_global_scale", ".weight_scale_2")
    groups = scale.shape[-1] if scale.shape else 0
    is_nv = scale.dtype in FP8_E4M3_DTYPES or groups * 16 == columns
    fmt = NVFP4 if is_nv else MXFP4
    # W4A8_NVFP4_FP8 has scales of NVFP4's kind for 32 columns each
    size = 32 if is_nv and groups * 32 == columns else fmt.group_size
    check_shape(name, scale, (*leading, columns // size))
    if columns % size or not leading or not columns:
        raise BadSource(f"tensor {codes.name!r} of shape {list(codes.shape)} holds no whole words")
    parts = {CODES: codes, SCALE: scale}
    divides = codes.name.endswith(".weight_packed")
    if is_nv:
        if total is not None:
            check_global(total, leading)
            parts[GLOBAL] = total
        elif scale.dtype in FP8_E4M3_DTYPES:
            wanted = ".weight_global_scale" if divides else ".weight_scale_2"
            raise BadSource(
                f"tensor {codes.name!r} has no global scale ({found.module}{wanted})",
                kind="missing_global_scale",
                hint="the download is incomplete, or the weights were renamed",
            )
    elif total is not None:
        raise BadSource(f"{name!r}: {total.name!r} does not go with mxfp4 scales")
    with_factors(found, parts, columns)
    coding = Coding(
        tuple(parts), "e2m1", "stream", 4, (1, size),
        global_scale=DIVIDES if divides and is_nv else MULTIPLIES,
    )  # fmt: skip
    metadata = _nvfp4_metadata(found, divides) if is_nv else fmt.metadata()
    lossless = COLUMNS not in parts and size == fmt.group_size
    return Coded(
        name, f"{family_of(found)} {fmt.name}", parts, coding, (*leading, columns), "BF16",
        fmt if lossless else None, lossless, metadata, unused_parts(found),
    )  # fmt: skip


def _nvfp4_metadata(found: Found, packed: bool) -> dict[str, str]:
    """What Ollama records: the group size where the config or the packing states it."""
    group = recorded_metadata(found.source.config).get("group_size") or ("16" if packed else None)
    return {"quant_type": "nvfp4"} | ({"group_size": group} if group else {})


def read_blocks(found: Found) -> Coded:
    """gpt-oss: blocks of 16 bytes, 32 codes, with a scale each. Rows are outputs."""
    codes, scale = found.codes, found.scale
    name = f"{found.module}.weight"
    fits = len(codes.shape) > 2 and codes.shape[-1] == 16 and scale.shape == codes.shape[:-1]
    if not fits:
        raise BadSource(
            f"{scale.name!r} of shape {list(scale.shape)} does not fit {codes.name!r} of shape "
            f"{list(codes.shape)}: one scale for each block of 16 bytes is needed",
            kind="bad_relation",
        )
    parts = {CODES: codes, SCALE: scale}
    coding = Coding(tuple(parts), "e2m1", "stream", 4, (1, 32))
    shape = (*codes.shape[:-2], codes.shape[-2] * 32)
    return Coded(name, "gpt-oss mxfp4", parts, coding, shape, "BF16", MXFP4, True, MXFP4.metadata())


def read_fp8(found: Found) -> Coded:
    """8-bit floats with a scale for the tensor, each row, each block, or each 32 of a row."""
    codes, scale = found.codes, found.scale
    parts = {CODES: codes, SCALE: scale}
    if len(codes.shape) < 2:
        raise BadSource(f"FP8 tensor {codes.name!r} is not a matrix", kind="bad_block_scale_shape")
    *leading, rows, columns = codes.shape
    unused = unused_parts(found)
    if scale.dtype in E8M0 and scale.shape == (*leading, rows, columns // 32) and not columns % 32:
        coding = Coding(tuple(parts), "e4m3", "stream", 8, (1, 32))
        return Coded(
            codes.name, "mxfp8", parts, coding, codes.shape, "BF16", MXFP8, True,
            MXFP8.metadata(), unused,
        )  # fmt: skip
    if scale.dtype not in FLOAT_DTYPES | {"F8_E8M0"}:
        raise BadSource(f"{scale.name!r} is {scale.dtype}: no known FP8 scale", kind="bad_relation")
    block = _fp8_block(found)
    with_factors(found, parts, columns)
    what = {(0, 0): "tensor", (1, 0): "channel"}.get(block, f"block {block[0]}x{block[1]}")
    coding = Coding(tuple(parts), "e4m3", "stream", 8, block)
    # powers of two that serve whole groups of 32 columns: the codes are mxfp8's as they are
    powers = scale.dtype == "F8_E8M0" and COLUMNS not in parts
    fmt = MXFP8 if powers and block[1] % 32 == 0 and columns % 32 == 0 else None
    return Coded(
        codes.name, f"FP8 per {what}", parts, coding, codes.shape, "BF16", fmt, unused=unused
    )


def _fp8_block(found: Found) -> tuple[int, int]:
    """Rows and columns that share a scale; 0 is all of them. The shapes decide, if they can."""
    codes, scale = found.codes, found.scale
    *leading, rows, columns = codes.shape
    stated = fp8_block_size(found.source.config)
    block = stated or FP8_BLOCK
    expected = (*leading, -(-rows // block[0]), -(-columns // block[1]))
    shape = scale.shape
    if shape == expected or shape == (expected[0], 1, expected[-1], 1):  # ModelOpt's four axes
        return block
    inverse = scale.name.endswith(FP8_SCALES[0])
    if stated is not None and inverse:
        raise _no_block(codes, scale, expected)
    if (
        shape == ()
        or (stated is None and shape == (*leading, 1, 1))
        or (shape == (1,) and not inverse)
    ):
        return 0, 0
    if shape in {(*leading, rows, 1), (*leading, rows)}:
        return 1, 0
    if leading and shape == tuple(leading):
        return 0, 0
    if stated is None and not inverse and len(shape) == 2 and shape[0] == rows:
        return block_of_scale(codes.name, scale, rows, columns)
    raise _no_block(codes, scale, expected)


def _no_block(codes: SourceTensor, scale: SourceTensor, expected: tuple[int, ...]) -> BadSource:
    return BadSource(
        f"{scale.name!r} has shape {list(scale.shape)}; {list(expected)} is needed for "
        f"{codes.name!r} of shape {list(codes.shape)}",
        kind="bad_block_scale_shape",
    )
