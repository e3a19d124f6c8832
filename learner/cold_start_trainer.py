"""Stage 1: one iteration of AC-DMD (arXiv 2605.26108). Knows no Ray.

The student is rolled to a random step without gradient; its sample there, still noisy, teaches the fake score, and on
every k-th iteration the student itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common import seeding
from common.backbones.base import Conditioning, Network
from common.config import ColdStartConfig, SamplingConfig
from common.flow import cps_transition
from common.types import Prompt
from learner.matching import DrawKey, MatchingSettings, fake_score_objective, renoise_samples, student_objective
from learner.networks import Networks
from learner.objectives.loss import as_floats
from learner.totals import Totals

PURPOSE = "cold_start"


class ColdStartTrainer:
    """Updates fake score and student; every draw is a function of (seed, iteration)."""

    def __init__(
        self,
        networks: Networks,
        settings: ColdStartConfig,
        sampling: SamplingConfig,
        guidance: float,
        prompts: Sequence[Prompt],
        seed: int,
    ) -> None:
        self._networks = networks
        self._backbone = networks.backbone
        self._settings = settings
        self._eta = sampling.eta
        self._sigmas = self._backbone.sigmas(sampling.steps)
        self._matching = MatchingSettings.of(settings, sampling, guidance)
        self._prompts = prompts
        self._empty = self._backbone.encode_prompts([""])
        self._seed = seed

    def update(self, iteration: int) -> Totals:
        """One fake-score update and, every `student_every`-th time, one student update; returns their metrics.

        Raises:
            TrainingError, RankError: a gradient is not finite, or another rank failed; that network has not changed.
        """
        batch, networks = self._settings.batch_size, self._networks
        rows = range(batch)[networks.ranks.share(batch)]
        share = len(rows) / batch
        chosen = seeding.prompt_indices(self._seed, iteration, batch, len(self._prompts))[rows.start : rows.stop]
        last = len(self._sigmas) - 2
        step = seeding.sample_indices(last + 1, 1, seed=self._seed, purpose=f"{PURPOSE}/step", iteration=iteration)[0]
        train_student = (iteration + 1) % self._settings.student_every == 0
        key = DrawKey(self._seed, PURPOSE, iteration, rows, batch)
        totals = Totals()
        # All inside, so that the other ranks hear of whatever fails.
        with networks.fake_optimizer.gathering():
            conditioning = self._backbone.encode_prompts([self._prompts[index].text for index in chosen])
            sample = self._roll_to(step, conditioning, key, with_graph=train_student)
            renoised = renoise_samples(sample, self._sigmas[step + 1], key)
            fake = fake_score_objective(self._backbone, renoised, conditioning, self._matching, key)
            (fake.value * share).backward()
        totals.add(as_floats(fake.metrics), share)
        totals.add({"fake_gradient_norm": networks.fake_optimizer.step(iteration)}, share)
        if train_student:
            with networks.student_optimizer.gathering():
                loss = student_objective(
                    self._backbone, sample, renoised, conditioning, self._empty, self._matching, key
                )
                (loss.value * share).backward()
            totals.add(as_floats(loss.metrics), share)
            totals.add({"student_gradient_norm": networks.student_optimizer.step(iteration)}, share)
            networks.update_average()
        return totals

    def _roll_to(self, last_step: int, conditioning: Conditioning, key: DrawKey, *, with_graph: bool) -> Tensor:
        """The student's sample after `last_step`; only that step may keep its graph."""
        shape = (len(conditioning), *self._backbone.latent_shape)
        latents = key.normal("initial", torch.empty(shape, device=self._backbone.device))
        for step in range(last_step + 1):
            with torch.set_grad_enabled(with_graph and step == last_step):
                sigma_B = torch.full((len(conditioning),), self._sigmas[step])
                velocity = self._backbone.velocity(Network.STUDENT, latents, sigma_B, conditioning)
                transition = cps_transition(latents, velocity, self._sigmas[step], self._sigmas[step + 1], self._eta)
                latents = transition.sample(key.normal(f"step{step}", latents))
        return latents
