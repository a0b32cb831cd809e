"""Model names: `[scheme://][host/][namespace/]model[:tag]`, parsed once at the edge.

A missing scheme is `https`, a missing host `registry.ollama.ai`, a missing namespace `library`,
a missing tag `latest`. Names compare without regard to case.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from quantmill.errors import BadName

DEFAULT_SCHEME = "https"
DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"

# first character, further characters, greatest length
_PARTS = {
    "host": re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}"),
    "namespace": re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}"),
    "model": re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"),
    "tag": re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"),
    "digest": re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,79}"),
}

# A separator was there and nothing stood beside it: no valid part holds this character.
_MISSING = "!MISSING!"


@dataclass(frozen=True, slots=True)
class ModelName:
    """A model name; parts that were not written are None until `resolved`."""

    model: str
    tag: str | None = None
    namespace: str | None = None
    host: str | None = None
    scheme: str | None = None

    def __str__(self) -> str:
        """Host, namespace, model and tag, as far as they are there."""
        path = "/".join(p for p in (self.host, self.namespace, self.model) if p)
        return f"{path}:{self.tag}" if self.tag else path

    @property
    def resolved(self) -> ModelName:
        """The same name with defaults filled in."""
        return ModelName(
            self.model,
            self.tag or DEFAULT_TAG,
            self.namespace or DEFAULT_NAMESPACE,
            self.host or DEFAULT_HOST,
            self.scheme or DEFAULT_SCHEME,
        )

    @property
    def parts(self) -> tuple[str, str, str, str]:
        """Host, namespace, model, tag with defaults: the four folders of the manifest's path."""
        full = self.resolved
        return (full.host or "", full.namespace or "", full.model, full.tag or "")

    @property
    def path(self) -> str:
        """Path of the manifest below the store's `manifests` folder."""
        return "/".join(self.parts)

    @property
    def display(self) -> str:
        """Shortest text that means this name: default host and namespace hidden, tag shown."""
        full = self.resolved
        if _same(full.host, DEFAULT_HOST):
            full = replace(full, host=None)
            if _same(full.namespace, DEFAULT_NAMESPACE):
                full = replace(full, namespace=None)
        return str(full)

    @property
    def key(self) -> tuple[str, ...]:
        """What two spellings of one name have in common."""
        return tuple(part.lower() for part in self.parts)


def _same(a: str | None, b: str) -> bool:
    return a is not None and a.lower() == b.lower()


def is_valid_part(kind: str, text: str) -> bool:
    """Whether `text` may stand as the host, namespace, model, tag or digest of a name."""
    return _PARTS[kind].fullmatch(text) is not None


def _split(text: str, separator: str) -> tuple[str, str | None]:
    """Text before and after the last separator; an empty side next to one is marked invalid."""
    before, found, after = text.rpartition(separator)
    if not found:
        return after, None
    return before or _MISSING, after or _MISSING


def split_name(text: str) -> ModelName:
    """The parts as they are written, unchecked: use `parse_name` for input from outside."""
    tag = None
    # a colon before the last slash belongs to the host (a port)
    if text.rfind(":") > text.rfind("/"):
        text, tag = _split(text, ":")
    rest, model = _split(text, "/")
    if model is None:
        return ModelName(rest, tag)
    host, namespace = _split(rest, "/")
    if namespace is None:
        return ModelName(model, tag, rest)
    scheme, found, address = host.rpartition("://")
    return ModelName(model, tag, namespace, address, scheme if found and scheme else None)


def _checked(name: ModelName, original: str) -> ModelName:
    for kind in ("host", "namespace", "model", "tag"):
        part = getattr(name, kind)
        if part is not None and not is_valid_part(kind, part):
            shown = "" if _MISSING in part else f": {kind} {part!r}"
            raise BadName(
                f"invalid model name {original!r}{shown}",
                hint="names look like [host/][namespace/]model[:tag]",
            )
    return name


def parse_name(text: str) -> ModelName:
    """The name `text` means, every part checked; raises BadName."""
    return _checked(split_name(text), text)


def as_name(name: str | ModelName) -> ModelName:
    """A name given as text or as a value."""
    return parse_name(name) if isinstance(name, str) else name


def as_names(names: str | ModelName | Iterable[str | ModelName]) -> list[ModelName]:
    """One name or several, each as text or as a value."""
    if isinstance(names, str | ModelName):
        return [as_name(names)]
    return [as_name(name) for name in names]


def name_from_path(path: str) -> ModelName:
    """The name whose manifest lies at this path of four parts; raises BadName for other paths."""
    parts = path.split("/")
    if len(parts) != 4:
        raise BadName(f"not a manifest path: {path!r}")
    host, namespace, model, tag = parts
    return _checked(ModelName(model, tag, namespace, host), path)
