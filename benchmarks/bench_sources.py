"""Weights that are quantized already: decoding them, and a whole `create`, against plain MLX.

Decoding: codes of other quantizers to BF16 by every implementation of the kernels that this
processor has, by the same arithmetic in NumPy, and by MLX's operations on its CPU, in turn, one
thread each, the best of several runs. `same` is 1 where all of ours give the same bytes.

`create`: a checkpoint of block FP8 becomes mxfp8, by whole processes in turn. The peer is the loop
that importers write with MLX: from_fp8, the scales of the blocks multiplied in, mx.quantize, and
mx.save_safetensors for each tensor. quantmill syncs what it writes, and hashes it; MLX does not.
The table gives medians of wall time, CPU time, peak memory and millions of weights a second.

    python benchmarks/bench_sources.py [--gigabytes 0.5] [--runs 3] [--folder /tmp]

Results also go to bench-results/sources.json.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from results import Row, keep, measure, medians, print_table
from synthetic import make

ROWS, COLUMNS = 256, 4096
MEGA = 1e6

LOOP = """
import os, sys
import mlx.core as mx
mx.set_default_device(mx.cpu)
os.mkdir(sys.argv[2])
tensors = mx.load(sys.argv[1] + "/model.safetensors")
for name in [name for name in tensors if not name.endswith("_scale_inv")]:
    codes, scales = tensors.pop(name), tensors.pop(name + "_scale_inv")
    rows, columns = codes.shape
    weight = mx.from_fp8(codes, dtype=mx.bfloat16).reshape(rows // 128, 128, columns // 128, 128)
    weight = (weight * scales[:, None, :, None]).reshape(rows, columns).astype(mx.bfloat16)
    codes, scales = mx.quantize(weight, group_size=32, bits=8, mode="mxfp8")
    parts = {name: codes, name + ".scales": scales}
    mx.save_safetensors(f"{sys.argv[2]}/{name}.safetensors", parts)
"""


def compare(source: Path, runs: int) -> dict[str, Row]:
    """Medians of whole processes, in turn, and ratios to the loop."""
    store, target = source / "store", source / "out"
    program = [sys.executable, "-m", "quantmill", "create", "bench", str(source), "--quiet"]
    commands = {
        f"create, {workers} workers": [*program, "--store", str(store), "--workers", str(workers)]
        for workers in (1, 2)
    }
    commands["MLX loop"] = [sys.executable, "-c", LOOP, str(source), str(target)]
    weights = (source / "model.safetensors").stat().st_size  # a byte each, but for a few scales
    found: dict[str, list[Row]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            row = measure(command)
            row["M weights/s"] = weights / row["wall s"] / MEGA
            found[name].append(row)
            for place in (store, target):
                shutil.rmtree(place, ignore_errors=True)
    rows = {name: medians(each) for name, each in found.items()}
    for name in list(rows)[:2]:
        rows[f"{name} / MLX"] = {c: rows[name][c] / rows["MLX loop"][c] for c in rows[name]}
    return rows


# -- decoding --------------------------------------------------------------------------------------


def decoding(runs: int) -> dict[str, Row]:
    """Millions of weights a second, by what does the work."""
    import mlx.core as mx

    from quantmill import _native, elements, kernels
    from quantmill.weights import CodedRows

    mx.set_default_device(mx.cpu)
    random = np.random.default_rng(0)
    out = np.ones(2 * ROWS * COLUMNS, np.uint8)  # touched already: fresh memory is slow
    found: dict[str, Row] = {}
    for element, group in (("e4m3", 128), ("e4m3", COLUMNS), ("uint", 128), ("e2m1", 16)):
        count = 256 if element == "uint" else 127 if element == "e4m3" else 16
        codes = random.integers(0, count, (ROWS, COLUMNS), np.uint8)
        scales = random.random((ROWS, COLUMNS // group), np.float32)
        raw = scales.reshape(-1).view(np.uint8).data
        zeros = raw if element == "uint" else None
        rows = CodedRows(element, COLUMNS, group, codes.reshape(-1).data, raw, zeros, None)
        row: Row = {"numpy": speed(runs, partial(elements.decode, rows, "BF16"))}
        if element == "e4m3":
            row["mlx"] = speed(runs, partial(by_mlx, mx.array(codes), mx.array(scales)))
        same, expected = True, elements.decode(rows, "BF16")
        for kernel in kernels.list_kernels():
            if kernel.name in {kernels.MLX, "exact"} or not kernel.supported:
                continue
            nothing = memoryview(b"")
            work = (rows.codes, raw, zeros or nothing, nothing, element, "BF16", COLUMNS, group,
                    out.data, kernel.name)  # fmt: skip
            row[kernel.name] = speed(runs, partial(_native.decode, *work))
            same = same and out.data == expected
        found[f"{element}, groups of {group}"] = row | {"same": float(same)}
    return found


def by_mlx(codes: Any, scales: Any) -> None:
    """FP8 to BF16 in MLX's operations; a scale serves a part of one row."""
    import mlx.core as mx

    weight = mx.from_fp8(codes, dtype=mx.bfloat16).reshape(*scales.shape, -1)
    mx.eval((weight * scales[..., None]).reshape(codes.shape).astype(mx.bfloat16))


def speed(runs: int, action: Callable[[], object]) -> float:
    """Millions of weights a second in the fastest of several runs."""
    seconds = float("inf")
    for _ in range(runs):
        started = time.perf_counter()
        action()
        seconds = min(seconds, time.perf_counter() - started)
    return ROWS * COLUMNS / seconds / MEGA


def main() -> None:
    """Run both and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; some gigabytes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source = Path(name) / "checkpoint"
        size = make(source, options.gigabytes, "--fp8")
        rows = compare(source, options.runs)
    print_table(f"{size / 1e9:.2f} GB of block FP8 to mxfp8", rows)
    # after the processes: a child's peak counts what its parent held
    speeds = decoding(4 * options.runs)
    print_table("codes to BF16, millions of weights a second, one thread", speeds, 0)
    keep("sources", {"bytes": size, "medians": rows, "decoding": speeds})


if __name__ == "__main__":
    main()
