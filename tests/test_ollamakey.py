"""Ollama's key: what it signs, who is shown that, and what a key must be like."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from fakes import put_model
from ollamaregistries import OllamaRegistry, ollama_registry
from quantmill.cli import run
from quantmill.credentials import Login, find_login, own_file, save_login
from quantmill.errors import BadName, BadRequest, RegistryError
from quantmill.loggingin import login_with_key, logout
from quantmill.ollamakey import OllamaKey, key_file, make_key, signable
from quantmill.patience import Patience
from quantmill.pulling import pull
from quantmill.pushing import push
from quantmill.store import Store
from registries import Handler, Misbehaving, misbehaving

QUICK = Patience(tries=3, first_delay=0.001, longest_delay=0.01, connect=2, stall=2)
OLLAMA = "registry.ollama.ai"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own, without a keyring."""
    for variable, folder in (("HOME", "home"), ("XDG_CONFIG_HOME", "c"), ("DOCKER_CONFIG", "d")):
        monkeypatch.setenv(variable, str(tmp_path / folder))
    monkeypatch.setitem(sys.modules, "keyring", None)
    return tmp_path / "home"


@pytest.fixture
def key() -> OllamaKey:
    """A key where Ollama keeps it."""
    make_key(key_file())
    return OllamaKey(key_file())


def public(key: OllamaKey) -> str:
    return key.public_line().split()[1]


@pytest.fixture
def registry(key: OllamaKey) -> Iterator[OllamaRegistry]:
    """A registry that knows the key and that the key is shown to."""
    with ollama_registry(keys={public(key)}) as found:
        login_with_key(found.host)
        yield found


@pytest.fixture
def elsewhere() -> Iterator[Misbehaving]:
    """Another host, which gives out tokens to everybody."""
    with misbehaving(lambda request: request.reply(200, b'{"token": "x"}')) as found:
        yield found


def send(registry: OllamaRegistry, folder: Path) -> None:
    store, name = Store(folder / "s"), f"{registry.host}/a/m"
    put_model(store, name, b"{}", b"some bytes")
    push(name, store=store, patience=QUICK)


# -- what is signed --------------------------------------------------------------------------------


def test_a_token_is_asked_for_with_a_signature(registry: OllamaRegistry, tmp_path: Path) -> None:
    """The server checks signature, time, nonce, service and scopes; then the model goes up."""
    send(registry, tmp_path)
    assert len(registry.tokens) == len(registry.nonces) == 1
    assert len(registry.blobs) == 2
    assert pull(f"{registry.host}/a/m", store=tmp_path / "other", patience=QUICK).fetched == 2


def test_a_token_that_has_run_out_is_asked_for_anew(
    registry: OllamaRegistry, tmp_path: Path
) -> None:
    """The second request is signed as well, with another nonce, and carries no old token."""
    send(registry, tmp_path)
    real = registry._manifest

    def run_out(request: Handler, path: str, body: bytes) -> None:
        real(request, path, body)
        registry.spent.add("token-1")

    registry._manifest = run_out  # type: ignore[method-assign]
    pull(f"{registry.host}/a/m", store=tmp_path / "other", patience=QUICK)
    assert registry.tokens == ["token-0", "token-1", "token-2"]
    assert len(set(registry.nonces)) == 3


def test_the_signed_address_is_written_as_ollama_writes_it() -> None:
    """Keys in order, spaces and slashes encoded, whatever stood in the realm kept."""
    found = signable("https://r.test/v2/token?z=1&service=a+b&scope=repository%3Aa%2Fm%3Apull")
    path, _, query = found.partition("?")
    assert path == "https://r.test/v2/token"
    assert [pair.partition("=")[0] for pair in query.split("&")] == [
        "nonce", "scope", "service", "ts", "z"
    ]  # fmt: skip
    assert "scope=repository%3Aa%2Fm%3Apull&service=a+b&ts=" in query


def test_a_server_that_repeats_the_signature_is_not_quoted(key: OllamaKey, tmp_path: Path) -> None:
    """An error that echoes what was signed is shown without it."""

    def echo(request: Handler) -> None:
        sent = request.headers.get("Authorization")
        if sent is None:
            realm = f"http://127.0.0.1:{request.server.server_port}/token"
            request.reply(401, WWW_Authenticate=f'Bearer realm="{realm}"')
        else:
            request.reply(403, b'{"errors": [{"message": "no: %s"}]}' % sent.encode())

    with misbehaving(echo) as server:
        login_with_key(server.host)
        with pytest.raises(RegistryError) as caught:
            pull(f"{server.host}/a/m", store=tmp_path, patience=QUICK)
    assert caught.value.kind == "forbidden"
    assert public(key) not in f"{caught.value.message} {caught.value.hint}"


# -- who is shown it -------------------------------------------------------------------------------


