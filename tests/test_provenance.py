"""Notes on where models came from: what they lead to makes every damaged blob whole again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import SMALL, write_checkpoint
from quantmill import provenance, strictjson
from quantmill.cli import run
from quantmill.creation import create, read_modelfile
from quantmill.digests import digest_of
from quantmill.errors import NoSpace
from quantmill.formats import AFFINE_GROUPS, FORMAT_NAMES
from quantmill.manifest import Manifest
from quantmill.modelfile import parse_modelfile
from quantmill.names import parse_name
from quantmill.patience import Patience
from quantmill.planner import parse_override
from quantmill.plans import Options
from quantmill.pruning import copy, prune, remove
from quantmill.pulling import pull
from quantmill.pushing import push
from quantmill.recipes import Recipe, Request, as_record, from_record
from quantmill.refetching import Known
from quantmill.repairing import Step, plan_repair, repair
from quantmill.store import Store
from quantmill.verification import verify
from registries import misbehaving, serve_memory
from test_adapters import peft_pair, write_peft

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
DOWN = "model.layers.0.mlp.down_proj"
QUICK = Patience(tries=2, first_delay=0.001, longest_delay=0.001)
MODELFILE = """FROM {}
TEMPLATE "{{ .Prompt }}"
SYSTEM be brief
LICENSE free
LICENSE as in air
PARAMETER temperature 0.5
PARAMETER stop one
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(
        tmp_path / "source", SMALL, {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    )


def lose_all(store: Store, name: str = "m") -> Manifest:
    """Remove every blob of a model."""
    manifest = store.get_manifest(parse_name(name))
    for ref in manifest.all_refs():
        store.remove_blob(ref.digest)
    return manifest


def repaired(store: Store, **choices: Any) -> tuple[Step, ...]:
    known = Known(store, patience=QUICK, **choices)
    return repair(store, plan_repair(store, verify(store), known), known)


# -- recipes ---------------------------------------------------------------------------------------

FORMATS = st.one_of(
    st.sampled_from([f for f in FORMAT_NAMES if not f.startswith("affine")]),
    st.builds(
        "affine-{}:{}".format, st.sampled_from([2, 3, 4, 5, 6, 8]), st.sampled_from(AFFINE_GROUPS)
    ),
    st.just("keep"),
)
MODELFILES = st.builds(
    lambda system, stop, number: parse_modelfile(
        f"FROM x\nSYSTEM {system}\nPARAMETER stop {stop}\nPARAMETER top_k {number}\nLICENSE a\n"
    ),
    st.from_regex(r"[a-zé]{1,9}", fullmatch=True), st.from_regex(r"[a-z]{1,3}", fullmatch=True),
    st.integers(1, 99),
)  # fmt: skip
RECIPES = st.builds(
    Recipe,
    source=st.sampled_from(["/there/is no/such folder", "org/repo@main", "m:latest"]),
    request=st.one_of(
        st.builds(Request, st.just("int4"), st.sampled_from([None, 32, 64])),
        st.just(Request()),
        st.builds(Request, requantize=st.sampled_from(["bf16", "int8"])),
        st.builds(Request, draft_quantize=st.just("int8")),
    ),
    options=st.builds(
        Options,
        overrides=st.lists(FORMATS.map(lambda f: parse_override(f"*.v_proj.weight={f}"))).map(
            tuple
        ),
        rounding=st.sampled_from(["ceil", "nearest"]),
        global_scale=st.booleans(),
    ),
    modelfile=st.none() | MODELFILES,
    draft=st.sampled_from([None, "/no/draft"]),
    merge_lora=st.sampled_from([None, "/no/adapter"]),
    follow_links=st.booleans(),
)


@given(RECIPES)
def test_a_recipe_comes_back_from_its_json(recipe: Recipe) -> None:
    """All that decides bytes is in the note."""
    record = strictjson.parse_object(strictjson.canonical(as_record(recipe)))
    assert from_record(record) == recipe


@pytest.mark.parametrize(
    "change",
    [
        {"options": {}},
        {"request": {"quantize": "int5"}},
        {"request": None},
        {"source": None},
        {"modelfile": {"source": "x"}},
        {"new field": 1},
    ],
)
def test_a_recipe_that_is_not_understood_is_none(change: dict[str, Any]) -> None:
    """What another version wrote, or damage, is passed over."""
    assert from_record(as_record(Recipe("x")) | change) is None


# -- notes -----------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=40)), st.sampled_from([b"", b"\n"]))
def test_lines_that_make_no_sense_are_passed_over(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], end: bytes
) -> None:
    """Whatever a crash or another program left in the file, later notes are read."""
    store = Store(tmp_path_factory.mktemp("notes"))
    digest = digest_of(b"")
    store.disk.append(store.provenance_of(digest), b"\n".join(lines) + end)
    name = parse_name("registry.example/n/m:t")
    provenance.note_registry(store, digest, name)
    assert provenance.registries(store, digest)[0] == name


