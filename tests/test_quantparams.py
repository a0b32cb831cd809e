"""Parameters of quantized tensors: the peers' vectors, and who is believed when sources differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from departures import DEPARTURES
from quantmill.classify import fp8_block_size, recorded_metadata
from quantmill.companions import gather
from quantmill.errors import BadSource, Corrupt, QuantmillError
from quantmill.formats import (
    AFFINE_BITS,
    AFFINE_GROUPS,
    INT4,
    INT8,
    MXFP4,
    MXFP8,
    NVFP4,
    Format,
    mode_default,
    parse_format,
    recorded_format,
)
from quantmill.quantconfig import (
    QuantConfig,
    Section,
    Written,
    index_default,
    legacy_format,
    model_section,
    parse_model_config,
    parse_quantization_config,
    read_quant_config,
)
from quantmill.quantparams import (
    BLOB,
    DEFAULT,
    LOAD_BITS,
    LOAD_GROUPS,
    MODEL_INDEX,
    OVERRIDE,
    SHAPES,
    Params,
    affine_consistent,
    bits_for_group_size,
    fitting,
    infer,
    legacy_quantization,
    recorded,
    resolve,
)
from quantmill.tensorfile import TensorEntry, TensorFile, header_length, parse_header
from vectors import DATA, cases, suite

W = "model.layers.0.mlp.gate.weight"
PATH = W.removesuffix(".weight")
Shape = tuple[int, ...]


def entry(dtype: str, shape: Shape) -> TensorEntry:
    return TensorEntry("t", dtype, shape, 0, 0)


def resolved(
    fmt: Format,
    metadata: Mapping[str, str] | None = None,
    config: QuantConfig | None = None,
    default: Written | None = None,
    columns: int = 1280 * 3,
) -> Params:
    """What is decided for a tensor stored in `fmt`."""
    return decided(
        (8, fmt.packed_columns(columns)),
        (8, columns // fmt.group_size),
        "BF16" if fmt.has_bias else "U8",
        metadata,
        config,
        default,
    )


def decided(
    weight: Shape,
    scale: Shape,
    dtype: str,
    metadata: Mapping[str, str] | None = None,
    config: QuantConfig | None = None,
    default: Written | None = None,
) -> Params:
    scales = entry(dtype, scale)
    bias = None if dtype == "U8" else scales
    return resolve(W, entry("U32", weight), scales, bias, metadata or {}, config, default)


def config_of(section: Mapping[str, Any]) -> QuantConfig:
    found = read_quant_config({"quantization": section})
    assert found is not None
    return found


def answer_kind(case: dict[str, Any], action: Any) -> None:
    """Check that the action fails as the vector says."""
    with pytest.raises(QuantmillError) as caught:
        action()
    assert caught.value.kind == case["expect"]["error"]["kind"]


# -- vectors: metadata and shapes ------------------------------------------------------------------

KINDS = {
    "truncated_file": "truncated_file",
    "header_too_large": "unreadable_shard",
    "bad_header_json": "unreadable_shard",
    "bad_tensor_entry": "unreadable_shard",
}
"""What tensorfile calls the failures of the vectors."""


def read_file(data: bytes) -> TensorFile:
    length = header_length(data[:8], len(data), "blob")
    return parse_header(data[8 : 8 + length], len(data), "blob")


def header_bytes(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def scanned_bytes(header: Mapping[str, Any]) -> object:
    return read_file(header_bytes(header))


def shape_of(header: Mapping[str, Any], name: str) -> list[int]:
    shape: list[int] = header[name]["shape"]
    return shape


def hint_of(kind: str) -> int:
    return 8 if "8" in kind else 4 if "4" in kind else 0


def scanned(header: Mapping[str, Any]) -> dict[str, tuple[str, int, int]]:
    """Mode, width and group of each weight as a header scan finds them: record first, then shapes.

    Names with scales come from `gather`; shapes are read Ollama's way where nothing is recorded.
    """
    entries = {k: v for k, v in header.items() if k != "__metadata__"}
    found = {}
    for weight in gather(entries)[0].values():
        if weight.scale is None:
            continue
        said = recorded(weight.name, header.get("__metadata__", {}))
        guess = infer(shape_of(entries, weight.codes), shape_of(entries, weight.scale), 0)
        if said:
            known = mode_default(said[0].mode or "")
            group = said[0].group_size or known.group_size
            found[weight.name] = (known.mode, said[0].bits or known.bits, group)
        elif guess:
            found[weight.name] = (guess.mode, guess.bits, guess.group_size)
    return found


@cases("blob_quant_info", "blob_info")
def test_header_scans_equal_the_vectors(case: dict[str, Any]) -> None:
    """Recorded types and groups, per tensor before blob, then shapes; damaged files are refused."""
    header, expect = case["input"].get("header"), case["expect"]
    if header is None:
        with pytest.raises(QuantmillError) as caught:
            read_file(bytes.fromhex(case["input"]["file_hex"]))
        assert caught.value.kind == KINDS[expect["error"]["kind"]]
        return
    if case["id"] in DEPARTURES:
        shapeless = any(e.get("shape") == "bad" for e in header.values())
        with pytest.raises(QuantmillError, match="data_offsets" if shapeless else "'weird'"):
            (scanned, scanned_bytes)[shapeless](header)
        return
    whole = recorded("", header.get("__metadata__", {}))
    kind = expect["global"]["quant_type"]
    assert [w.mode for w in whole] == ([parse_format(kind).mode] if kind else [])
    assert [w.group_size for w in whole] == ([expect["global"]["group_size"]] if kind else [])
    expected = {}
    for name, info in expect["tensors"].items():
        fmt = parse_format(info["quant_type"])
        expected[name] = (fmt.mode, fmt.bits, info["group_size"])
    assert scanned(header) == expected


@pytest.mark.parametrize(
    "case",
    [c for c in suite("blob_quant_info") if c["op"] == "listing" and "error" in c["expect"]],
    ids=lambda c: c["id"],
)
def test_files_that_cannot_be_listed_are_refused(case: dict[str, Any]) -> None:
    """A file that is too short or describes no tensor properly is refused with the kind for it."""
    given_input, kind = case["input"], case["expect"]["error"]["kind"]
    if kind == "no_tensor":  # such a file is valid; verification reports an entry without tensors
        data = header_bytes(given_input["header"])
        assert not parse_header(data[8:], len(data), "blob").entries
        return
    data = bytes.fromhex(given_input.get("file_hex", "")) or (
        header_bytes(given_input["header"]) if "header" in given_input else b""
    )
    with pytest.raises(QuantmillError) as caught:
        read_file(data)
    assert caught.value.kind == KINDS[kind]


@cases("blob_quant_info", "main_names")
def test_main_names_equal_the_vectors(case: dict[str, Any]) -> None:
    """The tensors of a blob are those that are no companions."""
    names = case["input"]["header"].keys() - {"__metadata__"}
    assert list(gather(names)[0]) == case["expect"]["names"]


@cases("blob_quant_info", "infer")
def test_inference_equals_the_vectors(case: dict[str, Any]) -> None:
    """Shapes alone give 4 or 8 bits affine, or nothing."""
    found = infer(**case["input"])
    assert (found and found.bits, found and found.group_size) == (
        case["expect"]["bits"],
        case["expect"]["group_size"],
    )


@cases("blob_quant_info", "infer", odd=True)
def test_the_hint_only_breaks_ties(case: dict[str, Any]) -> None:
    """The peers' rule is kept with its oddities, since nothing is decided by it."""
    test_inference_equals_the_vectors(case)


