"""The fuzzer, for a moment: every parser, and that the fuzzer finds what it should."""

from __future__ import annotations

import pytest

import fuzz
from quantmill.errors import QuantmillError
from quantmill.strictjson import parse


@pytest.mark.parametrize("target", sorted(fuzz.TARGETS))
def test_no_input_makes_a_parser_fail(target: str) -> None:
    """Half a second of changed inputs gives values and errors raised on purpose, nothing else."""
    found = fuzz.fuzz(target, 0.5)
    assert found.failure is None
    assert found.runs > len(fuzz.seeds(target))


@pytest.mark.parametrize("target", sorted(fuzz.TARGETS))
def test_a_seed_is_a_sound_input(target: str) -> None:
    """What the fuzzer begins with is read: changes of it reach further than those of noise."""
    parser = fuzz.TARGETS[target]()
    accepted = 0
    for data in fuzz.seeds(target):
        try:
            parser(data)
            accepted += 1
        except QuantmillError:
            continue
    assert accepted


def test_a_parser_that_fails_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that nobody raised on purpose ends the run, with the input."""

    def fragile(data: bytes) -> object:
        return parse(data) and 1 // (len(data) % 5)

    monkeypatch.setitem(fuzz.TARGETS, "fragile", lambda: fragile)
    found = fuzz.fuzz("fragile", 10)
    assert found.failure is not None
    assert len(found.failure[0]) % 5 == 0
    assert "ZeroDivisionError" in found.failure[1]
