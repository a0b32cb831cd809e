"""What a blob's header says about its weights: layouts old and new, and headers that lie."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantmill import mediatypes
from quantmill.errors import Corrupt
from quantmill.formats import (
    AFFINE_GROUPS,
    DTYPE_BYTES,
    FLOAT_DTYPES,
    FORMAT_NAMES,
    NVFP4,
    Format,
    parse_format,
)
from quantmill.plans import BlobSpec, TensorSpec
from quantmill.stored import StoredTensor, describe_blob
from quantmill.tensorfile import TensorFile, lay_out, parse_header
from vectors import suite

Shape = tuple[int, ...]
Parts = Mapping[str, tuple[str, Shape]]

W = "layers.0.up_proj.weight"
NORM = ("layers.0.norm.weight", "BF16", (64,))


def file_of(parts: Parts, metadata: Mapping[str, str] | None = None) -> TensorFile:
    header, _ = lay_out([(n, d, s) for n, (d, s) in parts.items()], metadata or {})
    size = len(header) + sum(_nbytes(d, s) for d, s in parts.values())
    return parse_header(header[8:], size, "blob")


def _nbytes(dtype: str, shape: Shape) -> int:
    count = DTYPE_BYTES[dtype]
    for n in shape:
        count *= n
    return count


def described(parts: Parts, **metadata: str) -> list[StoredTensor]:
    """The weights of a blob; in keywords `W_` stands for the name of the weight."""
    named = {k.replace("W_", f"{W}."): v for k, v in metadata.items()}
    return describe_blob(file_of(parts, named), "blob")


def formats(found: list[StoredTensor]) -> list[str]:
    return [t.format.label if t.format else t.dtype for t in found]


def affine(words: int, groups: int, name: str = W, rows: int = 4) -> dict[str, tuple[str, Shape]]:
    return {
        name: ("U32", (rows, words)),
        f"{name}.scale": ("BF16", (rows, groups)),
        f"{name}.bias": ("BF16", (rows, groups)),
    }


def floats(words: int, groups: int, name: str = W) -> dict[str, tuple[str, Shape]]:
    return {name: ("U32", (4, words)), f"{name}.scale": ("U8", (4, groups))}


# -- layouts ---------------------------------------------------------------------------------------


def test_a_plain_tensor_is_itself() -> None:
    """Without scales a tensor has its stored dtype, shape and bytes, and no format."""
    assert described({W: ("BF16", (4, 8))}) == [StoredTensor(W, "BF16", (4, 8), None, 64)]


def test_one_type_for_the_whole_blob() -> None:
    """Type and group size of the blob count for each of its quantized weights."""
    parts = affine(16, 4) | affine(32, 8, "layers.0.down_proj.weight")
    found = described(parts, quant_type="int4", group_size="32")
    assert formats(found) == ["int4 g32", "int4 g32"]
    assert [t.shape for t in found] == [(4, 256), (4, 128)]


def test_a_type_for_each_tensor() -> None:
    """A tensor's own type and group size win over those of the blob."""
    parts = affine(16, 4) | affine(16, 2, "layers.0.down_proj.weight")
    found = described(
        parts, quant_type="int4", group_size="64", W_quant_type="int4", W_group_size="32"
    )
    assert formats(found) == ["int4", "int4 g32"]


def test_bytes_count_the_companions() -> None:
    """Codes, scales and biases together are the bytes of a weight."""
    (found,) = described(affine(16, 2), quant_type="int4", group_size="64")
    assert found.nbytes == 4 * 16 * 4 + 2 * (4 * 2 * 2)
    assert found.elements == 4 * 128


def test_a_width_without_a_name_is_recorded_as_affine_and_bits() -> None:
    """`affine` with `bits` describes widths that have no name of their own."""
    (found,) = described(affine(10, 1), quant_type="affine", group_size="64", bits="5")
    assert found.format == Format("affine", 5, 64)
    assert found.shape == (4, 64)


