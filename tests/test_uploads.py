"""Uploads: to storage that Ollama's registry names, and those that go on in the next run."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fakes import put_model, write_file
from ollamaregistries import OllamaRegistry, ollama_registry
from quantmill import prune, pushing, uploading
from quantmill.addresses import registry_origin
from quantmill.credentials import Login
from quantmill.digests import Digest, digest_of
from quantmill.errors import RegistryError, StoreError
from quantmill.files import Disk
from quantmill.names import parse_name
from quantmill.ollamakey import OllamaKey
from quantmill.patience import Patience
from quantmill.pushing import Pushed, push
from quantmill.registry import Registry
from quantmill.store import Store
from quantmill.uploadnotes import UploadNote
from registries import Handler, misbehaving, real_registry

QUICK = Patience(tries=4, first_delay=0.001, longest_delay=0.01, connect=2, stall=2)
KIB = 1024
LONG = bytes(i * 7 % 251 for i in range(100 * KIB))
PARTS = [LONG[at : at + 32 * KIB] for at in range(0, len(LONG), 32 * KIB)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts small enough that a blob of 100 KiB has four."""
    monkeypatch.setattr(pushing, "PART", 32 * KIB)
    monkeypatch.setattr(uploading, "OLLAMA_LEAST", 32 * KIB)


def nobody(_: str) -> Login | None:
    return None


def send(host: str, folder: Path, *, ollamas: bool = True, disk: Disk | None = None) -> Pushed:
    """Push a model of one long blob; a registry is Ollama's where it goes by keys."""
    store, name = Store(folder / "s", disk or Disk()), f"{host}/a/m"
    put_model(Store(store.root), name, b"{}", LONG)
    key = OllamaKey(folder / "absent")
    return push(name, store=store, patience=QUICK, find=lambda _: key if ollamas else None)


def requests(registry: OllamaRegistry, method: str) -> list[str]:
    return [line for line in registry.asked if line.startswith(method)]


# -- whole blobs to storage ------------------------------------------------------------------------


def test_storage_gets_the_blob_as_the_registry_says(tmp_path: Path) -> None:
    """The address letter for letter, the headers that were signed, no token; then the commit."""
    path = "/store/a%2fb/../c/{id}"
    signed = {"x-amz-checksum-sha256": "c3Vt", "Content-Type": "model/blob"}
    with ollama_registry(
        ways="direct", anonymous=True, direct_path=path, signed_headers=signed
    ) as registry:
        assert send(registry.host, tmp_path).sent == 2
        got = {body: (where, headers) for where, headers, body in registry.stored}
        assert set(got) == {b"{}", LONG}
        where, headers = got[LONG]
        assert where.startswith("/store/a%2fb/../c/")
        assert headers["x-amz-checksum-sha256"] == "c3Vt"
        assert headers["content-type"] == "model/blob"
        assert headers["content-length"] == str(len(LONG))
        assert set(registry.blobs.values()) == {b"{}", LONG}
        assert requests(registry, "PATCH") == []


def test_headers_that_frame_a_request_are_not_the_registrys(tmp_path: Path) -> None:
    """Neither the length nor the host nor the connection is what it has signed."""
    lies = {"Content-Length": "1", "Host": "other.test", "Transfer-Encoding": "chunked",
            "Connection": "close"}  # fmt: skip
    with ollama_registry(ways="direct", anonymous=True, signed_headers=lies) as registry:
        send(registry.host, tmp_path)
        for _, headers, body in registry.stored:
            assert headers["content-length"] == str(len(body))
            assert registry.storage.endswith(headers.get("Host", headers.get("host", "")))
            assert "transfer-encoding" not in {name.lower() for name in headers}


@pytest.mark.parametrize(
    "address",
    ["/relative", "relative", "file:///etc/passwd", "http://u:p@127.0.0.1/x", "//127.0.0.1/x",
     "http://[", "http://127.0.0.1/a b"],
)  # fmt: skip
def test_addresses_of_storage_that_lead_nowhere_are_refused(address: str, tmp_path: Path) -> None:
    """Only a whole HTTP address without a password takes a blob; nothing is sent before that."""
    with ollama_registry(ways="direct", anonymous=True, direct_path=address) as registry:
        with pytest.raises(RegistryError) as caught:
            send(registry.host, tmp_path)
        assert caught.value.kind == "bad_redirect"
        assert registry.blobs == {}


