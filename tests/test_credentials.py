"""Logins: where they are kept and found, and that nobody else sees them."""

from __future__ import annotations

import base64
import json
import logging
import stat
import sys
import types
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote_plus

import pytest

from quantmill import credentials
from quantmill.addresses import (
    is_loopback,
    is_public,
    may_have_password,
    origin_of,
    redirect_target,
    registry_origin,
)
from quantmill.challenges import Challenge, parse_challenges
from quantmill.cli import run
from quantmill.credentials import (
    IdentityToken,
    Login,
    find_login,
    own_file,
    remove_login,
    save_login,
)
from quantmill.errors import BadName, BadRequest, RegistryError
from quantmill.loggingin import login, logout
from quantmill.names import parse_name
from quantmill.patience import Patience
from quantmill.pulling import pull
from quantmill.spans import Span, in_parts, missing, parse_content_range, parse_uploaded
from registries import PASSWORD, Handler, misbehaving, real_registry

HOST = "registry.test:5000"
ALICE = Login("alice", "s3cret")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own, without a keyring."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sys.modules, "keyring", None)
    return tmp_path


def docker_config(home: Path, document: object) -> None:
    (home / "docker").mkdir(exist_ok=True)
    (home / "docker" / "config.json").write_text(json.dumps(document))


def auth(username: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{username}:{password}".encode()).decode()}


# -- where logins are ------------------------------------------------------------------------------


def test_a_login_is_kept_in_a_file_that_others_cannot_read() -> None:
    """Saved, found whatever the case, forgotten; the file has mode 0600."""
    assert save_login(HOST, ALICE) == str(own_file())
    assert stat.S_IMODE(own_file().stat().st_mode) == 0o600
    assert find_login(HOST.upper()) == ALICE
    assert find_login("registry.test") is None
    assert remove_login(HOST)
    assert not remove_login(HOST)
    assert find_login(HOST) is None


def test_a_file_that_others_may_read_is_refused() -> None:
    """The error names the file and the command that mends it, not what it holds."""
    save_login(HOST, ALICE)
    own_file().chmod(0o644)
    with pytest.raises(RegistryError, match="others may read") as caught:
        find_login(HOST)
    assert caught.value.hint == f"chmod 600 {own_file()}"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1, "a": 2}'])
def test_a_broken_file_is_one_error(text: str) -> None:
    """What cannot be read is named."""
    save_login(HOST, ALICE)
    own_file().write_text(text)
    with pytest.raises(RegistryError, match=r"logins\.json"):
        find_login(HOST)


class FakeKeyring(types.ModuleType):
    """A keyring in memory."""

    priority = 5

    def __init__(self) -> None:
        super().__init__("keyring")
        self.kept: dict[tuple[str, str], str] = {}

    def get_keyring(self) -> FakeKeyring:
        return self

    def set_password(self, service: str, user: str, secret: str) -> None:
        self.kept[service, user] = secret

    def get_password(self, service: str, user: str) -> str | None:
        return self.kept.get((service, user))

    def delete_password(self, service: str, user: str) -> None:
        del self.kept[service, user]


def test_the_keyring_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a keyring the login is there, and no longer in the file."""
    save_login(HOST, Login("old", "old"))
    ring = FakeKeyring()
    monkeypatch.setitem(sys.modules, "keyring", ring)
    assert save_login(HOST, ALICE) == "keyring"
    assert find_login(HOST) == ALICE
    assert "old" not in own_file().read_text()
    assert remove_login(HOST)
    assert find_login(HOST) is None
    assert ring.kept == {}


def test_a_keyring_that_fails_leaves_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A locked keyring is warned about, and the login kept in the file."""

    def refuse(*_: object) -> None:
        raise RuntimeError("locked s3cret")

    ring = FakeKeyring()
    monkeypatch.setattr(ring, "set_password", refuse, raising=False)
    monkeypatch.setitem(sys.modules, "keyring", ring)
    with pytest.warns(UserWarning, match="RuntimeError") as told:
        assert save_login(HOST, ALICE) == str(own_file())
    assert "s3cret" not in str(told[0].message)
    assert find_login(HOST) == ALICE


