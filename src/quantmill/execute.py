"""Carry out a plan: read, quantize, hash and write its blobs. Decides nothing."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from quantmill import mediatypes
from quantmill.errors import BadWeights, QuantmillError
from quantmill.formats import DTYPE_BYTES
from quantmill.gpuround import quantize_as_gpu
from quantmill.manifest import BlobRef
from quantmill.opening import OpenSource
from quantmill.plans import CAST, STACK, BlobSpec, Options, Plan, TensorSpec
from quantmill.quantize import (
    MAX_SCALE,
    Bytes,
    absolute_maximum,
    count_non_finite,
    piece_elements,
    quantize,
    to_bf16,
)
from quantmill.source import SourceTensor
from quantmill.store import BlobWriter, Pending, Store

PROFILES = {"mlx-cpu": quantize, "gpu": quantize_as_gpu}
"""Whose rounding to follow (docs/formats.md)."""

SMALLEST_MAXIMUM = 1e-30
"""A tensor with no larger magnitude gets no global scale: its inverse would overflow."""

COPY_BYTES = 4 << 20
BATCH_BLOBS = 64
BATCH_BYTES = 1 << 30
"""A batch of finished blobs is synced and named together when it reaches either of these."""


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
    """What became of a plan's blobs, in plan order. `non_finite` counts elements per tensor."""

    refs: tuple[BlobRef, ...]
    new_blobs: int
    non_finite: Mapping[str, int]


class Cancelled(Exception):
    """The work was called off; never seen outside this module's threads."""


@dataclass(slots=True)
class _Job:
    """What the threads of one run share."""

    plan: Plan
    checkpoint: OpenSource
    store: Store
    report: Callable[[Progress], None] | None
    tensors_total: int
    bytes_total: int
    cancelled: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    non_finite: dict[str, int] = field(default_factory=dict)
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

    def found_non_finite(self, tensor: str, count: int) -> None:
        with self.lock:
            self.non_finite[tensor] = self.non_finite.get(tensor, 0) + count


def write_blobs(
    plan: Plan,
    checkpoint: OpenSource,
    store: Store,
    *,
    workers: int,
    progress: Callable[[Progress], None] | None = None,
) -> Written:
    """Write every tensor blob of the plan into the store, durable and named when this returns.

    Bytes do not depend on `workers`. On any error, interruption included, unfinished files are
    removed; blobs named by then stay, referenced by nothing, for a later run or for prune.
    """
    job = _Job(plan, checkpoint, store, progress, len(plan.tensors), plan.source_bytes)
    refs: list[BlobRef] = []
    batch: list[Pending] = []
    new = 0
    outstanding: deque[Future[Pending]] = deque()
    specs = deque(plan.blobs)
    with ThreadPoolExecutor(workers, thread_name_prefix="quantmill") as pool:
        try:
            while specs or outstanding:
                while specs and len(outstanding) < 4 * workers:
                    outstanding.append(pool.submit(_write_blob, job, specs.popleft()))
                pending = outstanding[0].result()
                outstanding.popleft()
                batch.append(pending)
                name = plan.blobs[len(refs)].name
                refs.append(BlobRef(mediatypes.TENSOR, pending.digest, pending.size, name))
                if len(batch) >= BATCH_BLOBS or sum(p.size for p in batch) >= BATCH_BYTES:
                    new += store.commit(batch)
                    batch = []
            new += store.commit(batch)
            batch = []
        finally:
            job.cancelled.set()
            pool.shutdown(wait=True, cancel_futures=True)
            _discard(store, batch, outstanding)
    checkpoint.check_unchanged()
    return Written(tuple(refs), new, dict(sorted(job.non_finite.items())))


def _discard(store: Store, batch: list[Pending], outstanding: deque[Future[Pending]]) -> None:
    for future in outstanding:
        if not future.cancelled() and future.exception() is None:
            batch.append(future.result())
    store.discard(batch)


