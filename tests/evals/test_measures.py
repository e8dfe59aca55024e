"""Metrics, intervals, floors and ceilings against scipy, brute force and simulated truths."""

import csv
import subprocess
import sys

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import binom, ks_2samp, wasserstein_distance

from befm_jax.evals import baselines, measures, resampling
from befm_jax.evals.measures import METRICS, Pair, Side

SPANS = {
    "dictator": 100,
    "ultimatum_1": 100,
    "ultimatum_2": 100,
    "trust_1": 100,
    "trust_3": 150,
    "PG": 20,
    "bomb": 100,
}
UNEVEN = np.array([-3, 0, 1, 4, 9, 10])


def histograms(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 9, 6) + (np.arange(6) == 2), rng.integers(0, 9, 6) + (np.arange(6) == 4)


@pytest.fixture(scope="session")
def real_counts(moblab_csv):
    counts = {game: np.zeros(span + 1, np.int64) for game, span in SPANS.items()}
    with moblab_csv.open() as file:
        for row in csv.DictReader(file):
            for game, span in SPANS.items():
                choice = float(row[game] or "nan")
                if choice.is_integer() and 0 <= choice <= span:
                    counts[game][int(choice)] += 1
    return counts


def test_no_module_of_the_room_imports_jax():
    code = (
        "import sys, pkgutil, importlib, befm_jax.evals as room\n"
        "for module in pkgutil.walk_packages(room.__path__, 'befm_jax.evals.'):\n"
        "    importlib.import_module(module.name)\n"
        "assert 'befm_jax.evals.tasks.game_behavior' in sys.modules\n"
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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
        answer = baselines.median(values, counts).weights
        median.append(measures.crps(Pair.of(values, answer, counts)))
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


@pytest.mark.parametrize("name", METRICS)
def test_metrics_of_many_resamples_equal_those_of_each(name):
    rng = np.random.default_rng(4)
    model = rng.integers(1, 9, (3, 6))
    people = rng.integers(1, 9, (3, 6))
    together = METRICS[name].compute(Pair.of(UNEVEN, model, people, exact=False))
    alone = [
        METRICS[name].compute(Pair.of(UNEVEN, one, other, exact=False))
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
        ([0, 1], [1, 1], [[1, 1], [0, 0]], "people.*nothing in it"),
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


@pytest.mark.parametrize("size", [10, 100, 1000, 10_000])
def test_resamples_have_the_moments_of_a_multinomial(size):
    """Of cells that are all drawn one by one, in part, and not at all."""
    counts = np.array([0, 50, 0, 30, 18, 2])
    rows = 20_000
    drawn = resampling.resample(np.random.default_rng(0), counts, size, rows)
    assert (drawn.sum(1) == size).all()
    assert not drawn[:, [0, 2]].any()
    p = counts / 100
    np.testing.assert_allclose(drawn.mean(0), size * p, atol=4 * np.sqrt(size / 4 / rows))
    covariance = size * (np.diag(p) - np.outer(p, p))
    np.testing.assert_allclose(
        np.cov(drawn.T), covariance, atol=size * 4 * 0.25 / np.sqrt(rows / 2)
    )
    # Rows know nothing of one another.
    assert abs(np.corrcoef(drawn[1:, 1], drawn[:-1, 1])[0, 1]) < 4 / np.sqrt(rows)


@pytest.mark.parametrize("exact", [True, False])
def test_intervals_hold_the_truth_as_often_as_they_say(exact):
    rng = np.random.default_rng(5)
    values = np.arange(11)
    truth = np.exp(-0.3 * np.abs(values - 3.0))
    truth /= truth.sum()
    model = np.full(11, 1 / 11)
    chosen = {name: METRICS[name] for name in ("energy", "mean_difference", "wasserstein")}
    right = {
        name: metric.compute(Pair.of(values, model, truth * 1e7)) for name, metric in chosen.items()
    }
    held = dict.fromkeys(chosen, 0)
    for people in rng.multinomial(150, truth, size=300):
        answers = model if exact else rng.multinomial(200, model)
        compared = resampling.compare(
            values, answers, people, exact=exact, resamples=400, rng=rng, metrics=chosen
        )
        for name, metric in chosen.items():
            low, high = resampling.interval(compared[name].value, compared[name].replicates, metric)
            assert low <= compared[name].value <= high
            held[name] += low <= right[name] <= high
    assert all(0.90 <= count / 300 <= 0.98 for count in held.values()), held


def test_an_interval_holds_its_estimate_where_resampling_is_biased_most():
    # A perfect exact model: every resample is farther from it than the people themselves.
    people = np.full(50, 4)
    compared = resampling.compare(
        np.arange(50),
        people / 200,
        people,
        exact=True,
        resamples=500,
        rng=np.random.default_rng(0),
    )["total_variation"]
    assert compared.value == 0
    assert compared.replicates.min() > 0
    low, high = resampling.interval(0.0, compared.replicates, METRICS["total_variation"])
    assert low == 0
    assert 0 < high < compared.floor


@pytest.mark.parametrize("unlike", [1.0, -1.0])
def test_an_interval_holds_its_estimate_where_few_replicates_differ(unlike):
    replicates = np.array([0.0] * 990 + [unlike] * 10)
    low, high = resampling.interval(0.0, replicates, METRICS["mean_difference"])
    assert low <= 0.0 <= high


def test_an_undefined_figure_has_no_interval():
    metric = METRICS["log_score"]
    assert resampling.interval(np.nan, np.ones(9), metric) is None
    assert resampling.interval(1.0, np.array([1.0, np.nan]), metric) is None


def test_one_resample_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        resampling.compare(
            np.arange(2),
            np.array([1, 1]),
            np.array([1, 1]),
            exact=False,
            resamples=1,
            rng=np.random.default_rng(0),
        )


def test_the_energy_distance_has_no_floor_and_other_people_stand_above_a_perfect_model():
    people = np.array([40, 10, 5, 5, 10, 30])
    compared = resampling.compare(
        UNEVEN,
        np.full(6, 1 / 6),
        people,
        exact=True,
        resamples=4000,
        rng=np.random.default_rng(0),
    )
    assert abs(compared["energy"].floor) < 0.1 < compared["energy"].value
    ratio = compared["wasserstein"].ceiling / compared["wasserstein"].floor
    assert ratio == pytest.approx(np.sqrt(2), rel=0.05)  # two noisy samples instead of one
    assert compared["variance_ratio"].floor == pytest.approx(1, abs=0.05)


def test_the_floor_of_as_many_draws_as_people_is_the_ceiling_whatever_the_model():
    people = np.array([40, 10, 5, 5, 10, 30])
    compared = resampling.compare(
        UNEVEN,
        np.array([0, 0, 0, 0, 0, 100]),
        people,
        exact=False,
        resamples=4000,
        rng=np.random.default_rng(0),
    )
    for name in ("wasserstein", "total_variation", "ks", "crps"):
        assert compared[name].floor == pytest.approx(compared[name].ceiling, rel=0.05)


def expected_floor(counts, number: int) -> float:
    """The mean distance of `number` draws to what they are drawn from, without drawing.

    Below each gap of the scale stand binomially many of them: the sum of their mean absolute
    deviations.
    """
    below = np.cumsum(counts)[:-1] / counts.sum()
    draws = np.arange(number + 1)[:, None]
    deviation = (binom.pmf(draws, number, below) * np.abs(draws / number - below)).sum(0)
    return deviation.sum() * 100 / (len(counts) - 1)


# DESIGN.md section 8 says 4.1, 2.0 and 0.9: the first is 0.07 more than the mean itself.
@pytest.mark.parametrize(("number", "figure"), [(50, 4.03), (200, 2.01), (1000, 0.90)])
def test_floors_on_the_real_table_are_those_of_the_binomial(real_counts, number, figure):
    """The true distribution read exactly, against so many people."""
    floors, expected = [], []
    for seed, counts in enumerate(real_counts.values()):
        drawn = resampling.resample(np.random.default_rng(seed), counts, number, 4000)
        floors.append(measures.wasserstein(Pair.of(np.arange(len(counts)), counts, drawn)).mean())
        expected.append(expected_floor(counts, number))
    assert np.mean(expected) == pytest.approx(figure, abs=0.005)
    assert np.mean(floors) == pytest.approx(np.mean(expected), abs=0.03)


def test_baselines_are_the_designs_figures_on_the_real_table(real_counts):
    uniform, median, ceiling = [], [], []
    for counts in real_counts.values():
        values = np.arange(len(counts))
        for found, answers in (
            (uniform, baselines.uniform(values)),
            (median, baselines.median(values, counts)),
        ):
            found.append(measures.wasserstein(Pair.of(values, answers.weights, counts)))
        compared = resampling.compare(
            values,
            counts,
            counts,
            exact=False,
            resamples=500,
            rng=np.random.default_rng(0),
            metrics={"wasserstein": METRICS["wasserstein"]},
        )
        ceiling.append(compared["wasserstein"].ceiling)
    # Exactly uniform; the 12.3 of DESIGN.md is that of 1,000 uniform draws, biased upward.
    assert np.mean(uniform) == pytest.approx(12.20, abs=0.01)
    assert np.mean(median) == pytest.approx(20.9, abs=0.05)
    # Two draws of as many people as the whole table has.
    assert np.mean(ceiling) == pytest.approx(0.53, abs=0.03)
