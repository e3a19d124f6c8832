from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common import seeding

SHAPE = (4, 3, 3)


def test_a_draw_is_a_function_of_its_key_alone():
    torch.manual_seed(0)
    first = seeding.normal(SHAPE, seed=1, purpose="test", iteration=2, prompt=3)
    torch.manual_seed(99)
    seeding.normal(SHAPE, seed=1, purpose="test", iteration=7)
    assert torch.equal(first, seeding.normal(SHAPE, seed=1, purpose="test", prompt=3, iteration=2))
    assert first.dtype == torch.float32
    assert first.device.type == "cpu"


def test_the_stream_has_not_changed():
    """A checkpoint resumes exactly only if these numbers stay what they are."""
    expected = torch.tensor([-1.9724485874176025, -0.5124884247779846, 1.6589568853378296])
    torch.testing.assert_close(seeding.normal((3,), seed=0, purpose="golden", iteration=1), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 2, "purpose": "test", "iteration": 1},
        {"seed": 1, "purpose": "other", "iteration": 1},
        {"seed": 1, "purpose": "test", "iteration": 2},
        {"seed": 1, "purpose": "test", "prompt": 1},
        {"seed": 1 + 2**32, "purpose": "test", "iteration": 1},
    ],
)
def test_every_part_of_the_key_counts(other):
    draw = seeding.normal(SHAPE, seed=1, purpose="test", iteration=1)
    assert not torch.isin(draw, seeding.normal(SHAPE, **other)).any()


def test_draws_have_the_right_moments():
    normal = seeding.normal((100_000,), seed=0, purpose="moments")
    uniform = seeding.uniform((100_000,), seed=0, purpose="moments")
    assert normal.mean().item() == pytest.approx(0.0, abs=0.02)
    assert normal.std().item() == pytest.approx(1.0, abs=0.02)
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert 0 <= uniform.min().item() < 0.001
    assert 0.999 < uniform.max().item() < 1


@pytest.mark.parametrize("shared", [False, True])
def test_noise_of_a_sample_does_not_depend_on_the_group_size(shared):
    small = seeding.step_noise_Gchw(5, 1, 2, 0, 3, SHAPE, shared)
    large = seeding.step_noise_Gchw(5, 1, 2, 0, 8, SHAPE, shared)
    assert large.shape == (8, *SHAPE)
    assert torch.equal(small, large[:3])
    initial = seeding.initial_noise_Gchw(5, 1, 2, 8, SHAPE)
    assert torch.equal(seeding.initial_noise_Gchw(5, 1, 2, 3, SHAPE), initial[:3])


def test_shared_noise_is_one_draw_and_own_noise_is_not():
    shared = seeding.step_noise_Gchw(5, 1, 2, 0, 4, SHAPE, True)
    assert torch.equal(shared, shared[:1].expand(4, *SHAPE))
    for noise in (seeding.step_noise_Gchw(5, 1, 2, 0, 4, SHAPE, False), seeding.initial_noise_Gchw(5, 1, 2, 4, SHAPE)):
        assert all(not torch.equal(one, other) for one, other in itertools.combinations(noise, 2))


def test_noise_differs_between_steps_prompts_and_iterations():
    keys = [(1, 2, 0), (2, 2, 0), (1, 3, 0), (1, 2, 1)]
    for shared in (False, True):
        draws = [seeding.step_noise_Gchw(5, *key, 2, SHAPE, shared) for key in keys]
        assert all(not torch.equal(one, other) for one, other in itertools.combinations(draws, 2))


def test_selected_steps_are_sorted_distinct_and_cover_every_subset():
    seen = [seeding.selected_steps(0, iteration, 3, 2) for iteration in range(300)]
    assert set(seen) == {(0, 1), (0, 2), (1, 2)}
    assert min(seen.count(subset) for subset in set(seen)) > 60
    assert seeding.selected_steps(0, 0, 3, 3) == (0, 1, 2)


@given(seed=st.integers(0, 2**63), num_prompts=st.integers(1, 30), data=st.data())
def test_an_epoch_never_repeats_a_prompt(seed, num_prompts, data):
    count = data.draw(st.integers(1, num_prompts))
    epoch_length = num_prompts // count
    for epoch in range(2):
        iterations = range(epoch * epoch_length, (epoch + 1) * epoch_length)
        drawn = [index for i in iterations for index in seeding.prompt_indices(seed, i, count, num_prompts)]
        assert len(drawn) == len(set(drawn)) == epoch_length * count
        assert set(drawn) <= set(range(num_prompts))


def test_epochs_are_shuffled_anew():
    epochs = [[seeding.prompt_indices(0, e * 5 + i, 4, 20) for i in range(5)] for e in range(2)]
    assert epochs[0] != epochs[1]
    assert all(sorted(itertools.chain(*epoch)) == list(range(20)) for epoch in epochs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: seeding.selected_steps(0, 0, 3, 5), "5 different indices from 3"),
        (lambda: seeding.prompt_indices(0, 0, 8, 4), "8 different prompts an iteration from 4"),
        (lambda: seeding.prompt_indices(0, 0, 0, 4), "0 different prompts"),
    ],
)
def test_impossible_draws_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_generator_s_seed_is_a_function_of_its_key() -> None:
    keys = [(seed, purpose, prompt) for seed in (0, 1) for purpose in ("a", "b") for prompt in (0, 1)]
    seeds = [seeding.generator_seed(seed=seed, purpose=purpose, prompt=prompt) for seed, purpose, prompt in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds[0] == seeding.generator_seed(purpose="a", prompt=0, seed=0)
