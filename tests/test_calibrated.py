"""Models made by calibrated methods: what is measured is used, and the same run gives the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from checkpoints import fixture
from decoded import in_float32
from fakes import paces
from imatrices import Entry, write_gguf_imatrix
from quantmill import creation, open_model
from quantmill.cli import run
from quantmill.creation import Created, create
from quantmill.errors import BadPlan, BadRequest, QuantmillError
from quantmill.execute import Progress
from quantmill.importance import scaled
from quantmill.planner import parse_override
from quantmill.plans import AWARE, Options
from quantmill.recipes import as_record, from_record
from quantmill.repairing import repair
from quantmill.store import Store
from quantmill.windows import random_tokens

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (quantmill[run])")

from quantmill import calibration
from quantmill.activations import gram_matrices, second_moments
from quantmill.calibration import VERSIONS

LLAMA, EXPERTS = fixture("hf-llama-bf16"), fixture("hf-qwen3-moe-bf16")
METHODS = ["aware", "gptq"]
FORMATS = ["int4", "int8", "affine-3", "nvfp4", "mxfp4"]
WINDOWS, LENGTH = 8, 128
TOKENS = random_tokens(320, WINDOWS, LENGTH, first=1)


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models need no more than some hundred tokens."""
    monkeypatch.setattr(calibration, "LENGTH", LENGTH)
    monkeypatch.setattr(calibration, "_WINDOWS", dict.fromkeys(calibration._WINDOWS, WINDOWS))


def make(root: Path, method: str, quantize: str = "int4", **choices: Any) -> Created:
    source = choices.pop("source", LLAMA)
    options = replace(choices.pop("options", Options()), method=method)
    return create("m", source, store=Store(root), quantize=quantize, options=options, **choices)


def values(root: Path, name: str) -> npt.NDArray[np.float64]:
    """A weight's numbers, decoded with its scales as float32."""
    return in_float32(open_model("m", store=Store(root)), name)


