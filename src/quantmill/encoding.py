"""A tensor's data as codes, scales and biases, by the method that its spec names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from quantmill.errors import BadRequest
from quantmill.formats import DTYPE_BYTES, Format
from quantmill.pieces import Pieces
from quantmill.plans import AWARE, CALIBRATED, GPTQ, RECODE, RTN, SEARCH, TensorSpec
from quantmill.quantize import quantize
from quantmill.weights import Quantized

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from quantmill.gptq import Feedback

    Floats = npt.NDArray[np.float32]

TOGETHER = 1 << 24
"""Weights of a matrix in memory for error feedback, whole rows of them; bytes do not depend on it.
"""


class Statistics(Protocol):
    """What the layers of tensors are given, asked for by tensor and by member of a stack."""

    def importance(self, spec: TensorSpec, member: int) -> Floats | None:
        """What each column counts, float32 [columns], the largest in [1, 2); None: not known."""

    def feedback(self, spec: TensorSpec, member: int) -> Feedback | None:
        """How errors of columns are carried on; None: not known."""


def method_of(spec: TensorSpec, statistics: Statistics | None) -> str:
    """How the spec is quantized: its method, or its fallback where the pass gave it nothing.

    Raises BadRequest where a calibrated method has no statistics at all.
    """
    if spec.method not in CALIBRATED:
        return spec.method
    if statistics is None:
        raise BadRequest(f"the method {spec.method} needs a calibration")
    ask = statistics.feedback if spec.method == GPTQ else statistics.importance
    return spec.fallback if ask(spec, 0) is None else spec.method


def encoded(
    spec: TensorSpec,
    method: str,
    pieces: Pieces,
    rounded: Callable[[memoryview], Quantized],
    statistics: Statistics | None,
) -> Iterator[Quantized]:
    """The spec's data quantized by a method (`method_of`), or in the codes that it has.

    `rounded` rounds a piece to nearest.

    Raises what the method's own module does: quantize, searching, gptq.
    """
    assert spec.format is not None
    if spec.transform == RECODE:
        yield from pieces.recoded(spec)
        return
    if method == RTN:
        # after a calibrated method there is MLX's rounding on a CPU only
        plain = rounded if spec.method == RTN else _as_mlx(spec.dtype, spec.format)
        yield from map(plain, pieces.of(spec))
    elif method == SEARCH:
        yield from _searched(spec, pieces, None)
    elif method == AWARE:
        yield from _searched(spec, pieces, statistics)
    else:
        assert statistics is not None
        yield from _fed_back(spec, pieces, statistics)


def _as_mlx(dtype: str, fmt: Format) -> Callable[[memoryview], Quantized]:
    return lambda piece: quantize(piece, dtype, fmt)


def _searched(
    spec: TensorSpec, pieces: Pieces, statistics: Statistics | None
) -> Iterator[Quantized]:
    """The pieces by a search; each matrix of a stack has its columns weighed by itself."""
    from quantmill.searching import search

    assert spec.format is not None
    columns = spec.shape[-1]
    matrix = columns * _rows(spec)
    at, member, weights = 0, -1, None
    width = DTYPE_BYTES[spec.dtype]
    for piece in pieces.of(spec):
        done, count = 0, piece.nbytes // width
        while done < count:
            current, inside = divmod(at + done, matrix)
            if current != member or weights is None:
                member = current
                weights = _importance(spec, member, pieces, statistics)
            end = min(count, done + matrix - inside)
            part = piece[done * width : end * width]
            yield search(part, spec.dtype, spec.format, weights.data, inside % columns)
            done = end
        at += count


def _importance(
    spec: TensorSpec, member: int, pieces: Pieces, statistics: Statistics | None
) -> Floats:
    if statistics is not None:
        found = statistics.importance(spec, member)
        assert found is not None  # of one member or of all
        return found
    from quantmill.importance import importance

    weighting = spec.weightings[member] if spec.weightings else None
    return importance(weighting, spec.shape[-1], pieces.checkpoint)


def _fed_back(spec: TensorSpec, pieces: Pieces, statistics: Statistics) -> Iterator[Quantized]:
    """Some rows of a matrix after the other, the error of each column carried to those after it."""
    from quantmill.elements import to_float32
    from quantmill.gptq import quantize_with_feedback

    fmt, columns = spec.format, spec.shape[-1]
    assert fmt is not None
    for member, raw in _in_rows(spec, pieces.of(spec)):
        feedback = statistics.feedback(spec, member)
        assert feedback is not None  # of one member or of all
        values = to_float32(raw, spec.dtype).reshape(-1, columns)
        yield quantize_with_feedback(values, fmt, spec.dtype, feedback, _choose)


def _in_rows(
    spec: TensorSpec, pieces: Iterator[memoryview]
) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """A member of a stack and the bytes of the next of its rows."""
    import numpy as np

    row, rows = spec.shape[-1] * DTYPE_BYTES[spec.dtype], _rows(spec)
    member, start, kept = 0, 0, bytearray()
    for piece in pieces:
        kept += piece
        while kept:
            end = min(rows, start + max(1, TOGETHER // spec.shape[-1]))
            nbytes = (end - start) * row
            if len(kept) < nbytes:
                break
            yield member, np.frombuffer(bytes(kept[:nbytes]), np.uint8)
            del kept[:nbytes]
            member, start = (member + 1, 0) if end == rows else (member, end)


def _choose(
    group: Floats, fmt: Format, importance: Floats, dtype: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8] | None]:
    """Scales and biases of least weighted error for one group of columns, as they are stored."""
    import numpy as np

    from quantmill.searching import choose

    scales, biases = choose(group.reshape(-1).data, fmt, importance.data, dtype)
    found = np.frombuffer(scales, np.uint8)
    return found, None if biases is None else np.frombuffer(biases, np.uint8)


def _rows(spec: TensorSpec) -> int:
    return spec.shape[-2] if len(spec.shape) > 1 else 1
