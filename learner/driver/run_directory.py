"""Run directory: locked by one process, used by one run, and unchanged until the run is known to be possible.

claimed: lock ─► refuse, or verify the checkpoint ─► (start everything) ─► begin: drop repeated parts, write config.yaml
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common.config.run import Config
from common.config.stages import AlignmentConfig, ColdStartConfig, SamplingConfig
from common.config.upgrade import upgraded
from common.errors import CheckpointError, ConfigError, DamagedCheckpoint
from common.prompts import prompts_fingerprint
from common.rewards.api import ServerInfo, with_precision
from common.types import Position, PromptSets, Stage
from common.whole_files import write_whole
from learner.checkpoint import Checkpoint, CheckpointStore
from learner.driver.ledger import LEDGER, cut_ledger
from learner.driver.run_copies import fetch_run, require_own_copies
from learner.driver.run_lock import LOCK, locked
from learner.driver.watchdog import WATCHDOG_FILE
from learner.preflight.command_line import Invocation
from learner.preflight.run_file import dump_config, load_saved_config
from learner.records.group_files import cut_groups
from learner.records.metrics_log import BEGINNING, cut_metrics, logged_until

DECLARED, PROMPTS = "reward_servers", "prompt_fingerprints"
WRITTEN = ("metrics.jsonl", WATCHDOG_FILE, LEDGER, "summary.json", "report.html")
WRITTEN_FOLDERS = ("samples", "lora")
"""Files, and folders of files, that a run writes besides config.yaml and checkpoints."""
OF_POLICIES = re.compile(r"(teacher_\d+|cold_start|rtdmd)(-\d+\.png|\.json)")
"""Names of the files that `learner/driver/comparison.py` writes into `samples/policies`."""
LATER = (DECLARED, PROMPTS)
"""Settings of a checkpoint that are compared by functions of their own, and that older ones lack."""
SECTIONS = {"sampling": SamplingConfig, "cold_start": ColdStartConfig, "alignment": AlignmentConfig}
PATHS = {"backbone": ("path", "teacher_path"), "prompts": ("train", "cold_start", "evaluation")}
"""Settings that say where files are. Their content is compared instead, so that files may move. A checkpoint of an
earlier version has no hashes of all of them: there the paths are compared.
"""


@dataclass(frozen=True)
class Start:
    """The start of a run: its position, and the checkpoint to load, if any.

    Attributes:
        settings: settings that the checkpoint must have been made with; None for the cold start of another run.
    """

    position: Position
    checkpoint: Path | None = None
    settings: dict[str, Any] | None = None

    @property
    def resumes(self) -> bool:
        """Whether the checkpoint belongs to this run."""
        return self.settings is not None


def decided(invocation: Invocation) -> Invocation:
    """With `--resume auto`: resume if the run directory holds a run, else start one; the choice is printed.

    A directory without the run to resume gets it from its copies (`checkpoint.copy_to`), if there are any. Two drivers
    that decide at the same time cannot both start: `claimed` locks the directory and looks again.

    Raises:
        ConfigError: the copies cannot be reached.
        CheckpointError: the folder of checkpoints is a link to nothing, or the copies cannot be read.
    """
    copy, resumes = invocation.config.checkpoint.copy_to, invocation.resume or invocation.resume_auto
    if copy is not None and resumes and not invocation.dry_run and not _holds_run(invocation.run_dir):
        with _locked(invocation.run_dir):
            fetch_run(copy, invocation.run_dir)
    if not invocation.resume_auto:
        return invocation
    resume = _holds_run(invocation.run_dir)
    print(f"--resume auto: {'continuing the' if resume else 'starting a'} run in {invocation.run_dir}", file=sys.stderr)
    return replace(invocation, resume=resume, resume_auto=False)


@contextmanager
def claimed(invocation: Invocation) -> Iterator[tuple[Path, Start]]:
    """The directory to write into and the start of the run. A dry run gets a temporary directory.

    Raises:
        ConfigError: another process uses the directory, it holds another run, or it holds none and `--resume` is given;
            or `checkpoint.copy_to` has the copies of another run.
        CheckpointError: the directory cannot be written, or the start checkpoint cannot be used.
    """
    if not (invocation.run_dir / LOCK).exists():
        _require_run(invocation)
    if invocation.dry_run:
        start = _verified_start(invocation)
        with TemporaryDirectory(prefix="rtdmd-") as scratch:
            yield Path(scratch), start
        return
    with _locked(invocation.run_dir):
        require_own_copies(invocation.config.checkpoint.copy_to, invocation.run_dir)
        yield invocation.run_dir, _verified_start(invocation)


def run_id(run_dir: Path) -> str:
    """A name of the run for reward servers that several runs share. It tells them neither path nor host."""
    return hashlib.sha256(f"{socket.gethostname()}:{run_dir.absolute()}".encode()).hexdigest()[:16]


def begin(invocation: Invocation, start: Start) -> None:
    """Take the directory for this run: drop what a resumed run will repeat, then write config.yaml."""
    run_dir = invocation.run_dir
    try:
        if invocation.resume:
            position = start.position if start.resumes else BEGINNING
            for name in ("metrics.jsonl", WATCHDOG_FILE):
                cut_metrics(run_dir / name, position)
            cut_groups(run_dir, position)
            cut_ledger(run_dir, position)
        if not start.resumes:
            # No checkpoint confirms the settings with which these were measured.
            _remove_policies(run_dir)
        write_whole(run_dir / "config.yaml", dump_config(invocation.config).encode())
    except OSError as error:
        raise _not_writable(run_dir, error) from error


def _remove_policies(run_dir: Path) -> None:
    for path in (run_dir / "samples" / "policies").glob("*"):
        if OF_POLICIES.fullmatch(path.name):
            path.unlink()


def continuity(
    config: Config, prompts: PromptSets | None = None, infos: Mapping[str, ServerInfo] | None = None
) -> dict[str, Any]:
    """The settings that a checkpoint depends on: with other settings the continued run would not be the same run.

    The model's content is compared by hashes, see `Checkpoint.require_base`.

    Args:
        prompts: those that the run trains on; with them, their fingerprints are settings.
        infos: the identities that the reward servers declared, once they are known.
    """
    whole = config.model_dump(mode="json")
    kept = {key: whole[key] for key in ("backbone", "lora", "sampling", "cold_start", "alignment")}
    kept["backbone"] = {key: value for key, value in kept["backbone"].items() if key not in PATHS["backbone"]}
    free = {"surrogate_gap_limit"}  # a check; the run that it stopped may continue with another one
    if config.alignment.learning_rate_schedule == "constant":
        free.add("iterations")  # other schedules' rates depend on the number of iterations
    if config.cold_start.consistency_fraction == 1:
        free.add("micro_batch")  # a smaller fraction is taken per micro-batch
    kept["alignment"] = {key: value for key, value in kept["alignment"].items() if key not in free}
    kept["rewards"] = {r.name: {"weight": r.weight, "differentiable": r.differentiable} for r in config.rewards}
    kept["seed"] = config.run.seed
    if prompts is not None:
        kept[PROMPTS] = _fingerprints(prompts)
    if infos is not None:
        kept[DECLARED] = {name: json.loads(info.to_json()) for name, info in infos.items()}
    return kept


def _as_of(saved: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The settings of a run as the version that wrote `saved` would have kept them.

    They have its paths, and no setting that it did not have yet, if that has its default: which is what it did.
    """
    whole, settings = config.model_dump(mode="json"), continuity(config)
    for name, section in SECTIONS.items():
        defaults, then = section().model_dump(mode="json"), saved.get(name, {})
        settings[name] = {k: value for k, value in settings[name].items() if k in then or value != defaults[k]}
    for name, keys in PATHS.items():
        paths = {key: whole[name].get(key) for key in keys if key in saved.get(name, {})}
        if paths:
            settings[name] = settings.get(name, {}) | paths
    return settings | {key: saved[key] for key in LATER if key in saved}


