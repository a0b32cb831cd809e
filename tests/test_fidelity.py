"""What methods lose on a real model, by wide margins: the short form of `make fidelity`."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from fidelity import METHODS, Workshop, ratio
from permuted import permute, write_plain

from quantmill import calibration
from quantmill.evaluation import Judge
from quantmill.reference import opened
from quantmill.store import Store
from quantmill.windows import default_text

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (quantmill[run])")

TOKENS, WINDOW = 1024, 128

MOST = [
    ("int4", "search", 0.9), ("int4", "aware", 0.6), ("int4", "gptq", 0.45),
    ("nvfp4", "search", 0.9),
]  # fmt: skip
"""Format, method, and what its divergence may be of that of rounding. `make fidelity` finds 0.7 for
search, 0.4 for aware, 0.2 for gptq."""


@pytest.fixture(scope="module")
def plain(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain(smollm, tmp_path_factory.mktemp("plain") / "checkpoint")


@pytest.fixture(scope="module")
def checkpoint(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("permuted") / "checkpoint"
    shutil.copytree(plain, folder)
    return permute(folder)


def test_the_order_of_channels_means_nothing(plain: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Other weights in every group, and the same predictions to rounding."""
    store = Store(tmp_path)
    with opened(plain, store) as one, opened(checkpoint, store) as other:
        name = "model.layers.3.self_attn.o_proj.weight"
        assert not np.array_equal(one.decode(name), other.decode(name))
        judge = Judge(one, default_text(), tokens=64, window=32)
        found = judge.evaluate(other)
    assert found.divergence is not None
    assert found.agreement is not None
    assert abs(found.divergence.maximum) < 1e-5
    assert found.agreement.value == 1.0


def test_methods_lose_less_than_rounding(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them compared with one reference on the same windows, at the same size."""
    monkeypatch.setitem(calibration._WINDOWS, "mixed", 8)  # a quarter: it need not be the best
    store = Store(tmp_path / "store")
    workshop = Workshop(checkpoint, store, tmp_path)
    with opened(checkpoint, store) as reference:
        judge = Judge(reference, default_text(), tokens=TOKENS, window=WINDOW)

        def means(fmt: str, method: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
            with opened(workshop.make(fmt, method, None).place, store) as model:
                kl = judge.measure(model).kl
            assert kl is not None
            found: np.ndarray[tuple[int], np.dtype[np.float64]] = kl.mean(axis=1)
            return found

        for fmt in dict.fromkeys(fmt for fmt, *_ in MOST):
            base = means(fmt, "rtn")
            for _, method, most in (case for case in MOST if case[0] == fmt):
                quotient, error = ratio(means(fmt, method), base)
                assert quotient < most, (fmt, method, error)
                made, rounded = (workshop.make(fmt, m, None) for m in (method, "rtn"))
                assert made.bits_per_weight == rounded.bits_per_weight


def test_every_case_names_a_method_of_the_benchmark() -> None:
    """One table of methods."""
    assert {method for _, method, _ in MOST} <= METHODS.keys()


def test_the_error_of_a_ratio_is_that_of_paired_windows() -> None:
    """Windows that are all hard or all easy for both models say nothing about their ratio."""
    base = np.array([0.1, 0.4, 0.2, 0.8])
    assert ratio(base / 2, base) == pytest.approx((0.5, 0.0))
    found, error = ratio(base + np.array([0.01, -0.01, 0.01, -0.01]), base)
    assert found == pytest.approx(1.0)
    assert error == pytest.approx(0.01 * np.sqrt(4 / 3) / 2 / base.mean())
