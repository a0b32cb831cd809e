"""Modelfile text to values: parsing only, no file is opened.

A Modelfile is a list of commands, one a line, names in any case. A value in double quotes, single
or triple, may go on over several lines; it ends with the quotes that close a line. A line that
starts with `#` is a comment.
"""

from __future__ import annotations

import codecs
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from quantmill.errors import BadModelfile
from quantmill.manifest import go_json

MINIMUM_VERSION = "0.19.0"
"""The first Ollama release that runs safetensors models; REQUIRES may only raise it."""

OBSOLETE_PARAMETERS = frozenset(
    {"penalize_newline", "low_vram", "f16_kv", "logits_all", "vocab_only", "use_mlock",
     "mirostat", "mirostat_tau", "mirostat_eta"}
)  # fmt: skip
"""Parameters that old Modelfiles set and that no runtime reads any more."""

# A command's value goes to this field; None: understood, and of no use to a safetensors model.
_FIELDS: dict[str, str | None] = {
    "FROM": "source", "DRAFT": "draft", "TEMPLATE": "template", "SYSTEM": "system",
    "LICENSE": "license", "PARAMETER": "parameters", "PARSER": "parser", "RENDERER": "renderer",
    "REQUIRES": "requires", "ADAPTER": None, "MESSAGE": None,
}  # fmt: skip
_ROLES = ("system", "user", "assistant")

_GAP = re.compile(r"(?:[ \t\r\n]+|#[^\r\n]*)*")
_WORD = re.compile(r"([^ \t\r\n]*)[ \t]*")
_NEWLINE = re.compile(r"\r\n|\r|\n")
_VALUES = {
    quote: re.compile(rf"{quote}(.*?){quote}[^\S\r\n]*(?=[\r\n]|\Z)", re.DOTALL)
    for quote in ('"""', '"')
} | {"": re.compile(r"([^\r\n]*)")}

_FLOAT = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_INT = re.compile(r"[+-]?[0-9]{1,19}")
_TRUE = frozenset({"1", "t", "T", "true", "True", "TRUE"})
_FALSE = frozenset({"0", "f", "F", "false", "False", "FALSE"})
# Minor and patch may be left out; a release candidate may not follow a shortened version.
_NUMBER = r"(0|[1-9][0-9]{0,8})"
_IDENTIFIER = r"(?:0|[1-9][0-9]*|[0-9]*[A-Za-z-][0-9A-Za-z-]*)"
_VERSION = re.compile(
    rf"{_NUMBER}(?:\.{_NUMBER}(?:\.{_NUMBER}"
    rf"(?:-({_IDENTIFIER}(?:\.{_IDENTIFIER})*))?(?:\+[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*)?)?)?"
)


@dataclass(frozen=True, slots=True)
class Modelfile:
    """What a Modelfile says. None or empty: not said.

    `source` is the text after FROM. `ignored` lists what had no effect, one sentence each.
    """

    source: str
    draft: str | None = None
    template: str | None = None
    system: str | None = None
    license: tuple[str, ...] = ()
    parameters: Mapping[str, Any] | None = None
    parser: str | None = None
    renderer: str | None = None
    requires: str | None = None
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Command:
    line: int
    name: str
    key: str  # the parameter's name or the message's role
    value: str


@dataclass(slots=True)
class _Found:
    values: dict[str, str] = field(default_factory=dict)
    license: list[str] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)


def decode_modelfile(data: bytes) -> str:
    """Text of a Modelfile: UTF-8 with or without a mark, or UTF-16 with one."""
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise _encoding(f"undecodable byte at {error.start}") from None
    if "\0" in text:  # UTF-32, or UTF-16 without a mark
        raise _encoding("a zero character")
    return text


def parse_modelfile(text: str) -> Modelfile:
    """The meaning of a Modelfile; raises BadModelfile, naming line and text."""
    found = _Found()
    for command in _commands(text):
        _apply(command, found)
    if not found.values.get("source"):
        raise BadModelfile(
            "the Modelfile names no model", hint="add a line: FROM <directory or model>"
        )
    return Modelfile(
        **{name: value or None for name, value in found.values.items() if name != "source"},
        source=found.values["source"],
        license=tuple(found.license),
        parameters=found.parameters or None,
        ignored=tuple(found.ignored),
    )


def version_key(version: str) -> tuple[int, int, int, bool] | None:
    """Sort key of a version, a release after its candidates; None when it is no version."""
    match = _VERSION.fullmatch(version)
    if match is None:
        return None
    major, minor, patch = (int(part or 0) for part in match.group(1, 2, 3))
    return major, minor, patch, match[4] is None


def parameters_json(parameters: Mapping[str, Any]) -> bytes:
    """Run parameters as they are stored: names sorted, one newline at the end."""
    # Go writes a float without a fraction like a whole number
    whole = {n: int(v) for n, v in parameters.items() if isinstance(v, float) and v.is_integer()}
    return go_json(dict(sorted({**parameters, **whole}.items()))) + b"\n"


def _commands(text: str) -> Iterator[_Command]:
    at, line = 0, 1
    while True:
        start = _match(_GAP, text, at).end()
        line += len(_NEWLINE.findall(text, at, start))
        if start == len(text):
            return
        command, at = _command(text, start, line)
        yield command
        line += len(_NEWLINE.findall(text, start, at))


