"""The config blob: what a checkpoint's texts and a Modelfile say, as Ollama writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantmill import checkpoint, mediatypes
from quantmill.errors import BadRequest, BadSource, QuantmillError
from quantmill.formats import parse_request
from quantmill.modelconfig import (
    PARSERS,
    Serving,
    Traits,
    capabilities,
    check_draft_request,
    config_json,
    detect,
    draft_record,
    extra_layers,
    model_config,
    serving,
)
from quantmill.modelfile import Modelfile, parse_modelfile
from quantmill.names import parse_name
from vectors import cases


def detect_config(**config: Any) -> Traits:
    return detect({"config.json": json.dumps(config)})


@cases("modelfile", "detect")
def test_detect_vectors(case: dict[str, Any]) -> None:
    """A checkpoint's texts give the traits and capabilities of the vectors."""
    traits = detect(case["input"]["files"])
    parser = case["input"].get("parser", traits.parser)
    assert {
        "vision": traits.vision,
        "audio": traits.audio,
        "thinking": traits.thinking,
        "parser": traits.parser,
        "renderer": traits.renderer,
        "capabilities": list(capabilities(traits, parser)),
    } == case["expect"]


@cases("modelfile", "parser_features")
def test_parser_vectors(case: dict[str, Any]) -> None:
    """Known parsers support what the vectors say."""
    features = PARSERS.get(case["input"]["name"])
    assert (features is not None) == case["expect"]["known"]
    assert features is None or features.tools == case["expect"]["tools"]
    assert features is None or features.thinking == case["expect"]["thinking"]


@cases("modelfile", "precedence")
def test_precedence_vectors(case: dict[str, Any]) -> None:
    """A Modelfile's parser and renderer go before the inferred ones."""
    given = case["input"]
    inferred, explicit = given["inferred"] or None, given["explicit"] or None
    modelfile = Modelfile(".", parser=explicit, renderer=explicit)
    how = serving(
        Traits(parser=inferred, renderer=inferred), modelfile if given["has_modelfile"] else None
    )
    assert {"parser": how.parser, "renderer": how.renderer} == case["expect"]


@cases("modelfile", "draft_meta")
def test_draft_vectors(case: dict[str, Any]) -> None:
    """A draft model's config.json gives its record, or its kind of error."""
    expect, text = case["expect"], case["input"]["draft_config"]
    if "error" in expect:
        with pytest.raises(BadSource) as caught:
            draft_record(text)
        assert caught.value.kind == expect["error"]["kind"]
    else:
        assert draft_record(text) == expect["draft"]


@cases("modelfile", "model_config")
def test_model_config_vectors(case: dict[str, Any]) -> None:
    """Names, inferred values and a base config give the config blob of the vectors."""
    expect, given = case["expect"], case["input"]
    if "error" in expect:
        with pytest.raises(QuantmillError) as caught:
            parse_name(given["name"])
        assert caught.value.kind == expect["error"]["kind"]
        return
    parse_name(given["name"])
    how = Serving(
        tuple(given["capabilities"]),
        given["inferred_parser"] or None,
        given["inferred_renderer"] or None,
    )
    draft = draft_record(given["draft_config"]) if "draft_config" in given else None
    config = model_config(given["quantize"], how, draft=draft, base=given.get("base_config"))
    assert config == expect["config"]
    assert extra_layers(Modelfile(".")) == expect["layers"]
    assert expect["config_media_type"] == mediatypes.CONFIG
    assert expect["media_type"] == mediatypes.MANIFEST


@cases("modelfile", "create_check")
def test_create_check_vectors(case: dict[str, Any], tmp_path: Path) -> None:
    """A request that cannot be met is refused for the reason of the vectors."""
    given = case["input"]
    for name, text in given["files"].items():
        (tmp_path / name).write_text(text)
    kind = case["expect"]["error"]["kind"]
    if kind == "not_a_model_dir":
        assert not checkpoint.is_model_dir(tmp_path)
        return

    def request() -> None:
        check_draft_request(given.get("draft"), given.get("draft_quantize"))
        parse_request(given.get("quantize"))

    with pytest.raises(BadRequest) as caught:
        request()
    assert caught.value.kind == kind


