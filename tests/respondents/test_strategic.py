"""Quantal response and levels of reasoning, against searches of their definitions."""

import numpy as np
import pytest
from scipy.special import expit

from befm_jax.data.items import AnswerSet, Item, Message
from befm_jax.data.responses import Exact
from befm_jax.errors import DataError
from befm_jax.respondents import baselines, strategic

ACTIONS = AnswerSet.labels("Circle", "Square")
RNG = np.random.default_rng(0)
OWN, OTHER = RNG.integers(0, 40, (2, 300, 2, 2)).astype(float)


def asked(number, target=None, **notes):
    notes = notes or {"payoffs": {"own": OWN[number], "other": OTHER[number]}}
    return Item(str(number), (Message("user", "?"),), ACTIONS, target, {}, notes)


def people(model, precision, each=20):
    """Items of people who choose as a model says."""
    shares = expit(strategic.MODELS[model](OWN, OTHER, precision))
    counts = np.random.default_rng(1).binomial(each, shares)
    return [asked(n, np.array([count, each - count], float)) for n, count in enumerate(counts)]


def gain(payoffs, share):
    """A loop's: what the first action pays more."""
    first, second = payoffs
    return share * first[0] + (1 - share) * first[1] - share * second[0] - (1 - share) * second[1]


def levels(own, other, precision):
    """The first own action's shares at level 1 and level 2, by hand."""
    one = 1 / (1 + np.exp(-precision * gain(own, 0.5)))
    theirs = 1 / (1 + np.exp(-precision * gain(other.T, 0.5)))
    return one, 1 / (1 + np.exp(-precision * gain(own, theirs)))


@pytest.mark.parametrize("precision", [0.01, 0.1, 1.0])
def test_levels_are_those_worked_by_hand(precision):
    expected = np.array([levels(*game, precision) for game in zip(OWN, OTHER, strict=True)])
    found = [strategic.MODELS[name](OWN, OTHER, precision) for name in ("level_1", "level_2")]
    np.testing.assert_allclose(expit(found), expected.T, atol=1e-12)


@pytest.mark.parametrize("precision", [0.02, 0.1, 0.5])
def test_quantal_response_is_the_first_solution_from_equal_shares(precision):
    grid = np.linspace(0, 1, 20_001)
    found = expit(strategic.quantal_response(OWN, OTHER, precision))
    several = 0
    for own, other, share in zip(OWN, OTHER, found, strict=True):
        theirs = expit(precision * gain(other.T, grid))
        left = expit(precision * gain(own, theirs)) - grid
        solutions = grid[:-1][(left[:-1] >= 0) != (left[1:] >= 0)]
        several += len(solutions) > 1
        upward = left[len(grid) // 2] > 0
        ahead = solutions[solutions >= 0.5 - 1e-3] if upward else solutions[solutions < 0.5 + 1e-3]
        assert share == pytest.approx(ahead.min() if upward else ahead.max(), abs=1e-4)
    assert several > 0 or precision < 0.5


def test_a_matching_pennies_that_is_not_symmetric_tends_to_its_mixture():
    own, other = np.array([[[9.0, 0], [0, 1]]]), np.array([[[0, 1.0], [1, 0]]])
    shares = [expit(strategic.quantal_response(own, other, p))[0] for p in (1e-6, 1.0, 1000.0)]
    assert shares[0] == pytest.approx(0.5, abs=1e-5)
    # The paradox of one's own payoff: more of the first action, though the equilibrium is a half.
    assert shares[1] > 0.55
    assert shares[2] == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("model", strategic.MODELS)
def test_the_fit_is_that_of_a_brute_force_grid(model):
    training = people(model, 0.12)
    fitted = strategic.Fitted(strategic.MODELS[model], training)
    counts = np.array([item.target for item in training])

    def log_likelihood(precision):
        shares = expit(strategic.MODELS[model](OWN, OTHER, precision))
        return (counts * np.log(np.stack([shares, 1 - shares], 1))).sum()

    grid = np.geomspace(0.01, 0.5, 200)
    best = grid[np.argmax([log_likelihood(precision) for precision in grid])]
    assert fitted.precision == pytest.approx(best, rel=0.03)
    assert fitted.precision == pytest.approx(0.12, rel=0.1)
    assert log_likelihood(fitted.precision) >= log_likelihood(best) - 1e-6
    item = asked(3)
    (response,) = baselines.fit(model, training, "").respond([item], Exact())
    expected = expit(strategic.MODELS[model](OWN[3:4], OTHER[3:4], fitted.precision)[0])
    np.testing.assert_allclose(response.weights, [expected, 1 - expected])


def test_what_has_no_payoffs_is_not_served():
    fitted = baselines.fit("level_1", people("level_1", 0.1), "")
    with pytest.raises(DataError, match="item 0: no payoffs"):
        list(fitted.respond([asked(0, other=1)], Exact()))
    without = baselines.fit("level_1", [asked(0, np.array([1.0, 0]), other=1)], "")
    assert not without.serves(asked(1))


def test_a_mixed_equilibrium_is_its_shares():
    item = asked(0, equilibrium=(0.25, 0.75))
    (response,) = baselines.fit("equilibrium", [], "").respond([item], Exact())
    assert response.weights.tolist() == [0.25, 0.75]
