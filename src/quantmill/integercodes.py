"""Schemes whose codes are integers: compressed-tensors, ModelOpt, GPTQ and AWQ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from quantmill.classify import quantization_entries
from quantmill.coded import (
    AWQ,
    GPTQ,
    INT32,
    Coded,
    Found,
    block_of_scale,
    check_shape,
    contradiction,
    family_of,
    unused_parts,
    with_factors,
)
from quantmill.errors import BadSource
from quantmill.formats import AFFINE_BITS, AFFINE_GROUPS, Format
from quantmill.plans import CODES, COLUMNS, INDEX, SCALE, ZERO, Coding
from quantmill.source import Source, SourceTensor


def read_packed(found: Found) -> Coded:
    """compressed-tensors: unsigned codes in 32-bit words along rows, zero points down columns."""
    codes, scale = found.codes, found.scale
    name = f"{found.module}.weight"
    if len(codes.shape) != 2 or len(scale.shape) not in {1, 2}:
        raise BadSource(f"{codes.name!r} and {scale.name!r} must be matrices", kind="bad_relation")
    bits, columns, layout = _packed_width(found)
    rows = codes.shape[0]
    block = block_of_scale(name, scale, rows, columns)
    parts = {CODES: codes, SCALE: scale}
    zero = found.part(".weight_zero_point")
    if zero is not None:
        per_scale = (
            scale.shape if zero.dtype == "I8" else (_words(rows, bits, layout), scale.shape[-1])
        )
        check_shape(name, zero, per_scale)
        parts[ZERO] = zero
    _with_index(found, parts, columns, ".weight_g_idx")
    coding = Coding(tuple(parts), "uint", layout, bits, block, zero=1 << (bits - 1))
    return _integers(found, "compressed-tensors", parts, coding, (rows, columns))


def _words(count: int, bits: int, layout: str) -> int:
    """32-bit words for `count` codes: one stream of bits, or only whole codes in each word."""
    return -(-count * bits // 32) if layout == "stream" else -(-count // (32 // bits))


def _columns(words: int, bits: int, layout: str) -> int:
    """Codes that fill so many 32-bit words, 0 where none do."""
    if layout == "words":
        return words * (32 // bits)
    return 0 if words * 32 % bits else words * 32 // bits


def _packed_width(found: Found) -> tuple[int, int, str]:
    """Bits, columns and layout of packed integers: from the recorded shape, else the config.

    Until its version 0.18 compressed-tensors left the bits of a word unused that hold no whole
    code; the number of words tells which it is, but for a few columns.
    """
    codes, scale = found.codes, found.scale
    recorded = found.source.values.get(f"{found.module}.weight_shape")
    stated = set(_config_widths(found.source))
    if recorded is not None and (
        len(recorded) != 2 or recorded[0] != codes.shape[0] or recorded[1] <= 0
    ):
        raise BadSource(
            f"{found.module}.weight_shape says {list(recorded)}, {codes.name!r} has "
            f"{list(codes.shape)}",
            kind="bad_relation",
        )
    layouts = ("stream", "words") if _is_dense(found.source) else ("words", "stream")
    fits: dict[tuple[int, int], str] = {}
    for layout in layouts:
        for bits in sorted(stated or range(2, 9)):
            columns = recorded[1] if recorded else _columns(codes.shape[1], bits, layout)
            divides = scale.shape[-1] and columns % scale.shape[-1] == 0
            known = recorded is not None or (stated and divides)
            if known and columns and _words(columns, bits, layout) == codes.shape[1]:
                fits.setdefault((bits, columns), layout)
    if len(fits) == 1:
        (bits, columns), layout = fits.popitem()
        return bits, columns, layout
    if recorded is not None and not fits:
        raise contradiction(f"codes of {sorted(stated)} bits", codes)
    raise BadSource(
        f"nothing says how wide the codes of {codes.name!r} are",
        kind="unknown_width",
        hint=f"{found.module}.weight_shape, or num_bits in the config groups of config.json",
    )


def _is_dense(source: Source) -> bool:
    """Whether the writer, by its version, packs codes across the borders of words."""
    for entry in quantization_entries(source.config):
        version = str(entry.get("version", "")).split(".")
        if len(version) > 1 and all(part.isdecimal() for part in version[:2]):
            return (int(version[0][:6]), int(version[1][:6])) >= (0, 18)
    return False


def _config_widths(source: Source) -> Iterator[int]:
    """Every number of bits that a group of compressed-tensors' config gives to weights."""
    for entry in quantization_entries(source.config):
        groups = entry.get("config_groups")
        for group in groups.values() if isinstance(groups, dict) else ():
            weights = group.get("weights") if isinstance(group, dict) else None
            bits = weights.get("num_bits") if isinstance(weights, dict) else None
            if type(bits) is int and 2 <= bits <= 8:
                yield bits


