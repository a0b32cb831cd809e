"""Evaluate: what quantizing did to a model, in perplexity and in divergence from its reference.

docs/fidelity.md gives the formulas and the protocol.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from quantmill import blas
from quantmill.errors import BadRequest
from quantmill.names import ModelName
from quantmill.opening import Report
from quantmill.reference import opened
from quantmill.store import Store
from quantmill.windows import Ids, Text, Tokens, default_text, text_ids, text_of, tokens_digest

if TYPE_CHECKING:
    from quantmill.divergence import Measured, Passed, Reference
    from quantmill.model import Model

TOKENS = 8192
"""Tokens that are evaluated unless told otherwise."""

WINDOW = 512
"""Length of a window of them."""

KL_EDGES = (0.0, *(float(f"{10 ** (step / 4):.3g}") for step in range(-24, 9)))
"""Edges of the histogram of divergences, in nats: four columns for each power of ten."""

Progress = Callable[[int, int, str], None]
"""Told of steps done, steps in all, and what is being done."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error over windows; None where there is only one window."""

    value: float
    standard_error: float | None


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many positions have a divergence between each edge and the next; the edges are KL_EDGES.

    What rounding makes negative is in the first column, what is beyond the last edge in the last.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL(reference || model) per token in nats, over all positions."""

    mean: Estimate
    median: float
    p99: float
    maximum: float
    histogram: Histogram


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate` found.

    `text_digest` is the SHA-256 of the text in UTF-8, `tokens_digest` that of the windows
    (windows.tokens_digest). The last three are None without a reference.
    """

    model: str
    reference: str | None
    text: str
    python: str | None
    text_digest: str
    windows: int
    length: int
    tokens_digest: str
    perplexity: Estimate
    reference_perplexity: Estimate | None = None
    divergence: Divergence | None = None
    agreement: Estimate | None = None


