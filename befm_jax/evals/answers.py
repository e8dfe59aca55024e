"""What a model answered in a game, exactly or by sampling, and the two files that hold it.

`choices.csv` has the columns `game,participant,choice`: a row a simulated participant, the choice
in the game's own unit, empty where the answer could not be parsed.  `distribution.csv` has
`game,choice,probability`: the model's exact distribution; what a game's probabilities lack to 1
is mass outside its answer set.  The header tells which one a file is; further columns are
ignored.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from befm_jax import files
from befm_jax.data import games
from befm_jax.errors import DataError

_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class Answers:
    """A model's answers in one game over its `A` values, ascending.

    `from_distribution` and `from_counts` work out the fields that follow from the others.

    Attributes:
        weights: `[A]` float64, read-only.  Exact: shares that sum to 1.  Sampled: counts of the
            answers that are in the set.  All zero only if nothing the model said is in the set
            (`outside` is 1): such answers can be counted but not compared.
        exact: whether the weights are the model's whole distribution, not draws from it.
        outside: probability (exact) or share of answers (sampled) outside the answer set.
        total: number of answers asked for; None if exact.
        unparsed: sampled answers in which no choice could be read.
        out_of_set: sampled answers with a choice that the game does not allow.
        ends_after_answer: how often the model's turn ends right there once it has written an
            answer of the set: a probability (exact) or a share of such answers (sampled); None
            where nobody knows.

    Raises:
        ValueError: weights that are no list of finite, non-negative numbers; an exact
            distribution that does not sum to 1; counts that are not whole or do not add up.
    """

    weights: NDArray[np.float64]
    exact: bool
    outside: float
    total: int | None
    unparsed: int = 0
    out_of_set: int = 0
    ends_after_answer: float | None = None

    def __post_init__(self) -> None:
        weights = np.array(self.weights, np.float64)  # a copy: the caller's array stays theirs
        weights.flags.writeable = False
        object.__setattr__(self, "weights", weights)
        if weights.ndim != 1 or len(weights) < 2:
            raise ValueError(f"weights: shape {weights.shape}; one number for each of the values")
        if not np.isfinite(weights).all() or (weights < 0).any():
            raise ValueError("weights: must be finite and not negative")
        if not 0.0 <= self.outside <= 1.0:
            raise ValueError(f"outside: {self.outside}; a share lies between 0 and 1")
        if self.ends_after_answer is not None and not 0.0 <= self.ends_after_answer <= 1.0:
            raise ValueError(f"ends_after_answer: {self.ends_after_answer}; not a share")
        if self.empty and self.outside < 1.0 - _TOLERANCE:
            raise ValueError("weights: all are 0; at least one must be positive")
        if self.exact:
            self._check_distribution()
        else:
            self._check_counts()

    def _check_distribution(self) -> None:
        if not self.empty and abs(self.weights.sum() - 1.0) > _TOLERANCE:
            raise ValueError(
                f"weights: sum to {self.weights.sum():.6g}; an exact distribution sums to 1 "
                "(from_distribution takes one with mass missing)"
            )
        if self.total is not None or self.unparsed or self.out_of_set:
            raise ValueError("total, unparsed, out_of_set: count draws; exact answers have none")

    def _check_counts(self) -> None:
        if (self.weights != np.floor(self.weights)).any():
            raise ValueError("weights: counts of answers are whole numbers")
        if self.unparsed < 0 or self.out_of_set < 0:
            raise ValueError("unparsed, out_of_set: counts are not negative")
        left_out = self.unparsed + self.out_of_set
        counted = int(self.weights.sum()) + left_out
        if self.total != counted or counted == 0:
            raise ValueError(f"total: {self.total}, but {counted} answers are counted")
        if abs(self.outside - left_out / counted) > _TOLERANCE:
            raise ValueError(f"outside: {self.outside}, but {left_out} of {counted} are outside")

    @property
    def empty(self) -> bool:
        """Whether none of the answers is in the game's set."""
        return not self.weights.any()

    @property
    def distribution(self) -> NDArray[np.float64]:
        """`[A]` the shares of the answers within the set; all zero if there are none."""
        return self.weights if self.empty else self.weights / self.weights.sum()

    @classmethod
    def from_distribution(cls, mass: ArrayLike) -> Answers:
        """Exact answers from the model's mass on each of the `[A]` values.

        What the masses lack to 1 is `outside`; what is there is normalised.

        Raises:
            ValueError: negative or non-finite mass, or more than 1 in all.
        """
        weights = np.asarray(mass, np.float64)
        inside = float(weights.sum())
        if inside > 1.0 + _TOLERANCE:
            raise ValueError(f"mass: sums to {inside:.8g}; a model has no more than 1")
        normalised = weights / inside if inside > 0.0 else weights
        return cls(normalised, exact=True, outside=max(0.0, 1.0 - inside), total=None)

    @classmethod
    def from_counts(
        cls,
        counts: ArrayLike,
        unparsed: int = 0,
        out_of_set: int = 0,
        ends_after_answer: float | None = None,
    ) -> Answers:
        """Sampled answers from the number on each of the `[A]` values and those left out."""
        weights = np.asarray(counts, np.float64)
        left_out = unparsed + out_of_set
        total = int(weights.sum()) + left_out
        outside = left_out / total if total else 0.0
        return cls(weights, False, outside, total, unparsed, out_of_set, ends_after_answer)