def read_bytes(found: Found) -> Coded:
    """Signed bytes, a scale for the tensor, each row, or each group of a row."""
    codes, scale = found.codes, found.scale
    name = f"{found.module}.weight"
    if len(codes.shape) != 2:
        raise BadSource(f"{codes.name!r} of shape {list(codes.shape)} is no matrix")
    rows, columns = codes.shape
    block = block_of_scale(name, scale, rows, columns)
    parts = {CODES: codes, SCALE: scale}
    zero = found.part(".weight_zero_point")
    if zero is not None:
        check_shape(name, zero, scale.shape)
        if zero.dtype != "I8":
            raise BadSource(f"{zero.name!r} is {zero.dtype}, not I8", kind="bad_relation")
        parts[ZERO] = zero
    with_factors(found, parts, columns)
    coding = Coding(tuple(parts), "int", "stream", 8, block)
    return _integers(found, family_of(found), parts, coding, (rows, columns))


def read_nibble_rows(found: Found) -> Coded:
    """ModelOpt's 4-bit integers: two rows to a byte, signed, the even row in the lower half."""
    codes, scale = found.codes, found.scale
    name = f"{found.module}.weight"
    if len(codes.shape) != 2 or len(scale.shape) != 2:
        raise BadSource(
            f"{codes.name!r} of shape {list(codes.shape)} with {scale.dtype} scales "
            f"{list(scale.shape)} is no known scheme",
            kind="unsupported_source",
        )
    other = found.part(".weight_scale_2")
    if other is not None:
        raise BadSource(
            f"tensor {other.name!r}: 4-bit integers scaled to FP8 (W4A8) cannot be imported",
            kind="unsupported_source",
            hint="start from the original, unquantized checkpoint",
        )
    rows, columns = codes.shape[0] * 2, codes.shape[1]
    block = block_of_scale(name, scale, rows, columns)
    parts = {CODES: codes, SCALE: scale}
    with_factors(found, parts, columns)
    coding = Coding(tuple(parts), "int", "nibble_rows", 4, block)
    return _integers(found, "ModelOpt", parts, coding, (rows, columns))


