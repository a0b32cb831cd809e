"""Statistics of what linear layers are given, beside NumPy's of mlx-lm's own activations."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from checkpoints import fixture
from quantmill import mlxlm
from quantmill.creation import create
from quantmill.errors import BadRequest, BadSource, StoreError
from quantmill.load import open_model
from quantmill.store import Store
from quantmill.windows import default_text, random_tokens, text_of, text_tokens, tokens_digest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (quantmill[run])")

from quantmill.activations import Moments, Passes, gram_matrices, second_moments

WINDOWS = random_tokens(320, 9, 150, seed=1)
UP = "model.layers.1.mlp.up_proj.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"


def inputs_of_the_second_mlp() -> Any:
    """What mlx-lm's own forward pass gives gate and up of the second block."""
    module, _ = mlxlm.build(open_model(fixture("hf-llama-bf16")), mx.float32)
    blocks: Any = module.model.layers
    hidden = blocks[0](module.model.embed_tokens(mx.array(WINDOWS)), "causal")
    block = blocks[1]
    attended = hidden + block.self_attn(block.input_layernorm(hidden), "causal")
    return np.array(block.post_attention_layernorm(attended)).reshape(-1, 128).astype(np.float64)


def test_moments_and_grams_are_those_of_mlx_lms_activations() -> None:
    """Means of squares and X'X of the same numbers, computed by NumPy in float64."""
    x = inputs_of_the_second_mlp()
    moments = second_moments(open_model(fixture("hf-llama-bf16")), WINDOWS)
    assert moments[UP].values.dtype == np.float32
    assert int(moments[UP].tokens) == WINDOWS.size
    np.testing.assert_allclose(moments[UP].values, (x**2).mean(0), rtol=1e-4)
    grams: dict[str, Any] = {}
    for block in gram_matrices(open_model(fixture("hf-llama-bf16")), WINDOWS):
        grams |= block
    assert grams.keys() == moments.keys()
    found = grams[UP].products
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, x.T @ x, atol=1e-4 * np.abs(x.T @ x).max())
    for name, gram in grams.items():
        diagonal = np.diag(gram.products) / gram.tokens
        np.testing.assert_allclose(diagonal, moments[name].values, rtol=1e-5)


def test_weights_with_one_input_share_its_statistic() -> None:
    """Gate and up are the same object: it is computed once."""
    moments = second_moments(open_model(fixture("hf-llama-bf16")), WINDOWS)
    assert moments[UP] is moments[GATE]
    assert "model.embed_tokens.weight" not in moments
    assert "lm_head.weight" in moments


def test_a_tied_embedding_has_the_statistic_of_the_head() -> None:
    """Rows that are looked up multiply nothing; as a head the table does."""
    moments = second_moments(open_model(fixture("hf-qwen3-tied-bf16")), WINDOWS)
    assert moments["model.embed_tokens.weight"].values.shape == (128,)


def test_experts_of_a_stack_are_those_stored_singly(tmp_path: Path) -> None:
    """Each expert's statistic is of its own tokens, whichever way the experts are stored."""
    store = Store(tmp_path)
    create("stack", fixture("hf-qwen3-moe-bf16"), store=store)
    stack = second_moments(open_model("stack", store=store), WINDOWS)
    single = second_moments(open_model(fixture("hf-qwen3-moe-bf16")), WINDOWS)
    experts = "model.layers.0.mlp.experts"
    found = stack[f"{experts}.up_proj.weight"]
    assert found.values.shape == (4, 128)
    assert found.tokens.sum() == 2 * WINDOWS.size
    for index in range(4):
        one = single[f"{experts}.{index}.up_proj.weight"]
        assert one.tokens == found.tokens[index]
        np.testing.assert_allclose(one.values, found.values[index], rtol=1e-6)


def test_the_same_tokens_give_the_same_bits() -> None:
    """Calibration is repeatable."""
    runs = [second_moments(open_model(fixture("hf-gemma3-bf16")), WINDOWS) for _ in range(2)]
    for name, first in runs[0].items():
        assert first.values.tobytes() == runs[1][name].values.tobytes()


