"""`create`: from directory to store. What is written, what is refused, what is left behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import reference
from checkpoints import (
    SMALL,
    fixture,
    load_arrays,
    tensor_bytes,
    write_checkpoint,
    write_tensor_file,
)
from quantmill import mediatypes
from quantmill.checkpoint import open_checkpoint
from quantmill.creation import create, plan, read_modelfile
from quantmill.errors import BadSource, BadWeights
from quantmill.execute import Progress, write_blobs
from quantmill.facts import show
from quantmill.formats import FORMAT_NAMES, parse_format
from quantmill.manifest import Manifest
from quantmill.names import parse_name
from quantmill.pacing import Pace
from quantmill.planner import parse_override
from quantmill.plans import Options, plan_from_json, plan_to_json
from quantmill.pruning import prune
from quantmill.quantize import quantize
from quantmill.store import Store
from quantmill.tensorfile import lay_out
from quantmill.verification import read_tensor_file, verify

NAME = parse_name("m")


def snapshot(store: Store) -> dict[str, bytes]:
    """Every file below the store, the lock and journals aside."""
    return {
        str(path.relative_to(store.root)): path.read_bytes()
        for path in sorted(store.root.rglob("*"))
        if path.is_file() and ".quantmill" not in str(path)
    }


def blob(store: Store, manifest: Manifest, name: str) -> bytes:
    ref = next(r for r in manifest.blobs if r.name == name)
    return store.blob_path(ref.digest).read_bytes()


def stored_array(store: Store, manifest: Manifest, blob_name: str, tensor: str) -> bytes:
    ref = next(r for r in manifest.blobs if r.name == blob_name)
    entry = read_tensor_file(store, ref).entries[tensor]
    return blob(store, manifest, blob_name)[entry.start : entry.end]


# -- one input, one digest -------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [None, *FORMAT_NAMES])
def test_the_digest_depends_on_neither_workers_nor_run(
    tmp_path: Path, quantize: str | None
) -> None:
    """Two runs, with one worker and with several, give the same manifest digest."""
    source = fixture("hf-qwen3-moe-bf16")
    digests = {
        create("m", source, store=Store(tmp_path / str(n)), quantize=quantize, workers=n).digest
        for n in (1, 3)
    }
    assert len(digests) == 1


def test_the_digest_does_not_depend_on_how_tensors_are_spread(tmp_path: Path) -> None:
    """One file, and two orders of shards, give the same blobs and the same manifest."""
    write_checkpoint(tmp_path / "one", SMALL)
    names = list(SMALL)
    for folder, first in (("ab", names[:2]), ("ba", names[2:])):
        target = tmp_path / folder
        write_checkpoint(target, SMALL)
        (target / "model.safetensors").unlink()
        second = [n for n in names if n not in first]
        shards = {"model-00001-of-00002.safetensors": first,
                  "model-00002-of-00002.safetensors": second}  # fmt: skip
        for shard, held in shards.items():
            write_tensor_file(target / shard, {n: SMALL[n] for n in reversed(held)})
        weight_map = {n: shard for shard, held in shards.items() for n in held}
        (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    made = [
        create("m", tmp_path / f, store=Store(tmp_path / f"store-{f}"), quantize="int4").digest
        for f in ("one", "ab", "ba")
    ]
    assert made[0] == made[1] == made[2]


def test_creating_again_writes_nothing_new(store: Store) -> None:
    """A second create of the same model finds every blob there and changes no byte."""
    create("m", fixture("hf-llama-bf16"), store=store, quantize="int8")
    before = snapshot(store)
    again = create("m", fixture("hf-llama-bf16"), store=store, quantize="int8")
    assert again.new_blobs == 0
    assert snapshot(store) == before


def test_models_share_what_is_equal(store: Store) -> None:
    """Two formats of one model store tensors that neither quantizes only once."""
    create("m:int4", fixture("hf-llama-bf16"), store=store, quantize="int4")
    second = create("m:int8", fixture("hf-llama-bf16"), store=store, quantize="int8")
    assert second.new_blobs < len(second.plan.blobs)


# -- what is stored --------------------------------------------------------------------------------


def test_a_large_tensor_is_quantized_as_if_at_once(store: Store, tmp_path: Path) -> None:
    """Streaming in pieces gives the bytes that quantizing the whole tensor gives."""
    shape = (520, 4096)  # two pieces for every format, the second one partial
    name = "model.layers.0.self_attn.q_proj.weight"
    source = write_checkpoint(tmp_path / "big", {name: ("BF16", shape)})
    made = create("m", source, store=store, quantize="affine-6")
    raw = np.frombuffer(tensor_bytes("BF16", shape, sum(name.encode())), np.uint16)
    manifest = store.get_manifest(made.name)
    whole = quantize(raw.view(np.uint8).data, "BF16", parse_format("affine-6"))
    assert whole.biases is not None
    assert stored_array(store, manifest, name, name) == whole.weight.tobytes()
    assert stored_array(store, manifest, name, f"{name}.scale") == whole.scales.tobytes()
    assert stored_array(store, manifest, name, f"{name}.bias") == whole.biases.tobytes()


def test_experts_are_stacked_in_numeric_order(store: Store, tmp_path: Path) -> None:
    """Expert 10 follows expert 9, not expert 1."""
    group = "model.layers.0.mlp.experts"
    experts = {f"{group}.{i}.up_proj.weight": ("BF16", (2, 32)) for i in range(12)}
    source = write_checkpoint(tmp_path / "moe", experts)
    made = create("m", source, store=store)
    manifest = store.get_manifest(made.name)
    stacked = stored_array(store, manifest, group, f"{group}.up_proj.weight")
    names = [f"{group}.{i}.up_proj.weight" for i in range(12)]
    assert stacked == b"".join(tensor_bytes("BF16", (2, 32), sum(n.encode())) for n in names)


def test_other_widths_record_what_a_loader_needs(store: Store) -> None:
    """An affine width without a name of its own is stored as mode, bits and group size."""
    made = create("m", fixture("hf-llama-bf16"), store=store, quantize="affine-3", group_size=32)
    ref = next(r for r in store.get_manifest(made.name).blobs if "q_proj" in (r.name or ""))
    metadata = read_tensor_file(store, ref).metadata
    assert dict(metadata) == {"quant_type": "affine", "bits": "3", "group_size": "32"}


def test_nearest_rounding_changes_bytes_and_is_recorded(store: Store) -> None:
    """The option is stored with the model, and the default leaves no trace."""
    default = create("m:ceil", fixture("hf-llama-bf16"), store=store, quantize="mxfp4")
    nearest = create(
        "m:nearest", fixture("hf-llama-bf16"), store=store, quantize="mxfp4",
        options=Options(rounding="nearest"),
    )  # fmt: skip
    assert default.digest != nearest.digest
    assert show(store, default.name).recorded == {}
    assert show(store, nearest.name).recorded == {"e8m0": "nearest"}


def test_the_gpu_profile_changes_bytes_and_is_recorded(store: Store) -> None:
    """The rounding profile is stored with the model; the default one leaves no trace."""
    cpu = create("m:cpu", fixture("hf-llama-bf16"), store=store, quantize="mxfp4")
    gpu = create(
        "m:gpu", fixture("hf-llama-bf16"), store=store, quantize="mxfp4",
        options=Options(profile="gpu"),
    )  # fmt: skip
    assert cpu.digest != gpu.digest
    assert show(store, gpu.name).recorded == {"profile": "gpu"}
    assert not verify(store).damage


def test_a_global_scale_is_the_maximum_over_2688(store: Store) -> None:
    """An nvfp4 tensor with a global scale decodes, with it, close to its source."""
    name = "model.layers.0.self_attn.q_proj.weight"
    made = create(
        "m", fixture("hf-llama-bf16"), store=store, quantize="nvfp4",
        options=Options(global_scale=True),
    )  # fmt: skip
    manifest = store.get_manifest(made.name)
    source = source_array(name)
    stored = np.frombuffer(stored_array(store, manifest, name, f"{name}.global_scale"), np.float32)
    assert stored[0] == np.float32(np.abs(source).max() / 2688)
    words = np.frombuffer(stored_array(store, manifest, name, name), np.uint32).reshape(128, -1)
    scales = np.frombuffer(stored_array(store, manifest, name, f"{name}.scale"), np.uint8)
    packed = reference.Packed(words, scales.reshape(128, -1), None)
    decoded = reference.dequantize_float(packed, "nvfp4").astype(np.float32) * stored[0]
    assert np.abs(decoded - source).max() <= np.abs(source).max() / 6


def source_array(name: str) -> Any:
    arrays = load_arrays(fixture("hf-llama-bf16") / "model.safetensors")
    return np.array(arrays[name].astype(mx.float32))


def test_runtime_files_are_kept_beside_the_json_files(store: Store, tmp_path: Path) -> None:
    """Chat templates, tokenizer files and module configs come along; code and readmes do not."""
    source = write_checkpoint(
        tmp_path / "c", SMALL, chat_template__jinja="<think></think>", tokenizer__model="x",
        README__md="#", modeling__py="raise SystemExit", modules__json="[]",
    )  # fmt: skip
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    made = create("m", source, store=store)
    kept = {r.name: r.media_type for r in store.get_manifest(made.name).blobs}
    assert kept["chat_template.jinja"] == kept["tokenizer.model"] == mediatypes.FILE
    assert kept["1_Pooling/config.json"] == kept["config.json"] == mediatypes.JSON
    left_out = {f.name for f in made.plan.files if f.media_type is None}
    assert left_out == {"README.md", "modeling.py"}
    assert "thinking" in show(store, made.name).capabilities


def test_vision_and_audio_towers_are_kept(store: Store, tmp_path: Path) -> None:
    """Towers are imported, at source precision, and show as capabilities."""
    tensors = {
        "model.visual.blocks.0.attn.qkv.weight": ("BF16", (128, 128)),
        "model.audio_tower.layers.0.fc1.weight": ("F32", (128, 128)),
        **SMALL,
    }
    config = {"model_type": "x", "vision_config": {}, "audio_config": {}}
    made = create(
        "m", write_checkpoint(tmp_path / "c", tensors, config), store=store, quantize="int8"
    )
    facts = show(store, made.name)
    kept = {t.name for t in facts.tensors if t.format is None}
    assert {name for name in tensors if "visual" in name or "audio" in name} <= kept
    assert facts.capabilities == ("completion", "vision", "audio")


def test_a_modelfile_adds_its_entries_and_overrides_inference(store: Store, tmp_path: Path) -> None:
    """Template, system, licences and parameters follow the files; parser and version are set."""
    text = (
        'FROM .\nTEMPLATE """{{ .Prompt }}"""\nSYSTEM be brief\nLICENSE MIT\n'
        "PARAMETER temperature 0.5\nPARAMETER stop END\nPARSER qwen3\nREQUIRES 0.20.1\n"
    )
    source = write_checkpoint(tmp_path / "c", SMALL)
    (source / "Modelfile").write_text(text)
    parsed, folder = read_modelfile(source / "Modelfile")
    made = create("m", folder, store=store, modelfile=parsed)
    manifest = store.get_manifest(made.name)
    added = [(r.media_type, store.read_blob(r.digest, 1000)) for r in manifest.blobs[-4:]]
    assert added == [
        (mediatypes.TEMPLATE, b"{{ .Prompt }}"),
        (mediatypes.SYSTEM, b"be brief"),
        (mediatypes.LICENSE, b"MIT"),
        (mediatypes.PARAMS, b'{"stop":["END"],"temperature":0.5}\n'),
    ]
    facts = show(store, made.name)
    assert (facts.parser, facts.requires) == ("qwen3", "0.20.1")
    assert facts.capabilities == ("completion", "tools")


def test_progress_ends_at_the_totals(store: Store) -> None:
    """The last event has every tensor and every source byte done."""
    events: list[Progress] = []
    create("m", fixture("hf-llama-bf16"), store=store, quantize="int4", progress=events.append)
    last = events[-1]
    assert (last.tensors, last.bytes) == (last.tensors_total, last.bytes_total)
    assert [e.bytes for e in events] == sorted(e.bytes for e in events)


def test_plan_and_create_agree(store: Store) -> None:
    """What `plan` forecasts is what `create` writes, to the byte."""
    source = fixture("hf-qwen3_5-moe-bf16")
    forecast = plan(source, quantize="nvfp4")
    made = create("m", source, store=store, quantize="nvfp4")
    assert made.plan == forecast
    sizes = {r.name: r.size for r in store.get_manifest(made.name).tensor_refs()}
    assert sizes == {b.name: b.size for b in forecast.blobs}


def test_a_plan_that_went_through_json_writes_the_same_blobs(tmp_path: Path) -> None:
    """The plan alone decides: read back from JSON, it gives the same digests."""
    source = fixture("hf-qwen3-moe-bf16")
    decided = plan(source, quantize="mxfp8")
    again = plan_from_json(json.loads(json.dumps(plan_to_json(decided))))
    refs = []
    for number, one in enumerate((decided, again)):
        with open_checkpoint(source) as checkpoint:
            store = Store(tmp_path / str(number))
            refs.append(write_blobs(one, checkpoint, store, pace=Pace(2, 1 << 16)).refs)
    assert refs[0] == refs[1]


# -- what is refused -------------------------------------------------------------------------------


def broken_weights(folder: Path, value: int) -> Path:
    source = write_checkpoint(folder, SMALL)
    name = "model.layers.0.mlp.down_proj.weight"
    path = source / "model.safetensors"
    data = bytearray(path.read_bytes())
    _, entries = lay_out([(n, d, s) for n, (d, s) in SMALL.items()], {})
    data[entries[name].start : entries[name].start + 2] = value.to_bytes(2, "little")
    path.write_bytes(data)
    return source


@pytest.mark.parametrize("value", [0x7FC0, 0x7F80, 0xFF80], ids=["nan", "inf", "-inf"])
def test_non_finite_weights_are_refused_by_name(store: Store, tmp_path: Path, value: int) -> None:
    """NaN and infinity stop a quantizing create by name and leave the store as it was."""
    source = broken_weights(tmp_path / "c", value)
    with pytest.raises(BadWeights, match=r"down_proj\.weight") as caught:
        create("m", source, store=store, quantize="int4")
    assert "--allow-non-finite" in str(caught.value.hint)
    assert not store.list_names()
    prune(store, 0)
    assert snapshot(store) == {}


def test_non_finite_weights_can_be_allowed(store: Store, tmp_path: Path) -> None:
    """When asked for, the tensor is quantized all the same and the count reported."""
    source = broken_weights(tmp_path / "c", 0x7FC0)
    options = Options(allow_non_finite=True)
    made = create("m", source, store=store, quantize="int4", options=options)
    assert made.non_finite == (("model.layers.0.mlp.down_proj.weight", 1),)
    assert show(store, made.name).recorded == {"allow_non_finite": True}


def test_non_finite_weights_are_copied_exactly_when_kept(store: Store, tmp_path: Path) -> None:
    """Without quantization every bit of a NaN survives."""
    source = broken_weights(tmp_path / "c", 0x7FC1)
    made = create("m", source, store=store)
    name = "model.layers.0.mlp.down_proj.weight"
    stored = stored_array(store, store.get_manifest(made.name), name, name)
    assert stored[:2] == (0x7FC1).to_bytes(2, "little")


def test_a_broken_side_file_is_refused_before_writing(store: Store, tmp_path: Path) -> None:
    """A JSON file that is not JSON is named, and no blob is written."""
    source = write_checkpoint(tmp_path / "c", SMALL, generation_config__json="{")
    with pytest.raises(BadSource, match=r"generation_config\.json"):
        create("m", source, store=store)
    assert not store.root.exists()


def test_a_source_that_changes_meanwhile_is_refused(store: Store, tmp_path: Path) -> None:
    """Writing to a shard while it is read is noticed before the manifest is written."""
    source = write_checkpoint(tmp_path / "c", SMALL)

    def touch(event: Progress) -> None:
        os.utime(source / "model.safetensors", (1, 1))

    with pytest.raises(BadSource, match="changed while it was read"):
        create("m", source, store=store, progress=touch)
    assert not store.list_names()


def test_a_failed_create_leaves_the_former_model(store: Store, tmp_path: Path) -> None:
    """A name keeps pointing to what it pointed to until the new model is complete."""
    create("m", write_checkpoint(tmp_path / "good", SMALL), store=store)
    before = snapshot(store)
    with pytest.raises(BadWeights):
        create("m", broken_weights(tmp_path / "bad", 0x7F80), store=store, quantize="int8")
    prune(store, 0)
    assert snapshot(store) == before


def test_a_blob_collected_meanwhile_stops_the_manifest(store: Store, tmp_path: Path) -> None:
    """If another program removes a fresh blob, the model is not published without it."""
    source = write_checkpoint(tmp_path / "c", SMALL)
    names = iter(["first"])

    class Thief(Store):
        def blob_size(self, digest: Any) -> int:
            if next(names, None):
                self.remove_blob(digest)
            return super().blob_size(digest)

    thief = Thief(store.root)
    with pytest.raises(Exception, match="gone or changed"):
        create("m", source, store=thief)
    assert not store.list_names()


# -- interruption and company ----------------------------------------------------------------------

CHILD = """
import sys
from quantmill.cli import main
sys.argv = ["quantmill", *sys.argv[1:]]
main()
"""


def big_checkpoint(folder: Path, layers: int = 24) -> Path:
    names = {
        f"model.layers.{i}.self_attn.q_proj.weight": ("BF16", (512, 512)) for i in range(layers)
    }
    return write_checkpoint(folder, names)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminate"])
def test_an_interrupted_create_leaves_nothing_prune_does_not_remove(
    store: Store, tmp_path: Path, how: signal.Signals
) -> None:
    """After an interrupt there is no model, no temporary file, and prune empties the store."""
    source = big_checkpoint(tmp_path / "c")
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, "create", "m", str(source), "-q", "nvfp4",
         "--store", str(store.root), "--workers", "1"],
        stderr=subprocess.PIPE, text=True, env=os.environ | {"QUANTMILL_KERNELS": "mlx"},
    )  # fmt: skip
    while not list(store.blobs.glob("sha256-*")) and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(how)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == (130 if how == signal.SIGINT else 143), errors
    assert "Traceback" not in errors
    assert not list(store.blobs.glob("sha256-tmp-*"))
    assert not store.list_names()
    prune(store, 0)
    assert snapshot(store) == {}


def test_two_creates_at_once_do_not_hurt_each_other(store: Store, tmp_path: Path) -> None:
    """Two processes importing the same checkpoint under two names both end with a whole model."""
    source = big_checkpoint(tmp_path / "c", layers=8)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, "create", name, str(source), "-q", "int4",
             "--store", str(store.root)],
        )
        for name in ("a", "b")
    ]  # fmt: skip
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    found = verify(store)
    assert (found.models, found.damage) == (2, ())
    assert not list(store.blobs.glob("sha256-tmp-*"))


def test_threads_of_one_process_can_create_at_once(store: Store, tmp_path: Path) -> None:
    """The library call may run in several threads on one store."""
    source = write_checkpoint(tmp_path / "c", SMALL)
    threads = [
        threading.Thread(target=create, args=(f"m{i}", source), kwargs={"store": store})
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verify(store).models == 4
    assert not verify(store).damage


MEASURE = """
import re, resource, sys
from pathlib import Path
from quantmill.creation import create
from quantmill.store import Store
create("m", sys.argv[1], store=Store(sys.argv[2]), quantize="int4", workers=1)
status = Path("/proc/self/status")
if status.exists():  # ru_maxrss would count what the parent held when it started this process
    print(int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1]) * 1024)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_memory(source: Path, store: Path) -> int:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(source), str(store)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout)


