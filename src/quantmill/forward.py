"""Forward passes in float32, one transformer block after the other, on mlx-lm's architectures.

A whole model in float32 may be far larger than memory; one block is not. So the windows of tokens
go through the embedding together, then through each block in turn, whose weights are dequantized
when its turn comes and let go of afterwards. What mlx-lm does around its blocks (masks, scaling of
embeddings, the norm, caps on logits) is not written again: its own code runs, with blocks that
first only note what they are called with, and later give back what they were computed to give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from quantmill import cpulanes, mlxlm
from quantmill.denseweights import DenseWeights, StoredWeight
from quantmill.errors import BadPlan, BadRequest
from quantmill.model import Model
from quantmill.standins import (
    Call,
    Odd,
    Seen,
    Stations,
    Table,
    Watch,
    by_expert,
    replace_class,
    watch_experts,
    watch_linear,
)

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

States = list[mx.array]
"""Hidden states of all windows, some windows at a time: float32 [windows, length, hidden] each."""


# -- the pass --------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Stream:
    """Some windows on their way: tokens, the hidden states so far, and each block's call."""

    tokens: mx.array
    hidden: mx.array
    calls: list[Call]


class Block:
    """A block whose weights are in place, for states that go through it beside the pass itself."""

    def __init__(
        self, module: nn.Module, prefix: str, calls: Sequence[Call], before: States
    ) -> None:
        self._module, self._prefix, self._calls = module, prefix, calls
        self.before = before
        """What the pass itself gave the block."""
        parameters: Any = tree_flatten(module.parameters())
        self.weights: dict[str, mx.array] = {prefix + name: array for name, array in parameters}
        """Its parameters in float32, by mlx-lm's names."""

    def send(self, ways: Iterable[tuple[States, Mapping[str, mx.array]]]) -> Iterator[States]:
        """The states after the block for each way through it: states before, weights replaced.

        The weights of a way hold for it alone. No more of `ways` is asked for than is computed
        together: as many as there are threads, or one where weights are replaced.
        """
        waiting: list[States] = []
        for states, replaced in ways:
            if not replaced:
                waiting.append(states)
                if len(waiting) >= cpulanes.count():
                    yield from self._sent(waiting)
                    waiting = []
                continue
            yield from self._sent(waiting)
            waiting = []
            mx.eval(replaced)
            self._put(replaced)
            yield from self._sent([states])
            self._put({name: self.weights[name] for name in replaced})
        yield from self._sent(waiting)

    def _sent(self, some: Sequence[States]) -> list[States]:
        tasks = [
            partial(_through, self._module, hidden, call)
            for states in some
            for hidden, call in zip(states, self._calls, strict=True)
        ]
        found = cpulanes.each(tasks)
        count = len(self._calls)
        return [found[start : start + count] for start in range(0, len(found), count)]

    def _put(self, weights: Mapping[str, mx.array]) -> None:
        own = [(name.removeprefix(self._prefix), array) for name, array in weights.items()]
        self._module.update(tree_unflatten(own))


