"""Fixtures for every test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported: models of this size are several times slower on two threads than on one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

HUB_NAME = Path("somebody/some-model")


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random pipeline of a few kilobytes; nobody writes to it."""
    # Imported here: most tests need no model and start in a fraction of the time without diffusers.
    from tests.helpers.tiny_pipeline import write_tiny_pipeline

    return write_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Bitwise comparisons hold for a fixed number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cached(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache as a download of `HUB_NAME` leaves it, and no way to the hub; the snapshot's directory."""
    import huggingface_hub.constants

    repository = tmp_path / "cache" / "models--somebody--some-model"
    snapshot = shutil.copytree(tiny_pipeline, repository / "snapshots" / "0123456789abcdef")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123456789abcdef")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot
