"""tokenizer.json and tokenizer_config.json, rebuilt from a GGUF file's vocabulary.

GGUF keeps tokens, merges or scores, and the name of a pre-tokenizer whose rules are in the runtime.
The rules known here are rows of a table; a name without a row is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantmill.errors import BadSource
from quantmill.ggufconfig import Metadata
from quantmill.ggufheader import bad_gguf
from quantmill.source import CHAT_TEMPLATE, TOKENIZER_CONFIG

_NORMAL, _UNKNOWN, _CONTROL, _USER = 1, 2, 3, 4
_SPACE = "\u2581"
_LONGEST = 256

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*",
)
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = "|".join([*_WORDS, r"\p{N}", _REST])
_GPT4O = "|".join([*(w + r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?" for w in _WORDS), r"\p{N}{1,3}", _REST])


@dataclass(frozen=True, slots=True)
class _Splitting:
    """How a byte-level tokenizer cuts text before it merges.

    `pattern` "" stands for GPT-2's own. `whole` means a piece that is a token needs no merges.
    """

    pattern: str = ""
    digits: bool = False
    whole: bool = False
    add_bos: bool = False
    normalizer: str | None = None


_DIGITS = _Splitting(digits=True)
_SPLITTINGS: Mapping[str, _Splitting] = {
    "gpt-2": _Splitting(),
    "phi-2": _Splitting(),
    "olmo": _Splitting(),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama-bpe": _Splitting(_LLAMA3, whole=True, add_bos=True),
    "llama3": _Splitting(_LLAMA3, whole=True, add_bos=True),
    "llama-v3": _Splitting(_LLAMA3, whole=True, add_bos=True),
    "dbrx": _Splitting(_LLAMA3),
    "qwen2": _Splitting(_QWEN2, normalizer="NFC"),
    "deepseek-r1-qwen": _Splitting(_QWEN2),
    "tekken": _Splitting(_TEKKEN, whole=True, add_bos=True),
    "gpt-4o": _Splitting(_GPT4O),
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The parts of a file's metadata that make a tokenizer."""

    file: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    specials: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    chat_template: str | None

    def of_kind(self, *kinds: int) -> list[int]:
        """Ids of the tokens of these kinds."""
        return [n for n, kind in enumerate(self.kinds) if kind in kinds]


def rebuild_tokenizer(found: Metadata) -> dict[str, bytes]:
    """File name → content; {} for a file without a vocabulary.

    Raises BadSource for a vocabulary that is inconsistent or of a kind not known here.
    """
    model = found.get("tokenizer.ggml.model")
    if model in {None, "none", "no_vocab"}:
        return {}
    if model == "gpt2":
        vocabulary, parts = _byte_level(found)
    elif model == "llama":
        vocabulary, parts = _sentencepiece(found)
    else:
        raise BadSource(
            f"{found.file}: tokenizers of type {model!r} cannot be rebuilt",
            kind="unsupported_gguf_tokenizer",
            hint="understood are gpt2 and llama",
        )
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(vocabulary),
        **parts,
        "post_processor": _post_processor(vocabulary),
    }
    files = {
        "tokenizer.json": _json(tokenizer),
        TOKENIZER_CONFIG: _json(_tokenizer_config(vocabulary, found)),
    }
    if vocabulary.chat_template is not None:
        files[CHAT_TEMPLATE] = vocabulary.chat_template.encode()
    return files


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()


# -- the vocabulary --------------------------------------------------------------------------------


def _vocabulary(found: Metadata, *, add_bos: bool) -> Vocabulary:
    tokens = _array(found, "tokens", str)
    twice = len(tokens) - len(set(tokens))
    if not tokens or twice:
        what = f"{twice} tokens appear twice" if twice else "the vocabulary is empty"
        raise bad_gguf(found.file, what)
    kinds = _array(found, "token_type", int) or (_NORMAL,) * len(tokens)
    if len(kinds) != len(tokens):
        raise bad_gguf(found.file, f"{len(tokens)} tokens, but {len(kinds)} token types")
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {ours: found.token_id(theirs) for ours, theirs in names.items()}
    specials = {ours: n for ours, n in ids.items() if n is not None}
    for which, n in specials.items():
        if n >= len(tokens):
            raise bad_gguf(found.file, f"the {which} token is {n}, of {len(tokens)} tokens")
    template = found.get("tokenizer.chat_template")
    return Vocabulary(
        found.file, tokens, kinds, specials, _flag(found, "add_bos_token", add_bos),
        _flag(found, "add_eos_token", False), template if isinstance(template, str) else None,
    )  # fmt: skip


def _array(found: Metadata, key: str, kind: type) -> tuple[Any, ...]:
    values = found.get(f"tokenizer.ggml.{key}")
    if values is None:
        return ()
    if not isinstance(values, tuple) or any(type(value) is not kind for value in values):
        raise bad_gguf(found.file, f"tokenizer.ggml.{key} is not an array of {kind.__name__}")
    return values


def _flag(found: Metadata, key: str, default: bool) -> bool:
    value = found.get(f"tokenizer.ggml.{key}")
    return value if isinstance(value, bool) else default


# -- byte-level BPE --------------------------------------------------------------------------------


