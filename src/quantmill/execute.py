"""Carry out a plan: read, quantize, hash and write its blobs. Decides nothing."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

from quantmill import mediatypes
from quantmill.blobwriter import BlobWriter, Pending
from quantmill.calibration import Stages
from quantmill.digests import Digest
from quantmill.encoding import Statistics, encoded, method_of
from quantmill.errors import BadRequest, BadWeights
from quantmill.formats import DTYPE_BYTES
from quantmill.journal import Journal, Note
from quantmill.manifest import BlobRef
from quantmill.pacing import Pace
from quantmill.pieces import Pieces, source_bytes
from quantmill.plans import (
    CALIBRATED,
    CPU_PROFILE,
    DEVICE_PROFILES,
    GPU_PROFILE,
    RTN,
    BlobSpec,
    Plan,
    TensorSpec,
)
from quantmill.quantize import Arithmetic, quantize, scan
from quantmill.source import OpenSource
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
    `unmeasured` are tensors of a calibrated method that the pass of the model gave nothing.
    """

    refs: tuple[BlobRef, ...]
    new_blobs: int
    resumed: int
    non_finite: Mapping[str, int]
    unmeasured: tuple[str, ...] = ()


_T = TypeVar("_T")


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
    unmeasured: set[str] = field(default_factory=set)
    uncalibrated: set[str] = field(default_factory=set)  # blobs whose calibration is to come
    refreshed: float = field(default_factory=time.monotonic)

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

    def passed(self, done: int, total: int) -> None:
        """Tell of blocks of the model that a calibration has passed."""
        self.advance(f"calibrating, {done} of {total} blocks", 0)

    def refresh(self, digests: Iterable[Digest]) -> None:
        """Set the times of blobs that no manifest names yet, now and then."""
        if time.monotonic() - self.refreshed > REFRESH_SECONDS:
            self.store.refresh(digests)
            self.refreshed = time.monotonic()


