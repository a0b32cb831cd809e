"""Modelfile text becomes values, or an error that names line and text."""

from __future__ import annotations

import codecs
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from quantmill.errors import BadModelfile
from quantmill.modelfile import (
    MINIMUM_VERSION,
    OBSOLETE_PARAMETERS,
    PARAMETERS,
    Modelfile,
    decode_modelfile,
    parameters_json,
    parse_modelfile,
    version_key,
)
from vectors import cases

COMMANDS = (
    "FROM", "DRAFT", "TEMPLATE", "SYSTEM", "LICENSE", "PARAMETER", "PARSER", "RENDERER",
    "REQUIRES", "ADAPTER", "MESSAGE",
)  # fmt: skip


def parse(*lines: str) -> Modelfile:
    return parse_modelfile("\n".join(("FROM ./m", *lines, "")))


def refusal(*lines: str) -> BadModelfile:
    with pytest.raises(BadModelfile) as caught:
        parse(*lines)
    return caught.value


@cases("modelfile", "modelfile")
def test_vectors(case: dict[str, Any]) -> None:
    """Every Modelfile of the vectors gives its fields, or its kind of error."""
    expect = case["expect"]
    if "error" in expect:
        with pytest.raises(BadModelfile) as caught:
            parse_modelfile(case["input"]["modelfile"])
        assert caught.value.kind == expect["error"]["kind"]
        return
    found = parse_modelfile(case["input"]["modelfile"])
    values = {f.name: getattr(found, f.name) or None for f in fields(found)}
    values["model_dir"] = values.pop("source")
    del values["ignored"]
    assert values == expect


@cases("modelfile", "minimum_version")
def test_minimum_version(case: dict[str, Any]) -> None:
    """Safetensors models need the Ollama release of the vectors."""
    assert case["expect"]["version"] == MINIMUM_VERSION


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("You are kind.", "You are kind."),
        ("  \t blanks around  ", "blanks around"),
        ("# no comment here", "# no comment here"),
        ('"in quotes"', "in quotes"),
        ('" blanks kept "', " blanks kept "),
        ('"one\ntwo"', "one\ntwo"),
        ('"one\r\ntwo"  ', "one\r\ntwo"),
        ('"a" b"', 'a" b'),
        ('"""one "two" three"""', 'one "two" three'),
        ('"""one\n# two\n\nthree"""', "one\n# two\n\nthree"),
        ('"""quote at the end""""', 'quote at the end"'),
        ('"""inner """ marks"""', 'inner """ marks'),
        ("say \"hi\" and 'ho'", "say \"hi\" and 'ho'"),
        ("zero\u200dwidth\u00a0blank", "zero\u200dwidth\u00a0blank"),
    ],
)
def test_values(written: str, value: str) -> None:
    """A value is the rest of the line, or what stands between quotes that close a line."""
    found = parse(f"SYSTEM {written}", "PARSER after")
    assert (found.system, found.parser) == (value, "after")


@pytest.mark.parametrize("written", ['""', '""""""'])
def test_empty_quotes_unset(written: str) -> None:
    """Empty quotes mean that a text is not set."""
    found = parse(f"SYSTEM {written}", f"PARSER {written}")
    assert (found.system, found.parser) == (None, None)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_comments_and_line_ends(end: str) -> None:
    """Comments, blank lines, indentation and any line end leave the commands as they are."""
    text = end.join(("# head", "", "\t# indented", "  FROM ./m", "\tSystem hi", "#PARSER x"))
    assert parse_modelfile(text) == Modelfile("./m", system="hi")


def test_line_number_counts_every_line() -> None:
    """The line of an error counts comments, blank lines and the lines of quoted texts."""
    text = '# c\r\n\r\nFROM ./m\r\nSYSTEM """a\r\nb"""\r\nBOGUS x\r\n'
    with pytest.raises(BadModelfile, match="line 6: unknown command 'BOGUS'"):
        parse_modelfile(text)


@pytest.mark.parametrize(("opening", "quote"), [('"""one', '"""'), ('"one', '"'), ('"', '"')])
def test_unclosed_text(opening: str, quote: str) -> None:
    """A text without closing quotes is refused with the line where it starts."""
    error = refusal("", f"TEMPLATE {opening}", "two", "three")
    assert "line 3" in error.message
    assert opening in error.message
    assert quote in (error.hint or "")


@pytest.mark.parametrize(
    "line",
    ["SYSTEM", "SYSTEM ", "PARAMETER", "PARAMETER stop", "PARAMETER stop ", "MESSAGE user", "from"],
)
def test_missing_value(line: str) -> None:
    """A command without a value is refused, with its line and its word."""
    error = refusal(line)
    assert error.kind == "bad_modelfile"
    assert error.message.endswith(f"line 2: no value after {line.strip()!r}")


