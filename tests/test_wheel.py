"""The package as users get it: a wheel from the source archive, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from checkpoints import fixture
from quantmill.creation import create
from quantmill.store import Store
from quantmill.version import __version__

ROOT = Path(__file__).parent.parent
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "QUANTMILL"))}


def succeed(*command: object, cwd: Path) -> str:
    """Output of a command that has to work; where no package index answers, the test is skipped.

    In CI it never is.
    """
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=CLEAN, capture_output=True, text=True, check=False
    )
    offline = any(
        text in done.stderr + done.stdout
        for text in ("No matching distribution", "Temporary failure in name resolution")
    )
    if done.returncode and offline and not os.environ.get("CI"):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_a_wheel_from_the_source_archive_works_by_itself(tmp_path: Path) -> None:
    """Archive, wheel from it, clean environment: the kernels load and the digests are these."""
    out, elsewhere = tmp_path / "dist", tmp_path / "elsewhere"
    elsewhere.mkdir()
    succeed(sys.executable, "-m", "build", "--outdir", out, ROOT, cwd=elsewhere)
    (archive,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    check_archive(archive)
    check_wheel(wheel)
    succeed(sys.executable, "-m", "venv", "clean", cwd=elsewhere)
    python = elsewhere / "clean" / "bin" / "python"
    succeed(python, "-m", "pip", "install", "--quiet", wheel, cwd=elsewhere)
    rows = json.loads(succeed(python, "-m", "quantmill", "kernels", "--json", cwd=elsewhere))
    used = [row["name"] for row in rows if row["used"]]
    assert used not in ([], ["mlx"])
    source = fixture("hf-llama-bf16")
    made = create("m", source, store=Store(tmp_path / "here"), quantize="int4")
    command = (python, "-m", "quantmill", "create", "m", source, "-q", "int4", "--json",
               "--store", tmp_path / "there")  # fmt: skip
    assert json.loads(succeed(*command, cwd=elsewhere))["digest"] == str(made.digest)
    report = (python, "-m", "quantmill", "report", "m", "-o", "-", "--store", tmp_path / "there")
    assert succeed(*report, cwd=elsewhere).startswith("<!doctype html>")


def check_archive(archive: Path) -> None:
    """What is needed to build is there, what is not ours to ship is not."""
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {"CMakeLists.txt", "native/bind.cpp", "src/quantmill/cli.py", "LICENSE"} <= names
    assert not any(name.startswith((".ci", "shared", "build/")) for name in names)
    assert not any(name.endswith((".so", ".pyd")) for name in names)


def check_wheel(wheel: Path) -> None:
    """The name of the wheel says what its extension is built for."""
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
    (extension,) = (name for name in names if "_native" in name and name.endswith(".so"))
    assert wheel.name.startswith(f"quantmill-{__version__}-")
    stable = sys.version_info >= (3, 12)
    version = f"{sys.version_info.major}{sys.version_info.minor}"
    assert ("-cp312-abi3-" if stable else f"-cp{version}-cp{version}-") in wheel.name
    assert (".abi3." if stable else f".cpython-{version}-") in extension
    assert {"quantmill/_native.pyi", "quantmill/py.typed"} <= set(names)
    page = {f"quantmill/reportpage.{suffix}" for suffix in ("html", "css", "js")}
    assert page <= set(names)
