"""Forecast of a run before anything is loaded: placement, memory of each process, seconds per iteration.

All numbers are estimated from the model's sizes alone. A run writes prediction and measurement into summary.json.

Memory of a learner's rank: the frozen bases, text encoders and VAE; float32 adapters with gradients, two moments and
the average; the latents of a micro-batch, on the CPU of all its samples; the transformer's activations of one
micro-batch; the VAE's activations of one chunk, if rewards are back-propagated. Memory of a worker: the frozen parts,
the student's adapters, one block's activations of a group, and one decoded chunk. Local reward servers on the same GPU
are not included. Seconds include only the transformer's passes: no VAE, no rewards, no data transfer.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from common.backbones.files.sizes import ModelSizes
from common.config.processes import SharedGpus, shared_gpus
from common.config.run import Config
from common.errors import ConfigError

GIB = 2**30
FLOAT32 = 4
TRAINED_COPIES = 5
"""A trained adapter is held this many times: weights, gradient, two moments and the average."""
BLOCK_ACTIVATIONS = 23
"""Activation values saved per token and hidden unit, per block with two adapters (counted: `benchmarks/count.py`)."""
VAE_ACTIVATIONS = 45
"""Activation values saved per pixel and channel of the decoder's last stage (counted: `benchmarks/count.py`)."""
DECODE_VALUES = 7
"""Values per pixel and channel of that stage that decoding holds at once, without a backward pass (a guess)."""
PROCESS_GIB = {"cpu": 0.9, "cuda": 0.6}
"""Memory of Python, torch and its libraries before any model is loaded: CPU memory, or GPU memory."""
MATRIX_SIDE = 512
UTILISATION = 0.4
"""Transformers of this kind are guessed to reach this fraction of the device's peak. Not measured on a GPU yet."""


@dataclass(frozen=True)
class Device:
    """A device's memory in GiB and its peak bfloat16 operations per second."""

    name: str
    memory_gib: float
    peak_flops: float


DEVICES = {
    device.name: device
    for device in (
        Device("a100", 80, 312e12),
        Device("l40s", 48, 362e12),
        Device("h100", 80, 989e12),
        Device("h200", 141, 989e12),
        Device("b200", 180, 2250e12),
    )
}


def this_cpu(threads: int, dtype: str = "float32") -> Device:
    """This machine's memory, and `threads` times the speed of one thread: the fastest of several matrix products.

    In the run's own type: CPUs without instructions for bfloat16 are slower in it.
    """
    import torch  # only here: other parts of preflight run without torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    matrix = torch.ones(MATRIX_SIDE, MATRIX_SIDE, dtype={"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype])
    fastest = math.inf
    for _ in range(20):
        started = time.perf_counter()
        matrix @ matrix
        fastest = min(fastest, time.perf_counter() - started)
    torch.set_num_threads(before)
    flops = threads * 2.0 * MATRIX_SIDE**3 / fastest
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", memory / GIB, flops)


@dataclass(frozen=True)
class Prediction:
    """Peak memory of one process in GiB, and seconds of an iteration by part.

    Attributes:
        seconds: of the alignment, or of the cold start where there is no alignment.
        cold_start: seconds of an iteration of the cold start by part.
        learner_idle_gib, worker_idle_gib: what a process holds between its passes.
    """

    learner_gib: float
    worker_gib: float
    seconds: dict[str, float]
    learner_idle_gib: float = 0.0
    worker_idle_gib: float = 0.0
    cold_start: dict[str, float] = field(default_factory=dict)

    @property
    def iteration_s(self) -> float:
        return sum(self.seconds.values())


def predict(config: Config, sizes: ModelSizes, device: Device) -> Prediction:
    """The forecast of a run on such devices."""
    adapter = sizes.adapter * FLOAT32 / GIB
    kind = "cpu" if device.name == "cpu" else "cuda"
    number = 4 if config.backbone.dtype == "float32" else 2
    # Student and fake score each train an adapter; stage 2 keeps the two of the cold start as well, frozen.
    frozen = 2 if config.alignment.iterations > 0 else 0
    learner = PROCESS_GIB[kind] + _frozen_gib(config, sizes, sizes.bases, sharded=config.learner.shard_base)
    # The surrogate reward has no average.
    surrogate = TRAINED_COPIES - 1 if _learns_surrogate(config) else 0
    learner += adapter * (frozen + 2 * TRAINED_COPIES + surrogate)
    learner_idle = learner
    learner += _activations_gib(config, sizes)
    if config.alignment.iterations > 0:
        held = _rank_samples(config) if kind == "cpu" else _micro_batch(config)
        learner += held * (config.sampling.steps + 1) * sizes.latents * FLOAT32 / GIB
    one_sample = sizes.tokens * sizes.width * BLOCK_ACTIVATIONS * number / GIB
    # Two bases while the teacher is evaluated; between passes the teacher's is not on the GPU.
    worker, worker_idle = (
        PROCESS_GIB[kind] + _frozen_gib(config, sizes, bases) + 2 * adapter for bases in (sizes.bases, 1)
    )
    worker += config.alignment.group_size * one_sample
    worker += min(config.backbone.decode_chunk, config.alignment.group_size) * _image_gib(config, sizes, DECODE_VALUES)
    cold_start = _cold_start_seconds(config, sizes, device)
    seconds = _alignment_seconds(config, sizes, device) if config.alignment.iterations > 0 else cold_start
    return Prediction(learner, worker, seconds, learner_idle, worker_idle, cold_start)