def test_ollamas_registry_is_shown_the_key_by_default() -> None:
    """Names without a host lead there; a login that was kept for it comes first."""
    assert find_login(OLLAMA) == OllamaKey(key_file())
    save_login(OLLAMA, Login("u", "p"))
    assert find_login(OLLAMA) == Login("u", "p")
    login_with_key()
    assert find_login(OLLAMA) == OllamaKey(key_file())


def test_another_host_is_shown_the_key_only_when_that_was_said(
    key: OllamaKey, tmp_path: Path
) -> None:
    """Before `login --key` a token is asked for without a name, and after `logout` again."""
    with ollama_registry(keys={public(key)}, anonymous=True) as registry:
        registry.manifests["/v2/a/m/manifests/latest"] = b"{}"

        def nonces() -> int:
            with pytest.raises(RegistryError) as caught:  # no model, but it was let in
                pull(f"{registry.host}/a/m", store=tmp_path, patience=QUICK)
            assert caught.value.kind == "bad_manifest"
            return len(registry.nonces)

        assert nonces() == 0
        assert login_with_key(registry.host).kept_in == str(own_file())
        assert nonces() == 1
        assert logout(registry.host) == (registry.host, True)
        assert nonces() == 1


def test_the_key_is_not_shown_to_a_token_server_elsewhere(
    registry: OllamaRegistry, elsewhere: Misbehaving, tmp_path: Path
) -> None:
    """Another host, port or scheme than the registry's is refused, and nobody is asked."""
    port = registry.host.rpartition(":")[2]
    for realm in (
        f"http://{elsewhere.host}/token", f"http://localhost:{port}/v2/token",
        f"https://{registry.host}/v2/token",
    ):  # fmt: skip
        registry.realm = realm
        with pytest.raises(RegistryError, match="not shown the key") as caught:
            send(registry, tmp_path)
        assert caught.value.kind == "bad_token_server"
    assert elsewhere.seen == []
    assert registry.nonces == []


def test_the_token_goes_to_the_registry_alone(key: OllamaKey, tmp_path: Path) -> None:
    """Storage that blobs are sent to sees neither token nor signature."""
    with ollama_registry(keys={public(key)}, ways="direct") as registry:
        login_with_key(registry.host)
        send(registry, tmp_path)
        assert registry.stored
        assert not any("Authorization" in headers for _, headers, _ in registry.stored)


# -- without a key ---------------------------------------------------------------------------------


def test_without_a_key_a_token_is_asked_for_without_a_name(tmp_path: Path) -> None:
    """What is public is pulled so, also from hosts that are shown the key."""
    with ollama_registry(anonymous=True) as registry:
        save_login(registry.host, OllamaKey(key_file()))
        send(registry, tmp_path)
        assert registry.nonces == []


def test_without_a_key_the_refusal_says_what_to_do(tmp_path: Path) -> None:
    """The next step makes one."""
    with ollama_registry() as registry:
        save_login(registry.host, OllamaKey(key_file()))
        with pytest.raises(RegistryError, match="asks for Ollama's key") as caught:
            send(registry, tmp_path)
        assert caught.value.kind == "unauthorized"
        assert f"quantmill login {registry.host} --key" in str(caught.value.hint)


def test_a_key_that_no_account_knows_is_refused_in_words(key: OllamaKey, tmp_path: Path) -> None:
    """The next step shows the public key."""
    with ollama_registry() as registry:
        login_with_key(registry.host)
        with pytest.raises(RegistryError, match="does not accept the key") as caught:
            send(registry, tmp_path)
        assert "add it to the account" in str(caught.value.hint)


