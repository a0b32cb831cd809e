"""The texts that fidelity is measured on, and those that models are calibrated with for each.

    E1  WikiText-2 (raw, test): windows beginning at linspace(0, 149488, 40) of its first 150,000
        tokens, the first 16 of them unless more are asked for
    E2  tiny-shakespeare: 12 windows, a domain that nothing is calibrated with
    E3  the second half of Python's own documentation: 16 windows, always there

WikiText-2 (CC BY-SA) and tiny-shakespeare are not part of the project: a folder that has them is
given, E3 alone is measured without. Calibrated with is, for E1 and E2, tokens 152,000 to 305,000
of WikiText-2, other articles than those measured, beside what `create` always takes; for E3 that
alone: the first half of the documentation, and random tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantmill.windows import Text, Tokens, default_text, text_ids, text_of

LENGTH = 512
_FIRST, _CUT = 150_000, slice(152_000, 305_000)
_WIKI, _PLAYS = "wikitext-2-raw-test.txt", "tiny-shakespeare.txt"


@dataclass(frozen=True, slots=True)
class TextSet:
    """Windows of a text, int32 [windows, LENGTH], and the file to calibrate with; None: default."""

    name: str
    text: Text
    windows: Tokens
    calibration: Path | None


def text_sets(
    names: list[str], tokenizer: Any, texts: Path | None, work: Path, count: int | None
) -> list[TextSet]:
    """The sets of those names whose texts are there; files to calibrate with are put into `work`.

    `count` is the number of windows; without it each set has its own.
    """
    found = []
    wiki, plays = (texts / name if texts else None for name in (_WIKI, _PLAYS))
    if wiki and wiki.is_file():
        text = text_of(wiki)
        ids = text_ids(tokenizer, text.text).own
        cut = tokenizer.decode(ids[_CUT].tolist())
        own = work / "wikitext.txt"
        own.write_text(cut, encoding="utf-8")
        if "E1" in names:
            starts = np.linspace(0, _FIRST - LENGTH, 40).astype(int)[: count or 16]
            windows = np.stack([ids[start : start + LENGTH] for start in starts])
            found.append(TextSet("E1", text, windows, own))
        if "E2" in names and plays and plays.is_file():
            text = text_of(plays)
            windows = text_ids(tokenizer, text.text).windows(LENGTH, count or 12)
            found.append(TextSet("E2", text, windows, own))
    if "E3" in names:
        text = default_text()
        windows = text_ids(tokenizer, text.text).windows(LENGTH, count or 16)
        found.append(TextSet("E3", text, windows, None))
    return found
