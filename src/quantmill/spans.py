"""Spans of bytes: what of a blob is there, what is missing, in which parts it is moved."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.ASCII)
_UPLOADED = re.compile(r"(?:bytes=)?0-(\d{1,19})", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """The bytes from `start` up to, and without, `end`."""

    start: int
    end: int

    @property
    def size(self) -> int:
        """How many bytes these are."""
        return self.end - self.start


def missing(size: int, have: Iterable[Span]) -> list[Span]:
    """What lacks of the bytes 0 to `size`, in order; spans may overlap, and end beyond `size`."""
    found, at = [], 0
    for span in sorted(have):
        if span.start > at:
            found.append(Span(at, min(span.start, size)))
        at = max(at, span.end)
        if at >= size:
            break
    if at < size:
        found.append(Span(at, size))
    return [span for span in found if span.size > 0]


def in_parts(spans: Iterable[Span], longest: int) -> list[Span]:
    """The same bytes in spans of at most `longest` bytes."""
    return [
        Span(start, min(start + longest, span.end))
        for span in spans
        for start in range(span.start, span.end, longest)
    ]


def parse_content_range(text: str) -> tuple[Span, int | None] | None:
    """The span that a partial answer holds and the size of the whole; None for anything else."""
    match = _CONTENT_RANGE.fullmatch(text.strip())
    if match is None:
        return None
    start, last = int(match[1]), int(match[2])
    total = None if match[3] == "*" else int(match[3])
    if last < start or (total is not None and last >= total):
        return None
    return Span(start, last + 1), total


def parse_uploaded(text: str) -> int | None:
    """How many bytes of an upload have arrived, from `0-<last>`; None for anything else.

    `0-0` means none: registries answer so before the first byte.
    """
    match = _UPLOADED.fullmatch(text.strip())
    if match is None:
        return None
    return int(match[1]) + 1 if int(match[1]) else 0
