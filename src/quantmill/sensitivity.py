"""What quantizing a tensor does to a model's predictions, for every format that it may have.

Each tensor is quantized alone to PROBE, and the divergence of the predictions measured. Of the
other formats only the weighted error is computed, to which the divergence is in proportion while
it is small: both are quadratic in the change of the weights. So a pass for each tensor is enough.
docs/fidelity.md has the formulas and where they are from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from quantmill.activations import Moments, of_expert
from quantmill.branches import BRANCH_BYTES, Change, Progress, Variant, divergences
from quantmill.decode import Packed, decode_float32
from quantmill.elements import from_float32
from quantmill.errors import BadPlan
from quantmill.formats import Format
from quantmill.kernels import MLX, in_use
from quantmill.plans import AWARE, RTN, SEARCH
from quantmill.quantize import quantize
from quantmill.searching import search
from quantmill.weightings import is_worse_unweighed

if TYPE_CHECKING:
    import mlx.core as mx

    from quantmill.model import Model
    from quantmill.weights import Quantized

Floats = npt.NDArray[np.float32]

PROBE_BITS = 3
"""Few enough that every divergence is far above rounding, enough that most stay small."""

_PROBE_GROUPS = (64, 32, 128)

SAMPLE = 1 << 17
"""Weights of a tensor, in whole rows, that errors of its formats are computed from."""

_FEWEST_ROWS = 32


@dataclass(frozen=True, slots=True)
class Subject:
    """A tensor whose format is to be chosen: its name in a plan, and what mlx-lm makes of it.

    `matrices` are names of mlx-lm's weights, of which each row is a row of the tensor. `dtype` is
    that of the weights before they are quantized, and of scales. With the method SEARCH `columns`
    is what the search counts their columns by, one for each matrix of a stack; none where that is
    not known.
    """

    name: str
    matrices: tuple[str, ...]
    dtype: str
    formats: tuple[Format, ...]
    columns: tuple[Floats, ...] = ()

    @property
    def probe(self) -> Format:
        """The format that it is measured in; raises BadPlan where no group size fits."""
        for group in _PROBE_GROUPS:
            found = Format("affine", PROBE_BITS, group)
            if any(fmt.group_size == group for fmt in self.formats):
                return found
        raise BadPlan(f"{self.name!r} has no format that it could be measured in")


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The divergence that the probe of a tensor makes, in nats, and weighted errors by format."""

    probe: Format
    divergence: float
    errors: Mapping[Format, float]

    def cost(self, fmt: Format | None) -> float:
        """The divergence predicted for the tensor alone in a format; 0 where it is kept."""
        base = self.errors[self.probe]
        if fmt is None or not base > 0:
            return 0.0
        return self.divergence * self.errors[fmt] / base