def exact(source: Path, name: str) -> npt.NDArray[np.float64]:
    return np.array(open_model(source)[name].astype(mx.float32)).astype(np.float64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quantize", FORMATS)
def test_files_have_the_same_shapes_and_sizes(tmp_path: Path, method: str, quantize: str) -> None:
    """Names, dtypes, shapes and bytes of every tensor are those of rounding to nearest."""
    made = make(tmp_path / "m", method, quantize)
    rounded = make(tmp_path / "r", "rtn", quantize)
    assert [t.stored for t in made.plan.tensors] == [t.stored for t in rounded.plan.tensors]
    assert made.plan.blob_bytes == rounded.plan.blob_bytes
    assert made.unmeasured == ()
    assert open_model("m", store=Store(tmp_path / "m")).quantization


@pytest.mark.parametrize("quantize", FORMATS)
def test_no_group_is_worse_than_rounded_by_what_was_measured(tmp_path: Path, quantize: str) -> None:
    """Each column counted by the mean square of its input, over the tokens that the plan names."""
    made = make(tmp_path / "m", "aware", quantize)
    make(tmp_path / "r", "rtn", quantize)
    moments = second_moments(open_model(LLAMA), TOKENS)
    better = 0
    for spec in made.plan.tensors:
        if spec.format is None:
            continue
        weights = scaled(moments[spec.name].values.astype(np.float64))
        errors = []
        for root in (tmp_path / "m", tmp_path / "r"):
            off = np.square(values(root, spec.name) - exact(LLAMA, spec.name)) * weights
            errors.append(off.reshape(-1, spec.format.group_size).sum(axis=1))
        assert np.all(errors[0] <= errors[1] * (1 + 1e-6))
        better += int(errors[0].sum() < errors[1].sum())
    assert better


@pytest.mark.parametrize("quantize", ["int4", "affine-3", "nvfp4", "mxfp4"])
def test_error_feedback_loses_less_of_what_layers_compute(tmp_path: Path, quantize: str) -> None:
    """Of what a layer makes of its inputs less is lost than by a search, for nearly every layer."""
    made = make(tmp_path / "g", "gptq", quantize)
    make(tmp_path / "a", "aware", quantize)
    grams: dict[str, Any] = {}
    for block in gram_matrices(open_model(LLAMA), TOKENS):
        grams |= block
    better = []
    for spec in made.plan.tensors:
        if spec.format is not None:
            off = [values(tmp_path / n, spec.name) - exact(LLAMA, spec.name) for n in ("g", "a")]
            lost = [np.einsum("ij,jk,ik->", e, grams[spec.name].products, e) for e in off]
            better.append(lost[0] < lost[1])
    assert np.mean(better) > 0.8


@pytest.mark.parametrize("method", METHODS)
def test_bytes_depend_on_no_thread_and_no_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """One worker or three, whole tensors or pieces of a few rows: the same digest."""
    digests = {
        make(tmp_path / label, method, workers=workers).digest
        for label, workers in paces(monkeypatch)
    }
    assert len(digests) == 1


@pytest.mark.parametrize("method", METHODS)
def test_experts_are_calibrated_each_by_its_own_tokens(tmp_path: Path, method: str) -> None:
    """Stacks of experts, and again where few tokens leave some experts without enough."""
    made = make(tmp_path / "m", method, source=EXPERTS)
    assert made.unmeasured == ()
    stack = next(t for t in made.plan.tensors if t.format and len(t.shape) == 3)
    assert stack.method == method
    few = tmp_path / "few.txt"
    few.write_text("One two three. " * 400)
    options = Options(calibration=str(few))
    other = make(tmp_path / "f", method, source=EXPERTS, options=options)
    assert other.unmeasured == ()
    assert other.digest != made.digest


class Stop(Exception):
    """Raised by a test in the middle of a run."""


@pytest.mark.parametrize("method", METHODS)
def test_what_an_interrupted_run_finished_is_used(tmp_path: Path, method: str) -> None:
    """The next run computes the rest and gives the model that a run without a break gives."""
    whole = make(tmp_path / "whole", method)
    written = 0

    def stop(event: Progress) -> None:
        nonlocal written
        written = max(written, event.tensors)
        if event.tensors > 8:
            raise Stop

    with pytest.raises(Stop):
        make(tmp_path / "m", method, workers=1, progress=stop)
    assert written
    again = make(tmp_path / "m", method)
    assert again.digest == whole.digest
    assert 0 < again.resumed < len(whole.plan.blobs)
    third = make(tmp_path / "m", method)
    assert (third.digest, third.resumed) == (whole.digest, len(whole.plan.blobs))


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_blob_that_is_lost_is_made_again(tmp_path: Path, method: str) -> None:
    """Notes say that it was there; the pass is made for it alone."""
    made = make(tmp_path / "m", method)
    store = Store(tmp_path / "m")
    name = next(t.name for t in made.plan.tensors if t.method == method)
    lost = next(r for r in store.get_manifest(made.name).tensor_refs() if r.name == name)
    store.blob_path(lost.digest).unlink()
    again = make(tmp_path / "m", method)
    assert again.digest == made.digest
    assert again.resumed == len(made.plan.blobs) - 1


def test_the_recipe_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The stored model says what it was calibrated with: seed, tokens, source, method's version."""
    made = make(tmp_path / "m", "aware")
    store = Store(tmp_path / "m")
    manifest = store.get_manifest(made.name)
    assert manifest.config is not None
    config = json.loads(store.read_blob(manifest.config.digest, 1 << 20))
    said = config["quantmill"]
    found = said["calibration"]
    assert said["method"] == "aware"
    assert found.pop("source").startswith("sha256:")
    assert found.pop("tokens") == activations_tokens()
    assert found.pop("version") == VERSIONS[AWARE]
    assert found == {"kind": "random tokens", "windows": WINDOWS, "length": LENGTH}
    assert run(["plan", str(LLAMA), "-q", "int4", "--method", "gptq"]) == 0
    told = "8 x 128 random tokens (seed 0), 8 x 128 tokens of Python's documentation"
    assert told in capsys.readouterr().out


def activations_tokens() -> str:
    """The digest of the default windows."""
    from quantmill.windows import tokens_digest

    return tokens_digest(TOKENS)


def test_an_imatrix_of_the_same_tokens_gives_the_same_weights(tmp_path: Path) -> None:
    """What llama.cpp would have measured is used as what is measured here."""
    made = make(tmp_path / "m", "aware")
    moments = second_moments(open_model(LLAMA), TOKENS)
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip
    entries = {}
    for name, found in moments.items():
        if ".layers." in name:
            parts = name.split(".")
            sums = found.values[None] * np.float32(TOKENS.size)
            entries[f"blk.{parts[2]}.{names[parts[-2]]}.weight"] = Entry(sums, (TOKENS.size,))
        else:
            sums = found.values[None] * np.float32(TOKENS.size)
            entries["output.weight"] = Entry(sums, (TOKENS.size,))
    entries["blk.9.attn_q.weight"] = entries["blk.0.attn_q.weight"]
    path = write_gguf_imatrix(tmp_path / "i.gguf", entries)
    other = make(tmp_path / "i", "aware", options=Options(imatrix=str(path)))
    refs = [Store(tmp_path / n).get_manifest(made.name).tensor_refs() for n in ("m", "i")]
    assert [r.digest for r in refs[0]] == [r.digest for r in refs[1]]
    assert other.unused == ("blk.9.attn_q.weight",)
    assert other.plan.calibration is not None
    assert other.plan.calibration.file == "i.gguf"


def test_tensors_that_an_imatrix_lacks_are_told(tmp_path: Path) -> None:
    """They are searched with weights of norms."""
    entry = Entry(np.ones((1, 128), np.float32), (1000,))
    path = write_gguf_imatrix(tmp_path / "i.gguf", {"blk.0.attn_q.weight": entry})
    made = make(tmp_path / "m", "aware", options=Options(imatrix=str(path)))
    make(tmp_path / "s", "search")
    assert "model.layers.0.self_attn.q_proj.weight" not in made.unmeasured
    assert "model.layers.1.self_attn.q_proj.weight" in made.unmeasured
    refs = [
        {r.name: r.digest for r in Store(tmp_path / n).get_manifest(made.name).tensor_refs()}
        for n in ("m", "s")
    ]
    same = {name for name in refs[0] if refs[0][name] == refs[1][name]}
    assert same >= set(made.unmeasured)


def test_repair_follows_the_recipe(tmp_path: Path) -> None:
    """A damaged blob is made again by the same calibration, whose file may lie anywhere."""
    from quantmill.refetching import Known
    from quantmill.repairing import plan_repair
    from quantmill.verification import verify

    text = tmp_path / "text.txt"
    text.write_text("Some words to calibrate with, and some more of them. " * 300)
    made = make(tmp_path / "m", "gptq", options=Options(calibration=str(text)))
    store = Store(tmp_path / "m")
    ref = store.get_manifest(made.name).tensor_refs()[5]
    path = store.blob_path(ref.digest)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    providers = Known(store)
    steps = repair(store, plan_repair(store, verify(store), providers), providers)
    assert all(step.done for step in steps)
    assert store.holds(ref.digest, ref.size)


def test_a_recipe_keeps_the_files(tmp_path: Path) -> None:
    """As JSON and back, with paths that hold wherever it is read."""
    from quantmill.recipes import Recipe

    text = tmp_path / "text.txt"
    text.write_text("words")
    recipe = Recipe(str(LLAMA), options=Options(method="gptq", calibration=str(text)))
    assert from_record(json.loads(json.dumps(as_record(recipe)))) == recipe


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (Options(calibration="x"), "is not calibrated"),
        (Options(method="search", imatrix="x"), "is not calibrated"),
        (Options(method="gptq", imatrix="x"), "more than the means"),
        (Options(method="aware", imatrix="x", calibration="y"), "leave out --calibration"),
        (Options(method="aware", calibration="/nowhere/x.txt"), "/nowhere/x.txt"),
        (Options(method="aware", profile="gpu"), "rounding of its own"),
    ],
)
def test_options_that_do_not_go_together(options: Options, told: str) -> None:
    """Refused before anything is read, with what to do instead."""
    with pytest.raises(QuantmillError) as caught:
        creation.plan(LLAMA, quantize="int4", options=options)
    assert told in f"{caught.value} {caught.value.hint}"