@cases("blob_quant_info", "infer_type")
def test_inferred_types_equal_the_vectors(case: dict[str, Any]) -> None:
    """The same from a header, with a type's name as the hint."""
    given_input, expect = case["input"], case["expect"]
    header, name = given_input["header"], given_input["name"]
    shapes = (shape_of(header, name), shape_of(header, f"{name}.scale"))
    found = infer(*shapes, hint_of(given_input["hint"]))
    assert (found and found.name) == expect["quant_type"]
    assert (found and found.group_size) == expect["group_size"]


@cases("blob_quant_info", "affine_consistent")
def test_consistency_equals_the_vectors(case: dict[str, Any]) -> None:
    """Words and groups either hold the same number of codes or do not."""
    columns = case["input"]
    assert case["expect"]["consistent"] == affine_consistent(
        columns["weight_cols"], columns["scale_cols"], columns["bits"], columns["group_size"]
    )


@cases("blob_quant_info", "bits_for_group_size")
def test_widths_for_a_group_size_equal_the_vectors(case: dict[str, Any]) -> None:
    """A group size leaves one width or none."""
    columns = case["input"]
    assert case["expect"]["bits"] == bits_for_group_size(
        columns["weight_cols"], columns["scale_cols"], columns["group_size"]
    )


# -- vectors: the decision -------------------------------------------------------------------------


