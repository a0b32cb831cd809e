"""Layers built from the weights of an open model: `mlx.nn` modules, quantized where scales exist.

Nothing is copied and nothing is quantized here: the arrays of the model become the parameters of
the module. `Linear`, `Embedding` and the quantized twins are MLX's own classes, so they drop into
existing code; the global scale of nvfp4 and expert stacks need the small classes below."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, TypeVar

import mlx.core as mx
from mlx import nn

from quantmill.errors import Corrupt, NotFound
from quantmill.model import Model, Parts

_M = TypeVar("_M", bound=nn.Module)


class ScaledLinear(nn.QuantizedLinear):
    """A quantized linear layer whose product is multiplied by a global scale.

    The scale is one number, or one for each output row, and applies before the bias
    (docs/formats.md).
    """

    def __call__(self, x: mx.array) -> mx.array:
        """Product with the weight, times the global scale, plus the bias, in the dtype of x."""
        y = mx.quantized_matmul(
            x,
            self["weight"],
            scales=self["scales"],
            biases=self.get("biases"),
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )
        y = (y * self["global_scale"]).astype(y.dtype)
        return y + self["bias"].astype(y.dtype) if "bias" in self else y


class ScaledEmbedding(nn.QuantizedEmbedding):
    """A quantized embedding whose rows are multiplied by a global scale (one, or one per row)."""

    def _scaled(self, rows: mx.array, scale: mx.array) -> mx.array:
        return (rows * scale).astype(rows.dtype)

    def __call__(self, x: mx.array) -> mx.array:
        """The rows of x."""
        scale = self["global_scale"]
        scale = scale if scale.size == 1 else scale.reshape(-1)[x][..., None]
        return self._scaled(super().__call__(x), scale)

    def as_linear(self, x: mx.array) -> mx.array:
        """The product with the table, as a language model's head uses it."""
        return self._scaled(super().as_linear(x), self["global_scale"].reshape(-1))


class ExpertLinear(nn.Module):
    """A stack of linear layers [experts, out, in], one chosen for each row of the input.

    Call with x [..., 1, in] and indices [..., k]: gives [..., k, 1, out], as the switch layers of
    mlx-lm do. Quantized when it has `scales`.
    """

    def __init__(self, parts: Parts, bias: mx.array | None = None) -> None:
        super().__init__()
        self.weight = parts.weight
        if bias is not None:
            self.bias = bias
        if parts.params is not None:
            fmt = parts.params.format
            self.group_size, self.bits, self.mode = fmt.group_size, fmt.bits, fmt.mode
            self.scales = parts.scales
            if parts.biases is not None:
                self.biases = parts.biases
            if parts.global_scale is not None:
                self.global_scale = parts.global_scale
        self.freeze()

    @property
    def num_experts(self) -> int:
        """Layers in the stack."""
        return int(self["weight"].shape[0])

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Each row through the experts its indices name."""
        if "scales" in self:
            y = mx.gather_qmm(
                x,
                self["weight"],
                self["scales"],
                self.get("biases"),
                rhs_indices=indices,
                transpose=True,
                group_size=self.group_size,
                bits=self.bits,
                mode=self.mode,
            )
        else:
            y = mx.gather_mm(x, self["weight"].swapaxes(-1, -2), rhs_indices=indices)
        if "global_scale" in self:
            scale = self["global_scale"]
            if scale.size > 1:  # one for each expert, or for each row of each expert
                scale = scale.reshape(self.num_experts, -1)[indices][..., None, :]
            y = (y * scale).astype(y.dtype)
        if "bias" in self:
            y = y + mx.expand_dims(self["bias"][indices], -2)
        return y


def _empty(kind: type[_M], **attributes: Any) -> _M:
    """A module of a class made without its constructor, which would draw random weights."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name, value in attributes.items():
        if value is not None:
            setattr(module, name, value)
    module.freeze()
    return module


def _quantized(kind: type[_M], parts: Parts, bias: mx.array | None) -> _M:
    assert parts.params is not None
    fmt = parts.params.format
    return _empty(
        kind,
        group_size=fmt.group_size,
        bits=fmt.bits,
        mode=fmt.mode,
        weight=parts.weight,
        scales=parts.scales,
        biases=parts.biases,
        global_scale=parts.global_scale,
        bias=bias,
    )