@pytest.mark.parametrize(
    "key", [HOST, f"https://{HOST}", f"https://{HOST}/v1/", f"http://{HOST}/v2/", HOST.upper()]
)
def test_dockers_config_is_read(key: str, home: Path) -> None:
    """Its `auths` have hosts and addresses as keys."""
    docker_config(home, {"auths": {"other": auth("x", "y"), key: auth("alice", "s3:cret")}})
    assert find_login(HOST) == Login("alice", "s3:cret")
    assert find_login("registry.test") is None


@pytest.mark.parametrize(
    "document",
    [
        {}, {"auths": None}, {"auths": []}, {"auths": {HOST: {}}}, {"auths": {HOST: []}},
        {"auths": {HOST: {"auth": "!"}}}, {"auths": {HOST: {"auth": "YWxpY2U="}}},
        {"auths": {HOST: {"auth": 1}}}, {"auths": {HOST: {"identitytoken": 1}}},
        {"credHelpers": [], "credsStore": 3}, {"credsStore": "../../bin/sh"},
    ],
)  # fmt: skip
def test_what_dockers_config_lacks_is_no_login(document: object, home: Path) -> None:
    """Entries without a user and a password are passed over."""
    docker_config(home, document)
    assert find_login(HOST) is None


def test_docker_hub_has_a_key_of_its_own(home: Path) -> None:
    """Its login is found for the host that serves its models."""
    docker_config(home, {"auths": {"https://index.docker.io/v1/": auth("alice", "s3cret")}})
    assert find_login("registry-1.docker.io") == ALICE
    assert find_login(HOST) is None


HELPER = """#!/bin/sh
read -r host
test "$1 $host" = "get registry.test:5000" || { echo "credentials not found"; exit 1; }
echo '{"ServerURL": "x", "Username": "alice", "Secret": "s3cret"}'
"""


@pytest.mark.parametrize("config", [{"credsStore": "test"}, {"credHelpers": {HOST: "test"}}])
def test_dockers_helpers_are_asked(
    config: object, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The helper gets the host on stdin; without a login there, there is none."""
    (home / "bin").mkdir()
    program = home / "bin" / "docker-credential-test"
    program.write_text(HELPER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{home / 'bin'}:/usr/bin:/bin")
    docker_config(home, config)
    assert find_login(HOST) == ALICE
    assert find_login("elsewhere.test") is None


IDENTITY = "1dentity&token="
TOKEN_HELPER = HELPER.replace("alice", "<token>").replace("s3cret", IDENTITY)


def test_a_helper_may_hold_an_identity_token(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker's helpers say so in place of a user; no printed form shows it."""
    (home / "bin").mkdir()
    program = home / "bin" / "docker-credential-test"
    program.write_text(TOKEN_HELPER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{home / 'bin'}:/usr/bin:/bin")
    docker_config(home, {"credsStore": "test"})
    assert find_login(HOST) == IdentityToken(IDENTITY)
    assert IDENTITY not in repr(find_login(HOST))


def test_an_identity_token_takes_the_place_of_the_password_beside_it(home: Path) -> None:
    """As Docker writes it after a login with a token server that gives out such ones."""
    docker_config(home, {"auths": {HOST: auth("alice", "old") | {"identitytoken": IDENTITY}}})
    assert find_login(HOST) == IdentityToken(IDENTITY)


def test_a_helper_that_is_not_there_is_warned_about(home: Path) -> None:
    """Docker's config may name a program of another machine."""
    docker_config(home, {"credsStore": "absent"})
    with pytest.warns(UserWarning, match="docker-credential-absent"):
        assert find_login(HOST) is None


# -- challenges ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], []),
        ([""], []),
        (["Basic"], [("basic", {})]),
        (['Basic realm="a b", charset="UTF-8"'], [("basic", {"realm": "a b", "charset": "UTF-8"})]),
        (
            ['Bearer realm="https://a/t",service="s",scope="repository:a/m:pull,push"'],
            [("bearer", {"realm": "https://a/t", "service": "s",
                         "scope": "repository:a/m:pull,push"})],
        ),
        (["Bearer realm=https://a/t, Service=s"],
         [("bearer", {"realm": "https://a/t", "service": "s"})]),
        (['Basic realm="x", Bearer realm="y\\"z"'],
         [("basic", {"realm": "x"}), ("bearer", {"realm": 'y"z'})]),
        (["Negotiate abc=, Basic realm=x"], [("negotiate", {}), ("basic", {"realm": "x"})]),
        (["Basic", "Bearer realm=y"], [("basic", {}), ("bearer", {"realm": "y"})]),
        (['=, "', 'realm="x"'], []),
    ],
)  # fmt: skip
def test_challenges(headers: list[str], expected: list[tuple[str, dict[str, str]]]) -> None:
    """Quoted and bare values, several schemes in one header or in many."""
    assert parse_challenges(headers) == [Challenge(s, p) for s, p in expected]


