"""Model names and digests: the peers' vectors, and what must hold for any text."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from departures import DEPARTURES
from quantmill.digests import parse_digest
from quantmill.errors import BadName
from quantmill.names import ModelName, is_valid_part, name_from_path, parse_name
from vectors import cases


def written(name: ModelName) -> dict[str, str | None]:
    parts = ("host", "namespace", "model", "tag", "scheme")
    return {part: getattr(name, part) for part in parts}


@cases("model_name", "parse")
def test_names_are_read_as_in_the_vectors(case: dict[str, Any]) -> None:
    """A name has the parts, the defaults and the three spellings of the vector, or is refused."""
    expect, text = case["expect"], case["input"]["name"]
    if not expect["valid"]:
        with pytest.raises(BadName):
            parse_name(text)
        return
    name = parse_name(text)
    assert written(name) == expect["bare"]
    assert written(name.resolved) == expect["full"]
    assert str(name.resolved) == expect["string"]
    assert name.path == expect["filepath"]
    assert name.display == expect["display"]
    assert bool(name.host and name.namespace and name.tag) == expect["bare_valid"]


@cases("model_name", "bare_display")
def test_display_hides_default_host_and_namespace(case: dict[str, Any]) -> None:
    """The display form leaves out a default host, and then a default namespace, in any case."""
    assert parse_name(case["input"]["name"]).display == case["expect"]["display"]


@cases("model_name", "part")
def test_parts_are_checked_by_kind(case: dict[str, Any]) -> None:
    """Each kind of part has its own characters and length."""
    given_input = case["input"]
    assert is_valid_part(given_input["kind"], given_input["value"]) == case["expect"]["valid"]


@cases("model_name", "namespace")
def test_namespaces_are_single_parts(case: dict[str, Any]) -> None:
    """A namespace holds neither slash nor colon."""
    assert is_valid_part("namespace", case["input"]["value"]) == case["expect"]["valid"]


@cases("model_name", "from_path")
def test_paths_give_names(case: dict[str, Any]) -> None:
    """A path of four valid parts is a name, anything else is refused."""
    path, expected = case["input"]["path"], case["expect"]["name"]
    if expected is None:
        with pytest.raises(BadName):
            name_from_path(path)
    else:
        assert written(name_from_path(path)) == expected | {"scheme": None}


@pytest.mark.parametrize("path", ["n/m/t", "h/n/m/t/x", "/h/n/m/t", "h/n//t", ""])
def test_paths_of_another_depth_are_refused(path: str) -> None:
    """A path is a name's at a depth of four only."""
    with pytest.raises(BadName):
        name_from_path(path)


@cases("model_name", "equal")
def test_equal_names_have_equal_keys(case: dict[str, Any]) -> None:
    """Two spellings of one name have the same key."""
    a, b = (parse_name(case["input"][which]) for which in "ab")
    assert (a.key == b.key) == case["expect"]["equal"]


def test_keys_ignore_case() -> None:
    """Names that differ in case alone have the same key."""
    assert parse_name("Host/NS/Model:Tag").key == parse_name("host/ns/model:tag").key


@cases("model_name", "manifest_path")
def test_manifest_paths_follow_the_grammar(case: dict[str, Any]) -> None:
    """The manifest's path is the four parts, and a departure from the simpler rule is refused."""
    text = case["input"]["name"]
    if case["id"] in DEPARTURES:
        with pytest.raises(BadName):
            parse_name(text)
    else:
        assert parse_name(text).path == case["expect"]["path"]


@cases("model_name", "blob_path")
def test_bad_digests_are_refused(case: dict[str, Any]) -> None:
    """Text that is not exactly a SHA-256 digest never becomes a file name."""
    with pytest.raises(BadName) as caught:
        parse_digest(case["input"]["digest"])
    assert caught.value.kind == case["expect"]["error"]["kind"]


@pytest.mark.parametrize("separator", [":", "-"])
def test_digests_are_written_in_lower_case(separator: str) -> None:
    """Both separators and both cases are read; colon and lower case are written."""
    assert str(parse_digest(f"sha256{separator}{'0aB1' * 16}")) == f"sha256:{'0ab1' * 16}"


# -- properties ------------------------------------------------------------------------------------

PART = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}"
DOTTED = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
HOST = r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}"


@st.composite
def valid_names(draw: st.DrawFn) -> ModelName:
    def part(pattern: str) -> st.SearchStrategy[str]:
        return st.from_regex(pattern, fullmatch=True)

    namespace = draw(st.none() | part(PART))
    host = draw(st.none() | part(HOST)) if namespace else None
    return ModelName(draw(part(DOTTED)), draw(st.none() | part(DOTTED)), namespace, host)


NAME_LIKE = st.text(alphabet="ab.:/-_@\\\n\0 é")


@given(valid_names())
def test_names_survive_writing_and_reading(name: ModelName) -> None:
    """The text of a valid name means that name."""
    assert parse_name(str(name)) == name


@given(st.text() | NAME_LIKE)
def test_reading_any_text_raises_only_bad_name(text: str) -> None:
    """Whatever the text, the answer is a name or BadName."""
    with suppress(BadName):
        parse_name(text)


@given(NAME_LIKE | valid_names().map(str))
def test_no_name_leads_out_of_its_folder(text: str) -> None:
    """A name that is accepted has a path of exactly four parts, none of them empty or dots."""
    try:
        parts = parse_name(text).parts
    except BadName:
        return
    assert len(parts) == 4
    assert not [p for p in parts if p in {"", ".", ".."} or set(p) & {"/", "\\", "\0"}]
