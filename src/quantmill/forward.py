"""Forward passes in float32, one transformer block after the other, on mlx-lm's architectures.

A whole model in float32 may be far larger than memory; one block is not. So the windows of tokens
go through the embedding together, then through each block in turn, whose weights are dequantized
when its turn comes and let go of afterwards. What mlx-lm does around its blocks (masks, scaling of
embeddings, the norm, caps on logits) is not written again: its own code runs, with blocks that
first only note what they are called with, and later give back what they were computed to give.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx import nn
from mlx.utils import tree_flatten

from quantmill import cpulanes, mlxlm
from quantmill.denseweights import DenseWeights, StoredWeight
from quantmill.errors import BadPlan, BadRequest
from quantmill.model import Model

Windows = npt.NDArray[np.integer[Any]]
"""Token ids [windows, length]."""

TOKENS_AT_ONCE = 512
"""Tokens that go through a block together, in whole windows: enough for fast matrix products."""

_INSTEAD = "`quantmill diff` compares the weights of such a model with those it was made from"


@dataclass(frozen=True, slots=True)
class Given:
    """What some linear layers of a block were given in one step: the same input for all `names`.

    `names` are weights as the open model calls them. `values` is float32 [tokens, columns].
    `expert` is the place in a stack [experts, out, in] whose expert saw these tokens and no others,
    None for weights that are one matrix; `experts` is how many such a stack has.
    """

    names: tuple[str, ...]
    values: npt.NDArray[np.float32]
    expert: int | None = None
    experts: int | None = None


Observe = Callable[[Sequence[Given]], None]
"""Told of every step of a block: the inputs of its linear layers."""


# -- in the place of mlx-lm's modules --------------------------------------------------------------


_Seen = tuple[str, mx.array, mx.array | None]
"""Path of a layer, its input, and for experts which of them each row is for."""


@dataclass(slots=True)
class _Watch:
    """What the layers of the block at work were given, in the order of their calls in a thread."""

    on: bool = False
    here: threading.local = field(default_factory=threading.local)

    def note(self, path: str, x: mx.array, indices: mx.array | None = None) -> None:
        if self.on:
            self.here.__dict__.setdefault("seen", []).append((path, x, indices))

    def take(self) -> list[_Seen]:
        found: list[_Seen] = self.here.__dict__.pop("seen", [])
        return found


class _Table(nn.Module):
    """An embedding: rows are dequantized when they are looked up, the whole for a tied head."""

    def __init__(self, stored: StoredWeight, path: str, watch: _Watch) -> None:
        super().__init__()
        self._stored, self._path, self._watch = stored, path, watch
        self._dense: mx.array | None = None

    @property
    def weight(self) -> mx.array:
        """The table as float32 [rows, columns]; some heads multiply by it themselves."""
        if self._dense is None:
            self._dense = self._stored.dense()
        return self._dense

    def __call__(self, x: mx.array) -> mx.array:
        return self._stored.rows(x)

    def as_linear(self, x: mx.array) -> mx.array:
        self._watch.note(self._path, x)
        return cpulanes.product(x, self.weight)


def _replace_class(module: nn.Module, call: Callable[..., Any]) -> None:
    """Have a module called through `call`, which gets the class's own way to be called first."""
    kind = type(module)

    def __call__(self: Any, *args: Any, **others: Any) -> Any:  # noqa: N807
        return call(lambda *a, **o: kind.__call__(self, *a, **o), *args, **others)

    module.__class__ = type(kind.__name__, (kind,), {"__call__": __call__})


def _watch_linear(module: nn.Module, path: str, watch: _Watch) -> None:
    plain = type(module) is nn.Linear

    def call(own: Callable[..., mx.array], x: mx.array) -> mx.array:
        watch.note(path, x)
        if not plain:
            return own(x)
        y = cpulanes.product(x, module["weight"])
        return y + module["bias"] if "bias" in module else y

    _replace_class(module, call)


