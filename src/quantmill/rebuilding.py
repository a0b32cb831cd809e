"""Blobs made again from the source of their model, by the recipe that was noted of it.

Where none was, as for models of other programs, it is guessed from what the model itself records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

from quantmill import mediatypes, provenance, strictjson
from quantmill.activations import Passes
from quantmill.calibration import Calibrated
from quantmill.creation import calibrating, opened, plan_for, small_blobs, stored_base_of
from quantmill.digests import Digest, digest_of
from quantmill.drafts import Base
from quantmill.errors import BadPlan, BadRequest, QuantmillError
from quantmill.execute import write_blobs
from quantmill.formats import FORMAT_NAMES
from quantmill.manifest import BlobRef, Manifest
from quantmill.pacing import pace
from quantmill.planner import parse_override
from quantmill.plans import Options, Plan
from quantmill.recipes import Recipe, Request
from quantmill.source import OpenSource
from quantmill.store import Store
from quantmill.verification import MAX_JSON


class FromRecipe:
    """The sources that a model was made from, as a note says."""

    required = False

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    @property
    def name(self) -> str:
        """The source as it was given."""
        return str(self._recipe.source)

    def provide(self, store: Store, manifest: Manifest, wanted: Sequence[BlobRef]) -> None:
        """Commit those of the wanted blobs that the recipe gives."""
        del manifest  # the recipe says all
        _follow(store, self._recipe, wanted)


class FromSource:
    """A checkpoint directory or GGUF file that the user names.

    Without a recipe for the model, what it does not record, rules of its own for tensors, is found
    by size: of a blob whose planned size differs, each format is tried that gives the right one.
    The digest decides.
    """

    required = True

    def __init__(self, source: str) -> None:
        self._source = source

    @property
    def name(self) -> str:
        """The source as it was given."""
        return self._source

    def provide(self, store: Store, manifest: Manifest, wanted: Sequence[BlobRef]) -> None:
        """Commit those of the wanted blobs that the source gives."""
        for recipe in provenance.recipes(store, manifest.digest):
            # of several inputs one is named here: the others may be gone
            others = recipe.draft or recipe.merge_lora
            with suppress(QuantmillError) if others else nullcontext():
                _follow(store, replace(recipe, source=self._source), wanted)
        left = _lacking(store, wanted)
        for word, options in _recorded(store, manifest) if left else ():
            recipe = Recipe(self._source, Request(word), options)
            with opened(recipe, None) as checkpoint:
                for planned in _plans(checkpoint, word, options, left):
                    _make(store, checkpoint, planned, left, recipe)
                    left = _lacking(store, left)
                    if not left:
                        return


def _follow(store: Store, recipe: Recipe, wanted: Sequence[BlobRef]) -> None:
    base = stored_base_of(store, recipe)
    with opened(recipe, base) as checkpoint:
        planned = plan_for(checkpoint.source, recipe.request, recipe.options)
        _make(store, checkpoint, planned, _lacking(store, wanted), recipe, base)


def _lacking(store: Store, wanted: Sequence[BlobRef]) -> list[BlobRef]:
    return [ref for ref in wanted if not store.holds(ref.digest, ref.size)]


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
        method=str(found.get("method", Options().method)),
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


def _make(
    store: Store,
    checkpoint: OpenSource,
    planned: Plan,
    wanted: Sequence[BlobRef],
    recipe: Recipe,
    base: Base | None = None,
) -> None:
    with calibrating(planned, recipe, checkpoint, Passes()) as calibrated:
        _make_calibrated(store, checkpoint, calibrated, wanted, recipe, base)


def _make_calibrated(
    store: Store,
    checkpoint: OpenSource,
    calibrated: Calibrated,
    wanted: Sequence[BlobRef],
    recipe: Recipe,
    base: Base | None,
) -> None:
    planned = calibrated.plan
    sizes = {(ref.name, ref.size) for ref in wanted if ref.media_type == mediatypes.TENSOR}
    blobs = tuple(blob for blob in planned.blobs if (blob.name, blob.size) in sizes)
    if blobs:
        part = replace(planned, blobs=blobs)
        chosen = pace(part, checkpoint.source.tensors)
        write_blobs(part, checkpoint, store, pace=chosen, stages=calibrated.stages, restart=True)
    digests: set[Digest] = {ref.digest for ref in wanted}
    pending = []
    for _, _, data in small_blobs(checkpoint, planned, recipe.modelfile, base):
        if digest_of(data) in digests:
            with store.new_blob() as writer:
                writer.write(data)
                pending.append(writer.finish())
    store.commit(pending)
