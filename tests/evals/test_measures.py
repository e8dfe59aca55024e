"""Measures against scipy, scikit-learn, brute force and cases worked out by hand."""

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import ks_2samp, spearmanr, wasserstein_distance
from sklearn.metrics import f1_score

from befm_jax.data.items import AnswerSet, Item, Message
from befm_jax.errors import DataError
from befm_jax.evals import measures, text_measures
from befm_jax.evals.measures import MEASURES, Answered, Pair, Side

UNEVEN = np.array([-3, 0, 1, 4, 9, 10])


def histograms(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 9, 6) + (np.arange(6) == 2), rng.integers(0, 9, 6) + (np.arange(6) == 4)


@pytest.mark.parametrize("seed", range(5))
def test_wasserstein_equals_scipy_weighted_and_unweighted(seed):
    model, people = histograms(seed)
    ours = measures.wasserstein(Pair.of(UNEVEN, model, people))
    scale = 100 / 13
    weighted = wasserstein_distance(UNEVEN, UNEVEN, model, people) * scale
    lists = wasserstein_distance(np.repeat(UNEVEN, model), np.repeat(UNEVEN, people)) * scale
    np.testing.assert_allclose([ours, ours], [weighted, lists], rtol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_total_variation_jensen_shannon_and_ks_equal_scipy(seed):
    model, people = histograms(seed)
    pair = Pair.of(UNEVEN, model, people)
    p, q = model / model.sum(), people / people.sum()
    np.testing.assert_allclose(measures.total_variation(pair), np.abs(p - q).sum() / 2)
    np.testing.assert_allclose(measures.jensen_shannon(pair), jensenshannon(p, q, base=2) ** 2)
    lists = np.repeat(UNEVEN, model), np.repeat(UNEVEN, people)
    np.testing.assert_allclose(measures.ks(pair), ks_2samp(*lists).statistic)


@pytest.mark.parametrize("exact", [True, False])
def test_energy_equals_a_double_loop_over_the_members(exact):
    model, people = histograms(3)
    xs, ys = np.repeat(UNEVEN, model) * 100 / 13, np.repeat(UNEVEN, people) * 100 / 13
    between = np.mean([abs(x - y) for x in xs for y in ys])

    def within(members, whole):
        total = sum(abs(one - other) for one in members for other in members)
        return total / (len(members) ** 2 if whole else len(members) * (len(members) - 1))

    expected = 2 * between - within(xs, exact) - within(ys, False)
    ours = measures.energy(Pair.of(UNEVEN, model, people, exact=exact))
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


@pytest.mark.parametrize("exact", [True, False])
def test_energy_and_variance_ratio_have_no_bias_however_small_the_samples(exact):
    rng = np.random.default_rng(0)
    p, q = np.array([0.3, 0.1, 0.1, 0.1, 0.1, 0.3]), np.array([0.1, 0.1, 0.3, 0.3, 0.1, 0.1])
    # Ten million people stand for infinitely many: their correction vanishes.
    truth = measures.energy(Pair.of(UNEVEN, p, q * 1e7))
    people = rng.multinomial(6, q, size=40_000)
    model = p if exact else rng.multinomial(4, p, size=40_000)
    drawn = measures.energy(Pair.of(UNEVEN, model, people, exact=exact))
    assert abs(drawn.mean() - truth) < 4 * drawn.std() / 200
    variance = Pair.of(UNEVEN, model, people, exact=exact).model.variance
    expected = Pair.of(UNEVEN, p, q * 1e7).model.variance
    assert abs(np.mean(variance) - expected) <= 4 * np.std(variance) / 200 + 1e-9


def test_crps_equals_a_brute_force_integral_for_each_person():
    model, people = histograms(1)
    grid = np.arange(0.0005, 100, 0.001)
    points = (UNEVEN + 3) * 100 / 13
    model_cdf = ((points <= grid[:, None]) * model / model.sum()).sum(1)
    scores = [np.mean((model_cdf - (grid >= point)) ** 2) * 100 for point in points]
    ours = measures.crps(Pair.of(UNEVEN, model, people))
    np.testing.assert_allclose(ours, np.average(scores, weights=people), rtol=1e-3)


def test_crps_of_draws_estimates_that_of_the_distribution_behind_them():
    rng = np.random.default_rng(1)
    p, people = np.full(6, 1 / 6), histograms(2)[1]
    drawn = measures.crps(Pair.of(UNEVEN, rng.multinomial(3, p, size=40_000), people, exact=False))
    assert abs(drawn.mean() - measures.crps(Pair.of(UNEVEN, p, people))) < 4 * drawn.std() / 200


def test_crps_puts_the_true_distribution_before_the_median(real_counts):
    true, median = [], []
    for counts in real_counts.values():
        values = np.arange(len(counts))
        true.append(measures.crps(Pair.of(values, counts, counts)))
        at_median = np.arange(len(counts)) == np.searchsorted(2 * np.cumsum(counts), counts.sum())
        median.append(measures.crps(Pair.of(values, at_median, counts)))
    # The figures of DESIGN.md section 8.
    assert np.mean(true) == pytest.approx(14.4, abs=0.05)
    assert np.mean(median) == pytest.approx(20.9, abs=0.05)


def test_log_score_is_the_mean_surprise_and_undefined_for_an_impossible_choice():
    assert measures.log_score(Pair.of([0, 1], [0.25, 0.75], [1, 3])) == pytest.approx(
        -(np.log(0.25) + 3 * np.log(0.75)) / 4
    )
    both = measures.log_score(Pair.of([0, 1], [[1.0, 0.0], [0.5, 0.5]], [[2, 1], [2, 1]]))
    assert np.isnan(both[0])
    assert both[1] == pytest.approx(np.log(2))


def test_mean_difference_and_variance_ratio_of_a_known_case():
    pair = Pair.of([0, 10, 20], [0, 1, 0], [1, 0, 3])
    assert measures.mean_difference(pair) == pytest.approx(50 - 75)
    assert measures.variance_ratio(pair) == 0
    assert np.isnan(measures.variance_ratio(Pair.of([0, 1], [0.5, 0.5], [4, 0])))


def test_a_sample_of_one_has_no_spread():
    pair = Pair.of([0, 1], [1, 0], [3, 3], exact=False)
    assert np.isnan(measures.energy(pair))
    assert np.isnan(measures.crps(pair))


@pytest.mark.parametrize("name", [one.name for one in MEASURES.values() if one.kernel])
def test_measures_of_many_resamples_equal_those_of_each(name):
    rng = np.random.default_rng(4)
    model = rng.integers(1, 9, (3, 6))
    people = rng.integers(1, 9, (3, 6))
    together = MEASURES[name].kernel(Pair.of(UNEVEN, model, people, exact=False))
    alone = [
        MEASURES[name].kernel(Pair.of(UNEVEN, one, other, exact=False))
        for one, other in zip(model, people, strict=True)
    ]
    np.testing.assert_allclose(together, alone, rtol=1e-12)


@pytest.mark.parametrize(
    ("values", "model", "people", "message"),
    [
        ([0, 0], [1, 1], [1, 1], "ascending"),
        ([0], [1], [1], "at least two"),
        ([0, 1], [1, 1, 1], [1, 1], "model.*number of values"),
        ([0, 1], [1, 1], [1, -1], "people.*not negative"),
        ([0, 1], [1, np.nan], [1, 1], "model.*finite"),
        ([0, 1], [1, np.inf], [1, 1], "model.*finite"),
        ([0, 1], [1, 1], [[1, 1], [0, 0]], "people.*empty histogram"),
    ],
)
def test_histograms_that_do_not_fit_are_refused(values, model, people, message):
    with pytest.raises(ValueError, match=message):
        Pair.of(values, model, people)


def test_sides_of_different_values_are_refused():
    one = Side("model", [0, 1, 2], [1, 1, 1], exact=True)
    other = Side("people", [0, 1, 3], [1, 1, 1], exact=False)
    with pytest.raises(ValueError, match="the same values"):
        Pair(one, other)


def by_person(number: int, seed: int = 0, exact: bool = True) -> Answered:
    """People who answered one question each, and what a model says of each of them."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(6), number)
    model = shares if exact else rng.multinomial(40, shares)
    positions = (rng.random((number, 1)) >= np.cumsum(shares, 1)[:, :-1]).sum(1)
    return Answered(UNEVEN.astype(float), model, np.eye(6)[positions], exact)


# Values 0, 10, 30; p = .5 .3 .2; the answer 10: E|X - y| = .5 x 10 + .2 x 20.
@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("expected_error", 9.0),
        ("crps", 3.3),
        ("median_error", 10.0),
        ("mean_error", 1.0),
        ("accuracy", 0.0),
        ("expected_accuracy", 0.3),
        ("log_score", -np.log(0.3)),
        ("brier", 0.38 - 0.6 + 1.0),
    ],
)
def test_one_answer_scores_what_was_worked_out_by_hand(name, by_hand):
    pair = Pair.of([0, 10, 30], [0.5, 0.3, 0.2], [0, 1, 0])
    scale = 0.3 if MEASURES[name].unit == "points" else 1.0
    assert float(MEASURES[name].kernel(pair)) * scale == pytest.approx(by_hand, abs=1e-12)


def test_ties_share_the_hit():
    pair = Pair.of([0, 1, 2], [0.4, 0.4, 0.2], [0, 1, 0])
    assert float(measures.accuracy(pair)) == 0.5


@pytest.mark.parametrize("name", ["brier", "crps", "expected_accuracy", "expected_error"])
def test_scores_of_draws_estimate_those_of_the_distribution_behind_them(name):
    rng = np.random.default_rng(2)
    p, people = np.array([0.4, 0.1, 0.1, 0.1, 0.1, 0.2]), histograms(2)[1]
    kernel = MEASURES[name].kernel
    drawn = kernel(Pair.of(UNEVEN, rng.multinomial(5, p, size=40_000), people, exact=False))
    assert abs(drawn.mean() - kernel(Pair.of(UNEVEN, p, people))) < 4 * drawn.std() / 200


# Ranks are not made again, texts have no answer set, and some need what the items say: each has
# tests of its own.
WITH_OWN_TESTS = {
    *("spearman", "correlation_gap", "correlation_difference", "model_correlation"),
    *("people_correlation", "slope_difference", "follows_change", *text_measures.NAMES),
    *(one.name for one in MEASURES.values() if one.note),
}


@pytest.mark.parametrize("name", sorted(set(MEASURES) - WITH_OWN_TESTS))
@pytest.mark.parametrize("exact", [True, False])
def test_weights_count_items_as_often_as_they_say(name, exact):
    """Whole weights are items that are there several times: each measure by its own loop."""
    answered = by_person(30, exact=exact)
    weights = np.random.default_rng(1).integers(0, 3, (4, 30))
    found = MEASURES[name].compute(answered, weights.astype(float))
    if name == "log_score" and not exact:
        assert np.isnan(found).all()  # somebody's answer was never drawn
        return
    for row, figure in zip(weights, found, strict=True):
        again = np.repeat(np.arange(30), row)
        listed = Answered(answered.values, answered.model[again], answered.target[again], exact)
        alone = MEASURES[name].compute(listed, np.ones((1, len(again))))
        np.testing.assert_allclose(figure, alone[0], rtol=1e-9, atol=1e-12)


def test_spearman_varies_as_in_a_bootstrap_that_ranks_again():
    answered = by_person(300)
    predicted, observed = answered.model @ UNEVEN, answered.target @ UNEVEN
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 300, (800, 300))
    weights = np.array([np.bincount(row, minlength=300) for row in drawn], float)
    ours = MEASURES["spearman"].compute(answered, weights)
    loop = np.array([spearmanr(predicted[row], observed[row])[0] for row in drawn])
    assert np.corrcoef(ours, loop)[0, 1] > 0.98
    assert ours.std() == pytest.approx(loop.std(), rel=0.08)


def test_pooled_measures_compare_the_mean_distribution_with_everybody():
    answered = by_person(50)
    weights = np.random.default_rng(1).random((1, 50))
    model, people = weights[0] @ answered.model, weights[0] @ answered.target
    expected = wasserstein_distance(UNEVEN, UNEVEN, model, people) * 100 / 13
    found = MEASURES["wasserstein"].compute(answered, weights)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_energy_of_a_mixture_is_a_double_loop_over_different_people():
    answered = by_person(12)
    points = (UNEVEN + 3) * 100 / 13
    apart = np.abs(points[:, None] - points)
    total = 0.0
    for one in range(12):
        for other in set(range(12)) - {one}:
            x, y = answered.model[one], answered.model[other]
            own, theirs = answered.target[one], answered.target[other]
            total += 2 * x @ apart @ theirs - x @ apart @ y - own @ apart @ theirs
    found = MEASURES["energy"].compute(answered, np.ones((1, 12)))
    np.testing.assert_allclose(found, total / (12 * 11), rtol=1e-12)


def test_one_distribution_for_all_has_the_energy_of_its_histogram():
    target = np.eye(6)[np.random.default_rng(0).integers(0, 6, 40)]
    shares = np.random.default_rng(1).dirichlet(np.ones(6))
    answered = Answered(UNEVEN.astype(float), np.tile(shares, (40, 1)), target)
    expected = measures.energy(Pair.of(UNEVEN, shares, target.sum(0)))
    np.testing.assert_allclose(
        MEASURES["energy"].compute(answered, np.ones((1, 40))), expected, rtol=1e-9
    )


def test_a_perfect_model_of_persons_has_energy_nought():
    found = [
        MEASURES["energy"].compute(by_person(20, seed), np.ones((1, 20)))[0] for seed in range(800)
    ]
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(800)


def test_spearman_equals_scipy_with_ties():
    answered = by_person(200)
    predicted = answered.model @ UNEVEN
    rho = spearmanr(np.round(predicted), answered.target @ UNEVEN)[0]
    # Point masses, so that predictions tie, too.
    nearest = np.abs(UNEVEN - np.round(predicted)[:, None]).argmin(1)
    tied = Answered(answered.values, np.eye(6)[nearest], answered.target)
    expected = spearmanr(UNEVEN[nearest], answered.target @ UNEVEN)[0]
    ours = MEASURES["spearman"].compute(tied, np.ones((1, 200)))
    np.testing.assert_allclose(ours, expected, rtol=1e-9)
    assert abs(expected - rho) < 0.2


def test_spearman_of_predictions_that_are_all_alike_is_undefined():
    answered = by_person(9)
    alike = Answered(answered.values, np.full((9, 6), 1 / 6), answered.target)
    assert np.isnan(MEASURES["spearman"].compute(alike, np.ones((1, 9)))).all()


def test_macro_f1_equals_scikit_learn():
    answered = by_person(80)
    likeliest, observed = answered.model.argmax(1), answered.target.argmax(1)
    ours = MEASURES["macro_f1"].compute(answered, np.ones((1, 80)))
    np.testing.assert_allclose(ours, f1_score(observed, likeliest, average="macro"), rtol=1e-12)


def test_expected_f1_equals_scikit_learn_with_every_answer_as_likely_as_it_is():
    answered = by_person(80)
    observed = answered.target.argmax(1)
    guesses = np.tile(np.arange(6), 80)
    ours = MEASURES["expected_f1"].compute(answered, np.ones((1, 80)))
    expected = f1_score(
        np.repeat(observed, 6), guesses, labels=sorted(set(observed)), average="macro",
        sample_weight=answered.model.ravel(),
    )  # fmt: skip
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_nobody_in_a_resample_leaves_it_undefined():
    answered = by_person(5)
    for one in MEASURES.values():
        if one.kernel:
            found = one.compute(answered, np.array([[0.0] * 5, [1.0] * 5]))
            assert np.isnan(found[0]), one.name


def test_every_measure_says_what_it_is():
    for name, one in MEASURES.items():
        assert name == one.name
        assert one.definition.endswith((".", "people."))
        assert one.level in ("individual", "distribution", "check")
        assert one.low < one.high


def test_a_misspelt_measure_names_the_near():
    with pytest.raises(DataError, match="wasserstein"):
        measures.get("waserstein")


class TestTwoThings:
    """How an answer goes together with what is known of a person."""

    @staticmethod
    def people(rng, number=300, strength=0.6, answers=6):
        """`[I]` what is known of people, with ties, and `[I, A]` one-hot what they answered."""
        first = np.round(3 * rng.normal(size=number))
        second = strength * first / 3 + rng.normal(size=number)
        chosen = np.clip(np.round(1.2 * second + 2.5), 0, answers - 1).astype(int)
        return first, np.eye(answers)[chosen]

    @staticmethod
    def answered(first, model, target):
        scale = AnswerSet.numbers(range(target.shape[1]))
        items = tuple(
            Item(f"{n}", (Message("user", "?"),), scale, one, notes={"known": {"first": known}})
            for n, (known, one) in enumerate(zip(first, target, strict=True))
        )
        return Answered(np.arange(target.shape[1]), model, target, items=items)

    @pytest.mark.parametrize("seed", range(3))
    def test_of_one_answer_each_it_is_scipys_with_ties(self, seed):
        first, answers = self.people(np.random.default_rng(seed))
        rho, _ = measures.rank_correlation(first, answers)
        assert rho == pytest.approx(spearmanr(first, answers.argmax(1)).statistic, abs=1e-12)

    def test_of_distributions_it_is_that_of_a_large_sample_of_them(self):
        rng = np.random.default_rng(1)
        first = rng.integers(0, 4, 500)
        shares = rng.dirichlet(np.ones(5), 4)[first]
        rho, _ = measures.rank_correlation(first.astype(float), shares)
        many = np.repeat(np.arange(500), 400)
        drawn = (rng.random((len(many), 1)) > np.cumsum(shares, 1)[many][:, :-1]).sum(1)
        assert rho == pytest.approx(spearmanr(first[many], drawn).statistic, abs=0.01)

    @pytest.mark.parametrize("exact", [True, False])
    def test_the_influence_is_the_derivative_by_a_persons_weight(self, exact):
        rng = np.random.default_rng(2)
        first, answers = self.people(rng, 40)
        shares = answers if exact else rng.dirichlet(np.ones(6), 40)
        rho, influence = measures.rank_correlation(first, shares)
        assert influence.mean() == pytest.approx(0.0, abs=1e-12)
        times = 200  # everybody so often, and one of them once more
        for person in range(0, 40, 7):
            more = [
                np.append(np.repeat(one, times, 0), one[[person]], 0) for one in (first, shares)
            ]
            change = measures.rank_correlation(*more)[0] - rho
            assert change * 40 * times == pytest.approx(influence[person], rel=0.01, abs=0.01)

    def test_the_gap_is_unbiased_where_model_and_people_depend_alike(self):
        """The truth's own conditional distributions, and a population that is independent."""
        rng = np.random.default_rng(3)
        conditional = rng.dirichlet(np.ones(6), 4)
        gaps, independent, expected = [], [], []
        for _ in range(150):
            first = rng.integers(0, 4, 60)
            drawn = (rng.random((60, 1)) > np.cumsum(conditional, 1)[first][:, :-1]).sum(1)
            people = np.eye(6)[drawn]
            for model, into in ((conditional[first], gaps), (np.full((60, 6), 1 / 6), independent)):
                asked = self.answered(first.astype(float), model, people)
                into.append(MEASURES["correlation_gap"].compute(asked, np.ones((1, 60)))[0])
            rho, influence = measures.rank_correlation(first.astype(float), people)
            expected.append(rho**2 - np.square(influence).mean() / 60)
        assert abs(np.mean(gaps)) < 3 * np.std(gaps) / 150**0.5
        np.testing.assert_allclose(independent, expected, atol=1e-12)
        assert np.mean(independent) > 10 * abs(np.mean(gaps))

    def test_both_sides_difference_and_slope(self):
        rng = np.random.default_rng(4)
        first, people = self.people(rng)
        _, model = self.people(rng)
        asked = self.answered(first, model, people)
        found = {
            name: MEASURES[name].compute(asked, np.ones((1, len(first))))[0]
            for name in ("model_correlation", "people_correlation", "correlation_difference",
                         "slope_difference")
        }  # fmt: skip
        ours, theirs = (spearmanr(first, side.argmax(1)).statistic for side in (model, people))
        assert found["model_correlation"] == pytest.approx(ours)
        assert found["people_correlation"] == pytest.approx(theirs)
        assert found["correlation_difference"] == pytest.approx(ours - theirs)
        slopes = [
            np.polyfit(first / first.std(), side.argmax(1) * 20, 1)[0] for side in (model, people)
        ]
        assert found["slope_difference"] == pytest.approx(slopes[0] - slopes[1])

    def test_resampled_people_move_it_as_ranks_made_again_would(self):
        rng = np.random.default_rng(5)
        first, people = self.people(rng)
        asked = self.answered(first, people, people)
        drawn = rng.integers(0, len(first), (200, len(first)))
        weights = np.array([np.bincount(row, minlength=len(first)) for row in drawn], float)
        ours = MEASURES["people_correlation"].compute(asked, weights)
        again = [spearmanr(first[row], people.argmax(1)[row]).statistic for row in drawn]
        assert np.corrcoef(ours, again)[0, 1] > 0.98
        assert np.std(ours) == pytest.approx(np.std(again), rel=0.1)

    def test_what_is_not_one_thing_or_the_same_for_all_has_no_correlation(self):
        first, people = self.people(np.random.default_rng(6), 20)
        for known in (np.zeros(20), first):
            asked = self.answered(known, people, people)
            if known is first:
                asked.items[0].notes["known"]["second"] = 1.0
            for name in ("correlation_gap", "model_correlation", "slope_difference"):
                assert np.isnan(MEASURES[name].compute(asked, np.ones((1, 20)))).all()

    @pytest.mark.parametrize("draws", [0, 100])
    def test_variance_kept_is_that_of_the_means(self, draws):
        rng = np.random.default_rng(7)
        _, people = self.people(rng, 4000)
        shares = rng.dirichlet(2 * np.ones(6), 8)[rng.integers(0, 8, 4000)]
        model = rng.multinomial(draws, shares) if draws else shares
        asked = Answered(np.arange(6), model, people, exact=not draws)
        found = MEASURES["variance_kept"].compute(asked, np.ones((1, 4000)))[0]
        expected = np.var(shares @ np.arange(6)) / np.var(people.argmax(1))
        assert found == pytest.approx(expected, rel=0.05 if draws else 1e-9)
