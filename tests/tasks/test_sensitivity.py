"""Questions that are asked twice: what changes, and what a reader must answer then."""

import re
from dataclasses import replace

import numpy as np
import pytest

from befm_jax import tasks
from befm_jax.data import games
from befm_jax.data.items import AnswerSet
from befm_jax.data.knowledge import Question
from befm_jax.tasks import sources
from befm_jax.tasks.wording import DEFAULT

RNG = np.random.default_rng(0)


def asked(game):
    game = games.get(game) if isinstance(game, str) else game
    return {item.id: item for item in tasks.get("sensitivity").items(game, DEFAULT, RNG)}


def text(item):
    return item.prompt[-1].text


class TestGames:
    def test_every_game_is_asked_as_it_is_and_with_changes(self):
        changes = {id: [name.split("/")[1] for name in [*asked(id)][1:]] for id in games.ids()}
        many = ["endowment", "wording", "instruction"]
        assert changes == {
            "dictator": many,
            "ultimatum_proposer": many,
            "ultimatum_responder": many,
            "trust_investor": ["endowment", "multiplier", "wording", "instruction"],
            "trust_banker": ["multiplier", "invested", "wording", "instruction"],
            "public_goods": ["endowment", "return_rate", "wording", "instruction"],
            "bomb": ["boxes", "wording", "instruction"],
            "push_pull": ["labels", "order", "instruction"],
            "guessing": ["highest", "wording", "instruction"],
        }

    @pytest.mark.parametrize("id", games.ids())
    def test_a_pair_has_one_answer_set_and_another_text(self, id):
        original, *changed = asked(id).values()
        assert original.prompt == games.get(id).prompt()
        assert original.labels == {"game": id}
        texts = {text(item) for item in (original, *changed)}
        assert len(texts) == 1 + len(changed)
        for item in changed:
            assert item.answers == original.answers
            assert item.prompt[:-1] == original.prompt[:-1]
            assert item.notes["changed_from"] == id
            # A file of answers to the game must not answer the changed one.
            assert "game" not in item.labels
            assert item.target is None
            assert list(item.examples()) == []

    def test_a_fifth_of_the_endowment_leaves_a_fifth_of_the_answers(self):
        item = asked("dictator")["dictator/endowment"]
        assert text(item) == games.get("dictator").with_parameters(endowment=20).user
        assert item.notes["right"] == list(range(21))
        assert item.labels == {"change": "endowment", "question": "endowment, dictator"}

    def test_what_is_worth_nothing_is_given_to_nobody(self):
        for id in ("trust_investor/multiplier", "public_goods/return_rate"):
            assert asked(id.split("/")[0])[id].notes["right"] == [0]
        assert "multiplied by 0 on its way" in text(
            asked("trust_investor")["trust_investor/multiplier"]
        )

    def test_names_and_order_of_two_actions(self):
        """The payoffs read from the two texts, action by action."""
        push_pull = asked("push_pull")

        def read(item):
            said = text(item)
            both = re.findall(r"both (?:of you )?choose (\w+), each receives \$(\d+)", said)
            return dict(both), dict(re.findall(r"who chose (\w+) receives \$(\d+)", said))

        same = {"Push": "400", "Pull": "300"}, {"Pull": "700", "Push": "0"}
        assert read(push_pull["push_pull"]) == same
        assert read(push_pull["push_pull/order"]) == same
        other = {"Pull": "400", "Push": "300"}, {"Push": "700", "Pull": "0"}
        assert read(push_pull["push_pull/labels"]) == other
        for id, first in (("push_pull/order", "Pull"), ("push_pull/labels", "Push")):
            assert f"two actions, {first} or" in text(push_pull[id])
            assert f"brackets: [{first}] or" in text(push_pull[id])

    def test_a_users_own_game_is_asked_by_what_it_declares(self):
        own = games.Game(
            id="own", title="Own", roles=("a",), role="a", parameters={"coins": 10, "tax": 2.5},
            answers_of=lambda coins, tax: AnswerSet.numbers(range(1, coins + 1)),
            instructions=lambda coins, tax: f"You have {coins} coins; the tax is {tax}. How many?",
            payoff_of=lambda own, coins, tax: own, equilibrium_of=lambda coins, tax: 1,
        )  # fmt: skip
        # From 1 on, what is left is no answer of the set, and the tax changes no answer.
        assert list(asked(own)) == ["own", "own/coins", "own/instruction"]
        assert asked(own)["own/coins"].notes["right"] == [0, 1]

    def test_all_games_are_asked_in_every_split(self):
        (source,) = sources.select("sensitivity", games.select("dictator,push_pull"))
        assert [row.id for row in source.part("test").rows.rows] == ["dictator", "push_pull"]
        assert len(source.part("train").items()) == 8
        assert "sensitivity: 2 rows from the games as they are told" in source.describe()


class TestOptions:
    QUESTION = Question("q", "maths", "Which?", ("one", "two", "three"), (1,))

    def test_the_options_are_reversed_and_their_letters_with_them(self):
        original, changed = tasks.get("sensitivity/options").items(self.QUESTION, DEFAULT, RNG)
        assert "A. one\nB. two\nC. three" in text(original)
        assert "A. three\nB. two\nC. one" in text(changed)
        assert changed.notes["changed_from"] == original.id == "q"
        assert list(changed.notes["moved_to"]) == [2, 1, 0]
        assert list(changed.notes["as_before"]) == [0, 1, 2]
        assert (original.target, changed.target) == (None, None)

    def test_of_several_right_letters_each_moves(self):
        question = replace(self.QUESTION, several=True)
        _, changed = tasks.get("sensitivity/options").items(question, DEFAULT, RNG)
        names = changed.answers.names
        moved = {name: names[at] for name, at in zip(names, changed.notes["moved_to"], strict=True)}
        assert moved == {
            "A": "C", "B": "B", "C": "A", "AB": "BC", "AC": "AC", "BC": "AB", "ABC": "ABC",
        }  # fmt: skip

    def test_questions_in_a_fixed_order_are_left_out(self, tmp_path):
        table = tmp_path / "questions.csv"
        table.write_text("question,A,B,C,answer\nWhich?,one,two,three,B\nAnd?,x,y,both A and B,C\n")
        (source,) = sources.select(f"sensitivity/options={table}", [])
        assert [row.question for row in source.rows.rows] == ["Which?"]
        assert source.rows.left_out.counts == {"row: no question of sensitivity/options": 1}

    def test_the_packages_own_are_all_asked_twice(self):
        (source,) = sources.select("sensitivity/options", [])
        assert len({item.id for item in source.items()}) == 72
