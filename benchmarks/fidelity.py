"""What each method loses at the same size: divergence from one reference, as docs/fidelity.md says.

SmolLM2-135M with permuted channels (permuted.py) is quantized, the tied embedding too, in several
formats by several methods; every result is compared with the BF16 weights on the same tokens
(textsets.py). The table gives figures, ratios to rounding with the standard error of differences
between the same windows, and the goals; bench-results/fidelity.json has all of it. With --auto
there are formats by measured effect as well, in the bytes of int4 and of mlx-lm's mixed_4_6, with
ratios to the mixture by the same method.

    python benchmarks/fidelity.py [--texts FOLDER] [--sets E1,E3] [--formats int4,nvfp4]
        [--methods rtn,search] [--windows 16] [--peers mixed_4_6,gptq] [--auto] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from peers import PEERS
from permuted import packaged, permute, write_plain
from results import keep
from textsets import LENGTH, TextSet, text_sets

from quantmill import blas
from quantmill.activations import Passes
from quantmill.creation import create
from quantmill.evaluation import Evaluation, Judge
from quantmill.formats import Format
from quantmill.planner import parse_override
from quantmill.plans import Options, Override
from quantmill.recipes import Target
from quantmill.reference import opened
from quantmill.rules import exactly
from quantmill.store import Store
from quantmill.windows import default_text, text_ids, text_of

RTN = "rtn"

FORMATS = ("int4", "nvfp4", "mxfp4", "affine-3", "int8")

MIXED, MIXED_HEAD = "mixed_4_6", "mixed_head"
"""mlx-lm's mixture as it writes it, a tied embedding in 4 bits; and with 6, as another head has."""

METHODS = {RTN: False, "search": False, "aware": False, "gptq": True}
"""Methods of `create`, and whether what they are calibrated with depends on the text measured."""

GOALS: dict[tuple[str, str], dict[str, float]] = {
    ("search", ""): {"int4": 0.75, "nvfp4": 0.70, "mxfp4": 0.92, "affine-3": 1.00, "int8": 0.58},
    ("aware", ""): {"int4": 0.40, "nvfp4": 0.47, "mxfp4": 0.60, "affine-3": 0.40, "int8": 0.43},
    ("gptq", ""): {"int4": 0.25, "nvfp4": 0.28, "mxfp4": 0.34, "affine-3": 0.25},
    ("gptq", "E2"): {"int4": 0.30, "nvfp4": 0.32, "mxfp4": 0.40},
    ("auto", ""): {"int4": 0.20, MIXED_HEAD: 0.70},
}
"""Ratios of divergence to that of rounding, by method and set; "" is any set without its own."""

_PEER_WINDOWS = 16


@dataclass(frozen=True, slots=True)
class Variant:
    """One model: a store's name or a directory, what it is, its size and how long it took.

    `nbytes` is that of its tensor blobs, of models in the store.
    """

    format: str
    method: str
    place: str
    bits_per_weight: float
    seconds: float
    nbytes: int | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """A variant judged on a set: the figures, and its divergence in each window."""

    set: str
    variant: Variant
    evaluation: Evaluation
    means: npt.NDArray[np.float64]


