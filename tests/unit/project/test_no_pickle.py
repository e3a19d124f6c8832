"""Nothing that reads from a socket can reach pickle: proved over the imports of the sources, not by trying."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from reward_servers.scorers import BUILT_IN_SCORERS

REPOSITORY = Path(__file__).parents[3]
OURS = ("common", "reward_servers")
ENTRIES = [
    "reward_servers.__main__",
    "reward_servers.model_process.__main__",
    "reward_servers.score_images",
    "common.rewards.client",
    "reward_servers.remote",
]
MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
CALLS = {"torch.load", "numpy.load", "np.load", "pandas.read_pickle", "yaml.load", "yaml.unsafe_load", "eval", "exec"}


def source(module: str) -> Path | None:
    base = REPOSITORY.joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module a file names in an import, wherever in it, with `from a import b` read as both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def reachable(entries: list[str]) -> dict[str, ast.AST]:
    """Our modules that the entries import, directly or not."""
    found: dict[str, ast.AST] = {}
    waiting = list(entries)
    while waiting:
        module = waiting.pop()
        path = source(module) if module.split(".")[0] in OURS else None
        if path is not None and module not in found:
            found[module] = ast.parse(path.read_text(encoding="utf-8"))
            waiting += imports(found[module])
    return found


def dangers(tree: ast.AST) -> Iterator[str]:
    yield from (name for name in imports(tree) if name.split(".")[0] in MODULES or name in CALLS)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS:
                yield name
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only"):
            yield f"{node.arg}="


def test_no_pickle_is_reachable_from_a_socket() -> None:
    scorers = [path.partition(":")[0] for path in BUILT_IN_SCORERS.values()]
    modules = reachable(ENTRIES + scorers)
    assert {
        "reward_servers.app",
        "reward_servers.plain_json",
        "reward_servers.plain_pickle",
        "common.wire",
        *scorers,
    } <= set(modules)
    assert {module: found for module, tree in modules.items() if (found := list(dangers(tree)))} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "import torch\ntorch.load(x)",
        "from torch import load",
        "np.load(x, allow_pickle=True)",
        "eval(x)",
    ],
)
def test_a_danger_would_be_found(code: str) -> None:
    assert list(dangers(ast.parse(code)))
