"""Vectors that quantmill answers differently on purpose: case id → what it does and why."""

from __future__ import annotations

_UNKNOWN = (
    "An unknown format name is refused instead of meaning 8-bit affine, which nobody asked for."
)
_UNDECIDED = (
    "A model-wide default that does not fit leaves several formats: an error names them, since a "
    "guess may give wrong weights."
)
_AGAINST_SHAPES = "Byte scales for 4 words each are mxfp4, whatever the model's default says."

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
    "aux-d-router": "A learned `.scale` keeps its name because it is a companion only of a tensor "
    "that is there.",
    "params-valid-ff2e2b": "1-bit affine is not offered because MLX accepts it without testing it.",
    "info-b2a703": _UNKNOWN,
    "params-ce6b66": _UNKNOWN,
    "info-c7ba98": "A header with an entry that has no shape and no place is refused, whatever its "
    "metadata says.",
    "resolve-08dc57": _UNDECIDED,
    "resolve-2c2f8d": _UNDECIDED,
    "resolve-5d5ea6": _UNDECIDED,
    "resolve-c68e8f": _UNDECIDED,
    "layer-12de0e": _UNDECIDED,
    "layer-9ebe4b": _UNDECIDED,
    "resolve-b1da08": _AGAINST_SHAPES,
    "layer-dcdefe": _AGAINST_SHAPES,
    "layer-b2dd5c": _AGAINST_SHAPES,
    "layer-903286": "Affine codes without biases are refused because MLX cannot read them.",
}
