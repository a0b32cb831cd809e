"""Where quantmill answers otherwise than the peers, it says so: the lists are complete."""

from __future__ import annotations

from typing import Any

import pytest

from departures import AS_THE_REFERENCE, DEPARTURES
from quantmill.errors import QuantmillError
from test_planner import planned
from vectors import DATA, cases, suite

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
    "plan-d-preq-modelopt-3d": "non_scalar",
    "plan-d-fp8-noscale": "missing_fp8_scale",
    "plan-d-fp8-expert-noscale": "missing_fp8_scale",
}


@cases("plan", "plan", odd=True)
def test_odd_plans_are_refused_decoded_or_kept(case: dict[str, Any]) -> None:
    """Incomplete sources are refused by name; a stacked FP8 tensor is decoded; the rest is kept."""
    if case["id"] in PLANS:
        with pytest.raises(QuantmillError) as caught:
            planned(case)
        assert caught.value.kind == PLANS[case["id"]]
        return
    plan = planned(case)
    if case["id"] == "plan-d-fp8-3d":
        assert {t.transform for t in plan.tensors} == {"decode_fp8"}
    else:
        assert [b.name for b in plan.blobs] == [b["name"] for b in case["expect"]["blobs"]]