def vector_metadata(given_input: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, info in given_input.get("tensor_quant", {}).items():
        found |= {f"{name}.quant_type": info["quant_type"]}
        found |= {f"{name}.group_size": str(info["group_size"])}
    return found


def vector_default(given_input: Mapping[str, Any]) -> Written:
    default = given_input["defaults"]
    return Written(default["mode"], default["bits"] or None, default["group_size"] or None)


def stated(given_input: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Parameters as far as they are written, where there are no shapes to check them by."""
    said = recorded(name, vector_metadata(given_input))
    found = said[0] if said else vector_default(given_input)
    group = found.group_size or mode_default(found.mode or "").group_size
    return {"bits": found.bits, "group_size": group, "mode": found.mode}


def vector_params(given_input: Mapping[str, Any], name: str, shapes: Any, has_bias: bool) -> Params:
    """Our decision; the vectors leave out dtypes, which follow from the type that is written."""
    default = vector_default(given_input)
    said = recorded(name, vector_metadata(given_input)) or [default]
    scale = entry("BF16" if said[0].mode in {None, "affine"} else "U8", tuple(shapes[1]))
    bias = scale if has_bias and scale.dtype != "U8" else None
    config = QuantConfig((Section(default),)) if default.mode else None
    metadata = vector_metadata(given_input)
    return resolve(name, entry("U32", tuple(shapes[0])), scale, bias, metadata, config)


def check_params(case: dict[str, Any], name: str, shapes: Any, has_bias: bool) -> None:
    expect = {key: case["expect"][key] for key in ("bits", "group_size", "mode")}
    if shapes is None:
        assert stated(case["input"], name) == expect
        return
    if not expect["bits"]:  # the peers' word for "undecided"
        with pytest.raises(Corrupt) as caught:
            vector_params(case["input"], name, shapes, has_bias)
        assert caught.value.kind == "ambiguous_parameters"
        return
    fmt = vector_params(case["input"], name, shapes, has_bias).format
    assert {"bits": fmt.bits, "group_size": fmt.group_size, "mode": fmt.mode} == expect


@cases("blob_quant_info", "params")
def test_recorded_parameters_equal_the_vectors(case: dict[str, Any]) -> None:
    """A tensor's record comes before defaults; a group that is not recorded is the type's."""
    if case["id"] in DEPARTURES:
        with pytest.raises(Corrupt, match="recorded type 'weird' is unknown"):
            stated(case["input"], case["input"]["name"])
        return
    expect = dict(case["expect"])
    name = case["input"]["name"]
    assert bool(recorded(name, vector_metadata(case["input"]))) == expect.pop("from_tensor")
    assert stated(case["input"], name) == expect


REFUSED = {
    "resolve-08dc57": ["int4 g128", "int8 g64"],
    "resolve-2c2f8d": ["int4 g128", "int8 g64"],
    "resolve-5d5ea6": ["affine-1 g128", "affine-2 g64", "int4 g32", "int8 g16"],
    "resolve-c68e8f": ["affine-3 g128", "affine-6 g64"],
    "layer-12de0e": ["affine-1 g128", "affine-2 g64", "int4 g32", "int8 g16"],
    "layer-9ebe4b": ["int4 g128", "int8 g64"],
}
"""Departures that are errors, with the candidates that the error names."""


def check_departure(case: dict[str, Any], name: str, shapes: Any, has_bias: bool) -> None:
    """Defaults that do not fit decide nothing, and affine codes need biases."""
    if case["id"] == "layer-903286":
        with pytest.raises(Corrupt, match="without biases fit no format"):
            vector_params(case["input"], name, shapes, has_bias)
    elif case["id"] in REFUSED:
        with pytest.raises(Corrupt) as caught:
            vector_params(case["input"], name, shapes, has_bias)
        assert caught.value.kind == "ambiguous_parameters"
        assert caught.value.message.endswith(f"fit {', '.join(REFUSED[case['id']])}")
    else:
        found = vector_params(case["input"], name, shapes, has_bias)
        assert found == Params(MXFP4, SHAPES)


@cases("blob_quant_info", "resolve")
def test_decisions_equal_the_vectors(case: dict[str, Any]) -> None:
    """Record, defaults and shapes give the parameters of the reference, or an error instead."""
    given_input = case["input"]
    shapes = given_input["weight_shape"] and (
        given_input["weight_shape"],
        given_input["scale_shape"],
    )
    check = check_departure if case["id"] in DEPARTURES else check_params
    check(case, given_input["name"], shapes, True)


@cases("blob_quant_info", "resolve", odd=True)
def test_a_record_that_contradicts_the_shapes_is_refused(case: dict[str, Any]) -> None:
    """A per-tensor type that the packed shapes rule out is an error, not kept."""
    given_input = case["input"]
    assert "contradicts the packed shapes" in case["odd"]
    with pytest.raises(Corrupt, match="blob metadata says int8 g64") as caught:
        vector_params(
            given_input,
            given_input["name"],
            (given_input["weight_shape"], given_input["scale_shape"]),
            True,
        )
    assert caught.value.kind == "bad_relation"


@cases("aux_names", "layer")
def test_layers_have_the_parameters_of_the_vectors(case: dict[str, Any]) -> None:
    """A quantized layer's parameters are decided by its own record, defaults and shapes."""
    expect, shapes = case["expect"], case["input"].get("shapes")
    if expect["type"] != "quantized":
        return
    found = shapes and (shapes[expect["weight"]], shapes[expect["scales"]])
    check = check_departure if case["id"] in DEPARTURES else check_params
    check(case, expect["weight"], found, expect["qbiases"] is not None)


# -- vectors: configs ------------------------------------------------------------------------------


@cases("quant_config", "lookup")
def test_lookups_equal_the_vectors(case: dict[str, Any]) -> None:
    """Both forms of mlx-native's config find a tensor's entry in four steps."""
    native = case["input"]["form"] == "quantization_config"
    parse = parse_quantization_config if native else parse_model_config
    text, expect = case["input"]["text"].encode(), case["expect"]
    if "error" in expect:
        answer_kind(case, lambda: parse(text))
        return
    section = parse(text)
    assert len(section.overrides()) == expect["overrides"]
    found = [section.lookup(name) for name in ("", *case["input"]["lookups"])]
    assert [{"bits": w.bits, "group_size": w.group_size} for w in found] == [
        {"bits": expect["bits"], "group_size": expect["group_size"]},
        *expect["lookups"],
    ]


@cases("quant_config", "lookup", odd=True)
def test_odd_lookups_equal_the_vectors(case: dict[str, Any]) -> None:
    """Flat keys of the other form are ignored, and what is no number is absent."""
    test_lookups_equal_the_vectors(case)


def named(written: Written) -> str | None:
    fmt = recorded_format(written.mode, written.bits) if written.mode and written.bits else None
    return fmt.name if fmt else None


def as_dict(written: Written) -> dict[str, Any]:
    return {
        "bits": written.bits,
        "group_size": written.group_size,
        "mode": written.mode,
        "quant_type": named(written),
    }


@cases("quant_config", "overrides")
def test_overrides_equal_the_vectors(case: dict[str, Any]) -> None:
    """Defaults are as written; an entry without a mode is affine."""
    section = model_section(json.loads(case["input"]["text"])) or Section(Written())
    assert as_dict(section.default) == case["expect"]["defaults"]
    found = {
        f"{path}.weight": as_dict(Written(e.mode or "affine", e.bits, e.group_size))
        for path, e in section.entries.items()
        if not isinstance(e, bool)
    }
    assert found == case["expect"]["overrides"]


@cases("quant_config", "mlx_lm_params")
def test_modules_equal_the_vectors_of_mlx_lm(case: dict[str, Any]) -> None:
    """An entry stands by itself; without one, scales show that a module is quantized."""
    given_input, expect = case["input"], case["expect"]
    section = model_section({"quantization": given_input["quantization"]})
    assert section is not None
    found = section.module(given_input["path"], given_input["has_scales"])
    assert (found is not None) == expect["quantized"]
    if found is not None:
        parameters = {"bits": found.bits, "group_size": found.group_size, "mode": found.mode}
        assert parameters == {k: v for k, v in expect.items() if k != "quantized"}


@cases("quant_config", "mlx_lm_legacy")
def test_methods_equal_the_vectors_of_mlx_lm(case: dict[str, Any]) -> None:
    """A method by name stands for parameters, or is refused."""
    section, expect = case["input"]["quantization_config"], case["expect"]
    if "error" in expect:
        answer_kind(case, lambda: legacy_format(section))
        return
    assert legacy_format(section) == Format(expect["mode"], expect["bits"], expect["group_size"])
    found = model_section({"quantization_config": section})
    assert found is not None
    assert found.required() == legacy_format(section)


@cases("quant_config", "quant_block")
def test_blocks_equal_the_vectors(case: dict[str, Any]) -> None:
    """A section must give bits and group size; a missing mode is affine."""
    section, expect = model_section(case["input"]["config"]), case["expect"]
    assert section is not None
    if "error" in expect:
        answer_kind(case, section.required)
        return
    assert section.required() == Format(expect["mode"], expect["bits"], expect["group_size"])
    assert section.entries == expect["overrides"]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=c["id"])
        for c in suite("quant_config")
        if c["op"] == "source_metadata" and "odd" not in c
    ],
)
def test_metadata_of_sources_equals_the_vectors(case: dict[str, Any]) -> None:
    """A config's model-wide entry becomes blob metadata where its width has a name."""
    config, expect = case["input"]["config"], case["expect"]
    if "error" in expect:
        answer_kind(case, lambda: recorded_metadata(config))
        return
    assert recorded_metadata(config) == (expect["metadata"] or {})
    block = fp8_block_size(config)
    assert (list(block) if block else None) == expect["weight_block"]


