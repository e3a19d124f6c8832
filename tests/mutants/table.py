"""The mutants: what would ruin training without raising an error, each with the unit test that notices."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

_MATCHING, _COLD_START, _ALIGNMENT = (
    f"learner/{name}.py" for name in ("matching", "cold_start_trainer", "alignment_trainer")
)
_NETWORKS, _OPTIMIZER = "learner/networks.py", "learner/optimizer.py"
_AC_DMD, _ADVANTAGE, _CONSISTENCY, _HINGE, _SUBGRPO = (
    f"learner/objectives/{name}.py" for name in ("ac_dmd", "advantage", "consistency", "reward_gradient", "subgrpo")
)
_FLOW, _SAMPLER = "common/flow.py", "rollout_workers/sampler.py"
_BASE, _ADAPTERS, _DIFFUSERS, _SD3, _FLUX1, _FLUX2 = (
    f"common/backbones/{name}.py" for name in ("base", "adapters", "diffusers_backbone", "sd3", "flux1", "flux2")
)


def _test(name: str) -> str:
    """The node id of `FILE::TEST`, FILE without its folder and ending."""
    file, _, test = name.partition("::")
    return f"tests/unit/test_{file}.py::test_{test}"


TRAINERS = (
    Mutant(
        "the student is updated one iteration late",
        _COLD_START,
        "if (iteration + 1) % self._settings.student_every == 0:",
        "if iteration % self._settings.student_every == 0:",
        _test("networks::the_student_updates_every_kth_time_and_the_fake_score_always"),
    ),
    Mutant(
        "the policy loss takes no share of the final step's part",
        _ALIGNMENT,
        "term_share = 1 / (len(trained_steps) + 1)",
        "term_share = 1 / max(len(trained_steps), 1)",
        _test("alignment_trainer::the_policy_gradient_is_minus_advantage_times_surrogate"),
    ),
    Mutant(
        "all stochastic steps are trained, selected or not",
        _ALIGNMENT,
        "else batch.plan.selected",
        "else tuple(range(batch.plan.num_steps - 1))",
        _test("alignment_trainer::the_policy_gradient_is_minus_advantage_times_surrogate"),
    ),
    Mutant(
        "the policy loss does not use the advantages",
        _ALIGNMENT,
        "surrogate_B, old_B, batch.advantages_B[rows],",
        "surrogate_B, old_B, torch.ones_like(old_B),",
        _test("alignment_trainer::the_policy_gradient_is_minus_advantage_times_surrogate"),
    ),
    Mutant(
        "the policy loss never uses the rollout's surrogate",
        _ALIGNMENT,
        'if self._settings.old_surrogate == "rollout" else',
        'if self._settings.old_surrogate == "none" else',
        _test("alignment_trainer::a_disagreement_is_measured"),
    ),
    Mutant(
        "the hinge pushes the rewards down",
        _ALIGNMENT,
        "value = value + settings.reward_gradient_weight * hinge.value",
        "value = value - settings.reward_gradient_weight * hinge.value",
        _test("alignment_trainer::reward_back_propagation_raises_the_reward"),
    ),
    Mutant(
        "every micro-batch of the fake score counts as the whole batch",
        _ALIGNMENT,
        "            (loss.value * share).backward()",
        "            loss.value.backward()",
        _test("alignment_trainer::the_micro_batch_changes_no_result[1]"),
    ),
    Mutant(
        "every sample's reward gradient is clipped as a mean",
        _ALIGNMENT,
        "clip_sample_norms(gradients_Bchw, self._settings.reward_gradient_clip)",
        "clip_sample_norms(gradients_Bchw, None)",
        _test("alignment_trainer::clipping_scales_every_samples_reward_gradient"),
    ),
)

NETWORKS = (
    Mutant(
        "stage 2 goes on training the fake score's adapter of stage 1",
        _NETWORKS,
        "        bank.freeze(FAKE_SCORE)\n",
        "",
        _test("networks::stage_two_begins_at_the_averaged_student"),
    ),
    Mutant(
        "the fake score has no fresh adapter in stage 2",
        _NETWORKS,
        "bank.define(Network.FAKE_SCORE, (FAKE_SCORE, ALIGNED_FAKE_SCORE))",
        "bank.define(Network.FAKE_SCORE, (FAKE_SCORE,))",
        _test("networks::stage_two_begins_at_the_averaged_student"),
    ),
    Mutant(
        "stage 2 starts from the student's raw weights",
        _NETWORKS,
        "        bank.load(COLD_START, self.average.state())\n",
        "",
        _test("networks::stage_two_begins_at_the_averaged_student"),
    ),
    Mutant(
        "the moving average's decay is inverted",
        _OPTIMIZER,
        "average.lerp_(parameters[name].detach().to(average), 1 - self._decay)",
        "average.lerp_(parameters[name].detach().to(average), self._decay)",
        _test("networks::the_moving_average_by_hand"),
    ),
    Mutant(
        "a linear learning rate stays constant",
        _OPTIMIZER,
        'remaining = 1.0 if self.schedule == "constant" else max(0.0, 1 - iteration / self.iterations)',
        "remaining = 1.0",
        _test("optimizer::a_linear_learning_rate_falls_to_zero"),
    ),
    Mutant(
        "a step uses the first iteration's rate",
        _OPTIMIZER,
        "self._settings.learning_rate.at(iteration)",
        "self._settings.learning_rate.at(0)",
        _test("optimizer::a_step_uses_the_rate_of_its_iteration[2-0.25]"),
    ),
)

FLOW = (
    Mutant(
        "a transition ignores eta",
        _FLOW,
        "angle = eta * math.pi / 2",
        "angle = math.pi / 2",
        _test("flow::transition_by_hand"),
    ),
    Mutant(
        "a transition keeps the whole predicted noise beside the new one",
        _FLOW,
        "next_level * math.cos(angle) * noise_Bchw",
        "next_level * noise_Bchw",
        _test("flow::transition_by_hand"),
    ),
    Mutant(
        "the clean prediction adds the velocity",
        _FLOW,
        "clean_Bchw = upcast(sample_Bchw) - level * upcast(velocity_Bchw)",
        "clean_Bchw = upcast(sample_Bchw) + level * upcast(velocity_Bchw)",
        _test("flow::transition_by_hand"),
    ),
    Mutant(
        "the surrogate rewards samples far from the mean",
        _FLOW,
        "return -(upcast(next_sample_Bchw) - upcast(mean_Bchw)).square().mean(dim=(1, 2, 3))",
        "return (upcast(next_sample_Bchw) - upcast(mean_Bchw)).square().mean(dim=(1, 2, 3))",
        _test("flow::densities_by_hand"),
    ),
    Mutant(
        "the renoise level is not clamped",
        _FLOW,
        "upcast(uniform_B)).clamp(RENOISE_MIN, RENOISE_MAX)",
        "upcast(uniform_B))",
        _test("flow::renoise_level_stays_above_the_start_and_inside_the_clamp"),
    ),
    Mutant(
        "renoising keeps too little of a noisy sample",
        _FLOW,
        "keep = (1 - end) / (1 - start)",
        "keep = 1 - end",
        _test("flow::renoising_keeps_the_flow"),
    ),
    Mutant(
        "renoising adds noise as if the sample were clean",
        _FLOW,
        "return keep, ((end - start) / (1 - start) * (end + keep * start)).sqrt()",
        "return keep, end",
        _test("flow::renoising_keeps_the_flow"),
    ),
    Mutant(
        "the ambient target has no part for the sample's own noise",
        _FLOW,
        "noise_factor = end + keep * start.square() / (1 - start)",
        "noise_factor = end",
        _test("flow::ambient_target_regresses_to_the_velocity"),
    ),
    Mutant(
        "the ambient target adds the sample",
        _FLOW,
        "return noise_factor * upcast(noise_Bchw) - scale / (1 - start)",
        "return noise_factor * upcast(noise_Bchw) + scale / (1 - start)",
        _test("flow::ambient_target_from_a_clean_sample_is_the_velocity"),
    ),
)

OBJECTIVES = (
    Mutant(
        "the matching loss ascends",
        _AC_DMD,
        "(fixed_Bchw - gradient_Bchw)",
        "(fixed_Bchw + gradient_Bchw)",
        _test("objectives_losses::distribution_matching_by_hand"),
    ),
    Mutant(
        "the matching gradient is not normalised",
        _AC_DMD,
        "gradient_Bchw = gradient_Bchw / distance_B111.clamp(min=NORMALISER_FLOOR)",
        "pass",
        _test(
            "objectives_losses::distribution_matching_gradient_agrees_with_finite_differences_at_a_fixed_target[True]"
        ),
    ),
    Mutant(
        "the matching gradient's normaliser is the batch's, not the sample's",
        _AC_DMD,
        "(fixed_Bchw - teacher_Bchw).abs().mean(dim=(1, 2, 3), keepdim=True)",
        "(fixed_Bchw - teacher_Bchw).abs().mean().view(1, 1, 1, 1)",
        _test(
            "objectives_losses::distribution_matching_gradient_agrees_with_finite_differences_at_a_fixed_target[True]"
        ),
    ),
    Mutant(
        "the fake loss's weight has no cap",
        _AC_DMD,
        "width.pow(-2).clamp(max=max_weight)",
        "width.pow(-2)",
        _test("objectives_losses::fake_score_loss_by_hand"),
    ),
    Mutant(
        "the consistency loss squares one deviation",
        _CONSISTENCY,
        "(upcast(second_prediction_Bchw) - anchor_Bchw)",
        "(upcast(first_prediction_Bchw) - anchor_Bchw)",
        _test("objectives_losses::consistency_by_hand_can_be_negative"),
    ),
    Mutant(
        "consistency looks at later levels",
        _CONSISTENCY,
        "(upcast(sigma_B) - steps_B * STEP)",
        "(upcast(sigma_B) + steps_B * STEP)",
        _test("objectives_losses::earlier_sigma_spans_1_to_200_thousandths_and_stops_at_zero"),
    ),
    Mutant(
        "advantages are scaled by the group where the batch is asked for",
        _ADVANTAGE,
        'if scale == "batch":',
        'if scale == "group":',
        _test("objectives_advantage::advantages_by_hand"),
    ),
    Mutant(
        "advantages are centred on the batch",
        _ADVANTAGE,
        "values_PG.mean(dim=1, keepdim=True)",
        "values_PG.mean()",
        _test("objectives_advantage::advantages_by_hand"),
    ),
    Mutant(
        "advantages are not standardised a second time",
        _ADVANTAGE,
        "(combined_PG / (combined_PG.std(correction=0) + STD_FLOOR))",
        "combined_PG",
        _test("objectives_advantage::advantages_by_hand"),
    ),
    Mutant(
        "advantages are not clipped",
        _ADVANTAGE,
        ".clamp(-clip, clip)",
        "",
        _test("objectives_advantage::the_clip_binds"),
    ),
    Mutant(
        "a reward's weight is ignored",
        _ADVANTAGE,
        "[weight * reward_advantages(rewards[name], scale, name)",
        "[reward_advantages(rewards[name], scale, name)",
        _test("objectives_advantage::advantages_equal_the_reference"),
    ),
    Mutant(
        "the policy gradient lowers the reward",
        _SUBGRPO,
        "torch.maximum(-weight_B * ratio_B, -weight_B * clipped_ratio_B)",
        "torch.maximum(weight_B * ratio_B, weight_B * clipped_ratio_B)",
        _test("objectives_losses::on_policy_gradient_is_minus_advantage_times_surrogate_gradient"),
    ),
    Mutant(
        "the policy loss takes the better of the two ratios",
        _SUBGRPO,
        "torch.maximum(",
        "torch.minimum(",
        _test("objectives_losses::policy_loss_by_hand"),
    ),
    Mutant(
        "the clip's sides are swapped",
        _SUBGRPO,
        "ratio_B.clamp(1 - clip_low, 1 + clip_high)",
        "ratio_B.clamp(1 - clip_high, 1 + clip_low)",
        _test("objectives_losses::clip_widths_are_separate"),
    ),
    Mutant(
        "the hinge pulls on the images above its target",
        _HINGE,
        "(target - total_B).relu().mean()",
        "(total_B - target).relu().mean()",
        _test("objectives_losses::hinge_by_hand"),
    ),
    Mutant(
        "the hinge pulls on every image, whatever its reward",
        _HINGE,
        "(target - total_B).relu().mean()",
        "(target - total_B).mean()",
        _test("objectives_losses::hinge_by_hand"),
    ),
)

SAMPLER = (
    Mutant(
        "the noise of unselected steps is each sample's own",
        _SAMPLER,
        "shared=step not in plan.selected",
        "shared=False",
        _test("sampler::unselected_steps_share_their_noise_and_selected_ones_do_not[1]"),
    ),
    Mutant(
        "the group shares the noise of selected steps",
        _SAMPLER,
        "shared=step not in plan.selected",
        "shared=True",
        _test("sampler::unselected_steps_share_their_noise_and_selected_ones_do_not[0]"),
    ),
    Mutant(
        "evaluation samples without guidance",
        _SAMPLER,
        "conditioning, empty, spec.guidance)",
        "conditioning, empty, 1.0)",
        _test("sampler::an_evaluation_repeats_itself_and_guidance_changes_it"),
    ),
)

BACKBONES = (
    Mutant(
        "guidance extrapolates from the prompt, not from the empty one",
        _BASE,
        "return unconditional + scale * (conditional - unconditional)",
        "return conditional + scale * (conditional - unconditional)",
        _test("sd3_backbone::guidance_extrapolates_from_the_empty_prompt"),
    ),
    Mutant(
        "SD3's transformer is told sigma for its timestep",
        _SD3,
        "timestep=sigma_B * TIMESTEP_SCALE,",
        "timestep=sigma_B,",
        _test("sd3_backbone::the_euler_sampler_equals_the_pipeline[1.0]"),
    ),
    Mutant(
        "FLUX.1's student gets the teacher's guidance input",
        _FLUX1,
        "return settings.guidance_scale if network is Network.TEACHER else settings.student_guidance",
        "return settings.guidance_scale",
        _test("flux1_backbone::the_euler_sampler_equals_the_pipeline[student-1.0-1.5]"),
    ),
    Mutant(
        "FLUX.2's single-stream outputs have no adapter",
        _FLUX2,
        '"attn.to_qkv_mlp_proj", "attn.to_out")',
        '"attn.to_qkv_mlp_proj")',
        _test("flux2_backbone::targets_default_to_the_familys_own"),
    ),
    Mutant(
        "a layer of an adapter trains though the adapter is frozen",
        _ADAPTERS,
        "linear.requires_grad_(name in self._trainable)",
        "linear.requires_grad_(True)",
        _test("adapters::freezing_holds_through_a_switch"),
    ),
    Mutant(
        "a stack of adapters is its last one alone",
        _ADAPTERS,
        "layer.set_adapter(list(stack))",
        "layer.set_adapter(list(stack[-1:]))",
        _test("adapters::a_stack_equals_one_adapter_of_concatenated_ranks"),
    ),
)

MUTANTS = (*TRAINERS, *NETWORKS, *FLOW, *OBJECTIVES, *SAMPLER, *BACKBONES)
