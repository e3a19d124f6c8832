"""Mutants of what the trainers train with: matching, the networks and their optimizers."""

from __future__ import annotations

from tests.mutants.mutant import Mutant, unit_test

_MATCHING = "learner/training/distribution_matching.py"
_NETWORKS = "learner/training/networks.py"
_OPTIMIZER = "learner/training/optimizer.py"

MATCHING = (
    Mutant(
        "teacher and fake score are swapped",
        _MATCHING,
        "for velocity in (fake, teacher)",
        "for velocity in (teacher, fake)",
        unit_test("learner/training/distribution_matching::the_students_gradient_by_hand"),
    ),
    Mutant(
        "the teacher of the matching gradient is not guided",
        _MATCHING,
        "sigma, conditioning, empty, settings.guidance)",
        "sigma, conditioning, empty, 1.0)",
        unit_test("learner/training/distribution_matching::the_students_gradient_by_hand"),
    ),
    Mutant(
        "the fake score is guided as the teacher is",
        _MATCHING,
        "fake = backbone.velocity(Network.FAKE_SCORE, latents, sigma, conditioning)",
        "fake = guided_velocity(backbone, Network.FAKE_SCORE, latents, sigma, conditioning, empty, 3.0)",
        unit_test("learner/training/distribution_matching::the_students_gradient_by_hand"),
    ),
    Mutant(
        "the student's own velocity stands for the fake score's",
        _MATCHING,
        "fake = backbone.velocity(Network.FAKE_SCORE, latents",
        "fake = backbone.velocity(Network.STUDENT, latents",
        unit_test("learner/training/distribution_matching::the_students_gradient_by_hand"),
    ),
    Mutant(
        "teacher and fake score are projected with different noise",
        _MATCHING,
        ".sample(noise)\n",
        '.sample(key.normal("other" if velocity is fake else "project", latents))\n',
        unit_test("learner/training/distribution_matching::the_students_gradient_by_hand"),
    ),
    Mutant(
        "teacher and fake score are projected to clean images",
        _MATCHING,
        "velocity, sigma, renoised.sigma_start, settings.eta)",
        "velocity, sigma, 0.0, settings.eta)",
        unit_test("learner/training/distribution_matching::the_students_gradient_by_hand"),
    ),
    Mutant(
        "the projection back ignores eta",
        _MATCHING,
        "sigma, renoised.sigma_start, settings.eta)",
        "sigma, renoised.sigma_start, 0.0)",
        unit_test("learner/training/distribution_matching::the_students_gradient_by_hand"),
    ),
    Mutant(
        "consistency is subtracted",
        _MATCHING,
        "denoising.value + settings.consistency_weight",
        "denoising.value - settings.consistency_weight",
        unit_test("learner/training/distribution_matching::the_fake_scores_loss_and_gradient_by_hand"),
    ),
    Mutant(
        "consistency ignores its weight",
        _MATCHING,
        "settings.consistency_weight * consistency.value",
        "consistency.value",
        unit_test("learner/training/distribution_matching::the_fake_scores_loss_and_gradient_by_hand"),
    ),
    Mutant(
        "consistency takes one sample for both",
        _MATCHING,
        '("first", "second")',
        '("first", "first")',
        unit_test("learner/training/distribution_matching::the_fake_scores_loss_and_gradient_by_hand"),
    ),
    Mutant(
        "consistency is the teacher's",
        _MATCHING,
        "prediction = backbone.velocity(Network.FAKE_SCORE,",
        "prediction = backbone.velocity(Network.TEACHER,",
        unit_test("learner/training/distribution_matching::the_fake_scores_loss_and_gradient_by_hand"),
    ),
    Mutant(
        "consistency's gradient flows through its transitions",
        _MATCHING,
        "velocity_Bchw.detach(), sigma, earlier",
        "velocity_Bchw, sigma, earlier",
        unit_test("learner/training/distribution_matching::the_fake_scores_loss_and_gradient_by_hand"),
    ),
    Mutant(
        "the fake score's target takes the samples for clean",
        _MATCHING,
        "renoised.noise_Bchw, renoised.sigma_start, renoised.sigma_B)",
        "renoised.noise_Bchw, 0.0, renoised.sigma_B)",
        unit_test("learner/training/distribution_matching::the_fake_scores_loss_and_gradient_by_hand"),
    ),
    Mutant(
        "samples are renoised as if they were clean",
        _MATCHING,
        "renoise(x_start_Bchw, noise_Bchw, sigma_start, sigma_B)",
        "renoise(x_start_Bchw, noise_Bchw, 0.0, sigma_B)",
        unit_test(
            "learner/training/distribution_matching::samples_are_renoised_from_their_own_level_with_draws_of_their_own"
        ),
    ),
    Mutant(
        "all rows of a batch share one draw",
        _MATCHING,
        '"sample": sample}',
        '"sample": 0}',
        unit_test(
            "learner/training/distribution_matching::samples_are_renoised_from_their_own_level_with_draws_of_their_own"
        ),
    ),
    Mutant(
        "consistency over some of the rows counts as over all",
        _MATCHING,
        "return Loss(weight * loss.value,",
        "return Loss(loss.value,",
        unit_test("learner/training/distribution_matching::parts_of_a_batch_add_up_to_its_consistency"),
    ),
    Mutant(
        "every iteration has the same draws",
        _MATCHING,
        '"iteration": self.iteration,',
        '"iteration": 0,',
        unit_test("learner/training/distribution_matching::a_draw_is_a_function_of_every_part_of_its_key[other2]"),
    ),
    Mutant(
        "fake score and student have the same draws",
        _MATCHING,
        'purpose = f"{self.purpose}/{what}"\n        return torch',
        "purpose = what\n        return torch",
        unit_test("learner/training/distribution_matching::a_draw_is_a_function_of_every_part_of_its_key[other1]"),
    ),
)