class Measuring:
    """A model, tokens to measure with, and the method by which weights are quantized.

    `moments` weigh the columns of a weight in its error, and with the methods AWARE and GPTQ in
    the search; all count the same of what has none. GPTQ is measured as AWARE: what its feedback
    gains is gained in all formats.
    """

    def __init__(
        self,
        model: Model,
        windows: npt.NDArray[np.integer[Any]],
        subjects: Sequence[Subject],
        moments: Mapping[str, Moments],
        *,
        method: str = AWARE,
    ) -> None:
        from quantmill import mlxlm

        self._model, self._windows, self._method = model, windows, method
        self._subjects = subjects
        stored = mlxlm.stored_names(model)
        self._weighing = {
            matrix: _Weighing.of([moments.get(name) for name in stored[matrix]])
            for subject in subjects
            for matrix in subject.matrices
        }

    def sensitivities(
        self, *, most_bytes: int = BRANCH_BYTES, progress: Progress | None = None
    ) -> dict[str, Sensitivity]:
        """Of every subject, by its name. Memory and errors are those of `divergences`."""
        probes = [_Probe(self, subject) for subject in self._subjects]
        found = divergences(
            self._model, self._windows, [probe.variant for probe in probes],
            most_bytes=most_bytes, progress=progress,
        )  # fmt: skip
        return {
            probe.subject.name: Sensitivity(probe.subject.probe, max(0.0, value), probe.errors())
            for probe, value in zip(probes, found, strict=True)
        }

    def divergences(
        self,
        assignments: Sequence[Mapping[str, Format | None]],
        *,
        progress: Progress | None = None,
    ) -> list[float]:
        """The divergence of the model with all subjects in formats at once, for each assignment.

        Formats go by the names of subjects; None, and a name that is not there, keep a tensor.
        """
        variants = [
            {
                matrix: self.change(subject, matrix, fmt)
                for subject in self._subjects
                if (fmt := assigned.get(subject.name)) is not None
                for matrix in subject.matrices
            }
            for assigned in assignments
        ]
        return divergences(self._model, self._windows, variants, progress=progress)

    def change(self, subject: Subject, matrix: str, fmt: Format) -> Change:
        """What quantizing one of a subject's matrices makes of it."""

        def change(weight: mx.array) -> mx.array:
            import mlx.core as mx

            values = np.asarray(weight)
            parts = self.parts(subject, matrix, values)
            found = [self.rounded(part, part.values, subject.dtype, fmt) for part in parts]
            return mx.array(np.stack(found).reshape(values.shape))

        return change

    def rounded(self, part: Part, values: Floats, dtype: str, fmt: Format) -> Floats:
        """Rows of a part [rows, columns] after quantization, decoded with scales as float32."""
        raw = from_float32(np.ascontiguousarray(values).reshape(-1), dtype).data
        if part.columns is None or (part.equal and is_worse_unweighed(fmt)):
            made = quantize(raw, dtype, fmt)
        else:
            made = search(raw, dtype, fmt, part.columns.data)
        return _decoded(made, dtype, fmt, values.shape)

    def parts(self, subject: Subject, matrix: str, values: Floats) -> list[Part]:
        """The matrices of a weight [rows, columns] or [experts, rows, columns]."""
        found = self._weighing[matrix].parts(values)
        if self._method == RTN:
            return [replace(part, columns=None) for part in found]
        if self._method != SEARCH:
            return found
        own = subject.columns
        if not own:
            equal = np.ones(values.shape[-1], np.float32)
            return [replace(part, columns=equal, equal=True) for part in found]
        many = own if len(own) == len(found) else (own[0],) * len(found)
        return [replace(p, columns=h, equal=False) for p, h in zip(found, many, strict=True)]


@dataclass(frozen=True, slots=True)
class Part:
    """A matrix of a weight: what its columns count in its error and, if there is one, in a search.

    `equal` says that all count the same in the search, `tokens` how much the matrix counts.
    """

    values: Floats
    moments: Floats
    tokens: float
    columns: Floats | None
    equal: bool = False


@dataclass(frozen=True, slots=True)
class _Weighing:
    """Second moments [columns] of a matrix, or [experts, columns] of a stack, and their tokens."""

    moments: Floats | None
    tokens: npt.NDArray[np.int64] | None = None

    @classmethod
    def of(cls, found: Sequence[Moments | None]) -> _Weighing:
        """From the statistics of what a matrix is made of: one, or one for each expert."""
        known = [one for one in found if one is not None]
        if not known:
            return cls(None)
        if known[0].values.ndim == 2 or len(found) == 1:
            return cls._checked(known[0].values, known[0].tokens)
        columns = known[0].values.shape[-1]
        return cls._checked(
            np.stack([np.zeros(columns, np.float32) if m is None else m.values for m in found]),
            np.array([0 if m is None else int(m.tokens) for m in found], np.int64),
        )

    @classmethod
    def _checked(cls, values: Floats, tokens: npt.NDArray[np.int64]) -> _Weighing:
        if values.ndim == 1:
            return cls(values if np.isfinite(values).all() and values.any() else None)
        rows, counts = list(values), tokens.tolist()
        members = [of_expert(rows, counts, member) for member in range(len(rows))]
        values = np.stack(members).astype(np.float32)
        return cls(values, tokens) if np.isfinite(values).all() and values.any() else cls(None)

    def parts(self, values: Floats) -> list[Part]:
        """The matrices of a weight, searched for by their moments."""
        matrices = values.reshape(-1, *values.shape[-2:])
        if self.moments is None or self.moments.shape[-1] != values.shape[-1]:
            equal = np.ones(values.shape[-1], np.float32)
            return [Part(matrix, equal, 1.0, equal, True) for matrix in matrices]
        if self.moments.ndim == 1 or self.tokens is None or len(self.tokens) != len(matrices):
            moments = self.moments if self.moments.ndim == 1 else self.moments.mean(axis=0)
            return [Part(matrix, moments, 1.0, moments) for matrix in matrices]
        return [
            Part(matrix, moments, float(count), moments)
            for matrix, moments, count in zip(matrices, self.moments, self.tokens, strict=True)
        ]


