"""Fetching from the hub, against a server on this machine that answers as the hub does."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pytest

from checkpoints import SMALL, write_checkpoint
from quantmill.checkpoint import open_checkpoint
from quantmill.creation import create, plan
from quantmill.errors import BadRequest, BadSource, NoSpace, QuantmillError
from quantmill.hub import HubName, fetch, parse_hub_name
from quantmill.store import Store

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (quantmill[hub])")

from huggingface_hub import close_session, constants

TOKEN = "hf_VerySecretToken0123456789"
REPO = "org/small"
NAME = HubName(REPO, None)

# -- the server ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    token: str | None


@dataclass
class Hub:
    """Repositories, and how to answer for them wrongly. Fragments are parts of a path."""

    commits: dict[tuple[str, str], str] = field(default_factory=dict)
    trees: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    token: str | None = None  # without it, everything is private
    failing: dict[str, tuple[int, str]] = field(default_factory=dict)  # fragment: status, code
    listed: dict[str, int] = field(default_factory=dict)  # file: a size that is not its own
    cuts: dict[str, list[int]] = field(default_factory=dict)  # file: where each answer ends early
    pages: dict[str, bytes] = field(default_factory=dict)  # fragment: an answer with status 200
    xet: bool = False  # say of every file that it lies in such a storage
    storage: str = ""  # another server that has the content of large files
    pause: float = 0.0  # after every 2**20 bytes
    url: str = ""

    def publish(self, files: Path | Mapping[str, bytes], *revisions: str, repo: str = REPO) -> str:
        """A commit with these files, under the names given, and main."""
        if isinstance(files, Path):
            paths = [p for p in files.rglob("*") if p.is_file()]
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in paths}
        text = repr([repo, sorted((n, oid(data)) for n, data in files.items())])
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.trees[commit] = dict(files)
        for revision in (*(revisions or ("main",)), commit):
            self.commits[repo, revision] = commit
        return commit

    @property
    def got(self) -> list[str]:
        """Files whose content was asked for, in order of their names."""
        paths = [r.path.split("/resolve/")[1] for r in self.requests if "/resolve/" in r.path]
        gets = [r for r in self.requests if "/resolve/" in r.path]
        pairs = zip(gets, paths, strict=True)
        return sorted(unquote(p.partition("/")[2]) for r, p in pairs if r.method == "GET")

    @property
    def tokens(self) -> set[str | None]:
        return {r.token for r in self.requests}


def oid(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, path = self.hub, urlsplit(self.path).path
        hub.requests.append(Request(self.command, self.path, self.headers["Authorization"]))
        for fragment, (status, code) in hub.failing.items():
            if fragment in path:
                return self.refuse(status, code)
        for fragment, page in hub.pages.items():
            if fragment in path:
                return self.send(200, page, {"Content-Type": "text/html"})
        if hub.token and self.headers["Authorization"] != f"Bearer {hub.token}":
            return self.refuse(401, "RepoNotFound")
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path)
        if found:
            return self.listing(found[1], found[2] == "tree", unquote(found[3] or "main"))
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if found:
            return self.file(found[1], unquote(found[2]), unquote(found[3]))
        found = re.fullmatch(r"/content/(.+)", path)
        if found:
            return self.body(unquote(found[1]), hub.trees["content"][unquote(found[1])], {})
        if path == "/access":
            access = {"Cas-Url": hub.url, "Access-Token": "x", "Token-Expiration": "4000000000"}
            return self.send(200, b"", {f"X-Xet-{key}": value for key, value in access.items()})
        return self.refuse(404, "")

    def commit(self, repo: str, revision: str) -> str | None:
        if repo not in {r for r, _ in self.hub.commits}:
            self.refuse(404, "RepoNotFound")
        elif (repo, revision) not in self.hub.commits:
            self.refuse(404, "RevisionNotFound")
        return self.hub.commits.get((repo, revision))

    def listing(self, repo: str, as_tree: bool, revision: str) -> None:
        commit = self.commit(repo, revision)
        if commit is None:
            return
        tree = self.hub.trees[commit]
        sizes = {n: self.hub.listed.get(n, len(data)) for n, data in tree.items()}
        files: list[dict[str, Any]] = [
            {"type": "file", "path": n, "size": sizes[n], "oid": oid(tree[n])[:40]} for n in tree
        ]
        info = {"id": repo, "sha": commit}
        self.send(200, json.dumps(files if as_tree else info).encode(), {})

    def file(self, repo: str, revision: str, name: str) -> None:
        commit = self.commit(repo, revision)
        if commit is None:
            return
        data = self.hub.trees[commit].get(name)
        if data is None:
            self.refuse(404, "EntryNotFound")
            return
        headers = {"X-Repo-Commit": commit, "ETag": f'"{oid(data)}"'}
        if self.hub.xet:
            route = f"{self.hub.url}/access"
            headers |= {"X-Xet-Hash": oid(data), "X-Xet-Refresh-Route": route}
        if self.hub.storage and name.endswith(".safetensors"):
            headers |= {
                "Location": f"{self.hub.storage}/content/{quote(name)}",
                "X-Linked-Etag": f'"{oid(data)}"',
                "X-Linked-Size": str(len(data)),
            }
            self.send(302, b"", headers)
        else:
            self.body(name, data, headers)

    def body(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        found = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        if found:
            start = int(found[1])
            headers = {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            self.send(206, data[start:], headers, name)
        else:
            self.send(200, data, headers, name)

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": f"{code} here"})

    def send(self, status: int, data: bytes, headers: Mapping[str, str], name: str = "") -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = self.hub.cuts.get(name)
        if cuts:
            data, self.close_connection = data[: cuts.pop(0)], True
        try:
            for at in range(0, len(data), 2**20):
                self.wfile.write(data[at : at + 2**20])
                time.sleep(self.hub.pause)
        except OSError:  # whoever asked went away
            self.close_connection = True


@pytest.fixture
def served() -> Iterator[Any]:
    """Starts servers, each with repositories of its own."""
    servers = []

    def start() -> Hub:
        hub = Hub()
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        hub.url = f"http://127.0.0.1:{server.server_port}"
        return hub

    yield start
    close_session()
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home of the library, whatever the machine's settings are."""
    for variable in [*os.environ]:
        if variable.startswith(("HF_", "HUGGING")) or variable.lower().endswith("_proxy"):
            monkeypatch.delenv(variable)
    folder = tmp_path / "home"
    for constant, name in {
        "HF_HOME": "", "HF_HUB_CACHE": "hub", "HF_TOKEN_PATH": "token",
        "HF_STORED_TOKENS_PATH": "stored_tokens", "HF_XET_CACHE": "xet",
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, constant, str(folder / name))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    for constant in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "HF_HUB_DISABLE_SYMLINKS"):
        monkeypatch.setattr(constants, constant, False)
    return folder


