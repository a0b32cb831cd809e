"""Blobs made again from the source of their model, by the options that the model records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from quantmill import mediatypes, strictjson
from quantmill.creation import Request, plan_for, small_blobs
from quantmill.digests import digest_of
from quantmill.errors import BadPlan, BadRequest, QuantmillError
from quantmill.execute import write_blobs
from quantmill.formats import FORMAT_NAMES
from quantmill.manifest import BlobRef, Manifest
from quantmill.opening import locate, open_source
from quantmill.pacing import pace
from quantmill.planner import parse_override
from quantmill.plans import Options, Plan
from quantmill.source import OpenSource
from quantmill.store import Store
from quantmill.verification import MAX_JSON


class FromSource:
    """A checkpoint directory or GGUF file, as `create` reads it.

    What a model does not record, rules of its own for tensors, is found by size: of a blob whose
    planned size differs, each format is tried that gives the right one. The digest decides.
    """

    def __init__(self, source: str) -> None:
        self._source = source

    @property
    def name(self) -> str:
        """The source as it was given."""
        return self._source

    def provide(self, store: Store, manifest: Manifest, wanted: Sequence[BlobRef]) -> None:
        """Commit those of the wanted blobs that the source gives."""
        left = {ref.digest: ref for ref in wanted}
        for word, options in _recorded(store, manifest):
            with open_source(locate(self._source, None), decode=bool(word)) as checkpoint:
                for planned in _plans(checkpoint, word, options, list(left.values())):
                    _make(store, checkpoint, planned, list(left.values()))
                    left = {d: r for d, r in left.items() if not store.holds(d, r.size)}
                    if not left:
                        return


def _recorded(store: Store, manifest: Manifest) -> list[tuple[str | None, Options]]:
    """The format and options that the config records; every format where it is damaged too."""
    config: Mapping[str, Any] = {}
    ref = manifest.config
    if ref is not None and store.holds(ref.digest, ref.size):
        with suppress(strictjson.BadJson, QuantmillError):
            config = strictjson.parse_object(store.read_blob(ref.digest, MAX_JSON))
    own = config.get("quantmill")
    found = own if isinstance(own, dict) else {}
    options = Options(
        profile=str(found.get("profile", Options().profile)),
        rounding=str(found.get("e8m0", Options().rounding)),
        allow_non_finite=found.get("allow_non_finite") is True,
    )
    if config:
        word = config.get("file_type")
        return [(str(word) if word else None, options)]
    return [(word, options) for word in (None, *FORMAT_NAMES)]


def _plans(
    checkpoint: OpenSource, word: str | None, options: Options, wanted: Sequence[BlobRef]
) -> Iterator[Plan]:
    """The plan that the records give, then those with another format for what does not fit."""
    first = _plan(checkpoint, word, options)
    if first is None:
        return
    yield first
    sizes = {blob.name: blob.size for blob in first.blobs}
    odd = [ref.name for ref in wanted if ref.name in sizes and sizes[ref.name] != ref.size]
    for choice in ("keep", *FORMAT_NAMES) if odd else ():
        rules = tuple(parse_override(f"{name}={choice}") for name in odd)
        planned = _plan(checkpoint, word, replace(options, overrides=rules))
        if planned is not None:
            yield planned


def _plan(checkpoint: OpenSource, word: str | None, options: Options) -> Plan | None:
    try:
        return plan_for(checkpoint.source, Request(word), options)
    except (BadPlan, BadRequest):
        return None


def _make(store: Store, checkpoint: OpenSource, planned: Plan, wanted: Sequence[BlobRef]) -> None:
    sizes = {(ref.name, ref.size) for ref in wanted if ref.media_type == mediatypes.TENSOR}
    blobs = tuple(blob for blob in planned.blobs if (blob.name, blob.size) in sizes)
    if blobs:
        part = replace(planned, blobs=blobs)
        write_blobs(
            part, checkpoint, store, pace=pace(part, checkpoint.source.tensors), restart=True
        )
    digests = {ref.digest for ref in wanted}
    pending = []
    for _, _, data in small_blobs(checkpoint, planned, None, None):
        if digest_of(data) in digests:
            with store.new_blob() as writer:
                writer.write(data)
                pending.append(writer.finish())
    store.commit(pending)
