"""Baselines on cases small enough to write down."""

import numpy as np
import pytest

from befm_jax.evals import baselines

VALUES = np.array([0, 10, 20])


def test_uniform_gives_every_choice_the_same_share():
    np.testing.assert_allclose(baselines.uniform(VALUES).weights, [1 / 3] * 3)


@pytest.mark.parametrize(
    ("counts", "median"),
    [([5, 1, 1], 0), ([2, 3, 2], 10), ([0, 0, 1], 20), ([2, 0, 2], 0), ([1, 1, 2], 10)],
)
def test_median_is_the_smallest_choice_that_half_the_people_do_not_exceed(counts, median):
    assert VALUES[baselines.median(VALUES, np.array(counts)).weights.argmax()] == median


def test_equilibrium_is_a_point_mass_and_must_be_a_choice():
    np.testing.assert_array_equal(baselines.equilibrium(VALUES, 20).weights, [0, 0, 1])
    with pytest.raises(ValueError, match="equilibrium: 5 is not one of"):
        baselines.equilibrium(VALUES, 5)


def test_pooled_moves_everybody_to_the_nearest_choice_by_share_of_the_range():
    other = (np.array([0, 1, 2, 3, 4]), np.array([1, 2, 4, 8, 16]))
    pooled = baselines.pooled(VALUES, [(VALUES, np.array([1, 1, 1])), other])
    # 1 of 4 is halfway between the first two choices and 3 of 4 between the last two: down.
    np.testing.assert_allclose(pooled.weights * 34, [1 + 1 + 2, 1 + 4 + 8, 1 + 16])


def test_pooled_of_one_game_is_its_people():
    counts = np.array([3, 0, 7])
    np.testing.assert_allclose(baselines.pooled(VALUES, [(VALUES, counts)]).weights, counts / 10)


def test_every_baseline_is_defined_for_readers():
    assert set(baselines.DEFINITIONS) == {"uniform", "median", "equilibrium", "pooled"}
