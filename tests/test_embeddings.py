"""Sentence embeddings of a real encoder: what the methods leave of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from embeddings import Encoder, distance, encoder_of, sentences, write_as
from quantmill.creation import create
from quantmill.load import open_model
from quantmill.plans import RTN, SEARCH, Options
from quantmill.store import Store


def encoder(source: Path, folder: Path, quantize: str, method: str) -> Encoder:
    store = Store(folder / f"{quantize}-{method}")
    create("m", source, store=store, quantize=quantize, options=Options(method=method))
    with open_model("m", store=store) as opened:
        return encoder_of(opened)


@pytest.mark.parametrize(
    ("dtype", "most"), [("F32", {"int4": 0.95, "mxfp4": 0.95}), ("BF16", {"int8": 0.7})]
)
def test_a_search_keeps_embeddings_nearer(
    dtype: str, most: dict[str, float], minilm: Path, tmp_path: Path
) -> None:
    """Embeddings of searched weights are nearer to the original's than those of rounded ones."""
    source, texts = write_as(dtype, minilm, tmp_path / "m"), sentences(minilm, 16)
    with open_model(source) as opened:
        expected = encoder_of(opened)(texts)
    assert expected.shape == (16, 384)
    assert np.ptp(expected @ expected.T) > 1  # sentences differ
    for quantize, ratio in most.items():
        found = {
            method: distance(encoder(source, tmp_path, quantize, method)(texts), expected)
            for method in (RTN, SEARCH)
        }
        assert 0 < found[SEARCH] < ratio * found[RTN] < 0.06, quantize