def test_without_the_package_the_error_says_how_to_get_it(
    registry: OllamaRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a key and making one need cryptography."""
    monkeypatch.setitem(sys.modules, "cryptography", None)
    actions: list[Callable[[], object]] = [
        lambda: send(registry, tmp_path), lambda: make_key(tmp_path / "other")
    ]  # fmt: skip
    for action in actions:
        with pytest.raises(BadRequest, match="cryptography") as caught:
            action()
        assert caught.value.kind == "missing_extra"
        assert caught.value.hint == "pip install 'quantmill[ollama]'"


# -- what a key must be like -----------------------------------------------------------------------


def written(path: Path, data: bytes, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)
    return path


def openssh(key: ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey, password: bytes = b"") -> bytes:
    protection: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password:
        protection = serialization.BestAvailableEncryption(password)
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, protection
    )


def protected(path: Path) -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", str(path)], check=True
    )


def of_rsa(path: Path) -> None:
    written(path, openssh(rsa.generate_private_key(65537, 2048)))


def broken(path: Path) -> None:
    good = openssh(ed25519.Ed25519PrivateKey.generate())
    written(path, good[:150] + (b"A" if good[150:151] != b"A" else b"B") + good[151:])


def cut(path: Path) -> None:
    written(path, openssh(ed25519.Ed25519PrivateKey.generate())[:100])


def empty(path: Path) -> None:
    written(path, b"")


def folder(path: Path) -> None:
    path.mkdir()


def pipe(path: Path) -> None:
    os.mkfifo(path)


def dangling(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def exposed(path: Path) -> None:
    written(path, openssh(ed25519.Ed25519PrivateKey.generate()), 0o640)


WAYS = [protected, of_rsa, broken, cut, empty, folder, pipe, dangling, exposed]


@pytest.mark.parametrize("way", WAYS)
def test_a_key_that_cannot_be_used_is_one_error(
    way: Callable[[Path], None], tmp_path: Path
) -> None:
    """It names the file and tells nothing of what it holds."""
    if way is protected and shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not installed")
    path = key_file()
    path.parent.mkdir(parents=True)
    way(path)
    with ollama_registry(anonymous=True) as registry:
        save_login(registry.host, OllamaKey(path))
        with pytest.raises(RegistryError) as caught:
            send(registry, tmp_path)
        assert not registry.tokens
    assert caught.value.message.startswith(f"{path}")
    assert caught.value.kind in {"bad_key", "io", "credentials_exposed"}
    assert (caught.value.hint == f"chmod 600 {path}") == (way is exposed)
    if path.is_file():
        lines = path.read_text().splitlines()[1:]
        assert not any(line in f"{caught.value.message} {caught.value.hint}" for line in lines)


def test_openssh_reads_a_key_that_was_made(key: OllamaKey) -> None:
    """It finds the same public key."""
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not installed")
    read = subprocess.run(
        ["ssh-keygen", "-y", "-f", str(key.path)], capture_output=True, check=True
    )
    assert read.stdout.decode().split()[:2] == key.public_line().split()


# -- making a key ----------------------------------------------------------------------------------


def test_a_key_is_made_for_its_owner_alone(home: Path) -> None:
    """The folder is private, too; the public key lies beside it as Ollama writes it."""
    assert make_key(key_file())
    path = home / ".ollama" / "id_ed25519"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.with_suffix(".pub").read_text() == f"{OllamaKey(path).public_line()}\n"
    assert {p.name for p in path.parent.iterdir()} == {"id_ed25519", "id_ed25519.pub"}


@pytest.mark.parametrize("way", [*WAYS[1:], None])
def test_a_key_that_is_there_is_never_written_over(way: Callable[[Path], None] | None) -> None:
    """Whatever lies in its place stays, usable or not."""
    path = key_file()
    path.parent.mkdir(parents=True)
    (way or (lambda p: written(p, b"mine")))(path)
    before = os.lstat(path)
    assert not make_key(path)
    assert os.lstat(path) == before


def test_a_key_that_another_process_makes_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ollama may start in the same moment: its key wins, and nothing of ours is left."""
    sync, path = os.fsync, key_file()

    def other_first(fd: int) -> None:
        sync(fd)
        if not path.exists():
            written(path, b"theirs")

    monkeypatch.setattr(os, "fsync", other_first)
    assert not make_key(path)
    assert path.read_bytes() == b"theirs"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_public_key_alone_is_never_written_over() -> None:
    """Its private key may be on its way back: nothing is made, and the error names the file."""
    left = written(key_file().with_suffix(".pub"), b"ssh-ed25519 AAAA")
    with pytest.raises(RegistryError, match=r"id_ed25519\.pub is there"):
        make_key(key_file())
    assert left.read_bytes() == b"ssh-ed25519 AAAA"
    assert not key_file().exists()


def test_a_home_that_cannot_be_written_to_is_one_error(home: Path) -> None:
    """It names the file."""
    written(home, b"no folder")
    with pytest.raises(RegistryError, match="id_ed25519") as caught:
        make_key(key_file())
    assert caught.value.kind == "io"


def test_login_shows_the_key_and_the_next_step(
    capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    """Without a host it is for Ollama's registry; the second time the same key is shown."""
    assert run(["login"]) == 0
    first = capsys.readouterr().out
    line = OllamaKey(key_file()).public_line()
    assert line in first
    assert "https://ollama.com/settings/keys" in first
    assert "made the key" in first
    assert run(["login", f"https://{OLLAMA.upper()}/"]) == 0
    second = capsys.readouterr().out
    assert "found the key" in second
    assert line in second
    assert not own_file().exists()


def test_login_with_key_is_kept_for_a_host(capsys: pytest.CaptureFixture[str]) -> None:
    """As JSON it says where; a password afterwards takes its place, and the other way round."""
    assert run(["login", "r.test", "--key", "--json"]) == 0
    assert str(own_file()) in capsys.readouterr().out
    assert find_login("r.test") == OllamaKey(key_file())
    save_login("r.test", Login("u", "p"))
    assert find_login("r.test") == Login("u", "p")
    login_with_key("r.test")
    assert find_login("r.test") == OllamaKey(key_file())


def test_a_key_and_a_password_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    """The command line is wrong, and nothing was made."""
    assert run(["login", "r.test", "--key", "-u", "me"]) == 2
    assert "--key" in capsys.readouterr().err
    assert not key_file().exists()
    with pytest.raises(BadName):
        login_with_key("not a host")
