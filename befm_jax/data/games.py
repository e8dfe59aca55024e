"""Games: what one is, the registry of those that are known, and how a user adds their own.

A game is declared in a few lines: `befm_jax/data/game_library.py` holds ours. A user's are in a
Python file of their own, which `select("my_games.py")` loads:

    from befm_jax.data.games import AnswerSet, Game, register

    register(
        Game(
            id="coin_gift",
            title="Coin gift",
            roles=("giver", "receiver"),
            role="giver",
            parameters={"coins": 10},
            answers_of=lambda coins: AnswerSet.numbers(range(coins + 1), "coins"),
            instructions=lambda coins: (
                f"You found {coins} coins and may give some of them to a stranger. How many do you "
                f"give? Answer with one number from 0 to {coins} in square brackets, such as [3]."
            ),
            payoff_of=lambda given, coins: coins - given,
            equilibrium_of=lambda coins: 0,
        )
    )
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from befm_jax.data import user_files
from befm_jax.data.items import AnswerSet, Example, Message
from befm_jax.errors import DataError, unknown

__all__ = [
    "SYSTEM",
    "AnswerSet",
    "Game",
    "get",
    "ids",
    "load_file",
    "register",
    "select",
]

SYSTEM = (
    "You are taking part in an experiment about economic decisions, together with other people. "
    "Read the situation, decide for yourself as you would in life, and reply with your decision "
    "only."
)


@dataclass(frozen=True, eq=False)
class Game:
    """One decision of one role in a game, for people and models alike.

    Attributes:
        id: its name in files and on the command line: letters, digits and underscores.
        title: its name for people.
        roles: every role in the game.
        role: the one who answers here.
        instructions: from the parameters (as keywords) to the whole user message. It ends by
            asking for one answer in the form that the answer set reads; `AnswerSet.request` is
            such a sentence.
        answers_of: from the parameters to the answer set.
        payoff_of: from the choices and the parameters to the money of the role who answers, its
            own choice first, then those of the others. Its docstring says what they are.
        equilibrium_of: from the parameters to the textbook prediction, for players who maximise
            their own money and are neutral to risk.
        parameters: endowment, multiplier, group size, return rate: whatever the game needs.
        reference: the key of the human data: a column of the MobLab table; None for none.
        system: the system message, one for all games unless a game says otherwise.

    Raises:
        DataError: an id of another form, a role that is not among the roles, or functions that
            do not take these parameters or disagree with each other.
    """

    id: str
    title: str
    roles: tuple[str, ...]
    role: str
    instructions: Callable[..., str]
    answers_of: Callable[..., AnswerSet]
    payoff_of: Callable[..., float]
    equilibrium_of: Callable[..., int]
    parameters: Mapping[str, float] = field(default_factory=dict)
    reference: str | None = None
    system: str = SYSTEM

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_]+", self.id) or self.id == "all":
            raise DataError(f"game {self.id!r}: an id has letters, digits, _ only and is not 'all'")
        if self.role not in self.roles:
            raise DataError(f"game {self.id}: role {self.role!r} is not one of {self.roles}")
        try:
            # Whatever a declaration gets wrong shows here, not in the middle of a run.
            self.example(self.equilibrium)
        except (DataError, TypeError) as error:
            raise DataError(f"game {self.id}: {error}") from None

    @cached_property
    def user(self) -> str:
        """The user message: the instructions at this game's parameters."""
        return self.instructions(**self.parameters)

    @cached_property
    def answers(self) -> AnswerSet:
        """The answers that this game's parameters allow."""
        return self.answers_of(**self.parameters)

    @property
    def values(self) -> np.ndarray:
        """What payoffs are computed from, `[A]` ascending: int64 where all are whole, else float64.

        Of answers without an order, their positions.
        """
        places = range(len(self.answers)) if self.answers.values is None else self.answers.values
        values = np.asarray(places, np.float64)
        return values.astype(np.int64) if (values == np.floor(values)).all() else values

    @property
    def span(self) -> float:
        """The greatest answer less the smallest: what is 100 points in rescaled distances."""
        return float(self.values[-1] - self.values[0])

    @cached_property
    def equilibrium(self) -> int:
        """The textbook prediction at this game's parameters."""
        return self.equilibrium_of(**self.parameters)

    def payoff(self, *choices: Any, **named_choices: Any) -> float:
        """The money of the role who answers: its own choice first, then those of the others."""
        return self.payoff_of(*choices, **named_choices, **self.parameters)

    def prompt(self) -> tuple[Message, ...]:
        """The system message, if there is one, and the user message."""
        given = (Message("system", self.system),) if self.system else ()
        return (*given, Message("user", self.user))

    def example(self, value: float, weight: float = 1.0) -> Example:
        """The example of `weight` people who chose `value`.

        Raises:
            DataError: the answer set does not hold the value.
        """
        answer = self.answers.written[self.answers.position(value)]
        return Example.of(self.system, self.user, answer, weight)

    def with_parameters(self, **overrides: float) -> "Game":
        """The same game with other parameters: its answers, payoffs and prediction follow.

        It has no human reference any more: those people played at the old parameters.

        Raises:
            DataError: a parameter that the game does not have, or a value that it cannot have.
        """
        for name in overrides:
            if name not in self.parameters:
                raise unknown(f"parameter of {self.id}", name, self.parameters)
        parameters = {**self.parameters, **overrides}
        if parameters == self.parameters:
            return self
        return replace(self, parameters=parameters, reference=None)


