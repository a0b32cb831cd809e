"""`quantmill create` against `mlx_lm.convert` and a plain `mx.quantize` loop: whole processes.

All read the same synthetic Llama-shaped BF16 checkpoint and write affine 4-bit weights. `same work`
means that all of them give every matrix 4 bits, as mlx-lm does; `policy` is what `create -q int4`
does by itself (embeddings keep their precision, some matrices get 8 bits: more bytes to write).
Each runs several times, in turn; the tables give medians of wall time, CPU time and peak memory,
and ratios of medians.

The floor is what the steps of `same work` take one after the other on one thread, measured in the
same run: read the file, quantize it, hash and write as many bytes as `create` does.

    python benchmarks/bench_create.py [--gigabytes 1] [--runs 5]
        [--scaling 0.25 0.5 1 2 4] [--workers 1 2] [--folder /tmp]

Results also go to bench-results/create.json. `benchmarks/plot_create.py` draws the scaling.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from results import Row, keep, measure, medians, print_table
from synthetic import make

HERE = Path(__file__).parent
SAME = ["--tensor", "*_proj.weight=int4", "--tensor", "*embed_tokens.weight=int4",
        "--tensor", "lm_head.weight=int4"]  # fmt: skip

LOOP = """
import sys
import mlx.core as mx
mx.set_default_device(mx.cpu)
arrays = {}
for name, weight in mx.load(sys.argv[1] + "/model.safetensors").items():
    if weight.ndim == 2:
        parts = mx.quantize(weight, group_size=64, bits=4)
        mx.eval(*parts)
        arrays |= {f"{name}{end}": part for end, part in zip(("", ".scales", ".biases"), parts)}
    else:
        arrays[name] = weight
mx.save_safetensors(sys.argv[2], arrays)
"""


def create(source: Path, store: Path, *more: str) -> list[str]:
    """The command line of a `create`."""
    program = [sys.executable, "-m", "quantmill", "create", "bench", str(source)]
    return [*program, "-q", "int4", "--store", str(store), "--quiet", *more]


def convert(source: Path, target: Path) -> list[str]:
    """The command line of mlx-lm's converter."""
    paths = ["--hf-path", str(source), "--mlx-path", str(target)]
    return [sys.executable, "-m", "mlx_lm", "convert", *paths, "-q", "--q-bits", "4"]


def fresh(command: list[str], target: Path) -> Row:
    """One measured run into a target that is not there."""
    shutil.rmtree(target, ignore_errors=True)
    target.unlink(missing_ok=True)
    found = measure(command)
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    return found


def floor(source: Path, runs: int) -> dict[str, float]:
    """Seconds of every step, by bench_floor.py in a process of its own."""
    command = [sys.executable, str(HERE / "bench_floor.py"), str(source), str(runs)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
    return {name: float(value) for name, value in (x.split() for x in lines if x)}


def compare(source: Path, runs: int) -> dict[str, Row]:
    """Medians of everything, in turn."""
    store, target = source / "store", source / "out"
    commands = {
        "create, same work": (create(source, store, *SAME), store),
        "create, policy": (create(source, store), store),
        "mlx_lm.convert": (convert(source, target), target),
        "mx.quantize loop": ([sys.executable, "-c", LOOP, str(source), str(target)], target),
    }
    found: dict[str, list[Row]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, (command, place) in commands.items():
            found[name].append(fresh(command, place))
    rows = {name: medians(each) for name, each in found.items()}
    ours = rows["create, same work"]
    for peer in ("mlx_lm.convert", "mx.quantize loop"):
        rows[f"same work / {peer}"] = {c: ours[c] / rows[peer][c] for c in ours}
    peer = "mlx_lm.convert"
    rows[f"policy / {peer}"] = {c: rows["create, policy"][c] / rows[peer][c] for c in ours}
    return rows


def scaling(
    folder: Path, sizes: list[float], workers: list[int], runs: int
) -> dict[str, dict[str, Row]]:
    """Medians of `create` over sizes and workers, and of mlx-lm for the same sizes."""
    found: dict[str, dict[str, Row]] = {}
    for size in sizes:
        source = folder / f"checkpoint-{size}"
        nbytes = make(source, size)
        each: dict[str, list[Row]] = {}
        for _ in range(runs):
            for count in workers:
                command = create(source, source / "store", *SAME, "--workers", str(count))
                row = fresh(command, source / "store")
                each.setdefault(f"create, {count} workers", []).append(row)
            row = fresh(convert(source, source / "out"), source / "out")
            each.setdefault("mlx_lm.convert", []).append(row)
        shutil.rmtree(source)
        rows = {name: medians(them) for name, them in each.items()}
        found[f"{nbytes / 1e9:.2f}"] = rows
        print_table(f"{nbytes / 1e9:.2f} GB", rows)
    return found


def main() -> None:
    """Run what was asked for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--scaling", type=float, nargs="*", default=[0.25, 0.5, 1, 2, 4])
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--folder", type=Path, help="where to work; some gigabytes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source = Path(name) / "checkpoint"
        size = make(source, options.gigabytes)
        rows = compare(source, options.runs)
        print_table(f"{size / 1e9:.2f} GB of BF16, int4, {os.cpu_count()} cores", rows, 3)
        steps = floor(source, options.runs)
        steps["sum"] = sum(steps[step] for step in ("read", "quantize", "hash", "write"))
        steps["create / sum"] = rows["create, same work"]["wall s"] / steps["sum"]
        print_table("floor: steps on one thread", {"seconds": steps}, 3)
        profile = profiled(source)
        print_table("where a create with one worker spends its time", {"seconds": profile}, 3)
        shutil.rmtree(source)
        scaled = scaling(Path(name), options.scaling, options.workers, min(options.runs, 3))
    keep("create", {"bytes": size, "medians": rows, "floor": steps, "profile": profile,
                    "scaling": scaled})  # fmt: skip


def profiled(source: Path) -> dict[str, float]:
    """Seconds by step of one `create`, by profile_create.py in a process of its own."""
    program = [sys.executable, str(HERE / "profile_create.py")]
    command = [*program, str(source), str(source / "store"), *SAME[1::2]]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
    shutil.rmtree(source / "store")
    return {name: float(value) for name, value in (x.split() for x in lines if x)}


if __name__ == "__main__":
    main()
