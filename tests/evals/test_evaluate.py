"""Items and responses to figures: persons and histograms, averages, groups, intervals."""

import subprocess
import sys

import numpy as np
import pytest

from befm_jax.data.items import AnswerSet, FreeText, Item, Message
from befm_jax.data.responses import Response
from befm_jax.errors import DataError
from befm_jax.evals import resampling
from befm_jax.evals.evaluate import evaluate
from befm_jax.evals.measures import MEASURES
from befm_jax.tasks import Task

ASKED = (Message("user", "How much?"),)
SCALE = AnswerSet.numbers(range(5), "dollars")
DISTANCES = tuple(one.name for one in MEASURES.values() if one.kernel)


def task(measures=("crps",), **fields) -> Task:
    return Task("made_up", lambda row, wording, rng: iter(()), "rows", measures, **fields)


def histograms(number: int = 3) -> list[Item]:
    rng = np.random.default_rng(3)
    return [
        Item(
            f"game{place}",
            ASKED,
            SCALE,
            rng.multinomial(60 * (place + 1), [0.3, 0.1, 0.2, 0.1, 0.3]),
            {"game": f"game{place}", "era": "new" if place else "old"},
            {"title": f"Game {place}"},
        )
        for place in range(number)
    ]


def persons(number: int, rng, questions=("q1", "q2"), spread: float = 1.0):
    """Items of persons, and an exact respondent who knows half of what moves each of them."""
    items, responses = [], {}
    for person in range(number):
        moved = rng.normal() * spread
        for question in questions:
            y = int(np.clip(np.round(2 + moved + rng.normal()), 0, 4))
            mass = np.exp(-0.5 * (np.arange(5) - 2 - moved / 2) ** 2)
            item = Item(
                f"{person}/{question}",
                ASKED,
                SCALE,
                SCALE.one(y),
                {"person": str(person), "question": question, "sex": "fm"[person % 2]},
            )
            items.append(item)
            responses[item.id] = Response(item.id, mass / mass.sum(), True)
    return items, responses


def same(items, weights, **fields) -> dict[str, Response]:
    return {item.id: Response(item.id, np.asarray(weights), True, **fields) for item in items}


def figure(evaluation, measure: str, where=None):
    (found,) = [
        one
        for one in evaluation.figures
        if one.measure == measure and dict(one.where) == (where or {})
    ]
    return found


