"""The tasks of games: populations, persons, and games that are asked without people."""

import numpy as np
import pytest

from befm_jax import tasks
from befm_jax.data import choices, games
from befm_jax.data.bomb_risk import Opened
from befm_jax.data.choices import Histogram, Plays
from befm_jax.errors import DataError
from befm_jax.evals import measures
from befm_jax.evals.evaluate import evaluate
from befm_jax.respondents import baselines
from befm_jax.tasks import sources
from befm_jax.tasks.games import ACROSS, BOMB_RISK, GAMES, JOINT, PERSON, item_of
from befm_jax.tasks.wording import DEFAULT

SEVEN = [game for game in map(games.get, games.ids()) if game.reference]
RNG = np.random.default_rng(0)


def items(task, rows):
    return [item for row in rows.rows for item in task.items(row, DEFAULT, RNG)]


class TestPopulation:
    def test_one_item_a_game_with_the_peoples_counts(self):
        rows = choices.part(choices.read("", SEVEN), "test")
        made = items(GAMES, choices.counted(rows, SEVEN))
        assert [item.id for item in made] == [game.id for game in SEVEN]
        assert sum(item.target.sum() for item in made) == 6561
        counts = choices.histograms(rows, SEVEN)
        for item, game in zip(made, SEVEN, strict=True):
            np.testing.assert_array_equal(item.target, counts[game.id])
            assert item.prompt == game.prompt()
            assert item.answers == game.answers
            assert item.labels == {"game": game.id}

    def test_what_is_learnt_is_every_choice_as_often_as_people_made_it(self):
        rows = choices.counted(choices.part(choices.read("", SEVEN), "train"), SEVEN)
        learnt = [example for item in items(GAMES, rows) for example in item.examples("games")]
        assert sum(example.weight for example in learnt) == 52_474
        counts = choices.histograms(rows, SEVEN)
        expected = [
            game.example(value, float(count))
            for game in SEVEN
            for value, count in zip(game.values.tolist(), counts[game.id], strict=True)
            if count
        ]
        assert [(e.messages, e.weight) for e in learnt] == [
            (e.messages, e.weight) for e in expected
        ]

    def test_its_measures_are_the_nine(self):
        assert len(set(GAMES.measures)) == 9
        assert [measures.get(name).name for name in GAMES.measures] == list(GAMES.measures)
        assert (GAMES.needs, GAMES.average, GAMES.cluster) == ("histograms", "game", "")


class TestPerson:
    def test_one_item_a_person_and_game(self):
        row = Plays("7", {"bomb": 50, "push_pull": 1}, {"sex": "female"})
        bomb, push = PERSON.items(row, DEFAULT, RNG)
        assert (bomb.id, push.id) == ("7/bomb", "7/push_pull")
        assert bomb.labels == {"person": "7", "game": "bomb", "sex": "female"}
        assert bomb.target.sum() == bomb.target[50] == 1
        assert push.target.tolist() == [0, 1]
        assert PERSON.cluster in push.labels
        assert PERSON.average in push.labels

    def test_persons_add_up_to_the_population(self, tmp_path):
        path = tmp_path / "people.csv"
        path.write_text(
            "UserID,bomb,dictator\n" + "".join(f"{n},{n % 9},{n % 4}\n" for n in range(90))
        )
        rows = choices.read(path, [games.get("dictator"), games.get("bomb")])
        totals = {}
        for item in items(PERSON, choices.by_person(rows)):
            game = item.labels["game"]
            totals[game] = totals.get(game, 0) + item.target
        for item in items(GAMES, choices.counted(rows, SEVEN)):
            np.testing.assert_array_equal(totals[item.id], item.target)
        assert len({item.id for item in items(PERSON, rows)}) == 180


