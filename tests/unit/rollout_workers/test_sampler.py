"""Sampling: where the noise comes from, and what a group's members share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.backbones.sd3 import StableDiffusion3
from common.flow import cps_transition, surrogate_log_density
from common.policies import SamplingSpec
from common.types import Network, Prompt, Step, StepPlan
from rollout_workers.sampler import SampledGroup, group_noise, sample_for_evaluation, sample_group
from tests.helpers.tiny_pipeline import load_tiny_backbone, randomise

PROMPT = Prompt(5, "red circle")
SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)
PLAN = StepPlan(iteration=2, sigmas=SIGMAS, eta=0.9, selected=(0, 2))


@pytest.fixture(scope="module")
def backbone(tiny_pipeline: Path) -> StableDiffusion3:
    backbone = load_tiny_backbone(tiny_pipeline)
    backbone.adapters.add("student", seed=0, trainable=False)
    randomise(backbone, "student", seed=1)
    backbone.adapters.define(Network.STUDENT, ("student",))
    return backbone


def sample(
    backbone: StableDiffusion3, prompt: Prompt = PROMPT, plan: StepPlan = PLAN, seed: int = 0, group_size: int = 3
) -> SampledGroup:
    return sample_group(backbone, prompt, plan, seed=seed, group_size=group_size)


def added_noise(backbone: StableDiffusion3, sampled: SampledGroup, plan: StepPlan, step: int) -> torch.Tensor:
    """The noise that a step has put in, recovered from the states before and after it: [G, c, h, w]."""
    group_size = sampled.latents_SGchw.shape[1]
    latents, conditioning = sampled.latents_SGchw[step], backbone.encode_prompts([PROMPT.text]).expand_to(group_size)
    with torch.no_grad():
        velocity = backbone.velocity(
            Network.STUDENT, latents, torch.full((group_size,), plan.sigmas[step]), conditioning
        )
    transition = cps_transition(latents, velocity, plan.sigmas[step], plan.sigmas[step + 1], plan.eta)
    return (sampled.latents_SGchw[step + 1] - transition.mean_Bchw) / transition.std


def test_shapes_and_states(backbone: StableDiffusion3) -> None:
    sampled = sample(backbone)
    assert sampled.latents_SGchw.shape == (5, 3, *backbone.latent_shape)
    assert sampled.surrogate_TG.shape == (4, 3)
    assert sampled.latents_SGchw.dtype == sampled.surrogate_TG.dtype == torch.float32
    assert (sampled.surrogate_TG[:3] < 0).all()
    assert (sampled.surrogate_TG[3] == 0).all()


@pytest.mark.parametrize("step", [0, 1, 2])
def test_unselected_steps_share_their_noise_and_selected_ones_do_not(backbone: StableDiffusion3, step: int) -> None:
    noise = added_noise(backbone, sample(backbone), PLAN, step)
    assert noise.std() == pytest.approx(1, abs=0.15)
    apart = (noise[0] - noise[1]).abs().max()
    assert apart < 1e-3 if step not in PLAN.selected else apart > 1


def test_shared_noise_is_the_groups_wherever_its_members_are_sampled(backbone: StableDiffusion3) -> None:
    """A function of (prompt, step, iteration) alone: another selection, another size, the same draw."""
    other = StepPlan(PLAN.iteration, SIGMAS, 0.9, selected=(2,))
    first = added_noise(backbone, sample(backbone), PLAN, 1)
    second = added_noise(backbone, sample(backbone, plan=other, group_size=2), other, 1)
    assert torch.allclose(first[0], second[1], atol=1e-3)
    next_iteration = StepPlan(PLAN.iteration + 1, SIGMAS, 0.9, PLAN.selected)
    third = added_noise(backbone, sample(backbone, plan=next_iteration), next_iteration, 1)
    assert (first[0] - third[0]).abs().max() > 1


@pytest.mark.parametrize("same_latent", [False, True])
def test_noise_that_was_drawn_before_gives_the_same_group(backbone: StableDiffusion3, same_latent: bool) -> None:
    plan = replace(PLAN, same_latent=same_latent)
    noise = group_noise(backbone, PROMPT, plan, seed=0, group_size=3)
    assert [len(one) for one in noise.steps_Gchw] == [3] * 4
    before = sample_group(backbone, PROMPT, plan, seed=0, group_size=3, noise=noise)
    assert torch.equal(before.latents_SGchw, sample(backbone, plan=plan).latents_SGchw)


def test_samples_do_not_depend_on_the_groups_size(backbone: StableDiffusion3) -> None:
    small, large = sample(backbone, group_size=2), sample(backbone, group_size=5)
    assert torch.allclose(small.latents_SGchw, large.latents_SGchw[:, :2], atol=1e-5)
    assert torch.equal(small.latents_SGchw[0], large.latents_SGchw[0, :2])


def test_a_group_may_start_from_one_noise(backbone: StableDiffusion3) -> None:
    same = sample(backbone, plan=replace(PLAN, same_latent=True)).latents_SGchw
    assert torch.equal(same[0], sample(backbone).latents_SGchw[0, :1].expand(3, *same.shape[2:]))
    assert (same[1, 0] - same[1, 1]).abs().max() > 0.1  # step 0 is selected


@pytest.mark.usefixtures("one_thread")
def test_sampling_is_a_function_of_its_keys(backbone: StableDiffusion3) -> None:
    first = sample(backbone)
    torch.manual_seed(123)  # must not matter
    again = sample(backbone)
    assert torch.equal(first.latents_SGchw, again.latents_SGchw)
    assert torch.equal(first.surrogate_TG, again.surrogate_TG)
    others = [
        sample(backbone, seed=1),
        sample(backbone, prompt=Prompt(6, PROMPT.text)),
        sample(backbone, plan=StepPlan(3, SIGMAS, 0.9, (0, 2))),
    ]
    assert all(not torch.equal(first.latents_SGchw[0], other.latents_SGchw[0]) for other in others)


def test_without_stochasticity_no_noise_is_added(backbone: StableDiffusion3) -> None:
    first, second = (sample(backbone, plan=StepPlan(2, SIGMAS, 0.0, selected)) for selected in ((0, 2), (1,)))
    assert torch.equal(first.latents_SGchw, second.latents_SGchw)
    assert (first.surrogate_TG == 0).all()


def test_the_surrogate_is_of_the_transition_that_was_taken(backbone: StableDiffusion3) -> None:
    sampled = sample(backbone)
    noise = added_noise(backbone, sampled, PLAN, 0)
    std = float(cps_transition(sampled.latents_SGchw[0], sampled.latents_SGchw[0], 1.0, 0.9, 0.9).std)
    expected = surrogate_log_density(torch.zeros_like(noise), noise * std)
    assert torch.allclose(sampled.surrogate_TG[0], expected, rtol=1e-4)


def evaluate(backbone: StableDiffusion3, spec: SamplingSpec, count: int = 2) -> torch.Tensor:
    return sample_for_evaluation(backbone, [PROMPT], spec, seed=0, count=count, empty=backbone.encode_prompts([""]))


def test_prompts_that_share_their_passes_keep_their_pictures(backbone: StableDiffusion3) -> None:
    """Noise and text of each are its own; the passes differ by rounding."""
    prompts = [PROMPT, Prompt(6, "blue square"), Prompt(9, "red circle")]
    spec, empty = SamplingSpec(Network.STUDENT, 3, 2.0, eta=0.9), backbone.encode_prompts([""])
    alone = [sample_for_evaluation(backbone, [p], spec, seed=0, count=2, empty=empty) for p in prompts]
    together = sample_for_evaluation(backbone, prompts, spec, seed=0, count=2, empty=empty)
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    assert (alone[0] - alone[2]).abs().max() > 0.1


def test_every_policy_is_evaluated_from_the_same_noise(
    backbone: StableDiffusion3, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[torch.Tensor] = []
    original = backbone.velocity

    def spy(network: Network, latents: torch.Tensor, *rest: object) -> torch.Tensor:
        starts.append(latents)
        return original(network, latents, *rest)

    monkeypatch.setattr(backbone, "velocity", spy)
    results = []
    for spec in (
        SamplingSpec(Network.TEACHER, 6, 1.0, 0.0),
        SamplingSpec(Network.TEACHER, 4, 1.0, 0.0),
        SamplingSpec(Network.STUDENT, 4, 1.0, 0.9),
    ):
        results.append(evaluate(backbone, spec))
    assert torch.equal(starts[0], starts[6])
    assert torch.equal(starts[0], starts[10])
    assert not torch.allclose(results[1], results[2], atol=1e-2)


def test_an_evaluation_repeats_itself_and_guidance_changes_it(backbone: StableDiffusion3) -> None:
    plain = SamplingSpec(Network.TEACHER, 4, 1.0, 0.0)
    assert torch.allclose(evaluate(backbone, plain), evaluate(backbone, plain, count=3)[:2], atol=1e-5)
    assert not torch.allclose(
        evaluate(backbone, plain), evaluate(backbone, SamplingSpec(Network.TEACHER, 4, 4.0, 0.0)), atol=1e-2
    )


def test_the_steps_of_a_plan_by_hand() -> None:
    plan = StepPlan(iteration=0, sigmas=(1.0, 0.5, 0.0), eta=0.9, selected=(1,))
    assert plan.steps == (Step(1.0, 0.5, 0.9, shared_noise=True), Step(0.5, 0.0, 0.9, shared_noise=False))
