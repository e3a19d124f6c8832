"""The command `rtdmd`: every word leads to its command, and what earlier versions called otherwise is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from learner import commands
from learner.commands import COMMANDS
from learner.main import main as train

PROJECT_ROOT = Path(__file__).resolve().parents[3]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "learner.commands", *words]
    return subprocess.run(line, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        commands._loaded(COMMANDS[name][0])(["--help"])
    assert ended.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_help_lists_every_command() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in COMMANDS)


def test_without_a_command_the_help_is_shown_and_the_status_is_that_of_a_refusal() -> None:
    done = run()
    assert (done.returncode, "usage: rtdmd COMMAND" in done.stdout) == (2, True)


def test_an_unknown_command_is_refused_by_name() -> None:
    done = run("trane")
    assert done.returncode == 2
    assert done.stderr.startswith("error: rtdmd trane: no such command; there are train, forecast, ")


@pytest.mark.parametrize("name", ["generate", "evaluate", "export"])
def test_a_script_of_an_earlier_version_names_its_command(name: str) -> None:
    line = [sys.executable, f"learner/{name}.py", "--run", "x"]
    done = subprocess.run(line, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == f"error: python learner/{name}.py is now a command: rtdmd {name}"


def test_the_module_of_an_earlier_version_names_its_command() -> None:
    line = [sys.executable, "-m", "reward_servers.score", "--url", "x"]
    done = subprocess.run(line, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: python -m reward_servers.score is now a command: rtdmd score\n"


@pytest.mark.parametrize("words", [["--plan"], ["--plan", "h100"]])
def test_the_option_of_an_earlier_version_names_its_command(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(words) == 2
    assert "--plan is now a command: rtdmd forecast [--device DEVICE]" in capsys.readouterr().err


def test_completion_offers_commands_and_their_options(tmp_path: Path) -> None:
    (tmp_path / "rtdmd").write_text(f'#!/bin/sh\nexec {sys.executable} -m learner.commands "$@"\n')
    (tmp_path / "rtdmd").chmod(0o755)
    script = (
        f'PATH={tmp_path}:$PATH; eval "$(rtdmd completion)"; '
        'COMP_WORDS=(rtdmd ev); COMP_CWORD=1; _rtdmd; echo "${COMPREPLY[@]}"; '
        'COMP_WORDS=(rtdmd train --res); COMP_CWORD=2; _rtdmd; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["evaluate", "--resume"]
