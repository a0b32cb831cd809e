"""Quantization with error feedback: what rounding a column loses, the columns after it make up for.

The algorithm is GPTQ's (Frantar et al., arXiv 2210.17323) in the form of LDLQ (Chee et al., arXiv
2307.13304), which takes no inverse. Columns that count most go first, group by group, and a group's
scales and biases are chosen on weights that make up for the columns before it. What is rounded how,
and in which order errors are summed, docs/formats.md says (Error feedback).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from quantmill.elements import E4M3, to_float32
from quantmill.errors import BadRequest
from quantmill.feedbackarrays import LANES, Place, Tiles
from quantmill.formats import Format
from quantmill.weights import Quantized

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]

DAMPING = 0.05
"""Of the mean of the Gram matrix's diagonal so much is added to it. Frantar et al. add 0.01; with
more less is lost on texts unlike those that were calibrated with (docs/fidelity.md)."""

_BLOCK = 128
"""Columns whose errors are carried beyond them at once; a whole number of any format's groups."""

_NOTHING = np.empty((0, 0), np.uint8)

_ROWS = 1024
"""Rows at a time: few enough for the cache, enough to make Python's share small."""

Choose = Callable[[Floats, Format, Floats, str], tuple[Bytes, Bytes | None]]
"""Scales and biases, as they are stored, of one group of columns [rows, group] with its weights."""


@dataclass(frozen=True, slots=True)
class Way:
    """How columns in groups of one size are gone through.

    `order`, int64 [columns], has the columns as they are rounded, a group's side by side. In this
    order are `importance`, float32 [columns], what their errors count when scales are chosen, and
    `factors`, float32 [columns, columns]: row k says how much of the error of the k-th each later
    column takes over; only what is right of the diagonal is read.
    """

    order: npt.NDArray[np.int64]
    importance: Floats
    factors: Floats


@dataclass(frozen=True, slots=True)
class Feedback:
    """How errors are carried on between columns: a Gram matrix, prepared once for all weights that
    share an input.

    `gram` is damped, float64 [columns, columns]; `diagonal` that of the inputs, float64 [columns].
    """

    gram: Doubles
    diagonal: Doubles
    _ways: dict[int, Way] = field(default_factory=dict)

    def way(self, group_size: int) -> Way:
        """The way for groups of this size, made once.

        Groups go by the sum of the diagonal over their columns, the largest first, and so do the
        columns of a group by the diagonal: what counts most is rounded while most columns are left
        to make up for it. With H = A A' in this order, A upper triangular, the factors are A with
        its columns divided by the diagonal (Chee et al., 2023, section 4; the same feedback as that
        of Frantar et al., whose U is the inverse of A). The importance is H_jj before damping, what
        an error costs that nothing makes up for; after feedback it is A_jj^2, which fits texts
        unlike those of the calibration less.

        Raises BadRequest where H has no such factor.
        """
        if group_size not in self._ways:
            self._ways[group_size] = self._made(group_size)
        return self._ways[group_size]

    def _made(self, group_size: int) -> Way:
        by_group = self.diagonal.reshape(-1, group_size)
        inside = np.argsort(-by_group, axis=1, kind="stable")
        groups = np.argsort(-by_group.sum(axis=1), kind="stable")
        order = (inside + np.arange(len(by_group))[:, None] * group_size)[groups].reshape(-1)
        backwards = order[::-1]
        try:
            # an upper factor is the lower one of the matrix turned round
            upper = np.linalg.cholesky(self.gram[np.ix_(backwards, backwards)])[::-1, ::-1]
        except np.linalg.LinAlgError:
            raise BadRequest(
                "the calibration gave too few different activations",
                hint="use more tokens",
            ) from None
        own = np.diag(upper)
        importance = self.diagonal[order]
        total = float(importance.sum())
        importance *= len(order) / total if total else 1
        factors = np.ascontiguousarray(upper / own, np.float32)
        return Way(order, importance.astype(np.float32), factors)


def prepare(gram: Doubles, damping: float = DAMPING) -> Feedback:
    """Prepare a Gram matrix X'X of inputs, float64 [columns, columns].

    Columns whose input was always 0 take and give nothing. Raises BadRequest for a matrix that no
    inputs have, since it is not finite or not positive.
    """
    gram = np.array(gram, np.float64)
    diagonal = np.einsum("ii->i", gram)
    if not np.all(np.isfinite(gram)) or np.any(diagonal < 0):
        raise BadRequest("the calibration gave activations that are not finite")
    own = diagonal.copy()
    dead = own == 0
    mean = float(np.mean(own[~dead])) if not dead.all() else 1.0
    diagonal[dead] = mean
    diagonal += damping * mean
    return Feedback(gram, own)


