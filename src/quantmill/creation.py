"""Create: from a checkpoint directory to a model in the store. The whole flow on one page."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from quantmill import mediatypes, modelconfig, strictjson
from quantmill.classify import classify
from quantmill.digests import Digest
from quantmill.errors import BadPlan, BadRequest, BadSource, Corrupt, StoreError
from quantmill.execute import Progress, Written, recorded_options, write_blobs
from quantmill.formats import parse_request
from quantmill.manifest import BlobRef, manifest_bytes, parse_manifest
from quantmill.modelfile import Modelfile, decode_modelfile, parse_modelfile
from quantmill.names import ModelName, as_name
from quantmill.opening import OpenSource, open_source
from quantmill.pacing import pace
from quantmill.planner import make_plan
from quantmill.plans import Options, Plan
from quantmill.source import Source
from quantmill.store import Store
from quantmill.version import __version__

DECODED = "bf16"
"""The word that asks for decoded weights which are not quantized again."""


@dataclass(frozen=True, slots=True)
class Created:
    """What `create` wrote. `non_finite` pairs tensors with their count of NaN and infinities.

    `new_blobs` were not in the store before; `resumed` were there and known from an earlier run.
    """

    name: ModelName
    digest: Digest
    plan: Plan
    entries: int
    new_blobs: int
    resumed: int
    size: int
    non_finite: tuple[tuple[str, int], ...]


def plan(
    source: str | Path,
    *,
    quantize: str | None = None,
    group_size: int | None = None,
    options: Options | None = None,
    requantize: str | None = None,
    follow_links: bool = False,
) -> Plan:
    """Everything that `create` would do with this checkpoint directory, and nothing done.

    `quantize` names a format, None keeps source precision; `group_size` replaces the format's own.
    `requantize` does the same to weights that are quantized already, which are decoded first;
    "bf16" only decodes them. Reads headers and small files only. Raises BadSource, BadRequest and
    BadPlan as `create` does.
    """
    request = Request(quantize, group_size, requantize)
    decode = request.wants_numbers(options)
    with open_source(source, follow_links=follow_links, decode=decode) as checkpoint:
        return plan_for(checkpoint.source, request, options)


@dataclass(frozen=True, slots=True)
class Request:
    """The format asked for: of float weights, or, after decoding, of quantized ones.

    A wrong word is told here, before anything is opened: raises BadRequest.
    """

    quantize: str | None = None
    group_size: int | None = None
    requantize: str | None = None

    def __post_init__(self) -> None:
        if self.requantize is not None and self.quantize:
            raise BadRequest("--quantize and --requantize exclude each other", hint="give one")
        parse_request(self.word, self.group_size)

    @property
    def decode(self) -> bool:
        """Whether quantized weights shall be decoded."""
        return self.requantize is not None

    def wants_numbers(self, options: Options | None) -> bool:
        """Whether a format is asked for that weights must be decoded for, in whatever way."""
        rules = options.overrides if options else ()
        return bool(self.decode or self.word) or any(rule.format for rule in rules)

    @property
    def word(self) -> str | None:
        """The name of the format, None for numbers as they are."""
        if self.requantize is None:
            return self.quantize
        return None if self.requantize.strip().lower() == DECODED else self.requantize


def plan_for(source: Source, request: Request, options: Options | None = None) -> Plan:
    """The plan for a source whose headers are read already."""
    kind = classify(source, request.word, request.group_size, decode=request.decode)
    return make_plan(source, kind, options, version=__version__, decode=request.decode)


def create(
    name: str | ModelName,
    source: str | Path,
    *,
    store: Store | None = None,
    quantize: str | None = None,
    group_size: int | None = None,
    options: Options | None = None,
    requantize: str | None = None,
    modelfile: Modelfile | None = None,
    device: str = "cpu",
    workers: int | None = None,
    memory: int | None = None,
    restart: bool = False,
    follow_links: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Created:
    """Import a checkpoint directory into the store under `name`, quantized on the way.

    Decides everything first (see `plan`), streams tensors through at most `workers` threads within
    `memory` bytes for the whole process, and writes the manifest last: until then, and after any
    failure, the store shows what it showed before. Blobs that an earlier, interrupted run finished
    are checked and used, unless `restart`. The same input gives the same manifest digest whatever
    these three are. `device` "gpu" has MLX quantize on Metal or CUDA, which round differently
    (docs/formats.md).

    Raises BadName, BadRequest, BadSource, BadWeights (NaN or infinite weights), BadPlan, OverBudget
    and StoreError; each names the file, tensor or name.
    """
    target = as_name(name)
    store = store or Store()
    request = Request(quantize, group_size, requantize)
    options = on_device(device, options or Options())
    decode = request.wants_numbers(options)
    with open_source(source, follow_links=follow_links, decode=decode) as checkpoint:
        found = checkpoint.source
        decided = plan_for(found, request, options)
        config = _config(decided, found, modelfile)
        side_files = list(_side_files(checkpoint, decided))
        chosen = pace(decided, workers, memory)
        additions = [(mediatypes.CONFIG, None, config), *side_files, *_additions(modelfile)]
        # a thread of its own: waiting for the disk costs the weights no time
        with store.writing(), ThreadPoolExecutor(1, "quantmill-files") as beside:
            small = beside.submit(_put_all, store, additions)
            written = write_blobs(
                decided, checkpoint, store, pace=chosen, restart=restart, progress=progress
            )
            config_ref, *rest = small.result()
            refs = [*written.refs, *rest]
            _check_present(store, [*refs, config_ref])
            raw = manifest_bytes(config_ref, refs)
            store.put_manifest(target, raw)
    return _created(store, target, decided, raw, written)


def _created(
    store: Store, target: ModelName, decided: Plan, raw: bytes, written: Written
) -> Created:
    manifest = parse_manifest(raw, target.display)
    return Created(
        store.spelling(target), manifest.digest, decided, len(manifest.blobs), written.new_blobs,
        written.resumed, manifest.total_size, tuple(written.non_finite.items()),
    )  # fmt: skip


def on_device(device: str, options: Options) -> Options:
    """Options with the rounding profile of the device that does the arithmetic.

    Raises BadRequest for a device that MLX does not have here.
    """
    if device == "cpu":
        return options
    if device != "gpu":
        raise BadRequest(f"unknown device {device!r}", hint="choose cpu or gpu")
    from quantmill.mlxquantize import gpu_name

    profile = gpu_name()
    if profile is None:
        raise BadRequest(
            "MLX has no GPU here",
            kind="no_device",
            hint="leave out --device; --profile gpu follows a GPU's rounding on the CPU",
        )
    return replace(options, profile=profile)


def _config(decided: Plan, source: Source, modelfile: Modelfile | None) -> bytes:
    if modelfile is not None and modelfile.draft:
        raise BadPlan(
            f"the Modelfile names a draft model ({modelfile.draft}), which cannot be imported",
            kind="draft_unsupported",
            hint="remove the DRAFT line",
        )
    how = modelconfig.serving(modelconfig.detect(source.texts), modelfile)
    recorded = recorded_options(decided.options)
    config = modelconfig.model_config(
        decided.format.name if decided.format else "",
        how,
        base={"quantmill": recorded} if recorded else None,
    )
    return modelconfig.config_json(config)


_Addition = tuple[str, str | None, bytes]


def _side_files(checkpoint: OpenSource, decided: Plan) -> Iterable[_Addition]:
    """Kept files: JSON ones first, as Ollama orders them, each checked to be JSON."""
    kept = [f for f in decided.files if f.media_type]
    for file in sorted(kept, key=lambda f: (f.media_type != mediatypes.JSON, f.name)):
        data = checkpoint.read_file(file.name)
        if file.media_type == mediatypes.JSON:
            try:
                strictjson.parse(data, constants=True)
            except strictjson.BadJson as error:
                raise BadSource(f"{file.name}: {error}", kind="bad_json") from None
        yield str(file.media_type), file.name, data


def _additions(modelfile: Modelfile | None) -> Iterable[_Addition]:
    for media_type, data in modelconfig.extra_layers(modelfile) if modelfile else ():
        yield media_type, None, data


def _put_all(store: Store, additions: Iterable[_Addition]) -> list[BlobRef]:
    refs, pending = [], []
    try:
        for media_type, name, data in additions:
            with store.new_blob() as writer:
                writer.write(data)
                pending.append(writer.finish())
            refs.append(BlobRef(media_type, pending[-1].digest, len(data), name))
        store.commit(pending)
    except BaseException:
        store.discard(pending)
        raise
    return refs


def _check_present(store: Store, refs: Iterable[BlobRef]) -> None:
    """Nothing that the manifest will name may have been collected since it was written."""
    for ref in refs:
        try:
            size = store.blob_size(ref.digest)
        except StoreError as error:
            raise _vanished(ref) from error
        if size != ref.size:
            raise _vanished(ref)


def _vanished(ref: BlobRef) -> Corrupt:
    return Corrupt(
        f"blob {ref.digest.short} ({ref.name or ref.media_type}) is gone or changed",
        kind="blob_missing",
        hint="another program pruned the store meanwhile; run the command again",
    )


def read_modelfile(path: str | Path) -> tuple[Modelfile, Path]:
    """A Modelfile and the checkpoint directory its FROM line means.

    A relative FROM is looked up beside the Modelfile, then in the current directory. Raises
    BadModelfile, or BadSource when the file cannot be read.
    """
    file = Path(path)
    try:
        text = decode_modelfile(file.read_bytes())
    except OSError as error:
        raise BadSource(f"{file}: {error.strerror}", kind="modelfile_unreadable") from None
    parsed = parse_modelfile(text)
    beside = file.parent / parsed.source
    return parsed, beside if beside.exists() else Path(parsed.source)
