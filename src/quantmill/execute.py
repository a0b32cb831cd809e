"""Carry out a plan: read, quantize, hash and write its blobs. Decides nothing."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TypeVar

from quantmill import mediatypes
from quantmill.blobwriter import BlobWriter, Pending
from quantmill.errors import BadRequest, BadWeights
from quantmill.formats import DTYPE_BYTES
from quantmill.journal import Journal, Note
from quantmill.manifest import BlobRef
from quantmill.pacing import PIECE_BYTES, Pace
from quantmill.plans import (
    CAST,
    COPYING,
    CPU_PROFILE,
    DECODING,
    DEVICE_PROFILES,
    GPU_PROFILE,
    RECODE,
    RTN,
    SEARCH,
    BlobSpec,
    Options,
    Plan,
    TensorSpec,
)
from quantmill.quantize import Arithmetic, quantize, scan
from quantmill.source import OpenSource, SourceTensor
from quantmill.store import Store
from quantmill.weights import MAX_SCALE, Quantized

SMALLEST_MAXIMUM = 1e-30
"""A tensor with no larger magnitude gets no global scale: its inverse would overflow."""

LARGEST_TAIL = 1 << 20
"""Scales or biases that a thread keeps in memory until the codes before them are written."""

REFRESH_SECONDS = 900
"""How often a long run sets the times of blobs that no manifest names yet: Ollama's grace for them
is an hour."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a `create` is: tensors and source bytes, done and in all."""

    tensors: int
    tensors_total: int
    bytes: int
    bytes_total: int
    blob: str


@dataclass(frozen=True, slots=True)
class Written:
    """What became of a plan's blobs, in plan order. `non_finite` counts elements per tensor.

    `new_blobs` were not in the store; `resumed` were, and were known from an earlier run's notes.
    """

    refs: tuple[BlobRef, ...]
    new_blobs: int
    resumed: int
    non_finite: Mapping[str, int]


class Cancelled(Exception):
    """The work was called off; never seen outside this module's threads."""


@dataclass(frozen=True, slots=True)
class _Done:
    """A blob that is whole: in a temporary file, or in the store from an earlier run."""

    blob: BlobSpec
    note: Note
    pending: Pending | None


@dataclass(slots=True)
class _Job:
    """What the threads of one run share."""

    plan: Plan
    checkpoint: OpenSource
    store: Store
    journal: Journal
    arithmetic: Arithmetic
    piece_bytes: int
    report: Callable[[Progress], None] | None
    tensors_total: int
    bytes_total: int
    cancelled: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    pending: set[Pending] = field(default_factory=set)  # whole files without a name yet
    tensors: int = 0
    bytes: int = 0

    def advance(self, blob: str, nbytes: int, tensors: int = 0) -> None:
        if self.cancelled.is_set():
            raise Cancelled
        with self.lock:
            self.tensors += tensors
            self.bytes += nbytes
            if self.report:
                self.report(
                    Progress(self.tensors, self.tensors_total, self.bytes, self.bytes_total, blob)
                )


