"""The commands as a user meets them: what is printed where, which exit code, which JSON."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import quantmill.errors
from checkpoints import fixture
from quantmill.cli import app, run
from quantmill.errors import QuantmillError
from registries import misbehaving, serve_memory

Run = Callable[..., "Outcome"]


class Outcome:
    """What a command line printed and returned."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line against a store of the test's own."""
    monkeypatch.setenv("QUANTMILL_STORE", str(tmp_path / "store"))

    def call(*arguments: str | Path) -> Outcome:
        code = run([str(a) for a in arguments])
        printed = capsys.readouterr()
        return Outcome(code, printed.out, printed.err)

    return call


# -- the main job ----------------------------------------------------------------------------------


def test_a_model_goes_through_all_commands(cli: Run, source: Path) -> None:
    """create, list, show, verify, cp, rm, prune: each does its part and exits with 0."""
    assert cli("create", "m", source, "-q", "int4").code == 0
    assert "m:latest" in cli("list").out
    shown = cli("show", "m", "--tensors").out
    assert re.search(r"q_proj\.weight +int4 +64 +128 x 128", shown)
    assert "all good" in cli("verify", "m").out
    assert cli("cp", "m", "other:v2").code == 0
    assert cli("rm", "m").code == 0
    assert "other:v2" in cli("ls").out
    assert cli("rm", "other:v2").code == 0
    assert cli("prune", "--older-than", "0").code == 0
    assert cli("list", "--json").json == []


def test_plan_shows_each_tensor_with_its_reason(cli: Run, source: Path) -> None:
    """The table has a row per tensor, and totals with bits per weight and space needed."""
    out = cli("plan", source, "-q", "int4").out
    assert re.search(r"down_proj\.weight .* int8 .*sensitive", out)
    assert re.search(r"embed_tokens\.weight .* keep .*embedding", out)
    assert "bits per weight" in out
    assert re.search(r"disk space needed: .*free", out)


def test_plan_writes_nothing(cli: Run, source: Path, tmp_path: Path) -> None:
    """After `plan` there is not even a store directory."""
    cli("plan", source, "-q", "mxfp8")
    assert not (tmp_path / "store").exists()


def test_the_store_option_wins_over_the_environment(cli: Run, source: Path, tmp_path: Path) -> None:
    """--store names the directory that is written."""
    cli("create", "m", source, "--store", tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "manifests").is_dir()
    assert not (tmp_path / "store").exists()


def test_a_modelfile_names_the_source(cli: Run, source: Path) -> None:
    """-f takes FROM relative to the Modelfile and tells what it ignores."""
    (source / "Modelfile").write_text("FROM .\nSYSTEM hi\nMESSAGE user hello\n")
    done = cli("create", "m", "-f", source / "Modelfile")
    assert done.code == 0
    assert "ignored" in done.err
    assert "MESSAGE" in done.err
    assert "system" in cli("show", "m").out


def test_a_modelfile_and_another_source_contradict(cli: Run, source: Path, tmp_path: Path) -> None:
    """SOURCE and a different FROM are refused rather than one of them ignored."""
    (source / "Modelfile").write_text("FROM .\n")
    done = cli("create", "m", tmp_path, "-f", source / "Modelfile")
    assert done.code == 2
    assert "FROM" in done.err


def test_quiet_prints_nothing_on_success(cli: Run, source: Path) -> None:
    """--quiet leaves stdout and stderr empty."""
    done = cli("create", "m", source, "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")


def test_files_left_out_are_named(cli: Run, source: Path) -> None:
    """A file that is not kept is mentioned on stderr."""
    (source / "training_args.bin").write_bytes(b"x")
    assert "training_args.bin" in cli("create", "m", source).err


# -- JSON ------------------------------------------------------------------------------------------

CLI_PAGE = (Path(__file__).parent.parent / "docs" / "cli.md").read_text(encoding="utf-8")
DOCUMENTED = {
    name: json.loads(block)
    for name, block in re.findall(r"<!-- json: (\w+) -->\n```json\n(.*?)```", CLI_PAGE, re.DOTALL)
}
FREE_FORM = {"info", "recorded", "non_finite", "plan", "evaluation"}
"""Objects whose keys depend on the model; the page says where their keys come from."""


