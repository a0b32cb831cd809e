"""Fetch a checkpoint from the Hugging Face Hub.

huggingface_hub makes the requests and keeps the files, with its own settings: cache, token,
endpoint, offline mode. What is fetched is decided here, from the repository's list of files
(hubfiles.py): weights as safetensors, configs and tokenizers, nothing that could be executed.
"""

from __future__ import annotations

import errno
import glob
import json
import logging
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from quantmill.errors import BadRequest, BadSource, NoSpace, QuantmillError
from quantmill.hubfiles import choose_files, is_plain_path
from quantmill.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ResolvedRevision

Report = Callable[[int, int, str], None]
"""Told of progress: bytes done, bytes in all, a label. Called from any thread, one at a time."""

_PART = "[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPO = re.compile(f"{_PART}/{_PART}")
_REVISION = re.compile("[A-Za-z0-9_][A-Za-z0-9_.+-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*")
_COMMIT = re.compile("[0-9a-f]{40}")
_HUBS = ("https://huggingface.co", "https://hf.co")


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository on the hub; without a revision its default branch is meant."""

    repo: str
    revision: str | None

    def __str__(self) -> str:
        """The text that means this name."""
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


def parse_hub_name(text: str) -> HubName | None:
    """The repository that `org/repo` or `org/repo@revision` means; None for any other text.

    The hub's address may stand in front: hf.co, huggingface.co or HF_ENDPOINT.
    """
    own = os.environ.get("HF_ENDPOINT", "").rstrip("/")
    hubs = (*_HUBS, own) if own else _HUBS
    starts = [f"{start}/" for hub in hubs for start in (hub, hub.rpartition("://")[2])]
    start = next((s for s in starts if text.startswith(s)), "")
    repo, at, revision = text.removeprefix(start).partition("@")
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo or repo.endswith(".git"):
        return None
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        return None
    return HubName(repo, revision or None)


def fetch(name: HubName, progress: Report | None = None) -> Path:
    """The directory in the hub's cache that holds the checkpoint, every file of it complete.

    Files that the cache holds are not fetched again. In offline mode (HF_HUB_OFFLINE) nothing is
    asked for and the cache must hold them all. Raises BadRequest when huggingface_hub is not
    installed, BadSource when the repository or revision is not to be had, has no safetensors or
    cannot be reached, NoSpace when the cache's disk is too small.
    """
    require_hub()
    if parse_hub_name(str(name)) != name:
        raise BadRequest(
            f"{str(name)!r} does not name a repository on the hub",
            kind="bad_hub_name",
            hint="names look like org/repo or org/repo@revision",
        )
    from huggingface_hub import is_offline_mode

    with _quiet():
        try:
            return _from_cache(name) if is_offline_mode() else _from_hub(name, progress)
        except QuantmillError:
            raise
        except Exception as error:
            told = _told(error, name)
            if told is None:
                raise
            # the library's errors may quote headers and signed addresses: none of it is shown
            raise told from None


def require_hub() -> None:
    """Raise BadRequest with the way to install it when huggingface_hub is missing or too old."""
    try:
        from huggingface_hub import get_cached_repo_tree, resolve_revision  # noqa: F401
    except ImportError:
        raise BadRequest(
            "fetching from the hub needs huggingface_hub, 2.4 or newer",
            kind="missing_extra",
            hint="pip install 'quantmill[hub]'",
        ) from None


# -- where from ------------------------------------------------------------------------------------


def _from_hub(name: HubName, progress: Report | None) -> Path:
    from huggingface_hub import HfApi, constants, hf_hub_download

    api = HfApi(constants.ENDPOINT, library_name="quantmill", library_version=__version__)
    revision, sizes = _listing(api, name)

    def read(document: str) -> bytes:
        path = hf_hub_download(
            name.repo, document, revision=revision, endpoint=api.endpoint,
            library_name=api.library_name, library_version=api.library_version,
        )  # fmt: skip
        return Path(path).read_bytes()

    return _download(api, name, revision, choose_files(str(name), sizes, read), progress)


def _listing(api: HfApi, name: HubName) -> tuple[ResolvedRevision, dict[str, int]]:
    """The commit that the revision means, and the size of every file in it."""
    from huggingface_hub import ResolvedRevision, constants
    from huggingface_hub.hf_api import RepoFile

    try:
        # first, for its time limit, and because it is never answered from the cache
        limit = constants.HF_HUB_ETAG_TIMEOUT
        info = api.model_info(name.repo, revision=name.revision, timeout=limit)
        commit = str(info.sha)
        if not _COMMIT.fullmatch(commit):
            raise _no_hub()
        # makes the cache remember what the revision means, for offline mode
        api.resolve_revision(name.repo, revision=name.revision)
        tree = api.list_repo_tree(name.repo, recursive=True, revision=commit)
        sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    except (json.JSONDecodeError, KeyError, TypeError, AssertionError):
        raise _no_hub() from None
    if not all(type(size) is int and size >= 0 for size in sizes.values()):
        raise _no_hub()
    revision = ResolvedRevision(commit, name.revision, name.repo)
    return revision, {path: size for path, size in sizes.items() if is_plain_path(path)}


def _from_cache(name: HubName) -> Path:
    """The snapshot that the cache holds; nothing is asked for."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            name.repo, revision=name.revision, local_files_only=True, allow_patterns=[]
        )
    except LocalEntryNotFoundError:
        raise BadSource(
            f"the cache does not hold {name}, and HF_HUB_OFFLINE forbids fetching it",
            kind="hub_not_cached",
            hint="unset HF_HUB_OFFLINE to fetch it",
        ) from None
    folder = Path(found)
    try:
        tree = get_cached_repo_tree(name.repo, revision=name.revision)
        sizes = {e.path: e.size for e in tree if is_plain_path(e.path)}
    except CachedRepoTreeNotFoundError:  # another program filled the cache: what is there counts
        files = (path for path in folder.rglob("*") if path.is_file())
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}

    def read(document: str) -> bytes:
        if _wrong(folder, {document: sizes[document]}):
            raise _not_all_cached(name, document)
        return (folder / document).read_bytes()

    wrong = _wrong(folder, choose_files(str(name), sizes, read))
    if wrong:
        raise _not_all_cached(name, wrong[0])
    return folder


