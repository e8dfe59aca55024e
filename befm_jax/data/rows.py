"""Rows: what a reader gives, one a person (or paper), and what it had to leave out.

A person is read once and kept whole; splits are made after reading, by person, so that the parts
are disjoint whatever the layout of the table.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import Int64

from befm_jax import files
from befm_jax.errors import DataError, printable, unknown

Row = TypeVar("Row")
SPLITS = ("all", "train", "validation", "test")
_EXAMPLES_PER_REASON = 5
_PERMUTATIONS = 64
# Two tables with ids from 1 to n share a tenth of who chose what by chance. Too many recognised
# costs people to compare with; too few, and a model is compared with those it learnt from.
_SAME_PEOPLE = 0.2
# Zeros in one place alone: in two, a long row of them would be tried in every division.
_WHOLE_NUMBER = re.compile(r"([+-]?)0*([1-9]\d*|0)(?:\.0*)?")


# Columns that say for how many people a row stands: with a word such as "weight", "pspwght" or
# "WTSSPS" in their name, or called one of these.
_WEIGHT = re.compile(r"[a-z]*(weights?|wgh?t|wts?)|wtss[a-z]*")
_COUNTS = ("count", "freq", "frequency")


@dataclass
class LeftOut:
    """What a reader could not use: how much for each reason, and the first few with their place."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, place: str, what: str) -> None:
        """Counts something under its reason; `place` is where it is, such as "line 7"."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < _EXAMPLES_PER_REASON:
            shown.append(f"{place}: {what if len(what) <= 60 else what[:57] + '...'}")

    def add_weights(self, column: str) -> None:
        """Notes a column of sampling weights, which no figure uses."""
        reason = f"column {column!r}: weights are not used, people count alike"
        self.add(reason, "line 1", repr(column))

    def lines(self) -> list[str]:
        """One line a reason, for a reader."""
        shown = {reason: f" ({'; '.join(places)})" for reason, places in self.examples.items()}
        return [
            printable(f"left out, {reason}: {number:,}{shown.get(reason, '')}")
            for reason, number in self.counts.items()
        ]


def of_person(row: Any, split: str, seed: int) -> Any:
    """The row where its person is in the split, else None."""
    return row if split_of(str(row.person), seed) == split else None


@dataclass(frozen=True)
class Rows(Generic[Row]):
    """The rows of one source.

    Attributes:
        rows: one a person or paper; random access is all that is asked of it.
        source: what they were read from, for a reader.
        fingerprint: SHA-256 of what was read, whatever file holds it: see `fingerprint_of`.
        sketch: by which a table is recognised that shares many of its people: see `sketch_of`;
            "" where persons are not known.
        left_out: what could not be used, of the whole source.
        split: which part of the source these are: one of `SPLITS`.
        split_seed: which of the possible splits.
        within: from a row, a split and a seed to what of the row is in that split, None for
            nothing: for rows that are not split by their `person` alone.
    """

    rows: Sequence[Row]
    source: str
    fingerprint: str
    sketch: str = ""
    left_out: LeftOut = field(default_factory=LeftOut)
    split: str = "all"
    split_seed: int = 0
    within: Callable[[Row, str, int], Row | None] = of_person

    @classmethod
    def of(cls, rows: Iterable[Row], source: object) -> Rows[Row]:
        """Rows of one's own: dataclasses with the id of a `person`, in any order.

        Raises:
            DataError: there are none.
        """
        kept = list(rows)
        if not kept:
            raise DataError(f"{source}: no rows")
        facts = {repr(row) for row in kept}
        return cls(kept, str(source), fingerprint_of(facts), sketch_of(facts))

    @classmethod
    def read(
        cls,
        path: str | Path,
        columns: Sequence[str],
        row: Callable[[dict[str, str]], Row],
    ) -> Rows[Row]:
        """Rows of a table of one's own, CSV or Parquet, as `of`.

        Args:
            path: the table.
            columns: the names of the columns that are needed.  Columns of weights that are not
                among them are noted in `left_out`.
            row: from a line's cells by column to its row.  Lines for which it raises a DataError
                are left out, with the message as the reason.

        Raises:
            DataError: as `files.records`; or there are no rows.
        """
        rows, left_out = [], LeftOut()
        for number, (line, cells) in enumerate(files.records(path, columns)):
            for name in weights_in(cells) if number == 0 else ():
                if name not in columns:
                    left_out.add_weights(name)
            try:
                rows.append(row(cells))
            except DataError as error:
                shown = ", ".join(f"{name} {cells[name]!r}" for name in columns)
                left_out.add(str(error), f"line {line}", shown)
        if not rows:
            raise DataError(f"{path}: no rows; {'; '.join(left_out.lines()) or 'there are none'}")
        return replace(cls.of(rows, Path(path).name), left_out=left_out)

    def part(self, split: str, seed: int = 0) -> Rows[Row]:
        """What is in a split: the rows of its persons, unless `within` says otherwise.

        For one seed the parts are disjoint; parts of persons add up to the whole.

        Args:
            split: one of `SPLITS`.
            seed: which of the possible splits.

        Raises:
            DataError: an unknown split, rows that are a part already, or nobody in the split.
        """
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        if split == "all":
            return self
        if self.split != "all":
            raise DataError(f"{self.source}: these rows are the {self.split} split already")
        parts = (self.within(row, split, seed) for row in self.rows)
        kept = [row for row in parts if row is not None]
        if not kept:
            raise DataError(f"{self.source}: nobody is in the {split} split of seed {seed}")
        return replace(self, rows=kept, split=split, split_seed=seed)

    def shares_people(self, sketch: str) -> bool:
        """Whether a good part of these people (a fifth) are those of another source's sketch.

        So the people that a model was trained on are recognised in a table that has more rows, or
        fewer.
        """
        return resemblance(self.sketch, sketch) > _SAME_PEOPLE


def usable(
    path: str | Path, columns: Sequence[str], left_out: LeftOut
) -> Iterator[tuple[int, dict[str, str]]]:
    """The lines of a table with their numbers, each as stripped cells by column.

    Lines with another number of cells than the header are counted as left out.

    Args:
        path: the table.
        columns: required columns; the others are included too.
        left_out: where they are counted.

    Raises:
        DataError: as `files.table`; a missing column.
    """
    header, lines = files.table(path)
    if missing := [column for column in columns if column not in header]:
        raise DataError(
            f"{path}:1: no column {', '.join(map(repr, missing))}; found "
            f"{', '.join(map(repr, header))}"
        )
    for line, cells in lines:
        if len(cells) == len(header):
            yield line, dict(zip(header, (cell.strip() for cell in cells), strict=True))
        else:
            what = f"{len(cells)} where the header has {len(header)}"
            left_out.add("row: wrong number of cells", f"line {line}", what)


def fingerprint_of(facts: Iterable[str]) -> str:
    """SHA-256 of a set of facts, such as who chose what, as hexadecimal digits.

    Neither their order nor the file that holds them counts: a table that was saved again, with
    other line ends, a byte-order mark or rows sorted otherwise, has the same fingerprint.
    """
    return hashlib.sha256("\n".join(sorted(set(facts))).encode()).hexdigest()


def sketch_of(facts: Iterable[str]) -> str:
    """64 bytes, in hexadecimal digits, that resemble those of a set that shares many facts.

    MinHash with one byte a permutation (P. Li, A. C. König, "b-Bit Minwise Hashing", WWW 2010).
    A byte tells next to nothing of the fact that it comes from, so that a sketch can be published
    with a model.  "" for no facts.
    """
    digests = [hashlib.sha256(fact.encode()).digest()[:8] for fact in set(facts)]
    if not digests:
        return ""
    hashed = np.frombuffer(b"".join(digests), "<u8")
    smallest = []
    for number in range(_PERMUTATIONS):
        seed = hashlib.sha256(f"permutation {number}".encode()).digest()
        flip, factor = np.frombuffer(seed[:16], "<u8")
        permuted = (hashed ^ flip) * (factor | np.uint64(1))  # modulo 2^64; odd: one to one
        smallest.append(int(permuted.min()) & 255)
    return bytes(smallest).hex()


def resemblance(sketch: str, other: str) -> float:
    """About what share of two sets' facts are in both (their Jaccard index), from their sketches.

    The standard error is .06 at most; sets that share nothing have .004.  0 without a sketch.
    """
    if len(sketch) != len(other) or not sketch:
        return 0.0
    pairs = zip(bytes.fromhex(sketch), bytes.fromhex(other), strict=True)
    return sum(one == another for one, another in pairs) / _PERMUTATIONS


def normal_id(person: str) -> str:
    """A person's id as it is compared: `131074`, `131074.0` and `0131074` are one person."""
    text = person.strip()
    found = _WHOLE_NUMBER.fullmatch(text)
    return f"{found[1].replace('+', '')}{found[2]}" if found else text


