"""Registries that lie in their HTTP, in manifests and challenges: refused, and soon."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fakes import put_model
from quantmill.credentials import Login
from quantmill.digests import digest_of
from quantmill.errors import NoSpace, QuantmillError, RegistryError
from quantmill.names import parse_name
from quantmill.patience import Patience
from quantmill.pulling import pull
from quantmill.pushing import push
from quantmill.registry import MAX_MANIFEST
from quantmill.store import Store
from registries import Answer, Handler, misbehaving, model_of, serve_model, serve_well
from test_transfer import (
    BLOBS,
    LONG,
    MANIFEST,
    QUICK,
    SHORT,
    data_of,
    fetch,
    good,
    is_whole_or_absent,
    nobody,
)

NEVER = 10**30


def says(request: Handler, *parts: bytes) -> None:
    """Write these bytes as they are, and hang up."""
    for part in parts:
        request.wfile.write(part)
    request.close_connection = True


def for_ever(request: Handler, start: bytes, again: bytes, pause: float = 0) -> None:
    """Write without end, until the client has hung up."""
    request.close_connection = True
    request.wfile.write(start)
    while not request.server.ended.wait(pause):
        request.wfile.write(again)


def head(*lines: str, body: bytes = b"") -> bytes:
    return "\r\n".join(["HTTP/1.1 200 OK", *lines, "", ""]).encode("latin-1") + body


def answers_with(data: bytes) -> Answer:
    return lambda request: says(request, data)


def unending(start: bytes, again: bytes, pause: float = 0) -> Answer:
    return lambda request: for_ever(request, start, again, pause)


SIZE = f"Content-Length: {len(MANIFEST)}"

WITHOUT_END: dict[str, Answer] = {
    "interim answers": unending(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100),
    "interim answers, slowly": unending(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.02),
    "header lines": unending(b"HTTP/1.1 200 OK\r\n", b"X-More: 1\r\n" * 100),
    "one header line": unending(b"HTTP/1.1 200 OK\r\nX-More: ", b"x" * 1000),
    "a header, slowly": unending(b"HTTP/1.1 200 OK\r\nX-More: ", b"x", 0.02),
    "a body": unending(head("Connection: close"), b" " * 65536),
    "a body, slowly": unending(head("Connection: close"), b" ", 0.02),
    "chunks": unending(head("Transfer-Encoding: chunked"), b"10000\r\n" + b" " * 65536 + b"\r\n"),
    "a chunk's header, slowly": unending(head("Transfer-Encoding: chunked"), b"0", 0.02),
    "a chunk of sixteen exabytes": unending(
        head("Transfer-Encoding: chunked") + b"FFFFFFFFFFFFFFFF\r\n", b" " * 65536
    ),
    "trailers, slowly": unending(
        head("Transfer-Encoding: chunked") + b"0\r\nX-More: ", b"x", 0.02
    ),
    "what it refuses for": unending(b"HTTP/1.1 403 No\r\n\r\n", b"no! " * 10000),
    "what it refuses for, slowly": unending(b"HTTP/1.1 403 No\r\n\r\n", b"n", 0.02),
}  # fmt: skip

NONSENSE: dict[str, bytes] = {
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "nothing": b"",
    "no status": b"HTTP/1.1\r\n\r\n",
    "a status of two digits": b"HTTP/1.1 20 OK\r\n\r\n" + MANIFEST,
    "a status of 999": f"HTTP/1.1 999 OK\r\n{SIZE}\r\n\r\n".encode() + MANIFEST,
    "a protocol that was not asked for": (
        b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n" + MANIFEST
    ),
    "two lengths": head(SIZE, "Content-Length: 3", body=MANIFEST),
    "a length of thousands of digits": head(f"Content-Length: {'9' * 5000}", body=MANIFEST),
    "a length below nothing": head("Content-Length: -3", body=MANIFEST),
    "a length that is no number": head("Content-Length: \xb2", body=MANIFEST),
    "a length too short": head(f"Content-Length: {len(MANIFEST) - 3}", body=MANIFEST),
    "a length too long": head(f"Content-Length: {len(MANIFEST) + 3}", body=MANIFEST),
    "a zero byte in a header": head(SIZE, "X-Zero: \0", body=MANIFEST),
    "a header without a name": head(SIZE, ": x", body=MANIFEST),
    "a bomb, compressed on the way": head("Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"),
    "a bomb, compressed": head(SIZE, "Content-Encoding: gzip", body=MANIFEST),
    "a bomb, compressed twice": head(SIZE, "Content-Encoding: identity, br", body=MANIFEST),
    "a chunk below nothing": head("Transfer-Encoding: chunked", body=b"-5\r\n"),
    "another digest": head(
        SIZE, f"Docker-Content-Digest: {digest_of(b'another')}", body=MANIFEST
    ),
}  # fmt: skip


def instead_of_the_manifest(way: Answer) -> Answer:
    return lambda request: (way if "/manifests/" in request.path else good)(request)


@pytest.mark.parametrize("what", WITHOUT_END)
def test_an_answer_without_end_ends(what: str, tmp_path: Path) -> None:
    """Fast or one byte at a time, with or without content: given up, with one error."""
    with misbehaving(instead_of_the_manifest(WITHOUT_END[what])) as server:
        with pytest.raises(RegistryError) as caught:
            fetch(server, tmp_path)
        assert server.host in caught.value.message
        assert "\n" not in caught.value.message
    assert not is_whole_or_absent(Store(tmp_path))


@pytest.mark.parametrize("what", ["interim answers, slowly", "a chunk's header, slowly"])
def test_a_blob_that_never_begins_is_given_up(what: str, tmp_path: Path) -> None:
    """Bytes that are no content do not keep a pull waiting."""
    with (
        misbehaving(serve_model(MANIFEST, BLOBS, WITHOUT_END[what])) as server,
        pytest.raises(RegistryError, match="after 4 tries"),
    ):
        fetch(server, tmp_path)
    assert not is_whole_or_absent(Store(tmp_path))


def test_what_a_slow_answer_breaks_is_fetched_again(tmp_path: Path) -> None:
    """Blobs that move meanwhile are hurt for a moment at most, and the model arrives."""
    asked: list[str] = []

    def first_never(request: Handler) -> None:
        asked.append(request.path)
        if len(asked) == 1:
            for_ever(request, b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.02)
        else:
            good(request)

    with misbehaving(serve_model(MANIFEST, BLOBS, first_never)) as server:
        fetch(server, tmp_path)
    assert is_whole_or_absent(Store(tmp_path))


@pytest.mark.parametrize("what", NONSENSE)
def test_http_that_makes_no_sense_is_refused(what: str, tmp_path: Path) -> None:
    """Lengths, encodings, statuses and digests that contradict the bytes are one error."""
    with misbehaving(instead_of_the_manifest(answers_with(NONSENSE[what]))) as server:
        with pytest.raises(RegistryError) as caught:
            fetch(server, tmp_path)
        assert server.host in caught.value.message
        assert caught.value.message.isprintable()
    assert not is_whole_or_absent(Store(tmp_path))


@pytest.mark.parametrize("stated", ["", "sha512:00", "nonsense", str(digest_of(MANIFEST))])
def test_a_digest_that_says_nothing_else_is_accepted(stated: str, tmp_path: Path) -> None:
    """Registries that name no digest, or one of another kind, are believed as before."""
    answer = answers_with(head(SIZE, f"Docker-Content-Digest: {stated}", body=MANIFEST))
    with misbehaving(instead_of_the_manifest(answer)) as server:
        assert fetch(server, tmp_path).blobs == 3


@pytest.mark.parametrize(
    ("extra", "accepted"), [(MAX_MANIFEST - len(MANIFEST), True), (MAX_MANIFEST, False)]
)
def test_a_manifest_of_more_than_16_mib_is_refused(
    extra: int, accepted: bool, tmp_path: Path
) -> None:
    """Up to the limit it is read; beyond, the pull stops there."""
    with misbehaving(serve_model(MANIFEST + b" " * extra, BLOBS)) as server:
        if accepted:
            assert fetch(server, tmp_path, Patience()).blobs == 3
        else:
            with pytest.raises(RegistryError, match="more than 16777216 bytes"):
                fetch(server, tmp_path, Patience())


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (b'{"schemaVersion": 1, "fsLayers": [{"blobSum": "sha256:00"}]}', "no config"),
        (
            b'{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",'
            b' "manifests": [{"digest": "sha256:00"}]}',
            "several platforms",
        ),
        (
            b'{"mediaType": "application/vnd.docker.distribution.manifest.list.v2+json",'
            b' "manifests": []}',
            "several platforms",
        ),
        (b'{"mediaType": "text/html", "body": "<html>"}', "no config"),
        (MANIFEST.replace(b'"config"', b'"subject"'), "no config"),
    ],
)
def test_other_documents_are_no_model(manifest: bytes, said: str, tmp_path: Path) -> None:
    """Image indexes and manifests of other kinds are refused, by what they lack."""
    with misbehaving(serve_model(manifest, BLOBS)) as server:
        with pytest.raises(RegistryError, match=said) as caught:
            fetch(server, tmp_path)
        assert caught.value.kind == "bad_manifest"


@pytest.mark.parametrize("size", [2**62, NEVER, -1, 1.5])
def test_sizes_beyond_every_disk_take_no_space(size: float, tmp_path: Path) -> None:
    """A blob that is said to be enormous is refused before a byte is written."""
    raw = MANIFEST.replace(b'"size":100000', f'"size":{size}'.encode())
    with misbehaving(serve_model(raw, BLOBS)) as server:
        with pytest.raises((RegistryError, NoSpace)):
            fetch(server, tmp_path)
        assert not [path for path, _ in server.seen if "/blobs/" in path]


def test_a_blob_of_no_bytes_must_be_the_empty_one(tmp_path: Path) -> None:
    """A size of zero does not spare a digest its bytes."""
    raw = MANIFEST.replace(b'"size":5', b'"size":0')
    with misbehaving(serve_model(raw, BLOBS)) as server:
        with pytest.raises(RegistryError) as caught:
            fetch(server, tmp_path)
        assert caught.value.kind == "digest_mismatch"


# -- blobs -----------------------------------------------------------------------------------------


def surplus(request: Handler) -> None:
    """Behind the body, a second answer that nobody asked for."""
    serve_well(request, data_of(request))
    request.wfile.write(head("Content-Length: 4", body=b"evil"))


def ranges_twice(request: Handler) -> None:
    data = data_of(request)
    start, end = request.asked(len(data)) or (0, len(data))
    lines = [f"Content-Range: bytes {start}-{end - 1}/{len(data)}"] * 2
    length = f"Content-Length: {end - start}"
    text = "\r\n".join(["HTTP/1.1 206 Partial", length, *lines, "", ""]).encode()
    says(request, text, data[start:end])


def announces_less(request: Handler) -> None:
    data = data_of(request)
    says(request, head(f"Content-Length: {len(data) - 1}", body=data))


def another_digest(request: Handler) -> None:
    data = data_of(request)
    request.reply(200, data, Docker_Content_Digest=str(digest_of(b"another")))


@pytest.mark.parametrize("way", [surplus, ranges_twice, announces_less, another_digest])
def test_a_lie_about_a_blob_gives_the_right_bytes_or_an_error(way: Answer, tmp_path: Path) -> None:
    """Answers nobody asked for, ranges twice, lengths too short, digests of something else."""
    store = Store(tmp_path)
    with misbehaving(serve_model(MANIFEST, BLOBS, way)) as server:
        try:
            fetch(server, store)
        except RegistryError as error:
            assert server.host in error.message  # noqa: PT017
            assert not is_whole_or_absent(store)
        else:
            assert is_whole_or_absent(store)


@pytest.mark.parametrize(
    "after", ["31536000000", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT", "-5", "soon", "\xb3", ""]
)
def test_a_registry_cannot_ask_for_years(after: str, tmp_path: Path) -> None:
    """What Retry-After says counts up to the longest delay, nonsense not at all."""
    answer = answers_with(
        f"HTTP/1.1 503 Busy\r\nRetry-After: {after}\r\nContent-Length: 0\r\n\r\n".encode("latin-1")
    )
    with misbehaving(answer) as server, pytest.raises(RegistryError, match="after 4 tries"):
        fetch(server, tmp_path)


# -- redirects and challenges ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines",
    [
        ["Location: http://127.0.0.1/\x01"],
        ["Location: http://127.0.0.1/\x7f"],
        ["Location: http://127.0.0.1/\xa0"],
        ["Location: http://127.0.0.1/a b"],
        ["Location: http://127.0.0.1:port/"],
        ["Location: http://127.0.0.1:99999/"],
        ["Location: http://127.0.0.1/a", "Location: http://127.0.0.1/b"],
        ["Location: gopher://127.0.0.1/"],
        ["Location: http://127.0.0.1>-6/"],
        ["Location: http://fa\xdf.test/"],
        ["Location: http://a.xn--/"],
        ["Location: " + "/x" * 40000],
        [],
    ],
)
def test_locations_that_make_no_sense_are_not_followed(lines: list[str], tmp_path: Path) -> None:
    """Control characters, blanks, ports that are none, two addresses, none."""
    text = "\r\n".join(["HTTP/1.1 302 Found", "Content-Length: 0", *lines, "", ""])
    answer = serve_model(MANIFEST, BLOBS, answers_with(text.encode("latin-1")))
    with misbehaving(answer) as server:
        with pytest.raises(RegistryError) as caught:
            fetch(server, tmp_path)
        assert caught.value.kind in {"bad_redirect", "registry_unavailable", "registry"}
        assert caught.value.message.isprintable()


@pytest.mark.parametrize(
    "challenge",
    [
        "", "Nonsense", "Basic", 'Basic realm="', "Bearer", 'Bearer realm="file:///etc/passwd"',
        'Bearer realm="http://u:p@127.0.0.1/"', 'Bearer realm="//"', 'Bearer realm="http://["',
        'Bearer realm="' + "x" * 20000, ", , ,=,=", "Negotiate YII=", 'Bearer realm="\xff"',
    ],
)  # fmt: skip
def test_challenges_that_make_no_sense_cost_no_login(challenge: str, tmp_path: Path) -> None:
    """One error, few requests, and the password only where Basic asks for it."""
    answer = answers_with(
        f"HTTP/1.1 401 No\r\nWWW-Authenticate: {challenge}\r\nContent-Length: 0\r\n\r\n".encode(
            "latin-1"
        )
    )
    with misbehaving(answer) as server:
        with pytest.raises(RegistryError) as caught:
            pull(f"{server.host}/a/m", store=tmp_path, patience=QUICK,
                 find=lambda _: Login("u", "s3cret"))  # fmt: skip
        assert "s3cret" not in f"{caught.value.message} {caught.value.hint}"
        assert len(server.seen) <= 2
        if not challenge.startswith("Basic"):
            assert not any("Authorization" in headers for _, headers in server.seen)


def test_challenges_without_end_are_met_once(tmp_path: Path) -> None:
    """A registry that gives out a new token each time and refuses each is given up."""

    def answer(request: Handler) -> None:
        if request.path.startswith("/token"):
            request.reply(200, b'{"token": "t%d"}' % len(request.server.seen))
        else:
            realm = f"http://127.0.0.1:{request.server.server_port}/token"
            request.reply(401, WWW_Authenticate=f'Bearer realm="{realm}"')

    with misbehaving(answer) as server:
        with pytest.raises(RegistryError, match="asks for a login"):
            fetch(server, tmp_path)
        assert len(server.seen) == 3


@pytest.mark.parametrize(
    "token",
    [b"", b"[]", b'{"token": 1}', b'{"token": "a\\r\\nX-Evil: 1"}', b'{"token": "\xc3\xa9"}',
     b'{"token": ""}', b" " * (2 << 20), b'{"token": "' + b"t" * 500_000 + b'"}'],
)  # fmt: skip
def test_tokens_that_are_none_are_refused(token: bytes, tmp_path: Path) -> None:
    """Other types, line breaks, other letters, megabytes: one error and no header made of it."""

    def answer(request: Handler) -> None:
        realm = f"http://127.0.0.1:{request.server.server_port}/token"
        if request.path.startswith("/token"):
            request.reply(200, token)
        else:
            request.reply(401, WWW_Authenticate=f'Bearer realm="{realm}"')

    with misbehaving(answer) as server:
        with pytest.raises(RegistryError):
            fetch(server, tmp_path)
        assert not any("X-Evil" in headers for _, headers in server.seen)


# -- push ------------------------------------------------------------------------------------------


def test_a_body_behind_an_answer_to_head_is_not_read(tmp_path: Path) -> None:
    """Such bytes are no answer to the next request: the push ends well, or with an error."""
    named: list[str] = []

    def answer(request: Handler) -> None:
        request.rfile.read(int(request.headers.get("Content-Length", 0)))
        if request.command == "HEAD":
            request.wfile.write(b"HTTP/1.1 404 No\r\nContent-Length: 40\r\n\r\n")
            request.wfile.write(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")
        elif request.command == "POST":
            request.reply(202, Location="/upload")
        else:
            named.append(request.path)
            request.reply(201)

    store = Store(tmp_path)
    with misbehaving(answer) as server:
        put_model(store, f"{server.host}/a/m", b"{}", SHORT, LONG)
        try:
            push(f"{server.host}/a/m", store=store, find=nobody, patience=QUICK)
        except QuantmillError as error:
            assert server.host in error.message  # noqa: PT017
            assert not any("/manifests/" in path for path in named)
        else:
            assert sum("digest=" in path for path in named) == 3


def test_an_upload_that_leads_elsewhere_gets_no_login(tmp_path: Path) -> None:
    """A Location on another host is given the bytes, which are no secret, and no password."""

    def take(request: Handler) -> None:
        request.rfile.read(int(request.headers.get("Content-Length", 0)))
        request.reply(201)

    with misbehaving(take) as elsewhere:

        def answer(request: Handler) -> None:
            request.rfile.read(int(request.headers.get("Content-Length", 0)))
            if "Authorization" not in request.headers:
                request.reply(401, WWW_Authenticate="Basic")
            elif request.command == "HEAD":
                request.reply(404)
            elif request.command == "POST":
                request.reply(202, Location=f"http://{elsewhere.host}/upload")
            else:
                request.reply(201)

        store = Store(tmp_path)
        with misbehaving(answer) as server:
            put_model(store, f"{server.host}/a/m", b"{}", SHORT)
            push(f"{server.host}/a/m", store=store, patience=QUICK,
                 find=lambda _: Login("u", "s3cret"))  # fmt: skip
        assert len(elsewhere.seen) == 2
        assert not any("Authorization" in headers for _, headers in elsewhere.seen)


def test_an_upload_never_leads_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A public registry cannot have bytes sent to an address of a private network."""
    from quantmill import registry as module

    public: Callable[[object], bool] = lambda origin: "localhost" not in str(origin)  # noqa: E731
    monkeypatch.setattr(module, "_public", public)

    def answer(request: Handler) -> None:
        request.rfile.read(int(request.headers.get("Content-Length", 0)))
        if request.command == "HEAD":
            request.reply(404)
        else:
            request.reply(202, Location=f"http://localhost:{request.server.server_port}/upload")

    store = Store(tmp_path)
    with misbehaving(answer) as server:
        put_model(store, f"{server.host}/a/m", b"{}", SHORT)
        with pytest.raises(RegistryError, match="private") as caught:
            push(f"{server.host}/a/m", store=store, find=nobody, patience=QUICK)
        assert caught.value.kind == "bad_redirect"
        assert not any("/upload?" in path for path, _ in server.seen)


