"""`verify`: a good store is good, and each kind of damage is one finding that names who is hurt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from checkpoints import SMALL, write_checkpoint
from fakes import files, put, write_file
from quantmill import mediatypes
from quantmill.creation import create
from quantmill.digests import Digest, digest_of
from quantmill.errors import NotFound
from quantmill.manifest import BlobRef, Manifest, manifest_bytes
from quantmill.names import parse_name
from quantmill.store import Store
from quantmill.tensorfile import lay_out
from quantmill.verification import Damage, Verified, describe_ref, verify

NAME = parse_name("m")
QUANTIZED = "model.layers.0.mlp.down_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
HURT = ("m:latest",)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with the small model in int4 under the name `m`."""
    store = Store(tmp_path / "store")
    create(NAME, write_checkpoint(tmp_path / "source", SMALL), store=store, quantize="int4")
    return store


def manifest(store: Store) -> Manifest:
    return store.get_manifest(NAME)


def ref_of(store: Store, name: str) -> BlobRef:
    return next(ref for ref in manifest(store).blobs if ref.name == name)


def path_of(store: Store, name: str) -> Path:
    return store.blob_path(ref_of(store, name).digest)


def rewrite(store: Store, change: Callable[[dict[str, Any]], object]) -> None:
    """Put the manifest again after `change` edited its JSON."""
    document = json.loads(manifest(store).raw)
    change(document)
    store.put_manifest(NAME, json.dumps(document).encode())


def replace(store: Store, name: str, data: bytes) -> Digest:
    """Store other bytes for an entry, under their right digest and size; the old blob goes."""
    old = ref_of(store, name)
    (new,) = put(store, data)

    def change(document: dict[str, Any]) -> None:
        for entry in document["layers"]:
            if entry.get("name") == name:
                entry |= {"digest": str(new.digest), "size": new.size}

    rewrite(store, change)
    store.remove_blob(old.digest)
    return new.digest


def the_damage(store: Store) -> Damage:
    """The one finding of a store with one kind of damage."""
    (damage,) = verify(store).damage
    return damage


# -- good ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [None, "int4", "int8", "nvfp4", "mxfp4", "mxfp8", "affine-6"])
def test_what_create_writes_is_good(tmp_path: Path, quantize: str | None) -> None:
    """A fresh model verifies in every format, every blob and byte counted."""
    store = Store(tmp_path / "store")
    source = write_checkpoint(tmp_path / "source", SMALL)
    created = create("m", source, store=store, quantize=quantize)
    found = verify(store)
    assert found.damage == ()
    assert (found.models, found.nbytes) == (1, created.size)
    assert found.blobs == len(store.list_blobs())


def test_integer_tables_are_no_damage(tmp_path: Path) -> None:
    """A tensor of 32-bit integers that was kept is not taken for codes without scales."""
    store = Store(tmp_path / "store")
    tensors = SMALL | {"model.layers.0.table": ("U32", (4, 8))}
    create("m", write_checkpoint(tmp_path / "source", tensors), store=store, quantize="int4")
    assert verify(store).damage == ()


def test_an_empty_store_is_good(tmp_path: Path) -> None:
    """Nothing there is nothing damaged."""
    assert verify(Store(tmp_path / "absent")) == Verified(0, 0, 0, ())


def test_verifying_changes_nothing(store: Store) -> None:
    """Every file is as before, and there is no new one."""
    before = files(store)
    verify(store)
    assert files(store) == before


def test_a_shared_blob_is_read_once(store: Store) -> None:
    """A second name for the same blobs adds a model and not a byte."""
    alone = verify(store)
    store.put_manifest(parse_name("n"), manifest(store).raw)
    both = verify(store)
    assert (both.models, both.blobs, both.nbytes) == (2, alone.blobs, alone.nbytes)


def test_only_the_named_models_are_read(store: Store) -> None:
    """With names, damage elsewhere is not looked for."""
    put(store, b"loose")
    store.blob_path(digest_of(b"loose")).write_bytes(b"LOOSE")
    found = verify(store, [NAME])
    assert found.damage == ()
    assert found.blobs == len(store.list_blobs()) - 1


