"""Weights in float32 under mlx-lm's names, each made when its turn comes and handed out once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from quantmill import mlxlm
from quantmill.decode import Packed, decode_float32
from quantmill.errors import Corrupt
from quantmill.formats import Format
from quantmill.model import Model


@dataclass(slots=True)
class StoredWeight:
    """A matrix, or a stack of them, as stored; `rows` and `dense` give it in float32."""

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    format: Format | None = None

    def dense(self) -> mx.array:
        """All of it, in its shape; integers that are not codes stay what they are."""
        if self.format is None:
            floating = mx.issubdtype(self.weight.dtype, mx.floating)
            return self.weight.astype(mx.float32) if floating else self.weight
        assert self.scales is not None
        # scales as float32, so that nothing is rounded to the dtype they are stored in
        scales = self.scales.astype(mx.float32) if self.format.has_bias else self.scales
        biases = None if self.biases is None else self.biases.astype(mx.float32)
        return _dequantized(self.weight, scales, biases, self.format)

    def rows(self, indices: mx.array) -> mx.array:
        """Rows as float32 [*indices, columns]; the others are not dequantized."""

        def some(array: mx.array | None) -> mx.array | None:
            return None if array is None else array[indices]

        return StoredWeight(
            self.weight[indices], some(self.scales), some(self.biases), self.format
        ).dense()


def _dequantized(
    codes: mx.array, scales: mx.array, biases: mx.array | None, fmt: Format
) -> mx.array:
    mx.eval(codes, scales, *([] if biases is None else [biases]))
    arrays = [np.asarray(codes), np.asarray(scales)]
    more = None if biases is None else np.asarray(biases)
    packed = Packed(arrays[0], arrays[1], more, None, False, ["F32", "F32"])
    found = decode_float32(packed, fmt)
    if found is not None:
        return mx.array(found)
    with mx.stream(mx.cpu):  # the same values whatever device is the default
        return mx.dequantize(
            codes, scales, biases, fmt.group_size, fmt.bits, mode=fmt.mode, dtype=mx.float32
        )


class DenseWeights:
    """Weights under mlx-lm's names; each is handed out once, so that it can be let go of."""

    def __init__(self, model: Model, target: nn.Module) -> None:
        mlxlm.allow_many_files()
        named = mlxlm.named_for(model, target)
        model.forget()  # arrays that are not read yet are held here alone
        self._arrays, self._formats = named.weights, named.formats
        self._where = model.where

    def take(self, name: str) -> StoredWeight:
        """A weight as it is stored; raises Corrupt when it is not there any more, or never was."""
        if name not in self._arrays:
            raise self._misfit(f"there is no {name!r}")
        path = name.removesuffix(".weight")
        fmt = self._formats.get(path) if name.endswith(".weight") else None
        weight = self._arrays.pop(name)
        if fmt is None:
            return StoredWeight(weight)
        biases = self._arrays.pop(f"{path}.biases") if fmt.has_bias else None
        return StoredWeight(weight, self._arrays.pop(f"{path}.scales"), biases, fmt)

    def rows(self, name: str) -> int | None:
        """Length of a weight's first axis, None where there is no such weight."""
        found = self._arrays.get(name)
        return None if found is None else int(found.shape[0])

    def fill(self, module: nn.Module, prefix: str, leaving: Sequence[str] = ()) -> None:
        """Give the parameters of a module their values, those beginning with `leaving` aside.

        Raises Corrupt where one is missing or has another shape.
        """
        values = []
        parameters: Any = tree_flatten(module.parameters())
        for name, placeholder in parameters:
            whole = f"{prefix}{name}"
            if whole.startswith(tuple(leaving)):
                continue
            array = self.take(whole).dense()
            if tuple(array.shape) != tuple(placeholder.shape):
                raise self._misfit(f"{whole!r} has shape {list(array.shape)}")
            values.append((name, array))
        module.update(tree_unflatten(values))

    def check_used(self) -> None:
        """Raise Corrupt when weights are left over."""
        if self._arrays:
            raise self._misfit(f"there is no place for {min(self._arrays)!r}")

    def _misfit(self, what: str) -> Corrupt:
        return Corrupt(
            f"{self._where}: the weights do not fit mlx-lm's module: {what}",
            kind="weights_do_not_fit",
        )
