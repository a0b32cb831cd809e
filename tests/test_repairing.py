"""Repair: what is damaged is planned, shown, made again or put aside, and never dropped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from checkpoints import SMALL, write_checkpoint
from fakes import put, writer_elsewhere
from powercuts import CUTS, ModelDisk, PowerCut
from quantmill.cli import run
from quantmill.creation import create
from quantmill.errors import Busy
from quantmill.manifest import BlobRef, Manifest
from quantmill.planner import parse_override
from quantmill.plans import Options
from quantmill.rebuilding import FromSource
from quantmill.refetching import Known
from quantmill.repairing import BlobProvider, Step, plan_repair, repair
from quantmill.store import Store
from quantmill.verification import verify

DOWN = "model.layers.0.mlp.down_proj.weight"


def make(store: Store, source: Path, **options: Any) -> Manifest:
    made = create("m", source, store=store, **{"quantize": "int4", **options})
    return store.get_manifest(made.name)


def bend(store: Store, ref: BlobRef) -> None:
    """Change the last byte of a blob."""
    path = store.blob_path(ref.digest)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def repaired(store: Store, provider: BlobProvider | None) -> tuple[Step, ...]:
    def providers(_: Manifest) -> Sequence[BlobProvider]:
        return (provider,) if provider else ()

    return repair(store, plan_repair(store, verify(store), providers), providers)


def aside(store: Store) -> list[str]:
    if not store.quarantine.is_dir():
        return []
    return sorted(path.name.rpartition("-")[0] for path in store.quarantine.iterdir())


@pytest.mark.parametrize("harm", ["bent", "gone"])
def test_every_blob_can_be_made_again_from_the_source(
    store: Store, source: Path, harm: str
) -> None:
    """Weights, side files and the config: damaged or missing, they are whole afterwards."""
    manifest = make(store, source)
    for ref in manifest.all_refs():
        if harm == "gone":
            store.remove_blob(ref.digest)
        else:
            bend(store, ref)
    steps = repaired(store, FromSource(str(source)))
    assert {step.action for step in steps} == {"rebuild"}
    assert all(step.done for step in steps)
    assert not verify(store).damage
    assert aside(store) == []


@pytest.mark.parametrize(
    "options",
    [
        {"quantize": None},
        {"quantize": "mxfp4", "options": Options(rounding="nearest")},
        {"options": Options(profile="gpu")},
        {"options": Options(overrides=(parse_override(f"{DOWN}=affine-6"),))},
        {"options": Options(overrides=(parse_override(f"{DOWN}=keep"),))},
    ],
    ids=["floats", "recorded rounding", "recorded profile", "rule", "rule to keep"],
)
def test_options_are_those_of_the_model(
    store: Store, source: Path, options: dict[str, Any]
) -> None:
    """What the config records is followed; a format of one tensor's own is found by size."""
    for ref in make(store, source, **options).tensor_refs():
        store.remove_blob(ref.digest)
    assert all(step.done for step in repaired(store, FromSource(str(source))))
    assert not verify(store).damage


def test_another_source_gives_nothing(store: Store, source: Path, tmp_path: Path) -> None:
    """Blobs with another digest are not taken for the damaged one, which is put aside."""
    shape = {
        name: ("F32" if name == DOWN else dtype, shape) for name, (dtype, shape) in SMALL.items()
    }
    other = write_checkpoint(tmp_path / "other", shape)
    ref = next(r for r in make(store, source).tensor_refs() if r.name == DOWN)
    bend(store, ref)
    (step,) = repaired(store, FromSource(str(other)))
    assert (step.action, step.done, step.models) == ("quarantine", False, ("m:latest",))
    assert "other does not give it" in step.detail
    assert aside(store) == [ref.digest.file_name]
    (damage,) = verify(store).damage
    assert damage.kind == "blob_missing"


