"""Figures of games that were played, against loops over the moves."""

import numpy as np
import pytest

from befm_jax import tasks
from befm_jax.evals import play as evals
from befm_jax.evals.play import People
from befm_jax.tasks.play import RESPONDENT, Move, Trajectory
from befm_jax.tasks.repeated import Observed

TASK = tasks.get("play/people")


def made_up(seed=0, episodes=60, opponents=("recorded", "itself")):
    """Episodes of several lengths, one of another setting in three."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(episodes):
        for opponent in opponents:
            moves = []
            for at in range(1, int(rng.integers(2, 5))):
                for who in (RESPONDENT, RESPONDENT if opponent == "itself" else opponent):
                    id, level = f"{number}/{opponent}/{at}/{len(moves)}", float(rng.random() < 0.6)
                    payoff = float(rng.normal(10, 3))
                    moves.append(Move(at, id, who, "asked", "[Push]", payoff, level, 0.25, at % 2))
            labels = {"opponent": opponent, "setting": "b" if number % 3 else "a"}
            found.append(Trajectory(f"{number}/{opponent}", labels, tuple(moves)))
    return found


OBSERVED = [
    Observed(str(person), setting, at, level)
    for setting in "ab"
    for at in range(1, 5)
    for person, level in enumerate((0.0, 1.0, 1.0 if setting == "a" else 0.0, at / 4))
]


def evaluated(played, **more):
    people = more.pop("people", People.of(OBSERVED))
    resamples = more.pop("resamples", 400)
    return evals.evaluate(
        TASK, played, respondent="model", people=people, resamples=resamples, **more
    )


def figure(evaluation, measure, **where):
    (found,) = (one for one in evaluation.figures if one.measure == measure and one.where == where)
    return found


def own_moves(played, opponent, at=None):
    return [
        (one.labels["setting"], move)
        for one in played
        for move in one.moves
        if one.labels["opponent"] == opponent
        and move.who == RESPONDENT
        and at in (None, move.round)
    ]


def peoples(setting, at):
    return np.mean([o.cooperation for o in OBSERVED if (o.setting, o.round) == (setting, at)])


def distance(moves):
    total = 0.0
    for cell in {(setting, move.round) for setting, move in moves}:
        levels = [move.cooperation for setting, move in moves if (setting, move.round) == cell]
        total += len(levels) * abs(np.mean(levels) - peoples(*cell))
    return total / len(moves)


def test_figures_against_loops():
    played = made_up()
    found = evaluated(played)
    parts = {}
    for opponent in ("recorded", "itself"):
        moves = own_moves(played, opponent)
        games = sum(move.round == 1 for _, move in moves)
        parts[opponent] = {
            "payoff": np.mean([move.reward for _, move in moves]),
            "total_payoff": sum(move.reward for _, move in moves) / games,
            "cooperation": np.mean([move.cooperation for _, move in moves]),
            "cooperation_distance": distance(moves),
        }
        for measure, value in parts[opponent].items():
            assert figure(found, measure, opponent=opponent).value == pytest.approx(value)
        own = figure(found, "cooperation", opponent=opponent)
        assert own.ceiling == pytest.approx(np.mean([peoples(s, m.round) for s, m in moves]))
        assert (own.items, own.outside) == (len(moves), pytest.approx(0.25))
        assert own.unread == sum(move.round % 2 for _, move in moves)
        for at in (1, 2, 3):
            moves = own_moves(played, opponent, at)
            by_round = figure(found, "cooperation", round=f"{opponent}, round {at}")
            assert by_round.value == pytest.approx(np.mean([m.cooperation for _, m in moves]))
            assert by_round.ceiling == pytest.approx(np.mean([peoples(s, at) for s, _ in moves]))
            whole = figure(found, "total_payoff", round=f"{opponent}, round {at}")
            assert (whole.value, whole.ci95) == (None, None)
            assert whole.note == "undefined: a round is no whole game"
            apart = figure(found, "cooperation_distance", round=f"{opponent}, round {at}")
            assert apart.value == pytest.approx(distance(moves))
    for measure in TASK.measures:
        mean = np.mean([of[measure] for of in parts.values()])
        assert figure(found, measure).value == pytest.approx(mean)
    assert found.distributions == []


def test_intervals_are_of_whole_episodes():
    """Every episode repeats one payoff in all its rounds: there are as many facts as episodes."""
    rng = np.random.default_rng(0)
    payoffs = rng.normal(0, 1, 200)
    played = [
        Trajectory(
            str(number),
            {"opponent": "recorded", "setting": "a"},
            tuple(
                Move(at, f"{number}/{at}", RESPONDENT, "asked", "[Push]", payoff, 1.0, 0.0)
                for at in range(1, 11)
            ),
        )
        for number, payoff in enumerate(payoffs.tolist())
    ]
    low, high = figure(evaluated(played, resamples=2000), "payoff").ci95
    error = payoffs.std() / np.sqrt(len(payoffs))
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_where_nobody_is_known_nothing_is_compared():
    found = evaluated(made_up(episodes=5), people=People())
    own = figure(found, "cooperation_distance")
    assert (own.value, own.floor, own.ci95) == (None, None, None)
    assert figure(found, "cooperation").ceiling is None
    assert figure(found, "payoff").value is not None


def test_people_among_people_win_a_round_as_often_as_each_other():
    played = [
        Trajectory(
            f"{number}/{opponent}",
            {"opponent": opponent, "setting": "2/3 of the average"},
            tuple(
                Move(1, f"{number}/{opponent}/{seat}", who, "asked", "[3]", 0.5, None, 0.0)
                for seat, who in enumerate((RESPONDENT, *[opponent] * 15))
            ),
        )
        for number in range(8)
        for opponent in ("recorded", "level_1")
    ]
    found = evals.evaluate(
        tasks.get("play/guessing"), played, respondent="model", people=People(), resamples=20
    )
    assert figure(found, "rounds_won", opponent="recorded").ceiling == pytest.approx(1 / 16)
    assert figure(found, "rounds_won", opponent="level_1").ceiling is None


def test_others_in_the_same_place_stand_beside():
    played, others = made_up(), made_up(seed=1)
    found = evaluated(played, beside={"another": others})
    theirs = evaluated(others)
    for own in found.figures:
        expected = figure(theirs, own.measure, **own.where).value
        known = None if expected is None else pytest.approx(expected)
        assert own.beside == {"another": known}


def test_the_floor_is_what_people_are_apart_from_people():
    """Against a loop: of one cell, a choice of each of 25 people and all the choices of 40 others.

    Each has made one choice, or ten of which all are the same: then 40 people aren't 400.
    """
    rng = np.random.default_rng(1)
    levels = (rng.random(40) < 0.3).astype(float)
    for times in (1, 10):
        people = People.of(
            Observed(str(person), "a", 1, level)
            for person, level in enumerate(levels)
            for _ in range(times)
        )
        found = people.floor([("a", "1")] * 25, np.random.default_rng(0))
        many = people.floor([("a", "1")] * 4000, np.random.default_rng(0))
        differences = [
            [abs(rng.choice(levels, n).mean() - rng.choice(levels, 40).mean()) for n in (25, 4000)]
            for _ in range(2000)
        ]
        assert (found, many) == pytest.approx(np.mean(differences, 0), rel=0.15)
    assert np.isnan(people.floor([("a", "1"), ("b", "1")], np.random.default_rng(0)))


def test_later_rounds_are_one():
    people = People.of(
        Observed("me", "a", at, level) for at, level in ((21, 0.0), (40, 1.0), (20, 0.0))
    )
    assert people.mean(("a", "21+")) == 0.5
    assert people.mean(("a", "20")) == 0.0
