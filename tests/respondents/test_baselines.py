"""Baselines: on cases small enough to write down, and against the stored figures."""

from collections import Counter
from dataclasses import replace

import golden
import numpy as np
import pytest
import scipy.stats

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


class TestTexts:
    def paper(self, person, *texts, given="before"):
        labels = {"person": person}
        return Item(f"{person}/idea", ASK, FreeText(), texts or None, labels, {"given": given})

    def test_another_paper_s_text(self):
        training = [self.paper("a", "one", "two"), self.paper("b", "three")]
        fitted = baselines.fit("another_person", training, "")
        asked_of = [self.paper("a"), self.paper("b"), self.paper("c")]
        first, second, third = fitted.respond(asked_of, Exact())
        assert (first.texts, second.texts) == (("three",), ("one",))
        assert third.texts[0] in ("one", "three")
        assert (first.weights, first.draws, first.exact) == (None, 1, False)

    def test_the_text_that_is_given(self):
        fitted = baselines.fit("given_text", [self.paper("a", "one")], "")
        (response,) = fitted.respond([self.paper("b", given="the context")], Exact())
        assert response.texts == ("the context",)

    @pytest.mark.parametrize("name", ["uniform", "mode", "same_group", "other_answers"])
    def test_shares_are_of_closed_answers_alone(self, name):
        assert not baselines.fit(name, [self.paper("a", "one")], "").serves(self.paper("b"))


def test_letters_are_counted_among_questions_with_as_many_options():
    two, four = AnswerSet.letters(2), AnswerSet.letters(4)
    training = [
        Item(f"q{n}", ASK, answers, answers.one(place), {"game": "sums"})
        for n, (answers, place) in enumerate([(two, 0), (four, 3), (four, 3), (four, 0)])
    ]
    new = [Item("new", ASK, answers, None, {"game": "sums"}) for answers in (two, four)]
    assert shares("mode", training, new[0]).tolist() == [1, 0]
    np.testing.assert_allclose(shares("training_people", training, new[1]), [1 / 3, 0, 0, 2 / 3])


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
            ("another_person", Item("t", ASK, FreeText()), "no person"),
            ("given_text", Item("t", ASK, FreeText()), "no given in its notes"),
            ("given_text", asked(given="x"), "closed answers"),
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


class TestGroups:
    def grouped(self, person, sex, position, game="g"):
        item = asked(SCALE.one(position), person=person, game=game)
        return replace(item, labels={**item.labels, "sex": sex})

    def test_everybody_counts_as_ten_people_beside_those_of_the_group(self):
        training = [self.grouped(f"f{at}", "female", 0) for at in range(30)]
        training += [self.grouped(f"m{at}", "male", 2) for at in range(10)]
        fitted = baselines.fit("same_group", training, "game", ("sex",))
        (response,) = fitted.respond([self.grouped("new", "male", 0)], Exact())
        # Everybody: 3/4 and 1/4.
        np.testing.assert_allclose(response.weights, [7.5 / 20, 0, (10 + 2.5) / 20])

    def test_a_group_that_nobody_of_the_training_people_is_in_has_everybodys_shares(self):
        training = [self.grouped("f", "female", 0), self.grouped("m", "male", 2)]
        fitted = baselines.fit("same_group", training, "game", ("sex",))
        (response,) = fitted.respond([self.grouped("new", "other", 0)], Exact())
        np.testing.assert_allclose(response.weights, [0.5, 0, 0.5])

    def test_without_groups_or_without_the_label_it_does_not_serve(self):
        training = [self.grouped("f", "female", 0)]
        assert not baselines.fit("same_group", training, "game").serves(training[0])
        assert not baselines.fit("same_group", training, "game", ("sex",)).serves(asked())


class TestOtherAnswers:
    GRID = AnswerSet.numbers(range(1, 6))

    def people(self, number=400):
        rng = np.random.default_rng(3)
        mixing = rng.normal(size=(4, 4))
        latent = rng.normal(size=(number, 4)) @ mixing
        return np.clip(np.round(3 + latent / 2), 1, 5).astype(int)

    def items(self, table, known=()):
        return [
            Item(
                f"p{person}/q{question}",
                ASK,
                self.GRID,
                self.GRID.one(answer - 1),
                {"game": f"q{question}", "person": f"p{person}"},
                {"known": {f"q{other}": float(row[other]) for other in known}},
            )
            for person, row in enumerate(table)
            for question, answer in enumerate(row)
            if question not in known
        ]

    def test_it_is_ridge_regression_on_the_known_answers(self):
        table = self.people()
        fitted = baselines.fit("other_answers", self.items(table), "game")
        (item, *_) = self.items([[2, 5, 1, 4]], known=(1, 2, 3))
        (response,) = fitted.respond([item], Exact())
        centred = table - table.mean(0)
        ridge = 0.01 * np.diag(table.var(0))
        outcome, given = centred[:, 0], centred[:, 1:]
        # Ridge regression is least squares with one more row for each coefficient.
        rows = np.concatenate([given, np.sqrt(ridge[1:, 1:] * len(table))])
        slopes, *_ = np.linalg.lstsq(rows, np.concatenate([outcome, np.zeros(3)]), rcond=None)
        expected = table[:, 0].mean() + slopes @ (np.array([5, 1, 4]) - table[:, 1:].mean(0))
        covariance = np.cov(table.T, ddof=0) + ridge
        variance = 1 / np.linalg.inv(covariance)[0, 0]
        cumulated = scipy.stats.norm.cdf([1.5, 2.5, 3.5, 4.5], expected, np.sqrt(variance))
        shares = np.diff(np.concatenate([[0], cumulated, [1]]))
        np.testing.assert_allclose(response.weights, shares, atol=1e-9)

    def test_what_is_known_helps(self):
        training, test = self.people()[:300], self.people()[300:]
        fitted = {
            name: baselines.fit(name, self.items(training), "game")
            for name in ("other_answers", "training_people")
        }
        asked_for = self.items(test, known=(1, 2, 3))
        missed = {
            name: np.mean(
                [
                    np.abs(response.weights @ np.arange(5) - item.target.argmax())
                    for item, response in zip(
                        asked_for, baseline.respond(asked_for, Exact()), strict=True
                    )
                ]
            )
            for name, baseline in fitted.items()
        }
        assert missed["other_answers"] < 0.8 * missed["training_people"]

    def test_it_serves_where_most_people_answered_few_questions(self):
        """Moments of pairs that different people answered would belong to no distribution."""
        for seed in range(20):
            rng = np.random.default_rng(seed)
            training = [item for item in self.items(self.people(12)) if rng.random() < 0.6]
            fitted = baselines.fit("other_answers", training, "game")
            for item in self.items(self.people(5), known=(1, 2, 3)):
                (response,) = fitted.respond([item], Exact())
                assert np.isfinite(response.weights).all()
            _, _, covariance = baselines._Training(training, "game", ())._moments
            assert np.linalg.eigvalsh(covariance).min() > 0

    def test_of_whom_nothing_is_known_it_does_not_serve(self):
        training = self.items(self.people(20))
        fitted = baselines.fit("other_answers", training, "game")
        assert not fitted.serves(training[0])
        # Nor where what is known is no answer, as an age, of which it would be independent.
        assert not fitted.serves(replace(training[0], notes={"known": {"age": 30.0}}))
