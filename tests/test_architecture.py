"""The structure that docs/architecture.md describes, kept by tests."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import quantmill

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "quantmill"
MODULES = {p.stem: ast.parse(p.read_text(encoding="utf-8")) for p in SOURCE.glob("*.py")}

LAYERS = [
    {"errors", "digests", "names", "formats", "strictjson", "mediatypes", "version"},
    {"tensorfile", "ggufheader", "source", "plans", "manifest", "modelfile"},
    {"spans", "challenges", "addresses"}
    | {"experts", "stacks", "classify", "rules", "policy", "planner", "modelconfig", "stored"}
    | {"coded", "floatcodes", "integercodes", "schemes", "prequantized", "hubfiles"}
    | {"pipelines", "adapters", "weightings"}
    | {"ggufnames", "ggufconfig", "gguftokenizer", "ggufcodes"}
    | {"companions", "quantconfig", "quantparams", "allocation", "readers"},
    {
        "files",
        "blobwriter",
        "locking",
        "store",
        "openfile",
        "wholefile",
        "checkpoint",
        "ggufsource",
        "ggmlblocks",
        "opening",
        "parts",
        "components",
        "weights",
        "elements",
        "kernels",
        "quantize",
        "searching",
        "searchedarrays",
        "mlxquantize",
        "gpuround",
        "journal",
        "space",
        "pacing",
        "transforms",
        "coding",
        "importance",
        "gptq",
        "feedbackarrays",
        "merging",
        "adaptersource",
        "hub",
        "patience",
        "watching",
        "ollamakey",
        "credentials",
        "registry",
        "registrytokens",
        "partials",
        "uploadnotes",
        "blas",
        "environment",
    },
    {
        "pieces",
        "encoding",
        "calibration",
        "calibrating",
        "unquantized",
        "execute",
        "drafts",
        "recipes",
        "provenance",
        "resolutions",
        "creation",
        "verification",
        "repairing",
        "rebuilding",
        "refetching",
        "pruning",
        "moving",
        "pulling",
        "pushing",
        "uploading",
        "loggingin",
        "facts",
        "decode",
        "model",
        "load",
        "openweights",
        "origins",
        "weighterrors",
        "differences",
        "modelreport",
        "layers",
        "mlxlm",
        "generate",
        "export",
        "denseweights",
        "cpulanes",
        "forward",
        "windows",
        "activations",
        "imatrix",
        "standins",
        "branches",
        "sensitivity",
        "automatic",
        "reference",
        "divergence",
        "evaluation",
    },
    {"report", "planreport", "evaluationreport", "diffreport", "terminal", "arguments"}
    | {"reportdata", "reportpage", "heatmap", "markup"}
    | {"conversation", "evaluating", "sharing", "upkeep", "reporting", "cli"},
]
OUTSIDE_WORLD = {
    "os",
    "io",
    "mmap",
    "socket",
    "subprocess",
    "numpy",
    "mlx",
    "time",
    "random",
    "pathlib",
}
LONGEST_FILE = 520
LONGEST_FUNCTION = 60


def layer_of(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module in names)


def imports(tree: ast.Module) -> set[str]:
    """Modules imported anywhere in a file, imports for type checking aside."""
    checking = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in checking:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def own_imports(tree: ast.Module) -> set[str]:
    names = {name.split(".")[1] for name in imports(tree) if name.startswith("quantmill.")}
    return names & MODULES.keys()


def test_every_module_has_a_layer() -> None:
    """No module stands outside the table."""
    assert set().union(*LAYERS) == MODULES.keys() - {"__init__", "__main__"}


@pytest.mark.parametrize("module", sorted(set().union(*LAYERS)))
def test_modules_import_from_their_layer_or_above(module: str) -> None:
    """Arrows point from the edge to the values, never back."""
    for other in own_imports(MODULES[module]):
        assert layer_of(other) <= layer_of(module), f"{module} imports {other}"


@pytest.mark.parametrize("module", sorted(set().union(*LAYERS[:3])))
def test_values_documents_and_decisions_touch_nothing(module: str) -> None:
    """What decides has no files, no clock, no arrays."""
    roots = {name.split(".")[0] for name in imports(MODULES[module])}
    assert not roots & OUTSIDE_WORLD


def test_what_is_stored_is_computed_in_one_module() -> None:
    """MLX's part in `create` sits behind one seam; using models needs MLX's arrays."""
    users = {m for m, tree in MODULES.items() if any(n.startswith("mlx") for n in imports(tree))}
    using_models = {"model", "layers", "mlxlm", "generate", "export", "environment"}
    using_models |= {"denseweights", "standins", "forward", "cpulanes", "divergence"}
    using_models |= {"branches", "sensitivity"}
    assert users - using_models == {"mlxquantize"}


def test_the_command_line_is_not_imported_by_the_library() -> None:
    """Cli is the edge: nothing but __main__ imports it."""
    users = {m for m, tree in MODULES.items() if "cli" in own_imports(tree)}
    assert users <= {"__main__"}


def test_files_and_functions_stay_small() -> None:
    """A file that outgrows its limit has a second idea in it."""
    for module, tree in MODULES.items():
        lines = len((SOURCE / f"{module}.py").read_text(encoding="utf-8").splitlines())
        assert lines <= LONGEST_FILE, module
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= LONGEST_FUNCTION, f"{module}.{node.name} has {length} lines"


def test_the_public_names_exist_and_are_documented() -> None:
    """About twenty sorted names, each with a docstring."""
    assert quantmill.__all__ == sorted(quantmill.__all__)
    assert len(quantmill.__all__) <= 32
    for name in quantmill.__all__:
        value = getattr(quantmill, name)
        assert name == "__version__" or (value.__doc__ or "").strip(), name


def test_unknown_names_are_an_attribute_error() -> None:
    """A misspelt name fails as it does in any module."""
    with pytest.raises(AttributeError, match="creat"):
        _ = quantmill.creat


def test_help_loads_nothing_heavy() -> None:
    """`quantmill --help` and `list` import neither NumPy nor MLX nor an HTTP client."""
    program = (
        "import sys; from quantmill.cli import run; run(sys.argv[1:]);"
        "print([m for m in ('numpy', 'mlx', 'rich', 'httpx2') if m in sys.modules])"
    )
    for arguments in (["--help"], ["list", "--store", "absent"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "[]"


def test_no_module_is_a_drawer() -> None:
    """Names that fit anything hide a missing idea."""
    assert not {m for m in MODULES if re.search(r"util|helper|common|manager|misc", m)}


def test_tests_are_sentences() -> None:
    """Every test says which behaviour it shows."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"
