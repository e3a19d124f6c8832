"""Mutants of the sampler, the model families and their adapters."""

from __future__ import annotations

from tests.mutants.mutant import Mutant, unit_test

_SAMPLER = "rollout_workers/sampler.py"
_SEEDING = "common/seeding.py"
_BASE = "common/backbones/base.py"
_ADAPTERS = "common/backbones/adapters.py"
_LORA_LINEAR = "common/backbones/lora_linear.py"
_DIFFUSERS = "common/backbones/diffusers_backbone.py"
_SD3 = "common/backbones/sd3.py"
_FLUX1 = "common/backbones/flux1.py"
_FLUX2 = "common/backbones/flux2.py"

SAMPLER = (
    Mutant(
        "the noise of unselected steps is each sample's own",
        _SAMPLER,
        "shared=step.shared_noise",
        "shared=False",
        unit_test("rollout_workers/sampler::unselected_steps_share_their_noise_and_selected_ones_do_not[1]"),
    ),
    Mutant(
        "the group shares the noise of selected steps",
        _SAMPLER,
        "shared=step.shared_noise",
        "shared=True",
        unit_test("rollout_workers/sampler::unselected_steps_share_their_noise_and_selected_ones_do_not[0]"),
    ),
    Mutant(
        "evaluation samples without guidance",
        _SAMPLER,
        "conditioning, empty, spec.guidance)",
        "conditioning, empty, 1.0)",
        unit_test("rollout_workers/sampler::an_evaluation_repeats_itself_and_guidance_changes_it"),
    ),
    Mutant(
        "the same steps are selected in every iteration",
        _SEEDING,
        'purpose="selected", iteration=iteration)',
        'purpose="selected", iteration=0)',
        unit_test("common/seeding::selected_steps_are_sorted_distinct_and_cover_every_subset"),
    ),
    Mutant(
        "the teacher samples in the student's place",
        _SAMPLER,
        "return backbone.velocity(Network.STUDENT,",
        "return backbone.velocity(Network.TEACHER,",
        unit_test("learner/training/alignment_trainer::learner_and_sampler_agree"),
    ),
)

