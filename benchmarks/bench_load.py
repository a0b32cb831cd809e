"""`open_model` against `mx.load` over the same blobs, in one process, in turn.

A synthetic Llama-shaped model of some 300 blobs is quantized into a store first. Each task then
runs several times with each of the two, alternating; the table gives medians in milliseconds and
their ratio. The files are in the page cache for both. Results also go to bench-results/load.json.

    open     every header is known (MLX reads headers too; both open every file)
    first    open, then one weight with its companions is in memory
    all      open, then every array is in memory
    views    open, then NumPy sums the bytes of every weight: over mapped files, or MLX's arrays

    python benchmarks/bench_load.py [--layers 36] [--width 512] [--runs 9]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from results import keep
from synthetic import shapes, write_checkpoint

from quantmill.creation import create
from quantmill.load import open_model
from quantmill.model import Model
from quantmill.names import parse_name
from quantmill.store import Store

FULL_WIDTH = 2048
FIRST = "model.layers.0.mlp.down_proj.weight"
Task = Callable[[], int]


def small_shapes(layers: int, width: int) -> dict[str, tuple[int, ...]]:
    """The model of bench_create, every dimension made smaller, with this many layers."""
    whole = shapes(0)
    one = {n: s for n, s in whole.items() if ".layers." in n}
    names = {n: s for n, s in whole.items() if n not in one}
    for index in range(layers):
        names |= {n.replace(".layers.0.", f".layers.{index}."): s for n, s in one.items()}
    return {n: tuple(d * width // FULL_WIDTH for d in s) for n, s in names.items()}


def arrays_of(model: Model, name: str) -> list[mx.array]:
    """A weight and its companions."""
    parts = model.parts(name)
    found = (parts.weight, parts.scales, parts.biases, parts.global_scale)
    return [a for a in found if a is not None]


def ours(store: Store) -> dict[str, Task]:
    """What each task is with quantmill; each returns a number to compare."""

    def opened() -> int:
        with open_model("bench", store=store) as model:
            return len(model)

    def first() -> int:
        with open_model("bench", store=store) as model:
            arrays = arrays_of(model, FIRST)
            mx.eval(arrays)
            return sum(a.nbytes for a in arrays)

    def everything() -> int:
        with open_model("bench", store=store) as model:
            arrays = [a for name in model for a in arrays_of(model, name)]
            mx.eval(arrays)
            return sum(a.nbytes for a in arrays)

    def views() -> int:
        with open_model("bench", store=store) as model:
            flat = (model.view(name).reshape(-1).view(np.uint8) for name in model)
            return sum(int(view.sum(dtype=np.int64)) for view in flat)

    return {"open": opened, "first": first, "all": everything, "views": views}


def theirs(store: Store) -> dict[str, Task]:
    """The same with `mx.load` alone, which is told the names and the files."""
    manifest = store.get_manifest(parse_name("bench"))
    files = {str(r.name): str(store.blob_path(r.digest)) for r in manifest.tensor_refs()}

    def load(path: str) -> dict[str, mx.array]:
        found = mx.load(path, format="safetensors")
        assert isinstance(found, dict)
        return found

    def opened() -> int:
        return len({name: load(path) for name, path in files.items()})

    def first() -> int:
        arrays = {name: load(path) for name, path in files.items()}[FIRST]
        mx.eval(arrays)
        return sum(a.nbytes for a in arrays.values())

    def everything() -> int:
        arrays = [a for path in files.values() for a in load(path).values()]
        mx.eval(arrays)
        return sum(a.nbytes for a in arrays)

    def views() -> int:
        weights = (load(path)[name] for name, path in files.items())
        flat = (np.array(w.reshape(-1).view(mx.uint8), copy=False) for w in weights)
        return sum(int(view.sum(dtype=np.int64)) for view in flat)

    return {"open": opened, "first": first, "all": everything, "views": views}


def milliseconds(task: Task) -> tuple[float, int]:
    """How long a task takes, and what it returns."""
    started = time.perf_counter()
    found = task()
    return (time.perf_counter() - started) * 1e3, found


def main() -> None:
    """Make the store, run both in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args()
    mx.set_default_device(mx.cpu)
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(Path(name), small_shapes(options.layers, options.width))
        store = Store(Path(name) / "store")
        made = create("bench", name, store=store, quantize="int4")
        pair = {"open_model": ours(store), "mx.load": theirs(store)}
        runs: dict[str, dict[str, list[float]]] = {who: {} for who in pair}
        for task in pair["mx.load"]:
            for turn in range(options.runs + 1):
                done = {who: milliseconds(tasks[task]) for who, tasks in pair.items()}
                if len({found for _, found in done.values()}) > 1:
                    raise SystemExit(f"{task}: the two did not do the same: {done}")
                for who, (taken, _) in done.items() if turn else ():  # the first turn warms up
                    runs[who].setdefault(task, []).append(taken)
        report(runs, len(made.plan.blobs), made.size)


def report(runs: dict[str, dict[str, list[float]]], blobs: int, size: int) -> None:
    """Print medians and ratios, and keep everything as JSON."""
    medians = {who: {t: statistics.median(r) for t, r in of.items()} for who, of in runs.items()}
    tasks = list(medians["mx.load"])
    medians["ratio"] = {t: medians["open_model"][t] / medians["mx.load"][t] for t in tasks}
    print(f"{blobs} blobs, {size / 1e6:.0f} MB, affine 4 bit, {os.cpu_count()} processors; ms")
    print(f"{'':12}" + "".join(f"{task:>10}" for task in tasks))
    for who, values in medians.items():
        print(f"{who:12}" + "".join(f"{values[task]:10.2f}" for task in tasks))
    keep("load", {"blobs": blobs, "bytes": size, "runs": runs, "medians": medians})


if __name__ == "__main__":
    main()
