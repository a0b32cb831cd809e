"""JSON from outside: what is refused, and that equal values have equal bytes."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantmill.strictjson import BadJson, canonical, is_text, parse, parse_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a":1,"b":2,"a":1}', "'a' appears twice"),
        (b'[{"x":{"k":1,"\\u006b":2}}]', "'k' appears twice"),
        (b"[NaN]", "NaN is not JSON"),
        (b"-Infinity", "-Infinity is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"9" * 5000, "a number is too long"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'{"\xff":1}', "invalid UTF-8 at byte 2"),
        (b'"\xed\xa0\x80"', "invalid UTF-8 at byte 1"),
        (b'{"a":1,}', "line 1 column"),
        (b"{} {}", "Extra data"),
        (b"", "line 1 column 1"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value,
)
def test_bad_json_is_refused_with_its_reason(text: bytes, reason: str) -> None:
    """What is wrong with the text, or where, is in the message."""
    with pytest.raises(BadJson) as caught:
        parse(text)
    assert reason in str(caught.value)


@pytest.mark.parametrize("text", [b"NaN", b"-Infinity"])
def test_python_constants_are_read_where_allowed(text: bytes) -> None:
    """NaN and infinities, as Python writes them, are values where the caller says so."""
    assert isinstance(parse(text, constants=True), float)


@pytest.mark.parametrize("text", [b"[]", b"null", b'"a"', b"1"])
def test_documents_that_must_be_objects_are_checked(text: bytes) -> None:
    """Valid JSON of another type is no object."""
    with pytest.raises(BadJson, match="not an object"):
        parse_object(text)


@given(
    st.binary()
    | st.text(alphabet='{}[]",:0eE.-+ \\u\ud800aNn').map(
        lambda t: t.encode("utf-8", "surrogatepass")
    )
)
def test_reading_any_bytes_raises_only_bad_json(data: bytes) -> None:
    """Whatever the bytes, the answer is a value or BadJson."""
    with suppress(BadJson):
        parse(data)


@given(VALUES)
def test_canonical_text_keeps_the_value(value: object) -> None:
    """Writing and reading gives an equal value."""
    assert parse(canonical(value), constants=True) == value


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_canonical_text_ignores_insertion_order(value: dict[str, int]) -> None:
    """Equal objects have equal bytes in whatever order they were filled."""
    assert canonical(dict(reversed(value.items()))) == canonical(value)


def test_canonical_text_is_compact_sorted_ascii() -> None:
    """No blanks, keys in order, everything beyond ASCII escaped."""
    assert canonical({"b": [1, 2], "a": "é"}) == b'{"a":"\\u00e9","b":[1,2]}'


@pytest.mark.parametrize(
    ("text", "expected"),
    [(b'"\\ud83d\\ude00"', True), (b'"\\ud83d"', False), (b'"\\ude00"', False)],
)
def test_halves_of_surrogate_pairs_are_no_text(text: bytes, expected: bool) -> None:
    """JSON can escape half a character, which no UTF-8 file can hold."""
    assert is_text(parse(text)) == expected