def test_storage_is_never_in_the_clear_nor_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """From HTTPS to HTTP, and from a public host to a private address, no blob goes."""
    addresses = {"r.test": "8.8.8.8", "inside.test": "10.0.0.1"}
    monkeypatch.setattr(
        "socket.getaddrinfo", lambda host, *_, **__: [(0, 0, 0, "", (addresses[host], 443))]
    )
    told = {"x-direct-upload-url": "http://r.test/store"}
    with pytest.raises(RegistryError, match="without encryption"):
        uploading._direct("https://r.test/v2/", told)
    with (
        Registry(registry_origin(parse_name("r.test/a/m")), "a/m") as registry,
        pytest.raises(RegistryError, match=r"inside\.test, a private address"),
    ):
        registry.deliver("https://inside.test/x", "a blob", headers={}, content=lambda: iter([b""]))


def test_an_upload_does_not_go_on_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A public registry that says so, in an answer or in a note of an earlier run, is refused."""
    addresses = {"r.test": "8.8.8.8", "inside.test": "10.0.0.1"}
    monkeypatch.setattr(
        "socket.getaddrinfo", lambda host, *_, **__: [(0, 0, 0, "", (addresses[host], 443))]
    )
    with (
        Registry(registry_origin(parse_name("r.test/a/m")), "a/m") as registry,
        pytest.raises(RegistryError, match=r"inside\.test, a private address"),
        registry.exchange("PATCH", "https://inside.test/x", "a blob"),
    ):
        pass


def test_storage_on_the_registrys_own_host_gets_no_token(tmp_path: Path) -> None:
    """The address carries what it needs."""
    seen = list[bool]()
    with ollama_registry(ways="direct", anonymous=True) as registry:

        def both(request: Handler) -> None:
            if request.path.startswith("/here"):
                seen.append("Authorization" in request.headers)
                registry.store(request)
            else:
                registry.answer(request)

        with misbehaving(both) as server:
            registry.host, registry.direct_path = server.host, f"http://{server.host}/here/{{id}}"
            send(server.host, tmp_path)
    assert seen == [False, False]


@pytest.mark.parametrize("status", [500, 503])
def test_storage_that_fails_for_a_while_gets_a_fresh_address(status: int, tmp_path: Path) -> None:
    """A signed address may be good for once: each try begins with another one."""
    with ollama_registry(ways="direct", anonymous=True, storage_fails=[status, status]) as registry:
        send(registry.host, tmp_path)
        assert len(registry.stored) == len({where for where, _, _ in registry.stored}) == 4
        assert set(registry.blobs.values()) == {b"{}", LONG}


def test_a_commit_that_fails_for_a_while_sends_no_blob_again(tmp_path: Path) -> None:
    """What storage has is not brought twice."""
    with ollama_registry(ways="direct", anonymous=True, commit_fails=[500, 502]) as registry:
        send(registry.host, tmp_path)
        assert len(registry.stored) == 2
        assert set(registry.blobs.values()) == {b"{}", LONG}


@pytest.mark.parametrize("ways", ["direct", "apart", "here"])
def test_an_end_whose_answer_was_lost_is_no_failure(ways: str, tmp_path: Path) -> None:
    """The upload is not known any more, as the blob is there: nothing is sent again."""
    with ollama_registry(ways=ways, anonymous=True, answers_lost=[500, 502]) as registry:
        send(registry.host, tmp_path)
        sent = len(registry.stored) or len(requests(registry, "PATCH"))
        assert sent == (2 if ways == "direct" else len(PARTS) + 1)
        assert set(registry.blobs.values()) == {b"{}", LONG}


def test_storage_that_refuses_is_one_error(tmp_path: Path) -> None:
    """It names storage and registry, not the address, and nothing is named by a manifest."""
    path = "/store/{id}?signature=h1dden"
    with ollama_registry(
        ways="direct", anonymous=True, storage_fails=[403] * 9, direct_path=path
    ) as registry:
        with pytest.raises(RegistryError, match="answers 403") as caught:
            send(registry.host, tmp_path)
        assert registry.host in caught.value.message
        assert registry.storage.removeprefix("http://") in caught.value.message
        assert "h1dden" not in f"{caught.value.message} {caught.value.hint}"
        assert registry.manifests == {}


# -- parts to storage ------------------------------------------------------------------------------


def test_each_part_goes_where_the_registry_says(tmp_path: Path) -> None:
    """In order, each to its own address, and the etag at the end is that of the parts."""
    with ollama_registry(ways="apart", anonymous=True) as registry:
        send(registry.host, tmp_path)
        bodies = [body for where, _, body in registry.stored if len(body) > 2]
        assert bodies == PARTS
        assert all(where.endswith("?X=%3a") for where, _, _ in registry.stored)
        assert set(registry.blobs.values()) == {b"{}", LONG}


def test_a_part_that_storage_fails_is_sent_again_alone(tmp_path: Path) -> None:
    """What storage has stays there."""
    with ollama_registry(ways="apart", anonymous=True) as registry:
        store = registry.store

        def third_fails_twice(request: Handler) -> None:
            if "/2?" in request.path and not registry.storage_fails and not registry.nonces:
                registry.storage_fails += [500, 503]
                registry.nonces.append("done")
            store(request)

        registry.store = third_fails_twice  # type: ignore[method-assign]
        with misbehaving(third_fails_twice) as storage:
            registry.storage = f"http://{storage.host}"
            send(registry.host, tmp_path)
        sizes = [len(body) for _, _, body in registry.stored if len(body) > 2]
        assert len(sizes) == len(PARTS) + 2
        assert set(registry.blobs.values()) == {b"{}", LONG}


def test_parts_that_stay_here_have_an_etag_as_well(tmp_path: Path) -> None:
    """As Ollama sends it; the registry's check of it is the test."""
    with ollama_registry(ways="here", anonymous=True) as registry:
        send(registry.host, tmp_path)
        assert len(requests(registry, "PATCH")) == len(PARTS) + 1
        assert set(registry.blobs.values()) == {b"{}", LONG}


