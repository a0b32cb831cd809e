"""The copied vectors (tests/data/README.md says where they come from), as pytest cases."""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parent / "data"


@cache
def suite(name: str) -> list[dict[str, Any]]:
    """All cases of a suite, in file order."""
    document = json.loads((DATA / "vectors" / f"{name}.json").read_text(encoding="utf-8"))
    cases: list[dict[str, Any]] = document["cases"]
    return cases


def cases(
    name: str, *ops: str, odd: bool = False, without: Collection[str] = ()
) -> pytest.MarkDecorator:
    """A parametrize decorator over the cases of `ops`; odd ones only when asked for."""
    chosen = [c for c in suite(name) if c["op"] in ops and ("odd" in c) == odd]
    chosen = [c for c in chosen if c["id"] not in without]
    assert chosen, f"no {ops} cases in {name}"
    return pytest.mark.parametrize("case", chosen, ids=[c["id"] for c in chosen])
