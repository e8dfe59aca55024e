"""Files of examples: what a person was told, what they answered, how many did.

All are UTF-8, a byte-order mark and any line ends allowed:

- JSON (`.json`), a list of records, and JSON lines (`.jsonl`, `.json`), a record a line;
- CSV, with a mapping from `user, answer` (and `system`, `weight`) to the file's own columns.

A JSON record has one of these layouts, each with an optional `system` and `weight`:

- chat: `user, assistant`;
- Alpaca: `instruction, input, output`, and `history`, a list of earlier questions and answers;
- `prompt, completion`;
- OpenAI: `messages`, a list of `role, content`; those with a `weight` of 0 are not learnt;
- ShareGPT: `conversations`, a list of `from, value`.

Of a conversation every reply of the assistant is learnt.  Other fields are passed over.  Every
malformed record is an error that names its place.
"""

import json
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

from befm_jax import files
from befm_jax.data.items import Example, Message, Role
from befm_jax.data.mixture import Family
from befm_jax.errors import DataError, listed, unknown

# What a column mapping may name, and the file's columns where no mapping is given.
_CSV_FIELDS = {"system": "system", "user": "user", "answer": "answer", "weight": "weight"}
_CSV_REQUIRED = ("user", "answer")
# A JSON record's fields: of the question, joined by line ends where they are not empty, and last
# that of the answer.
_TURNS = (("user", "assistant"), ("instruction", "input", "output"), ("prompt", "completion"))
_LISTS = ("messages", "conversations")
# Data of preferences mark answers that people did not like.
_DISLIKED = ("label", "kto_tag")
_SPEAKERS: Mapping[str, Role] = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant",
}  # fmt: skip
# Who speaks, what, and whether it is learnt.
_Turn = tuple[Role, str, bool]


def read(path: str | Path, columns: Mapping[str, str] | None = None) -> list[Example]:
    """Examples of a file, its layout taken from the suffix: `.json`, `.jsonl` or `.csv`.

    Args:
        path: the file.
        columns: for a CSV file, see `read_csv`; without it the columns are called `system`,
            `user`, `answer`, `weight`, the first and the last optional.

    Raises:
        DataError: another suffix, columns for a file that has none, or a malformed file.
    """
    suffix = Path(path).suffix.lower()
    if suffix == ".csv":
        if columns is None:
            return _read_csv(path, _CSV_FIELDS, _CSV_REQUIRED)
        return read_csv(path, columns)
    if suffix not in (".json", ".jsonl"):
        raise DataError(
            f"{path}: unknown layout {suffix!r}; it may be .json, .jsonl (a record a line) or .csv"
        )
    if columns is not None:
        raise DataError(f"{path}: a column mapping is for .csv files; this is {suffix}")
    return read_json(path) if suffix == ".json" else list(JsonLines(path))


def family(path: str | Path) -> Family:
    """The examples of a file as a family of a mixture: one row an example.

    Raises:
        DataError: see `read`.
    """
    if Path(path).suffix.lower() == ".jsonl":
        rows: Sequence[Example] = JsonLines(path)
    else:
        rows = read(path)
    return Family(Path(path).name, rows, lambda example, rng: (example,), files.fingerprint(path))


class JsonLines(Sequence[Example]):
    """The examples of a file with a JSON record a line, read from it when they are wanted.

    Blank lines are passed over.

    Only where the lines begin is kept in memory.  The first lines are checked at once, the others
    in a thread: a malformed one is the error of whatever is wanted next.

    Raises:
        DataError: with the line and the field.
    """

    CHECKED_AT_ONCE = 1000

    def __init__(self, path: str | Path) -> None:
        self._path = path
        begins, number = files.lines(path)
        self._begins, self._number = begins, number
        self._file = Path(path).open("rb")  # noqa: SIM115 - for as long as there are rows to read
        self._error: DataError | None = None
        _not_empty(self, path)
        self._check(range(min(len(self), self.CHECKED_AT_ONCE)))
        threading.Thread(target=self._check_others, daemon=True).start()

    def __len__(self) -> int:
        return len(self._number)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """One example, or those of a slice."""
        if isinstance(index, slice):
            return [self._read(at) for at in range(*index.indices(len(self)))]
        return self._read(range(len(self))[index])

    def _read(self, index: int) -> Example:
        if self._error is not None:
            raise self._error
        begin, end = self._begins[index]
        # Positional, so that threads need no lock.
        content = os.pread(self._file.fileno(), int(end - begin), int(begin))
        return _line_example(content, self._path, int(self._number[index]))

    def _check_others(self) -> None:
        """Takes a fifth of a core: the first steps are compiled and made meanwhile."""
        for begin in range(self.CHECKED_AT_ONCE, len(self), 200):
            since = time.perf_counter()
            self._check(range(begin, min(begin + 200, len(self))))
            if self._error is not None:
                return
            time.sleep(4 * (time.perf_counter() - since))

    def _check(self, indices: Iterable[int]) -> None:
        for index in indices:
            try:
                self._read(index)
            except DataError as error:
                self._error = error
                if index < self.CHECKED_AT_ONCE:
                    raise
                return


