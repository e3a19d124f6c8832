"""The lock of a run directory, the start of a run, and the records that a resumed run drops."""

from __future__ import annotations

import errno
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.config.run import Config
from common.errors import CheckpointError, ConfigError
from common.rewards.api import ServerInfo
from common.types import Position, Prompt, PromptSets, Stage
from learner.checkpoint import Checkpoint, CheckpointStore
from learner.driver.run_copies import RunCopies
from learner.driver.run_directory import (
    Start,
    begin,
    claimed,
    continuity,
    decided,
    require_same_prompts,
    require_same_rewards,
    run_id,
)
from learner.driver.run_lock import LOCK
from learner.preflight.command_line import Invocation
from learner.records.group_files import kept_names
from tests.helpers.run_directory import write_group

INFO = ServerInfo("hps", "1", "abc", True, 0.0, math.inf, "1", "hps:Hps", True)
STATE = {"adapter/a": torch.arange(4.0)}
TRY_LOCK = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


def config(**cold_start: object) -> Config:
    sections = {
        "run": {"name": "test"},
        "backbone": {"path": "model"},
        "prompts": {"train": "a.txt", "evaluation": "b.txt"},
        "cold_start": cold_start,
        "rewards": [{"name": "hps", "scorer": "hps", "differentiable": True}],
    }
    return Config.model_validate(sections)


def invocation(run_dir: Path, *, resume: bool = False, dry_run: bool = False, **cold_start: object) -> Invocation:
    return Invocation(config(**cold_start), run_dir, dry_run=dry_run, resume=resume)


def start_of(asked: Invocation) -> Start:
    with claimed(asked) as (_, start):
        return start


def finished_run(run_dir: Path) -> Path:
    """A run with a checkpoint, config.yaml and records; returns the checkpoint."""
    with claimed(invocation(run_dir)) as (_, start):
        begin(invocation(run_dir), start)
    (run_dir / "metrics.jsonl").write_text("")
    (run_dir / "samples" / "policies").mkdir(parents=True)
    (run_dir / "samples" / "policies" / "cold_start.json").write_text("")
    return CheckpointStore(run_dir / "checkpoints").save(Position(Stage.ALIGNMENT, 3), STATE, continuity(config()))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_new_run_starts_at_the_beginning_and_says_so(tmp_path: Path) -> None:
    asked = invocation(tmp_path / "new" / "run")
    with claimed(asked) as (run_dir, start):
        assert run_dir == asked.run_dir
        assert start == Start(Position(Stage.COLD_START, 0))
        assert not (run_dir / "config.yaml").exists()
        begin(asked, start)
        assert "name: test" in (run_dir / "config.yaml").read_text()


