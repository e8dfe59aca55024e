"""Recorded answers: reads files of answers as a respondent, and writes those of simulations.

Four formats, tables as CSV or Parquet, recognised by the file's suffix and header:

- `choices.csv`: `game,participant,choice`, one row per draw; an empty choice could not be read.
- `distribution.csv`: `game,choice,probability`, unconditional probabilities of the model: what an
  item's lack to 1 is outside its answer set.
- `responses.jsonl`: as `befm_jax.data.responses` writes it.
- `.jsonl` of texts: one object per line with `item` (or `game`) and `text`, one draw each, parsed
  by the item's answer set; a null `text` is a missing answer.

An item's answers are recorded under its id or, where that is not in the file and a person is asked
the plain question of a game, under the game's.  Columns, games and choices (the value or the name)
are case-insensitive.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from befm_jax import files
from befm_jax.data.items import AnswerSet, FreeText, Item
from befm_jax.data.responses import How, Response, read_responses
from befm_jax.data.rows import weights_in
from befm_jax.errors import DataError, listed, unknown

_TOLERANCE = 1e-6
# How reasons of `AnswerSet.parse` and `parse_cell` begin for an unreadable answer; others are not
# allowed.
_UNREAD = ("no answer", "not a number", "not finite")

Format = Literal["choices", "distribution", "responses", "texts"]


class _Line(NamedTuple):
    """One line of a file: a draw, or the probability of an answer."""

    number: int
    answer: str | None
    probability: float = 0.0


class Recorded:
    """Answers in a file, as a respondent.

    Attributes:
        path: the file.
        name: its name in reports; by default the file's name without its suffix.
        layout: which of the module's formats the file has.
        weights: columns of sampling weights, which are not used.
    """

    def __init__(self, path: str | Path, name: str = "") -> None:
        """Reads the file; answers are checked when items are asked.

        Raises:
            DataError: no such file, an empty or damaged one, a missing column or field, an invalid
                probability, Parquet without pyarrow, or answers that are not those which the
                FILE.json beside them describes.
        """
        self.path = Path(path)
        self.name = name or self.path.stem
        self.weights: list[str] = []
        self._lines: dict[str, list[_Line]] = {}
        self._responses: dict[str, Response] = {}
        self._origin: dict[str, Any] = {"respondent": None, "how": None}
        if self.path.suffix.lower() == ".jsonl":
            self.layout: Format = self._read_json_lines()
        else:
            self.layout = self._read_table()
        beside = self.path.with_name(f"{self.path.name}.json")
        if self.layout != "responses" and beside.is_file():
            metadata = files.read_object(beside, DataError)
            self._origin = {
                "respondent": _object(metadata, "model", beside),
                "how": _object(metadata, "answers", beside),
            }
            if metadata.get("fingerprint", self.fingerprint) != self.fingerprint:
                raise DataError(
                    f"{path}: not the answers that {beside.name} describes; restore them, or "
                    f"delete {beside.name} to have them as of unknown origin"
                )
        if not self._lines and not self._responses:
            raise DataError(f"{path}: has no answers")

    @property
    def exact(self) -> bool:
        """Whether distributions are recorded, not draws."""
        if self.layout == "responses":
            return all(response.exact for response in self._responses.values())
        return self.layout == "distribution"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of a table's or of texts' answers, in whatever order and however written."""
        lines = sorted(
            f"{key.casefold()},{_as_number(line.answer)},{line.probability!r}\n"
            for key, of_key in self._lines.items()
            for line in of_key
        )
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """The file's path, format and SHA-256, and the metadata of the `respondent` and `how`.

        These two are those of `responses.jsonl`, or of the FILE.json that `befm_jax.simulate`
        writes beside a table.  They are None where neither exists: then it is unknown on which
        people that model was trained.
        """
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        described = {"answers": str(self.path), "layout": self.layout, "sha256": digest}
        return described | self._origin

    def serves(self, item: Item) -> bool:
        """Whether answers to an item are recorded."""
        return self._key(item) is not None

    def unasked(self, items: Iterable[Item]) -> list[str]:
        """The ids and games in the file that none of these items has."""
        keys = {self._key(item) for item in items}
        return [key for key in (*self._lines, *self._responses) if key not in keys]

    def respond(self, items: Sequence[Item], how: How) -> Iterator[Response]:
        """The recorded responses, in the items' order; `how` is ignored (see `Response.exact`).

        Answers outside the set are counted, and their texts kept.

        Raises:
            DataError: an item without answers in the file, one that was asked in other words, or
                invalid answers: a probability without an answer, an answer with two, probabilities
                that sum to more than 1.
        """
        for item in items:
            key = self._key(item)
            if key is None:
                known = (*self._lines, *self._responses)
                name = item.notes.get("recorded_as", item.id)
                raise DataError(f"{self.path}: {unknown('item', name, known)}")
            if self.layout == "responses":
                yield self._as_recorded(item, self._responses[key])
            elif self.layout == "distribution":
                yield self._distribution(item, key)
            else:
                yield self._draws(item, key)

    def _key(self, item: Item) -> str | None:
        """The key of an item's answers in the file; None where there are none."""
        known = self._responses if self.layout == "responses" else self._lines
        own = [key for key in (item.id, item.notes.get("recorded_as")) if key]
        folded = [self._folded.get(key.casefold(), "") for key in own]
        return next((key for key in (*own, *folded) if key in known), None)

    @cached_property
    def _folded(self) -> dict[str, str]:
        """The keys in the file by their casefolded forms."""
        return {key.casefold(): key for key in (*self._lines, *self._responses)}

    def _read_table(self) -> Format:
        header, _ = files.table(self.path)
        columns = {name.casefold() for name in header}
        layout: Format = "distribution" if "probability" in columns else "choices"
        if layout == "choices" and "participant" not in columns:
            raise DataError(
                f"{self.path}:1: neither a column 'participant' (choices: game,participant,choice) "
                "nor 'probability' (distribution: game,choice,probability); found "
                f"{listed(header)}"
            )
        self.weights = weights_in(header)
        third = "probability" if layout == "distribution" else "participant"
        for line, cells in files.records(self.path, ("game", "choice", third)):
            probability = 0.0
            if layout == "distribution":
                probability = self._probability(line, cells["probability"])
            key = cells["game"]
            self._lines.setdefault(key, []).append(_Line(line, cells["choice"], probability))
        return layout

    def _probability(self, line: int, cell: str) -> float:
        try:
            number = float(cell)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            hint = "; write 0.5, not 0,5" if "," in cell else ""
            raise DataError(f"{self.path}:{line}: probability {cell!r} is not a number{hint}")
        if number < 0.0:
            raise DataError(f"{self.path}:{line}: probability is {cell}; it must be 0 to 1")
        return number

    def _read_json_lines(self) -> Format:
        content = files.read_bytes(self.path)
        # Line feeds alone: a text may contain other line separators.
        lines = files.decode(content, self.path).split("\n")
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            record = self._record(number, line)
            if "schema" in record and not self._lines:
                head, self._responses = read_responses(self.path)
                self._origin = {name: head.get(name) for name in self._origin}
                return "responses"
            key = record.get("item", record.get("game"))
            if not isinstance(key, str):
                raise DataError(f"{self.path}:{number}: item is {key!r}; it must be an item's id")
            text = record.get("text", False)
            if not isinstance(text, str | None):
                shown = "missing" if text is False else repr(text)
                raise DataError(f"{self.path}:{number}: text is {shown}; it must be a text or null")
            self._lines.setdefault(key, []).append(_Line(number, text))
        return "texts"

    def _record(self, number: int, line: str) -> Mapping[str, Any]:
        try:
            record = files.parse_json(line)
        except ValueError as error:
            raise DataError(f"{self.path}:{number}: not JSON ({error})") from None
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise DataError(f"{self.path}:{number}: line is a {kind}; it must be a JSON object")
        return record

    def _as_recorded(self, item: Item, response: Response) -> Response:
        answers = None if isinstance(item.answers, FreeText) else len(item.answers)
        recorded = None if response.weights is None else len(response.weights)
        if answers != recorded:
            raise DataError(
                f"{self.path}: {item.id}: {recorded or 'no'} weights; the item has "
                f"{answers or 'free text as its'} answers"
            )
        if response.asked not in ("", item.fingerprint):
            raise DataError(
                f"{self.path}: {item.id} was asked in other words, or with other answers; give the "
                "--wording and the data that it was asked with"
            )
        return replace(response, item=item.id)

    def _draws(self, item: Item, key: str) -> Response:
        lines = self._lines[key]
        if isinstance(item.answers, FreeText):
            texts = tuple(line.answer for line in lines if line.answer is not None)
            unread = len(lines) - len(texts)
            outside = unread / len(lines)
            return Response(item.id, None, False, outside, len(lines), unread, texts)
        parse = item.answers.parse if self.layout == "texts" else item.answers.parse_cell
        counts = np.zeros(len(item.answers))
        reasons: Counter[bool] = Counter()
        unusable = []
        for line in lines:
            position, reason = parse(line.answer or "")
            if position is None:
                reasons[reason.startswith(_UNREAD)] += 1
                unusable.append(line.answer or "")
            else:
                counts[position] += 1
        return Response.from_counts(item.id, counts, reasons[True], reasons[False], unusable)

    def _distribution(self, item: Item, key: str) -> Response:
        if isinstance(item.answers, FreeText):
            raise DataError(f"{self.path}: {item.id}: probabilities; the item asks for free text")
        mass = np.zeros(len(item.answers))
        seen: set[int | str] = set()
        total = math.fsum(line.probability for line in self._lines[key])
        if total > 1.0 + _TOLERANCE:
            raise DataError(
                f"{self.path}: the probabilities of {key} sum to {total:.8g}; they must sum to 1 "
                "at most"
            )
        for line in self._lines[key]:
            answer = line.answer or ""
            position, reason = item.answers.parse_cell(answer)
            if reason.startswith(_UNREAD):
                raise DataError(f"{self.path}:{line.number}: choice {answer!r} is {reason}")
            choice = answer.casefold() if position is None else position
            if choice in seen:
                raise DataError(f"{self.path}:{line.number}: {key} has the choice {answer} twice")
            seen.add(choice)
            if position is not None:
                mass[position] = line.probability
        return Response.from_mass(item.id, mass)


