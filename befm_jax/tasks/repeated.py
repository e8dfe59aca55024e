"""The tasks that are played: repeated games against strategies, itself and people's recorded moves.

- `play/dilemma`: a prisoner's dilemma that goes on after each round with a probability of 0.8;
- `play/public_goods`: ten rounds of a public goods game in a group of four;
- `play/guessing`: four rounds of the guessing game among sixteen, with the results told; with a
  table of people's first numbers (`befm_jax.data.guesses`), one round among people;
- `play/people`: in a person's place, in the games of a table of rounds (`befm_jax.data.rounds`):
  repeated dilemmas, and public goods without chat, punishment and reward.

An opponent is a strategy (`befm_jax.respondents.strategies`) in all other places; "itself", the
respondent in all of them; or "recorded": in a dilemma the partner makes the moves that the person
made in one match, in public goods the others contribute what the person's group did, and neither
reacts.  Each of a person's games has the length of the recorded match.

In a table of rounds people's cooperation in the same setting (treatment, or design of public goods)
and round is known, and stands beside the respondent's.  People played with people, so it is
compared where the respondent plays with itself or with what is recorded.

For other payoffs, replace the design in a file of your own:

    from dataclasses import replace
    from befm_jax.tasks import register, repeated

    MINE = {"reward": 3, "sucker": 0, "temptation": 5, "penalty": 1, "continuation": 0.9}

    def mine(row, wording, rng):
        yield from repeated.dilemma(replace(row, design=MINE), wording, rng)

    register(repeated.played("play/mine", mine, needs="dilemma_sessions"))
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from befm_jax.data import games
from befm_jax.data.games import Game
from befm_jax.data.guesses import SESSIONS, Session
from befm_jax.data.items import AnswerSet, Item, Message
from befm_jax.data.rounds import COINS, Decision, Played
from befm_jax.data.rows import Rows
from befm_jax.errors import DataError
from befm_jax.tasks import Task, register
from befm_jax.tasks.play import RESPONDENT, Episode, Question
from befm_jax.tasks.wording import Wording

ITSELF, RECORDED = "itself", "recorded"
COOPERATORS = (
    *("always_cooperate", "always_defect", "tit_for_tat", "generous_tit_for_tat"),
    *("equilibrium", "uniform"),
)
GUESSERS = ("level_1", "level_2", "equilibrium", "uniform")
_CONTINUATION, _ROUNDS, _GUESSING_ROUNDS = 0.8, 10, 4
# Later rounds are one in figures: few matches are as long.
_LAST = 20


class Simultaneous(ABC):
    """A game of rounds in which everybody chooses at the same moment (an `Episode`).

    Args:
        id: unique in its task.
        labels: opponent, setting.
        seats: the names of those who play; a name may have several seats.
        rounds: how many are played.
        answers: the choices in every round.
    """

    def __init__(
        self,
        id: str,
        labels: Mapping[str, str],
        seats: Sequence[str],
        rounds: int,
        answers: AnswerSet,
    ) -> None:
        self.id, self.labels, self.seats, self.answers = id, labels, tuple(seats), answers
        self.rounds = rounds
        # By round, the position of everybody's choice as it was carried out, and the rewards.
        self.history: list[tuple[int, ...]] = []
        self.rewards: list[tuple[float, ...]] = []
        self._conversations: list[tuple[Message, ...]] = [()] * len(seats)
        self._questions: list[Question] = []

    def questions(self) -> Sequence[Question]:
        """A question a seat; see `Episode`."""
        if not self._questions and len(self.history) < self.rounds:
            number = len(self.history) + 1
            for seat, (who, before) in enumerate(zip(self.seats, self._conversations, strict=True)):
                prompt = (*before, *self.messages(seat))
                id = f"{self.id}/{number}/{seat + 1}"
                item = Item(id, prompt, self.answers, None, self.labels, self.notes(seat))
                self._questions.append(Question(who, item))
        return self._questions

    def take(self, answers: Sequence[int]) -> Sequence[float]:
        """Carries the choices out; see `Episode`."""
        self._conversations = [
            (*item.prompt, Message("assistant", self.answers.written[answer]))
            for (_, item), answer in zip(self.questions(), answers, strict=True)
        ]
        self._questions = []
        self.history.append(self.carried_out(answers))
        self.rewards.append(self.payoffs(self.history[-1]))
        return self.rewards[-1]

    def carried_out(self, answers: Sequence[int]) -> tuple[int, ...]:
        """What becomes of everybody's choices."""
        return tuple(answers)

    @abstractmethod
    def messages(self, seat: int) -> tuple[Message, ...]:
        """What a seat is told before its next choice."""

    @abstractmethod
    def payoffs(self, choices: tuple[int, ...]) -> tuple[float, ...]:
        """Everybody's reward in a round."""

    @abstractmethod
    def notes(self, seat: int) -> Mapping[str, Any]:
        """What strategies in a seat go by."""


