"""Quantize open-weight safetensors checkpoints into MLX formats, in a store that Ollama reads.

import quantmill
made = quantmill.create("minilm:int8", "path/to/checkpoint", quantize="int8")
print(made.plan.bits_per_weight, made.digest)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from quantmill.version import __version__

if TYPE_CHECKING:
    from quantmill.creation import Created, create, plan
    from quantmill.differences import diff
    from quantmill.errors import QuantmillError
    from quantmill.evaluation import evaluate
    from quantmill.execute import Progress
    from quantmill.facts import list_models, show
    from quantmill.formats import Format, parse_format
    from quantmill.load import open_model
    from quantmill.model import Model
    from quantmill.modelfile import parse_modelfile
    from quantmill.names import ModelName, parse_name
    from quantmill.planner import parse_override
    from quantmill.plans import Options, Plan, plan_from_json, plan_to_json
    from quantmill.pruning import copy, plan_prune, prune, remove
    from quantmill.pulling import pull
    from quantmill.pushing import push
    from quantmill.store import Store
    from quantmill.verification import verify
    from quantmill.weighterrors import weight_errors

# Names are fetched when they are first used, so that `import quantmill` costs nothing.
_HOMES = {
    "Created": "creation",
    "Format": "formats",
    "Model": "model",
    "ModelName": "names",
    "Options": "plans",
    "Plan": "plans",
    "Progress": "execute",
    "QuantmillError": "errors",
    "Store": "store",
    "copy": "pruning",
    "create": "creation",
    "diff": "differences",
    "evaluate": "evaluation",
    "list_models": "facts",
    "open_model": "load",
    "parse_format": "formats",
    "parse_modelfile": "modelfile",
    "parse_name": "names",
    "parse_override": "planner",
    "plan": "creation",
    "plan_from_json": "plans",
    "plan_prune": "pruning",
    "plan_to_json": "plans",
    "prune": "pruning",
    "pull": "pulling",
    "push": "pushing",
    "remove": "pruning",
    "show": "facts",
    "verify": "verification",
    "weight_errors": "weighterrors",
}

__all__ = [
    "Created",
    "Format",
    "Model",
    "ModelName",
    "Options",
    "Plan",
    "Progress",
    "QuantmillError",
    "Store",
    "__version__",
    "copy",
    "create",
    "diff",
    "evaluate",
    "list_models",
    "open_model",
    "parse_format",
    "parse_modelfile",
    "parse_name",
    "parse_override",
    "plan",
    "plan_from_json",
    "plan_prune",
    "plan_to_json",
    "prune",
    "pull",
    "push",
    "remove",
    "show",
    "verify",
    "weight_errors",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"quantmill.{_HOMES[name]}"), name)
