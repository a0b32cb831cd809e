"""The kernels against MLX's own quantizer, one thread each, in turn.

Random BF16, F16 or F32 weights in rows of 1024 are quantized and dequantized by every
implementation that this processor has and by `mx.quantize` and `mx.dequantize` on the CPU. Each
runs several times; the best counts, since other work on the machine can only slow one down. Speeds
are gigabytes of unquantized weights per second. `same` is 1 where codes, scales and biases equal
MLX's byte for byte. Results also go to bench-results/kernels.json.

    python benchmarks/bench_kernels.py [--dtypes BF16 F16 F32] [--runs 5] [--megabytes 8 64]

Eight megabytes stay in the cache, as the pieces of a `create` do; 64 come from memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from results import Row, keep, print_table

from quantmill import _native, kernels
from quantmill.elements import Bytes, from_float32
from quantmill.formats import AFFINE_BITS, DTYPE_BYTES, INT4, MXFP4, MXFP8, NVFP4, Format
from quantmill.mlxquantize import quantize_on_cpu
from quantmill.weights import Quantized

FORMATS = [Format("affine", bits, 64) for bits in AFFINE_BITS] + [MXFP4, MXFP8, NVFP4]
MLX_BYTES = {"affine": 32 << 20, "mxfp8": 32 << 20, "mxfp4": 2 << 20, "nvfp4": 2 << 20}
"""MLX's slow paths get less, or this would take minutes."""


def best(runs: int, action: Callable[[], object]) -> float:
    """Seconds of the fastest of several runs."""
    found = float("inf")
    for _ in range(runs):
        started = time.perf_counter()
        action()
        found = min(found, time.perf_counter() - started)
    return found


def room(nbytes: int, dtype: str, fmt: Format) -> Quantized:
    """Space for the results, touched already: fresh memory is slow the first time."""
    count = nbytes // DTYPE_BYTES[dtype]
    scale_bytes = count // fmt.group_size * DTYPE_BYTES[fmt.scale_dtype(dtype)]
    sizes = (count * fmt.bits // 8, scale_bytes, scale_bytes if fmt.has_bias else 0)
    # NumPy's large arrays lie in large pages, as the weights here do
    codes, scales, biases = (np.ones(size, np.uint8).data for size in sizes)
    return Quantized(codes, scales, biases)


def mlx_array(part: Bytes, dtype: str, width: int) -> mx.array:
    """Raw bytes as an MLX array of rows."""
    kinds: dict[str, npt.DTypeLike] = {"F16": np.float16, "F32": np.float32, "U32": np.uint32}
    if dtype == "BF16":
        return mx.array(part.view(np.uint16).reshape(-1, width)).view(mx.bfloat16)
    return mx.array(part.view(kinds.get(dtype, np.uint8)).reshape(-1, width))


def measure_format(raw: Bytes, dtype: str, fmt: Format, runs: int) -> tuple[Row, Row]:
    """Speeds and ratios of quantizing and of dequantizing."""
    out, part = room(raw.size, dtype, fmt), raw[: MLX_BYTES[fmt.mode]]
    array = mlx_array(part, dtype, 1024)
    kind: dict[str, Any] = {"group_size": fmt.group_size, "bits": fmt.bits, "mode": fmt.mode}
    mx.eval(array)
    seconds = best(runs, lambda: mx.eval(mx.quantize(array, **kind)))
    there: Row = {"mlx": part.size / seconds / 1e9}
    expected = quantize_on_cpu(part.data, dtype, fmt)
    packed = mx.quantize(array, **kind)
    mx.eval(packed)
    value = dtype if fmt.mode == "affine" else "BF16"
    value_bytes = part.size // DTYPE_BYTES[dtype] * DTYPE_BYTES[value]
    seconds = best(runs, lambda: mx.eval(mx.dequantize(*packed, **kind)))
    back: Row = {"mlx": value_bytes / seconds / 1e9}
    decoded = np.empty(value_bytes, np.uint8)
    assert out.biases is not None
    biases = expected.biases if expected.biases is not None else memoryview(b"")
    same = True
    quantizer: Callable[..., object] = _native.quantize
    dequantizer: Callable[..., object] = _native.dequantize
    for kernel in kernels.list_kernels():
        if kernel.name in {kernels.MLX, "exact"} or not kernel.supported:
            continue
        work: tuple[Any, ...] = (
            raw,
            dtype,
            fmt.mode,
            fmt.bits,
            fmt.group_size,
            1.0,
            out.weight,
            out.scales,
        )
        seconds = best(runs, partial(quantizer, *work, out.biases, kernel.name))
        there[kernel.name] = raw.size / seconds / 1e9
        there[f"{kernel.name}/mlx"] = there[kernel.name] / there["mlx"]
        same = same and equal(out, expected)
        codes = (expected.weight, expected.scales, biases)
        how: tuple[Any, ...] = (value, fmt.mode, fmt.bits, fmt.group_size, decoded, kernel.name)
        seconds = best(runs, partial(dequantizer, *codes, *how))
        back[kernel.name] = value_bytes / seconds / 1e9
        back[f"{kernel.name}/mlx"] = back[kernel.name] / back["mlx"]
    there["same"] = float(same)
    return there, back


def equal(found: Quantized, expected: Quantized) -> bool:
    """Whether the beginning of a result is another one's bytes."""
    pairs = [(found.weight, expected.weight), (found.scales, expected.scales)]
    if expected.biases is not None and found.biases is not None:
        pairs.append((found.biases, expected.biases))
    return all(a[: b.nbytes] == b for a, b in pairs)


def main() -> None:
    """Measure every format and print two tables for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", nargs="+", default=["BF16"], choices=["BF16", "F16", "F32"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[8, 64])
    options = parser.parse_args()
    mx.set_default_device(mx.cpu)
    document: dict[str, object] = {}
    for dtype, megabytes in product(options.dtypes, options.megabytes):
        count = (megabytes << 20) // DTYPE_BYTES[dtype]
        values = np.random.default_rng(0).standard_normal(count, dtype=np.float32)
        raw = from_float32(values * np.float32(0.02), dtype)
        formats = [*FORMATS, Format("affine", 4, 32)] if dtype == "BF16" else [INT4, MXFP8, NVFP4]
        found = {fmt.label: measure_format(raw, dtype, fmt, options.runs) for fmt in formats}
        there = {label: rows[0] for label, rows in found.items()}
        back = {label: rows[1] for label, rows in found.items()}
        print_table(f"quantize {megabytes} MiB of {dtype}, GB/s of weights, one thread", there)
        print_table(f"dequantize to {dtype}, GB/s of weights, one thread", back)
        document[f"{dtype}, {megabytes} MiB"] = {"quantize": there, "dequantize": back}
    keep("kernels", document)


if __name__ == "__main__":
    main()