class _Probe:
    """A subject quantized alone; while its weights are there, errors of all its formats."""

    def __init__(self, measuring: Measuring, subject: Subject) -> None:
        self.subject = subject
        self._measuring = measuring
        self._errors: dict[str, dict[Format, float]] = {}

    @property
    def variant(self) -> Variant:
        """The model with this tensor alone changed."""
        return {matrix: self._change(matrix) for matrix in self.subject.matrices}

    def errors(self) -> dict[Format, float]:
        """Weighted errors of the formats, over all matrices."""
        formats = {self.subject.probe, *self.subject.formats}
        return {fmt: sum(one[fmt] for one in self._errors.values()) for fmt in formats}

    def _change(self, matrix: str) -> Change:
        change = self._measuring.change(self.subject, matrix, self.subject.probe)

        def noted(weight: mx.array) -> mx.array:
            if matrix not in self._errors:  # a tied embedding is asked for twice
                self._errors[matrix] = self._of_formats(matrix, np.asarray(weight))
            return change(weight)

        return noted

    def _of_formats(self, matrix: str, values: Floats) -> dict[Format, float]:
        parts = self._measuring.parts(self.subject, matrix, values)
        rows = -(-max(_FEWEST_ROWS, SAMPLE // values.shape[-1]) // len(parts))
        sampled = [(part, _some(part.values, rows)) for part in parts]

        def error(fmt: Format) -> float:
            return sum(
                self._error(part, some, fmt) * len(part.values) * part.tokens
                for part, some in sampled
            )

        formats = sorted({self.subject.probe, *self.subject.formats})
        if in_use() == MLX:
            return {fmt: error(fmt) for fmt in formats}
        with ThreadPoolExecutor(_THREADS) as pool:  # the kernels run without Python's lock
            return dict(zip(formats, pool.map(error, formats), strict=True))

    def _error(self, part: Part, values: Floats, fmt: Format) -> float:
        """The mean of a row's weighted squared error."""
        rounded = self._measuring.rounded(part, values, self.subject.dtype, fmt)
        squares = np.square(values.astype(np.float64) - rounded)
        return float((squares @ part.moments.astype(np.float64)).mean())


_THREADS = 4


def _some(values: Floats, rows: int) -> Floats:
    """So many rows spread evenly over a matrix."""
    count = len(values)
    if rows >= count:
        return values
    return values[np.linspace(0, count - 1, rows).astype(np.int64)]


def _decoded(made: Quantized, dtype: str, fmt: Format, shape: tuple[int, ...]) -> Floats:
    """As float32, scales and biases taken as float32 too, as `eval` does."""
    from quantmill.elements import to_float32

    rows, columns = shape
    codes = np.frombuffer(made.weight, np.uint32).reshape(rows, fmt.packed_columns(columns))
    groups = rows, columns // fmt.group_size
    if not fmt.has_bias:
        scales = np.frombuffer(made.scales, np.uint8).reshape(groups)
        packed = Packed(codes, scales, None, None, False, ["U8"])
    else:
        assert made.biases is not None
        parts = [
            to_float32(np.frombuffer(part, np.uint8), dtype).reshape(groups)
            for part in (made.scales, made.biases)
        ]
        packed = Packed(codes, parts[0], parts[1], None, False, ["F32", "F32"])
    found = decode_float32(packed, fmt)  # None without the kernels
    return _by_mlx(codes, packed.scales, packed.biases, fmt) if found is None else found


def _by_mlx(
    codes: npt.NDArray[Any], scales: npt.NDArray[Any], biases: npt.NDArray[Any] | None, fmt: Format
) -> Floats:
    import mlx.core as mx

    from quantmill.denseweights import StoredWeight

    more = None if biases is None else mx.array(biases)
    return np.asarray(StoredWeight(mx.array(codes), mx.array(scales), more, fmt).dense())
