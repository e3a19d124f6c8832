"""A finished run for use: its student, from the newest checkpoint or, if none is left, from `lora/`. Needs no Ray.

    run directory ─► config.yaml, checkpoints/ or lora/ ─► a backbone whose student is the requested policy

The directory may have been moved. It does not contain the base model. That is looked up at the run file's path: from
here, from the project, and from the folders above the run, in one of which the run was probably started. Or it is named
anew. Its fingerprint shows whether the run was trained on it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from common.backbones import load_backbone
from common.backbones.base import Backbone
from common.config.run import Config
from common.errors import CheckpointError, ConfigError, ModelError
from common.project_files import with_found_paths
from common.types import Network, Stage
from learner.checkpoint import Checkpoint, CheckpointStore
from learner.preflight.run_file import load_saved_config
from learner.training.lora_file import ABOUT_LORA, LORA_FILE, LORA_PREFIX, scaled_lora, written_scale
from learner.training.networks import COLD_START, student_adapters

ALIGNED_POLICY, COLD_START_POLICY, TEACHER_POLICY = POLICIES = ("rtdmd", "cold_start", "teacher")
States = dict[str, dict[str, Tensor]]
"""Adapter name -> module path.lora_A.weight and .lora_B.weight -> weights, in the order of the student's stack."""


@dataclass(frozen=True)
class TrainedRun:
    """A run's directory, its configuration, and the checkpoint to use; None if only `lora/` is left."""

    directory: Path
    config: Config
    checkpoint: Path | None

    @classmethod
    def open(cls, path: Path, base: Path | None = None) -> Self:
        """Open a run directory, or one checkpoint of a run (`runs/NAME/checkpoints/alignment-000100`).

        `base` is the base model's current path, if it differs from the run file's.

        Raises:
            ConfigError: there is no config.yaml, or it is not valid.
        """
        names_checkpoint = Checkpoint.is_at(path)
        directory = CheckpointStore.run_of(path) if names_checkpoint else path
        if directory is None:
            raise ConfigError(
                f"{path} is a checkpoint without its run: copy the run's config.yaml too, to RUN/config.yaml beside "
                f"RUN/checkpoints/{path.name}"
            )
        if not (directory / "config.yaml").is_file():
            raise ConfigError(f"{path} is not the directory of a run or of its checkpoint: no {directory}/config.yaml")
        config = with_found_paths(load_saved_config(directory / "config.yaml"), directory.absolute().parents)
        if base is not None:
            config = config.model_copy(update={"backbone": config.backbone.model_copy(update={"path": base})})
        return cls(directory, config, path if names_checkpoint else CheckpointStore.of_run(directory).latest())

    @property
    def title(self) -> str:
        return self.config.run.name

    def load(self, policy: str, device: str) -> Backbone:
        """A backbone whose student is `policy`; the teacher gets no adapter.

        Raises:
            ModelError: the base model cannot be loaded.
            CheckpointError: the run has not reached this policy, its files are damaged, or it was trained on another
                base model.
        """
        target = torch.device(device)
        if policy == TEACHER_POLICY:
            return self._load_base(target)
        states, base = self._from_lora(policy) if self.checkpoint is None else _from_checkpoint(self.checkpoint, policy)
        backbone = self._load_base(target)
        if base and base != backbone.base_fingerprint():
            raise CheckpointError(
                f"{self.directory} was trained on another base model than the one at {self.config.backbone.path}: name "
                "the right one with --base DIR"
            )
        for name, state in states.items():
            # A run's lora/ is its whole stack as one adapter: its rank is the sum. A family's default targets may have
            # changed since.
            backbone.adapters.attach(name, state)
        backbone.adapters.define(Network.STUDENT, tuple(states))
        return backbone

    def _load_base(self, device: torch.device) -> Backbone:
        path = self.config.backbone.path
        try:
            return load_backbone(self.config.backbone, self.config.lora, device)
        except ModelError as error:
            if path.exists():
                raise
            raise ModelError(
                f"the run's base model {path} is neither here, nor in a folder above {self.directory}, nor on the hub: "
                f"name its directory with --base DIR ({error})"
            ) from error

    def _from_lora(self, policy: str) -> tuple[States, str]:
        """The exported student and the fingerprint of its base ("" if the run is too old to have written one)."""
        path = self.directory / "lora" / LORA_FILE
        if not path.is_file():
            raise CheckpointError(
                f"{self.directory} has neither a checkpoint nor {path.relative_to(self.directory)}: it has not trained "
                "far enough to be used"
            )
        if policy != ALIGNED_POLICY:
            raise CheckpointError(
                f"--policy {policy}: {self.directory} has no checkpoint, and its lora/ is the final policy alone; use "
                f"--policy {ALIGNED_POLICY}"
            )
        about = path.with_name(ABOUT_LORA)
        try:
            weights = load_file(path)
            said = dict(json.loads(about.read_text())) if about.is_file() else {"base": ""}
            base, own = str(said["base"]), self.config.lora.alpha / self.config.lora.rank
            scale = written_scale(path, said, before=own)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(f"{path.parent} is damaged: {error!r}; export the run's LoRA again") from error
        state = {key.removeprefix(LORA_PREFIX): value for key, value in weights.items()}
        return {"student": scaled_lora(state, scale / own)}, base


def _from_checkpoint(directory: Path, policy: str) -> tuple[States, str]:
    checkpoint = Checkpoint.open(directory)
    adapters = student_adapters(checkpoint.state())
    if policy == COLD_START_POLICY:
        adapters = {COLD_START: adapters[COLD_START]}
    elif checkpoint.position.stage is not Stage.ALIGNMENT:
        raise CheckpointError(
            f"--policy {policy}: {directory} is from the cold start, and the run has no later one: use --policy "
            f"{COLD_START_POLICY}"
        )
    return adapters, checkpoint.base
