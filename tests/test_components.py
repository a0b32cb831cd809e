"""Models made of components: diffusers directories imported, opened and written again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import fixture, write_tensor_file
from quantmill import mediatypes
from quantmill.cli import run
from quantmill.creation import create, plan
from quantmill.errors import BadPlan, BadSource, BadWeights, Corrupt, NotFound, QuantmillError
from quantmill.export import export
from quantmill.facts import show
from quantmill.formats import parse_format
from quantmill.load import open_model
from quantmill.manifest import Manifest
from quantmill.names import parse_name
from quantmill.pipelines import choose_shards, exported_index, stored_index
from quantmill.planner import parse_override
from quantmill.plans import Options, plan_from_json, plan_to_json
from quantmill.policy import component_policy, decide
from quantmill.store import Store
from quantmill.tensorfile import TensorFile, header_length, parse_header
from quantmill.verification import read_tensor_file, verify

PIPELINE = fixture("diffusers-z-image")
WEIGHTS = {
    "text_encoder": "model.safetensors",
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
TO_K = "layers.0.attention.to_k.weight"


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A copy of the fixture, to be changed."""
    return Path(shutil.copytree(PIPELINE, tmp_path / "pipeline"))


def header(path: Path) -> TensorFile:
    data = path.read_bytes()
    length = header_length(data[:8], len(data), path.name)
    return parse_header(data[8 : 8 + length], len(data), path.name)


def change_index(folder: Path, **entries: Any) -> None:
    """Set entries of model_index.json; None removes one."""
    path = folder / "model_index.json"
    index = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({k: v for k, v in index.items() if v is not None}))


def files_of(store: Store, manifest: Manifest, media_type: str) -> dict[str, bytes]:
    refs = [r for r in manifest.blobs if r.media_type == media_type]
    return {str(r.name): store.read_blob(r.digest, 1 << 24) for r in refs}


# -- what is stored --------------------------------------------------------------------------------


def test_every_tensor_comes_out_as_it_went_in(store: Store) -> None:
    """Imported as it is, each tensor of each component keeps its dtype, shape and bytes."""
    manifest = store.get_manifest(create("m", PIPELINE, store=store).name)
    stored = {str(r.name): r for r in manifest.tensor_refs()}
    expected = 0
    for component, file in WEIGHTS.items():
        path = PIPELINE / component / file
        for name, entry in header(path).entries.items():
            ref = stored[f"{component}/{name}"]
            (found,) = read_tensor_file(store, ref).entries.values()
            assert (found.name, found.dtype, found.shape) == (ref.name, entry.dtype, entry.shape)
            blob = store.read_blob(ref.digest, 1 << 24)
            assert blob[found.start : found.end] == path.read_bytes()[entry.start : entry.end]
            expected += 1
    assert len(stored) == expected == 187


def test_files_of_every_folder_are_kept_byte_for_byte(store: Store) -> None:
    """Configs, scheduler and tokenizer are stored under `<folder>/<name>` as they are."""
    manifest = store.get_manifest(create("m", PIPELINE, store=store, quantize="int4").name)
    kept = files_of(store, manifest, mediatypes.JSON)
    originals = {str(p.relative_to(PIPELINE)): p.read_bytes() for p in PIPELINE.rglob("*/*.json")}
    assert {n: d for n, d in kept.items() if n != "model_index.json"} == originals


def test_other_tokenizer_files_are_kept_too(store: Store, pipeline: Path) -> None:
    """What a tokenizer reads beside JSON has a folder before its name as well."""
    (pipeline / "tokenizer" / "merges.txt").write_text("a b")
    manifest = store.get_manifest(create("m", pipeline, store=store).name)
    assert files_of(store, manifest, mediatypes.FILE) == {"tokenizer/merges.txt": b"a b"}