class Cooperating(Simultaneous):
    """A game in which a choice is more or less cooperative.

    Args:
        row: the game and its parameters.
        wording: the texts.
        opponent: who has the other seats: the name of a strategy, `ITSELF` or `RECORDED`.
        players: how many seats there are; the respondent has the first.
        recorded: by round, what the others chose; () where that is not known.
        rounds: how many are played.
    """

    def __init__(
        self,
        row: Played,
        wording: Wording,
        opponent: str,
        players: int,
        recorded: Sequence[Sequence[int]],
        rounds: int,
    ) -> None:
        other = RESPONDENT if opponent == ITSELF else opponent
        super().__init__(
            f"{row.person}/{opponent}",
            {"opponent": opponent, "setting": _setting(row)},
            (RESPONDENT, *[other] * (players - 1)),
            rounds,
            row.answers,
        )
        self.row, self.wording, self.recorded = row, wording, recorded
        self._design = tuple(row.design.items())
        self.cooperation = _cooperation(row)

    def messages(self, seat: int) -> tuple[Message, ...]:
        """The opening, or what the seat learnt in the round before."""
        number = len(self.history)
        if not number:
            return _told(self.wording, self.opening, self._design, self.answers)
        name = f"rounds/{self.row.game}/next"
        learnt = tuple(self.learnt(seat).items())
        return _told(self.wording, name, self._design, self.answers, number, learnt)

    def notes(self, seat: int) -> Mapping[str, Any]:
        """`cooperation`, the mean of the others in the round before, and what strategies need."""
        number = len(self.history)
        others = None
        if number:
            levels = [self.cooperation[choice] for choice in self.history[-1]]
            others = (sum(levels) - levels[seat]) / (len(levels) - 1)
        return {
            "cooperation": self.cooperation,
            "others": others,
            "equilibrium": self.equilibrium(),
            "recorded": self.recorded[number][seat - 1] if seat and self.recorded else None,
        }

    @property
    def opening(self) -> str:
        """The name of the wording that begins the game."""
        return f"rounds/{self.row.game}"

    @abstractmethod
    def learnt(self, seat: int) -> Mapping[str, Any]:
        """`Decision.after` of a seat in the round before."""

    @abstractmethod
    def equilibrium(self) -> float:
        """The cooperation of an equilibrium strategy after what has happened."""


@functools.lru_cache(maxsize=20_000)
def _told(
    wording: Wording,
    name: str,
    design: tuple[tuple[str, Any], ...],
    answers: AnswerSet,
    number: int = 0,
    learnt: tuple[tuple[str, Any], ...] = (),
) -> tuple[Message, ...]:
    """What a player is told after round `number`: kept, since many are told the same."""
    before = Decision(1, number, 0, after=dict(learnt)) if number else None
    decision = Decision(1, number + 1, 0)
    fields = {"design": dict(design), "answers": answers, "decision": decision, "before": before}
    return wording(name, **fields)