def linear(model: Model, path: str) -> nn.Module:
    """The linear layer at a module path: `nn.Linear`, `nn.QuantizedLinear` or `ScaledLinear`.

    A learned bias of another dtype is cast to that of a dense weight. Raises NotFound when the
    model has no weight there."""
    parts = _parts(model, path)
    bias = model.get(f"{path}.bias")
    if parts.params is None:
        if bias is not None:
            bias = bias.astype(parts.weight.dtype)
        return _empty(nn.Linear, weight=parts.weight, bias=bias)
    kind = nn.QuantizedLinear if parts.global_scale is None else ScaledLinear
    return _quantized(kind, parts, bias)


def embedding(model: Model, path: str) -> nn.Module:
    """The embedding at a module path: `nn.Embedding`, `nn.QuantizedEmbedding` or `ScaledEmbedding`.

    Its `as_linear` is the head of a model with tied embeddings. Raises NotFound.
    """
    parts = _parts(model, path)
    if parts.params is None:
        return _empty(nn.Embedding, weight=parts.weight)
    fmt = parts.params.format
    kind = nn.QuantizedEmbedding if parts.global_scale is None else ScaledEmbedding
    found = _quantized(kind, parts, None)
    found.num_embeddings = parts.weight.shape[0]
    found.dims = fmt.columns(parts.weight.shape[-1])
    return found


def experts(model: Model, path: str) -> ExpertLinear:
    """The expert stack at a path such as `model.layers.0.mlp.experts.up_proj`.

    Also found under the name `switch_mlp`, with and without `.weight`, and when each expert has a
    tensor of its own: those are stacked. Raises NotFound.
    """
    for candidate in _spellings(path):
        if candidate in model:
            bias = model.get(f"{candidate.removesuffix('.weight')}.bias")
            return ExpertLinear(model.parts(candidate), bias)
    return _stacked(model, path)


def _spellings(path: str) -> list[str]:
    other = path.replace(".switch_mlp.", ".experts.")
    if other == path:
        other = path.replace(".experts.", ".switch_mlp.")
    return [f"{p}{end}" for p in (path, other) for end in (".weight", "")]


def _stacked(model: Model, path: str) -> ExpertLinear:
    group, _, projection = path.replace(".switch_mlp.", ".experts.").rpartition(".")
    pattern = re.compile(rf"{re.escape(group)}\.([0-9]+)\.{re.escape(projection)}\.weight")
    indices = sorted(int(found[1]) for name in model if (found := pattern.fullmatch(name)))
    if not indices:
        raise NotFound(f"{model.where}: no expert stack at {path!r}", kind="tensor_not_found")
    if indices != list(range(len(indices))):
        raise _uneven(model, path, "are not numbered from 0 on without gaps")
    modules = [f"{group}.{index}.{projection}" for index in indices]
    members = [model.parts(f"{module}.weight") for module in modules]
    if len({m.params.format if m.params else None for m in members}) > 1:
        raise _uneven(model, path, "are not all quantized the same way")

    def stack(arrays: Sequence[mx.array | None]) -> mx.array | None:
        there = [a for a in arrays if a is not None]
        if there and len({(len(there), a.shape, a.dtype) for a in there}) > 1:
            raise _uneven(model, path, "differ in shape or dtype")
        if there and len(there) < len(arrays):
            raise _uneven(model, path, "do not all have the same parts")
        return mx.stack(there) if there else None

    weight = stack([m.weight for m in members])
    assert weight is not None
    scales, biases = stack([m.scales for m in members]), stack([m.biases for m in members])
    scale = stack([m.global_scale for m in members])
    parts = Parts(weight, scales, biases, scale, members[0].params)
    return ExpertLinear(parts, stack([model.get(f"{module}.bias") for module in modules]))


def _uneven(model: Model, path: str, what: str) -> Corrupt:
    return Corrupt(f"{model.where}: the experts of {path!r} {what}", kind="uneven_experts")


def _parts(model: Model, path: str) -> Parts:
    if f"{path}.weight" not in model:
        raise NotFound(f"{model.where}: no weight at {path!r}", kind="tensor_not_found")
    return model.parts(f"{path}.weight")