def test_the_model_index_says_what_the_model_is(store: Store) -> None:
    """Class, version and totals are stored the way that Ollama's importer wrote them."""
    manifest = store.get_manifest(create("m", PIPELINE, store=store, quantize="nvfp4").name)
    raw = files_of(store, manifest, mediatypes.JSON)["model_index.json"]
    index = json.loads(raw)
    assert index["architecture"] == "ZImagePipeline"
    assert not {"_class_name", "_diffusers_version"} & index.keys()
    assert (index["quantization"], index["group_size"]) == ("NVFP4", 16)
    assert index["parameter_count"] == 781763
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert raw == json.dumps(index, indent=4, sort_keys=True).encode()


def test_unquantized_the_index_says_the_text_encoders_dtype(store: Store) -> None:
    """Without a format, `quantization` is the dtype recorded by the text encoder."""
    create("m", PIPELINE, store=store)
    assert show(store, "m").info == {
        "architecture": "ZImagePipeline",
        "parameter_count": 781763,
        "quantization": "bfloat16",
    }


def test_a_pipeline_makes_images(store: Store) -> None:
    """The config names the capability, no parser and no renderer, and the format asked for."""
    create("m", PIPELINE, store=store, quantize="int4")
    facts = show(store, "m")
    assert (facts.capabilities, facts.parser, facts.renderer) == (("image",), "", "")
    assert facts.format == "int4"


def test_a_pipeline_that_edits_images_sees_them(store: Store, pipeline: Path) -> None:
    """Flux2KleinPipeline takes images as well."""
    change_index(pipeline, _class_name="Flux2KleinPipeline")
    create("m", pipeline, store=store)
    assert show(store, "m").capabilities == ("image", "vision")


def test_the_digest_depends_on_neither_workers_nor_run(tmp_path: Path) -> None:
    """One worker and several give the same model."""
    digests = {
        create("m", PIPELINE, store=Store(tmp_path / str(n)), quantize="int4", workers=n).digest
        for n in (1, 3)
    }
    assert len(digests) == 1


def test_plan_and_create_agree(store: Store) -> None:
    """What `plan` forecasts is what is written, and the plan goes through JSON unchanged."""
    forecast = plan(PIPELINE, quantize="mxfp8")
    made = create("m", PIPELINE, store=store, quantize="mxfp8")
    assert made.plan == forecast == plan_from_json(json.loads(json.dumps(plan_to_json(forecast))))
    sizes = {r.name: r.size for r in store.get_manifest(made.name).tensor_refs()}
    assert sizes == {b.name: b.size for b in forecast.blobs}
    assert not verify(store).damage


def test_an_interrupted_create_goes_on(store: Store) -> None:
    """A second run finds the blobs of the first by its notes, whatever part they belong to."""

    class Stopped(Exception):
        pass

    def stop(event: Any) -> None:
        if event.tensors > 100:
            raise Stopped

    with pytest.raises(Stopped):
        create("m", PIPELINE, store=store, quantize="int4", workers=1, progress=stop)
    assert not store.list_names()
    made = create("m", PIPELINE, store=store, quantize="int4")
    again = create("m", PIPELINE, store=store, quantize="int4")
    assert again.resumed == len(again.plan.blobs)
    assert again.digest == made.digest


# -- what is quantized -----------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["int4", "int8", "nvfp4", "mxfp4", "mxfp8"])
def test_attention_and_feed_forward_are_quantized(fmt: str) -> None:
    """Of the transformer the matrices of its blocks, and only whose rows are whole groups."""
    specs = {t.name.removeprefix("transformer/"): t for t in plan(PIPELINE, quantize=fmt).tensors}
    for block in ("layers.0", "context_refiner.0", "noise_refiner.0"):
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            found = specs[f"{block}.attention.{part}.weight"].format
            assert found is not None
            assert found.name == fmt
        assert specs[f"{block}.feed_forward.w1.weight"].format is not None
        assert specs[f"{block}.feed_forward.w2.weight"].rule == "unaligned"  # rows of 170


