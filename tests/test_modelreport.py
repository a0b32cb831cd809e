"""The data of a report: places of tensors, decisions made again, errors, evaluations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from checkpoints import SMALL, write_checkpoint
from quantmill.checkpoint import Checkpoint
from quantmill.cli import run
from quantmill.creation import create
from quantmill.errors import BadSource
from quantmill.facts import show
from quantmill.heatmap import Scale, bits_share, error_scale
from quantmill.modelreport import ReportModel, describe_models, natural, place_of
from quantmill.names import parse_name
from quantmill.origins import option_words
from quantmill.planner import parse_override
from quantmill.plans import Options
from quantmill.recipes import Recipe, Request
from quantmill.reportdata import histogram_of, numbers_of, report_json
from quantmill.store import Store

QUERY = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def described(store: Store, name: str = "m", **options: Any) -> ReportModel:
    (found,) = describe_models(store, [parse_name(name)], **options)
    return found


# -- places ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "series", "layer", "part"),
    [
        (QUERY, "model.layers", 0, "self_attn.q_proj"),
        ("encoder.layer.11.output.dense.bias", "encoder.layer", 11, "output.dense.bias"),
        ("transformer/blocks.3.ff.net.0.proj.weight", "transformer/blocks", 3, "ff.net.*.proj"),
        (
            "model.layers.2.mlp.experts.17.up_proj.weight",
            "model.layers",
            2,
            "mlp.experts.*.up_proj",
        ),
        ("model.embed_tokens.weight", "", None, "model.embed_tokens"),
        ("blocks.4", "blocks", 4, "(itself)"),
        ("7.weight", "", None, "7"),
        ("a.99999999999999999999.b", "", None, "a.99999999999999999999.b"),
        ("", "", None, ""),
    ],
)
def test_a_name_says_where_its_tensor_stands(
    name: str, series: str, layer: int | None, part: str
) -> None:
    """The first number is the layer's, whatever the series is called; others become stars."""
    place = place_of(name)
    assert (place.series, place.layer, place.part) == (series, layer, part)


def test_layers_are_in_the_order_of_their_numbers() -> None:
    """2 comes before 10."""
    assert sorted(["a.10.x", "a.2.x", "b"], key=natural) == ["a.2.x", "a.10.x", "b"]


# -- models ----------------------------------------------------------------------------------------


def test_sizes_and_formats_are_those_of_show(store: Store, source: Path) -> None:
    """Tensors add up to the facts, kinds to the tensors."""
    create("m", source, store=store, quantize="int4")
    model, facts = described(store), show(store, "m")
    assert [t.name for t in model.tensors] == sorted(SMALL, key=natural)
    data = sum(share.nbytes for share in facts.shares)
    assert sum(t.nbytes for t in model.tensors) == data == sum(k.nbytes for k in model.kinds)
    assert {t.label for t in model.tensors} == {share.label for share in facts.shares}
    (query,) = [t for t in model.tensors if t.name == QUERY]
    assert query.bits_per_weight == 4.5


def test_the_source_is_found_by_itself(store: Store, source: Path) -> None:
    """Errors and reasons come from what the model was made from, as noted."""
    create("m", source, store=store, quantize="int4")
    model = described(store)
    assert (model.reference, model.unmeasured) == (str(source), None)
    assert model.origin.options == ("--quantize int4",)
    found = {t.name: t for t in model.tensors}
    assert (found[QUERY].rule, found[QUERY].reason) == ("requested", "as requested")
    error = found[QUERY].error
    assert error is not None
    assert 0.001 < (error.relative or 0) < 0.02
    norm = found[NORM].error
    assert norm is not None
    assert norm.identical


def test_a_source_that_is_gone_is_told(store: Store, source: Path) -> None:
    """Without it there are no errors and no reasons, and the page says why."""
    create("m", source, store=store, quantize="int4")
    shutil.rmtree(source)
    model = described(store)
    assert model.origin.problem == f"{source} is not on this machine"
    assert model.unmeasured == f"{source} is not on this machine; --against names a reference"
    assert {(t.reason, t.error) for t in model.tensors} == {(None, None)}


