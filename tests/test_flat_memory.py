"""Memory of push, pull and verify does not grow with the model: peaks of whole processes."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantmill import mediatypes
from quantmill.formats import DTYPE_BYTES
from quantmill.manifest import BlobRef, manifest_bytes
from quantmill.names import parse_name
from quantmill.pulling import PART
from quantmill.store import Store
from quantmill.tensorfile import lay_out
from registries import RealRegistry, real_registry

MEGABYTE = 10**6
SIZES = {"small": [10] * 4, "large": [80] * 3 + [10] * 16}
"""Megabytes of the blobs of two models, of 40 and of 400 MB."""

MOST_MORE = 24 * MEGABYTE

# A process counts as its own what the one that started it held: so a small one starts it.
WRAPPER = """
import json, os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps([os.waitstatus_to_exitcode(status), usage.ru_maxrss * unit]))
"""


def peak_of(*arguments: str | Path, expected: int = 0) -> int:
    """Bytes that a command held at most."""
    command = [sys.executable, "-m", "quantmill", *map(str, arguments)]
    done = subprocess.run(
        [sys.executable, "-S", "-c", WRAPPER, *command], stdout=subprocess.PIPE, check=True
    )
    code, peak = json.loads(done.stdout)
    assert code == expected
    return int(peak)


def put_large_model(
    store: Store, name: str, megabytes: list[int], dtype: str = "U8", seed: int = 1
) -> None:
    """A model of tensor blobs of these sizes, no two the same."""
    block = random.Random(seed).randbytes(MEGABYTE)
    columns = MEGABYTE // DTYPE_BYTES[dtype]
    refs = []
    with store.new_blob() as writer:
        writer.write(b"{}")
        pending = [writer.finish()]
    for number, count in enumerate(megabytes):
        tensor = f"layers.{number}.weight"
        with store.new_blob() as writer:
            writer.write(lay_out([(tensor, dtype, (count, columns))], {})[0])
            for part in range(count):
                writer.write((number * 1000 + part).to_bytes(8, "little"))
                writer.write(memoryview(block)[8:])
            pending.append(writer.finish())
        refs.append(BlobRef(mediatypes.TENSOR, pending[-1].digest, pending[-1].size, tensor))
    store.commit(pending)
    config = BlobRef(mediatypes.CONFIG, pending[0].digest, 2)
    store.put_manifest(parse_name(name), manifest_bytes(config, refs))


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[RealRegistry]:
    """A registry; what it and the stores hold is removed at the end."""
    with real_registry(tmp_path / "registry") as found:
        yield found
    shutil.rmtree(tmp_path)


def test_memory_does_not_grow_with_the_model(registry: RealRegistry, tmp_path: Path) -> None:
    """Ten times the model, some blobs in parts: a few megabytes more at most."""
    assert max(SIZES["large"]) * MEGABYTE > PART
    peaks: dict[str, list[int]] = {"push": [], "pull": [], "verify": []}
    for size, megabytes in SIZES.items():
        name, ours, theirs = f"{registry.host}/team/{size}", tmp_path / size, tmp_path / "pulled"
        put_large_model(Store(ours), name, megabytes)
        peaks["push"].append(peak_of("push", name, "--store", ours, "--quiet"))
        shutil.rmtree(ours)
        peaks["pull"].append(peak_of("pull", name, "--store", theirs, "--quiet"))
        peaks["verify"].append(peak_of("verify", name, "--store", theirs))
        shutil.rmtree(theirs)
    growth = {command: large - small for command, (small, large) in peaks.items()}
    assert {command: more for command, more in growth.items() if more > MOST_MORE} == {}, peaks


def test_what_is_compared_is_never_held_whole(tmp_path: Path) -> None:
    """A tensor ten times as large, read on both sides, takes no more memory."""
    peaks = []
    for megabytes in (8, 80):
        store = Store(tmp_path / str(megabytes))
        for seed, name in enumerate(("a", "b")):
            put_large_model(store, name, [megabytes], "F16", seed)
        peaks.append(peak_of("diff", "a", "b", "--store", store.root, expected=1))
        shutil.rmtree(store.root)
    assert peaks[1] - peaks[0] < MOST_MORE, peaks
