"""Mutants of the trainers of both stages."""

from __future__ import annotations

from tests.mutants.mutant import Mutant, unit_test

_SAMPLING = "common/sampling.py"
_COLD_START = "learner/training/cold_start_trainer.py"
_ALIGNMENT = "learner/training/alignment_trainer.py"
_BATCH = "learner/training/alignment_batch.py"
_POLICY = "learner/training/policy_gradient.py"

COLD_START = (
    Mutant(
        "the student is updated one iteration late",
        _COLD_START,
        "return (iteration + 1) % self._settings.student_every == 0",
        "return iteration % self._settings.student_every == 0",
        unit_test("learner/training/networks::the_student_updates_every_kth_time_and_the_fake_score_always"),
    ),
    Mutant(
        "the average of stage 1 moves with the student's updates alone",
        _COLD_START,
        "        self._networks.update_average()\n        self",
        "            self._networks.update_average()\n        self",
        unit_test("learner/training/networks::the_average_moves_in_every_iteration_of_stage_one"),
    ),
    Mutant(
        "the samples of stage 1 count as clean",
        _COLD_START,
        "renoise_samples(sample, steps[-1].sigma_next, key)",
        "renoise_samples(sample, 0.0, key)",
        unit_test("learner/training/cold_start_by_hand::each_update_has_samples_of_its_own_after_a_random_step"),
    ),
    Mutant(
        "plain DMD trains on the noisy sample",
        _COLD_START,
        "replace(last, sigma_next=0.0)",
        "last",
        unit_test("learner/training/cold_start_by_hand::plain_dmd_trains_on_clean_predictions_at_every_step"),
    ),
    Mutant(
        "stage 1 always rolls to the last step",
        _COLD_START,
        "        steps = self._steps_to(self._last_step(key))",
        "        steps = self._steps_to(len(self._steps) - 1)",
        unit_test("learner/training/cold_start_by_hand::each_update_has_samples_of_its_own_after_a_random_step"),
    ),
    Mutant(
        "the student trains on the fake score's own draws",
        _COLD_START,
        'key = self._key("student", iteration)',
        'key = self._key("fake", iteration)',
        unit_test("learner/training/cold_start_by_hand::each_update_has_samples_of_its_own_after_a_random_step"),
    ),
    Mutant(
        "stage 1's rollout ignores eta",
        _COLD_START,
        "steps_between(self._backbone.sigmas(sampling.steps), sampling.eta)",
        "steps_between(self._backbone.sigmas(sampling.steps), 0.0)",
        unit_test("learner/training/cold_start_by_hand::each_update_has_samples_of_its_own_after_a_random_step"),
    ),
    Mutant(
        "every step of the rollout keeps its graph",
        _COLD_START,
        "with_graph and index == len(steps) - 1",
        "with_graph",
        unit_test("learner/training/cold_start_by_hand::the_gradients_of_both_updates_by_hand"),
    ),
    Mutant(
        "stage 1 rolls out the fake score",
        _COLD_START,
        "Network.STUDENT, latents_Bchw, sigma_B",
        "Network.FAKE_SCORE, latents_Bchw, sigma_B",
        unit_test("learner/training/networks::two_updates_change_every_trainable_parameter_and_no_other"),
    ),
    Mutant(
        "stage 1's teacher is not guided",
        _COLD_START,
        "sampling, guidance, settings.consistency_weight)",
        "sampling, 1.0, settings.consistency_weight)",
        unit_test("learner/training/cold_start_by_hand::the_gradients_of_both_updates_by_hand"),
    ),
    Mutant(
        "every step of the rollout has the same noise",
        _COLD_START,
        'key.normal(f"step{index}", latents)',
        'key.normal("step", latents)',
        unit_test("learner/training/cold_start_by_hand::each_update_has_samples_of_its_own_after_a_random_step"),
    ),
    Mutant(
        "a step's velocity is the next level's",
        _SAMPLING,
        "torch.full((len(latents_Bchw),), step.sigma, device",
        "torch.full((len(latents_Bchw),), step.sigma_next, device",
        unit_test("learner/training/cold_start_by_hand::each_update_has_samples_of_its_own_after_a_random_step"),
    ),
    Mutant(
        "stage 1's consistency is left out",
        _COLD_START,
        "guidance, settings.consistency_weight)",
        "guidance, 0.0)",
        unit_test("learner/training/cold_start_by_hand::the_gradients_of_both_updates_by_hand"),
    ),
)