# -- vectors: components ---------------------------------------------------------------------------


def component_layers(given_input: Mapping[str, Any]) -> dict[str, int]:
    component = given_input["component"]
    prefix = f"{component}/" if component else ""
    return {
        layer["name"].removeprefix(prefix): layer["size"]
        for layer in given_input["layers"]
        if layer["name"].startswith(prefix) and not layer.get("media_type", "").endswith("json")
        if not component or "/" not in component
    }


def vector_index(given_input: Mapping[str, Any]) -> dict[str, Any]:
    text = given_input.get("model_index_text")
    return (json.loads(text) if text else None) or given_input["model_index"] or {}


def check_component(case: dict[str, Any]) -> None:
    given_input, expect = case["input"], case["expect"]
    layers, index = component_layers(given_input), vector_index(given_input)
    assert bool(layers) == ("error" not in expect)
    if not layers:
        return
    named_type = legacy_quantization(index, layers)
    assert named_type in expect.get("quantization_any_of", [expect.get("quantization") or ""])
    assert ((index_default(index) or Written()).group_size or 0) == expect["group_size"]
    assert sorted(layers) == expect["tensors"]


@cases("weights_quantization", "weights")
def test_component_types_equal_the_vectors(case: dict[str, Any]) -> None:
    """The old heuristic names what it named: the model index first, then ratios of sizes."""
    check_component(case)