def test_peak_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A model four times as large, in tensors four times as large, needs no more memory."""
    peaks = []
    for rows in (4096, 16384):
        name = "model.layers.0.self_attn.q_proj.weight"
        source = tmp_path / str(rows)
        source.mkdir()
        (source / "config.json").write_text("{}")
        shape = (rows, 4096)
        header, _ = lay_out([(name, "BF16", shape)], {})
        with (source / "model.safetensors").open("wb") as file:
            file.write(header)
            block = tensor_bytes("BF16", (1024, 4096))
            for _ in range(rows // 1024):
                file.write(block)
        peaks.append(peak_memory(source, tmp_path / f"store-{rows}"))
        shutil.rmtree(source)
    grown = 12288 * 4096 * 2
    assert peaks[1] - peaks[0] < grown / 4


def test_the_limit_of_open_files_is_respected(store: Store, tmp_path: Path) -> None:
    """Hundreds of blobs do not hold hundreds of files open."""
    tensors = {f"model.layers.{i}.norm.weight": ("BF16", (8,)) for i in range(300)}
    source = write_checkpoint(tmp_path / "c", tensors)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    try:
        made = create("m", source, store=store)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert made.new_blobs == 300


def test_overrides_reach_the_store(store: Store) -> None:
    """A tensor chosen by rule is stored in that format, and says so in its blob."""
    name = "model.layers.0.self_attn.q_proj.weight"
    options = Options(overrides=(parse_override(f"{name}=affine-5:128"),))
    made = create("m", fixture("hf-llama-bf16"), store=store, quantize="int4", options=options)
    found = next(t for t in show(store, made.name).tensors if t.name == name)
    assert found.format is not None
    assert (found.format.name, found.format.group_size) == ("affine-5", 128)