def test_parts_that_came_before_are_not_mixed_with_those_of_storage(tmp_path: Path) -> None:
    """How the registry keeps what it took is not known: the blob starts anew, all of it apart."""
    with ollama_registry(ways="here", anonymous=True) as registry:

        def changes_its_ways(request: Handler) -> None:
            second = request.headers.get("Content-Range", "").startswith(f"{32 * KIB}-")
            if second and registry.ways == "here":
                registry.ways = "apart"
                request.rfile.read(int(request.headers["Content-Length"]))
                request.reply(500)
            else:
                registry.answer(request)

        with misbehaving(changes_its_ways) as server:
            registry.host = server.host
            send(server.host, tmp_path)
        assert [body for _, _, body in registry.stored if len(body) > 2] == PARTS
        assert len(requests(registry, "GET /v2/a/m/blobs/uploads/")) == 1
        assert LONG in registry.blobs.values()


def sent_elsewhere(location: str) -> Callable[[Handler], None]:
    """A registry that sends every part elsewhere."""

    def answer(request: Handler) -> None:
        request.rfile.read(int(request.headers.get("Content-Length", 0)))
        if request.command == "POST":
            request.reply(202, Location="/v2/a/m/blobs/uploads/1")
        elif request.command == "PATCH":
            request.reply(307, Location=location)
        else:
            request.reply(404 if request.command == "HEAD" else 201)

    return answer


def test_a_part_sent_nowhere_is_refused(tmp_path: Path) -> None:
    """A redirect without an address is none."""
    with misbehaving(sent_elsewhere("")) as server, pytest.raises(RegistryError) as caught:
        send(server.host, tmp_path)
    assert caught.value.kind == "bad_redirect"


