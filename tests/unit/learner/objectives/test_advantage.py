from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.objectives.advantage import (
    group_advantages,
    renormalised_group_advantages,
    reward_advantages,
    zero_spread_fraction,
)
from learner.objectives.loss import renormalised_weights
from tests.helpers.reference import REFERENCE, assert_near, tensor

NO_CLIP = math.inf


@pytest.mark.parametrize("case", REFERENCE["advantages"], ids=lambda case: case["scale"])
def test_advantages_equal_the_reference(case):
    shape = (case["num_prompts"], case["group_size"])
    rewards = {name: tensor(values).reshape(shape) for name, values in case["rewards"].items()}
    for name, expected in case["per_reward"].items():
        assert_near(reward_advantages(rewards[name], case["scale"]).flatten(), expected)
    assert_near(group_advantages(rewards, case["weights"], case["scale"], NO_CLIP).flatten(), case["advantages"])


def test_advantages_by_hand():
    # Groups (0, 2) and (5, 5): centred (-1, 1, 0, 0); std over the batch of (0, 2, 5, 5) is sqrt(54 / 4 - 9).
    rewards_PG = torch.tensor([[0.0, 2.0], [5.0, 5.0]], dtype=torch.float64)
    first = 1 / (math.sqrt(4.5) + 1e-4)
    assert reward_advantages(rewards_PG, "batch").tolist() == [[-first, first], [0, 0]]
    within = 1 / 1.0001
    assert reward_advantages(rewards_PG, "group").tolist() == [[-within, within], [0, 0]]
    second = first / (first * math.sqrt(0.5) + 1e-4)
    expected = torch.tensor([[-second, second], [0, 0]], dtype=torch.float64)
    torch.testing.assert_close(group_advantages({"r": rewards_PG}, {"r": 1.0}, "batch", 5.0), expected)


@pytest.mark.parametrize("scale", ["batch", "group"])
@given(value=st.floats(-100, 100, width=32), other=st.floats(-3, 3, width=32))
def test_a_group_of_equal_rewards_gets_exactly_zero(scale, value, other):
    rewards_PG = torch.stack([torch.full((7,), value), torch.linspace(-1, 1, 7) * other])
    advantages_PG = group_advantages({"r": rewards_PG}, {"r": 1.0}, scale, 5.0)
    assert torch.equal(advantages_PG[0], torch.zeros(7))
    everywhere_PG = torch.full((2, 7), value)
    assert torch.equal(group_advantages({"r": everywhere_PG}, {"r": 1.0}, scale, 5.0), torch.zeros(2, 7))


def test_an_equal_reward_leaves_the_other_rewards_of_its_group_alone():
    varied_PG = torch.tensor([[0.0, 1.0, 2.0], [2.0, 0.0, 1.0]])
    flat_PG = torch.full((2, 3), 0.3)
    alone = group_advantages({"varied": varied_PG}, {"varied": 1.0}, "group", 5.0)
    both = group_advantages({"varied": varied_PG, "flat": flat_PG}, {"varied": 1.0, "flat": 3.0}, "group", 5.0)
    assert torch.equal(alone, both)


@given(shift=st.floats(-50, 50), factor=st.floats(0.5, 20))
def test_advantages_do_not_depend_on_a_rewards_unit(shift, factor):
    rewards_PG = torch.tensor([[0.1, 0.9, 0.4], [0.8, 0.2, 0.7]], dtype=torch.float64)
    moved_PG = rewards_PG * factor + shift
    one, other = (group_advantages({"r": r}, {"r": 1.0}, "batch", 5.0) for r in (rewards_PG, moved_PG))
    torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)  # the 1e-4 added to the std has the reward's unit


def test_the_clip_binds():
    rewards_PG = torch.zeros(4, 50)
    rewards_PG[0, 0] = 1.0
    advantages_PG = group_advantages({"r": rewards_PG}, {"r": 1.0}, "batch", 5.0)
    assert advantages_PG.max().item() == 5.0
    assert group_advantages({"r": rewards_PG}, {"r": 1.0}, "batch", 100.0).max().item() > 5.0


def test_a_watched_reward_does_not_count():
    rewards = {"trained": torch.tensor([[0.0, 1.0]]), "watched": torch.tensor([[5.0, -5.0]])}
    weights = {"trained": 1.0}
    expected = group_advantages({"trained": rewards["trained"]}, weights, "batch", 5.0)
    assert torch.equal(group_advantages(rewards, weights, "batch", 5.0), expected)


def test_zero_spread_fraction_counts_groups():
    assert zero_spread_fraction(torch.tensor([[0.3, 0.3], [0.3, 0.4], [1.0, 1.0], [0.0, 1.0]])).item() == 0.5


OK = torch.tensor([[0.0, 1.0]])


