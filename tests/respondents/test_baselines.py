"""Baselines: on cases small enough to write down, and against the stored figures."""

from collections import Counter

import golden
import numpy as np
import pytest

from befm_jax.data import choices, games
from befm_jax.data.items import AnswerSet, FreeText, Item, Message
from befm_jax.data.responses import Exact, Sampled
from befm_jax.errors import DataError
from befm_jax.evals import measures
from befm_jax.evals.measures import Pair
from befm_jax.respondents import baselines
from befm_jax.tasks.games import item_of

SCALE = AnswerSet.numbers([0, 10, 20])
OTHER = AnswerSet.numbers(range(5))
WAYS = AnswerSet.labels("Bus", "Bike", "Car")
ASK = (Message("user", "?"),)


def asked(counts=None, answers=SCALE, game="g", person="", **notes):
    id = f"{person}/{game}" if person else game
    labels = {"game": game} | ({"person": person} if person else {})
    target = None if counts is None else np.array(counts, np.float64)
    return Item(id, ASK, answers, target, labels, notes)


def shares(name, training, item, question="game"):
    fitted = baselines.fit(name, training, question)
    assert fitted.serves(item)
    (response,) = fitted.respond([item], Exact())
    assert response.item == item.id
    assert response.exact
    assert response.outside == pytest.approx(0, abs=1e-12)
    return response.weights


def test_uniform_gives_every_answer_the_same_share():
    np.testing.assert_allclose(shares("uniform", [], asked()), [1 / 3] * 3)


@pytest.mark.parametrize(
    ("counts", "median"),
    [([5, 1, 1], 0), ([2, 3, 2], 1), ([0, 0, 1], 2), ([2, 0, 2], 0), ([1, 1, 2], 1)],
)
def test_median_is_the_smallest_answer_that_half_the_people_do_not_exceed(counts, median):
    assert shares("median", [asked(counts)], asked()).tolist() == SCALE.one(median).tolist()


@pytest.mark.parametrize(("counts", "mode"), [([1, 5, 2], 1), ([3, 1, 3], 0), ([0, 0, 1], 2)])
def test_mode_is_the_most_frequent_answer(counts, mode):
    assert shares("mode", [asked(counts)], asked()).tolist() == SCALE.one(mode).tolist()
    ways = asked(counts, WAYS)
    assert shares("mode", [ways], asked(None, WAYS)).tolist() == WAYS.one(mode).tolist()


def test_equilibrium_is_that_of_the_item():
    assert shares("equilibrium", [], asked(equilibrium=2)).tolist() == [0, 0, 1]
    assert shares("equilibrium", [], item_of("push_pull")).tolist() == [0, 1]


def test_pooled_moves_everybody_to_the_nearest_answer_by_share_of_the_range():
    training = [
        asked([1, 1, 1]),
        asked([1, 2, 4, 8, 16], OTHER, "other"),
        asked([9, 9, 9], WAYS, "w"),
    ]
    # 1 of 4 is halfway between the first two answers and 3 of 4 between the last two: down.
    expected = np.array([1 + 1 + 2, 1 + 4 + 8, 1 + 16]) / 34
    np.testing.assert_allclose(shares("pooled", training, asked()), expected)
    # A game that nobody was trained on has one, too.
    np.testing.assert_allclose(shares("pooled", training, asked(game="new")), expected)


def test_training_people_are_their_histogram_from_persons_or_from_counts():
    persons = [
        *(asked([0, 0, 1], person=str(n)) for n in range(3)),
        asked([1, 0, 0], person="3"),
        asked([0, 1, 0], person="3", game="other"),
    ]
    for training in (persons, [asked([1, 0, 3])]):
        found = shares("training_people", training, asked(None, person="9"))
        np.testing.assert_allclose(found, [0.25, 0, 0.75])


def test_all_items_may_ask_the_same_question():
    training = [asked([1, 0, 0], game="a"), asked([0, 0, 1], game="b")]
    found = shares("training_people", training, asked(game="c"), question="")
    np.testing.assert_allclose(found, [0.5, 0, 0.5])


def test_the_previous_choice_is_kept_as_often_as_training_people_keep_theirs():
    kept = [(0, 0)] * 3 + [(2, 2)] * 3 + [(1, 0), (1, 2)]
    training = [
        asked(SCALE.one(now), person=f"p{n}", previous=before)
        for n, (now, before) in enumerate(kept)
    ]
    everybody = (np.array([3, 2, 3]) + 1 / 3) / 9
    grid = np.linspace(0, 1, 10_001)[1:-1, None]
    chosen, before = np.array(kept).T
    likelihood = grid * (chosen == before) + (1 - grid) * everybody[chosen]
    posterior = np.log(likelihood).sum(1) + np.log(grid * (1 - grid))[:, 0]
    share = grid[posterior.argmax(), 0]
    assert 0.4 < share < 0.7
    found = shares("previous_choice", training, asked(previous=1))
    np.testing.assert_allclose(found, share * SCALE.one(1) + (1 - share) * everybody, atol=1e-3)
    found = shares("previous_choice", training, asked(previous=None))
    np.testing.assert_allclose(found, everybody)
    firsts = [asked([1, 0, 1], previous=None)]
    found = shares("previous_choice", firsts, asked(previous=1))
    np.testing.assert_allclose(found, np.array([4, 1, 4]) / 9)
    assert not baselines.fit("previous_choice", training, "game").serves(asked())