def test_a_registry_may_answer_before_it_has_read_the_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It points to storage and hangs up: what it does not want to read is not pressed on it."""
    monkeypatch.setattr(pushing, "PART", 64 << 20)
    monkeypatch.setattr(uploading, "OLLAMA_LEAST", 64 << 20)
    long = bytes(16 << 20)
    with ollama_registry(ways="apart", anonymous=True) as registry:

        def hasty(request: Handler) -> None:
            if request.command == "PATCH" and int(request.headers["Content-Length"]) == len(long):
                name = request.path.rpartition("/")[2]
                where = f"{registry.storage}/part/{name.partition('-')[0]}/0"
                request.reply(307, Location=where, Connection="close")
                request.close_connection = True
            else:
                registry.answer(request)

        with misbehaving(hasty) as server:
            registry.host = server.host
            name = f"{server.host}/a/m"
            put_model(Store(tmp_path), name, b"{}", long)
            push(name, store=tmp_path, patience=QUICK, find=lambda _: OllamaKey(tmp_path / "no"))
        assert long in registry.blobs.values()


def test_only_ollamas_registry_sends_parts_elsewhere(tmp_path: Path) -> None:
    """From any other that is a refusal, and storage sees nothing."""
    with misbehaving(lambda request: request.reply(200)) as storage:
        with (
            misbehaving(sent_elsewhere(f"http://{storage.host}/x")) as server,
            pytest.raises(RegistryError) as caught,
        ):
            send(server.host, tmp_path, ollamas=False)
        assert caught.value.kind == "refused"
        assert storage.seen == []


def test_other_registries_see_nothing_of_ollamas_ways(tmp_path: Path) -> None:
    """No header and no parameter that is not of the distribution API."""
    with sessions() as server:
        send(server.host, tmp_path, ollamas=False)
        for path, headers in server.seen:
            assert not any(name.lower().startswith("x-") for name in headers)
            assert "etag" not in path
            assert not path.endswith("uploads/") or "digest" not in path
        assert [path for path, _ in server.seen if "/uploads/?" in path] == []


# -- uploads that go on ----------------------------------------------------------------------------


class Sessions:
    """A registry whose uploads can be gone on with; it keeps blobs whose digest is right."""

    def __init__(self) -> None:
        self.host, self.seen = "", list[tuple[str, dict[str, str]]]()
        self.parts: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.commands: list[tuple[str, str]] = []
        self.break_after: int | None = None
        self.on_get: Callable[[Handler], bool] = lambda _: False
        self._lock = threading.Lock()

    def answer(self, request: Handler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        path, _, query = request.path.partition("?")
        name = path.rpartition("/")[2]
        with self._lock:
            self.commands.append((request.command, path))
            if request.command == "HEAD":
                request.reply(200 if name in self.blobs else 404)
            elif request.command == "POST":
                name = str(len(self.parts))
                self.parts[name] = b""
                request.reply(202, Location=f"{path}{name}?state=0")
            elif "/manifests/" in path:
                request.reply(201)
            elif request.command == "GET":
                if not self.on_get(request):
                    self._tell(request, path, name, 204)
            elif name not in self.parts:
                request.reply(404)
            elif request.command == "PATCH":
                self._take(request, path, name, body)
            else:
                data = self.parts.pop(name) + body
                digest = query.rpartition("digest=")[2].replace("%3A", ":")
                right = str(digest_of(data)) == digest
                if right:
                    self.blobs[digest] = data
                request.reply(201 if right else 400)

    def _take(self, request: Handler, path: str, name: str, body: bytes) -> None:
        if self.break_after is not None and len(self.parts[name]) >= self.break_after:
            request.reply(403)
            return
        if request.headers["Content-Range"].startswith(f"{len(self.parts[name])}-"):
            self.parts[name] += body
            self._tell(request, path, name, 202)
        else:
            request.reply(416)

    def _tell(self, request: Handler, path: str, name: str, status: int) -> None:
        if name not in self.parts:
            request.reply(404)
            return
        got = len(self.parts[name])
        request.reply(status, Location=f"{path}?state={got}", Range=f"0-{max(got - 1, 0)}")

    def of(self, command: str) -> list[str]:
        return [path for name, path in self.commands if name == command]


@contextmanager
def sessions() -> Iterator[Sessions]:
    """Such a registry inside this block."""
    found = Sessions()
    with misbehaving(found.answer) as server:
        found.host, found.seen = server.host, server.seen
        yield found


def notes(folder: Path) -> list[Path]:
    found = Store(folder / "s").uploads
    return sorted(found.iterdir()) if found.is_dir() else []


def break_off(server: Sessions, folder: Path, **options: Disk) -> None:
    """A push that ends after two parts of the long blob."""
    server.break_after = 2 * 32 * KIB
    with pytest.raises(RegistryError, match="forbids"):
        send(server.host, folder, ollamas=False, **options)
    server.break_after = None
    server.commands.clear()


def test_the_next_run_sends_the_rest(tmp_path: Path) -> None:
    """Two parts of four were there; the note is private, and gone when the blob is there."""
    with sessions() as server:
        break_off(server, tmp_path)
        (note,) = notes(tmp_path)
        assert stat.S_IMODE(note.stat().st_mode) == 0o600
        send(server.host, tmp_path, ollamas=False)
        assert len(server.of("PATCH")) == 2
        assert LONG in server.blobs.values()
        assert notes(tmp_path) == []


def test_a_note_is_gone_when_another_run_has_sent_the_blob(tmp_path: Path) -> None:
    """Nothing is asked of the upload then."""
    with sessions() as server:
        break_off(server, tmp_path)
        server.blobs[str(digest_of(LONG))] = LONG
        send(server.host, tmp_path, ollamas=False)
        assert server.of("GET") == []
        assert notes(tmp_path) == []


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 416, 500])
def test_an_upload_that_is_not_known_any_more_starts_anew(status: int, tmp_path: Path) -> None:
    """Whatever the registry answers about it."""
    with sessions() as server:
        break_off(server, tmp_path)

        def refuse(request: Handler) -> bool:
            request.reply(status)
            return True

        server.on_get = refuse
        send(server.host, tmp_path, ollamas=False)
        assert len(server.of("PATCH")) == len(PARTS)
        assert LONG in server.blobs.values()


@pytest.mark.parametrize("told", ["", "0-999999999", "5-9", "bytes", "0-102400"])
def test_an_answer_about_an_upload_that_makes_no_sense_starts_it_anew(
    told: str, tmp_path: Path
) -> None:
    """More bytes than the blob has, no count, nonsense."""
    with sessions() as server:
        break_off(server, tmp_path)

        def lie(request: Handler) -> bool:
            request.reply(204, Location=request.path, Range=told)
            return True

        server.on_get = lie
        send(server.host, tmp_path, ollamas=False)
        assert len(server.of("PATCH")) == len(PARTS)
        assert LONG in server.blobs.values()


def test_an_upload_with_other_bytes_in_it_starts_anew(tmp_path: Path) -> None:
    """The digest at the end tells; then the blob is sent from its start."""
    with sessions() as server:
        break_off(server, tmp_path)
        (name,) = [name for name, data in server.parts.items() if data]
        server.parts[name] = server.parts[name][::-1]
        send(server.host, tmp_path, ollamas=False)
        assert len(server.of("PATCH")) == 2 + len(PARTS)
        assert LONG in server.blobs.values()


@pytest.mark.parametrize(
    "text",
    ["", "\n", "http://{other}/v2/a/m/blobs/uploads/0\n", "http://{own}/v2/a/m/blobs/uploads/0",
     "http://u:p@{own}/x\n", "file:///etc/passwd\n", "/v2/a/m/blobs/uploads/0\n", "\xff\n",
     "http://{own}/a b\n", "x" * 9000],
)  # fmt: skip
def test_a_note_that_leads_elsewhere_is_not_followed(text: str, tmp_path: Path) -> None:
    """Another host, another scheme, a password, half a line: nobody is asked, all is sent."""
    with sessions() as server, misbehaving(lambda request: request.reply(204)) as other:
        break_off(server, tmp_path)
        (note,) = notes(tmp_path)
        note.write_bytes(text.format(other=other.host, own=server.host).encode("latin-1"))
        send(server.host, tmp_path, ollamas=False)
        assert server.of("GET") == []
        assert other.seen == []
        assert len(server.of("PATCH")) == len(PARTS)


class Unwritable(Disk):
    """A disk whose notes cannot be opened, or not written."""

    def __init__(self, operation: str) -> None:
        self._operation = operation

    def open(self, folder: Path, name: str) -> tuple[Path, int]:
        self._fail("open")
        return super().open(folder, name)

    def write(self, fd: int, data: memoryview, offset: int, path: Path) -> None:
        self._fail("write")
        super().write(fd, data, offset, path)

    def remove(self, path: Path) -> None:
        self._fail("remove")
        super().remove(path)

    def make_private(self, fd: int, path: Path) -> None:
        self._fail("make_private")
        super().make_private(fd, path)

    def _fail(self, operation: str) -> None:
        if operation == self._operation:
            raise StoreError("read-only file system", kind="io")


@pytest.mark.parametrize("operation", ["open", "write", "remove", "make_private"])
def test_a_store_that_cannot_be_written_to_is_pushed_from(operation: str, tmp_path: Path) -> None:
    """Without a note an upload starts anew; nothing fails."""
    with sessions() as server:
        break_off(server, tmp_path, disk=Unwritable(operation))
        send(server.host, tmp_path, ollamas=False, disk=Unwritable(operation))
        assert LONG in server.blobs.values()
        assert all(stat.S_IMODE(note.stat().st_mode) == 0o600 or not note.stat().st_size
                   for note in notes(tmp_path))  # fmt: skip


def note_of(folder: Path, digest: Digest) -> UploadNote:
    origin = registry_origin(parse_name("127.0.0.1:5000/a/m"))
    return UploadNote(Store(folder), origin, "a/m", digest)


def test_a_note_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    """Two that push the same blob do not send their parts into one upload."""
    url = "http://127.0.0.1:5000/v2/a/m/blobs/uploads/1"
    first = note_of(tmp_path, digest_of(LONG))
    first.write(url)
    second = note_of(tmp_path, digest_of(LONG))
    assert second.read() is None
    second.write(f"{url}?other")
    second.remove()
    second.close()
    first.close()
    assert note_of(tmp_path, digest_of(LONG)).read() == url


def test_notes_of_other_users_are_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a store that several share, an upload of somebody else is his."""
    note = note_of(tmp_path, digest_of(LONG))
    note.write("http://127.0.0.1:5000/v2/a/m/blobs/uploads/1")
    note.close()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert note_of(tmp_path, digest_of(LONG)).read() is None


