"""Variants of a model measured by branching off one pass: as far apart as whole models are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from checkpoints import fixture
from quantmill import mlxlm
from quantmill.errors import BadRequest
from quantmill.load import open_model
from quantmill.windows import random_tokens

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (quantmill[run])")

from quantmill.branches import divergences

WINDOWS = random_tokens(250, 3, 40, seed=4)
LLAMA, TIED, EXPERTS = "hf-llama-bf16", "hf-qwen3-tied-bf16", "hf-qwen3-moe-bf16"


def coarse(weight: mx.array) -> mx.array:
    """Rounded to a grid that predictions notice."""
    return mx.round(weight * 8) / 8


def log_probabilities(name: str, changed: tuple[str, ...]) -> Any:
    """Those of mlx-lm's own module with all weights at once, some of them changed."""
    module, _ = mlxlm.build(open_model(fixture(name)), mx.float32)
    parameters: Any = dict(tree_flatten(module.parameters()))
    module.load_weights([(n, coarse(parameters[n])) for n in changed], strict=False)
    logits = module(mx.array(WINDOWS)).astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True)).astype(np.float64)


def expected(name: str, changed: tuple[str, ...]) -> float:
    """The mean over all positions."""
    theirs, ours = log_probabilities(name, ()), log_probabilities(name, changed)
    return float((np.exp(theirs) * (theirs - ours)).sum(-1).mean())


def variants(names: list[tuple[str, ...]]) -> list[dict[str, Callable[[mx.array], mx.array]]]:
    return [dict.fromkeys(some, coarse) for some in names]


CASES: dict[str, list[tuple[str, ...]]] = {
    LLAMA: [
        ("model.layers.1.mlp.down_proj.weight",),
        ("model.layers.0.self_attn.q_proj.weight",),
        ("model.embed_tokens.weight",),
        ("lm_head.weight",),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.v_proj.weight",
         "lm_head.weight", "model.embed_tokens.weight"),
    ],
    TIED: [
        ("model.embed_tokens.weight",),
        ("model.layers.1.self_attn.o_proj.weight",),
        ("model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight"),
    ],
    EXPERTS: [
        ("model.layers.0.mlp.switch_mlp.down_proj.weight",),
        ("model.layers.1.mlp.switch_mlp.up_proj.weight",),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_branches_are_as_far_apart_as_whole_models(name: str) -> None:
    """Each variant beside mlx-lm's module that has all its weights at once."""
    found = divergences(open_model(fixture(name)), WINDOWS, variants(CASES[name]))
    for value, changed in zip(found, CASES[name], strict=True):
        assert value > 1e-7
        assert value == pytest.approx(expected(name, changed), rel=2e-3, abs=2e-7), changed


def test_one_pass_or_many_give_the_same_bits() -> None:
    """Variants that do not fit together are measured one after the other."""
    both = [
        divergences(open_model(fixture(LLAMA)), WINDOWS, variants(CASES[LLAMA]), most_bytes=limit)
        for limit in (1 << 30, 1)
    ]
    assert both[0] == both[1]


def test_a_variant_without_a_change_is_the_model() -> None:
    """No divergence, but for rounding."""
    same: dict[str, Callable[[mx.array], mx.array]] = {CASES[LLAMA][0][0]: lambda weight: weight}
    found = divergences(open_model(fixture(LLAMA)), WINDOWS, [same, {}])
    assert found == pytest.approx([0, 0], abs=1e-7)
    assert divergences(open_model(fixture(LLAMA)), WINDOWS, []) == []


def test_progress_ends_where_it_says() -> None:
    """Steps only grow, whatever the number of passes."""
    told: list[tuple[int, int]] = []
    divergences(
        open_model(fixture(LLAMA)), WINDOWS, variants(CASES[LLAMA]), most_bytes=1,
        progress=lambda *step: told.append(step),
    )  # fmt: skip
    assert told == sorted(told)
    assert told[-1] == (15, 15)


def test_names_that_are_no_weights_are_refused() -> None:
    """A wrong name must not measure as no divergence."""
    for name in ("model.norm.weight", "model.layers.7.mlp.up_proj.weight", "what"):
        with pytest.raises(BadRequest, match="no weight of a block"):
            divergences(open_model(fixture(LLAMA)), WINDOWS, [{name: coarse}])