def read_answers(path: Path | str) -> dict[str, Answers]:
    """Each game's answers from a `choices.csv` or a `distribution.csv`.

    UTF-8 with or without a byte-order mark, any line ends.  A choice that the game does not
    allow, or that is not whole, is counted in `out_of_set` (choices) or adds to `outside`
    (distribution), never dropped in silence.

    Raises:
        DataError: no such file, not text, empty, a column missing, an unknown game, text where a
            number belongs, a choice given twice, or probabilities that are negative or exceed 1.
    """
    header, lines = files.read_table(files.decode(files.read_bytes(path), path), path)
    for column in ("game", "choice"):
        if column not in header:
            raise DataError(f"{path}:1: no column {column!r}; found {', '.join(header)}")
    if "probability" not in header and "participant" not in header:
        raise DataError(
            f"{path}:1: neither a column 'participant' (choices: game,participant,choice) nor "
            f"'probability' (distribution: game,choice,probability); found {', '.join(header)}"
        )
    rows = list(_rows(path, header, lines))
    if not rows:
        raise DataError(f"{path}: a header but no rows")
    return (_read_distribution if "probability" in header else _read_choices)(path, rows)


_Row = tuple[int, dict[str, str]]


def _rows(
    path: Path | str, header: list[str], lines: Iterator[tuple[int, list[str]]]
) -> Iterator[_Row]:
    """Each row's cells by column, with the number of its line."""
    for line, cells in lines:
        if len(cells) != len(header):
            raise DataError(f"{path}:{line}: {len(cells)} cells, but {len(header)} columns")
        yield line, dict(zip(header, (cell.strip() for cell in cells), strict=True))


def _read_choices(path: Path | str, rows: list[_Row]) -> dict[str, Answers]:
    counts: dict[str, NDArray[np.float64]] = {}
    unparsed: Counter[str] = Counter()
    out_of_set: Counter[str] = Counter()
    positions: dict[str, dict[float, int]] = {}
    for line, row in rows:
        game = row["game"]
        if game not in positions:
            positions[game] = _positions(path, line, game)
            counts[game] = np.zeros(len(positions[game]))
        if not row["choice"]:
            unparsed[game] += 1
            continue
        position = positions[game].get(_number(path, line, "choice", row["choice"]))
        if position is None:
            out_of_set[game] += 1
        else:
            counts[game][position] += 1
    return {
        game: Answers.from_counts(counted, unparsed[game], out_of_set[game])
        for game, counted in counts.items()
    }


def _read_distribution(path: Path | str, rows: list[_Row]) -> dict[str, Answers]:
    masses: dict[str, dict[float, float]] = {}
    positions: dict[str, dict[float, int]] = {}
    for line, row in rows:
        game = row["game"]
        if game not in masses:
            positions[game] = _positions(path, line, game)
            masses[game] = {}
        choice = _number(path, line, "choice", row["choice"])
        probability = _number(path, line, "probability", row["probability"])
        if probability < 0.0:
            raise DataError(
                f"{path}:{line}: probability {row['probability']} is negative; "
                "a probability lies between 0 and 1"
            )
        if choice in masses[game]:
            raise DataError(f"{path}:{line}: {game} has the choice {row['choice']} twice")
        masses[game][choice] = probability
    answers = {}
    for game, mass in masses.items():
        total = math.fsum(mass.values())
        if total > 1.0 + _TOLERANCE:
            raise DataError(
                f"{path}: the probabilities of {game} sum to {total:.8g}; at most 1 is right"
            )
        answers[game] = Answers.from_distribution(
            [mass.get(choice, 0.0) for choice in positions[game]]
        )
    return answers


def _positions(path: Path | str, line: int, game: str) -> dict[float, int]:
    """The game's values in their order, each with its position."""
    try:
        values = games.get(game).values
    except (DataError, KeyError) as error:
        raise DataError(
            f"{path}:{line}: {error.args[0]} (--games takes .py files that declare more)"
        ) from None
    return {float(value): position for position, value in enumerate(values)}


def _number(path: Path | str, line: int, field: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{path}:{line}: {field} {text!r} is not a number")
    return number


def write_choices(path: Path | str, choices: Mapping[str, Sequence[int | None]]) -> None:
    """Write `choices.csv`: each game's answers, participants numbered from 0; None: unparsed."""
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["game", "participant", "choice"])
        for game, chosen in choices.items():
            for participant, choice in enumerate(chosen):
                writer.writerow([game, participant, "" if choice is None else int(choice)])


def write_distribution(path: Path | str, answers: Mapping[str, Answers]) -> None:
    """Write `distribution.csv`: the mass on every value, so that it sums to 1 less `outside`.

    Probabilities are written in full precision.

    Raises:
        ValueError: sampled answers, which would come back as if they were exact, or answers that
            do not have a weight for each of the game's values.
    """
    tables = {game: games.get(game).values for game in answers}
    for game, answer in answers.items():
        if not answer.exact:
            raise ValueError(f"{game}: sampled answers belong in choices.csv (write_choices)")
        if len(answer.weights) != len(tables[game]):
            raise ValueError(
                f"{game}: {len(answer.weights)} weights, but {len(tables[game])} choices"
            )
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["game", "choice", "probability"])
        for game, answer in answers.items():
            mass = answer.weights * (1.0 - answer.outside)
            for value, probability in zip(tables[game], mass, strict=True):
                writer.writerow([game, int(value), repr(float(probability))])
