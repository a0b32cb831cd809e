"""A real language model, SmolLM2-135M-Instruct, from GGUF to an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from quantmill.creation import create
from quantmill.evaluation import evaluate
from quantmill.export import export
from quantmill.generate import Chat, Message
from quantmill.load import open_model
from quantmill.store import Store
from quantmill.verification import verify

mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (quantmill[run])")

QUESTION: list[Message] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, smollm: Path) -> Store:
    found = Store(tmp_path_factory.mktemp("store"))
    create("smollm2:int8", smollm, store=found, quantize="int8")
    create("smollm2:bf16", smollm, store=found, requantize="bf16")
    create("smollm2:codes", smollm, store=found)
    return found


def answer(store: Store, name: str) -> tuple[str, list[int]]:
    pieces = list(Chat(open_model(name, store=store)).stream(QUESTION, max_tokens=12))
    return "".join(p.text for p in pieces), [p.token for p in pieces]


def test_the_quantized_model_answers_as_the_unquantized_one(store: Store) -> None:
    """The greedy answer of int8 begins with the tokens of the model it was made from."""
    text, tokens = answer(store, "smollm2:int8")
    assert "Paris" in text
    assert answer(store, "smollm2:bf16")[1][:6] == tokens[:6]


def test_the_model_with_the_codes_of_its_file_answers_as_the_decoded_one(store: Store) -> None:
    """Kept codes and the numbers they stand for give the same greedy answer."""
    assert answer(store, "smollm2:codes") == answer(store, "smollm2:bf16")


@pytest.mark.parametrize("name", ["smollm2:int8", "smollm2:codes"])
def test_mlx_lm_gives_the_same_answer_for_the_same_weights(
    name: str, store: Store, tmp_path: Path
) -> None:
    """mlx-lm itself, loading the exported directory, generates the same text."""
    export(open_model(name, store=store), tmp_path / "out", "mlx-lm")
    module, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    module.set_dtype(mx.float32)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)
    theirs = mlx_lm.generate(module, tokenizer, prompt, max_tokens=12)
    assert theirs == answer(store, name)[0]


def test_eight_bits_predict_nearly_what_the_file_does(store: Store, smollm: Path) -> None:
    """A few tokens are enough to tell 8 bits from noise, and to see that codes are kept exactly."""
    few: Any = {"tokens": 64, "window": 32, "store": store}
    found = evaluate("smollm2:int8", smollm, **few)
    assert found.divergence is not None
    assert found.agreement is not None
    assert 1e-5 < found.divergence.mean.value < 0.05
    assert found.agreement.value > 0.85
    same = evaluate("smollm2:codes", smollm, **few)
    assert same.divergence is not None
    assert abs(same.divergence.maximum) < 1e-5


def test_the_stored_model_verifies(store: Store) -> None:
    """Every format of a language model from GGUF are whole."""
    assert not verify(store).damage
