"""Games that are played: payoffs worked by hand, draws that depend on nothing else."""

import inspect
import json
from dataclasses import replace

import numpy as np
import pytest

from befm_jax import tasks
from befm_jax.data import games
from befm_jax.data.guesses import Session
from befm_jax.data.items import AnswerSet, FreeText, Item, Message
from befm_jax.data.responses import Exact, Response, Sampled
from befm_jax.data.rounds import Decision, Played
from befm_jax.errors import DataError
from befm_jax.respondents import strategies
from befm_jax.respondents.strategies import ALL, Strategy
from befm_jax.tasks import play, repeated, sources
from befm_jax.tasks.play import RESPONDENT, Question
from befm_jax.tasks.wording import DEFAULT

FIVE = {"sucker": 0.0, "penalty": 1.0, "reward": 3.0, "temptation": 5.0}
LABELS = games.get("push_pull").answers
COINS = AnswerSet.numbers(range(21), "coins")
GROUP = {
    "group_size": 3, "multiplier": 2.0, "rounds": None, "all_or_nothing": False,
    "opt_out": False, "chat": False, "punishment": False, "reward": False,
}  # fmt: skip


def dilemma(opponent, length, recorded=(), **design):
    row = Played("7", "dilemma", LABELS, {**FIVE, **design}, "here", "7")
    rng = np.random.default_rng(0)
    return repeated.Dilemma(row, DEFAULT, opponent, length, rng, recorded)


EXACT = Exact()


def played(episode, respondent, how=EXACT):
    """The respondent's trajectory, and the moves of all others."""
    (found,) = play.play({**ALL, RESPONDENT: respondent}, [episode], how)
    own = [move for move in found.moves if move.who == RESPONDENT]
    return own, [move for move in found.moves if move.who != RESPONDENT]


def rewards(moves):
    return [move.reward for move in moves]


def answers(moves):
    return [move.answer for move in moves]


class Fixed:
    """Says the same in every question of its kind, and counts how often it is asked."""

    name = "fixed"

    def __init__(self, *shares):
        self.shares, self.asked = np.array(shares), []

    def respond(self, items, how):
        self.asked.append([item.id for item in items])
        for item in reversed(items):
            if isinstance(how, Sampled):
                assert how.n == 1
                yield Response.from_counts(item.id, np.zeros(len(self.shares)), unread=1)
            else:
                yield Response.from_mass(item.id, self.shares)

    def describe(self):
        return {"path": "fixed"}