def assert_same_shape(documented: Any, printed: Any, where: str) -> None:
    if isinstance(documented, dict) and isinstance(printed, dict):
        assert list(documented) == list(printed), where
        for key in documented:
            if key not in FREE_FORM:
                assert_same_shape(documented[key], printed[key], f"{where}.{key}")
    elif isinstance(documented, list) and isinstance(printed, list):
        if documented and printed:
            assert_same_shape(documented[0], printed[0], f"{where}[0]")
    elif documented is not None and printed is not None:
        assert type(documented) is type(printed), where


def json_of_all_commands(cli: Run, source: Path, damaged: Path) -> dict[str, Any]:
    found = {"create": cli("create", "m", source, "-q", "int4", "--json").json}
    found["plan"] = cli("plan", source, "-q", "int4", "--json").json
    found["list"] = cli("list", "--json").json
    found["show"] = cli("show", "m", "--tensors", "--json").json
    found["report"] = cli("report", "m", "--json").json
    found["diff"] = cli("diff", source, "m", "--json").json
    found["cp"] = cli("cp", "m", "m2", "--json").json
    found["rm"] = cli("rm", "m2", "--json").json
    with misbehaving(serve_memory()) as registry:
        monkeypatch = pytest.MonkeyPatch()
        monkeypatch.setenv("XDG_CONFIG_HOME", str(source.parent / "config"))
        monkeypatch.setattr("sys.stdin", io.StringIO("secret\n"))
        options = ("-u", "alice", "--password-stdin", "--json")
        found["login"] = cli("login", registry.host, *options).json
        found["logout"] = cli("logout", registry.host, "--json").json
        monkeypatch.undo()
        found["push"] = cli("push", "m", f"{registry.host}/a/m", "--json").json
        found["pull"] = cli("pull", f"{registry.host}/a/m", "--json").json
    next(damaged.glob("sha256-*")).unlink()
    found["verify"] = cli("verify", "--json").json
    found["prune"] = cli("prune", "--json").json
    tiny = str(fixture("hf-llama-bf16"))
    found["run"] = cli("run", tiny, "the cat", "--max-tokens", "2", "--json").json
    few = ("--tokens", "64", "--window", "32", "--json")
    found["eval"] = cli("eval", tiny, "--against", tiny, *few).json
    found["export"] = cli("export", tiny, source / "out", "--json").json
    found["kernels"] = cli("kernels", "--json").json
    found["doctor"] = cli("doctor", "--json").json
    found["error"] = json.loads(cli("show", "nope", "--json").err)
    return found


def test_json_shapes_are_the_documented_ones(cli: Run, source: Path, tmp_path: Path) -> None:
    """Every command's --json output has exactly the keys that docs/cli.md shows, in its order."""
    found = json_of_all_commands(cli, source, tmp_path / "store" / "blobs")
    assert found.keys() == DOCUMENTED.keys()
    for name, printed in found.items():
        assert_same_shape(DOCUMENTED[name], printed, name)


def test_the_plan_in_json_can_be_read_back(cli: Run, source: Path) -> None:
    """What `plan --json` prints under `plan` is the plan that the library makes."""
    from quantmill import plan, plan_from_json

    printed = cli("plan", source, "-q", "nvfp4", "--json").json["plan"]
    assert plan_from_json(printed) == plan(source, quantize="nvfp4")


# -- errors ----------------------------------------------------------------------------------------


def test_an_error_is_one_line_and_a_hint(cli: Run, tmp_path: Path) -> None:
    """Nothing on stdout; on stderr the error, then what to do."""
    done = cli("create", "m", tmp_path / "absent")
    assert done.out == ""
    error, hint = done.err.splitlines()
    assert error.startswith("error: ")
    assert "absent" in error
    assert hint.startswith("hint: ")
    assert done.code == 3


