"""Games: what the library's games pay and predict, how a user adds one."""

import inspect
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from befm_jax.data import games
from befm_jax.data.games import Game
from befm_jax.data.items import AnswerSet, Message
from befm_jax.errors import DataError

RANGES = {
    "dictator": (0, 100),
    "ultimatum_proposer": (0, 100),
    "ultimatum_responder": (0, 100),
    "trust_investor": (0, 100),
    "trust_banker": (0, 150),
    "public_goods": (0, 20),
    "bomb": (0, 100),
    "push_pull": (0, 1),
    "guessing": (0, 100),
}
WITH_PEOPLE = list(RANGES)[:7]

FILE = """
from befm_jax.data.games import AnswerSet, Game, register

def declare(id, top):
    return Game(
        id=id, title=id, roles=("a",), role="a", parameters={"top": top},
        answers_of=lambda top: AnswerSet.numbers(range(top + 1), "coins"),
        instructions=lambda top: "How many? " + AnswerSet.numbers(range(top + 1), "coins").request,
        payoff_of=lambda own, top: own, equilibrium_of=lambda top: top,
    )
"""


@pytest.fixture
def _registry():
    """Leave no game of a test behind for another."""
    before = dict(games._REGISTRY)
    yield
    games._REGISTRY.clear()
    games._REGISTRY.update(before)


class TestLibrary:
    def test_ids_and_answers_are_those_of_the_design(self):
        assert games.ids()[:9] == list(RANGES)
        for id, (low, high) in RANGES.items():
            game = games.get(id)
            assert game.values.dtype == np.int64
            np.testing.assert_array_equal(game.values, np.arange(low, high + 1))
            assert game.span == high - low
            assert game.equilibrium in game.values
            assert (game.reference is not None) == (id in WITH_PEOPLE)

    @pytest.mark.parametrize("id", RANGES)
    def test_a_prompt_is_short_and_ends_with_the_form_of_the_answer(self, id):
        game = games.get(id)
        assert 50 <= len(game.user.split()) <= 110
        assert game.user.endswith(game.answers.request)
        assert game.prompt() == (Message("system", games.SYSTEM), Message("user", game.user))
        example = game.example(game.equilibrium, 3)
        assert example.messages[:-1] == game.prompt()
        assert example.weight == 3

    @pytest.mark.parametrize("id", RANGES)
    def test_payoffs_say_what_they_are(self, id):
        assert inspect.getdoc(games.get(id).payoff_of)

    def test_payoffs_are_those_worked_out_by_hand(self):
        pay = {id: games.get(id).payoff for id in RANGES}
        assert pay["dictator"](30) == 70
        assert pay["ultimatum_proposer"](40, 40) == 60
        assert pay["ultimatum_proposer"](40, 41) == 0
        assert pay["ultimatum_responder"](40, 40) == 40
        assert pay["ultimatum_responder"](threshold=41, offer=40) == 0
        assert pay["trust_investor"](50, 75) == 125
        assert pay["trust_banker"](60) == 90
        assert pay["public_goods"](12, 8) == 18
        assert pay["public_goods"](0, 60) == 50
        assert pay["bomb"](25) == 18.75
        assert [pay["push_pull"](*pair) for pair in ((0, 0), (0, 1), (1, 0), (1, 1))] == [
            *(400, 0, 700, 300)
        ]
        # 15 others at 30 and one at 20: the target is 19.58.
        assert pay["guessing"](20, [30] * 15) == 100
        assert pay["guessing"](30, [20] * 15) == 0
        assert pay["guessing"](20, [20] * 15) == 100 / 16


class TestEquilibrium:
    @staticmethod
    def best(game: Game, *others) -> list[int]:
        """The answers that pay most against the others, by trying them all."""
        payoffs = [game.payoff(int(value), *others) for value in game.values]
        return [int(v) for v, p in zip(game.values, payoffs, strict=True) if p == max(payoffs)]

    @pytest.mark.parametrize("id", ["dictator", "bomb", "trust_banker"])
    def test_games_of_one_decision(self, id):
        game = games.get(id)
        assert self.best(game) == [game.equilibrium]

    def test_public_goods_zero_is_best_whatever_the_others_do(self):
        game = games.get("public_goods")
        assert all(self.best(game, total) == [0] for total in range(61))
        generous = game.with_parameters(return_rate=1.25)
        assert all(self.best(generous, total) == [generous.equilibrium] for total in range(61))

    def test_push_pull_pull_is_best_whatever_the_other_does(self):
        game = games.get("push_pull")
        assert [self.best(game, other) for other in (0, 1)] == [[1], [1]]
        assert game.answers.written[game.answers.position(game.equilibrium)] == "[Pull]"
        with pytest.raises(DataError, match="neither Push nor Pull"):
            game.with_parameters(both_push=800)

    def test_ultimatum_neither_gains_by_another_choice(self):
        proposer, responder = games.get("ultimatum_proposer"), games.get("ultimatum_responder")
        assert self.best(proposer, responder.equilibrium) == [proposer.equilibrium]
        # Subgame-perfect: the limit is a best answer to every offer, made or not.
        assert all(responder.equilibrium in self.best(responder, offer) for offer in range(101))

    def test_trust_sending_nothing_is_best_where_nothing_comes_back(self):
        investor, banker = games.get("trust_investor"), games.get("trust_banker")
        assert self.best(investor, banker.equilibrium) == [investor.equilibrium]

    def test_guessing_only_zero_and_one_hold_still(self):
        game = games.get("guessing")
        still = [common for common in range(101) if common in self.best(game, [common] * 15)]
        assert still == [0, 1]
        assert game.equilibrium == 0

    def test_guessing_pays_as_the_rule_in_exact_fractions(self):
        generator = np.random.default_rng(0)
        for numbers in generator.integers(0, 101, (200, 16)).tolist():
            target = Fraction(2, 3) * sum(numbers) / 16
            distances = [abs(number - target) for number in numbers]
            share = 100 / distances.count(min(distances))
            due = share if distances[0] == min(distances) else 0
            assert games.get("guessing").payoff(numbers[0], numbers[1:]) == pytest.approx(due)