@pytest.mark.parametrize("text", ["", "# nothing\n", 'FROM ""\n', "SYSTEM hi"])
def test_no_model(text: str) -> None:
    """A Modelfile must name a model."""
    with pytest.raises(BadModelfile, match="names no model") as caught:
        parse_modelfile(text)
    assert "FROM" in (caught.value.hint or "")


def test_unknown_command_hints_at_near_ones() -> None:
    """A mistyped command is answered with the command that was meant."""
    error = refusal("TEMPLTE x")
    assert "TEMPLATE" in (error.hint or "")
    assert "MESSAGE" not in (error.hint or "")
    assert all(name in (refusal("XYZZY x").hint or "") for name in COMMANDS)


def test_look_alike_letters_are_no_command() -> None:
    """Letters that only fold to ASCII do not make a command."""
    assert "unknown command" in refusal("\u017fystem x").message


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.7", 0.7),
        ("temperature", "1", 1.0),
        ("top_p", ".5", 0.5),
        ("min_p", "5e-2", 0.05),
        ("presence_penalty", "-1.5", -1.5),
        ("num_ctx", "4096", 4096),
        ("num_predict", "-1", -1),
        ("seed", str(2**63 - 1), 2**63 - 1),
        ("use_mmap", "true", True),
        ("use_mmap", "F", False),
        ("use_mmap", "0", False),
        ("stop", "<|im_end|>", ["<|im_end|>"]),
        ("stop", '" a b "', [" a b "]),
    ],
)
def test_parameter_types(name: str, text: str, value: Any) -> None:
    """A parameter's value has the type that runtimes expect of it."""
    found = (parse(f"PARAMETER {name} {text}").parameters or {})[name]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("temperature", "hot"),
        ("temperature", "nan"),
        ("temperature", "1e999"),
        ("temperature", "-1e39"),
        ("temperature", "1_0"),
        ("temperature", "\u0661"),
        ("num_ctx", "4096.0"),
        ("num_ctx", "4k"),
        ("seed", str(2**63)),
        ("seed", "9" * 5000),
        ("use_mmap", "yes"),
        ("use_mmap", '""'),
    ],
)
def test_bad_parameter_value(name: str, text: str) -> None:
    """A value of the wrong type is refused, naming line, parameter and what is wanted."""
    error = refusal("# comment", f"PARAMETER {name} {text}")
    assert error.kind == "bad_parameter"
    assert f"line 3: {name} is not {PARAMETERS[name][0]}" in error.message
    assert len(error.message) < 200


def test_stop_appends() -> None:
    """Repeated stop parameters add up; another parameter's last value counts."""
    found = parse("PARAMETER stop a", "PARAMETER seed 1", "PARAMETER stop b", "parameter  seed  2")
    assert found.parameters == {"stop": ["a", "b"], "seed": 2}
    assert found.ignored == ("line 5: PARAMETER seed replaces an earlier one",)


def test_unknown_parameter_hints_at_near_ones() -> None:
    """A mistyped parameter is answered with the names that were meant."""
    error = refusal("PARAMETER temprature 0.5")
    assert error.kind == "bad_parameter"
    assert "line 2" in error.message
    assert "'temprature'" in error.message
    assert "temperature" in (error.hint or "")
    assert "num_ctx" not in (error.hint or "")
    assert all(name in (refusal("PARAMETER zzz 1").hint or "") for name in PARAMETERS)


@pytest.mark.parametrize("name", sorted(OBSOLETE_PARAMETERS))
def test_obsolete_parameters(name: str) -> None:
    """An obsolete parameter has no effect, whatever its value, and the caller learns of it."""
    found = parse(f"PARAMETER {name} anything")
    assert found == Modelfile("./m", ignored=(f"line 2: PARAMETER {name} is obsolete",))


def test_ignored_commands() -> None:
    """Commands that safetensors models have no use for, and replaced ones, are given back."""
    found = parse("ADAPTER ./a", 'MESSAGE user "hi', 'there"', "PARSER x", "PARSER y")
    assert found.parser == "y"
    assert found.ignored == (
        "line 2: ADAPTER has no effect on a safetensors model",
        "line 3: MESSAGE user has no effect on a safetensors model",
        "line 6: PARSER replaces an earlier one",
    )


def test_unknown_role() -> None:
    """A message's role is one of three."""
    error = refusal("MESSAGE robot hi")
    assert "'robot'" in error.message
    assert error.hint == "write one of system, user, assistant"


def test_licenses_in_order() -> None:
    """Each LICENSE adds a text."""
    assert parse("LICENSE b", 'LICENSE """a\nc"""').license == ("b", "a\nc")


