"""People's first numbers in the guessing game, and sessions in which somebody plays against them.

The table (CSV or Parquet) has the columns `p, choice, count`: the fraction of the average (`2/3`),
a whole number from 0 to 100, and how many people chose it (R. Nagel, "Unraveling in Guessing
Games", American Economic Review 85(5), 1995).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from befm_jax.data import games
from befm_jax.data.games import Game
from befm_jax.data.rows import LeftOut, Rows, fingerprint_of, sketch_of, usable
from befm_jax.errors import DataError

SESSIONS = 50


@dataclass(frozen=True)
class Session:
    """A session of the guessing game.

    Attributes:
        person: the id of whoever takes part.
        game: the game with its fraction and group size.
        guesses: how many people chose each number of its answers, `A` of them; () without people.
    """

    person: str
    game: Game
    guesses: tuple[int, ...] = ()


def sessions() -> Rows[Session]:
    """Sessions of the package's guessing game, without people."""
    game = games.get("guessing")
    return Rows.of((Session(str(n), game) for n in range(1, SESSIONS + 1)), "the package's game")


def read(path: str | Path) -> Rows[Session]:
    """Sessions against the people of a table, as many for each fraction; see `tasks.repeated`.

    Raises:
        DataError: as `rows.usable`; or no number that can be used.
    """
    left_out = LeftOut()
    counted: dict[Fraction, Counter[int]] = {}
    answers = games.get("guessing").answers
    for line, cells in usable(path, ("p", "choice", "count"), left_out):
        place = f"line {line}"
        choice, reason = answers.parse_cell(cells["choice"])
        try:
            fraction = Fraction(cells["p"])
        except (ValueError, ZeroDivisionError):
            left_out.add("p: not a fraction", place, repr(cells["p"]))
            continue
        if fraction <= 0:
            left_out.add("p: not above 0", place, repr(cells["p"]))
        elif choice is None:
            left_out.add(f"choice: {reason}", place, repr(cells["choice"]))
        elif not cells["count"].isdecimal():
            left_out.add("count: not a whole number", place, repr(cells["count"]))
        else:
            counted.setdefault(fraction, Counter())[choice] += int(cells["count"])
    known = {
        fraction: tuple(of[position] for position in range(len(answers)))
        for fraction, of in counted.items()
        if of.total()
    }
    if not known:
        raise DataError(f"{path}: no number; {'; '.join(left_out.lines()) or 'no rows'}")
    rows = [
        Session(
            f"{fraction}, {number}",
            games.get("guessing").with_parameters(fraction=float(fraction)),
            guesses,
        )
        for number in range(1, SESSIONS + 1)
        for fraction, guesses in known.items()
    ]
    facts = {repr(entry) for entry in known.items()}
    source = f"{Path(path).name} (first numbers in the guessing game)"
    return Rows(rows, source, fingerprint_of(facts), sketch_of(facts), left_out)