def test_no_module_of_the_room_imports_jax():
    code = (
        "import sys, pkgutil, importlib, befm_jax.evals as room\n"
        "for module in pkgutil.walk_packages(room.__path__, 'befm_jax.evals.'):\n"
        "    importlib.import_module(module.name)\n"
        "assert 'befm_jax.evals.report' in sys.modules\n"
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", DISTANCES)
def test_a_histogram_has_the_kernels_figures_and_their_mean(name):
    items = histograms()
    responses = same(items, [0.4, 0.2, 0.2, 0.1, 0.1])
    found = evaluate(task((name,), average="game"), items, responses, respondent="me", resamples=50)
    alone = [
        resampling.compare(
            np.arange(5),
            responses[item.id].weights,
            item.target,
            exact=True,
            resamples=2,
            rng=np.random.default_rng(0),
            measures=[MEASURES[name]],
        )[name].value
        for item in items
    ]
    own = [figure(found, name, {"game": item.id}).value for item in items]
    np.testing.assert_allclose(own, alone, rtol=1e-12)
    whole = figure(found, name)
    assert whole.value == pytest.approx(np.mean(alone))
    assert whole.ci95[0] <= whole.value <= whole.ci95[1]
    assert (whole.items, whole.people) == (3, 360.0)
    assert "histograms" in whole.note


def test_one_seed_gives_one_result_whatever_other_items_are_there():
    items = histograms()
    responses = same(items, np.full(5, 0.2))
    asked = task(("wasserstein",), average="game")
    one, again, other = (
        evaluate(asked, own, responses, respondent="me", resamples=50, seed=seed)
        for own, seed in ((items, 1), (items[:1], 1), (items, 2))
    )
    at = "wasserstein", {"game": "game0"}
    assert figure(one, *at) == figure(again, *at)
    assert figure(one, *at).ci95 != figure(other, *at).ci95


def test_persons_figures_are_the_mean_over_values_of_the_mean_over_people():
    items, responses = persons(40, np.random.default_rng(0))
    items = items[:-3]  # unequal numbers of people
    found = evaluate(
        task(("crps", "expected_error"), average="question", groups=("sex",)),
        items,
        responses,
        respondent="me",
        resamples=50,
    )
    apart = np.abs(np.subtract.outer(np.arange(5), np.arange(5))) * 25.0

    def error(own):
        return np.mean([responses[one.id].weights @ apart @ one.target for one in own])

    by_question = [
        error([one for one in items if one.labels["question"] == question])
        for question in ("q1", "q2")
    ]
    assert figure(found, "expected_error").value == pytest.approx(np.mean(by_question))
    women = [one for one in items if one.labels["sex"] == "f"]
    by_sex = [
        error([one for one in women if one.labels["question"] == question])
        for question in ("q1", "q2")
    ]
    own = figure(found, "expected_error", {"sex": "f"})
    assert own.value == pytest.approx(np.mean(by_sex))
    assert own.people == len(women)
    assert {tuple(one.where.items()) for one in found.figures} == {
        (), (("question", "q1"),), (("question", "q2"),), (("sex", "f"),), (("sex", "m"),),
    }  # fmt: skip


def test_the_interval_is_that_of_a_loop_that_draws_persons_again():
    items, responses = persons(60, np.random.default_rng(1), spread=2.0)
    found = evaluate(
        task(("expected_error",), average="question"),
        items, responses, respondent="me", resamples=4000,
    )  # fmt: skip
    apart = np.abs(np.subtract.outer(np.arange(5), np.arange(5))) * 25.0
    errors = np.array([responses[one.id].weights @ apart @ one.target for one in items])
    errors = errors.reshape(60, 2)  # persons by questions
    rng = np.random.default_rng(9)
    loop = [errors[rng.integers(0, 60, 60)].mean() for _ in range(4000)]
    low, high = np.percentile(loop, [2.5, 97.5])
    ours = figure(found, "expected_error").ci95
    np.testing.assert_allclose(ours, [low, high], atol=0.1 * (high - low))
    # As if other people had answered each question, it would be narrower.
    single = [
        np.mean([errors[rng.integers(0, 60, 60), place].mean() for place in (0, 1)])
        for _ in range(4000)
    ]
    assert np.std(loop) > 1.05 * np.std(single)


def test_intervals_of_persons_hold_the_truth_as_often_as_they_say():
    """Forty persons of three answers each, that are alike within a person."""
    asked = task(("expected_error", "mean_difference", "spearman"))
    questions = tuple(f"q{place}" for place in range(3))
    big, theirs = persons(3000, np.random.default_rng(10), questions)
    truth = evaluate(asked, big, theirs, respondent="me", resamples=2)
    held = dict.fromkeys(asked.measures, 0)
    rng = np.random.default_rng(11)
    for study in range(80):
        items, responses = persons(40, rng, questions)
        found = evaluate(asked, items, responses, respondent="me", resamples=200, seed=study)
        for name in asked.measures:
            low, high = figure(found, name).ci95
            held[name] += low <= figure(truth, name).value <= high
    # 95 %; percentiles of forty clusters hold a little less.
    assert all(0.85 <= count / 80 <= 1.0 for count in held.values()), held


def test_respondents_groups_and_measures_meet_the_same_resamples():
    items, responses = persons(30, np.random.default_rng(2))
    asked = task(("expected_error",), groups=("sex",))
    worse = {name: Response(name, np.full(5, 0.2), True) for name in responses}
    one = evaluate(asked, items, responses, respondent="me", resamples=100)
    fewer = {name: response for name, response in worse.items() if not name.startswith("7/")}
    other = evaluate(asked, items, fewer, respondent="other", resamples=100)
    again = evaluate(asked, items, responses, respondent="me", resamples=100)
    assert one.figures == again.figures
    assert other.skipped == {"no response": ["7/q1", "7/q2"]}
    with_less = evaluate(
        task(("expected_error",)), items, responses, respondent="me", resamples=100
    )
    assert figure(one, "expected_error").ci95 == figure(with_less, "expected_error").ci95


def test_questions_without_persons_are_clusters_of_their_own():
    answers = [AnswerSet.letters(3 + place % 2) for place in range(20)]
    items = [
        Item(f"q{place}", ASKED, own, own.one(0), {"subject": "a" if place < 5 else "b"})
        for place, own in enumerate(answers)
    ]
    right = {f"q{place}" for place in range(20) if place % 5}
    responses = {
        item.id: Response(item.id, own.one(0 if item.id in right else 1), True)
        for item, own in zip(items, answers, strict=True)
    }
    asked = task(("accuracy", "wasserstein"), average="subject")
    found = evaluate(asked, items, responses, respondent="me", resamples=200)
    assert figure(found, "accuracy").value == pytest.approx(0.8)
    low, high = figure(found, "accuracy").ci95
    assert low < 0.8 < high
    assert figure(found, "wasserstein").value is None
    assert "no order" in figure(found, "wasserstein").note


def test_what_stands_beside_has_its_figures_and_uniform_begins_the_skill():
    items = histograms()
    perfect = {item.id: Response(item.id, item.target / item.target.sum(), True) for item in items}
    uniform = same(items, np.full(5, 0.2))
    partial = dict(list(uniform.items())[:1])
    found = evaluate(
        task(("crps", "variance_ratio"), average="game"),
        items, uniform, respondent="me", resamples=400,
        beside={"uniform": uniform, "perfect": perfect, "partial": partial},
    )  # fmt: skip
    whole = figure(found, "crps")
    assert whole.skill == pytest.approx(0.0)
    assert whole.beside["uniform"] == pytest.approx(whole.value)
    assert whole.beside["perfect"] < whole.value
    assert whole.beside["partial"] is None
    assert figure(found, "crps", {"game": "game0"}).beside["partial"] is not None
    assert figure(found, "variance_ratio").skill is None
    best = evaluate(
        task(("crps",), average="game"), items, perfect, respondent="me", resamples=4000,
        beside={"uniform": uniform},
    )  # fmt: skip
    assert figure(best, "crps").skill == pytest.approx(1.0, abs=0.02)


def test_figures_in_points_say_what_a_point_is_in_the_items_unit():
    items = histograms()
    found = evaluate(
        task(("mean_difference", "total_variation"), average="game"),
        items, same(items, [0, 0, 0, 0, 1.0]), respondent="me", resamples=50,
    )  # fmt: skip
    own = figure(found, "mean_difference", {"game": "game0"})
    dollars = 4 - items[0].target @ np.arange(5) / items[0].target.sum()
    assert own.value * own.per_point == pytest.approx(dollars)
    assert own.own_unit == "dollars"
    assert figure(found, "total_variation").per_point is None
    wider = AnswerSet.numbers(range(11), "dollars")
    more = [*items, Item("wide", ASKED, wider, np.ones(11) * 4, {"game": "wide"})]
    responses = same(items, [0, 0, 0, 0, 1.0]) | {"wide": Response("wide", wider.one(3), True)}
    mixed = evaluate(
        task(("mean_difference",), average="game"), more, responses, respondent="me", resamples=50
    )
    assert figure(mixed, "mean_difference").per_point is None
    assert figure(mixed, "mean_difference", {"game": "wide"}).per_point == pytest.approx(0.1)


def test_what_is_outside_is_counted_also_where_nothing_else_is():
    items = [*histograms(3), Item("nobody", ASKED, SCALE, None, {"game": "nobody"})]
    responses = {
        "game0": Response.from_counts("game0", [1, 2, 3, 4, 0], 6, 4, ends_after_answer=0.5),
        "game1": Response.from_counts("game1", np.zeros(5), 3, 1),
        "nobody": Response.from_counts("nobody", [1, 0, 0, 0, 0]),
    }
    found = evaluate(
        task(("wasserstein",), average="game"), items, responses, respondent="me", resamples=50
    )
    assert found.skipped == {
        "nothing answered is in the answer set": ["game1"],
        "no response": ["game2"],
        "no people to compare with": ["nobody"],
    }
    whole = figure(found, "wasserstein")
    assert whole.outside == pytest.approx((0.5 + 1.0) / 2)
    assert (whole.items, whole.unread, whole.draws) == (1, 9, 24)
    assert whole.ends_after_answer == 0.5
    assert "1 of 2 items are not in it" in whole.note
    with pytest.raises(DataError, match=r"no item to compare me .*in the answer set: 1"):
        evaluate(task(), items[1:2], responses, respondent="me", resamples=50)


def test_an_impossible_answer_leaves_the_log_score_undefined_with_a_note():
    items = histograms(1)
    found = evaluate(
        task(("log_score", "spearman")), items, same(items, [1.0, 0, 0, 0, 0]),
        respondent="me", resamples=50,
    )  # fmt: skip
    undefined = figure(found, "log_score")
    assert (undefined.value, undefined.ci95) == (None, None)
    assert "no probability" in undefined.note
    assert "person by person" in figure(found, "spearman").note


@pytest.mark.parametrize("number", [1, 4, 5])
def test_four_persons_have_no_interval(number):
    items, responses = persons(number, np.random.default_rng(0))
    found = figure(evaluate(task(), items, responses, respondent="me", resamples=50), "crps")
    assert found.value is not None
    assert (found.ci95 is None) is (number < 5)
    note = f"no interval: it needs 5 clusters, and this has {number} (person)"
    assert (note in found.note) is (number < 5)


def test_a_group_of_few_has_a_figure_without_interval():
    items, responses = persons(30, np.random.default_rng(0))
    rare = [
        Item(one.id, one.prompt, one.answers, one.target, {**one.labels, "sex": "x"})
        if one.labels["person"] in ("3", "4") else one
        for one in items
    ]  # fmt: skip
    found = evaluate(task(groups=("sex",)), rare, responses, respondent="me", resamples=200)
    assert figure(found, "crps", {"sex": "x"}).ci95 is None
    assert "needs 5 clusters" in figure(found, "crps", {"sex": "x"}).note
    assert figure(found, "crps", {"sex": "f"}).ci95 is not None


def test_texts_are_compared_with_references():
    items = [
        Item(f"paper{place}", ASKED, FreeText(), ("people give half",), {"journal": "AER"})
        for place in range(4)
    ]
    responses = {
        item.id: Response(item.id, None, False, draws=1, texts=(text,))
        for item, text in zip(items, ["people give half", "nobody", "people give", ""], strict=True)
    }
    asked = task(("rouge1", "crps"))
    found = evaluate(asked, items, responses, respondent="me", resamples=100)
    assert figure(found, "rouge1").value == pytest.approx((1 + 0 + 0.8 + 0) / 4)
    assert figure(found, "crps").value is None
    assert "closed answers" in figure(found, "crps").note
    assert found.distributions == []


def test_distributions_hold_everybody_and_the_mean_response():
    items, responses = persons(20, np.random.default_rng(0))
    found = evaluate(task(average="question"), items, responses, respondent="me", resamples=50)
    drawn = {one.where["question"]: one for one in found.distributions}
    own = [one for one in items if one.labels["question"] == "q1"]
    np.testing.assert_allclose(drawn["q1"].people, sum(one.target for one in own))
    expected = np.mean([responses[one.id].weights for one in own], 0)
    np.testing.assert_allclose(drawn["q1"].model, expected)
    assert drawn["q1"].title == "q1"
    assert list(drawn["q1"].answers) == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed"),
        ({"resamples": 1}, ValueError, "at least 2"),
        ({"responses": {"game0": Response("game0", [0.5, 0.5], True)}}, DataError, "2 weights"),
        (
            {
                "responses": {
                    "game0": Response("game0", np.full(5, 0.2), True),
                    "game1": Response.from_counts("game1", [1, 0, 0, 0, 0]),
                }
            },
            DataError,
            "some exact and some drawn|exact and some drawn",
        ),
        ({"measures": ("crsp",)}, DataError, "crps"),
    ],
)
def test_what_can_not_be_compared_is_refused(change, error, message):
    items = histograms(2)
    responses = change.pop("responses", same(items, np.full(5, 0.2)))
    asked = task(change.pop("measures", ("crps",)))
    with pytest.raises(error, match=message):
        evaluate(asked, items, responses, respondent="me", **{"resamples": 10, **change})