class TestDilemma:
    def test_tit_for_tat_against_one_who_always_defects(self):
        own, other = played(dilemma("always_defect", 5), ALL["tit_for_tat"])
        assert answers(own) == ["[Push]", *["[Pull]"] * 4]
        assert rewards(own) == [0, 1, 1, 1, 1]
        assert rewards(other) == [5, 1, 1, 1, 1]
        assert [move.cooperation for move in own] == [1, 0, 0, 0, 0]

    def test_tit_for_tat_against_recorded_moves(self):
        own, other = played(dilemma("recorded", 4, (0, 1, 0, 0)), ALL["tit_for_tat"])
        assert answers(other) == ["[Push]", "[Pull]", "[Push]", "[Push]"]
        assert answers(own) == ["[Push]", "[Push]", "[Pull]", "[Push]"]
        assert rewards(own) == [3, 0, 5, 3]

    def test_with_itself_all_seats_are_the_respondents(self):
        own, other = played(dilemma("itself", 2), ALL["tit_for_tat"])
        assert not other
        assert [(move.round, move.reward) for move in own] == [(1, 3), (1, 3), (2, 3), (2, 3)]

    def test_a_generous_player_forgives_one_time_in_three(self):
        own, _ = played(dilemma("always_defect", 400), ALL["generous_tit_for_tat"])
        assert own[0].cooperation == 1
        assert np.mean([move.cooperation for move in own[1:]]) == pytest.approx(1 / 3, abs=0.06)

    @pytest.mark.parametrize(
        ("payoffs", "forgives"),
        [
            ((0, 1, 3, 5), 1 / 3),
            ((0, 300, 400, 700), 1 / 4),
            ((0, 5, 6, 7), 1 / 2),  # 1 - 1 / 6, 1 / 2
            ((0, 1, 3, 9), 0.0),  # to take turns in defecting is worth more than to cooperate
        ],
    )
    def test_how_often_it_forgives_depends_on_the_payoffs(self, payoffs, forgives):
        design = dict(zip(("sucker", "penalty", "reward", "temptation"), payoffs, strict=True))
        row = replace(repeated.dilemmas().rows[0], design={**design, "continuation": 0.5})
        episode = repeated.Dilemma(row, DEFAULT, "tit_for_tat", 2, np.random.default_rng(0))
        episode.take([0, 1])
        (_, asked), _ = episode.questions()
        (response,) = ALL["generous_tit_for_tat"].respond([asked], Exact())
        assert response.shares == pytest.approx([forgives, 1 - forgives])

    @pytest.mark.parametrize(("continuation", "lasts"), [(0.49, False), (0.51, True)])
    def test_from_the_equilibrium_no_single_defection_pays(self, continuation, lasts):
        """The threshold is (5 - 3) / (5 - 1); payoffs are discounted by the continuation."""
        rounds = 40

        def worth(defects_in):
            class Deviates(Strategy):
                def respond(self, items, how):
                    for item, answer in zip(items, super().respond(items, how), strict=True):
                        first = f"/{defects_in}/" in item.id
                        yield Response.from_mass(item.id, [0, 1]) if first else answer

            episode = dilemma("equilibrium", rounds, continuation=continuation)
            own, _ = played(episode, Deviates("equilibrium"))
            return sum(reward * continuation**at for at, reward in enumerate(rewards(own)))

        as_it_is = worth(0)
        assert as_it_is == pytest.approx((3 if lasts else 1) / (1 - continuation), rel=1e-9)
        assert all(worth(number) <= as_it_is + 1e-9 for number in (1, 2, 3, 10))
        # Where it lasts, the grim trigger was needed: with a little less it would not have held.
        lost = 5 + 1 * continuation / (1 - continuation)
        assert (lost < 3 / (1 - continuation)) == lasts

    def test_cooperation_ends_when_anybody_defects(self):
        own, _ = played(dilemma("recorded", 4, (0, 1, 0, 0), continuation=0.9), ALL["equilibrium"])
        assert [move.cooperation for move in own] == [1, 1, 0, 0]
        own, _ = played(dilemma("always_cooperate", 4), ALL["equilibrium"])
        assert [move.cooperation for move in own] == [0] * 4

    def test_where_every_move_goes_wrong_the_opposite_is_carried_out_and_told(self):
        episode = dilemma("always_defect", 2, continuation=0.5, error=1.0)
        own, _ = played(episode, ALL["always_cooperate"])
        assert [move.cooperation for move in own] == [1, 1]
        assert rewards(own) == [5, 5]
        assert "Carried out were Pull for you and Push for the other person." in own[1].asked

    def test_what_is_told_of_the_length(self):
        (told,) = dilemma("uniform", 4, rounds=4).questions()[0].item.prompt
        assert "You play 4 rounds with one other person" in told.text
        (told,) = dilemma("uniform", 4, continuation=0.75).questions()[0].item.prompt
        assert "another one follows with a probability of 75 percent" in told.text

    def test_another_game_is_refused(self):
        with pytest.raises(DataError, match="sucker 0, penalty 1, reward 6, temptation 5; they mu"):
            dilemma("uniform", 1, reward=6.0)

    def test_the_conversation_is_what_was_said_and_learnt(self):
        episode = dilemma("always_defect", 2, rounds=2)
        played_before = [question.item for question in episode.questions()]
        episode.take([0, 1])
        for item, answer, told in zip(
            (question.item for question in episode.questions()), "01", ("Pull", "Push"), strict=True
        ):
            before = played_before[int(answer)].prompt
            said = Message("assistant", LABELS.written[int(answer)])
            asked = Message("user", f"The other person chose {told}.\n\nRound 2.")
            assert item.prompt == (*before, said, asked)


