"""What the steps of a `create` take one by one, on one thread: seconds, a line for each.

    python benchmarks/bench_floor.py CHECKPOINT RUNS

Reads the checkpoint from the page cache in pieces, quantizes as many bytes to int4, hashes as many
bytes as come out, and writes them to a new file without syncing it. Each step is the median of its
runs, as the time of `create` is. Called by bench_create.py.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from quantmill.formats import INT4
from quantmill.pacing import PIECE_BYTES
from quantmill.quantize import quantize


def main() -> None:
    """Time each step and print it."""
    source, runs = Path(sys.argv[1]), int(sys.argv[2])
    file = source / "model.safetensors"
    size = file.stat().st_size
    pieces = size // PIECE_BYTES
    piece = np.empty(PIECE_BYTES, np.uint8)
    descriptor = os.open(file, os.O_RDONLY)
    os.preadv(descriptor, [piece.data], PIECE_BYTES)
    found = quantize(piece.data, "BF16", INT4)
    assert found.biases is not None
    out = np.concatenate([found.weight, found.scales, found.biases])
    target = source / "floor"

    def read() -> None:
        for i in range(pieces):
            os.preadv(descriptor, [piece.data], i * PIECE_BYTES)

    def quantized() -> None:
        for _ in range(pieces):
            quantize(piece.data, "BF16", INT4)

    def hashed() -> None:
        digest = hashlib.sha256()
        for _ in range(pieces):
            digest.update(out.data)

    def written() -> None:
        with target.open("wb", buffering=0) as new:
            for _ in range(pieces):
                new.write(out.data)
        target.unlink()

    steps: dict[str, Callable[[], None]] = {
        "read": read, "quantize": quantized, "hash": hashed, "write": written,
    }  # fmt: skip
    for name, step in steps.items():
        seconds = []
        for _ in range(runs):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
        print(name, statistics.median(seconds))


if __name__ == "__main__":
    main()
