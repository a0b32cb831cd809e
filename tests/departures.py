"""Vectors that quantmill answers differently on purpose: case id → what it does and why.

Of the cases marked `odd`, doubtful answers of the reference, those that are not in DEPARTURES are in
AS_THE_REFERENCE: also a decision, with its reason.
"""

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
    "plan-d-expert-uneven": "Projections with different numbers of experts are refused because a "
    "model cannot run on half an expert.",
    "plan-d-preq-modelopt-3d": "Stacked 4-bit codes are repacked like others, and a global scale for "
    "each expert is stored as it is.",
    "plan-d-preq-mlx-override": "The module's own entry counts; affine codes without biases, as here, "
    "are refused.",
    "plan-old-nvfp4-experts": "Packed experts are stacked as float ones are.",
    "plan-preq-mlx": "Codes and scales whose shapes contradict the recorded group size are refused.",
    "plan-d-fp8-mismatch-weight": "The expert whose scale does not fit its own weight is named, before "
    "experts are compared.",
    "classify-b3f950": "FP8 blocks of any size are read.",
    "plan-d-fp8-noscale": "An FP8 weight without a scale is refused because its values are unknown.",
    "plan-d-fp8-expert-noscale": "As for any FP8 weight without a scale, told by that name and not by "
    "the collision it would cause.",
    "plan-d-fp8-3d": "A stacked FP8 tensor is decoded whatever its name ends in, since its dtype and "
    "its scales say what it is.",
    "mq-info-eb98e3": "Every tensor blob is asked for its type, because the first may be a norm.",
    "info-a50848": "Recorded mxfp4 with float scales and biases is refused: it cannot be mxfp4.",
    "info-770907": "Plural companions count like all others, so codes without biases are refused.",
    "info-ab2390": "A header whose metadata is not text is refused.",
    "main-8c0a17": "A global scale and plural scales are companions and not weights; an ordinary "
    "bias is a weight.",
    "list-231565": "Per-tensor metadata is read: the tensor is listed as int4.",
    "list-ca69c2": "A tensor without scales is listed with its dtype, whatever its blob records.",
    "model-fb796a": "Shapes that leave several formats open are an error naming them.",
    **dict.fromkeys(
        (
            "resolve-8b6426",
            "resolve-c47fda",
            "resolve-ce9941",
            "resolve-55794d",
            "resolve-a46f1d",
            "resolve-cf5c81",
            "resolve-5f0a5f",
            "resolve-50f183",
            "resolve-ff398d",
        ),
        "A recorded type that contradicts the packed shapes is refused because the weights "
        "would come out wrong.",
    ),
    "ov-5c3133": "A missing mode is affine, as mlx-lm reads it.",
    "ov-68609f": "`false` means not quantized and `true` the model-wide values, as mlx-lm reads them.",
    "meta-99d0a2": "A missing mode is affine, as mlx-lm reads it.",
    "layer-903286": "Affine codes without biases are refused because MLX cannot read them.",
}

_ONE_WIDTH = "Float modes have one width each, so the number says nothing new."

AS_THE_REFERENCE: dict[str, str] = {
    "num-zeros-bf16-int4": "These are the bytes of MLX.",
    "num-lut-f32-f32-mxfp4": "These are the bytes of MLX.",
    "inv-d-modelx": "The rule for names without an index is the reference's.",
    "aux-d-biasclash-0ccccc": "The singular spelling wins, for biases as for scales.",
    "info-27011c": "Float scales and biases fit one affine format only.",
    "infer-800285": "Kept as the peers' rule; nothing is decided by it.",
    "infer-ca0646": "Kept as the peers' rule; nothing is decided by it.",
    "infer-8c26dc": "Kept as the peers' rule; nothing is decided by it.",
    "qc-721cae": "quantization_config.json has its entries under per_tensor.",
    "qc-042010": "mlx-native's reading, kept as one candidate among others that shapes confirm.",
    **dict.fromkeys(
        (
            "source-type-650e96", "source-type-131c10", "source-type-d1cbab",
            "meta-28432c", "meta-e4e037", "meta-73d29c", "meta-7e8c21",
        ),
        _ONE_WIDTH,
    ),
    "weights-fece4e": "Kept as the legacy heuristic; nothing is decided by it.",
    "weights-448edf": "Kept as the legacy heuristic, the first pair in name order deciding.",
}  # fmt: skip
