"""The store on disk: what is named when, what a failure leaves, who may work at the same time."""

from __future__ import annotations

import ast
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fakes import FaultyDisk, files, finished, put, put_model, write_file, writer_elsewhere
from quantmill import locking
from quantmill import store as store_module
from quantmill.digests import Digest, digest_of, parse_digest
from quantmill.errors import Busy, Corrupt, NoSpace, NotFound, StoreError
from quantmill.files import Disk, translated
from quantmill.locking import LOCK_FILE
from quantmill.manifest import MAX_MANIFEST
from quantmill.names import parse_name
from quantmill.store import Store, default_root
from vectors import cases

NAME = parse_name("m")
SOURCE = Path(store_module.__file__).parent
STORE_MODULES = (
    "blobwriter", "execute", "facts", "journal", "partials", "pruning", "pulling", "pushing",
    "repairing", "store", "uploading", "uploadnotes", "verification",
)  # fmt: skip


# -- vectors ---------------------------------------------------------------------------------------


@cases("model_name", "list")
def test_listed_names_equal_the_vectors(case: dict[str, Any], store: Store) -> None:
    """Of the manifest paths that are there, the valid names are listed, sorted."""
    for path in case["input"]["paths"]:
        write_file(store.manifests / path)
    found = [str(stored.name) for stored in store.list_names()]
    assert sorted(found) == sorted(case["expect"]["names"])


@cases("model_name", "put")
def test_stored_blobs_equal_the_vectors(case: dict[str, Any], store: Store) -> None:
    """A committed blob has the digest, the size and the path of the vector."""
    data = bytes.fromhex(case["input"]["data_hex"])
    blob = finished(store, data)
    store.commit([blob])
    expect = case["expect"]
    assert (str(blob.digest), blob.size) == (expect["digest"], expect["size"])
    assert (store.root / expect["path"]).read_bytes() == data


@cases("model_name", "dirs")
def test_folders_equal_the_vectors(case: dict[str, Any]) -> None:
    """Blobs and manifests lie in the folders of the vector."""
    found = Store(case["input"]["models_dir"])
    assert found.manifests.as_posix() == case["expect"]["manifests"]
    assert found.blobs.as_posix() == case["expect"]["blobs"]