@pytest.fixture
def hub(served: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The server that the library asks, with nothing published."""
    found: Hub = served()
    use(found.url, monkeypatch)
    return found


def use(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's pauses between its attempts take no time."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "small", SMALL, tokenizer__json="{}", vocab__txt="a")


def content(folder: Path) -> dict[str, bytes]:
    paths = [p for p in folder.rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def refused(name: HubName = NAME) -> BadSource:
    """The error that fetching gives; it never says the token."""
    with pytest.raises(BadSource) as caught:
        fetch(name)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert TOKEN not in f"{caught.value.message} {caught.value.hint}"
    assert "\n" not in caught.value.message
    return caught.value


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("org/repo", "org/repo", None),
        ("Qwen/Qwen2.5-0.5B_x", "Qwen/Qwen2.5-0.5B_x", None),
        ("org/repo@main", "org/repo", "main"),
        ("org/repo@refs/pr/1", "org/repo", "refs/pr/1"),
        ("org/repo@" + "0a" * 20, "org/repo", "0a" * 20),
        ("a/" + "b" * 96, "a/" + "b" * 96, None),
        ("hf.co/org/repo", "org/repo", None),
        ("https://huggingface.co/org/repo@v1.0", "org/repo", "v1.0"),
    ],
)
def test_names_of_repositories(text: str, repo: str, revision: str | None) -> None:
    """A name is an owner, a repository and perhaps a revision; the hub may stand in front."""
    assert parse_hub_name(text) == HubName(repo, revision)


@pytest.mark.parametrize(
    "text",
    [
        "", "repo", "/org/repo", "./org/repo", "../repo", "org/repo/", "org//repo", "a/b/c", "~/x",
        "org/re po", "org/repo:tag", "org/a..b", "org/a--b", "org/-a", "org/a-", "org/.a", "org/a.",
        "org/repo.git", "org/répo", "a/" + "b" * 97, "org/repo@", "org/repo@a@b", "org/repo@../x",
        "org/repo@/x", "org/repo@x/", "org/repo@a//b", "org/repo@.x", "org/repo@a b",
        "http://huggingface.co/org/repo", "https://example.org/org/repo", "org\\repo", "org/repo\n",
        "https://huggingface.co/org/repo/tree/main", "https://huggingface.co/", "hf.co/org",
    ],
)  # fmt: skip
def test_other_texts_are_no_names(text: str) -> None:
    """Paths, addresses of other places and what the hub's grammar forbids are not repositories."""
    assert parse_hub_name(text) is None


@pytest.mark.parametrize("endpoint", ["https://mirror.example:8000/", "mirror.example:8000"])
def test_the_endpoint_may_stand_in_front(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Addresses copied from the hub in use are understood; absolute paths stay paths."""
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert parse_hub_name("mirror.example:8000/org/repo") == HubName("org/repo", None)
    assert parse_hub_name("/org/repo") is None


@pytest.mark.parametrize(
    "name", [HubName("../x", None), HubName("a/b", "../../c"), HubName("a/b", "")]
)
def test_names_that_no_text_gives_are_refused(name: HubName) -> None:
    """A name that was put together wrongly cannot lead out of the cache."""
    with pytest.raises(BadRequest, match="does not name a repository"):
        fetch(name)


def test_a_name_prints_as_it_is_written() -> None:
    """The text of a name means the name."""
    for text in ("org/repo", "org/repo@refs/pr/1"):
        assert str(parse_hub_name(text)) == text


# -- fetching --------------------------------------------------------------------------------------


def test_a_checkpoint_is_fetched_whole(hub: Hub, home: Path, small: Path) -> None:
    """The directory lies in the library's cache, has the same bytes and opens as the source."""
    commit = hub.publish(small)
    folder = fetch(NAME)
    assert folder.relative_to(home).as_posix() == f"hub/models--org--small/snapshots/{commit}"
    assert content(folder) == content(small)
    with open_checkpoint(folder) as fetched, open_checkpoint(small) as source:
        assert fetched.source.fingerprint == source.source.fingerprint
    assert not [p for p in folder.rglob("*") if p.is_file() and os.access(p, os.X_OK)]


@pytest.mark.parametrize("revision", ["v1", "refs/pr/7", "commit"])
def test_a_revision_means_one_commit(hub: Hub, small: Path, revision: str) -> None:
    """A tag, a pull request or a commit is resolved once, and every file is asked for by commit."""
    old = hub.publish(small, "v1", "refs/pr/7")
    (small / "tokenizer.json").write_text('{"new": 1}')
    new = hub.publish(small)
    folder = fetch(HubName(REPO, old if revision == "commit" else revision))
    assert (folder.name, fetch(NAME).name) == (old, new)
    assert (folder / "tokenizer.json").read_text() == "{}"
    asked = {
        r.path.split("/resolve/")[1].partition("/")[0]
        for r in hub.requests
        if "/resolve/" in r.path
    }
    assert asked == {old, new}


def test_nothing_is_fetched_twice(hub: Hub, small: Path) -> None:
    """A second fetch asks for no content; a new commit costs only what changed in it."""
    hub.publish(small)
    first = fetch(NAME)
    assert hub.got == sorted(content(small))
    hub.requests.clear()
    assert fetch(NAME) == first
    assert not hub.got
    (small / "tokenizer.json").write_text('{"new": 1}')
    hub.publish(small)
    assert content(fetch(NAME)) == content(small)
    assert hub.got == ["tokenizer.json"]


def test_only_what_a_checkpoint_needs_is_fetched(hub: Hub, small: Path) -> None:
    """Pickles, other formats, copies of the weights, code, pictures and hidden paths stay there."""
    wanted = content(small) | {"a.jinja": b"1", "b[1]*.json": b"2", "c.tiktoken": b"3"}
    extra = (
        "pytorch_model.bin", "training_args.bin", "model.pt", "a.gguf", "model.fp16.safetensors",
        "consolidated.safetensors", "adapter_model.safetensors", "modeling_x.py", "run.sh",
        "picture.png", "README.md", "requirements.txt", "tf_model.h5", "flax_model.msgpack",
        "original/params.json", "original/consolidated.00.pth", "original/model.safetensors",
        "onnx/model.onnx", "onnx/config.json", "1_Pooling/config.json", ".git/config.json",
        "../outside.json", "a/../../outside.json", "/outside.json", "a\\b.json", "new\nline.json",
    )  # fmt: skip
    hub.publish(wanted | dict.fromkeys(extra, b"no"))
    folder = fetch(NAME)
    assert content(folder) == wanted
    assert hub.got == sorted(wanted)


def test_configs_of_modules_are_fetched(hub: Hub, small: Path) -> None:
    """A sentence-transformers model brings the config of each of its modules."""
    files = content(small) | {"modules.json": b"[]", "1_Pooling/config.json": b"{}"}
    hub.publish(files | {"2_Dense/pytorch_model.bin": b"no", "onnx/model.onnx": b"no"})
    assert content(fetch(NAME)) == files


def test_an_index_says_which_shards_are_in_use(hub: Hub, small: Path) -> None:
    """Shards of the index are fetched, weights that it does not name are not."""
    files = content(small)
    weights = files.pop("model.safetensors")
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    index = {"weight_map": {"a": shards[0], "b": shards[1]}}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    files |= dict.fromkeys(shards, weights)
    hub.publish(files | {"model.safetensors": weights, "model-00001-of-00003.safetensors": b"no"})
    assert content(fetch(NAME)) == files
    del files[shards[1]]
    hub.publish(files)
    hub.requests.clear()
    error = refused()
    assert (error.kind, shards[1] in error.message) == ("missing_shard", True)
    assert not hub.got


def pipeline(weights: bytes) -> dict[str, bytes]:
    named = {
        "_class_name": "FluxPipeline",
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "Scheduler"],
        "safety_checker": [None, None],
    }
    stem = "transformer/diffusion_pytorch_model"
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    return {
        "model_index.json": json.dumps(named).encode(),
        "transformer/config.json": b"{}",
        f"{stem}.safetensors.index.json": json.dumps({"weight_map": {"a": shard}}).encode(),
        f"transformer/{shard}": weights,
        "vae/config.json": b"{}",
        "vae/diffusion_pytorch_model.safetensors": weights,
        "tokenizer/vocab.json": b"{}",
        "tokenizer/merges.txt": b"a b",
        "scheduler/scheduler_config.json": b"{}",
    }


def test_a_pipeline_brings_its_components(hub: Hub, small: Path) -> None:
    """Of a diffusers repository the folders that its index names are fetched, without copies."""
    files = pipeline((small / "model.safetensors").read_bytes())
    extra = (
        "flux1-dev.safetensors", "safety_checker/model.safetensors", "other/config.json",
        "vae/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bin",
        "transformer/model.onnx", "transformer/custom.py", "vae/deeper/config.json",
    )  # fmt: skip
    hub.publish(files | dict.fromkeys(extra, b"no"))
    assert content(fetch(NAME)) == files


def test_a_component_with_only_pickles_is_refused(hub: Hub, small: Path) -> None:
    """A pipeline that is not whole without a pickle is refused before its weights are fetched."""
    files = pipeline((small / "model.safetensors").read_bytes())
    files["vae/diffusion_pytorch_model.bin"] = files.pop("vae/diffusion_pytorch_model.safetensors")
    hub.publish(files)
    error = refused()
    assert (error.kind, "vae/diffusion_pytorch_model.bin" in error.message) == ("no_weights", True)
    assert hub.got == ["model_index.json"]


@pytest.mark.parametrize(
    ("files", "kind", "said"),
    [
        (["config.json", "pytorch_model.bin"], "no_weights", "may execute code"),
        (["config.json", "a.gguf", "b.gguf"], "no_weights", "GGUF files: a.gguf, b.gguf"),
        (["config.json", "sub/model.safetensors"], "no_weights", "sub/model.safetensors"),
        (["config.json", "README.md"], "no_weights", "no model weights"),
        (["adapter_model.safetensors", "adapter_config.json"], "missing_config", "config.json"),
        (["model_index.json", "model.safetensors"], "no_weights", "other folders"),
    ],
)
def test_other_weights_are_refused_with_nothing_fetched(
    hub: Hub, files: list[str], kind: str, said: str
) -> None:
    """A repository without a checkpoint of safetensors is refused, naming what it has."""
    hub.publish(dict.fromkeys(files, b"{}"))
    error = refused()
    assert (error.kind, error.exit_code) == (kind, 3)
    assert said in error.message
    assert not hub.got


# -- tokens ----------------------------------------------------------------------------------------


def test_a_token_goes_to_the_hub_and_nowhere_else(
    hub: Hub, served: Any, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server that keeps large files gets requests without the token that the hub gets."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    storage: Hub = served()
    storage.trees["content"] = content(small)
    hub.token, hub.storage = TOKEN, storage.url
    hub.publish(small)
    assert content(fetch(NAME)) == content(small)
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert storage.tokens == {None}
    assert [r.path for r in storage.requests] == ["/content/model.safetensors"]


def test_a_stored_token_is_used(hub: Hub, home: Path, small: Path) -> None:
    """Without HF_TOKEN the token is the one that `hf auth login` keeps."""
    home.mkdir()
    (home / "token").write_text(TOKEN)
    hub.token = TOKEN
    hub.publish(small)
    assert content(fetch(NAME)) == content(small)


def test_no_token_is_sent_where_there_is_none(hub: Hub, small: Path) -> None:
    """A public repository is asked for without identification."""
    hub.publish(small)
    fetch(NAME)
    assert hub.tokens == {None}


@pytest.mark.parametrize("token", ["hf_é" + TOKEN, TOKEN + "\x00"])
def test_a_token_that_cannot_be_sent_is_not_shown(
    hub: Hub, small: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    """Characters that no header can hold are an error that keeps the token to itself."""
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: token)
    hub.publish(small)
    with pytest.raises(BadRequest) as caught:
        fetch(NAME)
    assert TOKEN not in f"{caught.value.message}{caught.value.hint}"
    assert caught.value.__suppress_context__


# -- offline ---------------------------------------------------------------------------------------


def test_offline_the_cache_is_used(hub: Hub, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was fetched by a name or a commit is found by it again, and nothing is asked for."""
    commit = hub.publish(small, "main", "refs/pr/1")
    names = [NAME, HubName(REPO, "refs/pr/1"), HubName(REPO, commit)]
    folder = fetch(NAME)
    fetch(names[1])
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert [fetch(name) for name in names] == [folder] * 3
    assert not hub.requests


def test_offline_a_cache_of_another_program_is_used(
    hub: Hub, home: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the cache has no list of the files, those that are there count."""
    hub.publish(small)
    folder = fetch(NAME)
    for path in home.glob("hub/*/trees"):
        path.rename(path.with_name("elsewhere"))
    monkeypatch.setattr("huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE", {})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(NAME) == folder
    (folder / "model.safetensors").unlink()
    assert refused().kind == "no_weights"


@pytest.mark.parametrize("name", [HubName("org/other", None), HubName(REPO, "v2")])
def test_offline_without_a_snapshot_is_an_error(
    hub: Hub, small: Path, monkeypatch: pytest.MonkeyPatch, name: HubName
) -> None:
    """A repository or revision that was never fetched is named, and nothing is asked for."""
    hub.publish(small)
    fetch(NAME)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refused(name)
    assert (error.kind, str(name) in error.message) == ("hub_not_cached", True)
    assert "HF_HUB_OFFLINE" in str(error.hint)
    assert not hub.requests


@pytest.mark.parametrize("how", ["gone", "short"])
def test_offline_a_part_of_a_snapshot_is_not_enough(
    hub: Hub, small: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A file that the list has and the cache has not, or not whole, is named."""
    hub.publish(small)
    path = fetch(NAME) / "model.safetensors"
    if how == "gone":
        path.unlink()
    else:
        path.resolve().write_bytes(b"short")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refused()
    assert error.kind == "hub_not_cached"
    assert "model.safetensors is missing or incomplete" in error.message


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failing", "kind", "said", "hint"),
    [
        ({"/api/": (404, "RepoNotFound")}, "hub_not_found", "no repository org/small", "HF_TOKEN"),
        ({"/api/": (401, "RepoNotFound")}, "hub_not_found", "or it is private", "hf auth login"),
        ({"/api/": (404, "")}, "hub_not_found", "no repository org/small", "check the name"),
        ({"/api/": (401, "")}, "hub_refused", "does not accept the token", "HF_TOKEN"),
        ({"/api/": (403, "")}, "hub_refused", "refuses org/small", "permission"),
        ({"/api/": (403, "GatedRepo")}, "hub_gated", "org/small is gated", "org/small, then"),
        ({"/resolve/": (403, "GatedRepo")}, "hub_gated", "org/small is gated", "HF_TOKEN"),
        ({"/resolve/": (401, "GatedRepo")}, "hub_gated", "org/small is gated", "HF_TOKEN"),
        ({"/resolve/": (404, "EntryNotFound")}, "hub_refused", "refuses org/small", "removed"),
        ({"/api/": (500, "")}, "hub_unreachable", "status 500", "HF_HUB_OFFLINE=1"),
        ({"/tree/": (503, "")}, "hub_unreachable", "status 503", "again"),
        ({"/resolve/": (500, "")}, "hub_unreachable", "status 500", "HF_HUB_OFFLINE=1"),
        ({"/resolve/": (429, "")}, "hub_unreachable", "status 429", "later"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("hasty")
def test_refusals_are_told_apart(
    hub: Hub,
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: dict[str, tuple[int, str]],
    kind: str,
    said: str,
    hint: str,
) -> None:
    """Each answer of the hub becomes one sentence, a hint and a kind; the token is in none."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.publish(small)
    hub.failing = failing
    error = refused()
    assert (error.kind, error.exit_code) == (kind, 3)
    assert said in error.message
    assert hint in str(error.hint)


def test_a_revision_that_is_not_there_is_named(hub: Hub, small: Path) -> None:
    """A wrong revision is told from a wrong repository."""
    hub.publish(small)
    error = refused(HubName(REPO, "no/such"))
    assert (error.kind, error.message) == ("hub_no_revision", "org/small has no revision 'no/such'")


def test_a_repository_that_is_not_there_is_named(hub: Hub, small: Path) -> None:
    """A wrong repository is named, with the host that was asked."""
    hub.publish(small)
    error = refused(HubName("org/other", "v1"))
    host = hub.url.removeprefix("http://")
    assert error.message == f"{host} has no repository org/other, or it is private"


def test_the_cache_is_not_used_silently(
    hub: Hub, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub that cannot be reached is an error even for what the cache holds; the hint says how."""
    hub.publish(small)
    fetch(NAME)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    use(f"http://someone:secret@{address}", monkeypatch)
    error = refused()
    assert (error.kind, address in error.message) == ("hub_unreachable", True)
    assert "HF_HUB_OFFLINE=1" in str(error.hint)
    assert "secret" not in error.message


def test_a_hub_that_does_not_answer_is_given_up(
    hub: Hub, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that accepts and stays silent is an error after the library's time limit."""
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        use(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch)
        error = refused()
    assert (error.kind, "no answer in time" in error.message) == ("hub_unreachable", True)


@pytest.mark.parametrize(
    ("page", "at"),
    [
        (b"<html>log in</html>", "/api/"),
        (b"[]", "/api/"),
        (b"{}", "/api/"),
        (b'{"id": "org/small", "sha": "../../x"}', "/api/"),
        (b'{"id": "org/small", "sha": null}', "/api/"),
        (b"<html>log in</html>", "/tree/"),
        (b'{"x": 1}', "/tree/"),
        (b'[{"type": "file", "path": "config.json", "size": null, "oid": "x"}]', "/tree/"),
        (b'[{"type": "file", "path": "config.json", "size": -1, "oid": "x"}]', "/tree/"),
        (b"<html>log in</html>", "/resolve/"),
    ],
)
def test_what_is_no_hub_is_told(hub: Hub, small: Path, page: bytes, at: str) -> None:
    """An answer that the hub would not give, such as a login page's, leads to HF_ENDPOINT."""
    hub.publish(small)
    hub.pages = {at: page}
    error = refused()
    assert error.kind == "hub_unreachable"
    assert "does not answer as a hub does" in error.message
    assert "HF_ENDPOINT" in str(error.hint)


@pytest.mark.parametrize("endpoint", ["huggingface.co", "http://[::", "http://127.0.0.1:port"])
@pytest.mark.usefixtures("home")
def test_an_endpoint_that_is_no_address_is_told(
    monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    """A mistake in HF_ENDPOINT is a mistake in the request."""
    use(endpoint, monkeypatch)
    with pytest.raises(BadRequest, match="HF_ENDPOINT"):
        fetch(NAME)


def test_a_full_disk_is_told_before_anything_is_fetched(
    hub: Hub, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Space is compared with the sizes listed, less what the cache holds."""
    hub.publish(small)
    usage = type("Usage", (), {"free": 100})
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: usage)
        with pytest.raises(NoSpace, match=r"org/small needs 0\.1 MB") as caught:
            fetch(NAME)
    assert (caught.value.exit_code, hub.got) == (4, [])
    assert "HF_HOME" in str(caught.value.hint)
    fetch(NAME)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    fetch(NAME)


@pytest.mark.parametrize("number", ["ENOSPC", "EACCES"])
def test_a_cache_that_cannot_be_written_is_told(
    hub: Hub, small: Path, monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    """A disk that fills up meanwhile, and a cache without permission, are told by name."""
    import errno

    def fail(*_: object, **__: object) -> None:
        raise OSError(getattr(errno, number), "no way", "/some/cache")

    hub.publish(small)
    monkeypatch.setattr("huggingface_hub.file_download._chmod_and_move", fail)
    with pytest.raises(QuantmillError) as caught:
        fetch(NAME)
    full = number == "ENOSPC"
    assert caught.value.kind == ("no_space" if full else "hub_cache")
    assert ("no space left" if full else "/some/cache: no way") in caught.value.message


@pytest.mark.usefixtures("hub")
def test_without_the_library_the_way_to_install_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named when huggingface_hub is not installed."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BadRequest, match="needs huggingface_hub") as caught:
        fetch(NAME)
    assert (caught.value.kind, caught.value.hint) == (
        "missing_extra", "pip install 'quantmill[hub]'",
    )  # fmt: skip


def test_a_storage_that_fails_is_told(hub: Hub, small: Path) -> None:
    """Errors of hf_xet, which quote addresses, are told without them."""
    pytest.importorskip("hf_xet")
    hub.publish(small)
    hub.xet = True
    error = refused()
    assert (error.kind, "storage" in error.message) == ("hub_unreachable", True)
    assert any("/reconstructions/" in r.path for r in hub.requests)


# -- interruptions ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("hasty")
def test_a_download_that_breaks_off_is_noticed_and_completed(
    hub: Hub, home: Path, small: Path
) -> None:
    """After all attempts it is an error; the next run fetches only what is missing."""
    hub.publish(small)
    hub.cuts = {"model.safetensors": [50, *[0] * 20]}
    error = refused()
    assert (error.kind, "again" in str(error.hint)) == ("hub_unreachable", True)
    assert not list(home.rglob("*.incomplete"))
    hub.cuts.clear()
    hub.requests.clear()
    assert content(fetch(NAME)) == content(small)
    assert hub.got == ["model.safetensors"]


@pytest.mark.parametrize("more", [-1, 1])
def test_a_size_that_is_not_the_listed_one_is_an_error(hub: Hub, small: Path, more: int) -> None:
    """The list is what every file is compared with in the end."""
    hub.publish(small)
    hub.listed = {"model.safetensors": (small / "model.safetensors").stat().st_size + more}
    error = refused()
    assert error.kind == "hub_incomplete"
    assert "model.safetensors does not have the" in error.message
    hub.listed.clear()
    assert content(fetch(NAME)) == content(small)


def test_a_damaged_file_in_the_cache_is_fetched_again(hub: Hub, small: Path) -> None:
    """A file of another size than the listed one, which the library would keep, is replaced."""
    hub.publish(small)
    (fetch(NAME) / "model.safetensors").resolve().write_bytes(b"short")
    hub.requests.clear()
    assert content(fetch(NAME)) == content(small)
    assert hub.got == ["model.safetensors"]


def test_an_interrupt_ends_the_downloads(hub: Hub, home: Path, small: Path) -> None:
    """Ctrl-C does not wait until files are complete, and leaves no half ones."""
    big = bytes(60 * 2**20)
    hub.publish(content(small) | {"model.safetensors": big})
    hub.pause = 0.03
    main = threading.main_thread().ident or 0
    once = threading.Lock()

    def interrupt(done: int, *_: object) -> None:
        if done > 2**20 and once.acquire(blocking=False):
            signal.pthread_kill(main, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fetch(NAME, interrupt)
    sizes = [p.stat().st_size for p in home.rglob("*") if p.is_file()]
    assert max(sizes, default=0) < len(big) // 2
    hub.pause = 0
    assert (fetch(NAME) / "model.safetensors").stat().st_size == len(big)


# -- progress --------------------------------------------------------------------------------------


def test_progress_counts_bytes_up_to_the_whole(
    hub: Hub, small: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Bytes never go back and end at the total, whatever had to be asked for twice."""
    size = 25 * 2**20
    hub.publish(content(small) | {"model.safetensors": bytes(size)})
    hub.cuts = {"model.safetensors": [12 * 2**20]}
    told: list[tuple[int, int, str]] = []
    fetch(NAME, lambda *event: told.append(event))
    done = [event[0] for event in told]
    total = size + sum(len(d) for n, d in content(small).items() if n != "model.safetensors")
    assert done == sorted(done)
    assert {event[1] for event in told} == {total}
    assert told[-1] == (total, total, "4/4 files")
    assert len(set(done)) > 3
    told.clear()
    fetch(NAME, lambda *event: told.append(event))
    assert not told
    assert capfd.readouterr() == ("", "")


# -- a process of its own --------------------------------------------------------------------------


def test_the_library_is_loaded_when_it_is_needed() -> None:
    """Names are understood without huggingface_hub; only fetching loads it."""
    program = (
        "import sys; from quantmill.hub import *; assert parse_hub_name('org/small');"
        "assert 'huggingface_hub' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_settings_of_the_environment_are_used(hub: Hub, home: Path, small: Path) -> None:
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE act, and nothing else is printed."""
    hub.token = TOKEN
    hub.publish(small)
    hub.cuts = {"model.safetensors": [50]}  # which the library would warn of
    program = "from quantmill.hub import *; print(fetch(parse_hub_name('org/small')))"
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN}

    def run(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **settings, **more}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    first = run()
    assert (first.returncode, first.stderr) == (0, "")
    folder = Path(first.stdout.removesuffix("\n"))
    assert folder.is_relative_to(home / "hub")
    assert content(folder) == content(small)
    hub.requests.clear()
    again = run(HF_HUB_OFFLINE="1")
    assert (again.stdout, again.stderr, hub.requests) == (first.stdout, "", [])
    lost = run(HF_HUB_OFFLINE="1", HF_HOME=str(home / "other"))
    assert "the cache does not hold org/small" in lost.stderr
    assert TOKEN not in lost.stderr


# -- create ----------------------------------------------------------------------------------------


def test_a_model_is_created_from_its_name(hub: Hub, small: Path, tmp_path: Path) -> None:
    """A repository's name gives the model that its directory gives, digest for digest."""
    hub.publish(small, "v1")
    told: list[tuple[int, int, str]] = []
    store = Store(tmp_path / "store")
    named = create(
        "m",
        "org/small@v1",
        store=store,
        quantize="int4",
        fetching=lambda *event: told.append(event),
    )
    assert named.digest == create("n", small, store=store, quantize="int4").digest
    assert told[-1][0] == told[-1][1]
    assert plan("org/small@v1", quantize="int4").blobs == named.plan.blobs


def test_a_directory_comes_before_a_repository(
    hub: Hub, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that exists is never looked for on the hub, nor is a Path that does not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    shutil.copytree(small, tmp_path / "org" / "small")
    assert plan("org/small").tensors
    with pytest.raises(BadSource, match="does not exist"):
        plan(Path("org/other"))
    assert not hub.requests


def test_the_command_fetches_and_tells_what_is_missing(
    hub: Hub, home: Path, small: Path, tmp_path: Path
) -> None:
    """`create NAME org/repo` works from the shell; a name that is neither is told as both."""
    hub.publish(small)
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "NO_COLOR": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "quantmill", *arguments, "--store", str(tmp_path / "s")],
            env={**os.environ, **settings}, capture_output=True, text=True, check=False,
        )  # fmt: skip

    made = run("create", "m", "org/small", "-q", "int8", "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout)["format"] == "int8"
    lost = run("create", "m", "org/absent")
    assert lost.returncode == 3
    assert "no directory 'org/absent'" in lost.stderr
    assert "on the hub" in lost.stderr