def read_json(path: str | Path) -> list[Example]:
    """Examples of a JSON file: a list of records, one record, or a record a line.

    Raises:
        DataError: with the record's number, counted from 1, or the line, and the field.
    """
    text = files.decode(files.read_bytes(path), path)
    try:
        with _at(path):
            records = _parse_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a whole record, and more after it
            return list(JsonLines(path))
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    if isinstance(records, dict):
        records = [records]
    if not isinstance(records, list):
        raise DataError(f"{path}: expected a JSON list of records, not {_kind(records)}")
    _not_empty(records, path)
    examples = []
    for number, record in enumerate(records, 1):
        with _at(f"{path}: record {number}"):
            examples.append(of_record(record))
    return examples


def write_chat(path: str | Path, examples: Iterable[Example]) -> None:
    """Write examples as chat JSONL."""
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        for example in examples:
            turn = _turn(example)
            record = {**_optional(turn), "user": turn["user"], "assistant": turn["answer"]}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_csv(path: str | Path, columns: Mapping[str, str]) -> list[Example]:
    """Examples of a CSV file with a header.

    Args:
        path: the file.
        columns: from `user` and `answer`, and if wanted `system` and `weight`, to the names of
            the file's columns, e.g. `{"user": "question", "answer": "response"}`. Columns that
            are not named are not read.

    Raises:
        DataError: a column that is not there, or a malformed row, with its line.
    """
    _check_columns(columns)
    return _read_csv(path, columns, tuple(columns))


def _read_csv(
    path: str | Path, columns: Mapping[str, str], required: tuple[str, ...]
) -> list[Example]:
    header, table = files.read_table(files.decode(files.read_bytes(path), path), path)
    rows, header = list(table), files.named(header, columns.values())
    for name in required:
        if columns[name] not in header:
            error = unknown("column", columns[name], header)
            raise DataError(f"{path}:1: for {name}: {error}")
    place = {name: header.index(column) for name, column in columns.items() if column in header}
    _not_empty(rows, path)
    examples = []
    for line, cells in rows:
        with _at(f"{path}:{line}"):
            if len(cells) != len(header):
                raise DataError(f"{len(cells)} cells where the header has {len(header)}")
            values: dict[str, Any] = {name: cells[position] for name, position in place.items()}
            if "weight" in values:
                values["weight"] = _number(values["weight"], columns["weight"])
            examples.append(Example.of(**{"system": "", **values}))
    return examples


