"""Facts about stored models, read from manifests, configs and blob headers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from quantmill import mediatypes, strictjson
from quantmill.errors import Corrupt, NotFound, QuantmillError
from quantmill.manifest import Manifest
from quantmill.modelconfig import DRAFT_TENSOR_PREFIX
from quantmill.names import ModelName, as_name
from quantmill.source import CONFIG, MODEL_INDEX
from quantmill.store import Store
from quantmill.stored import StoredTensor
from quantmill.verification import MAX_JSON, describe_ref, read_tensor_file

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Listed:
    """One line of `list`. `problem` says why the manifest is unreadable; the rest is then empty."""

    name: ModelName
    digest: str
    size: int
    modified: datetime
    format: str
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class FormatShare:
    """How much of a model one format (or dtype) holds."""

    label: str
    tensors: int
    weights: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What `show` tells. `info` has Ollama's keys; `bits_per_weight` counts all tensor data.

    `draft` is the model's draft model, whose tensors are among the others, where it has one.
    """

    name: ModelName
    digest: str
    size: int
    modified: datetime
    format: str
    capabilities: tuple[str, ...]
    parser: str
    renderer: str
    requires: str
    recorded: Mapping[str, Any]
    info: Mapping[str, Any]
    weights: int
    bits_per_weight: float
    shares: tuple[FormatShare, ...]
    files: tuple[tuple[str, int], ...]
    tensors: tuple[StoredTensor, ...]
    draft: DraftFacts | None = None


@dataclass(frozen=True, slots=True)
class DraftFacts:
    """The draft model of a model."""

    architecture: str
    tensors: int
    weights: int
    nbytes: int


def list_models(store: Store) -> list[Listed]:
    """Every model in the store, in name order; unreadable ones with their problem."""
    return [
        _listed(store, stored.name, datetime.fromtimestamp(stored.modified, UTC))
        for stored in store.list_names()
    ]


def _listed(store: Store, name: ModelName, modified: datetime) -> Listed:
    try:
        manifest = store.get_manifest(name)
    except QuantmillError as error:
        return Listed(name, "", 0, modified, "", error.message)
    config = _config(store, manifest)
    shown = str(config.get("file_type") or "")
    return Listed(name, manifest.digest.hex, manifest.total_size, modified, shown)


def show(store: Store, name: str | ModelName) -> ModelFacts:
    """Facts about one model, with its tensors.

    Raises BadName, NotFound for the name or a blob that is missing, Corrupt for headers that lie.
    """
    name = as_name(name)
    manifest = store.get_manifest(name)
    config = _config(store, manifest)
    tensors = tuple(t for ref in manifest.tensor_refs() for t in describe_ref(store, ref))
    weights = sum(t.elements for t in tensors)
    data = sum(t.nbytes for t in tensors)
    draft = _draft(config.get("draft"), tensors)
    files = [
        (ref.name or ref.media_type.rpartition(".")[2], ref.size)
        for ref in manifest.blobs
        if ref.media_type != mediatypes.TENSOR
    ]
    return ModelFacts(
        name=store.spelling(name),
        digest=manifest.digest.hex,
        size=manifest.total_size,
        modified=datetime.fromtimestamp(store.manifest_time(name), UTC),
        format=str(config.get("file_type") or ""),
        capabilities=tuple(map(str, _of_type(list, config.get("capabilities")))),
        parser=str(config.get("parser") or ""),
        renderer=str(config.get("renderer") or ""),
        requires=str(config.get("requires") or ""),
        recorded=_of_type(dict, config.get("quantmill")),
        info=_info(store, manifest, weights - (draft.weights if draft else 0)),
        weights=weights,
        bits_per_weight=8 * data / weights if weights else 0.0,
        shares=shares(tensors),
        files=tuple(files),
        tensors=tensors,
        draft=draft,
    )


def _draft(record: Any, tensors: tuple[StoredTensor, ...]) -> DraftFacts | None:
    if not isinstance(record, dict):
        return None
    prefix = str(record.get("tensor_prefix") or DRAFT_TENSOR_PREFIX)
    own = [t for t in tensors if t.name.startswith(prefix)]
    weights, nbytes = sum(t.elements for t in own), sum(t.nbytes for t in own)
    return DraftFacts(str(record.get("architecture") or ""), len(own), weights, nbytes)


def shares(tensors: tuple[StoredTensor, ...]) -> tuple[FormatShare, ...]:
    """Tensors, weights and bytes by format, most bytes first."""
    found: dict[str, list[StoredTensor]] = defaultdict(list)
    for tensor in tensors:
        found[tensor.format.label if tensor.format else tensor.dtype].append(tensor)
    summed = [
        FormatShare(k, len(v), sum(t.elements for t in v), sum(t.nbytes for t in v))
        for k, v in found.items()
    ]
    return tuple(sorted(summed, key=lambda s: (-s.nbytes, s.label)))