class Dilemma(Cooperating):
    """A repeated prisoner's dilemma.

    `row.design` has `reward` (both cooperate), `penalty` (neither does), `temptation` (one alone
    does not) and `sucker` (one alone does); `continuation`, the probability of another round, where
    the number of rounds isn't told; and, as it may be, `error`, the probability that the opposite
    of a choice is carried out.

    Raises:
        DataError: payoffs that are no prisoner's dilemma.
    """

    def __init__(
        self,
        row: Played,
        wording: Wording,
        opponent: str,
        rounds: int,
        rng: np.random.Generator,
        recorded: Sequence[int] = (),
    ) -> None:
        names = ("sucker", "penalty", "reward", "temptation")
        payoffs = [float(row.design[name]) for name in names]
        if sorted(set(payoffs)) != payoffs:
            shown = ", ".join(f"{name} {row.design[name]:g}" for name in names)
            raise DataError(f"dilemma: payoffs are {shown}; they must ascend in this order")
        moves = [(choice,) for choice in recorded]
        row = replace(row, design={"error": 0.0, "rounds": rounds, **row.design})
        super().__init__(row, wording, opponent, 2, moves, rounds)
        sucker, penalty, reward, temptation = payoffs
        self._table = ((reward, sucker), (temptation, penalty))
        self._error, self._rng = float(row.design["error"]), rng
        # More often, others could exploit, or defectors do better (M. Nowak, K. Sigmund, "Tit for
        # tat in heterogeneous populations", Nature 355, 1992).
        bounds = (
            1.0 - (temptation - reward) / (reward - sucker),
            (reward - penalty) / (temptation - penalty),
        )
        self._forgives = max(0.0, min(bounds))
        # Neither gains by defecting once if all cooperation ends with that (the grim trigger).
        worth = (temptation - reward) / (temptation - penalty)
        self._lasting = not self._error and row.design.get("continuation", 0.0) >= worth

    @property
    def opening(self) -> str:
        """Another text where the number of rounds is told."""
        return "rounds/dilemma" if "continuation" in self.row.design else "play/dilemma"

    def carried_out(self, answers: Sequence[int]) -> tuple[int, ...]:
        """The choices, each the opposite with the probability of an error."""
        wrong = self._rng.random(2) < self._error
        return tuple(answer ^ int(one) for answer, one in zip(answers, wrong, strict=True))

    def payoffs(self, choices: tuple[int, ...]) -> tuple[float, ...]:
        """Of both, in points."""
        own, other = choices
        return self._table[own][other], self._table[other][own]

    def notes(self, seat: int) -> Mapping[str, Any]:
        """As of every game, and `forgives`, the probability with which a generous player does."""
        return {**super().notes(seat), "forgives": self._forgives}

    def learnt(self, seat: int) -> Mapping[str, Any]:
        """What was carried out."""
        return {"own": self.history[-1][seat], "other": self.history[-1][1 - seat]}

    def equilibrium(self) -> float:
        """The grim trigger's where it is an equilibrium, else that of the game played once."""
        return float(self._lasting and not any(map(any, self.history)))


class PublicGoods(Cooperating):
    """Rounds of a public goods game with 20 coins a member and round; see `data.rounds`."""

    def __init__(
        self,
        row: Played,
        wording: Wording,
        opponent: str,
        rounds: int,
        recorded: Sequence[Sequence[int]] = (),
    ) -> None:
        assert row.answers.values is not None
        self._values = row.answers.values
        size = int(row.design["group_size"])
        super().__init__(row, wording, opponent, size, recorded, rounds)
        self._brings = row.design["multiplier"] / size

    def payoffs(self, choices: tuple[int, ...]) -> tuple[float, ...]:
        """What everybody has after a round, in coins."""
        put = [self._values[choice] for choice in choices]
        return tuple(COINS - own + self._brings * sum(put) for own in put)

    def learnt(self, seat: int) -> Mapping[str, Any]:
        """The coins in the fund, and the whole coins that the member gained."""
        choices = self.history[-1]
        total = sum(self._values[choice] for choice in choices)
        gain = round(self.rewards[-1][seat])
        return {"total": int(total), "others": len(choices) - 1, "gain": gain}

    def equilibrium(self) -> float:
        """That of the game played once: a coin in the fund brings its owner less than a coin."""
        return float(self._brings >= 1.0)