_REGISTRY: dict[str, Game] = {}


def register(game: Game) -> Game:
    """Make a game known under its id, and return it.

    The same definition may come again, as when a notebook cell or a file is run twice: the last
    one stays.

    Raises:
        DataError: another game has this id.
    """
    known = _REGISTRY.get(game.id)
    if known is not None and _definition(known) != _definition(game):
        raise DataError(f"game {game.id!r} exists already and is another: choose another id")
    _REGISTRY[game.id] = game
    return game


def get(id: str) -> Game:
    """The game of this id.

    Raises:
        DataError: there is none; names the near ones.
    """
    if id not in _REGISTRY:
        raise unknown("game", id, _REGISTRY)
    return _REGISTRY[id]


def ids() -> list[str]:
    """The ids of all registered games, ours first, in the order in which they were declared."""
    return list(_REGISTRY)


def load_file(path: str | Path) -> list[Game]:
    """Run a user's own Python file and return the games that it declares, registered.

    See `befm_jax.data.user_files.load`.

    Raises:
        DataError: no such file, an error in it (with its line), no game in it, or an id taken by
            another game. The registry is then as it was.
    """
    return user_files.load(path, Game, _REGISTRY, register)


def select(spec: str | Sequence[str]) -> list[Game]:
    """The games that a person asked for, each once, in their order.

    Args:
        spec: entries in one string with commas, or as a sequence: an id, "all" for every
            registered game, or the path of a `.py` file of the user's games (see `load_file`).

    Raises:
        DataError: an unknown id, a file that does not load, or nothing asked for.
    """
    entries = spec.split(",") if isinstance(spec, str) else list(spec)
    chosen: dict[str, Game] = {}
    for entry in filter(None, (entry.strip() for entry in entries)):
        if entry.endswith(".py"):
            found = load_file(entry)
        else:
            found = list(_REGISTRY.values()) if entry == "all" else [get(entry)]
        chosen.update((game.id, game) for game in found)
    if not chosen:
        raise DataError(f"no games asked for; there are: {', '.join(_REGISTRY)}, or all")
    return list(chosen.values())


def _definition(game: Game) -> tuple[Any, ...]:
    # What can be compared: functions are represented by what they say at the parameters.
    return (
        *(game.id, game.title, game.roles, game.role, dict(game.parameters), game.reference),
        *(game.system, game.user, game.answers, game.equilibrium),
    )


# Last, because the library is declared with what stands above.
from befm_jax.data import game_library  # noqa: E402, F401
