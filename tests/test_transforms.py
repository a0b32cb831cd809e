"""Byte-level transforms: the peers' vectors."""

from __future__ import annotations

from typing import Any

import pytest

from quantmill.errors import BadPlan, QuantmillError
from quantmill.plans import DECODE_FP8, DECODE_STACK_FP8
from quantmill.transforms import Part, apply
from vectors import cases


def part(document: dict[str, Any]) -> Part:
    data = bytes.fromhex(document["data_hex"])
    return Part(document["name"], document["dtype"], tuple(document["shape"]), data)


def transformed(given_input: dict[str, Any]) -> Part:
    sources = [part(document) for document in given_input["sources"]]
    return apply(given_input["transform"], given_input["out_name"], sources)


@cases("blob_io", "transform")
def test_transforms_equal_the_vectors(case: dict[str, Any]) -> None:
    """Name, dtype, shape and bytes are those of the reference, or the same refusal."""
    expect = case["expect"]
    if "error" in expect:
        with pytest.raises(QuantmillError) as caught:
            transformed(case["input"])
        assert caught.value.kind == expect["error"]["kind"]
    else:
        assert transformed(case["input"]) == part(expect)


@pytest.mark.parametrize("transform", [DECODE_FP8, DECODE_STACK_FP8])
def test_transforms_that_compute_are_refused(transform: str) -> None:
    """Decoding FP8 needs arithmetic, so it has no byte-level form."""
    with pytest.raises(BadPlan) as caught:
        apply(transform, "w", [Part("w", "F8_E4M3", (1,), b"\0")])
    assert caught.value.kind == "needs_numeric_path"
