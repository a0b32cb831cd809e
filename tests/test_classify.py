"""The kind of a checkpoint: the peers' vectors, and real checkpoints' inventories."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest

from departures import DEPARTURES
from quantmill.classify import FLOAT, Kind, classify
from quantmill.errors import BadSource, QuantmillError
from quantmill.formats import INT4
from quantmill.schemes import recognise
from sources import source_of, vector_source
from vectors import DATA, cases


def classified(case: dict[str, Any]) -> Kind:
    return classify(vector_source(case["input"]), case["input"]["requested"])


@cases("classify", "classify", without=DEPARTURES)
def test_kinds_equal_the_vectors(case: dict[str, Any]) -> None:
    """Kind and shared format are those of the reference, or the same refusal with its words."""
    expect = case["expect"]
    if "error" in expect:
        with pytest.raises(QuantmillError) as caught:
            classified(case)
        assert caught.value.kind == expect["error"]["kind"]
        assert all(word in caught.value.message for word in expect["error"].get("mentions", []))
        return
    kind = classified(case)
    assert kind.name == expect["kind"]
    assert (kind.format.name if kind.format else None) == expect["quantize"]


@cases("classify", "classify", odd=True)
def test_a_missing_mode_means_affine(case: dict[str, Any]) -> None:
    """A quantization entry with bits and no mode is affine, which departs from the reference."""
    assert case["id"] in DEPARTURES
    assert classified(case) == Kind(case["expect"]["kind"], INT4)


# -- real checkpoints ------------------------------------------------------------------------------

PLAIN = (
    "hf-gemma3-bf16",
    "hf-llama-bf16",
    "hf-llama-bf16-sharded",
    "hf-llama-f16",
    "hf-llama-f32",
    "hf-qwen3-moe-bf16",
    "hf-qwen3-tied-bf16",
    "hf-qwen3_5-moe-bf16",
)


@cache
def inventories() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DATA / "inventories.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", PLAIN)
def test_float_checkpoints_hold_no_codes(name: str) -> None:
    """In a checkpoint as transformers saves it, unquantized, every tensor is plain."""
    source = vector_source(inventories()[name])
    assert not recognise(source).coded
    assert classify(source, None) == Kind(FLOAT, None)


# hf2q-mixed is decided by its quantization_config.json, which an inventory does not hold
QUANTIZED = sorted(inventories().keys() - {*PLAIN, "hf2q-mixed"})


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_checkpoints_are_recognised_whole(name: str) -> None:
    """Whatever tool quantized a checkpoint, no codes are taken for numbers and none are left."""
    source = vector_source(inventories()[name])
    found = recognise(source)
    assert found.coded
    assert classify(source, None).name != FLOAT
    assert all(t.dtype in {"BF16", "F16", "F32", "I64"} for t in found.plain)


@pytest.mark.parametrize("name", ["proj.qweight", "proj.weight.absmax", "experts.up_proj_blocks"])
def test_telling_names_are_refused(name: str) -> None:
    """A tensor that only a quantizer writes is refused by its name where its parts are missing."""
    source = source_of({"norm.weight": ("BF16", (64,)), name: ("F32", (64, 8))})
    with pytest.raises(BadSource, match=re.escape(repr(name))):
        recognise(source)


@pytest.mark.parametrize("dtype", ["U8", "I8", "I32", "F8_E4M3"])
def test_integer_matrices_are_refused_without_any_sign(dtype: str) -> None:
    """A weight matrix of codes is refused even if nothing beside it or in its name says so."""
    source = source_of({"norm.weight": ("BF16", (64,)), "proj.weight": (dtype, (64, 64))})
    with pytest.raises(BadSource, match=r"'proj\.weight'"):
        recognise(source)


@pytest.mark.parametrize("bits", ["4", 4.0, True, [4]])
def test_widths_of_the_wrong_type_are_refused(bits: Any) -> None:
    """A config whose bits are not an integer is refused, naming the field."""
    source = source_of({"w.weight": ("BF16", (64, 64))}, {"quantization_config": {"bits": bits}})
    with pytest.raises(BadSource, match=r"quantization_config\.bits"):
        classify(source, None)
