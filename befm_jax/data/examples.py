"""Files of examples: what a person was told, what they answered, how many did.

Three layouts are read, all UTF-8, a byte-order mark and any line ends allowed:

- Alpaca JSON: one list of objects `instruction, input, output`, optional `system`, `weight`.
- Chat JSONL: one object a line, `user, assistant`, optional `system`, `weight`.
- CSV, with a mapping from `user, answer` (and `system`, `weight`) to the file's own columns.

Other fields of a JSON record are passed over. Every malformed record is an error that names its
place.
"""

import json
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, overload

from befm_jax import files
from befm_jax.data.items import Example
from befm_jax.data.mixture import Family
from befm_jax.errors import DataError, unknown

# What a column mapping may name, and the file's columns where no mapping is given.
_CSV_FIELDS = {"system": "system", "user": "user", "answer": "answer", "weight": "weight"}
_CSV_REQUIRED = ("user", "answer")


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
            f"{path}: unknown layout {suffix!r}; it may be .json (Alpaca), .jsonl (chat) or .csv"
        )
    if columns is not None:
        raise DataError(f"{path}: a column mapping is for .csv files; this is {suffix}")
    return read_alpaca(path) if suffix == ".json" else read_chat(path)


def family(path: str | Path) -> Family:
    """The examples of a file as a family of a mixture: one row an example.

    Raises:
        DataError: see `read`.
    """
    if Path(path).suffix.lower() == ".jsonl":
        rows: Sequence[Example] = ChatFile(path)
    else:
        rows = read(path)
    return Family(Path(path).name, rows, lambda example, rng: (example,), files.fingerprint(path))


class ChatFile(Sequence[Example]):
    """The examples of a chat JSONL file, read from it when they are wanted.

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
        return _chat_example(content, self._path, int(self._number[index]))

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


def read_alpaca(path: str | Path) -> list[Example]:
    """Examples of an Alpaca JSON file.

    The prompt is the instruction, followed by a line end and the input where the input is not
    empty: LLaMA-Factory's rule. Its `history` (earlier turns) has no place in an example.

    Raises:
        DataError: with the record's number, counted from 1, and the field.
    """
    text = files.decode(files.read_bytes(path), path)
    try:
        records = _parse_json(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    if not isinstance(records, list):
        raise DataError(f"{path}: expected one JSON list of records, not {_kind(records)}")
    _not_empty(records, path)
    return [
        _alpaca_example(record, f"{path}: record {number}")
        for number, record in enumerate(records, 1)
    ]


def read_chat(path: str | Path) -> list[Example]:
    """Examples of a chat JSONL file; blank lines are passed over.

    Raises:
        DataError: with the line and the field.
    """
    return list(ChatFile(path))


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
    rows = list(table)
    for name in required:
        if columns[name] not in header:
            error = unknown("column", columns[name], header)
            raise DataError(f"{path}:1: for {name}: {error}")
    place = {name: header.index(column) for name, column in columns.items() if column in header}
    _not_empty(rows, path)
    examples = []
    for line, cells in rows:
        where = f"{path}:{line}"
        if len(cells) != len(header):
            raise DataError(f"{where}: {len(cells)} cells where the header has {len(header)}")
        values: dict[str, Any] = {name: cells[position] for name, position in place.items()}
        if "weight" in values:
            values["weight"] = _number(values["weight"], where, columns["weight"])
        examples.append(_build({"system": "", **values}, where))
    return examples


def _chat_example(content: bytes, path: str | Path, line: int) -> Example:
    where, text = f"{path}:{line}", files.decode(content, path, line)
    try:
        record = _parse_json(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg})") from None
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    return _record_example(record, where, user="user", answer="assistant")


def _alpaca_example(record: Any, where: str) -> Example:
    if isinstance(record, dict):
        if record.get("history"):
            raise DataError(f"{where}: history: earlier turns cannot be held in an example")
        prompt_input = _text(record, "input", where, optional=True)
        if prompt_input:
            instruction = _text(record, "instruction", where)
            record = {**record, "instruction": f"{instruction}\n{prompt_input}"}
        record = {k: v for k, v in record.items() if k not in ("input", "history")}
    return _record_example(record, where, user="instruction", answer="output")


def _record_example(record: Any, where: str, user: str, answer: str) -> Example:
    """The example of a JSON record; `user` and `answer` are the layout's names for them."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object with {user}, {answer}, not {_kind(record)}")
    weight = record.get("weight", 1.0)
    values = {
        "system": _text(record, "system", where, optional=True),
        "user": _text(record, user, where),
        "answer": _text(record, answer, where),
        "weight": _number(weight, where, "weight"),
    }
    return _build(values, where)


def _build(values: dict[str, Any], where: str) -> Example:
    try:
        return Example.of(**values)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def _text(record: dict[str, Any], name: str, where: str, optional: bool = False) -> str:
    value = record.get(name)
    if value is None and optional:
        return ""
    if name not in record:
        raise DataError(
            f"{where}: {name}: missing; the record has {', '.join(record) or 'nothing'}"
        )
    if not isinstance(value, str):
        raise DataError(f"{where}: {name}: expected text, not {_kind(value)}")
    return value


def _number(value: Any, where: str, name: str) -> float:
    if not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    raise DataError(f"{where}: {name}: {_shown(value)} is not a number")


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