@pytest.mark.parametrize("quantize", [None, "", "  "])
def test_no_draft_format_is_no_draft_request(quantize: str | None) -> None:
    """A blank draft format asks for nothing; any format is in order with a draft model."""
    check_draft_request(None, quantize)
    check_draft_request("./draft", "mxfp8")
    with pytest.raises(BadRequest, match="mxfp8"):
        check_draft_request(None, "mxfp8")


@pytest.mark.parametrize(
    ("name", "parser", "renderer"),
    [
        ("Qwen3NextForCausalLM", "qwen3.5", "qwen3.5"),
        ("Qwen3MoeForCausalLM", "qwen3", "qwen3-coder"),
        ("NemotronH_Nano_Omni_Reasoning_V3", "nemotron-3-nano", "nemotron-3-nano"),
        ("glm-4-moe", "glm-4.7", "glm-4.7"),
        ("Cohere2MoeForCausalLM", "cohere", "cohere"),
        ("not_muse_glimmer", None, None),
    ],
)
def test_names_to_parsers(name: str, parser: str | None, renderer: str | None) -> None:
    """An architecture or a model_type alike names parser and renderer."""
    for traits in (detect_config(architectures=[name]), detect_config(model_type=name)):
        assert (traits.parser, traits.renderer) == (parser, renderer)


def test_first_matching_name_wins() -> None:
    """Architectures go before model_type, and that before the inner model's."""
    traits = detect_config(
        architectures=["Other", "Gemma4"], model_type="qwen3", llm_config={"model_type": "glm4"}
    )
    assert traits.parser == "gemma4"
    assert detect_config(model_type="qwen3", llm_config={"model_type": "glm4"}).parser == "qwen3"


@pytest.mark.parametrize(
    ("model_type", "mark", "in_file", "parser", "renderer"),
    [
        ("laguna", "laguna_glm_thinking_v8", False, "poolside-v1", "poolside-v1"),
        ("laguna", "laguna_glm_thinking_v8", True, "poolside-v1", "poolside-v1"),
        *(
            ("nemotron_h", "{reasoning effort: efficient}", f, *["nemotron-3.5-nano"] * 2)
            for f in (False, True)
        ),
        ("qwen3_5", "resolved_reasoning_effort preserve_thinking", False, "qwen3.5", "qwen3.8"),
        ("qwen3_5", "resolved_reasoning_effort preserve_thinking", True, "qwen3.5", "qwen3.5"),
        ("qwen3_5", "preserve_thinking", False, "qwen3.5", "qwen3.5"),
    ],
)
def test_template_marks(
    model_type: str, mark: str, in_file: bool, parser: str, renderer: str
) -> None:
    """Marks in a template choose a newer variant; the Qwen ones count in the main template only."""
    embedded, file = ("other", mark) if in_file else (mark, "other")
    traits = detect(
        {
            "config.json": json.dumps({"model_type": model_type}),
            "tokenizer_config.json": json.dumps({"chat_template": embedded}),
            "chat_template.jinja": file,
        }
    )
    assert (traits.parser, traits.renderer) == (parser, renderer)


@pytest.mark.parametrize("template", ["", None, [{"name": "x", "template": "other"}]])
def test_template_falls_back_to_file(template: Any) -> None:
    """The template file counts when the tokenizer has no single template of its own."""
    traits = detect(
        {
            "tokenizer_config.json": json.dumps({"chat_template": template}),
            "chat_template.jinja": "<think></think>",
        }
    )
    assert traits == Traits(thinking=True)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_broken_json(name: str) -> None:
    """A file that is no JSON object is refused by name."""
    with pytest.raises(BadSource, match=name):
        detect({name: "[]"})


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": "Qwen3"},
        {"architectures": [None, 3]},
        {"llm_config": []},
        {"model_type": 1},
    ],
)
def test_odd_types_mean_unknown(config: dict[str, Any]) -> None:
    """Fields of an unexpected type say nothing about the model."""
    assert detect_config(**config) == Traits()


@pytest.mark.parametrize(
    ("config", "vision", "audio"),
    [
        ({"has_vision": True}, True, False),
        ({"has_vision": "yes"}, False, False),
        ({"vision_config": []}, False, False),
        ({"sound_config": {}}, False, True),
    ],
)
def test_modalities(config: dict[str, Any], vision: bool, audio: bool) -> None:
    """A sub-config that is an object, or an explicit flag, shows what a model takes in."""
    traits = detect_config(**config)
    assert (traits.vision, traits.audio) == (vision, audio)


