"""GGUF's types of blocks whose codes an MLX format holds without loss: one row for each type.

Every type here computes a number as scale * code, or as scale * code + minimum, with one scale for
16 or for a multiple of 32 numbers; ggmlblocks.py takes the blocks apart. A type without a row has
groups of another size, or codes that stand for no evenly spaced numbers: it is decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from quantmill.coded import Coded
from quantmill.formats import MXFP4, NVFP4, Format
from quantmill.plans import CODES, GGML, Coding
from quantmill.source import RAW_BLOCKS, SourceTensor


@dataclass(frozen=True, slots=True)
class Exact:
    """A row: numbers and bytes of a block, the format, and the dtype of its scales and biases.

    Products of a scale and a whole number are exact in that dtype: those with a power of two in
    F16, unless they are too large for it; those with the six bits that K-types have for a group
    in F32.
    """

    elements: int
    nbytes: int
    format: Format
    dtype: str


def _affine(bits: int, group_size: int = 32) -> Format:
    return Format("affine", bits, group_size)


EXACT: Mapping[str, Exact] = {
    "Q4_0": Exact(32, 18, _affine(4), "F16"),
    "Q4_1": Exact(32, 20, _affine(4), "F16"),
    "Q5_0": Exact(32, 22, _affine(5), "F16"),
    "Q5_1": Exact(32, 24, _affine(5), "F16"),
    "Q8_0": Exact(32, 34, _affine(8), "F16"),
    "Q4_K": Exact(256, 144, _affine(4), "F32"),
    "Q5_K": Exact(256, 176, _affine(5), "F32"),
    "TQ1_0": Exact(256, 54, _affine(2, 128), "F16"),
    "TQ2_0": Exact(256, 66, _affine(2, 128), "F16"),
    "MXFP4": Exact(32, 17, MXFP4, "BF16"),
    "NVFP4": Exact(64, 36, NVFP4, "BF16"),
}


def scheme_of(tensor: SourceTensor) -> str:
    """What plans call the type of block that the file stores a tensor in; "" for plain numbers."""
    return f"GGUF {tensor.blocks}" if tensor.blocks else ""


def read_raw_blocks(tensor: SourceTensor) -> Coded | None:
    """A weight that is given as the file's own blocks, None for any other tensor."""
    if tensor.dtype != RAW_BLOCKS or not tensor.blocks:
        return None
    row = EXACT[tensor.blocks]
    *leading, nbytes = tensor.shape
    coding = Coding((CODES,), tensor.blocks, GGML, row.format.bits, (1, row.format.group_size))
    return Coded(
        tensor.name, scheme_of(tensor), {CODES: tensor}, coding,
        (*leading, nbytes // row.nbytes * row.elements), row.dtype, row.format,
    )  # fmt: skip
