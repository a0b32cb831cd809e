"""HTML as text that is escaped wherever it is not markup already.

Names and texts of models may hold anything. `Markup` is what `element` made; any other text that
is put into an element or an attribute is escaped, so that forgetting it is not possible.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from typing import Any

NOTHING = "\N{EN DASH}"
"""What stands where there is nothing to say."""


class Markup(str):
    """Text that is HTML."""

    __slots__ = ()


Child = str | int | None | Iterable["Child"]

_VOID = frozenset({"input", "wbr", "br", "hr"})


def element(tag: str, /, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """An element. Attributes that are None or False are left out, True ones have no value.

    `class_`, `for_` and `data_x` stand for `class`, `for` and `data-x`.
    """
    start = [tag]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        plain = key.rstrip("_").replace("_", "-")
        start.append(plain if value is True else f'{plain}="{escape(str(value))}"')
    opening = f"<{' '.join(start)}>"
    if tag in _VOID:
        return Markup(opening)
    return Markup(f"{opening}{joined(children)}</{tag}>")


def joined(children: Child) -> Markup:
    """Children one after the other, escaped unless they are markup."""
    if children is None:
        return Markup("")
    if isinstance(children, Markup):
        return children
    if isinstance(children, (str, int)):
        return Markup(escape(str(children)))
    return Markup("".join(joined(child) for child in children))


def breakable(text: str) -> Markup:
    """A dotted name that may be broken after its dots, slashes and underscores."""
    found = escape(text)
    for sign in (".", "/", "_"):
        found = found.replace(sign, f"{sign}<wbr>")
    return Markup(found)


def embedded_json(document: Any) -> Markup:
    """JSON for the inside of a script element: nothing in it can end the element."""
    text = json.dumps(document, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)