@pytest.mark.parametrize("fmt", ["int4", "nvfp4"])
def test_what_is_sensitive_is_kept(fmt: str) -> None:
    """Embedders, norms, modulation, the output layer and the whole vae keep their precision."""
    kept = {t.name for t in plan(PIPELINE, quantize=fmt).tensors if t.format is None}
    for name in (
        "all_x_embedder.2-1.weight", "cap_embedder.1.weight", "t_embedder.mlp.0.weight",
        "layers.0.adaLN_modulation.0.weight", "all_final_layer.2-1.linear.weight",
        "all_final_layer.2-1.adaLN_modulation.1.weight", "layers.0.attention_norm1.weight",
        "cap_pad_token",
    ):  # fmt: skip
        assert f"transformer/{name}" in kept
    assert "text_encoder/embed_tokens.weight" in kept
    vae = header(PIPELINE / "vae" / WEIGHTS["vae"]).entries
    assert {f"vae/{name}" for name in vae} <= kept


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("transformer_blocks.0.attn.to_q.weight", "requested"),
        ("transformer_blocks.0.ff.net.2.weight", "requested"),
        ("single_transformer_blocks.3.proj_out.weight", "requested"),
        ("down_blocks.1.attentions.0.proj_in.weight", "requested"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "requested"),
        ("proj_out.weight", "output"),
        ("final_layer.linear.weight", "output"),
        ("img_in.weight", "input"),
        ("caption_projection.linear_1.weight", "input"),
        ("transformer_blocks.0.img_mod.1.weight", "modulation"),
        ("double_stream_modulation_img.linear.weight", "modulation"),
        ("adaln_single.linear.weight", "modulation"),
        ("transformer_blocks.0.norm1.linear.weight", "norm"),
        ("norm_out.linear.weight", "norm"),
        ("down_blocks.0.resnets.0.time_emb_proj.weight", "time"),
        ("time_text_embed.timestep_embedder.linear_1.weight", "time"),
        ("context_embedder.weight", "embedding"),
        ("shared.weight", "embedding"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "position"),
    ],
)
def test_names_of_other_pipelines(name: str, rule: str) -> None:
    """The rules fit the names of Flux, Qwen-Image, PixArt, U-Nets and T5 too."""
    policy = component_policy("transformer", {"_class_name": "X"})
    assert decide(policy, name, (256, 256), parse_format("int8")).rule == rule


@pytest.mark.parametrize("component", ["vae", "vae_1", "audio_vae", "VAE"])
def test_a_vae_by_any_name_is_kept(component: str) -> None:
    """Every component with `vae` in its name keeps its precision."""
    decision = decide(
        component_policy(component, {}), "mid.to_q.weight", (256, 256), parse_format("int8")
    )
    assert (decision.format, decision.rule) == (None, "vae")


def test_a_text_encoder_follows_its_architecture() -> None:
    """A text encoder whose architecture has rules of its own gets them."""
    config = {"architectures": ["Gemma4ForConditionalGeneration"]}
    assert component_policy("text_encoder", config).name == "gemma4"


def test_rules_of_the_user_match_names_with_the_component(store: Store) -> None:
    """`--tensor` sees the names that `plan` shows, in every component."""
    overrides = tuple(map(parse_override, ("transformer/*.to_k.weight=int8", "vae/*to_q*=keep")))
    found = {t.name: t for t in plan(PIPELINE, quantize="int4", options=Options(overrides)).tensors}
    assert found[f"transformer/{TO_K}"].reason == "int8 by --tensor transformer/*.to_k.weight"
    assert found[f"transformer/{TO_K.replace('to_k', 'to_q')}"].rule == "requested"


def test_a_rule_that_fits_no_component_is_refused() -> None:
    """A pattern without the component's name fits nothing, and the hint shows one that would."""
    options = Options((parse_override(f"{TO_K}=int8"),))
    with pytest.raises(QuantmillError, match="fits no tensor") as caught:
        plan(PIPELINE, quantize="int4", options=options)
    assert "*" in str(caught.value.hint)


