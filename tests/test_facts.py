"""`list` and `show`: the peers' vectors, and facts that must add up."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from checkpoints import SMALL
from fakes import put, put_model, write_file
from quantmill import mediatypes
from quantmill.creation import create
from quantmill.digests import parse_digest
from quantmill.errors import Corrupt, NotFound, QuantmillError
from quantmill.facts import component_info, list_models, model_info, read_json, show
from quantmill.formats import AFFINE_GROUPS, FORMAT_NAMES, parse_format
from quantmill.manifest import BlobRef, Manifest, manifest_bytes, parse_manifest
from quantmill.names import parse_name
from quantmill.planner import parse_override
from quantmill.plans import Options
from quantmill.store import Store
from quantmill.stored import describe_blob
from quantmill.tensorfile import lay_out, parse_header
from vectors import cases, suite

NAME = parse_name("m")
QUERY = "model.layers.0.self_attn.q_proj.weight"


# -- vectors ---------------------------------------------------------------------------------------


def content(blob: dict[str, Any]) -> bytes:
    """The bytes that a vector's blob stands for."""
    if "json" in blob:
        return json.dumps(blob["json"]).encode()
    if "text" in blob:
        return str(blob["text"]).encode()
    header = dict(blob["safetensors_header"])
    metadata = header.pop("__metadata__", {})
    tensors = [(n, t["dtype"], tuple(t["shape"])) for n, t in header.items()]
    laid_out, entries = lay_out(tensors, metadata)
    return laid_out + bytes(sum(entry.nbytes for entry in entries.values()))


def vector_manifest(store: Store, given_input: dict[str, Any]) -> Manifest:
    """The vector's manifest, and its blobs under the digests it gives them."""
    for digest, blob in given_input["blobs"].items():
        write_file(store.blob_path(parse_digest(digest)), content(blob))
    return parse_manifest(json.dumps(given_input["manifest"]).encode(), "m")


def answer(action: Callable[[], object]) -> object:
    try:
        return action()
    except QuantmillError as error:
        return {"error": {"kind": error.kind}}


def queries(op: str, *, odd: bool = False) -> pytest.MarkDecorator:
    """Each query of an op, with its result in the vectors."""
    chosen = [
        pytest.param(case["input"], query.get("arg"), result, id=f"{case['id']}-{at}")
        for case in suite("manifest_query")
        if case["op"] == "query" and "results" in case["expect"] and ("odd" in case) == odd
        for at, (query, result) in enumerate(
            zip(case["input"]["queries"], case["expect"]["results"], strict=True)
        )
        if query["op"] == op
    ]
    assert chosen
    return pytest.mark.parametrize(("given_input", "arg", "expected"), chosen)


@queries("config_json")
def test_json_files_equal_the_vectors(
    given_input: dict[str, Any], arg: str, expected: object, store: Store
) -> None:
    """A JSON file of a model is its value, or the kind of error of the vector."""
    manifest = vector_manifest(store, given_input)
    assert answer(lambda: read_json(store, manifest, arg)) == expected


@queries("model_info")
def test_component_facts_equal_the_vectors(
    given_input: dict[str, Any], arg: None, expected: object, store: Store
) -> None:
    """Architecture, count and type of a model of components are those of the vector."""
    assert component_info(store, vector_manifest(store, given_input)) == expected


@queries("model_info", odd=True)
def test_every_tensor_blob_is_asked_for_its_type(
    given_input: dict[str, Any], arg: None, expected: dict[str, object], store: Store
) -> None:
    """A type that only a later blob records is found, where the reference looks at the first."""
    found = component_info(store, vector_manifest(store, given_input))
    assert found == expected | {"quantization": "INT4"}


def test_a_type_of_one_tensor_is_found(store: Store) -> None:
    """A blob of mixed types records them tensor by tensor; the first one counts."""
    header, _ = lay_out([("w", "BF16", ())], {"w.quant_type": "mxfp8"})
    config, entry = put(store, b"{}", header + bytes(2))
    ref = BlobRef(mediatypes.TENSOR, entry.digest, entry.size, "w")
    manifest = parse_manifest(manifest_bytes(config, [ref]), "m")
    assert component_info(store, manifest)["quantization"] == "MXFP8"


@cases("manifest_query", "names")
def test_main_tensors_equal_the_vectors(case: dict[str, Any]) -> None:
    """A blob's weights, companions aside, have the names of the vector."""
    data = content({"safetensors_header": case["input"]["header"]})
    found = describe_blob(parse_header(data[8:], len(data), "blob"), "blob")
    assert [tensor.name for tensor in found] == case["expect"]["names"]


