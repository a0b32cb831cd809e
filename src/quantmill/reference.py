"""Whatever a model can be compared with, as an open model: stored, or a source as it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from quantmill.creation import create
from quantmill.errors import BadName, BadPlan, NotFound
from quantmill.load import open_model
from quantmill.model import Model
from quantmill.names import as_name
from quantmill.opening import Report, locate, open_source
from quantmill.store import Store
from quantmill.unquantized import unquantized


@contextmanager
def opened(source: str | Path, store: Store, fetching: Report | None = None) -> Iterator[Model]:
    """Open a stored model by name, a checkpoint directory, a GGUF file, or a hub repository.

    Directories of plain weights, and mlx-lm's, are opened where they lie. Weights that are coded
    otherwise are imported as they are, codes kept where MLX has them and decoded where not, into a
    temporary store that is removed afterwards (as large as they are decoded, in TMPDIR).

    Raises NotFound for what is neither, and what `open_model` and `create` do.
    """
    if isinstance(source, str) and _is_stored(source, store):
        with open_model(source, store=store) as model:
            yield model
        return
    place = locate(source, fetching)
    if not os.path.exists(place):
        raise NotFound(
            f"there is no model, directory or file {str(source)!r}",
            hint="`quantmill list` shows what is in the store",
        )
    with open_source(place) as checkpoint:
        if checkpoint.source.is_pipeline:
            raise BadPlan(
                f"{source} is made of components, so there is no forward pass",
                kind="pipeline",
                hint="`quantmill diff` compares weights tensor by tensor",
            )
        found = checkpoint.source
    made = partial(create, "reference", place)
    with (
        unquantized(place, found, lambda own: made(store=own).name) as open_it,
        open_it() as model,
    ):
        model.where = str(source)
        yield model


def _is_stored(text: str, store: Store) -> bool:
    """Whether a model of that name is there; a path that exists is one only if it is not."""
    try:
        store.get_manifest(as_name(text))
    except (BadName, NotFound):
        return False
    return True
