"""Draft models: stored with their base at once, or added to a base that is in the store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import SMALL, fixture, write_checkpoint
from quantmill import mediatypes
from quantmill.cli import run
from quantmill.creation import create, plan, read_modelfile
from quantmill.errors import BadRequest, BadSource, Corrupt, QuantmillError
from quantmill.facts import show
from quantmill.formats import FORMAT_NAMES, parse_format
from quantmill.load import open_model
from quantmill.manifest import BlobRef, Manifest, manifest_bytes
from quantmill.modelfile import parse_modelfile
from quantmill.names import ModelName, parse_name
from quantmill.planner import parse_override
from quantmill.plans import Options
from quantmill.pruning import remove
from quantmill.store import Store
from quantmill.verification import verify

BASE = fixture("hf-llama-bf16")
DRAFT = fixture("hf-qwen3-tied-bf16")
RECORD = {
    "model_format": "safetensors",
    "architecture": "Qwen3ForCausalLM",
    "tensor_prefix": "draft.",
    "config": "draft/config.json",
}


def entries(store: Store, name: str | ModelName) -> list[tuple[str, str | None, str]]:
    manifest = store.get_manifest(parse_name(str(name)))
    return [(ref.media_type, ref.name, str(ref.digest)) for ref in manifest.blobs]


def config_of(store: Store, name: str) -> dict[str, Any]:
    manifest = store.get_manifest(parse_name(name))
    assert manifest.config is not None
    found = json.loads(store.read_blob(manifest.config.digest, 1 << 20))
    assert isinstance(found, dict)
    return found


def rewritten(store: Store, name: str, config: Any, blobs: list[BlobRef] | None = None) -> None:
    """Give a model another config, and other entries."""
    manifest = store.get_manifest(parse_name(name))
    ref = put(store, mediatypes.CONFIG, None, json.dumps(config).encode())
    store.put_manifest(parse_name(name), manifest_bytes(ref, blobs or manifest.blobs))


def put(store: Store, media_type: str, name: str | None, data: bytes) -> BlobRef:
    with store.new_blob() as writer:
        writer.write(data)
        pending = writer.finish()
    store.commit([pending])
    return BlobRef(media_type, pending.digest, pending.size, name)


# -- what is stored --------------------------------------------------------------------------------


def test_the_draft_follows_its_base(store: Store) -> None:
    """Entries: the model's, the draft's tensors and files under its prefixes, then the texts."""
    modelfile = parse_modelfile("FROM .\nSYSTEM be brief\nPARAMETER temperature 0\n")
    create("m", BASE, store=store, draft=DRAFT, modelfile=modelfile)
    base = entries(store, create("b", BASE, store=store).name)
    draft = entries(store, create("d", DRAFT, store=store).name)
    found = entries(store, "m")
    assert found[: len(base)] == base
    names = [(kind, name) for kind, name, _ in found[len(base) :]]
    expected = [
        (kind, f"draft.{name}" if kind == mediatypes.TENSOR else f"draft/{name}")
        for kind, name, _ in draft
    ]
    assert names == [*expected, (mediatypes.SYSTEM, None), (mediatypes.PARAMS, None)]
    assert not verify(store).damage


def test_the_config_records_the_draft(store: Store) -> None:
    """Prefixes, format and architecture are written down, and all else is the base's."""
    create("m", BASE, store=store, quantize="int4", draft=DRAFT, draft_quantize="int8")
    create("b", BASE, store=store, quantize="int4")
    config = config_of(store, "m")
    assert config.pop("draft") == RECORD
    assert config == config_of(store, "b")
    assert config["file_type"] == "int4"


def test_both_open_apart(store: Store) -> None:
    """The model comes without its draft, and the draft with its own names, config and files."""
    create("m", BASE, store=store, draft=DRAFT, draft_quantize="int8")
    with (
        open_model("m", store=store) as model,
        open_model("m", component="draft", store=store) as draft,
        open_model(BASE) as base,
        open_model(DRAFT) as small,
    ):
        assert list(model) == list(base)
        assert not any(name.startswith("draft/") for name in model.files)
        assert list(draft) == list(small)
        assert (model.config, draft.config) == (base.config, small.config)
        assert draft.read_file("tokenizer.json") == small.read_file("tokenizer.json")
        norm = "model.norm.weight"
        assert np.array_equal(draft.decode(norm), small.decode(norm))
        assert draft.quantization == "int8"
        assert model.quantization == ""


