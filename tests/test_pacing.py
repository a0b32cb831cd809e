"""Threads and pieces within a memory budget, and what a process really occupies."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import SMALL, write_checkpoint, write_tensor_file
from packers import SCHEMES
from quantmill import coding, kernels, pacing
from quantmill.creation import create, on_device, plan
from quantmill.errors import BadRequest, OverBudget
from quantmill.opening import open_source
from quantmill.pacing import PIECE_BYTES, SMALLEST_PIECE, default_workers, pace, parse_memory
from quantmill.plans import Options, Plan
from quantmill.source import SourceTensor
from quantmill.store import Store
from test_adapters import peft_pair, write_peft

MEGABYTE = 1 << 20


@pytest.fixture
def small(tmp_path: Path) -> Plan:
    return plan(write_checkpoint(tmp_path / "c", SMALL), quantize="nvfp4")


def test_without_a_budget_every_processor_works(small: Plan) -> None:
    """One thread on each processor, with pieces of the usual size."""
    found = pace(small, {})
    assert found.workers == default_workers() >= 1
    assert found.piece_bytes == PIECE_BYTES


def test_a_smaller_budget_gives_fewer_threads_and_smaller_pieces(
    small: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both shrink, pieces stay powers of two, and the sum stays within the budget."""
    monkeypatch.setattr(pacing, "occupied", lambda: 50 * MEGABYTE)
    before = None
    for budget in (400, 120, 90, 80, 74, 70):
        found = pace(small, {}, 8, budget * MEGABYTE)
        assert found.piece_bytes & (found.piece_bytes - 1) == 0
        assert SMALLEST_PIECE <= found.piece_bytes <= PIECE_BYTES
        needed = found.workers * (2 * found.piece_bytes + 3 * MEGABYTE)
        assert 66 * MEGABYTE + needed <= budget * MEGABYTE
        assert before is None or found.workers <= before
        before = found.workers
    assert before == 1