def _as_number(answer: str | None) -> str:
    """An answer as text: 33, 33.0 and 33.00 are one."""
    try:
        return repr(float(answer or ""))
    except ValueError:
        return (answer or "").casefold()


def _object(content: Mapping[str, Any], name: str, path: Path) -> dict[str, Any] | None:
    """A field that is a JSON object, or None where it is absent or null."""
    value = content.get(name)
    if not isinstance(value, dict | None):
        raise DataError(f"{path}: {name} is {value!r:.40}; it must be a JSON object")
    return value


def write_choices(path: str | Path, items: Iterable[Item], responses: Iterable[Response]) -> None:
    """Writes `choices.csv`: participants numbered from 0, an empty choice for an unread answer.

    A choice is written as its value, or as its name where the answers have no order.  Where a
    response has the text of each draw, participants are in the order of the draws; else in the
    order of the answers.

    Args:
        path: the file.
        items: the items, in the order of the file.
        responses: sampled responses to each of these items, in any order.

    Raises:
        ValueError: an exact response, one to free text, or none to an item.
    """
    rows: list[list[object]] = []
    for item, answers, response in _answered(items, responses):
        if response.exact:
            raise ValueError(f"{item.id}: an exact response belongs in a distribution.csv")
        positions: list[int | None]
        if len(response.texts) == response.draws:
            positions = [answers.parse(text).position for text in response.texts]
        else:
            counts = np.asarray(response.weights, np.int64)
            positions = [*np.repeat(np.arange(len(answers)), counts).tolist()]
            positions += [None] * (response.draws - len(positions))
        for participant, position in enumerate(positions):
            choice = "" if position is None else answers.value_of(position)
            rows.append([item.id, participant, choice])
    _write(path, ["game", "participant", "choice"], rows)