def read_transposed(found: Found) -> Coded:
    """GPTQ packs codes down the inputs, AWQ along the outputs: the shapes tell which it is."""
    codes, scale = found.codes, found.scale
    zeros = found.part(".qzeros")
    if any(len(t.shape) != 2 for t in (codes, scale, zeros or scale)) or not scale.elements:
        raise _no_layout(found)
    if _is_gemv(found, zeros):
        return _gemv(found, zeros)
    groups, outputs = scale.shape
    is_gptq = codes.shape[1] == outputs
    bits = 4 if zeros is None else zeros.shape[1] * 32 // outputs
    if bits not in {2, 3, 4, 8} or (zeros is None and is_gptq):
        raise _no_layout(found)
    inputs = codes.shape[0] * 32 // bits if is_gptq else codes.shape[0]
    per_output = -(-outputs * bits // 32)
    if not is_gptq and (bits != 4 or codes.shape[1] != per_output or outputs % 8):
        raise _no_layout(found)
    if (zeros is not None and zeros.shape != (groups, per_output)) or inputs * bits % 32:
        raise _no_layout(found)
    method = "gptq" if is_gptq else "awq"
    _check_method(found, method, bits)
    parts = {CODES: codes, SCALE: scale} | ({ZERO: zeros} if zeros is not None else {})
    if is_gptq:
        _with_index(found, parts, inputs, ".g_idx")
    size = _group_size(found, inputs, groups)
    coding = Coding(
        tuple(parts), "uint", method, bits, (1, size), zero=0 if zeros else 8,
        zero_offset=1 if is_gptq and _gptq_version(found) == 1 else 0,
    )  # fmt: skip
    return _integers(found, method.upper(), parts, coding, (outputs, inputs))


def _is_gemv(found: Found, zeros: SourceTensor | None) -> bool:
    """Whether rows are outputs, as in AWQ's packing for single rows of inputs."""
    stated = _stated_packing(found)
    if zeros is None or stated not in {"", "gemv"}:
        return False
    outputs = found.codes.shape[0]
    fits = zeros.shape[0] == outputs and found.scale.shape == (outputs, zeros.shape[1] * 8)
    # GPTQ's shapes may fit as well
    return fits and (stated == "gemv" or found.codes.shape[1] != found.scale.shape[1])


def _stated_packing(found: Found) -> str:
    entries = quantization_entries(found.source.config)
    return next((str(e["version"]).lower() for e in entries if e.get("version")), "")


def _gemv(found: Found, zeros: SourceTensor | None) -> Coded:
    """Codes in plain order along rows; scales and zero points filled up with zeros."""
    assert zeros is not None
    _check_method(found, "awq", 4, "gemv")
    outputs, inputs = found.codes.shape[0], found.codes.shape[1] * 8
    sizes = [
        e.get("group_size", e.get("q_group_size"))
        for e in quantization_entries(found.source.config)
    ]
    size = next((inputs if n == -1 else n for n in sizes if type(n) is int and n), 0)
    if size <= 0 or -(-inputs // size) > found.scale.shape[1]:
        raise contradiction(f"groups of {size}", found.scale)
    parts = {CODES: found.codes, SCALE: found.scale, ZERO: zeros}
    coding = Coding(tuple(parts), "uint", "gemv", 4, (1, size))
    return _integers(found, "AWQ", parts, coding, (outputs, inputs))


def _no_layout(found: Found) -> BadSource:
    shapes = f"{found.codes.name!r} {list(found.codes.shape)}, scales {list(found.scale.shape)}"
    zeros = found.part(".qzeros")
    return BadSource(
        f"{shapes}, zero points {list(zeros.shape) if zeros else 'none'}: this is neither the "
        "layout of GPTQ nor that of AWQ (gemm)",
        kind="bad_relation",
        hint="AWQ's gemv_fast and marlin packings are not read; start from the original checkpoint",
    )


def _group_size(found: Found, inputs: int, groups: int) -> int:
    """Consecutive inputs that share a scale; the last group may be smaller."""
    stated = [inputs // groups] if inputs % groups == 0 else []
    for entry in quantization_entries(found.source.config):
        size = entry.get("group_size", entry.get("q_group_size"))
        if type(size) is int and size > 0:
            stated.append(size)
    fits = [size for size in stated if -(-inputs // size) == groups]
    if not fits:
        raise contradiction(f"groups of {stated}", found.scale)
    return fits[0]


def _gptq_version(found: Found) -> int:
    """1 where zero points are stored less one, 2 where they are stored as they are."""
    for entry in quantization_entries(found.source.config):
        stated = entry.get("checkpoint_format", entry.get("packing_format"))
        if stated is not None:
            name = str(stated).lower().removeprefix("auto_round:").removeprefix("auto_")
            if name not in {"gptq", "gptq_v2"}:
                raise BadSource(
                    f"config.json: GPTQ checkpoint_format {stated!r} is not read, only gptq and "
                    "gptq_v2",
                    kind="unsupported_source",
                    hint="start from the original, unquantized checkpoint",
                )
            return 2 if name == "gptq_v2" else 1
    return 1


def _check_method(found: Found, method: str, bits: int, packing: str = "gemm") -> None:
    """Raise BadSource where the config names another method, width or packing."""
    allowed = {"gptq": GPTQ, "awq": AWQ}[method]
    if found.method and found.method not in allowed:
        raise contradiction(f"the method {found.method}", found.codes)
    for entry in quantization_entries(found.source.config):
        stated = entry.get("bits", entry.get("w_bit"))
        several = entry.get("dynamic") or entry.get("extra_config")
        if type(stated) is int and stated != bits and not several:
            raise contradiction(f"{stated} bits", found.codes)
    stated_packing = _stated_packing(found)
    if method == "awq" and stated_packing not in {"", packing}:
        raise contradiction(f"the packing {stated_packing}", found.codes)


def _with_index(found: Found, parts: dict[str, SourceTensor], columns: int, ending: str) -> None:
    """Take in the tensor that says which group a column belongs to, unless it says nothing.

    Without activation order groups are consecutive; that the tensor says so is checked when it is
    read, so it stays a part either way.
    """
    index = found.part(ending)
    if index is None:
        return
    if index.shape != (columns,) or index.dtype not in INT32:
        raise BadSource(
            f"{index.name!r} is {index.dtype} {list(index.shape)}, not one number for each of "
            f"{columns} columns",
            kind="bad_relation",
        )
    parts[INDEX] = index


def _integers(
    found: Found,
    family: str,
    parts: Mapping[str, SourceTensor],
    coding: Coding,
    shape: tuple[int, int],
) -> Coded:
    """A weight of integer codes; an affine format holds it where its groups fit."""
    fmt = None
    if INDEX not in parts or not _is_ordered_by_activation(found.source):
        fmt = _affine(coding, shape[1]) if COLUMNS not in parts else None
    scale = parts[SCALE].dtype
    width = f"int{coding.bits}" + (" with zero points" if ZERO in parts else "")
    return Coded(
        f"{found.module}.weight", f"{family} {width}", parts, coding, shape,
        "F16" if scale == "F16" else "BF16", fmt, False, {}, unused_parts(found),
    )  # fmt: skip


def _is_ordered_by_activation(source: Source) -> bool:
    """Whether columns may belong to any group; True unless the config denies it."""
    for entry in quantization_entries(source.config):
        if "desc_act" in entry:
            rules = entry.get("dynamic")
            own = rules.values() if isinstance(rules, dict) else ()
            if any(isinstance(rule, dict) and rule.get("desc_act") for rule in own):
                return True
            return entry["desc_act"] is not False and entry.get("static_groups") is not True
    return True


def _affine(coding: Coding, columns: int) -> Format | None:
    """The affine format whose groups divide those of the coding, the largest first."""
    size = coding.block[1] or columns
    if coding.bits not in AFFINE_BITS or coding.block[0] not in {0, 1}:
        return None
    for group in sorted(AFFINE_GROUPS, reverse=True):
        if size % group == 0 and columns % group == 0:
            return Format("affine", coding.bits, group)
    return None