class TestParameters:
    def test_answers_prompt_and_prediction_follow(self):
        small = games.get("bomb").with_parameters(boxes=20)
        assert (small.span, small.equilibrium) == (20, 10)
        assert "20 closed boxes" in small.user
        assert "from 0 to 20" in small.user
        banker = games.get("trust_banker").with_parameters(invested=100, multiplier=1.15)
        assert banker.span == 115
        assert "$115" in banker.user

    def test_the_human_reference_holds_only_where_they_played(self):
        dictator = games.get("dictator")
        assert dictator.with_parameters(endowment=100).reference == "dictator"
        assert dictator.with_parameters(endowment=10).reference is None

    def test_an_unknown_or_impossible_parameter_is_an_error(self):
        dictator = games.get("dictator")
        with pytest.raises(DataError, match="'endowmnt': did you mean 'endowment'"):
            dictator.with_parameters(endowmnt=10)
        with pytest.raises(DataError, match="two answers or more"):
            dictator.with_parameters(endowment=-1)
        with pytest.raises(DataError, match="dictator: 'float'"):
            dictator.with_parameters(endowment=9.5)
        with pytest.raises(DataError, match="not between 0 and the endowment"):
            games.get("trust_banker").with_parameters(invested=101)


@pytest.mark.usefixtures("_registry")
class TestUserGames:
    def test_the_documented_example_loads_end_to_end(self, tmp_path: Path):
        example = games.__doc__.split("loads:\n")[1]
        path = tmp_path / "my_games.py"
        path.write_text(inspect.cleandoc(example))
        (game,) = games.select(str(path))
        assert games.get("coin_gift") is game
        assert (game.span, game.equilibrium, game.payoff(3)) == (10, 0, 7)
        assert game.example(4).messages[-1].text == "[4]"
        assert games.ids()[-1] == "coin_gift"

    def test_registered_games_and_those_at_module_level_are_both_found(self, tmp_path):
        path = tmp_path / "two.py"
        path.write_text(
            "from befm_jax.data.game_library import register\n"
            f"{FILE}\nregister(declare('one', 3))\nLEFT = declare('two', 4)\n"
            "from befm_jax.data.games import get\nOURS = get('bomb')\n"
        )
        assert [game.id for game in games.load_file(path)] == ["one", "two"]
        # Loading the file again is no conflict, and gives its games again.
        assert [game.id for game in games.select([str(path), "one", "bomb"])] == [
            *("one", "two", "bomb")
        ]

    @pytest.mark.parametrize(
        ("code", "says"),
        [
            ("x = 1\n", "no game in it"),
            ("x = 1\ny = 1 / 0\n", r"bad\.py:2: ZeroDivisionError"),
            ("x = 1\ny = (\n", r"bad\.py:2: SyntaxError"),
            (
                FILE + "register(declare('new', 3))\nregister(declare('bomb', 3))\n",
                r":\d+: .*'bomb'",
            ),
            (FILE + "declare('new', -1)\n", "game new: .*two answers or more"),
            (FILE + "declare('a.b', 1)\n", "an id has letters"),
            # One answer only: refused where it is declared, not after a model was asked.
            (FILE + "declare('new', 0)\n", r"bad\.py:\d+: game new: .*two answers or more"),
        ],
    )
    def test_a_bad_file_is_an_error_with_its_line_and_registers_nothing(self, tmp_path, code, says):
        path = tmp_path / "bad.py"
        path.write_text(code)
        before = games.ids()
        with pytest.raises(DataError, match=says):
            games.load_file(path)
        assert games.ids() == before

    def test_a_file_that_is_not_there_is_an_error(self):
        with pytest.raises(DataError, match=r"nowhere\.py: no such file"):
            games.select("nowhere.py")

    def test_functions_that_do_not_fit_the_parameters_are_refused(self):
        with pytest.raises(DataError, match=r"game odd: .*unexpected keyword argument 'top'"):
            Game(
                id="odd",
                title="Odd",
                roles=("a",),
                role="a",
                parameters={"top": 3},
                answers_of=lambda: AnswerSet.numbers(range(4)),
                instructions=lambda top: "?",
                payoff_of=lambda own, top: own,
                equilibrium_of=lambda top: 0,
            )

    def test_one_id_is_one_game(self):
        bomb = games.get("bomb")
        assert games.register(bomb) is bomb
        with pytest.raises(DataError, match="'bomb' exists already"):
            games.register(bomb.with_parameters(boxes=10))


class TestSelect:
    def test_all_and_lists(self):
        assert [game.id for game in games.select("all")] == games.ids()
        assert [game.id for game in games.select("bomb, dictator,bomb")] == ["bomb", "dictator"]
        assert [game.id for game in games.select(["public_goods"])] == ["public_goods"]

    def test_a_misspelt_id_names_the_near_ones(self):
        with pytest.raises(DataError, match="unknown game 'dictater': did you mean 'dictator'"):
            games.select("bomb,dictater")
        with pytest.raises(DataError, match="no games asked for"):
            games.select(" , ")