def write_blobs(
    plan: Plan,
    checkpoint: OpenSource,
    store: Store,
    *,
    pace: Pace,
    stages: Stages | None = None,
    restart: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Written:
    """Write every tensor blob of the plan into the store, durable and named when this returns.

    Bytes do not depend on `pace`. Blobs that an earlier run finished are read and checked, and not
    computed again, unless `restart` says so. On any error, interruption included, unfinished files
    are removed; blobs named by then stay, referenced by nothing, for a later run or for prune.
    Blobs of a calibrated method come last, as `stages` give what they are calibrated with.
    """
    journal = Journal(store, plan, checkpoint)
    if restart:
        journal.forget()
    job = _Job(
        plan, checkpoint, store, journal, _arithmetic(plan.options.profile), pace.piece_bytes,
        progress, len(plan.tensors), sum(source_bytes(spec, checkpoint) for spec in plan.tensors),
    )  # fmt: skip
    done: dict[str, _Done] = {}
    new = 0
    with ThreadPoolExecutor(pace.workers, thread_name_prefix="quantmill") as pool:
        try:
            for blobs, statistics in _staged(job, stages):
                tasks = partial(_finish_blob, job, statistics=statistics)
                for batch in _finished(pool, tasks, blobs):
                    new += _commit(job, batch)
                    done |= {one.blob.name: one for one in batch}
                    job.refresh(one.note.digest for one in done.values())
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
    return Written(refs, new, resumed, dict(sorted(counts.items())), tuple(sorted(job.unmeasured)))


def _staged(
    job: _Job, stages: Stages | None
) -> Iterator[tuple[Sequence[BlobSpec], Statistics | None]]:
    """Blobs that can be written, and with what; what needs no calibration first."""
    yield job.plan.blobs, None
    left = [blob for blob in job.plan.blobs if blob.name in job.uncalibrated]
    if not left:
        return
    if stages is None:
        raise BadRequest(f"the method {job.plan.options.method} needs a calibration")
    for stage in stages(left, job.passed):
        yield stage.blobs, stage.statistics


def _finished(
    pool: ThreadPoolExecutor, finish: Callable[[BlobSpec], _Done | None], blobs: Sequence[BlobSpec]
) -> Iterator[list[_Done]]:
    """Blobs as they get finished, some at a time; raises what went wrong after the others.

    While a batch is synced and named the threads go on: what they finish meanwhile is the next.
    """
    queue: SimpleQueue[Future[_Done | None]] = SimpleQueue()
    # The largest first: no thread is left alone with one at the end.
    for blob in sorted(blobs, key=lambda blob: -blob.size):
        pool.submit(finish, blob).add_done_callback(queue.put)
    left = len(blobs)
    while left:
        futures = _all_of(queue)
        left -= len(futures)
        found = [future.result() for future in futures if not future.exception()]
        yield [one for one in found if one is not None]
        for future in futures:
            future.result()  # what went wrong, once the others are safe


def _all_of(queue: SimpleQueue[_T]) -> list[_T]:
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


def _finish_blob(job: _Job, blob: BlobSpec, statistics: Statistics | None) -> _Done | None:
    """Write a blob, or find it whole; None where it is not and its calibration is still to come."""
    key = job.journal.key(blob)
    note = job.journal.find(key, blob)
    if note is None:
        if statistics is None and any(spec.method in CALIBRATED for spec in blob.tensors):
            job.uncalibrated.add(blob.name)
            return None
        return _write_blob(job, blob, key, statistics)
    tensors = job.checkpoint.source.tensors
    nbytes = sum(tensors[name].nbytes for spec in blob.tensors for name in spec.sources)
    job.advance(blob.name, nbytes, tensors=len(blob.tensors))
    return _Done(blob, note, None)


def _write_blob(job: _Job, blob: BlobSpec, key: str, statistics: Statistics | None) -> _Done:
    non_finite: dict[str, int] = {}
    with job.store.new_blob() as writer:
        writer.write(blob.header)
        for spec in blob.tensors:
            try:
                count = _write_tensor(job, blob, spec, writer, statistics)
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


def _write_tensor(
    job: _Job, blob: BlobSpec, spec: TensorSpec, writer: BlobWriter, statistics: Statistics | None
) -> int:
    """Write one tensor and what belongs to it; the count of NaN and infinities quantized."""
    pieces = Pieces(job.checkpoint, job.piece_bytes, partial(job.advance, blob.name))
    if spec.format is None:
        for piece in pieces.of(spec):
            writer.write(piece)
        return 0
    method = method_of(spec, statistics)
    if method != spec.method:
        job.unmeasured.add(spec.name)
    maximum = _maximum(job, spec) if spec.global_scale else None
    rounded = partial(_rounded, job, spec, maximum)
    non_finite = 0
    tails = [_Tail(writer, size) for size in _tail_sizes(spec)]
    codes_left = spec.elements * spec.format.bits // 8
    for found in encoded(spec, method, pieces, rounded, statistics):
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


def _rounded(job: _Job, spec: TensorSpec, maximum: float | None, piece: memoryview) -> Quantized:
    assert spec.format is not None
    rounding = job.plan.options.rounding
    return job.arithmetic(piece, spec.dtype, spec.format, rounding=rounding, maximum=maximum)


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
    for piece in Pieces(job.checkpoint, job.piece_bytes).of(spec):
        non_finite, largest = scan(piece, spec.dtype)
        if non_finite:
            raise BadWeights("a global scale needs finite values")
        found = max(found, largest)
    return found if found > SMALLEST_MAXIMUM else MAX_SCALE


def recorded(plan: Plan) -> dict[str, object]:
    """What a stored model says about options that change bytes; {} for the defaults."""
    options = plan.options
    found: dict[str, object] = {}
    if options.profile != CPU_PROFILE:
        found["profile"] = options.profile
    if options.rounding != "ceil":
        found["e8m0"] = options.rounding
    if options.allow_non_finite:
        found["allow_non_finite"] = True
    if options.method != RTN:
        found["method"] = options.method
    if options.automatic is not None:
        found["auto"] = asdict(options.automatic)
    if plan.calibration is not None:
        found["calibration"] = {
            k: v for k, v in asdict(plan.calibration).items() if v not in ("", 0)
        }
    return found