# -- opened, shown, written ------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [None, "int4", "nvfp4", "mxfp8"])
def test_each_component_opens_and_decodes(store: Store, fmt: str | None) -> None:
    """Opened alone, a component has its own names, config and files, and every weight decodes."""
    create("m", PIPELINE, store=store, quantize=fmt)
    for component, file in WEIGHTS.items():
        with (
            open_model("m", component=component, store=store) as model,
            open_model(PIPELINE, component=component) as original,
        ):
            assert list(model) == sorted(header(PIPELINE / component / file).entries)
            assert model.config == original.config
            assert model.files == ("config.json",)
            assert model.read_file("config.json") == original.read_file("config.json")
            for name in model:
                assert model.shape(name) == original.shape(name)
                if model.params(name) is None:
                    assert np.array_equal(model.decode(name), original.decode(name))
                else:
                    error = np.abs(as_floats(model, name) - as_floats(original, name)).max()
                    assert error < 0.3 * np.abs(as_floats(original, name)).max()


def as_floats(model: Any, name: str) -> Any:
    import mlx.core as mx

    return np.array(model.dequantize(name).astype(mx.float32))


def test_the_whole_model_opens_under_prefixed_names(store: Store) -> None:
    """Without a component, every weight has its component before its name."""
    create("m", PIPELINE, store=store, quantize="int8")
    with open_model("m", store=store) as model:
        assert len(model) == 187
        assert f"transformer/{TO_K}" in model
        assert model.params(f"transformer/{TO_K}") is not None


def test_an_unknown_component_is_named(store: Store) -> None:
    """A component that the model does not have is an error."""
    create("m", PIPELINE, store=store)
    with pytest.raises(NotFound, match="no component 'unet'"):
        open_model("m", component="unet", store=store)


def test_a_component_may_be_called_draft(store: Store, pipeline: Path) -> None:
    """A model without a draft model may have a component of that name."""
    (pipeline / "vae").rename(pipeline / "draft")
    change_index(pipeline, vae=None, draft=["diffusers", "AutoencoderKL"])
    create("m", pipeline, store=store)
    with open_model("m", component="draft", store=store) as model:
        assert "decoder.conv_in.weight" in model


def test_an_export_is_a_diffusers_directory_again(store: Store, tmp_path: Path) -> None:
    """Written as `hf`, an unquantized import gives what it was made from, and imports the same."""
    made = create("m", PIPELINE, store=store)
    with open_model("m", store=store) as model:
        written = export(model, tmp_path / "out", "hf")
    assert written.tensors == 187
    assert set(written.shards) == {f"{c}/{f}" for c, f in WEIGHTS.items()}
    for path in PIPELINE.rglob("*.json"):
        again = tmp_path / "out" / path.relative_to(PIPELINE)
        assert json.loads(again.read_text()) == json.loads(path.read_text())
        assert path.name == "model_index.json" or again.read_bytes() == path.read_bytes()
    assert create("again", tmp_path / "out", store=store).digest == made.digest


def test_a_quantized_model_is_exported_decoded(store: Store, tmp_path: Path) -> None:
    """Every component is written decoded, in shards with an index where one is not enough."""
    create("m", PIPELINE, store=store, quantize="int4")
    with open_model("m", store=store) as model:
        export(model, tmp_path / "out", "hf", shard_bytes=1 << 19)
        decoded = model.decode(f"transformer/{TO_K}")
    folder = tmp_path / "out" / "transformer"
    assert (folder / "diffusion_pytorch_model.safetensors.index.json").exists()
    with open_model(tmp_path / "out", component="transformer") as again:
        assert np.array_equal(again.decode(TO_K), decoded)
    assert plan(tmp_path / "out").source_bytes == plan(PIPELINE).source_bytes


