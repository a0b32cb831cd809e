"""`open_model`: stored models and directories, opened for use."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import FIXTURES, SMALL, fixture, load_arrays, write_checkpoint
from fakes import finished
from quantmill import kernels, mediatypes
from quantmill.creation import create
from quantmill.errors import BadName, BadRequest, BadSource, BadTensorFile, Corrupt, NotFound
from quantmill.formats import FORMAT_NAMES, Format, parse_format
from quantmill.load import open_model
from quantmill.manifest import BlobRef, manifest_bytes
from quantmill.model import Model
from quantmill.names import ModelName, parse_name
from quantmill.quantparams import BLOB, DEFAULT, MODEL_INDEX, OVERRIDE, SHAPES
from quantmill.store import Store
from quantmill.tensorfile import lay_out

Arrays = Mapping[str, mx.array]
Layer = tuple[str, Arrays, Mapping[str, str]]

Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
TAGS = {mx.uint32: "U32", mx.uint8: "U8", mx.float32: "F32", mx.float16: "F16",
        mx.bfloat16: "BF16", mx.bool_: "BOOL", mx.int64: "I64"}  # fmt: skip


def raw(array: mx.array) -> bytes:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array).tobytes()


def tensor_file(arrays: Arrays, metadata: Mapping[str, str] | None = None) -> bytes:
    header, _ = lay_out([(n, TAGS[a.dtype], a.shape) for n, a in arrays.items()], metadata or {})
    return header + b"".join(raw(a) for a in arrays.values())


def ref(store: Store, name: str, data: bytes, media_type: str = mediatypes.TENSOR) -> BlobRef:
    pending = finished(store, data)
    store.commit([pending])
    return BlobRef(media_type, pending.digest, pending.size, name)


def publish(store: Store, refs: Sequence[BlobRef], name: str = "m") -> ModelName:
    config = ref(store, "", b"{}", mediatypes.CONFIG)
    store.put_manifest(parse_name(name), manifest_bytes(config, refs))
    return parse_name(name)


def put(
    store: Store,
    layers: Sequence[Layer | tuple[str, Arrays]],
    files: Mapping[str, Any] | None = None,
) -> ModelName:
    """A model of these layers (name, tensors, metadata) and JSON files."""
    refs = [ref(store, layer[0], tensor_file(*layer[1:])) for layer in layers]
    for name, document in (files or {}).items():
        refs.append(ref(store, name, json.dumps(document).encode(), mediatypes.JSON))
    return publish(store, refs)


def folder(
    path: Path, files: Mapping[str, Arrays], config: Mapping[str, Any] | None = None
) -> Path:
    """A directory of tensor files."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {}))
    for name, arrays in files.items():
        (path / f"{name}.safetensors").write_bytes(tensor_file(arrays))
    return path


def dense(*shape: int, seed: int = 0, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    values = np.random.default_rng(seed).normal(0, 0.05, shape).astype(np.float32)
    return mx.array(values).astype(dtype)


def codes(fmt: Format | str, weight: mx.array) -> list[mx.array]:
    """Codes, scales and, for affine formats, biases: MLX's own, on the CPU."""
    fmt = parse_format(fmt) if isinstance(fmt, str) else fmt
    with mx.stream(mx.cpu):
        return list(mx.quantize(weight, fmt.group_size, fmt.bits, mode=fmt.mode))


def decoded(fmt: Format | str, parts: Sequence[mx.array]) -> mx.array:
    fmt = parse_format(fmt) if isinstance(fmt, str) else fmt
    with mx.stream(mx.cpu):
        return mx.dequantize(
            parts[0],
            parts[1],
            parts[2] if len(parts) > 2 else None,
            group_size=fmt.group_size,
            bits=fmt.bits,
            mode=fmt.mode,
        )


SINGULAR = ("", ".scale", ".bias")
LEGACY = ("", "_scale", "_qbias")


def spelled(name: str, parts: Sequence[mx.array], endings: Sequence[str] = SINGULAR) -> Arrays:
    return {f"{name}{end}": part for end, part in zip(endings, parts, strict=False)}


def plural(module: str, parts: Sequence[mx.array]) -> Arrays:
    return spelled(module, parts, (".weight", ".scales", ".biases"))


def same(found: mx.array, expected: mx.array) -> bool:
    """Whether dtype, shape and every bit agree."""
    kind = (found.dtype, found.shape) == (expected.dtype, expected.shape)
    return kind and raw(found) == raw(expected)


def content(model: Model) -> dict[str, Any]:
    """All that an open model holds, comparable."""
    found = {}
    for name in model:
        params, weight = model.params(name), model.dequantize(name)
        found[name] = (params, model.shape(name), model.dtype(name), str(weight.dtype), raw(weight))
    return found


INT4 = codes("int4", dense(8, 128))
INT4_META = {"quant_type": "int4", "group_size": "64"}


# -- directories -----------------------------------------------------------------------------------

READ = sorted(p.name for p in FIXTURES.iterdir() if p.name.startswith(("mlx-", "hf2q-")))


def test_every_quantized_fixture_is_read() -> None:
    """Eleven directories of mlx-lm and one of mlx-native: a lost one must fail."""
    assert len(READ) == 12


@pytest.mark.parametrize("name", READ)
def test_directories_decode_to_what_their_producer_means(name: str) -> None:
    """Every expected weight is decoded bit for bit as mlx-lm and mlx-native decode it."""
    expected = load_arrays(FIXTURES / name / "expected.safetensors")
    with open_model(fixture(name)) as model:
        assert [n for n, a in expected.items() if not same(model.dequantize(n), a)] == []


@pytest.mark.parametrize("name", READ)
def test_packed_weights_of_directories_are_known_as_such(name: str) -> None:
    """The weights with parameters are just those whose codes are U32."""
    with open_model(fixture(name)) as model:
        assert [n for n in model if model.params(n)] == [
            n for n in model if model.dtype(n) == "U32"
        ]


@pytest.mark.parametrize("name", READ)
def test_no_tensor_of_a_directory_is_lost(name: str) -> None:
    """Weights and their companions together are the tensors in the files."""
    with open_model(fixture(name)) as model:
        found = sum(
            sum(a is not None for a in (p.weight, p.scales, p.biases, p.global_scale))
            for p in map(model.parts, model)
        )
    assert found == len(load_arrays(fixture(name) / "model.safetensors"))


@pytest.mark.parametrize(
    ("renamed", "original"),
    [
        ("mlx-dot-child-affine4", "mlx-affine-4bit-gs64"),
        ("mlx-mixed-naming-orphans", "mlx-qwen3_5-moe-nvfp4"),
    ],
)
def test_other_spellings_give_the_same_weights(renamed: str, original: str) -> None:
    """Renamed companions change neither names nor parameters nor values."""
    with open_model(fixture(renamed)) as one, open_model(fixture(original)) as other:
        assert content(one) == content(other)


# -- stored models ---------------------------------------------------------------------------------

GOLDEN = sorted(
    p.name
    for p in FIXTURES.iterdir()
    if p.name.startswith("hf-") and not (p / "expected.safetensors").exists()
)
QUANTIZE = [None, "int4", "int8", "mxfp4", "mxfp8", "nvfp4"]


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("golden"))


