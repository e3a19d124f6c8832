"""Mutants of the rivals of SubGRPO: DiffusionNFT and TDM-R1's surrogate reward."""

from __future__ import annotations

from tests.mutants.mutant import Mutant, unit_test

_NFT = "learner/training/diffusion_nft.py"
_NFT_LOSS = "learner/objectives/diffusion_nft.py"
_SURROGATE = "learner/training/surrogate_reward.py"
_SURROGATE_LOSS = "learner/objectives/surrogate_reward.py"

RIVALS = (
    Mutant(
        "FLUX.1's surrogate gets the student's guidance input",
        "common/backbones/flux1.py",
        "network in (Network.TEACHER, Network.SURROGATE_REWARD)",
        "network is Network.TEACHER",
        unit_test("common/backbones/families::a_fresh_surrogate_reward_is_the_teacher[flux1]"),
    ),
    Mutant(
        "DiffusionNFT pushes good samples away",
        _NFT,
        "            batch.advantages_B[rows],",
        "            -batch.advantages_B[rows],",
        unit_test("learner/training/rivals::it_raises_a_reward_without_gradient[nft]"),
    ),
    Mutant(
        "DiffusionNFT trains on the samples before the final step",
        _NFT,
        "batch.latents(-1, rows)",
        "batch.latents(-2, rows)",
        unit_test("learner/training/rivals::the_nft_gradient_by_hand"),
    ),
    Mutant(
        "DiffusionNFT noises to the level after the step",
        _NFT,
        "batch.plan.steps[step].sigma\n",
        "batch.plan.steps[step].sigma_next\n",
        unit_test("learner/training/rivals::the_nft_gradient_by_hand"),
    ),
    Mutant(
        "the surrogate learns to prefer the worse samples",
        _SURROGATE,
        "preference_loss(*errors, batch.advantages_B[rows],",
        "preference_loss(*errors, -batch.advantages_B[rows],",
        unit_test(
            "learner/training/alignment_trainer_gaussian::the_surrogate_reward_learns_the_direction_of_the_reward"
        ),
    ),
    Mutant(
        "the student descends the surrogate reward",
        _SURROGATE,
        "for v in (surrogate, judged.reference_Bchw)]",
        "for v in (judged.reference_Bchw, surrogate)]",
        unit_test("learner/training/rivals::it_raises_a_reward_without_gradient[surrogate_reward]"),
    ),
    Mutant(
        "each sample of a group is judged at its own noise",
        _SURROGATE,
        "replace(key, rows=groups_B.tolist())",
        "key",
        unit_test("learner/training/rivals::the_samples_of_a_group_are_compared_at_one_level_and_noise"),
    ),
    Mutant(
        "every micro-batch of the surrogate counts as the whole batch",
        _SURROGATE,
        "(weight * share * (preference",
        "(weight * (preference",
        unit_test("learner/training/rivals::the_micro_batch_changes_no_result[1-surrogate_reward]"),
    ),
    Mutant(
        "checkpoints lack the surrogate reward",
        "learner/training/networks.py",
        "surrogate = (SURROGATE_REWARD,) if self._surrogate_optimizer else ()",
        "surrogate: tuple[str, ...] = ()",
        unit_test("learner/training/rivals::a_restored_run_goes_on_bit_by_bit[surrogate_reward]"),
    ),
    Mutant(
        "checkpoints lack the surrogate reward's moments",
        "learner/training/networks.py",
        'self._surrogate_optimizer.load(_part(state, "optimizer/surrogate"))',
        "pass",
        unit_test("learner/training/rivals::a_restored_run_goes_on_bit_by_bit[surrogate_reward]"),
    ),
    Mutant(
        "DiffusionNFT has no negative velocity",
        _NFT_LOSS,
        "old_Bchw - change_Bchw)",
        "old_Bchw + change_Bchw)",
        unit_test("learner/objectives/diffusion_nft::the_loss_by_hand"),
    ),
    Mutant(
        "DiffusionNFT's errors are not normalised",
        _NFT_LOSS,
        " / size_B.clamp(min=NORMALISER_FLOOR)",
        "",
        unit_test("learner/objectives/diffusion_nft::the_loss_by_hand"),
    ),
    Mutant(
        "groups that are ordered rightly train most",
        _SURROGATE_LOSS,
        "torch.sigmoid(-odds_B)",
        "torch.sigmoid(odds_B)",
        unit_test("learner/objectives/surrogate_reward::the_preference_loss_by_hand"),
    ),
    Mutant(
        "the surrogate's bound takes out the samples with the wrong sign",
        _SURROGATE_LOSS,
        "held_B = right_B & too_far",
        "held_B = ~right_B & too_far",
        unit_test("learner/objectives/surrogate_reward::too_far_away_only_samples_with_the_wrong_sign_train"),
    ),
    Mutant(
        "the ascent of the surrogate reward descends",
        _SURROGATE_LOSS,
        "(clean_Bchw, reference_Bchw, surrogate_Bchw)\n    return",
        "(clean_Bchw, surrogate_Bchw, reference_Bchw)\n    return",
        unit_test("learner/objectives/surrogate_reward::the_ascent_by_hand"),
    ),
)