def _not_all_cached(name: HubName, file: str) -> BadSource:
    return BadSource(
        f"the cache holds only a part of {name}: {file} is missing or incomplete",
        kind="hub_not_cached",
        hint="unset HF_HUB_OFFLINE to fetch the rest",
    )


# -- transfer --------------------------------------------------------------------------------------


def _download(
    api: HfApi,
    name: HubName,
    revision: ResolvedRevision,
    chosen: Mapping[str, int],
    progress: Report | None,
) -> Path:
    from huggingface_hub import try_to_load_from_cache

    def is_held(file: str) -> bool:
        path = try_to_load_from_cache(name.repo, file, revision=revision.resolved)
        return isinstance(path, str) and Path(path).stat().st_size == chosen[file]

    needed = sum(size for file, size in chosen.items() if not is_held(file))
    _require_space(name, needed)
    watch = _Watch(progress, needed, len(chosen))
    folder = _snapshot(api, name, revision, chosen, watch)
    wrong = _wrong(folder, chosen)
    if wrong:  # the library takes a damaged file in its cache for a whole one, unless told
        _snapshot(api, name, revision, wrong, watch, force=True)
        wrong = _wrong(folder, chosen)
    if wrong:
        raise _incomplete(name, f"{wrong[0]} does not have the {chosen[wrong[0]]} bytes listed")
    watch.finish()
    return folder


