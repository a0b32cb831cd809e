"""Digests: `sha256` plus 64 hex digits, checked once and then trusted."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from quantmill.errors import BadName

_PATTERN = re.compile(r"sha256[:-]([0-9a-fA-F]{64})", re.ASCII)


def blob_file_name(digest: str) -> str:
    """File name of a blob in the store: the first colon becomes a dash, nothing else changes."""
    return digest.replace(":", "-", 1)


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """A SHA-256 digest; `hex` is lower case."""

    hex: str

    def __str__(self) -> str:
        return f"sha256:{self.hex}"

    @property
    def file_name(self) -> str:
        """Name of the blob's file in the store."""
        return blob_file_name(str(self))

    @property
    def short(self) -> str:
        """The first twelve hex digits, for people."""
        return self.hex[:12]


def parse_digest(text: str) -> Digest:
    """A digest from `sha256:<hex>` or `sha256-<hex>`; raises BadName for anything else."""
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise BadName(f"invalid digest format {text!r}", kind="invalid_digest")
    return Digest(match[1].lower())


def digest_of(data: bytes) -> Digest:
    """The digest of these bytes."""
    return Digest(hashlib.sha256(data).hexdigest())