@pytest.mark.parametrize("left", ["config.yaml", "checkpoints"])
def test_a_directory_of_another_run_is_refused(tmp_path: Path, left: str) -> None:
    finished_run(tmp_path)
    if left == "config.yaml":
        (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    else:
        (tmp_path / "config.yaml").unlink()
    for dry_run in (False, True):
        with pytest.raises(ConfigError, match=f"{tmp_path} holds a run already: use --resume"):
            start_of(invocation(tmp_path, dry_run=dry_run))


@pytest.mark.parametrize("left", ["metrics.jsonl", "report.html", "lora/adapter.safetensors", "samples/policies/a.png"])
def test_what_was_copied_from_a_run_is_not_written_over(tmp_path: Path, left: str) -> None:
    """Without config.yaml and checkpoints, as people fetch it from a cluster."""
    (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / left).write_text("kept")
    for dry_run in (False, True):
        with pytest.raises(ConfigError, match=f"{tmp_path} holds {left}, which a run would write over: name another"):
            start_of(invocation(tmp_path, dry_run=dry_run))
    assert (tmp_path / left).read_text() == "kept"


def test_a_run_that_starts_anew_removes_its_own_records_alone(tmp_path: Path) -> None:
    with claimed(invocation(tmp_path)) as (_, start):
        begin(invocation(tmp_path), start)
    policies = tmp_path / "samples" / "policies"
    policies.mkdir(parents=True)
    for name in ("teacher_28.json", "teacher_28-00.png", "cold_start-100.png", "my_notes.png", "my_scores.json"):
        (policies / name).write_text("")
    asked = invocation(tmp_path, resume=True)
    with claimed(asked) as (_, start):
        begin(asked, start)
    assert sorted(path.name for path in policies.iterdir()) == ["my_notes.png", "my_scores.json"]


def test_a_resumed_run_removes_the_groups_that_it_will_sample_again(tmp_path: Path) -> None:
    finished_run(tmp_path)  # its checkpoint is after 3 iterations of alignment
    for iteration in (2, 3):
        write_group(tmp_path, iteration)
    asked = invocation(tmp_path, resume=True)
    with claimed(asked) as (_, start):
        begin(asked, start)
    assert kept_names(tmp_path) == ["alignment-000002"]


def test_what_a_failed_start_leaves_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    assert start_of(invocation(tmp_path)).checkpoint is None
    assert start_of(invocation(tmp_path)).checkpoint is None


def test_a_directory_has_one_owner_at_a_time(tmp_path: Path) -> None:
    def lock_elsewhere() -> int:
        command = [sys.executable, "-c", TRY_LOCK, str(tmp_path / LOCK)]
        return subprocess.run(command, stderr=subprocess.DEVNULL, timeout=60, check=False).returncode

    with claimed(invocation(tmp_path)):
        with pytest.raises(ConfigError, match=f"{tmp_path} is in use by another process"):
            start_of(invocation(tmp_path, resume=True))
        assert lock_elsewhere() != 0
    assert lock_elsewhere() == 0


@pytest.mark.parametrize("dry_run", [False, True])
def test_resuming_where_no_run_is_does_not_start_one(tmp_path: Path, dry_run: bool) -> None:
    """Neither in a directory that does not exist, nor in one that holds something else."""
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "notes.txt").write_text("")
    for wrong in (tmp_path / "rum", tmp_path / "else"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ConfigError, match=f"--resume: there is no run in {wrong}: check --run-dir"):
            start_of(invocation(wrong, resume=True, dry_run=dry_run))
        assert sorted(tmp_path.rglob("*")) == before


