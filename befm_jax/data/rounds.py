"""Games that are played for several rounds: each person's choices in order, and what they learnt.

Five tables are known by their columns (CSV, in gzip or Parquet):

- public goods in many designs, after Alsobay et al. (2025): `session, participant, group_size,
  multiplier, contribution_type, framing, chat, punishment, reward, rounds_shown, round,
  contribution, group_total, others_seen, gain`;
- repeated dilemmas, after Dal Bo and Frechette (AER 101, 2011): `treatment` (D5R40: continuation
  probability 0.5, reward 40), `id, game, period, choice` and `other.choice`, c or d;
- repeated dilemmas in which moves may go wrong, after Fudenberg, Rand and Dreber (AER 102, 2012):
  the same, with `bc` (benefit by cost), `error`, and `last.choice`, `last.other` as they were
  carried out;
- repeated dilemmas of several studies, after Nay and Vorobeychik (PLOS ONE 11, 2016): `data,
  version, sequence, period, me, other_previous`, with `versions.csv` beside it: `version,
  stochastic_payoffs, continuation, infinite, continuous_time, error, R, S, T, P, longest`.  A
  sequence is somebody's choices in one match; nobody knows whose, so that each counts as a person;
- MobLab's records: `UserID, Role, Round, totalRound, move, Total, roundResult, gameType`, of the
  dictator game, bomb risk and the ultimatum game, whose move is `[offer, least accepted]`.

Public goods and the studies' dilemmas are split by design, so that groups and designs of the test
are in no training.  The others are split by person; a person's partners may be in another split.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from befm_jax import files
from befm_jax.data import games
from befm_jax.data.items import AnswerSet
from befm_jax.data.rows import (
    LeftOut,
    Rows,
    fingerprint_of,
    normal_id,
    number_or_none,
    of_person,
    sketch_of,
    split_of,
    usable,
)
from befm_jax.errors import DataError

COINS = 20
ANY, ALL = (
    AnswerSet.numbers(range(COINS + 1), "coins"),
    AnswerSet.labels("Nothing", "Everything", values=(0, COINS)),
)
_DOLLARS, _BOXES = (AnswerSet.numbers(range(101), unit) for unit in ("dollars", "boxes"))
PAYOFFS = {"R": "reward", "S": "sucker", "T": "temptation", "P": "penalty"}
# Push is to cooperate, Pull to defect.
DILEMMA = games.get("push_pull").answers
_MOVES = {"c": DILEMMA.read_cell("Push"), "d": DILEMMA.read_cell("Pull")}


@dataclass(frozen=True)
class Decision:
    """One choice of a person.

    Attributes:
        match: the number of the repetition of the whole game, of a supergame say; ascending.
        round: the number of the round in it, from 1.
        choice: the position in the answer set.
        asked: which choice it is, where a round has several: "offer", "limit".
        after: what the person learnt then, by name; {} where that is not known.
    """

    match: int
    round: int
    choice: int
    asked: str = ""
    after: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Played:
    """What one person chose in one game, round by round.

    Attributes:
        person: the id.
        game: "public_goods", "dilemma", "dictator", "bomb" or "ultimatum".
        answers: the answer set of every round.
        design: the parameters, for prompts.
        setting: what people of one question have in common: the treatment, or what kind of design.
        group: the id of those who played together where it is known, else the person.
        labels: of the design, for figures by group.
        decisions: in order.
    """

    person: str
    game: str
    answers: AnswerSet
    design: Mapping[str, Any]
    setting: str
    group: str
    labels: Mapping[str, str] = field(default_factory=dict)
    decisions: tuple[Decision, ...] = ()


def read(path: str | Path) -> Rows[Played]:
    """Everybody's rounds in one of the tables; what can't be used is counted by reason.

    Raises:
        DataError: no such file, columns of none of the tables, or no choice that can be used.
    """
    header, _ = files.table(path)
    layout = next((one for one in _LAYOUTS if set(one.columns) <= set(header)), None)
    if layout is None:
        expected = "; or ".join(f"{', '.join(one.columns)} ({one.name})" for one in _LAYOUTS)
        raise DataError(
            f"{path}:1: columns of no game in rounds: found {', '.join(header)}; expected "
            f"{expected}"
        )
    left_out = LeftOut()
    people: dict[tuple[str, str], Played] = {}
    made: dict[tuple[str, str], dict[tuple[int, int, str], Decision]] = {}
    for place, row, decision in layout.lines(path, left_out):
        who = row.person, row.game
        known = people.setdefault(who, row)
        theirs = made.setdefault(who, {})
        where = decision.match, decision.round, decision.asked
        if (known.group, known.setting, known.design) != (row.group, row.setting, row.design):
            left_out.add("row: the person is in another design, too", place, row.setting)
        elif where in theirs:
            left_out.add("row: second choice in a round", place, f"{row.person}, {where}")
        else:
            theirs[where] = decision
    rows = [
        replace(row, decisions=tuple(sorted(made[who].values(), key=_in_order)))
        for who, row in people.items()
    ]
    if not rows:
        raise DataError(f"{path}: no choice; {'; '.join(left_out.lines()) or 'no rows'}")
    facts = {repr((row.person, row.game, row.design, row.decisions)) for row in rows}
    source = f"{Path(path).name} ({layout.name})"
    return Rows(rows, source, fingerprint_of(facts), sketch_of(facts), left_out, within=in_split)


def _in_order(decision: Decision) -> tuple[int, int]:
    return decision.match, decision.round


def in_split(row: Played, split: str, seed: int) -> Played | None:
    """The row where it is in the split, else None.

    Public goods and the dilemmas of several studies are split by design, the others by person.
    """
    if row.game != "public_goods" and "study" not in row.labels:
        return of_person(row, split, seed)
    return row if split_of(row.labels["design"], seed) == split else None


# Of each line that can be used: its place, the row of its person without decisions, the decision.
_Lines = Iterator[tuple[str, Played, Decision]]


class _Layout(NamedTuple):
    name: str
    columns: tuple[str, ...]
    lines: Callable[[str | Path, LeftOut], _Lines]


def _public_goods(path: str | Path, left_out: LeftOut) -> _Lines:
    for line, cells in usable(path, _PUBLIC_GOODS, left_out):
        place, person, session = f"line {line}", cells["participant"], cells["session"]
        size, round_number = _whole(cells["group_size"], 2), _whole(cells["round"], 1)
        multiplier, shown = number_or_none(cells["multiplier"]), cells["rounds_shown"]
        rounds = _whole(shown, 1)
        switches = {name: cells[name] for name in ("chat", "punishment", "reward")}
        kind, framing = cells["contribution_type"], cells["framing"]
        if not person or not session:
            left_out.add("row: no participant or session", place, "")
            continue
        if (
            size is None
            or multiplier is None
            or (shown and rounds is None)
            or kind not in ("variable", "all_or_nothing")
            or framing not in ("opt_in", "opt_out")
            or not set(switches.values()) <= {"0", "1"}
        ):
            what = ", ".join(cells[name] for name in _DESIGN)
            left_out.add("row: a design that can't be", place, what)
            continue
        answers = ALL if kind == "all_or_nothing" else ANY
        choice, reason = answers.parse_cell(cells["contribution"])
        if round_number is None or choice is None:
            left_out.add(f"contribution: {reason}" if reason else "row: no round", place, person)
            continue
        after = {
            "total": _whole(cells["group_total"], 0),
            "others": _whole(cells["others_seen"], 0),
            "gain": _whole(cells["gain"]),
        }
        design = {
            "group_size": size,
            "multiplier": multiplier,
            "rounds": rounds,
            "all_or_nothing": kind == "all_or_nothing",
            "opt_out": framing == "opt_out",
            **{name: value == "1" for name, value in switches.items()},
        }
        labels = {
            "design": " ".join(f"{name}={value}" for name, value in design.items()),
            "framing": framing,
            **{name: "yes" if value == "1" else "no" for name, value in switches.items()},
        }
        setting = f"{kind}, {framing}"
        row = Played(person, "public_goods", answers, design, setting, session, labels)
        yield place, row, Decision(1, round_number, choice, after=after)


def _dilemma_lines(
    path: str | Path, left_out: LeftOut, columns: tuple[str, ...], treatment_of: _TreatmentOf
) -> Iterator[tuple[str, dict[str, str], Played, Decision]]:
    """The lines of a table of dilemmas with their cells; nothing is known of what was learnt."""
    for line, cells in usable(path, columns, left_out):
        place, person = f"line {line}", normal_id(cells["id"])
        match, number = _whole(cells["game"], 1), _whole(cells["period"], 1)
        treatment, choice = treatment_of(cells), _MOVES.get(cells["choice"])
        if not person or match is None or number is None:
            left_out.add("row: no id, game or period", place, "")
        elif treatment is None:
            left_out.add("row: a treatment that can't be", place, cells["treatment"])
        elif choice is None:
            left_out.add("choice: not c or d", place, repr(cells["choice"]))
        else:
            setting, design = treatment
            labels = {"design": setting}
            row = Played(person, "dilemma", DILEMMA, design, setting, person, labels)
            yield place, cells, row, Decision(match, number, choice)


# From the cells of a line to the name of its treatment, and its parameters.
_Treatment = tuple[str, dict[str, float]] | None
_TreatmentOf = Callable[[Mapping[str, str]], _Treatment]


def _without_errors(path: str | Path, left_out: LeftOut) -> _Lines:
    def treatment(cells: Mapping[str, str]) -> _Treatment:
        found = re.fullmatch(r"D(5|75)R(\d+)", cells["treatment"])
        if found is None:
            return None
        continuation, reward = float(f"0.{found[1]}"), float(found[2])
        payoffs = {"reward": reward, "sucker": 12.0, "temptation": 50.0, "penalty": 25.0}
        name = f"continuation {continuation:g}, reward {reward:g}"
        return name, {**payoffs, "continuation": continuation, "error": 0.0}

    for place, cells, row, decision in _dilemma_lines(path, left_out, _DAL_BO, treatment):
        other = _MOVES.get(cells["other.choice"])
        after = {} if other is None else {"own": decision.choice, "other": other}
        yield place, row, replace(decision, after=after)


def payoffs_of(ratio: float) -> dict[str, float]:
    """The payoffs where to cooperate costs 2 units and gives the other `ratio` times as many."""
    benefit, cost = 2.0 * ratio, 2.0
    return {"reward": benefit - cost, "sucker": -cost, "temptation": benefit, "penalty": 0.0}


def _with_errors(path: str | Path, left_out: LeftOut) -> _Lines:
    def treatment(cells: Mapping[str, str]) -> _Treatment:
        ratio, error = number_or_none(cells["bc"]), number_or_none(cells["error"])
        if ratio is None or error is None or not 0 <= error < 1:
            return None
        name = f"benefit {ratio:g} times the cost, error {error:g}"
        # 7/8 as in the paper.
        return name, {**payoffs_of(ratio), "continuation": 0.875, "error": error}

    lines = list(_dilemma_lines(path, left_out, _FUDENBERG, treatment))
    # The outcome of a round is in the next round's line.
    after = {}
    for _, cells, row, decision in lines:
        own, other = (_MOVES.get(cells[name]) for name in ("last.choice", "last.other"))
        if own is not None and other is not None:
            learnt = {"own": own, "other": other}
            after[row.person, decision.match, decision.round - 1] = learnt
    for place, _, row, decision in lines:
        learnt = after.get((row.person, decision.match, decision.round), {})
        yield place, row, replace(decision, after=learnt)


def _several_studies(path: str | Path, left_out: LeftOut) -> _Lines:
    designs = _versions(Path(path).with_name("versions.csv"))
    found: list[tuple[str, Played, int, int]] = []
    others: dict[tuple[str, int], int] = {}
    for line, cells in usable(path, _NAY, left_out):
        place, version, sequence = f"line {line}", cells["version"], cells["sequence"]
        design, choice = designs.get(version), _MOVES.get(cells["me"])
        number = _whole(cells["period"], 1)
        if not sequence or number is None:
            left_out.add("row: no sequence or period", place, "")
        elif design is None:
            reason = "row: a version with random payoffs or continuous time, or an unknown one"
            left_out.add(reason, place, repr(version))
        elif choice is None:
            left_out.add("choice: not c or d", place, repr(cells["me"]))
        else:
            person, name = f"{version}/{sequence}", f"{cells['data']} {version}"
            labels = {"design": name, "study": cells["data"]}
            row = Played(person, "dilemma", DILEMMA, design, name, person, labels)
            found.append((place, row, number, choice))
            if (other := _MOVES.get(cells["other_previous"])) is not None:
                # Of the round before.
                others[person, number - 1] = other
    for place, row, number, choice in found:
        told = others.get((row.person, number))
        after = {} if told is None else {"own": choice, "other": told}
        yield place, row, Decision(1, number, choice, after=after)


def _versions(path: Path) -> dict[str, dict[str, float]]:
    """The parameters of dilemmas by version, of those that are played as the package asks them.

    Raises:
        DataError: no such table, or a parameter that is no number, with its line.
    """
    designs = {}
    for line, cells in files.records(path, _VERSIONS):
        known = {}
        for name in _VERSIONS[1:]:
            number = number_or_none(cells[name])
            if number is None:
                raise DataError(f"{path}:{line}: {name} is {cells[name]!r}; it must be a number")
            known[name] = number
        design = {name: known[key] for key, name in PAYOFFS.items()}
        design |= {"continuation": known["continuation"], "error": known["error"]}
        if not known["infinite"]:
            design |= {"rounds": int(known["longest"]), "continuation": 0.0}
        if not known["stochastic_payoffs"] and not known["continuous_time"]:
            designs[cells["version"]] = design
    return designs


def _moblab(path: str | Path, left_out: LeftOut) -> _Lines:
    # Of each person and game the last session: its number, its last round, and how many it has.
    sessions: dict[tuple[str, str], tuple[int, int, int]] = {}
    for line, cells in usable(path, _MOBLAB, left_out):
        place, person, kind = f"line {line}", normal_id(cells["UserID"]), cells["gameType"]
        number, rounds = _whole(cells["Round"], 1), _whole(cells["totalRound"], 1)
        if not person or number is None or rounds is None:
            left_out.add("row: no participant or round", place, "")
            continue
        if kind not in _MOBLAB_GAMES:
            left_out.add("row: unknown gameType", place, repr(kind))
            continue
        if cells["Role"] == "second":
            left_out.add("row: the recipient, who decides nothing", place, person)
            continue
        if _whole(cells["Total"]) != 100:
            left_out.add("row: another stake than 100", place, cells["Total"])
            continue
        game, answers = _MOBLAB_GAMES[kind]
        asked, moves = [""], [cells["move"]]
        if game == "ultimatum":
            asked = ["offer", "limit"]
            moves = cells["move"].removeprefix("[").removesuffix("]").split(",")
        parsed = [answers.parse_cell(move) for move in moves]
        if len(parsed) != len(asked) or any(one.position is None for one in parsed):
            reasons = [one.reason for one in parsed if one.reason]
            reason = reasons[0] if len(parsed) == len(asked) else "not an offer and a limit"
            left_out.add(f"move: {reason}", place, repr(cells["move"]))
            continue
        match, last, of = sessions.get((person, game), (0, 0, 0))
        if number <= last or rounds != of:
            match += 1
        sessions[person, game] = match, number, rounds
        after = {"safe": cells["roundResult"] == "SAFE"} if game == "bomb" else {}
        row = Played(person, game, answers, {}, game, person, {"design": game})
        for which, one in zip(asked, parsed, strict=True):
            assert one.position is not None
            yield place, row, Decision(match, number, one.position, which, after)


def _whole(cell: str, least: int | None = None) -> int | None:
    """The whole number in a cell, at least `least`, else None."""
    number = number_or_none(cell)
    if number is None or not number.is_integer() or (least is not None and number < least):
        return None
    return int(number)


_DESIGN = (
    *("group_size", "multiplier", "contribution_type", "framing"),
    *("chat", "punishment", "reward", "rounds_shown"),
)
_PUBLIC_GOODS = (
    *("session", "participant", *_DESIGN),
    *("round", "contribution", "group_total", "others_seen", "gain"),
)
_DAL_BO = ("treatment", "id", "game", "period", "choice", "other.choice")
_FUDENBERG = (
    *("treatment", "id", "game", "period", "last.choice", "last.other", "choice", "bc", "error"),
)
_NAY = ("data", "version", "sequence", "period", "me", "other_previous")
_VERSIONS = (
    *("version", "stochastic_payoffs", "continuation", "infinite", "continuous_time", "error"),
    *("R", "S", "T", "P", "longest"),
)
_MOBLAB = ("UserID", "Role", "Round", "totalRound", "move", "Total", "roundResult", "gameType")
_MOBLAB_GAMES = {
    "dictator": ("dictator", _DOLLARS),
    "bomb_risk": ("bomb", _BOXES),
    "ultimatum_strategy": ("ultimatum", _DOLLARS),
}
_LAYOUTS = (
    _Layout("public goods", _PUBLIC_GOODS, _public_goods),
    _Layout("repeated dilemmas", _DAL_BO, _without_errors),
    _Layout("repeated dilemmas with errors", _FUDENBERG, _with_errors),
    _Layout("repeated dilemmas of several studies", _NAY, _several_studies),
    _Layout("MobLab's rounds", _MOBLAB, _moblab),
)
