"""A fast BLAS for MLX's matrix products on Linux CPUs, and the threads of NumPy's own.

MLX's CPU wheel links the reference BLAS. A library that exports the standard `cblas_*` symbols
and is loaded globally before MLX takes their place: oneMKL makes float32 products 19 times faster
(docs/running.md). Bytes of stored models do not depend on it: quantizing uses no matrix products.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

VARIABLE = "QUANTMILL_BLAS"
"""`off`, or the path of a library; anything else is an error when the library does not load."""

_OFF = {"off", "0", "no", "none"}
_SYMBOL = "cblas_sgemm"


@dataclass(frozen=True, slots=True)
class Blas:
    """Which library serves MLX's matrix products. `path` None means MLX's own, for `reason`."""

    path: str | None
    reason: str


_chosen: Blas | None = None


def preload() -> Blas:
    """Load the first library found, once, before MLX; says what is in use.

    Order: the variable QUANTMILL_BLAS, oneMKL from the package `mkl`, OpenBLAS of the system.
    Does nothing where MLX is loaded already, on macOS (Accelerate is fast), and when switched off.
    """
    global _chosen  # noqa: PLW0603  (a process has one BLAS)
    if _chosen is None:
        _chosen = _preload()
    return _chosen


def _preload() -> Blas:
    wanted = os.environ.get(VARIABLE, "")
    if wanted.lower() in _OFF:
        return Blas(None, f"{VARIABLE} is {wanted}")
    if sys.platform != "linux":
        return Blas(None, "MLX brings its own here")
    if "mlx.core" in sys.modules:
        return Blas(None, "MLX was loaded before")
    for path in [wanted] if wanted else _candidates():
        try:
            library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            if wanted:
                return Blas(None, f"{VARIABLE}: {error}")
            continue
        if hasattr(library, _SYMBOL):
            return Blas(path, "found")
    return Blas(None, "none found; install the package `mkl` or Debian's libopenblas0")


def _candidates() -> Iterator[str]:
    for folder in (Path(sys.prefix) / "lib", Path(sys.base_prefix) / "lib"):
        yield from (str(p) for p in sorted(folder.glob("libmkl_rt.so*"), reverse=True))
    for name in ("openblas", "openblas64"):
        found = ctypes.util.find_library(name)
        if found:
            yield found


# -- NumPy's own -----------------------------------------------------------------------------------

_one = threading.Lock()
_users = 0
_before = 1


def has_threads() -> bool:
    """Whether the threads of NumPy's BLAS can be set: `one_thread` has an effect."""
    return _threads() is not None


@contextmanager
def one_thread() -> Iterator[None]:
    """Products of NumPy in one thread each, for the whole process, for work that has several.

    Threads of OpenBLAS wait for one another while they hold their processors: with a thread of
    Python's for each processor it is several times faster to have no others. Does nothing where
    NumPy has another BLAS.
    """
    global _users, _before  # noqa: PLW0603  (a process has one of NumPy's)
    threads = _threads()
    if threads is None:
        yield
        return
    get, put = threads
    with _one:
        _users += 1
        if _users == 1:
            _before = get()
            put(1)
    try:
        yield
    finally:
        with _one:
            _users -= 1
            if _users == 0:
                put(_before)


@cache
def _threads() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """The functions that tell and set how many threads OpenBLAS uses, as NumPy's wheels name them.

    They are looked up through NumPy's extension, in the library that it was linked with.
    """
    try:
        extension = importlib.import_module("numpy._core._multiarray_umath")
        library = ctypes.CDLL(str(extension.__file__))
    except (ImportError, OSError):
        return None
    for prefix in ("scipy_openblas", "openblas"):
        for suffix in ("64_", ""):
            get = getattr(library, f"{prefix}_get_num_threads{suffix}", None)
            put = getattr(library, f"{prefix}_set_num_threads{suffix}", None)
            if get is not None and put is not None:
                put.restype = None
                return get, put
    return None