class TestAcross:
    ROW = Plays("7", {"bomb": 50, "push_pull": 1, "dictator": 20}, {"sex": "female"})

    def asked(self, row=ROW, seed=0):
        return {
            i.labels["game"]: i for i in ACROSS.items(row, DEFAULT, np.random.default_rng(seed))
        }

    def test_each_game_is_asked_with_the_answers_to_all_others(self):
        made = self.asked()
        assert set(made) == set(self.ROW.choices)
        bomb = made["bomb"]
        assert (bomb.id, bomb.target[50]) == ("7/bomb", 1)
        assert bomb.labels == {"person": "7", "game": "bomb", "sex": "female"}
        assert bomb.notes["known"] == {"push_pull": 1.0, "dictator": 20.0}
        assert bomb.notes["equilibrium"] == 50
        system, user = bomb.prompt
        assert system == games.get("bomb").prompt()[0]
        game, said = user.text.split("\n\n")
        assert game == games.get("bomb").user
        heading, *others = said.split("\n")
        assert heading == "What you decided in other games:"
        assert sorted(others) == [
            "Dictator (0 to 100 dollars): 20", "Push or pull (Push, Pull): Pull",
        ]  # fmt: skip

    def test_the_order_is_one_a_person_and_random(self):
        firsts = set()
        for seed in range(30):
            said = [
                item.prompt[-1].text.split("\n")[-2:] for item in self.asked(seed=seed).values()
            ]
            before = {(first, second) for first, second in said}
            assert not before & {(second, first) for first, second in before}
            firsts |= {first for first, _ in said}
        assert len(firsts) == 3

    def test_people_who_played_one_game_are_counted_as_left_out(self, tmp_path):
        path = tmp_path / "people.csv"
        path.write_text("UserID,bomb,dictator\n1,50,10\n2,,10\n3,5,\n")
        asked = [games.get("dictator"), games.get("bomb")]
        across, person = sources.select("games/across,games/person", asked, str(path))
        assert [item.id for item in across.items()] in (
            ["1/bomb", "1/dictator"], ["1/dictator", "1/bomb"],
        )  # fmt: skip
        assert across.rows.left_out.counts == {"row: no question of games/across": 2}
        assert person.rows.left_out.counts == {}
        path.write_text("UserID,bomb,dictator\n2,,10\n3,5,\n")
        with pytest.raises(DataError, match="no row that games/across has a question for"):
            sources.select("games/across", asked, str(path))

    def test_other_answers_predict_where_games_go_together(self):
        training = [
            item
            for n in range(60)
            for item in self.asked(Plays(str(n), {"bomb": n, "dictator": 70 - n})).values()
        ]
        asked = self.asked(Plays("new", {"bomb": 10, "dictator": 60}))["dictator"]
        fitted = baselines.fit("other_answers", training, ACROSS.average)
        (response,) = fitted.respond([asked], ACROSS.how)
        assert response.weights @ np.arange(101) == pytest.approx(60, abs=1.5)


class TestJoint:
    def test_each_choice_is_put_into_the_question_of_each_other(self):
        row = Plays("7", {"dictator": 20, "push_pull": 1, "bomb": 50}, {"sex": "f"})
        asked = {item.id: item for item in JOINT.items(row, DEFAULT, RNG)}
        assert len(asked) == 6
        item = asked["7/push_pull/bomb"]
        game, said = item.prompt[-1].text.split("\n\n")
        assert game == games.get("bomb").user
        assert said.split("\n")[1:] == ["Push or pull (Push, Pull): Pull"]
        assert item.target.argmax() == 50
        assert item.labels == {"sex": "f", "person": "7", "pair": "bomb given push_pull"}
        # Under the question whose answer it is, as the baseline looks it up.
        assert item.notes["known"] == {"push_pull given bomb": 1.0}
        assert asked["7/bomb/push_pull"].labels["pair"] == "push_pull given bomb"

    def test_baselines_that_see_the_first_choice_and_that_do_not(self):
        """People who give more open fewer boxes: a normal population says so, a marginal can't."""
        rng = np.random.default_rng(0)
        moved = rng.normal(size=300)
        rows = [
            Plays(str(n), {"bomb": int(np.clip(50 + 12 * one + 6 * more, 0, 100)),
                           "dictator": int(np.clip(40 - 12 * one + 6 * other, 0, 100))})
            for n, (one, more, other) in enumerate(
                zip(moved, rng.normal(size=300), rng.normal(size=300), strict=True)
            )
        ]  # fmt: skip
        items = [item for row in rows for item in JOINT.items(row, DEFAULT, RNG)]
        found = {}
        for name in ("other_answers", "training_people"):
            fitted = baselines.fit(name, items, JOINT.average)
            responses = {one.item: one for one in fitted.respond(items, JOINT.how)}
            figures = evaluate(JOINT, items, responses, respondent=name, resamples=200).figures
            found[name] = {one.measure: one for one in figures if not one.where}
        people = found["other_answers"]["people_correlation"].value
        assert people < -0.6
        assert found["other_answers"]["correlation_gap"].value == pytest.approx(0, abs=0.01)
        assert found["other_answers"]["variance_kept"].value == pytest.approx(people**2, abs=0.1)
        assert found["training_people"]["model_correlation"].value == pytest.approx(0, abs=1e-9)
        gap = found["training_people"]["correlation_gap"]
        assert gap.value == pytest.approx(people**2, abs=0.01)
        assert gap.ci95[0] > 0.3


