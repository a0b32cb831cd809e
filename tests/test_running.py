"""Stored models in mlx-lm: logits, generation, serving, and export to directories it opens."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from checkpoints import fixture, load_arrays
from quantmill import mlxlm
from quantmill.creation import create
from quantmill.errors import BadPlan, BadRequest, Corrupt, StoreError
from quantmill.export import export
from quantmill.formats import FORMAT_NAMES
from quantmill.generate import Chat, Message
from quantmill.load import open_model
from quantmill.model import Model
from quantmill.plans import Options
from quantmill.store import Store

mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (quantmill[run])")

from mlx_lm.utils import load_model, quantize_model, save_model  # noqa: E402

FIXTURES = [
    "hf-llama-bf16", "hf-llama-bf16-sharded", "hf-llama-f16", "hf-llama-f32",
    "hf-qwen3-tied-bf16", "hf-qwen3-moe-bf16", "hf-gemma3-bf16", "hf-qwen3_5-moe-bf16",
]  # fmt: skip
TOKENS = [1, 17, 80, 255, 3]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


def stored(store: Store, name: str, quantize: str | None, **options: Any) -> Model:
    made = create(
        f"{name.lower()}:{quantize or 'none'}", fixture(name), store=store, quantize=quantize,
        options=Options(**options),
    )  # fmt: skip
    return open_model(made.name, store=store)


def logits(module: nn.Module) -> mx.array:
    module.set_dtype(mx.float32)
    out = module(mx.array([TOKENS]))
    mx.eval(out)
    return out


def converted(model: Model, name: str, folder: Path) -> nn.Module:
    """What mlx-lm itself makes of the fixture with the same parameters for each layer."""
    dense = folder / "dense"
    dense.mkdir(parents=True)
    for path in fixture(name).iterdir():
        if path.name != "config.json":
            (dense / path.name).symlink_to(path)
    config = mlxlm.normalised(model.config)
    (dense / "config.json").write_text(json.dumps(config))
    module, config = load_model(dense)
    formats = mlxlm.named_for(model, mlxlm.empty_model(model)[0]).formats

    def chosen(path: str, _: nn.Module) -> bool | dict[str, Any]:
        fmt = formats.get(path)
        if fmt is None:
            return False
        return {"group_size": fmt.group_size, "bits": fmt.bits, "mode": fmt.mode}

    # a group size of 1 keeps mlx-lm from skipping modules that its default would not fit
    module, config = quantize_model(module, config, 1, 4, quant_predicate=chosen)
    target = folder / "quantized"
    save_model(target, module)
    (target / "config.json").write_text(json.dumps(config))
    again, _ = load_model(target)
    return again


# -- logits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", ["int4", "int8", "nvfp4", "mxfp4", "mxfp8", "affine-5"])
@pytest.mark.parametrize("name", FIXTURES)
def test_logits_are_those_of_mlx_lm(store: Store, tmp_path: Path, name: str, quantize: str) -> None:
    """The module built from stored weights computes what mlx-lm's own conversion computes."""
    model = stored(store, name, quantize)
    ours, _ = mlxlm.build(model)
    theirs = converted(model, name, tmp_path)
    assert mx.array_equal(logits(ours), logits(theirs))


@pytest.mark.parametrize("name", FIXTURES)
def test_unquantized_models_compute_what_their_source_does(
    store: Store, tmp_path: Path, name: str
) -> None:
    """Without a format the stored model is the source."""
    model = stored(store, name, None)
    ours, _ = mlxlm.build(model)
    dense = tmp_path / "dense"
    dense.mkdir()
    for path in fixture(name).iterdir():
        if path.name != "config.json":
            (dense / path.name).symlink_to(path)
    (dense / "config.json").write_text(json.dumps(mlxlm.normalised(model.config)))
    theirs, _ = load_model(dense)
    assert mx.array_equal(logits(ours), logits(theirs))


def test_quantized_layers_have_the_stored_parameters(store: Store) -> None:
    """Each layer is quantized as its blob says: mixed widths stay mixed."""
    module, _ = mlxlm.build(stored(store, "hf-llama-bf16", "int4"))
    attention = module.model.layers[0].self_attn
    assert (attention.q_proj.bits, attention.v_proj.bits) == (4, 8)
    assert isinstance(module.model.embed_tokens, nn.Embedding)


def test_a_global_scale_is_applied_when_running(store: Store) -> None:
    """nvfp4 with a global scale runs, and is nearer to the source than plain nvfp4 is off."""
    model = stored(store, "hf-llama-bf16", "nvfp4", global_scale=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    module, _ = mlxlm.build(model)
    weight = module.model.layers[0].self_attn.q_proj.weight
    assert mx.array_equal(weight, model.dequantize(name))


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("mlx-affine-4bit-gs64", None),
        ("mlx-dot-child-affine4", "mlx-affine-4bit-gs64"),
        ("mlx-mixed_4_6", None),
        ("mlx-mxfp4", None),
        ("mlx-nvfp4", None),
        ("mlx-qwen3-moe-4bit", None),
        ("mlx-qwen3_5-moe-nvfp4", None),
        ("mlx-mixed-naming-orphans", "mlx-qwen3_5-moe-nvfp4"),
    ],
)
def test_quantized_directories_compute_what_mlx_lm_computes(name: str, of: str | None) -> None:
    """A directory in whatever naming gives the logits of the one mlx-lm wrote."""
    ours, _ = mlxlm.build(open_model(fixture(name)))
    theirs, _ = load_model(fixture(of or name))
    assert mx.array_equal(logits(ours), logits(theirs))


