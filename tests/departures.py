"""Vectors that quantmill answers differently on purpose: case id → what it does and why."""

from __future__ import annotations

_UNKNOWN = (
    "An unknown format name is refused instead of meaning 8-bit affine, which nobody asked for."
)

DEPARTURES: dict[str, str] = {
    "path-bef765": "`m:` is refused because one full grammar is used for every name, and a tag "
    "separator needs a tag.",
    "name-d6e0f1": _UNKNOWN,
    "name-d1c176": _UNKNOWN,
    "name-be2492": _UNKNOWN,
    "name-489eb7": _UNKNOWN,
    "name-285dc5": _UNKNOWN,
    "classify-69993f": "A quantization entry without a mode is affine because mlx-lm, which writes "
    "such entries, reads them so.",
    "params-valid-ff2e2b": "1-bit affine is not offered because MLX accepts it without testing it.",
}
