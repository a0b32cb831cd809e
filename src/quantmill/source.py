"""What a checkpoint says about itself: tensors, config, files. checkpoint.py finds it out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantmill import strictjson
from quantmill.digests import Digest, digest_of
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
    `values` the integers of small tensors that describe others.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, SourceTensor]
    files: tuple[SourceFile, ...] = ()
    ignored: tuple[SourceTensor, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def fingerprint(self) -> Digest:
        """Changes whenever a name, dtype, shape, place, config or side file changes."""
        tensors = [
            [t.name, t.dtype, t.shape, t.file, t.start, *([t.blocks] if t.blocks else [])]
            for t in self.tensors.values()
        ]
        files = [[f.name, f.size, f.media_type] for f in self.files]
        said = [self.texts.get(QUANTIZATION_CONFIG, ""), self.values]
        return digest_of(strictjson.canonical([dict(self.config), tensors, files, said]))