def _snapshot(
    api: HfApi,
    name: HubName,
    revision: ResolvedRevision,
    files: Collection[str],
    watch: _Watch,
    *,
    force: bool = False,
) -> Path:
    from huggingface_hub import snapshot_download

    # a thread of its own: the library, interrupted, first waits until all running downloads end
    with ThreadPoolExecutor(1, "quantmill-hub") as beside:
        path = beside.submit(
            snapshot_download,
            name.repo,
            revision=revision,
            allow_patterns=[glob.escape(file) for file in files],
            force_download=force,
            endpoint=api.endpoint,
            library_name=api.library_name,
            library_version=api.library_version,
            tqdm_class=_bar_class(watch),
        )
        try:
            return Path(path.result())
        except BaseException:
            watch.stop()
            raise


def _wrong(folder: Path, sizes: Mapping[str, int]) -> list[str]:
    """Files that are not there or do not have their size."""
    return [
        file
        for file, size in sizes.items()
        if not (folder / file).is_file() or (folder / file).stat().st_size != size
    ]


def _require_space(name: HubName, needed: int) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise _no_space(
            f"{name} needs {needed / 1e6:.1f} MB in {cache}, where {free / 1e6:.1f} MB are free"
        )


class _Stopped(Exception):
    """The downloads were called off; never seen outside this module's threads."""


class _Watch:
    """What the library's progress bars count: told to `progress`, and the way to end it all."""

    def __init__(self, progress: Report | None, total: int, files: int) -> None:
        self._progress = progress
        self._total = total
        self._files = files
        self._lock = threading.Lock()
        self._stopped = False
        self._done = 0
        self._finished = 0

    def stop(self) -> None:
        """Let every running download fail when its next bytes arrive."""
        self._stopped = True
        _abort_xet()

    def count(self, done: int, more: int, *, in_bytes: bool) -> int:
        """What a bar shows after `more`; raises _Stopped after `stop`."""
        if self._stopped:
            raise _Stopped
        with self._lock:
            if in_bytes:  # two bars count bytes: received, and written
                self._done = min(max(self._done, done + more), self._total)
            else:
                self._finished += more
            self._tell()
        return done + more

    def finish(self) -> None:
        """All files are there, whatever was counted: some may have been held under other names."""
        self._done, self._finished = self._total, self._files
        self._tell()

    def _tell(self) -> None:
        if self._progress and self._total:
            label = f"{min(self._finished, self._files)}/{self._files} files"
            self._progress(self._done, self._total, label)


def _bar_class(watch: _Watch) -> type:
    """A class for the library's progress bars that draws nothing and reports to `watch`."""
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):
        n: int
        monitor_interval = 0  # no thread that watches over redrawing

        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **{**settings, "disable": True})  # type: ignore[no-untyped-call]
            self.in_bytes = settings.get("unit") == "B"

        def update(self, n: float | None = 1) -> None:
            self.n = watch.count(self.n, int(n or 0), in_bytes=self.in_bytes)

    return Silent


def _abort_xet() -> None:
    """End transfers of hf_xet, which its progress bars cannot end; the library shows no door."""
    try:
        from huggingface_hub.utils._xet import abort_xet_session
    except ImportError:
        return
    abort_xet_session()  # type: ignore[no-untyped-call]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's warnings from stderr, unless its own settings ask for more than those."""
    log = logging.getLogger("huggingface_hub")
    before = log.level
    if before >= logging.WARNING:
        log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


# -- errors ----------------------------------------------------------------------------------------


