"""Pulling from registries that misbehave: the right bytes or a clear error, never half a model."""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import put_model, writer_elsewhere
from quantmill import prune, pulling
from quantmill.credentials import Login
from quantmill.digests import digest_of
from quantmill.errors import BadRequest, Busy, QuantmillError, RegistryError
from quantmill.moving import Moving
from quantmill.names import parse_name
from quantmill.partials import Partial
from quantmill.patience import Patience
from quantmill.pulling import pull
from quantmill.pushing import push
from quantmill.spans import Span
from quantmill.store import Store
from registries import Answer, Handler, Misbehaving, misbehaving, model_of, serve_model, serve_well

QUICK = Patience(
    tries=4, first_delay=0.001, longest_delay=0.01, connect=2, stall=0.2, counts=1 << 30
)
LONG = bytes(i * 7 % 251 for i in range(100_000))
SHORT = b"short"
MANIFEST, BLOBS = model_of(b"{}", SHORT, LONG)
KIB = 1024


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts small enough that a blob of 100 kB has several."""
    monkeypatch.setattr(pulling, "PART", 24 * KIB)
    monkeypatch.setattr(pulling, "PROBE", 4 * KIB)
    monkeypatch.setattr(pulling, "NOTED", 8 * KIB)


def nobody(_: str) -> Login | None:
    return None


def fetch(server: Misbehaving, store: Store | Path, patience: Patience = QUICK) -> pulling.Pulled:
    return pull(f"{server.host}/a/m", store=Store(store) if isinstance(store, Path) else store,
                patience=patience, find=nobody)  # fmt: skip


def data_of(request: Handler) -> bytes:
    return BLOBS[request.path.rpartition("/")[2]]


# -- the ways to misbehave -------------------------------------------------------------------------


def whole(request: Handler) -> None:
    request.reply(200, data_of(request))


def shifted(request: Handler) -> None:
    data = data_of(request)
    start, end = request.asked(len(data)) or (0, len(data))
    request.reply(
        206, data[start + 1 : end], Content_Range=f"bytes {start + 1}-{end - 1}/{len(data)}"
    )


def other_total(request: Handler) -> None:
    data = data_of(request)
    start, end = request.asked(len(data)) or (0, len(data))
    request.reply(206, data[start:end], Content_Range=f"bytes {start}-{end - 1}/{len(data) + 9}")


def no_range(request: Handler) -> None:
    request.reply(206, data_of(request))


def less(request: Handler) -> None:
    data = data_of(request)
    start, end = request.asked(len(data)) or (0, len(data))
    half = max(start + 1, (start + end) // 2)
    request.reply(206, data[start:half], Content_Range=f"bytes {start}-{half - 1}/{len(data)}")


def cut(request: Handler) -> None:
    data = data_of(request)
    start, end = request.asked(len(data)) or (0, len(data))
    request.send_response(206)
    request.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
    request.send_header("Content-Length", str(end - start))
    request.end_headers()
    request.wfile.write(data[start : (start + end) // 2])
    request.close_connection = True


def hang_up(request: Handler) -> None:
    request.close_connection = True


def error_500(request: Handler) -> None:
    request.reply(500, b"<html>")


def busy_503(request: Handler) -> None:
    request.reply(503, Retry_After="0")


def limited_429(request: Handler) -> None:
    request.reply(429, b'{"errors": [{"message": "slow down"}]}', Retry_After="1")


def stall(request: Handler) -> None:
    data = data_of(request)
    request.send_response(200)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data[:1])
    request.server.ended.wait(1)
    request.close_connection = True


def drip(request: Handler) -> None:
    data = data_of(request)
    request.send_response(200)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    for at in range(20):
        request.wfile.write(data[at : at + 1])
        if request.server.ended.wait(0.05):
            break
    request.close_connection = True


def wrong_bytes(request: Handler) -> None:
    serve_well(request, data_of(request)[::-1])


def endless(request: Handler) -> None:
    request.send_response(200)
    request.send_header("Connection", "close")
    request.end_headers()
    while not request.server.ended.is_set():
        request.wfile.write(data_of(request))
    request.close_connection = True


def encoded(request: Handler) -> None:
    request.reply(200, data_of(request), Content_Encoding="gzip")


def too_long(request: Handler) -> None:
    request.reply(200, data_of(request) + b"x")


def missing_404(request: Handler) -> None:
    request.reply(404)


def unsatisfied_416(request: Handler) -> None:
    request.reply(416)


def good(request: Handler) -> None:
    serve_well(request, data_of(request))


WAYS: list[Answer] = [
    good, whole, shifted, other_total, no_range, less, cut, hang_up, error_500, busy_503,
    limited_429, stall, drip, wrong_bytes, endless, encoded, too_long, missing_404, unsatisfied_416,
]  # fmt: skip
PASSING: list[Answer] = [good, whole, shifted, no_range, less, cut, hang_up, error_500, busy_503]


def one_after_the_other(ways: list[Answer]) -> Answer:
    """Each request for a blob is answered in the next way; the last one stays."""
    lock, left = threading.Lock(), iter(ways)

    def answer(request: Handler) -> None:
        with lock:
            way = next(left, good)
        way(request)

    return answer


def is_whole_or_absent(store: Store) -> bool:
    """Every named blob has its bytes; a name is there only with all of them."""
    for blob in store.list_blobs():
        assert blob.digest is not None
        assert store.holds(blob.digest, blob.size)
    for stored in store.list_names():
        for ref in store.get_manifest(stored.name).all_refs():
            assert store.holds(ref.digest, ref.size)
    return bool(store.list_names())


@settings(max_examples=60)
@given(st.lists(st.sampled_from(WAYS), max_size=8), st.booleans())
def test_the_right_file_or_an_error(ways: list[Answer], again: bool) -> None:
    """Whatever a registry answers, the model is there whole or there is one error and no model."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        with misbehaving(serve_model(MANIFEST, BLOBS, one_after_the_other(ways))) as server:
            for _ in range(1 + again):
                try:
                    fetch(server, store)
                except RegistryError as error:
                    assert server.host in error.message  # noqa: PT017
                    assert not is_whole_or_absent(store)
                else:
                    assert is_whole_or_absent(store)


