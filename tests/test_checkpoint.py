"""Checkpoint directories: the peers' vectors, directories that lie, links, changing files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quantmill.checkpoint import Checkpoint, is_model_dir, open_checkpoint
from quantmill.classify import classify
from quantmill.errors import BadSource
from quantmill.planner import make_plan
from quantmill.plans import Plan
from quantmill.source import CONFIG, INDEX
from quantmill.tensorfile import lay_out
from vectors import DATA, cases

SHARD = "model.safetensors"
WEIGHT = "model.a.weight"

Tensors = dict[str, dict[str, Any]]


def write_shard(path: Path, tensors: Tensors, fill: bytes = b"\0") -> None:
    """A tensor file of these tensors, every byte of data the same."""
    head, entries = lay_out([(n, t["dtype"], tuple(t["shape"])) for n, t in tensors.items()], {})
    path.write_bytes(head + fill * sum(e.nbytes for e in entries.values()))


def write_dir(folder: Path, document: dict[str, Any]) -> Path:
    """The directory that a vector describes."""
    if document["config"] is not None:
        (folder / CONFIG).write_text(json.dumps(document["config"]))
    for name, tensors in document["files"].items():
        write_shard(folder / name, tensors)
    if document["index"] is not None:
        (folder / INDEX).write_text(json.dumps({"weight_map": document["index"]}))
    for name, text in document.get("other_files", {}).items():
        (folder / name).write_text(text)
    return folder


def small_model(folder: Path) -> Path:
    """A model of one tensor of 16 elements, 32 bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {SHARD: {WEIGHT: {"dtype": "BF16", "shape": [4, 4]}}}
    return write_dir(folder, {"config": {}, "files": files, "index": None})


def planned(folder: Path) -> Plan:
    """What an import decides before it writes anything."""
    with open_checkpoint(folder) as checkpoint:
        kind = classify(checkpoint.source, None)
        return make_plan(checkpoint.source, kind, version="t")


# -- vectors ---------------------------------------------------------------------------------------


def inventory(folder: Path) -> dict[str, dict[str, Any]]:
    with open_checkpoint(folder) as checkpoint:
        return {
            t.name: {"dtype": t.dtype, "shape": list(t.shape), "file": t.file}
            for t in checkpoint.source.tensors.values()
        }


@cases("inventory", "inventory")
def test_inventories_equal_the_vectors(case: dict[str, Any], tmp_path: Path) -> None:
    """Every tensor is found in its file, or the directory is refused for the same reason."""
    folder, expect = write_dir(tmp_path, case["input"]), case["expect"]
    if "error" in expect:
        with pytest.raises(BadSource) as caught:
            inventory(folder)
        assert caught.value.kind == expect["error"]["kind"]
    else:
        assert inventory(folder) == expect["tensors"]


@cases("inventory", "inventory", odd=True)
def test_any_name_that_starts_with_model_counts(case: dict[str, Any], tmp_path: Path) -> None:
    """Without an index, weights are the files called model*.safetensors, as in the reference."""
    assert inventory(write_dir(tmp_path, case["input"])) == case["expect"]["tensors"]


@cases("inventory", "model_dir")
def test_model_directories_are_known_by_their_files(case: dict[str, Any], tmp_path: Path) -> None:
    """A directory counts as a model when the names are there, whatever the content."""
    assert is_model_dir(write_dir(tmp_path, case["input"])) == case["expect"]["supported"]


@cases("inventory", "config_blobs")
def test_json_side_files_become_entries(case: dict[str, Any], tmp_path: Path) -> None:
    """JSON files beside the weights become entries with their own bytes, in name order."""
    small_model(tmp_path)
    with open_checkpoint(write_dir(tmp_path, case["input"])) as checkpoint:
        found = [
            {
                "media_type": file.media_type,
                "name": file.name,
                "sha256": hashlib.sha256(checkpoint.read_file(file.name)).hexdigest(),
            }
            for file in checkpoint.source.files
            if file.media_type and file.name != CONFIG
        ]
    assert found == case["expect"]["layers"]