class Workshop:
    """Makes variants of one checkpoint, each once."""

    def __init__(self, checkpoint: Path, store: Store, work: Path) -> None:
        self._checkpoint, self._store, self._work = checkpoint, store, work
        self._made: dict[tuple[str, str, Path | None], Variant] = {}
        self._passes = Passes(products=True)

    def make(self, fmt: str, method: str, calibration: Path | None) -> Variant:
        """A model of a format; all matrices and the embedding are quantized, norms are not."""
        key = fmt, method, calibration
        if key not in self._made:
            rules = (f"*_proj.weight={fmt}", f"*embed_tokens.weight={fmt}")
            overrides = tuple(map(parse_override, rules))
            self._made[key] = self._created(fmt, method, fmt, overrides, calibration)
        return self._made[key]

    def mixture(self, label: str, folder: Path, method: str, calibration: Path | None) -> Variant:
        """The formats that a directory of mlx-lm's has for each of its weights, by our method."""
        said = json.loads((folder / "config.json").read_text())["quantization"]
        overrides = tuple(
            Override(exactly(f"{path}.weight"), Format("affine", own["bits"], own["group_size"]))
            for path, own in said.items()
            if isinstance(own, dict)
        )
        rest = map(parse_override, ("*_proj.weight=int4", "*embed_tokens.weight=int4"))
        head = [parse_override("*embed_tokens.weight=affine-6")] if label == MIXED_HEAD else []
        return self._created(label, method, "int4", (*rest, *overrides, *head), calibration)

    def fitted(self, beside: Variant, method: str, calibration: Path | None) -> Variant:
        """Formats by measured effect, in no more bytes than another variant has."""
        target = Target(nbytes=beside.nbytes)
        made = self._created(beside.format, method, "auto", (), calibration, target)
        return replace(made, method="auto")

    def _created(
        self,
        fmt: str,
        method: str,
        quantize: str,
        overrides: tuple[Override, ...],
        calibration: Path | None,
        target: Target | None = None,
    ) -> Variant:
        text = str(calibration) if calibration else None
        options = Options(overrides, method=method, calibration=text)
        name = f"{fmt}:{'auto-' if target else ''}{method}-{_stem(calibration)}"
        started = time.perf_counter()
        made = create(
            name, self._checkpoint, store=self._store, quantize=quantize, options=options,
            fit=target, passes=self._passes,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        size = made.plan.blob_bytes
        return Variant(fmt, method, name, made.plan.bits_per_weight, seconds, size)

    def peer(self, name: str, calibration: Path | None, tokenizer: Any) -> Variant:
        """A model that mlx-lm makes without us, given the windows that calibration begins with."""
        text = text_of(calibration) if calibration else default_text(calibrating=True)
        key = "int4", f"mlx-lm {name}", calibration
        if key not in self._made:
            folder = self._work / f"{name}-{_stem(calibration)}"
            windows = text_ids(tokenizer, text.text).windows(LENGTH, _PEER_WINDOWS)
            started = time.perf_counter()
            PEERS[name](self._checkpoint, folder, windows)
            seconds = time.perf_counter() - started
            bits = _bits_per_weight(folder, self._checkpoint)
            self._made[key] = Variant("int4", f"mlx-lm {name}", str(folder), bits, seconds)
        return self._made[key]


def _stem(calibration: Path | None) -> str:
    return calibration.stem if calibration else "documentation"


def _bits_per_weight(folder: Path, checkpoint: Path) -> float:
    """Stored bits for each weight of a BF16 checkpoint."""
    stored, whole = (
        sum(path.stat().st_size for path in place.glob("*.safetensors"))
        for place in (folder, checkpoint)
    )
    return 16 * stored / whole


def judged(judge: Judge, store: Store, name: str, variant: Variant) -> Result:
    """Compare a variant with the reference."""
    place = Path(variant.place) if Path(variant.place).is_dir() else variant.place
    with opened(place, store) as model:
        measured = judge.measure(model)
        assert measured.kl is not None
        found = judge.summed_up(model, measured)
    return Result(name, variant, found, measured.kl.mean(axis=1))


def ratio(ours: npt.NDArray[np.float64], base: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Quotient of two means over the same windows, and its standard error (delta method)."""
    found = float(ours.mean() / base.mean())
    spread = (ours - found * base).std(ddof=1) if len(ours) > 1 else np.nan
    return found, float(spread / np.sqrt(len(ours)) / base.mean())


def goal(method: str, name: str, fmt: str) -> float | None:
    """The ratio asked for, None where there is no goal."""
    return GOALS.get((method, name), GOALS.get((method, ""), {})).get(fmt)


def row(result: Result, base: Result) -> dict[str, Any]:
    """What is printed and kept of a result, beside the rounded model of its format and set."""
    found, kl, agreement = (
        result.evaluation,
        result.evaluation.divergence,
        result.evaluation.agreement,
    )
    assert kl is not None
    assert agreement is not None
    quotient, error = ratio(result.means, base.means)
    return {
        "set": result.set,
        "format": result.variant.format,
        "method": result.variant.method,
        "kl": kl.mean.value,
        "kl error": kl.mean.standard_error,
        "ratio": quotient,
        "ratio error": error,
        "goal": goal(result.variant.method, result.set, result.variant.format),
        "median": kl.median,
        "p99": kl.p99,
        "top1": agreement.value,
        "perplexity": found.perplexity.value,
        "reference perplexity": found.reference_perplexity and found.reference_perplexity.value,
        "bits per weight": result.variant.bits_per_weight,
        "create s": result.variant.seconds,
        "tokens": found.tokens_digest,
    }


HEADINGS = (
    "set format     method            KL per token       to rtn          goal  median     p99  "
    "same top     ppl    bpw  create s"
)


def line(found: dict[str, Any]) -> str:
    """One row of the table."""
    wanted = "     " if found["goal"] is None else f"{found['goal']:5.2f}"
    error = found["kl error"]
    return (
        f"{found['set']:3} {found['format']:10} {found['method']:17} "
        f"{found['kl']:.5f} ± {0 if error is None else error:.5f}  "
        f"{found['ratio']:5.3f} ± {found['ratio error']:5.3f}  {wanted}  "
        f"{found['median']:.4f} {found['p99']:7.3f}  {100 * found['top1']:6.2f} % "
        f"{found['perplexity']:7.2f} {found['bits per weight']:6.3f} {found['create s']:8.1f}"
    )


@contextmanager
def working_in(folder: Path | None) -> Iterator[Path]:
    """A folder that is kept, or one that is removed afterwards."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="fidelity-") as temporary:
        yield Path(temporary)


def variants(
    workshop: Workshop, one: TextSet, fmt: str, methods: Sequence[str]
) -> Iterator[Variant]:
    """Models of a format, the rounded one first."""
    for method in (RTN, *(m for m in methods if m != RTN)):
        yield workshop.make(fmt, method, one.calibration if METHODS[method] else None)


def automatic(
    workshop: Workshop, one: TextSet, tokenizer: Any
) -> Iterator[tuple[Variant, Variant | None]]:
    """Formats by measured effect and what they are compared with; of the latter itself, None."""
    text = one.calibration
    int4 = workshop.make("int4", RTN, None)
    yield int4, None
    yield workshop.fitted(int4, "gptq", text), int4
    folder = Path(workshop.peer(MIXED, text, tokenizer).place)
    for label in (MIXED, MIXED_HEAD):
        mixture = workshop.mixture(label, folder, "aware", text)
        yield mixture, None
        yield workshop.fitted(mixture, "aware", text), mixture


def run(chosen: argparse.Namespace, work: Path) -> list[dict[str, Any]]:
    """Make, judge and print; the rows."""
    from quantmill import mlxlm

    checkpoint = work / "permuted"
    if not checkpoint.exists():
        permute(write_plain(packaged(), work / "plain")).rename(checkpoint)
    store, rows = Store(work / "store"), []
    with opened(checkpoint, store) as reference:
        tokenizer = mlxlm.tokenizer_for(reference, reference.config)
        sets = text_sets(chosen.sets, tokenizer, chosen.texts, work, chosen.windows)
        workshop = Workshop(checkpoint, store, work)
        for one in sets:
            print(f"\n{one.name}: {one.text.name}, {len(one.windows)} windows\n{HEADINGS}")
            judge = Judge(reference, one.text, windows=one.windows)
            rounded: dict[str, Result] = {}
            for fmt in chosen.formats:
                for variant in variants(workshop, one, fmt, chosen.methods):
                    result = judged(judge, store, one.name, variant)
                    base = rounded.setdefault(fmt, result)
                    rows.append(row(result, base))
                    print(line(rows[-1]), flush=True)
            compared: dict[Variant, Result] = {}
            for variant, beside in automatic(workshop, one, tokenizer) if chosen.auto else ():
                result = judged(judge, store, one.name, variant)
                compared[variant] = result
                rows.append(row(result, compared[beside or variant]))
                print(line(rows[-1]), flush=True)
            for name in chosen.peers if "int4" in rounded else ():
                variant = workshop.peer(name, one.calibration, tokenizer)
                result = judged(judge, store, one.name, variant)
                rows.append(row(result, rounded["int4"]))
                print(line(rows[-1]), flush=True)
    return rows


def _words(known: Sequence[str]) -> Any:
    def parse(text: str) -> list[str]:
        found = [word for word in text.split(",") if word]
        unknown = [word for word in found if word not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(known)}")
        return found

    return parse


def main() -> None:
    blas.preload()  # mlx-lm's own gptq computes with MLX
    sets = ("E1", "E2", "E3")
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=Path, help="folder with the texts of E1 and E2")
    parser.add_argument("--sets", type=_words(sets), default=list(sets))
    parser.add_argument("--formats", type=_words(FORMATS), default=list(FORMATS))
    parser.add_argument("--methods", type=_words(list(METHODS)), default=list(METHODS))
    parser.add_argument("--peers", type=_words(list(PEERS)), default=["mixed_4_6"])
    parser.add_argument("--auto", action="store_true", help="formats by measured effect as well")
    parser.add_argument("--windows", type=int, help="windows of each set, 40 for all of E1")
    parser.add_argument("--work", type=Path, help="folder for checkpoint and store, to be kept")
    chosen = parser.parse_args()
    with working_in(chosen.work) as work:
        keep("fidelity", {"rows": run(chosen, work)})


if __name__ == "__main__":
    main()
