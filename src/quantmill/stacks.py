"""Expert stacks: per-expert tensors become one tensor per projection, in expert order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

from quantmill.errors import BadSource
from quantmill.experts import ExpertName, parse_expert
from quantmill.plans import BlobSpec, TensorSpec
from quantmill.source import SourceTensor


class Member(Protocol):
    """A tensor of a checkpoint, or a weight that is stored in several."""

    @property
    def name(self) -> str:
        """Name of the weight."""

    @property
    def dtype(self) -> str:
        """Dtype tag of its elements, or of its codes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape; codes count, not words."""


_M = TypeVar("_M", bound=Member)
Projections = dict[str, dict[int, _M]]


def split_experts(tensors: Iterable[_M]) -> tuple[list[_M], dict[str, Projections[_M]]]:
    """Plain tensors, and per-expert ones as group → projection → index → tensor.

    Raises BadSource for two tensors with the same place in a stack.
    """
    plain: list[_M] = []
    stacks: dict[str, Projections[_M]] = defaultdict(lambda: defaultdict(dict))
    for tensor in tensors:
        expert = parse_expert(tensor.name)
        if expert is None:
            plain.append(tensor)
        else:
            _add_expert(stacks, expert, tensor)
    return plain, stacks


def _add_expert(stacks: dict[str, Projections[_M]], expert: ExpertName, tensor: _M) -> None:
    members = stacks[expert.group][expert.projection]
    if expert.index in members:
        raise BadSource(
            f"{members[expert.index].name!r} and {tensor.name!r} are the same expert",
            kind="duplicate_expert",
        )
    members[expert.index] = tensor


def ordered_members(group: str, projection: str, members: Mapping[int, _M], count: int) -> list[_M]:
    """The experts of one projection in index order.

    Raises BadSource unless there are `count` of them, numbered from 0 without gaps, equal in dtype
    and shape.
    """
    indices = sorted(members)
    # a file may claim any index, so nothing here may grow with `count`
    wrong = next((min(i, at) for at, i in enumerate(indices) if i != at), len(indices))
    if wrong != count:
        what = "has no" if wrong not in members else "cannot be the index of"
        raise BadSource(f"{group}: expert {wrong} {what} {projection}", kind="missing_expert")
    ordered = [members[index] for index in indices]
    for tensor in ordered[1:]:
        if (tensor.dtype, tensor.shape) != (ordered[0].dtype, ordered[0].shape):
            raise BadSource(
                f"{group}: {projection} differs between experts: {ordered[0].name!r} is "
                f"{ordered[0].dtype} {list(ordered[0].shape)}, {tensor.name!r} is "
                f"{tensor.dtype} {list(tensor.shape)}",
                kind="mismatched_expert_layout",
            )
    return ordered


def expert_count(projections: Mapping[str, Mapping[int, _M]]) -> int:
    """How many experts a group must have: one more than the highest index in any projection."""
    return 1 + max(index for members in projections.values() for index in members)


def stacked(
    group: str, projection: str, members: Sequence[SourceTensor]
) -> tuple[SourceTensor, tuple[str, ...]]:
    """Ordered members as the tensor that their stack will be, with the names that go into it."""
    name, first = f"{group}.{projection}.weight", members[0]
    stack = SourceTensor(name, first.dtype, (len(members), *first.shape), blocks=first.blocks)
    return stack, tuple(m.name for m in members)


def blob_of(name: str, specs: Sequence[TensorSpec]) -> BlobSpec:
    """A blob of tensors that share one format; tensors in name order, the format recorded."""
    ordered = tuple(sorted(specs, key=lambda s: s.name))
    fmt = ordered[0].format
    return BlobSpec(name, ordered, fmt.metadata() if fmt else {})
