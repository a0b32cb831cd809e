"""Scales and biases searched for, with every weight's error counted by its column's importance.

The formats and their bytes' layout are those of quantmill.quantize; only the choice of parameters
differs (docs/formats.md, Search), and no group's weighted error is above that of `quantize`. Groups
are independent, so a tensor may be given in pieces. kernels.py does the work, searchedarrays.py
where it cannot, with the same bytes.
"""

from __future__ import annotations

from quantmill import kernels
from quantmill.errors import BadRequest
from quantmill.formats import FLOAT_DTYPES, Format, is_valid
from quantmill.weights import Quantized, count_groups, no_groups


def search(
    raw: memoryview, dtype: str, fmt: Format, importance: memoryview, first: int = 0
) -> Quantized:
    """Quantize consecutive groups of weights with the parameters of least weighted error.

    `raw` holds little-endian elements of `dtype` (BF16, F16 or F32), a whole number of groups,
    which follow each other along rows and rows along the matrix. `importance` is one float32 for
    each column of the matrix, finite and not negative, of any shape; the weights of a group that
    has no importance at all count alike. `first` is the column at which `raw` begins.

    Raises BadRequest for other dtypes, a partial group, an importance that is no such number or
    not of whole groups, and a column where no group begins; BadWeights where finite weights are too
    large for a finite affine scale.
    """
    return _search(raw, dtype, dtype, fmt, importance, first)


def choose(
    raw: memoryview, fmt: Format, importance: memoryview, scale_dtype: str
) -> tuple[memoryview, memoryview | None]:
    """Scales and biases for the rows of one group of columns, without codes.

    `raw` holds F32 weights [rows, group], `importance` F32 [group]. Of affine formats both results
    hold `scale_dtype` (BF16, F16 or F32) [rows], and errors are those of values in that dtype; of
    the others there are bytes [rows] and None. The source of the search is section "Search" of
    docs/formats.md, that of choosing anew for each group GPTQ (Frantar and others, 2022) with
    groups. Raises as `search` does.
    """
    found = _search(raw, "F32", scale_dtype, fmt, importance, 0)
    return found.scales, found.biases


def _search(
    raw: memoryview, dtype: str, stored: str, fmt: Format, importance: memoryview, first: int
) -> Quantized:
    raw = memoryview(raw).cast("B")
    groups = count_groups(raw, dtype, fmt)
    if stored not in FLOAT_DTYPES:
        raise BadRequest(f"scales cannot have dtype {stored}", kind="unsupported_dtype")
    if not is_valid(fmt.mode, fmt.bits, fmt.group_size):
        raise BadRequest(f"{fmt.label} is no format", kind="unsupported_quantize_type")
    importance = memoryview(importance).cast("B")
    _check_importance(importance, fmt, first)
    if not groups:
        return no_groups(fmt)
    found = kernels.search(raw, dtype, stored, fmt, importance, first)
    if found is not None:
        return found
    from quantmill.searchedarrays import search_arrays

    return search_arrays(raw, dtype, stored, fmt, importance, first)


def _check_importance(importance: memoryview, fmt: Format, first: int) -> None:
    import numpy as np

    columns, odd = divmod(importance.nbytes, 4)
    if odd or not columns or columns % fmt.group_size:
        raise BadRequest(f"importance of {columns} columns is not whole groups of {fmt.group_size}")
    if first % fmt.group_size or not 0 <= first < columns:
        raise BadRequest(f"no group of {fmt.group_size} in {columns} columns begins at {first}")
    values = np.frombuffer(importance, np.float32)
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise BadRequest("importance must be finite and not negative")
