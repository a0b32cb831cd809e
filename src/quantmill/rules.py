"""Rules of the user about tensors: which one a tensor follows, and whether each is good for one.

`auto` writes a rule for every tensor, so those that name one tensor are looked up by its name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from quantmill.errors import BadRequest
from quantmill.plans import Override

_ESCAPED = re.compile(r"\[([*?[])\]")


def exactly(name: str) -> str:
    """The pattern that fits this name and no other."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _only_name(pattern: str) -> str | None:
    """The one name that a pattern fits, None where it may fit others."""
    if any(sign in _ESCAPED.sub("", pattern) for sign in "*?["):
        return None
    return _ESCAPED.sub(r"\1", pattern)


class Rules:
    """Overrides in the order in which they were given: the last one that fits wins."""

    def __init__(self, overrides: Sequence[Override]) -> None:
        self._overrides = overrides
        self._names = [_only_name(override.pattern) for override in overrides]
        self._named = {name: number for number, name in enumerate(self._names) if name is not None}
        self._patterns = [number for number, name in enumerate(self._names) if name is None]

    def fitting(self, name: str) -> Override | None:
        """The rule that a tensor of this name follows."""
        found = self._named.get(name, -1)
        for number in reversed(self._patterns):
            if number < found:
                break
            if fnmatchcase(name, self._overrides[number].pattern):
                found = number
                break
        return self._overrides[found] if found >= 0 else None

    def refuse_unused(self, names: Sequence[str]) -> None:
        """Raise BadRequest for a rule that fits none of the names."""
        known = set(names)
        for override, one in zip(self._overrides, self._names, strict=True):
            if one in known if one is not None else _fits_any(override.pattern, names):
                continue
            raise BadRequest(
                f"--tensor {override.pattern!r} fits no tensor",
                kind="unused_override",
                hint=_closest(override.pattern, names),
            )


def _fits_any(pattern: str, names: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _closest(pattern: str, names: Sequence[str]) -> str | None:
    """A hint: the pattern with wildcards where it is part of a name, else a name much like it."""
    from difflib import get_close_matches

    if any(pattern in name for name in names):
        return f"a pattern stands for the whole name: try '*{pattern}*'"
    close = get_close_matches(pattern, names, n=1)
    return f"did you mean {close[0]!r}?" if close else None
