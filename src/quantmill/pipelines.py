"""Diffusers directories: what model_index.json lists, and which files of a folder are weights.

A pipeline is a directory whose model_index.json lists components: models in folders of their own,
and tokenizers and schedulers, which have no weights (docs/sources.md).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from quantmill import strictjson
from quantmill.errors import BadSource
from quantmill.formats import Format
from quantmill.source import CONFIG, INDEX, MODEL_INDEX

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
TRANSFORMERS_WEIGHTS = "model"

INDEXES = (f"{DIFFUSERS_WEIGHTS}.safetensors.index.json", INDEX)
"""Where a component's shards may be listed."""

_SUFFIX = ".safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SHARD = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.safetensors")
# Classes of model_index.json that never have weights, though some keep a config.json.
_WEIGHTLESS = ("Tokenizer", "Scheduler", "Processor", "Extractor")
_VISION_PIPELINES = frozenset({"Flux2KleinPipeline"})

# Spelling in a directory → spelling in a stored model_index.json.
_CLASS, _ARCHITECTURE = "_class_name", "architecture"
_VERSION = "_diffusers_version"
_FACTS = ("parameter_count", "quantization", "group_size")


def parse_index(data: bytes) -> dict[str, Any]:
    """The content of model_index.json; raises BadSource when it is no JSON object."""
    try:
        return strictjson.parse_object(data, constants=True)
    except strictjson.BadJson as error:
        raise BadSource(
            f"{MODEL_INDEX}: {error}", kind="bad_index", hint="fetch the file again"
        ) from None


def listed_folders(index: Mapping[str, Any]) -> dict[str, str]:
    """The folders that a model_index.json lists, in name order, with the class of each.

    Entries without a class are left empty on purpose and are not among them. Raises BadSource for
    a name that is no folder's.
    """
    found = {}
    for name, entry in sorted(index.items()):
        pair = isinstance(entry, list) and len(entry) == 2
        if name.startswith("_") or not pair or not isinstance(entry[1], str):
            continue
        if (
            name in {"", ".", ".."}
            or any(c in name for c in "/\\\0")
            or not strictjson.is_text(name)
        ):
            raise BadSource(
                f"{MODEL_INDEX}: {name!r} is not the name of a folder",
                kind="invalid_component",
                hint="components must lie in folders beside model_index.json",
            )
        found[name] = entry[1]
    return found


def has_weights(folder: str, kind: str, names: Iterable[str]) -> bool:
    """Whether a listed folder, of class `kind`, is a component with weights, by its file names.

    Raises BadSource for one that must have weights and has none that may be opened.
    """
    present = sorted(names)
    if any(name.endswith(_SUFFIX) for name in present):
        return True
    weightless = any(word in kind for word in _WEIGHTLESS)
    pickles = [name for name in present if name.endswith(_PICKLES)]
    if pickles and not weightless:
        raise BadSource(
            f"{folder}: the only weights are {', '.join(pickles)}; pickled files can run programs "
            "and are never opened",
            kind="pickled_weights",
            hint="fetch the .safetensors files of this component, or convert it",
        )
    if (CONFIG in present and not weightless) or any(name in present for name in INDEXES):
        raise BadSource(
            f"{folder}: no weights: looked for *.safetensors",
            kind="no_weights",
            hint="the download is incomplete: fetch the .safetensors files of this component",
        )
    return False


def choose_shards(names: Mapping[str, int]) -> list[str]:
    """The files of a component's weights, where no index names them.

    Variants (`model.fp16.safetensors`) are passed over where there is one without a suffix. Raises
    BadSource where several files could be meant, or a shard is missing.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in sorted(n for n in names if n.endswith(_SUFFIX)):
        shard = _SHARD.fullmatch(name)
        groups[shard[1] if shard else name.removesuffix(_SUFFIX)].append(name)
    plain = [stem for stem in groups if "." not in stem]
    candidates = plain or list(groups)
    if len(candidates) != 1:
        raise _ambiguous([name for stem in candidates for name in groups[stem]])
    files = groups[candidates[0]]
    _check_complete(files)
    return files


def _ambiguous(files: Sequence[str]) -> BadSource:
    return BadSource(
        f"several files could be the weights: {', '.join(files)}",
        kind="ambiguous_source",
        hint="keep one variant of the weights in the folder",
    )


def _check_complete(files: Sequence[str]) -> None:
    shards = [_SHARD.fullmatch(name) for name in files]
    if len(files) == 1 and shards[0] is None:
        return
    if not all(shards) or len({s[3] for s in shards if s}) != 1:
        raise _ambiguous(files)
    there = {int(s[2]) for s in shards if s}
    total = next(int(s[3]) for s in shards if s)
    # a name may claim any count, so nothing here may grow with it
    missing = next((n for n in range(1, len(there) + 1) if n not in there), len(there) + 1)
    if len(there) != total:
        raise BadSource(
            f"shard {missing} of {total} is missing beside {files[0]}",
            kind="missing_shard",
            hint="fetch the missing file again",
        )


# -- model_index.json, stored and back -------------------------------------------------------------


def capabilities(index: Mapping[str, Any]) -> tuple[str, ...]:
    """What a runtime can do with a pipeline."""
    return ("image", "vision") if index.get(_CLASS) in _VISION_PIPELINES else ("image",)


def stored_index(
    index: Mapping[str, Any], weights: int, fmt: Format | None, configs: Mapping[str, Any]
) -> bytes:
    """model_index.json as it is stored, with `weights` in all and what they are quantized to.

    `configs` are those of the components; for weights at source precision the text encoder's tells
    the dtype.
    """
    found = {k: v for k, v in index.items() if k not in {_VERSION, *_FACTS}}
    if _CLASS in found:
        found[_ARCHITECTURE] = found.pop(_CLASS)
    found["parameter_count"] = weights
    said = fmt.name.upper() if fmt else _dtype(configs)
    if said:
        found["quantization"] = said
    if fmt:
        found["group_size"] = fmt.group_size
    text = json.dumps(dict(sorted(found.items())), indent=4, ensure_ascii=False)
    return text.encode("utf-8")


def _dtype(configs: Mapping[str, Any]) -> str:
    """The dtype that a text encoder records, or any other component."""
    ordered = sorted(configs, key=lambda name: ("text_encoder" not in name, name))
    for name in ordered:
        for key in ("torch_dtype", "dtype"):  # transformers 5 writes the shorter one
            if isinstance(said := configs[name].get(key), str):
                return said
    return ""


def exported_index(index: Mapping[str, Any], configs: Mapping[str, Any]) -> dict[str, Any]:
    """model_index.json as diffusers reads it, from a stored one.

    The version of diffusers comes from a component's config, which records it as well.
    """
    found = {k: v for k, v in index.items() if k not in {_ARCHITECTURE, *_FACTS}}
    head = {_CLASS: index[_ARCHITECTURE]} if _ARCHITECTURE in index else {}
    versions = [c[_VERSION] for _, c in sorted(configs.items()) if _VERSION in c]
    if versions and _VERSION not in found:
        head[_VERSION] = versions[0]
    return head | found


def weights_stem(config: Mapping[str, Any]) -> str:
    """What a component's weight files are called: diffusers' own models have a name of theirs."""
    return DIFFUSERS_WEIGHTS if _CLASS in config else TRANSFORMERS_WEIGHTS
