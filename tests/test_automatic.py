"""`--quantize auto`: formats that fit a size, what is predicted and measured of them."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import fixture, write_checkpoint
from quantmill import cli
from quantmill.creation import Created, create, plan
from quantmill.errors import BadPlan, BadRequest
from quantmill.formats import Format
from quantmill.load import open_model
from quantmill.plans import Automatic, Options, Override, Plan
from quantmill.provenance import recipes
from quantmill.readers import READERS, reader
from quantmill.recipes import Recipe, Request, Target, as_record, from_record
from quantmill.rules import Rules, exactly
from quantmill.store import Store
from quantmill.windows import random_tokens

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (quantmill[run])")

LLAMA, TIED, EXPERTS = "hf-llama-bf16", "hf-qwen3-tied-bf16", "hf-qwen3-moe-bf16"
SEARCHED = Options(method="search")


def planned(name: str, target: Target, options: Options | None = None) -> Plan:
    return plan(fixture(name), quantize="auto", fit=target, options=options)


def said(found: Plan) -> Automatic:
    assert found.options.automatic is not None
    return found.options.automatic


def chosen(found: Plan) -> dict[str, Format | None]:
    return {spec.name: spec.format for spec in found.tensors if spec.rule == "auto"}


# -- what is chosen --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [LLAMA, TIED, EXPERTS])
def test_the_target_is_met_and_the_prediction_is_near(name: str) -> None:
    """Everything stored is counted; predicted and measured divergence agree to a quarter."""
    found = planned(name, Target(4.6), SEARCHED)
    assert 4.4 < found.bits_per_weight <= 4.6
    result = said(found)
    assert result.predicted == pytest.approx(result.measured, rel=0.25)
    assert result.uniform_measured is not None
    assert result.measured <= result.uniform_measured
    reasons = [spec.reason for spec in found.tensors if spec.rule == "auto"]
    assert any(r.startswith("auto: KL ") for r in reasons)
    kept = [spec for spec in found.tensors if "norm" in spec.name]
    assert kept
    assert all(spec.format is None and spec.rule == "norm" for spec in kept)


def test_a_size_counts_headers_as_well() -> None:
    """The tensor blobs are never larger than what is asked for."""
    for size in (260_000, 300_000):
        found = planned(LLAMA, Target(nbytes=size))
        assert size - 8_000 < found.blob_bytes <= size
        assert said(found).target == f"{size:,} bytes"


def test_what_ollama_reads() -> None:
    """Two widths only, and one format for gate and up of the experts of a layer."""
    formats = chosen(planned(EXPERTS, Target(5.0, reader="ollama")))
    assert {fmt.bits for fmt in formats.values() if fmt} <= {4, 8}
    for layer in (0, 1):
        experts = f"model.layers.{layer}.mlp.experts."
        assert formats[f"{experts}gate_proj.weight"] == formats[f"{experts}up_proj.weight"]


def test_rules_of_the_user_stay() -> None:
    """A tensor that a rule names is not chosen for, and its bytes count."""
    name = "model.layers.0.mlp.down_proj.weight"
    rule = Override(name, Format("affine", 8, 32))
    found = planned(LLAMA, Target(5.0), Options((rule,)))
    assert name not in chosen(found)
    spec = next(s for s in found.tensors if s.name == name)
    assert (spec.format, spec.rule) == (rule.format, "override")
    assert found.bits_per_weight <= 5.0


def test_a_target_for_everything_keeps_everything() -> None:
    """And says that a larger one would change nothing."""
    found = planned(LLAMA, Target(20.0))
    assert said(found).exhausted
    assert set(chosen(found).values()) == {None}
    assert said(found).measured == pytest.approx(0, abs=1e-6)


def test_the_same_again() -> None:
    """Plans are equal, reasons included."""
    assert planned(TIED, Target(4.5)) == planned(TIED, Target(4.5))


def test_a_text_that_is_given_is_what_is_measured_on(tmp_path: Path) -> None:
    """Divergences are those of the user's domain; with aware they are calibrated with it too."""
    from quantmill.automatic import LENGTH, WINDOWS
    from quantmill.mlxlm import empty_model, tokenizer_for
    from quantmill.windows import text_tokens, tokens_digest

    text = tmp_path / "own.txt"
    text.write_text("A hedgehog crossed the road and lived to tell of it. " * 200)
    options = Options(method="aware", calibration=str(text))
    found = planned(TIED, Target(4.5), options)
    with open_model(fixture(TIED)) as model:
        tokenizer = tokenizer_for(model, empty_model(model)[1])
    windows = text_tokens(tokenizer, text.read_text(), LENGTH, WINDOWS)
    assert said(found).tokens == tokens_digest(windows)


