"""Open an adapter's directory beside the model that it changes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from quantmill import strictjson
from quantmill.adapters import ADAPTER_CONFIG, FOLDER
from quantmill.checkpoint import Checkpoint, Layout
from quantmill.errors import BadSource
from quantmill.parts import OpenParts
from quantmill.source import ADAPTER, MODEL, OpenSource, Part, joined

_WEIGHTS = ("adapter_model.safetensors", "adapters.safetensors")
"""PEFT's file, and mlx-lm's; numbered ones beside it are earlier states of the training."""


def _weights(names: Mapping[str, int]) -> list[str]:
    found = [name for name in _WEIGHTS if name in names]
    if len(found) == 1:
        return found
    pickles = [n for n in names if n.startswith("adapter_model.") and n not in _WEIGHTS]
    if found:
        what = f"both {_WEIGHTS[0]} and {_WEIGHTS[1]}"
    elif pickles:
        what = f"{pickles[0]}, a pickle, which is never opened since it may execute code; no "
        what += _WEIGHTS[0]
    else:
        what = f"neither {_WEIGHTS[0]} nor {_WEIGHTS[1]}"
    raise BadSource(f"the adapter has {what}", kind="no_weights")


_LAYOUT = Layout(_weights, (), needs_config=False)


def with_adapter(opened: OpenSource, path: str | Path, *, follow_links: bool = False) -> OpenParts:
    """An open model together with an adapter of it; closes the model if that fails.

    Raises BadSource for a directory that is no adapter, and for a model of several components.
    """
    with ExitStack() as stack:
        stack.push(opened)
        parts = opened.source.parts or (Part(MODEL, MODEL, opened.source),)
        if not any(part.role == MODEL for part in parts):
            raise BadSource(
                "an adapter changes a model that is imported with it",
                kind="unsupported_adapter",
                hint="import model and adapter first, then add the draft model",
            )
        folder = Path(path)
        if not folder.is_dir():
            raise BadSource(
                f"{folder} is not the directory of an adapter",
                kind="not_an_adapter",
                hint=f"give the directory that holds {ADAPTER_CONFIG}",
            )
        adapter = Checkpoint(folder, follow_links=follow_links, layout=_LAYOUT)
        stack.push(adapter)
        source = replace(adapter.source, config=_config(adapter, folder), files=(), texts={})
        parts = (*parts, Part(ADAPTER, ADAPTER, source, folder=FOLDER))
        whole = joined(parts, opened.source.config, texts=opened.source.texts)
        found = OpenParts(whole, {"": opened, FOLDER: adapter})
        stack.pop_all()
    return found


def _config(adapter: Checkpoint, folder: Path) -> dict[str, object]:
    if all(file.name != ADAPTER_CONFIG for file in adapter.source.files):
        raise BadSource(f"{folder}: no {ADAPTER_CONFIG}", kind="missing_config")
    try:
        return strictjson.parse_object(adapter.read_file(ADAPTER_CONFIG), constants=True)
    except strictjson.BadJson as error:
        raise BadSource(f"{ADAPTER_CONFIG}: {error}", kind="invalid_config") from None
