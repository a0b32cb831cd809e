"""Measuring whole processes, and keeping what was measured."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

FOLDER = Path("bench-results")

Row = dict[str, float]


def measure(command: Sequence[str]) -> Row:
    """Wall and CPU seconds and peak megabytes of one process."""
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"a benchmarked process failed with {child.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    cpu = usage.ru_utime + usage.ru_stime
    return {"wall s": wall, "cpu s": cpu, "peak MB": usage.ru_maxrss * unit / 1e6}


def medians(runs: Sequence[Row]) -> Row:
    """The median of every column."""
    return {column: statistics.median(run[column] for run in runs) for column in runs[0]}


def print_table(title: str, rows: Mapping[str, Row], digits: int = 2) -> None:
    """Rows under the columns of the first."""
    columns = list(next(iter(rows.values())))
    width = max(map(len, rows)) + 2
    print(f"\n{title}")
    print(" " * width + "".join(f"{c:>14}" for c in columns))
    for name, row in rows.items():
        cells = "".join(f"{row[c]:14.{digits}f}" if c in row else f"{'':14}" for c in columns)
        print(f"{name:{width}}{cells}")


def keep(name: str, document: Mapping[str, object]) -> None:
    """Write results, with what they were measured on, to bench-results/<name>.json."""
    FOLDER.mkdir(exist_ok=True)
    about = {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()}
    text = json.dumps({"about": about, **document}, indent=2)
    (FOLDER / f"{name}.json").write_text(text + "\n")


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