ALIGNMENT = (
    Mutant(
        "the policy loss takes no share of the final step's part",
        _ALIGNMENT,
        "part = share / (len(trained_steps) + 1)",
        "part = share / max(len(trained_steps), 1)",
        unit_test(
            "learner/training/alignment_trainer::the_policy_gradient_is_minus_advantage_times_surrogate[squared_error]"
        ),
    ),
    Mutant(
        "all stochastic steps are trained, selected or not",
        _POLICY,
        "else plan.selected",
        "else tuple(range(plan.num_steps - 1))",
        unit_test(
            "learner/training/alignment_trainer::the_policy_gradient_is_minus_advantage_times_surrogate[squared_error]"
        ),
    ),
    Mutant(
        "the policy loss does not use the advantages",
        _POLICY,
        "surrogate_B, old_B, batch.advantages_B[rows],",
        "surrogate_B, old_B, old_B * 0 + 1,",
        unit_test(
            "learner/training/alignment_trainer::the_policy_gradient_is_minus_advantage_times_surrogate[squared_error]"
        ),
    ),
    Mutant(
        "the policy loss never uses the rollout's surrogate",
        _POLICY,
        'if settings.old_surrogate == "rollout" else',
        'if settings.old_surrogate == "none" else',
        unit_test("learner/training/alignment_trainer::a_disagreement_is_measured"),
    ),
    Mutant(
        "a micro-batch reaches over the middle of a measured batch",
        _ALIGNMENT,
        "middle = batch.middle if halves else len(batch)",
        "middle = len(batch)",
        unit_test("learner/training/term_signals::each_half_has_its_own_rows"),
    ),
    Mutant(
        "the hinge pushes the rewards down",
        _ALIGNMENT,
        "values[REWARD] = settings.reward_gradient_weight * hinge.value",
        "values[REWARD] = -settings.reward_gradient_weight * hinge.value",
        unit_test("learner/training/alignment_trainer::reward_back_propagation_raises_the_reward"),
    ),
    Mutant(
        "every micro-batch of the fake score counts as the whole batch",
        _ALIGNMENT,
        "            (loss.value * share).backward()",
        "            loss.value.backward()",
        unit_test("learner/training/alignment_trainer::the_micro_batch_changes_no_result[1]"),
    ),
    Mutant(
        "every sample's reward gradient is clipped as a mean",
        _ALIGNMENT,
        "clip_sample_norms(gradients_Bchw, self._settings.reward_gradient_clip)",
        "clip_sample_norms(gradients_Bchw, None)",
        unit_test("learner/training/alignment_trainer::clipping_scales_every_samples_reward_gradient"),
    ),
    Mutant(
        "the average of stage 2 moves in every iteration",
        _ALIGNMENT,
        "if (iteration + 1) % self._settings.ema_every == 0:",
        "if True:",
        unit_test("learner/training/alignment_trainer::the_average_moves_every_kth_iteration"),
    ),
    Mutant(
        "the fake score trains on the samples before the final step",
        _ALIGNMENT,
        "renoise_samples(batch.latents(-1, rows), 0.0, key)",
        "renoise_samples(batch.latents(-2, rows), 0.0, key)",
        unit_test(
            "learner/training/alignment_trainer::a_gradient_that_is_not_finite_stops_its_network_by_name[student]"
        ),
    ),
    Mutant(
        "the final step's matching ascends",
        _ALIGNMENT,
        "values[MATCHING] = settings.matching_weight * matching.value",
        "values[MATCHING] = -settings.matching_weight * matching.value",
        unit_test("learner/training/alignment_trainer::the_final_steps_matching_gradient_by_hand"),
    ),
    Mutant(
        "the final step's matching ignores its weight",
        _ALIGNMENT,
        "settings.matching_weight * matching.value",
        "matching.value",
        unit_test("learner/training/alignment_trainer::the_final_steps_matching_gradient_by_hand"),
    ),
    Mutant(
        "matching is of the step before the last",
        _ALIGNMENT,
        "batch.transition(self._backbone, batch.plan.num_steps - 1, rows)",
        "batch.transition(self._backbone, batch.plan.num_steps - 2, rows)",
        unit_test("learner/training/alignment_trainer::the_final_steps_matching_gradient_by_hand"),
    ),
    Mutant(
        "stage 2's student trains on the fake score's own draws",
        _ALIGNMENT,
        'self._parts(batch, "student", halves',
        'self._parts(batch, "fake", halves',
        unit_test("learner/training/alignment_trainer::the_final_steps_matching_gradient_by_hand"),
    ),
    Mutant(
        "the exact density is never used",
        _POLICY,
        'if settings.surrogate == "gaussian":',
        'if settings.surrogate == "none":',
        unit_test(
            "learner/training/alignment_trainer::the_policy_gradient_is_minus_advantage_times_surrogate[gaussian]"
        ),
    ),
    Mutant(
        "advantages go to the wrong samples",
        _BATCH,
        "to_device(advantages_PG.flatten()[mine]",
        "to_device(advantages_PG.T.flatten()[mine]",
        unit_test(
            "learner/training/alignment_trainer::the_policy_gradient_is_minus_advantage_times_surrogate[squared_error]"
        ),
    ),
    Mutant(
        "advantages are always scaled by the group",
        _ALIGNMENT,
        "            self._settings.advantage_scale,",
        '            "group",',
        unit_test(
            "learner/training/alignment_trainer::the_policy_gradient_is_minus_advantage_times_surrogate[squared_error]"
        ),
    ),
    Mutant(
        "the smallest advantages are kept",
        _BATCH,
        "descending=True",
        "descending=False",
        unit_test("learner/training/alignment_batch::the_largest_advantages_are_kept_in_their_order"),
    ),
    Mutant(
        "the balanced weights grow with the noise",
        _POLICY,
        "inverse_sizes.append(1 / (size * std if",
        "inverse_sizes.append((size * std if",
        unit_test("learner/training/alignment_batch::balanced_weights_give_every_step_the_same_gradient"),
    ),
    Mutant(
        "the clip widths are swapped",
        _POLICY,
        "settings.clip_low, settings.clip_high",
        "settings.clip_high, settings.clip_low",
        unit_test("learner/training/alignment_trainer::each_clip_width_is_on_its_own_side"),
    ),
    Mutant(
        "the hinge's gradient is divided twice by the batch",
        _ALIGNMENT,
        "hinge.value * count, decoded",
        "hinge.value, decoded",
        unit_test("learner/training/alignment_trainer::the_micro_batch_changes_no_result[1]"),
    ),
    Mutant(
        "the hinge's target is ignored",
        _ALIGNMENT,
        "self._settings.reward_target)",
        "0.0)",
        unit_test("learner/training/alignment_trainer::reward_back_propagation_raises_the_reward"),
    ),
    Mutant(
        "prompts go to the wrong samples",
        _BATCH,
        "encoded_of_B=to_device(order, device)",
        "encoded_of_B=to_device(order.flip(0), device)",
        unit_test("learner/training/alignment_trainer::learner_and_sampler_agree"),
    ),
    Mutant(
        "every step is given the first level",
        _BATCH,
        "self.latents(step, rows), self.plan.steps[step])",
        "self.latents(step, rows), self.plan.steps[0])",
        unit_test("learner/training/alignment_trainer::learner_and_sampler_agree"),
    ),
    Mutant(
        "stage 2 ignores its share of micro-batches",
        _ALIGNMENT,
        "part = share / (len(trained_steps) + 1)",
        "part = 1 / (len(trained_steps) + 1)",
        unit_test(
            "learner/training/alignment_trainer::the_policy_gradient_is_minus_advantage_times_surrogate[squared_error]"
        ),
    ),
    Mutant(
        "the fake score of stage 2 ascends",
        _ALIGNMENT,
        "            (loss.value * share).backward()",
        "            (-loss.value * share).backward()",
        unit_test("learner/training/alignment_trainer_gaussian::the_fake_scores_gradient_by_hand"),
    ),
    Mutant(
        "the fake score of stage 2 takes its samples for noisy",
        _ALIGNMENT,
        "renoise_samples(batch.latents(-1, rows), 0.0, key)",
        "renoise_samples(batch.latents(-1, rows), 0.5, key)",
        unit_test("learner/training/alignment_trainer_gaussian::the_fake_scores_gradient_by_hand"),
    ),
    Mutant(
        "the fake score of stage 2 has no consistency term",
        _ALIGNMENT,
        "self._matching = matching\n",
        "self._matching = MatchingSettings(matching.guidance, matching.eta, matching.fake_max_weight, 0.0, 1.0)\n",
        unit_test("learner/training/alignment_trainer_gaussian::the_fake_scores_gradient_by_hand"),
    ),
    Mutant(
        "stage 2 gets the cold start's consistency weight",
        "learner/training/learner_rank.py",
        "config.backbone.guidance_scale, config.alignment.consistency_weight",
        "config.backbone.guidance_scale, config.cold_start.consistency_weight",
        unit_test("learner/training/learner_rank::each_stage_has_its_own_consistency_weight[0.5-0.0]"),
    ),
    Mutant(
        "alignment samples the cold start's prompts",
        "learner/run.py",
        "prompts = self.prompts.alignment",
        "prompts = self.prompts.cold_start",
        unit_test("learner/run::a_plan_is_drawn_from_the_prompts_of_alignment"),
    ),
    Mutant(
        "the recipe of an export has the teacher's guidance",
        "learner/tools/export.py",
        'settings.get("student_guidance", 1.0)',
        'settings.get("guidance_scale", 1.0)',
        unit_test("learner/tools/export::the_recipe_samples_as_the_student_was_trained"),
    ),
)