@pytest.mark.parametrize("line", [b'{"registry":5}', b'{"registry":"!"}', b'{"recipe":[]}', b"[]"])
def test_notes_of_the_wrong_type_are_passed_over(store: Store, line: bytes) -> None:
    """A name that is none, a recipe that is none: as if they were not there."""
    digest = digest_of(b"")
    store.disk.append(store.provenance_of(digest), line + b"\n")
    assert not provenance.registries(store, digest)
    assert not provenance.recipes(store, digest)


def test_equal_notes_are_written_once(store: Store, source: Path) -> None:
    """The same command again adds nothing."""
    made = create("m", source, store=store)
    path = store.provenance_of(made.digest)
    before = path.read_bytes()
    create("m", source, store=store)
    assert path.read_bytes() == before


def test_a_note_that_cannot_be_written_is_no_error(store: Store, source: Path) -> None:
    """It is a hint: the model is there."""
    store.root.mkdir()
    store.provenance.parent.mkdir()
    store.provenance.write_text("a file in the folder's place")
    assert create("m", source, store=store).digest
    assert not verify(store).damage


def test_notes_go_with_their_model(store: Store, source: Path) -> None:
    """Prune keeps the notes on what has a name, a copied one too, and removes the others."""
    made = create("m", source, store=store)
    path = store.provenance_of(made.digest)
    copy(store, "m", "copy")
    remove(store, "m")
    prune(store, 0)
    assert path.exists()
    remove(store, "copy")
    prune(store, 0)
    assert not path.exists()


# -- repair ----------------------------------------------------------------------------------------


def as_asked(**choices: Any) -> Callable[[Store, Path], object]:
    return lambda store, source: create("m", source, store=store, **choices)


def with_modelfile(store: Store, source: Path) -> None:
    path = source.parent / "Modelfile"
    path.write_text(MODELFILE.format(source))
    modelfile, folder = read_modelfile(path)
    create("m", folder, store=store, modelfile=modelfile, quantize="int8")


def with_draft(store: Store, source: Path) -> None:
    draft = shutil.copytree(source, source.parent / "draft")
    create("m", source, store=store, draft=draft, draft_quantize="int4", quantize="int8")


def with_adapter(store: Store, source: Path) -> None:
    pair = peft_pair(
        "model.layers.0.mlp.down_proj", *SMALL["model.layers.0.mlp.down_proj.weight"][1]
    )
    create(
        "m", source, store=store, merge_lora=write_peft(source.parent / "a", pair), quantize="int8"
    )


@pytest.mark.parametrize(
    "make",
    [
        as_asked(),
        as_asked(quantize="int4", group_size=32),
        as_asked(quantize="int8", options=Options(overrides=(parse_override("*.mlp.*=int4:32"),))),
        as_asked(quantize="mxfp4", options=Options(rounding="nearest")),
        as_asked(quantize="nvfp4", options=Options(global_scale=True)),
        with_modelfile,
        with_draft,
        with_adapter,
    ],
    ids=["floats", "group size", "rules", "rounding", "global scale", "Modelfile", "draft",
         "adapter"],
)  # fmt: skip
def test_whatever_create_was_asked_is_made_again(
    store: Store, source: Path, make: Callable[[Store, Path], object]
) -> None:
    """With every blob gone, the config included, the notes alone bring all back."""
    make(store, source)
    lose_all(store)
    assert all(step.done for step in repaired(store))
    assert not verify(store).damage


def test_a_source_that_moved_can_be_named(store: Store, source: Path) -> None:
    """The rest of the recipe holds: group size and rules."""
    create("m", source, store=store, quantize="int4", group_size=32)
    lose_all(store)
    moved = source.rename(source.with_name("moved"))
    assert not any(step.done for step in repaired(store))
    assert all(step.done for step in repaired(store, source=str(moved)))
    assert not verify(store).damage


def test_a_draft_beside_a_stored_base_is_made_again(store: Store, source: Path) -> None:
    """The base's blobs are as they are; its own notes say where they are from."""
    create("base", source, store=store, quantize="int8")
    create("m", "base", store=store, draft=source, draft_quantize="int4")
    lose_all(store)
    repaired(store)  # the base, whose blobs the draft's recipe then finds
    repaired(store)
    assert not verify(store).damage


