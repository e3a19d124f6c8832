"""Every way to start one of our processes sets OMP_WAIT_POLICY before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import rich  # noqa: F401 - these processes need the libraries of the learner

from common import WAIT_POLICY

REPOSITORY = Path(__file__).parents[3]
TORCH_IN_ITS_PLACE = """
import os, pathlib
pathlib.Path(os.environ["SEEN"]).write_text(os.environ.get("OMP_WAIT_POLICY", "not set"))
os._exit(0)
"""
RTDMD = "import sys; from learner.commands import main; sys.argv[0] = 'rtdmd'; sys.exit(main())"
DOORS = {
    "rtdmd train": ("-c", RTDMD, "train", "--run-dir", "{tmp}/run", "--dry-run"),
    "rtdmd generate": ("-c", RTDMD, "generate"),
    "rtdmd evaluate": ("-c", RTDMD, "evaluate"),
    "rtdmd export": ("-c", RTDMD, "export"),
    "rtdmd import": ("-c", RTDMD, "import"),
    "rtdmd convert": ("-c", RTDMD, "convert"),
    "rtdmd serve": ("-c", RTDMD, "serve", "--scorer", "hps", "--model", "zoo/weights/hps", "--port", "0"),
    "learner/main.py": ("learner/main.py", "--run-dir", "{tmp}/run", "--dry-run"),
    "reward_servers": ("-m", "reward_servers", "--scorer", "hps", "--model", "zoo/weights/hps", "--port", "0"),
    "reward_servers.convert": ("-m", "reward_servers.convert"),
    "zoo.build": ("-m", "zoo.build", "--only", "hps"),
    "one process": ("examples/train_in_one_process.py",),
    **{
        f"benchmarks.{name}": ("-m", f"benchmarks.{name}")
        for name in ("adapter_dtype", "adapter_switching", "backbones", "count", "overlap", "shared_base", "throughput")
    },
    "a worker": ("-c", "import rollout_workers.actor"),
}


def seen_by_torch(words: tuple[str, ...], tmp_path: Path, **variables: str) -> str:
    """The variable's value when the process imports torch, in whose place it finds a module that notes the value."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(TORCH_IN_ITS_PLACE)
    environment = {name: value for name, value in os.environ.items() if name != WAIT_POLICY}
    environment |= {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPOSITORY}", "SEEN": str(tmp_path / "seen"), **variables}
    command = [sys.executable, *(word.format(tmp=tmp_path) for word in words)]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (tmp_path / "seen").exists(), result.stderr
    return (tmp_path / "seen").read_text()


@pytest.mark.parametrize("door", DOORS)
def test_idle_threads_sleep_in_every_process(door: str, tmp_path: Path) -> None:
    assert seen_by_torch(DOORS[door], tmp_path) == "PASSIVE"


@pytest.mark.parametrize("door", ["learner/main.py", "reward_servers", "one process"])
def test_a_value_of_the_user_is_kept(door: str, tmp_path: Path) -> None:
    assert seen_by_torch(DOORS[door], tmp_path, OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"


def test_every_benchmark_that_imports_torch_at_its_start_is_among_the_doors() -> None:
    starting = [path for path in (REPOSITORY / "benchmarks").glob("*.py") if "\nimport torch" in path.read_text()]
    commands = {path.stem for path in starting if '__name__ == "__main__"' in path.read_text()}
    assert commands == {name.removeprefix("benchmarks.") for name in DOORS if name.startswith("benchmarks.")}


def test_openmp_has_read_it() -> None:
    """GNU OpenMP shows its settings when torch loads it."""
    environment = {name: value for name, value in os.environ.items() if name != WAIT_POLICY}
    environment |= {"OMP_DISPLAY_ENV": "TRUE", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", "import learner, torch"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in result.stderr


@pytest.mark.parametrize(("given", "expected"), [({}, "PASSIVE"), ({WAIT_POLICY: "ACTIVE"}, "ACTIVE")])
def test_make_hands_it_on(given: dict[str, str], expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != WAIT_POLICY} | given
    target = "include Makefile\nshown:\n\t@echo policy=$$OMP_WAIT_POLICY\n"
    command = ["make", "--silent", "--file", "-", "shown"]
    shown = subprocess.check_output(command, cwd=REPOSITORY, env=environment, input=target, text=True, timeout=60)
    assert f"policy={expected}" in shown.splitlines()