@pytest.mark.parametrize(
    ("written", "stored"),
    [
        ("v0.19.0", "0.19.0"),
        ("0.19.0+mac", "0.19.0+mac"),
        ("0.19.1-rc1", "0.19.1-rc1"),
        ("0.20", "0.20"),
        ("1", "1"),
    ],
)
def test_requires_accepted(written: str, stored: str) -> None:
    """A version at or above the minimum is kept without its leading v."""
    assert parse(f"REQUIRES {written}").requires == stored


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        ("0.19.0-rc9", "requires_below_minimum"),
        ("v0.18", "requires_below_minimum"),
        ("0", "requires_below_minimum"),
        ("vv1.0.0", "requires_invalid"),
        ("01.0.0", "requires_invalid"),
        ("1.0-rc1", "requires_invalid"),
        ("1.0.0-01", "requires_invalid"),
        ("1.0.0 ", None),
        ("9" * 5000, "requires_invalid"),
        ('""', "requires_invalid"),
    ],
)
def test_requires_refused(written: str, kind: str | None) -> None:
    """A version that is none, or too low, is refused by kind; blanks around it do not count."""
    if kind is None:
        assert parse(f"REQUIRES {written}").requires == written.strip()
        return
    error = refusal(f"REQUIRES {written}")
    assert error.kind == kind
    assert "line 2" in error.message
    assert MINIMUM_VERSION in (error.hint or "")


def test_version_order() -> None:
    """Versions sort by number, a candidate before its release."""
    versions = ["0.9.9", "0.19.0-rc1", "0.19.0", "0.19.1", "0.100", "2"]
    keys = [version_key(v) for v in versions]
    assert None not in keys
    assert keys == sorted(k for k in keys if k)


@pytest.mark.parametrize(
    "data",
    [
        "FROM ü\n".encode(),
        codecs.BOM_UTF8 + "FROM ü\n".encode(),
        codecs.BOM_UTF16_LE + "FROM ü\n".encode("utf-16-le"),
        codecs.BOM_UTF16_BE + "FROM ü\n".encode("utf-16-be"),
    ],
)
def test_encodings(data: bytes) -> None:
    """UTF-8 with or without a mark and UTF-16 with one give the same text."""
    assert decode_modelfile(data) == "FROM ü\n"


@pytest.mark.parametrize(
    "data",
    [
        "FROM ü\n".encode("latin-1"),
        "FROM m\n".encode("utf-16-le"),
        codecs.BOM_UTF16_LE + b"F",
        codecs.BOM_UTF32_LE + "FROM m\n".encode("utf-32-le"),
        codecs.BOM_UTF32_BE + "FROM m\n".encode("utf-32-be"),
    ],
)
def test_other_encodings(data: bytes) -> None:
    """Any other encoding is refused, with UTF-8 as the way out."""
    with pytest.raises(BadModelfile) as caught:
        decode_modelfile(data)
    assert caught.value.hint == "save it as UTF-8"


def test_parameters_json() -> None:
    """Stored parameters are sorted, escaped as Go does it, and end in a newline."""
    found = parse("PARAMETER top_k 4", "PARAMETER stop <|é|>", "PARAMETER temperature 1").parameters
    expect = '{"stop":["\\u003c|é|\\u003e"],"temperature":1,"top_k":4}\n'
    assert parameters_json(found or {}) == expect.encode()


KINDS = ("bad_modelfile", "bad_parameter", "requires_invalid", "requires_below_minimum")
WORDS = st.sampled_from((*COMMANDS, *PARAMETERS, *OBSOLETE_PARAMETERS, "user", "0.5", "1", "v0.20"))
MARKS = st.sampled_from((" ", "\t", "\n", "\r\n", '"', '"""', "#", "FROM ./m\n", "\nPARAMETER "))


@given(st.one_of(st.text(), st.lists(WORDS | MARKS | st.text(max_size=3)).map("".join)))
@example("FROM ./m\nPARAMETER seed " + "9" * 5000)
@example("FROM ./m\nREQUIRES " + "9" * 5000)
@example('FROM """')
def test_any_text(text: str) -> None:
    """Arbitrary text is parsed or refused as a Modelfile, nothing else."""
    found = error = None
    try:
        found = parse_modelfile(text)
    except BadModelfile as refused:
        error = refused
    assert found is None or found.source
    assert error is None or (error.kind in KINDS and error.hint)


@given(st.binary())
def test_any_bytes(data: bytes) -> None:
    """Arbitrary bytes are decoded or refused as a Modelfile, nothing else."""
    text = error = None
    try:
        text = decode_modelfile(data)
    except BadModelfile as refused:
        error = refused
    assert text is None or "\0" not in text
    assert error is None or error.hint == "save it as UTF-8"
