"""Checkpoints: whole or not at all, refused when damaged or of another run."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.errors import CheckpointError
from common.types import Position, Stage
from learner import checkpoint as checkpoint_module
from learner.checkpoint import Checkpoint, CheckpointStore

STATE = {"adapter/a": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(3.0)}
SETTINGS = {"seed": 0, "lora": {"rank": 2, "targets": ["to_q"]}}
HERE = Position(Stage.ALIGNMENT, 7)


def write(root: Path, position: Position = HERE, state: dict[str, Tensor] | None = None) -> Path:
    return CheckpointStore(root).save(position, state or STATE, SETTINGS)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    directory = write(tmp_path)
    assert directory == tmp_path / "alignment-000007"
    checkpoint = Checkpoint.open(directory)
    checkpoint.require_settings(SETTINGS)
    state = checkpoint.state()
    assert checkpoint.position == HERE
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[key], STATE[key]) for key in STATE)
    assert [path.name for path in tmp_path.iterdir()] == ["alignment-000007"]


def fail_when_writing(name: str) -> Callable[[Path, bytes], None]:
    def fail(path: Path, content: bytes) -> None:
        path.write_bytes(content[:5])
        if path.name == name:
            raise OSError(28, "No space left on device")

    return fail


@pytest.mark.parametrize("file", ["state.safetensors", "checkpoint.json"])
def test_a_failed_write_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    before = write(tmp_path)
    monkeypatch.setattr(checkpoint_module, "_write_durably", fail_when_writing(file))
    for position in (HERE, Position(Stage.ALIGNMENT, 8)):
        with pytest.raises(CheckpointError, match=r"cannot write a checkpoint: .*No space left.*free space"):
            write(tmp_path, position, {"adapter/a": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == [before]
    assert torch.equal(Checkpoint.open(before).state()["adapter/a"], STATE["adapter/a"])


def test_a_process_killed_while_writing_leaves_nothing_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, content: bytes) -> None:
        path.write_bytes(content[:5])
        raise KeyboardInterrupt

    before = write(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "_write_durably", killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, Position(Stage.ALIGNMENT, 8))
    assert CheckpointStore(tmp_path).latest() == before
    after = write(tmp_path, Position(Stage.ALIGNMENT, 8))
    assert CheckpointStore(tmp_path).latest() == after
    assert Checkpoint.open(after).position.iteration == 8


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=f"cannot write a checkpoint: {tmp_path}/file"):
        write(tmp_path / "file")


def flip(directory: Path) -> None:
    file = directory / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def truncate(directory: Path) -> None:
    file = directory / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def forget_key(directory: Path) -> None:
    file = directory / "checkpoint.json"
    about = json.loads(file.read_text())
    del about["stage"]
    file.write_text(json.dumps(about))


def layout_as_text(directory: Path) -> None:
    file = directory / "checkpoint.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layout": "2"}))


def test_a_file_system_that_syncs_no_directories_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some network mounts and shared folders."""
    sync = os.fsync

    def files_alone(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", files_alone)
    assert Checkpoint.open(write(tmp_path)).position == Position(Stage.ALIGNMENT, 7)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "is damaged"),
        (truncate, "is damaged"),
        (forget_key, "is not a checkpoint"),
        (layout_as_text, "is not a checkpoint"),
        (lambda directory: (directory / "state.safetensors").unlink(), "is not a checkpoint"),
        (lambda directory: (directory / "checkpoint.json").write_text('{"stage": "al'), "is not a checkpoint"),
        (lambda directory: (directory / "checkpoint.json").write_text("[]"), "is not a checkpoint"),
        (lambda directory: (directory / "checkpoint.json").write_bytes(b"\xff\xfe"), "is not a checkpoint"),
        (lambda directory: (directory / "checkpoint.json").write_text('{"stage":"alignment","iteration":7}'), "is not"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    directory = write(tmp_path)
    damage(directory)
    with pytest.raises(CheckpointError, match=rf"{directory} .*{message}|{directory} {message}.*"):
        Checkpoint.open(directory)


def test_a_checkpoint_is_set_aside_under_a_name_that_is_free(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for name in ("alignment-000007.damaged", "alignment-000007.damaged1"):
        assert store.set_aside(write(tmp_path)) == tmp_path / name
    assert store.latest() is None


def test_later_checkpoints_of_the_stage_are_set_aside_for_a_reason(tmp_path: Path) -> None:
    for position in (HERE, Position(Stage.ALIGNMENT, 8), Position(Stage.ALIGNMENT, 9), Position(Stage.COLD_START, 8)):
        write(tmp_path, position)
    store = CheckpointStore(tmp_path)
    assert store.set_aside_after(HERE, "rolled_back") == 2
    assert store.iterations(Stage.ALIGNMENT) == [7]
    assert store.iterations(Stage.COLD_START) == [8]
    assert (tmp_path / "alignment-000009.rolled_back").is_dir()


def test_pruning_spares_one_checkpoint(tmp_path: Path) -> None:
    for iteration in range(1, 6):
        write(tmp_path, Position(Stage.ALIGNMENT, iteration))
    CheckpointStore(tmp_path).prune(Stage.ALIGNMENT, keep=2, spared=[Position(Stage.ALIGNMENT, 2)])
    assert CheckpointStore(tmp_path).iterations(Stage.ALIGNMENT) == [2, 4, 5]


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}/alignment-000001 is not a checkpoint"):
        Checkpoint.open(tmp_path / "alignment-000001")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**SETTINGS, "seed": 1}, r"another seed \(0, now 1\)"),
        ({**SETTINGS, "lora": {"rank": 4, "targets": ["to_q"]}}, r"another lora\.rank \(2, now 4\)"),
        ({**SETTINGS, "lora": {"rank": 2}}, r"another lora\.targets"),
        ({**SETTINGS, "new": 1}, r"another new \(None, now 1\)"),
    ],
)
def test_other_settings_are_named(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"{message}.*use another --run-dir"):
        Checkpoint.open(write(tmp_path)).require_settings(settings)


