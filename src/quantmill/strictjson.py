"""JSON from a source that may lie: no duplicate keys, no NaN, no unbounded nesting or numbers."""

from __future__ import annotations

import json
import re
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")


class BadJson(ValueError):
    """Text that is not acceptable JSON; the message says why, without the text itself."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise BadJson(f"key {twice!r} appears twice")
    return found


def _refused(text: str) -> Any:
    raise BadJson(f"{text} is not JSON")


def parse(data: bytes, *, constants: bool = False) -> Any:
    """The value of UTF-8 JSON `data`; raises BadJson.

    `constants` accepts NaN and Infinity, which Python's own writer produces and the configs of
    published models hold.
    """
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=float if constants else _refused,
        )
    except UnicodeDecodeError as error:
        raise BadJson(f"invalid UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise BadJson(f"{error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise BadJson("nested too deeply") from None
    except BadJson:
        raise
    except ValueError:  # an integer with thousands of digits
        raise BadJson("a number is too long") from None


def parse_object(data: bytes, *, constants: bool = False) -> dict[str, Any]:
    """Like `parse`, for a document that must be an object."""
    value = parse(data, constants=constants)
    if not isinstance(value, dict):
        raise BadJson("the top level is not an object")
    return value


def is_text(value: str) -> bool:
    """Whether UTF-8 can hold this string: JSON may escape one half of a surrogate pair."""
    return _SURROGATE.search(value) is None


def canonical(value: Any) -> bytes:
    """Compact ASCII JSON with sorted keys: equal values give equal bytes."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return text.encode("ascii")
