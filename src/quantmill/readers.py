"""Which formats other programs read, tensor by tensor: one table.

docs/formats.md says how formats are recorded for them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from quantmill.errors import BadRequest
from quantmill.formats import AFFINE_BITS, AFFINE_GROUPS, Format


@dataclass(frozen=True, slots=True)
class Reader:
    """A program: affine formats that it reads in any mixture, and tensors that must agree.

    Tensors whose names give the same text with what fits `together` left out share their format.
    """

    name: str
    formats: tuple[Format, ...]
    together: str = ""

    def group(self, name: str) -> str:
        """What tensors that must have one format have in common: a text, the name for others."""
        return re.sub(self.together, "", name) if self.together else name


def _affine(bits: tuple[int, ...]) -> tuple[Format, ...]:
    return tuple(Format("affine", b, group) for b in bits for group in AFFINE_GROUPS)


READERS: Mapping[str, Reader] = {
    # config.json has an entry for each module, with any width and group that MLX has
    "mlx-lm": Reader("mlx-lm", _affine(AFFINE_BITS)),
    # Blobs record the type by name, and only these two affine widths have one. Its runner joins an
    # expert's gate and up, which takes one format for both.
    "ollama": Reader("ollama", _affine((4, 8)), r"(?<=\.experts\.)(?:gate|up)_proj"),
}
"""By name; everything else raises."""


def reader(name: str) -> Reader:
    """The row of a program; raises BadRequest for one that nothing is known of."""
    found = READERS.get(name.strip().lower())
    if found is None:
        raise BadRequest(f"unknown reader {name!r}", hint=f"choose {' or '.join(READERS)}")
    return found