def test_old_notes_are_pruned(tmp_path: Path) -> None:
    """They are temporary files to `prune`."""
    store = Store(tmp_path)
    path = write_file(store.uploads / "0", b"http://r.test/\n")
    assert prune(store).leftovers == ()
    assert [file.path for file in prune(store, 0).leftovers] == [path]
    assert not path.exists()


KILLED = """
import os, signal, sys
from quantmill import pushing
pushing.PART = 1 << 19
def die(event):
    # the first part is counted as it goes, the next one when the registry has taken it
    if event.blob_size > pushing.PART and event.blob_bytes >= 4 * pushing.PART:
        if event.blob_bytes == seen[-1]:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(event.blob_bytes)
seen = [0]
pushing.push(sys.argv[1], store=sys.argv[2], progress=die, find=lambda _: None)
"""


def test_a_push_that_was_killed_goes_on_in_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real registry gets the parts that it lacks, in the same upload."""
    monkeypatch.setattr(pushing, "PART", 1 << 19)
    data = bytes(range(256)) * (1 << 14)
    with real_registry(tmp_path / "registry") as registry:
        store, name = Store(tmp_path / "s"), f"{registry.host}/a/m"
        put_model(store, name, data, b"{}")
        killed = subprocess.run([sys.executable, "-c", KILLED, name, store.root], check=False)
        assert killed.returncode == -signal.SIGKILL
        (note,) = notes(tmp_path)
        assert note.stat().st_size
        parts, uploads = registry.requests("PATCH "), registry.requests("POST ")
        assert parts >= 4
        pushed = push(name, store=store, find=nobody)
        assert pushed.sent >= 1
        # four, and the one that was broken off, which the registry may log only now
        assert registry.requests("PATCH ") - parts in {4, 5}
        assert registry.requests("POST ") - uploads <= 1  # of the short blob, at most
        assert registry.blob_file(digest_of(data)).read_bytes() == data
        assert notes(tmp_path) == []