def _told(error: BaseException, name: HubName) -> QuantmillError | None:
    """An error of the library in our words; None for one that is not about the request."""
    import httpx2
    from huggingface_hub import errors

    wrapped = (errors.LocalEntryNotFoundError, errors.RevisionResolutionError)
    while isinstance(error, wrapped) and error.__cause__:
        error = error.__cause__
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(error, name)
    if isinstance(error, UnicodeEncodeError | httpx2.LocalProtocolError):
        return BadRequest(
            "the hub's token or address has characters that no request can carry",
            hint="check HF_TOKEN and HF_ENDPOINT",
        )
    if isinstance(error, httpx2.InvalidURL | httpx2.UnsupportedProtocol):
        return BadRequest("HF_ENDPOINT is no http or https address", hint="check HF_ENDPOINT")
    if isinstance(error, httpx2.HTTPError):
        return _unreachable(f"cannot get {name} from {_host()}: {_reason(error)}")
    if isinstance(error, errors.FileMetadataError):
        return _no_hub()
    if isinstance(error, OSError):
        return _not_written(error, name)
    if type(error) is RuntimeError:  # what hf_xet raises, in words of its own
        return _unreachable(f"cannot get {name}: the hub's storage does not deliver it")
    return None


def _refused(error: Any, name: HubName) -> BadSource:
    """What the hub's answer means, which is an error by its status."""
    from huggingface_hub import errors

    status = error.response.status_code
    log_in = "`hf auth login` or HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return BadSource(
            f"{name} is gated: its owner gives access on request",
            kind="hub_gated",
            hint=f"ask for access at {_host()}/{name.repo}, then identify with {log_in}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return BadSource(
            f"{name.repo} has no revision {name.revision or 'main'!r}",
            kind="hub_no_revision",
            hint="a revision is a branch, a tag or a commit",
        )
    not_listed = status == 404 and "/api/models/" in error.response.url.path
    if isinstance(error, errors.RepositoryNotFoundError) or not_listed:
        return BadSource(
            f"{_host()} has no repository {name.repo}, or it is private",
            kind="hub_not_found",
            hint=f"check the name; a private one needs {log_in}, a directory may start with ./",
        )
    if status == 401:
        return BadSource(
            f"{_host()} does not accept the token", kind="hub_refused", hint=f"renew it: {log_in}"
        )
    if status < 500 and status != 429:
        return BadSource(
            f"{_host()} refuses {name} (status {status})",
            kind="hub_refused",
            hint="the token may lack a permission, or something was removed or disabled",
        )
    return _unreachable(f"cannot get {name} from {_host()}: it answers with status {status}")


def _reason(error: Exception) -> str:
    import httpx2

    if isinstance(error, httpx2.TimeoutException):
        return "no answer in time"
    if isinstance(error, httpx2.NetworkError | httpx2.RemoteProtocolError):
        return str(error).partition("\n")[0] or "the connection broke"
    return type(error).__name__  # others may quote addresses


def _not_written(error: OSError, name: HubName) -> QuantmillError:
    from huggingface_hub import constants

    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return _no_space(f"{constants.HF_HUB_CACHE} has no space left for {name}")
    if error.errno is None:  # the library found a length that is not the one announced
        return _incomplete(name, "a file ended early")
    return BadSource(
        f"{error.filename or constants.HF_HUB_CACHE}: {error.strerror}",
        kind="hub_cache",
        hint="HF_HOME or HF_HUB_CACHE sets another place for the hub's cache",
    )


def _incomplete(name: HubName, what: str) -> BadSource:
    return BadSource(
        f"the download of {name} is incomplete: {what}",
        kind="hub_incomplete",
        hint="run the command again; files that are complete are not fetched twice",
    )


def _unreachable(message: str) -> BadSource:
    return BadSource(
        message,
        kind="hub_unreachable",
        hint="run the command again later; with HF_HUB_OFFLINE=1 the cache is used as it is",
    )


def _no_hub() -> BadSource:
    return BadSource(
        f"{_host()} does not answer as a hub does",
        kind="hub_unreachable",
        hint="check HF_ENDPOINT, and whether a proxy or a login page answers instead",
    )


def _no_space(message: str) -> NoSpace:
    return NoSpace(message, hint="HF_HOME or HF_HUB_CACHE sets another place for the hub's cache")


def _host() -> str:
    """The hub's host and port; an address may hold a password, too."""
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2] or "the hub"
