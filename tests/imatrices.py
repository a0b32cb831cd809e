"""Importance matrices as llama.cpp writes them; the GGUF form by the gguf library."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Entry:
    """Sums of squares [matrices, columns] of so many tokens [matrices]."""

    sums: Floats
    counts: tuple[float, ...]

    @property
    def means(self) -> Floats:
        """What a reader should find, float32 [matrices, columns]."""
        counts = np.maximum(np.asarray(self.counts), 1)[:, None]
        found: Floats = (self.sums.astype(np.float64) / counts).astype(np.float32)
        return found


def entry(columns: int, counts: Sequence[int] = (640,), seed: int = 0) -> Entry:
    """Sums as a run would leave them; zeros for what saw no token."""
    random = np.random.default_rng((seed, columns, len(counts)))
    sums = random.lognormal(0, 2, (len(counts), columns)) * np.asarray(counts)[:, None]
    return Entry(sums.astype(np.float32), tuple(counts))


class _Writer(GGUFWriter):
    """A file that is of no architecture, as llama-imatrix writes it."""

    def add_architecture(self) -> None:
        pass


def write_gguf_imatrix(
    path: Path,
    entries: Mapping[str, Entry],
    *,
    datasets: Sequence[str] = ("wiki.train.raw",),
    chunks: int = 3,
    kind: str | None = "imatrix",
    keys: Mapping[str, Any] | None = None,
    more: Mapping[str, npt.NDArray[Any]] | None = None,
) -> Path:
    """The current form, with the sums of newer versions (`in_sum`); `more` tensors follow."""
    writer = _Writer(path, "")
    if kind is not None:
        writer.add_type(kind)
    if datasets:
        writer.add_array("imatrix.datasets", list(datasets))
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", 512)
    for key, value in (keys or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_int32)(key, value)
    for name, found in entries.items():
        # ggml leaves out outer dimensions of 1
        one = len(found.counts) == 1
        counts = np.asarray(found.counts, np.float32)
        writer.add_tensor(f"{name}.in_sum2", found.sums.reshape(-1) if one else found.sums)
        writer.add_tensor(f"{name}.counts", counts if one else counts[:, None])
        writer.add_tensor(f"{name}.in_sum", np.zeros(found.sums.size, np.float32))
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dat_imatrix(
    entries: Mapping[str, Entry], *, chunk: int = 512, trailer: bytes | None = None
) -> bytes:
    """The older form: means times calls, ones for experts that saw no token."""
    found = [struct.pack("<i", len(entries))]
    for name, kept in entries.items():
        calls = -(-int(max(kept.counts)) // chunk)
        means = np.where(np.asarray(kept.counts)[:, None] > 0, kept.means, np.float32(1))
        values = (means.astype(np.float64) * calls).astype("<f4")
        found += [dat_name(name), struct.pack("<ii", calls, values.size), values.tobytes()]
    found.append(struct.pack("<i", 3) + dat_name("wiki.train.raw") if trailer is None else trailer)
    return b"".join(found)


def dat_name(text: str) -> bytes:
    """A text after its length."""
    raw = text.encode()
    return struct.pack("<i", len(raw)) + raw
