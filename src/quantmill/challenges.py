"""What a registry asks for when it answers 401: the WWW-Authenticate header as values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"\s*=\s*(?:\"((?:[^\"\\]|\\.)*)\"|([^\s,\"=]+))", re.DOTALL)
_CREDENTIAL = re.compile(r"[0-9A-Za-z._~+/-]+=*\s*(?=,|$)")
_LONGEST = 8192


@dataclass(frozen=True, slots=True)
class Challenge:
    """One way to identify oneself: `bearer` or `basic`, with its parameters, keys in lower case."""

    scheme: str
    parameters: Mapping[str, str] = field(default_factory=dict)


def parse_challenges(headers: Iterable[str]) -> list[Challenge]:
    """The challenges of all WWW-Authenticate headers, in order.

    What does not follow the grammar is passed over.
    """
    found: list[tuple[str, dict[str, str]]] = []
    for header in headers:
        text, at = header[:_LONGEST], 0
        while at < len(text):
            token = _TOKEN.match(text, at)
            if token is None:
                at += 1
                continue
            at = token.end()
            value = _VALUE.match(text, at)
            if value is None:
                found.append((token[0].lower(), {}))
                space = len(text) - len(text[at:].lstrip())
                other = _CREDENTIAL.match(text, space) if space > at else None
                if other and not _VALUE.match(text, space + len(other[0].rstrip("= "))):
                    at = other.end()
                continue
            at = value.end()
            if found:
                written = value[2] if value[1] is None else re.sub(r"\\(.)", r"\1", value[1])
                found[-1][1].setdefault(token[0].lower(), written)
    return [Challenge(scheme, parameters) for scheme, parameters in found]