def test_the_drafts_embedding_gets_the_format_asked_for(tmp_path: Path) -> None:
    """Embedding and head of a draft are quantized as asked; the base's follow the usual rules."""
    head = {**SMALL, "lm_head.weight": ("BF16", (64, 128))}
    source = write_checkpoint(tmp_path / "c", head)
    found = {
        t.name: t.format.name if t.format else None
        for t in plan(source, quantize="nvfp4", draft=source, draft_quantize="int4").tensors
    }
    assert found["model.embed_tokens.weight"] is None
    assert found["lm_head.weight"] == "mxfp8"
    assert found["draft.model.embed_tokens.weight"] == "int4"
    assert found["draft.lm_head.weight"] == "int4"
    assert found["draft.model.layers.0.mlp.down_proj.weight"] == "int8"
    assert found["draft.model.layers.0.input_layernorm.weight"] is None


def test_without_a_format_of_its_own_a_draft_is_kept(store: Store) -> None:
    """--quantize and --group-size are the base's alone."""
    decided = plan(BASE, quantize="int4", group_size=32, draft=DRAFT)
    assert decided.format == parse_format("int4", 32)
    assert all(t.format is None for t in decided.tensors if t.name.startswith("draft."))
    both = plan(BASE, quantize="int4", group_size=32, draft=DRAFT, draft_quantize="nvfp4")
    assert parse_format("nvfp4") in {t.format for t in both.tensors}


def test_rules_of_the_user_reach_the_draft() -> None:
    """`--tensor` sees a draft's tensors under the names that are written."""
    options = Options((parse_override("draft.*.q_proj.weight=int8"),))
    found = plan(BASE, draft=DRAFT, options=options).tensors
    quantized = {t.name for t in found if t.format}
    assert quantized == {t.name for t in found if t.name.endswith("q_proj.weight")} - {
        t.name for t in found if not t.name.startswith("draft.")
    }
    assert quantized


def test_experts_of_a_draft_are_stacked(store: Store) -> None:
    """A mixture-of-experts draft has its groups under the prefix, and opens."""
    create("m", BASE, store=store, draft=fixture("hf-qwen3-moe-bf16"), draft_quantize="int8")
    with open_model("m", component="draft", store=store) as draft:
        assert draft.params("model.layers.0.mlp.experts.up_proj.weight") is not None
    assert not verify(store).damage


def test_a_draft_may_be_quantized_already(store: Store) -> None:
    """Codes of a quantized draft are copied beside a base that is quantized on the way."""
    source = fixture("mlx-mxfp4")
    create("m", BASE, store=store, quantize="int4", draft=source)
    with open_model("m", component="draft", store=store) as draft, open_model(source) as original:
        assert list(draft) == list(original)
        assert draft.quantization == "mxfp4"
        for name in draft:
            assert np.array_equal(draft.decode(name), original.decode(name))
    assert show(store, "m").format == "int4"
    assert not verify(store).damage


def test_a_draft_of_fp8_blocks_opens(store: Store) -> None:
    """Weights that are recoded keep their names and numbers under the draft's prefix."""
    source = fixture("hf-deepseek-v3-fp8-block")
    create("m", BASE, store=store, draft=source)
    alone = create("a", source, store=store)
    with (
        open_model("m", component="draft", store=store) as draft,
        open_model(alone.name, store=store) as model,
    ):
        assert list(draft) == list(model)
        for name in draft:
            assert np.array_equal(draft.decode(name), model.decode(name))