class Guessing(Simultaneous):
    """The guessing game with its average and target told after every round.

    Rewards are shares of the prize: 1 for whoever is closest alone.
    """

    def __init__(
        self,
        row: Session,
        wording: Wording,
        opponent: str,
        rounds: int,
        recorded: Sequence[int] = (),
    ) -> None:
        self.game, self.wording, self.recorded = row.game, wording, recorded
        super().__init__(
            f"{row.person}/{opponent}",
            {"opponent": opponent, "setting": f"{_fraction(row.game)} of the average"},
            (RESPONDENT, *[opponent] * (int(row.game.parameters["group_size"]) - 1)),
            rounds,
            row.game.answers,
        )

    def messages(self, seat: int) -> tuple[Message, ...]:
        """The game, or what came of the round before."""
        if self.rounds == 1:
            return self.game.prompt()
        number = len(self.history)
        if not number:
            fields = {"game": self.game.user, "rounds": self.rounds}
            return (*self.game.prompt()[:-1], *self.wording("play/guessing", **fields))
        average = self._averages[-1]
        return self.wording(
            "play/guessing/next",
            round=number + 1,
            average=average,
            fraction=_fraction(self.game),
            target=self.game.parameters["fraction"] * average,
            won=self.rewards[-1][seat],
        )

    def payoffs(self, choices: tuple[int, ...]) -> tuple[float, ...]:
        """Shares of the prize."""
        numbers = [int(self.game.values[choice]) for choice in choices]
        prize = self.game.parameters["prize"]
        won = {
            number: self.game.payoff(number, numbers[:seat] + numbers[seat + 1 :]) / prize
            for seat, number in enumerate(numbers)
        }
        return tuple(won[number] for number in numbers)

    def notes(self, seat: int) -> Mapping[str, Any]:
        """`averages` by round, the `fraction`, the equilibrium, and what is recorded."""
        return {
            "averages": self._averages,
            "fraction": self.game.parameters["fraction"],
            "equilibrium": self.answers.position(self.game.equilibrium),
            "recorded": self.recorded[seat - 1] if seat and self.recorded else None,
        }

    @property
    def _averages(self) -> tuple[float, ...]:
        return tuple(float(self.game.values[list(choices)].mean()) for choices in self.history)


def _fraction(game: Game) -> str:
    return str(Fraction(game.parameters["fraction"]).limit_denominator(100))


def dilemma(row: Played, wording: Wording, rng: np.random.Generator) -> Iterator[Episode]:
    """A repeated prisoner's dilemma against each strategy, and against itself.

    Where the number of rounds is not told, it is drawn once for all of them.
    """
    rounds = row.design.get("rounds")
    if rounds is None:
        rounds = int(rng.geometric(1.0 - row.design["continuation"]))
    for opponent in (*COOPERATORS, ITSELF):
        yield Dilemma(row, wording, opponent, rounds, rng.spawn(1)[0])


def public_goods(row: Played, wording: Wording, rng: np.random.Generator) -> Iterator[Episode]:
    """Rounds of a public goods game in a group of each strategy, and in a group of itself."""
    for opponent in (*COOPERATORS, ITSELF):
        yield PublicGoods(row, wording, opponent, row.design["rounds"])


def guessing(row: Session, wording: Wording, rng: np.random.Generator) -> Iterator[Episode]:
    """The guessing game among each strategy, or one round of it among people of a table."""
    if not row.guesses:
        for opponent in GUESSERS:
            yield Guessing(row, wording, opponent, _GUESSING_ROUNDS)
        return
    others = int(row.game.parameters["group_size"]) - 1
    shares = np.array(row.guesses) / sum(row.guesses)
    drawn = rng.choice(len(shares), size=others, p=shares).tolist()
    yield Guessing(row, wording, RECORDED, 1, drawn)


def in_peoples_place(row: Played, wording: Wording, rng: np.random.Generator) -> Iterator[Episode]:
    """One of a person's matches, against what is recorded and against itself.

    The person is in the recorded partner's place in a dilemma, and in the respondent's in public
    goods, where the others are those of the person's group.
    """
    matches = _matches(row)
    match = matches[int(rng.integers(len(matches)))]
    for opponent in (RECORDED, ITSELF):
        if row.game == "dilemma":
            moves = [decision.choice for decision in match]
            yield Dilemma(row, wording, opponent, len(match), rng.spawn(1)[0], moves)
        else:
            others = [_of_others(row, decision) or [] for decision in match]
            yield PublicGoods(row, wording, opponent, len(match), others)


def can_be_replaced(row: Played) -> bool:
    """Whether somebody can be in a person's place: see `in_peoples_place`."""
    if row.game == "public_goods":
        alone = not any(row.design[name] for name in ("chat", "punishment", "reward"))
        known = all(_of_others(row, decision) is not None for decision in row.decisions)
        return alone and known and bool(_matches(row))
    return row.game == "dilemma" and bool(_matches(row))


def _matches(row: Played) -> list[list[Decision]]:
    """A person's matches of which every round from the first is known."""
    matches: dict[int, list[Decision]] = {}
    for decision in row.decisions:
        matches.setdefault(decision.match, []).append(decision)
    return [
        match
        for match in matches.values()
        if [one.round for one in match] == list(range(1, len(match) + 1))
    ]


