"""Sentence embeddings by BERT, in float32: how far a quantized encoder's are from the original's.

mlx-lm has no such architecture, so its arithmetic stands here, after Devlin and others (2018), with
the mean over tokens of sentence-transformers. Products are NumPy's, erf is MLX's.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from quantmill.denseweights import StoredWeight
from quantmill.model import Model
from quantmill.windows import default_text

Floats = npt.NDArray[np.float32]
Observe = Callable[[str, Floats], None]
"""Told of the name of a linear layer's weight and of its input, float32 [tokens, columns]."""

_LONGEST = 128


class Encoder:
    """A BERT model; called with sentences' token ids, it gives float32 [sentences, hidden].

    Tokens of all sentences go through the linear layers together.
    """

    def __init__(self, config: dict[str, Any], weights: dict[str, Floats]) -> None:
        self.weights = weights
        self.heads, self.layers = config["num_attention_heads"], config["num_hidden_layers"]
        self.epsilon = np.float32(config["layer_norm_eps"])

    def __call__(self, texts: Sequence[Sequence[int]], observe: Observe | None = None) -> Floats:
        """For each sentence the mean of the last layer's states."""
        ends = np.cumsum([len(ids) for ids in texts])
        spans = [slice(end - len(ids), end) for ids, end in zip(texts, ends, strict=True)]
        places = np.concatenate([np.arange(len(ids)) for ids in texts])
        start = "embeddings."
        x = self.weights[f"{start}word_embeddings.weight"][np.concatenate(texts)]
        x = x + self.weights[f"{start}position_embeddings.weight"][places]
        x = x + self.weights[f"{start}token_type_embeddings.weight"][0]
        x = self._norm(f"{start}LayerNorm", x)
        for n in range(self.layers):
            x = self._layer(f"encoder.layer.{n}.", x, spans, observe)
        return np.stack([x[span].mean(axis=0) for span in spans])

    def _layer(self, at: str, x: Floats, spans: Sequence[slice], observe: Observe | None) -> Floats:
        def linear(name: str, given: Floats) -> Floats:
            weight = f"{at}{name}.weight"
            if observe is not None:
                observe(weight, given)
            product: Floats = given @ self.weights[weight].T + self.weights[f"{at}{name}.bias"]
            return product

        parts = [linear(f"attention.self.{part}", x) for part in ("query", "key", "value")]
        mixed = np.concatenate([self._attention(*(part[s] for part in parts)) for s in spans])
        x = self._norm(
            f"{at}attention.output.LayerNorm", x + linear("attention.output.dense", mixed)
        )
        wide = _gelu(linear("intermediate.dense", x))
        return self._norm(f"{at}output.LayerNorm", x + linear("output.dense", wide))

    def _attention(self, *parts: Floats) -> Floats:
        query, key, value = (p.reshape(len(p), self.heads, -1).swapaxes(0, 1) for p in parts)
        scores = query @ key.swapaxes(1, 2) / np.float32(np.sqrt(query.shape[-1]))
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores = scores / scores.sum(axis=-1, keepdims=True)
        mixed: Floats = (scores @ value).swapaxes(0, 1).reshape(parts[0].shape)
        return mixed

    def _norm(self, name: str, x: Floats) -> Floats:
        centred = x - x.mean(axis=-1, keepdims=True)
        size = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + self.epsilon)
        scaled: Floats = centred / size * self.weights[f"{name}.weight"]
        return scaled + self.weights[f"{name}.bias"]


def _gelu(x: Floats) -> Floats:
    found: Floats = x * (1 + np.asarray(mx.erf(mx.array(x / np.float32(np.sqrt(2)))))) / 2
    return found


def encoder_of(model: Model) -> Encoder:
    """An open model, its codes as numbers the way `eval` has them: scales taken as float32."""
    return Encoder(dict(model.config), {name: _dense(model, name) for name in model})


def _dense(model: Model, name: str) -> Floats:
    parts = model.parts(name)
    fmt = None if parts.params is None else parts.params.format
    stored = StoredWeight(parts.weight, parts.scales, parts.biases, fmt)
    return np.asarray(stored.dense())


def write_as(dtype: str, source: Path, folder: Path) -> Path:
    """A copy of a checkpoint with its float tensors rounded to `dtype`."""
    folder.mkdir()
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copy(path, folder)
    arrays: dict[str, mx.array] = mx.load(str(source / "model.safetensors"))  # type: ignore[assignment]
    kind = {"BF16": mx.bfloat16, "F32": mx.float32}[dtype]
    with mx.stream(mx.cpu):
        rounded = {
            name: array.astype(kind) if mx.issubdtype(array.dtype, mx.floating) else array
            for name, array in arrays.items()
        }
        mx.save_safetensors(str(folder / "model.safetensors"), rounded, {"format": "pt"})
    return folder


def sentences(folder: Path, count: int) -> list[list[int]]:
    """Token ids of sentences of Python's documentation, from places spread evenly over it."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    found = re.findall(r"[A-Z][^.!?]{30,300}[.!?]", default_text().text.replace("\n", " "))
    chosen = [found[i] for i in np.linspace(0, len(found) - 1, count).astype(int)]
    return [tokenizer.encode(re.sub(r"\s+", " ", text)).ids[:_LONGEST] for text in chosen]


def distance(found: Floats, expected: Floats) -> float:
    """Mean over sentences of 1 less the cosine between an embedding and the expected one."""
    one, two = found.astype(np.float64), expected.astype(np.float64)
    lengths = np.sqrt(np.square(one).sum(axis=1) * np.square(two).sum(axis=1))
    return float(np.mean(1 - (one * two).sum(axis=1) / lengths))