def test_explicit_parser_decides_capabilities() -> None:
    """Capabilities follow the Modelfile's parser, not the inferred one."""
    traits = Traits(vision=True, audio=True, parser="gemma4", renderer="gemma4")
    assert serving(traits).capabilities == ("completion", "vision", "audio", "tools", "thinking")
    how = serving(traits, Modelfile(".", parser="passthrough", requires="0.30.0"))
    assert how == Serving(("completion", "vision", "audio"), "passthrough", "gemma4", "0.30.0")


def test_unknown_parser_adds_nothing() -> None:
    """A parser that is not built in is passed on and adds no capability."""
    how = serving(Traits(), Modelfile(".", parser="my-own"))
    assert how == Serving(("completion",), "my-own")


def test_field_order() -> None:
    """Fields come in the order Ollama writes them, whatever the base's order is."""
    base = {"base_name": "b", "context_length": 8, "os": "linux", "later_field": 0, "draft": None}
    how = Serving(("completion",), "qwen3", "qwen3-coder", "0.20.0")
    config = model_config("int4", how, draft={"model_format": "safetensors"}, base=base)
    assert list(config) == [
        "model_format", "model_family", "model_families", "model_type", "file_type", "renderer",
        "parser", "requires", "capabilities", "context_length", "base_name", "draft",
        "architecture", "os", "later_field",
    ]  # fmt: skip
    assert (config["os"], config["later_field"]) == ("linux", 0)


def test_base_config_stays_where_nothing_is_said() -> None:
    """A base's file type, draft and higher version stay; parser and capabilities are replaced."""
    base = {
        "file_type": "int8", "requires": "0.25.0", "parser": "old", "capabilities": ["vision"],
        "draft": {"architecture": "D"}, "model_format": "gguf",
    }  # fmt: skip
    config = model_config("", Serving(("completion",), "new"), base=base)
    assert config["file_type"] == "int8"
    assert config["requires"] == "0.25.0"
    assert config["draft"] == {"architecture": "D"}
    assert config["parser"] == "new"
    assert config["capabilities"] == ["completion"]
    assert config["model_format"] == "safetensors"


@pytest.mark.parametrize("requires", ["0.14.0", "soon", None, 3])
def test_base_version_never_lowers_the_minimum(requires: Any) -> None:
    """A base's version below the minimum, or none at all, becomes the minimum."""
    config = model_config("", Serving(("completion",)), base={"requires": requires})
    assert config["requires"] == "0.19.0"


def test_config_json() -> None:
    """The blob is compact, has Go's escapes and no newline at the end."""
    config = model_config("", Serving(("completion",), "<&>"))
    assert config_json(config) == (
        b'{"model_format":"safetensors","model_family":"","model_families":null,"model_type":"",'
        b'"file_type":"","parser":"\\u003c\\u0026\\u003e","requires":"0.19.0",'
        b'"capabilities":["completion"],"architecture":"","os":""}'
    )


def test_extra_layers() -> None:
    """A Modelfile's texts become layers in fixed order, raw, licences one by one."""
    modelfile = parse_modelfile(
        'PARAMETER seed 1\nLICENSE b\nSYSTEM "é "\nLICENSE a\nTEMPLATE {{ .Prompt }}\nFROM m\n'
    )
    assert extra_layers(modelfile) == [
        (mediatypes.TEMPLATE, b"{{ .Prompt }}"),
        (mediatypes.SYSTEM, "é ".encode()),
        (mediatypes.LICENSE, b"b"),
        (mediatypes.LICENSE, b"a"),
        (mediatypes.PARAMS, b'{"seed":1}\n'),
    ]


def test_every_inferred_parser_is_known() -> None:
    """Every parser that detection can name has its features in the table."""
    texts = ("", "laguna_glm_thinking_v8 {reasoning effort: efficient}")
    names = ("muse_glimmer", "laguna", "cohere2_moe", "glm4", "deepseek", "gemma4", "qwen3_5")
    for name in (*names, "qwen3", "nemotron_h"):
        for text in texts:
            config = json.dumps({"model_type": name})
            assert detect({"config.json": config, "chat_template.jinja": text}).parser in PARSERS