def source_weights(name: str, wanted: Sequence[str]) -> dict[str, mx.array]:
    """The weights of a checkpoint under the names they are stored as: single experts stacked."""
    found: dict[str, mx.array] = {}
    for path in fixture(name).glob("*.safetensors"):
        found |= load_arrays(path)
    for stack in set(wanted) - found.keys():
        group, projection = stack.split(".experts.")
        members = [n for n in found if n.startswith(f"{group}.experts.") and n.endswith(projection)]
        one = [found.pop(f"{group}.experts.{i}.{projection}") for i in range(len(members))]
        found[stack] = mx.stack(one)
    return found


@pytest.mark.parametrize("quantize", QUANTIZE)
@pytest.mark.parametrize("name", GOLDEN)
def test_a_stored_model_gives_back_its_source(
    golden: Store, name: str, quantize: str | None
) -> None:
    """Names and shapes are the source's, and every weight is what MLX makes of the source's."""
    made = create(f"m:{name}-{quantize}", fixture(name), store=golden, quantize=quantize)
    with open_model(made.name, store=golden) as model:
        source = source_weights(name, list(model))
        assert list(model) == sorted(source)
        assert {n: model.shape(n) for n in model} == {n: a.shape for n, a in source.items()}
        for tensor, weight in source.items():
            params = model.params(tensor)
            expected = weight
            if params is not None:
                assert params.source == BLOB
                expected = decoded(params.format, codes(params.format, weight))
            assert same(model.dequantize(tensor), expected), tensor


@pytest.mark.parametrize("quantize", FORMAT_NAMES)
def test_every_format_that_is_written_is_read(golden: Store, quantize: str) -> None:
    """What `create` records about a weight is what the model says about it."""
    made = create(f"all:{quantize}", fixture("hf-llama-bf16"), store=golden, quantize=quantize)
    planned = {t.name: t.format for blob in made.plan.blobs for t in blob.tensors}
    with open_model(made.name, store=golden) as model:
        found = {n: model.params(n) for n in model}
    assert {n: p.format if p else None for n, p in found.items()} == planned


# -- looking around --------------------------------------------------------------------------------


@pytest.fixture
def small(store: Store) -> Model:
    """One quantized weight, and plain ones of several kinds."""
    layers: list[Layer | tuple[str, Arrays]] = [
        ("z.weight", {"z.weight": dense(4, 32, dtype=mx.float32)}),
        (Q, spelled(Q, INT4), INT4_META),
        ("e.weight", spelled("e.weight", codes("mxfp8", dense(4, 64))), {"quant_type": "mxfp8"}),
        (NORM, {NORM: dense(128)}),
        ("h.weight", {"h.weight": dense(4, 4, dtype=mx.float16)}),
        ("empty.weight", {"empty.weight": mx.zeros((0, 8))}),
        ("steps", {"steps": mx.array([1, 2, 3], mx.int64)}),
    ]
    files = {"config.json": {"model_type": "llama"}, "tokenizer.json": {"a": 1}}
    return open_model(put(store, layers, files), store=store)


PLAIN = [NORM, "z.weight", "h.weight", "steps", "empty.weight"]


def test_names_are_sorted_and_companions_are_none(small: Model) -> None:
    """Iterating gives every weight once, in order, and nothing else."""
    assert list(small) == sorted([*PLAIN, Q, "e.weight"])


def test_membership_and_length_are_those_of_the_names(small: Model) -> None:
    """A companion's name is no member."""
    assert (Q in small, f"{Q}.scale" in small, 7 in small, len(small)) == (True, False, False, 7)


def test_shapes_are_logical_and_dtypes_stored(small: Model) -> None:
    """A packed weight has the shape of the weight it stands for, and the dtype of its words."""
    assert (small.shape(Q), small.dtype(Q), small.scale_dtype(Q)) == ((8, 128), "U32", "BF16")


def test_the_model_has_the_format_of_most_bytes(small: Model) -> None:
    """Of two formats the one with more bytes of codes names the model."""
    assert (small.quantization, small.group_size) == ("int4", 64)


def test_a_plain_model_has_no_format(store: Store) -> None:
    """Without scales the quantization is the empty text and the group size 0."""
    with open_model(put(store, [(NORM, {NORM: dense(8)})]), store=store) as model:
        assert (model.format, model.quantization, model.group_size) == (None, "", 0)


def test_get_of_a_missing_name_is_none(small: Model) -> None:
    """`get` answers None where indexing raises."""
    assert small.get("no.such.weight") is None


@pytest.mark.parametrize(
    "ask",
    [Model.__getitem__, Model.parts, Model.dequantize, Model.view, Model.shape, Model.dtype,
     Model.scale_dtype, Model.params],
)  # fmt: skip
def test_a_missing_tensor_is_named(small: Model, ask: Any) -> None:
    """Every question about a tensor that is not there names it, and the model."""
    with pytest.raises(NotFound, match=r"m:latest has no tensor 'no\.such'") as caught:
        ask(small, "no.such")
    assert caught.value.kind == "tensor_not_found"


def test_a_plain_tensor_has_no_scale_dtype(small: Model) -> None:
    """Asking for the scales of what has none names the tensor."""
    with pytest.raises(NotFound, match=r"'model\.norm\.weight' has no scales"):
        small.scale_dtype(NORM)