def _config(store: Store, manifest: Manifest) -> dict[str, Any]:
    """The config blob, {} where it is missing or broken: verify's business, not a listing's."""
    if manifest.config is None:
        return {}
    try:
        return strictjson.parse_object(store.read_blob(manifest.config.digest, MAX_JSON))
    except (QuantmillError, strictjson.BadJson):
        return {}


def _of_type(kind: type[_T], value: object) -> _T:
    """The value, or an empty one where a config written by others holds something else."""
    return value if isinstance(value, kind) else kind()


def read_json(store: Store, manifest: Manifest, name: str) -> Any:
    """The JSON file `name` of a model.

    Raises NotFound (kind config_not_found or blob_missing) or Corrupt (kind bad_json).
    """
    ref = manifest.json_ref(name)
    if ref is None:
        raise NotFound(f"the model has no file {name!r}", kind="config_not_found")
    try:
        data = store.read_blob(ref.digest, MAX_JSON)
    except NotFound as error:
        raise NotFound(error.message, kind="blob_missing") from None
    try:
        return strictjson.parse(data, constants=True)
    except strictjson.BadJson as error:
        raise Corrupt(f"{name}: {error}", kind="bad_json") from None


# -- info maps, with the keys and rules of the peers -----------------------------------------------

_BYTES_BY_DTYPE = {"float32": 4, "float16": 2, "bfloat16": 2}
_BLOB_OVERHEAD = 150  # what Ollama takes for a blob's header when it has only sizes to go by
_FIELDS = (
    ("block_count", "num_hidden_layers"),
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
)
_CLASS_ENDINGS = ("ForCausalLM", "ForConditionalGeneration")


def model_info(
    config: Mapping[str, Any], tensor_bytes: int, blobs: int, weights: int = 0
) -> dict[str, Any]:
    """Architecture, size and shape of a language model from its config.json.

    The parameter count is `weights`, or estimated from sizes where that is 0. Fields of
    `text_config` win over those beside it.
    """
    architecture = _architecture(config)
    info: dict[str, Any] = {"general.architecture": architecture}
    width = _BYTES_BY_DTYPE.get(str(config.get("torch_dtype") or config.get("dtype")), 2)
    count = weights or (tensor_bytes - _BLOB_OVERHEAD * blobs) // width
    if count > 0:
        info["general.parameter_count"] = count
    nested = config.get("text_config")
    for key, field in _FIELDS:
        for place in (nested if isinstance(nested, dict) else {}, config):
            value = place.get(field)
            if type(value) is int and value > 0:
                info[f"{architecture}.{key}"] = value
                break
    return info


def _architecture(config: Mapping[str, Any]) -> str:
    if isinstance(config.get("model_type"), str):
        return str(config["model_type"])
    listed = config.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else ""
    for ending in _CLASS_ENDINGS:
        name = str(name).removesuffix(ending)
    return name.lower()


def _info(store: Store, manifest: Manifest, weights: int) -> dict[str, Any]:
    if not manifest.tensor_refs():  # weights in a GGUF file: Ollama's own format, not described
        return {}
    if manifest.json_ref(CONFIG) is None:
        return component_info(store, manifest)
    config = read_json(store, manifest, CONFIG)
    refs = manifest.tensor_refs()
    return model_info(
        config if isinstance(config, dict) else {}, manifest.tensor_size, len(refs), weights
    )


def component_info(store: Store, manifest: Manifest) -> dict[str, Any]:
    """Architecture, parameter count and quantization of a model made of components.

    From its model_index.json; missing counts are estimated at two bytes a weight, a missing type is
    the first that a tensor blob records, else BF16.
    """
    try:
        index = read_json(store, manifest, MODEL_INDEX)
    except QuantmillError:
        index = {}
    index = index if isinstance(index, dict) else {}
    return {
        "architecture": index.get("architecture") or "",
        "parameter_count": index.get("parameter_count") or manifest.tensor_size // 2,
        "quantization": index.get("quantization") or _first_type(store, manifest),
    }


def _first_type(store: Store, manifest: Manifest) -> str:
    for ref in manifest.tensor_refs():
        try:
            metadata = read_tensor_file(store, ref).metadata
        except QuantmillError:
            continue
        for key, value in metadata.items():
            if value and (key == "quant_type" or key.endswith(".quant_type")):
                return value.upper()
    return "BF16"