@cases("manifest_query", "model_info")
def test_info_maps_equal_the_vectors(case: dict[str, Any]) -> None:
    """Architecture, estimated count and shape of a language model are those of the vector."""
    given_input = case["input"]
    found = model_info(
        given_input["config"], given_input["total_tensor_bytes"], given_input["tensor_count"]
    )
    assert found == case["expect"]["info"]


# -- info ------------------------------------------------------------------------------------------


def test_counted_weights_win_over_an_estimate() -> None:
    """Where the weights are known, bytes are not asked."""
    assert model_info({}, 1000, 1, 7)["general.parameter_count"] == 7


@pytest.mark.parametrize("value", [True, 0, -1, 2.5, "12", None, [12]])
def test_fields_that_are_no_counts_are_left_out(value: object) -> None:
    """A config may hold anything; only positive integers are shown."""
    assert model_info({"model_type": "x", "hidden_size": value}, 0, 0) == {
        "general.architecture": "x"
    }


@pytest.mark.parametrize("config", [{"architectures": "Llama"}, {"architectures": []}, {}])
def test_an_unknown_architecture_is_empty(config: dict[str, Any]) -> None:
    """Without a usable architecture there is no name, and no error."""
    assert model_info(config, 0, 0) == {"general.architecture": ""}


# -- list ------------------------------------------------------------------------------------------


def test_models_are_listed_by_name(store: Store, source: Path) -> None:
    """Name, digest, size and format of every model, in name order."""
    created = {
        name: create(name, source, store=store, quantize=fmt)
        for name, fmt in [("b", "int4"), ("a", "nvfp4"), ("c", None)]
    }
    found = list_models(store)
    assert [(m.name.model, m.format, m.problem) for m in found] == [
        ("a", "nvfp4", None),
        ("b", "int4", None),
        ("c", "", None),
    ]
    for m in found:
        made = created[m.name.model]
        assert (m.digest, m.size) == (made.digest.hex, made.size)


def test_the_time_is_that_of_the_manifest(store: Store, source: Path) -> None:
    """A model was modified when its manifest was written."""
    create("m", source, store=store)
    os.utime(store.manifest_path(NAME), (86400, 86400))
    (listed,) = list_models(store)
    assert listed.modified == show(store, NAME).modified == datetime(1970, 1, 2, tzinfo=UTC)


def test_an_unreadable_manifest_is_listed_with_its_problem(store: Store, source: Path) -> None:
    """A broken model is listed beside the others, saying what is wrong."""
    create("m", source, store=store)
    write_file(store.manifest_path(parse_name("broken")), b"{oops")
    broken, good = list_models(store)
    assert (broken.name.display, broken.digest, broken.size) == ("broken:latest", "", 0)
    assert "manifest of broken:latest" in (broken.problem or "")
    assert good.problem is None


@pytest.mark.parametrize("config", [b"[]", b"{oops", b'{"file_type": null}'])
def test_a_broken_config_does_not_stop_a_listing(store: Store, config: bytes) -> None:
    """What the config does not say is empty: its damage is for verify to report."""
    put_model(store, "m", config)
    (listed,) = list_models(store)
    assert (listed.format, listed.problem) == ("", None)


def test_a_missing_config_does_not_stop_a_listing(store: Store) -> None:
    """A model whose config blob is gone is listed without a format."""
    put_model(store, "m", b"{}")
    config = store.get_manifest(NAME).config
    assert config
    store.remove_blob(config.digest)
    assert [m.format for m in list_models(store)] == [""]


def test_an_absent_store_lists_nothing(store: Store) -> None:
    """A store that does not exist is empty, and is not created by looking."""
    assert list_models(store) == []
    assert not store.root.exists()


# -- show ------------------------------------------------------------------------------------------

FORMATS = [
    (name, group)
    for name in FORMAT_NAMES
    for group in (AFFINE_GROUPS if parse_format(name).has_bias else (None,))
]


@pytest.mark.parametrize(("name", "group"), FORMATS)
def test_show_knows_every_format(store: Store, source: Path, name: str, group: int | None) -> None:
    """The format that was asked for is the one that the stored tensors show."""
    create("m", source, store=store, quantize=name, group_size=group)
    facts = show(store, NAME)
    asked = parse_format(name, group)
    (tensor,) = [t for t in facts.tensors if t.name == QUERY]
    assert (facts.format, tensor.format, tensor.shape) == (asked.name, asked, (128, 128))
    assert asked.label in [share.label for share in facts.shares]