@pytest.mark.parametrize(
    ("quant_type", "fmt"), [("INT4", "int4"), ("q4", "int4"), ("FP4", "int4"), ("affine", "int4")]
)
def test_types_are_read_in_any_case_and_by_alias(quant_type: str, fmt: str) -> None:
    """Names compare without case, aliases are resolved, affine alone means 4 bits."""
    assert formats(described(affine(16, 2), quant_type=quant_type)) == [fmt]


@pytest.mark.parametrize("group_size", ["", "0", "x", "-64", "9" * 5000])
def test_an_unusable_group_size_is_as_good_as_none(group_size: str) -> None:
    """A recorded group size that is no number gives way to the type's own."""
    assert formats(described(affine(16, 2), quant_type="int4", group_size=group_size)) == ["int4"]


def test_names_as_mlx_lm_writes_them() -> None:
    """`scales` and `biases` in place of `weight` are companions too."""
    base = W.removesuffix(".weight")
    parts = {
        W: ("U32", (4, 16)),
        f"{base}.scales": ("F16", (4, 2)),
        f"{base}.biases": ("F16", (4, 2)),
    }
    found = described(parts, quant_type="int4", group_size="64")
    assert [(t.name, t.shape) for t in found] == [(W, (4, 128))]


def test_a_global_scale_belongs_to_its_weight() -> None:
    """An nvfp4 weight with a global scale is one weight, four bytes larger."""
    parts = floats(16, 8) | {f"{W}.global_scale": ("F32", ())}
    (found,) = described(parts, quant_type="nvfp4", group_size="16")
    assert (found.format, found.nbytes) == (NVFP4, 4 * 16 * 4 + 4 * 8 + 4)


def test_layer_biases_are_ordinary_tensors() -> None:
    """A bias without a scale beside it is a tensor in its own right."""
    parts: Parts = {
        W: ("BF16", (4, 8)),
        f"{W}.bias": ("BF16", (4,)),
        "layers.0.up_proj.bias": ("BF16", (4,)),
    }
    found = described(parts)
    assert [t.name for t in found] == sorted(parts)
    assert {t.format for t in found} == {None}


def test_the_oldest_blobs_have_one_key() -> None:
    """Codes under `data`, with scales in a blob of their own, are accepted as they are."""
    assert formats(described({"data": ("U32", (4, 16))})) == ["U32"]


def test_experts_share_a_blob() -> None:
    """Stacked projections of a group are weights with a leading dimension."""
    names = [f"layers.0.mlp.experts.{p}.weight" for p in ("down_proj", "gate_proj", "up_proj")]
    parts = {
        part: (dtype, (8, *shape))
        for name in names
        for part, (dtype, shape) in floats(16, 8, name).items()
    }
    found = described(parts, quant_type="nvfp4", group_size="16")
    assert [(t.name, t.shape, t.format) for t in found] == [(n, (8, 4, 128), NVFP4) for n in names]


def test_plain_tensors_may_lie_beside_quantized_ones() -> None:
    """The type of the blob says nothing about a tensor without scales."""
    name, dtype, shape = NORM
    found = described(affine(16, 2) | {name: (dtype, shape)}, quant_type="int4", group_size="64")
    assert formats(found) == ["BF16", "int4"]


def test_integer_tensors_are_no_codes() -> None:
    """A kept tensor of 32-bit integers that no type is recorded for is an ordinary one."""
    assert formats(described({"layers.0.table": ("U32", (4, 16))})) == ["U32"]


# -- nothing recorded ------------------------------------------------------------------------------


def test_shapes_that_fit_one_format_need_no_record() -> None:
    """Where a single affine format explains the shapes, it is the one."""
    assert formats(described(affine(64, 2))) == ["int8 g128"]


