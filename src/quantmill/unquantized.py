"""The numbers of a checkpoint as an open model, for passes and comparisons of what it was."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from quantmill.classify import FLOAT, classify
from quantmill.load import open_model
from quantmill.model import Model
from quantmill.names import ModelName
from quantmill.opening import GGUF_SUFFIX
from quantmill.source import MODEL, Source
from quantmill.store import Store

_MLX_LM = "quantization"
"""What the config of a directory says whose codes are MLX's own."""


@contextmanager
def unquantized(
    place: str | Path, source: Source, stored: Callable[[Store], ModelName]
) -> Iterator[Callable[[], Model]]:
    """What opens the model at `place`, as often as it is called; `source` is what was read of it.

    A directory of plain weights, or of mlx-lm's, is opened where it lies. Other weights are
    imported by `stored`, codes kept where MLX has them and decoded where not, into a temporary
    store that is removed in the end (as large as they are decoded, in TMPDIR), when first asked.
    """
    own = next((part.source for part in source.parts if part.role == MODEL), source)
    if opens_as_it_is(own) and source.adapter is None:
        yield lambda: open_model(Path(place))
        return
    with ExitStack() as stack:
        made: list[tuple[ModelName, Store]] = []

        def opened() -> Model:
            if not made:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="quantmill-"))
                store = Store(folder)
                made.append((stored(store), store))
            name, store = made[0]
            model = open_model(name, store=store)
            model.where = str(place)
            return model

        yield opened


def opens_as_it_is(source: Source) -> bool:
    """Whether a directory needs no import to be a model."""
    if any(tensor.file.endswith(GGUF_SUFFIX) for tensor in source.tensors.values()):
        return False
    return _MLX_LM in source.config or classify(source, None).name == FLOAT