def _frozen_gib(config: Config, sizes: ModelSizes, bases: int, *, sharded: bool = False) -> float:
    settings = config.backbone
    number = 4 if settings.dtype == "float32" else 2
    encoders = sizes.text_encoders * (1 if settings.text_encoder_int8 else number)
    weights = float(sizes.transformer * bases)
    if sharded:
        # Its own part and two whole blocks: one in use, one in transfer.
        weights = weights / config.learner.ranks + 2 * sizes.transformer / sizes.layers
    parts = weights * number + sizes.vae * number
    return (parts if settings.idle_on_cpu else parts + encoders) / GIB


def _activations_gib(config: Config, sizes: ModelSizes) -> float:
    settings = config.backbone
    number = 4 if settings.dtype == "float32" else 2
    block = sizes.tokens * sizes.width * number
    layers = sizes.layers + BLOCK_ACTIVATIONS if settings.gradient_checkpointing else sizes.layers * BLOCK_ACTIVATIONS
    transformer = max(_passes_kept(config)) * block * layers
    vae = 0.0
    if config.alignment.reward_gradient_weight > 0 and config.alignment.iterations > 0:
        vae = min(settings.decode_chunk, _micro_batch(config)) * _image_gib(config, sizes, VAE_ACTIVATIONS)
    return transformer / GIB + vae


def _image_gib(config: Config, sizes: ModelSizes, values: int) -> float:
    """GiB of so many values per pixel and channel of the decoder's last stage, for one image."""
    return sizes.pixels * sizes.vae_width * values * (4 if config.backbone.dtype == "float32" else 2) / GIB


def _passes_kept(config: Config) -> tuple[float, float]:
    """Passes per sample whose activations a rank keeps at once, in stage 1 and in stage 2; 0 for a stage that is off.

    In stage 1 a rank processes its share of a batch at once, in stage 2 in micro-batches. The fake score keeps most, or
    the student: its last step waits for the rewards' gradient while a policy step is trained.
    """
    alignment, cold_start = config.alignment, config.cold_start
    distilling = aligning = 0.0
    if cold_start.iterations > 0 and cold_start.from_checkpoint is None:
        share = math.ceil(cold_start.batch_size / config.learner.ranks)
        distilling = share * (1 + _regularised_passes(config, cold_start.consistency_weight))
    if alignment.iterations > 0:
        waiting = alignment.reward_gradient_weight > 0 and _policy_steps(config) > 0
        fake_score = 1 + _regularised_passes(config, alignment.consistency_weight)
        aligning = _micro_batch(config) * max(fake_score, 2 if waiting else 1)
    return distilling, aligning


def _regularised_passes(config: Config, consistency_weight: float) -> float:
    """Extra passes of the fake score per sample for the consistency regulariser of a stage."""
    return 2 * config.cold_start.consistency_fraction if consistency_weight > 0 else 0.0


def _micro_batch(config: Config) -> int:
    return min(config.alignment.micro_batch, _rank_samples(config))


def _rank_samples(config: Config) -> int:
    """Samples of an alignment iteration that a rank trains on."""
    alignment = config.alignment
    return math.ceil(alignment.prompts_per_iteration * alignment.group_size / config.learner.ranks)


def _trained_pass(config: Config) -> int:
    """Passes that a trained one costs: a backward pass through a frozen base costs as much as a forward pass."""
    return 3 if config.backbone.gradient_checkpointing else 2


def _cold_start_seconds(config: Config, sizes: ModelSizes, device: Device) -> dict[str, float]:
    """Seconds of the transformer's passes in an iteration of the cold start."""
    cold_start, trained = config.cold_start, _trained_pass(config)
    one_pass = cold_start.batch_size * sizes.forward_flops / (UTILISATION * device.peak_flops) / config.learner.ranks
    fake_score = trained * (1 + _regularised_passes(config, cold_start.consistency_weight))
    # Each update rolls the student to a middle step on average; the student's update keeps the last step's graph.
    rolled = (config.sampling.steps + 1) / 2
    student = (rolled + trained - 1 + 1 + sizes.guided_passes) / cold_start.student_every
    return {"fake_score": one_pass * (rolled + fake_score), "student": one_pass * student}