def test_a_checkpoint_belongs_to_one_base_model(tmp_path: Path) -> None:
    directory = CheckpointStore(tmp_path).save(Position(Stage.ALIGNMENT, 7), STATE, SETTINGS, base="trained on")
    Checkpoint.open(directory).require_base("trained on")
    assert Checkpoint.open(directory).base == "trained on"
    with pytest.raises(CheckpointError, match=r"another base model than the one at backbone\.path"):
        Checkpoint.open(directory).require_base("another")


def test_the_latest_is_the_furthest_not_the_newest(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "nowhere").latest() is None
    assert CheckpointStore(tmp_path).latest() is None
    for position in (Position(Stage.ALIGNMENT, 2), Position(Stage.COLD_START, 900), Position(Stage.ALIGNMENT, 1)):
        write(tmp_path, position)
    (tmp_path / ".alignment-000009.partial").mkdir()
    (tmp_path / "notes").mkdir()
    assert CheckpointStore(tmp_path).latest() == tmp_path / "alignment-000002"


def test_pruning_keeps_the_newest_of_its_stage(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        write(tmp_path, Position(Stage.ALIGNMENT, number))
    write(tmp_path, Position(Stage.COLD_START, 1))
    CheckpointStore(tmp_path).prune(Stage.ALIGNMENT, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "alignment-000002",
        "alignment-000003",
        "cold_start-000001",
    ]
    CheckpointStore(tmp_path).prune(Stage.ALIGNMENT, keep=2)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_name_may_outgrow_six_digits(tmp_path: Path) -> None:
    for number in (999_999, 1_000_000, 10_000_000):
        write(tmp_path, Position(Stage.ALIGNMENT, number))
    assert CheckpointStore(tmp_path).latest() == tmp_path / "alignment-10000000"
    CheckpointStore(tmp_path).prune(Stage.ALIGNMENT, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alignment-1000000", "alignment-10000000"]


@pytest.mark.parametrize("name", ["alignment-7", "warmup-000007", "alignment-000007x", ".alignment-000007.partial"])
def test_what_is_not_named_like_a_checkpoint_is_none(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert CheckpointStore(tmp_path).latest() is None


def test_a_checkpoint_of_an_earlier_layout_is_read_but_not_continued(tmp_path: Path) -> None:
    directory = write(tmp_path)
    about = json.loads((directory / "checkpoint.json").read_text())
    del about["layout"]
    (directory / "checkpoint.json").write_text(json.dumps(about))
    checkpoint = Checkpoint.open(directory)
    state = checkpoint.state()
    assert checkpoint.position == HERE
    assert torch.equal(state["adapter/a"], STATE["adapter/a"])
    with pytest.raises(CheckpointError, match=r"written by an earlier version.*cold_start\.from_checkpoint"):
        checkpoint.require_settings(SETTINGS)


def test_of_a_kept_checkpoint_that_is_a_link_only_the_link_is_removed(tmp_path: Path) -> None:
    store, elsewhere = CheckpointStore(tmp_path / "checkpoints"), tmp_path / "kept"
    kept = write(elsewhere, Position(Stage.ALIGNMENT, 1))
    write(store.root, Position(Stage.ALIGNMENT, 2))
    (store.root / kept.name).symlink_to(kept)
    store.prune(Stage.ALIGNMENT, keep=1)
    assert [path.name for path in store.root.iterdir()] == ["alignment-000002"]
    assert Checkpoint.open(kept).position == Position(Stage.ALIGNMENT, 1)
    (store.root / "alignment-000003").symlink_to(kept)
    assert not write(store.root, Position(Stage.ALIGNMENT, 3)).is_symlink()


def test_a_checkpoint_that_cannot_be_removed_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path)
    for iteration in (1, 2):
        write(tmp_path, Position(Stage.ALIGNMENT, iteration))

    def busy(path: Path) -> None:
        raise OSError(16, "Device or resource busy", str(path))

    monkeypatch.setattr(checkpoint_module.shutil, "rmtree", busy)
    store.prune(Stage.ALIGNMENT, keep=1)
    assert [record.getMessage() for record in caplog.records] == [
        f"an old checkpoint stays: {tmp_path}/alignment-000001: Device or resource busy"
    ]


def test_checkpoints_on_a_disk_that_is_not_there_are_not_none(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to(tmp_path / "unmounted")
    with pytest.raises(CheckpointError, match=r"checkpoints is a link to .*/unmounted, which is not there"):
        CheckpointStore.of_run(tmp_path).latest()


def test_the_run_of_a_checkpoint_is_found_through_links(tmp_path: Path) -> None:
    run, disk = tmp_path / "run", tmp_path / "disk" / "checkpoints"
    write(disk)
    run.mkdir()
    (run / "config.yaml").write_text("")
    (run / "checkpoints").symlink_to(disk)
    (tmp_path / "best").symlink_to(run / "checkpoints" / "alignment-000007")
    assert CheckpointStore.run_of(run / "checkpoints" / "alignment-000007") == run
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    (tmp_path / "other" / "config.yaml").write_text("")
    here = write(tmp_path / "other" / "checkpoints")
    (tmp_path / "newest").symlink_to(here)
    assert CheckpointStore.run_of(tmp_path / "newest") == tmp_path / "other"


def test_a_checkpoint_in_another_folder_of_a_run_is_not_of_that_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    assert CheckpointStore.run_of(write(tmp_path / "copied")) is None
    assert CheckpointStore.run_of(write(tmp_path / "checkpoints")) == tmp_path


def test_another_text_encoder_or_decoder_is_refused(tmp_path: Path) -> None:
    directory = CheckpointStore(tmp_path).save(HERE, STATE, SETTINGS, base="base", parts="encoders")
    Checkpoint.open(directory).require_base("base", "encoders")
    with pytest.raises(CheckpointError, match="was trained with other text encoders, another VAE or another noise"):
        Checkpoint.open(directory).require_base("base", "others")
    for unknown in (write(tmp_path), directory):  # of an earlier version; a family that does not tell
        Checkpoint.open(unknown).require_base(Checkpoint.open(unknown).base)
