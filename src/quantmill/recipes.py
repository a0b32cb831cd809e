"""What `create` is asked for: everything that a model's bytes depend on besides the files it reads.

A recipe is plain data, and JSON for the notes that repair follows (provenance.py).
"""

from __future__ import annotations

import math
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
from quantmill.plans import Automatic, Options, Override, Plan
from quantmill.readers import reader

_LISTS = ("license", "ignored")
"""Fields of a Modelfile that are tuples."""

_FILES = ("calibration", "imatrix")
"""Options that name a file."""

DECODED = "bf16"
"""The word that asks for decoded weights which are not quantized again."""


AUTO = "auto"
"""The word that asks for formats by measured effect, within a target."""


@dataclass(frozen=True, slots=True)
class Target:
    """How large `auto` may make a model, and for which program (readers.py).

    Either bits per weight, of all data stored, kept tensors and scales included; or bytes of all
    tensor blobs. Raises BadRequest for both, neither, what is not positive, and unknown readers.
    """

    bits_per_weight: float | None = None
    nbytes: int | None = None
    reader: str = "mlx-lm"

    def __post_init__(self) -> None:
        if (self.bits_per_weight is None) == (self.nbytes is None):
            raise BadRequest(
                "--quantize auto needs a target",
                kind="no_target",
                hint="either --target-bpw 4.5 or --target-size 6GB",
            )
        if not 0 < (self.nbytes or self.bits_per_weight or 0) < math.inf:
            raise BadRequest(f"{self.text} is no size")
        reader(self.reader)

    @property
    def text(self) -> str:
        """For people."""
        if self.nbytes is None:
            return f"{self.bits_per_weight:g} bits per weight"
        return f"{self.nbytes:,} bytes"

    def data_bytes(self, weights: int) -> int:
        """Bytes of data that a model of so many weights may have; of a size, headers included."""
        if self.nbytes is not None:
            return self.nbytes
        assert self.bits_per_weight is not None
        return int(self.bits_per_weight * weights / 8)

    def excess(self, plan: Plan) -> int:
        """Bytes of a plan that are too many, negative where there is room."""
        if self.nbytes is not None:
            return plan.blob_bytes - self.nbytes
        data = sum(spec.nbytes for spec in plan.tensors)
        return data - self.data_bytes(sum(spec.weights for spec in plan.tensors))


@dataclass(frozen=True, slots=True)
class Request:
    """The formats asked for: of float weights, or, after decoding, of quantized ones; of a draft.

    The word AUTO comes with a `target`. A wrong word is told here, before anything is opened:
    raises BadRequest.
    """

    quantize: str | None = None
    group_size: int | None = None
    requantize: str | None = None
    draft_quantize: str | None = None
    target: Target | None = None

    def __post_init__(self) -> None:
        if self.requantize is not None and self.quantize:
            raise BadRequest("--quantize and --requantize exclude each other", hint="give one")
        parse_request(self.draft_quantize)
        if not self.is_auto:
            parse_request(self.word, self.group_size)
        elif self.target is None:
            Target()  # says what is missing
        elif self.group_size is not None:
            raise BadRequest("--quantize auto chooses group sizes", hint="leave out --group-size")
        if self.target is not None and not self.is_auto:
            raise BadRequest("a target is for --quantize auto", hint="add --quantize auto")

    @property
    def is_auto(self) -> bool:
        """Whether formats are to be found by measuring."""
        return self.word is not None and self.word.strip().lower() == AUTO

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
    """The recipe as JSON; paths are made absolute, so that it holds wherever it is read.

    What `auto` was asked is not in it: its rules are.
    """
    options, said = asdict(recipe.options), None
    request = {k: v for k, v in asdict(recipe.request).items() if k != "target"}
    if recipe.options.automatic is None:
        del options["automatic"]
    options["overrides"] = [_rule(rule) for rule in recipe.options.overrides]
    options |= {key: _durable(options[key]) for key in _FILES}
    if recipe.modelfile is not None:
        said = asdict(recipe.modelfile)
        said |= {key: list(said[key]) for key in _LISTS}
    return {
        "source": _durable(recipe.source),
        "request": request,
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
        options["overrides"] = tuple(map(_read_rule, options["overrides"]))
        if "automatic" in options:
            options["automatic"] = Automatic(**options["automatic"])
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


def _rule(rule: Override) -> str | list[str]:
    fmt = rule.format
    text = f"{rule.pattern}={KEEP if fmt is None else f'{fmt.name}:{fmt.group_size}'}"
    return [text, rule.why] if rule.why else text


def _read_rule(said: str | list[str]) -> Override:
    if isinstance(said, str):
        return parse_override(said)
    text, why = said
    return replace(parse_override(text), why=why)