def _through(block: nn.Module, hidden: mx.array, call: Call) -> mx.array:
    after: mx.array = block(hidden, *call.args, **call.others)
    cpulanes.values(after)
    return after


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
        self._watch = Watch()
        self._model_where = model.where
        modules: dict[str, Any] = dict(self._target.named_modules())
        heads = [path for path in modules if path.endswith("lm_head")]
        self._head = f"{heads[0]}.weight" if heads else ""
        self._head_module: Any = modules[heads[0]] if heads else None
        self._table = self._weights.take(self.embedding)
        self.vocabulary = self._vocabulary()
        """Rows of the head: tokens that a logit is computed for."""
        self._check(windows, self._table.weight.shape[0])
        path = self.embedding.removesuffix(".weight")
        self._inner.embed_tokens = Table(self._table, path, self._watch)
        self._blocks: list[nn.Module] = list(self._inner.layers)
        self._weights.fill(self._inner, self._prefix, [f"{self._prefix}layers."])
        self._prepare()
        self._streams = [self._begin(chunk) for chunk in _chunks(np.asarray(windows))]

    def __len__(self) -> int:
        """Blocks."""
        return len(self._blocks)

    def step(
        self,
        index: int,
        observe: Observe | None = None,
        beside: Callable[[Block], None] | None = None,
    ) -> None:
        """Send all windows through a block; they must be taken in order, each once.

        `observe` is told of the inputs of its linear layers, some windows at a time. `beside` is
        then given the block, to send other states through it before its weights are let go of.
        """
        block = self._blocks[index]
        placeholders = block.parameters()
        self._weights.fill(block, self._of_block(index))
        before = self.states
        self._stations.running, self._watch.on = True, observe is not None
        mx.eval(
            _arrays(block),
            [_arrays((s.calls[index].args, s.calls[index].others)) for s in self._streams],
        )
        tasks = [partial(self._noted, block, index, stream) for stream in self._streams]
        lanes = len(tasks) if observe is None else cpulanes.count()
        for start in range(0, len(tasks), lanes):
            for seen in cpulanes.each(tasks[start : start + lanes]):
                if observe is not None:
                    observe(self._given(seen))
        self._watch.on = False
        if beside is not None:
            calls = [stream.calls[index] for stream in self._streams]
            beside(Block(block, self._of_block(index), calls, before))
        self._stations.running = False
        block.update(placeholders)  # never computed: what was in their place is let go of

    def finish(self, observe: Observe | None = None) -> npt.NDArray[np.float32]:
        """The hidden states that the head is given, float32 [windows, length, hidden].

        `observe` is told of the head's input, under the embedding's name where the head is tied.
        Raises Corrupt when weights are left over.
        """
        self._weights.fill(self._target, "", [self._prefix])
        self._weights.check_used()
        found = self.final(self.states)
        if observe is not None:
            for hidden in found:
                self._watch.on = True
                self.logits(hidden)  # not computed: only the head's input is looked at
                self._watch.on = False
                observe(self._given(self._watch.take()))
        self._streams = [_Stream(stream.tokens, mx.array(0.0), []) for stream in self._streams]
        return np.concatenate(found)

    def logits(self, hidden: npt.NDArray[np.float32] | mx.array) -> mx.array:
        """Logits [..., vocabulary] of hidden states [..., hidden] from `finish`, not computed yet.

        Also what the architecture does after its head, such as a soft cap.
        """
        states = mx.array(hidden)
        flat = states.reshape(1, -1, states.shape[-1])
        found: mx.array = self._target(flat)
        return found.reshape(*states.shape[:-1], -1)

    # -- for states that go another way ------------------------------------------------------------

    @property
    def states(self) -> States:
        """The hidden states so far."""
        return [stream.hidden for stream in self._streams]

    def block_of(self, name: str) -> int | None:
        """The block that a parameter of mlx-lm's name belongs to, None for those outside."""
        inside = name.removeprefix(f"{self._prefix}layers.")
        number = inside.partition(".")[0]
        return int(number) if inside != name and number.isdecimal() else None

    @property
    def embedding(self) -> str:
        """What mlx-lm calls the weight of the embedding."""
        return f"{self._prefix}embed_tokens.weight"

    @property
    def head(self) -> str:
        """What it calls that of the head; the embedding's where the two are one."""
        return self._head or self.embedding

    def embedding_weight(self) -> mx.array:
        """The embedding in float32 [tokens, hidden]."""
        return self._table.dense()

    def head_weight(self) -> mx.array:
        """The head's weight in float32 [vocabulary, hidden]; there after `finish`."""
        weight: mx.array = self._head_module["weight"] if self._head else self._table.dense()
        return weight

    def embedded(self, table: mx.array) -> States:
        """The first block's input where the embedding is `table`."""
        with self._with_table(StoredWeight(table)):
            return [self._begin(stream.tokens).hidden for stream in self._streams]

    def final(self, states: States) -> list[npt.NDArray[np.float32]]:
        """What the head is given for states after the last block."""
        found = []
        for stream, hidden in zip(self._streams, states, strict=True):
            self._stations.last = hidden
            found.append(np.array(self._inner(stream.tokens)))
        self._stations.last = None
        return found

    @contextmanager
    def _with_table(self, stored: StoredWeight) -> Iterator[None]:
        own = self._inner.embed_tokens
        path = self.embedding.removesuffix(".weight")
        self._inner.embed_tokens = Table(stored, path, self._watch)
        try:
            yield
        finally:
            self._inner.embed_tokens = own

    @contextmanager
    def with_head(self, weight: mx.array) -> Iterator[None]:
        """Have `logits` use a weight [vocabulary, hidden] in the place of `head_weight`."""
        if not self._head:
            with self._with_table(StoredWeight(weight)):
                yield
            return
        own = self._head_module["weight"]
        self._head_module.update({"weight": weight})
        try:
            yield
        finally:
            self._head_module.update({"weight": own})

    # -- inside ------------------------------------------------------------------------------------

    def _noted(self, block: nn.Module, index: int, stream: _Stream) -> list[Seen]:
        """Send some windows through a block; what its layers were given."""
        self._watch.take()
        call = stream.calls[index]
        hidden = block(stream.hidden, *call.args, **call.others)
        seen = self._watch.take()
        cpulanes.values(hidden, *(a for _, *given in seen for a in given if a is not None))
        stream.hidden = hidden
        return seen

    def _vocabulary(self) -> int:
        return self._weights.rows(self._head) or int(self._table.weight.shape[0])

    def _of_block(self, index: int) -> str:
        return f"{self._prefix}layers.{index}."

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
                watch_experts(module, path, self._watch)
            elif isinstance(module, nn.Linear):
                watch_linear(module, path, self._watch)
        self._stations = Stations(self._blocks)

        def call(own: Callable[..., Any], inputs: mx.array, *args: Any, **others: Any) -> Any:
            # hidden states go straight to the head
            is_hidden = mx.issubdtype(inputs.dtype, mx.floating)
            return inputs if is_hidden else own(inputs, *args, **others)

        replace_class(self._inner, call)

    def _begin(self, tokens: mx.array) -> _Stream:
        try:
            first, calls = self._stations.record(lambda: self._inner(tokens), len(self._blocks))
        except (Odd, TypeError, ValueError, AttributeError, IndexError) as error:
            raise _no_blocks(self._model_where, self._kind) from error
        mx.eval(first)
        return _Stream(tokens, first, calls)

    def _given(self, seen: Sequence[Seen]) -> list[Given]:
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
            for expert, _, values in by_expert(x, indices):
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
