"""Every example in the README is run, and every link in the docs leads somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELLIPSIS = "…"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, minilm: Path, smollm: Path) -> Path:
    """A directory with the models under the names the README uses."""
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed (quantmill[run])")
    found = tmp_path_factory.mktemp("readme")
    (found / "all-MiniLM-L6-v2").symlink_to(minilm)
    (found / "SmolLM2-135M-Instruct.gguf").symlink_to(smollm)
    return found


def run_in(folder: Path, command: list[str] | str) -> str:
    environment = {
        **os.environ,
        "QUANTMILL_STORE": str(folder / "store"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        command, shell=isinstance(command, str), cwd=folder, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def pattern(shown: str) -> str:
    """A pattern of the shown output: an ellipsis stands for any text, alone for any lines."""
    lines = [
        r"(?:.*\n)*?" if line == ELLIPSIS else re.escape(line).replace(ELLIPSIS, ".*") + r"\n"
        for line in shown.splitlines()
    ]
    return "".join(lines)


def test_the_readme_commands_print_what_it_shows(folder: Path) -> None:
    """Each command of the README succeeds and prints the lines given below it, in order."""
    commands = 0
    for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL):
        for shown in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, expected = shown.partition("\n")
            printed = run_in(folder, command)
            assert re.fullmatch(pattern(expected), printed), f"{command}\n{printed}"
            commands += 1
    assert commands == 9


@pytest.mark.parametrize("page", ["README.md", "docs/loading.md"])
def test_the_programs_of_a_page_run(folder: Path, page: str) -> None:
    """The Python examples run as they stand."""
    text = (ROOT / page).read_text(encoding="utf-8")
    programs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert programs
    for program in programs:
        run_in(folder, [sys.executable, "-c", program])


@pytest.mark.parametrize("page", PAGES, ids=[p.name for p in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page names a file, and every anchor one of its headings."""
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {h.lower().replace(" ", "-") for h in headings}, target


def test_every_lie_of_the_security_page_has_its_test() -> None:
    """Each row of docs/security.md names a test that is there."""
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "**" not in line][1:]
    defined = {
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert set(named) <= defined, row


def test_the_module_table_is_complete() -> None:
    """docs/architecture.md names every module, and none that is not there."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text[text.index("## Modules") : text.index("## Seams")]
    named = {
        name
        for row in re.findall(r"^\| [a-z]* ?\| (`.*?) \|", table, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    }
    present = {p.stem for p in (ROOT / "src" / "quantmill").glob("*.py")}
    assert named == present - {"__init__", "__main__"}


def test_the_formats_page_has_the_real_numbers() -> None:
    """The table of bits per weight is what the code computes."""
    from quantmill.formats import parse_format

    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.* (\d+\.\d+) \|$", text, re.MULTILINE)
    assert {name for name, _ in rows} == {"int4", "int8", "nvfp4", "mxfp4", "mxfp8"}
    for name, bits in rows:
        assert parse_format(name).bits_per_weight("BF16") == float(bits)


def test_pages_that_the_code_refers_to_exist() -> None:
    """A docstring that sends the reader to a page sends him to one that is there."""
    for path in [*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").glob("*.py")]:
        for page in re.findall(r"docs/\w+\.md", path.read_text(encoding="utf-8")):
            assert (ROOT / page).exists(), f"{path.name}: {page}"