@settings(max_examples=20)
@given(st.lists(st.sampled_from(PASSING), max_size=3))
def test_what_passes_is_waited_for(ways: list[Answer]) -> None:
    """Failures that may pass, fewer than there are tries, end with the right model."""
    with (
        tempfile.TemporaryDirectory() as folder,
        misbehaving(serve_model(MANIFEST, BLOBS, one_after_the_other(ways))) as server,
    ):
        assert (
            fetch(server, Path(folder), Patience(tries=20, first_delay=0.001, stall=2)).blobs == 3
        )


@pytest.mark.parametrize(
    ("way", "kind"),
    [
        (other_total, "wrong_size"),
        (endless, "wrong_size"),
        (too_long, "wrong_size"),
        (wrong_bytes, "digest_mismatch"),
        (encoded, "bad_encoding"),
        (missing_404, "not_found"),
        (unsatisfied_416, "refused"),
    ],
)
def test_what_is_final_stops_at_once(way: Answer, kind: str, tmp_path: Path) -> None:
    """No second request follows where another try cannot help."""
    with misbehaving(serve_model(*model_of(LONG, LONG), way)) as server:
        with pytest.raises(RegistryError) as caught:
            fetch(server, tmp_path)
        assert caught.value.kind == kind
        parts = 6 if way is wrong_bytes else 1
        assert sum("/blobs/" in path for path, _ in server.seen) <= parts
    assert not is_whole_or_absent(Store(tmp_path))


@pytest.mark.parametrize("way", [stall, drip, error_500, limited_429, cut, hang_up])
def test_patience_ends(way: Answer, tmp_path: Path) -> None:
    """A registry that keeps failing is given up after so many tries, with what failed last."""
    with misbehaving(serve_model(MANIFEST, BLOBS, way)) as server:
        with pytest.raises(RegistryError, match="after 4 tries") as caught:
            fetch(server, tmp_path)
        assert caught.value.kind == "registry_unavailable"