def test_an_unknown_architecture_is_named(store: Store) -> None:
    """A model_type that mlx-lm does not have is an error that says so."""
    model = stored(store, "hf-llama-bf16", None)
    model.config = {**model.config, "model_type": "no_such_thing"}
    with pytest.raises(BadPlan, match="no_such_thing"):
        mlxlm.build(model)


def test_weights_that_are_missing_are_named(store: Store) -> None:
    """A config that wants more layers than there are is refused, with the names."""
    model = stored(store, "hf-llama-bf16", "int8")
    model.config = {**model.config, "num_hidden_layers": 3}
    with pytest.raises(Corrupt, match=r"model\.layers\.2"):
        mlxlm.build(model)


# -- export ----------------------------------------------------------------------------------------


def flat(module: nn.Module) -> dict[str, mx.array]:
    from mlx.utils import tree_flatten

    found: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    return found


@pytest.mark.parametrize("quantize", [None, *FORMAT_NAMES])
@pytest.mark.parametrize("name", ["hf-llama-bf16", "hf-qwen3-moe-bf16", "hf-qwen3_5-moe-bf16"])
def test_stock_mlx_lm_opens_what_is_exported(
    store: Store, tmp_path: Path, name: str, quantize: str | None
) -> None:
    """`mlx_lm.load` gives arrays equal to those of the module built from the store."""
    model = stored(store, name, quantize)
    export(model, tmp_path / "out", "mlx-lm")
    theirs, _ = load_model(tmp_path / "out")
    ours, _ = mlxlm.build(model)
    expected, found = flat(ours), flat(theirs)
    assert expected.keys() == found.keys()
    for key, array in expected.items():
        assert array.dtype == found[key].dtype
        assert mx.array_equal(array, found[key]), key


def test_exported_config_names_every_module(store: Store, tmp_path: Path) -> None:
    """Per-module entries carry all three parameters, and `false` where nothing is quantized."""
    model = stored(store, "hf-llama-bf16", "int4")
    export(model, tmp_path / "out", "mlx-lm")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    entry = config["quantization"]
    assert entry == config["quantization_config"]
    assert {k: entry[k] for k in ("group_size", "bits", "mode")} == {
        "group_size": 64, "bits": 4, "mode": "affine",
    }  # fmt: skip
    assert entry["model.embed_tokens"] is False
    assert entry["lm_head"] == {"group_size": 64, "bits": 8, "mode": "affine"}


def test_exports_are_sharded_with_an_index(store: Store, tmp_path: Path) -> None:
    """Shards stay below the limit, the index names each tensor's shard, totals are right."""
    model = stored(store, "hf-llama-bf16", "int8")
    done = export(model, tmp_path / "out", "mlx-lm", shard_bytes=100_000)
    assert len(done.shards) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = {name: shard for shard in done.shards for name in load_arrays(tmp_path / "out" / shard)}
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == done.nbytes
    weights = sum(int(np.prod(model.shape(name))) for name in model)
    assert index["metadata"]["total_parameters"] == weights
    theirs, _ = load_model(tmp_path / "out")
    assert mx.array_equal(logits(theirs), logits(mlxlm.build(model)[0]))


@pytest.mark.parametrize("name", ["hf-llama-bf16", "hf-qwen3-moe-bf16", "hf-qwen3_5-moe-bf16"])
def test_hf_export_has_the_source_names_decoded(store: Store, tmp_path: Path, name: str) -> None:
    """`--to hf` writes floats under the names of the source, experts one by one again."""
    model = stored(store, name, "int8")
    export(model, tmp_path / "out", "hf")
    source = load_arrays(fixture(name) / "model.safetensors")
    found = load_arrays(tmp_path / "out" / "model.safetensors")
    assert found.keys() == source.keys()
    for key, array in source.items():
        assert (found[key].shape, found[key].dtype) == (array.shape, array.dtype), key
        step = mx.max(mx.abs(array)).astype(mx.float32) / 50
        error = mx.abs(found[key].astype(mx.float32) - array.astype(mx.float32))
        assert mx.all(error <= step), key
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization" not in config


def test_a_directory_that_is_there_is_never_written_to(store: Store, tmp_path: Path) -> None:
    """An export into an existing directory is refused."""
    (tmp_path / "out").mkdir()
    with pytest.raises(BadRequest, match="there already"):
        export(stored(store, "hf-llama-bf16", None), tmp_path / "out", "hf")