def test_models_without_a_pass_are_refused(tmp_path: Path) -> None:
    """A pipeline, an architecture that mlx-lm lacks: the error names the way without a pass."""
    with pytest.raises(BadPlan, match="pipeline"):
        make(tmp_path / "p", "aware", source=fixture("diffusers-z-image"))
    with pytest.raises(BadRequest, match="not budgeted"):
        make(tmp_path / "p", "aware", memory=1 << 30)
    assert Store(tmp_path / "p").list_names() == []


def test_a_short_text_gives_fewer_windows(tmp_path: Path) -> None:
    """A text of less than one window is refused, of less than all is used as far as it goes."""
    text = tmp_path / "text.txt"
    text.write_text("Few words.")
    with pytest.raises(BadRequest, match="too few"):
        make(tmp_path / "m", "aware", options=Options(calibration=str(text)))
    text.write_text("Few words. " * 300)
    assert make(tmp_path / "m", "aware", options=Options(calibration=str(text))).digest


@pytest.mark.parametrize("name", ["ct-int4-w4a16", "mlx-affine-8bit-gs64"])
def test_decoded_weights_are_calibrated_as_well(tmp_path: Path, name: str) -> None:
    """Weights that are quantized already run decoded."""
    options = Options(method="gptq")
    made = create("m", fixture(name), store=Store(tmp_path), requantize="affine-3", options=options)
    assert made.unmeasured == ()
    assert {t.method for t in made.plan.tensors if t.format} == {"gptq"}


