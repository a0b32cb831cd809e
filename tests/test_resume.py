"""A `create` that was interrupted goes on; what it finished is checked and not computed again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints import SMALL, write_checkpoint
from fakes import FaultyDisk, files
from quantmill import execute
from quantmill.creation import Created, create
from quantmill.errors import BadWeights, StoreError
from quantmill.files import Disk
from quantmill.plans import Options
from quantmill.pruning import prune
from quantmill.quantize import quantize as real_quantize
from quantmill.store import Store
from quantmill.verification import verify


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of weights quantized, a number for each piece."""
    found: list[int] = []

    def counted(raw: memoryview, *arguments: Any, **options: Any) -> Any:
        found.append(raw.nbytes)
        return real_quantize(raw, *arguments, **options)

    monkeypatch.setattr(execute, "quantize", counted)
    return found


def interrupted_after(count: int) -> Callable[[Any], None]:
    """A progress function that gives up after so many tensors."""

    def progress(event: Any) -> None:
        if event.tensors >= count:
            raise KeyboardInterrupt

    return progress


def journal(store: Store) -> Path:
    (found,) = store.journals.iterdir()
    return found


def make(store: Store, source: Path, **options: Any) -> Created:
    return create("m", source, store=store, quantize="int8", workers=1, **options)


