"""What `create` is asked for: everything that a model's bytes depend on besides the files it reads.

A recipe is plain data, and JSON for the notes that repair follows (provenance.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from quantmill.drafts import Numbers
from quantmill.errors import BadRequest, QuantmillError
from quantmill.formats import parse_request
from quantmill.modelfile import Modelfile
from quantmill.planner import KEEP, parse_override
from quantmill.plans import Options, Override

_LISTS = ("license", "ignored")
"""Fields of a Modelfile that are tuples."""

_FILES = ("calibration", "imatrix")
"""Options that name a file."""

DECODED = "bf16"
"""The word that asks for decoded weights which are not quantized again."""


@dataclass(frozen=True, slots=True)
class Request:
    """The formats asked for: of float weights, or, after decoding, of quantized ones; of a draft.

    A wrong word is told here, before anything is opened: raises BadRequest.
    """

    quantize: str | None = None
    group_size: int | None = None
    requantize: str | None = None
    draft_quantize: str | None = None

    def __post_init__(self) -> None:
        if self.requantize is not None and self.quantize:
            raise BadRequest("--quantize and --requantize exclude each other", hint="give one")
        parse_request(self.word, self.group_size)
        parse_request(self.draft_quantize)

    @property
    def decode(self) -> bool:
        """Whether quantized weights shall be decoded."""
        return self.requantize is not None

    def numbers(self, options: Options | None) -> Numbers:
        """Of which parts of a model numbers are needed: a format is asked for, in whatever way."""
        rules = options.overrides if options else ()
        ruled = any(rule.format for rule in rules)
        return Numbers(bool(self.decode or self.word) or ruled, bool(self.draft_quantize) or ruled)

    @property
    def word(self) -> str | None:
        """The name of the format, None for numbers as they are."""
        if self.requantize is None:
            return self.quantize
        return None if self.requantize.strip().lower() == DECODED else self.requantize


@dataclass(frozen=True, slots=True)
class Recipe:
    """A source and what is to be made of it.

    `source`, `draft` and `merge_lora` are paths, repositories on the hub or, for the source, a
    stored model.
    """

    source: str | Path
    request: Request = field(default_factory=Request)
    options: Options = field(default_factory=Options)
    modelfile: Modelfile | None = None
    draft: str | Path | None = None
    merge_lora: str | Path | None = None
    follow_links: bool = False

    @property
    def numbers(self) -> Numbers:
        """Of which parts numbers are needed; an adapter is added to them."""
        found = self.request.numbers(self.options)
        return found if self.merge_lora is None else replace(found, of_model=True)


def as_record(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON; paths are made absolute, so that it holds wherever it is read."""
    options, said = asdict(recipe.options), None
    options["overrides"] = [_rule(rule) for rule in recipe.options.overrides]
    options |= {key: _durable(options[key]) for key in _FILES}
    if recipe.modelfile is not None:
        said = asdict(recipe.modelfile)
        said |= {key: list(said[key]) for key in _LISTS}
    return {
        "source": _durable(recipe.source),
        "request": asdict(recipe.request),
        "options": options,
        "modelfile": said,
        "draft": _durable(recipe.draft),
        "merge_lora": _durable(recipe.merge_lora),
        "follow_links": recipe.follow_links,
    }


def from_record(record: Mapping[str, Any]) -> Recipe | None:
    """The recipe of a record; None for one that another version wrote, or that is damaged."""
    try:
        options, said = dict(record["options"]), record["modelfile"]
        options["overrides"] = tuple(map(parse_override, options["overrides"]))
        if said is not None:
            said = Modelfile(**{**said, **{key: tuple(said[key]) for key in _LISTS}})
        recipe = Recipe(
            record["source"], Request(**record["request"]), Options(**options), said,
            record["draft"], record["merge_lora"], record["follow_links"],
        )  # fmt: skip
        known = isinstance(recipe.source, str) and as_record(recipe) == record
        return recipe if known else None
    except (KeyError, TypeError, ValueError, AttributeError, QuantmillError):
        return None


def _durable(place: str | Path | None) -> str | None:
    if place is None:
        return None
    return os.path.abspath(place) if os.path.exists(place) else str(place)


def _rule(rule: Override) -> str:
    fmt = rule.format
    return f"{rule.pattern}={KEEP if fmt is None else f'{fmt.name}:{fmt.group_size}'}"
