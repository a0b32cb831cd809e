"""Calibrate: run the model that is to be quantized, and tell each weight what its layer is given.

Statistics are those of the unquantized model, so a pass does not wait for what is quantized, and
what an interrupted run finished stays good.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from quantmill.activations import of_expert
from quantmill.calibration import OF_FILE, Calibrated, Stage
from quantmill.errors import BadRequest, Corrupt
from quantmill.gptq import Feedback, prepare
from quantmill.importance import scaled
from quantmill.plans import (
    CALIBRATED,
    GPTQ,
    IMATRIX,
    MIXED,
    RANDOM,
    BlobSpec,
    Calibration,
    Plan,
    TensorSpec,
)
from quantmill.source import MODEL, OpenSource, Source
from quantmill.windows import (
    Tokens,
    default_text,
    random_tokens,
    text_of,
    text_tokens,
    tokens_digest,
)

if TYPE_CHECKING:
    from quantmill.activations import Gram, Moments, Passes
    from quantmill.model import Model

Floats = npt.NDArray[np.float32]
Report = Callable[[int, int], None]

EXPERT_PRODUCTS = 128
"""As activations.EXPERT_TOKENS for products of columns, of which there are many more to know."""

_READ = 1 << 22


# -- tokens ----------------------------------------------------------------------------------------


def windows_of(calibration: Calibration, model: Model, file: str | None) -> Tokens:
    """The windows of tokens that a calibration says, int32 [windows, length].

    Random tokens need no tokenizer, only the config's `vocab_size` and, where there is one, its
    `bos_token_id`, with which each window begins. Raises BadRequest without a vocabulary or for a
    text that is too short for one window, BadPlan for a text without a tokenizer.
    """
    from quantmill.forward import empty_model

    _, config = empty_model(model)
    parts = []
    if calibration.kind in {RANDOM, MIXED}:
        size, first = _stated(config, "vocab_size"), _stated(config, "bos_token_id")
        if size is None:
            raise BadRequest(
                f"{model.where}: config.json has no vocab_size",
                hint="--method search needs no pass of the model",
            )
        parts.append(
            random_tokens(size, calibration.windows, calibration.length, calibration.seed, first)
        )
    texts = [(default_text(calibrating=True), 1)] if calibration.kind == MIXED else []
    texts += [(text_of(Path(file)), OF_FILE[calibration.kind])] if file else []
    if texts:
        from quantmill.mlxlm import tokenizer_for

        tokenizer = tokenizer_for(model, config)
        for text, times in texts:
            count = times * calibration.windows
            parts.append(_spread(tokenizer, text.text, calibration.length, count))
    return np.concatenate(parts)


def _spread(tokenizer: Any, text: str, length: int, count: int) -> Tokens:
    """As many windows as there should be, spread over the text; fewer of a short one."""
    whole = text_tokens(tokenizer, text, length)
    return whole if len(whole) <= count else text_tokens(tokenizer, text, length, count)


def _stated(config: Mapping[str, Any], key: str) -> int | None:
    nested = config.get("text_config")
    for place in (config, nested if isinstance(nested, dict) else {}):
        found = place.get(key)
        found = found[0] if isinstance(found, list) and found else found
        if isinstance(found, int) and not isinstance(found, bool):
            return found
    return None


def content_digest(checkpoint: OpenSource) -> str:
    """`sha256:…` of all weights: names, dtypes, shapes and bytes, in the order of names."""
    hashed = hashlib.sha256()
    buffer = memoryview(bytearray(_READ))
    for tensor in checkpoint.source.tensors.values():
        hashed.update(repr((tensor.name, tensor.dtype, tensor.shape)).encode())
        for offset in range(0, tensor.nbytes, _READ):
            piece = buffer[: min(_READ, tensor.nbytes - offset)]
            checkpoint.read_into(tensor, offset, piece)
            hashed.update(piece)
    return f"sha256:{hashed.hexdigest()}"


# -- the pass --------------------------------------------------------------------------------------


def calibrated(
    plan: Plan,
    checkpoint: OpenSource,
    model: Callable[[], Model],
    file: str | None,
    passes: Passes,
) -> Calibrated:
    """Fix what a plan is calibrated with; the pass itself is made when stages are asked for.

    `model` opens the unquantized model, anew each time, and `passes` are its; `file` is the text or
    imatrix. Raises what `windows_of`, `forward.Forward` and `imatrix.read_imatrix` do.
    """
    decided = plan.calibration
    assert decided is not None
    names = _Names(checkpoint.source)
    digest = content_digest(checkpoint)
    if decided.kind == IMATRIX:
        assert file is not None
        whole = replace(plan, calibration=replace(decided, source=digest))
        return _from_imatrix(whole, file, checkpoint.source, names)
    with model() as one:
        windows = windows_of(decided, one, file)
    decided = replace(decided, source=digest, tokens=tokens_digest(windows))

    def stages(blobs: Sequence[BlobSpec], report: Report) -> Iterator[Stage]:
        with model() as one:
            if plan.options.method == GPTQ:
                blocks = passes.gram_matrices(one, windows, progress=report)
                yield from _by_products(blocks, names, blobs)
            else:
                moments = passes.second_moments(one, windows, progress=report)
                yield Stage(tuple(blobs), _Squares(moments, names))

    return Calibrated(replace(plan, calibration=decided), stages)


def _from_imatrix(plan: Plan, file: str, source: Source, names: _Names) -> Calibrated:
    from quantmill.imatrix import moments_for, read_imatrix

    read = read_imatrix(file)
    matched = moments_for(read, source)
    found = {names.of_source(name): moments for name, moments in matched.moments.items()}
    if not any(names.has(found, spec) for spec in plan.tensors):
        raise BadRequest(
            f"{read.file} has no entry for a tensor that is quantized",
            kind="imatrix_does_not_fit",
            hint="it must have been made of this model by llama-imatrix",
        )

    def stages(blobs: Sequence[BlobSpec], report: Report) -> Iterator[Stage]:
        del report
        yield Stage(tuple(blobs), _Squares(found, names))

    return Calibrated(plan, stages, matched.unused)


def _by_products(
    blocks: Iterator[Mapping[str, Gram]], names: _Names, blobs: Sequence[BlobSpec]
) -> Iterator[Stage]:
    """After each block the blobs whose layers are in it; at last those that no layer reads."""
    waiting = list(blobs)
    for found in blocks:
        ready = [blob for blob in waiting if any(names.has(found, s) for s in blob.tensors)]
        waiting = [blob for blob in waiting if blob not in ready]
        if ready:
            yield Stage(tuple(ready), _Products(found, names))
        if not waiting:
            return
    if waiting:
        yield Stage(tuple(waiting), _Products({}, names))


# -- statistics by tensor --------------------------------------------------------------------------


class _Names:
    """Tensors of a plan under the names that the open model has for them."""

    def __init__(self, source: Source) -> None:
        own = next((part for part in source.parts if part.role == MODEL), None)
        self._prefix, self._folder = (own.prefix, own.folder) if own else ("", "")

    def whole(self, spec: TensorSpec) -> str:
        return spec.name.removeprefix(self._prefix)

    def of_source(self, name: str) -> str:
        return name.removeprefix(self._folder)

    def members(self, spec: TensorSpec) -> list[str]:
        """A name for each matrix of a stack, where the source has them one by one."""
        count = spec.shape[0] if len(spec.shape) > 2 else 1
        own = [self.of_source(name) for name in spec.sources]
        return own if len(own) == count else []

    def has(self, found: Mapping[str, object], spec: TensorSpec) -> bool:
        return spec.method in CALIBRATED and any(
            name in found for name in (self.whole(spec), *self.members(spec))
        )


class _Squares:
    """Means of squares, of the whole model."""

    def __init__(self, found: Mapping[str, Moments], names: _Names) -> None:
        self._found, self._names = found, names

    def importance(self, spec: TensorSpec, member: int) -> Floats | None:
        """What each column counts, float32 [columns]; None for a layer that was given nothing."""
        values = self._values(spec, member)
        if values is None:
            return None
        _check_columns(spec, values.shape[-1])
        return scaled(values)

    def feedback(self, spec: TensorSpec, member: int) -> Feedback | None:
        """Means of squares do not say it."""
        del spec, member
        return None

    def _values(self, spec: TensorSpec, member: int) -> npt.NDArray[np.float64] | None:
        whole = self._found.get(self._names.whole(spec))
        if whole is not None:
            if whole.values.ndim == 1:
                return whole.values.astype(np.float64)
            return of_expert(list(whole.values), whole.tokens.tolist(), member)
        names = self._names.members(spec)
        found = [self._found.get(name) for name in names]
        known = [one for one in found if one is not None]
        if not known:
            return None
        empty = np.zeros_like(known[0].values)
        return of_expert(
            [empty if one is None else one.values for one in found],
            [0 if one is None else int(one.tokens) for one in found],
            member,
        )


@dataclass(slots=True)
class _Products:
    """Products of columns, of one block; each matrix of them is prepared once."""

    found: Mapping[str, Gram]
    names: _Names
    _made: dict[tuple[int, int], Feedback] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def importance(self, spec: TensorSpec, member: int) -> Floats | None:
        """Not asked: what is not fed back is searched with weights of its norms."""
        del spec, member
        return None

    def feedback(self, spec: TensorSpec, member: int) -> Feedback | None:
        """From the member's own inputs, or those of all members; None where there were none."""
        if not self.names.has(self.found, spec):
            return None
        key, make = self._gram(spec, member)
        with self._lock:
            if key not in self._made:
                gram = make()
                _check_columns(spec, gram.shape[-1])
                self._made[key] = prepare(gram)
            if spec.format is not None:  # once, while no other thread asks for the same
                self._made[key].way(spec.format.group_size)
            return self._made[key]

    def _gram(
        self, spec: TensorSpec, member: int
    ) -> tuple[tuple[int, int], Callable[[], npt.NDArray[np.float64]]]:
        """A key for the matrix, and how to get it."""
        whole = self.found.get(self.names.whole(spec))
        if whole is not None:
            if whole.products.ndim == 2:
                return (id(whole), -1), lambda: whole.products
            if whole.tokens[member] >= EXPERT_PRODUCTS:
                return (id(whole), member), lambda: whole.products[member]
            return (id(whole), -1), lambda: whole.products.sum(axis=0)
        members = [self.found.get(name) for name in self.names.members(spec)]
        own = members[member]
        if own is not None and (len(members) == 1 or own.tokens >= EXPERT_PRODUCTS):
            return (id(own), -1), lambda: own.products
        known = [one for one in members if one is not None]
        return (id(known[0]), -2), lambda: np.sum([one.products for one in known], axis=0)


def _check_columns(spec: TensorSpec, columns: int) -> None:
    if columns != spec.shape[-1]:
        raise Corrupt(
            f"{spec.name!r} has {spec.shape[-1]} columns, but its layer is given {columns}",
            kind="weights_do_not_fit",
        )