@cases("weights_quantization", "weights", odd=True)
def test_odd_component_types_equal_the_vectors(case: dict[str, Any]) -> None:
    """Empty layers and disagreeing pairs give an answer of the reference, always the same one."""
    check_component(case)


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ({"quantization": "NVFP4", "group_size": 16}, Written("nvfp4", 4, 16)),
        ({"quantization": "q4", "group_size": 0}, Written("affine", 4)),
        ({"quantization": "int8", "group_size": -1}, Written("affine", 8)),
        ({"quantization": "FP4", "group_size": "32"}, Written("affine", 4)),
        ({"quantization": "BF16"}, None),
        ({"quantization": 4}, None),
        ({"group_size": 64}, Written(None, None, 64)),
        ({}, None),
    ],
)
def test_the_model_index_names_a_type(index: dict[str, Any], expected: Written | None) -> None:
    """Only a written group size counts, since what a type's name stands for has changed."""
    assert index_default(index) == expected


# -- every format is found back --------------------------------------------------------------------

FORMATS = [
    *(Format("affine", bits, group) for bits in LOAD_BITS for group in LOAD_GROUPS),
    NVFP4,
    MXFP4,
    MXFP8,
]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.name}-g{f.group_size}")


def test_every_format_that_is_written_can_be_read() -> None:
    """The widths and groups that are read include those that are written."""
    assert set(AFFINE_BITS) <= set(LOAD_BITS)
    assert set(AFFINE_GROUPS) <= set(LOAD_GROUPS)


@every_format
def test_blob_metadata_decides(fmt: Format) -> None:
    """A recorded format is found back, from the tensor's own keys as from the blob's."""
    own = {f"{W}.{key}": value for key, value in fmt.metadata().items()}
    assert resolved(fmt, fmt.metadata()) == Params(fmt, BLOB)
    assert resolved(fmt, own) == Params(fmt, BLOB)
    other = MXFP8 if fmt != MXFP8 else NVFP4
    assert resolved(fmt, other.metadata() | {f"{W}.bits": str(fmt.bits)} | own) == Params(fmt, BLOB)


@every_format
def test_an_entry_of_mlx_lm_decides(fmt: Format) -> None:
    """A module's entry with all three keys is found back, whatever the model's values are."""
    parameters = {"mode": fmt.mode, "bits": fmt.bits, "group_size": fmt.group_size}
    for path in (PATH, W, f"language_model.{PATH}"):
        config = config_of({"mode": "mxfp8", "bits": 8, "group_size": 32, path: parameters})
        assert resolved(fmt, config=config) == Params(fmt, OVERRIDE)
    found = config_of(parameters)
    assert resolved(fmt, config=found) == Params(fmt, DEFAULT)
    assert resolved(fmt, config=config_of(parameters | {PATH: True})) == Params(fmt, OVERRIDE)


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f.has_bias], ids=lambda f: f.label)
def test_an_entry_of_mlx_native_decides(fmt: Format) -> None:
    """An entry of quantization_config.json is found back and counts more than config.json."""
    entry_of = {"bits": fmt.bits, "group_size": fmt.group_size}
    document = {"bits": 4, "group_size": 64, "per_tensor": {W: entry_of}}
    model = {"quantization": {"bits": 8, "group_size": 64, PATH: {"bits": 8}}}
    assert resolved(fmt, config=read_quant_config(model, document)) == Params(fmt, OVERRIDE)
    assert resolved(fmt, config=read_quant_config({}, entry_of)) == Params(fmt, DEFAULT)


