"""Manifests: the peers' vectors, and what must hold for every manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantmill import mediatypes
from quantmill.digests import Digest, blob_file_name, digest_of, parse_digest
from quantmill.errors import Corrupt
from quantmill.manifest import BlobRef, Manifest, manifest_bytes, parse_manifest
from quantmill.names import parse_name
from vectors import cases, suite

CONFIG = BlobRef(mediatypes.CONFIG, Digest("c" * 64), 10)


def manifest_of(document: Any) -> Manifest:
    return parse_manifest(json.dumps(document).encode(), "m")


def ref(document: dict[str, Any]) -> BlobRef:
    digest = parse_digest(document["digest"])
    return BlobRef(document["mediaType"], digest, document["size"], document.get("name"))


# -- vectors: what a manifest says -----------------------------------------------------------------

QUERIES: dict[str, Callable[[Manifest, str], object]] = {
    "tensor_layers": lambda m, arg: [str(ref.digest) for ref in m.tensor_refs(arg)],
    "config_layer": lambda m, arg: str(found.digest) if (found := m.json_ref(arg)) else None,
    "has_tensors": lambda m, _: bool(m.tensor_refs()),
    "total_tensor_size": lambda m, _: m.tensor_size,
    "blob_file": lambda _, arg: blob_file_name(arg),
}


def manifest_queries() -> list[Any]:
    """Each query that the manifest alone answers, with its result in the vectors."""
    return [
        pytest.param(case["input"]["manifest"], query, result, id=f"{case['id']}-{at}")
        for case in suite("manifest_query")
        if case["op"] == "query" and "results" in case["expect"]
        for at, (query, result) in enumerate(
            zip(case["input"]["queries"], case["expect"]["results"], strict=True)
        )
        if query["op"] in QUERIES
    ]


@pytest.mark.parametrize(("document", "query", "expected"), manifest_queries())
def test_queries_equal_the_vectors(document: Any, query: dict[str, str], expected: Any) -> None:
    """A manifest answers each question as the reference does."""
    answer = QUERIES[query["op"]]
    assert answer(manifest_of(document), query.get("arg", "")) == expected


@pytest.mark.parametrize(
    "document",
    [
        case["input"]["manifest"]
        for case in suite("manifest_query")
        if case["op"] == "query" and "error" in case["expect"]
    ],
)
def test_documents_that_are_no_manifest_are_refused(document: Any) -> None:
    """JSON that is not a manifest is corrupt, with the kind that the vectors give."""
    with pytest.raises(Corrupt) as caught:
        manifest_of(document)
    assert caught.value.kind == "bad_manifest"


# -- vectors: the store's numbers ------------------------------------------------------------------


@cases("model_name", "put")
def test_blobs_are_known_by_their_digest(case: dict[str, Any]) -> None:
    """Bytes have the digest and the file name of the vector."""
    digest = digest_of(bytes.fromhex(case["input"]["data_hex"]))
    assert str(digest) == case["expect"]["digest"]
    assert f"blobs/{digest.file_name}" == case["expect"]["path"]


@cases("model_name", "write")
def test_written_manifests_equal_the_vectors(case: dict[str, Any]) -> None:
    """Path, text, digest and size of a written manifest are those of the reference."""
    given_input, expect = case["input"], case["expect"]
    raw = manifest_bytes(ref(given_input["config"]), [ref(d) for d in given_input["layers"]])
    manifest = parse_manifest(raw, given_input["name"])
    assert raw.decode() == expect["text"]
    assert manifest.digest.hex == expect["digest"]
    assert manifest.total_size == expect["total_size"]
    assert f"manifests/{parse_name(given_input['name']).path}" == expect["path"]


@cases("model_name", "size")
def test_sizes_count_config_and_layers(case: dict[str, Any]) -> None:
    """The size of a model is that of its config and its layers together."""
    manifest = manifest_of(case["input"]["manifest"])
    assert manifest.total_size == case["expect"]["total_size"]


# -- fields ----------------------------------------------------------------------------------------

GOOD = {"mediaType": mediatypes.TENSOR, "digest": str(Digest("a" * 64)), "size": 1, "name": "w"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"digest": "sha256:12"}, "digest"),
        ({"digest": None}, "digest"),
        ({"size": -1}, "size"),
        ({"size": 1.5}, "size"),
        ({"size": True}, "size"),
        ({"size": 2**63}, "size"),
        ({"mediaType": 1}, "mediaType"),
        ({"name": 1}, "name"),
        ({"name": "\ud800"}, "name"),
    ],
)
def test_bad_fields_are_named(change: dict[str, Any], field: str) -> None:
    """A wrong field of an entry is refused, naming the manifest, the entry and the field."""
    with pytest.raises(Corrupt) as caught:
        manifest_of({"layers": [GOOD, GOOD | change]})
    assert "manifest of m: layers[1]" in caught.value.message
    assert field in caught.value.message


def test_components_select_by_prefix() -> None:
    """The tensors of a component are those whose name starts with it and a slash."""
    names = ["vae/a", "vaes/a", "a", None]
    refs = [BlobRef(mediatypes.TENSOR, Digest("a" * 64), 1, name) for name in names]
    manifest = parse_manifest(manifest_bytes(CONFIG, refs), "m")
    assert manifest.tensor_refs("vae") == refs[:1]


def test_names_are_escaped_as_go_does() -> None:
    """Characters that Go's encoder escapes are escaped, others are UTF-8."""
    raw = manifest_bytes(CONFIG, [BlobRef(mediatypes.JSON, CONFIG.digest, 1, "<&>\u2028é")])
    assert b'"name":"\\u003c\\u0026\\u003e\\u2028\xc3\xa9"' in raw


# -- properties ------------------------------------------------------------------------------------

REFS = st.builds(
    BlobRef,
    st.text(),
    st.binary().map(digest_of),
    st.integers(0, 2**63 - 1),
    st.none() | st.text(min_size=1),
)


@given(REFS, st.lists(REFS))
def test_what_is_written_is_read_back(config: BlobRef, refs: list[BlobRef]) -> None:
    """Reading a written manifest gives its entries, in order."""
    manifest = parse_manifest(manifest_bytes(config, refs), "m")
    assert (manifest.config, list(manifest.blobs)) == (config, refs)


@given(st.binary())
def test_reading_any_bytes_raises_only_corrupt(raw: bytes) -> None:
    """Whatever the bytes, the answer is a manifest or Corrupt."""
    with suppress(Corrupt):
        parse_manifest(raw, "m")


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists)
FIELDS = st.fixed_dictionaries(
    {}, optional={key: st.just(value) | JSON for key, value in GOOD.items()}
)


@given(st.fixed_dictionaries({"config": FIELDS | JSON, "layers": st.lists(FIELDS) | JSON}))
def test_reading_near_manifests_raises_only_corrupt(document: Any) -> None:
    """A manifest with any field missing or of any type is read or refused with Corrupt."""
    with suppress(Corrupt):
        manifest_of(document)