def test_automatic_resume_starts_a_run_and_then_continues_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command starts the run, repeats a start that left no checkpoint, and goes on from a checkpoint."""
    run_dir = tmp_path / "run"
    asked = replace(invocation(run_dir), resume_auto=True)
    first = decided(asked)
    assert (first.resume, first.resume_auto) == (False, False)
    assert capsys.readouterr().err == f"--resume auto: starting a run in {run_dir}\n"
    assert start_of(first).checkpoint is None
    assert not decided(asked).resume, "a start that failed leaves nothing to continue"
    with claimed(first) as (_, start):
        begin(first, start)
    assert decided(asked).resume
    assert start_of(decided(asked)).checkpoint is None
    checkpoint = CheckpointStore.of_run(run_dir).save(Position(Stage.COLD_START, 5), STATE, continuity(config()))
    capsys.readouterr()
    assert start_of(decided(asked)).checkpoint == checkpoint
    assert capsys.readouterr().err == f"--resume auto: continuing the run in {run_dir}\n"


@pytest.mark.parametrize("auto", [True, False])
def test_a_directory_without_the_run_is_filled_from_its_copies(auto: bool, tmp_path: Path) -> None:
    finished = finished_run(tmp_path / "first")
    RunCopies(str(tmp_path / "copies")).push(tmp_path / "first")
    asked = invocation(tmp_path / "second", resume=not auto)
    section = asked.config.checkpoint.model_copy(update={"copy_to": str(tmp_path / "copies")})
    asked = replace(asked, config=asked.config.model_copy(update={"checkpoint": section}), resume_auto=auto)
    dry = replace(asked, dry_run=True)
    assert decided(dry).resume is not auto
    assert not (tmp_path / "second").exists()
    found = decided(asked)
    assert found.resume
    checkpoint = start_of(found).checkpoint
    assert checkpoint is not None
    assert list(contents(checkpoint).values()) == list(contents(finished).values())


def test_automatic_resume_does_not_write_over_what_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("kept")
    with pytest.raises(ConfigError, match=r"holds metrics\.jsonl, which a run would write over"):
        start_of(decided(replace(invocation(tmp_path), resume_auto=True)))


def test_without_auto_nothing_is_decided(tmp_path: Path) -> None:
    for resume in (False, True):
        asked = invocation(tmp_path, resume=resume)
        assert decided(asked) is asked


def test_resuming_a_run_without_a_checkpoint_says_that_it_starts_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with claimed(invocation(tmp_path)) as (_, start):
        begin(invocation(tmp_path), start)
    assert start_of(invocation(tmp_path, resume=True)) == Start(Position(Stage.COLD_START, 0))
    assert capsys.readouterr().err == f"--resume: {tmp_path} has no checkpoint yet: the run starts anew\n"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=rf"cannot write to {tmp_path}/file/run.*--run-dir"):
        start_of(invocation(tmp_path / "file" / "run"))


def test_resuming_takes_the_checkpoint_and_its_settings(tmp_path: Path) -> None:
    checkpoint = finished_run(tmp_path)
    start = start_of(invocation(tmp_path, resume=True))
    assert start == Start(Position(Stage.ALIGNMENT, 3), checkpoint, continuity(config()))
    assert start.resumes


@pytest.mark.parametrize(
    "change", [{"weights_hash": "def"}, {"high": 2.0}, {"implementation": "x:Y"}, {"precision": "float16"}]
)
def test_a_reward_that_has_become_another_is_refused_on_resume(tmp_path: Path, change: dict[str, object]) -> None:
    finished_run(tmp_path)
    settings = continuity(config(), infos={"hps": INFO})
    checkpoint = CheckpointStore(tmp_path / "checkpoints").save(Position(Stage.ALIGNMENT, 4), STATE, settings)
    start = start_of(invocation(tmp_path, resume=True))
    require_same_rewards(start, {"hps": INFO})
    assert start.settings == settings
    (field,) = change
    with pytest.raises(CheckpointError, match=f"reward hps declares {field} = .*{checkpoint} was written"):
        require_same_rewards(start, {"hps": ServerInfo(**(vars(INFO) | change))})


@pytest.mark.parametrize(
    ("implementation", "precision"), [("hps:Hps", "float32"), ("reward_servers.scorers.hpsv3:HpsV3Scorer", "bfloat16")]
)
def test_a_reward_of_a_checkpoint_from_before_precisions_had_that_of_its_scorer(
    tmp_path: Path, implementation: str, precision: str
) -> None:
    finished_run(tmp_path)
    info = replace(INFO, implementation=implementation, precision=precision)
    settings = continuity(config(), infos={"hps": info})
    del settings["reward_servers"]["hps"]["precision"]
    CheckpointStore(tmp_path / "checkpoints").save(Position(Stage.ALIGNMENT, 4), STATE, settings)
    start = start_of(invocation(tmp_path, resume=True))
    require_same_rewards(start, {"hps": info})
    with pytest.raises(CheckpointError, match=f"declares precision = 'float16', .* it was '{precision}'"):
        require_same_rewards(start, {"hps": replace(info, precision="float16")})


def test_a_checkpoint_without_declared_rewards_is_taken_as_it_is(tmp_path: Path) -> None:
    finished_run(tmp_path)
    require_same_rewards(start_of(invocation(tmp_path, resume=True)), {"hps": INFO})
    require_same_rewards(start_of(invocation(tmp_path / "new")), {"hps": INFO})


@pytest.mark.parametrize(
    ("stage_one", "stage_two", "bound"),
    [
        ({}, {}, set()),
        ({}, {"learning_rate_schedule": "linear"}, {"iterations"}),
        ({"consistency_fraction": 0.25}, {}, {"micro_batch"}),
    ],
)
def test_what_changes_the_training_that_follows_is_kept(
    stage_one: dict[str, object], stage_two: dict[str, object], bound: set[str]
) -> None:
    """The number of iterations under a schedule, and the micro-batch that a fraction is taken of."""
    changed = config(**stage_one).model_dump() | {"alignment": stage_two}
    kept = continuity(Config.model_validate(changed))["alignment"]
    assert kept.keys() & {"iterations", "micro_batch"} == bound


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_checkpoint_that_cannot_be_used_is_refused_before_anything_changes(tmp_path: Path, dry_run: bool) -> None:
    checkpoint = finished_run(tmp_path)
    (tmp_path / LOCK).touch()
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"another cold_start\.batch_size \(72, now 8\)"):
        start_of(invocation(tmp_path, resume=True, dry_run=dry_run, batch_size=8))
    assert contents(tmp_path) == before
    state = checkpoint / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is damaged: its hash differs, and there is no other: restore it"):
        start_of(invocation(tmp_path, resume=True, dry_run=dry_run))


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    tmp_path: Path, dry_run: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = finished_run(tmp_path)
    store = CheckpointStore(tmp_path / "checkpoints")
    newer = [store.save(Position(Stage.ALIGNMENT, number), STATE, continuity(config())) for number in (5, 7)]
    (newer[0] / "state.safetensors").unlink()
    (newer[1] / "state.safetensors").write_bytes(b"cut")
    start = start_of(invocation(tmp_path, resume=True, dry_run=dry_run))
    assert (start.position, start.checkpoint) == (Position(Stage.ALIGNMENT, 3), whole)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert f"checkpoint {newer[1]} is damaged: its hash differs; it is " in said[0]
    assert all(line.endswith(f"and the run resumes from {whole}") for line in said)
    names = {path.name for path in store.root.iterdir()}
    left = {"alignment-000003"} | {f"{path.name}{'' if dry_run else '.damaged'}" for path in newer}
    assert names == left


def test_a_checkpoint_that_cannot_be_read_is_not_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails for a moment is no damage."""
    finished_run(tmp_path)
    read = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path.name == "state.safetensors":
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        start_of(invocation(tmp_path, resume=True))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["alignment-000003"]


