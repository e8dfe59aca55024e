"""Multiple-choice questions: one a row, with their options and the letters of the right ones.

Three layouts of a file are read:

- CSV or Parquet with the columns `question`, `A`, `B`, ... and `answer` (letters: "B", "AC"), and
  `subject` if there is one;
- CSV without a header: the question, its options, and the letters in the last cell (MMLU's test
  files; Hendrycks et al., ICLR 2021);
- JSON Lines with `question`, `options` and `label`, a list of letters or one, and `passage` if
  there is one (AGIEval's; Zhong et al., NAACL 2024).

The subject of a file without subjects is its name.  The package has questions of its own, on
behavioural economics and game theory, in the first layout.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import NamedTuple, TypeGuard

from befm_jax import files
from befm_jax.data.items import LETTERS, MOST_LETTERS_TOGETHER
from befm_jax.data.rows import LeftOut, Rows, fingerprint_of, sketch_of
from befm_jax.errors import DataError

REFERENCE_FILE = "economics_questions.csv"
# "All of the above", "Both A and B": an option that means something in its own place alone.
_REFERS = re.compile(
    r"^(all|any|both|either|neither|none)( (of|are|is)\b|\W*$)"
    r"|^(all|both) (two|three|four|answers|choices|options|statements)\b"
    r"|^(both|either|neither) [a-h] (and|or|nor) [a-h]\b"
    r"|\b(all|any|both|combinations?|none|some|two) of (these|those|them)\b"
    r"|\babove\W*$|\bthe (above|following)\b|\([a-h]\)"
    r"|(?-i:\b(([Oo]ptions?|[Aa]nswers?|[Oo]nly) [A-H]|[A-H] only|[A-H](,| and| or| &) ?[A-H])\b)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Question:
    """A multiple-choice question.

    Attributes:
        id: follows from the question and its options, in whatever order they are.
        subject: what it is about.
        question: its text.
        options: their texts, in the order of the file, without letters.
        right: the positions of the right options, ascending.
        several: whether several options may be right: whether some question of the file has several
            right ones.
    """

    id: str
    subject: str
    question: str
    options: tuple[str, ...]
    right: tuple[int, ...]
    several: bool = False

    @property
    def person(self) -> str:
        """What splits go by: the question."""
        return self.id

    @property
    def in_any_order(self) -> bool:
        """Whether the options mean the same in another order: none speaks of another's place."""
        return not any(_REFERS.search(option) for option in self.options)


class _Record(NamedTuple):
    """A question as a file has it; `letters` are of the right options."""

    line: int
    subject: str
    question: str
    options: list[str]
    letters: str


def read_reference() -> Rows[Question]:
    """The package's own questions."""
    packaged = resources.files("befm_jax.data.reference").joinpath(REFERENCE_FILE)
    with resources.as_file(packaged) as path:
        return replace(read(path), source=f"the package's {REFERENCE_FILE}")


def read(path: str | Path) -> Rows[Question]:
    """The questions of a file.

    Questions that can't be used are counted as left out, such as one that repeats a right option
    among the wrong ones.

    Raises:
        DataError: no such file, one without questions (with its first line), a damaged one (with
            the line), or no question that can be used.
    """
    left_out = LeftOut()
    usable: dict[str, tuple[_Record, tuple[int, ...]]] = {}
    answer_of: dict[str, set[str]] = {}
    for record in _records(path):
        reason, right = _checked(record)
        texts = [_normal(option) for option in record.options]
        content = "\n".join([_normal(record.question), *sorted(texts)])
        name = hashlib.sha256(content.encode()).hexdigest()[:16]
        answer = {texts[at] for at in right}
        if not reason and name in usable:
            other = "" if answer == answer_of[name] else ", with another answer"
            reason = f"the same as one before{other}"
        if reason:
            left_out.add(f"question: {reason}", f"line {record.line}", record.question)
        else:
            usable[name], answer_of[name] = (record, right), answer
    several = any(len(right) > 1 for _, right in usable.values())
    rows = []
    for name, (record, right) in usable.items():
        if several and len(record.options) > MOST_LETTERS_TOGETHER:
            reason = f"question: more than {MOST_LETTERS_TOGETHER} options, of which several may be"
            left_out.add(f"{reason} right", f"line {record.line}", record.question)
            continue
        options = tuple(record.options)
        rows.append(Question(name, record.subject, record.question, options, right, several))
    if not rows:
        raise DataError(f"{path}: no question; {'; '.join(left_out.lines()) or 'no rows'}")
    facts = [repr((row.id, sorted(answer_of[row.id]))) for row in rows]
    sketch = sketch_of(row.id for row in rows)
    return Rows(rows, Path(path).name, fingerprint_of(facts), sketch, left_out)