def quantize_with_feedback(
    weights: Floats,
    fmt: Format,
    dtype: str,
    feedback: Feedback,
    choose: Choose,
    threads: int = 1,
) -> Quantized:
    """Quantize a matrix, float32 [rows, columns], to what a tensor of `dtype` stores.

    Columns are a whole number of groups. `choose` picks scales and biases for some rows of a group,
    in any of the `threads`; rows are independent, so bytes do not depend on how many there are. A
    weight that is NaN or infinite has no error, and spoils its own group alone. Raises what
    `choose` does, and BadRequest where the shapes do not fit together.
    """
    rows, columns = weights.shape
    if columns % fmt.group_size or feedback.gram.shape != (columns, columns):
        raise BadRequest(f"{columns} columns do not fit the groups or the calibration")
    way = feedback.way(fmt.group_size)
    job = _Job(np.asarray(weights, np.float32), fmt, dtype, way, choose)
    # as many rows in each part as in the others, in whole tiles
    share = -(-rows // (LANES * max(1, threads))) * LANES
    at_once = max(LANES, min(_ROWS, share))
    starts = range(0, rows, at_once)
    if threads == 1 or len(starts) < 2:
        parts = [job.run(start, start + at_once) for start in starts]
    else:
        with ThreadPoolExecutor(threads) as pool:
            parts = list(pool.map(lambda start: job.run(start, start + at_once), starts))
    codes, scales, biases = (
        np.concatenate(arrays) if arrays else np.empty(0, np.uint8)
        for arrays in ([getattr(part, name) for part in parts] for name in _Part.__slots__)
    )
    return Quantized(
        codes.reshape(-1).data,
        scales.reshape(-1).data,
        biases.reshape(-1).data if fmt.has_bias else None,
        int(np.count_nonzero(~np.isfinite(weights))),
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """Some rows' bytes of codes, scales and biases, [rows, bytes of a row]."""

    codes: Bytes
    scales: Bytes
    biases: Bytes


@dataclass(frozen=True, slots=True)
class _Job:
    weights: Floats
    fmt: Format
    dtype: str
    way: Way
    choose: Choose

    def run(self, first_row: int, last_row: int) -> _Part:
        rows = self.weights[first_row:last_row, self.way.order]
        columns, size = rows.shape[1], self.fmt.group_size
        tiles = Tiles.of(rows, self.fmt)
        places = self.way.order % size
        groups = self.way.order[::size] // size
        scales: list[Bytes] = [_NOTHING] * len(groups)
        biases = scales.copy()
        for start in range(0, columns, _BLOCK):
            end = min(columns, start + _BLOCK)
            for first in range(start, end, size):
                last, group = first + size, int(groups[first // size])
                stored = self._chosen(rows, tiles, first)
                scales[group], biases[group] = stored
                place = Place(first, group * size, places[first:last].astype(np.uint8))
                tiles.round(place, *self._numbers(*stored), self.way.factors)
                tiles.carry((first, last), (last, end), self.way.factors)
            tiles.carry((start, end), (end, columns), self.way.factors)
        return _Part(tiles.codes[: len(rows)], np.hstack(scales), np.hstack(biases))

    def _chosen(self, rows: Floats, tiles: Tiles, first: int) -> tuple[Bytes, Bytes]:
        """Bytes of scales and biases [rows, bytes], the latter none where the format has none."""
        last = first + self.fmt.group_size
        inside = tiles.group(first, len(rows))
        # what overflowed by making up for others goes without
        inside = np.where(np.isfinite(inside), inside, rows[:, first:last])
        importance = self.way.importance[first:last]
        scales, biases = self.choose(inside, self.fmt, importance, self.dtype)
        none = np.empty((len(rows), 0), np.uint8)
        return _raw(scales, len(rows)), none if biases is None else _raw(biases, len(rows))

    def _numbers(self, scales: Bytes, biases: Bytes) -> tuple[Floats, Floats]:
        """Scales and biases as float32 [rows]."""
        if self.fmt.has_bias:
            scale, bias = (to_float32(x.reshape(-1), self.dtype) for x in (scales, biases))
            return scale, bias
        byte = scales.reshape(-1)
        if self.fmt.mode == "nvfp4":
            return E4M3[byte], np.zeros(len(byte), np.float32)
        power = np.ldexp(np.float32(1), byte.astype(np.int32) - 127)
        return power.astype(np.float32), np.zeros(len(byte), np.float32)


def _raw(array: Bytes, rows: int) -> Bytes:
    return np.ascontiguousarray(np.asarray(array)).reshape(-1).view(np.uint8).reshape(rows, -1)
