"""What a calibrated method is given, decided by the options alone.

docs/fidelity.md says why these kinds and amounts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from quantmill.encoding import Statistics
from quantmill.errors import BadRequest
from quantmill.files import translated
from quantmill.plans import (
    AWARE,
    CALIBRATED,
    GPTQ,
    IMATRIX,
    MIXED,
    RANDOM,
    TEXT,
    BlobSpec,
    Calibration,
    Options,
    Plan,
)

VERSIONS = {AWARE: 2, GPTQ: 2}
"""Of the methods, counted up whenever the same weights and evidence would give other bytes."""

LENGTH = 512
"""Tokens of a window."""

_SEED = 0
_WINDOWS = {RANDOM: 16, TEXT: 32, MIXED: 24}
"""Windows of each part: random tokens settle means of squares soon, products of columns later."""

OF_FILE = {TEXT: 1, MIXED: 2}
"""How many times as many are taken of the user's text: in a mixture as many as of all else."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Blobs that can be written, and what is known of the inputs of their layers."""

    blobs: tuple[BlobSpec, ...]
    statistics: Statistics


Stages = Callable[[Sequence[BlobSpec], Callable[[int, int], None]], Iterator[Stage]]
"""Blobs in the order in which what they are calibrated with gets known; told of blocks passed."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A plan whose calibration is known whole, and the stages that its blobs are written in.

    `unused` are entries of an imatrix that are of no weight of the model.
    """

    plan: Plan
    stages: Stages | None = None
    unused: tuple[str, ...] = ()


def calibration_for(options: Options) -> Calibration | None:
    """What the options calibrate with, None for methods that are not calibrated.

    Reads a file that is given, for its digest. Raises BadRequest for options that do not go
    together, BadSource and StoreError for a file that cannot be read.
    """
    text, imatrix = options.calibration, options.imatrix
    if options.method not in CALIBRATED:
        if text or imatrix:
            raise BadRequest(
                f"the method {options.method} is not calibrated",
                hint="--method aware or gptq uses --calibration; --method aware uses --imatrix",
            )
        return None
    if imatrix and (text or options.method == GPTQ):
        raise BadRequest(
            "an imatrix holds means of squares, all that is used with --method aware"
            if text
            else "--method gptq needs more than the means of squares that an imatrix holds",
            hint="leave out --calibration" if text else "use --method aware, or leave it out",
        )
    version = VERSIONS[options.method]
    if imatrix:
        return _with_file(Calibration(IMATRIX, version), imatrix)
    plain = TEXT if text else RANDOM
    kind = MIXED if options.method == GPTQ else plain
    found = Calibration(kind, version, _SEED, _WINDOWS[kind], LENGTH)
    return _with_file(found, text) if text else found


def _with_file(found: Calibration, path: str) -> Calibration:
    with translated(Path(path)), Path(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return replace(found, file=Path(path).name, file_digest=f"sha256:{digest}")
