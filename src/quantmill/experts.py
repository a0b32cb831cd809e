"""Names of expert tensors: which belong together, which are one expert of many.

Pure functions on text. A per-expert tensor is named `<group>.<index>.<projection>.weight`;
the members of a group are stacked into one tensor per projection (docs/formats.md).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from quantmill.errors import BadSource

_WEIGHT = ".weight"

# In the order they are tried; a name may contain more than one of them.
_GROUP_MARKERS = (
    ".mlp.experts.",
    ".mlp.shared_experts.",
    ".mlp.switch_mlp.",
    ".moe.experts.",
    ".mixer.experts.",
    ".mixer.shared_experts.",
)

_CONTAINERS = (
    "model.language_model.backbone.",
    "model.language_model.",
    "language_model.model.",
    "language_model.backbone.",
    "language_model.",
    "model.",
    "backbone.",
    "mtp.",
    "",
)

_STACK_PARTS = (".experts.", ".mlp.switch_mlp.", ".mlp.shared_experts.", ".mixer.shared_experts.")
_STACK_COMPANIONS = (".bias", ".scale", ".qbias")

_ROUTING_GATES = (
    ".mlp.gate.weight",
    ".mixer.gate.weight",
    ".shared_expert_gate.weight",
    ".router.proj.weight",
)

# The digit counts are bounded because a file may claim any name, and Python refuses to convert
# very long numbers; a longer one is no index. `+1` counts as an index, as it does in Ollama.
_LAYER_PATH = re.compile(rf"(?:{'|'.join(map(re.escape, _CONTAINERS))})layers\.[0-9]+")
_LAYER = re.compile(r"\.layers\.([0-9]{1,18})\.")
_INDEX = re.compile(r"[+-]?[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class ExpertName:
    """One expert's tensor: its group, its index there, and the projection it belongs to."""

    group: str
    index: int
    projection: str


def group_prefix(name: str) -> str | None:
    """The prefix shared by all experts of a layer, None for a tensor outside such a group."""
    if not name.endswith(_WEIGHT):
        return None
    for marker in _GROUP_MARKERS:
        layer, found, _ = name.partition(marker)
        if found and _LAYER_PATH.fullmatch(layer):
            return layer + marker.removesuffix(".")
    return None


def parse_expert(name: str) -> ExpertName | None:
    """The parts of a per-expert tensor's name, None for any other tensor.

    Raises BadSource for an expert with an index but without a projection.
    """
    group = group_prefix(name)
    if group is None:
        return None
    member = name[len(group) + 1 : -len(_WEIGHT)]
    index, _, projection = member.partition(".")
    if not _INDEX.fullmatch(index):
        return None
    if not projection:
        raise BadSource(f"expert tensor {name!r} names no projection", kind="no_projection")
    return ExpertName(group, int(index), projection)


def is_stacked_expert(name: str) -> bool:
    """Whether the tensor holds expert weights, whose rank may be 3; `.weight` is not required."""
    return not name.endswith(_STACK_COMPANIONS) and any(part in name for part in _STACK_PARTS)


def is_routing_gate(name: str) -> bool:
    """Whether the tensor decides which experts a token visits."""
    return name.endswith(_ROUTING_GATES)


def layer_index(name: str) -> int | None:
    """The number after the first `.layers.`, None where there is none or no dot leads it."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None