def test_files_are_listed_and_read(small: Model) -> None:
    """Files beside the weights are there by name, and config.json as a value."""
    found = (small.files, json.loads(small.read_file("tokenizer.json")), small.config)
    assert found == (("config.json", "tokenizer.json"), {"a": 1}, {"model_type": "llama"})


@pytest.mark.parametrize("name", ["vocab.txt", "../config.json", Q])
def test_a_missing_file_is_named(small: Model, name: str) -> None:
    """A file that is not there, and a path that leads elsewhere, are errors with the name."""
    with pytest.raises(NotFound, match="has no file") as caught:
        small.read_file(name)
    assert repr(name) in caught.value.message


# -- arrays ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PLAIN, Q, "e.weight"])
def test_views_are_the_stored_bytes(small: Model, name: str) -> None:
    """A view holds the bytes and the stored shape of the array."""
    assert small.view(name).shape == small[name].shape
    assert small.view(name).tobytes() == raw(small[name])


@pytest.mark.parametrize(
    ("name", "kind"), [(NORM, "<u2"), (Q, "<u4"), ("z.weight", "<f4"), ("h.weight", "<f2")]
)
def test_views_have_the_stored_dtype(small: Model, name: str, kind: str) -> None:
    """NumPy's own type where it has one; BF16 as 16-bit words."""
    assert small.view(name).dtype == np.dtype(kind)


def test_views_cannot_be_written(small: Model) -> None:
    """A view is read-only: the store's bytes must not change."""
    assert not small.view(NORM).flags.writeable


def test_views_copy_nothing(small: Model) -> None:
    """Two views of a tensor are the same memory."""
    assert np.shares_memory(small.view(Q), small.view(Q))


def test_load_gives_every_weight(small: Model) -> None:
    """Without a dtype, all weights come as they are stored."""
    found = small.load()
    assert list(found) == list(small)
    assert all(same(found[name], small[name]) for name in found)


def test_load_converts_plain_floats_only(small: Model) -> None:
    """Plain floats take the dtype; codes and integers keep theirs."""
    found = {name: array.dtype for name, array in small.load(mx.float16).items()}
    packed = {Q: mx.uint32, "e.weight": mx.uint32, "steps": mx.int64}
    assert found == dict.fromkeys(small, mx.float16) | packed


def test_load_leaves_scales_as_they_are(small: Model) -> None:
    """Converting plain floats does not change what a quantized weight decodes to."""
    small.load(mx.float32)
    assert small.parts(Q).scales.dtype == mx.bfloat16  # type: ignore[union-attr]


def test_dequantize_gives_plain_tensors_as_they_are(small: Model) -> None:
    """A plain tensor comes with its stored dtype."""
    assert same(small.dequantize("h.weight"), dense(4, 4, dtype=mx.float16))


