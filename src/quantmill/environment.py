"""What this installation can do: versions, devices, optional parts."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from typing import Any

from quantmill import kernels
from quantmill.blas import Blas
from quantmill.version import __version__

OPTIONAL = {"mlx-lm": "run", "gguf": "gguf", "huggingface_hub": "hub", "mkl": "fast"}
"""Optional packages and the extra that installs them."""


def describe(blas: Blas) -> dict[str, Any]:
    """Facts for `quantmill doctor`; `blas` is what `blas.preload` chose."""
    import mlx.core as mx

    return {
        "quantmill": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "kernels": kernels.in_use(),
        "mlx": _version("mlx"),
        "device": str(mx.default_device()),
        "blas": blas.path or f"MLX's own ({blas.reason})",
        **{
            name: _version(name) or f"not installed (quantmill[{extra}])"
            for name, extra in OPTIONAL.items()
        },
        "executable": sys.executable,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