def test_what_arrived_before_a_failure_is_not_asked_for_again(tmp_path: Path) -> None:
    """The second pull asks for the rest of a blob only."""

    def cut_long(request: Handler) -> None:
        (cut if data_of(request) == LONG else good)(request)

    with (
        misbehaving(serve_model(MANIFEST, BLOBS, cut_long)) as server,
        pytest.raises(RegistryError),
    ):
        fetch(server, tmp_path)
    with misbehaving(serve_model(MANIFEST, BLOBS)) as server:
        pulled = fetch(server, tmp_path)
        assert pulled.resumed > 0
        ranges = [h["Range"] for path, h in server.seen if "Range" in h]
        assert "bytes=0-4095" not in ranges
    assert is_whole_or_absent(Store(tmp_path))


def test_damaged_leftovers_are_fetched_anew(tmp_path: Path) -> None:
    """Bytes of an earlier run that turn out wrong cost time, not the model."""
    store = Store(tmp_path)
    partial = Partial(store, digest_of(LONG), len(LONG))
    partial.write(b"?" * 5000, 0)
    partial.note(Span(0, 5000))
    partial.close()
    with misbehaving(serve_model(MANIFEST, BLOBS)) as server:
        assert fetch(server, store).resumed == 0
    assert is_whole_or_absent(store)


def test_a_blob_is_fetched_by_one_process_at_a_time(tmp_path: Path) -> None:
    """Who comes second is told so."""
    store = Store(tmp_path)
    partial = Partial(store, digest_of(LONG), len(LONG))
    with misbehaving(serve_model(MANIFEST, BLOBS)) as server, pytest.raises(Busy, match="fetching"):
        fetch(server, store)
    partial.close()


def test_leftovers_are_pruned_when_old(tmp_path: Path) -> None:
    """Half-fetched blobs are temporary files to `prune`; nothing else of them stays."""
    with misbehaving(serve_model(MANIFEST, BLOBS, cut)) as server, pytest.raises(RegistryError):
        fetch(server, tmp_path)
    store = Store(tmp_path)
    assert prune(store).leftovers == ()
    assert prune(store, 0).leftovers
    assert list(store.partials.iterdir()) == []


def test_a_pull_holds_off_removal(tmp_path: Path) -> None:
    """Pulling shares the store's lock with other writers."""
    store = Store(tmp_path)
    with misbehaving(serve_model(MANIFEST, BLOBS)) as server, writer_elsewhere(tmp_path):
        assert fetch(server, store).blobs == 3


def test_progress_adds_up(tmp_path: Path) -> None:
    """Bytes grow to the total, blob by blob."""
    events: list[Moving] = []
    with misbehaving(serve_model(MANIFEST, BLOBS)) as server:
        pull(f"{server.host}/a/m", store=tmp_path, find=nobody, progress=events.append)
    assert events[-1].bytes == events[-1].bytes_total == sum(map(len, BLOBS.values()))
    assert events[-1].blobs == events[-1].blobs_total == 3
    counts = [event.bytes for event in events]
    assert counts == sorted(counts)


# -- manifests -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "manifest",
    [
        b"", b"{", b"[]", b"[" * 100_000, b"{}", b'{"manifests": []}', b"\xff",
        MANIFEST.replace(b'"layers"', b'"config"'),
        MANIFEST.replace(b"sha256:", b"../../../"),
        MANIFEST.replace(b'"size":5', b'"size":-5'),
        MANIFEST.replace(b'"size":5', b'"size":5,"name":"../../etc/passwd"'),
        MANIFEST.replace(b'"size":5', b'"size":5,"name":"/etc/passwd"'),
        MANIFEST.replace(f"{digest_of(SHORT)}".encode(), f"{digest_of(LONG)}".encode()),
        b" " * (17 << 20),
    ],
)  # fmt: skip
def test_bad_manifests_are_refused(manifest: bytes, tmp_path: Path) -> None:
    """A manifest that makes no sense, lies or leads out of the model is one error."""
    with misbehaving(serve_model(manifest, BLOBS)) as server:
        with pytest.raises(RegistryError) as caught:
            fetch(server, tmp_path)
        assert caught.value.kind in {"bad_manifest", "wrong_size"}
        assert server.host in caught.value.message
    assert not is_whole_or_absent(Store(tmp_path))


