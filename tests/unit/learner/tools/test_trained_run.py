"""A run to be used: which weights are taken from where, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from common.backbones.sd3 import StableDiffusion3
from common.errors import CheckpointError, ConfigError, ModelError
from common.types import Network
from learner.tools.trained_run import TrainedRun
from learner.training.lora_file import LORA_FILE, student_lora
from learner.training.networks import ALIGNED, COLD_START
from tests.helpers.tiny_pipeline import write_tiny_pipeline
from tests.helpers.trained_run import velocity, write_trained_run


@pytest.fixture(scope="module")
def trained(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StableDiffusion3]:
    directory = tmp_path_factory.mktemp("trained") / "run"
    return directory, write_trained_run(directory, tiny_pipeline)


@pytest.fixture
def moved(trained: tuple[Path, StableDiffusion3], tmp_path: Path) -> Path:
    """A copy elsewhere, to be changed."""
    return Path(shutil.copytree(trained[0], tmp_path / "moved"))


def loaded(path: Path, policy: str = "rtdmd", base: Path | None = None) -> StableDiffusion3:
    backbone = TrainedRun.open(path, base).load(policy, "cpu")
    assert isinstance(backbone, StableDiffusion3)
    return backbone


@pytest.mark.usefixtures("one_thread")
def test_the_newest_checkpoint_gives_the_averaged_student(trained: tuple[Path, StableDiffusion3], moved: Path) -> None:
    backbone = loaded(moved)
    assert backbone.adapters.stack(Network.STUDENT) == (COLD_START, ALIGNED)
    assert torch.equal(velocity(backbone), velocity(trained[1]))


@pytest.mark.usefixtures("one_thread")
def test_without_checkpoints_the_lora_gives_the_same_student(
    trained: tuple[Path, StableDiffusion3], moved: Path
) -> None:
    shutil.rmtree(moved / "checkpoints")
    torch.testing.assert_close(velocity(loaded(moved)), velocity(trained[1]), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("earlier", "metadata", "about"),
    [
        (True, True, True),
        (True, True, False),
        (True, False, True),
        (True, False, False),
        (False, True, True),
        (False, True, False),
        (False, False, True),
    ],
)
def test_a_lora_is_read_with_the_scale_it_was_written_with(
    trained: tuple[Path, StableDiffusion3], moved: Path, earlier: bool, metadata: bool, about: bool
) -> None:
    """Earlier versions left the scale, 2, out of the weights, and wrote it into the metadata alone.

    A file that has lost both is taken for one of them.
    """
    shutil.rmtree(moved / "checkpoints")
    file, beside = moved / "lora" / LORA_FILE, moved / "lora" / "about.json"
    if earlier:
        trained[1].save_lora(file.parent, student_lora(trained[1]), trained[1].adapters.scale)
        beside.write_text(json.dumps({"base": trained[1].base_fingerprint()}))
    if not metadata:
        save_file(load_file(file), file)
    if not about:
        beside.unlink()
    torch.testing.assert_close(velocity(loaded(moved)), velocity(trained[1]), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("one_thread")
def test_the_cold_start_is_the_same_from_either_stage(moved: Path) -> None:
    aligned, cold_start = (moved / "checkpoints" / name for name in ("alignment-000010", "cold_start-000010"))
    from_aligned, from_cold_start = (velocity(loaded(path, "cold_start")) for path in (aligned, cold_start))
    assert torch.equal(from_aligned, from_cold_start)
    assert (from_aligned - velocity(loaded(moved))).abs().max() > 1e-3


def test_the_teacher_needs_no_weights_of_the_run(moved: Path) -> None:
    shutil.rmtree(moved / "checkpoints")
    shutil.rmtree(moved / "lora")
    assert velocity(loaded(moved, "teacher"), Network.TEACHER).isfinite().all()
    with pytest.raises(CheckpointError, match="has neither a checkpoint nor lora"):
        loaded(moved)


def test_a_policy_the_run_has_not_got_to_is_refused(moved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the cold start, and the run has no later one: use --policy cold_start"):
        loaded(moved / "checkpoints" / "cold_start-000010")
    shutil.rmtree(moved / "checkpoints")
    with pytest.raises(CheckpointError, match=r"its lora/ is the final policy alone; use --policy rtdmd"):
        loaded(moved, "cold_start")


@pytest.mark.parametrize("left", ["checkpoints", "lora"])
def test_another_base_is_refused(moved: Path, left: str, tmp_path: Path) -> None:
    other = write_tiny_pipeline(tmp_path / "other", seed=1)
    shutil.rmtree(moved / {"checkpoints": "lora", "lora": "checkpoints"}[left])
    with pytest.raises(CheckpointError, match=r"trained on another base model than the one at .*other: name .* --base"):
        loaded(moved, base=other)


def test_a_base_that_moved_is_named_anew(moved: Path, tiny_pipeline: Path) -> None:
    config = moved / "config.yaml"
    config.write_text(config.read_text().replace(str(tiny_pipeline), "/nowhere"))
    with pytest.raises(ModelError, match="/nowhere"):
        loaded(moved)
    assert velocity(loaded(moved, base=tiny_pipeline)).isfinite().all()


def _offline(*_: object) -> str:
    raise OSError("no network")


def test_a_base_beside_the_runs_is_found_from_anywhere(
    moved: Path, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's own path of its base is relative to the folder in which the run was started."""
    config, models = moved / "config.yaml", moved.parent / "models"
    models.mkdir()
    (models / "sd3").symlink_to(tiny_pipeline)
    config.write_text(config.read_text().replace(str(tiny_pipeline), "models/sd3"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert velocity(loaded(moved)).isfinite().all()
    (models / "sd3").unlink()
    monkeypatch.setattr("common.backbones.files.pipeline_files.hf_hub_download", _offline)
    with pytest.raises(ModelError, match=r"models/sd3 is neither here, .* name its directory with --base DIR"):
        loaded(moved)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("left", ["checkpoints", "lora"])
def test_the_layers_are_those_of_the_weights_whatever_the_targets_are(
    trained: tuple[Path, StableDiffusion3], moved: Path, left: str
) -> None:
    """A family's default targets may have changed since the run."""
    shutil.rmtree(moved / {"checkpoints": "lora", "lora": "checkpoints"}[left])
    values = yaml.safe_load((moved / "config.yaml").read_text())
    values["lora"]["targets"] = ["to_q", "proj_out"]
    (moved / "config.yaml").write_text(yaml.safe_dump(values))
    torch.testing.assert_close(velocity(loaded(moved)), velocity(trained[1]), rtol=0, atol=1e-5)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not the directory of a run or of its checkpoint: no .*config\.yaml"):
        TrainedRun.open(tmp_path)


def test_a_checkpoint_that_was_copied_alone_is_named(moved: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(TrainedRun.open(moved).checkpoint or moved, tmp_path / "student")
    with pytest.raises(
        ConfigError, match=rf"{checkpoint} is a checkpoint without its run: copy the run's config\.yaml"
    ):
        TrainedRun.open(checkpoint)


def test_a_damaged_lora_is_refused(moved: Path) -> None:
    shutil.rmtree(moved / "checkpoints")
    (moved / "lora" / "about.json").write_text(json.dumps([]))
    with pytest.raises(CheckpointError, match="is damaged"):
        loaded(moved)
    (moved / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="is damaged"):
        loaded(moved)
