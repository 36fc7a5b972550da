"""The wheel holds all layers, imports point downwards, and no module grows past reading."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = ("search", "evaluators", "db", "spaces", "kernels")
BELOW = {
    "search": {"search", "evaluators", "db", "spaces", "kernels"},
    "evaluators": {"evaluators", "db", "spaces", "kernels"},
    "db": {"db"},
    "spaces": {"spaces", "kernels"},
    "kernels": {"kernels"},
}
LEAVES = {"errors", "registry", "plugins"}


def imports(path: Path) -> set[str]:
    """Second parts of the archfront modules that a file imports, e.g. ``spaces`` or ``errors``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            deeper = [f"{node.module}.{alias.name}" for alias in node.names]
            names = deeper if node.module == "archfront" else [node.module]
        found |= {name.split(".")[1] for name in names if name.startswith("archfront.")}
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_only_what_stands_below_it(layer: str) -> None:
    allowed = BELOW[layer] | ({"errors"} if layer == "db" else set() if layer == "kernels" else LEAVES)
    files = list((ROOT / layer).rglob("*.py"))
    assert files
    for path in files:
        assert imports(path) <= allowed, f"{path.relative_to(ROOT)} imports {imports(path) - allowed}"


def test_links_lead_to_the_layers() -> None:
    for layer in LAYERS:
        assert (ROOT / "src" / "archfront" / layer).resolve() == ROOT / layer


def test_kernels_cannot_shadow_another_package() -> None:
    """``./kernels/__init__.py`` would win over the package of that name that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_file_is_too_long_to_read() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in (*LAYERS, "src", "tests", "benchmarks", "examples")
        for path in (ROOT / folder).rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 500
    }
    assert long == {}


def test_the_wheel_holds_every_module(tmp_path: Path) -> None:
    # What an earlier build left there would go into the wheel again.
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for layer in LAYERS:
        for path in (ROOT / layer).rglob("*"):
            if path.suffix in (".py", ".mako", ".typed", ".html", ".css", ".js"):
                assert f"archfront/{path.relative_to(ROOT)}" in names
    assert "archfront/py.typed" in names
    assert not any(name.split("/")[0] in LAYERS for name in names), "a layer would be installed under its bare name"