def test_a_manifest_keeps_every_byte(tmp_path: Path) -> None:
    """What Ollama writes (another order, `from`, fields unknown here) is stored as it came."""
    layers = ",".join(
        f'{{"size":{len(data)},"from":"a/b","mediaType":"application/vnd.ollama.image.model",'
        f'"digest":"{digest}","x":1}}'
        for digest, data in BLOBS.items()
    )
    config = layers.partition("},")[0] + "}"
    raw = f'{{"layers" : [{layers}], "schemaVersion":2,"config":{config}}}'.encode()
    store = Store(tmp_path)
    with misbehaving(serve_model(raw, BLOBS)) as server:
        fetch(server, store)
        assert store.get_manifest(parse_name(f"{server.host}/a/m")).raw == raw


def test_without_the_client_the_error_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The HTTP client is an optional part."""
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(BadRequest, match="httpx2") as caught:
        pull("registry.test/a/m", store=tmp_path, find=nobody)
    assert caught.value.kind == "missing_extra"
    assert caught.value.hint == "pip install 'quantmill[registry]'"


# -- redirects and logins --------------------------------------------------------------------------


@pytest.fixture
def elsewhere() -> Iterator[Misbehaving]:
    """Storage on another port, which is another host to us."""
    with misbehaving(good) as server:
        yield server


def asks_for_login(then: Answer) -> Answer:
    def answer(request: Handler) -> None:
        if "Authorization" not in request.headers:
            request.reply(401, WWW_Authenticate='Basic realm="x"')
        else:
            then(request)

    return answer


def test_a_redirect_gets_no_login(elsewhere: Misbehaving, tmp_path: Path) -> None:
    """Storage on another host serves the blobs and never sees the password."""

    def away(request: Handler) -> None:
        where = f"http://{elsewhere.host}/store/{request.path.rpartition('/')[2]}"
        request.reply(307, Location=where)

    answer = asks_for_login(serve_model(MANIFEST, BLOBS, away))
    with misbehaving(answer) as server:
        pull(f"{server.host}/a/m", store=tmp_path, find=lambda _: Login("u", "secret"))
        assert any("Authorization" in headers for _, headers in server.seen)
    assert elsewhere.seen
    assert not any("Authorization" in headers for _, headers in elsewhere.seen)


def test_a_token_from_another_host_costs_no_password(
    elsewhere: Misbehaving, tmp_path: Path
) -> None:
    """A token server on another host is asked without the login, the one here with it."""
    elsewhere.answer = lambda request: request.reply(200, b'{"token": "anonymous"}')
    realms = {"other": f"http://{elsewhere.host}/token", "own": "/token"}

    def answer(request: Handler) -> None:
        host = f"http://127.0.0.1:{request.server.server_port}"
        realm = realms[which] if which == "other" else host + realms[which]
        if request.path.startswith("/token"):
            request.reply(200, b'{"access_token": "for-the-user"}')
        elif request.headers.get("Authorization", "").startswith("Bearer"):
            serve_model(MANIFEST, BLOBS)(request)
        else:
            scope = 'scope="repository:a/m:pull"'
            request.reply(401, WWW_Authenticate=f'Bearer realm="{realm}",service=s,{scope}')

    for which in ("other", "own"):
        with misbehaving(answer) as server:
            pull(f"{server.host}/a/m", store=tmp_path / which,
                 find=lambda _: Login("u", "secret"))  # fmt: skip
            asked = [h for path, h in server.seen if path.startswith("/token")]
            assert [h["Authorization"].split()[0] for h in asked] == ["Basic"] * (which == "own")
    assert len(elsewhere.seen) == 1
    assert "Authorization" not in elsewhere.seen[0][1]
    assert "scope=repository%3Aa%2Fm%3Apull" in elsewhere.seen[0][0]


def test_a_server_that_repeats_the_password_is_not_quoted(tmp_path: Path) -> None:
    """An error that echoes what was sent is shown without it."""

    def echo(request: Handler) -> None:
        sent = request.headers["Authorization"].split()[1]
        request.reply(403, b'{"errors": [{"message": "no: %s"}]}' % sent.encode())

    login = Login("u", "secret")
    with misbehaving(asks_for_login(echo)) as server:
        with pytest.raises(RegistryError) as caught:
            pull(f"{server.host}/a/m", store=tmp_path, find=lambda _: login)
        assert caught.value.kind == "forbidden"
        shown = f"{caught.value.message} {caught.value.hint} {login!r}"
        assert "secret" not in shown
        assert login.basic.split()[1] not in shown


def test_cookies_are_not_kept(tmp_path: Path) -> None:
    """What a registry sets is not sent again, to it or to any other port of its host."""

    def answer(request: Handler) -> None:
        if "/manifests/" in request.path:
            request.reply(200, MANIFEST, Set_Cookie="session=1; Path=/")
        else:
            good(request)

    with misbehaving(answer) as server:
        fetch(server, tmp_path)
        assert not any("Cookie" in headers for _, headers in server.seen)


@pytest.mark.parametrize(
    "location",
    ["", "file:///etc/passwd", "http://u:p@127.0.0.1/", "//", "http://[", "http://a..b/\x7f"],
)
def test_redirects_that_lead_nowhere_are_refused(location: str, tmp_path: Path) -> None:
    """Only HTTP addresses without a password in them are followed."""
    answer = serve_model(MANIFEST, BLOBS, lambda r: r.reply(302, Location=location))
    with misbehaving(answer) as server, pytest.raises(RegistryError) as caught:
        fetch(server, tmp_path)
    assert caught.value.kind == "bad_redirect"


def test_a_circle_of_redirects_ends(tmp_path: Path) -> None:
    """More than ten hops are refused."""
    answer: Callable[[Handler], None] = lambda r: r.reply(302, Location=r.path)  # noqa: E731
    with misbehaving(serve_model(MANIFEST, BLOBS, answer)) as server:
        with pytest.raises(RegistryError, match="more than 10 times"):
            fetch(server, tmp_path)
        assert len(server.seen) < 60


def test_a_host_that_is_not_there_is_not_waited_for(tmp_path: Path) -> None:
    """Nobody listens: one error, at once."""
    with misbehaving(good) as server:
        host = server.host
    with pytest.raises(RegistryError, match="cannot be reached") as caught:
        pull(f"{host}/a/m", store=tmp_path, find=nobody)
    assert caught.value.kind == "registry_unreachable"


def test_plain_http_needs_permission(tmp_path: Path) -> None:
    """Across a network nothing is asked in the clear unless the user says so."""
    with pytest.raises(BadRequest, match="without encryption") as caught:
        pull("http://registry.test/a/m", store=tmp_path, find=nobody)
    assert caught.value.hint is not None
    assert "--insecure" in caught.value.hint


# -- push ------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.lists(st.integers(0, 7), max_size=12))
def test_a_push_never_names_what_is_not_there(ways: list[int]) -> None:
    """Whatever fails on the way up, the manifest is sent only after every blob was taken."""
    taken: set[str] = set()
    named: list[str] = []
    left, lock = iter(ways), threading.Lock()

    def answer(request: Handler) -> None:
        length = int(request.headers.get("Content-Length", 0))
        body = request.rfile.read(length)
        with lock:
            way = next(left, 7)
        if way == 0:
            request.reply(500)
        elif way == 1:
            request.close_connection = True
        elif way == 2:
            request.reply(429, Retry_After="0")
        elif way == 3:
            request.reply(403)
        elif request.command == "HEAD":
            request.reply(404)
        elif request.command == "POST":
            request.reply(202, Location="/upload?state=1")
        elif "/manifests/" in request.path:
            assert taken == set(BLOBS)
            named.append(request.path)
            request.reply(201)
        else:
            digest = request.path.rpartition("digest=")[2].replace("%3A", ":")
            if str(digest_of(body)) == digest:
                taken.add(digest)
            request.reply(201)

    with tempfile.TemporaryDirectory() as folder, misbehaving(answer) as server:
        store = Store(folder)
        put_model(store, f"{server.host}/a/m", b"{}", SHORT, LONG)
        try:
            push(f"{server.host}/a/m", store=store, find=nobody, patience=QUICK)
        except QuantmillError as error:
            assert server.host in error.message  # noqa: PT017
            assert not named or 3 in ways or 1 in ways or 0 in ways or 2 in ways
        else:
            assert named
            assert taken == set(BLOBS)
        assert store.get_manifest(parse_name(f"{server.host}/a/m"))
