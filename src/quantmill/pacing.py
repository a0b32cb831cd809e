"""How many threads work, and on how many bytes at once: what keeps memory within a budget."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from quantmill import kernels
from quantmill.errors import OverBudget
from quantmill.plans import CAST, COLUMNS, CPU_PROFILE, INDEX, Options, Plan, TensorSpec
from quantmill.source import SourceTensor

PIECE_BYTES = 1 << 20
"""Source bytes that a thread takes at once: enough to make Python's share small, and cached."""

SMALLEST_PIECE = 1 << 16

MOST_WORKERS = 4
"""Threads by default: beyond this the disk and the bus are busy."""

_USUAL_BYTES = 32 << 20
"""Working memory of a thread when no budget is given, for arithmetic that needs much of it."""

_KEPT_BYTES = 3 << 20
"""What a thread holds besides: scales and biases that wait for their place, a buffer to hash."""

_RESERVE = 16 << 20
"""What the rest of the process may still need: results, notes, the interpreter."""

_MLX_BYTES = 80 << 20
"""What loading MLX takes."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Threads, and source bytes that each takes at once."""

    workers: int
    piece_bytes: int


def pace(
    plan: Plan,
    tensors: Mapping[str, SourceTensor],
    workers: int | None = None,
    memory: int | None = None,
) -> Pace:
    """Threads and pieces for a plan over these tensors of a source.

    `workers` are the most threads, None for one on each processor and MOST_WORKERS at most.
    `memory` is the most bytes that the whole process may ever occupy, what it occupies by now
    included; None for no limit other than the usual few megabytes a thread. Raises OverBudget when
    one thread with the smallest pieces would not fit.
    """
    wanted = workers or default_workers()
    times = _working_bytes(plan)
    if memory is None:
        usual = max(SMALLEST_PIECE, _USUAL_BYTES // times)
        return Pace(wanted, min(PIECE_BYTES, _power_of_two(usual)))
    loads_mlx = not _is_native(plan.options) and "mlx.core" not in sys.modules
    kept = _KEPT_BYTES + _held_bytes(plan, tensors)  # first: it loads NumPy where that is needed
    used = occupied() + _RESERVE + (_MLX_BYTES if loads_mlx else 0)
    smallest = kept + times * SMALLEST_PIECE
    if used + smallest > memory:
        raise OverBudget(
            f"{memory} bytes of memory are not enough",
            hint=f"--memory {-(-(used + smallest) // 1_000_000)}MB is the least here",
        )
    fitting = min(wanted, (memory - used) // smallest)
    share = (memory - used) // fitting - kept
    return Pace(fitting, min(PIECE_BYTES, _power_of_two(share // times)))


def _working_bytes(plan: Plan) -> int:
    """Bytes that the arithmetic occupies for each byte of source data, at most."""
    native, found = _is_native(plan.options), 2
    for spec in plan.tensors:
        if spec.transform == CAST:
            found = max(found, 8)
        if spec.coding is not None:
            found = max(found, 8 if _decodes_natively(spec) else 20)
        if spec.added:
            found = max(found, 20)  # several arrays of float32 for each element of two bytes
        if spec.format is not None and not native:
            # MLX composes the 4-bit float formats of whole-array operations
            found = max(found, 48 if spec.format.mode in {"nvfp4", "mxfp4"} else 24)
    return found


def _decodes_natively(spec: TensorSpec) -> bool:
    """Whether decoding makes no arrays of float32 for all elements."""
    assert spec.coding is not None
    return kernels.in_use() != kernels.MLX and not {COLUMNS, INDEX} & set(spec.coding.roles)


def _held_bytes(plan: Plan, tensors: Mapping[str, SourceTensor]) -> int:
    """Bytes that a thread holds besides its pieces, at most: what is read whole."""
    found = 0
    for spec in plan.tensors:
        held = 0
        if spec.coding is not None:
            from quantmill import coding

            held += coding.held_bytes(spec, tensors)
        if any(spec.added):
            from quantmill import merging

            held += merging.held_bytes(spec, tensors)
        found = max(found, held)
    return found


def _is_native(options: Options) -> bool:
    """Whether the kernels do all the work, and neither MLX nor NumPy."""
    usual = options.profile == CPU_PROFILE and options.rounding == "ceil"
    return usual and kernels.in_use() != kernels.MLX


def _power_of_two(limit: int) -> int:
    """The largest power of two up to `limit`, so that pieces hold whole groups."""
    return int(1 << (limit.bit_length() - 1))


def occupied() -> int:
    """Bytes of memory that this process has occupied at most so far."""
    with suppress(OSError, StopIteration), open("/proc/self/status", encoding="ascii") as lines:
        # the system's other figure counts what the parent held when it started this process
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def default_workers() -> int:
    """One for each processor this process may use, MOST_WORKERS at most."""
    try:
        usable = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        usable = os.cpu_count() or 1
    return max(1, min(MOST_WORKERS, usable))


def parse_memory(text: str) -> int:
    """Bytes from `800MB`, `2GiB`, `1.5G` or a plain number; raises ValueError."""
    units = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
    number = text.strip().lower().removesuffix("b")
    digits = number.rstrip("kmgi")
    if number[len(digits) :] not in units:
        raise ValueError(text)
    found = float(digits) * units[number[len(digits) :]]
    if not 0 < found < 2**63:
        raise ValueError(text)
    return int(found)