def _of_others(row: Played, decision: Decision) -> list[int] | None:
    """Positions of choices of all others that make the recorded total; None where there are none.

    Who of them put in how much is not known, and is told to nobody.
    """
    total, others = decision.after["total"], decision.after["others"]
    assert row.answers.values is not None
    if total is None or others != row.design["group_size"] - 1:
        return None
    left = total - row.answers.values[decision.choice]
    choices = []
    for _ in range(others):
        put = min(left, COINS)
        if put not in row.answers.values:
            return None
        choices.append(row.answers.position(put))
        left -= put
    return None if left else choices


class Observed(NamedTuple):
    """What a person did in a round, in terms of cooperation from 0 to 1."""

    person: str
    setting: str
    round: int
    cooperation: float


def observed(rows: Iterable[Any]) -> list[Observed]:
    """What people of the rows did, where they are dilemmas and public goods."""
    return [
        Observed(row.person, _setting(row), decision.round, _cooperation(row)[decision.choice])
        for row in rows
        if isinstance(row, Played)
        for decision in row.decisions
    ]


def _setting(row: Played) -> str:
    """What people have to have in common to be compared: all parameters, where they are known."""
    return row.labels.get("design", row.setting)


def _cooperation(row: Played) -> tuple[float, ...]:
    """`[A]` how cooperative each answer is, from 0 to 1."""
    assert row.answers.values is not None
    if row.game == "dilemma":
        return (1.0, 0.0)
    return tuple(value / COINS for value in row.answers.values)


def band(number: int) -> str:
    """The number of a round in figures: "1", ... "20", "21+"."""
    return str(number) if number <= _LAST else f"{_LAST + 1}+"


def dilemmas() -> Rows[Played]:
    """Sessions of the package's push-or-pull game, repeated, without people."""
    game = games.get("push_pull")
    names = ("reward", "penalty", "temptation", "sucker")
    payoffs = ("both_push", "both_pull", "pull_alone", "push_alone")
    design = {name: game.parameters[key] for name, key in zip(names, payoffs, strict=True)}
    design["continuation"] = _CONTINUATION
    return _sessions("dilemma", game.answers, design, f"continuation {_CONTINUATION}")


def groups() -> Rows[Played]:
    """Sessions of a public goods game in groups of four, ten rounds, without people."""
    design = {"group_size": 4, "multiplier": 2.0, "rounds": _ROUNDS}
    off = dict.fromkeys(("all_or_nothing", "opt_out", "chat", "punishment", "reward"), False)
    answers = AnswerSet.numbers(range(COINS + 1), "coins")
    return _sessions("public_goods", answers, {**design, **off}, f"{_ROUNDS} rounds")


def _sessions(
    game: str, answers: AnswerSet, design: Mapping[str, Any], setting: str
) -> Rows[Played]:
    rows = [
        Played(str(number), game, answers, design, setting, str(number))
        for number in range(1, SESSIONS + 1)
    ]
    return Rows.of(rows, "the package's game")


Episodes = Callable[[Any, Wording, np.random.Generator], Iterator[Episode]]


def played(
    name: str,
    episodes: Episodes,
    needs: str,
    measures: tuple[str, ...] = ("cooperation", "payoff", "total_payoff"),
    **fields: Any,
) -> Task:
    """A task that is played; figures are by opponent, and by opponent and round."""

    @functools.wraps(episodes)
    def opening(row: Any, wording: Wording, rng: np.random.Generator) -> Iterator[Item]:
        for episode in episodes(row, wording, rng):
            yield from (item for who, item in episode.questions() if who == RESPONDENT)

    return Task(
        name,
        opening,
        needs,
        measures,
        average="opponent",
        cluster="episode",
        groups=("round",),
        episodes=episodes,
        **fields,
    )


register(played("play/dilemma", dilemma, "dilemma_sessions"))
register(played("play/public_goods", public_goods, "public_goods_sessions"))
register(played("play/guessing", guessing, "guesses", ("rounds_won",)))
register(
    played(
        "play/people",
        in_peoples_place,
        "rounds",
        ("cooperation_distance", "cooperation", "payoff", "total_payoff"),
        serves=can_be_replaced,
    )
)