def test_a_missing_name_is_not_found(store: Store) -> None:
    """Asking for a model that is not there is an error, not damage."""
    with pytest.raises(NotFound, match="other:latest"):
        verify(store, [NAME, parse_name("other")])


def test_progress_reaches_the_total(store: Store) -> None:
    """Bytes done only grow, and end at the bytes in all."""
    seen: list[tuple[int, int]] = []
    found = verify(store, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {found.nbytes}
    assert seen[-1] == (found.nbytes, found.nbytes)


def quantized_arrays(name: str) -> dict[str, mx.array]:
    weights = mx.random.normal((128, 128), mx.bfloat16, key=mx.random.key(0))
    codes, scales, biases = mx.quantize(weights)
    return {name: codes, f"{name}.scale": scales, f"{name}.bias": biases}


def test_blobs_of_mlx_writer_are_good(store: Store, tmp_path: Path) -> None:
    """MLX's own file layout, unpadded and in another order, is the same content to us."""
    path = str(tmp_path / "blob.safetensors")
    metadata = {"quant_type": "int4", "group_size": "64"}
    mx.save_safetensors(path, quantized_arrays(QUANTIZED), metadata)
    replace(store, QUANTIZED, Path(path).read_bytes())
    assert verify(store).damage == ()
    (found,) = describe_ref(store, ref_of(store, QUANTIZED))
    assert found.format
    assert (found.format.label, found.shape) == ("int4", (128, 128))


def test_blobs_with_null_metadata_are_good(store: Store, tmp_path: Path) -> None:
    """MLX writes null where there is no metadata; a plain tensor needs none."""
    path = tmp_path / "blob.safetensors"
    mx.save_safetensors(str(path), {NORM: mx.zeros(128)})
    replace(store, NORM, path.read_bytes())
    assert b'"__metadata__":null' in path.read_bytes()
    assert verify(store).damage == ()


# -- blobs that are damaged ------------------------------------------------------------------------


def test_a_flipped_bit_is_found(store: Store) -> None:
    """Bytes that do not have their digest are named with what they hold instead."""
    path = path_of(store, QUANTIZED)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    damage = the_damage(store)
    assert (damage.kind, damage.models) == ("digest_mismatch", HURT)
    assert damage.digest == ref_of(store, QUANTIZED).digest
    assert QUANTIZED in damage.message
    assert digest_of(bytes(data)).short in damage.message


def test_a_truncated_blob_is_found(store: Store) -> None:
    """A blob that lost its end does not have its digest."""
    path = path_of(store, QUANTIZED)
    path.write_bytes(path.read_bytes()[:-1])
    damage = the_damage(store)
    assert (damage.kind, damage.models) == ("digest_mismatch", HURT)


def test_a_missing_blob_is_found(store: Store) -> None:
    """A blob that is gone is named by its entry."""
    path_of(store, QUANTIZED).unlink()
    damage = the_damage(store)
    assert (damage.kind, damage.models) == ("blob_missing", HURT)
    assert QUANTIZED in damage.message


def test_a_missing_config_is_found(store: Store) -> None:
    """The config blob is one of the model's blobs."""
    config = manifest(store).config
    assert config
    store.remove_blob(config.digest)
    damage = the_damage(store)
    assert (damage.kind, damage.digest, damage.models) == ("blob_missing", config.digest, HURT)


@pytest.mark.parametrize("linked", [False, True], ids=["folder", "link to a folder"])
def test_a_folder_in_place_of_a_blob_is_found(store: Store, tmp_path: Path, linked: bool) -> None:
    """A folder, or a link to one, is no blob."""
    path = path_of(store, QUANTIZED)
    path.unlink()
    if linked:
        path.symlink_to(tmp_path)
    else:
        path.mkdir()
    damage = the_damage(store)
    assert (damage.kind, damage.models) == ("corrupt", HURT)
    assert "not a regular file" in damage.message


def test_a_dangling_link_in_place_of_a_blob_is_found(store: Store, tmp_path: Path) -> None:
    """A link that leads nowhere is a missing blob."""
    path = path_of(store, QUANTIZED)
    path.unlink()
    path.symlink_to(tmp_path / "nowhere")
    assert the_damage(store).kind == "blob_missing"


def test_all_models_of_a_damaged_blob_are_named(store: Store) -> None:
    """Two models that share a damaged blob are both hurt, in one finding."""
    store.put_manifest(parse_name("n"), manifest(store).raw)
    path_of(store, QUANTIZED).write_bytes(b"")
    assert the_damage(store).models == ("m:latest", "n:latest")


def test_a_damaged_blob_that_no_model_uses_is_found(store: Store) -> None:
    """Damage of a loose blob is reported, with no model hurt."""
    (ref,) = put(store, b"loose")
    store.blob_path(ref.digest).write_bytes(b"LOOSE")
    damage = the_damage(store)
    assert (damage.kind, damage.digest, damage.models) == ("digest_mismatch", ref.digest, ())


def test_progress_reaches_the_total_of_a_damaged_store(store: Store, tmp_path: Path) -> None:
    """Missing blobs and folders in place of blobs count for nothing."""
    path_of(store, NORM).unlink()
    path = path_of(store, QUANTIZED)
    path.unlink()
    path.mkdir()
    seen: list[tuple[int, int]] = []
    verify(store, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0


# -- right digest, wrong content -------------------------------------------------------------------


def test_a_header_that_lies_is_found(store: Store) -> None:
    """A tensor file whose header claims more than the file has is damaged despite its digest."""
    data = path_of(store, NORM).read_bytes()
    digest = replace(store, NORM, data[:-2])
    damage = the_damage(store)
    assert (damage.kind, damage.digest, damage.models) == ("bad_tensor_file", digest, HURT)
    assert NORM in damage.message


def test_bytes_that_are_no_tensor_file_are_found(store: Store) -> None:
    """A tensor entry must hold a tensor file."""
    replace(store, NORM, b"not a tensor file")
    assert the_damage(store).kind == "bad_tensor_file"


def test_a_tensor_file_without_tensors_is_found(store: Store) -> None:
    """A header that lists nothing is no weight."""
    replace(store, NORM, lay_out([], {})[0])
    damage = the_damage(store)
    assert (damage.kind, damage.models) == ("bad_relation", HURT)
    assert "holds no tensor" in damage.message


def test_another_tensor_in_the_entry_is_found(store: Store) -> None:
    """The entry's name must be that of its tensor."""
    header, _ = lay_out([("other.weight", "BF16", (4,))], {})
    replace(store, NORM, header + bytes(8))
    damage = the_damage(store)
    assert damage.kind == "bad_relation"
    assert f"entry '{NORM}' holds tensor 'other.weight'" in damage.message


def quantized_parts(name: str) -> list[tuple[str, str, tuple[int, ...]]]:
    return [
        (name, "U32", (128, 16)),
        (f"{name}.scale", "BF16", (128, 2)),
        (f"{name}.bias", "BF16", (128, 2)),
    ]


@pytest.mark.parametrize(
    ("metadata", "count", "problem"),
    [
        ({"quant_type": "int4", "group_size": "32"}, 3, "int4 g32"),
        ({"quant_type": "int8", "group_size": "64"}, 3, "int8"),
        ({"quant_type": "nvfp4", "group_size": "16"}, 3, "nvfp4"),
        ({"quant_type": "int4", "group_size": "64"}, 2, "int4 needs biases"),
        ({"quant_type": "int4", "group_size": "64"}, 1, "packed codes without scales"),
    ],
)
def test_a_broken_relation_is_found(
    store: Store, metadata: dict[str, str], count: int, problem: str
) -> None:
    """Codes, scales, biases and the recorded format must fit each other."""
    parts = quantized_parts(QUANTIZED)[:count]
    header, entries = lay_out(parts, metadata)
    replace(store, QUANTIZED, header + bytes(sum(e.nbytes for e in entries.values())))
    damage = the_damage(store)
    assert (damage.kind, damage.models) == ("bad_relation", HURT)
    assert QUANTIZED in damage.message
    assert problem in damage.message


@pytest.mark.parametrize(
    ("groups", "damaged"), [(2, False), (3, True)], ids=["several formats", "no format"]
)
def test_shapes_without_a_type_are_damage_only_where_nothing_fits(
    store: Store, groups: int, damaged: bool
) -> None:
    """Early blobs record no type; that their shapes leave several formats open is no damage."""
    parts = [
        (QUANTIZED, "U32", (8, 16)),
        (f"{QUANTIZED}.scale", "BF16", (8, groups)),
        (f"{QUANTIZED}.bias", "BF16", (8, groups)),
    ]
    header, _ = lay_out(parts, {})
    replace(store, QUANTIZED, header + bytes(8 * 16 * 4 + 2 * 8 * groups * 2))
    assert [d.kind for d in verify(store).damage] == (["bad_relation"] if damaged else [])


@pytest.mark.parametrize("data", [b"{oops", b"\xff", b'{"a": 1, "a": 2}'])
def test_a_json_file_that_is_not_json_is_found(store: Store, data: bytes) -> None:
    """A JSON entry must hold JSON, each key once."""
    digest = replace(store, "config.json", data)
    damage = the_damage(store)
    assert (damage.kind, damage.digest, damage.models) == ("bad_json", digest, HURT)
    assert damage.message.startswith("config.json: ")


def test_constants_in_json_are_no_damage(store: Store) -> None:
    """NaN and Infinity, which published configs hold, are accepted."""
    replace(store, "config.json", b'{"a": NaN, "b": -Infinity}')
    assert verify(store).damage == ()


# -- manifests -------------------------------------------------------------------------------------


def change_size(document: dict[str, Any]) -> None:
    document["layers"][0]["size"] += 1


def test_a_wrong_size_in_the_manifest_is_found(store: Store) -> None:
    """The manifest and the file must agree about the size."""
    rewrite(store, change_size)
    damage = the_damage(store)
    assert (damage.kind, damage.models) == ("corrupt", HURT)
    ref = manifest(store).blobs[0]
    assert f"the manifest says {ref.size} bytes, the blob has {ref.size - 1}" in damage.message


def test_a_wrong_size_hurts_only_the_model_that_says_so(store: Store) -> None:
    """Another model with the right size for the same blob is not hurt."""
    store.put_manifest(parse_name("n"), manifest(store).raw)
    rewrite(store, change_size)
    assert the_damage(store).models == HURT


def test_a_manifest_without_config_is_found(store: Store) -> None:
    """Every model has a config."""
    config = manifest(store).config
    assert config
    rewrite(store, lambda document: document.pop("config"))
    store.remove_blob(config.digest)
    damage = the_damage(store)
    assert (damage.kind, damage.digest, damage.models) == ("bad_manifest", None, HURT)


def test_an_unreadable_manifest_is_found(store: Store) -> None:
    """A manifest that is not JSON is one finding, and other models are checked all the same."""
    store.put_manifest(parse_name("n"), manifest(store).raw)
    write_file(store.manifest_path(NAME), b"{oops")
    damage = the_damage(store)
    assert (damage.kind, damage.digest, damage.models) == ("bad_manifest", None, HURT)
    assert verify(store).models == 2


def test_findings_are_sorted_by_model(store: Store) -> None:
    """Findings about the same models stand together."""
    for name in ("b", "a"):
        config, entry = put(store, b"{}", name.encode())
        store.put_manifest(parse_name(name), manifest_bytes(config, [entry]))
        store.remove_blob(entry.digest)
    path_of(store, NORM).unlink()
    assert [d.models for d in verify(store).damage] == [("a:latest",), ("b:latest",), HURT]


def test_content_of_unknown_types_is_not_read(store: Store) -> None:
    """Of an entry with a media type of others only digest and size are checked."""
    config = manifest(store).config
    assert config
    (ref,) = put(store, b"GGUF")
    gguf = BlobRef(mediatypes.MODEL, ref.digest, ref.size)
    store.put_manifest(parse_name("gguf"), manifest_bytes(config, [gguf]))
    assert verify(store).damage == ()