def write_blobs(
    plan: Plan,
    checkpoint: OpenSource,
    store: Store,
    *,
    pace: Pace,
    restart: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Written:
    """Write every tensor blob of the plan into the store, durable and named when this returns.

    Bytes do not depend on `pace`. Blobs that an earlier run finished are read and checked, and not
    computed again, unless `restart` says so. On any error, interruption included, unfinished files
    are removed; blobs named by then stay, referenced by nothing, for a later run or for prune.
    """
    journal = Journal(store, plan, checkpoint)
    if restart:
        journal.forget()
    job = _Job(
        plan, checkpoint, store, journal, _arithmetic(plan.options.profile), pace.piece_bytes,
        progress, len(plan.tensors), sum(_read_bytes(spec, checkpoint) for spec in plan.tensors),
    )  # fmt: skip
    done: dict[str, _Done] = {}
    new, refreshed = 0, time.monotonic()
    finished: SimpleQueue[Future[_Done]] = SimpleQueue()
    with ThreadPoolExecutor(pace.workers, thread_name_prefix="quantmill") as pool:
        try:
            # The largest first: no thread is left alone with one at the end.
            for blob in sorted(plan.blobs, key=lambda blob: -blob.size):
                pool.submit(_finish_blob, job, blob).add_done_callback(finished.put)
            while len(done) < len(plan.blobs):
                # While these are synced and named the threads go on: what they finish meanwhile is
                # the next batch.
                futures = _all_of(finished)
                batch = [future.result() for future in futures if not future.exception()]
                new += _commit(job, batch)
                done |= {one.blob.name: one for one in batch}
                if time.monotonic() - refreshed > REFRESH_SECONDS:
                    store.refresh(one.note.digest for one in done.values())
                    refreshed = time.monotonic()
                for future in futures:
                    future.result()  # what went wrong, once the others are safe
        finally:
            job.cancelled.set()
            pool.shutdown(wait=True, cancel_futures=True)
            store.discard(job.pending)
    checkpoint.check_unchanged()
    ordered = [done[blob.name] for blob in plan.blobs]
    counts = {name: n for one in ordered for name, n in one.note.non_finite.items()}
    refs = tuple(
        BlobRef(mediatypes.TENSOR, one.note.digest, one.note.size, one.blob.name) for one in ordered
    )
    resumed = sum(one.pending is None for one in ordered)
    return Written(refs, new, resumed, dict(sorted(counts.items())))


def _all_of(queue: SimpleQueue[Future[_Done]]) -> list[Future[_Done]]:
    """Everything in the queue; waits for the first."""
    found = [queue.get()]
    while not queue.empty():
        found.append(queue.get())
    return found


def _commit(job: _Job, batch: list[_Done]) -> int:
    """Give blobs their names, after they are durable, and note them down; how many were new."""
    job.store.keep(one.note.digest for one in batch if one.pending is None)
    fresh = [one for one in batch if one.pending is not None]
    pending = [one.pending for one in fresh if one.pending is not None]
    new = job.store.commit(pending)
    with job.lock:
        job.pending.difference_update(pending)
    job.journal.add(one.note for one in fresh)
    return new


def _arithmetic(profile: str) -> Arithmetic:
    """Whose rounding to follow (docs/formats.md)."""
    if profile == CPU_PROFILE:
        return quantize
    if profile == GPU_PROFILE:
        from quantmill.gpuround import quantize_as_gpu

        return quantize_as_gpu
    if profile in DEVICE_PROFILES:
        from quantmill.mlxquantize import quantize_on_gpu

        return quantize_on_gpu
    raise BadRequest(f"unknown rounding profile {profile!r}", hint="choose mlx-cpu or gpu")


def _read_bytes(spec: TensorSpec, checkpoint: OpenSource) -> int:
    """Bytes of source data that writing the tensor takes."""
    return sum(checkpoint.source.tensors[name].nbytes for name in spec.reads)


def _finish_blob(job: _Job, blob: BlobSpec) -> _Done:
    key = job.journal.key(blob)
    note = job.journal.find(key, blob)
    if note is None:
        return _write_blob(job, blob, key)
    tensors = job.checkpoint.source.tensors
    nbytes = sum(tensors[name].nbytes for spec in blob.tensors for name in spec.sources)
    job.advance(blob.name, nbytes, tensors=len(blob.tensors))
    return _Done(blob, note, None)


def _write_blob(job: _Job, blob: BlobSpec, key: str) -> _Done:
    non_finite: dict[str, int] = {}
    with job.store.new_blob() as writer:
        writer.write(blob.header)
        for spec in blob.tensors:
            try:
                count = _write_tensor(job, blob, spec, writer)
            except BadWeights as error:
                raise BadWeights(
                    f"tensor {spec.name!r}: {error.message}", kind=error.kind, hint=error.hint
                ) from None
            if count:
                non_finite[spec.name] = count
            job.advance(blob.name, 0, tensors=1)
        pending = writer.finish()
        with job.lock:
            job.pending.add(pending)
    return _Done(blob, Note(key, pending.digest, pending.size, non_finite), pending)


def _write_tensor(job: _Job, blob: BlobSpec, spec: TensorSpec, writer: BlobWriter) -> int:
    """Write one tensor and what belongs to it; the count of NaN and infinities quantized."""
    if spec.format is None:
        for piece in _pieces(job, blob, spec):
            writer.write(piece)
        return 0
    maximum = _maximum(job, spec) if spec.global_scale else None
    rounding, non_finite = job.plan.options.rounding, 0
    tails = [_Tail(writer, size) for size in _tail_sizes(spec)]
    codes_left = spec.elements * spec.format.bits // 8
    for found in _quantized(job, blob, spec, rounding, maximum):
        non_finite += _allowed(job, spec, found)
        writer.write(found.weight)
        codes_left -= found.weight.nbytes
        distance = codes_left
        for tail, part in zip(tails, (found.scales, found.biases), strict=False):
            assert part is not None
            tail.add(part, distance)
            distance += tail.size
    for tail in tails:
        tail.write()
    if maximum is not None:
        writer.write(struct.pack("<f", maximum / MAX_SCALE))
    return non_finite


def _quantized(
    job: _Job, blob: BlobSpec, spec: TensorSpec, rounding: str, maximum: float | None
) -> Iterator[Quantized]:
    """The spec's data quantized piece by piece, or in the codes that it has."""
    assert spec.format is not None
    if spec.transform == RECODE:
        from quantmill.coding import recoded

        sources = [job.checkpoint.source.tensors[name] for name in spec.sources]
        pieces = recoded(spec, sources, job.checkpoint.read_into, job.piece_bytes)
        yield from _counted(job, blob, spec, pieces)
        return
    if spec.method == SEARCH:
        yield from _searched(job, blob, spec)
        return
    for piece in _pieces(job, blob, spec):
        yield job.arithmetic(piece, spec.dtype, spec.format, rounding=rounding, maximum=maximum)


def _searched(job: _Job, blob: BlobSpec, spec: TensorSpec) -> Iterator[Quantized]:
    """The pieces by a search; each matrix of a stack has its columns weighed by itself."""
    from quantmill.importance import importance
    from quantmill.searching import search

    assert spec.format is not None
    columns = spec.shape[-1]
    matrix = columns * (spec.shape[-2] if len(spec.shape) > 1 else 1)
    at, member, weights = 0, -1, None
    width = DTYPE_BYTES[spec.dtype]
    for piece in _pieces(job, blob, spec):
        done, count = 0, piece.nbytes // width
        while done < count:
            current, inside = divmod(at + done, matrix)
            if current != member or weights is None:
                member = current
                weighting = spec.weightings[member] if spec.weightings else None
                weights = importance(weighting, columns, job.checkpoint)
            end = min(count, done + matrix - inside)
            part = piece[done * width : end * width]
            yield search(part, spec.dtype, spec.format, weights.data, inside % columns)
            done = end
        at += count


def _tail_sizes(spec: TensorSpec) -> list[int]:
    """Bytes of the scales and, where there are any, of the biases."""
    assert spec.format is not None
    groups = spec.elements // spec.format.group_size
    size = groups * DTYPE_BYTES[spec.format.scale_dtype(spec.dtype)]
    return [size, size] if spec.format.has_bias else [size]


class _Tail:
    """What follows the codes: kept until they are all written, or put in its place ahead of time.

    A small one stays in memory. Of a large one, as a big stack of experts has, no more than
    LARGEST_TAIL does.
    """

    def __init__(self, writer: BlobWriter, size: int) -> None:
        self.size = size
        self._writer = writer
        self._kept: list[memoryview] = []
        self._kept_bytes = self._ahead = 0

    def add(self, part: memoryview, distance: int) -> None:
        """One more part; its tail begins `distance` bytes beyond what is written by now."""
        self._kept.append(part)
        self._kept_bytes += part.nbytes
        if self.size > LARGEST_TAIL and self._kept_bytes > LARGEST_TAIL // 2:
            self._put_ahead(distance)

    def _put_ahead(self, distance: int) -> None:
        for part in self._kept:
            self._writer.write_ahead(part, distance + self._ahead)
            self._ahead += part.nbytes
        self._kept, self._kept_bytes = [], 0

    def write(self) -> None:
        """Append the whole tail."""
        self._writer.take_in(self._ahead)
        for part in self._kept:
            self._writer.write(part)


def _allowed(job: _Job, spec: TensorSpec, found: Quantized) -> int:
    if found.non_finite and not job.plan.options.allow_non_finite:
        raise BadWeights(
            "holds NaN or infinite values, which no format can represent",
            hint=f"--tensor '{spec.name}=keep' copies it as it is; "
            "--allow-non-finite quantizes it all the same",
        )
    return found.non_finite


def _maximum(job: _Job, spec: TensorSpec) -> float:
    """The absolute maximum of a whole tensor: a first pass over its data.

    A tensor of nothing but zeros, or nearly, gets the maximum that makes the global scale 1.
    """
    found = 0.0
    for piece in _pieces(job, None, spec):
        non_finite, largest = scan(piece, spec.dtype)
        if non_finite:
            raise BadWeights("a global scale needs finite values")
        found = max(found, largest)
    return found if found > SMALLEST_MAXIMUM else MAX_SCALE


def _pieces(job: _Job, blob: BlobSpec | None, spec: TensorSpec) -> Iterator[memoryview]:
    """The spec's data in pieces, valid until the next one is asked for, adapters' changes added."""
    yield from _merged(job, spec, _own_pieces(job, blob, spec))
    if blob is not None:
        own = sum(job.checkpoint.source.tensors[name].nbytes for name in spec.sources)
        job.advance(blob.name, _read_bytes(spec, job.checkpoint) - own)


def _merged(job: _Job, spec: TensorSpec, pieces: Iterator[memoryview]) -> Iterator[memoryview]:
    if not any(spec.added):
        return pieces
    from quantmill.merging import merged

    return merged(spec, pieces, job.checkpoint.source.tensors, job.checkpoint.read_into)


def _own_pieces(job: _Job, blob: BlobSpec | None, spec: TensorSpec) -> Iterator[memoryview]:
    """What the source holds. A piece never spans two sources; all but a source's last hold whole
    groups.
    """
    tensors = job.checkpoint.source.tensors
    if spec.transform in DECODING:
        from quantmill.coding import numbers

        sources = [tensors[name] for name in spec.sources]
        pieces = numbers(spec, sources, job.checkpoint.read_into, job.piece_bytes)
        yield from _counted(job, blob, spec, pieces)
        return
    nbytes = job.piece_bytes if spec.format else PIECE_BYTES
    largest = max(tensors[name].nbytes for name in spec.sources)
    buffer = memoryview(bytearray(min(nbytes, largest)))
    for name in spec.sources:
        for piece in _source_pieces(job, blob, tensors[name], buffer, spec.transform == CAST):
            yield piece if spec.transform in COPYING | {CAST} else _changed(spec, piece)


_T = TypeVar("_T")


def _counted(
    job: _Job, blob: BlobSpec | None, spec: TensorSpec, pieces: Iterator[_T]
) -> Iterator[_T]:
    """The pieces of a weight whose sources are read together; they count when all is read."""
    yield from pieces
    if blob is not None:
        tensors = job.checkpoint.source.tensors
        job.advance(blob.name, sum(tensors[name].nbytes for name in spec.sources))


def _changed(spec: TensorSpec, piece: memoryview) -> memoryview:
    """A global scale in the convention of the store (docs/formats.md)."""
    from quantmill.transforms import change_global

    return change_global(str(spec.transform), spec.name, piece)


def _source_pieces(
    job: _Job, blob: BlobSpec | None, tensor: SourceTensor, buffer: memoryview, cast: bool
) -> Iterator[memoryview]:
    for offset in range(0, tensor.nbytes, max(1, buffer.nbytes)):
        piece = buffer[: min(buffer.nbytes, tensor.nbytes - offset)]
        job.checkpoint.read_into(tensor, offset, piece)
        yield _cast(piece, tensor.dtype) if cast else piece
        if blob is not None:
            job.advance(blob.name, piece.nbytes)


def _cast(piece: memoryview, dtype: str) -> memoryview:
    """Elements of another floating-point dtype as BF16."""
    import numpy as np

    from quantmill.elements import to_bf16

    return to_bf16(np.frombuffer(piece, np.uint8), dtype).data


def recorded_options(options: Options) -> dict[str, object]:
    """What a stored model says about options that change bytes; {} for the defaults."""
    found: dict[str, object] = {}
    if options.profile != CPU_PROFILE:
        found["profile"] = options.profile
    if options.rounding != "ceil":
        found["e8m0"] = options.rounding
    if options.allow_non_finite:
        found["allow_non_finite"] = True
    if options.method != RTN:
        found["method"] = options.method
    return found
