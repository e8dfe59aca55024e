"""One-shot games as they are asked: names and order carry no meaning."""

import re

import numpy as np
import pytest

from befm_jax import tasks
from befm_jax.data.matrix_games import Game, Player, Trial
from befm_jax.tasks.wording import DEFAULT

TASK = tasks.get("games/matrix")
GAME = Game(((10, 21), (26, 1)), ((7, 8), (13, 3)))
OUTCOME = re.compile(
    r"If you choose (\w+) and the other person chooses (\w+), you get (\d+) and the other person "
    r"gets (\d+)\."
)


def items(choice, number=200):
    row = Player("7", tuple(Trial(str(n), GAME, choice) for n in range(number)))
    return list(TASK.items(row, DEFAULT, np.random.default_rng(0)))


@pytest.mark.parametrize("choice", [0, 1])
def test_the_prompt_the_notes_and_the_target_say_the_same(choice):
    for item in items(choice):
        outcomes = OUTCOME.findall(item.prompt[-1].text)
        assert len(outcomes) == 4
        names, others = item.answers.names, ("Star", "Moon")
        for own, other, pays, pays_other in outcomes:
            at = names.index(own), others.index(other)
            assert item.notes["payoffs"]["own"][at[0]][at[1]] == int(pays)
            assert item.notes["payoffs"]["other"][at[0]][at[1]] == int(pays_other)
        chosen = item.notes["payoffs"]["own"][int(item.target.argmax())]
        assert sorted(chosen) == sorted(GAME.own[choice])
        game = Game(item.notes["payoffs"]["own"], item.notes["payoffs"]["other"])
        assert item.notes["equilibrium"] == pytest.approx(game.equilibrium)
        assert item.labels == {"person": "7", "kind": GAME.kind}


def test_names_and_what_is_named_first_are_drawn():
    asked = items(0)
    firsts = [OUTCOME.findall(item.prompt[-1].text)[0] for item in asked]
    chosen = np.array([item.target.argmax() for item in asked])
    first_is_chosen = np.array(
        [item.answers.names[at] == own for item, at, (own, *_) in zip(asked, chosen, firsts)]  # noqa: B905
    )
    others = np.array([other == "Star" for _, other, *_ in firsts])
    for drawn in (chosen, first_is_chosen, others):
        assert 70 < drawn.sum() < 130
    # All that is said before the payoffs is the same for everybody.
    assert len({item.prompt[-1].text.split("\n")[0] for item in asked}) == 1
    assert len({item.id for item in asked}) == 200
    assert {item.answers for item in asked} == {asked[0].answers}
