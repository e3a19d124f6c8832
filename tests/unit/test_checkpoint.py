"""Checkpoints: whole or not at all, refused when damaged or of another run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.errors import CheckpointError
from learner import checkpoint as checkpoint_module
from learner.checkpoint import (
    Position,
    latest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    write_checkpoint,
)

STATE = {"adapter/a": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(3.0)}
SETTINGS = {"seed": 0, "lora": {"rank": 2, "targets": ["to_q"]}}
HERE = Position("alignment", 7)


def write(root: Path, position: Position = HERE, state: dict[str, Tensor] | None = None) -> Path:
    return write_checkpoint(root, position, state or STATE, SETTINGS)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    directory = write(tmp_path)
    assert directory == tmp_path / "alignment-000007"
    position, state = read_checkpoint(directory, SETTINGS)
    assert position == HERE
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
    for position in (HERE, Position("alignment", 8)):
        with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*No space left.*--resume"):
            write(tmp_path, position, {"adapter/a": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == [before]
    assert torch.equal(read_checkpoint(before)[1]["adapter/a"], STATE["adapter/a"])


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
            write(tmp_path, Position("alignment", 8))
    assert latest_checkpoint(tmp_path) == before
    after = write(tmp_path, Position("alignment", 8))
    assert latest_checkpoint(tmp_path) == after
    assert read_checkpoint(after)[0].iteration == 8


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=f"cannot write checkpoint {tmp_path}/file/alignment-000007"):
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


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "is damaged"),
        (truncate, "is damaged"),
        (forget_key, "is not a checkpoint"),
        (lambda directory: (directory / "state.safetensors").unlink(), "is not a checkpoint"),
        (lambda directory: (directory / "checkpoint.json").write_text('{"stage": "al'), "is not a checkpoint"),
        (lambda directory: (directory / "checkpoint.json").write_text("[]"), "is not a checkpoint"),
        (lambda directory: (directory / "checkpoint.json").write_bytes(b"\xff\xfe"), "is not a checkpoint"),
        (lambda directory: (directory / "checkpoint.json").write_text('{"stage":"alignment","iteration":7}'), "is not"),
    ],
)
def test_damage_is_named_with_the_way_out(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    directory = write(tmp_path)
    damage(directory)
    with pytest.raises(CheckpointError, match=rf"{directory} .*{message}|{directory} {message}.*") as caught:
        read_checkpoint(directory, SETTINGS)
    assert "remove it to resume from the one before" in str(caught.value)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}/alignment-000001 is not a checkpoint"):
        read_checkpoint(tmp_path / "alignment-000001")


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
        read_checkpoint(write(tmp_path), settings)


def test_a_checkpoint_belongs_to_one_base_model(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, Position("alignment", 7), STATE, SETTINGS, base="trained on")
    assert read_checkpoint(directory, SETTINGS, "trained on")[0].iteration == 7
    with pytest.raises(CheckpointError, match=r"another base model than the one at backbone\.path"):
        read_checkpoint(directory, SETTINGS, "another")


def test_the_latest_is_the_furthest_not_the_newest(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None
    assert latest_checkpoint(tmp_path) is None
    for position in (Position("alignment", 2), Position("cold_start", 900), Position("alignment", 1)):
        write(tmp_path, position)
    (tmp_path / ".alignment-000009.partial").mkdir()
    (tmp_path / "notes").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "alignment-000002"


def test_pruning_keeps_the_newest_of_its_stage(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        write(tmp_path, Position("alignment", number))
    write(tmp_path, Position("cold_start", 1))
    prune_checkpoints(tmp_path, "alignment", keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "alignment-000002",
        "alignment-000003",
        "cold_start-000001",
    ]
    prune_checkpoints(tmp_path, "alignment", keep=2)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_name_may_outgrow_six_digits(tmp_path: Path) -> None:
    for number in (999_999, 1_000_000, 10_000_000):
        write(tmp_path, Position("alignment", number))
    assert latest_checkpoint(tmp_path) == tmp_path / "alignment-10000000"
    prune_checkpoints(tmp_path, "alignment", keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alignment-1000000", "alignment-10000000"]


@pytest.mark.parametrize("name", ["alignment-7", "warmup-000007", "alignment-000007x", ".alignment-000007.partial"])
def test_what_is_not_named_like_a_checkpoint_is_none(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert latest_checkpoint(tmp_path) is None


def test_a_checkpoint_of_an_earlier_layout_is_read_but_not_continued(tmp_path: Path) -> None:
    directory = write(tmp_path)
    about = json.loads((directory / "checkpoint.json").read_text())
    del about["layout"]
    (directory / "checkpoint.json").write_text(json.dumps(about))
    position, state = read_checkpoint(directory)
    assert position == HERE
    assert torch.equal(state["adapter/a"], STATE["adapter/a"])
    with pytest.raises(CheckpointError, match=r"written by an earlier version.*cold_start\.from_checkpoint"):
        read_checkpoint(directory, SETTINGS)