def test_a_name_that_means_another_address_on_connecting_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that were public when they were looked up: nothing is sent inside all the same."""
    from quantmill import registry as module

    monkeypatch.setattr(module, "_public", lambda _: True)
    with misbehaving(lambda request: request.reply(200, MANIFEST)) as inside:
        there = f"http://localhost:{inside.server_port}/"
        with misbehaving(lambda request: request.reply(307, Location=there)) as server:
            with pytest.raises(RegistryError, match="private") as caught:
                pull(f"{server.host}/a/m", store=tmp_path, patience=QUICK, find=nobody)
            assert caught.value.kind == "bad_redirect"
        assert not inside.seen


# -- names -----------------------------------------------------------------------------------------


def test_names_that_differ_in_case_alone_are_one_model(tmp_path: Path) -> None:
    """On every file system the second pull replaces what the first one brought."""
    store = Store(tmp_path)
    other, more = model_of(b"{}", b"other")
    for path, (manifest, blobs) in {"Team/M": (MANIFEST, BLOBS), "team/m": (other, more)}.items():
        with misbehaving(serve_model(manifest, blobs)) as server:
            server_name = parse_name(f"registry.test/{path}")
            pull(f"{server.host}/{path}", store=store, patience=QUICK, find=nobody)
            raw = store.get_manifest(parse_name(f"{server.host}/{path}")).raw
        store.put_manifest(server_name, raw)
        store.remove_manifest(parse_name(f"{server.host}/{path}"))
    assert [s.name.display for s in store.list_names()] == ["registry.test/Team/M:latest"]
    assert store.get_manifest(server_name).raw == other
