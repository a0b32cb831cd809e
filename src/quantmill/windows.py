"""Windows of tokens [windows, length]: of a text, or random. What models are measured with."""

from __future__ import annotations

import hashlib
import importlib
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantmill.errors import BadRequest, BadSource
from quantmill.files import translated

Tokens = npt.NDArray[np.int32]
"""Token ids [windows, length]."""

_TOPICS = "pydoc_data.topics"


@dataclass(frozen=True, slots=True)
class Text:
    """A text and what it is called; `python` is the version that it comes from, or None."""

    name: str
    text: str
    python: str | None = None


def default_text(*, calibrating: bool = False) -> Text:
    """The second half of the documentation that Python's `help` shows: it needs no download.

    The topics of pydoc_data.topics in the order of their names; the first half is for `calibrating`
    alone: what a model was calibrated with must not judge it. The text changes with Python's minor
    version, so that version belongs to any figure.
    Raises BadRequest where an installation lacks it.
    """
    try:
        topics: dict[str, str] = importlib.import_module(_TOPICS).topics
    except ImportError:
        raise BadRequest(
            f"this Python has no {_TOPICS}, the default text",
            kind="no_default_text",
            hint="a Python with its whole standard library has it"
            if calibrating
            else "--text FILE names another",
        ) from None
    whole = "\n\n".join(topics[name] for name in sorted(topics))
    middle, version = len(whole) // 2, platform.python_version()
    if calibrating:
        return Text(f"{_TOPICS}, first half", whole[:middle], version)
    return Text(f"{_TOPICS}, second half", whole[middle:], version)


def text_of(path: Path) -> Text:
    """A file of UTF-8 text. Raises BadSource, and StoreError where it cannot be read."""
    with translated(path):
        data = path.read_bytes()
    try:
        return Text(path.name, data.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadSource(f"{path} is no UTF-8 text", kind="bad_text") from None


@dataclass(frozen=True, slots=True)
class Ids:
    """A text in tokens: those that the tokenizer puts before every text (BOS), and its own."""

    before: Tokens
    own: Tokens

    def windows(self, length: int, count: int | None = None) -> Tokens:
        """Windows of `length` tokens, int32 [windows, length].

        Without `count` one after the other, what is left at the end dropped; with it, that many,
        beginning at places spread evenly over the text: floor of numpy.linspace(0, tokens - length,
        count). The tokens before every text begin each window and count into its length. Raises
        BadRequest for a text that is too short.
        """
        own = length - len(self.before)
        if own < 1 or len(self.own) < own * (count or 1):
            raise BadRequest(
                f"the text has {len(self.own)} tokens, too few for {count or 1} x {length}",
                kind="text_too_short",
                hint="fewer --tokens, or a longer text",
            )
        last = len(self.own) - own
        starts = np.arange(0, last + 1, own) if count is None else np.linspace(0, last, count)
        found = [np.concatenate([self.before, self.own[s : s + own]]) for s in starts.astype(int)]
        return np.stack(found).astype(np.int32)

    def same_as(self, other: Ids) -> bool:
        """Whether all tokens are the same."""
        same = np.array_equal(self.before, other.before)
        return same and np.array_equal(self.own, other.own)


def text_ids(tokenizer: Any, text: str) -> Ids:
    """A text in tokens."""
    # not verbose: transformers warns of texts longer than a model's context, which windows are not
    ids = np.asarray(tokenizer.encode(text, add_special_tokens=False, verbose=False), np.int32)
    return Ids(_before(tokenizer), ids)


def text_tokens(tokenizer: Any, text: str, length: int, count: int | None = None) -> Tokens:
    """Windows of a text, int32 [windows, length]; arguments and errors are `Ids.windows`'s."""
    return text_ids(tokenizer, text).windows(length, count)


def _before(tokenizer: Any) -> Tokens:
    """Tokens that a tokenizer begins every text with."""
    plain = list(tokenizer.encode("a", add_special_tokens=False))
    whole = list(tokenizer.encode("a"))
    for start in range(len(whole)):
        if plain and whole[start : start + len(plain)] == plain:
            return np.asarray(whole[:start], np.int32)
    return np.empty(0, np.int32)


def random_tokens(
    vocabulary: int, count: int, length: int, seed: int = 0, first: int | None = None
) -> Tokens:
    """Uniformly random tokens below `vocabulary`, int32 [count, length], the same on any machine.

    Each window begins with the token `first` (BOS) where one is given. The high 32 bits of NumPy's
    PCG64 times the vocabulary, the high half of that: the generator's raw stream is fixed, what
    NumPy makes of it elsewhere may change between versions.
    """
    raw = np.random.PCG64(seed).random_raw(count * length) >> np.uint64(32)
    found = (raw * np.uint64(vocabulary) >> np.uint64(32)).astype(np.int32).reshape(count, length)
    if first is not None:
        found[:, 0] = first
    return found


def tokens_digest(tokens: npt.NDArray[np.integer[Any]]) -> str:
    """`sha256:…` of the windows: shape and ids as little-endian 32-bit integers."""
    hashed = hashlib.sha256(np.asarray(tokens.shape, "<i4").tobytes())
    hashed.update(np.ascontiguousarray(tokens, "<i4").tobytes())
    return f"sha256:{hashed.hexdigest()}"
