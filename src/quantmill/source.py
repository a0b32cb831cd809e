"""What a checkpoint says about itself: tensors, config, files. checkpoint.py finds it out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

from quantmill import strictjson
from quantmill.digests import Digest, digest_of
from quantmill.errors import BadSource
from quantmill.formats import DTYPE_BYTES

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
QUANTIZATION_CONFIG = "quantization_config.json"
MODEL_INDEX = "model_index.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"

DECIDING_TEXTS = (CONFIG, TOKENIZER_CONFIG, CHAT_TEMPLATE, QUANTIZATION_CONFIG)
"""Side files whose content decides something (`Source.texts`)."""

DECIDING_TENSORS = (".weight_shape",)
"""Endings of tensors whose few integers decide something (`Source.values`)."""

RAW_BLOCKS = "U8"
"""Dtype of tensors that are given as the blocks of a GGUF file: the last dimension counts bytes."""

MAX_TEXT = 64 * 2**20
"""Largest side file that is read or kept; real tokenizers stay far below."""


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of the checkpoint: where its bytes lie and how to read them.

    `file` is relative to the checkpoint, `start` counts bytes from the file's beginning. `blocks`
    is the type of block that a GGUF file has the tensor in: its bytes are these blocks where the
    dtype is RAW_BLOCKS, else numbers that are decoded while they are read.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str = ""
    start: int = 0
    blocks: str = ""

    @property
    def elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.elements * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file beside the weights. `media_type` None means it is left out, for `reason`."""

    name: str
    size: int
    media_type: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Source:
    """Everything decisions may depend on; no weight data.

    `tensors` is sorted by name. `ignored` are tensors that lie in a shard but not in the index.
    `texts` holds the few small files whose content decides something (config.json, chat templates),
    `values` the integers of small tensors that describe others. `parts` are the checkpoints that a
    joined source was made of, none for an ordinary one.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, SourceTensor]
    files: tuple[SourceFile, ...] = ()
    ignored: tuple[SourceTensor, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def is_pipeline(self) -> bool:
        """Whether this is a diffusers directory, `config` being its model_index.json."""
        return any(part.role == COMPONENT for part in self.parts)

    @property
    def draft(self) -> Part | None:
        """The part that is a draft model."""
        return next((part for part in self.parts if part.role == DRAFT), None)

    @property
    def adapter(self) -> Part | None:
        """The part that is an adapter of the model, and gives it no tensors of its own."""
        return next((part for part in self.parts if part.role == ADAPTER), None)

    @property
    def fingerprint(self) -> Digest:
        """Changes whenever a name, dtype, shape, place, config or side file changes."""
        tensors = [
            [t.name, t.dtype, t.shape, t.file, t.start, *([t.blocks] if t.blocks else [])]
            for t in self.tensors.values()
        ]
        files = [[f.name, f.size, f.media_type] for f in self.files]
        said = [self.texts.get(QUANTIZATION_CONFIG, ""), self.values]
        parts = [[p.prefix, p.folder, str(p.source.fingerprint)] for p in self.parts]
        return digest_of(strictjson.canonical([dict(self.config), tensors, files, said, parts]))


# The roles a part may have.
MODEL = "model"
COMPONENT = "component"
DRAFT = "draft"
ADAPTER = "adapter"


@dataclass(frozen=True, slots=True)
class Part:
    """One of several checkpoints that make up a model, planned by itself.

    `prefix` goes before the names of its tensors as they are written. `folder` goes before the
    names of its files, and before those of its source tensors, which it keeps apart from other
    parts' in the joined source.
    """

    name: str
    role: str
    source: Source
    prefix: str = ""
    folder: str = ""


def joined(
    parts: Iterable[Part],
    config: Mapping[str, Any],
    files: Iterable[SourceFile] = (),
    texts: Mapping[str, str] | None = None,
) -> Source:
    """One source of all parts, every name with the folder of its part before it.

    `files` belong to no part. Raises BadSource when two tensors or files would share a name.
    """
    parts = tuple(parts)
    tensors = [_within(part, t) for part in parts for t in part.source.tensors.values()]
    ignored = [_within(part, t) for part in parts for t in part.source.ignored]
    named = [replace(f, name=part.folder + f.name) for part in parts for f in part.source.files]
    all_files = sorted([*files, *named], key=lambda f: f.name)
    for names in ([t.name for t in tensors], [f.name for f in all_files]):
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        if twice:
            raise BadSource(f"two parts of the model have {twice[0]!r}", kind="name_collision")
    found = {t.name: t for t in sorted(tensors, key=lambda t: t.name)}
    return Source(config, found, tuple(all_files), tuple(ignored), texts or {}, parts=parts)


def _within(part: Part, tensor: SourceTensor) -> SourceTensor:
    return replace(tensor, name=part.folder + tensor.name, file=part.folder + tensor.file)


class OpenSource(Protocol):
    """What `create` needs of an open source, whatever file format it is in."""

    @property
    def source(self) -> Source:
        """What the source says about itself."""

    def read_into(self, tensor: SourceTensor, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from `offset` on; callable from any thread."""

    def identity(self, tensor: SourceTensor) -> str:
        """What tells the file that holds the tensor from any other, and from any later state."""

    def read_file(self, name: str) -> bytes:
        """The content of a side file."""

    def check_unchanged(self) -> None:
        """Raise BadSource if what was opened is no longer what it was."""

    def close(self) -> None:
        """Close all files."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...
