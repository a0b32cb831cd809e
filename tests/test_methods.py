"""Models made by other methods than rounding to nearest: same files, less lost, same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import SMALL, write_checkpoint
from decoded import in_float32
from fakes import paces
from quantmill import open_model
from quantmill.cli import run
from quantmill.creation import create
from quantmill.importance import importance
from quantmill.opening import open_source
from quantmill.plans import Options
from quantmill.store import Store
from test_weightings import LAYER, LLAMA, TENSORS

SEARCH = Options(method="search")
FORMATS = ["int4", "int8", "affine-3", "affine-6", "nvfp4", "mxfp4", "mxfp8"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", TENSORS, LLAMA)


def make(root: Path, source: Path, options: Options = SEARCH, **choices: Any) -> Any:
    return create("m", source, store=Store(root), options=options, **choices)


@pytest.mark.parametrize("quantize", FORMATS)
def test_files_have_the_same_shapes_and_sizes(tmp_path: Path, source: Path, quantize: str) -> None:
    """Names, dtypes, shapes and bytes of every tensor are those of rounding to nearest."""
    searched = make(tmp_path / "s", source, quantize=quantize)
    rounded = make(tmp_path / "r", source, Options(), quantize=quantize)
    assert [t.stored for t in searched.plan.tensors] == [t.stored for t in rounded.plan.tensors]
    assert searched.plan.blob_bytes == rounded.plan.blob_bytes
    assert open_model("m", store=Store(tmp_path / "s")).quantization


@pytest.mark.parametrize("quantize", FORMATS)
def test_the_weighted_error_is_never_above_that_of_rounding(
    tmp_path: Path, source: Path, quantize: str
) -> None:
    """Of every tensor that is searched, each group counted by its importance."""
    made = make(tmp_path / "s", source, quantize=quantize)
    make(tmp_path / "r", source, Options(), quantize=quantize)
    searched, rounded = (open_model("m", store=Store(tmp_path / n)) for n in ("s", "r"))
    better = 0
    with open_source(source) as opened:
        for spec in made.plan.tensors:
            if spec.method != "search":
                continue
            raw = bytearray(opened.source.tensors[spec.name].nbytes)
            opened.read_into(opened.source.tensors[spec.name], 0, memoryview(raw))
            if spec.dtype != "BF16":
                continue
            exact = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
            exact = exact.reshape(spec.shape)
            weights = importance(
                spec.weightings[0] if spec.weightings else None, spec.shape[-1], opened
            ).astype(np.float64)
            group = spec.format.group_size
            errors = []
            for model in (searched, rounded):
                off = np.square(in_float32(model, spec.name) - exact) * weights
                errors.append(off.reshape(-1, group).sum(axis=1))
            assert np.all(errors[0] <= errors[1] * (1 + 1e-6))
            better += int(errors[0].sum() < errors[1].sum())
    assert better or quantize == "mxfp8"


def test_bytes_depend_on_no_thread_and_no_piece(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker or three, whole tensors or pieces of a few rows: the same digest."""
    digests = {
        make(tmp_path / label, source, quantize="int4", workers=workers).digest
        for label, workers in paces(monkeypatch)
    }
    assert len(digests) == 1


def test_another_method_is_another_model(tmp_path: Path, source: Path) -> None:
    """Notes on blobs of one method are not used for another; the config says which it was."""
    store = Store(tmp_path / "s")
    first = create("a", source, store=store, options=SEARCH, quantize="int4")
    second = create("b", source, store=store, quantize="int4")
    again = create("c", source, store=store, options=SEARCH, quantize="int4")
    assert first.digest != second.digest
    assert (again.digest, again.new_blobs) == (first.digest, 0)


def test_a_changed_norm_is_noticed(tmp_path: Path, source: Path) -> None:
    """What weighs a tensor is part of what its note is about."""
    store = Store(tmp_path / "s")
    first = create("a", source, store=store, options=SEARCH, quantize="int4")
    path = source / "model.safetensors"
    data = bytearray(path.read_bytes())
    with open_source(source) as opened:
        start = opened.source.tensors[f"{LAYER}input_layernorm.weight"].start
    data[start : start + 256 : 4] = bytes(64)
    path.write_bytes(bytes(data))
    assert create("a", source, store=store, options=SEARCH, quantize="int4").digest != first.digest


def test_the_command_takes_a_method(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--method search`, recorded in the model; beside another rounding it is refused."""
    store = ["--store", str(tmp_path / "s")]
    command = ["create", "m", str(source), "-q", "int4", "--method", "search", *store]
    assert run(["plan", str(source), "-q", "int4", "--method", "search"]) == 0
    told = "method search for 7 of 7 quantized tensors, columns weighed in 7"
    assert told in capsys.readouterr().out
    assert run(command) == 0
    assert told in capsys.readouterr().out
    assert run(["show", "m", "--json", *store]) == 0
    assert '"method": "search"' in capsys.readouterr().out
    assert run([*command, "--e8m0", "nearest"]) == 2
    assert "leave out" in capsys.readouterr().err
    assert run(["create", "m", str(source), "-q", "int4", "--method", "magic", *store]) == 2


def test_an_unknown_architecture_is_searched_where_that_helps(tmp_path: Path) -> None:
    """Without weights of columns int8 is searched, int4 is not."""
    source = write_checkpoint(tmp_path / "c", SMALL, {"model_type": "unheard of"})
    for quantize, same in (("int4", True), ("int8", False)):
        one = make(tmp_path / f"s{quantize}", source, quantize=quantize)
        two = make(tmp_path / f"r{quantize}", source, Options(), quantize=quantize)
        refs = [
            {
                r.digest
                for r in Store(tmp_path / f"{k}{quantize}").get_manifest(m.name).tensor_refs()
            }
            for k, m in (("s", one), ("r", two))
        ]
        if same:
            methods = {t.method for t in one.plan.tensors if t.format and t.format.bits == 4}
            assert methods == {"rtn"}
        else:
            assert refs[0] != refs[1]
