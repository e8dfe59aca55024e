"""Bomb risk outside the classroom: how many boxes people of known age, sex and country open.

The table has one line a person, CSV, in gzip or Parquet: `study, id, age, gender` (1: female, 0:
male), `country, treatment, boxes` and `choice`, the number of boxes opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from befm_jax.data import games, questionnaires
from befm_jax.data.games import Game
from befm_jax.data.rows import LeftOut, Rows, fingerprint_of, normal_id, sketch_of, usable
from befm_jax.errors import DataError

_COLUMNS = ("study", "id", "age", "gender", "country", "treatment", "boxes", "choice")
_BOXES = ("25", "100")
_SEX = {"0": "male", "1": "female"}
_STAKES = {"highstake": "high", "high stakes": "high", "low stakes": "low"}
# The boxes take away from money that one has: another question than the game's.
_LOSSES = "lossaversion"


@dataclass(frozen=True)
class Opened:
    """How many boxes a person opened.

    Attributes:
        person: the id.
        boxes: how many there were.
        choice: the position in the game's answer set.
        age: in years; None where it is not known.
        labels: sex, age_band, country, stakes ("high", "low"; absent: the usual ones), study and
            treatment, where they are known.
    """

    person: str
    boxes: int
    choice: int
    age: int | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def game(self) -> Game:
        """The bomb risk game with this number of boxes."""
        return _game(self.boxes)


@cache
def _game(boxes: int) -> Game:
    return games.get("bomb").with_parameters(boxes=boxes)


def read(path: str | Path) -> Rows[Opened]:
    """Everybody in a table; what can't be used is counted by reason.

    Raises:
        DataError: as `rows.usable`; or nobody chose.
    """
    left_out = LeftOut()
    rows: dict[str, Opened] = {}
    for line, cells in usable(path, _COLUMNS, left_out):
        place, person = f"line {line}", normal_id(cells["id"])
        if not person:
            left_out.add("row: no id", place, "")
        elif person in rows:
            left_out.add("row: second choice of the same person", place, person)
        elif cells["boxes"] not in _BOXES:
            left_out.add(f"row: not {' or '.join(_BOXES)} boxes", place, repr(cells["boxes"]))
        elif cells["treatment"] == _LOSSES:
            left_out.add("row: about losses", place, person)
        else:
            boxes = int(cells["boxes"])
            choice, reason = _game(boxes).answers.parse_cell(cells["choice"])
            if choice is None:
                left_out.add(f"choice: {reason}", place, repr(cells["choice"]))
                continue
            age = None
            if cells["age"]:
                age = questionnaires.age_of(cells["age"])
                if age is None:
                    left_out.add(questionnaires.NO_AGE, place, repr(cells["age"]))
            labels = {
                "sex": _SEX.get(cells["gender"], ""),
                "age_band": "" if age is None else questionnaires.age_band(age),
                "stakes": _STAKES.get(cells["treatment"], ""),
                **{name: cells[name] for name in ("country", "study", "treatment")},
            }
            known = {name: value for name, value in labels.items() if value}
            rows[person] = Opened(person, boxes, choice, age, known)
    if not rows:
        raise DataError(f"{path}: nobody chose; {'; '.join(left_out.lines()) or 'no rows'}")
    facts = {repr(row) for row in rows.values()}
    source = f"{Path(path).name} (bomb risk)"
    return Rows(list(rows.values()), source, fingerprint_of(facts), sketch_of(facts), left_out)