@every_format
def test_shapes_decide_where_they_leave_one_format(fmt: Format) -> None:
    """With nothing written, one fitting format is taken and several are refused by name."""
    columns = 1280 * 3
    dtype = "BF16" if fmt.has_bias else "U8"
    words, groups = fmt.packed_columns(columns), columns // fmt.group_size
    left = fitting(words, groups, dtype, fmt.has_bias)
    assert fmt in left
    if left == [fmt]:
        assert resolved(fmt) == Params(fmt, SHAPES)
        return
    with pytest.raises(Corrupt) as caught:
        resolved(fmt)
    assert caught.value.kind == "ambiguous_parameters"
    assert repr(W) in caught.value.message
    assert all(f"{f.name} g{f.group_size}" in caught.value.message for f in left)


def test_shapes_fit_exactly_the_formats_that_could_have_made_them() -> None:
    """Fitting formats are those with as many codes in the words as in the groups."""
    for words in range(1, 65):
        for groups in range(1, 17):
            expected = [
                f for f in FORMATS if f.has_bias and words * 32 == groups * f.group_size * f.bits
            ]
            assert fitting(words, groups, "F16", True) == expected
    assert fitting(64, 8, "U8", True) == fitting(64, 8, "F32", False) == []
    assert fitting(64, 8, "I16", True) == fitting(64, 0, "U8", False) == []


@every_format
def test_a_record_without_a_group_takes_it_from_the_shapes(fmt: Format) -> None:
    """The width leaves one group size, so older blobs and the model index need none."""
    metadata = {k: v for k, v in fmt.metadata().items() if k != "group_size"}
    assert resolved(fmt, metadata) == Params(fmt, BLOB)
    config = QuantConfig((), Written(fmt.mode, fmt.bits))
    assert resolved(fmt, config=config) == Params(fmt, MODEL_INDEX)
    assert resolved(fmt, default=Written(fmt.mode, fmt.bits)) == Params(fmt, BLOB)


@given(st.sampled_from(FORMATS), st.sampled_from(FORMATS), st.booleans())
def test_contradictions_are_refused(fmt: Format, other: Format, in_config: bool) -> None:
    """A statement that the shapes rule out is refused with tensor, source and what would fit."""
    entry_of = {"mode": other.mode, "bits": other.bits, "group_size": other.group_size}
    metadata = {} if in_config else other.metadata()
    config = config_of({"bits": 4, "group_size": 64, PATH: entry_of}) if in_config else None
    words, groups = fmt.packed_columns(3840), 3840 // fmt.group_size
    if other in fitting(words, groups, "BF16" if fmt.has_bias else "U8", fmt.has_bias):
        assert resolved(fmt, metadata, config).format == other
        return
    with pytest.raises(Corrupt) as caught:
        resolved(fmt, metadata, config)
    assert caught.value.kind == "bad_relation"
    for text in (repr(W), OVERRIDE if in_config else BLOB, f"{fmt.name} g{fmt.group_size}"):
        assert text in caught.value.message


# -- who is believed -------------------------------------------------------------------------------

# 8 words for 1 group: int4 g64, int8 g32 and 2 bits with 128 in a group all fit
SAME = ((8, 16), (8, 2), "BF16")
INT8_32 = Format("affine", 8, 32)


def test_a_modules_entry_comes_before_blob_metadata() -> None:
    """Ollama fills an imported blob's metadata from the model's values, so the entry is right."""
    config = config_of({"bits": 4, "group_size": 64, PATH: {"bits": 8, "group_size": 32}})
    assert decided(*SAME, INT4.metadata(), config) == Params(INT8_32, OVERRIDE)
    assert resolved(INT8, INT4.metadata(), config_of({"bits": 4, PATH: {"bits": 8}})) == Params(
        INT8, OVERRIDE
    )


def test_an_entry_that_does_not_fit_gives_way_to_metadata_that_does() -> None:
    """Consistency with the shapes comes before rank."""
    config = config_of({"bits": 4, "group_size": 64, PATH: {"bits": 3, "group_size": 32}})
    assert decided(*SAME, INT4.metadata(), config) == Params(INT4, BLOB)


def test_metadata_of_the_tensor_comes_before_that_of_the_blob() -> None:
    """Global keys with deviating tensors' own keys beside them are read."""
    own = {f"{W}.quant_type": "int8", f"{W}.group_size": "32"}
    assert decided(*SAME, INT4.metadata() | own) == Params(INT8_32, BLOB)