def test_too_small_a_budget_names_the_least(small: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says which budget would do, and that one does."""
    monkeypatch.setattr(pacing, "occupied", lambda: 50 * MEGABYTE)
    with pytest.raises(OverBudget) as caught:
        pace(small, {}, 2, 60 * MEGABYTE)
    assert caught.value.exit_code == 4
    least = str(caught.value.hint).split()[1]
    assert pace(small, {}, 2, parse_memory(least)).workers == 1


def test_mlx_needs_more(small: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the kernels pieces are smaller, since MLX makes large arrays of them."""
    usual = pace(small, {}).piece_bytes
    monkeypatch.setattr(kernels, "in_use", lambda: kernels.MLX)
    assert pace(small, {}).piece_bytes < usual


@pytest.mark.parametrize(
    ("text", "count"),
    [("1000", 1000), ("2kB", 2000), ("200MB", 200_000_000), ("1GiB", 1 << 30), ("1.5G", 15 * 10**8),
     (" 3 mib ", 3 << 20)],
)  # fmt: skip
def test_amounts_of_memory(text: str, count: int) -> None:
    """Plain numbers and the usual units."""
    assert parse_memory(text) == count


@pytest.mark.parametrize("text", ["", "MB", "much", "-1GB", "0", "1TB2", "inf", "nan", "1e400"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    """Anything else is a ValueError."""
    with pytest.raises((ValueError, OverflowError)):
        parse_memory(text)


MEASURE = """
import sys
from quantmill.cli import run
from quantmill.pacing import occupied
code = run(["create", "m", sys.argv[1], "--store", sys.argv[2], "-q", sys.argv[3],
            "--memory", sys.argv[4], "--quiet"])
print(code, occupied())
"""


@pytest.mark.parametrize(("fmt", "budget"), [("int4", 64), ("nvfp4", 64), ("affine-3", 128)])
def test_a_process_stays_within_its_budget(tmp_path: Path, fmt: str, budget: int) -> None:
    """The real peak of a whole process is below what was asked for, the interpreter included."""
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": ("BF16", (2048, 4096)) for i in range(6)}
    write_tensor_file(folder / "model.safetensors", shapes)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, folder, tmp_path / "store", fmt, f"{budget}MiB"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    code, peak = map(int, done.stdout.split())
    assert code == 0, done.stderr
    assert peak <= budget * MEGABYTE


# -- weights that are quantized already ------------------------------------------------------------

UP = "model.layers.0.mlp.up_proj"


def coded(folder: Path, scheme: str, rows: int, columns: int, **options: Any) -> Path:
    """A checkpoint of one matrix for each of three layers."""
    modules = {UP.replace(".0.", f".{layer}."): (rows, columns) for layer in range(3)}
    return SCHEMES[scheme](np.random.default_rng(0), modules, **options).write(folder)


@pytest.mark.parametrize(
    ("scheme", "options", "budget"),
    [
        ("block_fp8", {}, 72),
        ("gptq", {"order": "activations", "group_size": 32}, 96),
        ("awq", {"group_size": 32}, 96),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_decoding_stays_within_a_budget(
    tmp_path: Path, scheme: str, options: dict[str, Any], budget: int
) -> None:
    """The peak of a process that decodes and quantizes again is below what was asked for."""
    folder = coded(tmp_path / "c", scheme, 2048, 4096, **options)
    program = MEASURE.replace('"-q"', '"--requantize"')
    done = subprocess.run(
        [sys.executable, "-c", program, folder, tmp_path / "store", "mxfp8", f"{budget}MiB"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    code, peak = map(int, done.stdout.split())
    assert code == 0, done.stderr
    assert peak <= budget * MEGABYTE


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("gptq", {"symmetric": False, "group_size": 32}),
        ("gptq", {"bits": 3, "order": "activations"}),
        ("gptq", {"bits": 8}),
        ("awq", {"group_size": 32}),
        ("awq", {"version": "gemv", "group_size": 32}),
        ("compressed_packed", {"symmetric": False, "group_size": 32}),
        ("block_fp8", {}),
    ],
    ids=str,
)
def test_what_reading_holds_is_no_more_than_counted(
    tmp_path: Path, scheme: str, options: dict[str, Any]
) -> None:
    """With the smallest pieces, what decoding allocates is what is counted, and not half of it."""
    folder = coded(tmp_path / "c", scheme, 1024, 4096, **options)
    spec = next(t for t in plan(folder, requantize="bf16").tensors if UP in t.name)
    with open_source(folder) as source:
        tensors = source.source.tensors
        sources = [tensors[name] for name in spec.sources]
        held = coding.held_bytes(spec, tensors)
        tracemalloc.start()
        for _ in coding.numbers(spec, sources, source.read_into, SMALLEST_PIECE):
            pass
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert held / 2 <= peak <= held + 20 * SMALLEST_PIECE


def test_a_matrix_that_is_held_whole_must_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPTQ's codes run across the rows: a budget without room for all of them is refused."""
    monkeypatch.setattr(pacing, "occupied", lambda: 50 * MEGABYTE)
    gptq = coded(tmp_path / "gptq", "gptq", 4096, 4096)
    with open_source(gptq) as source:
        tensors = source.source.tensors
    decided = plan(gptq)
    assert tensors[f"{UP}.qweight"].nbytes == 8 * MEGABYTE
    with pytest.raises(OverBudget) as caught:
        pace(decided, tensors, 1, 74 * MEGABYTE)
    least = parse_memory(str(caught.value.hint).split()[1])
    assert pace(decided, tensors, 2, least).workers == 1
    assert pace(decided, tensors, 2, 2 * least).workers == 2


def test_factors_of_adapters_must_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both factors of a change are held in float32, whatever rank they have."""
    monkeypatch.setattr(pacing, "occupied", lambda: 50 * MEGABYTE)
    base = write_checkpoint(tmp_path / "base", SMALL)
    module = "model.layers.0.self_attn.q_proj"
    rows, columns = SMALL[f"{module}.weight"][1]
    adapter = write_peft(tmp_path / "a", peft_pair(module, rows, columns))
    decided = plan(base, merge_lora=adapter)
    low = next(low for t in decided.tensors for low in t.added if low)
    small, large = (
        {name: SourceTensor(name, "BF16", (rank, 4096)) for name in (low.left, low.right)}
        for rank in (4, 512)
    )
    budget = 90 * MEGABYTE
    assert pace(decided, small, 1, budget).workers == 1
    with pytest.raises(OverBudget):
        pace(decided, large, 1, budget)


def test_scales_of_a_large_tensor_do_not_gather_in_memory(tmp_path: Path) -> None:
    """Writing scales ahead into their place gives the bytes that keeping them would give."""
    name = "model.layers.0.mlp.up_proj.weight"
    source = write_checkpoint(tmp_path / "c", {name: ("BF16", (8192, 4096))})
    from quantmill import execute

    ahead = create("a", source, store=Store(tmp_path / "a"), quantize="affine-2", group_size=32)
    assert ahead.plan.blobs[0].tensors[0].elements // 32 * 2 > execute.LARGEST_TAIL
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "LARGEST_TAIL", 1 << 30)
        kept = create("b", source, store=Store(tmp_path / "b"), quantize="affine-2", group_size=32)
    assert ahead.digest == kept.digest


# -- devices ---------------------------------------------------------------------------------------


def test_no_gpu_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking for a GPU where MLX has none is refused before anything is read."""
    from quantmill import mlxquantize

    monkeypatch.setattr(mlxquantize, "gpu_name", lambda: None)
    with pytest.raises(BadRequest, match="no GPU") as caught:
        on_device("gpu", Options())
    assert "--profile gpu" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["metal", "cuda"])
def test_a_gpu_does_the_work_and_is_reported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a device (here MLX's CPU under its name) MLX quantizes, and the model says who did."""
    import mlx.core as mx

    from quantmill import mlxquantize

    streams: list[object] = []

    class Devices:
        """MLX, with a list of devices that holds a GPU."""

        cpu = mx.cpu
        gpu = mx.cpu

        def __getattr__(self, attribute: str) -> object:
            return getattr(mx, attribute)

        def stream(self, device: object) -> object:
            streams.append(device)
            return mx.stream(mx.cpu)

    monkeypatch.setattr(mlxquantize, "mx", Devices())
    monkeypatch.setattr(mlxquantize, "gpu_name", lambda: name)
    source = write_checkpoint(tmp_path / "c", SMALL)
    store = Store(tmp_path / "store")
    made = create("m", source, store=store, quantize="int4", device="gpu", workers=1)
    assert made.plan.options.profile == name
    assert streams
    manifest = store.get_manifest(made.name)
    assert manifest.config is not None
    config = json.loads(store.read_blob(manifest.config.digest, 1 << 20))
    assert config["quantmill"] == {"profile": name}
    usual = create("n", source, store=store, quantize="int4")
    blobs = [r.digest for r in manifest.tensor_refs()]
    assert blobs == [r.digest for r in store.get_manifest(usual.name).tensor_refs()]


def test_a_gpu_rounds_up_only() -> None:
    """The GPU kernels have one rounding of exponents; the other is refused."""
    from quantmill.formats import MXFP4
    from quantmill.mlxquantize import quantize_on_gpu

    with pytest.raises(BadRequest, match="rounds exponents up"):
        quantize_on_gpu(memoryview(bytes(64)), "BF16", MXFP4, rounding="nearest")