# -- addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "insecure", "expected"),
    [
        ("m", False, "https://registry.ollama.ai"),
        ("registry.test/a/m", False, "https://registry.test"),
        ("registry.test:5000/a/m", False, "https://registry.test:5000"),
        ("registry.test:5000/a/m", True, "http://registry.test:5000"),
        ("https://registry.test/a/m", True, "https://registry.test"),
        ("localhost:5000/a/m", False, "http://localhost:5000"),
        ("127.0.0.1/a/m", False, "http://127.0.0.1"),
        ("https://localhost:5000/a/m", False, "https://localhost:5000"),
        ("localhost.test/a/m", False, "https://localhost.test"),
    ],
)
def test_https_is_the_default(name: str, insecure: bool, expected: str) -> None:
    """Plain HTTP is for this machine, or asked for."""
    assert str(registry_origin(parse_name(name), insecure=insecure)) == expected


def test_addresses_that_make_no_sense() -> None:
    """Other schemes and ports that are none are refused; so is HTTP across a network."""
    for name in ("ftp://registry.test/a/m", "registry.test:99999/a/m", "a:b/a/m"):
        with pytest.raises(BadName, match="no address"):
            registry_origin(parse_name(name))
    with pytest.raises(BadRequest, match="without encryption"):
        registry_origin(parse_name("http://registry.test/a/m"))


def test_where_redirects_may_lead() -> None:
    """Relative, and to other hosts; never to plain HTTP, with a password, or to an odd host."""
    base = "https://r.test/v2/a/m/blobs/x"
    assert redirect_target(base, "/y?z=1") == "https://r.test/y?z=1"
    assert redirect_target(base, "https://cdn.test/y") == "https://cdn.test/y"
    for bad in ("http://r.test/y", "https://u:p@r.test/", "file:///x", "https://[", None, "",
                "https://cdn.test>-6/", "https://fa\xdf.test/", "https://cdn%2etest/"):  # fmt: skip
        with pytest.raises(RegistryError) as caught:
            redirect_target(base, bad)
        assert caught.value.kind == "bad_redirect"


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("127.0.0.1", False), ("10.1.2.3", False), ("169.254.169.254", False),
        ("192.168.0.1", False), ("::1", False), ("fe80::1%eth0", False), ("::ffff:10.0.0.1", False),
        ("2606:4700::1111", True), ("0.0.0.0", False), ("224.0.0.1", False), ("x", False),
        ("64:ff9b::8.8.8.8", True), ("64:ff9b::10.0.0.1", False), ("2002:a00:1::", False),
        ("2001:0:a00:1::", False), ("::ffff:8.8.8.8", True), ("ff02::1", False),
    ],
)  # fmt: skip
def test_public_addresses(address: str, public: bool) -> None:
    """Private, loopback, link-local and mapped addresses are not public."""
    assert is_public(address) is public
    assert is_loopback(address) is (address in {"127.0.0.1", "::1"})


