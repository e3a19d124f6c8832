"""One rank of a learner on the tiny pipeline.

    python -m tests.helpers.rank_process PIPELINE OUT INDEX COUNT BASE [FAULT]

Trains both stages for two iterations each and writes its weights, and the metrics of its rows. BASE is "whole",
"sharded" or "recomputed", which is sharded with activations recomputed, or "surrogate": whole, with a surrogate reward.
FAULT is "error" or "death", which rank 1 meets in the first update of stage 2 of the student, or "unmeasured", an error
while the surrogate's groups are measured.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Module

from common.errors import RankError, RewardUnavailable
from common.types import Prompt
from learner.training.batch_metrics import Totals
from learner.training.networks import StageSettings
from learner.training.ranks import ALONE, Meeting
from learner.training.reward_gradients import DifferentiableRewards
from tests.helpers.tiny_training import (
    Brightness,
    alignment_settings,
    alignment_trainer,
    cold_start_settings,
    cold_start_trainer,
    new_networks,
    scored_groups,
)


class Faulty(Brightness):
    """Serves no gradient, in one of two ways."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self._fault = fault

    def differentiable(self, images_BCHW: Tensor, prompts: list[Prompt]) -> DifferentiableRewards:
        if self._fault == "death":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RewardUnavailable("bright", "http://127.0.0.1:1", "out")


def unmeasured(*arguments: object) -> Tensor:
    raise RewardUnavailable("bright", "http://127.0.0.1:1", "out")


def train(pipeline: Path, out: Path, index: int, count: int, base: str, fault: str = "") -> int:
    """Train, write the files, and return the number of frozen weights in this process."""
    whole_base = base in ("whole", "surrogate")
    sharded = count > 1 and not whole_base
    ranks = ALONE if count == 1 else Meeting(index, count, (out / "meeting").as_uri(), 120.0, sharded).join()
    # Whole, it does not divide by two.
    # Of 4, each rank and micro-batch has as many regularised rows as any other.
    settings = cold_start_settings(batch_size=5 if whole_base else 4, consistency_fraction=0.5)
    networks = new_networks(pipeline, settings, ranks)
    if base == "recomputed":
        networks.backbone.enable_gradient_checkpointing()
    trainer = cold_start_trainer(networks, settings)
    totals: list[Totals] = [trainer.update(iteration) for iteration in range(2)]
    # Micro-batches of other sizes on one rank and on two.
    whole = {"group_size": 3, "prompts_per_iteration": 3}
    groups = whole if whole_base else {"group_size": 4, "signal_every": None}  # a sharded base measures none
    policy = "surrogate_reward" if base == "surrogate" else "subgrpo"
    alignment = alignment_settings(micro_batch=2, policy_gradient=policy, **groups)
    networks.begin_alignment(StageSettings.of(alignment))
    faulty = fault if index == 1 else ""
    served = Faulty(faulty) if faulty in ("error", "death") else None
    trainer = alignment_trainer(networks, alignment, served=served)
    if faulty == "unmeasured":
        trainer._surrogate._measured = unmeasured
    for iteration in range(2):
        try:
            totals.append(trainer.update(scored_groups(networks.backbone, iteration, alignment))[0])
        except (RankError, RewardUnavailable) as error:
            print(f"{type(error).__name__}: {error}")
            sys.exit(1)
    save_file(networks.state(), out / f"rank-{index}-of-{count}.safetensors")
    (out / f"rank-{index}-of-{count}.json").write_text(
        json.dumps([{name: part for name, part in vars(total).items() if part} for total in totals])
    )
    return held_weights(networks.backbone.adapters.modules())


def held_weights(bases: Iterable[Module]) -> int:
    """Frozen weights in this process."""
    frozen = [parameter for base in bases for name, parameter in base.named_parameters() if ".lora_" not in name]
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in frozen)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(train(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:]))