def test_without_a_source_damage_is_put_aside_or_reported(store: Store, source: Path) -> None:
    """Wrong bytes are kept elsewhere; what is missing or unreadable is named with what to do."""
    unreadable = create("b", source, store=store).name
    store.manifest_path(unreadable).write_bytes(b"{")
    bent, gone = make(store, source).tensor_refs()[:2]
    bend(store, bent)
    store.remove_blob(gone.digest)
    (loose,) = put(store, b"loose")
    store.blob_path(loose.digest).write_bytes(b"bent!")
    steps = {step.digest: step for step in repaired(store, None)}
    assert steps[gone.digest].action == "report"
    assert "--from" in steps[gone.digest].detail
    assert steps[loose.digest].done
    assert "manifest" in steps[None].detail
    assert aside(store) == sorted([loose.digest.file_name, bent.digest.file_name])


def test_a_plan_changes_nothing(store: Store, source: Path) -> None:
    """Planning names each blob, the models it hurts and what would be done."""
    ref = make(store, source).tensor_refs()[0]
    bend(store, ref)
    disk = ModelDisk(store.root)
    known = Known(store, str(source))
    (step,) = plan_repair(Store(store.root, disk), verify(store), known)
    assert (step.digest, step.models, step.action) == (ref.digest, ("m:latest",), "rebuild")
    assert disk.done == 0


def test_nothing_is_put_aside_while_others_write(store: Store, source: Path) -> None:
    """A writer may be replacing it: Busy."""
    bend(store, make(store, source).tensor_refs()[0])
    with writer_elsewhere(store.root), pytest.raises(Busy):
        repaired(store, None)
    assert aside(store) == []


class Mirror:
    """Another store with the same blobs, as a registry would be."""

    name = "a mirror"
    required = False

    def __init__(self, other: Store) -> None:
        self._other = other

    def provide(self, store: Store, manifest: Manifest, wanted: Sequence[BlobRef]) -> None:
        del manifest
        for ref in wanted:
            with store.new_blob() as writer:
                writer.write(self._other.read_blob(ref.digest, ref.size))
                store.commit([writer.finish()])


def test_blobs_may_come_from_elsewhere(store: Store, source: Path, tmp_path: Path) -> None:
    """Whatever gives blobs can be a provider; it is asked for those that are damaged only."""
    manifest = make(store, source)
    shutil.copytree(store.root, tmp_path / "copy")
    bend(store, manifest.tensor_refs()[1])
    (step,) = repaired(store, Mirror(Store(tmp_path / "copy")))
    assert (step.done, step.detail) == (True, "from a mirror")
    assert not verify(store).damage


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("with_source", [False, True])
def test_a_crash_during_repair_loses_nothing(
    store: Store, source: Path, tmp_path: Path, how: str, with_source: bool
) -> None:
    """After any operation: the damaged bytes are in their place or aside, and repair gets done."""
    ref = make(store, source).tensor_refs()[0]
    bend(store, ref)
    provider = FromSource(str(source)) if with_source else None
    at, hit = 1, True
    while hit:
        root = tmp_path / "root"
        shutil.copytree(store.root, root)
        disk = ModelDisk(root, how, at)
        found = Store(root, disk)
        with suppress(PowerCut):
            repaired(found, provider)
        disk.settle(at)
        hit = disk.hit
        store_then = Store(root)
        assert store_then.blob_path(ref.digest).exists() or aside(store_then)
        repaired(store_then, provider)
        kinds = [damage.kind for damage in verify(store_then).damage]
        assert kinds == ([] if with_source else ["blob_missing"])
        shutil.rmtree(root)
        at += 3


def test_the_command_shows_its_plan_and_exits_right(
    store: Store, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--dry-run changes nothing and exits with 1; the repair itself ends with 0."""
    bend(store, make(store, source).tensor_refs()[0])
    command = ["verify", "--repair", "--from", str(source), "--store", str(store.root)]
    assert run([*command, "--dry-run"]) == 1
    assert "would: rebuild blob" in capsys.readouterr().out
    assert verify(store).damage
    assert run([*command, "--json"]) == 0
    (step,) = json.loads(capsys.readouterr().out)["repair"]
    assert list(step) == ["digest", "models", "action", "detail", "done"]
    assert step["done"]
    assert run(["verify", "--store", str(store.root)]) == 0
    assert run(["verify", "--dry-run", "--store", str(store.root)]) == 2