def test_a_rule_for_some_tensors_is_kept(tmp_path: Path) -> None:
    """Tensors in source precision, or in another format, beside calibrated ones."""
    rules = (parse_override("*q_proj*=keep"), parse_override("*down_proj*=int8"))
    made = make(tmp_path / "m", "gptq", options=Options(overrides=rules))
    formats = {t.name: t.format.bits if t.format else None for t in made.plan.tensors}
    assert formats["model.layers.0.self_attn.q_proj.weight"] is None
    assert formats["model.layers.0.mlp.down_proj.weight"] == 8


@pytest.mark.parametrize("method", ["search", *METHODS])
@pytest.mark.parametrize("quantize", ["int4", "nvfp4"])
def test_stock_mlx_lm_gives_the_same_logits(tmp_path: Path, method: str, quantize: str) -> None:
    """Exported and loaded by mlx-lm itself: the logits of our own layers, in float32."""
    from mlx_lm.utils import load_model

    from quantmill import mlxlm
    from quantmill.export import export

    make(tmp_path / "m", method, quantize)
    model = open_model("m", store=Store(tmp_path / "m"))
    export(model, tmp_path / "out", "mlx-lm")
    theirs, _ = load_model(tmp_path / "out")
    theirs.set_dtype(mx.float32)
    ours, _ = mlxlm.build(open_model("m", store=Store(tmp_path / "m")), mx.float32)
    tokens = mx.array(TOKENS[:1, :16])
    assert np.array_equal(np.array(theirs(tokens)), np.array(ours(tokens)))