# -- what is made ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def made(store: Store) -> Created:
    source = fixture(TIED)
    return create("m:auto", source, store=store, quantize="auto", fit=Target(4.5), options=SEARCHED)


def test_what_is_measured_is_what_is_stored(store: Store, made: Created) -> None:
    """The stored model's own divergence on the same tokens is the one that was measured."""
    from quantmill.divergence import Passed, Reference, compare
    from quantmill.forward import Forward

    def passed(model: Any) -> Passed:
        forward = Forward(model, windows)
        for index in range(len(forward)):
            forward.step(index)
        return Passed(forward, forward.finish())

    windows = automatic_windows()
    reference = Reference(passed(open_model(fixture(TIED))), windows)
    kl = compare(passed(open_model("m:auto", store=store)), reference).kl
    assert kl is not None
    assert said(made.plan).measured == pytest.approx(float(kl.mean()), rel=1e-3)


def automatic_windows() -> Any:
    from quantmill.automatic import _windows

    return _windows(Options(), open_model(fixture(TIED)))


def test_the_model_records_what_was_found(store: Store, made: Created) -> None:
    """Target, predictions and the digest of tokens are in its config."""
    config = json.loads(store.read_blob(store.get_manifest(made.name).config.digest, 1 << 20))  # type: ignore[union-attr]
    record = config["quantmill"]["auto"]
    assert record["target"] == "4.5 bits per weight"
    assert record["measured"] == said(made.plan).measured
    assert record["tokens"].startswith("sha256:")