def test_a_dry_run_writes_elsewhere(tmp_path: Path) -> None:
    finished_run(tmp_path)
    before = contents(tmp_path)
    with claimed(invocation(tmp_path, resume=True, dry_run=True)) as (scratch, start):
        assert scratch != tmp_path
        (scratch / "metrics.jsonl").write_text("x")
        assert start.position == Position(Stage.ALIGNMENT, 3)
    assert not scratch.exists()
    assert contents(tmp_path) == before
    with claimed(invocation(tmp_path / "new", dry_run=True)):
        assert not (tmp_path / "new").exists()


def test_a_borrowed_cold_start_is_verified(tmp_path: Path) -> None:
    borrowed = CheckpointStore(tmp_path).save(Position(Stage.COLD_START, 9), STATE, {})
    start = start_of(invocation(tmp_path / "run", from_checkpoint=borrowed, iterations=5))
    assert start == Start(Position(Stage.COLD_START, 5), borrowed)
    assert not start.resumes
    aligned = CheckpointStore(tmp_path).save(Position(Stage.ALIGNMENT, 1), STATE, {})
    with pytest.raises(CheckpointError, match=r"from_checkpoint: .* is not a checkpoint of the cold start"):
        start_of(invocation(tmp_path / "run", from_checkpoint=aligned))
    with pytest.raises(ConfigError, match=r"from_checkpoint: .*nowhere is not a checkpoint: name a folder runs/NAME/"):
        start_of(invocation(tmp_path / "run", from_checkpoint=tmp_path / "nowhere", dry_run=True))


