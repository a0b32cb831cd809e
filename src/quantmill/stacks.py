"""Expert stacks: per-expert tensors become one tensor per projection, in expert order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from quantmill.errors import BadSource
from quantmill.experts import ExpertName, parse_expert
from quantmill.plans import BlobSpec, TensorSpec
from quantmill.source import SourceTensor


def split_experts(
    tensors: Iterable[SourceTensor],
) -> tuple[list[SourceTensor], dict[str, dict[str, dict[int, SourceTensor]]]]:
    """Plain tensors, and per-expert ones as group → projection → index → tensor.

    Raises BadSource for two tensors with the same place in a stack.
    """
    plain: list[SourceTensor] = []
    stacks: dict[str, dict[str, dict[int, SourceTensor]]] = defaultdict(lambda: defaultdict(dict))
    for tensor in tensors:
        expert = parse_expert(tensor.name)
        if expert is None:
            plain.append(tensor)
        else:
            _add_expert(stacks, expert, tensor)
    return plain, stacks


def _add_expert(
    stacks: dict[str, dict[str, dict[int, SourceTensor]]], expert: ExpertName, tensor: SourceTensor
) -> None:
    members = stacks[expert.group][expert.projection]
    if expert.index in members:
        raise BadSource(
            f"{members[expert.index].name!r} and {tensor.name!r} are the same expert",
            kind="duplicate_expert",
        )
    members[expert.index] = tensor


def ordered_members(
    group: str, projection: str, members: Mapping[int, SourceTensor], count: int
) -> list[SourceTensor]:
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


def expert_count(projections: Mapping[str, Mapping[int, SourceTensor]]) -> int:
    """How many experts a group must have: one more than the highest index in any projection."""
    return 1 + max(index for members in projections.values() for index in members)


def stacked(
    group: str,
    projections: Mapping[str, Mapping[int, SourceTensor]],
    ordered: Callable[..., Sequence[SourceTensor]] = ordered_members,
) -> Iterator[tuple[SourceTensor, tuple[str, ...]]]:
    """Each projection as the tensor its stack will be, with the names that go into it.

    `ordered` is called as `ordered_members` is. Raises BadSource where it does.
    """
    count = expert_count(projections)
    for projection in sorted(projections):
        members = ordered(group, projection, projections[projection], count)
        name, first = f"{group}.{projection}.weight", members[0]
        stack = SourceTensor(name, first.dtype, (count, *first.shape))
        yield stack, tuple(m.name for m in members)


def stack_blobs(group: str, specs: list[TensorSpec]) -> list[BlobSpec]:
    """One blob for the whole group when its projections agree, else one for each."""
    if len({spec.format for spec in specs}) == 1:
        return [blob_of(group, specs)]
    return [blob_of(spec.name, [spec]) for spec in specs]


def blob_of(name: str, specs: Sequence[TensorSpec]) -> BlobSpec:
    """A blob of tensors that share one format; tensors in name order, the format recorded."""
    ordered = tuple(sorted(specs, key=lambda s: s.name))
    fmt = ordered[0].format
    return BlobSpec(name, ordered, fmt.metadata() if fmt else {})