def test_a_failed_export_leaves_nothing(store: Store, tmp_path: Path) -> None:
    """When a tensor cannot be read, no half directory remains."""
    model = stored(store, "hf-llama-f16", "int8")
    model.release()
    with pytest.raises(BadRequest):
        export(model, tmp_path / "out", "mlx-lm")
    assert list(tmp_path.iterdir()) == []


# -- generating ------------------------------------------------------------------------------------

USER: list[Message] = [{"role": "user", "content": "the cat"}]


def test_generation_is_mlx_lms(store: Store, tmp_path: Path) -> None:
    """The greedy answer is the one mlx-lm gives for the exported directory."""
    model = stored(store, "hf-llama-bf16", "int8")
    chat = Chat(model)
    text = "".join(p.text for p in chat.stream(USER, max_tokens=12))
    export(model, tmp_path / "out", "mlx-lm")
    module, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    module.set_dtype(mx.float32)
    assert text == mlx_lm.generate(module, tokenizer, "the cat", max_tokens=12)


def test_a_seed_makes_sampling_repeatable(store: Store) -> None:
    """The same seed gives the same tokens, another seed other ones."""
    chat = Chat(stored(store, "hf-llama-bf16", "int8"))

    def tokens(seed: int) -> list[int]:
        pieces = chat.stream(USER, max_tokens=16, temperature=1.0, seed=seed)
        return [p.token for p in pieces]

    assert tokens(7) == tokens(7) != tokens(8)


def quantmill(store: Store, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quantmill", *arguments, "--store", str(store.root)],
        input=stdin, capture_output=True, text=True, check=True,
    )  # fmt: skip


def test_run_prints_an_answer(store: Store) -> None:
    """`run NAME PROMPT` prints text; with --json also why it ended."""
    stored(store, "hf-llama-bf16", "int8")
    plain = quantmill(store, "run", "hf-llama-bf16:int8", "the cat", "--max-tokens", "5")
    answer = json.loads(
        quantmill(
            store, "run", "hf-llama-bf16:int8", "the cat", "--max-tokens", "5", "--json"
        ).stdout
    )
    assert plain.stdout.rstrip("\n") == answer["text"].rstrip("\n")
    assert (answer["finish_reason"], answer["generated_tokens"]) == ("length", 5)


def test_run_without_a_prompt_is_a_conversation(store: Store) -> None:
    """Each line that is typed gets an answer, until the input ends."""
    stored(store, "hf-llama-bf16", "int8")
    done = quantmill(store, "run", "hf-llama-bf16:int8", "--max-tokens", "3", stdin="one\ntwo\n")
    assert done.stdout.count("\n") >= 2


@pytest.fixture(scope="module")
def server(store: Store) -> Iterator[str]:
    stored(store, "hf-llama-bf16", "int8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    child = subprocess.Popen(
        [sys.executable, "-m", "quantmill", "serve", "hf-llama-bf16:int8",
         "--port", str(port), "--store", str(store.root)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert child.poll() is None
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        child.terminate()
        assert child.wait(timeout=30) == 0


def test_a_real_client_talks_to_the_server(server: str, store: Store) -> None:
    """The OpenAI client gets the greedy answer that `run` gives, whole and streamed."""
    from openai import OpenAI

    client = OpenAI(base_url=server, api_key="none", max_retries=0)
    request: dict[str, Any] = {"messages": USER, "max_tokens": 6, "temperature": 0}
    whole = client.chat.completions.create(model="hf-llama-bf16:int8", **request)
    parts = client.chat.completions.create(model="default_model", stream=True, **request)
    streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert whole.choices[0].message.content == streamed
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 6
    assert [m.id for m in client.models.list()] == ["hf-llama-bf16:int8"]


def test_the_server_serves_one_model_only(server: str) -> None:
    """A request for another model is refused; it cannot make the server fetch one."""
    from openai import NotFoundError, OpenAI

    client = OpenAI(base_url=server, api_key="none", max_retries=0)
    with pytest.raises(NotFoundError):
        client.chat.completions.create(model="org/other", messages=[], max_tokens=1)


# -- BLAS ------------------------------------------------------------------------------------------


def doctor(**environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "quantmill", "doctor", "--json"],
        env={**os.environ, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_doctor_says_what_is_in_use() -> None:
    """Versions, device and the library behind matrix products."""
    found = doctor()
    assert found["mlx"] == "0.32.4"
    assert "blas" in found
    assert re.match(r"Device\((cpu|gpu)", found["device"])


def test_a_preloaded_blas_can_be_switched_off() -> None:
    """QUANTMILL_BLAS=off leaves MLX its own."""
    assert doctor(QUANTMILL_BLAS="off")["blas"] == "MLX's own (QUANTMILL_BLAS is off)"


def test_a_blas_that_does_not_load_is_reported(tmp_path: Path) -> None:
    """A path that is no library is named, and MLX's own is used."""
    path = tmp_path / "libnothing.so"
    path.write_text("")
    assert str(path) in doctor(QUANTMILL_BLAS=str(path))["blas"]


def test_a_model_that_is_not_there_is_an_error(store: Store) -> None:
    """`run` of an unknown name is one line and exit code 1."""
    with pytest.raises(StoreError):
        open_model("absent", store=store)
