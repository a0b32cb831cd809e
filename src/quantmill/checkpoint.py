"""Open a checkpoint directory: headers now, bytes later. Nothing in it is trusted or executed."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from quantmill import mediatypes, strictjson, tensorfile
from quantmill.errors import BadSource, BadTensorFile
from quantmill.openfile import OpenFile
from quantmill.source import (
    CONFIG,
    DECIDING_TENSORS,
    DECIDING_TEXTS,
    INDEX,
    MAX_TEXT,
    Source,
    SourceFile,
    SourceTensor,
)

SUFFIX = ".safetensors"

# Side files that a runtime reads and that are not JSON. Everything else is left out by name.
_RUNTIME_NAMES = frozenset(
    {"vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model",
     "source.spm", "target.spm", "tekken.model"}
)  # fmt: skip
_RUNTIME_SUFFIXES = (".jinja", ".tiktoken")


_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class Layout:
    """How the files of a directory are named.

    An index, called one of `indexes`, says which files hold the weights; without one `shards` does,
    given all names and sizes. `shards` None: there are no weights.
    """

    shards: Callable[[Mapping[str, int]], list[str]] | None
    indexes: tuple[str, ...] = (INDEX,)
    needs_config: bool = True


class Checkpoint:
    """An open checkpoint. Use as a context manager; `read_into` may be called from any thread.

    `home` is the directory that links may not leave, where it is not `path` itself.
    """

    def __init__(
        self,
        path: Path,
        *,
        follow_links: bool = False,
        layout: Layout | None = None,
        home: Path | None = None,
    ) -> None:
        self.path = path
        self._follow_links = follow_links
        self._layout = layout or MODEL_LAYOUT
        self._home = home or path
        self._index = ""
        self._files: dict[str, OpenFile] = {}
        try:
            self.source = self._inventory()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; the source value stays usable."""
        while self._files:
            self._files.popitem()[1].close()

    def read_into(self, tensor: SourceTensor, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from `offset` on; raises BadSource if they end."""
        self._files[tensor.file].read_into(tensor.start + offset, buffer)

    def identity(self, tensor: SourceTensor) -> str:
        """What tells the tensor's file from any other, and from any later state of its own."""
        return self._files[tensor.file].identity

    def read_file(self, name: str) -> bytes:
        """The content of a side file; raises BadSource if it is larger than MAX_TEXT."""
        return _text_bytes(self._open(name))

    def check_unchanged(self) -> None:
        """Raise BadSource if a file was written to since it was opened."""
        for opened in self._files.values():
            opened.check_unchanged()

    # -- opening -----------------------------------------------------------------------------------

    def _open(self, name: str) -> OpenFile:
        if name not in self._files:
            refuse_link_outside(self._home, self.path / name, name, self._follow_links)
            self._files[name] = _open_file(self.path, name)
        return self._files[name]

    def _json(self, name: str, kind: str) -> dict[str, Any]:
        try:
            return strictjson.parse_object(self.read_file(name), constants=True)
        except strictjson.BadJson as error:
            raise BadSource(f"{name}: {error}", kind=kind) from None

    # -- inventory (docs/sources.md) ---------------------------------------------------------------

    def _inventory(self) -> Source:
        names = list_folder(self.path)
        if CONFIG not in names and self._layout.needs_config:
            raise BadSource(
                f"{self.path}: no {CONFIG}",
                kind="missing_config",
                hint="give the directory that holds config.json and the .safetensors files",
            )
        config = self._json(CONFIG, "invalid_config") if CONFIG in names else {}
        weight_map = self._weight_map(names)
        choose = self._layout.shards
        unindexed = choose(names) if choose and not weight_map else []
        shards = sorted(set(weight_map.values())) or unindexed
        tensors, ignored = self._tensors(shards, weight_map)
        if not tensors and choose:
            raise BadSource(
                f"{self.path}: no model weights in {', '.join(shards)}", kind="no_weights"
            )
        texts = {n: self._text(n) for n in DECIDING_TEXTS if n in names}
        files = tuple(self._side_files(names, set(shards)))
        values = {n: v for n, t in tensors.items() if (v := self._values(t)) is not None}
        return Source(config, tensors, files, ignored, texts, values)

    def _values(self, tensor: SourceTensor) -> tuple[int, ...] | None:
        """The integers of a small tensor that describes others; None for any other tensor."""
        kind = {"I64": "q", "I32": "i"}.get(tensor.dtype)
        if not tensor.name.endswith(DECIDING_TENSORS) or kind is None or tensor.elements > 8:
            return None
        raw = self._files[tensor.file].read(tensor.start, tensor.nbytes)
        return struct.unpack(f"<{tensor.elements}{kind}", raw)

    def _text(self, name: str) -> str:
        try:
            return self.read_file(name).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadSource(f"{name}: invalid UTF-8 at byte {error.start}") from None

    def _weight_map(self, names: Mapping[str, int]) -> dict[str, str]:
        """Tensor → shard as the index says, {} without one."""
        there = [name for name in self._layout.indexes if name in names]
        if len(there) > 1:
            raise BadSource(
                f"{' and '.join(there)} both claim to name the weights",
                kind="ambiguous_source",
                hint="remove the one that does not belong to the model",
            )
        if not there:
            return {}
        self._index = index = there[0]
        found = self._json(index, "bad_index").get("weight_map")
        if found is None:
            return {}
        if not isinstance(found, dict):
            raise BadSource(f"{index}: weight_map is not an object", kind="bad_index")
        for tensor, shard in found.items():
            if not isinstance(shard, str):
                raise BadSource(f"{index}: {tensor!r} has no file name", kind="bad_index")
            if not _is_file_name(shard) or not shard.endswith(SUFFIX):
                raise BadSource(
                    f"{index}: invalid shard path {shard!r} for {tensor!r}",
                    kind="invalid_shard_path",
                    hint="shards must lie beside the index",
                )
        return found

    def _tensors(
        self, shards: list[str], weight_map: Mapping[str, str]
    ) -> tuple[dict[str, SourceTensor], tuple[SourceTensor, ...]]:
        found: dict[str, SourceTensor] = {}
        ignored: list[SourceTensor] = []
        for shard in shards:
            for tensor in self._shard_tensors(shard):
                _place(tensor, found, ignored, weight_map, self._index)
        for name, shard in weight_map.items():
            if name not in found:
                raise BadSource(
                    f"{self._index} names tensor {name!r} in {shard}, which does not hold it",
                    kind="missing_tensor",
                    hint="the download is incomplete or files of two versions are mixed",
                )
        return {name: found[name] for name in sorted(found)}, tuple(ignored)

    def _shard_tensors(self, shard: str) -> Iterator[SourceTensor]:
        opened = self._open(shard)
        prefix = opened.read(0, min(opened.size, tensorfile.LENGTH_BYTES))
        try:
            length = tensorfile.header_length(prefix, opened.size, shard)
            header = opened.read(tensorfile.LENGTH_BYTES, length)
            parsed = tensorfile.parse_header(header, opened.size, shard)
        except BadTensorFile as error:
            raise BadTensorFile(error.message, kind="unreadable_shard", hint=error.hint) from None
        for entry in parsed.entries.values():
            yield SourceTensor(entry.name, entry.dtype, entry.shape, shard, entry.start)

    def _side_files(self, names: Mapping[str, int], shards: set[str]) -> Iterator[SourceFile]:
        for name, size in sorted({**names, **_module_configs(self.path, names)}.items()):
            if name in shards or name in self._layout.indexes:
                continue
            media_type, reason = _role(name)
            yield SourceFile(name, size, media_type, reason)


def open_checkpoint(
    path: str | Path, *, follow_links: bool = False, loose: bool = False
) -> Checkpoint:
    """Open a checkpoint directory and read its headers.

    A directory is accepted when it has a config.json and weights as `model*.safetensors`, named by
    model.safetensors.index.json where there is one. Links that lead out of the directory are
    refused, except into the cache that a snapshot directory belongs to, unless `follow_links`.
    `loose` accepts every *.safetensors file and no config.json, as directories to load may be.
    Raises BadSource or BadTensorFile, naming the file or tensor.
    """
    folder = Path(path)
    if not os.path.isdir(folder):  # of any text at all, unlike Path.is_dir
        what = "is a file" if os.path.exists(folder) else "does not exist"
        raise BadSource(
            f"{folder} {what}",
            kind="not_a_model_dir",
            hint="give the directory that holds config.json and the .safetensors files",
        )
    layout = LOOSE_LAYOUT if loose else MODEL_LAYOUT
    return Checkpoint(folder, follow_links=follow_links, layout=layout)


def read_side_file(folder: Path, name: str) -> bytes:
    """The content of one file of a checkpoint, nothing else opened.

    Raises BadSource where the checkpoint's own `read_file` does.
    """
    refuse_link_outside(folder, folder / name, name, follow_links=False)
    opened = _open_file(folder, name)
    try:
        return _text_bytes(opened)
    finally:
        opened.close()


def is_model_dir(path: str | Path) -> bool:
    """Whether the directory has a config.json and at least one .safetensors file."""
    folder = Path(path)
    with os.scandir(folder) as entries:
        return (folder / CONFIG).is_file() and any(e.name.endswith(SUFFIX) for e in entries)


def list_folder(folder: Path) -> dict[str, int]:
    """Names and sizes in the folder itself; sub-folders left out."""
    found = {}
    for entry in os.scandir(folder):
        try:
            if not entry.is_dir():
                found[entry.name] = entry.stat().st_size
        except OSError:  # a dangling or circular link: opening it will say so
            found[entry.name] = 0
    return found


def _unindexed_shards(names: Mapping[str, int]) -> list[str]:
    shards = sorted(n for n in names if n.startswith("model") and n.endswith(SUFFIX))
    if "model.safetensors" in shards and len(shards) > 1:
        others = ", ".join(s for s in shards if s != "model.safetensors")
        raise BadSource(
            f"model.safetensors lies beside {others} and there is no {INDEX}",
            kind="ambiguous_source",
            hint="remove the files that do not belong to the model, or add the index",
        )
    if not shards:
        pickles = sorted(n for n in names if n.endswith(_PICKLES))
        if pickles and not any(n.endswith((SUFFIX, ".gguf")) for n in names):
            raise BadSource(
                f"the weights are pickles ({', '.join(pickles[:3])}), which are never opened: "
                "loading one can run any program",
                kind="pickled_weights",
                hint="look for safetensors of the same model, or convert the files if you trust them",
            )
        other = sorted(n for n in names if n.endswith((SUFFIX, *_PICKLES, ".gguf")))
        found = f"; found {', '.join(other)}" if other else ""
        raise BadSource(
            f"no model weights: looked for model*.safetensors{found}",
            kind="no_weights",
            hint="weights must be safetensors named model*.safetensors or listed in an index",
        )
    return shards


def _place(
    tensor: SourceTensor,
    found: dict[str, SourceTensor],
    ignored: list[SourceTensor],
    weight_map: Mapping[str, str],
    index: str,
) -> None:
    if tensor.name in found:
        raise BadSource(
            f"tensor {tensor.name!r} is in {found[tensor.name].file} and in {tensor.file}",
            kind="duplicate_tensor",
        )
    if not weight_map:
        found[tensor.name] = tensor
        return
    if tensor.name not in weight_map:
        ignored.append(tensor)
        return
    if weight_map[tensor.name] != tensor.file:
        raise BadSource(
            f"{index} places tensor {tensor.name!r} in {weight_map[tensor.name]}, "
            f"but it is in {tensor.file}",
            kind="misplaced_tensor",
        )
    found[tensor.name] = tensor


def _module_configs(folder: Path, names: Mapping[str, int]) -> dict[str, int]:
    """Configs of sentence-transformers modules (pooling and such), one folder down."""
    if "modules.json" not in names:
        return {}
    found = {}
    for entry in os.scandir(folder):
        path = folder / entry.name / CONFIG
        if entry.is_dir(follow_symlinks=False) and path.is_file():
            found[f"{entry.name}/{CONFIG}"] = path.stat().st_size
    return found


def _every_shard(names: Mapping[str, int]) -> list[str]:
    return sorted(name for name in names if name.endswith(SUFFIX))


MODEL_LAYOUT = Layout(_unindexed_shards)
"""One model: config.json, and `model*.safetensors` or what an index names."""

LOOSE_LAYOUT = Layout(_every_shard, needs_config=False)
"""A directory to load: every *.safetensors file, with or without config.json."""

SIDE_LAYOUT = Layout(None, (), needs_config=False)
"""Files beside weights, and no weights: a tokenizer, a scheduler."""


def _is_file_name(text: str) -> bool:
    return Path(text).name == text and "\0" not in text and strictjson.is_text(text)


def _role(name: str) -> tuple[str | None, str]:
    if not strictjson.is_text(name):
        return None, "its name is not UTF-8"
    if name.endswith(".json"):
        return mediatypes.JSON, "JSON side file"
    if name in _RUNTIME_NAMES or name.endswith(_RUNTIME_SUFFIXES):
        return mediatypes.FILE, "read by a runtime"
    if name.endswith(SUFFIX):
        return None, "weights that are not part of the model"
    return None, "not read by a runtime"


def refuse_link_outside(folder: Path, path: Path, name: str, follow_links: bool) -> None:
    """Raise BadSource where a file of a checkpoint is a link that leads out of it."""
    try:
        target = path.resolve(strict=True)
        home = folder.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a circular link, before Python 3.13
        raise _cannot_open(name, error) from None
    allowed = [home]
    if home.parent.name == "snapshots":  # a download cache keeps every file as a link to its blobs
        # its own repository's, or since huggingface_hub 2 those that all repositories share
        allowed += [(above / "blobs").resolve() for above in home.parents[1:3]]
    if follow_links or any(target.is_relative_to(root) for root in allowed):
        return
    raise BadSource(
        f"{name} is a link to {target}, outside the checkpoint",
        kind="link_outside",
        hint="use --follow-links if that is meant",
    )


def _open_file(folder: Path, name: str) -> OpenFile:
    try:
        opened = OpenFile(folder / name, name)
    except OSError as error:
        raise _cannot_open(name, error) from None
    if not opened.is_regular:
        opened.close()
        raise BadSource(f"{name} is not a regular file", kind="unreadable_shard")
    return opened


def _text_bytes(opened: OpenFile) -> bytes:
    if opened.size > MAX_TEXT:
        raise BadSource(f"{opened.name} has {opened.size} bytes; {MAX_TEXT} is the limit")
    return opened.read(0, opened.size)


def _cannot_open(name: str, error: Exception) -> BadSource:
    absent = isinstance(error, OSError) and error.errno == errno.ENOENT
    reason = getattr(error, "strerror", None) or "circular link"
    return BadSource(
        f"source model is incomplete: {name}: {reason}",
        kind="missing_shard" if absent else "unreadable_shard",
        hint="fetch the missing file again" if absent else None,
    )
