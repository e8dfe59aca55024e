"""Contexts as they are asked, and the figures of respondents that know them, and that don't."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from befm_jax import tasks
from befm_jax.data import contexts, effects, games
from befm_jax.data.items import AnswerSet
from befm_jax.data.matrix_games import Game, Player, Trial
from befm_jax.data.responses import Exact, Response
from befm_jax.data.rounds import Decision, Played
from befm_jax.data.rows import Rows
from befm_jax.errors import DataError
from befm_jax.evals.evaluate import evaluate
from befm_jax.respondents import baselines
from befm_jax.tasks.sources import Source, families
from befm_jax.tasks.wording import DEFAULT

RETRIEVAL, EFFECTS = (tasks.get(f"contexts/{name}") for name in ("retrieval", "effects"))
COINS = AnswerSet.numbers(range(21), "coins")
SHARES = np.random.default_rng(7).dirichlet(np.ones(21), 12)


def designs(rng, people=30):
    """Twelve designs of public goods of two studies, with people whose shares are `SHARES`."""
    for number, shares in enumerate(SHARES):
        design = {
            "group_size": 4 + number, "multiplier": 2.0, "rounds": None, "all_or_nothing": False,
            "opt_out": False, "chat": False, "punishment": False, "reward": False,
        }  # fmt: skip
        labels = {"design": f"design {number}", "study": "ab"[number % 2]}
        for person in range(people):
            choice = Decision(1, 1, int(rng.choice(21, p=shares)))
            id = f"{number}/{person}"
            yield Played(id, "public_goods", COINS, design, "", id, labels, (choice,))


def evaluated(items, responses, task=RETRIEVAL, resamples=50):
    by_item = {response.item: response for response in responses}
    return {
        (figure.measure, *figure.where.values()): figure
        for figure in evaluate(
            task, items, by_item, respondent="someone", resamples=resamples, seed=0
        ).figures
    }


def uniform(items):
    return baselines.fit("uniform", [], "").respond(items, Exact())


class TestRetrieval:
    rows = Rows.of(designs(np.random.default_rng(0)), "designs")
    items = Source(RETRIEVAL, rows).items()

    def test_a_context_is_asked_as_the_game_is_with_what_everybody_did(self):
        assert len(self.items) == 24
        same, other = self.items[:2]
        assert same.prompt == other.prompt
        assert "You are in a group of 4 people" in same.prompt[-1].text
        assert same.prompt[-1].text.endswith("Round 1.")
        chosen = [row.decisions[0].choice for row in self.rows.rows[:30]]
        np.testing.assert_array_equal(same.target, np.bincount(chosen, minlength=21))
        assert same.labels["experiment"] == "a"
        assert same.labels["distractors"] == "of the same kind, 0 to 20 coins"
        names = [f"design {number}" for number in range(12)]
        assert same.notes["candidates"][0] == names[0]
        assert set(same.notes["candidates"]) == set(names[::2])
        assert set(other.notes["candidates"]) == {names[0], *names[1::2]}

    def test_of_a_2x2_game_the_people_are_on_the_side_of_their_action(self):
        game = Game(((10, 21), (26, 1)), ((7, 8), (13, 3)))
        other = Game(((3, 0), (5, 1)), ((3, 5), (0, 1)))
        people = [Player(str(n), (Trial("1", game, 1),)) for n in range(3)]
        rows = Rows.of([*people, Player("4", (Trial("1", other, 0),))], "games")
        items = Source(RETRIEVAL, rows).items()
        (item,) = [item for item in items if item.target.sum() == 3]
        chosen = item.notes["payoffs"]["own"][int(item.target.argmax())]
        assert sorted(chosen) == [1, 26]

    def test_true_distributions_are_scored_as_a_loop_has_it(self):
        shares = {f"design {number}": own for number, own in enumerate(SHARES)}
        responses = [Response.from_mass(i.id, shares[i.labels["context"]]) for i in self.items]
        found = evaluated(self.items, responses)
        for which in ("of the same kind, 0 to 20 coins", "of other kinds, 0 to 20 coins"):
            ranks, losses = [], []
            for item in (i for i in self.items if i.labels["distractors"] == which):
                levels = [float(item.target @ np.log(shares[c])) for c in item.notes["candidates"]]
                ranks.append(1 + sum(level > levels[0] for level in levels[1:]))
                losses.append(np.log(sum(np.exp(level - levels[0]) for level in levels)))
            ranks = np.array(ranks)
            assert found["retrieved_first", which].value == pytest.approx(np.mean(ranks == 1))
            assert found["retrieved_in_3", which].value == pytest.approx(np.mean(ranks <= 3))
            assert found["reciprocal_rank", which].value == pytest.approx(np.mean(1 / ranks))
            assert found["posterior_log_loss", which].value == pytest.approx(np.mean(losses))
            assert found["retrieved_first", which].items == 12
            assert found["retrieved_first", which].ceiling > 0.6
        assert found["retrieved_first",].value > 0.9

    def test_whoever_answers_alike_everywhere_is_at_chance(self):
        found = evaluated(self.items, uniform(self.items))
        for which, number in (("of the same kind", 6), ("of other kinds", 7)):
            key = f"{which}, 0 to 20 coins"
            harmonic = sum(1 / rank for rank in range(1, number + 1))
            assert found["retrieved_first", key].value == pytest.approx(1 / number, abs=1e-12)
            assert found["reciprocal_rank", key].value == pytest.approx(harmonic / number)
            assert found["posterior_log_loss", key].value == pytest.approx(np.log(number))
            assert found["posterior_ece", key].value == pytest.approx(0.0, abs=1e-12)

    def test_studies_are_resampled_whole(self):
        shares = {f"design {number}": own for number, own in enumerate(SHARES)}

        def width(studies):
            """The width of the interval of who is right about every second study."""
            items, responses = [], []
            for item in self.items:
                study = int(item.labels["context"].split()[1]) % studies
                items.append(replace(item, labels={**item.labels, "experiment": str(study)}))
                own = shares[item.labels["context"]]
                responses.append(Response.from_mass(item.id, own if study % 2 else own[::-1]))
            ends = evaluated(items, responses, resamples=400)["retrieved_first",].ci95
            return None if ends is None else ends[1] - ends[0]

        # Six studies of two designs tell less than twelve of one, and four too little.
        assert width(6) > 1.15 * width(12)
        assert width(4) is None

    def test_what_everybody_did_is_learnt_too(self):
        (family,) = families([Source(RETRIEVAL, self.rows)], 0, False)
        examples = list(family.examples(family.rows[0], np.random.default_rng(0)))
        assert sum(example.weight for example in examples) == 2 * 30

    def test_a_missing_response_is_nobodys_candidate(self):
        responses = list(uniform(self.items))
        found = evaluated(self.items, responses[2:])
        assert found["retrieved_first", "of the same kind, 0 to 20 coins"].items == 11
        chance = found["retrieved_first", "of the same kind, 0 to 20 coins"].value
        assert chance == pytest.approx((5 / 5 + 6 / 6) / 11)

    def test_a_person_without_a_first_round_is_left_out(self):
        late = Played("1", "dilemma", games.get("push_pull").answers, {}, "", "1", {},
                      (Decision(1, 2, 0),))  # fmt: skip
        assert not RETRIEVAL.serves(late)
        assert RETRIEVAL.serves(self.rows.rows[0])


def effect(id, source, game, control, treatment, difference, outcome="mean"):
    cells = {
        "id": id, "game": game, "parameters_control": control, "outcome": outcome,
        "parameters_treatment": treatment, "difference": str(difference), "standard_error": "0.01",
        "ci95": "", "units": "share", "direction": "+1" if difference > 0 else "-1",
        "assignment": "between people", "source": source, "kind": "study", "note": "",
    }  # fmt: skip
    return effects._effect(cells)


CONTRASTS = [
    effect("gift", "A", "dictator", "endowment=10", "endowment=100", -0.05),
    effect("take", "A", "dictator", "frame=give", "frame=take;recipient=charity", 0.1),
    effect("veto", "B", "ultimatum proposer", "veto=no", "veto=yes;pay=real", 0.2),
    effect("chat", "C", "public goods", "chat=no", "chat=yes", 0.15),
    effect("noise", "D", "prisoner's dilemma", "bc=4;continuation=0.875;error=0",
           "bc=4;continuation=0.875;error=0.125", -0.2),
    effect("other", "E", "push/pull", "own_round1=push;other_round1=pull",
           "own_round1=push;other_round1=push", 0.4),
    effect("boxes", "E", "bomb risk", "boxes=25", "boxes=25;gender=female", -0.02),
]  # fmt: skip


class TestEffects:
    items = Source(EFFECTS, Rows.of(CONTRASTS, "contrasts")).items()

    def answer(self, mean_of):
        """Responses whose outcome has a given mean: mass on the two extreme values."""
        for item in self.items:
            values = np.array(item.notes["values"])
            mass = np.zeros(len(values))
            mean = mean_of(item)
            mass[values.argmax()], mass[values.argmin()] = mean, 1 - mean
            yield Response.from_mass(item.id, mass)

    def test_arms_differ_in_the_question_alone(self):
        texts = {item.id: [message.text for message in item.prompt] for item in self.items}
        assert len(texts) == 14
        for id in (row.id for row in CONTRASTS):
            assert texts[f"{id}/control"] != texts[f"{id}/treatment"]
        assert "belong to a charity" in texts["take/treatment"][0]
        assert texts["veto/treatment"][-1].endswith("you are paid what you earn, in money.")
        assert "The members can write to one another." in texts["chat/treatment"][0]
        assert "12.5 percent" in texts["noise/treatment"][0]
        assert texts["other/treatment"][1:] == [
            "[Push]",
            "The other person chose Push.\n\nRound 2.",
        ]
        assert "A match has 2 rounds." in texts["other/treatment"][0]
        assert texts["boxes/treatment"][-1].endswith("Sex: female")
        assert not any("  " in text for both in texts.values() for text in both)

    def test_nothing_is_learnt_of_them(self):
        assert [example for item in self.items for example in item.examples()] == []
        with pytest.raises(DataError, match="task contexts/effects: nobody's answers are known"):
            families([Source(EFFECTS, Rows.of(CONTRASTS, "contrasts"))], 0, False)

    def test_the_published_differences_score_best(self):
        published = {row.id: row.published.difference for row in CONTRASTS}

        def mean_of(item):
            treated = item.labels["arm"] == "treatment"
            return 0.5 + treated * published[item.labels["effect"]]

        found = evaluated(self.items, self.answer(mean_of), EFFECTS)
        assert found["effect_sign",].value == 1
        assert found["effect_correlation",].value == pytest.approx(1)
        squares = sum(one**2 for one in published.values())
        slope = squares / (squares - 7 * 0.01**2)
        assert found["effect_slope",].value == pytest.approx(slope)
        assert found["effect_coverage",].value == 1
        assert found["effect_sign",].items == 14
        assert found["effect_sign", "dictator"].items == 4
        wrong = evaluated(self.items, self.answer(lambda item: 1 - mean_of(item)), EFFECTS)
        assert wrong["effect_sign",].value == 0
        assert wrong["effect_correlation",].value == pytest.approx(-1)
        assert wrong["effect_slope",].value == pytest.approx(-slope)

    def test_who_is_not_asked_both_arms_is_in_no_figure(self):
        responses = [one for one in self.answer(lambda _: 0.5) if one.item != "chat/treatment"]
        found = evaluated(self.items, responses, EFFECTS)
        assert found["effect_coverage", "public goods"].value is None
        assert found["effect_sign",].value == 0.5

    def test_measures_of_other_items_are_undefined_and_say_why(self):
        task = replace(EFFECTS, measures=("effect_sign", "log_score", "reciprocal_rank"))
        found = evaluated(self.items, self.answer(lambda _: 0.5), task)
        assert found["effect_sign",].value == 0.5
        assert "nobody's answers are known" in found["log_score",].note
        assert "it needs candidates in the notes" in found["reciprocal_rank",].note

    def test_draws_serve_as_well(self):
        responses = [
            Response.from_counts(item.id, np.ones(len(item.answers))) for item in self.items
        ]
        found = evaluated(self.items, responses, EFFECTS)
        assert found["effect_slope",].value == pytest.approx(0.0, abs=1e-9)
        assert found["effect_sign",].draws == sum(len(item.answers) for item in self.items)


def test_every_context_is_its_own_candidate():
    rows = contexts.counted(TestRetrieval.rows).rows
    asked = itertools.chain.from_iterable(
        RETRIEVAL.items(row, DEFAULT, np.random.default_rng(0)) for row in rows
    )
    for item in asked:
        assert item.notes["candidates"].count(item.labels["context"]) == 1