def test_files_that_no_runtime_reads_are_left_out(tmp_path: Path) -> None:
    """The index and unknown files become no entries, runtimes' own files do."""
    document = {"config": {}, "files": {SHARD: {WEIGHT: {"dtype": "U8", "shape": [1]}}}}
    others = dict.fromkeys(["README.md", "tokenizer.model", "a.jinja", "other.safetensors"], "")
    folder = write_dir(tmp_path, document | {"index": {WEIGHT: SHARD}, "other_files": others})
    with open_checkpoint(folder) as checkpoint:
        found = [file.name for file in checkpoint.source.files if file.media_type]
    assert found == ["a.jinja", CONFIG, "tokenizer.model"]


# -- directories that lie --------------------------------------------------------------------------

MALFORMED = DATA / "malformed-dirs"
MALFORMED_CASES: dict[str, Any] = json.loads((MALFORMED / "CASES.json").read_text("utf-8"))

# ModelOpt weights are recognised by their tensors, whatever lies beside them
ACCEPTED = {"control-sharded", "experts-control", "modelopt-no-sidecar", "weights-nan-inf"}

_Q_PROJ = "model.layers.0.self_attn.q_proj"
_EXPERTS = "model.layers.0.mlp.experts"

# Words of the refusal: the file or the tensor at fault.
REFUSED = {
    "config-bad-json": ["config.json"],
    "config-missing": ["no config.json"],
    "ct-nvfp4-no-global": [f"{_Q_PROJ}.weight_packed"],
    "experts-gap": [f"{_EXPERTS}: expert 2 has no gate_proj"],
    "experts-shape-differs": [f"{_EXPERTS}.1.gate_proj.weight"],
    "fp8-e5m2": [f"{_Q_PROJ}.weight", "F8_E5M2"],
    "fp8-no-scale": [f"{_Q_PROJ}.weight"],
    "fp8-scale-shape-mismatch": [f"{_Q_PROJ}.weight_scale_inv"],
    "gptoss-scales-mismatch": [f"{_EXPERTS}.down_proj_blocks"],
    "index-bad-json": [INDEX],
    "index-missing-shard": ["model-00002-of-00002.safetensors"],
    "index-path-traversal": ["invalid shard path", "../outside.safetensors"],
    "index-tensor-in-wrong-shard": ["model.norm.weight"],
    "mlx-biases-missing": [f"{_Q_PROJ}.weight"],
    "mlx-bits-disagree": [f"{_Q_PROJ}.weight"],
    "mlx-scales-shape-mismatch": [f"{_Q_PROJ}.weight"],
    "single-and-sharded": [SHARD, "model-00001-of-00002.safetensors"],
    "tensor-in-two-shards": ["model.embed_tokens.weight", "00001-of", "00002-of"],
}


def test_every_malformed_directory_is_tested() -> None:
    """Each case is either accepted or refused here."""
    assert MALFORMED_CASES.keys() == ACCEPTED | REFUSED.keys()


@pytest.mark.parametrize("name", sorted(ACCEPTED))
def test_sound_directories_are_planned(name: str) -> None:
    """A directory whose files agree is planned to the last tensor; values are not looked at yet."""
    with open_checkpoint(MALFORMED / name) as checkpoint:
        tensors = checkpoint.source.tensors.keys()
    plan = planned(MALFORMED / name)
    used = {s for spec in plan.tensors for s in spec.sources}
    assert used | {d.name for d in plan.dropped} == tensors


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_wrong_directories_are_refused(name: str) -> None:
    """A directory that is wrong as a whole is refused, naming the file or tensor at fault."""
    with pytest.raises(BadSource) as caught:
        planned(MALFORMED / name)
    assert [word for word in REFUSED[name] if word not in caught.value.message] == []


@pytest.mark.parametrize(
    "shard", ["/model.safetensors", "a/b.safetensors", "a\0.safetensors", "\ud800.safetensors"]
)
def test_index_entries_that_are_no_file_names_are_refused(shard: str, tmp_path: Path) -> None:
    """An index may only name files beside it."""
    small_model(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {WEIGHT: shard}}))
    with pytest.raises(BadSource) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.kind == "invalid_shard_path"


