"""Push and pull against a real registry: Debian's docker-registry on a loopback port."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoints import SMALL, write_checkpoint
from fakes import files, put_model
from quantmill import create, pulling, pushing, verify
from quantmill.cli import run
from quantmill.credentials import Login, find_login
from quantmill.digests import digest_of
from quantmill.errors import Corrupt, NotFound, RegistryError
from quantmill.loggingin import login
from quantmill.moving import Moving
from quantmill.names import parse_name
from quantmill.patience import Patience
from quantmill.pulling import pull
from quantmill.pushing import push
from quantmill.store import Store
from registries import PASSWORD, RealRegistry, real_registry, require_real_registry
from tokenservers import token_server

QUICK = Patience(tries=3, first_delay=0.01, longest_delay=0.05, stall=5)
PATIENT = Patience(tries=40, first_delay=0.05, longest_delay=0.2, stall=5)
LONG = bytes(range(256)) * (4 << 12)  # 4 MiB
MIB = 1 << 20


def nobody(_: str) -> Login | None:
    return None


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[RealRegistry]:
    with real_registry(tmp_path / "registry") as found:
        yield found


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts small enough that a blob of 4 MiB has many."""
    monkeypatch.setattr(pulling, "PART", MIB // 2)
    monkeypatch.setattr(pulling, "PROBE", MIB // 16)
    monkeypatch.setattr(pulling, "NOTED", MIB // 8)
    monkeypatch.setattr(pushing, "PART", MIB // 2)


def test_a_model_comes_back_as_it_was(registry: RealRegistry, tmp_path: Path) -> None:
    """What is pushed and pulled into another store has the same manifest and verifies."""
    ours, theirs = Store(tmp_path / "ours"), Store(tmp_path / "theirs")
    name = f"{registry.host}/alice/m:v1"
    made = create(name, write_checkpoint(tmp_path / "c", SMALL), store=ours, quantize="int4")
    pushed = push(name, store=ours, find=nobody)
    pulled = pull(name, store=theirs, find=nobody)
    assert str(pulled.digest) == str(pushed.digest) == str(made.digest)
    assert pulled.fetched == pulled.blobs == pushed.sent == pushed.blobs
    assert files(ours) == files(theirs)
    assert not verify(theirs).damage


def test_what_is_there_does_not_move_again(registry: RealRegistry, tmp_path: Path) -> None:
    """A second push and a second pull transfer no blob."""
    store, name = Store(tmp_path / "s"), f"{registry.host}/alice/m"
    put_model(store, name, b"{}", LONG, b"x")
    push(name, store=store, find=nobody)
    assert push(name, store=store, find=nobody).sent == 0
    pull(name, store=tmp_path / "other", find=nobody)
    gets = registry.requests("GET /v2/alice/m/blobs/")
    assert pull(name, store=tmp_path / "other", find=nobody).fetched == 0
    assert registry.requests("GET /v2/alice/m/blobs/") == gets


def test_blobs_are_mounted_from_a_repository_beside_it(
    registry: RealRegistry, tmp_path: Path
) -> None:
    """Pushed under a second name, a model's blobs are not sent again."""
    store, name = Store(tmp_path / "s"), f"{registry.host}/alice/m"
    put_model(store, name, b"{}", LONG, b"x")
    push(name, store=store, find=nobody)
    second = push(name, f"{registry.host}/bob/n:2", store=store, find=nobody)
    assert (second.sent, second.mounted) == (0, 3)
    assert pull(second.name, store=tmp_path / "other", find=nobody).fetched == 3


def test_a_pull_replaces_the_name_and_keeps_what_it_can(
    registry: RealRegistry, tmp_path: Path
) -> None:
    """A new version under the same tag fetches only what is new."""
    ours, theirs = Store(tmp_path / "ours"), Store(tmp_path / "theirs")
    name = f"{registry.host}/alice/m"
    put_model(ours, name, b"{}", LONG, b"old")
    push(name, store=ours, find=nobody)
    pull(name, store=theirs, find=nobody)
    raw = put_model(ours, name, b"{}", LONG, b"new")
    push(name, store=ours, find=nobody)
    assert pull(name, store=theirs, find=nobody).fetched == 1
    assert theirs.get_manifest(parse_name(name)).raw == raw


def test_a_damaged_blob_in_the_store_is_fetched_again(
    registry: RealRegistry, tmp_path: Path
) -> None:
    """Pulling what is there mends what is broken."""
    ours, theirs = Store(tmp_path / "ours"), Store(tmp_path / "theirs")
    name = f"{registry.host}/alice/m"
    put_model(ours, name, b"{}", LONG)
    push(name, store=ours, find=nobody)
    pull(name, store=theirs, find=nobody)
    theirs.blob_path(digest_of(LONG)).write_bytes(LONG[::-1])
    assert pull(name, store=theirs, find=nobody).fetched == 1
    assert files(ours) == files(theirs)


@pytest.mark.usefixtures("small_parts")
def test_a_long_blob_moves_in_parts(registry: RealRegistry, tmp_path: Path) -> None:
    """Eight parts go up one after the other and come down several at a time."""
    store, name = Store(tmp_path / "s"), f"{registry.host}/alice/m"
    put_model(store, name, b"{}", LONG)
    push(name, store=store, find=nobody)
    assert registry.requests("PATCH ") == 8
    pull(name, store=tmp_path / "other", find=nobody)
    assert registry.requests("GET /v2/alice/m/blobs/") == 1 + 1 + 8
    assert Store(tmp_path / "other").holds(digest_of(LONG), len(LONG))


@pytest.mark.usefixtures("small_parts")
def test_a_pull_goes_on_where_the_registry_died(registry: RealRegistry, tmp_path: Path) -> None:
    """A registry killed in the middle of a blob gives a clear error, and no blob; then the rest."""
    ours, theirs = Store(tmp_path / "ours"), Store(tmp_path / "theirs")
    name = f"{registry.host}/alice/m"
    put_model(ours, name, b"{}", LONG)
    push(name, store=ours, find=nobody)

    def die(event: Moving) -> None:
        if event.bytes > len(LONG) // 2:
            registry.kill()

    with pytest.raises(RegistryError, match="tries"):
        pull(name, store=theirs, progress=die, patience=QUICK, find=nobody)
    assert not theirs.blob_path(digest_of(LONG)).exists()
    assert theirs.list_names() == []
    registry.start()
    pulled = pull(name, store=theirs, find=nobody)
    assert pulled.resumed >= len(LONG) // 4
    assert files(ours) == files(theirs)


@pytest.mark.usefixtures("small_parts")
def test_a_push_ends_well_wherever_the_registry_died(
    registry: RealRegistry, tmp_path: Path
) -> None:
    """Killed in the midst of a part, it may know nothing of the upload: then that starts anew."""
    store, name = Store(tmp_path / "s"), f"{registry.host}/alice/m"
    put_model(store, name, b"{}", LONG)
    died = threading.Event()

    def die(event: Moving) -> None:
        if event.blob_bytes > len(LONG) // 2 and not died.is_set():
            died.set()
            registry.kill()
            threading.Timer(0.5, registry.start).start()

    push(name, store=store, progress=die, patience=PATIENT, find=nobody)
    assert died.is_set()
    assert pull(name, store=tmp_path / "other", find=nobody).fetched == 2


@pytest.mark.usefixtures("small_parts")
def test_a_push_goes_on_where_the_registry_died(registry: RealRegistry, tmp_path: Path) -> None:
    """A registry that comes back gets the rest, and serves the model whole."""
    store, name = Store(tmp_path / "s"), f"{registry.host}/alice/m"
    put_model(store, name, b"{}", LONG)
    died, seen = threading.Event(), list[int]()

    def die(event: Moving) -> None:
        # at the start of a part, which is when the count is told a second time
        again = event.blob_bytes in seen and event.blob_bytes >= len(LONG) // 2
        seen.append(event.blob_bytes)
        if again and not died.is_set():
            died.set()
            registry.kill()
            threading.Timer(0.5, registry.start).start()

    push(name, store=store, progress=die, patience=PATIENT, find=nobody)
    assert died.is_set()
    assert registry.requests("POST ") == 2
    assert pull(name, store=tmp_path / "other", find=nobody).fetched == 2


def test_a_damaged_blob_is_refused_in_both_directions(
    registry: RealRegistry, tmp_path: Path
) -> None:
    """Bytes that do not fit their digest neither leave the store nor get into it."""
    store, name = Store(tmp_path / "s"), f"{registry.host}/alice/m"
    put_model(store, name, b"{}", LONG)
    push(name, store=store, find=nobody)
    registry.blob_file(digest_of(LONG)).write_bytes(LONG[::-1])
    other = Store(tmp_path / "other")
    with pytest.raises(RegistryError, match=digest_of(LONG).hex) as caught:
        pull(name, store=other, find=nobody)
    assert caught.value.kind == "digest_mismatch"
    assert other.list_names() == []
    assert not other.blob_path(digest_of(LONG)).exists()
    store.blob_path(digest_of(LONG)).write_bytes(LONG[::-1])
    with pytest.raises(Corrupt, match="damaged"):
        push(name, f"{registry.host}/alice/fresh", store=store, find=nobody)


def test_names_that_are_not_there(registry: RealRegistry, tmp_path: Path) -> None:
    """A missing model is an error of one line on either side."""
    with pytest.raises(RegistryError, match=r"has no alice/m:latest") as caught:
        pull(f"{registry.host}/alice/m", store=tmp_path / "s", find=nobody)
    assert caught.value.kind == "not_found"
    with pytest.raises(NotFound, match="no model named"):
        push(f"{registry.host}/alice/m", store=tmp_path / "s", find=nobody)


def test_a_password_opens_what_is_closed(tmp_path: Path) -> None:
    """With the right password all goes well; with none or a wrong one the error says what to do."""
    store = Store(tmp_path / "s")
    with real_registry(tmp_path / "registry", login=True) as registry:
        name = f"{registry.host}/alice/m"
        put_model(store, name, b"{}", b"x" * 1000)
        for find, said in ((nobody, "asks for a login"), (wrong, "does not accept the login")):
            with pytest.raises(RegistryError, match=said) as caught:
                push(name, store=store, find=find)
            assert caught.value.kind == "unauthorized"
            assert caught.value.hint == f"quantmill login {registry.host}"
            assert "battery" not in caught.value.message
        assert push(name, store=store, find=alice).sent == 2
        assert pull(name, store=tmp_path / "other", find=alice).fetched == 2


def test_tokens_open_what_is_closed(tmp_path: Path) -> None:
    """Anybody may pull by an anonymous token; pushing takes one that the password was shown for."""
    require_real_registry()
    store = Store(tmp_path / "s")
    with token_server(Login("alice", PASSWORD)) as tokens:
        (tmp_path / "registry").mkdir()
        access = tokens.config(tmp_path / "registry")
        with real_registry(tmp_path / "registry", access=access) as registry:
            name = f"{registry.host}/alice/m"
            put_model(store, name, b"{}", b"x" * 1000)
            allowed = Login("alice", PASSWORD, token_server=tokens.host)
            pushed = push(name, store=store, find=lambda _: allowed, patience=QUICK)
            assert pushed.sent == 2
            assert any("push" in scope for _, scopes in tokens.asked for scope in scopes)
            tokens.asked.clear()
            assert pull(name, store=tmp_path / "o", find=nobody, patience=QUICK).fetched == 2
            assert {given for given, _ in tokens.asked} == {None}


def test_a_token_server_elsewhere_must_be_named(tmp_path: Path) -> None:
    """It sees no password of itself; the error names it, and how to let it."""
    require_real_registry()
    store = Store(tmp_path / "s")
    with token_server(Login("alice", PASSWORD)) as tokens:
        (tmp_path / "registry").mkdir()
        access = tokens.config(tmp_path / "registry")
        with real_registry(tmp_path / "registry", access=access) as registry:
            put_model(store, f"{registry.host}/alice/m", b"{}")
            with pytest.raises(RegistryError, match="was not shown the password") as caught:
                push(f"{registry.host}/alice/m", store=store, find=alice, patience=QUICK)
            hint = f"login {registry.host} --tokens-from {tokens.host}"
            assert hint in str(caught.value.hint)
            with pytest.raises(RegistryError, match="was not shown the password"):
                login(registry.host, Login("alice", PASSWORD))
            assert {given for given, _ in tokens.asked} == {None}
            kept = login(registry.host, Login("alice", PASSWORD, tokens.host))
            assert find_login(kept.host) == Login("alice", PASSWORD, tokens.host)
            assert push(f"{registry.host}/alice/m", store=store, patience=QUICK).sent == 1
            wrong_password = Login("alice", "battery", tokens.host)
            with pytest.raises(RegistryError, match="does not accept the login"):
                login(registry.host, wrong_password)


def wrong(_: str) -> Login | None:
    return Login("alice", "battery")


def alice(_: str) -> Login | None:
    return Login("alice", PASSWORD)


def test_the_commands_from_end_to_end(
    registry: RealRegistry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Push AS, rm, pull and verify on the command line, with JSON on stdout."""
    source, name = write_checkpoint(tmp_path / "c", SMALL), f"{registry.host}/alice/m:v1"

    def call(*arguments: str | Path) -> object:
        code = run([*map(str, arguments), "--store", str(tmp_path / "s"), "--json"])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return json.loads(printed.out)

    made = call("create", "m", source)
    assert isinstance(made, dict)
    pushed, _ = call("push", "m", name), call("rm", "m")
    pulled = call("pull", name)
    assert isinstance(pushed, dict)
    assert isinstance(pulled, dict)
    assert made["digest"] == pushed["digest"] == pulled["digest"]
    assert pulled["fetched_blobs"] == pulled["blobs"] == pushed["sent_blobs"]
    found = call("verify")
    assert isinstance(found, dict)
    assert found["ok"]


def test_repair_fetches_what_is_damaged(
    registry: RealRegistry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pulled, then harmed: the plan names the registry, and only what is damaged is fetched."""
    ours, theirs = Store(tmp_path / "ours"), Store(tmp_path / "theirs")
    name = f"{registry.host}/alice/m:v1"
    create(name, write_checkpoint(tmp_path / "c", SMALL), store=ours, quantize="int4")
    push(name, store=ours, find=nobody)
    pull(name, store=theirs, find=nobody)
    bent, gone = theirs.get_manifest(parse_name(name)).tensor_refs()[:2]
    theirs.blob_path(bent.digest).write_bytes(b"x")
    theirs.remove_blob(gone.digest)
    gets = registry.requests("GET /v2/alice/m/blobs/")
    assert run(["verify", "--repair", "--store", str(theirs.root)]) == 0
    printed = capsys.readouterr().out
    assert all(
        f"would: rebuild blob {ref.digest.short} from registry {name}" in printed
        for ref in (bent, gone)
    )
    assert registry.requests("GET /v2/alice/m/blobs/") == gets + 2
    assert files(ours) == files(theirs)