BACKBONES = (
    Mutant(
        "guidance extrapolates from the prompt, not from the empty one",
        _BASE,
        "return unconditional + scale * (conditional - unconditional)",
        "return conditional + scale * (conditional - unconditional)",
        unit_test("common/backbones/sd3::guidance_extrapolates_from_the_empty_prompt"),
    ),
    Mutant(
        "SD3's transformer is told sigma for its timestep",
        _SD3,
        "timestep=sigma_B * TIMESTEP_SCALE,",
        "timestep=sigma_B,",
        unit_test("common/backbones/sd3::the_euler_sampler_equals_the_pipeline[1.0]"),
    ),
    Mutant(
        "FLUX.1's student gets the teacher's guidance input",
        _FLUX1,
        "return settings.guidance_scale if as_teacher else settings.student_guidance",
        "return settings.guidance_scale",
        unit_test("common/backbones/flux1::the_euler_sampler_equals_the_pipeline[student-1.0-1.5]"),
    ),
    Mutant(
        "FLUX.2's single-stream outputs have no adapter",
        _FLUX2,
        '"attn.to_qkv_mlp_proj", "attn.to_out")',
        '"attn.to_qkv_mlp_proj")',
        unit_test("common/backbones/flux2::targets_default_to_the_familys_own"),
    ),
    Mutant(
        "a parameter trains though it was declared frozen",
        _ADAPTERS,
        "if parameter.requires_grad != (id(parameter) in declared):",
        "if False:",
        unit_test("common/backbones/adapters::a_parameter_that_was_switched_behind_the_bank_is_named"),
    ),
    Mutant(
        "a stack of adapters is its last one alone",
        _LORA_LINEAR,
        "for name in stack if name in self.lora_A]",
        "for name in stack[-1:] if name in self.lora_A]",
        unit_test("common/backbones/adapters::a_stack_equals_one_adapter_of_concatenated_ranks"),
    ),
    Mutant(
        "a recomputed block runs through the network that is active by then",
        _ADAPTERS,
        "with self._through(network):\n                return function(*inputs)",
        "with self._through(self._active.name):\n                return function(*inputs)",
        unit_test(
            "common/backbones/adapters::checkpointing_recomputes_through_the_network_of_the_forward_pass[stack1]"
        ),
    ),
    Mutant(
        "a network keeps the weights of its first pass",
        _ADAPTERS,
        "if version != self._copied[network]:",
        "if self._copied[network] < 0:",
        unit_test("common/backbones/adapters::state_is_a_copy_and_load_takes_it_back"),
    ),
    Mutant(
        "a step of the learner's optimizer is not counted",
        "learner/training/optimizer.py",
        "torch.autograd.graph.increment_version(self._weights)",
        "torch.autograd.graph.increment_version([])",
        unit_test("common/backbones/adapters::a_step_of_the_learners_optimizer_changes_the_next_pass"),
    ),
    Mutant(
        "a worker loads the frozen weights again with every version",
        "rollout_workers/weight_receiver.py",
        "if due[adapter] == before.get(adapter)}",
        "if False}",
        unit_test("common/weights::a_new_worker_takes_the_frozen_weights_and_an_old_one_keeps_them"),
    ),
    Mutant(
        "a weight behind the low-rank product is missing from the inputs' gradient",
        _LORA_LINEAR,
        "(gradient @ weight).addmm_(gradient_low, a)",
        "(gradient @ weight)",
        unit_test("common/backbones/lora_linear::the_gradients_are_those_by_hand"),
    ),
    Mutant(
        "the gradient of B lacks the scale",
        _LORA_LINEAR,
        "(gradient.T @ part) * ctx.scale if",
        "(gradient.T @ part) if",
        unit_test("common/backbones/lora_linear::the_gradients_are_those_by_hand"),
    ),
    Mutant(
        "an adapter of another shape is added",
        _ADAPTERS,
        "if not rank or shapes != [[rank, in_features], [out_features, rank]]:",
        "if not rank:",
        unit_test("common/backbones/adapters::an_adapter_that_fits_no_layer_is_named_and_changes_nothing"),
    ),
    Mutant(
        "a fresh A has the variance 1 / rank, not the deviation",
        _ADAPTERS,
        "noise / rank if",
        "noise / rank**0.5 if",
        unit_test("learner/training/networks::stage_twos_adapters_are_fresh_and_of_its_own_size"),
    ),
    Mutant(
        "adapters bind to SD3.5-M's second attention too",
        _DIFFUSERS,
        '"attn.to_q",\n    "attn.to_k",',
        '"to_q",\n    "to_k",',
        unit_test("common/backbones/sd3::targets_default_to_the_joint_attention_alone"),
    ),
    Mutant(
        "an adapter has the inverse scale",
        _ADAPTERS,
        "self.scale = alpha / rank",
        "self.scale = rank / alpha",
        unit_test("common/backbones/adapters::adapters_of_other_ranks_on_other_layers_add_up"),
    ),
    Mutant(
        "an exported LoRA has its scale in the metadata alone",
        "learner/training/lora_file.py",
        'scale * value if ".lora_B." in key',
        'value if ".lora_B." in key',
        unit_test("common/backbones/families::diffusers_loads_the_exported_student_and_draws_the_same_images"),
    ),
    Mutant(
        "any scheduler's noise levels are taken for Euler's",
        "common/backbones/files/schedules.py",
        "if kind != SCHEDULER:",
        "if kind is None:",
        unit_test("common/backbones/pipeline_files::another_flow_scheduler_is_refused_by_its_class"),
    ),
    Mutant(
        "weights of another model pass as bookkeeping",
        "common/weight_names.py",
        "return last in RECOMPUTED or last in buffers",
        "return True",
        unit_test("reward_servers/scorers/published_weights::a_foreign_weight_is_refused"),
    ),
    Mutant(
        "a missing weight of a text encoder is random",
        "common/backbones/pipeline_loading.py",
        'and report["missing_keys"]:',
        'and not report["missing_keys"]:',
        unit_test("common/backbones/pipeline_loading::a_missing_weight_is_named_and_never_random"),
    ),
    Mutant(
        "an adapter beside a reward's weights is added to them",
        "reward_servers/scorers/model_directory.py",
        "if (directory / ADAPTER_CONFIG).exists():",
        "if not directory.exists():",
        unit_test("reward_servers/scorers/published_weights::an_adapter_beside_the_weights_is_refused"),
    ),
    Mutant(
        "blocks that the configuration lacks are dropped",
        "common/backbones/pipeline_loading.py",
        "if foreign and isinstance(module, diffusers.ModelMixin):",
        "if not module:",
        unit_test("learner/tools/diffusers_pipeline::a_block_more_than_the_configuration_has_is_refused"),
    ),
)
