"""Removing names and blobs: what goes, what stays, and that nothing goes by mistake."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fakes import files, finished, put, put_model, write_file, writer_elsewhere
from quantmill import pruning
from quantmill.digests import Digest, digest_of
from quantmill.errors import Busy, Corrupt, NotFound
from quantmill.files import Disk
from quantmill.manifest import manifest_bytes
from quantmill.names import parse_name
from quantmill.pruning import GRACE_SECONDS, copy, plan_prune, prune, remove
from quantmill.store import BlobFile, Store

OLD = GRACE_SECONDS + 60
YOUNG = GRACE_SECONDS - 60


def aged(path: Path, seconds: float) -> Path:
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


def age_all(store: Store) -> None:
    """Make every file of the store older than the grace period."""
    for path in store.root.rglob("*"):
        if path.is_file():
            aged(path, OLD)


def loose(store: Store, data: bytes, age: float) -> Digest:
    """A blob that no manifest names."""
    (ref,) = put(store, data)
    aged(store.blob_path(ref.digest), age)
    return ref.digest


def break_manifest(store: Store, name: str) -> None:
    write_file(store.manifest_path(parse_name(name)), b"{oops")


def blobs(store: Store) -> set[bytes]:
    """The contents of all blobs."""
    return {blob.path.read_bytes() for blob in store.list_blobs()}


# -- prune -----------------------------------------------------------------------------------------


def test_old_loose_blobs_are_pruned_and_young_ones_counted(store: Store) -> None:
    """The grace period, by the file's time, decides between removing and counting."""
    old = loose(store, b"old", OLD)
    loose(store, b"young", YOUNG)
    plan = prune(store)
    assert [blob.digest for blob in plan.blobs] == [old]
    assert (plan.young, plan.nbytes) == (1, 3)
    assert blobs(store) == {b"young"}


def test_the_age_limit_can_be_chosen(store: Store) -> None:
    """With no age limit even a fresh loose blob goes."""
    loose(store, b"young", 0)
    assert prune(store, 0).young == 0
    assert blobs(store) == set()


def test_what_a_manifest_names_is_never_pruned(store: Store) -> None:
    """Config and entries stay, however old they are."""
    put_model(store, "m", b"config", b"entry")
    age_all(store)
    before = files(store)
    plan = prune(store, 0)
    assert (plan.blobs, plan.leftovers, plan.young) == ((), (), 0)
    assert files(store) == before


@pytest.mark.parametrize(
    "path",
    [
        "blobs/sha256-tmp-0123",
        f"blobs/sha256-{'0' * 64}-partial",
        f"blobs/sha256-{'0' * 64}.tmp",
        "manifests/registry.ollama.ai/library/m/.tmp-0123",
    ],
)
def test_leftovers_are_pruned_when_old(path: str, store: Store) -> None:
    """Unfinished files, ours and Ollama's, are kept while young and removed when old."""
    left = aged(write_file(store.root / path), YOUNG)
    assert (prune(store).leftovers, left.exists()) == ((), True)
    aged(left, OLD)
    assert [f.path for f in prune(store).leftovers] == [left]
    assert not left.exists()


def test_finished_blobs_of_an_interrupted_commit_are_leftovers(store: Store) -> None:
    """A blob that never got its name is found as a temporary file."""
    aged(finished(store, b"abc").path, OLD)
    assert [(f.digest, f.size) for f in prune(store).leftovers] == [(None, 3)]


def test_a_plan_removes_nothing(store: Store) -> None:
    """Planning says what would go, and leaves every file."""
    loose(store, b"old", OLD)
    aged(write_file(store.blobs / "sha256-tmp-0123"), OLD)
    before = files(store)
    plan = plan_prune(store)
    assert (len(plan.blobs), len(plan.leftovers)) == (1, 1)
    assert files(store) == before


@pytest.mark.parametrize("action", [plan_prune, prune])
def test_nothing_is_pruned_while_a_manifest_is_unreadable(
    store: Store, action: Callable[[Store], object]
) -> None:
    """What a broken manifest names would look loose: refused, naming the model and a way out."""
    loose(store, b"old", OLD)
    break_manifest(store, "broken")
    with pytest.raises(Corrupt, match="manifest of broken:latest") as caught:
        action(store)
    assert "nothing is pruned" in (caught.value.hint or "")
    assert blobs(store) == {b"old"}


def test_nothing_is_pruned_while_another_process_writes(store: Store) -> None:
    """Prune gives up at once: Busy."""
    loose(store, b"old", OLD)
    with writer_elsewhere(store.root), pytest.raises(Busy):
        prune(store)
    assert blobs(store) == {b"old"}