def test_a_public_host_may_not_lead_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A redirect from the internet to an address of a private network is refused."""
    from quantmill import registry as module

    addresses = {"r.test": "8.8.8.8", "cdn.test": "8.8.4.4", "inside.test": "10.0.0.1"}

    def look_up(host: str, *_: object, **__: object) -> list[Any]:
        return [(0, 0, 0, "", (addresses[host], 443))]

    monkeypatch.setattr("socket.getaddrinfo", look_up)
    origin = registry_origin(parse_name("r.test/a/m"))
    with module.Registry(origin, "a/m") as registry:
        registry._guard("https://cdn.test/x")
        with pytest.raises(RegistryError, match=r"inside\.test, a private address"):
            registry._guard("https://inside.test/x")


def test_who_may_have_the_password() -> None:
    """The same scheme, host and port, and Docker's token server for Docker's registry."""
    hub = origin_of("https://registry-1.docker.io/v2/")
    own = origin_of("https://r.test/")
    assert hub is not None
    assert own is not None
    for url, registry, expected in (
        ("https://r.test/token", own, True),
        ("https://r.test:444/token", own, False),
        ("http://r.test/token", own, False),
        ("https://auth.r.test/token", own, False),
        ("https://auth.docker.io/token", hub, True),
        ("http://auth.docker.io/token", hub, False),
        ("https://auth.docker.io/token", own, False),
    ):
        server = origin_of(url)
        assert server is not None
        assert may_have_password(registry, server) is expected


# -- spans -----------------------------------------------------------------------------------------


def test_what_is_missing() -> None:
    """Spans may overlap, come in any order and reach beyond the end."""
    assert missing(10, []) == [Span(0, 10)]
    assert missing(10, [Span(4, 6), Span(0, 2), Span(5, 7)]) == [Span(2, 4), Span(7, 10)]
    assert missing(10, [Span(0, 99)]) == []
    assert missing(10, [Span(50, 99)]) == [Span(0, 10)]
    assert missing(0, []) == []
    assert in_parts([Span(0, 5), Span(7, 8)], 2) == [
        Span(0, 2), Span(2, 4), Span(4, 5), Span(7, 8)
    ]  # fmt: skip


def test_ranges_in_headers() -> None:
    """Nonsense is None; `0-0` of an upload means that nothing has arrived."""
    assert parse_content_range("bytes 2-3/9") == (Span(2, 4), 9)
    assert parse_content_range("bytes 2-3/*") == (Span(2, 4), None)
    for bad in ("", "bytes 3-2/9", "bytes 2-9/9", "bytes */9", "items 2-3/9", "bytes -2-3/9"):
        assert parse_content_range(bad) is None
    assert (parse_uploaded("0-9"), parse_uploaded("bytes=0-9"), parse_uploaded("0-0")) == (
        10,
        10,
        0,
    )
    assert parse_uploaded("1-9") is None


# -- identity tokens -------------------------------------------------------------------------------


class TokenServer:
    """A registry, the server that gives out its tokens, and what both were sent."""

    def __init__(self, realm: str = "") -> None:
        self.realm, self.said = realm, b'{"access_token": "good", "refresh_token": "another"}'
        self.status, self.forms = 200, list[tuple[str, dict[str, list[str]]]]()
        self.asked = list[str]()

    def answer(self, request: Handler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        self.asked.append(f"{request.command} {request.path}")
        if request.path.startswith("/token"):
            if request.command == "POST":
                assert request.headers["Content-Type"] == "application/x-www-form-urlencoded"
                assert "Authorization" not in request.headers
                self.forms.append((request.path, parse_qs(body.decode())))
                request.reply(self.status, self.said)
            else:
                request.reply(200, b'{"token": "anonymous"}')
        elif request.headers.get("Authorization") in {"Bearer good", "Bearer anonymous"}:
            request.reply(404)
        else:
            realm = self.realm or f"http://127.0.0.1:{request.server.server_port}/token?x=1"
            scope = 'service="s t",scope="repository:a/m:pull repository:a/n:pull"'
            request.reply(401, WWW_Authenticate=f'Bearer realm="{realm}",{scope}')


def pull_with_identity(host: str, folder: Path) -> RegistryError:
    with pytest.raises(RegistryError) as caught:
        pull(f"{host}/a/m", store=folder, find=lambda _: IdentityToken(IDENTITY))
    return caught.value


def test_an_identity_token_is_exchanged_for_a_token(tmp_path: Path) -> None:
    """By POST, in the form alone, with service, scopes and client; the token opens the registry."""
    server = TokenServer()
    with misbehaving(server.answer) as found:
        assert pull_with_identity(found.host, tmp_path).kind == "not_found"
    expected = {
        "grant_type": ["refresh_token"], "client_id": ["quantmill"], "refresh_token": [IDENTITY],
        "service": ["s t"], "scope": ["repository:a/m:pull repository:a/n:pull"],
    }  # fmt: skip
    assert server.forms == [("/token?x=1", expected)]


def test_an_identity_token_is_not_shown_to_another_host(tmp_path: Path) -> None:
    """A token server elsewhere is asked without a name, as with a password."""
    elsewhere = TokenServer()
    with misbehaving(elsewhere.answer) as other:
        server = TokenServer(f"http://{other.host}/token")
        with misbehaving(server.answer) as found:
            pull_with_identity(found.host, tmp_path)
        assert elsewhere.forms == []
        assert len(elsewhere.asked) == 1
        assert elsewhere.asked[0].startswith("GET /token?")
        assert "Authorization" not in other.seen[0][1]


@pytest.mark.parametrize("written", [IDENTITY, quote_plus(IDENTITY)])
def test_a_server_that_repeats_the_identity_token_is_not_quoted(
    written: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the error nor the log shows it, with all logging on."""
    caplog.set_level(logging.DEBUG)
    server = TokenServer()
    server.status, server.said = 400, b'{"error": "%s"}' % written.encode()
    with misbehaving(server.answer) as found:
        error = pull_with_identity(found.host, tmp_path)
    assert error.kind == "refused"
    for secret in (IDENTITY, quote_plus(IDENTITY)):
        assert secret not in f"{error.message} {error.hint} {caplog.text}"