def _write_blob(job: _Job, blob: BlobSpec) -> Pending:
    with job.store.new_blob() as writer:
        writer.write(blob.header)
        for spec in blob.tensors:
            try:
                _write_tensor(job, blob, spec, writer)
            except BadWeights as error:
                raise BadWeights(
                    f"tensor {spec.name!r}: {error.message}", kind=error.kind, hint=error.hint
                ) from None
            job.advance(blob.name, 0, tensors=1)
        return writer.finish()


def _write_tensor(job: _Job, blob: BlobSpec, spec: TensorSpec, writer: BlobWriter) -> None:
    if spec.format is None:
        for piece in _pieces(job, blob, spec, COPY_BYTES):
            writer.write(piece.data)
        return
    arithmetic = PROFILES[job.plan.options.profile]
    maximum = _maximum(job, spec) if spec.global_scale else None
    scales, biases = [], []
    nbytes = piece_elements(spec.format) * DTYPE_BYTES[spec.dtype]
    for piece in _pieces(job, blob, spec, nbytes):
        _check_finite(job, spec, piece)
        found = arithmetic(
            piece, spec.dtype, spec.format, rounding=job.plan.options.rounding, maximum=maximum
        )
        writer.write(found.weight.data)
        scales.append(found.scales)
        if found.biases is not None:
            biases.append(found.biases)
    for part in (*scales, *biases):
        writer.write(part.data)
    if maximum is not None:
        writer.write(np.float32(maximum / MAX_SCALE).tobytes())


def _check_finite(job: _Job, spec: TensorSpec, piece: Bytes) -> None:
    count = count_non_finite(piece, spec.dtype)
    if not count:
        return
    if not job.plan.options.allow_non_finite:
        raise BadWeights(
            "holds NaN or infinite values, which no format can represent",
            hint=f"--tensor '{spec.name}=keep' copies it as it is; "
            "--allow-non-finite quantizes it all the same",
        )
    job.found_non_finite(spec.name, count)


def _maximum(job: _Job, spec: TensorSpec) -> float:
    """The absolute maximum of a whole tensor: a first pass over its data.

    A tensor of nothing but zeros, or nearly, gets the maximum that makes the global scale 1.
    """
    found = 0.0
    for piece in _pieces(job, None, spec, COPY_BYTES):
        if count_non_finite(piece, spec.dtype):
            raise BadWeights("a global scale needs finite values")
        found = max(found, absolute_maximum(piece, spec.dtype))
    return found if found > SMALLEST_MAXIMUM else MAX_SCALE


def _pieces(job: _Job, blob: BlobSpec | None, spec: TensorSpec, nbytes: int) -> Iterator[Bytes]:
    """The spec's data in pieces of about `nbytes`, valid until the next one is asked for.

    A piece never spans two sources, and all but a source's last hold whole groups.
    """
    if spec.transform not in {None, STACK, CAST}:
        raise QuantmillError(f"{spec.name!r}: transform {spec.transform} cannot be carried out yet")
    tensors = job.checkpoint.source.tensors
    buffer = np.empty(min(nbytes, max(tensors[name].nbytes for name in spec.sources)), np.uint8)
    for name in spec.sources:
        yield from _source_pieces(job, blob, tensors[name], buffer, spec.transform == CAST)


def _source_pieces(
    job: _Job, blob: BlobSpec | None, tensor: SourceTensor, buffer: Bytes, cast: bool
) -> Iterator[Bytes]:
    for offset in range(0, tensor.nbytes, max(1, buffer.size)):
        piece = buffer[: min(buffer.size, tensor.nbytes - offset)]
        job.checkpoint.read_into(tensor, offset, piece.data)
        yield to_bf16(piece, tensor.dtype) if cast else piece
        if blob is not None:
            job.advance(blob.name, piece.size)


def default_workers() -> int:
    """One for each processor this process may use, four at most."""
    import os

    try:
        usable = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        usable = os.cpu_count() or 1
    return max(1, min(4, usable))


def recorded_options(options: Options) -> dict[str, object]:
    """What a stored model says about options that change bytes; {} for the defaults."""
    found: dict[str, object] = {}
    if options.profile != "mlx-cpu":
        found["profile"] = options.profile
    if options.rounding != "ceil":
        found["e8m0"] = options.rounding
    if options.allow_non_finite:
        found["allow_non_finite"] = True
    return found
