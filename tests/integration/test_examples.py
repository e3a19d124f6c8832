"""The example that trains in one process runs, with smaller numbers than its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = PROJECT_ROOT / "examples" / "train_in_one_process.py"
SMALLER = (
    "--cold_start.iterations 2 --cold_start.batch_size 2 "
    "--alignment.iterations 2 --alignment.prompts_per_iteration 2 --alignment.group_size 2"
)


def test_both_stages_train_in_one_process(tmp_path: Path) -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 80
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *SMALLER.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(PROJECT_ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rewards = [float(value) for value in re.findall(r"reward (?:at the start|after stage \d): ([\d.]+)", done.stdout)]
    assert len(rewards) == 3
    assert all(0 < reward < 1 for reward in rewards)
    assert done.stdout.count("alignment ") == 2
