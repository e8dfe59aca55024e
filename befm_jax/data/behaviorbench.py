"""BehaviorBench's files: the published benchmark's records, read from its directory as it is.

The layout is that of huggingface.co/datasets/befm/BehaviorBench (arXiv 2606.24162): JSON Lines, a
record a line, with the texts `system`, `user` and `assistant`; the answer is the assistant's.  Some
files have `metadata`: whose record it is (`user_id` or `subject_idx`), which statement is asked
(`target_item`), what the others in a group guessed (`other_players_choices`), the `journal`.

Answers are `[33]`, `[$33]`, `33`, `[Push]`, or letters (`BC`, `[BC]`): how most records of a file
have them is how all its answers are written.  Numbers are whole; a fraction in a record counts as
the nearest.  An answer outside its range is an error, but for ages: those of jokes are left out.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from befm_jax import files
from befm_jax.data import questionnaires
from befm_jax.data.items import AnswerSet, FreeText, Message, number_in
from befm_jax.data.rows import LeftOut, Rows, drawn_part, fingerprint_of, normal_id, sketch_of
from befm_jax.errors import DataError

TRAITS = ("Extraversion", "Neuroticism", "Agreeableness", "Conscientiousness", "Openness")
SCORES, AGES = range(10, 51), range(121)
# Those of an answer written as a file has it: "[$", "33", "]".
_WRITTEN = re.compile(r"\s*(\[?\$?)\s*([-+\w.,]+)\s*(\]?)\s*")


@dataclass(frozen=True, eq=False)
class Record:
    """One record: a question as it stands in a file, and its answer.

    Attributes:
        id: the file's name and the line, "dictator/12".
        person: whose record it is; where a file does not say, an id that follows from the record.
        prompt: the system's message, if there is one, and the user's.
        answers: the file's answers.
        answer: the position of the answer; of free text, the text.
        labels: game, trait, statement, step, journal: what the file and the record are about.
        others: what the others in the group guessed, in a guessing game.
    """

    id: str
    person: str
    prompt: tuple[Message, ...]
    answers: AnswerSet | FreeText
    answer: int | str
    labels: Mapping[str, str] = field(default_factory=dict)
    others: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Population:
    """The records of a file that all ask the same of different people.

    Attributes:
        id: the file's name, "dictator".
        prompt: what all are asked.
        answers: the possible answers.
        counts: how many gave each.
        labels: the game.
    """

    id: str
    prompt: tuple[Message, ...]
    answers: AnswerSet
    counts: Int64[np.ndarray, " A"]
    labels: Mapping[str, str]


class _File(NamedTuple):
    """A file: its name, its answers, where it is, and what all of its records are about."""

    name: str
    answers: AnswerSet | FreeText
    path: str
    labels: Mapping[str, str] = {}


def _numbers(values: range) -> AnswerSet:
    return replace(AnswerSet.numbers(values), nearest=True)


_HUNDRED, _COINS, _RETURNED = _numbers(range(101)), _numbers(range(21)), _numbers(range(151))
_CARDS = AnswerSet.labels("Push", "Pull", values=(0, 1))
_LIKERT = _numbers(range(1, 6))
_GAMES = {
    "dictator": _HUNDRED,
    "ultimatum_proposer": _HUNDRED,
    "ultimatum_responder": _HUNDRED,
    "trust_investor": _HUNDRED,
    "trust_banker": _RETURNED,
    "public_goods": _COINS,
    "bomb": _HUNDRED,
    "guessing": _HUNDRED,
}
_ROUNDS = {
    **{name: _GAMES[name] for name in ("dictator", "trust_investor", "public_goods", "bomb")},
    "guessing": _HUNDRED,
    "trust_banker_inv50": _RETURNED,
    "trust_banker_inv100": _numbers(range(301)),
}
_STEPS = {
    "idea": "idea_generation",
    "method": "method_recommendation",
    "outcome": "outcome_prediction",
    "impact": "impact_prediction",
    "title": "title_prediction",
}


def _of_games(games: Mapping[str, AnswerSet], path: str) -> tuple[_File, ...]:
    """The files of games; `path` has the name of the game in the place of {}."""
    return tuple(
        _File(name, answers, f"moblab/{path.format(name)}", {"game": name})
        for name, answers in games.items()
    )


def _of_survey(name: str, answers: AnswerSet) -> tuple[_File, ...]:
    return (_File(name, answers, f"big_five/{name}/test.jsonl"),)


_FIRST, _LATER = "game_behavior/{}_test.jsonl", "multiround_behavior/{}_multiround_test.jsonl"
_ACROSS = "acrossgame_behavior/acrossgame_{}_test.jsonl"
SETS: Mapping[str, tuple[_File, ...]] = {
    "games": _of_games(_GAMES, _FIRST),
    "push_pull": _of_games({"push_pull": _CARDS}, _FIRST),
    "across": _of_games(_GAMES, _ACROSS),
    "across_push_pull": _of_games({"push_pull": _CARDS}, _ACROSS),
    "rounds": _of_games(_ROUNDS, _LATER),
    "rounds_push_pull": _of_games({"push_pull": _CARDS}, _LATER),
    "guessing": _of_games(
        {"guessing": _HUNDRED}, "strategic_gameplay/{}_strategic_gameplay_test.jsonl"
    ),
    "traits": _of_survey("pers_score_pred", _numbers(SCORES)),
    "other_traits": _of_survey("acrossdim_pers_score", _numbers(SCORES)),
    "answer": _of_survey("surv_resp_pred", _LIKERT),
    "masked": _of_survey("missing_surv_resp", _LIKERT),
    "next": _of_survey("seq_surv_resp", _LIKERT),
    "age": _of_survey("demo_pred_age", _numbers(AGES)),
    "contest": (
        _File(
            "ieo_economics",
            AnswerSet.letters(4, several=True),
            "economics_contests/ieo_economics.jsonl",
        ),
    ),
    "workflow": tuple(
        _File(
            name,
            FreeText(64 if step == "title" else 256),
            f"workflows/{name}_test.jsonl",
            {"step": step},
        )
        for step, name in _STEPS.items()
    ),
}


def read(folder: str | Path, name: str) -> Rows[Record]:
    """The records of one of `SETS` in the benchmark's directory, one a row.

    Records that can't be used are counted as left out: ages that nobody has, and guesses in a group
    without others.

    Raises:
        DataError: a missing, empty or damaged file; a record without a field, with another type of
            value or an answer outside its range (with file and line); no record that can be used.
    """
    left_out = LeftOut()
    by_file = [list(_records(Path(folder), file, name, left_out)) for file in SETS[name]]
    # In turn of each file, so that the first so many are of all games or steps.
    usable = list(filter(None, itertools.chain.from_iterable(itertools.zip_longest(*by_file))))
    rows, facts = [record for record, _ in usable], {fact for _, fact in usable}
    if not rows:
        raise DataError(f"{folder}: no record of {name}; {'; '.join(left_out.lines())}")
    return Rows(rows, _source(folder, name), fingerprint_of(facts), sketch_of(facts), left_out)


def read_populations(folder: str | Path, name: str) -> Rows[Population]:
    """The records of one of `SETS` whose files ask the same of everybody, one a file.

    A split has a part of each file's records, drawn.

    Raises:
        DataError: as `read`; a record that asks something else than the file's first.
    """
    left_out = LeftOut()
    rows, facts = [], set()
    for file in SETS[name]:
        records = [record for record, _ in _records(Path(folder), file, name, left_out)]
        first = records[0]
        assert isinstance(first.answers, AnswerSet)
        for record in records:
            if record.prompt != first.prompt:
                line = record.id.split("/")[-1]
                raise DataError(
                    f"{Path(folder) / file.path}:{line}: asks something else than the file's first "
                    "record; all ask the same"
                )
        positions = [int(record.answer) for record in records]
        counts = np.bincount(positions, minlength=len(first.answers)).astype(np.int64)
        rows.append(Population(file.name, first.prompt, first.answers, counts, file.labels))
        facts.add(repr((file.path, first.prompt[-1].text, counts.tolist())))
    source = _source(folder, name)
    fingerprint, sketch = fingerprint_of(facts), sketch_of(facts)
    return Rows(rows, source, fingerprint, sketch, left_out, within=_drawn)


def _drawn(row: Population, split: str, seed: int) -> Population | None:
    counts = drawn_part(row.counts, split, seed, row.id)
    return replace(row, counts=counts) if counts.any() else None


def _source(folder: str | Path, name: str) -> str:
    return f"{Path(folder).name} (BehaviorBench, {name})"


def _records(
    folder: Path, file: _File, name: str, left_out: LeftOut
) -> Iterator[tuple[Record, str]]:
    """The records of a file that can be used, each with the fact that it is."""
    path = folder / file.path
    lines = [
        (line, _checked(record, f"{path}:{line}")) for line, record in files.json_records(path)
    ]
    answers = _as_written(file.answers, [record["assistant"] for _, record in lines])
    for line, record in lines:
        place = f"{path}:{line}"
        answer = _answer(record["assistant"], answers)
        if answer is None and name == "age" and number_in(record["assistant"]) is not None:
            left_out.add(f"age: not {AGES[0]} to {AGES[-1]}", place, record["assistant"])
            continue
        if answer is None:
            assert isinstance(answers, AnswerSet)
            raise DataError(
                f"{place}: assistant is {record['assistant']!r:.40}; it must be an answer: "
                f"{answers.in_words}"
            )
        others = _others(record, place) if name == "guessing" else ()
        if name == "guessing" and not others:
            left_out.add("guess: nobody else in the group", place, record["assistant"])
            continue
        fact = repr((file.path, record["user"], record["assistant"]))
        system = (Message("system", record["system"]),) if record["system"] else ()
        prompt = (*system, Message("user", record["user"]))
        labels = {**file.labels, **_labels(record, name, place)}
        id, person = f"{file.name}/{line}", _person(record)
        yield Record(id, person, prompt, answers, answer, labels, others), fact


def _checked(record: dict[str, Any], place: str) -> dict[str, Any]:
    """The record, if it has the texts it must have."""
    for name in ("system", "user", "assistant"):
        if name not in record:
            raise DataError(
                f"{place}: no {name}; a record has system, user and assistant; found "
                f"{', '.join(record) or 'nothing'}"
            )
        if not isinstance(record[name], str):
            kind = type(record[name]).__name__
            raise DataError(f"{place}: {name} is a {kind}; it must be a text")
        if name != "system" and not record[name].strip():
            raise DataError(f"{place}: {name} is blank; it must be a text")
    if not isinstance(record.get("metadata", {}), dict):
        kind = type(record["metadata"]).__name__
        raise DataError(f"{place}: metadata is a {kind}; it must be an object")
    return record


def _as_written(answers: AnswerSet | FreeText, texts: list[str]) -> AnswerSet | FreeText:
    """The answers as most of these texts are written: in brackets or not, with a dollar sign."""
    if isinstance(answers, FreeText):
        return answers
    found = Counter((form[1], form[3]) for text in texts if (form := _WRITTEN.fullmatch(text)))
    if not found:
        return answers
    ((before, after), _), *_ = found.most_common(1)
    return replace(answers, written=tuple(f"{before}{name}{after}" for name in answers.names))


def _answer(text: str, answers: AnswerSet | FreeText) -> int | str | None:
    """The position of the answer, or its text; None where it is none of the answers."""
    if isinstance(answers, FreeText):
        return text
    if answers.nearest and answers.values:
        number = number_in(text)
        if number is None or not answers.values[0] <= number <= answers.values[-1]:
            return None
    return answers.parse(text).position


def _person(record: Mapping[str, Any]) -> str:
    metadata = record.get("metadata", {})
    for name in ("user_id", "subject_idx"):
        if isinstance(metadata.get(name), int | str):
            return normal_id(str(metadata[name]))
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def _labels(record: Mapping[str, Any], name: str, place: str) -> dict[str, str]:
    """What a record of a set is about: its trait, statement or journal."""
    metadata, asked = record.get("metadata", {}), record["user"]
    if name in ("traits", "other_traits"):
        marked = [trait for trait in TRAITS if f"*{trait}*" in asked]
        if len(marked) != 1:
            raise DataError(f"{place}: user must mark the trait that is asked as *Extraversion*")
        return {"trait": marked[0]}
    if name in ("masked", "next"):
        if not isinstance(metadata.get("target_item"), str):
            raise DataError(
                f"{place}: metadata.target_item is {metadata.get('target_item')!r:.40}; it must be "
                "the statement that is asked, such as 'E1'"
            )
        return {"statement": metadata["target_item"]}
    if name == "answer":
        form = questionnaires.get("big_five_50")
        found = [code for code, one in form.statements.items() if one.text in asked]
        if len(found) != 1:
            raise DataError(f"{place}: user must hold one of the 50 Big Five statements")
        return {"statement": found[0]}
    journal = record.get("journal", metadata.get("journal"))
    return {"journal": journal} if name == "workflow" and isinstance(journal, str) else {}


def _others(record: Mapping[str, Any], place: str) -> tuple[float, ...]:
    others = record.get("metadata", {}).get("other_players_choices")
    known = isinstance(others, list) and all(type(one) in (int, float) for one in others)
    if not known or not all(0 <= one <= 100 for one in others):
        raise DataError(
            f"{place}: metadata.other_players_choices is {others!r:.40}; it must be a list of "
            "numbers from 0 to 100"
        )
    return tuple(map(float, others))
