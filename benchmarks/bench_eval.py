"""Forward passes block by block against mlx-lm's own of the whole model, with and without a BLAS.

A synthetic Llama-shaped model is stored unquantized and as int4. Each way of sending the same
random tokens through it runs in a process of its own, in turn, so that peaks of memory can be read
and the BLAS chosen; the table gives medians of tokens per second, from opening to the last block's
result, and peaks, and ratios to our own. Results also go to bench-results/eval.json.

    ours         quantmill's forward pass, float32
    whole f32    mlx-lm's module with all weights, float32
    whole bf16   the same as it is stored, which a CPU computes in software

    python benchmarks/bench_eval.py [--layers 8] [--width 1024] [--windows 4] [--runs 3]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench_load import FULL_WIDTH, small_shapes
from results import keep, medians, print_table
from synthetic import HEADS, config, write_checkpoint

from quantmill.creation import create
from quantmill.store import Store

PROGRAM = """
import json, resource, sys, time
from quantmill import blas
blas.preload()
import mlx.core as mx
from quantmill import mlxlm
from quantmill.forward import Forward
from quantmill.load import open_model
from quantmill.store import Store
from quantmill.windows import random_tokens
how, store, name, windows = sys.argv[1:]
tokens = random_tokens(1000, int(windows), 512)
started = time.perf_counter()
with open_model(name, store=Store(store)) as model:
    if how == "ours":
        forward = Forward(model, tokens)
        for index in range(len(forward)):
            forward.step(index)
        forward.finish()
    else:
        module, _ = mlxlm.build(model, mx.float32 if how == "whole f32" else None)
        for window in tokens:
            mx.eval(module.model(mx.array(window)[None]))
seconds = time.perf_counter() - started
unit = 1 if sys.platform == "darwin" else 1024
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
print(json.dumps({"tokens/s": tokens.size / seconds, "peak MB": peak}))
"""


def write_model(folder: Path, layers: int, width: int) -> None:
    """The model of bench_load with a config for its dimensions."""
    tensors = small_shapes(layers, width)
    write_checkpoint(folder, tensors)
    rows, hidden = tensors["model.embed_tokens.weight"]
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": tensors["model.layers.0.mlp.up_proj.weight"][0],
        "head_dim": FULL_WIDTH // HEADS * width // FULL_WIDTH,
        "vocab_size": rows,
    }
    (folder / "config.json").write_text(json.dumps(config(layers) | sizes))


def run(how: str, store: Path, name: str, windows: int, blas: str) -> dict[str, float]:
    """One process; a BLAS of `off` leaves MLX its own."""
    environment = {**os.environ, "QUANTMILL_BLAS": blas}
    command = [sys.executable, "-c", PROGRAM, how, str(store), name, str(windows)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        write_model(checkpoint, chosen.layers, chosen.width)
        store = Store(Path(folder) / "store")
        ways = []
        for quantize in (None, "int4"):
            name = f"bench:{quantize or 'bf16'}"
            create(name, checkpoint, store=store, quantize=quantize)
            for blas in ("", "off"):
                ways += [(how, name, blas) for how in ("ours", "whole f32", "whole bf16")]
        runs: dict[tuple[str, str, str], list[dict[str, float]]] = {way: [] for way in ways}
        for _ in range(chosen.runs):
            for way in ways:
                how, name, blas = way
                runs[way].append(run(how, Path(folder) / "store", name, chosen.windows, blas))
    rows = {}
    for (how, name, blas), found in runs.items():
        row, own = medians(found), medians(runs["ours", name, blas])
        row |= {"speed / ours": row["tokens/s"] / own["tokens/s"]}
        row |= {"memory / ours": row["peak MB"] / own["peak MB"]}
        rows[f"{how}, {name}, BLAS {blas or 'preloaded'}"] = row
    print_table("forward passes", rows)
    keep("eval", rows)


if __name__ == "__main__":
    main()
