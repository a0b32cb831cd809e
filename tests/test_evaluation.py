"""Perplexity and divergence: NumPy's figures from mlx-lm's logits, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import quantmill
from checkpoints import fixture
from quantmill import divergence, mlxlm
from quantmill.creation import create
from quantmill.errors import BadPlan, BadRequest, NotFound
from quantmill.evaluation import KL_EDGES, Evaluation, Judge
from quantmill.evaluationreport import evaluation_json, evaluation_lines
from quantmill.load import open_model
from quantmill.reportdata import histogram_of
from quantmill.store import Store
from quantmill.windows import text_of, text_tokens, tokens_digest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (quantmill[run])")

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 20
COUNT, LENGTH = 5, 24
NAMES = ["hf-llama-bf16", "hf-qwen3-tied-bf16", "hf-gemma3-bf16", "hf-qwen3-moe-bf16"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    found = Store(tmp_path_factory.mktemp("store"))
    for name in NAMES:
        create(f"{name}:int4", fixture(name), store=found, quantize="int4")
    return found


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "two-cities.txt"
    path.write_text(TEXT)
    return path


def evaluated(store: Store, text: Path, model: Any, against: Any = None) -> Evaluation:
    return quantmill.evaluate(
        model, against, text=text, tokens=COUNT * LENGTH + 3, window=LENGTH, store=store
    )


def log_probabilities(model: Any, windows: Any) -> Any:
    """Float64 [windows, length, vocabulary], from the logits of mlx-lm's whole module."""
    module, _ = mlxlm.build(model, mx.float32)
    logits = np.array(module(mx.array(windows))).astype(np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def windows_for(name: str) -> Any:
    model = open_model(fixture(name))
    return text_tokens(mlxlm.tokenizer_for(model, model.config), TEXT, LENGTH, COUNT)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("positions", [512, 7])
def test_figures_are_numpys_from_mlx_lms_logits(
    store: Store, text: Path, name: str, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many positions are compared at once: the definitions, in float64."""
    monkeypatch.setattr(divergence, "_POSITIONS", positions)
    windows = windows_for(name)
    ours = log_probabilities(open_model(f"{name}:int4", store=store), windows)
    theirs = log_probabilities(open_model(fixture(name)), windows)
    found = evaluated(store, text, f"{name}:int4", fixture(name))

    kl = (np.exp(theirs) * (theirs - ours)).sum(-1)
    same = (ours.argmax(-1) == theirs.argmax(-1)).mean(1)
    root = np.sqrt(COUNT)
    assert (found.windows, found.length) == windows.shape
    assert found.tokens_digest == tokens_digest(windows)
    assert found.divergence is not None
    assert found.agreement is not None
    assert found.reference_perplexity is not None
    spread = kl.mean(1).std(ddof=1) / root
    assert found.divergence.mean.value == pytest.approx(kl.mean(), rel=1e-4)
    assert found.divergence.mean.standard_error == pytest.approx(spread, rel=1e-3)
    assert found.divergence.median == pytest.approx(np.median(kl), rel=1e-3)
    assert found.divergence.p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    assert found.divergence.maximum == pytest.approx(kl.max(), rel=1e-3)
    assert found.agreement.value == pytest.approx(same.mean())
    assert found.agreement.standard_error == pytest.approx(same.std(ddof=1) / root)
    for predicted, perplexity in ((ours, found.perplexity), (theirs, found.reference_perplexity)):
        chosen = np.take_along_axis(predicted[:, :-1], windows[:, 1:, None], -1)[..., 0]
        surprise = -chosen.mean(1)
        value = np.exp(surprise.mean())
        assert perplexity.value == pytest.approx(value, rel=1e-5)
        error = value * surprise.std(ddof=1) / root
        assert perplexity.standard_error == pytest.approx(error, rel=1e-3)


def test_a_model_does_not_diverge_from_itself(store: Store, text: Path) -> None:
    """Zero at every position, the same token every time, one perplexity."""
    found = evaluated(store, text, "hf-llama-bf16:int4", "hf-llama-bf16:int4")
    assert found.divergence is not None
    assert found.agreement is not None
    assert abs(found.divergence.maximum) < 1e-6
    assert found.agreement.value == 1.0
    assert found.reference_perplexity == found.perplexity


def test_the_same_question_has_the_same_answer(store: Store, text: Path) -> None:
    """Bit for bit on one machine."""
    answers = [
        evaluated(store, text, "hf-gemma3-bf16:int4", fixture("hf-gemma3-bf16")) for _ in range(2)
    ]
    assert answers[0] == answers[1]


def test_without_a_reference_there_is_perplexity_alone(store: Store, text: Path) -> None:
    """Values that do not apply are null, and not shown to people."""
    found = evaluated(store, text, "hf-llama-bf16:int4")
    compared = evaluated(store, text, "hf-llama-bf16:int4", fixture("hf-llama-bf16"))
    assert found.perplexity == compared.perplexity
    document = evaluation_json(found)
    assert document["kl"] is document["reference"] is document["top1_agreement"] is None
    assert document.keys() == evaluation_json(compared).keys()
    assert not [line for line in evaluation_lines(found) if "KL" in line or "reference" in line]
    assert any("nats" in line for line in evaluation_lines(compared))


def test_the_histogram_counts_every_position(store: Store, text: Path) -> None:
    """Under the same edges for any model, and as the report page reads it; null alone."""
    found = evaluated(store, text, "hf-llama-bf16:int4", fixture("hf-llama-bf16"))
    same = evaluated(store, text, "hf-llama-bf16:int4", "hf-llama-bf16:int4")
    assert found.divergence is not None
    assert same.divergence is not None
    document = json.loads(json.dumps(evaluation_json(found)))
    drawn = histogram_of(document)
    assert drawn is not None
    assert drawn.edges == KL_EDGES == same.divergence.histogram.edges
    assert sum(drawn.counts) == COUNT * LENGTH
    below = sum(c for c, edge in zip(drawn.counts, drawn.edges[1:], strict=True)
                if edge <= found.divergence.median)  # fmt: skip
    assert below <= COUNT * LENGTH / 2
    assert same.divergence.histogram.counts[0] == COUNT * LENGTH
    assert evaluation_json(evaluated(store, text, "hf-llama-bf16:int4"))["kl_histogram"] is None


def test_one_reference_judges_several_models(store: Store, text: Path) -> None:
    """The same figures as one at a time; what is asked of the reference is computed once."""
    with open_model(fixture("hf-llama-bf16")) as reference:
        judge = Judge(reference, text_of(text), tokens=COUNT * LENGTH + 3, window=LENGTH)
        for name in ("hf-llama-bf16:int4", "hf-llama-bf16:int8", "hf-llama-bf16:int4"):
            if name.endswith("int8"):
                create(name, fixture("hf-llama-bf16"), store=store, quantize="int8")
            found = judge.evaluate(open_model(name, store=store))
            assert found == evaluated(store, text, name, fixture("hf-llama-bf16"))
        windows = judge.windows[:2]
        few = Judge(reference, text_of(text), windows=windows)
        measured = few.measure(open_model("hf-llama-bf16:int4", store=store))
        assert measured.kl is not None
        assert measured.kl.shape == windows.shape


def test_one_window_has_no_standard_error(store: Store, text: Path) -> None:
    """A spread needs two."""
    found = quantmill.evaluate("hf-llama-bf16:int4", text=text, tokens=40, window=40, store=store)
    assert found.windows == 1
    assert found.perplexity.standard_error is None
    assert "±" not in "".join(evaluation_lines(found))


def test_the_default_text_says_which_python_it_comes_from(store: Store) -> None:
    """Python's own documentation changes with its version."""
    found = quantmill.evaluate("hf-llama-bf16:int4", tokens=64, window=32, store=store)
    assert found.python is not None
    assert found.text in evaluation_lines(found)[1]
    assert found.python in evaluation_lines(found)[1]


def test_progress_names_what_is_done(store: Store, text: Path) -> None:
    """Blocks of the reference, blocks of the model, then tokens compared."""
    told: list[tuple[int, int, str]] = []
    quantmill.evaluate(
        "hf-llama-bf16:int4", "hf-llama-bf16:int4", text=text, tokens=48, window=24, store=store,
        progress=lambda *step: told.append(step),
    )  # fmt: skip
    assert {label for *_, label in told} == {"hf-llama-bf16:int4, blocks", "comparing, tokens"}
    assert told[-1][:2] == (48, 48)


# -- sources ---------------------------------------------------------------------------------------


def test_coded_checkpoints_and_gguf_files_are_references(store: Store, text: Path) -> None:
    """What cannot be opened where it lies is imported for the occasion, and nothing stays."""
    name = "hf-deepseek-v3-fp8-block"
    create("deepseek", fixture(name), store=store)
    before = list(store.list_names())
    found = evaluated(store, text, "deepseek", fixture(name))
    assert found.reference == str(fixture(name))
    assert found.divergence is not None
    assert abs(found.divergence.maximum) < 1e-6
    assert list(store.list_names()) == before


def test_directories_of_mlx_lm_are_opened_as_they_are(store: Store, text: Path) -> None:
    """Its codes need no import, so nothing is written."""
    directory = fixture("mlx-affine-8bit-gs64")
    found = evaluated(store, text, directory, directory)
    assert found.divergence is not None
    assert abs(found.divergence.mean.value) < 1e-6


# -- what cannot be compared -----------------------------------------------------------------------


def test_models_with_other_tokenizers_are_not_compared(store: Store, text: Path) -> None:
    """Probabilities of different tokens say nothing about each other."""
    other = text.parent / "other"
    other.mkdir(exist_ok=True)
    for path in fixture("hf-llama-bf16").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    ordered = sorted(vocabulary, key=vocabulary.get)
    letters = [token for token in ordered if token.isalpha()]
    swapped = dict(zip(letters, [vocabulary[t] for t in reversed(letters)], strict=True))
    tokenizer["model"]["vocab"] = vocabulary | swapped
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(BadRequest, match="different tokenizers") as caught:
        evaluated(store, text, "hf-llama-bf16:int4", other)
    assert caught.value.hint


def test_heads_of_other_sizes_are_not_compared(
    store: Store, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens, but one model can predict more of them."""
    from quantmill.forward import Forward

    sizes = iter((320, 384))
    monkeypatch.setattr(Forward, "_vocabulary", lambda *_: next(sizes))
    with pytest.raises(BadRequest, match="predicts 384 tokens, hf-llama-bf16:int4 320"):
        evaluated(store, text, "hf-llama-bf16:int4", "hf-llama-bf16:int4")


def test_models_without_a_forward_pass(store: Store, text: Path, minilm: Path) -> None:
    """Embedding models and diffusers pipelines: the error says what compares their weights."""
    for source in (minilm, fixture("diffusers-z-image")):
        with pytest.raises(BadPlan, match="no forward pass") as caught:
            evaluated(store, text, source)
        assert "weights" in (caught.value.hint or "")


def test_what_is_not_there_and_what_is_too_short(store: Store, text: Path, tmp_path: Path) -> None:
    """Names, texts and windows are checked before anything is computed."""
    with pytest.raises(NotFound, match="absent"):
        evaluated(store, text, "absent")
    with pytest.raises(NotFound, match="gone"):
        evaluated(store, text, "hf-llama-bf16:int4", tmp_path / "gone")
    with pytest.raises(BadRequest, match="too few"):
        quantmill.evaluate("hf-llama-bf16:int4", text=text, tokens=10**6, store=store)
    with pytest.raises(BadRequest, match="5 tokens in windows of 8"):
        quantmill.evaluate("hf-llama-bf16:int4", text=text, tokens=5, window=8, store=store)
