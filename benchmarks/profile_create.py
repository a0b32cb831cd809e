"""Where a `create` with one worker spends its time: seconds by step, a line for each.

    python benchmarks/profile_create.py CHECKPOINT STORE PATTERN=FORMAT...

The functions that do the steps are wrapped with clocks; `python` is what is left of the worker's
time, `start` everything before and after the blobs, and `sync` runs beside the worker, in the main
thread. Called by bench_create.py.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from typing import Any

STARTED = time.perf_counter()

from quantmill import execute, store  # noqa: E402  (loading is part of what is measured)
from quantmill.creation import create  # noqa: E402
from quantmill.files import Disk  # noqa: E402
from quantmill.openfile import OpenFile  # noqa: E402
from quantmill.planner import parse_override  # noqa: E402
from quantmill.plans import Options  # noqa: E402

SECONDS = dict.fromkeys(["read", "quantize", "hash", "write", "sync", "blobs", "python"], 0.0)


def clocked(step: str, action: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, its time added to a step."""

    def wrapped(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return action(*arguments, **options)
        finally:
            SECONDS[step] += time.perf_counter() - started

    return wrapped


class Hash:
    """A SHA-256 with a clock on it."""

    def __init__(self) -> None:
        whole = hashlib.sha256()
        self.update = clocked("hash", whole.update)
        self.hexdigest = whole.hexdigest


class Hashes:
    """Stands in for hashlib."""

    sha256 = Hash


def main() -> None:
    """Run a `create` with clocks on it and print them."""
    for owner, name, step in (
        (OpenFile, "read_into", "read"), (execute, "quantize", "quantize"),
        (Disk, "write", "write"), (Disk, "sync", "sync"), (execute, "_finish_blob", "blobs"),
    ):  # fmt: skip
        setattr(owner, name, clocked(step, getattr(owner, name)))
    setattr(store, "hashlib", Hashes)  # noqa: B010  (not an attribute of its own)
    options = Options(tuple(parse_override(text) for text in sys.argv[3:]))
    target = store.Store(sys.argv[2])
    create("bench", sys.argv[1], store=target, quantize="int4", options=options, workers=1)
    total = time.perf_counter() - STARTED
    steps = sum(SECONDS[step] for step in ("read", "quantize", "hash", "write"))
    SECONDS["python"] = SECONDS.pop("blobs") - steps
    for step, seconds in (SECONDS | {"start": total - steps - SECONDS["python"]}).items():
        print(step, seconds)


if __name__ == "__main__":
    main()