@pytest.mark.parametrize(
    ("rewards", "weights", "message"),
    [
        ({"hps": OK}, {"hps": 1.0, "pick": 1.0}, r"\['pick'\], but only \['hps'\]"),
        ({"hps": OK}, {}, "weights is empty"),
        ({"hps": OK[:, :1]}, {"hps": 1.0}, "at least 2 samples"),
        ({"hps": OK[0]}, {"hps": 1.0}, r"hps has shape \[2\]"),
        ({"hps": OK, "pick": OK.repeat(2, 1)}, {"hps": 1.0, "pick": 1.0}, "differ in shape"),
        ({"hps": OK * math.nan}, {"hps": 1.0}, "hps is not finite"),
    ],
)
def test_impossible_rewards_are_refused_by_name(rewards, weights, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, weights, "batch", 5.0)


def test_an_impossible_scale_or_clip_is_refused():
    with pytest.raises(ValueError, match="scale = 'prompt'"):
        group_advantages({"r": OK}, {"r": 1.0}, "prompt", 5.0)
    with pytest.raises(ValueError, match="clip = 0"):
        group_advantages({"r": OK}, {"r": 1.0}, "batch", 0)


def test_renormalised_advantages_by_hand():
    """Rewards a and b of weights 1 and 3; b is missing in the third group, whose a then weighs 4.

    Every group of values (0, 2) has mean 1 and std 1, so with c = 1 / (1 + 1e-4) the sums are (2, -2) c, (1, -1) c and
    (-4, 4) c, of std sqrt((2 * 4 + 2 * 1 + 2 * 16) / 6) c = sqrt(7) c.
    """
    groups = [
        {"a": torch.tensor([0.0, 2.0]), "b": torch.tensor([2.0, 0.0])},
        {"a": torch.tensor([2.0, 0.0]), "b": torch.tensor([1.0, 1.0])},
        {"a": torch.tensor([0.0, 2.0])},
    ]
    c = 1 / 1.0001
    sums = torch.tensor([[2.0, -2.0], [1.0, -1.0], [-4.0, 4.0]]) * c
    expected = sums / (math.sqrt(7) * c + 1e-4)
    found = renormalised_group_advantages(groups, {"a": 1.0, "b": 3.0}, "group", 5.0)
    torch.testing.assert_close(found, expected)


def test_a_reward_is_standardised_over_the_groups_that_have_it():
    """Over the batch: b's std is that of (0, 4, 2, 2) without the third group, sqrt(2); a's that of all six values."""
    groups = [
        {"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([0.0, 4.0])},
        {"a": torch.tensor([2.0, 2.0]), "b": torch.tensor([2.0, 2.0])},
        {"a": torch.tensor([0.0, 4.0])},
    ]
    a, b = 1 / (math.sqrt(10 / 6) + 1e-4), 1 / (math.sqrt(2) + 1e-4)
    sums = torch.tensor([[-a - 2 * b, a + 2 * b], [0, 0], [-2 * 2 * a, 2 * 2 * a]])
    expected = sums / (sums.square().mean().sqrt() + 1e-4)
    found = renormalised_group_advantages(groups, {"a": 1.0, "b": 1.0}, "batch", 5.0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scale", ["batch", "group"])
def test_with_nothing_missing_they_are_the_plain_advantages_to_the_bit(scale):
    rewards = {name: torch.randn(4, 3, generator=torch.Generator().manual_seed(3 + len(name))) for name in ("a", "bb")}
    weights = {"a": 0.3, "bb": 1.7}
    groups = [{name: rewards_PG[place] for name, rewards_PG in rewards.items()} for place in range(4)]
    plain = group_advantages(rewards, weights, scale, 5.0)
    assert torch.equal(renormalised_group_advantages(groups, weights, scale, 5.0), plain)


def test_a_reward_missing_everywhere_leaves_what_the_others_say():
    groups = [{"a": torch.tensor([0.0, 1.0, 5.0])}, {"a": torch.tensor([2.0, 2.0, 3.0])}]
    alone = group_advantages({"a": torch.stack([group["a"] for group in groups])}, {"a": 2.0}, "batch", 5.0)
    found = renormalised_group_advantages(groups, {"a": 1.0, "b": 1.0}, "batch", 5.0)
    torch.testing.assert_close(found, alone)


def test_a_group_without_any_reward_is_refused():
    groups = [{"a": torch.tensor([0.0, 1.0])}, {"c": torch.tensor([0.0, 1.0])}]
    with pytest.raises(ValueError, match="none of the rewards"):
        renormalised_group_advantages(groups, {"a": 1.0, "b": 1.0}, "batch", 5.0)


def test_renormalised_weights_keep_their_sum():
    weights = {"a": 1.0, "b": 3.0, "c": 4.0}
    assert renormalised_weights(weights, {"a", "b"}) == {"a": 2.0, "b": 6.0}
    assert renormalised_weights(weights, ["a", "b", "c", "d"]) == weights