def test_mlx_lm_has_no_layout_for_pipelines(store: Store, tmp_path: Path) -> None:
    """The whole model is refused there with the way out; its text encoder alone is written."""
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (quantmill[run])")
    create("m", PIPELINE, store=store, quantize="int4")
    with (
        open_model("m", store=store) as model,
        pytest.raises(BadPlan, match="text_encoder, transformer, vae") as caught,
    ):
        export(model, tmp_path / "out", "mlx-lm")
    assert "--to hf" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()
    arguments = ["export", "m", str(tmp_path / "out"), "--component", "text_encoder"]
    assert run([*arguments, "--store", str(store.root)]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_component_that_leads_out_is_not_written(store: Store, tmp_path: Path) -> None:
    """A manifest with `../` before a tensor's name cannot write outside of the directory."""
    create("m", PIPELINE, store=store)
    manifest = store.get_manifest(parse_name("m"))
    raw = manifest.raw.replace(b'"vae/', b'"../')
    store.put_manifest(parse_name("bad"), raw)
    with open_model("bad", store=store) as model, pytest.raises(Corrupt, match="leads out"):
        export(model, tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()


# -- other shapes of directories -------------------------------------------------------------------


def test_any_number_of_components_of_any_name(store: Store, pipeline: Path) -> None:
    """A second text encoder and a unet are components like the others."""
    shutil.copytree(pipeline / "text_encoder", pipeline / "text_encoder_2")
    (pipeline / "transformer").rename(pipeline / "unet")
    change_index(
        pipeline, transformer=None, unet=["diffusers", "U"], text_encoder_2=["transformers", "T"]
    )
    made = create("m", pipeline, store=store, quantize="int8")
    order = list(dict.fromkeys(t.name.partition("/")[0] for t in made.plan.tensors))
    assert order == ["text_encoder", "text_encoder_2", "unet", "vae"]
    assert f"unet/{TO_K}" in {t.name for t in made.plan.tensors}


def quantized_text_encoder(folder: Path) -> Path:
    """Put a model that mlx-lm quantized in the text encoder's place."""
    shutil.rmtree(folder / "text_encoder")
    source = fixture("mlx-affine-4bit-gs64")
    shutil.copytree(source, folder / "text_encoder")
    return source


def test_a_component_may_be_quantized_already(store: Store, pipeline: Path) -> None:
    """Each component is what it is: one is copied as codes while the others stay floats."""
    source = quantized_text_encoder(pipeline)
    made = create("m", pipeline, store=store)
    assert made.plan.kind == "prequantized, float"
    with (
        open_model("m", component="text_encoder", store=store) as model,
        open_model(source) as original,
    ):
        assert list(model) == list(original)
        for name in model:
            assert np.array_equal(as_floats(model, name), as_floats(original, name))
    with open_model("m", component="transformer", store=store) as model:
        assert model.quantization == ""
    assert show(store, "m").info["quantization"] == "INT4"
    assert not verify(store).damage


def test_requantize_reaches_every_component(store: Store, pipeline: Path) -> None:
    """Decoding and quantizing again treats all components as floats, the vae kept as always."""
    quantized_text_encoder(pipeline)
    create("m", pipeline, store=store, requantize="int8")
    for component, expected in (("text_encoder", "int8"), ("transformer", "int8"), ("vae", "")):
        with open_model("m", component=component, store=store) as model:
            assert model.quantization == expected


def test_an_entry_without_a_class_is_no_component(store: Store, pipeline: Path) -> None:
    """`[null, null]`, flags and numbers in model_index.json list nothing."""
    change_index(pipeline, safety_checker=[None, None], requires_safety_checker=True, ratio=0.5)
    create("m", pipeline, store=store)
    assert {n for n, _ in show(store, "m").files} == {
        n for n, _ in show(store, create("o", PIPELINE, store=store).name).files
    }


def test_a_tokenizer_is_not_a_component(store: Store, pipeline: Path) -> None:
    """A folder whose class has no weights may hold a config and files that are not read."""
    (pipeline / "tokenizer" / "config.json").write_text("{}")
    (pipeline / "tokenizer" / "training_args.bin").write_bytes(b"x")
    made = create("m", pipeline, store=store)
    assert {f.name for f in made.plan.files if not f.media_type} == {"tokenizer/training_args.bin"}


def test_what_is_not_listed_is_left_out_by_name(pipeline: Path) -> None:
    """Folders that the index does not list, and files beside it, are named in the plan."""
    shutil.copytree(pipeline / "vae", pipeline / "old_vae")
    (pipeline / "README.md").write_text("#")
    (pipeline / "flux.safetensors").write_bytes(b"one file for other programs")
    left_out = {f.name: f.reason for f in plan(pipeline).files if not f.media_type}
    assert left_out.keys() == {"old_vae/", "README.md", "flux.safetensors"}
    assert left_out["old_vae/"] == "not listed in model_index.json"


def test_shards_with_an_index(store: Store, pipeline: Path) -> None:
    """A component may be sharded under diffusers' names; the model is the same."""
    folder = pipeline / "transformer"
    names = sorted(header(folder / WEIGHTS["transformer"]).entries)
    tensors = dict.fromkeys(names, ("BF16", (4, 64)))
    shards = {f"diffusion_pytorch_model-0000{i}-of-00002.safetensors": names[i - 1 :: 2]
              for i in (1, 2)}  # fmt: skip
    digests = []
    for indexed in (True, False):
        (folder / WEIGHTS["transformer"]).unlink(missing_ok=True)
        for shard, held in shards.items():
            write_tensor_file(folder / shard, {n: tensors[n] for n in held})
        index = folder / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {n: s for s, h in shards.items() for n in h}}))
        if not indexed:
            index.unlink()
        made = create("m", pipeline, store=store)
        assert "transformer/diffusion_pytorch_model.safetensors.index.json" not in {
            f.name for f in made.plan.files
        }
        digests.append(made.digest)
    assert digests[0] == digests[1]