def test_with_json_an_error_is_json(cli: Run, source: Path) -> None:
    """The same facts as an object, the exit code among them."""
    done = cli("create", "m", source, "-q", "int3", "--json")
    error = json.loads(done.err)["error"]
    assert error["kind"] == "unsupported_quantize_type"
    assert error["exit_code"] == done.code == 2
    assert "affine-3" in error["hint"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["create"], 2),
        (["create", "bad name", "."], 2),
        (["create", "m"], 2),
        (["nonsense"], 2),
        (["create", "m", ".", "--workers", "many"], 2),
        (["create", "m", ".", "--group-size", "64"], 2),
        (["create", "m", ".", "--tensor", "x"], 2),
        (["show", "absent"], 1),
        (["rm", "absent"], 1),
        (["cp", "absent", "m"], 1),
        (["verify", "absent"], 1),
        (["eval", "absent"], 1),
        (["eval", ".", "--window", "1"], 2),
        (["--help"], 0),
        (["--version"], 0),
        ([], 0),
    ],
)
def test_exit_codes(
    cli: Run, arguments: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Usage is 2, a missing model 1, success 0."""
    monkeypatch.chdir(tmp_path)
    assert cli(*arguments).code == code


def test_damage_makes_verify_exit_with_1(cli: Run, source: Path, tmp_path: Path) -> None:
    """A flipped bit is found, the model it hurts is named."""
    cli("create", "m", source)
    path = max((tmp_path / "store" / "blobs").iterdir(), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = cli("verify")
    assert done.code == 1
    assert "hurts m:latest" in done.out


def test_an_unreadable_manifest_does_not_hide_the_others(
    cli: Run, source: Path, tmp_path: Path
) -> None:
    """`list` shows the good model, marks the broken one and warns."""
    cli("create", "good", source)
    cli("create", "broken", source)
    path = tmp_path / "store" / "manifests" / "registry.ollama.ai" / "library" / "broken" / "latest"
    path.write_text("{")
    done = cli("list")
    assert "good:latest" in done.out
    assert re.search(r"broken:latest +unreadable", done.out)
    assert "broken" in done.err


def test_every_error_class_has_a_documented_exit_code() -> None:
    """docs/cli.md lists the exit code of each error quantmill raises."""
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", CLI_PAGE, re.MULTILINE)}
    classes = [
        value
        for value in vars(quantmill.errors).values()
        if isinstance(value, type) and issubclass(value, QuantmillError)
    ]
    assert {cls.exit_code for cls in classes} <= documented
    assert {0, 130, 143} <= documented


# -- terminal --------------------------------------------------------------------------------------

CHILD = "from quantmill.cli import main; main()"


def test_a_closed_pipe_is_no_error(source: Path) -> None:
    """A reader that stops early ends the command quietly."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, "plan", str(source)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    errors = child.stderr.read()
    child.stderr.close()
    assert (child.wait(), errors) == (0, b"")


def in_terminal(*arguments: str) -> str:
    """What a command prints when stderr is a terminal."""
    master, slave = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], stderr=slave, stdout=subprocess.DEVNULL,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(slave)
    seen = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:
            break
        if not part:
            break
        seen += part
    child.wait()
    os.close(master)
    return seen.decode()


def test_a_terminal_shows_tensors_bytes_and_time_left(tmp_path: Path) -> None:
    """In a terminal a bar counts tensors and bytes; elsewhere nothing of the kind appears."""
    source = fixture("hf-qwen3-moe-bf16")
    arguments = ("create", "m", str(source), "-q", "nvfp4", "--store", str(tmp_path / "s"))
    seen = in_terminal(*arguments)
    assert re.search(r"\d+/27 tensors", seen)
    assert re.search(r"MB", seen)
    assert "tensors" not in in_terminal(*arguments, "--quiet")


def completed(shell: str, line: str, *, word: int, store: str = "absent") -> str:
    """What a shell is offered for the word at this position of a command line."""
    environment = {
        **os.environ,
        "QUANTMILL_STORE": store,
        "_QUANTMILL_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": line,
        "COMP_CWORD": str(word),
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = subprocess.run(
        [Path(sys.executable).parent / "quantmill"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion_offers_commands(shell: str) -> None:
    """The completion protocol of each shell answers with the commands that fit."""
    offered = completed(shell, "quantmill ver", word=1)
    assert "verify" in offered
    assert "create" not in offered


def test_completion_offers_stored_names(source: Path, tmp_path: Path) -> None:
    """Names in the store complete the argument of `show`."""
    store = str(tmp_path / "store")
    subprocess.run(
        [sys.executable, "-c", CHILD, "create", "minilm:x", str(source), "--store", store,
         "--quiet"], check=True,
    )  # fmt: skip
    assert "minilm:x" in completed("bash", "quantmill show min", word=2, store=store)


def test_every_option_has_a_help_text() -> None:
    """No command or option is undocumented."""
    import typer.main

    group: Any = typer.main.get_command(app)
    for command in group.commands.values():
        assert command.help
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.help, (command.name, parameter.name)