def test_shapes_that_fit_several_formats_are_refused() -> None:
    """Guessing would give wrong weights: the message names the candidates."""
    with pytest.raises(Corrupt, match=r"no type recorded; .*int4 g64, int8 g32"):
        described(affine(16, 2))


def test_shapes_that_fit_no_format_are_refused() -> None:
    """Codes and scales that no format explains are corrupt."""
    with pytest.raises(Corrupt, match="fit no format"):
        described(affine(7, 3))


@pytest.mark.parametrize(("words", "fmt"), [(2, "nvfp4"), (4, "mxfp4"), (8, "mxfp8")])
def test_byte_scales_tell_the_float_formats_apart(words: int, fmt: str) -> None:
    """With byte scales, the words of codes for each scale decide."""
    assert formats(described(floats(words * 4, 4))) == [fmt]


@pytest.mark.parametrize(("words", "groups"), [(12, 4), (9, 4), (4, 0)])
def test_byte_scales_that_fit_no_format_are_refused(words: int, groups: int) -> None:
    """Another ratio, or none, is corrupt."""
    with pytest.raises(Corrupt, match="byte scales fit no format"):
        described(floats(words, groups))


# -- contradictions --------------------------------------------------------------------------------

INT4_64 = {"quant_type": "int4", "group_size": "64"}


@pytest.mark.parametrize(
    ("parts", "metadata", "problem"),
    [
        (affine(16, 2), INT4_64 | {"group_size": "32"}, r"int4 g32: codes \[4, 16\] and scales"),
        (affine(16, 2), {"quant_type": "int8"}, r"int8: codes \[4, 16\] and scales \[4, 2\]"),
        (
            affine(16, 2) | {f"{W}.scale": ("BF16", (5, 2)), f"{W}.bias": ("BF16", (5, 2))},
            INT4_64,
            r"scales \[5, 2\] do not fit",
        ),
        ({k: v for k, v in affine(16, 2).items() if "bias" not in k}, INT4_64, "int4 needs biases"),
        (affine(16, 8), {"quant_type": "nvfp4"}, "nvfp4 cannot have BF16 scales"),
        (floats(16, 8) | {f"{W}.bias": ("U8", (4, 8))}, {"quant_type": "nvfp4"}, "has no biases"),
        (floats(16, 2) | {f"{W}.bias": ("U8", (4, 2))}, INT4_64, "int4 cannot have U8 scales"),
        (
            affine(16, 2) | {f"{W}.scale": ("I16", (4, 2)), f"{W}.bias": ("I16", (4, 2))},
            INT4_64,
            "int4 cannot have I16 scales",
        ),
        (affine(16, 2) | {f"{W}.bias": ("F16", (4, 2))}, INT4_64, "biases and scales differ"),
        (affine(16, 2) | {f"{W}.bias": ("BF16", (2, 4))}, INT4_64, "biases and scales differ"),
        (affine(16, 2) | {W: ("BF16", (4, 16))}, INT4_64, r"has scales but is BF16 \[4, 16\]"),
        ({W: ("U32", (8,)), f"{W}.scale": ("U8", (4,))}, {"quant_type": "nvfp4"}, "has scales but"),
        ({W: ("U32", (4, 16))}, {}, "packed codes without scales"),
        ({"experts": ("U32", (4, 16))}, INT4_64, "packed codes without scales"),
        ({W: ("BF16", (4, 16))}, {f"{W}.quant_type": "int4"}, "recorded as int4 but has no scales"),
        (affine(16, 2), {"quant_type": "weird"}, "recorded type 'weird' is unknown"),
        (affine(16, 2), {"quant_type": "affine", "bits": "7"}, "affine-7 g64 does not exist"),
        (floats(16, 4), {"quant_type": "nvfp4", "group_size": "32"}, "nvfp4 g32 does not exist"),
        (
            affine(16, 2) | {f"{W}.global_scale": ("F32", ())},
            INT4_64,
            "global scale of F32 does not fit int4",
        ),
        (
            floats(16, 8) | {f"{W}.global_scale": ("BF16", ())},
            {"quant_type": "nvfp4"},
            "global scale of BF16",
        ),
    ],
)
def test_contradictions_are_refused_naming_the_tensor(
    parts: Parts, metadata: dict[str, str], problem: str
) -> None:
    """Parts that do not belong together are corrupt; blob, tensor and reason are named."""
    with pytest.raises(Corrupt, match=problem) as caught:
        describe_blob(file_of(parts, metadata), "blob")
    assert caught.value.message.startswith(f"blob: tensor '{next(iter(parts))}': ")
    assert caught.value.kind == "bad_relation"