def test_show_tells_of_the_draft(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Architecture and size of the draft have a line; the parameter count is the base's."""
    create("m", BASE, store=store, draft=DRAFT, draft_quantize="int8")
    create("b", BASE, store=store)
    facts, base = show(store, "m"), show(store, "b")
    assert facts.draft is not None
    assert facts.draft.architecture == "Qwen3ForCausalLM"
    assert facts.info == base.info
    assert facts.weights == base.weights + facts.draft.weights
    assert run(["show", "m", "--store", str(store.root)]) == 0
    assert "draft model" in capsys.readouterr().out


def test_the_digest_depends_on_neither_workers_nor_run(tmp_path: Path) -> None:
    """One worker and several give the same model."""
    digests = {
        create(
            "m", BASE, store=Store(tmp_path / str(n)), quantize="int4", draft=DRAFT,
            draft_quantize="int4", workers=n,
        ).digest
        for n in (1, 3)
    }  # fmt: skip
    assert len(digests) == 1


# -- a base in the store ---------------------------------------------------------------------------

FORMATS = st.sampled_from([None, *FORMAT_NAMES])


@given(quantize=FORMATS, draft_quantize=FORMATS)
def test_one_step_and_two_give_the_same_model(
    tmp_path_factory: pytest.TempPathFactory, quantize: str | None, draft_quantize: str | None
) -> None:
    """Base and draft at once, or the draft added to the stored base: one digest."""
    folder = tmp_path_factory.mktemp("both")
    source = write_checkpoint(folder / "base", SMALL)
    small = write_checkpoint(folder / "draft", SMALL, {"model_type": "tiny"})
    store = Store(folder / "store")
    once = create(
        "once", source, store=store, quantize=quantize, draft=small, draft_quantize=draft_quantize
    )
    create("base", source, store=store, quantize=quantize)
    twice = create("twice", "base", store=store, draft=small, draft_quantize=draft_quantize)
    assert entries(store, "twice") == entries(store, "once")
    assert twice.digest == once.digest


def test_the_bases_blobs_are_used_as_they_are(store: Store) -> None:
    """Nothing of a stored base is written again, and it stays what it was."""
    made = create("b", BASE, store=store, quantize="int4")
    before = {b.path.name: b.path.stat().st_ino for b in store.list_blobs()}
    added = create("m", "b", store=store, draft=DRAFT, draft_quantize="int8")
    assert str(added.base) == "b"
    assert added.new_blobs == len(added.plan.tensors) == 24
    assert all(t.name.startswith("draft.") for t in added.plan.tensors)
    after = {b.path.name: b.path.stat().st_ino for b in store.list_blobs()}
    assert before.items() <= after.items()
    assert store.get_manifest(parse_name("b")).digest == made.digest
    assert entries(store, "m")[:25] == entries(store, "b")


def test_the_base_may_go_afterwards(store: Store) -> None:
    """The new model holds what it shares with its base, which may be removed or be replaced."""
    create("b", BASE, store=store)
    create("m", "b", store=store, draft=DRAFT)
    remove(store, ["b"])
    create("m", "m", store=store, draft=DRAFT, draft_quantize="int4")
    assert not verify(store).damage
    with open_model("m", component="draft", store=store) as draft:
        assert draft.quantization == "int4"


def test_a_draft_replaces_the_one_before(store: Store) -> None:
    """A base that has a draft already gets the new one in its place, no entry left over."""
    create("b", BASE, store=store, draft=fixture("hf-gemma3-bf16"))
    create("m", "b", store=store, draft=DRAFT)
    create("o", BASE, store=store, draft=DRAFT)
    assert entries(store, "m") == entries(store, "o")
    assert config_of(store, "m")["draft"] == RECORD


def test_a_base_keeps_its_texts_but_for_new_ones(store: Store, tmp_path: Path) -> None:
    """Template and parameters of the base stay, what a Modelfile says anew replaces the old."""
    text = (
        "FROM .\nTEMPLATE t\nSYSTEM old\nPARAMETER temperature 0\nPARSER qwen3\nREQUIRES 0.20.0\n"
    )
    create("b", BASE, store=store, modelfile=parse_modelfile(text))
    file = tmp_path / "Modelfile"
    shutil.copytree(DRAFT, tmp_path / "small")
    file.write_text("FROM b\nDRAFT ./small\nSYSTEM new\nREQUIRES 0.21.0\n")
    parsed, source = read_modelfile(file)
    assert parsed.draft == str(tmp_path / "small")
    made = create("m", source, store=store, modelfile=parsed)
    texts = {
        kind: store.read_blob(ref.digest, 100)
        for ref in store.get_manifest(made.name).blobs
        if not ref.name and (kind := ref.media_type)
    }
    assert texts == {
        mediatypes.TEMPLATE: b"t",
        mediatypes.SYSTEM: b"new",
        mediatypes.PARAMS: b'{"temperature":0}\n',
    }
    facts = show(store, "m")
    assert (facts.parser, facts.requires) == ("qwen3", "0.21.0")
    assert facts.capabilities == ("completion", "tools")


def test_a_new_parser_adds_what_it_can_do(store: Store) -> None:
    """A parser named in the Modelfile adds capabilities to those of the stored base."""
    create("b", BASE, store=store)
    create("m", "b", store=store, modelfile=parse_modelfile(f"FROM b\nDRAFT {DRAFT}\nPARSER qwen3"))
    assert show(store, "m").capabilities == ("completion", "tools")


def test_what_the_base_recorded_stays(store: Store) -> None:
    """Options that changed the base's bytes are still told, with those of the draft."""
    create("b", BASE, store=store, quantize="mxfp4", options=Options(rounding="nearest"))
    create("m", "b", store=store, draft=DRAFT, draft_quantize="int8")
    assert show(store, "m").recorded == {"e8m0": "nearest"}
    assert show(store, "m").format == "mxfp4"


def test_a_directory_wins_over_a_name(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a path of that name exists it is the base, whatever the store holds."""
    create("b", fixture("hf-gemma3-bf16"), store=store)
    shutil.copytree(BASE, tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    assert create("m", "b", store=store, draft=DRAFT).base is None


def test_the_plan_of_a_stored_base_is_the_drafts(store: Store) -> None:
    """`plan` of a stored base lists what would be written: the draft alone."""
    create("b", BASE, store=store)
    forecast = plan("b", store=store, draft=DRAFT, draft_quantize="nvfp4")
    assert create("m", "b", store=store, draft=DRAFT, draft_quantize="nvfp4").plan == forecast
    assert forecast.format == parse_format("nvfp4")


# -- what is refused -------------------------------------------------------------------------------


def test_a_format_needs_a_draft(store: Store) -> None:
    """--draft-quantize alone is an error before anything is opened."""
    with pytest.raises(BadRequest) as caught:
        create("m", BASE, store=store, draft_quantize="int4")
    assert caught.value.kind == "draft_quantize_without_draft"


def test_an_unknown_draft_format_is_refused(store: Store) -> None:
    """A draft's format is checked as the model's is, and nothing is written."""
    with pytest.raises(BadRequest, match="int9"):
        create("m", BASE, store=store, draft=DRAFT, draft_quantize="int9")
    assert not store.root.exists()


def test_a_stored_base_is_not_quantized_again(store: Store) -> None:
    """--quantize with a base in the store is an error with the way out."""
    create("b", BASE, store=store)
    with pytest.raises(BadRequest, match="in the store already") as caught:
        create("m", "b", store=store, quantize="int4", draft=DRAFT)
    assert "--draft-quantize" in str(caught.value.hint)


@pytest.mark.parametrize("source", ["absent", "absent:tag", "a/b/c/d/e", "-", "x y", "a" * 300])
def test_a_base_that_is_nowhere_is_named(store: Store, source: str) -> None:
    """Neither a directory nor a stored model: one error that says what may stand there."""
    with pytest.raises(BadSource, match=source) as caught:
        create("m", source, store=store, draft=DRAFT)
    assert caught.value.kind == "not_a_model_dir"
    assert "quantmill list" in str(caught.value.hint)


def test_without_a_draft_a_stored_name_is_no_source(store: Store) -> None:
    """A stored model alone cannot be made anew: its name is looked for as a directory."""
    create("b", BASE, store=store)
    with pytest.raises(BadSource, match="b does not exist"):
        create("m", "b", store=store)


def gguf_base(config: dict[str, Any]) -> None:
    config["model_format"] = "gguf"


def image_base(config: dict[str, Any]) -> None:
    config["capabilities"] = ["image"]


def strange_base(config: dict[str, Any]) -> None:
    config["capabilities"] = "completion"


@pytest.mark.parametrize("change", [gguf_base, image_base, strange_base])
def test_a_base_must_be_a_language_model(
    store: Store, change: Callable[[dict[str, Any]], None]
) -> None:
    """A stored base of another format, or that generates no text, is refused by name."""
    create("b", BASE, store=store)
    config = config_of(store, "b")
    change(config)
    rewritten(store, "b", config)
    with pytest.raises(BadSource, match="b:latest cannot have a draft") as caught:
        create("m", "b", store=store, draft=DRAFT)
    assert caught.value.kind == "draft_base_unsupported"


def test_a_pipeline_is_neither_base_nor_draft(store: Store) -> None:
    """A model of components, in a directory or in the store, has no draft and is none."""
    pipeline = fixture("diffusers-z-image")
    create("b", pipeline, store=store)
    for base in (pipeline, "b"):
        with pytest.raises(BadSource) as caught:
            create("m", base, store=store, draft=DRAFT)
        assert caught.value.kind == "draft_base_unsupported"
    with pytest.raises(BadSource, match=r"draft: .*components"):
        create("m", BASE, store=store, draft=pipeline)


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (shutil.rmtree, "not_a_model_dir"),
        (lambda f: (f / "config.json").unlink(), "missing_config"),
        (lambda f: (f / "config.json").write_text("{}"), "draft_architecture_missing"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "bad_json"),
        (lambda f: (f / "model.safetensors").unlink(), "no_weights"),
    ],
)
def test_a_draft_that_is_wrong_is_refused(
    store: Store, tmp_path: Path, damage: Callable[[Path], None], kind: str
) -> None:
    """The error says that it is about the draft model, and nothing is written."""
    folder = Path(shutil.copytree(DRAFT, tmp_path / "d"))
    damage(folder)
    with pytest.raises(BadSource, match="draft") as caught:
        create("m", BASE, store=store, draft=folder)
    assert caught.value.kind == kind
    assert not store.root.exists()


def test_a_base_with_a_missing_blob_is_refused(store: Store) -> None:
    """A stored base that is damaged is named before the draft is read."""
    create("b", BASE, store=store)
    ref = store.get_manifest(parse_name("b")).tensor_refs()[3]
    store.blob_path(ref.digest).unlink()
    with pytest.raises(Corrupt, match="of b:latest") as caught:
        create("m", "b", store=store, draft=DRAFT)
    assert caught.value.kind == "blob_missing"
    assert "verify" in str(caught.value.hint)


@pytest.mark.parametrize("data", [b"{", b"[]", None])
def test_a_base_with_a_broken_config_is_refused(store: Store, data: bytes | None) -> None:
    """A config blob that is no JSON object, or not there, is damage and not a traceback."""
    create("b", BASE, store=store)
    manifest = store.get_manifest(parse_name("b"))
    if data is None:
        assert manifest.config is not None
        store.blob_path(manifest.config.digest).unlink()
    else:
        ref = put(store, mediatypes.CONFIG, None, data)
        store.put_manifest(parse_name("b"), manifest_bytes(ref, manifest.blobs))
    with pytest.raises(QuantmillError):
        create("m", "b", store=store, draft=DRAFT)


def test_names_of_drafts_are_not_the_bases(store: Store, tmp_path: Path) -> None:
    """A base whose tensors are called like a draft's could not be told from it."""
    source = write_checkpoint(tmp_path / "c", {**SMALL, "draft.fc.weight": ("BF16", (4, 64))})
    create("b", source, store=store)
    with open_model("b", store=store) as model:
        assert "draft.fc.weight" in model
    for base in (source, "b"):
        with pytest.raises(BadSource, match=r"draft\.fc\.weight") as caught:
            create("m", base, store=store, draft=DRAFT)
        assert caught.value.kind == "name_collision"


def test_two_drafts_are_one_too_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--draft beside another DRAFT line is an error that names both."""
    file = tmp_path / "Modelfile"
    file.write_text(f"FROM {BASE}\nDRAFT {DRAFT}\n")
    arguments = ["create", "m", "-f", str(file), "--store", str(tmp_path / "store")]
    assert run([*arguments, "--draft", str(BASE)]) == 2
    printed = capsys.readouterr().err
    assert str(DRAFT) in printed
    assert "--draft is" in printed
    assert run([*arguments, "--draft", str(DRAFT), "--draft-quantize", "int8"]) == 0
    assert "created m" in capsys.readouterr().out


def test_entries_of_other_kinds_stay(store: Store) -> None:
    """What a base holds that is nothing of ours comes along, after the draft."""
    create("b", BASE, store=store)
    manifest: Manifest = store.get_manifest(parse_name("b"))
    messages = put(store, mediatypes.MESSAGES, None, b"[]")
    rewritten(store, "b", config_of(store, "b"), [messages, *manifest.blobs])
    create("m", "b", store=store, draft=DRAFT)
    assert entries(store, "m")[-1][0] == mediatypes.MESSAGES