class TestPublicGoods:
    def group(self, opponent, *decisions, **design):
        row = Played("7", "public_goods", COINS, {**GROUP, **design}, "here", "s", {}, decisions)
        return row, repeated.PublicGoods(row, DEFAULT, opponent, 2)

    def test_payoffs_and_what_is_learnt(self):
        _, episode = self.group("itself")
        # 45 coins become 90 and each of three gets 30.
        assert list(episode.take([20, 20, 5])) == [30, 30, 45]
        asked = episode.questions()[2].item.prompt[-1].text
        assert asked.startswith("The 3 members have 45 coins in the fund together.")
        assert "You gained 45 coins in round 1." in asked

    def test_tit_for_tat_gives_what_the_others_gave(self):
        _, episode = self.group("always_cooperate")
        episode.take([20, 3, 8])
        notes = episode.questions()[0].item.notes
        assert notes["others"] == pytest.approx(11 / 2 / 20)
        (answer,) = ALL["tit_for_tat"].respond([episode.questions()[0].item], Exact())
        assert answer.weights[5] == 1  # the lesser of 5 and 6

    def test_the_equilibrium_is_to_give_where_a_coin_returns_more_than_itself(self):
        for multiplier, gives in ((2.9, 0), (3.1, 20)):
            _, episode = self.group("always_defect", multiplier=multiplier)
            own, _ = played(episode, ALL["equilibrium"])
            assert answers(own) == [f"[{gives}]"] * 2

    def test_the_rest_of_the_group_puts_in_what_it_did(self):
        decisions = [
            Decision(1, 1, 4, after={"total": 31, "others": 2, "gain": 37}),
            Decision(1, 2, 20, after={"total": 20, "others": 2, "gain": 13}),
        ]
        row, _ = self.group("recorded", *decisions)
        assert repeated.can_be_replaced(row)
        rng = np.random.default_rng(0)
        recorded, itself = repeated.in_peoples_place(row, DEFAULT, rng)
        own, others = played(recorded, ALL["always_defect"])
        assert answers(others) == ["[20]", "[7]", "[0]", "[0]"]
        assert rewards(own) == pytest.approx([20 + 27 * 2 / 3, 20])
        assert repeated.observed([row]) == [
            (row.person, "here", 1, 0.2), (row.person, "here", 2, 1.0),
        ]  # fmt: skip
        # As the person did, the gain is the recorded one.
        assert round(20 - 4 + 31 * 2 / 3) == 37
        own, others = played(itself, ALL["always_cooperate"])
        assert (len(own), others) == (6, [])

    @pytest.mark.parametrize(
        "change",
        [{"total": None}, {"total": 45}, {"total": 3}, {"others": 1}],
    )
    def test_a_group_that_is_not_known_is_not_replayed(self, change):
        after = {"total": 31, "others": 2, "gain": 37, **change}
        row, _ = self.group("recorded", Decision(1, 1, 4, after=after))
        assert not repeated.can_be_replaced(row)

    def test_with_chat_or_without_a_first_round_nobody_can_be_replaced(self):
        known = {"total": 31, "others": 2, "gain": 37}
        row, _ = self.group("recorded", Decision(1, 1, 4, after=known), chat=True)
        assert not repeated.can_be_replaced(row)
        row, _ = self.group("recorded", Decision(1, 2, 4, after=known))
        assert not repeated.can_be_replaced(row)


class TestGuessing:
    def test_who_wins_against_a_loop(self):
        rng = np.random.default_rng(1)
        session = Session("1", games.get("guessing"))
        for _ in range(12):
            numbers = rng.integers(0, 12, 16).tolist()
            episode = repeated.Guessing(session, DEFAULT, "uniform", 2)
            found = episode.take(numbers)
            # In whole numbers: 48 times the distance from 2/3 of the average of 16.
            distances = [abs(48 * number - 2 * sum(numbers)) for number in numbers]
            winners = [d == min(distances) for d in distances]
            expected = [won / sum(winners) for won in winners]
            assert found == pytest.approx(expected)
            (told,) = episode.questions()[0].item.prompt[-1:]
            assert f"The average of all numbers was {sum(numbers) / 16:.2f}, and 2/3" in told.text
            won = {0.0: "Another number", 1.0: "you won the prize"}.get(expected[0], "a share of")
            assert won in told.text

    def test_levels_go_by_the_average_of_the_round_before(self):
        session = Session("1", games.get("guessing"))
        episode = repeated.Guessing(session, DEFAULT, "level_1", 3)
        own, others = played(episode, ALL["level_2"])
        # All others at 33, 2/3 of 50; level 2 at 22, 4/9 of it: the average is 517 / 16.
        assert answers(own) == ["[22]", "[14]", "[10]"]
        assert answers(others)[::15] == ["[33]", "[22]", "[14]"]
        assert rewards(own) == [1, 1, 1]

    def test_one_round_among_people_is_the_game_as_it_is(self):
        guesses = np.zeros(101, int)
        guesses[[10, 90]] = 3, 1
        session = Session("1", games.get("guessing"), tuple(guesses.tolist()))
        (episode,) = repeated.guessing(session, DEFAULT, np.random.default_rng(0))
        questions = episode.questions()
        assert questions[0].item.prompt == games.get("guessing").prompt()
        _, others = played(episode, ALL["equilibrium"])
        assert len(others) == 15
        assert set(answers(others)) == {"[10]", "[90]"}