def test_a_run_that_goes_on_does_not_measure_again(
    store: Store, made: Created, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same request of the same files; another target, or --restart, is measured."""
    monkeypatch.setattr("quantmill.branches.divergences", lambda *_: pytest.fail("measured"))

    def again(bits: float, *, restart: bool = False) -> Created:
        return create(
            "m:again", fixture(TIED), store=store, quantize="auto", fit=Target(bits),
            options=SEARCHED, restart=restart,
        )  # fmt: skip

    assert again(4.5).digest == made.digest
    for path in store.journals.glob("*.auto.jsonl"):
        path.write_bytes(path.read_bytes() + b'{"torn": ')
    assert again(4.5).digest == made.digest
    monkeypatch.setattr("quantmill.creation.resolved", lambda *_: pytest.fail("asked"))
    for bits, restart in ((5.0, False), (4.5, True)):
        with pytest.raises(pytest.fail.Exception, match="asked"):
            again(bits, restart=restart)


def test_its_recipe_needs_no_measurement(
    store: Store, made: Created, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notes hold the formats found: a blob that is lost is made again with the same bytes."""
    monkeypatch.setattr("quantmill.branches.divergences", lambda *_: pytest.fail("measured"))
    (recipe,) = recipes(store, made.digest)
    assert not recipe.request.is_auto
    assert from_record(as_record(recipe)) == recipe
    blobs = store.get_manifest(made.name).tensor_refs()
    lost = [ref.digest for ref in blobs if "down_proj" in (ref.name or "")]
    for digest in lost:
        store.blob_path(digest).unlink()
    assert cli.run(["verify", "m:auto", "--repair", "--store", str(store.root)]) == 0
    for digest in lost:
        assert store.blob_path(digest).exists()


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path) -> None:
    """Random tokens do."""
    source = tmp_path / "source"
    shutil.copytree(fixture(LLAMA), source)
    for file in source.glob("tokenizer*"):
        file.unlink()
    found = plan(source, quantize="auto", fit=Target(4.5))
    config = json.loads((source / "config.json").read_text())
    from quantmill.automatic import LENGTH, WINDOWS
    from quantmill.windows import tokens_digest

    tokens = random_tokens(config["vocab_size"], WINDOWS, LENGTH, 0, config.get("bos_token_id"))
    assert said(found).tokens == tokens_digest(tokens)


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-q", "auto"], "needs a target"),
        (["-q", "auto", "--target-bpw", "4", "--target-size", "6GB"], "needs a target"),
        (["-q", "auto", "--for", "ollama"], "needs a target"),
        (["-q", "auto", "--target-size", "6XB"], "is no size"),
        (["-q", "auto", "--target-bpw", "-1"], "is no size"),
        (["-q", "auto", "--target-bpw", "nan"], "is no size"),
        (["-q", "auto", "--target-bpw", "4", "--for", "llama.cpp"], "unknown reader"),
        (["-q", "auto", "--target-bpw", "4", "--group-size", "64"], "chooses group sizes"),
        (["-q", "int4", "--target-bpw", "4"], "a target is for --quantize auto"),
        (["-q", "auto", "--target-bpw", "1.5"], "the smallest possible is"),
    ],
)
def test_what_cannot_be_is_told(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong words before anything is opened; a target that cannot be met names the least."""
    assert cli.run(["plan", str(fixture(LLAMA)), *options]) == 2
    assert message in capsys.readouterr().err


def test_models_that_cannot_be_measured(tmp_path: Path, minilm: Path) -> None:
    """No next token, no tensors, or two models."""
    with pytest.raises(BadPlan, match="bert"):
        plan(minilm, quantize="auto", fit=Target(4.5))
    small = write_checkpoint(tmp_path / "small", {"model.norm.weight": ("BF16", (64,))})
    with pytest.raises(BadRequest, match="no tensor"):
        plan(small, quantize="auto", fit=Target(4.5))
    with pytest.raises(BadRequest, match="draft"):
        plan(fixture(LLAMA), quantize="auto", fit=Target(4.5), draft=fixture(TIED))


def test_readers_are_a_table() -> None:
    """Every row has formats that exist; other names raise."""
    for name, row in READERS.items():
        assert reader(f" {name.upper()} ") is row
        assert len(set(row.formats)) == len(row.formats)
    with pytest.raises(BadRequest, match="unknown reader"):
        reader("another")


def test_the_command_shows_predicted_and_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In words and as JSON."""
    store = ["--store", str(tmp_path / "store")]
    asked = ["-q", "auto", "--target-bpw", "5", "--for", "ollama"]
    assert cli.run(["create", "m", str(fixture(LLAMA)), *asked, *store]) == 0
    out = capsys.readouterr().out
    assert "auto for ollama, 5 bits per weight: KL per token predicted 0." in out
    assert cli.run(["plan", str(fixture(LLAMA)), *asked, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["auto"]["reader"] == "ollama"
    rules = {tensor["rule"] for tensor in document["tensors"]}
    assert "auto" in rules


def test_names_are_patterns_of_themselves() -> None:
    """A rule that was found fits its tensor alone."""
    for name in ("a.b", "a[0].b", "a*?b"):
        assert fnmatchcase(name, exactly(name))
    assert not fnmatchcase("axxb", exactly("a*?b"))


NAMES = st.text("ab[]*?!", max_size=4)


@given(st.lists(NAMES | NAMES.map(exactly), max_size=6), NAMES)
def test_the_last_rule_that_fits_wins(patterns: list[str], name: str) -> None:
    """Also where rules that name one tensor are not tried one by one."""
    rules = [Override(pattern, None, str(number)) for number, pattern in enumerate(patterns)]
    fits = [rule for rule in rules if fnmatchcase(name, rule.pattern)]
    assert Rules(rules).fitting(name) == (fits[-1] if fits else None)
    if len(fits) == len(rules):
        Rules(rules).refuse_unused([name])
        return
    with pytest.raises(BadRequest, match="fits no tensor"):
        Rules(rules).refuse_unused([name])


def test_a_request_is_recorded_resolved() -> None:
    """A recipe of before is read as it was."""
    recipe = Recipe("org/model", Request("int4"), Options((Override("*x", None),)))
    record = as_record(recipe)
    assert "target" not in record["request"]
    assert "automatic" not in record["options"]
    assert from_record(record) == recipe
    assert np.isfinite(Target(4.5).bits_per_weight or 0)