def _alignment_seconds(config: Config, sizes: ModelSizes, device: Device) -> dict[str, float]:
    """Seconds of the transformer's passes in an iteration of the alignment."""
    alignment, trained = config.alignment, _trained_pass(config)
    steps = _policy_steps(config)
    matching = 1 + sizes.guided_passes if alignment.matching_weight > 0 else 0
    samples = alignment.prompts_per_iteration * alignment.group_size
    one_pass = samples * sizes.forward_flops / (UTILISATION * device.peak_flops)
    ranks = config.learner.ranks
    # Of a group's errors and of the reference, without gradient; then those that train.
    learned = {"surrogate_reward": one_pass * (trained + 2) / ranks} if _learns_surrogate(config) else {}
    judged = 2 * steps if learned else 0
    return learned | {
        "rollouts": one_pass * config.sampling.steps / config.workers.most,
        "fake_score": one_pass * trained * (1 + _regularised_passes(config, alignment.consistency_weight)) / ranks,
        "student": one_pass * (trained * (steps + 1) + matching + judged) / ranks,
    }


def _learns_surrogate(config: Config) -> bool:
    return config.alignment.iterations > 0 and config.alignment.policy_gradient == "surrogate_reward"


def _policy_steps(config: Config) -> int:
    """Steps per iteration that the policy term trains."""
    policy = config.alignment.policy_gradient
    if policy == "grpo":
        return config.sampling.steps - 1
    return 0 if policy == "none" else config.alignment.selected_steps


def requirements_text(config: Config, sizes: ModelSizes, prediction: Prediction, device: Device) -> str:
    """The output of `rtdmd forecast`."""
    rows = [
        ("learner rank", config.learner.ranks, config.learner.num_gpus, prediction.learner_gib),
        ("rollout worker", config.workers.most, config.workers.num_gpus, prediction.worker_gib),
    ]
    shared = shared_gpus(config.learner, config.workers)
    if shared is not None:
        rows.append(("both on one GPU", shared.count, shared.share, _both_gib(config, shared, prediction)))
    lines = [
        f"{config.backbone.path}: transformer {sizes.transformer / 1e6:,.1f} M weights"
        f"{' (two bases)' if sizes.bases > 1 else ''}, {sizes.image_tokens} + {sizes.text_tokens} tokens a sample, "
        f"text encoders {sizes.text_encoders / 1e6:,.1f} M, VAE {sizes.vae / 1e6:,.1f} M, "
        f"adapter {sizes.adapter / 1e6:,.2f} M",
        "",
        f"{'process':16}{'count':>6}{'GPUs each':>11}{'peak GiB':>10}   on {device.name}, {device.memory_gib:.0f} GiB",
    ]
    for name, number, gpus, gib in rows:
        fits = "fits" if gib <= device.memory_gib else "DOES NOT FIT"
        lines.append(f"{name:16}{number:>6}{gpus:>11g}{gib:>10.1f}   {fits}")
    if any(gib > device.memory_gib for *_, gib in rows):
        lines.append("to need less: a smaller alignment.micro_batch, group_size or backbone.decode_chunk; backbone.")
        lines[-1] += "gradient_checkpointing, idle_on_cpu, text_encoder_int8; learner.shard_base"
    lines.append("")
    if config.cold_start.iterations > 0 and config.cold_start.from_checkpoint is None:
        lines.append(_time_text("the cold start", prediction.cold_start, config.cold_start.iterations))
    if config.alignment.iterations > 0:
        lines.append(_time_text("alignment", prediction.seconds, config.alignment.iterations))
    lines.append("the passes of the transformer alone: without VAE, rewards and evaluations")
    lines.append(f"estimated at {UTILISATION:.0%} of {device.peak_flops / 1e12:,.2f} TFLOP/s; a run measures it")
    return "\n".join(lines)


def _time_text(stage: str, seconds: Mapping[str, float], iterations: int) -> str:
    parts, one = ", ".join(f"{name} {value:.2f}" for name, value in seconds.items()), sum(seconds.values())
    return f"an iteration of {stage}: {one:.2f} s ({parts}); all {iterations:,}: {one * iterations / 3600:.1f} h"


def _both_gib(config: Config, shared: SharedGpus, prediction: Prediction) -> float:
    """Peak memory of a GPU that ranks and workers share. At staleness 0 one kind is idle while the other computes."""
    learner, worker = shared.ranks * prediction.learner_gib, shared.workers * prediction.worker_gib
    if not config.phases_share_gpus:
        return learner + worker
    return max(
        learner + shared.workers * prediction.worker_idle_gib, worker + shared.ranks * prediction.learner_idle_gib
    )


def choose_device(name: str, config: Config) -> Device:
    """The named device; "auto" is this CPU, or an h200 if the run file asks for GPUs.

    Raises:
        ConfigError: there is no device of that name.
    """
    if name == "auto":
        if config.learner.num_gpus > 0:
            return DEVICES["h200"]
        return this_cpu(config.learner.threads or os.cpu_count() or 1, config.backbone.dtype)
    if name not in DEVICES:
        raise ConfigError(f"--device {name}: known devices are {', '.join(DEVICES)}")
    return DEVICES[name]


def compared(prediction: Prediction, learner_gib: float, iteration_s: float) -> dict[str, dict[str, float]]:
    """Predicted and measured values for a run's summary."""
    return {
        "learner_gib": {"predicted": round(prediction.learner_gib, 2), "measured": round(learner_gib, 2)},
        "iteration_s": {"predicted": round(prediction.iteration_s, 2), "measured": round(iteration_s, 2)},
    }
