"""What benchmarks train on: real people's choices, questionnaires and abstracts, or random rows.

The tables are no part of the project.  They are looked for in a folder beside it, one folder a
source; what is taken from them, and what can't be used, is said.
"""

from __future__ import annotations

import csv
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from befm_jax import files
from befm_jax.data import choices, games
from befm_jax.data.games import Game
from befm_jax.data.items import Example
from befm_jax.errors import DataError
from befm_jax.tasks.games import item_of

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"

QUESTIONNAIRE = (
    "You are a person who fills in a questionnaire about personality. You are told who you are and "
    "shown one statement. Say how well it describes you as you are now, compared with people of "
    "your age, from 1 (does not describe me at all) through 3 (neither one nor the other) to 5 "
    "(describes me very well). Reply with one number in square brackets, such as [2]."
)
GENDERS = {"1": "male", "2": "female", "3": "other"}
NATIVE = {"1": "yes", "2": "no"}
OLDEST = 100


@dataclass(frozen=True)
class Data:
    """Rows of examples (a person's, a paper's), the origin in words, and what was left out."""

    rows: list[list[Example]]
    said: str

    @property
    def examples(self) -> list[Example]:
        """Those of all rows."""
        return [example for row in self.rows for example in row]


def seven_games() -> list[Game]:
    """The games that people's choices are known of."""
    return [games.get(name) for name in games.ids() if games.get(name).reference]


def moblab(folder: Path, sample: int, seed: int) -> Data:
    """Every choice in the seven games of MobLab's table; there is nothing to sample."""
    del sample, seed
    read = choices.read(_there(folder / "moblab" / "joint.csv"), seven_games())
    rows = [[example] for example in _examples(read)]
    return Data(rows, choices.describe(read).replace("\n", "; "))


def bigfive(folder: Path, sample: int, seed: int) -> Data:
    """All answers of `sample` respondents to the fifty statements of the Big Five markers.

    The prompt is the instruction, who the respondent is, and one statement; what is not answered
    is left out.
    """
    wording = _statements(_there(folder / "bigfive" / "bigfive.tsv"))
    usable, left_out = [], Counter[str]()
    for row in _rows(_there(folder / "bigfive" / "bigfive_data.csv"), delimiter="\t"):
        reason = _unusable(row)
        if reason:
            left_out[reason] += 1
        else:
            usable.append(row)
    chosen = np.random.default_rng(seed).permutation(len(usable))[:sample]
    rows = []
    for row in (usable[number] for number in chosen):
        who = (
            f"Your age: {row['age']}. Your gender: {GENDERS[row['gender']]}. English is your "
            f"native language: {NATIVE[row['engnat']]}. Your country: {row['country']}."
        )
        rows.append(
            [
                Example.of(QUESTIONNAIRE, f"{who}\nThe statement: {statement}", f"[{row[item]}]")
                for item, statement in wording.items()
                if row[item] in ("1", "2", "3", "4", "5")
            ]
        )
    reasons = "; ".join(f"left out, {reason}: {count:,}" for reason, count in left_out.items())
    answers = sum(map(len, rows))
    said = f"{answers:,} answers of {len(chosen):,} of {len(usable):,} respondents ({reasons})"
    return Data(rows, said)


def literature(folder: Path, sample: int, seed: int) -> Data:
    """`sample` abstracts of economics journals, learnt whole after their titles."""
    usable, without = [], 0
    for name in ("aer_2020_2026.csv", "aej_2020_2026.csv"):
        for row in _rows(_there(folder / "literature_aer" / name)):
            title, abstract = row["title"].strip(), row["abstract"].strip()
            if title and abstract:
                usable.append(Example.of("", title, abstract))
            else:
                without += 1
    chosen = np.random.default_rng(seed).permutation(len(usable))[:sample]
    said = (
        f"{len(chosen):,} of {len(usable):,} abstracts (left out, without title or abstract: "
        f"{without:,})"
    )
    return Data([[usable[number]] for number in chosen], said)


READERS: dict[str, Callable[[Path, int, int], Data]] = {
    "moblab": moblab,
    "bigfive": bigfive,
    "literature": literature,
}


def game_examples() -> list[Example]:
    """One example for every choice made in the seven games, of the embedded reference."""
    return _examples(choices.read("", seven_games()))


def _examples(read: choices.Choices) -> list[Example]:
    counts = choices.histograms(read, seven_games())
    return [one for game in seven_games() for one in item_of(game, counts[game.id]).examples()]


def texts(examples: list[Example]) -> list[str]:
    """Every text once, for a tokenizer to learn from."""
    return list(dict.fromkeys(message.text for one in examples for message in one.messages))


def one_by_one(examples: list[Example], number: int, seed: int) -> list[Example]:
    """`number` observations drawn at random, each an example of its own."""
    weights = np.array([example.weight for example in examples])
    drawn = np.random.default_rng(seed).choice(len(examples), number, p=weights / weights.sum())
    return [dataclasses.replace(examples[one], weight=1.0) for one in drawn]


def _there(path: Path) -> Path:
    if not path.is_file():
        raise DataError(
            f"{path}: not there. The table is no part of the project; --shared names the folder "
            f"that holds {path.parent.name}/{path.name}"
        )
    return path


def _rows(path: Path, delimiter: str = ",") -> Iterator[dict[str, str]]:
    text = files.decode(files.read_bytes(path), path)
    yield from csv.DictReader(text.splitlines(keepends=True), delimiter=delimiter)


def _statements(path: Path) -> dict[str, str]:
    lines = files.decode(files.read_bytes(path), path).splitlines()
    return dict(line.split("\t", 1) for line in lines if "\t" in line)


def _unusable(row: dict[str, str]) -> str:
    """Why a respondent can't be described; "" where they can."""
    if not (row["age"].isdigit() and 0 < int(row["age"]) <= OLDEST):
        return f"an age that is none or above {OLDEST}"
    if row["gender"] not in GENDERS or row["engnat"] not in NATIVE or not row["country"]:
        return "gender, language or country missing"
    return ""
