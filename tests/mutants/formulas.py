"""Mutants of the formulas: the flow and the objectives."""

from __future__ import annotations

from tests.mutants.mutant import Mutant, unit_test

_AC_DMD = "learner/objectives/ac_dmd.py"
_ADVANTAGE = "learner/objectives/advantage.py"
_CONSISTENCY = "learner/objectives/consistency.py"
_HINGE = "learner/objectives/reward_gradient.py"
_SUBGRPO = "learner/objectives/subgrpo.py"
_FLOW = "common/flow.py"

FLOW = (
    Mutant(
        "a transition ignores eta",
        _FLOW,
        "angle = eta * math.pi / 2",
        "angle = math.pi / 2",
        unit_test("common/flow::transition_by_hand"),
    ),
    Mutant(
        "a transition keeps the whole predicted noise beside the new one",
        _FLOW,
        "next_level * math.cos(angle) * noise_Bchw",
        "next_level * noise_Bchw",
        unit_test("common/flow::transition_by_hand"),
    ),
    Mutant(
        "the clean prediction adds the velocity",
        _FLOW,
        "clean_Bchw = upcast(sample_Bchw) - level * upcast(velocity_Bchw)",
        "clean_Bchw = upcast(sample_Bchw) + level * upcast(velocity_Bchw)",
        unit_test("common/flow::transition_by_hand"),
    ),
    Mutant(
        "the surrogate rewards samples far from the mean",
        _FLOW,
        "return -(upcast(next_sample_Bchw) - upcast(mean_Bchw)).square().mean(dim=(1, 2, 3))",
        "return (upcast(next_sample_Bchw) - upcast(mean_Bchw)).square().mean(dim=(1, 2, 3))",
        unit_test("common/flow::densities_by_hand"),
    ),
    Mutant(
        "the renoise level is not clamped",
        _FLOW,
        "upcast(uniform_B)).clamp(RENOISE_MIN, RENOISE_MAX)",
        "upcast(uniform_B))",
        unit_test("common/flow::renoise_level_stays_above_the_start_and_inside_the_clamp"),
    ),
    Mutant(
        "renoising keeps too little of a noisy sample",
        _FLOW,
        "keep = (1 - end) / (1 - start)",
        "keep = 1 - end",
        unit_test("common/flow::renoising_keeps_the_flow"),
    ),
    Mutant(
        "renoising adds noise as if the sample were clean",
        _FLOW,
        "return keep, ((end - start) / (1 - start) * (end + keep * start)).sqrt()",
        "return keep, end",
        unit_test("common/flow::renoising_keeps_the_flow"),
    ),
    Mutant(
        "the ambient target has no part for the sample's own noise",
        _FLOW,
        "noise_factor = end + keep * start.square() / (1 - start)",
        "noise_factor = end",
        unit_test("common/flow::ambient_target_regresses_to_the_velocity"),
    ),
    Mutant(
        "the ambient target adds the sample",
        _FLOW,
        "return noise_factor * upcast(noise_Bchw) - scale / (1 - start)",
        "return noise_factor * upcast(noise_Bchw) + scale / (1 - start)",
        unit_test("common/flow::ambient_target_from_a_clean_sample_is_the_velocity"),
    ),
    Mutant(
        "SD3's schedule is not shifted",
        _FLOW,
        "return shift * raw / (1 + (shift - 1) * raw)",
        "return raw",
        unit_test("common/flow::sd3_schedule_equals_the_reference"),
    ),
    Mutant(
        "FLUX.2's shift ignores the number of steps",
        _FLOW,
        "return mu_10_steps + (mu_200_steps - mu_10_steps) * (num_steps - 10) / 190",
        "return mu_10_steps",
        unit_test("common/flow::flux2_schedule_equals_the_reference[flux2_klein_1024]"),
    ),
)

