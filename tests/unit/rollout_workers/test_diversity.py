"""Diversity against values computed by hand."""

from __future__ import annotations

import pytest
import torch

from rollout_workers.diversity import mean_pairwise_distance


def feature(*vectors: tuple[float, float]) -> torch.Tensor:
    """One image a vector, one place each: [G, 2, 1, 1]."""
    return torch.tensor(vectors, dtype=torch.float32)[:, :, None, None]


def test_identical_images_do_not_differ() -> None:
    assert mean_pairwise_distance([torch.ones(3, 4, 2, 2)]) == 0


def test_only_directions_count() -> None:
    assert mean_pairwise_distance([feature((1, 0), (5, 0))]) == pytest.approx(0, abs=1e-6)
    assert mean_pairwise_distance([feature((3, 0), (0, 7))]) == pytest.approx(2)
    assert mean_pairwise_distance([feature((1, 0), (-2, 0))]) == pytest.approx(4)


def test_pairs_places_and_depths_are_averaged() -> None:
    """Pairs of (1, 0), (0, 1), (-1, 0): 2, 4, 2. A second depth that is the same everywhere halves the mean."""
    shallow = feature((1, 0), (0, 1), (-1, 0))
    assert mean_pairwise_distance([shallow]) == pytest.approx(8 / 3)
    assert mean_pairwise_distance([shallow, torch.ones(3, 1, 1, 1)]) == pytest.approx(4 / 3)
    beside_equal_places = torch.cat([shallow, torch.ones(3, 2, 1, 1)], dim=3)
    assert mean_pairwise_distance([beside_equal_places]) == pytest.approx(4 / 3)


def test_a_feature_of_zeros_is_no_nan() -> None:
    assert mean_pairwise_distance([torch.zeros(2, 3, 1, 1)]) == 0


def test_one_image_has_no_diversity() -> None:
    with pytest.raises(ValueError, match="at least 2 images of a prompt, got 1"):
        mean_pairwise_distance([torch.ones(1, 4, 2, 2)])
