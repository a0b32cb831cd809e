"""Where quantmill answers otherwise than the peers, it says so: the lists are complete."""

from __future__ import annotations

from typing import Any

import pytest

from departures import AS_THE_REFERENCE, DEPARTURES
from quantmill.classify import BLOCK_FP8, classify
from quantmill.errors import QuantmillError
from sources import vector_source
from test_planner import planned
from vectors import DATA, suite

SUITES = sorted(path.stem for path in (DATA / "vectors").glob("*.json"))
ALL = {case["id"]: case for name in SUITES for case in suite(name)}


def test_every_odd_case_is_decided() -> None:
    """A doubtful answer of the reference is either departed from or kept, with a reason."""
    odd = {case_id for case_id, case in ALL.items() if "odd" in case}
    assert odd <= DEPARTURES.keys() | AS_THE_REFERENCE.keys()


def test_every_entry_names_a_case() -> None:
    """No entry outlives its case, and no case is in both lists."""
    listed = DEPARTURES.keys() | AS_THE_REFERENCE.keys()
    assert listed <= ALL.keys()
    assert not DEPARTURES.keys() & AS_THE_REFERENCE.keys()
    assert all(reason.endswith(".") for reason in (DEPARTURES | AS_THE_REFERENCE).values())


PLANS = {
    "plan-d-expert-uneven": "missing_expert",
    "plan-d-fp8-mismatch-weight": "bad_block_scale_shape",
    "plan-preq-mlx": "ambiguous_parameters",
    "plan-d-preq-mlx-override": "bad_relation",
    "plan-d-fp8-noscale": "missing_fp8_scale",
    "plan-d-fp8-expert-noscale": "missing_fp8_scale",
}


DEPARTING_PLANS = [ALL[case_id] for case_id in DEPARTURES if case_id.startswith("plan-")]


@pytest.mark.parametrize("case", DEPARTING_PLANS, ids=[c["id"] for c in DEPARTING_PLANS])
def test_departing_plans_are_refused_decoded_or_stacked(case: dict[str, Any]) -> None:
    """Sources that do not add up are refused by name; stacked FP8 and packed experts are read."""
    if case["id"] in PLANS:
        with pytest.raises(QuantmillError) as caught:
            planned(case)
        assert caught.value.kind == PLANS[case["id"]]
        return
    plan = planned(case)
    if case["id"] == "plan-d-fp8-3d":
        assert {t.transform for t in plan.tensors} == {"decode_fp8"}
    elif case["id"] == "plan-old-nvfp4-experts":
        assert [b.name for b in plan.blobs] == ["model.layers.1.mlp.experts", "norm.weight"]
        parts = {t.name.rpartition("gate_proj.")[2]: t.shape for t in plan.blobs[0].tensors}
        assert parts == {
            "weight": (2, 2, 2), "weight.scale": (2, 2, 1), "weight.global_scale": (2,),
        }  # fmt: skip
    else:
        assert case["id"] == "plan-d-preq-modelopt-3d"
        assert [t.shape for t in plan.tensors] == [(4, 128, 16), (4, 128, 8), (4,)]


def test_fp8_blocks_of_any_size_are_read() -> None:
    """A block size other than 128x128 is no reason to refuse a checkpoint."""
    case = ALL["classify-b3f950"]["input"]
    assert classify(vector_source(case), None).name == BLOCK_FP8
