"""Contexts inferred from behaviour, against a loop over behaviours and candidates."""

import numpy as np
import pytest

from befm_jax.evals.resampling import halves
from befm_jax.evals.retrieval import BINS, Retrieved


def by_loop(shares, counts, candidates):
    """Hit at 1 and 3, reciprocal rank and log loss of each behaviour, one after the other."""
    figures = []
    for behaviour, own in zip(counts, candidates, strict=True):
        levels = []
        for at in own[own >= 0]:
            level = 0.0
            for number, share in zip(behaviour, shares[at], strict=True):
                level += number * np.log(share) if number else 0.0
            levels.append(level)
        better = sum(level > levels[0] + 1e-9 for level in levels)
        ranks = range(better + 1, better + 1 + sum(abs(a - levels[0]) < 1e-9 for a in levels))
        posterior = np.exp(np.array(levels) - max(levels))
        figures.append((
            np.mean([rank <= 1 for rank in ranks]),
            np.mean([rank <= 3 for rank in ranks]),
            np.mean([1 / rank for rank in ranks]),
            -np.log(posterior[0] / posterior.sum()),
        ))  # fmt: skip
    return np.array(figures)


def some(rng, contexts=12, answers=5, most=6):
    shares = rng.dirichlet(np.ones(answers), contexts)
    shares[3] = shares[5]  # so that some are tied
    counts = rng.integers(0, 6, (contexts, answers)).astype(float)
    candidates = np.full((contexts, most), -1)
    for row in range(contexts):
        others = rng.permutation([one for one in range(contexts) if one != row])
        number = rng.integers(1, most)
        candidates[row, : 1 + number] = [row, *others[:number]]
    candidates[3, :3] = [3, 5, 0]
    return shares, counts, candidates


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_those_of_a_loop(seed):
    shares, counts, candidates = some(np.random.default_rng(seed))
    found = Retrieved.of(shares, counts, candidates)
    ours = np.stack([found.within(1), found.within(3), found.reciprocal_rank, found.log_loss], 1)
    np.testing.assert_allclose(ours, by_loop(shares, counts, candidates), atol=1e-12)
    np.testing.assert_allclose(found.posterior.sum(1), 1.0)
    assert (found.posterior[candidates < 0] == 0).all()


@pytest.mark.parametrize("number", [2, 4, 10])
def test_where_all_are_alike_it_is_chance_exactly(number):
    shares = np.tile([0.2, 0.3, 0.5], (number, 1))
    counts = np.random.default_rng(0).integers(0, 9, (number, 3)).astype(float)
    candidates = (np.arange(number)[:, None] + np.arange(number)) % number
    found = Retrieved.of(shares, counts, candidates)
    harmonic = sum(1 / rank for rank in range(1, number + 1))
    np.testing.assert_allclose(found.within(1), 1 / number, rtol=1e-15)
    np.testing.assert_allclose(found.within(3), min(3 / number, 1), rtol=1e-15)
    np.testing.assert_allclose(found.reciprocal_rank, harmonic / number, rtol=1e-14)
    np.testing.assert_allclose(found.log_loss, np.log(number), rtol=1e-14)
    np.testing.assert_allclose(np.abs(found.calibration().mean(0)).sum(), 0.0, atol=1e-12)


def test_true_likelihoods_are_calibrated_and_sharpened_ones_are_not():
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(6), 5)
    true = rng.integers(0, 5, 20_000)
    counts = rng.multinomial(2, shares[true]).astype(float)
    candidates = (true[:, None] + np.arange(5)) % 5
    ece = np.abs(Retrieved.of(shares, counts, candidates).calibration().mean(0)).sum()
    assert ece < 0.02
    sharp = shares**3 / (shares**3).sum(1, keepdims=True)
    ece = np.abs(Retrieved.of(sharp, counts, candidates).calibration().mean(0)).sum()
    assert ece > 0.1


def test_calibration_by_hand():
    # One person each: the posteriors are .8 and .2, .8 and .2, .5 and .5.
    shares = np.array([[0.8, 0.2], [0.2, 0.8], [0.5, 0.5], [0.5, 0.5]])
    counts = np.array([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    candidates = np.array([[0, 1], [1, 0], [2, 3], [3, 2]])
    gaps = Retrieved.of(shares, counts, candidates).calibration()
    wanted = np.zeros((4, BINS))
    wanted[0, 8], wanted[1, 8] = -0.2, 0.8
    np.testing.assert_allclose(gaps, wanted, atol=1e-12)


def test_what_a_context_does_not_allow():
    shares = np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    counts = np.array([[2.0, 1], [0, 0], [0, 3]])
    found = Retrieved.of(shares, counts, np.array([[0, 1, 2], [1, 0, 2], [2, 0, -1]]))
    assert found.likelihoods[0, 0] == -np.inf
    np.testing.assert_allclose(found.reciprocal_rank, [(1 / 2 + 1 / 3) / 2, 11 / 18, 1])
    assert np.isnan(found.log_loss[0])
    np.testing.assert_allclose(found.log_loss[1:], [np.log(3), 0], atol=1e-12)
    # Nobody allows it: they stay equally likely.
    found = Retrieved.of(shares[[0, 0]], counts[[2, 2]], np.array([[0, 1], [1, 0]]))
    np.testing.assert_allclose(found.log_loss, np.log(2))


def test_halves_know_what_there_is_to_know():
    rng = np.random.default_rng(0)
    candidates = (np.arange(4)[:, None] + np.arange(4)) % 4

    def score(counts):
        shares, others = halves(rng, counts)
        assert (others.sum(1) == 200).all()
        np.testing.assert_allclose(shares.sum(1), 1.0)
        return Retrieved.of(shares, others, candidates).within(1).mean()

    shares = np.array([[0.7, 0.2, 0.1], [0.1, 0.7, 0.2], [0.2, 0.1, 0.7], [0.4, 0.4, 0.2]])
    assert score(rng.multinomial(400, shares).astype(float)) > 0.95
    alike = [score(rng.multinomial(400, shares[[0] * 4]).astype(float)) for _ in range(100)]
    assert abs(np.mean(alike) - 0.25) < 0.08


def test_halves_are_of_the_people_and_no_answer_is_impossible():
    counts = np.array([[4.0, 0, 0], [0, 7, 0]])
    shares, others = halves(np.random.default_rng(0), counts)
    np.testing.assert_array_equal(others, [[2, 0, 0], [0, 4, 0]])
    everybody = np.array([2 + 1 / 3, 3 + 1 / 3, 1 / 3]) / 6
    np.testing.assert_allclose(shares[0], (np.array([2, 0, 0]) + 10 * everybody) / 12)
    assert (shares > 0).all()