@pytest.mark.parametrize("kernels_there", [True, False], ids=["kernels", "mlx"])
@pytest.mark.parametrize(
    "folder", ["mlx-f16-affine-4bit-gs32", "mlx-nvfp4", "mlx-mxfp8", "mlx-qwen3-moe-4bit"]
)
def test_decoding_by_kernels_is_decoding_by_mlx(
    folder: str, kernels_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`decode` and `dequantize` give MLX's values, by the kernels and without them."""
    with open_model(fixture(folder)) as model:
        name = next(n for n in model if model.params(n) is not None)
        expected = model.dequantize_lazily(name)
        if not kernels_there:
            monkeypatch.setattr(kernels, "in_use", lambda: kernels.MLX)
        assert same(model.dequantize(name), expected)
        bits = expected.view(mx.uint16) if expected.dtype == mx.bfloat16 else expected
        decoded = model.decode(name)
        assert decoded.tobytes() == np.asarray(bits).tobytes()
        assert decoded.shape == expected.shape
        assert model.decode(name, 1).tobytes() == decoded[1].tobytes()


@pytest.mark.parametrize("name", [Q, NORM])
@pytest.mark.parametrize("index", [0, 3, -1])
def test_one_row_equals_that_row_of_the_whole(small: Model, name: str, index: int) -> None:
    """`index` gives one element of the first axis, of packed weights too."""
    assert same(small.dequantize(name, index), small.dequantize(name)[index])


@pytest.mark.parametrize("index", [8, -9])
def test_an_index_beyond_the_end_is_refused(small: Model, index: int) -> None:
    """An index outside the first axis is an error, never memory beyond it."""
    with pytest.raises(IndexError, match="8"):
        small.dequantize(Q, index)


def test_one_expert_of_a_stack(store: Store) -> None:
    """`index` gives one expert of a packed stack."""
    name = "model.layers.0.mlp.experts.up_proj.weight"
    parts = codes("nvfp4", dense(3, 8, 64))
    layer = ("model.layers.0.mlp.experts", spelled(name, parts), {"quant_type": "nvfp4"})
    with open_model(put(store, [layer]), store=store) as model:
        assert same(model.dequantize(name, 1), decoded("nvfp4", [p[1] for p in parts]))


# -- global scales ---------------------------------------------------------------------------------

NVFP4 = codes("nvfp4", dense(8, 64))


@pytest.mark.parametrize(
    "scale",
    [mx.array(0.37), mx.array([0.37]), mx.array([[0.37]]), mx.linspace(0.1, 2, 8),
     mx.linspace(0.1, 2, 8)[:, None]],
    ids=["scalar", "one", "one by one", "per row", "column"],
)  # fmt: skip
def test_global_scales_multiply_rows(store: Store, scale: mx.array) -> None:
    """One number multiplies everything and one for each row its row, rounded to BF16 once."""
    arrays = {**spelled(Q, NVFP4), f"{Q}.global_scale": scale}
    expected = decoded("nvfp4", NVFP4).astype(mx.float32) * scale.reshape(-1, 1)
    with open_model(put(store, [(Q, arrays)]), store=store) as model:
        assert same(model.dequantize(Q), expected.astype(mx.bfloat16))
        assert same(model.dequantize(Q, 5), expected[5].astype(mx.bfloat16))


def test_global_scales_multiply_experts(store: Store) -> None:
    """One number for each expert multiplies that expert, alone and in the stack."""
    name, scale = "model.layers.0.mlp.switch_mlp.up_proj.weight", mx.array([0.5, 0.37])
    parts = codes("nvfp4", dense(2, 8, 64))
    arrays = {**spelled(name, parts), f"{name}.global_scale": scale}
    expected = decoded("nvfp4", parts).astype(mx.float32) * scale[:, None, None]
    with open_model(put(store, [(name, arrays)]), store=store) as model:
        assert same(model.dequantize(name), expected.astype(mx.bfloat16))
        assert same(model.dequantize(name, 1), expected[1].astype(mx.bfloat16))


@pytest.mark.parametrize(("ending", "factor"), [("_scale_2", 0.25), ("_global_scale", 4.0)])
def test_global_scales_of_other_producers(tmp_path: Path, ending: str, factor: float) -> None:
    """ModelOpt's second scale multiplies; the one of compressed-tensors divides."""
    arrays = {**spelled(Q, NVFP4), f"{Q}{ending}": mx.array(factor)}
    with open_model(folder(tmp_path / "d", {"model": arrays})) as model:
        assert same(model.dequantize(Q), decoded("nvfp4", NVFP4) * 0.25)


# -- release and laziness --------------------------------------------------------------------------


@pytest.mark.parametrize("ask", [Model.__getitem__, Model.parts, Model.view, Model.dequantize])
def test_released_models_give_no_arrays(small: Model, ask: Any) -> None:
    """After release the error says so, for arrays already read as well."""
    small.load()
    small.release()
    with pytest.raises(BadRequest, match="m:latest was released"):
        ask(small, Q)


def test_released_models_still_answer_from_headers(small: Model) -> None:
    """Names, shapes and parameters outlive the arrays."""
    before = (list(small), small.shape(Q), small.params(Q), small.config)
    small.release()
    assert (list(small), small.shape(Q), small.params(Q), small.config) == before


def test_a_held_view_outlives_its_model(small: Model) -> None:
    """Releasing the model does not take the memory from under a view."""
    view = small.view(Q)
    small.release()
    assert view.tobytes() == raw(INT4[0])


def test_held_arrays_outlive_their_model(small: Model) -> None:
    """An array that was not read yet is read after release all the same."""
    array = small[Q]
    small.release()
    assert same(array, INT4[0])


def test_leaving_the_context_releases(small: Model) -> None:
    """The end of a `with` block is a release."""
    with small as entered:
        assert entered is small
    with pytest.raises(BadRequest):
        small[Q]


@contextmanager
def few_files() -> Iterator[None]:
    """At most 128 open files inside this block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_released_models_hold_no_file_open(store: Store) -> None:
    """Models that were used and released do not count against the limit of open files."""
    name = put(store, [(NORM, {NORM: dense(8), "other": dense(8)})])
    with few_files():
        released = [open_model(name, store=store) for _ in range(200)]
        for model in released:
            model.view(NORM)
            model[NORM]
            model.release()
    assert all(list(model) == [NORM, "other"] for model in released)


class Loads:
    """Counts `mx.load` by path."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: list[str] = []
        self._load = mx.load
        monkeypatch.setattr(mx, "load", self)

    def __call__(self, path: str, **options: Any) -> Any:
        self.paths.append(path)
        return self._load(path, **options)


@pytest.fixture
def many(store: Store) -> ModelName:
    """Three hundred blobs."""
    names = [f"model.layers.{i}.norm.weight" for i in range(300)]
    return put(store, [(n, {n: mx.full((8,), float(i))}) for i, n in enumerate(names)])


def test_opening_reads_headers_only(
    store: Store, many: ModelName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening 300 blobs and asking for names, shapes and views hands none to MLX."""
    loads = Loads(monkeypatch)
    with open_model(many, store=store) as model:
        assert [model.shape(name) for name in model] == [(8,)] * 300
    assert loads.paths == []


def test_each_blob_is_loaded_once(
    store: Store, many: ModelName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Using every tensor twice loads each blob once."""
    with open_model(many, store=store) as model:
        loads = Loads(monkeypatch)
        model.load()
        model.load()
    assert len(loads.paths) == len(set(loads.paths)) == 300


def test_only_used_blobs_are_loaded(small: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight and its companions cost one load of their blob."""
    loads = Loads(monkeypatch)
    small.parts(Q)
    assert len(loads.paths) == 1


def test_the_limit_of_open_files_is_respected(store: Store, many: ModelName) -> None:
    """Hundreds of blobs do not hold hundreds of files open, be they evaluated or not."""
    with few_files(), open_model(many, store=store) as model:
        found = [model[name] for name in model]
        mx.eval(found)
    assert sorted(int(a[0]) for a in found) == list(range(300))


# -- components ------------------------------------------------------------------------------------

Y = "transformer/y.weight"


def parts_model(
    store: Store, *, prefixed: bool = True, files: Mapping[str, Any] | None = None
) -> ModelName:
    """A model of three components; the keys in its blobs repeat the component or do not."""
    own = "" if prefixed else "transformer/"
    layers: list[Layer] = [
        ("text_encoder/n.weight", {"text_encoder/n.weight": dense(4, seed=1)}, {}),
        (Y, spelled(Y.removeprefix(own), INT4), INT4_META),
        ("transformer/n.weight", {"transformer/n.weight".removeprefix(own): dense(8, seed=2)}, {}),
        ("vae/z", {"vae/z": dense(2, 2, seed=3)}, {}),
    ]
    return put(store, layers, files)


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_component_is_opened_without_its_prefix(store: Store, prefixed: bool) -> None:
    """Only the component's weights are there, under names without the prefix."""
    name = parts_model(store, prefixed=prefixed)
    with open_model(name, component="transformer", store=store) as model:
        assert list(model) == ["n.weight", "y.weight"]
        assert same(model.dequantize("y.weight"), decoded("int4", INT4))


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_whole_model_keeps_its_prefixes(store: Store, prefixed: bool) -> None:
    """Opened whole, every weight keeps its component's prefix, whatever the blobs call it."""
    with open_model(parts_model(store, prefixed=prefixed), store=store) as model:
        assert list(model) == ["text_encoder/n.weight", "transformer/n.weight", Y, "vae/z"]


def test_a_component_called_like_the_start_of_another(store: Store) -> None:
    """A component is a whole folder name, not the beginning of one."""
    layers = [("vae/z", {"vae/z": dense(2)}), ("vae2/z", {"vae2/z": dense(3)})]
    with open_model(put(store, layers), component="vae", store=store) as model:
        assert model.shape("z") == (2,)


@pytest.mark.parametrize("component", ["unet", "text", "transformer/y"])
def test_an_unknown_component_is_named(store: Store, component: str) -> None:
    """A component that is not there is an error with its name."""
    with pytest.raises(NotFound, match=f"no component '{component}'") as caught:
        open_model(parts_model(store), component=component, store=store)
    assert caught.value.kind == "no_component"


def test_a_component_has_its_own_config(store: Store) -> None:
    """The config of a component is the one in its folder."""
    files = {"transformer/config.json": {"a": 1}, "config.json": {"a": 2}}
    name = parts_model(store, files=files)
    with open_model(name, component="transformer", store=store) as model:
        assert model.config == {"a": 1}


def test_keys_about_single_tensors_count_in_components(store: Store) -> None:
    """What a component's blob says about a tensor is found under the stripped name."""
    affine = codes(Format("affine", 4, 64), dense(8, 128))  # fits int8 g32 too
    said = {f"{Y}.quant_type": "int4", f"{Y}.group_size": "64"}
    name = put(store, [("transformer/y", spelled(Y, affine), said)])
    with open_model(name, component="transformer", store=store) as model:
        assert model.params("y.weight").source == BLOB  # type: ignore[union-attr]


@pytest.mark.parametrize("component", [None, "transformer"])
def test_the_model_index_says_the_quantization(store: Store, component: str | None) -> None:
    """The quantization in model_index.json decides between what shapes leave open."""
    index = {"quantization": "INT4", "group_size": 64}
    name = put(store, [(Y, spelled(Y, INT4))], {"model_index.json": index})
    with open_model(name, component=component, store=store) as model:
        (params,) = map(model.params, model)
    assert params is not None
    assert (params.format, params.source) == (parse_format("int4"), MODEL_INDEX)


def test_component_folders_of_a_directory(tmp_path: Path) -> None:
    """A folder of a directory is a component, and the directory's model index counts there."""
    weights = {"model": spelled("y.weight", INT4)}
    folder(tmp_path / "d" / "transformer", weights, {"model_type": "t"})
    (tmp_path / "d" / "model_index.json").write_text('{"quantization": "INT4"}')
    with open_model(tmp_path / "d", component="transformer") as model:
        params = model.params("y.weight")
        assert params is not None
        assert (model.config, params.source) == ({"model_type": "t"}, MODEL_INDEX)


def test_an_unknown_component_folder_is_named(tmp_path: Path) -> None:
    """A folder that is not there is no component."""
    with pytest.raises(NotFound, match="no component 'vae'"):
        open_model(folder(tmp_path / "d", {"model": {NORM: dense(4)}}), component="vae")


# -- generations of blobs --------------------------------------------------------------------------


def test_the_oldest_blobs_are_named_by_their_layers(store: Store) -> None:
    """Three blobs with the key `data` make one weight with its scale and bias."""
    fmt = Format("affine", 5, 64)  # the shapes fit nothing else
    parts = codes(fmt, dense(8, 128))
    layers = [(f"{Q}{end}", {"data": p}) for end, p in zip(LEGACY, parts, strict=True)]
    with open_model(put(store, layers), store=store) as model:
        assert list(model) == [Q]
        assert same(model.dequantize(Q), decoded(fmt, parts))


def test_equal_blobs_serve_several_old_layers(store: Store) -> None:
    """Layers of one content share a blob and keep their names."""
    layers = [(f"model.layers.{i}.norm.weight", {"data": dense(16)}) for i in range(2)]
    with open_model(put(store, layers), store=store) as model:
        assert len(store.list_blobs()) == 2  # the other one is the config
        assert all(same(model[name], dense(16)) for name, _ in layers)


def test_old_layers_of_a_component_lose_its_prefix(store: Store) -> None:
    """A `data` blob is named by its layer without the component."""
    name = put(store, [("vae/conv.weight", {"data": dense(4)})])
    with open_model(name, component="vae", store=store) as model:
        assert list(model) == ["conv.weight"]


def test_shapes_decide_where_nothing_is_recorded(store: Store) -> None:
    """Combined blobs without metadata are read where only one format fits."""
    with open_model(put(store, [(Q, spelled(Q, NVFP4))]), store=store) as model:
        params = model.params(Q)
    assert params is not None
    assert (params.format.name, params.source) == ("nvfp4", SHAPES)


def test_the_config_decides_where_shapes_do_not(store: Store) -> None:
    """Combined blobs without metadata take the config's default."""
    files = {"config.json": {"quantization": {"bits": 4, "group_size": 64}}}
    with open_model(put(store, [(Q, spelled(Q, INT4))], files), store=store) as model:
        params = model.params(Q)
    assert params is not None
    assert (params.format.bits, params.source) == (4, DEFAULT)


def test_an_entry_of_the_config_beats_the_blob(store: Store) -> None:
    """Where both fit, the config's entry for a module counts more than the blob's metadata."""
    entry = {"bits": 8, "group_size": 32}
    files = {"config.json": {"quantization": {**entry, Q.removesuffix(".weight"): entry}}}
    with open_model(put(store, [(Q, spelled(Q, INT4), INT4_META)], files), store=store) as model:
        params = model.params(Q)
    assert params is not None
    assert (params.format, params.source) == (Format("affine", 8, 32), OVERRIDE)


def test_a_side_file_of_parameters_is_read(store: Store) -> None:
    """quantization_config.json among the entries decides as it does in a directory."""
    own = {"bits": 4, "group_size": 64, "per_tensor": {Q: {"bits": 8, "group_size": 32}}}
    files = {"quantization_config.json": own}
    with open_model(put(store, [(Q, spelled(Q, INT4))], files), store=store) as model:
        assert model.params(Q).format == Format("affine", 8, 32)  # type: ignore[union-attr]


def test_packed_blobs_hold_several_weights(store: Store) -> None:
    """All projections of an expert stack come out of one blob, each with its companions."""
    group = "model.layers.0.mlp.switch_mlp"
    arrays = {p: codes("mxfp4", dense(2, 8, 64, seed=i)) for i, p in enumerate(("down", "up"))}
    held = {k: a for p, parts in arrays.items() for k, a in spelled(f"{group}.{p}", parts).items()}
    name = put(store, [(group, held, {"quant_type": "mxfp4", "group_size": "32"})])
    with open_model(name, store=store) as model:
        assert list(model) == [f"{group}.down", f"{group}.up"]
        assert same(model.dequantize(f"{group}.up"), decoded("mxfp4", arrays["up"]))


def test_keys_about_single_tensors_beat_the_blob(store: Store) -> None:
    """In a blob of two formats each weight has its own."""
    eight = codes("int8", dense(4, 128))
    held = {**spelled("g.down.weight", eight), **spelled("g.up.weight", INT4)}
    said = {"g.down.weight.quant_type": "int8", "g.down.weight.group_size": "64", **INT4_META}
    with open_model(put(store, [("g", held, said)]), store=store) as model:
        found = [model.params(name).format.name for name in model]  # type: ignore[union-attr]
    assert found == ["int8", "int4"]


def test_companions_may_lie_in_other_blobs(store: Store) -> None:
    """A scale is found whichever blob holds it, and the codes' blob says what it is."""
    arrays = dict(plural("m", INT4))
    layers: list[Layer] = [("m.weight", {"m.weight": arrays.pop("m.weight")}, INT4_META)]
    name = put(store, [*layers, ("m.rest", arrays)])
    with open_model(name, store=store) as model:
        assert same(model.dequantize("m.weight"), decoded("int4", INT4))


# -- order -----------------------------------------------------------------------------------------


def test_the_order_of_manifest_entries_does_not_matter(store: Store) -> None:
    """Every order of the entries opens the same model, also where a scale is spelled twice."""
    arrays = {**plural("m", INT4), "m.weight.scale": INT4[1]}
    refs = [ref(store, n, tensor_file({n: a})) for n, a in arrays.items()]
    config = json.dumps({"quantization": {"bits": 4, "group_size": 64}}).encode()
    refs.append(ref(store, "config.json", config, mediatypes.JSON))
    found = [content(open_model(publish(store, o), store=store)) for o in permutations(refs)]
    assert all(one == found[0] for one in found)


@given(st.data())
def test_the_spread_over_files_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """However tensors are spread over files, and in whatever order, the model is the same."""
    arrays = {**plural("a", INT4), **spelled("b.weight", NVFP4), NORM: dense(8), "a.bias": dense(8)}
    config = {"quantization": {"bits": 4, "group_size": 64, "b": {"mode": "nvfp4"}}}
    where = data.draw(st.permutations(sorted(arrays)))
    cut = data.draw(st.lists(st.integers(0, len(where)), max_size=3).map(sorted))
    pieces = [where[a:b] for a, b in zip([0, *cut], [*cut, len(where)], strict=True)]
    files = {f"model-{i}": {n: arrays[n] for n in piece} for i, piece in enumerate(pieces)}
    root = tmp_path_factory.mktemp("spread")
    one = open_model(folder(root / "one", {"model": arrays}, config))
    several = open_model(folder(root / "several", files, config))
    assert content(several) == content(one)
    shutil.rmtree(root)


# -- what is wrong ---------------------------------------------------------------------------------


def blob_of(store: Store, name: str) -> Path:
    manifest = store.get_manifest(parse_name("m"))
    return store.blob_path(next(r for r in manifest.blobs if r.name == name).digest)


def test_a_missing_blob_is_named(store: Store) -> None:
    """A blob that is gone is told with the model, its digest and its entry."""
    name = put(store, [(NORM, {NORM: dense(8)})])
    path = blob_of(store, NORM)
    path.unlink()
    with pytest.raises(NotFound, match=r"m:latest: blob .*\(model\.norm\.weight\)") as caught:
        open_model(name, store=store)
    assert (caught.value.kind, path.name[7:19] in caught.value.message) == ("blob_missing", True)


@pytest.mark.parametrize("size", [0, 7, 40, -1])
def test_a_truncated_blob_is_named(store: Store, size: int) -> None:
    """A blob that ends early, in its header or its data, is refused with the entry's name."""
    name = put(store, [(NORM, {NORM: dense(8)})])
    path = blob_of(store, NORM)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(Corrupt, match=r"model\.norm\.weight"):
        open_model(name, store=store)


@pytest.fixture
def flipped(store: Store) -> ModelName:
    """A model with one bit of data flipped."""
    name = put(store, [(NORM, {NORM: dense(8)})])
    path = blob_of(store, NORM)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return name


def test_verify_notices_a_wrong_digest(store: Store, flipped: ModelName) -> None:
    """With `verify` a flipped bit is told with the entry's name."""
    with pytest.raises(Corrupt, match=r"\(model\.norm\.weight\) is damaged"):
        open_model(flipped, store=store, verify=True)


def test_digests_are_not_recomputed_unasked(store: Store, flipped: ModelName) -> None:
    """Without `verify` nothing but headers is read."""
    assert list(open_model(flipped, store=store)) == [NORM]


def test_verify_accepts_what_is_whole(store: Store) -> None:
    """With `verify` an undamaged model opens."""
    name = put(store, [(NORM, {NORM: dense(8)})])
    assert list(open_model(name, store=store, verify=True)) == [NORM]


LIES = {
    "shape": b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}',
    "range": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',
    "overlap": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
    "dtype": b'{"a":{"dtype":"F7","shape":[2],"data_offsets":[0,8]}}',
    "twice": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "overflow": b'{"a":{"dtype":"F32","shape":[9223372036854775807,2],"data_offsets":[0,8]}}',
}


@pytest.mark.parametrize("header", LIES.values(), ids=LIES.keys())
def test_a_lying_header_is_refused(store: Store, header: bytes) -> None:
    """A stored header that does not describe its bytes is an error with the entry's name."""
    data = len(header).to_bytes(8, "little") + header + bytes(8)
    name = publish(store, [ref(store, "the.entry", data)])
    with pytest.raises(Corrupt, match=r"the\.entry"):
        open_model(name, store=store)


@pytest.mark.parametrize("header", LIES.values(), ids=LIES.keys())
def test_a_lying_header_in_a_directory_is_refused(tmp_path: Path, header: bytes) -> None:
    """A header in a directory that does not describe its bytes is an error with the file's name."""
    data = len(header).to_bytes(8, "little") + header + bytes(8)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(BadTensorFile, match=r"model\.safetensors"):
        open_model(tmp_path)


def test_one_name_in_two_blobs_is_refused(store: Store) -> None:
    """Which of two tensors of one name is meant is not guessed."""
    name = put(store, [("a", {NORM: dense(8)}), ("b", {NORM: dense(9)})])
    with pytest.raises(Corrupt, match=r"two blobs hold a tensor called 'model\.norm\.weight'"):
        open_model(name, store=store)


def test_one_blob_listed_twice_is_one(store: Store) -> None:
    """An entry that stands in the manifest twice gives its tensors once."""
    entry = ref(store, NORM, tensor_file({NORM: dense(8)}))
    assert list(open_model(publish(store, [entry, entry]), store=store)) == [NORM]


def test_one_name_in_two_files_is_refused(tmp_path: Path) -> None:
    """A directory with two tensors of one name is refused, both files named."""
    path = folder(tmp_path / "d", {"a": {NORM: dense(8)}, "b": {NORM: dense(8)}})
    with pytest.raises(BadSource, match=r"in a\.safetensors and in b\.safetensors"):
        open_model(path)


@pytest.mark.parametrize(
    ("orphan", "weight"),
    [("m.weight.scale", "m.weight"), ("m.scales", "m.weight"), ("m.weight_scale_2", "m.weight")],
)
def test_a_companion_without_its_weight_is_refused(store: Store, orphan: str, weight: str) -> None:
    """The error names the companion and the weight that is not there."""
    name = put(store, [("a", {orphan: dense(8, 2), NORM: dense(8)})])
    with pytest.raises(Corrupt) as caught:
        open_model(name, store=store)
    assert repr(orphan) in caught.value.message
    assert repr(weight) in caught.value.message
    assert caught.value.kind == "orphaned_companion"


def test_a_global_scale_without_a_scale_is_refused(store: Store) -> None:
    """A global scale of a weight that has no scales is an error with both names."""
    name = put(store, [(Q, {Q: dense(8, 64), f"{Q}.global_scale": mx.array(1.0)})])
    with pytest.raises(Corrupt, match=rf"global scale '{Q}\.global_scale' has no scale"):
        open_model(name, store=store)


def test_codes_without_scales_are_refused(store: Store) -> None:
    """Packed codes are never taken for a plain tensor of integers."""
    with pytest.raises(Corrupt, match=r"q_proj\.weight' holds packed codes") as caught:
        open_model(put(store, [(Q, {Q: INT4[0]})]), store=store)
    assert caught.value.kind == "missing_scales"


def test_metadata_that_the_shapes_refute_is_refused(store: Store) -> None:
    """Blob metadata that cannot be true is an error with model, tensor and both readings."""
    name = put(store, [(Q, spelled(Q, INT4), {"quant_type": "int8", "group_size": "64"})])
    with pytest.raises(Corrupt, match="blob metadata says int8 g64") as caught:
        open_model(name, store=store)
    assert caught.value.message.startswith("m:latest: tensor 'model.layers.0.self_attn")


def test_an_unknown_type_is_refused(store: Store) -> None:
    """A recorded type that nothing is known about is told, not ignored."""
    with pytest.raises(Corrupt, match="'q5_k' is unknown"):
        open_model(put(store, [(Q, spelled(Q, INT4), {"quant_type": "q5_k"})]), store=store)


def test_ambiguous_parameters_are_refused(store: Store) -> None:
    """Where nobody says what the shapes leave open, the tensor and the candidates are named."""
    with pytest.raises(Corrupt, match=r"m:latest: .*q_proj.*int4 g64, int8 g32") as caught:
        open_model(put(store, [(Q, spelled(Q, INT4))]), store=store)
    assert caught.value.kind == "ambiguous_parameters"


def test_a_companion_spelled_twice_alike_is_no_conflict(store: Store) -> None:
    """Two spellings with one content are silent."""
    arrays = {**plural("m", NVFP4), "m.weight.scale": NVFP4[1]}
    assert open_model(put(store, [("m.weight", arrays)]), store=store).conflicts == ()


def test_a_companion_spelled_twice_unlike_is_told(store: Store) -> None:
    """Of two contents the singular spelling's is used; a warning and `conflicts` name both."""
    arrays = {**plural("m", NVFP4), "m.weight.scale": NVFP4[1] ^ 1}
    with pytest.warns(UserWarning, match=r"'m\.scales' is ignored, 'm\.weight\.scale'"):
        model = open_model(put(store, [("m.weight", arrays)]), store=store)
    assert len(model.conflicts) == 1
    assert same(model.dequantize("m.weight"), decoded("nvfp4", [NVFP4[0], NVFP4[1] ^ 1]))


def test_a_missing_side_file_blob_is_told(store: Store) -> None:
    """A config.json whose blob is gone is an error at opening, not an empty config."""
    name = put(store, [(NORM, {NORM: dense(8)})], {"config.json": {"a": 1}})
    blob_of(store, "config.json").unlink()
    with pytest.raises(NotFound):
        open_model(name, store=store)


@pytest.mark.parametrize("file", ["config.json", "quantization_config.json", "model_index.json"])
def test_a_side_file_that_is_not_json_is_named(store: Store, file: str) -> None:
    """A broken file that may say parameters stops the opening."""
    refs = [ref(store, NORM, tensor_file({NORM: dense(8)}))]
    name = publish(store, [*refs, ref(store, file, b"{", mediatypes.JSON)])
    with pytest.raises(Corrupt, match=file.replace(".", r"\.")):
        open_model(name, store=store)


def test_a_model_without_tensors_is_refused(store: Store) -> None:
    """A manifest without tensor entries, such as a GGUF model's, is told."""
    with pytest.raises(NotFound, match="m:latest has no tensor blobs"):
        open_model(put(store, [], {"config.json": {}}), store=store)


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "a/../b.weight", "a\n", "data "])
def test_names_that_look_like_paths_are_names(store: Store, name: str) -> None:
    """A tensor may be called anything; its name never leads to a file."""
    with open_model(put(store, [(name, {name: dense(4)})]), store=store) as model:
        assert list(model) == [name]
        assert same(model[name], dense(4))


