"""Stage 2: one iteration of RTDMD (arXiv 2605.26108) on a batch of scored groups. Does not use Ray.

The fake score trains on the rollouts' final samples. The student takes one step on the average of

    SubGRPO              on each selected stochastic step, from the rewards' group-relative advantages; or a rival of it
    the final step       matching_weight * AC-DMD at sigma 0 + reward_gradient_weight * hinge on differentiable rewards

Shape suffixes: see `common/types.py`; B = P * G, the groups in order.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from common import seeding
from common.backbones.device.transfer import wait_for
from common.config.stages import AlignmentConfig
from common.errors import AttestationError
from common.kept_groups import TrainedSamples
from common.progress import no_step
from common.types import ScoredGroup, TrajectoryGroup
from learner.metric_names import EFFECTIVE_SAMPLES, LEFT_OUT_GRADIENTS, SURROGATE_GAP
from learner.objectives.advantage import renormalised_group_advantages, zero_spread_fraction
from learner.objectives.loss import Loss, renormalised_weights
from learner.objectives.reward_gradient import attach_gradient, clip_sample_norms, reward_hinge_loss
from learner.training.alignment_batch import Batch, assemble
from learner.training.batch_metrics import Totals
from learner.training.diffusion_nft import DiffusionNft
from learner.training.distribution_matching import (
    DrawKey,
    MatchingSettings,
    begin_fake_score_noise,
    begin_student_noise,
    fake_score_objective,
    renoise_samples,
    student_objective,
)
from learner.training.networks import Networks
from learner.training.noise_ahead import NoiseAhead
from learner.training.optimizer import AdapterOptimizer
from learner.training.policy_gradient import PolicyTerm, TransitionPolicy
from learner.training.reward_gradients import DifferentiableRewards, RequestedRewards, RewardGradients
from learner.training.surrogate_reward import SurrogateReward
from learner.training.term_signals import HalfSignals, TermSignals

PURPOSE = "alignment"
POLICY, MATCHING, REWARD = "policy", "matching", "reward_gradient"
"""Terms of the student's gradient."""


class Update(NamedTuple):
    """The metrics of this rank's rows, the seconds of each part, and what the whole batch was trained on."""

    totals: Totals
    seconds: dict[str, float]
    trained: TrainedSamples


class Decoded(NamedTuple):
    """Final samples as a leaf of their own graph, up to the images whose rewards are requested."""

    latents_Bchw: Tensor
    requested: RequestedRewards


class FinalSample(NamedTuple):
    """The deterministic last step of some rows, with its graph; `decoded` if rewards are back-propagated through it."""

    sample_Bchw: Tensor
    decoded: Decoded | None


