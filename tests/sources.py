"""Small sources built from tables, without files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantmill.source import Source, SourceTensor


def source_of(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], config: Mapping[str, Any] | None = None
) -> Source:
    """A source with these tensors (name → dtype, shape) and this config."""
    found = {n: SourceTensor(n, dtype, tuple(shape)) for n, (dtype, shape) in tensors.items()}
    return Source(config or {}, {n: found[n] for n in sorted(found)})


def vector_source(document: Mapping[str, Any]) -> Source:
    """The source that a vector's `config` and `tensors` describe."""
    tensors = {n: (t["dtype"], tuple(t["shape"])) for n, t in document["tensors"].items()}
    return source_of(tensors, document["config"])
