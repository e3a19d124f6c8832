"""Checks before a run starts that the run file alone cannot decide: prompts, rewards and the loaded model."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.config.processes import ROUNDING, shared_gpus
from common.config.run import Config
from common.errors import ConfigError, WireError
from common.renoise_levels import RENOISE_MARGIN, RENOISE_MAX
from common.rewards.access import RewardAccess
from common.rewards.control_request import ControlRequest, Reference
from common.types import Guidance, Prompt, PromptSets
from common.wire import MAX_ITEMS, pack, unpack


def check_enough_prompts(config: Config, prompts: PromptSets) -> None:
    """ConfigError when there are fewer prompts than a batch, which repeats none, or the final table needs."""
    files = config.prompts
    for key, needed, path, available in (
        ("cold_start.batch_size", config.cold_start.batch_size, files.cold_start or files.train, prompts.cold_start),
        ("alignment.prompts_per_iteration", config.alignment.prompts_per_iteration, files.train, prompts.alignment),
    ):
        if needed > len(available):
            raise ConfigError(f"{key} = {needed}, but {path} has only {len(available)} prompts")
    first, count = config.evaluation.final_from, len(prompts.evaluation)
    if first >= count:
        raise ConfigError(
            f"evaluation.final_from = {first}, but {files.evaluation} has only {count} prompts: the final table would "
            "be empty"
        )


def warn_of_repeated_prompts(config: Config, prompts: PromptSets) -> None:
    """Say how many prompts of the final table are also trained on: for these it is not held out."""
    images, files = config.evaluation, config.prompts
    trained = {prompt.text for prompt in (*prompts.cold_start, *prompts.alignment)}
    final = prompts.evaluation[images.final_from :][: images.final_prompts]
    repeated = sum(prompt.text in trained for prompt in final)
    if repeated:
        print(
            f"warning: {repeated} of the {len(final)} prompts of the final table ({files.evaluation}) are training "
            "prompts too: it is held out for the others alone",
            file=sys.stderr,
        )


def check_requests(config: Config, prompts: PromptSets) -> None:
    """ConfigError when a prompt and its metadata are too long to be sent once for each image of a request."""
    files, images = config.prompts, config.evaluation
    for key, count, path, chosen in (
        ("alignment.group_size", config.alignment.group_size, files.train, prompts.alignment),
        ("evaluation.images_per_prompt", images.images_per_prompt, files.evaluation, prompts.evaluation),
        ("evaluation.final_images_per_prompt", images.final_images_per_prompt, files.evaluation, prompts.evaluation),
    ):
        for prompt in chosen:
            one = [prompt.text, prompt.metadata]
            # An item takes at least a byte, so most prompts need not be repeated to be measured.
            if len(pack({"one": one})) * count > MAX_ITEMS:
                _check_request(f"{path}: the prompt {prompt.text[:40]!r}", f"{key} = {count}", one * count)


def _check_request(prompt: str, setting: str, repeated: list[Any]) -> None:
    try:
        unpack(pack({"repeated": repeated}))
    except WireError as error:
        raise ConfigError(
            f"{prompt} and its metadata are sent once for each image; with {setting} that is more than a reward server "
            "reads in one request: shorten its metadata"
        ) from error


def check_files(config: Config, *, resuming: bool) -> None:
    """All missing files are reported in one error. A resumed run does not need the checkpoint it started from."""
    named = {f"prompts.{name}": path for name, path in config.prompts if path is not None}
    named |= {f"rewards.{one.name}.model": one.model for one in config.rewards if one.url == "local" and one.model}
    if config.cold_start.from_checkpoint is not None and not resuming:
        named["cold_start.from_checkpoint"] = config.cold_start.from_checkpoint
    missing = [f"{key} = {path}" for key, path in named.items() if not os.path.exists(path)]
    if missing:
        raise ConfigError(f"missing: {', '.join(missing)} (looked for from {Path.cwd()})")


def gpus_wanted(config: Config) -> float:
    """GPUs wanted by learner and workers together."""
    learner, workers = config.learner, config.workers
    return learner.ranks * learner.num_gpus + workers.least * workers.num_gpus


def check_gpus(config: Config) -> None:
    """ConfigError when this machine has too few GPUs. A cluster may grow, so it is not checked here."""
    import torch  # only here: other checks run without torch

    learner, workers, found = config.learner, config.workers, torch.cuda.device_count()
    shared = shared_gpus(learner, workers)
    shares = [learner.num_gpus] * learner.ranks + [workers.num_gpus] * workers.least
    if not _have_room(shares if shared is None else [shared.share] * shared.count, found):
        raise ConfigError(
            f"learner.ranks = {learner.ranks} of learner.num_gpus = {learner.num_gpus:g} and "
            f"{workers.least} workers of workers.num_gpus = {workers.num_gpus:g} have no room on this machine's "
            f"{found} GPUs: ask for fewer (they may be shares, 0 is the CPU), or submit the run to a Ray cluster"
        )


def check_reward_devices(config: Config) -> None:
    """ConfigError for a local reward on a GPU that this machine does not have."""
    wanted = {one.name: one.device for one in config.rewards if one.url == "local" and one.device != "cpu"}
    if not wanted:
        return
    from common.torch_device import devices  # only here: it imports torch

    there = devices()
    for name, device in wanted.items():
        index = int(device.partition(":")[2] or 0)
        if index >= len(there) - 1:
            raise ConfigError(f"rewards.{name}.device = {device}: usable on this machine: {', '.join(there)}")


def _have_room(shares: Sequence[float], gpus: int) -> bool:
    """Whether each share fits on one GPU, or on whole ones, when placed one after the other as Ray does."""
    free = [1.0] * gpus
    for share in shares:
        part, count = (share, 1) if share < 1 else (1.0, math.ceil(share))
        chosen = [index for index, room in enumerate(free) if room >= part - ROUNDING][:count]
        if share > 0 and len(chosen) < count:
            return False
        for index in chosen:
            free[index] -= part
    return True


def check_schedule(config: Config, sigmas: tuple[float, ...]) -> None:
    """Stage 1 and the surrogate reward renoise from every level but the first: there must be room above the second."""
    highest = RENOISE_MAX - RENOISE_MARGIN
    cold_start, alignment = config.cold_start, config.alignment
    distils = cold_start.iterations > 0 and cold_start.from_checkpoint is None
    learns_reward = alignment.iterations > 0 and alignment.policy_gradient == "surrogate_reward"
    if (distils or learns_reward) and sigmas[1] > highest:
        raise ConfigError(
            f"sampling.steps = {config.sampling.steps}: the second noise level is {sigmas[1]:.3f}, and the "
            f"{'cold start' if distils else 'surrogate reward'} needs it to be at most {highest:.2f}: use fewer steps"
        )


def check_guidance(config: Config, guidance: Guidance) -> None:
    """The evaluated teacher is guided; a model without guidance would fail there, after the first stage."""
    evaluation = config.evaluation
    if guidance is Guidance.NONE and evaluation.teacher and evaluation.teacher_guidance != 1:
        raise ConfigError(
            f"evaluation.teacher_guidance = {evaluation.teacher_guidance:g}: the teacher at {config.backbone.path} "
            "takes no guidance: set it to 1"
        )


def control_requests(config: Config, train: Prompt, evaluation: Prompt) -> dict[str, ControlRequest]:
    """A control request for every reward, with a prompt from the set that the reward is used on."""
    chosen = {reward.name: train if reward.trained else evaluation for reward in config.rewards}
    return {name: ControlRequest(prompt.text, dict(prompt.metadata)) for name, prompt in chosen.items()}


def check_rewards(config: Config, access: RewardAccess, controls: dict[str, ControlRequest]) -> RewardAccess:
    """Check every server's identity and send every reward its control request before anything expensive starts.

    Returns:
        The access with these control requests, the identity of each reward in this run and, if the run file names a
        Redis, what its servers answer to random pictures.

    Raises:
        RewardError: no server of a reward answers, or one is not a reward server or differs from the others.
        ConfigError: a server cannot do what the run requires.
    """
    access = replace(access, controls=controls)
    references: dict[str, Reference] = {}
    with access.client() as client:
        infos = {reward.name: client.verify(reward.name) for reward in config.rewards}
        for reward in config.rewards:
            if reward.differentiable and not infos[reward.name].differentiable:
                raise ConfigError(
                    f"rewards.{reward.name}.differentiable is true, but its server has no gradient: set it to false"
                )
            client.send_control(reward.name, controls[reward.name])
            if reward.differentiable:
                client.send_control(reward.name, controls[reward.name], gradient=True)
            # In a Redis of the run's own servers hardly register: a worker asks when the first does.
            named = config.redis.url not in ("embedded", "none")
            reference = client.reference(reward.name) if named else None
            if reference is not None:
                references[reward.name] = reference
    return replace(access, infos=infos, references=references)