# -- where the store is ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "root"),
    [
        ({"QUANTMILL_STORE": "q", "OLLAMA_MODELS": "o"}, Path("q")),
        ({"OLLAMA_MODELS": "o"}, Path("o")),
        ({"QUANTMILL_STORE": "", "OLLAMA_MODELS": "o"}, Path("o")),
        ({"QUANTMILL_STORE": "~/q"}, Path("home/q")),
        ({}, Path("home/.ollama/models")),
    ],
)
def test_the_environment_names_the_root(
    environ: dict[str, str], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QUANTMILL_STORE wins over OLLAMA_MODELS, which wins over the home; empty means not set."""
    monkeypatch.setenv("HOME", "home")
    assert default_root(environ) == root


def test_free_space_is_known_before_the_store_exists(store: Store) -> None:
    """The file system that will hold the store is asked."""
    assert store.free_bytes()
    assert not store.root.exists()


# -- blobs -----------------------------------------------------------------------------------------


def test_a_blob_is_readable_by_all(store: Store) -> None:
    """Blobs have mode 0644, as Ollama writes them."""
    (ref,) = put(store, b"abc")
    assert store.blob_path(ref.digest).stat().st_mode & 0o777 == 0o644


def test_a_blob_has_no_name_before_commit(store: Store) -> None:
    """A finished blob lies under a temporary name."""
    blob = finished(store, b"abc")
    assert [b.digest for b in store.list_blobs()] == [None]
    assert not store.blob_path(blob.digest).exists()


def test_a_blob_written_in_pieces_is_one(store: Store) -> None:
    """Pieces of any kind of buffer are joined and hashed together."""
    with store.new_blob() as writer:
        for piece in (b"ab", memoryview(b"cd"), memoryview(bytearray(8)).cast("I")):
            writer.write(piece)
        blob = writer.finish()
    assert (blob.digest, blob.size) == (digest_of(b"abcd" + bytes(8)), 12)


def test_a_blob_that_is_there_is_kept_and_touched(store: Store) -> None:
    """A second copy leaves the first in place and refreshes its time."""
    (ref,) = put(store, b"abc")
    path = store.blob_path(ref.digest)
    os.utime(path, (0, 0))
    inode = path.stat().st_ino
    assert store.commit([finished(store, b"abc")]) == 0
    assert path.stat().st_ino == inode
    assert path.stat().st_mtime > 0


def test_a_blob_of_another_size_is_replaced(store: Store) -> None:
    """A file that is too short for its name is damaged and gives way."""
    (ref,) = put(store, b"abc")
    store.blob_path(ref.digest).write_bytes(b"ab")
    assert store.commit([finished(store, b"abc")]) == 1
    assert store.read_blob(ref.digest, 3) == b"abc"


def test_a_link_in_place_of_a_blob_is_replaced(store: Store, tmp_path: Path) -> None:
    """A link is not the blob, whatever it leads to."""
    (ref,) = put(store, b"abc")
    path = store.blob_path(ref.digest)
    path.unlink()
    path.symlink_to(write_file(tmp_path / "elsewhere", b"abc"))
    store.commit([finished(store, b"abc")])
    assert not path.is_symlink()


def test_equal_blobs_of_a_batch_are_stored_once(store: Store) -> None:
    """The same content twice in one commit gives one new file and no leftover."""
    assert store.commit([finished(store, b"abc"), finished(store, b"abc")]) == 1
    assert len(store.list_blobs()) == 1


def test_an_abandoned_writer_leaves_nothing(store: Store) -> None:
    """Leaving the context before `finish` removes the file."""
    with store.new_blob() as writer:
        writer.write(b"abc")
    assert files(store) == {}


def test_a_failing_writer_leaves_nothing(store: Store) -> None:
    """An exception inside the context removes the file and passes through."""
    with pytest.raises(ZeroDivisionError), store.new_blob() as writer:
        writer.write(bytes(1 // 0))
    assert files(store) == {}


def test_discarded_blobs_are_gone(store: Store) -> None:
    """Finished blobs that will not be committed can be removed."""
    store.discard([finished(store, b"a"), finished(store, b"b")])
    assert files(store) == {}


def test_a_finished_blob_takes_no_more(store: Store) -> None:
    """Writing after `finish` is a mistake of the programmer."""
    with store.new_blob() as writer:
        writer.finish()
        with pytest.raises(ValueError, match="finished"):
            writer.write(b"abc")


def test_a_file_of_the_wrong_length_is_not_accepted(store: Store) -> None:
    """When the file system lost bytes, `finish` notices and nothing remains."""
    with store.new_blob() as writer:
        writer.write(b"abc")
        next(store.blobs.iterdir()).write_bytes(b"ab")
        with pytest.raises(Corrupt, match="wrote 3 bytes"):
            writer.finish()
    assert files(store) == {}


def test_blobs_are_read_up_to_a_limit(store: Store) -> None:
    """A blob larger than the caller expects is refused, not read."""
    (ref,) = put(store, b"abc")
    with pytest.raises(Corrupt, match="3 bytes; 2 is the limit"):
        store.read_blob(ref.digest, 2)


def test_a_blob_that_ends_early_is_corrupt(store: Store) -> None:
    """Asking for bytes beyond the end is an error that says where the blob ends."""
    (ref,) = put(store, b"abc")
    with pytest.raises(Corrupt, match="ends at byte 3, 5 are needed"):
        list(store.blob_chunks(ref.digest, 1, 5))


def test_chunks_join_to_the_range(store: Store) -> None:
    """A range is read in pieces of at most the given size."""
    (ref,) = put(store, b"abcdefgh")
    assert list(store.blob_chunks(ref.digest, 1, 6, chunk=2)) == [b"bc", b"de", b"f"]


def test_a_missing_blob_is_not_found(store: Store) -> None:
    """The size of a blob that is not there is NotFound."""
    with pytest.raises(NotFound):
        store.blob_size(Digest("0" * 64))


def test_a_folder_is_no_blob(store: Store) -> None:
    """A folder under a blob's name is corrupt."""
    digest = Digest("0" * 64)
    store.blob_path(digest).mkdir(parents=True)
    with pytest.raises(Corrupt, match="not a regular file"):
        store.blob_size(digest)


def test_old_blob_names_are_understood(store: Store) -> None:
    """Files named with a colon, as old Ollama versions wrote them, are blobs of that digest."""
    write_file(store.blobs / f"sha256:{'A' * 64}")
    assert [b.digest for b in store.list_blobs()] == [parse_digest(f"sha256:{'a' * 64}")]


def vanishing(store: Store, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Let `path` be removed right after the folder it lies in has been read."""
    scan = store.disk.scan

    def scan_and_remove(folder: Path) -> list[Path]:
        found = scan(folder)
        if folder == path.parent:
            path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(store.disk, "scan", scan_and_remove)


def test_a_blob_may_vanish_while_blobs_are_listed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that another process renames or removes meanwhile is passed over."""
    kept, gone = put(store, b"abc", b"def")
    vanishing(store, monkeypatch, store.blob_path(gone.digest))
    assert [b.digest for b in store.list_blobs()] == [kept.digest]


# -- names -----------------------------------------------------------------------------------------


def test_names_take_the_spelling_that_is_there(store: Store) -> None:
    """A name that differs in case alone means the existing model, part by part."""
    write_file(store.manifests / "Host/NS/Model/Tag")
    assert store.spelling(parse_name("host/ns/MODEL:other")).path == "Host/NS/Model/other"


def test_an_exact_spelling_wins(store: Store) -> None:
    """Where two spellings exist, each is reached by its own."""
    for path in ("h/n/M/t", "h/n/m/t"):
        write_file(store.manifests / path)
    assert store.spelling(parse_name("h/n/m:t")).model == "m"


def test_putting_another_spelling_replaces_the_model(store: Store) -> None:
    """There is one model after a name was put twice in different case."""
    put_model(store, "Model:Tag", b"1")
    raw = put_model(store, "mODEL:tAG", b"2")
    assert [s.name.display for s in store.list_names()] == ["Model:Tag"]
    assert store.get_manifest(parse_name("model:tag")).raw == raw


@pytest.mark.parametrize(
    "path",
    [
        "h/n/m/.DS_Store",
        "h/n/m/.tmp-0123",
        "h/n/.m/t",
        "h/n/m/a tag",
        "h/na.me/m/t",
        "h/n/m",
        "h/n/m/t/deeper",
    ],
)
def test_files_that_are_no_manifests_are_not_listed(path: str, store: Store) -> None:
    """Hidden files, invalid names and other depths are passed over."""
    write_file(store.manifests / path)
    assert store.list_names() == []


def test_models_behind_links_are_listed(store: Store, tmp_path: Path) -> None:
    """A linked folder and a linked file are models: reading follows links, so listing does."""
    target = write_file(tmp_path / "n/m/t")
    (store.manifests / "h/n/m").mkdir(parents=True)
    (store.manifests / "h/n/m/t").symlink_to(target)
    (store.manifests / "linked").symlink_to(tmp_path)
    assert [s.name.path for s in store.list_names()] == ["h/n/m/t", "linked/n/m/t"]


def test_links_in_a_circle_are_passed_over(store: Store) -> None:
    """A link to itself lists nothing and ends."""
    store.manifests.mkdir(parents=True)
    (store.manifests / "h").symlink_to(store.manifests / "h")
    assert store.list_names() == []


def test_a_manifest_may_vanish_while_names_are_listed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is removed meanwhile is passed over."""
    put_model(store, "m", b"1")
    vanishing(store, monkeypatch, store.manifest_path(NAME))
    assert store.list_names() == []


def test_an_unreadable_folder_is_an_error_of_the_store(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that belongs to another user is refused in words, not as if it were empty."""

    def refuse(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StoreError, match="Permission denied") as caught:
        store.list_names()
    assert caught.value.kind == "io"


# -- manifests -------------------------------------------------------------------------------------


def test_a_missing_model_is_not_found(store: Store) -> None:
    """NotFound names the model as the user knows it."""
    with pytest.raises(NotFound, match="no model named m:latest"):
        store.get_manifest(NAME)


def test_a_folder_is_no_model(store: Store) -> None:
    """A folder in place of a manifest is not found, as it is not listed."""
    store.manifest_path(NAME).mkdir(parents=True)
    with pytest.raises(NotFound):
        store.get_manifest(NAME)


def test_a_file_in_place_of_a_folder_is_not_found(store: Store) -> None:
    """A path that leads through a file holds no model."""
    write_file(store.manifests / "registry.ollama.ai/library")
    with pytest.raises(NotFound):
        store.get_manifest(NAME)


def test_an_oversize_manifest_is_corrupt(store: Store) -> None:
    """A manifest beyond the limit is refused before it is read."""
    path = write_file(store.manifest_path(NAME))
    os.truncate(path, MAX_MANIFEST + 1)
    with pytest.raises(Corrupt, match=f"manifest of m:latest has {MAX_MANIFEST + 1} bytes"):
        store.get_manifest(NAME)


def test_an_unreadable_manifest_is_corrupt(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest that the system will not read is corrupt, not missing."""
    put_model(store, "m", b"1")

    def refuse(fd: int, count: int, offset: int, path: Path) -> bytes:
        with translated(path):
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(store.disk, "read", refuse)
    with pytest.raises(Corrupt, match=r"manifest of m:latest: .*: Permission denied"):
        store.get_manifest(NAME)


def test_a_manifest_that_is_not_json_is_corrupt(store: Store) -> None:
    """Corrupt names the model and what is wrong."""
    write_file(store.manifest_path(NAME), b"{oops")
    with pytest.raises(Corrupt, match="manifest of m:latest"):
        store.get_manifest(NAME)


def test_removing_a_manifest_removes_empty_folders(store: Store) -> None:
    """Folders that held nothing else go too; the manifests folder and siblings stay."""
    for path in ("h/n/m/t", "h/other/m/t"):
        write_file(store.manifests / path)
    store.remove_manifest(parse_name("h/n/m:t"))
    assert [p.name for p in (store.manifests / "h").iterdir()] == ["other"]
    store.remove_manifest(parse_name("h/other/m:t"))
    assert list(store.manifests.iterdir()) == []


def test_removing_a_missing_manifest_is_not_found(store: Store) -> None:
    """NotFound, as for reading."""
    with pytest.raises(NotFound):
        store.remove_manifest(NAME)


def test_unfinished_manifests_are_found(store: Store) -> None:
    """Temporary files of an interrupted `put_manifest` can be listed for removal."""
    left = write_file(store.manifest_path(NAME).parent / ".tmp-01")
    assert [f.path for f in store.stale_files()] == [left]


# -- order of operations ---------------------------------------------------------------------------


def test_blobs_are_synced_before_any_is_named(store: Store) -> None:
    """Commit syncs every file, then renames every file, then syncs the folder once."""
    blobs = [finished(store, data) for data in (b"a", b"b", b"c")]
    disk = FaultyDisk()
    Store(store.root, disk).commit(blobs)
    assert disk.operations == ["sync"] * 3 + ["rename"] * 3 + ["sync_folder"]
    assert [path for _, path in disk.done[:3]] == [blob.path for blob in blobs]
    assert disk.done[-1][1] == store.blobs


def test_a_manifest_is_synced_before_it_is_named(store: Store) -> None:
    """A manifest and every folder on the way are synced, then it is renamed, the folder synced."""
    put_model(store, "m", b"1")
    disk = FaultyDisk()
    Store(store.root, disk).put_manifest(NAME, b"{}")
    target = store.manifest_path(NAME)
    assert disk.operations[:4] == ["create", "write", "close", "sync"]
    assert disk.done[3][1].parent == target.parent
    folders = [store.root, store.manifests, target.parent.parent.parent, target.parent.parent]
    assert disk.done[4:8] == [("sync_folder", folder) for folder in folders]
    assert disk.done[8:] == [("rename", target), ("sync_folder", target.parent)]


def test_new_folders_are_synced_into_their_parents(store: Store) -> None:
    """Each folder that is created is made durable before a file is put into it."""
    disk = FaultyDisk()
    Store(store.root, disk).put_manifest(NAME, b"{}")
    folders = [path for operation, path in disk.done if operation == "make_folder"]
    synced = [path for operation, path in disk.done if operation == "sync"]
    assert store.manifest_path(NAME).parent in folders
    assert {folder.parent for folder in folders} <= set(synced)
    assert disk.operations.index("write") > max(
        at for at, (operation, _) in enumerate(disk.done) if operation == "make_folder"
    )


def test_a_blob_that_is_kept_is_synced(store: Store) -> None:
    """What another program wrote may not be durable: file and folder are synced before use."""
    (ref,) = put(store, b"abc")
    again = finished(store, b"abc")
    disk = FaultyDisk()
    Store(store.root, disk).commit([again])
    path = store.blob_path(ref.digest)
    assert disk.done == [
        ("touch", path), ("sync", path), ("sync_folder", store.blobs), ("remove", again.path)
    ]  # fmt: skip


OF_PATHS = {
    "write_bytes", "write_text", "unlink", "rename", "replace", "mkdir", "rmdir", "touch", "chmod",
    "symlink_to", "hardlink_to", "read_bytes", "read_text", "open", "stat", "lstat", "exists",
    "is_file", "is_dir", "is_symlink", "iterdir", "glob", "rglob", "walk", "samefile",
}  # fmt: skip
WITHOUT_DISK = {
    "os.environ",
    "os.urandom",
    "os.strerror",
    "os.stat_result",
    "os.fstat",
    "os.geteuid",
}


@pytest.mark.parametrize("module", STORE_MODULES)
def test_only_the_disk_touches_the_disk(module: str) -> None:
    """Nothing under the store is read, written, renamed or removed but through `files.Disk`."""
    for node in ast.walk(ast.parse((SOURCE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            owner, text = ast.unparse(node.value), ast.unparse(node)
            if owner == "os":
                assert text in WITHOUT_DISK
            else:
                assert owner.endswith("disk") or node.attr not in OF_PATHS | {"flock"}, text
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) != "open", module


# -- failures --------------------------------------------------------------------------------------

OLD, NEW = (b"{}", b"old blob"), (b"{}", b"new blob", b"another")


def operations_of(action: Callable[[Store], object], root: Path) -> int:
    """How many disk operations an action takes."""
    disk = FaultyDisk()
    action(Store(root, disk))
    return len(disk.done)


def put_old(root: Path) -> bytes:
    return put_model(Store(root), "m", *OLD)


def put_new(store: Store) -> bytes:
    return put_model(store, "m", *NEW)


def check_whole(store: Store, *allowed: bytes | None) -> None:
    """The store shows exactly one of the allowed manifests, with all its blobs intact."""
    names = [stored.name.display for stored in store.list_names()]
    assert names in ([], ["m:latest"])
    found = store.get_manifest(NAME) if names else None
    assert (found.raw if found else None) in allowed
    for ref in found.all_refs() if found else ():
        assert store.hash_blob(ref.digest) == ref.digest


@pytest.mark.parametrize("former", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("forever", [False, True], ids=["once", "from there on"])
def test_any_failing_operation_leaves_the_model_before_or_after(
    tmp_path: Path, forever: bool, former: bool
) -> None:
    """Whichever disk operation fails, the model is the old or the new one and a retry completes."""

    def root_of(label: object) -> Path:
        root = tmp_path / str(label)
        if former:
            put_old(root)
        return root

    before = put_old(tmp_path / "old") if former else None
    after = put_new(Store(tmp_path / "new"))
    for number in range(operations_of(put_new, root_of("count"))):
        root = root_of(number)
        with pytest.raises(StoreError):
            put_new(Store(root, FaultyDisk(number, forever=forever)))
        check_whole(Store(root), before, after)
        assert put_new(Store(root)) == after
        check_whole(Store(root), after)


def test_a_manifest_that_fails_leaves_the_old_one(store: Store) -> None:
    """Until the rename, every failure while replacing a manifest leaves the old bytes."""
    before = put_model(store, "m", *OLD)
    for number in range(9):  # create, write, close, sync, four folders, rename
        with pytest.raises(StoreError):
            Store(store.root, FaultyDisk(number)).put_manifest(NAME, b"{}")
        assert store.get_manifest(NAME).raw == before
        assert store.stale_files() == []


@pytest.mark.parametrize("renames", [False, True], ids=["renames kept", "renames lost"])
def test_a_power_cut_leaves_the_model_before_or_after(tmp_path: Path, renames: bool) -> None:
    """What was not synced may be lost at any moment, and the model is still the old or the new."""
    before, after = put_old(tmp_path / "old"), put_new(Store(tmp_path / "new"))
    put_old(tmp_path / "count")
    for number in range(operations_of(put_new, tmp_path / "count") + 1):
        root = tmp_path / str(number)
        put_old(root)
        disk = FaultyDisk(number, forever=True)
        try:
            put_new(Store(root, disk))
        except StoreError:
            disk.lose_unsynced(renames=renames)
            check_whole(Store(root), before, after)
        else:
            disk.lose_unsynced(renames=renames)
            check_whole(Store(root), after)


def full(fd: int, data: memoryview, offset: int) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_no_space(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC while writing a blob exits with 4, says what to do and leaves nothing."""
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(NoSpace, match="No space left") as caught:
        put(store, b"abc")
    assert (caught.value.exit_code, caught.value.kind) == (4, "no_space")
    assert caught.value.hint
    assert files(store) == {}


def test_a_disk_that_fills_up_on_the_manifest_keeps_the_old_one(store: Store) -> None:
    """ENOSPC while writing the manifest leaves no temporary file and the former model."""
    before = put_model(store, "m", b"1")
    shown = files(store)
    disk = FaultyDisk(1, code=errno.ENOSPC)
    with pytest.raises(NoSpace):
        Store(store.root, disk).put_manifest(NAME, b"{}")
    assert disk.done[1][0] == "write"
    assert files(store) == shown
    assert store.get_manifest(NAME).raw == before


def test_hashing_what_is_no_file_is_corrupt(store: Store) -> None:
    """A named pipe in a blob's place is refused: reading it would wait for ever."""
    digest = put(store, b"abc")[0].digest
    store.blob_path(digest).unlink()
    os.mkfifo(store.blob_path(digest))
    with pytest.raises(Corrupt, match="not a regular file"):
        store.hash_blob(digest)
    assert not store.holds(digest, 3)


# -- company ---------------------------------------------------------------------------------------

WRITE = "import sys; from quantmill.store import Store\nwith Store(sys.argv[1]).writing(): pass"


def test_removing_is_refused_while_another_process_writes(store: Store) -> None:
    """A remover does not wait for a writer: Busy, at once."""
    with writer_elsewhere(store.root), pytest.raises(Busy), store.removing():
        pass


def test_removing_is_possible_when_the_writer_is_done(store: Store) -> None:
    """The lock goes with the process that held it."""
    with writer_elsewhere(store.root):
        pass
    with store.removing():
        assert (store.root / LOCK_FILE).exists()


def test_two_processes_may_write_at_once(store: Store) -> None:
    """Writers do not exclude each other."""
    with writer_elsewhere(store.root):
        command = [sys.executable, "-c", WRITE, str(store.root)]
        done = subprocess.run(command, timeout=60, check=False)
    assert done.returncode == 0


def test_a_remover_excludes_other_removers(store: Store) -> None:
    """Two removals at once: the second is Busy."""
    with store.removing(), pytest.raises(Busy), store.removing():
        pass


def test_a_file_system_without_locks_is_named(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where flock is not to be had, the message says so and what to do."""
    import fcntl

    def refuse(fd: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StoreError, match="has no locks: No locks") as caught, store.writing():
        pass
    assert caught.value.kind == "no_locks"
    assert "local disk" in (caught.value.hint or "")


def test_removing_on_a_network_file_system_warns(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other machines may not see the lock: whoever removes is told, whoever writes is not."""
    monkeypatch.setattr(locking, "file_system", lambda _: "nfs4")
    with store.writing():
        pass
    with pytest.warns(UserWarning, match=r"network file system \(nfs4\)"), store.removing():
        pass


def test_the_file_system_of_a_folder_is_that_of_its_mount(tmp_path: Path) -> None:
    """The longest mount point decides, the later one of two; blanks in names are escaped."""
    table = write_file(
        tmp_path / "mounts",
        b"1 0 8:1 / / rw - ext4 /dev/sda rw\n"
        b"2 1 0:5 / /net rw shared:1 - nfs4 host:/x rw\n"
        b"3 1 0:6 / /net/a\\040b rw - tmpfs none rw\n"
        b"4 1 0:7 / /twice rw - xfs a rw\n5 4 0:8 / /twice rw - cifs b rw\nnonsense\n",
    )
    expected = {"/home": "ext4", "/net/x": "nfs4", "/network": "ext4", "/net/a b/c": "tmpfs",
                "/twice": "cifs"}  # fmt: skip
    for folder, kind in expected.items():
        assert locking.file_system(Path(folder), str(table)) == kind
    assert locking.file_system(tmp_path, str(tmp_path / "absent")) is None


def test_a_lock_file_that_is_replaced_is_locked_anew(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock on a file that is gone keeps nobody out: the one under the name counts."""
    path = store.root / LOCK_FILE
    lock = Disk.lock
    removed: list[Path] = []

    def slow(disk: Disk, where: Path, *, exclusive: bool) -> int:
        fd = lock(disk, where, exclusive=exclusive)
        if not removed:
            removed.append(where)
            where.unlink()
        return fd

    monkeypatch.setattr(Disk, "lock", slow)
    with store.writing():
        assert path.exists()
        monkeypatch.undo()
        with pytest.raises(Busy), store.removing():
            pass


def test_another_users_lock_file_can_be_locked(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a store that several users share the first one's file is opened for reading."""
    with store.writing():
        pass
    system = os.open

    def refuse(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied")
        return system(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse)
    with store.removing():
        pass


def test_a_folder_that_vanishes_is_made_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may remove empty folders while a manifest is on its way into them."""
    sync, folder = Disk.sync, store.manifest_path(NAME).parent
    met: list[Path] = []

    def removing(disk: Disk, path: Path) -> None:
        if path == folder.parent and not met:
            met.append(path)
            folder.rmdir()
            folder.parent.rmdir()
        sync(disk, path)

    monkeypatch.setattr(Disk, "sync", removing)
    put_model(store, "m", b"1")
    assert met
    assert store.get_manifest(NAME)
