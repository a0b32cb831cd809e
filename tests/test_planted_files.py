"""Files planted where a pull works: refused or replaced, never followed nor waited for."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from quantmill.digests import digest_of
from quantmill.errors import StoreError
from quantmill.locking import LOCK_FILE
from quantmill.partials import Partial
from quantmill.store import Store
from registries import misbehaving, serve_model
from test_transfer import BLOBS, LONG, MANIFEST, fetch, is_whole_or_absent


def planted(tmp_path: Path) -> tuple[Store, Path]:
    """A store and the place of the longest blob, half fetched, in it."""
    store = Store(tmp_path / "store")
    store.partials.mkdir(parents=True)
    return store, store.partials / digest_of(LONG).file_name


def pulled(store: Store) -> None:
    with misbehaving(serve_model(MANIFEST, BLOBS)) as server:
        fetch(server, store)
    assert is_whole_or_absent(store)


def test_a_link_in_place_of_a_half_fetched_blob_is_refused(tmp_path: Path) -> None:
    """What it leads to is not written to."""
    store, place = planted(tmp_path)
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    place.symlink_to(victim)
    with pytest.raises(StoreError, match=place.name):
        pulled(store)
    assert victim.read_bytes() == b"precious"


def test_a_pipe_or_device_in_place_of_a_half_fetched_blob_is_refused(tmp_path: Path) -> None:
    """The error names it; nothing is written to it or waited for."""
    store, place = planted(tmp_path)
    os.mkfifo(place)
    with pytest.raises(StoreError, match="is no file") as caught:
        pulled(store)
    assert caught.value.hint == "remove it"
    place.unlink()
    try:
        os.mknod(place, 0o600 | stat.S_IFCHR, os.makedev(1, 5))
        os.close(os.open(place, os.O_RDWR))
    except OSError:
        pytest.skip("devices cannot be made here")
    with pytest.raises(StoreError, match="is no file"):
        pulled(store)


@pytest.mark.parametrize("kind", ["link", "link to nothing", "endless", "pipe"])
def test_a_planted_list_of_spans_is_replaced(kind: str, tmp_path: Path) -> None:
    """Neither followed, read without end nor waited for; the pull writes a list of its own."""
    store, place = planted(tmp_path)
    victim, spans = tmp_path / "victim", place.with_name(f"{place.name}.spans")
    if kind == "pipe":
        os.mkfifo(spans)
    else:
        victim.write_bytes(b"precious")
        endless, absent = Path("/dev/zero"), tmp_path / "absent"
        spans.symlink_to({"link": victim, "link to nothing": absent, "endless": endless}[kind])
    pulled(store)
    assert not (tmp_path / "absent").exists()
    assert kind == "pipe" or victim.read_bytes() == b"precious"
    assert not spans.is_symlink()


@pytest.mark.parametrize(
    "spans",
    [
        b"0 100000\n", b"0 99999\n1 100000\n", b"5 3\n-1 7\n0 10\n0 10\n", b"\xb2 \xb3\n", b"0 10",
        b"0 99999999999999999999999999\n", b"\0" * 1000, b"0 1\n" * 500_000,
        b"".join(b"%d %d\n" % (i, i + 1) for i in range(0, 100_000, 2)),
    ],
)  # fmt: skip
def test_a_list_of_spans_that_lies_costs_time_only(spans: bytes, tmp_path: Path) -> None:
    """Bytes said to be there that are not, spans twice, backwards, by the thousand."""
    store, place = planted(tmp_path)
    place.write_bytes(b"?" * len(LONG))
    place.with_name(f"{place.name}.spans").write_bytes(spans)
    with misbehaving(serve_model(MANIFEST, BLOBS)) as server:
        fetch(server, store)
        assert len(server.seen) < 20
    assert is_whole_or_absent(store)


def test_a_list_with_thousands_of_holes_is_not_used(tmp_path: Path) -> None:
    """A request for each would take hours; a blob is fetched anew instead."""
    store, place = planted(tmp_path)
    place.write_bytes(LONG)
    lines = b"".join(b"%d %d\n" % (i, i + 1) for i in range(0, len(LONG), 2))
    place.with_name(f"{place.name}.spans").write_bytes(lines)
    partial = Partial(store, digest_of(LONG), len(LONG))
    partial.close()
    assert partial.have == []


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_planted_lock_hurts_nothing(kind: str, tmp_path: Path) -> None:
    """What a link in place of the lock leads to stays as it is; a pipe is not waited for."""
    store, _ = planted(tmp_path)
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    lock = store.root / LOCK_FILE
    if kind == "link":
        lock.symlink_to(victim)
    else:
        os.mkfifo(lock)
    pulled(store)
    assert victim.read_bytes() == b"precious"
