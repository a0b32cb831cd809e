"""`quantmill create` against a plain `mx.quantize` loop, whole processes in turn.

Both read the same synthetic Llama-shaped BF16 checkpoint and write affine 4-bit weights. Each runs
several times, one after the other; the table gives medians of wall time, CPU time and peak memory,
and the ratio of the medians. Results also go to bench-results/create.json.

    python benchmarks/bench_create.py [--gigabytes 0.25] [--runs 3]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from quantmill.tensorfile import lay_out

OURS = """
import sys
from quantmill.creation import create
from quantmill.store import Store
create("bench", sys.argv[1], store=Store(sys.argv[2]), quantize="int4")
"""

LOOP = """
import sys
import mlx.core as mx
mx.set_default_device(mx.cpu)
arrays = {}
for name, weight in mx.load(sys.argv[1] + "/model.safetensors").items():
    if weight.ndim == 2 and "embed" not in name:
        parts = mx.quantize(weight, group_size=64, bits=4)
        mx.eval(*parts)
        arrays |= {f"{name}{end}": part for end, part in zip(("", ".scales", ".biases"), parts)}
    else:
        arrays[name] = weight
mx.save_safetensors(sys.argv[2], arrays)
"""


def shapes(gigabytes: float) -> dict[str, tuple[int, ...]]:
    """Tensors of a Llama-like model of about this size in BF16."""
    hidden, inner, vocabulary = 2048, 5632, 32000
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    each = 2 * sum(a * b for a, b in layer.values())
    count = max(1, round((gigabytes * 1e9 - 4 * vocabulary * hidden) / each))
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
    }
    for index in range(count):
        prefix = f"model.layers.{index}"
        found[f"{prefix}.input_layernorm.weight"] = (hidden,)
        found |= {f"{prefix}.{name}.weight": shape for name, shape in layer.items()}
    return found


def write_checkpoint(folder: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """Write a Llama-like checkpoint of random BF16 weights."""
    header, _ = lay_out([(name, "BF16", shape) for name, shape in tensors.items()], {})
    random = np.random.default_rng(0)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        for shape in tensors.values():
            values = random.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
            file.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())


def measure(program: str, *arguments: str) -> dict[str, float]:
    """Wall and CPU seconds and peak megabytes of one process."""
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-c", program, *arguments])
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"a benchmarked process failed with {child.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024
    cpu = usage.ru_utime + usage.ru_stime
    return {"wall s": wall, "cpu s": cpu, "peak MB": usage.ru_maxrss * unit / 1e6}


def main() -> None:
    """Run both in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--write", type=Path, help="only write the checkpoint into this folder")
    options = parser.parse_args()
    if options.write:
        write_checkpoint(options.write, shapes(options.gigabytes))
        return
    results: dict[str, list[dict[str, float]]] = {"quantmill create": [], "mx.quantize loop": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # in a process of its own: a child's peak memory counts what its parent held at the fork
        arguments = ["--write", name, "--gigabytes", str(options.gigabytes)]
        subprocess.run([sys.executable, __file__, *arguments], check=True)
        size = (folder / "model.safetensors").stat().st_size
        for _ in range(options.runs):
            store, target = folder / "store", folder / "out.safetensors"
            results["quantmill create"].append(measure(OURS, name, str(store)))
            shutil.rmtree(store)
            results["mx.quantize loop"].append(measure(LOOP, name, str(target)))
            target.unlink()
    report(results, size)


def report(results: dict[str, list[dict[str, float]]], size: int) -> None:
    """Print medians and ratios, and keep everything as JSON."""
    ours, loop = results
    columns = list(results[ours][0])
    medians = {
        name: {c: statistics.median(run[c] for run in runs) for c in columns}
        for name, runs in results.items()
    }
    medians["ratio"] = {c: medians[ours][c] / medians[loop][c] for c in columns}
    print(f"{size / 1e9:.2f} GB of BF16, affine 4 bit, {os.cpu_count()} processors")
    print(f"{'':18}" + "".join(f"{c:>10}" for c in columns))
    for name, values in medians.items():
        print(f"{name:18}" + "".join(f"{values[c]:10.2f}" for c in columns))
    keep("create", {"bytes": size}, results, medians)


def keep(name: str, about: dict[str, int], runs: object, medians: object) -> None:
    """Write results, with what they were measured on, to bench-results/<name>.json."""
    target = Path("bench-results")
    target.mkdir(exist_ok=True)
    machine = {"machine": platform.machine(), "processors": os.cpu_count(), **about}
    document = {"about": machine, "runs": runs, "medians": medians}
    (target / f"{name}.json").write_text(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
