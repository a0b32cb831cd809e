"""The same checkpoint made by mlx-lm alone, as directories: what others get at the same size.

mixed_4_6   `mlx_lm.convert` with that recipe: 4 bits, 6 for some value and down projections
gptq        `mlx_lm.quant.gptq` with the windows that it is given; embedding rounded to 4 bits
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantmill.windows import Tokens


def mixed(checkpoint: Path, folder: Path, windows: Tokens) -> None:
    """mlx-lm's own mixture of 4 and 6 bits; needs no windows."""
    del windows
    from mlx_lm.convert import convert

    shutil.rmtree(folder, ignore_errors=True)
    convert(
        str(checkpoint), str(folder), quantize=True, q_group_size=64, quant_predicate="mixed_4_6"
    )


def gptq(checkpoint: Path, folder: Path, windows: Tokens) -> None:
    """Error feedback as mlx-lm does it, everything in 4 bits, groups of 64.

    In float32, as MLX emulates bf16 on a CPU; scales and biases are then stored in bf16.
    """
    import mlx.core as mx
    from mlx_lm.quant import gptq as theirs
    from mlx_lm.utils import load, save

    shutil.rmtree(folder, ignore_errors=True)
    loaded: Any = load(str(checkpoint), return_config=True)
    model, tokenizer, config = loaded
    model.set_dtype(mx.float32)
    quantize: Any = theirs.gptq_quantize
    model, config["quantization"] = quantize(
        model, mx.array(windows), 4, 64, fallback_bits=4, fallback_group_size=64, batch_size=2
    )
    model.set_dtype(mx.bfloat16)
    save(str(folder), str(checkpoint), model, tokenizer, config)


PEERS: dict[str, Callable[[Path, Path, Tokens], None]] = {"mixed_4_6": mixed, "gptq": gptq}