def half_made(store: Store, source: Path) -> int:
    """Interrupt a `create` half way; how many tensor blobs it had finished by then."""
    with pytest.raises(KeyboardInterrupt):
        make(store, source, progress=interrupted_after(len(SMALL) // 2))
    assert not store.list_names()
    return len(journal(store).read_bytes().splitlines())


def test_an_interrupted_create_goes_on(
    store: Store, source: Path, tmp_path: Path, quantized: list[int]
) -> None:
    """The second run computes only what the first did not finish, and the result is the same."""
    whole = make(Store(tmp_path / "other"), source)
    all_bytes = sum(quantized)
    quantized.clear()
    there = half_made(store, source)
    assert there > 0
    first = sum(quantized)
    quantized.clear()
    made = make(store, source)
    assert made.digest == whole.digest
    assert made.resumed == there
    assert made.resumed + made.new_blobs == len(made.plan.blobs)
    assert sum(quantized) < all_bytes
    assert first + sum(quantized) <= all_bytes + max(quantized)
    assert not verify(store).damage


def test_a_second_model_of_the_same_files_is_not_computed(
    store: Store, source: Path, quantized: list[int]
) -> None:
    """What is in the store is neither computed nor written again, whatever the name."""
    first = make(store, source)
    quantized.clear()
    second = create("other", source, store=store, quantize="int8")
    assert (second.digest, second.new_blobs) == (first.digest, 0)
    assert second.resumed == len(first.plan.blobs)
    assert quantized == []


def test_restart_computes_everything(store: Store, source: Path, quantized: list[int]) -> None:
    """`restart` takes no note's word for it."""
    first = make(store, source)
    before = sum(quantized)
    quantized.clear()
    again = make(store, source, restart=True)
    assert (again.digest, again.resumed, again.new_blobs) == (first.digest, 0, 0)
    assert sum(quantized) == before


def test_a_changed_file_is_read_again(store: Store, source: Path, tmp_path: Path) -> None:
    """Weights of the same size, written to the same file at the same time stamp, are not mixed."""
    make(store, source)
    file = source / "model.safetensors"
    data, times = bytearray(file.read_bytes()), file.stat()
    data[-1] ^= 0x01
    with file.open("r+b") as opened:
        opened.write(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    again = make(store, source)
    assert again.resumed == 0
    assert again.digest == make(Store(tmp_path / "other"), source).digest


def test_other_options_are_another_work(store: Store, source: Path) -> None:
    """Blobs are shared between requests only where all that bytes depend on is the same."""
    make(store, source)
    assert create("b", source, store=store, quantize="int4").resumed < len(SMALL)
    options = Options(profile="gpu")
    other = create("c", source, store=store, quantize="int8", options=options)
    assert other.resumed == 0


@pytest.mark.parametrize("harm", ["cut", "bent", "gone"])
def test_a_damaged_blob_is_computed_again(store: Store, source: Path, harm: str) -> None:
    """A note is believed only as far as the blob itself bears it out."""
    made = make(store, source)
    ref = store.get_manifest(made.name).tensor_refs()[0]
    path = store.blob_path(ref.digest)
    data = bytearray(path.read_bytes())
    if harm == "gone":
        path.unlink()
    else:
        data[-1] ^= 0x40
        path.write_bytes(data[: len(data) - (harm == "cut")])
    again = make(store, source)
    assert again.digest == made.digest
    assert (again.resumed, again.new_blobs) == (len(made.plan.blobs) - 1, 1)
    assert not verify(store).damage


@pytest.mark.parametrize(
    "line",
    [b"", b"\0\0\0\0", b"{", b"[]", b'["a"]', b'["a", "sha256:00", 3, {}]', b"\xff\xfe",
     b'["a", 1, 2, {}]', b'["%s", "sha256:%s", 5, {"x": "y"}]' % (b"a" * 64, b"0" * 64)],
)  # fmt: skip
def test_lines_that_make_no_sense_are_passed_over(store: Store, source: Path, line: bytes) -> None:
    """A torn or foreign line costs nothing but itself."""
    made = make(store, source)
    notes = journal(store).read_bytes().splitlines()
    journal(store).write_bytes(b"\n".join([line, *notes, line[:-1]]))
    assert make(store, source).resumed == len(made.plan.blobs)


def test_a_torn_line_spoils_only_itself(store: Store, source: Path) -> None:
    """What is noted after a crash tore the last line stands on lines of its own."""
    made = make(store, source)
    journal(store).write_bytes(journal(store).read_bytes()[:-20])
    assert make(store, source).resumed == len(made.plan.blobs) - 1
    assert make(store, source).resumed == len(made.plan.blobs)


def test_what_a_long_run_finished_is_kept_young(
    store: Store, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blobs without a manifest get a new time again and again: others remove old ones."""
    monkeypatch.setattr(execute, "REFRESH_SECONDS", -1)
    touched: list[Path] = []
    monkeypatch.setattr(Disk, "touch", lambda _, path: touched.append(path))
    made = make(store, source)
    assert len(set(touched)) == len(made.plan.blobs)


def test_a_note_that_names_another_blob_is_not_believed(store: Store, source: Path) -> None:
    """Whole blobs under the wrong key are told by their header and size."""
    made = make(store, source)
    notes = [json.loads(line) for line in journal(store).read_bytes().splitlines()]
    keys = [note[0] for note in notes]
    for note, key in zip(notes, keys[1:] + keys[:1], strict=True):
        note[0] = key
    journal(store).write_text("".join(f"{json.dumps(note)}\n" for note in notes))
    again = make(store, source)
    assert (again.digest, again.resumed) == (made.digest, 0)


def test_counts_of_non_finite_weights_survive(store: Store, tmp_path: Path) -> None:
    """A resumed blob's NaN are reported as the first run would have reported them."""
    name = "model.layers.0.mlp.down_proj.weight"
    source = write_checkpoint(tmp_path / "nan", SMALL)
    file = source / "model.safetensors"
    data = bytearray(file.read_bytes())
    header = int.from_bytes(data[:8], "little")
    start = json.loads(data[8 : 8 + header])[name]["data_offsets"][0] + 8 + header
    data[start : start + 2] = (0x7FC0).to_bytes(2, "little")
    file.write_bytes(data)
    with pytest.raises(BadWeights):
        make(store, source)
    options = Options(allow_non_finite=True)
    first = make(store, source, options=options)
    second = make(store, source, options=options)
    assert first.non_finite == second.non_finite == ((name, 1),)
    assert second.resumed == len(first.plan.blobs)


def test_prune_takes_journals_along(store: Store, source: Path) -> None:
    """What an interrupted create left, notes included, is gone after prune."""
    half_made(store, source)
    assert list(store.journals.iterdir())
    prune(store, 0)
    assert files(store) == {}
    assert not list(store.journals.iterdir())


def test_every_failing_operation_leaves_a_store_that_goes_on(tmp_path: Path, source: Path) -> None:
    """Whichever file operation fails, the same command run again gives the same model."""
    counting = FaultyDisk()
    whole = make(Store(tmp_path / "whole", counting), source)
    failed = 0
    for number in range(0, len(counting.done), 3):
        root = tmp_path / f"failing-{number}"
        try:  # threads take turns: a run may have fewer operations than the one that was counted
            make(Store(root, FaultyDisk(number)), source)
        except StoreError:
            failed += 1
        for stored in Store(root).list_names():  # failed after the manifest had its name
            assert Store(root).get_manifest(stored.name).digest == whole.digest
        made = make(Store(root), source)
        assert made.digest == whole.digest
        assert not verify(Store(root)).damage
        assert not list(Store(root).blobs.glob("sha256-tmp-*"))
        shutil.rmtree(root)
    assert failed > len(counting.done) // 4


CHILD = "from quantmill.cli import main; main()"


def test_killed_at_any_moment_it_goes_on(store: Store, tmp_path: Path) -> None:
    """Kill -9 at random moments, again and again: the store is whole, and the work gets done."""
    layers = {f"model.layers.{i}.mlp.down_proj.weight": ("BF16", (512, 512)) for i in range(40)}
    source = write_checkpoint(tmp_path / "killed", layers)
    expected = create("m", source, store=Store(tmp_path / "other"), quantize="int4")
    command = [sys.executable, "-c", CHILD, "create", "m", str(source), "-q", "int4",
               "--store", str(store.root), "--quiet"]  # fmt: skip
    moments = random.Random(1)
    started = time.monotonic()
    subprocess.run([*command[:-2], str(tmp_path / "timed"), "--quiet"], check=True)
    usual = time.monotonic() - started
    killed = 0
    for _ in range(12):
        child = subprocess.Popen(command)
        time.sleep(moments.uniform(0.3, 1.0) * usual)
        child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
        assert not verify(store).damage
    assert killed > 0
    assert subprocess.run(command, check=True).returncode == 0
    assert store.get_manifest(expected.name).digest == expected.digest
    assert not verify(store).damage