def test_defaults_are_asked_in_order() -> None:
    """The config's default, the model index's, and what other blobs record."""
    config = QuantConfig((Section(Written("affine", 4, 64)),), Written("affine", 8))
    assert decided(*SAME, None, config) == Params(INT4, DEFAULT)
    assert decided(*SAME, None, QuantConfig((), Written("affine", 8))) == Params(
        INT8_32, MODEL_INDEX
    )
    assert decided(*SAME, None, None, Written("affine", 8, 32)) == Params(INT8_32, BLOB)


def test_a_default_that_does_not_fit_is_passed_over() -> None:
    """Model-wide values say nothing about a tensor whose shapes leave one other format."""
    config = config_of({"mode": "nvfp4", "bits": 4, "group_size": 16})
    assert decided((8, 32), (8, 1), "F16", None, config) == Params(Format("affine", 8, 128), SHAPES)


def test_an_entry_without_a_mode_is_affine_in_a_model_of_another() -> None:
    """A router kept at 8 bits inside an nvfp4 model is affine, as mlx-lm reads it."""
    section = {"group_size": 16, "bits": 4, "mode": "nvfp4", PATH: {"group_size": 64, "bits": 8}}
    assert resolved(INT8, None, config_of(section)) == Params(INT8, OVERRIDE)
    assert resolved(NVFP4, None, config_of(section | {PATH: True})) == Params(NVFP4, OVERRIDE)


def test_what_an_entry_leaves_out_depends_on_the_reader_and_the_shapes_decide() -> None:
    """Without a group size, mlx-lm takes the mode's and mlx-native the section's."""
    config = config_of({"bits": 4, "group_size": 32, PATH: {"bits": 8}})
    assert resolved(INT8, None, config) == Params(INT8, OVERRIDE)
    assert resolved(INT8_32, None, config) == Params(INT8_32, OVERRIDE)
    assert config.sections[0].lookup(W) == Written("affine", 8, 32)
    assert config.sections[0].module(PATH, True) == Written("affine", 8, 64)


def test_false_means_not_quantized_which_scales_contradict() -> None:
    """A module said to be plain must not have scales, unless its blob's metadata says otherwise."""
    config = config_of({"bits": 4, "group_size": 64, PATH: False})
    with pytest.raises(Corrupt, match="config override says not quantized"):
        resolved(INT4, None, config)
    assert resolved(INT4, INT4.metadata(), config) == Params(INT4, BLOB)
    assert config.sections[0].module(PATH, True) is None