@pytest.mark.parametrize("quantize", [None, "int4", "nvfp4", "mxfp8"])
def test_shares_add_up(store: Store, source: Path, quantize: str | None) -> None:
    """Shares together hold all tensors, weights and bytes, which are those of the source."""
    created = create("m", source, store=store, quantize=quantize)
    facts = show(store, NAME)
    assert sum(s.tensors for s in facts.shares) == len(facts.tensors) == len(SMALL)
    assert sum(s.weights for s in facts.shares) == facts.weights
    assert facts.weights == sum(t.elements for t in created.plan.tensors)
    assert sum(s.nbytes for s in facts.shares) == sum(t.nbytes for t in created.plan.tensors)


def test_shares_come_largest_first(store: Store, source: Path) -> None:
    """The format that holds most bytes leads."""
    override = parse_override(f"{QUERY}=mxfp8")
    create("m", source, store=store, quantize="int4", options=Options(overrides=(override,)))
    found = [share.nbytes for share in show(store, NAME).shares]
    assert len(found) > 2
    assert found == sorted(found, reverse=True)


def test_bits_per_weight_are_those_of_the_plan(store: Store, source: Path) -> None:
    """Stored bits for each weight, scales and biases included."""
    created = create("m", source, store=store, quantize="int4")
    assert show(store, NAME).bits_per_weight == created.plan.bits_per_weight


def test_files_are_shown_with_their_sizes(store: Store, source: Path) -> None:
    """Everything that is not a tensor is listed by its name, or its kind where it has none."""
    create("m", source, store=store)
    manifest = store.get_manifest(NAME)
    assert manifest.config
    text = b"MIT"
    refs = [*manifest.blobs, *put(store, text)]
    store.put_manifest(NAME, manifest_bytes(manifest.config, refs))
    size = (source / "config.json").stat().st_size
    assert show(store, NAME).files == (("config.json", size), ("license", len(text)))


def test_show_takes_the_stored_spelling(store: Store, source: Path) -> None:
    """The name is shown as it is stored, however it was asked for."""
    create("Model:Tag", source, store=store)
    assert show(store, parse_name("mODEL:tAG")).name.display == "Model:Tag"


def test_the_count_is_that_of_the_weights(store: Store, source: Path) -> None:
    """The info map counts weights, not packed words, and has the config's shape."""
    config = {"model_type": "llama", "num_hidden_layers": 1}
    (source / "config.json").write_text(json.dumps(config))
    create("m", source, store=store, quantize="int4")
    facts = show(store, NAME)
    assert facts.info == {
        "general.architecture": "llama",
        "general.parameter_count": facts.weights,
        "llama.block_count": 1,
    }


def test_a_model_without_tensors_has_no_bits_per_weight(store: Store) -> None:
    """A model with weights of another kind is shown, with zero weights of ours."""
    put_model(store, "m", b"{}", b"GGUF")
    facts = show(store, NAME)
    assert (facts.weights, facts.bits_per_weight, facts.tensors) == (0, 0.0, ())


@pytest.mark.parametrize(
    "config",
    [
        {"capabilities": 5, "quantmill": [1]},
        {"capabilities": "completion", "quantmill": "x"},
        {"capabilities": None, "quantmill": None},
    ],
)
def test_a_config_of_others_may_hold_anything(store: Store, config: dict[str, Any]) -> None:
    """Fields of an unexpected type are shown as empty."""
    put_model(store, "m", json.dumps(config).encode())
    facts = show(store, NAME)
    assert (facts.capabilities, dict(facts.recorded)) == ((), {})


def test_show_of_a_missing_model_is_not_found(store: Store) -> None:
    """NotFound names the model."""
    with pytest.raises(NotFound, match="m:latest"):
        show(store, NAME)


def test_show_of_a_model_with_a_missing_blob_is_not_found(store: Store, source: Path) -> None:
    """A model whose tensors cannot be read is an error, not half an answer."""
    create("m", source, store=store)
    gone = store.get_manifest(NAME).tensor_refs()[0]
    store.remove_blob(gone.digest)
    with pytest.raises(NotFound, match=gone.digest.hex):
        show(store, NAME)


def test_show_of_a_header_that_lies_is_corrupt(store: Store) -> None:
    """A tensor blob that is no tensor file is named."""
    config, entry = put(store, b"{}", b"not a tensor file")
    ref = BlobRef(mediatypes.TENSOR, entry.digest, entry.size, "w.weight")
    store.put_manifest(NAME, manifest_bytes(config, [ref]))
    with pytest.raises(Corrupt, match=r"w\.weight"):
        show(store, NAME)