def test_a_source_that_changed_is_told(store: Store, source: Path) -> None:
    """A plan that gives other blobs says nothing about these."""
    create("m", source, store=store, quantize="int4")
    shutil.rmtree(source)
    write_checkpoint(source, SMALL | {"model.norm.weight": ("BF16", (128,))})
    problem = described(store).origin.problem
    assert problem == f"{source} is no longer what the model was made from"


def test_a_source_that_cannot_be_read_is_told(store: Store, source: Path) -> None:
    """A damaged source is no reason to fail."""
    create("m", source, store=store, quantize="int4")
    (source / "model.safetensors").write_bytes(b"x")
    assert (described(store).origin.problem or "").startswith("the source cannot be read: ")


def test_a_model_without_notes_is_shown(store: Store, source: Path) -> None:
    """Models of other programs have no recipe; a reference can be named all the same."""
    create("m", source, store=store, quantize="int4")
    shutil.rmtree(store.provenance_of(store.get_manifest(parse_name("m")).digest).parent)
    model = described(store, against=source)
    assert model.origin.problem == "no note says what the model was made from"
    assert model.reference == str(source)
    assert model.relative is not None


def test_another_model_can_be_the_reference(store: Store, source: Path) -> None:
    """--against takes a stored name, too; reasons stay those of the recipe."""
    create("m", source, store=store, quantize="int4")
    create("big", source, store=store, quantize="int8")
    model = described(store, against="big")
    assert model.reference == "big:latest"
    assert {t.reason for t in model.tensors} >= {"as requested"}


def test_options_are_told_as_they_are_typed() -> None:
    """All that changes bytes, nothing that is the default."""
    overrides = (parse_override("*q_proj*=nvfp4"), parse_override("*v*=keep"))
    options = Options(overrides, "gpu", "nearest", True, True)
    recipe = Recipe("s", Request(None, None, "int8", "int4"), options, None, "d", "a")
    assert option_words(recipe) == (
        "--requantize int8", "--draft d", "--draft-quantize int4", "--merge-lora a",
        "--profile gpu", "--e8m0 nearest", "--tensor *q_proj*=nvfp4", "--tensor *v*=keep",
        "--global-scale", "--allow-non-finite",
    )  # fmt: skip
    assert option_words(Recipe("s")) == ()


# -- scales ----------------------------------------------------------------------------------------


def test_bits_have_the_same_colour_in_every_report() -> None:
    """Powers of two lie evenly between 2 and 32 bits."""
    assert [bits_share(bits) for bits in (0, 2, 4, 8, 16, 32, 64)] == [0, 0, 0.25, 0.5, 0.75, 1, 1]


def test_errors_span_the_scale(store: Store, source: Path) -> None:
    """From the smallest to the largest of the page, none at all apart from the smallest."""
    scale = Scale(1e-5, 1e-1)
    shares = [scale.share(error) for error in (0, 1e-5, 1e-3, 1e-1, 1)]
    assert shares == pytest.approx([0, 0.08, 0.54, 1, 1])
    create("m", source, store=store, quantize="int4")
    found = error_scale(described(store).tensors)
    assert found is not None
    assert found.low < found.high
    assert error_scale([]) is None


# -- evaluations -----------------------------------------------------------------------------------


def test_evaluations_belong_to_the_models_they_name(store: Store, source: Path) -> None:
    """Others go to the models in their order."""
    for name in ("a", "b", "c"):
        create(name, source, store=store, quantize="int4")
    names = [parse_name(name) for name in ("a", "b", "c")]
    documents: list[dict[str, Any]] = [{"n": 1}, {"model": "a:latest", "n": 2}]
    found = describe_models(store, names, evaluations=documents)
    assert [m.evaluation and m.evaluation["n"] for m in found] == [2, 1, None]


def test_numbers_of_an_evaluation_are_found_whatever_they_are_called() -> None:
    """Those of objects inside it as well, under both names; texts and nonsense are left out."""
    document = {"kl": {"mean": 0.5, "p99": 2}, "top1_agreement": 0.6, "ok": True, "x": float("inf"),
                "kl_histogram": {"a": 1}, "name": "m"}  # fmt: skip
    assert numbers_of(document) == {"kl mean": 0.5, "kl p99": 2, "top1 agreement": 0.6}


