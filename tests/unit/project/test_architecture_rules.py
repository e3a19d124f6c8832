"""The rules of the house that a machine can check: who imports whom, sizes, no guessing at attributes."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
PACKAGES = ("common", "learner", "rollout_workers", "reward_servers", "zoo", "benchmarks", "deploy")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def sources() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((REPOSITORY / package).rglob("*.py"))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_the_import_contracts_hold() -> None:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_file_is_longer_than_the_limit() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert lengths, "no sources found"
    assert {str(path): length for path, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_no_function_is_longer_than_the_limit() -> None:
    too_long = {
        f"{path}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in sources()
        for node in functions(path)
        if (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
    }
    assert too_long == {}


def guesses(path: Path) -> Iterator[str]:
    """Calls of getattr and hasattr, but for look-ups in an imported module (`getattr(torch, "float32")`)."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    modules = {alias.asname or alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            subject = node.args[0]
            if not (isinstance(subject, ast.Name) and subject.id in modules):
                yield f"{path}:{node.lineno}"


def test_no_code_guesses_at_attributes() -> None:
    assert [guess for path in sources() for guess in guesses(path)] == []


def test_a_guess_would_be_found(tmp_path: Path) -> None:
    path = tmp_path / "sample.py"
    path.write_text("import torch\ngetattr(torch, 'float32')\nhasattr(self, 'x')\ngetattr(a.b, 'c', None)\n")
    assert list(guesses(path)) == [f"{path}:3", f"{path}:4"]


@pytest.mark.parametrize("extra", ["core", "rewards"])
def test_torch_is_the_same_everywhere(extra: str) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = next(name for name in project["optional-dependencies"][extra] if name.startswith("torch=="))
    assert f"install --quiet {pinned}\n" in (REPOSITORY / "Makefile").read_text(encoding="utf-8")


def test_a_reward_server_installs_neither_ray_nor_diffusers() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [*project["dependencies"], *project["optional-dependencies"]["rewards"]]
    assert [name for name in names if name.startswith(("ray", "diffusers"))] == []
