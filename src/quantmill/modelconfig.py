"""The config blob of a stored model: what a runtime must know before it reads a tensor.

Capabilities, parser and renderer are inferred from the checkpoint's own texts; a Modelfile
overrides them. Decisions only: texts and values in, values out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from quantmill import mediatypes, strictjson
from quantmill.errors import BadRequest, BadSource
from quantmill.manifest import go_json
from quantmill.modelfile import MINIMUM_VERSION, Modelfile, parameters_json, version_key
from quantmill.source import CHAT_TEMPLATE, CONFIG, TOKENIZER_CONFIG

DRAFT_TENSOR_PREFIX = "draft."
"""Goes before the names of a draft model's tensors and blobs."""

DRAFT_FILE_PREFIX = "draft/"
"""Goes before the names of a draft model's JSON files."""

# Order of the fields of Ollama's ConfigV2 (types/model/config.go at fb3076099). Later releases
# add generation_defaults and capabilities_explicit and stop writing the last two.
_FIELD_ORDER = (
    "model_format", "model_family", "model_families", "model_type", "file_type", "renderer",
    "parser", "requires", "remote_host", "remote_model", "capabilities", "context_length",
    "embedding_length", "base_name", "draft", "architecture", "os",
)  # fmt: skip

# Written even when empty, with the value they then have.
_ALWAYS: Mapping[str, Any] = {
    "model_format": "safetensors", "model_family": "", "model_families": None, "model_type": "",
    "file_type": "", "architecture": "", "os": "",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ParserFeatures:
    """What a built-in output parser can take out of a model's text."""

    tools: bool
    thinking: bool


_FEATURES = {
    ParserFeatures(tools=True, thinking=True): (
        "cogito", "cohere", "deepseek3", "gemma4", "glimmer", "glm-4.7", "harmony", "laguna",
        "lfm2-thinking", "nemotron-3-nano", "nemotron-3.5-nano", "ornith", "poolside-v1",
        "qwen3-thinking", "qwen3-vl-thinking", "qwen3.5",
    ),
    ParserFeatures(tools=True, thinking=False): (
        "functiongemma", "gemma4-no-thinking", "glm-ocr", "lfm2", "ministral", "olmo3", "qwen3",
        "qwen3-coder", "qwen3-vl-instruct",
    ),
    ParserFeatures(tools=False, thinking=True): ("olmo3-think",),
    ParserFeatures(tools=False, thinking=False): ("passthrough",),
}  # fmt: skip

PARSERS = {name: features for features, names in _FEATURES.items() for name in names}
"""The parsers built into Ollama (model/parsers at fb3076099)."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What a checkpoint shows about itself."""

    vision: bool = False
    audio: bool = False
    thinking: bool = False
    parser: str | None = None
    renderer: str | None = None


@dataclass(frozen=True, slots=True)
class Serving:
    """How a runtime shall serve the model: `Traits` after the Modelfile had its say."""

    capabilities: tuple[str, ...]
    parser: str | None = None
    renderer: str | None = None
    requires: str | None = None


@dataclass(frozen=True, slots=True)
class _Templates:
    main: str  # the tokenizer's own template, or the file when there is none
    file: str

    def has(self, *marks: str) -> bool:
        return all(mark in self.main for mark in marks)

    def either_has(self, mark: str) -> bool:
        # a tokenizer's template may only include the file, or be older than it
        return mark in self.main or mark in self.file


def _glimmer(name: str) -> bool:
    return name.startswith("museglimmer") or name == "muse_glimmer"


def _qwen35(name: str) -> bool:
    return "qwen3_5" in name or "qwen3next" in name


def _any_of(*parts: str) -> Callable[[str], bool]:
    return lambda name: any(part in name for part in parts)


def _same(name: str) -> Callable[[_Templates], tuple[str, str]]:
    return lambda _: (name, name)


def _marked(mark: str, name: str, otherwise: str) -> Callable[[_Templates], tuple[str, str]]:
    return lambda texts: _same(name if texts.either_has(mark) else otherwise)(texts)


def _qwen35_names(texts: _Templates) -> tuple[str, str]:
    newer = texts.has("resolved_reasoning_effort", "preserve_thinking")
    return "qwen3.5", "qwen3.8" if newer else "qwen3.5"


# The first rule that an architecture or model_type fits names parser and renderer.
_RULES: tuple[tuple[Callable[[str], bool], Callable[[_Templates], tuple[str, str]]], ...] = (
    (_glimmer, _same("glimmer")),
    (_any_of("laguna"), _marked("laguna_glm_thinking_v8", "poolside-v1", "laguna")),
    (_any_of("cohere2moe", "cohere2_moe"), _same("cohere")),
    (_any_of("glm4", "glm-4"), _same("glm-4.7")),
    (_any_of("deepseek"), _same("deepseek3")),
    (_any_of("gemma4"), _same("gemma4")),
    (_qwen35, _qwen35_names),
    (_any_of("qwen3"), lambda _: ("qwen3", "qwen3-coder")),
    (
        _any_of("nemotronh", "nemotron_h"),
        _marked("{reasoning effort: efficient}", "nemotron-3.5-nano", "nemotron-3-nano"),
    ),
)


def detect(files: Mapping[str, str]) -> Traits:
    """The traits that the texts of a checkpoint's small files show; files may be missing.

    Raises BadSource when one of the JSON files is no JSON object.
    """
    config = _object(files.get(CONFIG, "{}"), CONFIG)
    file = files.get(CHAT_TEMPLATE, "")
    # some tokenizers list several named templates: none of them is the default one here
    tokenizer = _object(files.get(TOKENIZER_CONFIG, "{}"), TOKENIZER_CONFIG)
    texts = _Templates(_text(tokenizer.get("chat_template")) or file, file)
    own, inner = _names(config), config.get("llm_config")
    inner_type = _text(inner.get("model_type")) if isinstance(inner, dict) else ""
    parser, renderer = _parser_and_renderer([*own, inner_type], texts)
    return Traits(
        vision=isinstance(config.get("vision_config"), dict) or config.get("has_vision") is True,
        audio=any(isinstance(config.get(key), dict) for key in ("audio_config", "sound_config")),
        thinking=_template_thinks(texts) or any(_qwen35(name.lower()) for name in own),
        parser=parser,
        renderer=renderer,
    )


def capabilities(traits: Traits, parser: str | None) -> tuple[str, ...]:
    """What a model with these traits can do when `parser` reads its output."""
    features = PARSERS.get(parser or "passthrough", PARSERS["passthrough"])
    offered = {
        "completion": True,
        "vision": traits.vision,
        "audio": traits.audio,
        "tools": features.tools,
        "thinking": traits.thinking or features.thinking,
    }
    return tuple(name for name, present in offered.items() if present)


def serving(traits: Traits, modelfile: Modelfile | None = None) -> Serving:
    """How to serve a checkpoint: the Modelfile's words where it has some, else the traits."""
    if modelfile is None:
        return Serving(capabilities(traits, traits.parser), traits.parser, traits.renderer)
    parser = modelfile.parser or traits.parser
    renderer = modelfile.renderer or traits.renderer
    return Serving(capabilities(traits, parser), parser, renderer, modelfile.requires)


def serving_of(config: Mapping[str, Any], modelfile: Modelfile | None = None) -> Serving:
    """How to serve a model built on a stored one with this config: as that, but for the Modelfile.

    A parser that the Modelfile names adds what it can take out of a text.
    """
    listed = config.get("capabilities")
    known = [_text(name) for name in (listed if isinstance(listed, list) else ())]
    parser, renderer = _text(config.get("parser")), _text(config.get("renderer"))
    if modelfile is None:
        return Serving(tuple(known), parser, renderer)
    added = capabilities(Traits(), modelfile.parser) if modelfile.parser else ()
    return Serving(
        tuple(dict.fromkeys([*known, *added])),
        modelfile.parser or parser,
        modelfile.renderer or renderer,
        modelfile.requires,
    )


def model_config(
    file_type: str,
    how: Serving,
    *,
    draft: Mapping[str, str] | None = None,
    base: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The config blob's fields, in Ollama's order, empty optional ones left out.

    `base` is the config of the model this one is built on: its other fields stay, and so does its
    file type when `file_type` is empty.
    """
    base = base or {}
    decided = {
        "model_format": "safetensors",
        "file_type": file_type or base.get("file_type"),
        "capabilities": list(how.capabilities),
        "parser": how.parser,
        "renderer": how.renderer,
        "requires": how.requires or _higher_version(base.get("requires")),
        "draft": dict(draft) if draft else base.get("draft"),
    }
    known = {**base, **decided}
    values = {name: known.pop(name, None) or _ALWAYS.get(name) for name in _FIELD_ORDER}
    ours = {name: value for name, value in values.items() if value or name in _ALWAYS}
    return ours | known


def config_json(config: Mapping[str, Any]) -> bytes:
    """The config blob's bytes: as Go's json.Marshal writes them, so no newline at the end."""
    return go_json(dict(config))


def extra_layers(modelfile: Modelfile) -> list[tuple[str, bytes]]:
    """Media type and bytes of everything a Modelfile adds, in the order of the manifest."""
    texts = [(mediatypes.TEMPLATE, modelfile.template), (mediatypes.SYSTEM, modelfile.system)]
    texts += [(mediatypes.LICENSE, text) for text in modelfile.license]
    layers = [(media_type, text.encode()) for media_type, text in texts if text]
    if modelfile.parameters:
        layers.append((mediatypes.PARAMS, parameters_json(modelfile.parameters)))
    return layers


def draft_record(config_text: str | None) -> dict[str, str]:
    """What the config blob says about a draft model, from the text of its config.json."""
    if config_text is None:
        raise BadSource(f"the draft model has no {CONFIG}", kind="draft_config_missing")
    names = _names(_object(config_text, f"{CONFIG} of the draft model", "draft_config_bad"))
    architecture = names[0] or names[-1]  # the first architecture, else model_type
    if not architecture:
        raise BadSource(
            f"{CONFIG} of the draft model has neither architectures nor model_type",
            kind="draft_architecture_missing",
        )
    return {
        "model_format": "safetensors",
        "architecture": architecture,
        "tensor_prefix": DRAFT_TENSOR_PREFIX,
        "config": f"{DRAFT_FILE_PREFIX}{CONFIG}",
    }


def check_draft_request(draft: str | None, draft_quantize: str | None) -> None:
    """Refuse a format for a draft model when there is no draft model."""
    if draft_quantize and draft_quantize.strip() and not draft:
        raise BadRequest(
            f"a draft format ({draft_quantize}) is given and no draft model",
            kind="draft_quantize_without_draft",
            hint="name the draft model, or leave its format out",
        )


def _parser_and_renderer(names: list[str], texts: _Templates) -> tuple[str | None, str | None]:
    hits = (named for name in names for fits, named in _RULES if fits(name.lower()))
    hit = next(hits, None)
    return hit(texts) if hit else (None, None)


def _template_thinks(texts: _Templates) -> bool:
    if texts.has("<think>", "</think>"):
        return True
    # a template that only cuts earlier reasoning away still belongs to a model that reasons
    splits = texts.has("content.split('</think>')") or texts.has('content.split("</think>")')
    return splits and not (texts.has("reasoning_content") or texts.has("<SPECIAL_12>"))


def _names(config: Mapping[str, Any]) -> list[str]:
    listed = config.get("architectures")
    found = [*(listed if isinstance(listed, list) else ()), config.get("model_type")]
    return [_text(name) for name in found]


def _higher_version(version: Any) -> str:
    key, minimum = version_key(_text(version)), version_key(MINIMUM_VERSION)
    assert minimum is not None
    return MINIMUM_VERSION if key is None or key < minimum else _text(version)


def _object(text: str, name: str, kind: str | None = None) -> dict[str, Any]:
    try:
        return strictjson.parse_object(text.encode(), constants=True)
    except strictjson.BadJson as error:
        what = f"{name} cannot be read: {error}"
        raise BadSource(what, kind=kind, hint="fetch the file again") from None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
