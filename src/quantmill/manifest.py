"""Manifests: the document a model name points to. Values and JSON bytes, no files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from quantmill import mediatypes, strictjson
from quantmill.digests import Digest, digest_of, parse_digest
from quantmill.errors import BadName, Corrupt

MAX_MANIFEST = 64 * 2**20
SCHEMA_VERSION = 2
_MAX_SIZE = 2**63


@dataclass(frozen=True, slots=True)
class BlobRef:
    """One entry of a manifest: a blob, what it is, and the name it goes by."""

    media_type: str
    digest: Digest
    size: int
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """A parsed manifest. `raw` are the bytes it was read from: unknown fields live on there."""

    config: BlobRef | None
    blobs: tuple[BlobRef, ...]
    raw: bytes

    @property
    def digest(self) -> Digest:
        """Digest of the manifest's own bytes."""
        return digest_of(self.raw)

    @property
    def total_size(self) -> int:
        """Bytes of the config and of every entry, repeated ones counted again."""
        return sum(ref.size for ref in self.all_refs())

    @property
    def tensor_size(self) -> int:
        """Bytes of the tensor blobs."""
        return sum(ref.size for ref in self.tensor_refs())

    def all_refs(self) -> Iterator[BlobRef]:
        """The entries in order, then the config."""
        yield from self.blobs
        if self.config is not None:
            yield self.config

    def tensor_refs(self, component: str = "") -> list[BlobRef]:
        """The tensor blobs, or those whose name starts with `component/`."""
        prefix = f"{component}/" if component else ""
        return [
            ref
            for ref in self.blobs
            if ref.media_type == mediatypes.TENSOR and (ref.name or "").startswith(prefix)
        ]

    def json_ref(self, name: str) -> BlobRef | None:
        """The first JSON entry with this name."""
        for ref in self.blobs:
            if ref.media_type == mediatypes.JSON and ref.name == name:
                return ref
        return None


def manifest_bytes(config: BlobRef, blobs: Sequence[BlobRef]) -> bytes:
    """The bytes Ollama writes for this manifest: compact, fixed field order, a final newline."""
    document = {
        "schemaVersion": SCHEMA_VERSION,
        "mediaType": mediatypes.MANIFEST,
        "config": _entry(config),
        "layers": [_entry(ref) for ref in blobs],
    }
    return go_json(document) + b"\n"


def go_json(value: Any) -> bytes:
    """Compact JSON with `<`, `>` and `&` escaped, as Go's encoder does by default."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8")


def _entry(ref: BlobRef) -> dict[str, Any]:
    found: dict[str, Any] = {
        "mediaType": ref.media_type,
        "digest": str(ref.digest),
        "size": ref.size,
    }
    return found if ref.name is None else found | {"name": ref.name}


def parse_manifest(raw: bytes, name: str) -> Manifest:
    """A manifest from its bytes; raises Corrupt, naming `name` and the field that is wrong."""
    try:
        document = strictjson.parse_object(raw)
    except strictjson.BadJson as error:
        raise _bad(name, str(error)) from None
    config, layers = document.get("config"), document.get("layers")
    if layers is None:
        layers = []
    if not isinstance(layers, list):
        raise _bad(name, "layers is not an array")
    refs = tuple(_ref(item, f"layers[{i}]", name) for i, item in enumerate(layers))
    return Manifest(None if config is None else _ref(config, "config", name), refs, raw)


def _ref(value: Any, where: str, manifest: str) -> BlobRef:
    if not isinstance(value, dict):
        raise _bad(manifest, f"{where} is not an object")
    media_type, size, name = value.get("mediaType"), value.get("size"), value.get("name")
    if not isinstance(media_type, str):
        raise _bad(manifest, f"{where}.mediaType is not a string")
    if type(size) is not int or not 0 <= size < _MAX_SIZE:
        raise _bad(manifest, f"{where}.size is not a byte count")
    if name is not None and not isinstance(name, str):
        raise _bad(manifest, f"{where}.name is not a string")
    if name and not strictjson.is_text(name):
        raise _bad(manifest, f"{where}.name {name!r} is not Unicode text")
    try:
        digest = parse_digest(str(value.get("digest")))
    except BadName as error:
        raise _bad(manifest, f"{where}: {error.message}") from None
    return BlobRef(media_type, digest, size, name or None)


def _bad(name: str, what: str) -> Corrupt:
    return Corrupt(f"manifest of {name}: {what}", kind="bad_manifest")