# -- names and directories -------------------------------------------------------------------------


def test_a_stored_name_comes_before_a_directory(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text that is both a model and a directory is the model; a Path is the directory."""
    put(store, [(NORM, {NORM: dense(8)})])
    folder(tmp_path / "m", {"model": {"other": dense(4)}})
    monkeypatch.chdir(tmp_path)
    found = [list(open_model(source, store=store)) for source in ("m", Path("m"))]
    assert found == [[NORM], ["other"]]


@pytest.mark.parametrize("form", [str, Path])
def test_a_directory_is_opened_by_its_path(store: Store, tmp_path: Path, form: Any) -> None:
    """A path that is no model's name opens the directory."""
    path = folder(tmp_path / "d", {"anything": {NORM: dense(8)}})
    assert list(open_model(form(path), store=store)) == [NORM]


def test_config_is_not_needed_in_a_directory(tmp_path: Path) -> None:
    """A directory of tensor files alone opens."""
    (tmp_path / "x.safetensors").write_bytes(tensor_file({NORM: dense(8)}))
    with open_model(tmp_path) as model:
        assert (list(model), model.config) == ([NORM], {})


def test_files_of_a_directory_are_read(tmp_path: Path) -> None:
    """Side files of a directory are listed and read by name."""
    path = write_checkpoint(tmp_path, {NORM: ("BF16", (8,))}, tokenizer__json='{"a": 1}')
    with open_model(path) as model:
        assert model.read_file("tokenizer.json") == b'{"a": 1}'


def test_text_that_is_neither_is_not_found(store: Store) -> None:
    """A valid name that is no model and no directory is not found, and named."""
    with pytest.raises(NotFound, match="no-such-model"):
        open_model("no-such-model", store=store)


def test_a_path_that_is_no_directory_is_not_found(store: Store, tmp_path: Path) -> None:
    """A Path that leads to nothing is not found, and named."""
    with pytest.raises(NotFound, match="no such directory"):
        open_model(tmp_path / "nothing", store=store)


@pytest.mark.parametrize("text", ["", "a\0b", "x" * 5000, "./a b/", "\ud800"])
def test_text_that_can_be_neither_is_a_bad_name(store: Store, text: str) -> None:
    """Text that no model can be called and that names no directory is refused as a name."""
    with pytest.raises(BadName):
        open_model(text, store=store)


def test_nothing_is_written(store: Store) -> None:
    """Opening and reading leaves every file of the store as it was."""
    name = put(store, [(Q, spelled(Q, INT4), INT4_META)], {"config.json": {}})

    def state() -> dict[str, str]:
        files = sorted(p for p in store.root.rglob("*") if p.is_file())
        return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    before = state()
    with open_model(name, store=store, verify=True) as model:
        model.load()
        model.view(Q)
    assert state() == before


def test_a_draft_model_is_a_component(store: Store, tmp_path: Path) -> None:
    """`draft` opens the tensors and the config of a model's draft model, prefixes stripped."""
    source = write_checkpoint(tmp_path / "c", SMALL)
    made = create("m", source, store=store)
    manifest = store.get_manifest(made.name)
    name = "model.layers.0.input_layernorm.weight"
    header, _ = lay_out([(f"draft.{name}", "BF16", (128,))], {})
    record = {"tensor_prefix": "draft.", "config": "draft/config.json"}
    added = [
        (mediatypes.TENSOR, f"draft.{name}", header + bytes(256)),
        (mediatypes.JSON, "draft/config.json", b'{"model_type": "tiny"}'),
        (mediatypes.CONFIG, None, json.dumps({"draft": record}).encode()),
    ]
    refs = []
    for media_type, entry, data in added:
        with store.new_blob() as writer:
            writer.write(data)
            pending = writer.finish()
        store.commit([pending])
        refs.append(BlobRef(media_type, pending.digest, pending.size, entry))
    store.put_manifest(parse_name("d"), manifest_bytes(refs[2], [*manifest.blobs, *refs[:2]]))
    draft = open_model("d", component="draft", store=store)
    assert list(draft) == [name]
    assert draft.config == {"model_type": "tiny"}


@pytest.mark.parametrize(
    ("dtype", "shape"), [("F16", (1,)), ("F32", (3,)), ("F32", (64, 4))], ids=str
)
def test_a_global_scale_that_does_not_fit_is_refused(
    tmp_path: Path, dtype: str, shape: tuple[int, ...]
) -> None:
    """A global scale is F32, and one number or one for each row; anything else is named."""
    tensors = {
        "l.weight": ("U32", (64, 8)),
        "l.weight.scale": ("U8", (64, 4)),
        "l.weight.global_scale": (dtype, shape),
    }
    with pytest.raises(Corrupt, match=r"l\.weight\.global_scale"):
        open_model(write_checkpoint(tmp_path / "m", tensors))


def test_a_blob_that_records_nothing_follows_the_others(store: Store, tmp_path: Path) -> None:
    """Where shapes leave two formats open, what other blobs of the model record decides."""
    source = write_checkpoint(
        tmp_path / "c",
        {f"model.layers.{i}.self_attn.q_proj.weight": ("BF16", (64, 128)) for i in range(2)},
    )
    made = create("m", source, store=store, quantize="int4")
    manifest = store.get_manifest(made.name)
    first, second = manifest.tensor_refs()
    file = store.blob_path(second.digest).read_bytes()
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    del header["__metadata__"]
    raw = json.dumps(header).encode()
    with store.new_blob() as writer:
        writer.write(len(raw).to_bytes(8, "little") + raw + file[8 + length :])
        pending = writer.finish()
    store.commit([pending])
    bare = BlobRef(second.media_type, pending.digest, pending.size, second.name)
    assert manifest.config is not None
    refs = [r for r in manifest.blobs if r not in {first, second}]
    store.put_manifest(parse_name("n"), manifest_bytes(manifest.config, [first, bare, *refs]))
    found = open_model("n", store=store).params(str(second.name))
    assert found is not None
    assert found.format.label == "int4"