def evaluate(
    model: str | Path | ModelName,
    against: str | Path | ModelName | None = None,
    *,
    text: str | Path | None = None,
    tokens: int = TOKENS,
    window: int = WINDOW,
    store: Store | None = None,
    progress: Progress | None = None,
    fetching: Report | None = None,
) -> Evaluation:
    """Perplexity of a model, and how far its predictions are from those of `against`.

    Both are names of stored models, checkpoint directories, GGUF files or hub repositories. `text`
    is the path of a UTF-8 file, None Python's own documentation (windows.default_text); `tokens`
    of it are taken in windows of `window` tokens spread over the text. Weights are dequantized to
    float32 and everything is computed in float32, a block of a model at a time.

    Raises BadRequest for models with different vocabularies or tokenizers and for a text that is
    too short, BadPlan for models without a forward pass or a tokenizer, NotFound and BadSource.
    """
    blas.preload()  # before anything loads MLX
    if window < 2 or tokens < window:
        raise BadRequest(
            f"{tokens} tokens in windows of {window}", hint="a window has 2 tokens or more"
        )
    chosen = default_text() if text is None else text_of(Path(text))
    store = store or Store()
    other = nullcontext(None) if against is None else opened(_source(against), store, fetching)
    with opened(_source(model), store, fetching) as ours, other as theirs:
        if theirs is not None:
            judge = Judge(theirs, chosen, tokens=tokens, window=window, progress=progress)
            return judge.evaluate(ours)
        windows = _ids(ours, chosen).windows(window, tokens // window)
        return _summed_up(ours, None, chosen, windows, _measured(ours, windows, progress))


class Judge:
    """One reference that any number of models are compared with, on the same windows of a text.

    What is asked of the reference (its hidden states, and of each position ln Z and the likeliest
    token) is computed once, when the first model is compared. The reference must stay open.

        with opened("smollm2:bf16", store) as reference:
            judge = Judge(reference, default_text())
            for name in names:
                with opened(name, store) as model:
                    print(judge.evaluate(model).divergence)
    """

    def __init__(
        self,
        reference: Model,
        text: Text,
        *,
        tokens: int = TOKENS,
        window: int = WINDOW,
        windows: Tokens | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Windows as `evaluate` takes them, or `windows`, ids of that text, int32 [count, length].

        Raises BadRequest for a text that is too short, BadPlan for a reference without a tokenizer.
        """
        self._model, self._text, self._progress = reference, text, progress
        self._ids = _ids(reference, text)
        self.windows = self._ids.windows(window, tokens // window) if windows is None else windows
        self._found: Reference | None = None

    def evaluate(self, model: Model) -> Evaluation:
        """`measure`'s figures, summed up."""
        return self.summed_up(model, self.measure(model))

    def measure(self, model: Model) -> Measured:
        """What a model predicts at each position, beside what the reference does.

        Raises BadRequest for other tokenizers or vocabularies, BadPlan for models without a forward
        pass or a tokenizer.
        """
        from quantmill.divergence import compare

        if not _ids(model, self._text).same_as(self._ids):
            raise BadRequest(
                f"{model.where} and {self._model.where} have different tokenizers",
                kind="different_tokenizers",
                hint="compare a model with what it was made from",
            )
        reference = self._reference()
        passed = _passed(model, self.windows, self._progress)
        theirs, ours = reference.passed.forward.vocabulary, passed.forward.vocabulary
        if theirs != ours:
            raise BadRequest(
                f"{model.where} predicts {ours} tokens, {self._model.where} {theirs}",
                kind="different_vocabularies",
                hint="compare a model with what it was made from",
            )
        told = _told(self._progress, "comparing, tokens")
        return compare(passed, reference, told)

    def summed_up(self, model: Model, measured: Measured) -> Evaluation:
        """The figures of `measure` as an evaluation."""
        return _summed_up(model, self._model, self._text, self.windows, measured)

    def _reference(self) -> Reference:
        from quantmill.divergence import Reference

        if self._found is None:
            passed = _passed(self._model, self.windows, self._progress)
            self._found = Reference(passed, self.windows)
        return self._found


def _source(given: str | Path | ModelName) -> str | Path:
    return given.display if isinstance(given, ModelName) else given


def _ids(model: Model, text: Text) -> Ids:
    from quantmill import mlxlm
    from quantmill.forward import empty_model

    _, config = empty_model(model)
    return text_ids(mlxlm.tokenizer_for(model, config), text.text)


def _measured(model: Model, windows: Tokens, progress: Progress | None) -> Measured:
    from quantmill.divergence import measure

    return measure(
        _passed(model, windows, progress), windows, _told(progress, "predicting, tokens")
    )


def _passed(model: Model, windows: Tokens, progress: Progress | None) -> Passed:
    from quantmill.divergence import Passed
    from quantmill.forward import Forward

    forward = Forward(model, windows)
    for index in range(len(forward)):
        if progress is not None:
            progress(index, len(forward), f"{model.where}, blocks")
        forward.step(index)
    return Passed(forward, forward.finish())


def _told(progress: Progress | None, label: str) -> Callable[[int, int], None] | None:
    return None if progress is None else (lambda done, total: progress(done, total, label))


# -- figures ---------------------------------------------------------------------------------------


def _summed_up(
    ours: Model, theirs: Model | None, text: Text, windows: Tokens, measured: Measured
) -> Evaluation:
    found = measured.reference_surprise
    kl, agrees = measured.kl, measured.agrees
    digest = hashlib.sha256(text.text.encode("utf-8")).hexdigest()
    return Evaluation(
        ours.where,
        theirs.where if theirs else None,
        text.name,
        text.python,
        f"sha256:{digest}",
        windows.shape[0],
        windows.shape[1],
        tokens_digest(windows),
        _perplexity(measured.surprise),
        None if found is None else _perplexity(found),
        None if kl is None else _divergence(kl),
        None if agrees is None else _mean(agrees.astype(np.float64)),
    )


def _mean(figures: npt.NDArray[np.float64]) -> Estimate:
    """The mean of [windows, positions], its standard error from the means of windows."""
    means = figures.mean(axis=1)
    if len(means) < 2:
        return Estimate(float(means[0]), None)
    error = means.std(ddof=1) / np.sqrt(len(means))
    return Estimate(float(means.mean()), float(error))


def _perplexity(surprise: npt.NDArray[np.float64]) -> Estimate:
    """The exponential of the mean; its error by that function's slope."""
    mean = _mean(surprise)
    value = float(np.exp(mean.value))
    error = mean.standard_error
    return Estimate(value, None if error is None else value * error)


def _divergence(kl: npt.NDArray[np.float64]) -> Divergence:
    figures: Any = np.quantile(kl, [0.5, 0.99])
    counts, _ = np.histogram(np.clip(kl, KL_EDGES[0], KL_EDGES[-1]), KL_EDGES)
    histogram = Histogram(KL_EDGES, tuple(map(int, counts)))
    return Divergence(_mean(kl), float(figures[0]), float(figures[1]), float(kl.max()), histogram)