NETWORKS = (
    Mutant(
        "stage 2 goes on training the fake score's adapter of stage 1",
        _NETWORKS,
        "        bank.freeze(FAKE_SCORE)\n",
        "",
        unit_test("learner/training/networks::stage_two_begins_at_the_averaged_student"),
    ),
    Mutant(
        "the fake score has no fresh adapter in stage 2",
        _NETWORKS,
        "bank.define(Network.FAKE_SCORE, (FAKE_SCORE, ALIGNED_FAKE_SCORE))",
        "bank.define(Network.FAKE_SCORE, (FAKE_SCORE,))",
        unit_test("learner/training/networks::stage_two_begins_at_the_averaged_student"),
    ),
    Mutant(
        "stage 2 starts from the student's raw weights",
        _NETWORKS,
        "        bank.load(COLD_START, self.average.state())\n",
        "",
        unit_test("learner/training/networks::stage_two_begins_at_the_averaged_student"),
    ),
    Mutant(
        "the moving average's decay is inverted",
        _OPTIMIZER,
        "self._average_n.lerp_(self._adapter.flat_n, 1 - self._decay)",
        "self._average_n.lerp_(self._adapter.flat_n, self._decay)",
        unit_test("learner/training/networks::the_moving_average_by_hand"),
    ),
    Mutant(
        "a linear learning rate stays constant",
        _OPTIMIZER,
        'remaining = 1.0 if self.schedule == "constant" else max(0.0, 1 - iteration / self.iterations)',
        "remaining = 1.0",
        unit_test("learner/training/optimizer::a_linear_learning_rate_falls_to_zero"),
    ),
    Mutant(
        "a step uses the first iteration's rate",
        _OPTIMIZER,
        "self._settings.learning_rate.at(iteration)",
        "self._settings.learning_rate.at(0)",
        unit_test("learner/training/optimizer::a_step_uses_the_rate_of_its_iteration[2-0.25]"),
    ),
    Mutant(
        "student and fake score swap their weight decays",
        _NETWORKS,
        "stage.weight_decay_student,",
        "stage.weight_decay_fake,",
        unit_test("learner/training/networks::each_network_is_trained_by_its_own_settings"),
    ),
    Mutant(
        "the fake score learns at the student's rate",
        _NETWORKS,
        "LearningRate(stage.learning_rate_fake, *schedule)",
        "LearningRate(stage.learning_rate_student, *schedule)",
        unit_test("learner/training/networks::each_network_is_trained_by_its_own_settings"),
    ),
    Mutant(
        "the fake score's optimizer has the student's settings",
        _NETWORKS,
        'AdapterOptimizer("fake score", fake, settings.fake,',
        'AdapterOptimizer("fake score", fake, settings.student,',
        unit_test("learner/training/networks::each_network_is_trained_by_its_own_settings"),
    ),
    Mutant(
        "stage 2's fresh adapters start at 1 / rank",
        _NETWORKS,
        "init_std=settings.init_std,\n",
        "init_std=None,\n",
        unit_test("learner/training/networks::stage_twos_adapters_are_fresh_and_of_its_own_size"),
    ),
    Mutant(
        "alignment.lora_rank has no effect",
        _NETWORKS,
        "rank=settings.rank,\n",
        "rank=None,\n",
        unit_test("learner/training/networks::stage_two_may_train_another_rank_at_the_same_scale"),
    ),
    Mutant(
        "no gradient is clipped",
        _OPTIMIZER,
        "            clip_grads_with_norm_(self._weights, self._settings.gradient_clip, norm)\n",
        "",
        unit_test("learner/training/optimizer::a_long_gradient_is_clipped_and_its_norm_before_is_returned"),
    ),
    Mutant(
        "weight decay is ignored",
        _OPTIMIZER,
        "if self._settings.weight_decay > 0:",
        "if False:",
        unit_test("learner/training/optimizer::weight_decay_takes_its_share_of_the_weight"),
    ),
    Mutant(
        "weight decay also shrinks parameters without a gradient",
        _OPTIMIZER,
        "zip(parameters, self._adapter.reached(), strict=True) if due]",
        "zip(parameters, self._adapter.reached(), strict=True)]",
        unit_test(
            "learner/training/optimizer::steps_are_those_of_torchs_adamw_and_leave_a_parameter_without_gradient_alone"
        ),
    ),
)
