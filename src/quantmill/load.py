"""Load: a stored model or a plain directory, opened for use. Headers are read, no weights.

Whatever naming the producer used, weights come out under one name each, with their scales, biases
and global scale beside them and the quantization parameters resolved (docs/loading.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantmill import mediatypes, strictjson
from quantmill.checkpoint import open_checkpoint, read_side_file
from quantmill.companions import loaded_name
from quantmill.digests import Digest
from quantmill.errors import BadName, Corrupt, NotFound
from quantmill.files import translated
from quantmill.manifest import BlobRef, Manifest
from quantmill.model import Located, Model
from quantmill.modelconfig import DRAFT_FILE_PREFIX, DRAFT_TENSOR_PREFIX
from quantmill.names import ModelName, as_name
from quantmill.quantconfig import read_quant_config, without_foreign
from quantmill.source import CONFIG, MODEL_INDEX, QUANTIZATION_CONFIG
from quantmill.store import Store
from quantmill.tensorfile import TensorFile
from quantmill.verification import MAX_JSON, damaged, read_tensor_file

DRAFT = "draft"
"""The component that is a model's draft model, where it has one."""


def open_model(
    source: str | Path | ModelName,
    *,
    component: str | None = None,
    store: Store | None = None,
    verify: bool = False,
) -> Model:
    """Open a stored model by name, or a directory of safetensors.

    A Path, or text that is not the name of a stored model and names a directory, is a directory
    in mlx-lm, mlx-native, Hugging Face or Ollama naming. `component` opens one part of a model
    made of several (`text_encoder`, `transformer`, `vae`), or its `draft` model, the prefix
    stripped. `verify` recomputes the digest of every blob first.

    Raises NotFound for a name, component or blob that is missing, Corrupt for headers that lie,
    scales without codes or codes without scales, and parameters that contradict the shapes."""
    if not isinstance(source, Path):
        found = _stored(source, store or Store(), component, verify)
        if found is not None:
            return found
    folder = Path(str(source))
    if not os.path.isdir(folder):
        raise NotFound(
            f"no model named {source} and no such directory",
            hint="`quantmill list` shows what is in the store",
        )
    return _from_folder(folder, component)


def _stored(
    source: str | ModelName, store: Store, component: str | None, verify: bool
) -> Model | None:
    try:
        name = as_name(source)
        manifest = store.get_manifest(name)
    except (BadName, NotFound):
        if os.path.isdir(str(source)):  # of any text at all, unlike Path.is_dir
            return None
        raise
    return _from_manifest(name.display, store, manifest, component, verify)


def _from_manifest(
    where: str, store: Store, manifest: Manifest, component: str | None, verify: bool
) -> Model:
    part = _part(store, manifest, component)
    refs = [r for r in manifest.tensor_refs() if part.holds(r)]
    if not refs:
        what = f"no component {component!r}" if component else "no tensor blobs"
        raise NotFound(f"{where} has {what}", kind="no_component" if component else "no_tensors")
    tensors: dict[str, Located] = {}
    seen: dict[str, str] = {}
    bad = damaged(store, (ref.digest for ref in refs)) if verify else set()
    for ref in refs:
        file = _header(where, store, ref, bad)
        path = store.blob_path(ref.digest)
        names = {key: _placed(ref.name or "", key, part) for key in file.entries}
        metadata = _renamed(file.metadata, names)
        for entry in file.entries.values():
            name = names[entry.name]
            if seen.setdefault(name, path.name) != path.name:
                raise Corrupt(f"{where}: two blobs hold a tensor called {name!r}")
            tensors[name] = Located(
                entry.name, entry.dtype, entry.shape, path, entry.start, entry.nbytes, metadata
            )
    files = {
        str(r.name): r
        for r in manifest.blobs
        if r.name and r.media_type in {mediatypes.JSON, mediatypes.FILE}
    }
    own = [name.removeprefix(part.files) for name, r in files.items() if part.holds(r)]

    def read(name: str) -> bytes:
        return store.read_blob(files[part.files + name].digest, MAX_JSON)

    index = files.get(MODEL_INDEX)
    said = store.read_blob(index.digest, MAX_JSON) if index else b"{}"
    return _model(where, tensors, read, own, said, stored=True)


def _header(where: str, store: Store, ref: BlobRef, bad: Set[Digest]) -> TensorFile:
    shown = f"{where}: blob {ref.digest.short} ({ref.name})"
    try:
        if ref.digest in bad:
            raise Corrupt(f"{shown} is damaged")
        return read_tensor_file(store, ref)
    except NotFound:
        raise NotFound(f"{shown} is missing", kind="blob_missing") from None