def test_progress_counts_blocks_and_the_head() -> None:
    """Two blocks and the head are three steps."""
    told: list[tuple[int, int]] = []
    second_moments(
        open_model(fixture("hf-llama-bf16")), WINDOWS, progress=lambda *step: told.append(step)
    )
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_pass_is_made_once_for_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by an auto that calibrates with what it measured; other tokens are another pass."""
    runs: list[int] = []

    def counted(*given: Any, **choices: Any) -> dict[str, Moments]:
        runs.append(len(given))
        return second_moments(*given, **choices)

    monkeypatch.setattr("quantmill.activations.second_moments", counted)
    model, passes = open_model(fixture("hf-llama-bf16")), Passes()
    first = passes.second_moments(model, WINDOWS)
    assert passes.second_moments(model, WINDOWS.astype(np.int64)) is first
    assert len(runs) == 1
    assert passes.second_moments(model, WINDOWS[:1]).keys() == first.keys()
    assert len(runs) == 2


@pytest.mark.parametrize("keeps", [True, False])
def test_gram_matrices_are_kept_where_that_is_asked_for(
    keeps: bool,
) -> None:
    """They are as large as the model."""
    model, passes = open_model(fixture("hf-llama-bf16")), Passes(products=keeps)
    begun = list(itertools.islice(passes.gram_matrices(model, WINDOWS), 2))
    first = list(passes.gram_matrices(model, WINDOWS))
    again = list(passes.gram_matrices(model, WINDOWS))
    expected = [block.keys() for block in gram_matrices(model, WINDOWS)]
    for found in (begun, first, again):
        assert [block.keys() for block in found] == expected[: len(found)]
    assert len(first) == len(again) == 3
    assert [first[n] is begun[n] for n in (0, 1)] == [keeps, keeps]
    assert (first[2] is again[2]) == keeps


# -- windows ---------------------------------------------------------------------------------------


def test_random_tokens_never_change() -> None:
    """The digest of a seed is the same on every machine and with every NumPy."""
    tokens = random_tokens(49152, 16, 512, seed=0, first=1)
    assert tokens.shape == (16, 512)
    assert (tokens[:, 0] == 1).all()
    assert 0 <= tokens.min() < 100
    assert 49000 < tokens.max() < 49152
    assert tokens_digest(tokens) == RANDOM_DIGEST
    assert tokens_digest(tokens.reshape(8, 1024)) != RANDOM_DIGEST


RANDOM_DIGEST = "sha256:320597443d46575309ab5ca3e5b1e1861cb0946cbfcd411a1c177399c2951c50"


class Tokenizer:
    """A token for each character; `before` begins every text."""

    def __init__(self, *before: int) -> None:
        self.before = list(before)

    def encode(self, text: str, add_special_tokens: bool = True, **_: bool) -> list[int]:
        return (self.before if add_special_tokens else []) + [ord(c) for c in text]


def test_windows_of_a_text_follow_each_other_or_are_spread() -> None:
    """All of it in order, or some windows from its beginning to its end."""
    text = "".join(chr(100 + i) for i in range(26))
    found = text_tokens(Tokenizer(), text, 5)
    assert found.dtype == np.int32
    assert found.tolist() == [[100 + 5 * w + i for i in range(5)] for w in range(5)]
    spread = text_tokens(Tokenizer(), text, 5, 3)
    assert spread[:, 0].tolist() == [100, 110, 121]
    assert text_tokens(Tokenizer(), text, 26).shape == (1, 26)


def test_windows_begin_as_the_tokenizer_begins_a_text() -> None:
    """Where the tokenizer puts BOS before a text, every window begins with it."""
    found = text_tokens(Tokenizer(7, 8), "abcdefgh", 5, 2)
    assert found.tolist() == [[7, 8, 97, 98, 99], [7, 8, 102, 103, 104]]


def test_a_text_that_is_too_short_is_refused() -> None:
    """Windows that would overlap everywhere measure little; none at all, nothing."""
    with pytest.raises(BadRequest, match="8 tokens, too few for 2 x 5"):
        text_tokens(Tokenizer(), "abcdefgh", 5, 2)
    with pytest.raises(BadRequest, match="too few for 1 x 9"):
        text_tokens(Tokenizer(), "abcdefgh", 9)


def test_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default is in every Python; files must be text, and be there."""
    text = default_text()
    assert len(text.text) > 100_000
    assert text.python
    (tmp_path / "text").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(BadSource, match="no UTF-8"):
        text_of(tmp_path / "text")
    with pytest.raises(StoreError, match="absent"):
        text_of(tmp_path / "absent")
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    with pytest.raises(BadRequest, match="no pydoc_data") as caught:
        default_text()
    assert "--text" in (caught.value.hint or "")