@contextmanager
def _at(place: str | Path) -> Iterator[None]:
    """Names the place in front of what is wrong there."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{place}: {error}") from None


def _line_example(content: bytes, path: str | Path, line: int) -> Example:
    text = files.decode(content, path, line)
    with _at(f"{path}:{line}"):
        try:
            record = _parse_json(text)
        except json.JSONDecodeError as error:
            raise DataError(f"not JSON ({error.msg})") from None
        return of_record(record)


def of_record(record: Any) -> Example:
    """The example of a JSON record, in whichever of the module's layouts it is.

    Raises:
        DataError: a record of no layout, or a malformed one; names the field.
    """
    if not isinstance(record, dict):
        raise DataError(f"expected an object with fields, not {_kind(record)}")
    for name in _DISLIKED:
        if record.get(name) is False:
            raise DataError(f"{name}: false, so its answer is not to be learnt; leave it out")
    weight = _number(record.get("weight", 1.0), "weight")
    field = next((name for name in _LISTS if name in record), None)
    turns = _single(record) if field is None else _conversation(record[field], field)
    system = _text(record, "system", optional=True)
    if system and turns[0][0] != "system":
        turns.insert(0, ("system", system, False))
    for role, text, learnt in turns:
        if not text.strip() and (learnt or role == "user"):
            raise DataError(f"{role}: blank; a question and an answer are needed")
    replies = [at for at, (_, _, learnt) in enumerate(turns) if learnt]
    # Without spans the last message is learnt.
    alone = replies == [len(turns) - 1]
    spans = () if alone else tuple((at, 0, len(turns[at][1])) for at in replies)
    return Example(tuple(Message(role, text) for role, text, _ in turns), spans, weight)


def _single(record: dict[str, Any]) -> list[_Turn]:
    """The turns of a record with one question and its answer, after those of its history."""
    names = next((names for names in _TURNS if names[0] in record or names[-1] in record), None)
    if names is None:
        known = "; ".join(", ".join(names) for names in (*_TURNS, *((name,) for name in _LISTS)))
        raise DataError(f"has {listed(record) or 'no fields'}; a record may have {known}")
    first, *others, answer = names
    asked = [_text(record, first), *(_text(record, name, optional=True) for name in others)]
    turns = _history(record.get("history") or []) if first == "instruction" else []
    turns.append(("user", "\n".join(filter(None, asked)), False))
    turns.append(("assistant", _text(record, answer), True))
    return turns


def _history(pairs: Any) -> list[_Turn]:
    turns: list[_Turn] = []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not (isinstance(pair, list) and [type(text) for text in pair] == [str, str]):
            raise DataError(f"history: {_shown(pair)} is not a pair of texts")
        turns += [("user", pair[0], False), ("assistant", pair[1], True)]
    return turns


def _conversation(messages: Any, name: str) -> list[_Turn]:
    """The turns of a list of messages, OpenAI's or ShareGPT's."""
    if not isinstance(messages, list):
        raise DataError(f"{name}: expected a list, not {_kind(messages)}")
    turns: list[_Turn] = []
    for number, message in enumerate(messages, 1):
        with _at(f"{name}: message {number}"):
            if not isinstance(message, dict):
                raise DataError(f"expected an object, not {_kind(message)}")
            speaker, said = ("from", "value") if "from" in message else ("role", "content")
            who, weight = _text(message, speaker), message.get("weight", 1)
            if who not in _SPEAKERS:
                raise DataError(
                    f"{speaker} is {_shown(who)}; it must be one of {', '.join(_SPEAKERS)}"
                )
            if weight not in (0, 1):
                raise DataError(f"weight is {_shown(weight)}; it must be 0 or 1")
            role = _SPEAKERS[who]
            turns.append((role, _text(message, said), role == "assistant" and weight == 1))
    if not any(learnt for _, _, learnt in turns):
        raise DataError(f"{name}: no assistant's reply in it that is learnt")
    return turns


def _text(record: dict[str, Any], name: str, optional: bool = False) -> str:
    value = record.get(name)
    if value is None and optional:
        return ""
    if name not in record:
        raise DataError(f"{name}: missing; the record has {listed(record) or 'nothing'}")
    if not isinstance(value, str):
        raise DataError(f"{name}: expected text, not {_kind(value)}")
    return value


def _number(value: Any, name: str) -> float:
    if not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    raise DataError(f"{name}: {_shown(value)} is not a number")


def _parse_json(text: str) -> Any:
    try:
        return files.parse_json(text)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise DataError(f"not JSON that can be read ({error})") from None


def _turn(example: Example) -> dict[str, Any]:
    """The fields of one question and its answer: what these layouts can hold.

    Raises DataError for a longer conversation, or one with spans.
    """
    roles = [message.role for message in example.messages]
    if example.spans or roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise DataError("example: this layout holds one question and its answer, nothing longer")
    *given, user, answer = (message.text for message in example.messages)
    return {"system": "".join(given), "user": user, "answer": answer, "weight": example.weight}


def _optional(turn: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a JSON layout writes only where they say something."""
    system = {"system": turn["system"]} if turn["system"] else {}
    weight = {"weight": turn["weight"]} if turn["weight"] != 1.0 else {}
    return {**system, **weight}


def _check_columns(columns: Mapping[str, str]) -> None:
    for name in columns:
        if name not in _CSV_FIELDS:
            raise DataError(f"columns: {unknown('field', name, _CSV_FIELDS)}")
    for name in _CSV_REQUIRED:
        if name not in columns:
            raise DataError(f"columns: no column is named for {name}; user and answer are needed")
    if len(set(columns.values())) != len(columns):
        raise DataError(f"columns: one column is named for two fields: {dict(columns)}")


def _not_empty(records: Sized, path: str | Path) -> None:
    if not records:
        raise DataError(f"{path}: no examples in it")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        float: "a number",
    }
    return "null" if value is None else names.get(type(value), "a number")