@pytest.mark.parametrize("weight_map", [[], "x", {WEIGHT: 1}, {WEIGHT: None}])
def test_indexes_of_the_wrong_types_are_refused(weight_map: Any, tmp_path: Path) -> None:
    """A weight map that does not map names to names is refused, naming the index."""
    small_model(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(BadSource, match=r"model\.safetensors\.index\.json"):
        open_checkpoint(tmp_path)


def test_tensors_outside_the_index_are_reported(tmp_path: Path) -> None:
    """A tensor that a shard holds and the index does not name is left out, and the plan says so."""
    tensor = {"dtype": "BF16", "shape": [4, 4]}
    files = {SHARD: {WEIGHT: tensor, "extra.weight": tensor}}
    write_dir(tmp_path, {"config": {}, "files": files, "index": {WEIGHT: SHARD}})
    assert [d.name for d in planned(tmp_path).dropped] == ["extra.weight"]


def test_claimed_expert_counts_are_not_allocated(tmp_path: Path) -> None:
    """One expert with a huge index is refused without memory for those before it."""
    files = {SHARD: {f"{_EXPERTS}.1000000.up_proj.weight": {"dtype": "BF16", "shape": [1, 1]}}}
    write_dir(tmp_path, {"config": {}, "files": files, "index": None})
    tracemalloc.start()
    try:
        with pytest.raises(BadSource, match="expert 0 has no up_proj"):
            planned(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("exists", [False, True])
def test_paths_that_are_no_directory_are_refused(exists: bool, tmp_path: Path) -> None:
    """A path to a file or to nothing is refused, naming it."""
    path = tmp_path / "model.gguf"
    if exists:
        path.touch()
    with pytest.raises(BadSource, match=r"model\.gguf") as caught:
        open_checkpoint(path)
    assert caught.value.kind == "not_a_model_dir"


def test_side_files_with_names_that_are_no_text_are_left_out(tmp_path: Path) -> None:
    """A file name that is not UTF-8 cannot stand in a manifest, so the file is left out."""
    small_model(tmp_path)
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.json")).write_text("{}")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with open_checkpoint(tmp_path) as checkpoint:
        files = checkpoint.source.files
    assert [f.name for f in files if f.media_type] == [CONFIG]


# -- links and special files (malformed-dirs/LINKS.json) -------------------------------------------


def without_weights(folder: Path) -> Path:
    """A directory with a config where the shard is still to be made; a whole model beside it."""
    folder.mkdir(parents=True)
    shutil.copyfile(MALFORMED / "control-sharded" / CONFIG, folder / CONFIG)
    shutil.copyfile(MALFORMED / "outside.safetensors", folder.parent / "outside.safetensors")
    return folder


def make_escape(shard: Path) -> None:
    shard.symlink_to("../outside.safetensors")


def make_dangling(shard: Path) -> None:
    shard.symlink_to("missing")


def make_loop(shard: Path) -> None:
    shard.symlink_to(shard.name)


REFUSED_LINKS: dict[str, list[Callable[[Path], object]]] = {
    "symlink-escape": [make_escape],
    "symlink-dangling": [make_dangling],
    "symlink-loop": [make_loop],
    "fifo-or-directory": [os.mkfifo, os.mkdir],
}


def test_every_link_case_is_tested() -> None:
    """Each case of the list is made below."""
    listed = {case["case"] for case in json.loads((MALFORMED / "LINKS.json").read_text("utf-8"))}
    assert listed == REFUSED_LINKS.keys() | {"symlink-hub-cache"}


@pytest.mark.parametrize(
    "make", [make for makers in REFUSED_LINKS.values() for make in makers], ids=lambda m: m.__name__
)
@pytest.mark.parametrize("indexed", [False, True])
def test_shards_that_are_no_files_are_refused(
    make: Callable[[Path], object], indexed: bool, tmp_path: Path
) -> None:
    """A link outside, to nothing or to itself, a pipe or a folder is refused by name, at once."""
    folder = without_weights(tmp_path / "model")
    make(folder / SHARD)
    if indexed:
        (folder / INDEX).write_text(json.dumps({"weight_map": {WEIGHT: SHARD}}))
    with pytest.raises(BadSource, match=r"model.*\.safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", [CONFIG, INDEX])
def test_pipes_in_place_of_documents_are_refused(name: str, tmp_path: Path) -> None:
    """A pipe called like the config or the index is refused without waiting for a writer."""
    small_model(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(BadSource, match=f"{name} is not a regular file"):
        open_checkpoint(tmp_path)


def test_links_outside_are_followed_on_request(tmp_path: Path) -> None:
    """A link that leads out of the directory is opened where the user allows it."""
    folder = without_weights(tmp_path / "model")
    make_escape(folder / SHARD)
    with open_checkpoint(folder, follow_links=True) as checkpoint:
        assert checkpoint.source.tensors


def cached_model(root: Path, target: str) -> Path:
    """A snapshot directory of a download cache, its shard a link to `target`."""
    folder = small_model(root / "snapshots" / "r")
    (root / "blobs").mkdir()
    shutil.move(folder / SHARD, (folder / target).resolve())
    (folder / SHARD).symlink_to(target)
    return folder


def test_links_into_the_download_cache_are_followed(tmp_path: Path) -> None:
    """A snapshot's links into the blobs of its own cache are accepted."""
    with open_checkpoint(cached_model(tmp_path, "../../blobs/h")) as checkpoint:
        assert list(checkpoint.source.tensors) == [WEIGHT]


def test_links_beside_the_download_cache_are_refused(tmp_path: Path) -> None:
    """A snapshot's link to another place of the cache than its blobs is refused."""
    with pytest.raises(BadSource) as caught:
        open_checkpoint(cached_model(tmp_path, "../../h"))
    assert caught.value.kind == "link_outside"


def test_links_inside_the_directory_are_followed(tmp_path: Path) -> None:
    """A link to a file of the same directory is accepted."""
    folder = small_model(tmp_path)
    (folder / SHARD).rename(folder / "weights.bin")
    (folder / SHARD).symlink_to("weights.bin")
    with open_checkpoint(folder) as checkpoint:
        assert list(checkpoint.source.tensors) == [WEIGHT]


# -- reading, and files that change meanwhile ------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Checkpoint]:
    with open_checkpoint(small_model(tmp_path)) as opened:
        yield opened


def read(checkpoint: Checkpoint, offset: int = 0) -> bytes:
    tensor = checkpoint.source.tensors[WEIGHT]
    buffer = bytearray(tensor.nbytes - offset)
    checkpoint.read_into(tensor, offset, memoryview(buffer))
    return bytes(buffer)


def test_bytes_are_read_from_the_offset_on(tmp_path: Path) -> None:
    """Reading fills the buffer with exactly the tensor's bytes from an offset."""
    folder = small_model(tmp_path)
    content = bytes(range(32))
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-32] + content)
    with open_checkpoint(folder) as checkpoint:
        assert read(checkpoint, 5) == content[5:]


def test_reading_a_file_that_was_cut_is_refused(checkpoint: Checkpoint) -> None:
    """A shard that became shorter after it was opened is noticed when it is read."""
    os.truncate(checkpoint.path / SHARD, (checkpoint.path / SHARD).stat().st_size - 1)
    with pytest.raises(BadSource) as caught:
        read(checkpoint)
    assert caught.value.kind == "source_changed"


def test_unchanged_files_pass(checkpoint: Checkpoint) -> None:
    """Reading does not count as a change."""
    read(checkpoint)
    checkpoint.check_unchanged()


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def rewrite(path: Path) -> None:
    """The same length, another modification time."""
    before = path.stat()
    path.write_bytes(b"\1" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))


@pytest.mark.parametrize("name", [SHARD, CONFIG])
@pytest.mark.parametrize("change", [grow, rewrite])
def test_changed_files_are_noticed(
    checkpoint: Checkpoint, name: str, change: Callable[[Path], None]
) -> None:
    """A file written to after it was opened is named by the check at the end."""
    change(checkpoint.path / name)
    with pytest.raises(BadSource, match=f"^{name} changed"):
        checkpoint.check_unchanged()


def test_a_swapped_file_does_not_change_what_is_read(checkpoint: Checkpoint) -> None:
    """A shard replaced under its name after opening is not read: the opened one is."""
    other = checkpoint.path / "other"
    write_shard(other, {WEIGHT: {"dtype": "BF16", "shape": [4, 4]}}, fill=b"\1")
    other.replace(checkpoint.path / SHARD)
    assert read(checkpoint) == bytes(32)