class TestAnotherPerson:
    PEOPLE = [asked(SCALE.one(n % 3), person=f"p{n}") for n in range(6)]  # noqa: RUF012

    def draws(self, item, seeds=3000, training=None):
        fitted = baselines.fit("another_person", training or self.PEOPLE, "game")
        return [next(fitted.respond([item], Sampled(1, seed))) for seed in range(seeds)]

    def test_every_other_person_is_as_likely_and_the_own_answer_is_never_given_back(self):
        # Six persons of whom each alone gives one of six answers: the answer tells who it was.
        six = AnswerSet.numbers(range(6))
        people = [asked(six.one(n), six, person=f"p{n}") for n in range(6)]
        for own in (0, 2, 5):
            drawn = Counter(int(r.weights.argmax()) for r in self.draws(people[own], 3000, people))
            assert set(drawn) == set(range(6)) - {own}
            # 600 expected, standard deviation 22.
            assert all(abs(number - 600) < 100 for number in drawn.values())

    def test_somebody_new_meets_all_of_them(self):
        answers = Counter(int(r.weights.argmax()) for r in self.draws(asked(None, person="new")))
        assert all(abs(number - 1000) < 150 for number in answers.values())

    def test_it_is_one_draw_whatever_was_asked_for(self):
        fitted = baselines.fit("another_person", self.PEOPLE, "game")
        for how in (Exact(), Sampled(100)):
            (response,) = fitted.respond([self.PEOPLE[0]], how)
            assert not response.exact
            assert response.draws == response.weights.sum() == 1
        first, again = (self.draws(self.PEOPLE[1], 5) for _ in range(2))
        assert [r.weights.tolist() for r in first] == [r.weights.tolist() for r in again]

    def test_where_nobody_else_answered(self):
        alone = [asked([1, 0, 0], person="p")]
        fitted = baselines.fit("another_person", alone, "game")
        for item, says in (
            (alone[0], "no other training person answered 'g'"),
            (asked(None, person="q", game="new"), "no other training person answered 'new'"),
            (asked(None), "it has no person"),
        ):
            assert not fitted.serves(item)
            with pytest.raises(DataError, match=says):
                list(fitted.respond([item], Exact()))
        assert fitted.serves(asked(None, person="q"))


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "item", "says"),
        [
            ("median", asked(game="new"), "no training people answered 'new'"),
            ("mode", asked(game="new"), "no training people answered 'new'"),
            ("training_people", asked(game="new"), "no training people answered 'new'"),
            ("training_people", asked(game="g", answers=OTHER), "not those of the training"),
            ("median", asked(game="ways", answers=WAYS), "no order"),
            ("pooled", asked(game="ways", answers=WAYS), "no order"),
            ("equilibrium", asked(), "no equilibrium"),
            ("uniform", Item("t", ASK, FreeText()), "free text"),
            ("another_person", Item("t", ASK, FreeText()), "free text"),
        ],
    )
    def test_an_item_that_can_not_be_answered(self, name, item, says):
        training = [asked([1, 1, 1]), asked([1, 1, 1], WAYS, "ways")]
        fitted = baselines.fit(name, training, "game")
        assert not fitted.serves(item)
        with pytest.raises(DataError, match=says):
            list(fitted.respond([item], Exact()))

    def test_nobody_on_a_scale(self):
        fitted = baselines.fit("pooled", [asked([1, 1, 1], WAYS, "ways")], "game")
        with pytest.raises(DataError, match="no training people answered on a scale"):
            list(fitted.respond([asked()], Exact()))

    def test_training_that_contradicts_itself_and_an_unknown_name(self):
        with pytest.raises(DataError, match="not those of others of 'g'"):
            baselines.fit("mode", [asked([1, 1, 1]), asked([1] * 5, OTHER)], "game")
        with pytest.raises(DataError, match="unknown baseline 'medium': did you mean 'median'"):
            baselines.fit("medium", [], "game")


def test_every_baseline_is_defined_for_readers():
    for name, definition in baselines.DEFINITIONS.items():
        described = baselines.fit(name, [], "game").describe()
        assert described == {"baseline": name, "definition": definition}
        assert definition.endswith(".")


def test_fitted_on_the_compared_people_they_have_the_stored_figures():
    stored = golden.read("figures")["exact"]["groups"]
    chosen = [games.get(name) for name in stored]
    people = choices.histograms(choices.part(choices.read("", chosen), "test"), chosen)
    items = [item_of(game, people[game.id].astype(float)) for game in chosen]
    compared = 0
    for name in ("uniform", "median", "equilibrium", "pooled"):
        fitted = baselines.fit(name, items, "game")
        for item, response in zip(items, fitted.respond(items, Exact()), strict=True):
            pair = Pair.of(np.array(item.answers.values), response.weights, item.target)
            for measure, figure in stored[item.id]["metrics"].items():
                if figure["baselines"][name] is None:
                    continue
                value = float(measures.get(measure).kernel(pair))
                assert value == pytest.approx(figure["baselines"][name], rel=1e-12, abs=1e-12)
                compared += 1
    assert compared > 200