@dataclass(frozen=True, slots=True)
class _Part:
    """What the names of a component's tensors and of its files begin with.

    `without` is the part that a whole model leaves out: its draft model.
    """

    tensors: str = ""
    files: str = ""
    without: _Part | None = None

    def holds(self, ref: BlobRef) -> bool:
        """Whether an entry belongs to this part."""
        tensor = ref.media_type == mediatypes.TENSOR
        if self.without is not None and self.without.holds(ref):
            return False
        return (ref.name or "").startswith(self.tensors if tensor else self.files)


def _part(store: Store, manifest: Manifest, component: str | None) -> _Part:
    """The part that a component is, None meaning all but the draft model."""
    if component not in {None, DRAFT}:
        return _Part(f"{component}/", f"{component}/")
    if component is None:
        names = (ref.name or "" for ref in manifest.tensor_refs())
        suspected = any(name.startswith(DRAFT_TENSOR_PREFIX) for name in names)
        return _Part(without=_draft(store, manifest) if suspected else None)
    return _draft(store, manifest) or _Part(f"{component}/", f"{component}/")


def _draft(store: Store, manifest: Manifest) -> _Part | None:
    """The draft model, whose names the model's config records; None where there is none."""
    if manifest.config is None:
        return None
    try:
        config = strictjson.parse_object(store.read_blob(manifest.config.digest, MAX_JSON))
    except strictjson.BadJson as error:
        raise Corrupt(f"config blob: {error}", kind="bad_json") from None
    record = config.get("draft")
    if not isinstance(record, dict):
        return None
    file = str(record.get("config") or f"{DRAFT_FILE_PREFIX}{CONFIG}")
    return _Part(str(record.get("tensor_prefix") or DRAFT_TENSOR_PREFIX), file.removesuffix(CONFIG))


def _placed(layer: str, key: str, part: _Part) -> str:
    """The name of a blob's tensor. In a component's blob, keys may lack the component's prefix."""
    name = loaded_name(layer, key)
    folder, slash, _ = layer.partition("/")
    if slash and not name.startswith(f"{folder}/"):
        name = f"{folder}/{name}"
    return name.removeprefix(part.tensors)


def _renamed(metadata: Mapping[str, str], names: Mapping[str, str]) -> Mapping[str, str]:
    """A blob's metadata, what it says about a tensor under the tensor's final name."""
    split = ((key.rpartition("."), text) for key, text in metadata.items())
    return {f"{names.get(tensor, tensor)}{dot}{what}": text for (tensor, dot, what), text in split}


def _from_folder(folder: Path, component: str | None) -> Model:
    index_file = folder / MODEL_INDEX
    if component:
        if Path(component).name != component:
            raise NotFound(f"{component!r} is not the name of a component", kind="no_component")
        folder = folder / component
        if not folder.is_dir():
            raise NotFound(f"{folder.parent} has no component {component!r}", kind="no_component")
    with open_checkpoint(folder, loose=True) as checkpoint:
        tensors = {
            t.name: Located(t.name, t.dtype, t.shape, folder / t.file, t.start, t.nbytes)
            for t in checkpoint.source.tensors.values()
        }
        names = [f.name for f in checkpoint.source.files if f.media_type]

    def read(name: str) -> bytes:
        return read_side_file(folder, name)

    with translated(index_file):
        index = index_file.read_bytes() if index_file.is_file() else b"{}"
    return _model(str(folder), tensors, read, names, index)


def _model(
    where: str,
    tensors: Mapping[str, Located],
    read: Callable[[str], bytes],
    files: Sequence[str],
    model_index: bytes,
    *,
    stored: bool = False,
) -> Model:
    def document(name: str, data: bytes) -> dict[str, Any]:
        try:
            return strictjson.parse_object(data, constants=True)
        except strictjson.BadJson as error:
            raise Corrupt(f"{where}: {name}: {error}", kind="bad_json") from None

    def beside(name: str) -> dict[str, Any]:
        return document(name, read(name)) if name in files else {}

    config = beside(CONFIG)
    # an imported model keeps its config.json, which speaks of packings that are never stored
    about = without_foreign(config) if stored else config
    said = (about, beside(QUANTIZATION_CONFIG), document(MODEL_INDEX, model_index))
    return Model(where, tensors, config, read, files, read_quant_config(*said))