def _byte_level(found: Metadata) -> tuple[Vocabulary, dict[str, Any]]:
    name = found.get("tokenizer.ggml.pre")
    splitting = _SPLITTINGS.get(name) if isinstance(name, str) else None
    if splitting is None:
        raise BadSource(
            f"{found.file}: its pre-tokenizer {name!r} is not known"
            if name is not None
            else f"{found.file}: it does not name its pre-tokenizer",
            kind="unsupported_gguf_tokenizer",
            hint=f"known are {', '.join(_SPLITTINGS)}",
        )
    vocabulary = _vocabulary(found, add_bos=splitting.add_bos)
    ids = {token: n for n, token in enumerate(vocabulary.tokens)}
    merges = _array(found, "merges", str)
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not space or not {left, right, left + right} <= ids.keys():
            raise bad_gguf(found.file, f"merge {merge!r} does not join two tokens to a third")
    return vocabulary, {
        "normalizer": {"type": splitting.normalizer} if splitting.normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _cutting(splitting)},
        "decoder": _BYTE_LEVEL | {"use_regex": True},
        "model": _bpe(ids, list(merges), ignore_merges=splitting.whole),
    }


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def _cutting(splitting: _Splitting) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if splitting.digits:
        steps.append({"type": "Digits", "individual_digits": True})
    if splitting.pattern:
        pattern = {"Regex": splitting.pattern}
        steps.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
    return [*steps, _BYTE_LEVEL | {"use_regex": not splitting.pattern}]


def _bpe(ids: Mapping[str, int], merges: list[str], **settings: Any) -> dict[str, Any]:
    defaults = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
        "ignore_merges": False,
    }  # fmt: skip
    return {**defaults, **settings, "vocab": ids, "merges": merges}


# -- SentencePiece BPE -----------------------------------------------------------------------------


def _sentencepiece(found: Metadata) -> tuple[Vocabulary, dict[str, Any]]:
    vocabulary = _vocabulary(found, add_bos=True)
    tokens, scores = vocabulary.tokens, _array(found, "scores", float)
    if len(scores) != len(tokens):
        raise bad_gguf(found.file, f"{len(tokens)} tokens, but {len(scores)} scores")
    prefix = _flag(found, "add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    first = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    last = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    decoders = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"}, {"type": "Fuse"}, *last,
    ]  # fmt: skip
    unknown = vocabulary.specials.get("unk", next(iter(vocabulary.of_kind(_UNKNOWN)), None))
    ids = {token: n for n, token in enumerate(tokens)}
    return vocabulary, {
        "normalizer": {"type": "Sequence", "normalizers": [*first, spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(
            ids, _merges(vocabulary, scores), fuse_unk=True, byte_fallback=True,
            unk_token=None if unknown is None else tokens[unknown],
        ),
    }  # fmt: skip


def _merges(vocabulary: Vocabulary, scores: Sequence[float]) -> list[str]:
    """SentencePiece joins the pair whose token scores best; as a list of pairs, best first.

    Only ordinary tokens are joined to: the others are matched whole.
    """
    tokens = vocabulary.tokens
    normal = vocabulary.of_kind(_NORMAL)
    known = {tokens[n] for n in normal}
    found = []
    for n in sorted(normal, key=lambda n: (-scores[n], n)):
        token = tokens[n]
        if len(token) > _LONGEST:
            raise bad_gguf(vocabulary.file, f"token {n} has {len(token)} characters")
        cuts = [(token[:at], token[at:]) for at in range(1, len(token))]
        found += [f"{a} {b}" for a, b in cuts if a in known and b in known]
    return found


# -- special tokens --------------------------------------------------------------------------------


def _added_tokens(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    named = set(vocabulary.specials.values())
    special = named | set(vocabulary.of_kind(_CONTROL, _UNKNOWN))
    return [
        {
            "id": n, "content": vocabulary.tokens[n], "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": n in special,
        }
        for n in sorted(special | set(vocabulary.of_kind(_USER)))
    ]  # fmt: skip


def _post_processor(vocabulary: Vocabulary) -> dict[str, Any] | None:
    specials, tokens = vocabulary.specials, vocabulary.tokens
    before = [specials["bos"]] if vocabulary.add_bos and "bos" in specials else []
    after = [specials["eos"]] if vocabulary.add_eos and "eos" in specials else []
    if not before and not after:
        return None

    def template(*sequences: tuple[str, int]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for name, kind in sequences:
            found += [{"SpecialToken": {"id": tokens[n], "type_id": kind}} for n in before]
            found.append({"Sequence": {"id": name, "type_id": kind}})
            found += [{"SpecialToken": {"id": tokens[n], "type_id": kind}} for n in after]
        return found

    used = {tokens[n]: {"id": tokens[n], "ids": [n], "tokens": [tokens[n]]} for n in before + after}
    return {
        "type": "TemplateProcessing",
        "single": template(("A", 0)),
        "pair": template(("A", 0), ("B", 1)),
        "special_tokens": used,
    }


def _tokenizer_config(vocabulary: Vocabulary, found: Metadata) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": found.whole("context_length"),
    }
    for which, n in vocabulary.specials.items():
        config[f"{which}_token"] = vocabulary.tokens[n]
    config["added_tokens_decoder"] = {
        str(added.pop("id")): added for added in _added_tokens(vocabulary)
    }
    if vocabulary.chat_template is not None:
        config["chat_template"] = vocabulary.chat_template
    return config
