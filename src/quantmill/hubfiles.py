"""Which files of a repository on the hub make up a checkpoint. Pickles and code never do."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from quantmill import strictjson
from quantmill.errors import BadSource
from quantmill.source import CONFIG, INDEX, MAX_TEXT, MODEL_INDEX

Read = Callable[[str], bytes]
"""Gives the content of one file of the repository."""

_WEIGHTS = ".safetensors"
_INDEXES = (INDEX, "diffusion_pytorch_model.safetensors.index.json")
_STEMS = ("model", "diffusion_pytorch_model")
# without the infix of a variant (fp16, non_ema), which holds the same weights once more
_PLAIN = re.compile(rf"({'|'.join(_STEMS)})(-\d+-of-\d+)?\.safetensors")
_SIDE_SUFFIXES = (".json", ".jinja", ".tiktoken", ".model", ".spm")
_SIDE_NAMES = frozenset({"vocab.txt", "merges.txt"})
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_GGUF = ".gguf"


def choose_files(name: str, sizes: Mapping[str, int], read: Read) -> dict[str, int]:
    """The files that make up the checkpoint, with their sizes.

    `sizes` lists the repository; `read` is asked only for the indexes that name weights. Raises
    BadSource, saying what there is instead, where a checkpoint of safetensors is not.
    """
    pipeline = MODEL_INDEX in sizes
    _refuse_other_weights(name, sizes, pipeline)
    if not pipeline and CONFIG not in sizes:
        raise BadSource(
            f"{name} has no {CONFIG}",
            kind="missing_config",
            hint="an adapter or a part of a model cannot be imported by itself",
        )
    components = _components(name, sizes, read) if pipeline else set()
    found = [n for folder in components or {""} for n in _weights_in(name, folder, sizes, read)]
    found += [n for n in sizes if _parent(n) in {"", *components} and _is_side_file(_base(n))]
    if "modules.json" in sizes:  # sentence-transformers: a folder for each module's config
        found += [n for n in sizes if n.count("/") == 1 and _base(n) == CONFIG]
    return {n: sizes[n] for n in sorted(set(found))}


def is_plain_path(path: str) -> bool:
    """Whether a listed path stays below the directory that it is put in."""
    return path.isprintable() and "\\" not in path and not {"", ".", ".."} & set(path.split("/"))


def _components(name: str, sizes: Mapping[str, int], read: Read) -> set[str]:
    """Folders that the index of a diffusers pipeline names."""
    stated = _document(name, MODEL_INDEX, sizes, read).items()
    named = {key for key, value in stated if isinstance(value, list) and None not in value}
    found = named & {_parent(n) for n in sizes}
    for folder in sorted(found):
        inside = [n for n in sizes if _parent(n) == folder]
        if not any(n.endswith(_WEIGHTS) for n in inside):  # a scheduler or tokenizer has no weights
            _refuse_pickles(name, inside)
    return found


def _weights_in(name: str, folder: str, sizes: Mapping[str, int], read: Read) -> list[str]:
    """The weight files of one folder: those its index names, else those with the usual names."""
    found = [n for n in sizes if _parent(n) == folder and n.endswith(_WEIGHTS)]
    start = f"{folder}/" if folder else ""
    index = next((start + n for n in _INDEXES if start + n in sizes), None)
    stated = _document(name, index, sizes, read).get("weight_map") if index else None
    if isinstance(stated, dict) and stated:
        shards = sorted({f"{start}{shard}" for shard in stated.values()})
        missing = [shard for shard in shards if shard not in found]
        if missing:
            raise BadSource(
                f"{index} of {name} names files that are not there: {_some(missing)}",
                kind="missing_shard",
            )
        return shards
    plain = [n for n in found if _PLAIN.fullmatch(_base(n))]
    return plain or [n for n in found if _base(n).startswith(_STEMS)] or found


def _document(name: str, file: str, sizes: Mapping[str, int], read: Read) -> dict[str, Any]:
    if sizes[file] > MAX_TEXT:
        raise BadSource(f"{file} of {name} has {sizes[file]} bytes", kind="bad_index")
    try:
        return strictjson.parse_object(read(file), constants=True)
    except strictjson.BadJson as error:
        raise BadSource(f"{file} of {name}: {error}", kind="bad_index") from None


def _refuse_other_weights(name: str, sizes: Mapping[str, int], pipeline: bool) -> None:
    """Raise BadSource where no weights are safetensors in the place that is looked at."""
    weights = [n for n in sizes if n.endswith(_WEIGHTS)]
    if any(n.count("/") == (1 if pipeline else 0) for n in weights):
        return
    ggufs = [n for n in sizes if n.endswith(_GGUF)]
    if ggufs:
        raise BadSource(
            f"{name} has no safetensors but GGUF files: {_some(ggufs)}",
            kind="no_weights",
            hint=f"`hf download {name.partition('@')[0]} FILE` prints a path to give",
        )
    _refuse_pickles(name, sizes)
    others = f", only in other folders: {_some(weights)}" if weights else ""
    raise BadSource(f"{name} has no model weights as safetensors{others}", kind="no_weights")


def _refuse_pickles(name: str, files: list[str] | Mapping[str, int]) -> None:
    pickles = [n for n in files if n.endswith(_PICKLES)]
    if pickles:
        raise BadSource(
            f"{name} has weights as pickles and not as safetensors: {_some(pickles)}; "
            "reading a pickle may execute code",
            kind="no_weights",
            hint="look for a revision or another repository with safetensors",
        )


def _is_side_file(base: str) -> bool:
    return base.endswith(_SIDE_SUFFIXES) or base in _SIDE_NAMES


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def _some(names: list[str]) -> str:
    first = ", ".join(sorted(names)[:3])
    return f"{first} and {len(names) - 3} more" if len(names) > 3 else first
