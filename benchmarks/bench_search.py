"""The search for scales and biases beside rounding to nearest, one thread.

Random BF16 weights (or others) in rows of 1024, importance that spreads over two powers of ten.
Speeds are millions of weights per second, the best of several runs. `nearest` is the fastest
kernel's plain quantize, `numpy` the same search in NumPy on a part of the weights, and `error` the
weighted error of the result over that of rounding to nearest. `same` is 1 where all implementations
give the same bytes. Results also go to bench-results/search.json.

    python benchmarks/bench_search.py [--dtypes BF16 F16 F32] [--runs 5] [--millions 1]
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import numpy as np
from bench_kernels import best, room
from results import Row, keep, print_table

from quantmill import _native, kernels
from quantmill.elements import RAW, Bytes, Floats, from_float32, to_float32
from quantmill.formats import AFFINE_BITS, DTYPE_BYTES, MXFP4, NVFP4, Format
from quantmill.quantize import quantize
from quantmill.searchedarrays import search_arrays
from quantmill.searching import search
from quantmill.weights import Quantized

FORMATS = [
    *(Format("affine", bits, 64) for bits in AFFINE_BITS),
    Format("affine", 4, 32),
    Format("affine", 4, 128),
    NVFP4,
    MXFP4,
]
COLUMNS = 1024
PEER_WEIGHTS = 1 << 18
"""NumPy gets fewer, or this would take minutes."""


def weighted_error(found: Quantized, raw: Bytes, dtype: str, fmt: Format, h: Floats) -> float:
    """Sum over all weights."""
    value = dtype if fmt.has_bias else "BF16"
    values = kernels.dequantize(found.weight, found.scales, found.biases, value, fmt)
    assert values is not None
    decoded = to_float32(np.frombuffer(values, np.uint8).view(RAW[value]), value)
    off = (to_float32(raw.view(RAW[dtype]), dtype) - decoded).astype(np.float64)
    return float((off.reshape(-1, COLUMNS) ** 2 * h).sum())


def measure(raw: Bytes, dtype: str, fmt: Format, h: Floats, runs: int) -> Row:
    """One row of the table."""
    count = raw.size // DTYPE_BYTES[dtype] / 1e6
    own = quantize(raw.data, dtype, fmt)
    row: Row = {"nearest": count / best(runs, lambda: quantize(raw.data, dtype, fmt))}
    expected = search(raw.data, dtype, fmt, h.data)
    out, same = room(raw.size, dtype, fmt), True
    weights = h.view(np.uint8)
    for kernel in kernels.list_kernels():
        if kernel.name == kernels.MLX or not kernel.supported:
            continue
        work: tuple[Any, ...] = (
            raw, dtype, dtype, fmt.mode, fmt.bits, fmt.group_size, weights, 0,
            out.weight, out.scales, out.biases, kernel.name,
        )  # fmt: skip
        row[kernel.name] = count / best(runs, partial(_native.search, *work))
        same = same and out.weight == expected.weight and out.scales == expected.scales
        same = same and (expected.biases is None or out.biases == expected.biases)
    part = raw[: PEER_WEIGHTS * DTYPE_BYTES[dtype]].data
    arrays = partial(search_arrays, part, dtype, dtype, fmt, weights.data, 0)
    row["numpy"] = PEER_WEIGHTS / 1e6 / best(1, arrays)
    row["error"] = weighted_error(expected, raw, dtype, fmt, h)
    row["error"] /= weighted_error(own, raw, dtype, fmt, h)
    row["same"] = float(same)
    return row


def main() -> None:
    """Measure every format and print a table for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", nargs="+", default=["BF16"], choices=["BF16", "F16", "F32"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--millions", type=int, default=1)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    h = np.exp(random.standard_normal(COLUMNS)).astype(np.float32)
    document: dict[str, object] = {}
    for dtype in options.dtypes:
        values = random.standard_normal(options.millions << 20, dtype=np.float32)
        raw = from_float32(values * np.float32(0.02), dtype)
        rows = {fmt.label: measure(raw, dtype, fmt, h, options.runs) for fmt in FORMATS}
        print_table(f"search, {dtype}, million weights per second, one thread", rows)
        document[dtype] = rows
    keep("search", document)


if __name__ == "__main__":
    main()