def _watch_experts(module: nn.Module, path: str, watch: _Watch) -> None:
    """Experts one after the other: MLX's own product on a CPU takes a row at a time."""

    def call(own: object, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        del own, sorted_indices
        watch.note(path, x, indices)
        weight: mx.array = module["weight"]
        parts, places = [], []
        for expert, rows, values in _by_expert(x, indices):
            parts.append(cpulanes.product(values, weight[expert]))
            places.append(rows)
        back = mx.array(np.argsort(np.concatenate(places)))
        y = mx.concatenate(parts)[back].reshape(*indices.shape, 1, weight.shape[1])
        return y + mx.expand_dims(module["bias"][indices], -2) if "bias" in module else y

    _replace_class(module, call)


def _by_expert(
    x: mx.array, indices: mx.array
) -> Iterator[tuple[int, npt.NDArray[np.int64], mx.array]]:
    """Expert, places among the flattened indices, and its rows [tokens, columns]."""
    columns = x.shape[-1]
    flat = mx.broadcast_to(x[..., 0, :], (*indices.shape, columns)).reshape(-1, columns)
    chosen = cpulanes.values(indices)[0].reshape(-1)
    for expert in np.unique(chosen):
        rows = np.flatnonzero(chosen == expert)
        yield int(expert), rows, flat[mx.array(rows)]


@dataclass(slots=True)
class _Call:
    """What a block is called with beside the hidden states."""

    args: tuple[Any, ...]
    others: dict[str, Any]


class _Odd(Exception):
    """An architecture does something between its blocks, which a pass by blocks would miss."""


class _Stations:
    """What blocks do when mlx-lm's code calls them: note the call, or give back a result."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.calls: list[_Call] = []
        self.first: mx.array | None = None
        self.last: mx.array | None = None
        self.running = False
        self._given: mx.array | None = None
        for index, block in enumerate(blocks):
            _replace_class(block, self._station(index))

    def _station(self, index: int) -> Callable[..., Any]:
        def call(own: Callable[..., Any], h: mx.array, *args: Any, **others: Any) -> Any:
            if self.running:
                return own(h, *args, **others)
            if self.last is not None:  # the pass is over: what follows the blocks goes on with this
                return self.last
            return self._noted(index, h, _Call(args, others))

        return call

    def _noted(self, index: int, h: mx.array, called: _Call) -> mx.array:
        """A stand-in for the block's result: one number everywhere, which the next must be given.

        By its value and not only by being the same object, since MLX's arrays can be changed in
        place: `h *= 2` between two blocks must be noticed.
        """
        if index != len(self.calls):
            raise _Odd
        if index == 0:
            self.first = h + 0  # of its own, whatever happens to the caller's
        elif h is not self._given or h[0, 0, 0].item() != index:
            raise _Odd
        self.calls.append(called)
        self._given = mx.broadcast_to(mx.array(index + 1.0), h.shape)
        return self._given

    def record(self, run: Callable[[], Any], count: int) -> tuple[mx.array, list[_Call]]:
        """The first block's input and every block's call, while `run` calls them in order."""
        self.calls, self.first, self.last = [], None, None
        run()
        found, first = self.calls, self.first
        self.calls, self.first, self._given = [], None, None
        if first is None or len(found) != count:
            raise _Odd
        return first, found


# -- the pass --------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Stream:
    """Some windows on their way: tokens, the hidden states so far, and each block's call."""

    tokens: mx.array
    hidden: mx.array
    calls: list[_Call]


class Forward:
    """One pass of windows of tokens through an open model: `step` for each block, then `finish`.

        forward = Forward(model, windows)
        for index in range(len(forward)):
            forward.step(index)
        hidden = forward.finish()
        logits = forward.logits(hidden[0])

    Memory is about that of one block in float32 beside the hidden states [windows, length, hidden];
    after `finish` the head in float32. Everything is computed in float32, on MLX's default device.
    """

    def __init__(self, model: Model, windows: Windows) -> None:
        """Embed the tokens. `windows` are ids [windows, length] below the model's vocabulary.

        Raises BadRequest without mlx-lm or for ids that the model has no embedding for, BadPlan for
        architectures that mlx-lm does not have or that are not made of blocks in a row, Corrupt
        when the weights do not fit.
        """
        self._target, config = empty_model(model)
        self._kind = str(config["model_type"])
        self._target.eval()
        path, self._inner = _inner(model, self._target, self._kind)
        self._prefix = f"{path}."
        self._weights = DenseWeights(model, self._target)
        self._names = mlxlm.stored_names(model)
        self._watch = _Watch()
        self._model_where = model.where
        embedding = f"{self._prefix}embed_tokens"
        self.vocabulary = self._vocabulary(embedding)
        """Rows of the head: tokens that a logit is computed for."""
        table = self._weights.take(f"{embedding}.weight")
        self._check(windows, table.weight.shape[0])
        self._inner.embed_tokens = _Table(table, embedding, self._watch)
        self._blocks: list[nn.Module] = list(self._inner.layers)
        self._weights.fill(self._inner, self._prefix, [f"{self._prefix}layers."])
        self._prepare()
        self._streams = [self._begin(chunk) for chunk in _chunks(np.asarray(windows))]

    def __len__(self) -> int:
        """Blocks."""
        return len(self._blocks)

    def step(self, index: int, observe: Observe | None = None) -> None:
        """Send all windows through a block; they must be taken in order, each once.

        `observe` is told of the inputs of its linear layers, some windows at a time.
        """
        block = self._blocks[index]
        placeholders = block.parameters()
        self._weights.fill(block, f"{self._prefix}layers.{index}.")
        self._stations.running, self._watch.on = True, observe is not None
        mx.eval(
            _arrays(block),
            [_arrays((s.calls[index].args, s.calls[index].others)) for s in self._streams],
        )
        tasks = [partial(self._through, block, index, stream) for stream in self._streams]
        lanes = len(tasks) if observe is None else cpulanes.count()
        for start in range(0, len(tasks), lanes):
            for seen in cpulanes.each(tasks[start : start + lanes]):
                if observe is not None:
                    observe(self._given(seen))
        self._stations.running = self._watch.on = False
        block.update(placeholders)  # never computed: what was in their place is let go of

    def finish(self, observe: Observe | None = None) -> npt.NDArray[np.float32]:
        """The hidden states that the head is given, float32 [windows, length, hidden].

        `observe` is told of the head's input, under the embedding's name where the head is tied.
        Raises Corrupt when weights are left over.
        """
        self._weights.fill(self._target, "", [self._prefix])
        self._weights.check_used()
        found = []
        for stream in self._streams:
            self._stations.last = stream.hidden
            found.append(np.array(self._inner(stream.tokens)))
            if observe is not None:
                self._watch.on = True
                self.logits(found[-1])  # not computed: only the head's input is looked at
                self._watch.on = False
                observe(self._given(self._watch.take()))
        self._streams = []
        self._stations.last = None
        return np.concatenate(found)

    def logits(self, hidden: npt.NDArray[np.float32] | mx.array) -> mx.array:
        """Logits [..., vocabulary] of hidden states [..., hidden] from `finish`, not computed yet.

        Also what the architecture does after its head, such as a soft cap.
        """
        states = mx.array(hidden)
        flat = states.reshape(1, -1, states.shape[-1])
        found: mx.array = self._target(flat)
        return found.reshape(*states.shape[:-1], -1)

    # -- inside ------------------------------------------------------------------------------------

    def _through(self, block: nn.Module, index: int, stream: _Stream) -> list[_Seen]:
        """Send some windows through a block; what its layers were given."""
        self._watch.take()
        call = stream.calls[index]
        hidden = block(stream.hidden, *call.args, **call.others)
        seen = self._watch.take()
        cpulanes.values(hidden, *(a for _, *given in seen for a in given if a is not None))
        stream.hidden = hidden
        return seen

    def _vocabulary(self, embedding: str) -> int:
        names = [f"{path}.weight" for path, _ in self._target.named_modules()]
        head = next((n for n in names if n.endswith("lm_head.weight")), "")
        return self._weights.rows(head) or self._weights.rows(f"{embedding}.weight") or 0

    def _check(self, windows: Windows, rows: int) -> None:
        if windows.ndim != 2 or not windows.size:
            raise BadRequest(f"windows of tokens have two axes and some tokens: {windows.shape}")
        if windows.min() < 0 or windows.max() >= rows:
            raise BadRequest(
                f"{self._model_where}: token {int(windows.max())} is not among its {rows} tokens",
                kind="foreign_tokens",
                hint="make the tokens with the model's own tokenizer",
            )

    def _prepare(self) -> None:
        from mlx_lm.models.switch_layers import SwitchLinear

        for path, module in self._target.named_modules():
            if isinstance(module, SwitchLinear):
                _watch_experts(module, path, self._watch)
            elif isinstance(module, nn.Linear):
                _watch_linear(module, path, self._watch)
        self._stations = _Stations(self._blocks)

        def call(own: Callable[..., Any], inputs: mx.array, *args: Any, **others: Any) -> Any:
            # hidden states go straight to the head
            is_hidden = mx.issubdtype(inputs.dtype, mx.floating)
            return inputs if is_hidden else own(inputs, *args, **others)

        _replace_class(self._inner, call)

    def _begin(self, tokens: mx.array) -> _Stream:
        try:
            first, calls = self._stations.record(lambda: self._inner(tokens), len(self._blocks))
        except (_Odd, TypeError, ValueError, AttributeError, IndexError) as error:
            raise _no_blocks(self._model_where, self._kind) from error
        mx.eval(first)
        return _Stream(tokens, first, calls)

    def _given(self, seen: Sequence[_Seen]) -> list[Given]:
        """What was noted, one for each input and expert."""
        groups: dict[tuple[int, int], list[int]] = {}
        for place, (_, x, indices) in enumerate(seen):
            groups.setdefault((id(x), id(indices)), []).append(place)
        found: list[Given] = []
        for places in groups.values():
            _, x, indices = seen[places[0]]
            names = [self._names.get(f"{seen[p][0]}.weight", ()) for p in places]
            if indices is None:
                own = tuple(dict.fromkeys(n[0] for n in names if n))
                found.append(Given(own, np.asarray(x).reshape(-1, x.shape[-1])))
                continue
            for expert, _, values in _by_expert(x, indices):
                mx.eval(values)
                found += _of_expert(names, expert, np.asarray(values))
        return [given for given in found if given.names]


def _of_expert(
    names: Sequence[tuple[str, ...]], expert: int, values: npt.NDArray[np.float32]
) -> Iterator[Given]:
    """An expert's input: for stacks by its place, for experts stored singly by their own names."""
    stacks = tuple(dict.fromkeys(n[0] for n in names if len(set(n)) == 1))
    single = tuple(n[expert] for n in names if len(set(n)) > 1)
    if stacks:
        count = max(len(n) for n in names)
        yield Given(stacks, values, expert, count)
    if single:
        yield Given(single, values)


def _arrays(tree: Any) -> list[mx.array]:
    """Arrays of a module, those it keeps beside its parameters too, or of a tree of values."""
    parts = [dict(m) for m in tree.modules()] if isinstance(tree, nn.Module) else [tree]
    found: Any = tree_flatten(parts, is_leaf=lambda value: isinstance(value, nn.Module))
    return [value for _, value in found if isinstance(value, mx.array)]


def _chunks(windows: Windows) -> Iterator[mx.array]:
    at_once = max(1, TOKENS_AT_ONCE // windows.shape[1])
    for start in range(0, len(windows), at_once):
        yield mx.array(windows[start : start + at_once].astype(np.int32))


def _inner(model: Model, target: nn.Module, kind: str) -> tuple[str, nn.Module]:
    """The part with the embedding, the blocks and the norm, and its path."""
    found = [
        (path, module)
        for path, module in target.named_modules()
        if path and all(name in module for name in ("embed_tokens", "layers", "norm"))
    ]
    if found:
        return min(found, key=lambda pair: len(pair[0]))
    raise _no_blocks(model.where, kind)


def _no_blocks(where: str, kind: str) -> BadPlan:
    return BadPlan(
        f"{where}: no forward pass block by block for the architecture {kind}",
        kind="unsupported_architecture",
        hint=_INSTEAD,
    )


def empty_model(model: Model) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's module without weights, and its config; raises BadPlan where there is no pass."""
    try:
        return mlxlm.empty_model(model)
    except BadPlan as error:
        if error.kind not in {"unsupported_architecture", "pipeline"}:
            raise
        what = f"{error.message.rstrip('.')}, so there is no forward pass"
        raise BadPlan(what, kind="unsupported_architecture", hint=_INSTEAD) from None