def _checked(record: _Record) -> tuple[str, tuple[int, ...]]:
    """Why a question can't be used, "" if it can, and the positions of its right options."""
    options, right = record.options, _right(record)
    texts = [_normal(option) for option in options]
    if not record.question:
        return "no text", ()
    if len(options) < 2 or not all(options):
        return "an option without text, or fewer than two", ()
    if len(options) > len(LETTERS):
        return f"more than {len(LETTERS)} options", ()
    if not right:
        return "its answer is no letter of its options", ()
    if {texts[at] for at in right} & {text for at, text in enumerate(texts) if at not in right}:
        return "a wrong option is the same as a right one", ()
    return "", right


def _right(record: _Record) -> tuple[int, ...]:
    """The positions of the right options; () where the letters are not those of options."""
    letters = set(re.sub(r"[\s,;\[\]()]", "", record.letters).upper())
    if not letters <= set(LETTERS[: len(record.options)]):
        return ()
    return tuple(sorted(map(LETTERS.index, letters)))


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


def _records(path: str | Path) -> Iterator[_Record]:
    suffix, stem = Path(path).suffix.lower(), Path(path).stem
    if suffix == ".jsonl":
        return _from_json(path, stem)
    if suffix == ".parquet" or _has_header(path):
        return _with_header(path, stem)
    return _without_header(path, stem)


def _has_header(path: str | Path) -> bool:
    try:
        header, _ = files.table(path)
    except DataError:  # such as a question of which two options are the same
        return False
    return "question" in [name.casefold() for name in header]


def _with_header(path: str | Path, stem: str) -> Iterator[_Record]:
    for line, cells in files.records(path, ("question", "A", "B", "answer")):
        options = [cells[letter] for letter in LETTERS if letter in cells]
        # A question of fewer options than another's has empty cells after them.
        while options and not options[-1]:
            options.pop()
        subject = cells.get("subject") or stem
        yield _Record(line, subject, cells["question"], options, cells["answer"])


def _without_header(path: str | Path, stem: str) -> Iterator[_Record]:
    columns = 0
    for line, row in files.csv_rows(path):
        *texts, letters = map(str.strip, row)
        record = _Record(line, stem, "".join(texts[:1]), texts[1:], letters)
        if not columns and not _right(record):
            raise DataError(
                f"{path}:{line}: neither a header with question, A, B, ... and answer, nor a "
                "question with its options and, in the last cell, the letters of the right ones"
            )
        columns = columns or len(row)
        if len(row) != columns:
            raise DataError(f"{path}:{line}: {len(row)} cells, but {columns} in the first line")
        yield record


def _from_json(path: str | Path, stem: str) -> Iterator[_Record]:
    for line, record in files.json_records(path):
        question, options, label = (record.get(name) for name in ("question", "options", "label"))
        passage, subject = record.get("passage") or "", record.get("subject") or stem
        letters = [label] if isinstance(label, str) else label
        texts = [passage, question, subject]
        if not (_are_texts(texts) and _are_texts(options) and _are_texts(letters)):
            raise DataError(
                f"{path}:{line}: a question must have a text as question, a list of texts as "
                f"options and letters as label; found {', '.join(record) or 'nothing'}"
            )
        # "(A) ...": letters are written when the question is asked.
        bare = [
            option.strip().removeprefix(f"({letter})").strip()
            for letter, option in itertools.zip_longest(LETTERS[: len(options)], options)
        ]
        yield _Record(line, subject, f"{passage}\n\n{question}".strip(), bare, "".join(letters))


def _are_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)