# -- vectors ---------------------------------------------------------------------------------------

REFUSED = {
    "info-b378e4": "byte scales cannot be int4",
    "info-8c26c4": "several formats fit",
    "info-b6d0d3": "several formats fit",
    "info-5fb692": "several formats fit",
    "info-b2a703": "the type is unknown",
    "info-c06f18": "the codes of down_proj are too many for int4",
    "list-d582df": "several formats fit",
    "model-658010": "the codes are too few for int4 with group size 32",
}
"""Cases that the reference answers by a guess, or without looking at the shapes, and why not so."""


def vector_file(header: Mapping[str, Any]) -> TensorFile:
    """The header with the offsets that the vectors leave out."""
    parts = {k: (v["dtype"], tuple(v["shape"])) for k, v in header.items() if k != "__metadata__"}
    return file_of(parts, header.get("__metadata__"))


def headers(op: str) -> pytest.MarkDecorator:
    """The cases of an op with a whole header; damaged files are for the tests of tensorfile."""
    chosen = [
        case
        for case in suite("blob_quant_info")
        if case["op"] == op and "odd" not in case and "file_hex" not in case["input"]
        if "bad" not in [v.get("shape") for v in case["input"].get("header", {}).values()]
        if "error" not in case["expect"]
    ]
    return pytest.mark.parametrize("case", chosen, ids=[case["id"] for case in chosen])


def vector_weights(case: dict[str, Any]) -> list[StoredTensor]:
    blobs = case["input"].get("blobs") or [case["input"]]
    found = []
    for blob in blobs:
        if blob.get("media_type") != mediatypes.JSON:
            found += describe_blob(vector_file(blob["header"]), "blob")
    return found


@headers("blob_info")
def test_types_and_group_sizes_equal_the_vectors(case: dict[str, Any]) -> None:
    """Each weight has the type and group size of the vector, or is refused for a reason."""
    if case["id"] in REFUSED:
        with pytest.raises(Corrupt):
            vector_weights(case)
        return
    expected = {
        name: parse_format(info["quant_type"], info["group_size"])
        for name, info in case["expect"]["tensors"].items()
    }
    assert {t.name: t.format for t in vector_weights(case)} == expected


@headers("model_tensors")
def test_shapes_and_weights_equal_the_vectors(case: dict[str, Any]) -> None:
    """Names, types, logical shapes and the number of weights are those of the vector."""
    if case["id"] in REFUSED:
        with pytest.raises(Corrupt):
            vector_weights(case)
        return
    found = vector_weights(case)
    assert [
        {"name": t.name, "shape": list(t.shape), "type": t.format.name if t.format else t.dtype}
        for t in found
    ] == case["expect"]["tensors"]
    assert sum(t.elements for t in found) == case["expect"]["parameter_count"]


@headers("listing")
def test_listings_equal_the_vectors(case: dict[str, Any]) -> None:
    """Names, dtypes and, where the vector knows one, the type are those of the vector."""
    if case["id"] in REFUSED:
        with pytest.raises(Corrupt):
            vector_weights(case)
        return
    found = vector_weights(case)
    expected = case["expect"]["tensors"]
    assert [(t.name, t.dtype) for t in found] == [(e["name"], e["dtype"]) for e in expected]
    for tensor, e in zip(found, expected, strict=True):
        assert e["quant_type"] in {None, tensor.format and tensor.format.name}


