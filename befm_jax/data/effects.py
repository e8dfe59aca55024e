"""Published effects of treatments in games, and the two questions that ask for each.

A table has one line a contrast, CSV, in gzip or Parquet: `id, game, parameters_control,
parameters_treatment` (`key=value;...`), `outcome, difference, standard_error, ci95, units,
direction, assignment, source, kind, note` and, if there are any, `adjusted_difference` and
`adjusted_standard_error`.  Differences are treatment less control, and kept as shares of the range
of the answers; of those in other units (Cohen's d, odds ratios) the direction is kept alone.  An
adjusted difference comes before the raw one, as the direction does that goes with it.

A contrast can be asked where both arms are games of this package and every parameter that differs
between them is part of a question.  Parameters that both arms share and no question tells of (the
platform, how the group was formed) are passed over; a range is asked at its middle; what is not
given has the package's own value.  Contrasts that can't be asked are counted with the reason, and
so are those whose note says that they are not to be scored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from befm_jax.data import games, rounds
from befm_jax.data.games import Game
from befm_jax.data.items import AnswerSet
from befm_jax.data.rounds import COINS, PAYOFFS, Decision, Played
from befm_jax.data.rows import (
    LeftOut,
    Rows,
    fingerprint_of,
    number_or_none,
    sketch_of,
    usable,
)
from befm_jax.errors import DataError

_COLUMNS = (
    *("id", "game", "parameters_control", "parameters_treatment", "outcome", "difference"),
    *("standard_error", "ci95", "units", "direction", "assignment", "source", "kind", "note"),
)
_NOT_SCORED = ("do not score", "sign not certain")
_TWO_SIDED = 1.96
# Dollars, where a table says no more of a stake.
_STAKES = {"low": 10, "high": 100}
_SWITCH = {"yes": True, "no": False}
_ABOUT = {"gender": "Sex", "age": "Age", "country": "Country"}


@dataclass(frozen=True)
class Gift:
    """A dictator game: what somebody gives, or leaves of what belongs to another.

    Attributes:
        endowment: dollars.
        take: whether they belong to the other, from whom some can be taken.
        charity: whether the other is one.
    """

    endowment: int = 100
    take: bool = False
    charity: bool = False

    @property
    def answers(self) -> AnswerSet:
        """What the other ends up with."""
        return AnswerSet.numbers(range(self.endowment + 1), "dollars")


@dataclass(frozen=True)
class Arm:
    """One arm of a contrast, as a question.

    Attributes:
        asked: the game: one of the package, a gift, or rounds of which the last is asked.
        values: `A` numbers, what each answer counts for in the outcome, 0 to 1.
        pay: "real", "hypothetical", or "" where that is not told.
        name: what players are told that the game is called; "" for nothing.
        about: what is told of the person: sex, age, country.
    """

    asked: Game | Gift | Played
    values: tuple[float, ...]
    pay: str = ""
    name: str = ""
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def told(self) -> tuple[object, ...]:
        """Whatever makes the question another one."""
        game = self.asked
        asked = (game.id, dict(game.parameters)) if isinstance(game, Game) else game
        return asked, self.pay, self.name, dict(self.about)


class Published(NamedTuple):
    """What is known of an effect; differences are shares of the range of the answers, or None."""

    direction: int | None
    difference: float | None
    standard_error: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Effect:
    """A contrast that can be asked.

    Attributes:
        id: its name.
        control, treatment: the two questions.
        published: what is known of it.
        labels: game, kind (where the figure is from), assignment, source.
    """

    id: str
    control: Arm
    treatment: Arm
    published: Published
    labels: Mapping[str, str]

    @property
    def person(self) -> str:
        """What splits go by: the source, whose contrasts share people."""
        return self.labels["source"]


def read(path: str | Path) -> Rows[Effect]:
    """The contrasts of a table that can be asked; the others are counted by reason.

    Raises:
        DataError: as `rows.usable`; or there is none that can be asked.
    """
    left_out = LeftOut()
    effects: dict[str, Effect] = {}
    for line, cells in usable(path, _COLUMNS, left_out):
        place, id = f"line {line}", cells["id"]
        note = next((one for one in _NOT_SCORED if one in cells["note"].casefold()), "")
        if not id or id in effects:
            left_out.add("row: no id, or the id of another row", place, repr(id))
        elif note:
            left_out.add(f"row: its note says {note!r}", place, id)
        else:
            try:
                effects[id] = _effect(cells)
            except DataError as error:
                left_out.add(f"not asked: {error}", place, id)
    if not effects:
        raise DataError(f"{path}: no effect; {'; '.join(left_out.lines()) or 'no rows'}")
    facts = {repr((one.id, one.published)) for one in effects.values()}
    source = f"{Path(path).name} (effects)"
    return Rows(list(effects.values()), source, fingerprint_of(facts), sketch_of(facts), left_out)


def _effect(cells: Mapping[str, str]) -> Effect:
    """The contrast of a line.

    Raises:
        DataError: it can't be asked, or nothing is known of it.
    """
    make = _GAMES.get(cells["game"])
    if make is None:
        raise DataError(f"{cells['game'] or 'no game'} is no game of this package")
    arms, untold = [], []
    for side in ("control", "treatment"):
        left = _parameters(cells[f"parameters_{side}"])
        arms.append(_arm(make, left, cells["outcome"].casefold()))
        untold.append(left)
    differing = sorted(key for key in {**untold[0], **untold[1]} if _differs(key, untold))
    if differing:
        raise DataError(f"no question tells of {', '.join(differing)}")
    if arms[0].told == arms[1].told:
        raise DataError("both arms have the same question")
    published = _published(cells)
    if published.direction is None and published.difference is None:
        raise DataError("neither a direction nor a difference is known")
    labels = {name: cells[name] for name in ("game", "kind", "source")}
    # "between people (one treatment a person)" is one of "between people".
    labels["assignment"] = re.split(r"[;,(]", cells["assignment"])[0].strip()
    return Effect(cells["id"], arms[0], arms[1], published, labels)


def _differs(key: str, sides: list[dict[str, str]]) -> bool:
    return sides[0].get(key) != sides[1].get(key)


def _parameters(cell: str) -> dict[str, str]:
    """The parameters of an arm; of a key that is there twice the last, which is the narrower."""
    pairs = (part.partition("=") for part in cell.split(";") if part.strip())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _arm(make: _Maker, left: dict[str, str], outcome: str) -> Arm:
    """The question of an arm; what it tells of is taken out of the parameters that are `left`."""
    asked = make(left, outcome)
    pay = left.pop("pay", "")
    if pay not in ("", "real", "hypothetical"):
        raise DataError(f"no question tells of pay {pay}")
    name = left["label"] if left.get("label", "").endswith("Game") else ""
    if name:
        del left["label"]
    about = {shown: left.pop(key) for key, shown in _ABOUT.items() if key in left}
    return Arm(asked, _values(outcome, asked), pay, name, about)


def _published(cells: Mapping[str, str]) -> Published:
    scale = 100.0 if cells["units"] == "0-100" else 1.0
    known = cells["units"] == "0-100" or cells["units"].startswith("share")
    adjusted = number_or_none(cells.get("adjusted_difference", "")) is not None
    which = "adjusted_" if adjusted else ""
    difference, error = (
        number_or_none(cells[f"{which}{name}"]) if known and f"{which}{name}" in cells else None
        for name in ("difference", "standard_error")
    )
    ends = re.fullmatch(r"\[(.+),(.+)\]", cells["ci95"])
    interval = None
    if difference is not None and error is not None:
        interval = difference - _TWO_SIDED * error, difference + _TWO_SIDED * error
    if difference is not None and ends and not adjusted:
        low, high = number_or_none(ends[1]), number_or_none(ends[2])
        interval = (low, high) if low is not None and high is not None else interval
    direction = {"+1": 1, "1": 1, "-1": -1, "0": 0}.get(cells["direction"])
    return Published(
        direction,
        None if difference is None else difference / scale,
        None if error is None else error / scale,
        None if interval is None else (interval[0] / scale, interval[1] / scale),
    )


def _values(outcome: str, asked: Game | Gift | Played) -> tuple[float, ...]:
    """What each answer counts for: a place on the scale from 0 to 1, or whether it is counted."""
    answers = asked.answers
    if answers.kind == "labels" and answers.names == _MOVES:
        return tuple(float(name == _MOVES[0]) for name in _MOVES)  # cooperation
    assert answers.values is not None
    low, high = answers.values[0], answers.values[-1]
    shares = [(value - low) / (high - low) for value in answers.values]
    counted: Mapping[str, Callable[[float], bool]] = {
        "give nothing": lambda share: share == 0.0,
        "give something": lambda share: share > 0.0,
        "give everything": lambda share: share == 1.0,
        "exactly half": lambda share: share == 0.5,
    }
    for words, holds in counted.items():
        if words in outcome:
            return tuple(float(holds(share)) for share in shares)
    if above := re.search(r"more than (\d+)", outcome):
        return tuple(float(value > float(above[1])) for value in answers.values)
    if "reject" in outcome:
        raise DataError("a rejection is no answer of the package's games")
    return tuple(shares)


# From an arm's parameters, of which it takes out what its question tells, and the outcome.
_Maker = Callable[[dict[str, str], str], "Game | Gift | Played"]
_MOVES = games.get("push_pull").answers.names


def _dictator(left: dict[str, str], outcome: str) -> Gift | Played:
    endowment = _dollars(left)
    if "round" in left:
        if endowment != 100:
            raise DataError("rounds are asked at an endowment of 100")
        at = _decision(left, outcome)
        return _played("dictator", AnswerSet.numbers(range(101), "dollars"), {}, at)
    frame, recipient = left.pop("frame", "give"), left.get("recipient", "student")
    if frame not in ("give", "take"):
        raise DataError(f"no question tells of frame {frame}")
    if recipient in ("student", "charity"):
        left.pop("recipient", "")
    return Gift(endowment, frame == "take", recipient == "charity")


def _proposer(left: dict[str, str], outcome: str) -> Game | Gift:
    if left.get("game", "") or left.get("rejection", ""):
        raise DataError("no question tells of other rules of a rejection")
    veto = _switch(left, "veto", True)
    endowment = _dollars(left)
    if not veto:
        return Gift(endowment)
    return games.get("ultimatum_proposer").with_parameters(endowment=endowment)


def _responder(left: dict[str, str], outcome: str) -> Game:
    if left.get("game", "") or left.get("rejection", ""):
        raise DataError("no question tells of other rules of a rejection")
    return games.get("ultimatum_responder").with_parameters(endowment=_dollars(left))


def _trust(role: str) -> _Maker:
    def make(left: dict[str, str], outcome: str) -> Game:
        endowment, multiplier = _dollars(left), _number_of(left, "multiplier", "3")
        more = {} if role == "trust_investor" else {"invested": (endowment + 1) // 2}
        game = games.get(role)
        return game.with_parameters(endowment=endowment, multiplier=multiplier, **more)

    return make


def _public_goods(left: dict[str, str], outcome: str) -> Played:
    if _number_of(left, "endowment", str(COINS)) != COINS:
        raise DataError(f"public goods are asked at an endowment of {COINS}")
    size = round(_number_of(left, "group_size", "4"))
    rate = _number_of(left, "mpcr", "0.5")
    multiplier = _number_of(left, "multiplier", str(size * rate))
    framing = left.pop("framing", "") or left.pop("frame", "opt_in")
    if framing not in _FRAMES:
        raise DataError(f"no question tells of frame {framing}")
    choices = left.pop("choices", f"0-{COINS}")
    if choices not in (f"0-{COINS}", f"0 or {COINS}"):
        raise DataError(f"no question tells of choices {choices}")
    at = _decision(left, outcome)
    design = {
        "group_size": size,
        "multiplier": round(multiplier, 2),
        "rounds": _rounds(left),
        "all_or_nothing": choices == f"0 or {COINS}",
        "opt_out": _FRAMES[framing],
        **{name: _switch(left, name, False) for name in ("chat", "punishment", "reward")},
    }
    left.pop("rounds", "")
    answers = rounds.ALL if design["all_or_nothing"] else rounds.ANY
    return _played("public_goods", answers, design, at)


_FRAMES = {"opt_in": False, "provision": False, "opt_out": True, "maintenance": True}
_NO_PAYOFFS = {"reward": 400.0, "sucker": 0.0, "temptation": 700.0, "penalty": 300.0}


def _dilemma(left: dict[str, str], outcome: str) -> Game | Played:
    payoffs = {name: _number_of(left, key) for key, name in PAYOFFS.items() if key in left}
    if "bc" in left:
        payoffs = rounds.payoffs_of(_number_of(left, "bc"))
    payoffs = payoffs or _NO_PAYOFFS
    if len(payoffs) < len(PAYOFFS):
        raise DataError("some payoffs are not known")
    if left.get("group_size", "2") != "2":
        raise DataError("dilemmas are asked of two people")
    one_shot = left.get("rounds") == "1" or left.get("one_shot") == "yes"
    finite, random_end = "rounds" in left, "continuation" in left
    if one_shot or not (finite or random_end or "other_round1" in left):
        if not one_shot and ("horizon" in left or "payoffs" in left):
            raise DataError("the number of rounds is not known")
        left.pop("rounds", "")
        return games.get("push_pull").with_parameters(
            both_push=payoffs["reward"],
            both_pull=payoffs["penalty"],
            pull_alone=payoffs["temptation"],
            push_alone=payoffs["sucker"],
        )
    # Whether a match is finite follows from the number of its rounds.
    left.pop("horizon", "")
    error = _number_of(left, "error", "0")
    own, other = left.pop("own_round1", ""), left.pop("other_round1", "")
    design: dict[str, Any] = {**payoffs, "error": error}
    if own and other:
        design |= {"rounds": 2, "continuation": 0.0}
        chosen = [[name.casefold() for name in _MOVES].index(move) for move in (own, other)]
        after = {"own": chosen[0], "other": chosen[1]}
        first = Decision(1, 1, chosen[0], after=after)
        return _played("dilemma", rounds.DILEMMA, design, Decision(1, 2, 0), first)
    if random_end:
        continuation = design["continuation"] = _number_of(left, "continuation")
        if continuation >= 1.0:
            raise DataError(f"continuation {continuation} is no probability below 1")
        at = _decision(left, outcome, 1.0 / (1.0 - continuation))
    else:
        number = _rounds(left)
        if number is None:
            raise DataError("the number of rounds is not known")
        at = _decision(left, outcome)
        design |= {"rounds": number, "continuation": 0.0}
        del left["rounds"]
    return _played("dilemma", rounds.DILEMMA, design, at)


def _bomb(left: dict[str, str], outcome: str) -> Game | Played:
    boxes = round(_number_of(left, "boxes", "100"))
    if "round" not in left:
        return games.get("bomb").with_parameters(boxes=boxes)
    if boxes != 100:
        raise DataError("rounds are asked with 100 boxes")
    at = _decision(left, outcome)
    return _played("bomb", AnswerSet.numbers(range(101), "boxes"), {}, at)


def _guessing(left: dict[str, str], outcome: str) -> Game:
    try:
        fraction = float(Fraction(left.pop("p", "2/3")))
    except (ValueError, ZeroDivisionError):
        raise DataError("p is not a fraction") from None
    ends = left.pop("range", "0-100").split("-")
    if len(ends) != 2 or ends[0] != "0" or not ends[1].isdigit():
        raise DataError("the range does not begin at 0")
    size = round(_number_of(left, "players", "16"))
    game = games.get("guessing")
    return game.with_parameters(fraction=fraction, highest=int(ends[1]), group_size=size)


_GAMES: Mapping[str, _Maker] = {
    "dictator": _dictator,
    "ultimatum proposer": _proposer,
    "ultimatum responder": _responder,
    "trust investor": _trust("trust_investor"),
    "trust banker": _trust("trust_banker"),
    "public goods": _public_goods,
    "public goods and prisoner's dilemma": _public_goods,
    "prisoner's dilemma": _dilemma,
    "push/pull": _dilemma,
    "bomb risk": _bomb,
    "guessing": _guessing,
}


def _played(
    game: str, answers: AnswerSet, design: Mapping[str, object], *decisions: Decision
) -> Played:
    return Played("", game, answers, design, game, "", {}, tuple(sorted(decisions, key=_in_order)))


def _in_order(decision: Decision) -> int:
    return decision.round


def _decision(left: dict[str, str], outcome: str, expected: float | None = None) -> Decision:
    """The round that is asked: the one that is named, else that in the middle of those counted.

    `expected`: how many rounds there are where their number is drawn.
    """
    last = expected or _rounds(left) or 1
    if "round" in left:
        at = _number_of(left, "round")
    elif "first" in outcome or "round 1" in outcome:
        at = 1.0
    else:
        at = (5 * last + 1) / 6 if "last third" in outcome else (1 + last) / 2
    return Decision(1, max(1, math.floor(at)), 0)


def _rounds(left: dict[str, str]) -> int | None:
    """The number of rounds, in the middle where a range is given; None where none is."""
    return round(_number_of({**left}, "rounds")) if "rounds" in left else None


def _dollars(left: dict[str, str]) -> int:
    """The endowment, or the stake."""
    key = "endowment" if "endowment" in left else "stake"
    if left.get(key) in _STAKES:
        return _STAKES[left.pop(key)]
    number = round(_number_of(left, key, "100"))
    if not 2 <= number <= 1000:
        raise DataError(f"{key} {number} is not asked in whole dollars")
    return number


def _switch(left: dict[str, str], key: str, absent: bool) -> bool:
    value = left.pop(key, "")
    if value and value not in _SWITCH:
        raise DataError(f"no question tells of {key} {value}")
    return _SWITCH[value] if value else absent


def _number_of(left: dict[str, str], key: str, absent: str = "") -> float:
    """The number of a parameter, which is taken out; the middle of a range; a unit may follow.

    Raises:
        DataError: it is no number.
    """
    text = left.pop(key, absent)
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(?:-(\d+(?:\.\d+)?))?(?: [a-z]+)?", text)
    if found is None:
        raise DataError(f"{key} {text} is not a number")
    return (float(found[1]) + float(found[2] or found[1])) / 2
