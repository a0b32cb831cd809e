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
from quantmill.windows import Text, Tokens, default_text, text_of, text_tokens, tokens_digest

if TYPE_CHECKING:
    from quantmill.divergence import Measured, Passed
    from quantmill.model import Model

TOKENS = 8192
"""Tokens that are evaluated unless told otherwise."""

WINDOW = 512
"""Length of a window of them."""

Progress = Callable[[int, int, str], None]
"""Told of steps done, steps in all, and what is being done."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error over windows; None where there is only one window."""

    value: float
    standard_error: float | None


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL(reference || model) per token in nats, over all positions."""

    mean: Estimate
    median: float
    p99: float
    maximum: float


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
        windows = _tokens(ours, chosen, tokens // window, window)
        if theirs is not None:
            _check_tokens(ours, theirs, windows, chosen)
        measured = _measured(ours, theirs, windows, progress)
        return _summed_up(ours, theirs, chosen, windows, measured)


def _source(given: str | Path | ModelName) -> str | Path:
    return given.display if isinstance(given, ModelName) else given


def _tokens(model: Model, text: Text, count: int, length: int) -> Tokens:
    from quantmill import mlxlm
    from quantmill.forward import empty_model

    _, config = empty_model(model)
    return text_tokens(mlxlm.tokenizer_for(model, config), text.text, length, count)


def _check_tokens(ours: Model, theirs: Model, windows: Tokens, text: Text) -> None:
    count, length = windows.shape
    try:
        same = np.array_equal(_tokens(theirs, text, count, length), windows)
    except BadRequest as error:
        if error.kind != "text_too_short":
            raise
        same = False
    if not same:
        raise BadRequest(
            f"{ours.where} and {theirs.where} have different tokenizers",
            kind="different_tokenizers",
            hint="compare a model with what it was made from",
        )


def _measured(
    ours: Model, theirs: Model | None, windows: Tokens, progress: Progress | None
) -> Measured:
    from quantmill.divergence import measure

    reference = None if theirs is None else _passed(theirs, windows, progress)
    model = _passed(ours, windows, progress)
    if reference is not None and reference.forward.vocabulary != model.forward.vocabulary:
        assert theirs is not None
        raise BadRequest(
            f"{ours.where} predicts {model.forward.vocabulary} tokens, "
            f"{theirs.where} {reference.forward.vocabulary}",
            kind="different_vocabularies",
            hint="compare a model with what it was made from",
        )
    label = "comparing" if reference else "predicting"

    def told(done: int, total: int) -> None:
        if progress is not None:
            progress(done, total, f"{label}, tokens")

    return measure(model, reference, windows, told)


def _passed(model: Model, windows: Tokens, progress: Progress | None) -> Passed:
    from quantmill.divergence import Passed
    from quantmill.forward import Forward

    forward = Forward(model, windows)
    for index in range(len(forward)):
        if progress is not None:
            progress(index, len(forward), f"{model.where}, blocks")
        forward.step(index)
    return Passed(forward, forward.finish())


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
    return Divergence(_mean(kl), float(figures[0]), float(figures[1]), float(kl.max()))
