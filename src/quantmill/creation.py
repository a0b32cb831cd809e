"""Create: from a checkpoint directory to a model in the store. The whole flow on one page."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from quantmill import mediatypes, modelconfig, pipelines, provenance, strictjson
from quantmill.activations import Passes
from quantmill.adaptersource import with_adapter
from quantmill.calibration import Calibrated, calibration_for
from quantmill.classify import FLOAT, Kind, classify
from quantmill.digests import Digest, digest_of
from quantmill.drafts import Base, open_with_draft, stored_base, with_draft
from quantmill.errors import BadRequest, BadSource, Corrupt, StoreError
from quantmill.execute import Progress, Written, recorded, write_blobs
from quantmill.manifest import BlobRef, manifest_bytes, parse_manifest
from quantmill.modelfile import Modelfile, decode_modelfile, parse_modelfile
from quantmill.names import ModelName, as_name
from quantmill.opening import Report, locate, open_source
from quantmill.pacing import pace
from quantmill.parts import naming
from quantmill.planner import make_plan, merge_plans, plan_part
from quantmill.plans import CALIBRATED, IMATRIX, Options, Plan
from quantmill.recipes import Recipe, Request, Target
from quantmill.resolutions import Resolution
from quantmill.source import ADAPTER, CONFIG, DRAFT, MODEL, MODEL_INDEX, OpenSource, Source
from quantmill.space import require_space
from quantmill.store import Store
from quantmill.version import __version__
from quantmill.weightings import with_methods

if TYPE_CHECKING:
    from quantmill.model import Model


@dataclass(frozen=True, slots=True)
class Created:
    """What `create` wrote. `non_finite` pairs tensors with their count of NaN and infinities.

    `new_blobs` were not in the store before; `resumed` were there and known from an earlier run.
    `base` is the stored model that a draft model was added to; the plan is then the draft's alone.
    `unmeasured` are tensors that a calibration said nothing of, `unused` what an imatrix says of
    others.
    """

    name: ModelName
    digest: Digest
    plan: Plan
    entries: int
    new_blobs: int
    resumed: int
    size: int
    non_finite: tuple[tuple[str, int], ...]
    base: ModelName | None = None
    unmeasured: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def plan(
    source: str | Path,
    *,
    quantize: str | None = None,
    group_size: int | None = None,
    options: Options | None = None,
    requantize: str | None = None,
    draft: str | Path | None = None,
    draft_quantize: str | None = None,
    merge_lora: str | Path | None = None,
    fit: Target | None = None,
    store: Store | None = None,
    follow_links: bool = False,
    fetching: Report | None = None,
    measuring: Report | None = None,
) -> Plan:
    """Everything that `create` would do with this checkpoint directory, and nothing done.

    `quantize` names a format, None keeps source precision; `group_size` replaces the format's own.
    `requantize` does the same to weights that are quantized already, which are decoded first;
    "bf16" only decodes them. `store` matters for a `draft` only, whose base may lie there. Reads
    headers and small files only, unless "auto" measures formats that `fit` a target, which runs the
    model (`measuring` is told how far). Raises BadSource, BadRequest and BadPlan as `create` does.
    """
    request = Request(quantize, group_size, requantize, draft_quantize, fit)
    recipe = Recipe(source, request, options or Options(), None, draft, merge_lora, follow_links)
    with opened(recipe, stored_base_of(store or Store(), recipe), fetching) as checkpoint:
        recipe = resolved(recipe, checkpoint, Passes(), measuring)
        return plan_for(checkpoint.source, recipe.request, recipe.options)


def plan_for(source: Source, request: Request, options: Options | None = None) -> Plan:
    """The plan for a source whose headers are read already; each part is planned by itself."""
    found = with_methods(_plan_for(source, request, options), source)
    return replace(found, calibration=calibration_for(found.options))


def _plan_for(source: Source, request: Request, options: Options | None) -> Plan:
    if not source.parts:
        kind = _kind(source, request)
        return make_plan(source, kind, options, version=__version__, decode=request.decode)
    if request.decode and not any(_is_quantized(part.source) for part in source.parts):
        _kind(source.parts[0].source, request)  # says that there is nothing to decode
    plans = []
    parts = [part for part in source.parts if part.role != ADAPTER]
    for part in parts:
        own = Request(request.draft_quantize) if part.role == DRAFT else request
        if own.decode and not _is_quantized(part.source):
            own = Request(own.word, own.group_size)
        with naming(part.folder):
            kind = _kind(part.source, own)
            adapter = source.adapter if part.role == MODEL else None
            plans.append(
                plan_part(
                    part, kind, options, version=__version__, decode=own.decode, adapter=adapter
                )
            )
    return merge_plans(source, parts, plans)


def _kind(source: Source, request: Request) -> Kind:
    return classify(source, request.word, request.group_size, decode=request.decode)


def _is_quantized(source: Source) -> bool:
    return classify(source, None).name != FLOAT


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
    draft: str | Path | None = None,
    draft_quantize: str | None = None,
    merge_lora: str | Path | None = None,
    fit: Target | None = None,
    device: str = "cpu",
    workers: int | None = None,
    memory: int | None = None,
    restart: bool = False,
    follow_links: bool = False,
    progress: Callable[[Progress], None] | None = None,
    fetching: Report | None = None,
    measuring: Report | None = None,
    passes: Passes | None = None,
) -> Created:
    """Import a checkpoint into the store under `name`, quantized on the way.

    `source` is a directory, a GGUF file, or `org/repo[@revision]` on the hub, fetched first into
    the cache of huggingface_hub (`fetching` is told of that). Decides everything first (see
    `plan`), streams tensors through at most `workers` threads within `memory` bytes for the whole
    process, and writes the manifest last: until then, and after any failure, the store shows what
    it showed before. Blobs that an earlier, interrupted run finished are checked and used, unless
    `restart`. These three change no digest; `device` "gpu" does, since Metal and CUDA round
    differently (docs/formats.md).

    `draft` is a draft model to store with the model, in the format `draft_quantize`. `source` may
    then name a stored model, whose blobs are used as they are. `merge_lora` is the directory of a
    LoRA adapter that is added to the weights, in float32, before they are quantized. With
    `quantize` (or `requantize`) "auto" the formats `fit` a target (docs/fidelity.md). `passes` of
    the same model spare those that were made before.

    Raises BadName, BadRequest, BadSource, BadWeights, BadPlan, OverBudget and StoreError.
    """
    target = as_name(name)
    store = store or Store()
    request = Request(quantize, group_size, requantize, draft_quantize, fit)
    draft = draft or (modelfile.draft if modelfile else None)
    options = on_device(device, options or Options())
    passes = passes or Passes()
    recipe = Recipe(source, request, options, modelfile, draft, merge_lora, follow_links)
    base = stored_base_of(store, recipe)
    with opened(recipe, base, fetching) as checkpoint:
        measure = partial(resolved, recipe, checkpoint, passes, measuring)
        recipe = _resolved(store, recipe, checkpoint, measure, restart=restart)
        decided = plan_for(checkpoint.source, recipe.request, recipe.options)
        _check_memory(decided, memory)
        chosen = pace(decided, checkpoint.source.tensors, workers, memory)
        run = partial(write_blobs, pace=chosen, restart=restart, progress=progress)
        with calibrating(decided, recipe, checkpoint, passes) as calibrated:
            return _made(store, target, calibrated, recipe, checkpoint, base, run)


def _made(
    store: Store,
    target: ModelName,
    calibrated: Calibrated,
    recipe: Recipe,
    checkpoint: OpenSource,
    base: Base | None,
    write: Callable[..., Written],
) -> Created:
    """Write everything, the manifest last."""
    decided = calibrated.plan
    additions = small_blobs(checkpoint, decided, recipe.modelfile, base)  # before any write
    run = partial(write, decided, checkpoint, store, stages=calibrated.stages)
    with store.writing():
        require_space(store, decided, checkpoint, sum(len(data) for *_, data in additions))
        written, small = _write_all(store, additions, run)
        refs = [*written.refs, *small[1:]]
        entries = _entries(base, refs) if recipe.draft else refs
        raw = _publish(store, target, small[0], entries, base)
        provenance.note_recipe(store, digest_of(raw), recipe)
    return _created(store, target, calibrated, raw, written, base)


def _check_memory(decided: Plan, memory: int | None) -> None:
    if memory is not None and decided.calibration and decided.calibration.kind != IMATRIX:
        raise BadRequest(
            f"--method {decided.options.method} runs the model, whose memory is not budgeted",
            hint="leave out --memory, or use --method search or --imatrix, which run nothing",
        )


def _write_all(
    store: Store, additions: Iterable[_Addition], weights: Callable[[], Written]
) -> tuple[Written, list[BlobRef]]:
    """Weights and small files, whose thread is of its own: waiting for the disk costs no time."""
    with ThreadPoolExecutor(1, "quantmill-files") as beside:
        small = beside.submit(_put_all, store, additions)
        return weights(), small.result()


def _publish(
    store: Store, target: ModelName, config: BlobRef, refs: Sequence[BlobRef], base: Base | None
) -> bytes:
    """Write the manifest, once everything it names is there, durably; its bytes."""
    if base:
        store.keep({ref.digest for ref in base.refs})
    _check_present(store, [*refs, config])
    raw = manifest_bytes(config, refs)
    store.put_manifest(target, raw)
    return raw


def _created(
    store: Store, target: ModelName, calibrated: Calibrated, raw: bytes, written: Written,
    base: Base | None,
) -> Created:  # fmt: skip
    manifest = parse_manifest(raw, target.display)
    return Created(
        store.spelling(target), manifest.digest, calibrated.plan, len(manifest.blobs),
        written.new_blobs, written.resumed, manifest.total_size, tuple(written.non_finite.items()),
        base.name if base else None, written.unmeasured, calibrated.unused,
    )  # fmt: skip


@contextmanager
def calibrating(
    decided: Plan, recipe: Recipe, checkpoint: OpenSource, passes: Passes
) -> Iterator[Calibrated]:
    """The plan with its calibration known whole, and what gives it; nothing for other methods.

    Raises BadPlan for models without a forward pass, and what `calibrating.calibrated` does.
    """
    if decided.calibration is None or not any(t.method in CALIBRATED for t in decided.tensors):
        yield Calibrated(replace(decided, calibration=None))
        return
    from quantmill import blas

    blas.preload()  # before anything loads MLX
    from quantmill.calibrating import calibrated

    options = recipe.options
    with _unquantized(recipe, checkpoint.source) as model:
        file = options.calibration or options.imatrix
        yield calibrated(decided, checkpoint, model, file, passes)


@contextmanager
def _unquantized(recipe: Recipe, source: Source) -> Iterator[Callable[[], Model]]:
    """What opens the model that a recipe quantizes, as it is."""
    from quantmill.unquantized import unquantized

    place = locate(recipe.source)

    def stored(own: Store) -> ModelName:
        return create("reference", place, store=own, merge_lora=recipe.merge_lora).name

    with unquantized(place, source, stored) as model:
        yield model


def _resolved(
    store: Store,
    recipe: Recipe,
    checkpoint: OpenSource,
    measure: Callable[[], Recipe],
    *,
    restart: bool,
) -> Recipe:
    """The recipe as `measure` gives it, or as a run before this one noted it."""
    if not recipe.request.is_auto:
        return recipe
    noted = Resolution(store, recipe, checkpoint)
    known = None if restart else noted.find()
    if known is not None:
        return known
    found = measure()
    noted.keep(found)
    return found


def resolved(
    recipe: Recipe, checkpoint: OpenSource, passes: Passes, report: Report | None = None
) -> Recipe:
    """The recipe itself, or for `auto` the one that measuring the model gives (automatic.py)."""
    if not recipe.request.is_auto:
        return recipe
    from quantmill import blas

    blas.preload()  # before anything loads MLX
    from quantmill.automatic import resolved as measured

    with _unquantized(recipe, checkpoint.source) as model:
        return measured(recipe, checkpoint, model, plan_for, passes, report)


def stored_base_of(store: Store, recipe: Recipe) -> Base | None:
    """The stored model that a draft model is added to, None where the source is a checkpoint.

    Raises BadRequest where its weights should change, BadSource and Corrupt as `stored_base` does.
    """
    draft, request = recipe.draft, recipe.request
    modelconfig.check_draft_request(str(draft) if draft else None, request.draft_quantize)
    base = stored_base(store, recipe.source) if draft else None
    if base and (request.word or request.decode):
        raise BadRequest(
            f"{base.name.display} is in the store already: its weights stay as they are",
            kind="base_is_stored",
            hint="leave out --quantize and --requantize; --draft-quantize is the draft model's",
        )
    return base


def opened(recipe: Recipe, base: Base | None, fetching: Report | None = None) -> OpenSource:
    """Everything that a recipe reads, fetched first where it is on the hub; raises BadSource."""
    place = locate(recipe.source, fetching) if base is None else recipe.source
    links, numbers = recipe.follow_links, recipe.numbers
    if recipe.draft is None:
        found = open_source(place, follow_links=links, decode=numbers.of_model)
    else:
        small = locate(recipe.draft, fetching)
        found = open_with_draft(place, small, base, numbers, follow_links=links)
    if recipe.merge_lora is None:
        return found
    return with_adapter(found, recipe.merge_lora, follow_links=links)


def _entries(base: Base | None, written: Sequence[BlobRef]) -> list[BlobRef]:
    """The entries of a model with a draft: what a base has stays but for texts given anew."""
    given = {ref.media_type for ref in written if ref.name is None}
    if mediatypes.TEMPLATE in given:
        given.add(mediatypes.PROMPT)  # its old name
    kept = [ref for ref in base.refs if ref.media_type not in given] if base else []
    return with_draft([*kept, *written])


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


def _config(decided: Plan, source: Source, modelfile: Modelfile | None, base: Base | None) -> bytes:
    stored = dict(base.config) if base else {}
    how = modelconfig.serving_of(stored, modelfile) if base else _serving(source, modelfile)
    own = stored.get("quantmill")
    said = (own if isinstance(own, dict) else {}) | recorded(decided)
    draft = source.draft
    # a stored base keeps its own; the plan is then the draft's
    config = modelconfig.model_config(
        decided.format.name if decided.format and not base else "",
        how,
        draft=modelconfig.draft_record(draft.source.texts.get(CONFIG)) if draft else None,
        base=stored | ({"quantmill": said} if said else {}),
    )
    return modelconfig.config_json(config)


def _serving(source: Source, modelfile: Modelfile | None) -> modelconfig.Serving:
    if not source.is_pipeline:
        return modelconfig.serving(modelconfig.detect(source.texts), modelfile)
    found = modelconfig.Serving(pipelines.capabilities(source.config))
    if modelfile is None:
        return found
    parser, renderer = modelfile.parser, modelfile.renderer
    return replace(found, parser=parser, renderer=renderer, requires=modelfile.requires)


_Addition = tuple[str, str | None, bytes]


def small_blobs(
    checkpoint: OpenSource, decided: Plan, modelfile: Modelfile | None, base: Base | None
) -> list[_Addition]:
    """Media type, name and bytes of what is stored beside the weights, the config first."""
    config = mediatypes.CONFIG, None, _config(decided, checkpoint.source, modelfile, base)
    return [config, *_side_files(checkpoint, decided), *_additions(modelfile)]


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
        if file.name == MODEL_INDEX and checkpoint.source.is_pipeline:
            data = _stored_index(checkpoint.source, decided)
        yield str(file.media_type), file.name, data


def _stored_index(source: Source, decided: Plan) -> bytes:
    weights = sum(spec.weights for spec in decided.tensors if spec.shape)
    configs = {part.name: part.source.config for part in source.parts}
    return pipelines.stored_index(source.config, weights, decided.format, configs)


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


def read_modelfile(path: str | Path) -> tuple[Modelfile, str | Path]:
    """A Modelfile, its DRAFT line made a path, and the directory its FROM line means.

    Relative ones are looked up beside the Modelfile, then in the current directory. Raises
    BadModelfile, or BadSource when the file cannot be read.
    """
    file = Path(path)
    try:
        text = decode_modelfile(file.read_bytes())
    except OSError as error:
        raise BadSource(f"{file}: {error.strerror}", kind="modelfile_unreadable") from None
    parsed = parse_modelfile(text)
    if parsed.draft:
        parsed = replace(parsed, draft=str(_meant(file, parsed.draft)))
    return parsed, _meant(file, parsed.source)


def _meant(file: Path, text: str) -> str | Path:
    """The path that a line of a Modelfile names, or the line itself."""
    beside = file.parent / text
    return beside if os.path.exists(beside) else text