def test_a_variant_beside_the_full_weights_is_left_out(store: Store, pipeline: Path) -> None:
    """The weights without a suffix are read; a variant and its index are left out by name."""
    folder = pipeline / "vae"
    shutil.copy(folder / WEIGHTS["vae"], folder / "diffusion_pytorch_model.fp16.safetensors")
    (folder / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text("{}")
    made = create("m", pipeline, store=store)
    left_out = {f.name for f in made.plan.files if not f.media_type}
    assert left_out == {
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors.index.fp16.json",
    }
    assert made.digest == create("o", PIPELINE, store=store).digest


def test_a_cached_snapshot_needs_no_option(tmp_path: Path) -> None:
    """In a download cache every file of every folder is a link to the cache's blobs."""
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "1234"
    (cache / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(p for p in PIPELINE.rglob("*") if p.is_file())):
        blob = cache / "blobs" / str(number)
        shutil.copy(path, blob)
        link = snapshot / path.relative_to(PIPELINE)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    assert len(plan(snapshot).tensors) == 187


# -- what is refused -------------------------------------------------------------------------------


def missing_folder(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def missing_scheduler(folder: Path) -> None:
    shutil.rmtree(folder / "scheduler")


def missing_weights(folder: Path) -> None:
    (folder / "vae" / WEIGHTS["vae"]).unlink()


def missing_config(folder: Path) -> None:
    (folder / "transformer" / "config.json").unlink()


def only_pickles(folder: Path) -> None:
    weights = folder / "vae" / WEIGHTS["vae"]
    weights.rename(weights.with_suffix(".bin"))


def two_variants(folder: Path) -> None:
    weights = folder / "vae" / WEIGHTS["vae"]
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    weights.rename(weights.with_name("diffusion_pytorch_model.non_ema.safetensors"))


def two_names(folder: Path) -> None:
    weights = folder / "vae" / WEIGHTS["vae"]
    shutil.copy(weights, weights.with_name("model.safetensors"))


def missing_shard(folder: Path) -> None:
    weights = folder / "vae" / WEIGHTS["vae"]
    weights.rename(weights.with_name("diffusion_pytorch_model-00001-of-00003.safetensors"))


def two_indexes(folder: Path) -> None:
    for name in ("model", "diffusion_pytorch_model"):
        (folder / "vae" / f"{name}.safetensors.index.json").write_text("{}")


def index_without_its_shard(folder: Path) -> None:
    index = folder / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))