@pytest.mark.parametrize(
    "said",
    [
        None, [], {}, {"edges": [0, 1], "counts": []}, {"edges": [0, 1], "counts": [1, 2]},
        {"edges": [1, 0], "counts": [1]}, {"edges": [0, "1"], "counts": [1]},
        {"edges": [0, 1], "counts": [-1]}, {"edges": [0, float("nan")], "counts": [1]},
        {"edges": list(range(500)), "counts": [1] * 499},
    ],
)  # fmt: skip
def test_a_histogram_that_makes_no_sense_is_none(said: object) -> None:
    """The page then says that there is none."""
    assert histogram_of({"kl_histogram": said}) is None


def test_a_histogram_is_read() -> None:
    """One edge more than counts."""
    found = histogram_of({"kl_histogram": {"edges": [0, 0.1, 1], "counts": [3, 4]}})
    assert found is not None
    assert (found.edges, found.counts) == ((0.0, 0.1, 1.0), (3.0, 4.0))


# -- the command -----------------------------------------------------------------------------------


def test_the_json_is_valid_and_complete(
    store: Store, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--json prints what the page holds, and the page can be written at the same time."""
    create("m", source, store=store, quantize="int4")
    page = source.parent / "page.html"
    assert run(["report", "m", "--store", str(store.root), "--json", "-o", str(page)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(json.dumps(report_json([described(store)]), allow_nan=False))
    assert page.read_bytes().startswith(b"<!doctype html>")


@pytest.mark.parametrize(
    "text", ['{"a": NaN, "b": -1e999}', '{"model": [1], "a": {"b": {"c": 1}}}']
)
def test_an_evaluation_may_hold_anything(
    store: Store, source: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is no number in JSON is null on the page, too."""
    create("m", source, store=store, quantize="int4")
    (source.parent / "eval.json").write_text(text)
    at = ("--eval", str(source.parent / "eval.json"), "--store", str(store.root))
    assert run(["report", "m", "--json", *at]) == 0

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert run(["report", "m", "-o", "-", *at]) == 0


def test_a_source_that_ends_too_early_is_told(
    store: Store, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference that was found by itself is no reason to fail; one that was named is."""
    create("m", source, store=store, quantize="int4")

    def fail(*_: object) -> None:
        raise BadSource("it ends")

    monkeypatch.setattr(Checkpoint, "read_into", fail)
    assert described(store).unmeasured == "the source cannot be read as numbers: it ends"
    with pytest.raises(BadSource):
        described(store, against=source)


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = run(["report", *map(str, arguments)])
    return code, capsys.readouterr().err


def test_wrong_requests_are_one_line(
    store: Store, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No page named, a directory in its place, a folder or a file that is not there."""
    create("m", source, store=store)
    at = ("--store", store.root)
    assert command(capsys, "m", *at)[0] == 2
    assert command(capsys, "m", "--json", "-o", "-", *at)[0] == 2
    code, err = command(capsys, "m", "-o", tmp_path, *at)
    assert (code, err.splitlines()[0]) == (2, f"error: {tmp_path} is there and no file")
    assert command(capsys, "m", "-o", tmp_path / "no" / "p.html", *at)[0] == 1
    assert command(capsys, "m", "-o", "/dev/null", *at)[0] == 2
    assert command(capsys, "nope", "-o", tmp_path / "p.html", *at)[0] == 1
    assert command(capsys, "m", "-o", "-", "--eval", tmp_path / "none", *at)[0] == 1
    (tmp_path / "bad").write_text("[1]")
    assert command(capsys, "m", "-o", "-", "--eval", tmp_path / "bad", *at)[0] == 2
    assert not (tmp_path / "no").exists()


def test_a_page_is_replaced_whole(
    store: Store, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails leaves the old page and nothing else; a link is followed."""
    from quantmill.errors import StoreError
    from quantmill.files import Disk
    from quantmill.wholefile import write_whole

    folder = tmp_path / "pages"
    folder.mkdir()
    page, link = folder / "page.html", folder / "link.html"
    link.symlink_to(page)
    write_whole(link, b"one")
    assert (page.read_bytes(), link.is_symlink()) == (b"one", True)

    class Failing(Disk):
        def sync(self, path: Path) -> None:
            raise StoreError(f"{path}: no")

    with pytest.raises(StoreError):
        write_whole(page, b"two", Failing())
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        "page.html": b"one", "link.html": b"one",
    }  # fmt: skip
