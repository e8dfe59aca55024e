"""Games in rounds as they are asked: one growing conversation a person."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from befm_jax import tasks
from befm_jax.data import games
from befm_jax.data.items import AnswerSet, examples_of
from befm_jax.data.rounds import Decision, Played
from befm_jax.errors import DataError
from befm_jax.tasks import sources
from befm_jax.tasks.rounds import band
from befm_jax.tasks.wording import DEFAULT

NEXT, FIRST = (tasks.get(f"rounds/{name}") for name in ("next", "first"))
DILEMMA = Played(
    "7",
    "dilemma",
    games.get("push_pull").answers,
    {
        "reward": 6.0, "sucker": -2.0, "temptation": 8.0, "penalty": 0.0,
        "continuation": 0.875, "error": 0.0,
    },
    "treatment",
    "7",
    {"design": "treatment"},
    (
        Decision(2, 1, 0, after={"own": 0, "other": 1}),
        Decision(2, 2, 1, after={"own": 1, "other": 0}),
        Decision(5, 1, 0),
        Decision(5, 2, 0),
    ),
)  # fmt: skip
NOISY = {**DILEMMA.design, "error": 0.125}
PUBLIC_GOODS = {
    "group_size": 7, "multiplier": 3.8, "rounds": None, "all_or_nothing": False,
    "opt_out": False, "chat": False, "punishment": False, "reward": False,
}  # fmt: skip
COINS = AnswerSet.numbers(range(21), "coins")


UNKNOWN = {"total": None, "others": None, "gain": None}


def items(row, task=NEXT):
    return list(task.items(row, DEFAULT, np.random.default_rng(0)))


def played(game, answers, design, *decisions, **more):
    labels = {"design": game, **dict.fromkeys(("framing", "chat", "punishment", "reward"), "no")}
    return Played("7", game, answers, design, game, "7", labels, decisions)


def test_a_person_is_one_conversation_of_which_every_choice_is_learnt():
    asked = items(DILEMMA)
    for before, after in itertools.pairwise(asked):
        assert after.prompt[: len(before.prompt)] == before.prompt
    (example,) = examples_of(asked)
    learnt = [example.messages[at].text[start:stop] for at, start, stop in example.spans]
    assert learnt == ["[Push]", "[Pull]", "[Push]", "[Push]"]
    assert [item.notes["previous"] for item in asked] == [None, 0, 1, 0]
    assert [item.id for item in asked] == ["7/2/1", "7/2/2", "7/5/1", "7/5/2"]
    assert [item.labels["situation"] for item in asked[:2]] == [
        "treatment, round 1", "treatment, round 2",
    ]  # fmt: skip


def test_what_happened_is_told_and_what_is_not_known_is_not():
    texts = [item.prompt[-1].text for item in items(DILEMMA)]
    assert texts[1:] == [
        "The other person chose Pull.\n\nRound 2.",
        "The other person chose Push.\n\nA new match begins, with another person. Round 1.",
        "Round 2.",
    ]
    assert "87.5 percent" in texts[0]
    assert "carried out" not in texts[0]
    noisy = items(played("dilemma", DILEMMA.answers, NOISY, *DILEMMA.decisions))
    assert "12.5 percent" in noisy[0].prompt[0].text
    assert (
        noisy[1]
        .prompt[-1]
        .text.startswith("Carried out were Push for you and Pull for the other person.")
    )


def test_what_happened_before_is_a_label():
    assert [item.labels["before"] for item in items(DILEMMA)] == [
        "a match begins", "own Push, other Pull", "a match begins", "nothing told",
    ]  # fmt: skip
    coins = [Decision(1, number, at) for number, at in enumerate((0, 20, 7, 7), 1)]
    row = played("public_goods", COINS, PUBLIC_GOODS, *(replace(d, after=UNKNOWN) for d in coins))
    assert [item.labels["before"] for item in items(row)] == [
        "a match begins", "chose the least", "chose the most", "chose between",
    ]  # fmt: skip


def test_public_goods_say_what_the_design_is():
    def opening(**changed):
        row = played("public_goods", COINS, PUBLIC_GOODS | changed, Decision(1, 1, 3))
        return items(row)[0].prompt[0].text

    plain = opening()
    assert "7 people" in plain
    assert "multiplied by 3.8" in plain
    assert "put into a common fund" in plain
    assert "not told how many rounds" in plain
    for changed, said in (
        ({"opt_out": True}, "leave there"),
        ({"all_or_nothing": True}, "all of them"),
        ({"chat": True}, "write to one another"),
        ({"punishment": True}, "take coins away"),
        ({"reward": True}, "give coins"),
        ({"rounds": 12}, "There are 12 rounds."),
    ):
        assert said in opening(**changed)
        assert said not in plain


def test_public_goods_tell_what_the_group_did():
    after = {"total": 83, "others": 6, "gain": 55}
    without = {"total": 80, "others": 5, "gain": None}
    row = played(
        "public_goods", COINS, PUBLIC_GOODS,
        Decision(1, 1, 3, after=after), Decision(1, 2, 4, after=without), Decision(1, 3, 5),
    )  # fmt: skip
    assert [item.prompt[-1].text for item in items(row)[1:]] == [
        "The 7 members have 83 coins in the fund together.\nYou gained 55 coins in round 1.\n\n"
        "Round 2.",
        "The 6 members have 80 coins in the fund together.\n\nRound 3.",
    ]


@pytest.mark.parametrize(
    ("game", "decisions", "says"),
    [
        ("bomb", (Decision(1, 1, 5, after={"safe": True}), Decision(1, 2, 5)), "in none of"),
        ("bomb", (Decision(1, 1, 5, after={"safe": False}), Decision(2, 1, 5)), "once more"),
        ("dictator", (Decision(1, 1, 5), Decision(2, 1, 5)), "once more. Round 1."),
        ("ultimatum", (Decision(1, 1, 5, "offer"), Decision(1, 1, 5, "limit")), "What is the"),
        ("ultimatum", (Decision(1, 1, 5, "limit"), Decision(1, 2, 5, "offer")), "Round 2. How"),
    ],
)
def test_moblabs_rounds(game, decisions, says):
    first, second = items(played(game, COINS, {}, *decisions))
    assert first.answers.request in first.prompt[0].text
    assert says in second.prompt[-1].text
    assert set(NEXT.groups) <= set(second.labels)
    assert second.notes["previous"] == (None if game == "ultimatum" else 5)


def test_the_first_choice_alone():
    row = played(
        "public_goods", COINS, PUBLIC_GOODS, Decision(1, 1, 3, after={}), Decision(1, 2, 4)
    )
    (item,) = items(row, FIRST)
    assert (item.id, item.target.argmax(), item.notes) == ("7/1/1", 3, {"equilibrium": 0})
    pays = played("public_goods", COINS, PUBLIC_GOODS | {"multiplier": 7.5}, Decision(1, 1, 3))
    assert items(pays, FIRST)[0].notes == {"equilibrium": 20}
    assert set(FIRST.groups) <= set(item.labels)
    assert FIRST.serves(row)
    assert not FIRST.serves(DILEMMA)


def test_it_is_asked_of_public_goods_alone(tmp_path):
    table = tmp_path / "dilemmas.csv"
    table.write_text("treatment,id,game,period,choice,other.choice\nD5R40,1,1,1,c,d\n")
    (source,) = sources.select(f"rounds/next={table}", [])
    assert [item.id for item in source.items()] == ["1/1/1"]
    with pytest.raises(DataError, match="no row that rounds/first has a question for"):
        sources.select(f"rounds/first={table}", [])


def test_bands():
    assert [band(n) for n in (1, 2, 3, 5, 6, 10, 11, 20, 21, 99)] == [
        *("1", "2", "3-5", "3-5", "6-10", "6-10", "11-20", "11-20", "21+", "21+")
    ]