def weights_in(header: Iterable[str]) -> list[str]:
    """The columns that say for how many people a row stands, by their names: sampling weights."""
    return [
        name
        for name in header
        if name.casefold() in _COUNTS
        or any(map(_WEIGHT.fullmatch, re.split(r"[ _.-]", name.casefold())))
    ]


def split_of(person: str, seed: int = 0) -> str:
    """The split of a person: "train" (80 %), "validation" (10 %) or "test" (10 %).

    A function of the id and the seed alone, so that a person is in one split whatever table or row
    they are found in.
    """
    digest = hashlib.sha256(f"{seed}:{normal_id(person)}".encode()).digest()
    tenth = int.from_bytes(digest[:8], "big") % 10
    return "train" if tenth < 8 else "validation" if tenth == 8 else "test"


def drawn_part(
    counts: Int64[np.ndarray, " A"], split: str, seed: int, name: str
) -> Int64[np.ndarray, " A"]:
    """The part of a histogram of unknown persons that is in a split, drawn without replacement.

    The draw depends on `seed` and the histogram's `name`, not on other histograms.
    """
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    generator = np.random.default_rng([seed, number])
    tenth = (int(counts.sum()) + 5) // 10
    test = generator.multivariate_hypergeometric(counts, tenth)
    # Of the few people that there may be, the test takes its tenth first.
    validation = generator.multivariate_hypergeometric(
        counts - test, min(tenth, int(counts.sum()) - tenth)
    )
    return {"test": test, "validation": validation, "train": counts - test - validation}[split]


def number_or_none(cell: str) -> float | None:
    """The finite number in a cell, else None."""
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