def _fingerprints(prompts: PromptSets) -> dict[str, str]:
    sets = {Stage.COLD_START: prompts.cold_start, Stage.ALIGNMENT: prompts.alignment}
    return {str(stage): prompts_fingerprint(chosen) for stage, chosen in sets.items()}


def require_same_prompts(start: Start, prompts: PromptSets, config: Config) -> None:
    """CheckpointError unless the stage in which the run continues has the prompts on which it began."""
    before = (start.settings or {}).get(PROMPTS, {})
    stage, now = str(start.position.stage), _fingerprints(prompts)
    finished = stage == Stage.COLD_START and start.position.iteration >= config.cold_start.iterations
    if not finished and before.get(stage, now[stage]) != now[stage]:
        raise CheckpointError(
            f"the prompts of the {stage} have changed since {start.checkpoint} was written: restore the prompt file, "
            "or use another --run-dir (cold_start.from_checkpoint starts it from a finished cold start)"
        )


def require_same_rewards(start: Start, infos: Mapping[str, ServerInfo]) -> None:
    """CheckpointError unless the reward servers declare the same identities as when the checkpoint was written."""
    declared = (start.settings or {}).get(DECLARED, {})
    before = {name: with_precision(identity) for name, identity in declared.items()}
    for name, info in infos.items():
        for field, now in json.loads(info.to_json()).items():
            if name in before and before[name].get(field) != now:
                raise CheckpointError(
                    f"the server of the reward {name} declares {field} = {now!r}, when {start.checkpoint} was written "
                    f"it was {before[name].get(field)!r}: bring the former server back, or use another --run-dir"
                )


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Create the directory and lock it."""
    with ExitStack() as stack:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(run_dir))
        except OSError as error:
            raise _not_writable(run_dir, error) from error
        yield


def _require_run(invocation: Invocation) -> None:
    """ConfigError if there is nothing to resume: a mistyped directory must neither be made nor start another run."""
    run_dir = invocation.run_dir
    if invocation.resume and not _holds_run(run_dir):
        raise ConfigError(
            f"--resume: there is no run in {run_dir.absolute()}: check --run-dir, or start one with --resume auto"
        )


def _holds_run(run_dir: Path) -> bool:
    return (run_dir / "config.yaml").exists() or CheckpointStore.of_run(run_dir).latest() is not None


def _require_free(run_dir: Path) -> None:
    """ConfigError if a new run would write over a run, or over what was copied from one."""
    if _holds_run(run_dir):
        raise ConfigError(f"{run_dir} holds a run already: use --resume to go on, or --run-dir for another directory")
    left = next((name for name in WRITTEN if (run_dir / name).is_file()), None)
    folders = (path for name in WRITTEN_FOLDERS for path in (run_dir / name).rglob("*") if path.is_file())
    left = left or next((str(path.relative_to(run_dir)) for path in folders), None)
    if left is not None:
        raise ConfigError(f"{run_dir} holds {left}, which a run would write over: name another --run-dir, or move it")


def _verified_start(invocation: Invocation) -> Start:
    """The run's own checkpoint, another run's cold start, or the beginning."""
    config, run_dir = invocation.config, invocation.run_dir
    _require_run(invocation)
    if not invocation.resume:
        _require_free(run_dir)
    store = CheckpointStore.of_run(run_dir)
    checkpoint, damaged = _newest_whole(store)
    if checkpoint is not None:
        # `require_same_prompts` and `require_same_rewards` compare the rest, once it is known.
        settings = _as_of(checkpoint.settings, config)
        checkpoint.require_settings(settings)
        for directory, error in damaged.items():
            where = "left" if invocation.dry_run else f"kept as {store.set_aside(directory)}"
            print(f"{error}; it is {where}, and the run resumes from {checkpoint.directory}", file=sys.stderr)
        return Start(checkpoint.position, checkpoint.directory, settings)
    if invocation.resume:
        _require_none_lost(run_dir)
        print(f"--resume: {run_dir} has no checkpoint yet: the run starts anew", file=sys.stderr)
    borrowed = config.cold_start.from_checkpoint
    if borrowed is not None:
        _require_same_student(_borrowed(borrowed), config)
        return Start(Position(Stage.COLD_START, config.cold_start.iterations), borrowed)
    return Start(BEGINNING)


def _newest_whole(store: CheckpointStore) -> tuple[Checkpoint | None, dict[Path, DamagedCheckpoint]]:
    """The most advanced checkpoint that is whole, or None if there are none; and the damaged ones after it.

    Raises:
        CheckpointError: all of them are damaged, or one cannot be read.
    """
    damaged: dict[Path, DamagedCheckpoint] = {}
    for directory in store.newest_first():
        try:
            return Checkpoint.open(directory), damaged
        except DamagedCheckpoint as error:
            damaged[directory] = error
    if damaged:
        raise CheckpointError(f"{next(iter(damaged.values()))}, and there is no other: restore it, or start anew")
    return None, damaged


def _opened(directory: Path, remedy: str) -> Checkpoint:
    try:
        return Checkpoint.open(directory)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {remedy}") from error


def _borrowed(directory: Path) -> Checkpoint:
    """Another run's cold start; ConfigError if something else is named."""
    stores = (CheckpointStore.of_run(directory), CheckpointStore(directory))
    inside = next(filter(None, (store.latest(Stage.COLD_START) for store in stores)), None)
    if inside is not None:
        raise ConfigError(f"cold_start.from_checkpoint: {directory} has checkpoints in it: name one, such as {inside}")
    if not Checkpoint.is_at(directory):
        raise ConfigError(
            f"cold_start.from_checkpoint: {directory} is not a checkpoint: name a folder "
            "runs/NAME/checkpoints/cold_start-NUMBER"
        )
    return _opened(directory, "cold_start.from_checkpoint: name another one")


