"""The plugin of the small environments skips a test for a missing heavy library, and for nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[3]
MISSING = "import pytest\ndef missing(name): raise ModuleNotFoundError(name=name)\n"
FILES = {
    "test_needs_torch": MISSING + "missing('torch.nn')",
    "test_misspelled_import": "import no_such_library",
    "test_inside": MISSING
    + "@pytest.fixture\ndef heavy(): missing('ray')\n"
    + "def test_fixture(heavy): pass\ndef test_body(): missing('peft')\n"
    + "def test_misspelled(): missing('no_such')\ndef test_wrong(): assert False\ndef test_right(): pass\n",
}


def test_only_a_missing_heavy_library_skips(tmp_path: Path) -> None:
    for name, content in FILES.items():
        (tmp_path / f"{name}.py").write_text(content)
    command = [sys.executable, "-m", "pytest", "-q", "-rsfE", "-p", "tests.helpers.light_environment", str(tmp_path)]
    command += ["--continue-on-collection-errors", "-p", "no:cacheprovider"]
    output = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False).stdout
    assert "2 failed, 1 passed, 3 skipped, 1 error" in output, output
    assert all(f"needs {library}" in output for library in ("torch", "ray", "peft"))
    assert "ERROR " in output.partition("short test summary")[2]
