"""The weights of a stored model or of a source as numbers, in pieces, under the names they share.

A source shows what `create` would store without a format: experts stacked, codes decoded, adapters
added. So a model and what it was made from have the same names.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from quantmill import coding, mediatypes
from quantmill.classify import FLOAT, classify
from quantmill.creation import opened, plan_for, stored_base_of
from quantmill.digests import digest_of
from quantmill.elements import E4M3, to_bf16, to_float32
from quantmill.errors import BadName, BadSource, NotFound, QuantmillError
from quantmill.formats import FLOAT_DTYPES, FP8_E4M3_DTYPES, Format
from quantmill.load import DRAFT, open_model
from quantmill.merging import merged
from quantmill.model import Model
from quantmill.modelconfig import DRAFT_TENSOR_PREFIX
from quantmill.names import ModelName, as_name
from quantmill.plans import CAST, CODES, COPYING, DECODING, STACK, Plan, TensorSpec
from quantmill.recipes import DECODED, Recipe, Request
from quantmill.source import ADAPTER, RAW_BLOCKS, OpenSource, Source, SourceTensor
from quantmill.store import Store

Numbers = npt.NDArray[Any]

PIECE_ELEMENTS = 1 << 18
"""Elements that are decoded at once, or one row where rows are longer."""


@dataclass(frozen=True, slots=True)
class WeightFacts:
    """What a weight is before anything of it is read.

    `label` is its format, else the scheme that its source has it in, else its dtype. `shape` counts
    numbers, not words; `nbytes` are those of codes and companions as they lie in their files.
    """

    label: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class OpenWeights(Protocol):
    """Weights that can be read as numbers. Use as a context manager."""

    where: str

    @property
    def facts(self) -> Mapping[str, WeightFacts]:
        """All weights by name."""

    @property
    def files(self) -> Mapping[str, str]:
        """Side files by name, with the digest of each."""

    def identity(self, name: str) -> Hashable | None:
        """What two weights with the same bytes have in common; None where bytes would tell."""

    def pieces(self, name: str) -> Iterator[Numbers] | None:
        """The numbers in order, flat: F32, F64 for what does not fit into it. None for no numbers.

        An array is valid until the next one is asked for.
        """

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def open_weights(what: str | Path | ModelName, store: Store | None = None) -> OpenWeights:
    """A stored model by name, else a checkpoint directory, GGUF file or repository on the hub.

    Raises NotFound where there is neither, and what `open_model` and `create` raise.
    """
    store = store or Store()
    name = None if isinstance(what, Path) else _stored_name(what, store)
    if name is not None:
        return StoredWeights(name, store)
    recipe = Recipe(what if isinstance(what, Path) else str(what))
    try:
        return SourceWeights(recipe, store)
    except BadSource as error:
        if error.kind != "not_a_model_dir":
            raise
        raise NotFound(
            f"{what} is neither a stored model nor a checkpoint",
            hint="`quantmill list` shows what is in the store; a source is a directory or file",
        ) from None


def _stored_name(what: str | ModelName, store: Store) -> ModelName | None:
    try:
        name = as_name(what)
        store.get_manifest(name)
    except (BadName, NotFound):
        return None
    return name


def to_numbers(raw: Numbers, dtype: str) -> Numbers | None:
    """Elements as F32 where that holds them, else as F64; None for 8-bit floats of odd kinds.

    `raw` is as a model's `view` gives it: BF16 and 8-bit floats as the integers of their bits.
    """
    if dtype in FLOAT_DTYPES:
        flat = np.ascontiguousarray(raw).reshape(-1)
        return to_float32(flat.view(np.uint8), dtype)
    if dtype in FP8_E4M3_DTYPES:
        return E4M3[raw.reshape(-1).view(np.uint8)]
    if dtype == "C64":  # real and imaginary parts in turn
        return np.ascontiguousarray(raw).reshape(-1).view(np.float32)
    if dtype in {"I64", "U64"}:  # as halves: F64 does not hold them, and equal ones must be equal
        return np.ascontiguousarray(raw).reshape(-1).view(np.uint32).astype(np.float64)
    if dtype.startswith("F8"):
        return None
    return raw.reshape(-1).astype(np.float64)


# -- stored models ---------------------------------------------------------------------------------


class StoredWeights:
    """A stored model, its draft model included under the names it is stored with."""

    def __init__(self, name: ModelName, store: Store) -> None:
        self.where = store.spelling(name).display
        manifest = store.get_manifest(name)
        self.manifest = manifest
        with ExitStack() as stack:
            self._models = [("", stack.enter_context(open_model(name, store=store)))]
            try:
                draft = open_model(name, component=DRAFT, store=store)
                self._models.append((DRAFT_TENSOR_PREFIX, stack.enter_context(draft)))
            except NotFound as error:
                if error.kind != "no_component":
                    raise
            self._stack = stack.pop_all()
        self.facts = {
            prefix + one: _model_facts(model, one)
            for prefix, model in self._models
            for one in model
        }
        self.files = {
            ref.name or ref.media_type.rpartition(".")[2]: str(ref.digest)
            for ref in manifest.blobs
            if ref.media_type != mediatypes.TENSOR
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def format(self, name: str) -> Format | None:
        """The format of a weight, None for one that is not quantized."""
        model, own = self._find(name)
        params = model.params(own)
        return params.format if params else None

    def identity(self, name: str) -> Hashable | None:
        """The blobs that hold the weight, by digest, and where it lies in them."""
        model, own = self._find(name)
        located = model.located(own)
        places = tuple((part.path.name, part.key, part.start, part.nbytes) for part in located)
        return (*places, self.format(name))

    def pieces(self, name: str) -> Iterator[Numbers] | None:
        """Numbers of whole rows."""
        model, own = self._find(name)
        dtype = model.decoded_dtype(own)
        if to_numbers(np.empty(0, np.uint8), dtype) is None:
            return None
        return _model_pieces(model, own, dtype)

    def _find(self, name: str) -> tuple[Model, str]:
        for prefix, model in reversed(self._models):
            own = name.removeprefix(prefix)
            if name.startswith(prefix) and own in model:
                return model, own
        raise NotFound(f"{self.where} has no tensor {name!r}", kind="tensor_not_found")


def _model_facts(model: Model, name: str) -> WeightFacts:
    params, dtype = model.params(name), model.dtype(name)
    nbytes = sum(part.nbytes for part in model.located(name))
    label = params.format.label if params else dtype
    return WeightFacts(label, dtype, model.shape(name), nbytes)


def _model_pieces(model: Model, name: str, dtype: str) -> Iterator[Numbers]:
    shape = model.shape(name)
    if len(shape) < 2:
        found = to_numbers(model.decode(name), dtype)
        assert found is not None
        yield found
        return
    # of a stack one expert after the other, of anything else runs of rows
    indices = range(shape[0]) if len(shape) > 2 else (None,)
    count, row = (shape[1], shape[2:]) if len(shape) > 2 else (shape[0], shape[1:])
    step = max(1, PIECE_ELEMENTS // max(1, int(np.prod(row))))
    for index in indices:
        for first in range(0, count, step):
            raw = model.decode(name, index, slice(first, min(count, first + step)))
            found = to_numbers(raw, dtype)
            assert found is not None
            del raw
            model.forget()  # pages that were read need not stay mapped
            yield found


# -- sources ---------------------------------------------------------------------------------------


class SourceWeights:
    """What a recipe reads, as numbers: of its formats and options nothing is used.

    Raises BadSource and what else `create` raises before it writes.
    """

    def __init__(self, recipe: Recipe, store: Store) -> None:
        self.where = str(recipe.source)
        plain = Recipe(
            recipe.source, Request(requantize=DECODED), draft=recipe.draft,
            merge_lora=recipe.merge_lora, follow_links=recipe.follow_links,
        )  # fmt: skip
        with ExitStack() as stack:
            base = stored_base_of(store, Recipe(recipe.source, draft=recipe.draft))
            self._open: OpenSource = stack.enter_context(opened(plain, base))
            self.plan: Plan = plan_for(self._open.source, _undone(self._open.source))
            self._model = self._in_mlx_formats(stack, recipe)
            self._stack = stack.pop_all()
        tensors = self._open.source.tensors
        self._specs = {spec.name: spec for spec in self.plan.tensors if spec.role == CODES}
        self.facts = {
            name: _model_facts(self._model, name)
            if self._model and self._is_mlx(name)
            else _spec_facts(spec, tensors)
            for name, spec in self._specs.items()
        }
        self.files = {
            file.name: str(digest_of(self._open.read_file(file.name)))
            for file in self._open.source.files
            if file.media_type
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _in_mlx_formats(self, stack: ExitStack, recipe: Recipe) -> Model | None:
        """The directory as a model, where it has weights that MLX holds as they are.

        MLX's own decoding rounds more often than `create`'s, so that a model and the directory it
        was made from, or exported to, would differ in numbers although they share their codes.
        """
        coded = any(spec.scheme for spec in self.plan.tensors)
        if not coded or recipe.merge_lora or not os.path.isdir(recipe.source):
            return None
        with suppress(QuantmillError):
            return stack.enter_context(open_model(Path(recipe.source)))
        return None

    def _is_mlx(self, name: str) -> bool:
        model = self._model
        return model is not None and name in model and model.params(name) is not None

    def identity(self, name: str) -> Hashable | None:
        """None: files of a source have no digests."""
        del name
        return None

    def pieces(self, name: str) -> Iterator[Numbers] | None:
        """Numbers as they are decoded, about PIECE_ELEMENTS at a time."""
        if self._model and self._is_mlx(name):
            return _model_pieces(self._model, name, self._model.decoded_dtype(name))
        spec = self._specs[name]
        known = spec.transform in COPYING | DECODING | {CAST, STACK} and spec.keeps is None
        if not known or to_numbers(np.empty(0, np.uint8), spec.dtype) is None:
            return None
        return self._numbers(spec)

    def _numbers(self, spec: TensorSpec) -> Iterator[Numbers]:
        tensors, read = self._open.source.tensors, self._open.read_into
        pieces = self._raw(spec)
        if any(spec.added):
            pieces = merged(spec, pieces, tensors, read)
        for piece in pieces:
            raw = np.frombuffer(piece, np.uint8)
            found = to_numbers(raw.view(_VIEWS.get(spec.dtype, np.uint8)), spec.dtype)
            assert found is not None
            yield found

    def _raw(self, spec: TensorSpec) -> Iterator[memoryview]:
        """Elements of the spec's dtype, before adapters."""
        tensors, read = self._open.source.tensors, self._open.read_into
        sources = [tensors[name] for name in spec.sources]
        if spec.transform in DECODING:
            yield from coding.numbers(spec, sources, read, 4 * PIECE_ELEMENTS)
            return
        largest = max(tensor.nbytes for tensor in sources)
        # a multiple of every element's size
        buffer = memoryview(bytearray(min(4 * PIECE_ELEMENTS, largest)))
        for tensor in sources:
            for offset in range(0, tensor.nbytes, max(1, buffer.nbytes)):
                piece = buffer[: min(buffer.nbytes, tensor.nbytes - offset)]
                read(tensor, offset, piece)
                whole = np.frombuffer(piece, np.uint8)
                yield to_bf16(whole, tensor.dtype).data if spec.transform == CAST else piece


_VIEWS: Mapping[str, Any] = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16,
    "U32": np.uint32, "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F64": np.float64,
    "C64": np.complex64,
}  # fmt: skip


def _undone(source: Source) -> Request:
    """The request that gives numbers: of weights that are quantized, decoded ones."""
    parts = [part.source for part in source.parts if part.role != ADAPTER] or [source]
    coded = any(classify(part, None).name != FLOAT for part in parts)
    return Request(requantize=DECODED if coded else None)


def _spec_facts(spec: TensorSpec, tensors: Mapping[str, SourceTensor]) -> WeightFacts:
    sources = [tensors[name] for name in spec.sources]
    nbytes = sum(map(_stored_bytes, sources))
    return WeightFacts(spec.scheme or sources[0].dtype, sources[0].dtype, spec.shape, nbytes)


def _stored_bytes(tensor: SourceTensor) -> int:
    """Bytes in the file: a GGUF file's blocks may show as the numbers they are decoded to."""
    if not tensor.blocks or tensor.dtype == RAW_BLOCKS:
        return tensor.nbytes
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    elements, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[tensor.blocks]]
    return tensor.elements // int(elements) * int(nbytes)