def test_a_model_from_a_registry_is_fetched_again(
    store: Store, source: Path, tmp_path: Path
) -> None:
    """Pulled, copied to another name, harmed: only what is damaged is asked for."""
    other = Store(tmp_path / "other")
    with misbehaving(serve_memory()) as server:
        name = f"{server.host}/n/m:v1"
        create(name, source, store=other, quantize="int8")
        push(name, store=other)
        pull(name, store=store)
        copy(store, name, "m")
        lost = store.get_manifest(parse_name("m")).tensor_refs()[:2]
        for ref in lost:
            store.remove_blob(ref.digest)
        asked = len(server.seen)
        steps = repaired(store)
        assert {step.detail for step in steps} == {f"from registry {name}"}
        assert sorted(path.rpartition("/")[2] for path, _ in server.seen[asked:]) == sorted(
            str(ref.digest) for ref in lost
        )
    assert not verify(store).damage


def test_what_was_pushed_is_fetched_again(store: Store, source: Path) -> None:
    """Where the source is gone the registry that got the model has it."""
    with misbehaving(serve_memory()) as server:
        create("m", source, store=store, quantize="int8")
        push("m", f"{server.host}/n/m:v1", store=store)
        shutil.rmtree(source)
        lose_all(store)
        assert all(step.done for step in repaired(store))
    assert not verify(store).damage


def test_a_registry_that_lost_a_blob_gives_the_others(store: Store, source: Path) -> None:
    """What cannot be had is named with what each place said; the rest is whole."""
    kept: dict[str, bytes] = {}
    with misbehaving(serve_memory(kept)) as server:
        create("m", source, store=store, quantize="int8")
        push("m", f"{server.host}/n/m:v1", store=store)
        shutil.rmtree(source)
        first, *_ = lose_all(store).tensor_refs()
        del kept[f"/v2/n/m/blobs/{first.digest}"]
        steps = repaired(store)
    (left,) = [step for step in steps if not step.done]
    assert left.digest == first.digest
    assert f"{source}: " in left.detail
    assert f"registry {server.host}/n/m:v1 does not give it" in left.detail
    assert {d.digest for d in verify(store).damage} == {first.digest}


def test_a_registry_that_sends_other_bytes_mends_nothing(store: Store, source: Path) -> None:
    """Bytes are taken by their digest alone."""
    kept: dict[str, bytes] = {}
    with misbehaving(serve_memory(kept)) as server:
        create("m", source, store=store, quantize="int8")
        push("m", f"{server.host}/n/m:v1", store=store)
        shutil.rmtree(source)
        first, *_ = lose_all(store).tensor_refs()
        kept[f"/v2/n/m/blobs/{first.digest}"] = bytes(first.size)
        repaired(store)
    assert {d.digest for d in verify(store).damage} == {first.digest}


def test_pull_asks_the_registry_in_the_name(store: Store, source: Path) -> None:
    """A model without notes, as another program leaves it, is fetched only when asked to."""
    with misbehaving(serve_memory()) as server:
        name = f"{server.host}/n/m:v1"
        create(name, source, store=store)
        push(name, store=store)
        shutil.rmtree(store.provenance)
        lose_all(store, name)
        seen = len(server.seen)
        command = ["verify", "--repair", "--store", str(store.root)]
        assert run(command) == 1
        assert len(server.seen) == seen
        assert run([*command, "--pull"]) == 0
    assert not verify(store).damage


def test_places_of_this_machine_are_asked_before_the_network(store: Store, source: Path) -> None:
    """With both known the registry hears nothing."""
    with misbehaving(serve_memory()) as server:
        create("m", source, store=store)
        push("m", f"{server.host}/n/m:v1", store=store)
        lose_all(store)
        seen = len(server.seen)
        assert all(step.done for step in repaired(store))
        assert len(server.seen) == seen


def test_too_little_space_is_told_before_the_first_byte(
    store: Store, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is to be had again must fit."""
    create("m", source, store=store)
    lose_all(store)
    monkeypatch.setattr(store.disk, "free", lambda _: 100)
    known = Known(store)
    with pytest.raises(NoSpace, match="are needed"):
        repair(store, plan_repair(store, verify(store), known), known)
    assert store.list_blobs() == []


def test_options_of_repair_belong_to_it(store: Store) -> None:
    """--pull without --repair, or beside --from, is refused."""
    root = ["--store", str(store.root)]
    assert run(["verify", "--pull", *root]) == 2
    assert run(["verify", "--repair", "--pull", "--from", "x", *root]) == 2
