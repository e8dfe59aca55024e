"""Questionnaires: their statements, keys and scales, and people's answers read from tables.

Two are known by the columns of their tables:

- `big_five_50`: the 50 Big Five markers of the IPIP as OpenPsychometrics asks them, columns `E1` to
  `O10`, 1 (disagree) to 5 (agree), 0 where an answer is missing;
- `bfi_25`: 25 IPIP items of the SAPA project as in R's `psych::bfi`, columns `A1` to `O5`, 1 (very
  inaccurate) to 6 (very accurate), empty where missing.

The statements are from the International Personality Item Pool (ipip.ori.org), which is in the
public domain.  A trait's score is the sum of its answers, those to reversed statements counted from
the other end; it is known of people who answered all of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import cast

import numpy as np
from jaxtyping import Int64

from befm_jax import files
from befm_jax.data.items import AnswerSet
from befm_jax.data.rows import SPLITS, LeftOut, Rows, drawn_part, fingerprint_of, sketch_of
from befm_jax.errors import DataError, unknown

AGES = range(13, 101)
NO_AGE = f"age: not {AGES[0]} to {AGES[-1]} (the person is kept)"
# What makes a cell.
CELLS = ("sex", "age_band")
REFERENCE_FILE = "big_five_by_sex_and_age.json"
# The first age of each band.
_BANDS = (13, 18, 25, 35, 45, 55, 65)


@dataclass(frozen=True)
class Statement:
    """A statement that people agree with or not, and the trait that it is counted for."""

    text: str
    trait: str
    is_reversed: bool


@dataclass(frozen=True, eq=False)
class Form:
    """A questionnaire.

    Attributes:
        id: its name.
        statements: by code, such as "E1", in the order in which they are asked.
        answers: the scale.
        scale: what the ends of the scale mean, for a prompt.
    """

    id: str
    statements: Mapping[str, Statement]
    answers: AnswerSet
    scale: str

    @cached_property
    def traits(self) -> dict[str, tuple[str, ...]]:
        """The codes of each trait's statements."""
        names = dict.fromkeys(statement.trait for statement in self.statements.values())
        return {
            name: tuple(code for code, one in self.statements.items() if one.trait == name)
            for name in names
        }

    def scores(self, trait: str) -> AnswerSet:
        """The possible scores of a trait."""
        number, (lowest, highest) = len(self.traits[trait]), self._ends
        return AnswerSet.numbers(range(number * lowest, number * highest + 1))

    def score(self, trait: str, answers: Mapping[str, int]) -> int | None:
        """The score of a trait from positions on the scale; None where an answer is missing."""
        lowest, highest = self._ends
        total = 0
        for code in self.traits[trait]:
            if code not in answers:
                return None
            value = lowest + answers[code]
            total += lowest + highest - value if self.statements[code].is_reversed else value
        return total

    @property
    def _ends(self) -> tuple[int, int]:
        assert self.answers.values is not None
        return int(self.answers.values[0]), int(self.answers.values[-1])


@dataclass(frozen=True)
class Questionnaire:
    """What one person answered.

    Attributes:
        person: an id that follows from the row's content: the tables have none.
        form: the id of the questionnaire.
        answers: code -> position on the scale, for each statement that was answered.
        age: in years; None where it is not known.
        labels: what else the table says of the person: sex, age_band, country, native_english,
            education.
    """

    person: str
    form: str
    answers: Mapping[str, int]
    age: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def scores(self) -> dict[str, int]:
        """Every trait of which all statements are answered, with its score."""
        form = get(self.form)
        found = {trait: form.score(trait, self.answers) for trait in form.traits}
        return {trait: score for trait, score in found.items() if score is not None}


@dataclass(frozen=True, eq=False)
class Cell:
    """What the people of one sex and age band answered, counted statement by statement.

    Attributes:
        form: the id of the questionnaire.
        labels: their `sex` and `age_band`.
        counts: code -> int64 `[A]` the number of people who gave each answer.
    """

    form: str
    labels: Mapping[str, str]
    counts: Mapping[str, Int64[np.ndarray, " A"]]

    @property
    def name(self) -> str:
        """The sex and age band: "female/18-24"."""
        return "/".join(self.labels[label] for label in CELLS)


def get(id: str) -> Form:
    """The questionnaire of this id.

    Raises:
        DataError: there is none; suggests similar ids.
    """
    if id not in _FORMS:
        raise unknown("questionnaire", id, _FORMS)
    return _FORMS[id]


def ids() -> list[str]:
    """The ids of all questionnaires."""
    return list(_FORMS)


def age_band(age: int) -> str:
    """The band of an age: "13-17", "18-24", ... "65+"."""
    start = max((first for first in _BANDS if first <= age), default=_BANDS[0])
    later = [first for first in _BANDS if first > start]
    return f"{start}-{later[0] - 1}" if later else f"{start}+"


def age_of(cell: str) -> int | None:
    """The age in a cell of a table; None where it is none that somebody has."""
    return int(cell) if cell.isascii() and cell.isdigit() and int(cell) in AGES else None


