"""Stage 1: one iteration of AC-DMD (arXiv 2605.26108). Does not use Ray.

The student is rolled to a random step without gradient; its sample there, still noisy, trains the fake score. In every
k-th iteration another, independently drawn sample trains the student: otherwise the fake score would be evaluated at
the very points it has just been fitted to.

Plain DMD (arXiv 2405.14867) is the comparison: there both train on the student's clean prediction at the random step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from common import seeding
from common.backbones.base import Conditioning
from common.config.stages import ColdStartConfig, SamplingConfig
from common.progress import no_step
from common.sampling import step_transition
from common.types import Network, Prompt, Step, steps_between
from learner.training.batch_metrics import Totals
from learner.training.distribution_matching import (
    DrawKey,
    MatchingSettings,
    Renoised,
    begin_fake_score_noise,
    begin_student_noise,
    fake_score_objective,
    renoise_samples,
    student_objective,
)
from learner.training.networks import Networks
from learner.training.noise_ahead import NoiseAhead

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
        begin_step: Callable[[str], None] = no_step,
    ) -> None:
        """`begin_step` is called with the name of each part of an update."""
        self._begin_step = begin_step
        self._networks = networks
        self._backbone = networks.backbone
        self._settings = settings
        self._steps = steps_between(self._backbone.sigmas(sampling.steps), sampling.eta)
        self._matching = MatchingSettings.of(settings, sampling, guidance, settings.consistency_weight)
        self._prompts = prompts
        self._empty = self._backbone.encode_prompts([""])
        self._seed = seed
        self._noise = NoiseAhead()

    def update(self, iteration: int) -> Totals:
        """One fake-score update and, every `student_every`-th time, one student update; return their metrics.

        Raises:
            TrainingError, RankError: a gradient is not finite, or another rank failed; that network has not changed.
        """
        totals = Totals()
        self._begin_step("fake_score")
        # Encoded inside the block, so that the other ranks are notified of any failure.
        with self._networks.fake_optimizer.gathering():
            conditioning = self._conditioning(iteration)
            self._fake_score_gradient(iteration, conditioning, totals)
        norm = self._networks.fake_optimizer.step(iteration)
        totals.add({"fake_gradient_norm": norm}, self._share)
        if self._trains_student(iteration):
            self._begin_step("student")
            with self._networks.student_optimizer.gathering():
                self._student_gradient(iteration, conditioning, totals)
            norm = self._networks.student_optimizer.step(iteration)
            totals.add({"student_gradient_norm": norm}, self._share)
        self._networks.update_average()
        self._begin_noise(iteration + 1)
        totals.read()
        return totals

    def _trains_student(self, iteration: int) -> bool:
        return (iteration + 1) % self._settings.student_every == 0

    def _begin_noise(self, iteration: int) -> None:
        """Begin to draw an iteration's noise, while the one before it ends."""
        self._noise.clear()
        fake = self._key("fake", iteration)
        self._begin_roll(fake)
        begin_fake_score_noise(self._backbone, self._matching, fake)
        if self._trains_student(iteration):
            student = self._key("student", iteration)
            self._begin_roll(student)
            begin_student_noise(self._backbone, student)

    def _begin_roll(self, key: DrawKey) -> None:
        for name in ("initial", *(f"step{index}" for index in range(self._last_step(key) + 1))):
            key.begin(name, self._backbone.latent_shape, self._backbone.device)

    @property
    def _rows(self) -> range:
        """This rank's rows of the batch."""
        batch = self._settings.batch_size
        return range(batch)[self._networks.ranks.share(batch)]

    @property
    def _share(self) -> float:
        """The fraction of the batch that these rows are."""
        return len(self._rows) / self._settings.batch_size

    def _conditioning(self, iteration: int) -> Conditioning:
        chosen = seeding.prompt_indices(self._seed, iteration, self._settings.batch_size, len(self._prompts))
        return self._backbone.encode_prompts([self._prompts[chosen[row]].text for row in self._rows])

    def _fake_score_gradient(self, iteration: int, conditioning: Conditioning, totals: Totals) -> None:
        key = self._key("fake", iteration)
        _, renoised = self._sub_interval(conditioning, key, with_graph=False)
        loss = fake_score_objective(self._backbone, renoised, conditioning, self._matching, key)
        (loss.value * self._share).backward()
        totals.add(loss.metrics, self._share)

    def _student_gradient(self, iteration: int, conditioning: Conditioning, totals: Totals) -> None:
        key = self._key("student", iteration)
        sample, renoised = self._sub_interval(conditioning, key, with_graph=True)
        loss = student_objective(self._backbone, sample, renoised, conditioning, self._empty, self._matching, key)
        (loss.value * self._share).backward()
        totals.add(loss.metrics, self._share)

    def _key(self, update: str, iteration: int) -> DrawKey:
        batch = self._settings.batch_size
        return DrawKey(self._seed, f"{PURPOSE}/{update}", iteration, self._rows, batch, self._noise)

    def _last_step(self, key: DrawKey) -> int:
        """The random step of an update, the same for the whole batch."""
        purpose = f"{key.purpose}/step"
        (index,) = seeding.sample_indices(len(self._steps), 1, seed=key.seed, purpose=purpose, iteration=key.iteration)
        return index

    def _sub_interval(self, conditioning: Conditioning, key: DrawKey, *, with_graph: bool) -> tuple[Tensor, Renoised]:
        """The student's sample after a random step, the same step for the whole batch, and the sample renoised."""
        steps = self._steps_to(self._last_step(key))
        sample = self._roll(steps, conditioning, key, with_graph=with_graph)
        return sample, renoise_samples(sample, steps[-1].sigma_next, key)

    def _steps_to(self, index: int) -> tuple[Step, ...]:
        """The steps up to this one, which for plain DMD ends at the clean prediction."""
        *before, last = self._steps[: index + 1]
        return (*before, last if self._settings.objective == "ambient" else replace(last, sigma_next=0.0))

    def _roll(self, steps: Sequence[Step], conditioning: Conditioning, key: DrawKey, *, with_graph: bool) -> Tensor:
        """The student's sample after these steps; only the last one may keep its graph."""
        shape = (len(conditioning), *self._backbone.latent_shape)
        latents = key.normal("initial", torch.empty(shape, device=self._backbone.device))

        def student(latents_Bchw: Tensor, sigma_B: Tensor) -> Tensor:
            return self._backbone.velocity(Network.STUDENT, latents_Bchw, sigma_B, conditioning)

        for index, step in enumerate(steps):
            with torch.set_grad_enabled(with_graph and index == len(steps) - 1):
                transition = step_transition(student, latents, step)
                latents = transition.sample(key.normal(f"step{index}", latents))
        return latents