def test_a_sample_of_people_is_worth_as_many_as_it_is_of():
    """On average of 1 / k, which is the energy distance over the people's own."""
    everybody = np.array([0.1, 0.2, 0.4, 0.2, 0.1])
    items = [Item(f"{n}", ASKED, SCALE, np.round(1e7 * everybody)) for n in range(600)]
    rng = np.random.default_rng(5)
    samples = rng.multinomial(25, everybody, len(items)) / 25
    responses = {
        item.id: Response(item.id, shares, True)
        for item, shares in zip(items, samples, strict=True)
    }
    found = evaluate(task(("energy",)), items, responses, respondent="few", resamples=20)
    mean, *each = found.figures
    shares_of_one = [1.0 / one.worth_people[0] for one in each]
    assert 1.0 / np.mean(shares_of_one) == pytest.approx(25, rel=0.1)
    assert mean.worth_people[0] == pytest.approx(1.0 / np.mean(shares_of_one), rel=1e-6)
    k, low, high = mean.worth_people
    assert low < k < high


def test_who_can_not_be_told_from_everybody_is_worth_at_least_so_many():
    (item,) = histograms(1)
    right = Response(item.id, np.array([0.3, 0.1, 0.2, 0.1, 0.3]), True)
    found = evaluate(task(("energy", "crps")), [item], {item.id: right}, respondent="right")
    energy, crps = found.figures[:2]
    _, low, high = energy.worth_people
    assert low > 5
    assert high is None
    # As the interval of the energy distance has it, by hand: 60 people.
    spread = (
        2
        * 60
        / 59
        * np.sum(np.cumsum(item.target / 60)[:4] * (1 - np.cumsum(item.target / 60)[:4]))
        * 25
    )
    assert low == pytest.approx(spread / energy.ci95[1])
    assert crps.worth_people is None


def test_values_of_few_people_are_left_out_of_the_mean_and_named():
    items, responses = persons(30, np.random.default_rng(0))
    rare = [item for item in items if item.labels["question"] == "q2"][3:]
    asked = [item for item in items if item not in rare]
    found = evaluate(
        task(average="question", least=4), asked, responses, respondent="me", resamples=20
    )
    assert [dict(one.where) for one in found.figures] == [{}, {"question": "q1"}]
    assert found.figures[0].value == found.figures[1].value
    assert found.skipped == {"fewer than 4 people of its question": ["0/q2", "1/q2", "2/q2"]}
    with pytest.raises(DataError, match="no question with 40 people or more"):
        evaluate(task(average="question", least=40), asked, responses, respondent="me")