class TestBombRisk:
    def item(self, boxes=25, choice=8, age=None, **labels):
        (item,) = BOMB_RISK.items(Opened("7", boxes, choice, age, labels), DEFAULT, RNG)
        return item

    def test_the_game_comes_first_and_the_person_last(self):
        item = self.item(25, 8, 34, sex="female", country="Austria", age_band="25-34")
        system, user = item.prompt
        assert system == games.get("bomb").prompt()[0]
        game, about = user.text.split("\n\n")
        assert game == games.get("bomb").with_parameters(boxes=25).user
        assert about.split("\n") == [
            "Give the answer of this person.", "Country: Austria", "Sex: female", "Age: 34",
        ]  # fmt: skip
        assert (len(item.answers), item.target.argmax(), item.id) == (26, 8, "7")
        assert item.labels["question"] == "25 boxes, usual stakes"
        assert set(BOMB_RISK.groups) <= set(item.labels)

    def test_what_is_not_known_is_not_said(self):
        assert self.item(100).prompt[1].text == games.get("bomb").user
        high = self.item(100, stakes="high")
        assert high.prompt[1].text == games.get("bomb").user + "\n\nThe stakes are high."
        assert high.labels["question"] == "100 boxes, high stakes"


class TestItemOf:
    def test_a_game_can_be_asked_without_people(self):
        item = item_of("push_pull")
        assert item.target is None
        assert list(item.examples()) == []
        assert item.notes["equilibrium"] == 1  # the position of Pull
        assert item.notes["title"] == games.get("push_pull").title

    @pytest.mark.parametrize("id", games.ids())
    def test_the_equilibrium_is_a_position(self, id):
        item = item_of(id)
        value = games.get(id).values[item.notes["equilibrium"]]
        assert value == games.get(id).equilibrium

    def test_other_parameters_are_another_question_with_their_own_answers(self):
        small = games.get("bomb").with_parameters(boxes=10)
        item = item_of(small, np.ones(11), id="bomb/10", labels={"boxes": "10"})
        assert item.labels == {"game": "bomb", "boxes": "10"}
        assert item.notes["parameters"] == {"boxes": 10}
        with pytest.raises(DataError, match="for 11 answers"):
            item_of(small, np.ones(101))
        with pytest.raises(DataError, match="unknown game 'bmob': did you mean 'bomb'"):
            item_of("bmob")

    def test_counts_over_other_answers_are_refused(self):
        with pytest.raises(DataError, match="for 101 answers"):
            next(GAMES.items(Histogram("bomb", np.ones(11)), DEFAULT, RNG))


def test_they_are_registered():
    assert tasks.get("games") is GAMES
    assert sorted(name for name in tasks.names() if name.split("/")[0] == "games") == [
        *("games", "games/across", "games/bomb_risk", "games/joint", "games/matrix"),
        *("games/person", "games/risky"),
    ]