class TestPlay:
    def test_all_episodes_of_a_round_are_asked_together(self):
        respondent = Fixed(0.5, 0.5)
        episodes = [replaced(dilemma("uniform", rounds), str(rounds)) for rounds in (1, 3, 2)]
        play.play({**ALL, RESPONDENT: respondent}, episodes, Exact())
        assert [len(asked) for asked in respondent.asked] == [3, 2, 1]

    def test_draws_depend_on_the_seed_and_on_no_other_episode(self):
        source = sources.select("play/dilemma", [])[0].limited(4)
        who = {**ALL, RESPONDENT: Fixed(0.3, 0.7)}
        everything = play.play(who, source.episodes(5), Exact(), 5)
        assert play.play(who, source.episodes(5), Exact(), 5) == everything
        assert play.play(who, source.episodes(6), Exact(), 6) != everything
        last = replace(source, rows=replace(source.rows, rows=source.rows.rows[-1:]))
        alone = play.play(who, reversed_of(last.episodes(5)), Exact(), 5)
        assert alone == everything[-len(alone) :][::-1]
        assert len({tuple(map(tuple, map(answers, [one.moves]))) for one in everything}) > 10

    def test_draws_follow_the_shares(self):
        own, _ = played(dilemma("uniform", 400), Fixed(0.3, 0.7))
        assert np.mean([move.cooperation for move in own]) == pytest.approx(0.3, abs=0.06)
        assert [move.outside for move in own[:2]] == [0, 0]

    def test_what_cant_be_read_is_drawn_and_counted(self):
        own, _ = played(dilemma("uniform", 400), Fixed(0, 0), Sampled(7))
        assert {move.outside for move in own} == {1}
        assert {move.unread for move in own} == {1}
        assert np.mean([move.cooperation for move in own]) == pytest.approx(0.5, abs=0.07)

    def test_two_respondents_play_with_each_other(self):
        (found,) = play.play(
            {RESPONDENT: Fixed(1, 0), "another": Fixed(0, 1)}, [dilemma("another", 2)], Exact()
        )
        assert [(move.who, move.reward) for move in found.moves] == [
            (RESPONDENT, 0), ("another", 5), (RESPONDENT, 0), ("another", 5),
        ]  # fmt: skip

    def test_errors(self):
        with pytest.raises(DataError, match="two episodes have the same id"):
            play.play(ALL, [dilemma("uniform", 1), dilemma("uniform", 1)], Exact())
        with pytest.raises(DataError, match="unknown player 'nobody'"):
            play.play({RESPONDENT: Fixed(1, 0)}, [dilemma("nobody", 1)], Exact())

        class Writing:
            id, labels = "1", {}

            def questions(self):
                item = Item("1", (Message("user", "Say something."),), FreeText())
                return [Question("writer", item)]

        class Writer(Fixed):
            def respond(self, items, how):
                yield Response("1", None, exact=False, draws=1, texts=("Something.",))

        with pytest.raises(DataError, match="free text can't be played"):
            play.play({"writer": Writer()}, [Writing()], Exact())

    def test_trajectories_are_read_as_they_were_written(self, tmp_path):
        own = play.play({**ALL, RESPONDENT: Fixed(0.5, 0.5)}, [dilemma("uniform", 3)], Exact())
        path = tmp_path / "own.jsonl"
        play.write(path, own, {"path": "ü"}, Exact())
        head, found = play.read(path)
        assert found == own
        assert head["respondent"] == {"path": "ü"}
        assert len(path.read_text().splitlines()) == 2
        path.write_text(path.read_text().replace('"asked"', '"aksed"'))
        with pytest.raises(DataError, match=r"own\.jsonl:2: not a trajectory"):
            play.read(path)
        path.write_text(json.dumps({"schema": "another"}))
        with pytest.raises(DataError, match=r"own\.jsonl:1: schema is 'another'"):
            play.read(path)


