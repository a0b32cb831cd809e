"""A tensor's data out of its sources, in pieces: copied, cast, decoded, adapters' changes added."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from quantmill.pacing import PIECE_BYTES
from quantmill.plans import CAST, COPYING, DECODING, TensorSpec
from quantmill.source import OpenSource, SourceTensor
from quantmill.weights import Quantized

_T = TypeVar("_T")


def source_bytes(spec: TensorSpec, checkpoint: OpenSource) -> int:
    """Bytes of source data that writing the tensor takes."""
    return sum(checkpoint.source.tensors[name].nbytes for name in spec.reads)


@dataclass(frozen=True, slots=True)
class Pieces:
    """Reads specs in pieces of about `piece_bytes`; `told` hears of bytes that were read."""

    checkpoint: OpenSource
    piece_bytes: int
    told: Callable[[int], None] = lambda _: None

    def of(self, spec: TensorSpec) -> Iterator[memoryview]:
        """The spec's data, each piece valid until the next one is asked for."""
        yield from self._merged(spec, self._own(spec))
        self.told(source_bytes(spec, self.checkpoint) - self._own_bytes(spec))

    def recoded(self, spec: TensorSpec) -> Iterator[Quantized]:
        """The codes that the sources have, as codes of the spec's format."""
        from quantmill.coding import recoded

        sources = [self.checkpoint.source.tensors[name] for name in spec.sources]
        found = recoded(spec, sources, self.checkpoint.read_into, self.piece_bytes)
        yield from self._counted(spec, found)

    def _merged(self, spec: TensorSpec, pieces: Iterator[memoryview]) -> Iterator[memoryview]:
        if not any(spec.added):
            return pieces
        from quantmill.merging import merged

        return merged(spec, pieces, self.checkpoint.source.tensors, self.checkpoint.read_into)

    def _own(self, spec: TensorSpec) -> Iterator[memoryview]:
        """What the source holds. A piece never spans two sources; all but a source's last hold
        whole groups.
        """
        tensors = self.checkpoint.source.tensors
        if spec.transform in DECODING:
            from quantmill.coding import numbers

            sources = [tensors[name] for name in spec.sources]
            found = numbers(spec, sources, self.checkpoint.read_into, self.piece_bytes)
            yield from self._counted(spec, found)
            return
        nbytes = self.piece_bytes if spec.format else PIECE_BYTES
        largest = max(tensors[name].nbytes for name in spec.sources)
        buffer = memoryview(bytearray(min(nbytes, largest)))
        for name in spec.sources:
            for piece in self._read(tensors[name], buffer, spec.transform == CAST):
                yield piece if spec.transform in COPYING | {CAST} else _changed(spec, piece)

    def _own_bytes(self, spec: TensorSpec) -> int:
        return sum(self.checkpoint.source.tensors[name].nbytes for name in spec.sources)

    def _counted(self, spec: TensorSpec, pieces: Iterator[_T]) -> Iterator[_T]:
        """The pieces of a weight whose sources are read together; they count when all is read."""
        yield from pieces
        self.told(self._own_bytes(spec))

    def _read(self, tensor: SourceTensor, buffer: memoryview, cast: bool) -> Iterator[memoryview]:
        for offset in range(0, tensor.nbytes, max(1, buffer.nbytes)):
            piece = buffer[: min(buffer.nbytes, tensor.nbytes - offset)]
            self.checkpoint.read_into(tensor, offset, piece)
            yield _cast(piece, tensor.dtype) if cast else piece
            self.told(piece.nbytes)


def _changed(spec: TensorSpec, piece: memoryview) -> memoryview:
    """A global scale in the convention of the store (docs/formats.md)."""
    from quantmill.transforms import change_global

    return change_global(str(spec.transform), spec.name, piece)


def _cast(piece: memoryview, dtype: str) -> memoryview:
    """Elements of another floating-point dtype as BF16."""
    import numpy as np

    from quantmill.elements import to_bf16

    return to_bf16(np.frombuffer(piece, np.uint8), dtype).data