# -- properties ------------------------------------------------------------------------------------


def every_format() -> list[Format]:
    named = [parse_format(name) for name in FORMAT_NAMES]
    groups = {f: AFFINE_GROUPS if f.has_bias else (f.group_size,) for f in named}
    return [Format(f.mode, f.bits, group) for f in named for group in groups[f]]


def planned(
    name: str, dtype: str, shape: Shape, fmt: Format | None, global_scale: bool = False
) -> TensorSpec:
    return TensorSpec(name, (name,), None, dtype, shape, fmt, "rule", "reason", global_scale)


def laid_out(blob: BlobSpec) -> TensorFile:
    return parse_header(blob.header[8:], blob.size, blob.name)


def as_planned(spec: TensorSpec) -> StoredTensor:
    stored_dtype = spec.stored[0][1]
    return StoredTensor(spec.name, stored_dtype, spec.shape, spec.format, spec.nbytes)


@pytest.mark.parametrize("fmt", every_format(), ids=lambda f: f.label)
@given(
    dtype=st.sampled_from(sorted(FLOAT_DTYPES)),
    leading=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    groups=st.integers(1, 40),
    extra=st.booleans(),
)
def test_what_is_planned_is_described(
    fmt: Format, dtype: str, leading: list[int], groups: int, extra: bool
) -> None:
    """A header laid out for a planned weight gives its format, logical shape and bytes back."""
    shape = (*leading, groups * max(fmt.group_size, 32))
    spec = planned(W, dtype, shape, fmt, extra and fmt == NVFP4)
    found = describe_blob(laid_out(BlobSpec(W, (spec,), fmt.metadata())), "blob")
    assert found == [as_planned(spec)]


@given(st.lists(st.none() | st.sampled_from(every_format()), min_size=1, max_size=4))
def test_mixed_blobs_are_described(chosen: list[Format | None]) -> None:
    """Weights of any formats in one blob, each with its own keys, are told apart."""
    specs = tuple(
        planned(f"layers.0.{at}.weight", "BF16", (2, 256), fmt) for at, fmt in enumerate(chosen)
    )
    metadata = {
        f"{spec.name}.{key}": value
        for spec in specs
        if spec.format
        for key, value in spec.format.metadata().items()
    }
    found = describe_blob(laid_out(BlobSpec("layers.0", specs, metadata)), "blob")
    assert found == [as_planned(spec) for spec in specs]


SHAPES = st.lists(st.integers(0, 64), max_size=3).map(tuple)
NAMES = st.sampled_from([W, *(f"{W}.{part}" for part in ("scale", "bias", "global_scale")), "data"])
VALUES = st.sampled_from(["int4", "nvfp4", "affine", "64", "32", "0", "7"]) | st.text()
KEYS = st.sampled_from(["quant_type", "group_size", "bits"]).flatmap(
    lambda key: st.sampled_from([key, f"{W}.{key}"])
)


@given(
    st.dictionaries(NAMES, st.tuples(st.sampled_from(["U32", "BF16", "U8", "F32"]), SHAPES)),
    st.dictionaries(KEYS, VALUES),
)
def test_any_header_is_described_or_corrupt(parts: Parts, metadata: dict[str, str]) -> None:
    """Whatever the parts and the metadata, the answer is weights or Corrupt."""
    with suppress(Corrupt):
        describe_blob(file_of(parts, metadata), "blob")


@pytest.mark.parametrize("key", ["bits", "group_size"])
@pytest.mark.parametrize("value", ["0", "9" * 5000, "1" + "0" * 30])
def test_absurd_parameters_do_not_stop_the_reader(key: str, value: str) -> None:
    """A weight of no columns with absurd parameters is read or refused like any other."""
    with suppress(Corrupt):
        described(affine(0, 0), quant_type="affine", **{key: value})