def _command(text: str, start: int, line: int) -> tuple[_Command, int]:
    word, at = (found := _match(_WORD, text, start))[1], found.end()
    name = word.upper() if word.isascii() else word
    if name not in _FIELDS:
        allowed = _near(name, _FIELDS)
        raise _bad(line, f"unknown command {_shown(word)}", f"write one of {allowed}")
    key = ""
    if name in ("PARAMETER", "MESSAGE"):
        key, at = (found := _match(_WORD, text, at))[1], found.end()
    quote = next((q for q in ('"""', '"') if text.startswith(q, at)), "")
    match = _VALUES[quote].match(text, at)
    if match is None:
        shown = _shown(_first_line(text[at:]))
        raise _bad(line, f"the text {shown} after {name} is not closed", f"end it with {quote}")
    value = match[1] if quote else match[1].strip()
    if not (quote or value):
        raise _bad(line, f"no value after {_shown(f'{word} {key}'.strip())}", "add a value")
    return _Command(line, name, key, value), match.end()


def _match(pattern: re.Pattern[str], text: str, at: int) -> re.Match[str]:
    match = pattern.match(text, at)
    assert match is not None  # only for patterns that match empty text too
    return match


def _apply(command: _Command, found: _Found) -> None:
    where = _FIELDS[command.name]
    if command.name == "MESSAGE" and command.key not in _ROLES:
        hint = f"write one of {', '.join(_ROLES)}"
        raise _bad(command.line, f"unknown role {_shown(command.key)}", hint)
    if where is None:
        _ignore(command, found, "has no effect on a safetensors model")
    elif where == "license":
        found.license.append(command.value)
    elif where == "parameters":
        _apply_parameter(command, found)
    else:
        value = _requires(command) if where == "requires" else command.value
        if where in found.values:
            _ignore(command, found, "replaces an earlier one")
        found.values[where] = value


def _apply_parameter(command: _Command, found: _Found) -> None:
    if command.key in OBSOLETE_PARAMETERS:
        return _ignore(command, found, "is obsolete")
    if command.key not in PARAMETERS:
        what = f"unknown parameter {_shown(command.key)}"
        hint = f"write one of {_near(command.key, PARAMETERS)}"
        raise _bad(command.line, what, hint, kind="bad_parameter")
    wanted, convert = PARAMETERS[command.key]
    try:
        value = convert(command.value)
    except ValueError:
        what = f"{command.key} is not {wanted}: {_shown(command.value)}"
        raise _bad(command.line, what, f"give {wanted}", kind="bad_parameter") from None
    if isinstance(value, list):
        value = [*found.parameters.get(command.key, ()), *value]
    elif command.key in found.parameters:
        _ignore(command, found, "replaces an earlier one")
    found.parameters[command.key] = value
    return None


def _ignore(command: _Command, found: _Found, why: str) -> None:
    what = f"{command.name} {command.key}".strip()
    found.ignored.append(f"line {command.line}: {what} {why}")


def _requires(command: _Command) -> str:
    version = command.value.removeprefix("v")
    key = version_key(version)
    hint = f"write a version of at least {MINIMUM_VERSION}"
    if key is None:
        what = f"REQUIRES is not a version: {_shown(command.value)}"
        raise _bad(command.line, what, hint, kind="requires_invalid")
    minimum = version_key(MINIMUM_VERSION)
    assert minimum is not None
    if key < minimum:
        what = f"REQUIRES {_shown(version)} is too low: safetensors models need {MINIMUM_VERSION}"
        raise _bad(command.line, what, hint, kind="requires_below_minimum")
    return version


def _float(text: str) -> float:
    if not _FLOAT.fullmatch(text) or abs(float(text)) >= 2.0**128:  # runtimes hold 32 bits
        raise ValueError(text)
    return float(text)


def _int(text: str) -> int:
    if not _INT.fullmatch(text) or not -(2**63) <= int(text) < 2**63:
        raise ValueError(text)
    return int(text)


def _bool(text: str) -> bool:
    if text not in _TRUE | _FALSE:
        raise ValueError(text)
    return text in _TRUE


_TYPES: tuple[tuple[str, Callable[[str], Any], tuple[str, ...]], ...] = (
    ("a whole number", _int, (
        "draft_num_predict", "main_gpu", "num_batch", "num_ctx", "num_gpu", "num_keep",
        "num_predict", "num_thread", "repeat_last_n", "seed", "top_k",
    )),
    ("a number", _float, (
        "frequency_penalty", "min_p", "presence_penalty", "repeat_penalty", "temperature",
        "top_p", "typical_p",
    )),
    ("true or false", _bool, ("use_mmap",)),
    ("a text", lambda text: [text], ("stop",)),
)  # fmt: skip

PARAMETERS = {name: (what, convert) for what, convert, names in _TYPES for name in names}
"""Every parameter a runtime reads: what its value must be, and the conversion from text."""


def _near(name: str, allowed: Iterable[str]) -> str:
    names = sorted(allowed)
    close = difflib.get_close_matches(name.lower(), [n.lower() for n in names], cutoff=0.5)
    return ", ".join(n for n in names if n.lower() in close) or ", ".join(names)


def _first_line(text: str) -> str:
    return _NEWLINE.split(text, maxsplit=1)[0]


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _bad(line: int, what: str, hint: str, *, kind: str = "bad_modelfile") -> BadModelfile:
    return BadModelfile(f"Modelfile line {line}: {what}", kind=kind, hint=hint)


def _encoding(what: str) -> BadModelfile:
    return BadModelfile(f"the Modelfile is not text: {what}", hint="save it as UTF-8")
