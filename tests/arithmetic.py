"""What the tests of both quantizers share: the formats, comparing bytes, and tensors in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hard_data import DTYPES, NAMES, hard_data
from quantmill.elements import absolute_maximum
from quantmill.formats import (
    AFFINE_BITS,
    AFFINE_GROUPS,
    INT4,
    INT8,
    MXFP4,
    MXFP8,
    NVFP4,
    Format,
)
from quantmill.weights import Quantized
from reference import Packed

Array = npt.NDArray[Any]

AFFINE = [Format("affine", bits, group) for bits in AFFINE_BITS for group in AFFINE_GROUPS]
MX = [MXFP4, MXFP8]
FORMATS = [*AFFINE, NVFP4, *MX]

all_formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.label)
affine_formats = pytest.mark.parametrize("fmt", AFFINE, ids=lambda f: f.label)
mx_formats = pytest.mark.parametrize("fmt", MX, ids=lambda f: f.label)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES)


class Parts(NamedTuple):
    """What a quantizer made, as arrays of bytes."""

    weight: Array
    scales: Array
    biases: Array | None
    non_finite: int


def parts_of(found: Quantized) -> Parts:
    weight, scales, biases = (
        None if part is None else np.frombuffer(part, np.uint8)
        for part in (found.weight, found.scales, found.biases)
    )
    assert weight is not None
    assert scales is not None
    return Parts(weight, scales, biases, found.non_finite)


def raw(x: Array) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def as_bytes(part: Array | None) -> bytes | None:
    return None if part is None else raw(part).tobytes()


def differing(found: Parts, expected: Packed | Parts) -> list[str]:
    """The parts that are not byte for byte the same."""
    words = expected.words if isinstance(expected, Packed) else expected.weight
    pairs = {
        "weight": (found.weight, words),
        "scales": (found.scales, expected.scales),
        "biases": (found.biases, expected.biases),
    }
    return [name for name, (a, b) in pairs.items() if as_bytes(a) != as_bytes(b)]


any_pieces = given(
    st.sampled_from([INT4, INT8, Format("affine", 3, 32), NVFP4, MXFP4, MXFP8]),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(any),
    st.sampled_from(NAMES),
    st.booleans(),
    st.sampled_from(["ceil", "nearest"]),
)
"""Format, dtype, groups in each piece, hard data, whether with a global scale, rounding."""


def differing_pieces(
    quantizer: Callable[..., Parts],
    overflowing: Callable[[Array], Array],
    fmt: Format,
    dtype: str,
    sizes: list[int],
    name: str,
    *,
    scaled: bool,
    rounding: str,
) -> list[str]:
    """The parts in which pieces, quantized one by one and joined, are not the whole's result."""
    groups = hard_data(name, dtype).reshape(-1, fmt.group_size)[: sum(sizes)]
    if fmt.mode == "affine":
        groups = groups[~overflowing(groups)]
    assume(len(groups) > 0)
    maximum = absolute_maximum(raw(groups), dtype) or 1.0
    options = {"rounding": rounding, "maximum": maximum if scaled and fmt == NVFP4 else None}
    whole = quantizer(groups, dtype, fmt, **options)
    parts = np.split(groups, np.cumsum(sizes)[:-1])
    pieces = [quantizer(part, dtype, fmt, **options) for part in parts]
    joined = Parts(
        np.concatenate([piece.weight for piece in pieces]),
        np.concatenate([piece.scales for piece in pieces]),
        np.concatenate([piece.biases for piece in pieces if piece.biases is not None])
        if fmt.has_bias
        else None,
        whole.non_finite,
    )
    return differing(whole, joined)
