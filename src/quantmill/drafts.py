"""Draft models: a small model stored beside the one it guesses for, whose tokens it proposes.

The base is a checkpoint read at the same time, or a model that is in the store already: then its
entries are taken over as they are and only the draft's are written (docs/sources.md).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantmill import mediatypes, strictjson
from quantmill.errors import BadName, BadSource, Corrupt, NotFound
from quantmill.manifest import BlobRef
from quantmill.modelconfig import DRAFT_FILE_PREFIX, DRAFT_TENSOR_PREFIX
from quantmill.names import ModelName, parse_name
from quantmill.opening import open_source
from quantmill.parts import OpenParts, naming
from quantmill.source import CONFIG, DRAFT, MODEL, OpenSource, Part, joined
from quantmill.store import Store
from quantmill.verification import MAX_JSON


@dataclass(frozen=True, slots=True)
class Base:
    """A stored model that a new one is built on: its entries, without a draft, and its config."""

    name: ModelName
    refs: tuple[BlobRef, ...]
    config: Mapping[str, Any]


def stored_base(store: Store, source: str | Path) -> Base | None:
    """The stored model that `source` names, None where it is a path or names nothing stored.

    A draft model that the base has already is left behind. Raises BadSource for a model that
    cannot have one, Corrupt when its config or a blob of it is damaged.
    """
    if os.path.exists(source):
        return None
    try:
        name = parse_name(str(source))
        manifest = store.get_manifest(name)
    except (BadName, NotFound):
        return None
    shown = name.display
    if manifest.config is None:
        raise Corrupt(f"manifest of {shown}: no config", kind="bad_manifest")
    try:
        config = strictjson.parse_object(store.read_blob(manifest.config.digest, MAX_JSON))
    except strictjson.BadJson as error:
        raise Corrupt(f"config blob of {shown}: {error}", kind="bad_json") from None
    _check_language_model(shown, config)
    refs = _without_draft(manifest.blobs, config.get("draft"))
    _refuse_draft_names(shown, (r.name or "" for r in refs))
    for ref in refs:
        _check_blob(store, shown, ref)
    return Base(name, refs, config)


def _check_language_model(shown: str, config: Mapping[str, Any]) -> None:
    found, able = config.get("model_format"), config.get("capabilities")
    why = ""
    if found != "safetensors":
        why = f"its format is {found or 'unknown'}"
    elif not isinstance(able, list) or "completion" not in able:
        why = "it does not generate text"
    if why:
        raise _unsupported(shown, why)


def _unsupported(shown: str, why: str) -> BadSource:
    return BadSource(
        f"{shown} cannot have a draft model: {why}",
        kind="draft_base_unsupported",
        hint="the base must be a language model of safetensors",
    )


def _without_draft(refs: Iterable[BlobRef], record: Any) -> tuple[BlobRef, ...]:
    if not isinstance(record, dict):
        return tuple(refs)
    tensors = str(record.get("tensor_prefix") or DRAFT_TENSOR_PREFIX)
    files = str(record.get("config") or f"{DRAFT_FILE_PREFIX}{CONFIG}").removesuffix(CONFIG)

    def is_draft(ref: BlobRef) -> bool:
        prefix = tensors if ref.media_type == mediatypes.TENSOR else files
        named = bool(prefix) and (ref.name or "").startswith(prefix)
        return named or ref.media_type == mediatypes.DRAFT

    return tuple(ref for ref in refs if not is_draft(ref))


def _check_blob(store: Store, shown: str, ref: BlobRef) -> None:
    try:
        whole = store.blob_size(ref.digest) == ref.size
    except NotFound:
        whole = False
    if not whole:
        raise Corrupt(
            f"blob {ref.digest.short} of {shown} ({ref.name or ref.media_type}) is missing or has "
            "the wrong size",
            kind="blob_missing",
            hint=f"`quantmill verify {shown}` tells what is damaged; create it again",
        )


def _refuse_draft_names(shown: str, names: Iterable[str]) -> None:
    """A tensor of the base called like one of a draft's could not be told from it."""
    taken = next((n for n in names if n.startswith((DRAFT_TENSOR_PREFIX, DRAFT_FILE_PREFIX))), None)
    if taken is not None:
        raise BadSource(
            f"{shown} has {taken!r}, a name that belongs to draft models", kind="name_collision"
        )


@dataclass(frozen=True, slots=True)
class Numbers:
    """Of which parts of a model the weights are needed as numbers, not as the codes they have."""

    of_model: bool = False
    of_draft: bool = False


def open_with_draft(
    source: str | Path,
    draft: str | Path,
    base: Base | None,
    numbers: Numbers = Numbers(),
    *,
    follow_links: bool = False,
) -> OpenParts:
    """Open a checkpoint and its draft model as one source; with a stored base the draft alone.

    Raises BadSource as `open_source` does, and where one of them cannot be what it shall be.
    """
    with ExitStack() as stack:
        opened: dict[str, OpenSource] = {}
        parts = []
        if base is None:
            opened[""] = model = stack.enter_context(
                _open_base(source, follow_links, numbers.of_model)
            )
            parts.append(Part("model", MODEL, model.source))
        with naming(DRAFT):
            small = stack.enter_context(
                open_source(draft, follow_links=follow_links, decode=numbers.of_draft)
            )
            if small.source.parts:
                raise BadSource(
                    f"{draft} is made of components",
                    kind="draft_unsupported",
                    hint="a draft model is a language model of the base's vocabulary",
                )
        opened[DRAFT_FILE_PREFIX] = small
        parts.append(Part(DRAFT, DRAFT, small.source, DRAFT_TENSOR_PREFIX, DRAFT_FILE_PREFIX))
        whole = parts[0].source
        found = OpenParts(joined(parts, whole.config, texts=whole.texts), opened)
        stack.pop_all()
    return found


def _open_base(source: str | Path, follow_links: bool, decode: bool) -> OpenSource:
    try:
        opened = open_source(source, follow_links=follow_links, decode=decode)
    except BadSource as error:
        if error.kind != "not_a_model_dir":
            raise
        hint = "give a checkpoint directory, or a name that `quantmill list` shows"
        raise BadSource(error.message, kind=error.kind, hint=hint) from None
    try:
        if opened.source.parts:
            raise _unsupported(str(source), "it is made of components")
        _refuse_draft_names(str(source), opened.source.tensors)
        _refuse_draft_names(str(source), (f.name for f in opened.source.files if f.media_type))
    except BaseException:
        opened.close()
        raise
    return opened


# Entries in the order of a manifest; those of a draft model follow the first three.
_ORDER = (mediatypes.TENSOR, mediatypes.JSON, mediatypes.FILE)
_TEXTS = (mediatypes.TEMPLATE, mediatypes.SYSTEM, mediatypes.LICENSE, mediatypes.PARAMS)


def with_draft(refs: Sequence[BlobRef]) -> list[BlobRef]:
    """The entries of a model with a draft: the model's own, the draft's, texts and parameters."""

    def rank(ref: BlobRef) -> int:
        if ref.media_type in _ORDER:
            draft = (ref.name or "").startswith((DRAFT_TENSOR_PREFIX, DRAFT_FILE_PREFIX))
            return _ORDER.index(ref.media_type) + (len(_ORDER) if draft else 0)
        kinds = (*_TEXTS, ref.media_type)
        return 2 * len(_ORDER) + kinds.index(ref.media_type)

    return sorted(refs, key=rank)