class AlignmentTrainer:
    """Updates fake score and student; every draw is a function of (seed, iteration)."""

    def __init__(
        self,
        networks: Networks,
        settings: AlignmentConfig,
        matching: MatchingSettings,
        reward_weights: dict[str, float],
        served: RewardGradients,
        seed: int,
        surrogate_gap_limit: float = math.inf,
        begin_step: Callable[[str], None] = no_step,
    ) -> None:
        """Set up the terms of the policy gradient.

        Args:
            served: the differentiable rewards among `reward_weights`.
            surrogate_gap_limit: inf: surrogate_gap has no limit.
            begin_step: told each micro-batch, and each request for reward gradients.
        """
        self._begin_step = begin_step
        self._networks = networks
        self._backbone = networks.backbone
        self._settings = settings
        self._matching = matching
        self._reward_weights = reward_weights
        self._served = served
        self._empty = self._backbone.encode_prompts([""])
        self._seed = seed
        self._surrogate_gap_limit = surrogate_gap_limit
        self._noise = NoiseAhead()
        self._surrogate: SurrogateReward | None = None
        self._policy: PolicyTerm = TransitionPolicy(self._backbone, settings)
        if settings.policy_gradient == "nft":
            self._policy = DiffusionNft(self._backbone, settings, seed)
        elif settings.policy_gradient == "surrogate_reward":
            self._policy = self._surrogate = SurrogateReward(networks, settings, seed)
        self._seconds: dict[str, float] = defaultdict(float)

    @property
    def first_optimizer(self) -> AdapterOptimizer:
        """The optimizer that takes the first step of an update: the ranks' first sum is that of its gradient."""
        networks = self._networks
        return networks.fake_optimizer if self._settings.matching_weight > 0 else networks.student_optimizer

    def update(self, groups: Sequence[ScoredGroup]) -> Update:
        """One step of fake score and student.

        Raises:
            RewardError: a gradient was not available; the student has not changed then.
            TrainingError, RankError: a gradient is not finite, or another rank failed; that network has not changed.
            AttestationError: surrogate_gap is beyond its limit; the student has not changed then.
        """
        self._seconds.clear()
        self._noise.clear()
        totals = Totals()
        batch = None
        if self._settings.matching_weight > 0:  # else nothing needs the fake score
            batch = self._update_fake_score(groups, totals)
        if self._surrogate is not None:
            # A run always has matching beside a surrogate, and so a batch already.
            batch = self._assemble(groups) if batch is None else batch
            with self._timed("surrogate_reward"):
                self._surrogate.learn(batch, list(self._parts(batch, "surrogate")), totals)
        batch = self._update_student(groups, batch, totals)
        # The groups are the same on every rank.
        totals.add(reward_metrics(groups), len(batch) / batch.total)
        if self._settings.policy_gradient != "none":
            totals.add({EFFECTIVE_SAMPLES: batch.effective_samples}, len(batch) / batch.total)
        totals.read()
        return Update(totals, dict(self._seconds), self._trained(batch))

    def _trained(self, batch: Batch) -> TrainedSamples:
        kept_PG = torch.zeros(batch.advantages_PG.shape, dtype=torch.bool)
        kept_PG.view(-1)[batch.kept] = True
        final_step = self._settings.matching_weight > 0 or self._settings.reward_gradient_weight > 0
        return TrainedSamples(
            batch.plan.sigmas,
            batch.advantages_PG.cpu().numpy(),
            kept_PG.numpy(),
            self._policy.steps(batch.plan),
            final_step,
        )

    def _assemble(self, groups: Sequence[ScoredGroup]) -> Batch:
        trajectories = [group.trajectory for group in groups]
        advantages_PG = renormalised_group_advantages(
            [{name: torch.as_tensor(values) for name, values in group.rewards_G.items()} for group in groups],
            self._reward_weights,
            self._settings.advantage_scale,
            self._settings.advantage_clip,
        )
        if self._settings.shuffled_advantages:
            advantages_PG = self._shuffled(advantages_PG, trajectories)
        fraction = self._settings.train_fraction
        with self._timed("prepare"):
            return assemble(trajectories, advantages_PG, fraction, self._networks.ranks, self._backbone)

    def _shuffled(self, advantages_PG: Tensor, trajectories: Sequence[TrajectoryGroup]) -> Tensor:
        """The advantages in a random order within each group."""
        orders_PG = [
            seeding.shuffled_group(self._seed, group.plan.iteration, group.prompt.index, group.group_size)
            for group in trajectories
        ]
        return advantages_PG.gather(1, torch.tensor(orders_PG))

    def _update_fake_score(self, groups: Sequence[ScoredGroup], totals: Totals) -> Batch:
        # Inside the block, so that the other ranks are notified of any failure.
        with self._networks.fake_optimizer.gathering():
            batch = self._assemble(groups)
            with self._timed("fake_score"):
                self._fake_score_gradient(batch, totals)
        with self._timed("fake_score"):  # the step waits for the passes
            norm = self._networks.fake_optimizer.step(batch.plan.iteration)
        totals.add({"fake_gradient_norm": norm}, len(batch) / batch.total)
        return batch

    def _fake_score_gradient(self, batch: Batch, totals: Totals) -> None:
        for rows, share, key in self._parts(batch, "fake"):
            renoised = renoise_samples(batch.latents(-1, rows), 0.0, key)
            conditioning = batch.conditioning(rows)
            loss = fake_score_objective(self._backbone, renoised, conditioning, self._matching, key)
            (loss.value * share).backward()
            totals.add(loss.metrics, share)

    def _update_student(self, groups: Sequence[ScoredGroup], batch: Batch | None, totals: Totals) -> Batch:
        """Assemble the batch if the fake score has not, and take the student's step on it."""
        with self._networks.student_optimizer.gathering():
            batch = self._assemble(groups) if batch is None else batch
            iteration, share_of_rank = batch.plan.iteration, len(batch) / batch.total
            signals = TermSignals(self._networks.student, self._terms) if self._measured(iteration) else None
            with self._timed("student"):
                for rows, share, key in self._parts(batch, "student", halves=signals is not None):
                    half = signals.on(int(rows.start >= batch.middle)) if signals else None
                    self._student_gradient(batch, rows, share, key, totals, half)
            self._require_small_gap(groups, totals)
        with self._timed("student"):  # the step waits for the passes
            norm = self._networks.student_optimizer.step(iteration)
        self._seconds["student"] -= self._seconds["reward_gradient"]
        totals.add({"student_gradient_norm": norm}, share_of_rank)
        if signals is not None:
            totals.add(signals.metrics(self._networks.ranks), share_of_rank)
        if (iteration + 1) % self._settings.ema_every == 0:
            self._networks.update_average()
        return batch

    def _require_small_gap(self, groups: Sequence[ScoredGroup], totals: Totals) -> None:
        """AttestationError if sampler and learner disagree on what the same weights compute.

        Stale groups are left out: there the gap also shows how far the student has moved since. A gap that is no number
        is left to the optimizer, which refuses its gradient.
        """
        trajectory, gap = groups[0].trajectory, totals.values().get(SURROGATE_GAP)
        if gap is None or trajectory.policy.number != trajectory.plan.iteration:
            return
        if gap > self._surrogate_gap_limit:
            raise AttestationError(
                f"iteration {trajectory.plan.iteration}: surrogate_gap is {gap:.1e}, above its limit of "
                f"{self._surrogate_gap_limit:g}: workers and learner do not compute the same from the same weights; "
                "compare their devices and versions, or raise alignment.surrogate_gap_limit, and continue with --resume"
            )

    def _student_gradient(
        self, batch: Batch, rows: slice, share: float, key: DrawKey, totals: Totals, signals: HalfSignals | None
    ) -> None:
        """Add the gradient of one part of the batch; of each term apart if `signals` are measured."""
        # Requested first: the policy's and the matching's passes need no rewards, and hide the wait for them.
        final = self._final_sample(batch, rows)
        trained_steps = self._policy.steps(batch.plan)
        part = share / (len(trained_steps) + 1)
        for step in trained_steps:
            value, metrics = self._policy.loss(batch, step, rows, key)
            with nullcontext() if signals is None else signals.of(POLICY):
                (value * part).backward()
            totals.add(metrics, share / len(trained_steps))
        values, metrics = self._final_step_losses(batch, rows, key, totals, final)
        totals.add(metrics, share)
        if signals is None and values:
            (torch.stack(list(values.values())).sum() * part).backward()
        elif signals is not None:
            for place, (term, value) in enumerate(values.items(), start=1):
                with signals.of(term):
                    (value * part).backward(retain_graph=place < len(values))

    def _final_sample(self, batch: Batch, rows: slice) -> FinalSample | None:
        """The deterministic last step of these rows, its rewards requested; None if no term needs it."""
        settings = self._settings
        if not (settings.matching_weight > 0 or settings.reward_gradient_weight > 0):
            return None
        sample_Bchw = batch.transition(self._backbone, batch.plan.num_steps - 1, rows).mean_Bchw
        if settings.reward_gradient_weight == 0:
            return FinalSample(sample_Bchw, None)
        latents_Bchw = sample_Bchw.detach().requires_grad_()
        requested = self._served.request(self._backbone.decode(latents_Bchw), batch.prompts[rows])
        return FinalSample(sample_Bchw, Decoded(latents_Bchw, requested))

    def _final_step_losses(
        self, batch: Batch, rows: slice, key: DrawKey, totals: Totals, final: FinalSample | None
    ) -> tuple[dict[str, Tensor], Mapping[str, float | Tensor]]:
        """Matching and reward back-propagation through the deterministic last step, by term, with their weights.

        Counts missing gradients.
        """
        settings = self._settings
        if final is None:
            return {}, {}
        metrics: dict[str, float | Tensor] = {}
        sample = final.sample_Bchw
        conditioning = batch.conditioning(rows)
        values = {}
        if settings.matching_weight > 0:
            renoised = renoise_samples(sample, 0.0, key)
            matching = student_objective(
                self._backbone, sample, renoised, conditioning, self._empty, self._matching, key
            )
            values[MATCHING] = settings.matching_weight * matching.value
            metrics.update(matching.metrics)
        if final.decoded is not None:
            hinge = self._reward_hinge(sample, final.decoded, totals)
            if hinge is not None:
                values[REWARD] = settings.reward_gradient_weight * hinge.value
                metrics.update(hinge.metrics)
        return values, metrics

    @property
    def _terms(self) -> tuple[str, ...]:
        """The terms of the student's gradient that are switched on."""
        settings = self._settings
        weights = {
            POLICY: settings.policy_gradient != "none",
            MATCHING: settings.matching_weight,
            REWARD: settings.reward_gradient_weight,
        }
        return tuple(term for term, weight in weights.items() if weight)

    def _measured(self, iteration: int) -> bool:
        """Whether the terms' signals are measured. Ranks of a sharded base cannot: their passes would differ."""
        every = self._settings.signal_every
        return every is not None and iteration % every == 0 and not self._networks.ranks.sharded

    def _reward_hinge(self, sample_Bchw: Tensor, decoded: Decoded, totals: Totals) -> Loss | None:
        """The hinge on the differentiable rewards of the decoded samples, with its gradient clipped per sample.

        None when no differentiable reward is available now.
        """
        rewards = self._collected(decoded.requested)
        totals.count({f"{LEFT_OUT_GRADIENTS}/{cause}": float(count) for cause, count in rewards.left_out.items()})
        if not rewards.scores:
            return None
        # Scaled if one is missing, so that the sum stays comparable with its target.
        weights = renormalised_weights(
            {name: self._reward_weights[name] for name in self._served.names}, rewards.scores
        )
        hinge = reward_hinge_loss(rewards.scores, weights, self._settings.reward_target)
        count = len(sample_Bchw)
        # The gradient of the mean times the count is each sample's own gradient.
        (gradients_Bchw,) = torch.autograd.grad(hinge.value * count, decoded.latents_Bchw)
        clipped_Bchw = clip_sample_norms(gradients_Bchw, self._settings.reward_gradient_clip)
        fixed_B = hinge.value.detach().expand(count)
        return Loss(attach_gradient(fixed_B, clipped_Bchw, sample_Bchw).mean(), hinge.metrics)

    def _collected(self, requested: RequestedRewards) -> DifferentiableRewards:
        """The requested rewards; timed is the wait with nothing else left to compute."""
        if not requested.answered():
            wait_for(self._backbone.device)
        self._begin_step(REWARD)
        with self._timed("reward_gradient"):
            rewards = requested.collect()
        self._begin_step("student")
        return rewards

    def _parts(self, batch: Batch, update: str, *, halves: bool = False) -> Iterator[tuple[slice, float, DrawKey]]:
        """Micro-batches: their rows within this rank's, their share of the whole batch, and the key of their draws.

        With `halves` none reaches over the middle of the whole batch.
        """
        middle = batch.middle if halves else len(batch)
        starts = [*range(0, middle, self._settings.micro_batch), *range(middle, len(batch), self._settings.micro_batch)]
        bounds = [slice(start, stop) for start, stop in pairwise([*starts, len(batch)])]
        purpose, iteration = f"{PURPOSE}/{update}", batch.plan.iteration
        keys = [DrawKey(self._seed, purpose, iteration, batch.rows[rows], batch.total, self._noise) for rows in bounds]
        for rows, key, following in zip_longest(bounds, keys, keys[1:]):
            self._begin_step(update)
            if key is keys[0]:
                self._begin_noise(update, key)
            if following is not None:
                self._begin_noise(update, following)
            yield rows, (rows.stop - rows.start) / batch.total, key

    def _begin_noise(self, update: str, key: DrawKey) -> None:
        """Begin to draw the noise of a micro-batch; it is drawn while the one before it is computed."""
        if update == "fake":
            begin_fake_score_noise(self._backbone, self._matching, key)
        elif update == "student" and self._settings.matching_weight > 0:
            begin_student_noise(self._backbone, key)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._seconds[part] += time.perf_counter() - started


def reward_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Mean of every reward over the groups that have it, and the fraction of these groups in which it has no spread."""
    metrics = {}
    for name in dict.fromkeys(name for group in groups for name in group.rewards_G):
        rewards_PG = torch.stack([torch.as_tensor(g.rewards_G[name]) for g in groups if name in g.rewards_G])
        metrics[f"reward/{name}"] = rewards_PG.mean().item()
        metrics[f"zero_spread/{name}"] = zero_spread_fraction(rewards_PG).item()
    return metrics
