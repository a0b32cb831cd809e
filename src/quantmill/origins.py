"""What a stored model was made from, as noted, and the plan of it made again.

The plan is believed as long as the source is on this machine and gives blobs of the names and sizes
that the model has. Nothing is fetched from the hub for it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from quantmill import provenance
from quantmill.creation import opened, plan_for, stored_base_of
from quantmill.drafts import stored_base
from quantmill.errors import QuantmillError
from quantmill.manifest import Manifest
from quantmill.plans import CPU_PROFILE, Options, Plan
from quantmill.recipes import Recipe
from quantmill.store import Store


@dataclass(frozen=True, slots=True)
class Origin:
    """A source, the options of `create`, and the plan that they give.

    `problem` says why the plan could not be made again; `plan` and `recipe` are then None.
    """

    source: str | None
    options: tuple[str, ...]
    plan: Plan | None = None
    recipe: Recipe | None = None
    problem: str | None = None


def origin_of(store: Store, manifest: Manifest) -> Origin:
    """The latest recipe that still gives the model; without one why the latest of all does not."""
    problem: str | None = None
    recipes = provenance.recipes(store, manifest.digest)
    for recipe in recipes:
        plan, why = _plan_again(store, manifest, recipe)
        if plan is not None:
            return Origin(str(recipe.source), option_words(recipe), plan, recipe)
        problem = problem or why
    if not recipes:
        return Origin(None, (), problem="no note says what the model was made from")
    return Origin(str(recipes[0].source), option_words(recipes[0]), problem=problem)


def _plan_again(store: Store, manifest: Manifest, recipe: Recipe) -> tuple[Plan | None, str | None]:
    """The plan, or why there is none."""
    missing = _missing(store, recipe)
    if missing:
        return None, f"{missing} is not on this machine"
    try:
        with opened(recipe, stored_base_of(store, recipe)) as checkpoint:
            plan = plan_for(checkpoint.source, recipe.request, recipe.options)
    except QuantmillError as error:
        return None, f"the source cannot be read: {error.message}"
    sizes = {ref.name: ref.size for ref in manifest.tensor_refs()}
    if any(sizes.get(blob.name) != blob.size for blob in plan.blobs):
        return None, f"{recipe.source} is no longer what the model was made from"
    return plan, None


def _missing(store: Store, recipe: Recipe) -> str | None:
    """The first place that a recipe names and that is not there."""
    files = recipe.options.calibration, recipe.options.imatrix
    for place in (recipe.source, recipe.draft, recipe.merge_lora, *files):
        if place is None or os.path.exists(place):
            continue
        if place == recipe.source and recipe.draft and stored_base(store, place):
            continue
        return str(place)
    return None


def option_words(recipe: Recipe) -> tuple[str, ...]:
    """The options of `create` that a recipe stands for, as they would be typed."""
    request, options = recipe.request, recipe.options
    given = {
        "--quantize": request.quantize,
        "--requantize": request.requantize,
        "--group-size": request.group_size,
        "--draft": recipe.draft,
        "--draft-quantize": request.draft_quantize,
        "--merge-lora": recipe.merge_lora,
        "--profile": options.profile if options.profile != CPU_PROFILE else None,
        "--method": options.method if options.method != Options().method else None,
        "--calibration": options.calibration,
        "--imatrix": options.imatrix,
        "--e8m0": options.rounding if options.rounding != Options().rounding else None,
    }
    words = [f"{option} {value}" for option, value in given.items() if value is not None]
    words += [f"--tensor {o.pattern}={o.format.label if o.format else 'keep'}"
              for o in options.overrides]  # fmt: skip
    words += ["--global-scale"] if options.global_scale else []
    return (*words, *(["--allow-non-finite"] if options.allow_non_finite else []))