def write_distribution(
    path: str | Path, items: Iterable[Item], responses: Iterable[Response]
) -> None:
    """Writes `distribution.csv`: the probability of each answer, which sum to 1 less `outside`.

    Probabilities are unconditional, not within the set, in full precision.

    Args:
        path: the file.
        items: the items, in the order of the file.
        responses: exact responses to each of these items, in any order.

    Raises:
        ValueError: a sampled response, which would be read as exact, one to free text, or none to
            an item.
    """
    rows: list[list[object]] = []
    for item, answers, response in _answered(items, responses):
        if not response.exact:
            raise ValueError(f"{item.id}: a sampled response belongs in a choices.csv")
        mass = np.asarray(response.weights) * (1.0 - response.outside)
        for position, probability in enumerate(mass.tolist()):
            rows.append([item.id, answers.value_of(position), repr(probability)])
    _write(path, ["game", "choice", "probability"], rows)


def _answered(
    items: Iterable[Item], responses: Iterable[Response]
) -> Iterator[tuple[Item, AnswerSet, Response]]:
    by_id = {response.item: response for response in responses}
    for item in items:
        response = by_id.get(item.id)
        if response is None:
            raise ValueError(f"{item.id}: no response to it")
        if isinstance(item.answers, FreeText) or response.weights is None:
            raise ValueError(f"{item.id}: free text can't be written to a table of choices")
        if len(response.weights) != len(item.answers):
            raise ValueError(
                f"{item.id}: {len(response.weights)} weights, but {len(item.answers)} answers"
            )
        yield item, item.answers, response


def _write(path: str | Path, header: list[str], rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    files.write(Path(path), text.getvalue().encode())