def test_a_blob_taken_into_use_meanwhile_stays(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ollama sets the time of a blob that it will name: whoever is about to remove it looks."""
    digest = loose(store, b"old", OLD)

    def plan_and_wait(*arguments: object) -> object:
        plan = plan_prune(store)
        os.utime(store.blob_path(digest))
        return plan

    monkeypatch.setattr(pruning, "plan_prune", plan_and_wait)
    plan = prune(store)
    assert (plan.blobs, plan.young, blobs(store)) == ((), 1, {b"old"})


def test_a_model_named_while_prune_looks_keeps_its_blobs(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are listed before manifests are read, so what is named in between is in use."""
    (ref,) = put(store, b"old")
    aged(store.blob_path(ref.digest), OLD)
    listed = Store.list_blobs

    def then_named(self: Store) -> list[BlobFile]:
        found = listed(self)
        self.put_manifest(parse_name("new"), manifest_bytes(ref, []))
        return found

    monkeypatch.setattr(Store, "list_blobs", then_named)
    assert prune(store).blobs == ()
    assert blobs(store) == {b"old"}


def test_empty_folders_are_removed(store: Store) -> None:
    """Folders of names that are gone disappear; those with a model stay."""
    put_model(store, "m", b"config")
    (store.manifests / "h/n/m").mkdir(parents=True)
    prune(store)
    assert [path.name for path in store.manifests.iterdir()] == ["registry.ollama.ai"]
    assert store.get_manifest(parse_name("m"))


def test_links_are_not_swept(store: Store, tmp_path: Path) -> None:
    """A linked folder keeps its link, and its empty folders."""
    (tmp_path / "elsewhere/n").mkdir(parents=True)
    store.manifests.mkdir(parents=True)
    (store.manifests / "h").symlink_to(tmp_path / "elsewhere")
    prune(store)
    assert (store.manifests / "h/n").is_dir()


def test_blobs_of_a_model_behind_a_link_are_in_use(store: Store, tmp_path: Path) -> None:
    """A model that is reached through a linked folder keeps its blobs."""
    put_model(store, "m", b"1")
    host = store.manifests / "registry.ollama.ai"
    host.rename(tmp_path / "elsewhere")
    host.symlink_to(tmp_path / "elsewhere")
    assert not prune(store, 0).blobs


def test_pruning_no_store_removes_nothing(store: Store) -> None:
    """A store that does not exist yet has nothing to prune."""
    plan = prune(store)
    assert (plan.blobs, plan.leftovers, plan.young, plan.nbytes) == ((), (), 0, 0)


# -- rm --------------------------------------------------------------------------------------------


def test_removing_a_model_frees_its_blobs(store: Store) -> None:
    """The only model's blobs go with it, however young they are."""
    put_model(store, "m", b"config", b"entry")
    removed = remove(store, [parse_name("M")])
    assert [name.display for name in removed.names] == ["m:latest"]
    assert (removed.blobs, removed.nbytes, removed.left) == (2, 11, 0)
    assert files(store) == {}


def test_shared_blobs_survive(store: Store) -> None:
    """What another model names stays."""
    put_model(store, "a", b"config a", b"shared")
    put_model(store, "b", b"config b", b"shared")
    assert remove(store, [parse_name("a")]).blobs == 1
    assert blobs(store) == {b"config b", b"shared"}


def test_blobs_shared_only_by_the_removed_go(store: Store) -> None:
    """Two models removed together free what only they share, once."""
    put_model(store, "a", b"config", b"shared")
    put_model(store, "b", b"config", b"shared")
    assert remove(store, [parse_name("a"), parse_name("b")]).blobs == 2
    assert files(store) == {}


def test_loose_blobs_of_others_stay(store: Store) -> None:
    """Removing a model touches only blobs that it named."""
    loose(store, b"loose", OLD)
    put_model(store, "m", b"config")
    remove(store, [parse_name("m")])
    assert blobs(store) == {b"loose"}


def test_a_name_given_twice_is_removed_once(store: Store) -> None:
    """Spellings of one name are one name."""
    put_model(store, "m", b"config")
    assert len(remove(store, [parse_name("m"), parse_name("M:latest")]).names) == 1


@pytest.mark.parametrize("order", [["m", "missing"], ["missing", "m"]])
def test_all_names_are_looked_up_before_any_is_removed(store: Store, order: list[str]) -> None:
    """One missing name among several: NotFound, and nothing is removed."""
    put_model(store, "m", b"config")
    before = files(store)
    with pytest.raises(NotFound, match="missing"):
        remove(store, [parse_name(name) for name in order])
    assert files(store) == before


def test_a_folder_in_place_of_a_manifest_is_missing(store: Store) -> None:
    """What is not listed cannot be removed, and keeps the others from being removed."""
    put_model(store, "m", b"config")
    store.manifest_path(parse_name("z")).mkdir(parents=True)
    before = files(store)
    with pytest.raises(NotFound, match="z:latest"):
        remove(store, [parse_name("m"), parse_name("z")])
    assert files(store) == before


def test_an_unreadable_manifest_can_be_removed(store: Store) -> None:
    """The name goes; what it named is unknown and stays for prune."""
    put_model(store, "broken", b"config")
    break_manifest(store, "broken")
    removed = remove(store, [parse_name("broken")])
    assert (len(removed.names), removed.blobs) == (1, 0)
    assert store.list_names() == []
    assert blobs(store) == {b"config"}


def test_blobs_stay_while_another_manifest_is_unreadable(store: Store) -> None:
    """The name goes, its blobs wait for prune: the broken manifest may name them."""
    put_model(store, "m", b"config", b"entry")
    put_model(store, "broken", b"other")
    break_manifest(store, "broken")
    removed = remove(store, [parse_name("m")])
    assert (removed.blobs, removed.left) == (0, 2)
    assert blobs(store) == {b"config", b"entry", b"other"}


def test_blobs_stay_while_another_process_writes(store: Store) -> None:
    """The name goes at once, its blobs wait for prune: the writer may be about to name them."""
    put_model(store, "m", b"config", b"entry")
    with writer_elsewhere(store.root):
        removed = remove(store, [parse_name("m")])
    assert (removed.blobs, removed.left) == (0, 2)
    assert store.list_names() == []
    assert blobs(store) == {b"config", b"entry"}


def test_a_missing_blob_does_not_stop_a_removal(store: Store) -> None:
    """Of a damaged model what is there is removed and counted."""
    put_model(store, "m", b"config", b"entry")
    store.remove_blob(digest_of(b"entry"))
    removed = remove(store, [parse_name("m")])
    assert (removed.blobs, removed.nbytes) == (1, len(b"config"))
    assert files(store) == {}


def test_a_folder_that_is_swept_meanwhile_does_not_stop_a_removal(tmp_path: Path) -> None:
    """A prune beside it may remove the folder that a name leaves empty, before it is synced."""

    class Swept(Disk):
        def remove(self, path: Path) -> None:
            super().remove(path)
            if path.name == "latest":
                path.parent.rmdir()

    store = Store(tmp_path, Swept())
    put_model(store, "m", b"config")
    assert remove(store, [parse_name("m")]).blobs == 1
    assert files(store) == {}


# -- cp --------------------------------------------------------------------------------------------


def test_a_copy_is_the_same_bytes(store: Store) -> None:
    """The second name has the first one's manifest, byte by byte, unknown fields and all."""
    put_model(store, "m", b"config", b"entry")
    path = store.manifest_path(parse_name("m"))
    path.write_bytes(
        path.read_bytes().replace(b'{"schemaVersion"', b'{"extra": 1, "schemaVersion"')
    )
    copy(store, parse_name("m"), parse_name("n/copy:tag"))
    assert store.manifest_path(parse_name("n/copy:tag")).read_bytes() == path.read_bytes()
    assert blobs(store) == {b"config", b"entry"}


def test_a_copy_replaces_what_was_there(store: Store) -> None:
    """The target's former manifest gives way; its blobs wait for prune."""
    put_model(store, "target", b"former")
    raw = put_model(store, "m", b"config")
    copy(store, parse_name("m"), parse_name("target"))
    assert store.get_manifest(parse_name("target")).raw == raw
    assert blobs(store) == {b"former", b"config"}


def test_a_copy_to_itself_changes_nothing(store: Store) -> None:
    """The same name in another spelling is left alone, its time included."""
    put_model(store, "m", b"config")
    path = aged(store.manifest_path(parse_name("m")), OLD)
    before = path.stat().st_mtime
    copy(store, parse_name("m"), parse_name("M"))
    assert path.stat().st_mtime == before
    assert [stored.path for stored in store.list_names()] == [path]


def test_a_copy_of_a_missing_model_is_not_found(store: Store) -> None:
    """NotFound names the model."""
    with pytest.raises(NotFound, match="m:latest"):
        copy(store, parse_name("m"), parse_name("n"))


def test_a_model_with_a_missing_blob_is_not_copied(store: Store) -> None:
    """A second name for a broken model is refused before it exists."""
    put_model(store, "m", b"config", b"entry")
    store.remove_blob(digest_of(b"entry"))
    with pytest.raises(NotFound):
        copy(store, parse_name("m"), parse_name("n"))
    assert [stored.name.model for stored in store.list_names()] == ["m"]


def test_a_model_with_a_truncated_blob_is_not_copied(store: Store) -> None:
    """A blob of the wrong size is corrupt."""
    put_model(store, "m", b"config", b"entry")
    store.blob_path(digest_of(b"entry")).write_bytes(b"ent")
    with pytest.raises(Corrupt, match="wrong size"):
        copy(store, parse_name("m"), parse_name("n"))


def test_a_copy_may_be_made_while_another_process_writes(store: Store) -> None:
    """Copying is writing, and writers do not exclude each other."""
    put_model(store, "m", b"config")
    with writer_elsewhere(store.root):
        copy(store, parse_name("m"), parse_name("n"))
    assert len(store.list_names()) == 2