def test_an_identity_token_is_no_password(tmp_path: Path) -> None:
    """A registry that asks for a password does not see it."""

    def answer(request: Handler) -> None:
        request.reply(401, WWW_Authenticate='Basic realm="x"')

    with misbehaving(answer) as found:
        assert pull_with_identity(found.host, tmp_path).kind == "unauthorized"
        assert not any("Authorization" in headers for _, headers in found.seen)


# -- login and logout ------------------------------------------------------------------------------


def test_a_login_is_tried_before_it_is_kept(tmp_path: Path) -> None:
    """The right password is kept, a wrong one is not."""
    with real_registry(tmp_path / "registry", login=True) as registry:
        with pytest.raises(RegistryError, match="does not accept the login"):
            login(registry.host, Login("alice", "wrong"))
        assert find_login(registry.host) is None
        assert login(registry.host, Login("alice", PASSWORD)).kept_in == str(own_file())
        assert find_login(registry.host) == Login("alice", PASSWORD)
        assert logout(f"http://{registry.host}/") == (registry.host, True)
    assert logout(None) == ("registry.ollama.ai", False)


def test_logins_that_cannot_be() -> None:
    """Empty ones, a colon in the user, a host that is none."""
    for bad in (Login("", "x"), Login("a", ""), Login("a:b", "x"), Login("a", "x\ny")):
        with pytest.raises(BadRequest):
            login(HOST, bad)
    with pytest.raises(BadName):
        login("not a host", ALICE)


def test_without_a_terminal_the_password_comes_from_stdin(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command does not hang: it says which options to use."""
    assert run(["login", HOST]) == 2
    assert "--password-stdin" in capsys.readouterr().err


def test_secrets_are_not_logged(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """With all logging on, neither the password nor a signed address appears."""

    def answer(request: Handler) -> None:
        if "Authorization" not in request.headers:
            request.reply(401, WWW_Authenticate='Basic realm="x"')
        elif "signature" in request.path:
            request.reply(403)
        else:
            request.reply(302, Location="/storage?signature=h1dden")

    caplog.set_level(logging.DEBUG)
    with misbehaving(answer) as server, pytest.raises(RegistryError) as caught:
        login(server.host, ALICE, patience=Patience(tries=2, first_delay=0))
    printed = capsys.readouterr()
    everything = f"{caplog.text}{printed.out}{printed.err}{caught.value.message}{caught.value.hint}"
    for secret in (ALICE.password, ALICE.basic.split()[1], "h1dden"):
        assert secret not in everything
    assert "s3cret" not in repr(ALICE)
    assert credentials.find_login(server.host) is None