def read(path: str | Path) -> Rows[Questionnaire]:
    """Everybody's answers in a table of one of the questionnaires, CSV, tab-separated or Parquet.

    Ages that nobody has (birth years, jokes) are counted as left out, and the person stays without
    an age; so are answers that are not on the scale.

    Raises:
        DataError: no such file, columns of no questionnaire, or nobody who answered.
    """
    header, lines = files.table(path)
    form = next((one for one in _FORMS.values() if set(one.statements) <= set(header)), None)
    if form is None:
        codes = [(list(one.statements), one.id) for one in _FORMS.values()]
        expected = ", or ".join(f"{', '.join(sorted(of)[:3])} ... ({id})" for of, id in codes)
        raise DataError(
            f"{path}:1: columns of no questionnaire: found {', '.join(header)}; expected {expected}"
        )
    left_out = LeftOut()
    places = {name: at for at, name in enumerate(header)}
    describe = _PEOPLE[form.id]
    rows: dict[str, Questionnaire] = {}
    for line, cells in lines:
        place = f"line {line}"
        if len(cells) != len(header):
            what = f"{len(cells)} where the header has {len(header)}"
            left_out.add("row: wrong number of cells", place, what)
            continue
        answers = {}
        for code in form.statements:
            cell = cells[places[code]].strip()
            if cell in _MISSING:
                continue
            position, reason = form.answers.parse_cell(cell)
            if position is None:
                left_out.add(f"answer: {reason}", place, f"{code} {cell!r}")
            else:
                answers[code] = position
        if not answers:
            left_out.add("row: no statement is answered", place, "")
            continue
        age, labels = None, {}
        for name, value in describe({name: cells[at].strip() for name, at in places.items()}):
            if name != "age":
                labels[name] = value
            elif (age := age_of(value)) is not None:
                labels["age_band"] = age_band(age)
            else:
                left_out.add(NO_AGE, place, repr(value))
        # A person's id is a hash of all that is known of them, wherever the row is.
        said = repr((form.id, sorted(answers.items()), age, sorted(labels.items())))
        content = hashlib.sha256(said.encode()).hexdigest()[:16]
        if content in rows:
            left_out.add("row: the same as one before", place, "")
            continue
        rows[content] = Questionnaire(content, form.id, answers, age, labels)
    if not rows:
        raise DataError(f"{path}: nobody answered; {'; '.join(left_out.lines()) or 'no rows'}")
    source = f"{Path(path).name} ({form.id})"
    return Rows(list(rows.values()), source, fingerprint_of(rows), sketch_of(rows), left_out)


def read_reference() -> Rows[Cell]:
    """The embedded answers: the Big Five of OpenPsychometrics' visitors, counted by sex and age."""
    file = resources.files("befm_jax.data.reference").joinpath(REFERENCE_FILE)
    content = json.loads(file.read_text(encoding="utf-8"))
    codes = list(get(content["form"]).statements)
    cells = [
        Cell(
            content["form"],
            dict(zip(CELLS, name.split("/"), strict=True)),
            dict(zip(codes, np.array(counts, np.int64), strict=True)),
        )
        for name, counts in content["cells"].items()
    ]
    left_out = LeftOut({reason: int(number) for reason, number in content["excluded"].items()})
    return Rows(cells, content["source"], content["fingerprint"], left_out=left_out)


def counted(rows: Rows[Questionnaire] | Rows[Cell]) -> Rows[Cell]:
    """The answers by sex and age band; who has neither is in no cell."""
    if not rows.rows or isinstance(rows.rows[0], Cell):
        return cast(Rows[Cell], rows)
    cells: dict[tuple[str, ...], Cell] = {}
    for row in cast(Rows[Questionnaire], rows).rows:
        key = (row.form, *(row.labels.get(label, "") for label in CELLS))
        if not all(key):
            continue
        if key not in cells:
            form = get(row.form)
            counts = {code: np.zeros(len(form.answers), np.int64) for code in form.statements}
            cells[key] = Cell(row.form, dict(zip(CELLS, key[1:], strict=True)), counts)
        for code, position in row.answers.items():
            cells[key].counts[code][position] += 1
    return replace(cast(Rows[Cell], rows), rows=list(cells.values()))


def part(
    rows: Rows[Questionnaire] | Rows[Cell], split: str, seed: int = 0
) -> Rows[Questionnaire] | Rows[Cell]:
    """A split of people: by person where persons are known, else drawn without replacement.

    Raises:
        DataError: see `Rows.part`.
    """
    if not rows.rows or not isinstance(rows.rows[0], Cell) or split == "all":
        return cast(Rows[Questionnaire], rows).part(split, seed)
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    cells = [
        replace(
            cell,
            counts={
                code: drawn_part(counts, split, seed, f"{cell.name}/{code}")
                for code, counts in cell.counts.items()
            },
        )
        for cell in cast(Rows[Cell], rows).rows
    ]
    return replace(cast(Rows[Cell], rows), rows=cells, split=split, split_seed=seed)