def _require_none_lost(run_dir: Path) -> None:
    """CheckpointError if a run has no checkpoint, but went on beyond the first one."""
    saved, metrics = run_dir / "config.yaml", run_dir / "metrics.jsonl"
    if not saved.exists():
        return
    config, reached = load_saved_config(saved), logged_until(metrics)
    begun = reached.stage is Stage.COLD_START or config.cold_start.from_checkpoint is not None
    if not begun or reached.iteration > config.checkpoint.every:
        raise CheckpointError(
            f"--resume: {metrics} goes on to iteration {reached.iteration} of {reached.stage}, but "
            f"{CheckpointStore.of_run(run_dir).root} has no checkpoint: restore them, or use another --run-dir"
        )


STUDENTS_KEYS = (
    ("backbone", "student_guidance"),
    ("backbone", "max_sequence_length"),
    ("lora", "rank"),
    ("lora", "alpha"),
)
"""With other values of these settings, the weights of a cold start belong to a different student."""


def _require_same_student(checkpoint: Checkpoint, config: Config) -> None:
    """CheckpointError unless another run's cold start fits this run's student."""
    if checkpoint.position.stage is not Stage.COLD_START:
        raise CheckpointError(
            f"cold_start.from_checkpoint: {checkpoint.directory} is not a checkpoint of the cold start"
        )
    saved, own = upgraded(checkpoint.settings), config.model_dump(mode="json")
    for section, key in STUDENTS_KEYS:
        then, now = saved.get(section, {}).get(key), own[section].get(key)
        if then is not None and then != now:
            raise CheckpointError(
                f"cold_start.from_checkpoint: {checkpoint.directory} was trained with {section}.{key} = {then}, this "
                f"run has {now}: set {section}.{key} to {then}"
            )


def _not_writable(run_dir: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot write to {run_dir}: {error.strerror}; choose another --run-dir")