OBJECTIVES = (
    Mutant(
        "the matching loss ascends",
        _AC_DMD,
        "(fixed_Bchw - gradient_Bchw)",
        "(fixed_Bchw + gradient_Bchw)",
        unit_test("learner/objectives/losses::distribution_matching_by_hand"),
    ),
    Mutant(
        "the matching gradient is not normalised",
        _AC_DMD,
        "gradient_Bchw = gradient_Bchw / distance_B111.clamp(min=NORMALISER_FLOOR)",
        "pass",
        unit_test(
            "learner/objectives/losses::distribution_matching_gradient_agrees_with_finite_differences_at_a_fixed_target[True]"
        ),
    ),
    Mutant(
        "the matching gradient's normaliser is the batch's, not the sample's",
        _AC_DMD,
        "(fixed_Bchw - teacher_Bchw).abs().mean(dim=(1, 2, 3), keepdim=True)",
        "(fixed_Bchw - teacher_Bchw).abs().mean().view(1, 1, 1, 1)",
        unit_test(
            "learner/objectives/losses::distribution_matching_gradient_agrees_with_finite_differences_at_a_fixed_target[True]"
        ),
    ),
    Mutant(
        "the fake loss's weight has no cap",
        _AC_DMD,
        "width.pow(-2).clamp(max=max_weight)",
        "width.pow(-2)",
        unit_test("learner/objectives/losses::fake_score_loss_by_hand"),
    ),
    Mutant(
        "the consistency loss squares one deviation",
        _CONSISTENCY,
        "(upcast(second_prediction_Bchw) - anchor_Bchw)",
        "(upcast(first_prediction_Bchw) - anchor_Bchw)",
        unit_test("learner/objectives/losses::consistency_by_hand_can_be_negative"),
    ),
    Mutant(
        "consistency looks at later levels",
        _CONSISTENCY,
        "(upcast(sigma_B) - steps_B * STEP)",
        "(upcast(sigma_B) + steps_B * STEP)",
        unit_test("learner/objectives/losses::earlier_sigma_spans_1_to_200_thousandths_and_stops_at_zero"),
    ),
    Mutant(
        "advantages are scaled by the group where the batch is asked for",
        _ADVANTAGE,
        'if scale == "batch":',
        'if scale == "group":',
        unit_test("learner/objectives/advantage::advantages_by_hand"),
    ),
    Mutant(
        "advantages are centred on the batch",
        _ADVANTAGE,
        "values_PG.mean(dim=1, keepdim=True)",
        "values_PG.mean()",
        unit_test("learner/objectives/advantage::advantages_by_hand"),
    ),
    Mutant(
        "advantages are not standardised a second time",
        _ADVANTAGE,
        "(combined_PG / (combined_PG.std(correction=0) + STD_FLOOR))",
        "combined_PG",
        unit_test("learner/objectives/advantage::advantages_by_hand"),
    ),
    Mutant(
        "advantages are not clipped",
        _ADVANTAGE,
        ".clamp(-clip, clip)",
        "",
        unit_test("learner/objectives/advantage::the_clip_binds"),
    ),
    Mutant(
        "a reward's weight is ignored",
        _ADVANTAGE,
        "[weight * reward_advantages(rewards[name], scale, name)",
        "[reward_advantages(rewards[name], scale, name)",
        unit_test("learner/objectives/advantage::advantages_equal_the_reference"),
    ),
    Mutant(
        "the policy gradient lowers the reward",
        _SUBGRPO,
        "torch.maximum(-weight_B * ratio_B, -weight_B * clipped_ratio_B)",
        "torch.maximum(weight_B * ratio_B, weight_B * clipped_ratio_B)",
        unit_test("learner/objectives/losses::on_policy_gradient_is_minus_advantage_times_surrogate_gradient"),
    ),
    Mutant(
        "the policy loss takes the better of the two ratios",
        _SUBGRPO,
        "torch.maximum(",
        "torch.minimum(",
        unit_test("learner/objectives/losses::policy_loss_by_hand"),
    ),
    Mutant(
        "the clip's sides are swapped",
        _SUBGRPO,
        "ratio_B.clamp(1 - clip_low, 1 + clip_high)",
        "ratio_B.clamp(1 - clip_high, 1 + clip_low)",
        unit_test("learner/objectives/losses::clip_widths_are_separate"),
    ),
    Mutant(
        "the hinge pulls on the images above its target",
        _HINGE,
        "(target - total_B).relu().mean()",
        "(total_B - target).relu().mean()",
        unit_test("learner/objectives/losses::hinge_by_hand"),
    ),
    Mutant(
        "the hinge pulls on every image, whatever its reward",
        _HINGE,
        "(target - total_B).relu().mean()",
        "(target - total_B).mean()",
        unit_test("learner/objectives/losses::hinge_by_hand"),
    ),
    Mutant(
        "a served gradient is descended",
        _HINGE,
        "(offset_BCHW * upcast(gradients_BCHW).detach())",
        "(offset_BCHW * -upcast(gradients_BCHW).detach())",
        unit_test("learner/objectives/losses::attached_gradient_equals_autograd_through_the_reward"),
    ),
)