_MISSING = ("", "0", "NA")
Described = Iterator[tuple[str, str]]


def _of_big_five(cells: Mapping[str, str]) -> Described:
    yield "age", cells.get("age", "")
    yield from _coded("sex", cells.get("gender"), {"1": "male", "2": "female", "3": "other"})
    yield from _coded("native_english", cells.get("engnat"), {"1": "yes", "2": "no"})
    country = cells.get("country", "")
    # "(nu" is what is left of a missing country.
    if len(country) == 2 and country.isalpha():
        yield "country", country


def _of_bfi(cells: Mapping[str, str]) -> Described:
    yield "age", cells.get("age", "")
    yield from _coded("sex", cells.get("gender"), {"1": "male", "2": "female"})
    levels = (
        *("some high school", "finished high school", "some college", "college graduate"),
        "graduate degree",
    )
    by_code = {str(number): level for number, level in enumerate(levels, 1)}
    yield from _coded("education", cells.get("education"), by_code)


def _coded(name: str, code: str | None, meanings: Mapping[str, str]) -> Described:
    if code is not None and code in meanings:
        yield name, meanings[code]


_TRAITS = {
    "E": "extraversion",
    "N": "emotional stability",
    "A": "agreeableness",
    "C": "conscientiousness",
    "O": "openness",
}


def _form(id: str, answers: AnswerSet, scale: str, statements: str) -> Form:
    """A form from lines of code, key (+: counted, -: reversed) and text."""
    parsed = {}
    for line in statements.strip().splitlines():
        code, key, text = line.split(maxsplit=2)
        parsed[code] = Statement(text, _TRAITS[code[0]], key == "-")
    return Form(id, parsed, answers, scale)


_FORMS = {
    form.id: form
    for form in (
        _form(
            "big_five_50",
            AnswerSet.numbers(range(1, 6)),
            "1 means that you disagree, 3 that you are neutral and 5 that you agree",
            """
E1 + I am the life of the party.
A1 - I feel little concern for others.
C1 + I am always prepared.
N1 - I get stressed out easily.
O1 + I have a rich vocabulary.
E2 - I don't talk a lot.
A2 + I am interested in people.
C2 - I leave my belongings around.
N2 + I am relaxed most of the time.
O2 - I have difficulty understanding abstract ideas.
E3 + I feel comfortable around people.
A3 - I insult people.
C3 + I pay attention to details.
N3 - I worry about things.
O3 + I have a vivid imagination.
E4 - I keep in the background.
A4 + I sympathize with others' feelings.
C4 - I make a mess of things.
N4 + I seldom feel blue.
O4 - I am not interested in abstract ideas.
E5 + I start conversations.
A5 - I am not interested in other people's problems.
C5 + I get chores done right away.
N5 - I am easily disturbed.
O5 + I have excellent ideas.
E6 - I have little to say.
A6 + I have a soft heart.
C6 - I often forget to put things back in their proper place.
N6 - I get upset easily.
O6 - I do not have a good imagination.
E7 + I talk to a lot of different people at parties.
A7 - I am not really interested in others.
C7 + I like order.
N7 - I change my mood a lot.
O7 + I am quick to understand things.
E8 - I don't like to draw attention to myself.
A8 + I take time out for others.
C8 - I shirk my duties.
N8 - I have frequent mood swings.
O8 + I use difficult words.
E9 + I don't mind being the center of attention.
A9 + I feel others' emotions.
C9 + I follow a schedule.
N9 - I get irritated easily.
O9 + I spend time reflecting on things.
E10 - I am quiet around strangers.
A10 + I make people feel at ease.
C10 + I am exacting in my work.
N10 - I often feel blue.
O10 + I am full of ideas.
""",
        ),
        _form(
            "bfi_25",
            AnswerSet.numbers(range(1, 7)),
            "1 means that it describes you very inaccurately and 6 very accurately",
            """
A1 - I am indifferent to the feelings of others.
A2 + I inquire about others' well-being.
A3 + I know how to comfort others.
A4 + I love children.
A5 + I make people feel at ease.
C1 + I am exacting in my work.
C2 + I continue until everything is perfect.
C3 + I do things according to a plan.
C4 - I do things in a half-way manner.
C5 - I waste my time.
E1 - I don't talk a lot.
E2 - I find it difficult to approach others.
E3 + I know how to captivate people.
E4 + I make friends easily.
E5 + I take charge.
N1 - I get angry easily.
N2 - I get irritated easily.
N3 - I have frequent mood swings.
N4 - I often feel blue.
N5 - I panic easily.
O1 + I am full of ideas.
O2 - I avoid difficult reading material.
O3 + I carry the conversation to a higher level.
O4 + I spend time reflecting on things.
O5 - I will not probe deeply into a subject.
""",
        ),
    )
}
_PEOPLE: dict[str, Callable[[Mapping[str, str]], Described]] = {
    "big_five_50": _of_big_five,
    "bfi_25": _of_bfi,
}