def replaced(episode, id):
    episode.id = id
    return episode


def reversed_of(episodes):
    return list(reversed(episodes))


class TestTasks:
    @pytest.mark.parametrize("name", ["play/dilemma", "play/public_goods", "play/guessing"])
    def test_the_packages_sessions(self, name):
        source = sources.select(name, [])[0].limited(2)
        episodes = source.episodes()
        assert {one.labels["opponent"] for one in episodes} <= {*strategies.DEFINITIONS, "itself"}
        openings = source.items()
        assert openings
        assert all(item.target is None for item in openings)
        asked = [q.item.prompt for one in episodes for q in one.questions() if q.who == RESPONDENT]
        assert [item.prompt for item in openings] == asked

    def test_there_is_nothing_to_learn_and_no_table_to_read(self, tmp_path):
        (source,) = sources.select("play/dilemma", [])
        with pytest.raises(DataError, match="play/dilemma is played; there is nothing to learn"):
            source.family()
        with pytest.raises(DataError, match="play/dilemma: it reads no table; play/people does"):
            sources.select(f"play/dilemma={tmp_path}", [])

    def test_in_the_place_of_the_people_of_a_table(self, tmp_path):
        path = tmp_path / "rounds.csv"
        choices = {"a": "cdc", "b": "d"}
        path.write_text(
            "treatment,id,game,period,choice,other.choice\n"
            + "".join(
                f"D75R40,{person},1,{number},{choice},d\n"
                for person, made in choices.items()
                for number, choice in enumerate(made, 1)
            )
            # Without its first round, a match is not played.
            + "D75R40,c,3,2,c,c\n"
        )
        (source,) = sources.select(f"play/people={path}", [])
        assert source.rows.left_out.counts == {"row: no question of play/people": 1}
        found = play.play({**ALL, RESPONDENT: ALL["tit_for_tat"]}, source.episodes(), Exact())
        by_id = {one.episode: one for one in found}
        assert list(by_id) == ["a/recorded", "a/itself", "b/recorded", "b/itself"]
        partner = [m.answer for m in by_id["a/recorded"].moves if m.who == "recorded"]
        assert partner == ["[Push]", "[Pull]", "[Push]"]
        assert [len(one.moves) for one in found] == [6, 6, 2, 2]
        setting = "continuation 0.75, reward 40"
        assert repeated.observed(source.rows.rows) == [
            ("a", setting, 1, 1), ("a", setting, 2, 0), ("a", setting, 3, 1), ("b", setting, 1, 0),
        ]  # fmt: skip

    def test_lengths_are_drawn_by_the_probability_to_go_on(self):
        (source,) = sources.select("play/dilemma", [])
        rounds = [one.rounds for one in source.episodes()]
        assert all(len(set(rounds[at : at + 7])) == 1 for at in range(0, len(rounds), 7))
        # The mean of 50 geometric lengths of mean 5 and standard deviation 4.5.
        assert (len(rounds), np.mean(rounds)) == (350, pytest.approx(5, abs=2))

    def test_the_example_of_other_payoffs(self, tmp_path):
        """That of the module's docstring, in a file as a user would have it."""
        example = inspect.cleandoc(repeated.__doc__.split("of your own:\n")[1])
        (tmp_path / "mine.py").write_text(example)
        try:
            (source,) = sources.select(str(tmp_path / "mine.py"), [])
            episode = source.limited(1).episodes()[1]
            assert episode.labels["opponent"] == "always_defect"
            assert "each gets 3" in episode.questions()[0].item.prompt[0].text
            assert list(episode.take([0, 1])) == [0, 5]
        finally:
            tasks._REGISTRY.pop("play/mine", None)