@pytest.mark.parametrize(
    ("weight", "scale", "bias", "problem"),
    [
        (("BF16", (8, 16)), ("BF16", (8, 2)), ("BF16", (8, 2)), "has scales but is BF16"),
        (("U32", (16,)), ("BF16", (2,)), ("BF16", (2,)), r"has scales but is U32 \[16\]"),
        (("U32", (8, 16)), ("BF16", (7, 2)), ("BF16", (7, 2)), "do not fit each other"),
        (("U32", (8, 16)), ("BF16", (2,)), ("BF16", (2,)), "do not fit each other"),
        (("U32", (8, 16)), ("BF16", ()), ("BF16", ()), "do not fit each other"),
        (("U32", (8, 16)), ("BF16", (8, 2)), ("F16", (8, 2)), "biases and scales differ"),
        (("U32", (8, 16)), ("BF16", (8, 2)), ("BF16", (8, 1)), "biases and scales differ"),
        (("U32", (8, 16)), ("BF16", (8, 2)), None, "without biases fit no format"),
        (("U32", (8, 16)), ("U8", (8, 8)), ("U8", (8, 8)), "with biases fit no format"),
        (("U32", (8, 16)), ("BF16", (8, 3)), ("BF16", (8, 3)), "fit no format"),
        (("U32", (8, 16)), ("I32", (8, 2)), ("I32", (8, 2)), "fit no format"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    weight: tuple[str, Shape],
    scale: tuple[str, Shape],
    bias: tuple[str, Shape] | None,
    problem: str,
) -> None:
    """Whatever is recorded, dtypes and shapes must describe one quantized tensor."""
    with pytest.raises(Corrupt, match=problem) as caught:
        resolve(W, entry(*weight), entry(*scale), bias and entry(*bias), INT4.metadata())
    assert caught.value.kind == "bad_relation"
    assert repr(W) in caught.value.message


def test_the_candidates_of_an_ambiguity_are_named_with_what_ollama_takes() -> None:
    """The message lists what fits; the hint says where to write it down."""
    with pytest.raises(Corrupt, match=r"int4 g128, int8 g64") as caught:
        decided((8, 32), (8, 2), "BF16")
    assert caught.value.hint is not None
    assert "Ollama takes it for int8 g64" in caught.value.hint


# -- configs that say nothing, or nonsense ---------------------------------------------------------


def test_a_model_without_any_section_has_no_config() -> None:
    """Plain models, empty sections and methods without parameters say nothing."""
    configs: list[dict[str, Any]] = [
        {},
        {"quantization": {}},
        {"quantization_config": {"quant_method": "fp8"}},
    ]
    for config in configs:
        assert read_quant_config(config, {}, {}) is None


def test_a_nested_section_counts() -> None:
    """A section inside text_config is the model's when the top level has none."""
    section = {"bits": 4, "group_size": 64}
    found = read_quant_config({"text_config": {"quantization_config": section}})
    assert found == QuantConfig((Section(Written(None, 4, 64)),))


@pytest.mark.parametrize("value", ["4bit", 4, [1]])
def test_a_section_of_the_wrong_type_is_refused(value: object) -> None:
    """A quantization section must be an object."""
    with pytest.raises(BadSource) as caught:
        read_quant_config({"quantization": value})
    assert caught.value.kind == "section_not_object"


@pytest.mark.parametrize(
    "document",
    [{"per_tensor": []}, {"bits": "4"}, {"per_tensor": {"a": 4}}, {"group_size": True}],
)
def test_a_per_tensor_config_of_the_wrong_type_is_refused(document: dict[str, Any]) -> None:
    """quantization_config.json is read strictly, as its own reader does."""
    with pytest.raises(BadSource) as caught:
        read_quant_config({}, document)
    assert caught.value.kind == "bad_config"


def test_an_unknown_mode_is_a_contradiction() -> None:
    """An entry in a mode that does not exist fits no tensor."""
    config = config_of({"bits": 4, "group_size": 64, PATH: {"mode": "fancy"}})
    with pytest.raises(Corrupt, match="config override says fancy"):
        resolved(INT4, None, config)


def test_group_sizes_that_are_no_numbers_are_ignored() -> None:
    """Metadata is text; what cannot be a group size says nothing."""
    for text in ("x", "", "-64", "0", "9" * 5000, "٣٢"):
        assert recorded("w", {"quant_type": "int4", "group_size": text})[0].bits == 4
    assert recorded("w", {"w.group_size": "x", "quant_type": "int4", "group_size": "64"}) == [
        Written("affine", 4, 64)
    ]


# -- fixtures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fixture", "expected"),
    [
        ("mlx-affine-4bit-gs64", {INT4}),
        ("mlx-affine-8bit-gs64", {INT8}),
        ("mlx-dot-child-affine4", {INT4}),
        ("mlx-f16-affine-4bit-gs32", {Format("affine", 4, 32)}),
        ("mlx-mixed-naming-orphans", {NVFP4, INT8}),
        ("mlx-mixed_4_6", {INT4, Format("affine", 6, 64)}),
        ("mlx-mxfp4", {MXFP4}),
        ("mlx-mxfp8", {MXFP8}),
        ("mlx-nvfp4", {NVFP4}),
        ("mlx-qwen3-moe-4bit", {INT4, INT8}),
        ("mlx-qwen3_5-moe-nvfp4", {NVFP4, INT8}),
        ("hf2q-mixed", {INT4, INT8, Format("affine", 6, 64), Format("affine", 3, 64)}),
    ],
)
def test_every_tensor_of_a_real_checkpoint_is_decided(fixture: str, expected: set[Format]) -> None:
    """Checkpoints of mlx-lm and for mlx-native give each tensor the parameters it was made with."""
    folder = DATA / "fixtures" / fixture / "checkpoint"
    data = (folder / "model.safetensors").read_bytes()
    length = header_length(data[:8], len(data), "model")
    file = parse_header(data[8 : 8 + length], len(data), "model")
    native = folder / "quantization_config.json"
    config = read_quant_config(
        json.loads((folder / "config.json").read_text(encoding="utf-8")),
        json.loads(native.read_text(encoding="utf-8")) if native.exists() else None,
    )
    found = {}
    for weight in gather(file.entries)[0].values():
        if weight.scale:
            parts = [file.entries[n] for n in (weight.codes, weight.scale, weight.bias) if n]
            codes, scale, bias = (*parts, None)[:3]
            assert codes is not None
            assert scale is not None
            found[weight.name] = resolve(weight.name, codes, scale, bias, file.metadata, config)
    assert {p.format for p in found.values()} == expected
    assert {p.source for p in found.values()} <= {OVERRIDE, DEFAULT}
    routers = {p.format for n, p in found.items() if n.endswith("mlp.gate.weight")}
    assert routers <= {INT8}