def test_a_run_in_place_of_its_cold_start_is_told_which_folder_is_meant(tmp_path: Path) -> None:
    store = CheckpointStore.of_run(tmp_path)
    borrowed = store.save(Position(Stage.COLD_START, 9), STATE, {})
    store.save(Position(Stage.ALIGNMENT, 1), STATE, {})
    for named in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(ConfigError, match=f"{named} has checkpoints in it: name one, .*{borrowed}$"):
            start_of(invocation(tmp_path / "run", from_checkpoint=named))
    (borrowed / "state.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"hash differs; cold_start\.from_checkpoint: name another one$"):
        start_of(invocation(tmp_path / "run", from_checkpoint=borrowed))


@pytest.mark.parametrize(("key", "then"), [("lora.rank", 4), ("backbone.max_sequence_length", 256)])
def test_a_borrowed_cold_start_is_the_same_student(tmp_path: Path, key: str, then: int) -> None:
    """Its weights load under other settings too, but then they are another student."""
    settings = continuity(config())
    section, name = key.split(".")
    settings[section][name] = then
    borrowed = CheckpointStore(tmp_path).save(Position(Stage.COLD_START, 9), STATE, settings)
    with pytest.raises(CheckpointError, match=rf"was trained with {key} = {then}, .*set {key} to {then}"):
        start_of(invocation(tmp_path / "run", from_checkpoint=borrowed, iterations=5))


def test_a_cold_start_of_an_earlier_version_keeps_its_guidance_input(tmp_path: Path) -> None:
    """FLUX.1's three networks had one; now the student has its own, 1.0 by default."""
    settings = continuity(config())
    settings["alignment"] = {"weight_decay": 0.0, "gradient_clip": 1.0}
    settings["backbone"] = {"family": "flux1", "guidance_scale": 3.5}
    borrowed = CheckpointStore(tmp_path).save(Position(Stage.COLD_START, 9), STATE, settings)
    values = config(from_checkpoint=borrowed).model_dump(mode="json") | {"backbone": {"family": "flux1", "path": "m"}}
    with pytest.raises(CheckpointError, match=r"set backbone\.student_guidance to 3\.5"):
        start_of(Invocation(Config.model_validate(values), tmp_path / "run", dry_run=False, resume=False))


def prompt_sets(train: str = "a cat", evaluation: str = "a dog") -> PromptSets:
    trained = [Prompt(0, train)]
    return PromptSets(cold_start=trained, alignment=trained, evaluation=[Prompt(0, evaluation)])


def moved(run_dir: Path) -> Invocation:
    """The run resumed with every file at another path."""
    sections = config().model_dump(mode="json")
    sections["backbone"]["path"] = "/moved/model"
    sections["prompts"] |= {"train": "/moved/a.txt", "evaluation": "/moved/c.txt"}
    return Invocation(Config.model_validate(sections), run_dir, dry_run=False, resume=True)


def test_moved_files_are_the_same_run(tmp_path: Path) -> None:
    """The content of prompts and models is compared, not their paths."""
    checkpoint = finished_run(tmp_path)
    start = start_of(moved(tmp_path))
    assert start.position == Position(Stage.ALIGNMENT, 3)
    Checkpoint.open(checkpoint).require_settings(start.settings or {})  # as the learner does


def test_a_run_of_an_earlier_version_resumes_where_its_files_are(tmp_path: Path) -> None:
    """It has no hashes of all of them, so their paths are compared."""
    finished_run(tmp_path)
    earlier = config().model_dump(mode="json")
    settings = continuity(config()) | {key: earlier[key] for key in ("prompts", "backbone")}
    del settings["cold_start"]["objective"]
    checkpoint = CheckpointStore(tmp_path / "checkpoints").save(Position(Stage.ALIGNMENT, 4), STATE, settings)
    start = start_of(invocation(tmp_path, resume=True))
    assert start.position == Position(Stage.ALIGNMENT, 4)
    Checkpoint.open(checkpoint).require_settings(start.settings or {})
    with pytest.raises(CheckpointError, match=r"another backbone\.path \('model', now '/moved/model'\)"):
        start_of(moved(tmp_path))


def test_a_setting_that_is_newer_than_the_checkpoint_counts_as_its_default(tmp_path: Path) -> None:
    finished_run(tmp_path)
    settings = continuity(config(consistency_weight=0))
    del settings["cold_start"]["objective"]
    CheckpointStore(tmp_path / "checkpoints").save(Position(Stage.ALIGNMENT, 4), STATE, settings)
    same = invocation(tmp_path, resume=True, consistency_weight=0)
    assert start_of(same).position == Position(Stage.ALIGNMENT, 4)
    with pytest.raises(CheckpointError, match=r"another cold_start\.objective \(None, now 'clean'\)"):
        start_of(invocation(tmp_path, resume=True, objective="clean", consistency_weight=0))


def test_other_training_prompts_are_refused_on_resume(tmp_path: Path) -> None:
    finished_run(tmp_path)
    settings = continuity(config(), prompt_sets())
    checkpoint = CheckpointStore(tmp_path / "checkpoints").save(Position(Stage.ALIGNMENT, 4), STATE, settings)
    start = start_of(invocation(tmp_path, resume=True))
    require_same_prompts(start, prompt_sets(evaluation="others are evaluated anew"), config())
    with pytest.raises(CheckpointError, match=f"the prompts of the alignment have changed since {checkpoint} was"):
        require_same_prompts(start, prompt_sets(train="a cat."), config())


def test_the_prompts_of_another_stage_may_change(tmp_path: Path) -> None:
    """Those of a stage that has not begun, such as prompts that a reward refuses, and those of a finished one."""
    store = CheckpointStore(tmp_path / "checkpoints")
    settings, changed = continuity(config(), prompt_sets()), prompt_sets(train="a cat.")
    begin(invocation(tmp_path), Start(Position(Stage.COLD_START, 0)))
    total = config().cold_start.iterations
    store.save(Position(Stage.COLD_START, total - 1), STATE, settings)
    with pytest.raises(CheckpointError, match="the prompts of the cold_start have changed"):
        require_same_prompts(start_of(invocation(tmp_path, resume=True)), changed, config())
    store.save(Position(Stage.COLD_START, total), STATE, settings)
    require_same_prompts(start_of(invocation(tmp_path, resume=True)), changed, config())


def test_a_checkpoint_without_fingerprints_is_taken_as_it_is(tmp_path: Path) -> None:
    finished_run(tmp_path)
    require_same_prompts(start_of(invocation(tmp_path, resume=True)), prompt_sets(), config())


LINE = '{{"stage": "alignment", "iteration": {}, "kind": "train"}}\n'


@pytest.mark.parametrize(("with_checkpoint", "lines"), [(True, 3), (False, 0)])
def test_resuming_drops_what_will_be_repeated(tmp_path: Path, with_checkpoint: bool, lines: int) -> None:
    finished_run(tmp_path)
    written = "".join(LINE.format(number) for number in range(5))
    (tmp_path / "metrics.jsonl").write_text(written if with_checkpoint else written.replace("alignment", "cold_start"))
    if not with_checkpoint:
        (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    asked = invocation(tmp_path, resume=True)
    with claimed(asked) as (_, start):
        begin(asked, start)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == lines
    assert (tmp_path / "samples" / "policies" / "cold_start.json").exists() == with_checkpoint


@pytest.mark.parametrize(("iterations", "lost"), [(50, False), (51, True)])
def test_a_run_whose_checkpoints_are_gone_is_not_started_anew(tmp_path: Path, iterations: int, lost: bool) -> None:
    """It writes its first checkpoint after `checkpoint.every` iterations: 50."""
    with claimed(invocation(tmp_path)) as (_, start):
        begin(invocation(tmp_path), start)
    lines = [f'{{"stage": "cold_start", "iteration": {done}, "kind": "train"}}\n' for done in range(iterations)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    before = contents(tmp_path)
    if not lost:
        assert start_of(invocation(tmp_path, resume=True)) == Start(Position(Stage.COLD_START, 0))
        return
    with pytest.raises(CheckpointError, match=r"goes on to iteration 51 of cold_start, but .*checkpoints has no "):
        start_of(invocation(tmp_path, resume=True))
    assert contents(tmp_path) == before


def test_each_run_directory_has_its_own_id_and_keeps_it(tmp_path: Path) -> None:
    one, two = run_id(tmp_path / "one"), run_id(tmp_path / "two")
    assert one == run_id(tmp_path / "one") != two
    assert len(one) == 16
    assert "one" not in one