def no_json(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")


def no_components(folder: Path) -> None:
    (folder / "model_index.json").write_text("{}")


def path_trick(name: str) -> Callable[[Path], None]:
    return lambda folder: change_index(folder, **{name: ["diffusers", "AutoencoderKL"]})


def link_outside(folder: Path) -> None:
    outside = folder.parent / "outside"
    (folder / "vae").rename(outside)
    (folder / "vae").symlink_to(outside)


def lying_shard(folder: Path) -> None:
    (folder / "vae" / WEIGHTS["vae"]).write_bytes(b"\xff" * 64)


def broken_side_file(folder: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "kind", "said"),
    [
        (missing_folder, "missing_component", "vae"),
        (missing_scheduler, "missing_component", "scheduler"),
        (missing_weights, "no_weights", "vae"),
        (missing_config, "missing_config", "transformer"),
        (only_pickles, "pickled_weights", "diffusion_pytorch_model.bin"),
        (two_variants, "ambiguous_source", "diffusion_pytorch_model.non_ema.safetensors"),
        (two_names, "ambiguous_source", "vae: .*model.safetensors"),
        (missing_shard, "missing_shard", "vae: shard 2 of 3"),
        (two_indexes, "ambiguous_source", "vae: diffusion_pytorch_model.* and model"),
        (index_without_its_shard, "missing_shard", "vae: .*b.safetensors"),
        (no_json, "bad_index", "model_index.json"),
        (no_components, "no_weights", "model_index.json"),
        (path_trick("../vae"), "invalid_component", "'../vae'"),
        (path_trick(".."), "invalid_component", "'..'"),
        (path_trick("vae/x"), "invalid_component", "'vae/x'"),
        (path_trick("\0"), "invalid_component", "x00"),
        (path_trick("a" * 5000), "missing_component", "aaaa"),
        (link_outside, "link_outside", "vae: "),
        (lying_shard, "unreadable_shard", "vae: diffusion_pytorch_model.safetensors"),
        (broken_side_file, "bad_json", "scheduler/scheduler_config.json"),
    ],
)
def test_a_directory_that_is_wrong_is_refused(
    store: Store, pipeline: Path, damage: Callable[[Path], None], kind: str, said: str
) -> None:
    """One error names the component and the file, with a kind, and nothing is written."""
    damage(pipeline)
    with pytest.raises(BadSource, match=said) as caught:
        create("m", pipeline, store=store, quantize="int4")
    assert caught.value.kind == kind
    assert not store.list_names()


def test_a_quantized_component_is_not_quantized_again(pipeline: Path) -> None:
    """A format for a pipeline with quantized weights in it is refused; the component is named."""
    quantized_text_encoder(pipeline)
    with pytest.raises(BadPlan, match=r"^text_encoder: cannot requantize"):
        plan(pipeline, quantize="int8")


def test_a_bad_weight_is_named_with_its_component(store: Store, pipeline: Path) -> None:
    """NaN in a weight stops the run under the name that `--tensor` takes."""
    path = pipeline / "transformer" / WEIGHTS["transformer"]
    start = header(path).entries[TO_K].start
    data = bytearray(path.read_bytes())
    data[start : start + 2] = b"\xc0\x7f"
    path.write_bytes(data)
    with pytest.raises(BadWeights, match=f"transformer/{TO_K}"):
        create("m", pipeline, store=store, quantize="int4")
    assert not store.list_names()


def test_a_change_while_reading_is_noticed(store: Store, pipeline: Path) -> None:
    """A file of any component that is written to meanwhile stops the run."""
    path = pipeline / "vae" / WEIGHTS["vae"]
    with pytest.raises(BadSource, match=r"vae: .*changed") as caught:
        create("m", pipeline, store=store, progress=lambda _: path.touch())
    assert caught.value.kind == "source_changed"
    assert not store.list_names()


# -- documents -------------------------------------------------------------------------------------


def test_many_claimed_shards_cost_nothing() -> None:
    """A name that claims 99999 shards is an error at once."""
    with pytest.raises(BadSource, match="shard 2 of 99999"):
        choose_shards({"model-00001-of-99999.safetensors": 1})


def test_the_index_goes_there_and_back() -> None:
    """What is stored can be exported again, the version taken from a component."""
    index = {"_class_name": "P", "_diffusers_version": "1", "vae": ["diffusers", "V"]}
    stored = json.loads(stored_index(index, 5, parse_format("int4"), {}))
    assert exported_index(stored, {"vae": {"_diffusers_version": "1"}}) == index
