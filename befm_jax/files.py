"""Reads text, tables and JSON with errors that name file and line; writes files atomically."""

from __future__ import annotations

import codecs
import csv
import datetime
import fcntl
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import socket
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from safetensors import SafetensorError

from befm_jax.errors import DataError, InUseError, UserError, listed

_CHUNK = 1 << 24  # bytes read at once of a file that may be larger than memory
_SHORT = 16  # bytes; a line of fewer may be blank
# A cell may hold a whole document; the module's own limit is 131,072 characters.
csv.field_size_limit(1 << 30)
# How files begin that are often saved under the name of a text or a table.
_NOT_TEXT = {
    b"PK\x03\x04": "a spreadsheet (.xlsx) or another zip archive; export it as CSV",
    b"\xd0\xcf\x11\xe0": "an old spreadsheet (.xls); export it as CSV",
    b"\x1f\x8b": "compressed with gzip; give its name the suffix .gz, or decompress it",
    b"PAR1\x15": "Parquet; give its name the suffix .parquet",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
}


def read_bytes(path: str | Path) -> bytes:
    """The content of a file.

    Raises:
        DataError: no such file, not a file, not readable, or empty.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not content.removeprefix(codecs.BOM_UTF8).strip():
        raise DataError(f"{path}: the file is empty")
    return content


def decode(content: bytes, path: str | Path, first_line: int = 1) -> str:
    """The UTF-8 text of a file's content, without its byte-order mark; line ends are kept.

    `first_line`: the number of the line where the content begins, for messages.

    Raises:
        DataError: the content is binary or in another encoding.
    """
    for begins, kind in _NOT_TEXT.items():
        if content.startswith(begins):
            raise DataError(f"{path}: is {kind}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}:{line}: not UTF-8 text (byte {content[error.start]:#04x}); save it as UTF-8"
        ) from None
    if "\0" in text:
        line = first_line + text.count("\n", 0, text.index("\0"))
        raise DataError(
            f"{path}:{line}: holds NUL bytes, so it is not a text file; save it as UTF-8 text"
        )
    return text


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lines(path: str | Path) -> tuple[Int64[np.ndarray, "L 2"], Int64[np.ndarray, " L"]]:
    """Where each line of a file begins and ends, and its number from 1; blank lines are left out.

    A line ends with a line feed, a carriage return, or both; its end is part of it.  The file may
    be larger than memory.

    Raises:
        DataError: no such file, not a file, not readable, or empty.
    """
    begins, offset, after_return = [np.zeros(1, np.int64)], 0, False
    try:
        with Path(path).open("rb") as file:
            while chunk := file.read(_CHUNK):
                codes = np.frombuffer(chunk, np.uint8)
                feed, carriage = codes == ord("\n"), codes == ord("\r")
                # A carriage return ends a line by itself unless a line feed follows.
                if after_return and not feed[0]:
                    begins.append(np.array([offset]))
                ends = feed.copy()
                ends[:-1] |= carriage[:-1] & ~feed[1:]
                begins.append(offset + 1 + np.flatnonzero(ends))
                offset, after_return = offset + len(chunk), bool(carriage[-1])
            starts = np.unique(np.concatenate([*begins, [offset]]))
            spans = np.stack([starts[:-1], starts[1:]], axis=1)
            blank = np.zeros(len(spans), bool)
            # Longer lines are looked at when they are read.
            for at in np.flatnonzero(spans[:, 1] - spans[:, 0] < _SHORT):
                begin, end = spans[at]
                file.seek(int(begin))
                content = file.read(int(end - begin))
                blank[at] = not content.removeprefix(codecs.BOM_UTF8).strip()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if blank.all():
        raise DataError(f"{path}: the file is empty")
    return spans[~blank], 1 + np.flatnonzero(~blank)


def table(path: str | Path) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The header and the rows of a CSV file, of one in gzip (`.gz`), or of a Parquet file.

    A row has its line number (for Parquet, the row's number from 1).

    Raises:
        DataError: as `read_bytes`, `decode` and `read_table`; a damaged file; Parquet without
            pyarrow.
    """
    content = read_bytes(path)
    suffix = Path(path).suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(content, path)
    if suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: not a gzip file ({error})") from None
    return read_table(decode(content, path), path)


def records(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a `table` with their line numbers, each as stripped cells by column.

    Args:
        path: the table.
        columns: required columns, by these names whatever the case in the file; the others are
            included too.

    Raises:
        DataError: as `table`; a missing column, a row with another number of cells.
    """
    header, rows = table(path)
    header = named(header, columns)
    missing = [column for column in columns if column not in header]
    if missing:
        raise DataError(
            f"{path}:1: no column {', '.join(map(repr, missing))}; found "
            f"{listed(map(repr, header))}"
        )
    for line, cells in rows:
        if len(cells) != len(header):
            raise DataError(f"{path}:{line}: {len(cells)} cells, but {len(header)} columns")
        yield line, dict(zip(header, (cell.strip() for cell in cells), strict=True))


def named(header: Sequence[str], columns: Iterable[str]) -> list[str]:
    """A header with these names for the columns that have them in another case."""
    names = list(header)
    for column in columns:
        same = [at for at, name in enumerate(names) if name.casefold() == column.casefold()]
        if column not in names and len(same) == 1:
            names[same[0]] = column
    return names


def json_records(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file, one a line, with their line numbers.

    Blank lines are skipped.

    Raises:
        DataError: as `read_bytes` and `decode`; (while iterating) a line that is not JSON, not an
            object, or holds what is no text: NUL or half a character, as escapes.
    """
    for line, text in enumerate(decode(read_bytes(path), path).split("\n"), 1):
        if not text.strip():
            continue
        try:
            record = parse_json(text)
        except ValueError as error:
            raise DataError(f"{path}:{line}: not JSON ({error})") from None
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise DataError(f"{path}:{line}: holds a {kind}; it must be a JSON object")
        if any("\0" in found or _HALF.search(found) for found in _texts(record)):
            raise DataError(f"{path}:{line}: holds a NUL or half a character; it must be text")
        yield line, record


# Half of a pair that writes one character: JSON can hold it, UTF-8 can't.
_HALF = re.compile("[\ud800-\udfff]")


def _texts(value: object) -> Iterator[str]:
    """All texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for inside in value.values() if isinstance(value, dict) else value:
            yield from _texts(inside)


def csv_rows(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """All rows of a CSV file, the first too, each with the number of its first line.

    For a file without a header.

    Raises:
        DataError: as `read_bytes` and `decode`; (while iterating) broken quoting.
    """
    return _rows(decode(read_bytes(path), path), path, ",")


def _read_parquet(
    content: bytes, path: str | Path
) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pip install 'befm_jax[tables]'") from None
    try:
        columns = parquet.read_table(io.BytesIO(content)).to_pydict()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: not a Parquet file, or damaged ({reason})") from None
    rows = zip(*columns.values(), strict=True)
    return _header(columns, path, 1), (
        (number, [_as_cell(value) for value in row]) for number, row in enumerate(rows, 1)
    )


def _as_cell(value: object) -> str:
    """A value of a Parquet column as in a CSV file; missing ones are empty."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return "" if value is None or value != value else str(value)  # only NaN differs from itself


def read_table(text: str, path: str | Path) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The header of a CSV text, and its rows, each with the number of its first line.

    Blank lines are skipped; rows may have any number of cells.  Names in the header are stripped.
    Handles what spreadsheets write: semicolons or tabs in the place of commas, a first line `sep=;`
    with the separator, and empty columns at the end.

    Raises:
        DataError: no header, a column named twice, or (while iterating) broken quoting.
    """
    first = _EXCEL_SEPARATOR.match(text)
    rows = _rows(text, path, first[1] if first else _separator(text))
    if first:
        next(rows)
    line, names = next(rows, (1, []))
    header = _header(names, path, line)
    return header, _without_empty_columns(rows, len(header), len(names))


def _header(names: Iterable[str], path: str | Path, line: int) -> list[str]:
    """The names of columns without spaces around them and unnamed ones at the end.

    Raises:
        DataError: no name, or one twice.
    """
    header = [name.strip() for name in names]
    if not any(header):
        raise DataError(f"{path}:{line}: no header; the first line must name the columns")
    while not header[-1]:
        header.pop()
    twice = sorted(name for name, times in Counter(header).items() if times > 1)
    if twice:
        raise DataError(f"{path}:{line}: column named twice: {listed(map(repr, twice))}")
    return header


def _without_empty_columns(
    rows: Iterator[tuple[int, list[str]]], named: int, columns: int
) -> Iterator[tuple[int, list[str]]]:
    """Rows without their cells in unnamed columns, if those are empty."""
    for line, cells in rows:
        if named < len(cells) <= columns and not any(map(str.strip, cells[named:])):
            cells = cells[:named]
        yield line, cells


_EXCEL_SEPARATOR = re.compile(r"\ufeff?sep=([,;\t|])\r?\n?")
_FIRST_LINE = re.compile(r"[\ufeff\r\n]*([^\r\n]*)")


def _separator(text: str) -> str:
    """What separates the names in the header: a comma, or where it has none what else there is."""
    header = _FIRST_LINE.match(text)
    return next((mark for mark in ",;\t|" if header and mark in header[1]), ",")


def _rows(text: str, path: str | Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    # strict: otherwise an unclosed quote makes one cell of the rest of the file.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not a CSV row ({error}); check its quotes") from None


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; raises ValueError for another text, or one nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_object(path: Path, error: type[UserError] = UserError) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: no such file.
        UserError: of the class `error`: not readable, not valid JSON, or not an object.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as reason:
        raise error(f"{path}: cannot be read ({reason.strerror})") from None
    except ValueError as reason:
        raise error(f"{path}: not valid JSON ({reason})") from None
    if not isinstance(content, dict):
        raise error(f"{path}: holds a {type(content).__name__}; it must be a JSON object")
    return content


def write_object(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object atomically."""
    write(path, (json.dumps(content, indent=2) + "\n").encode())


def write(path: Path, content: bytes) -> None:
    """Writes a file atomically, by a rename; creates its folder.

    Raises:
        NotWrittenError: the disk is full, say; an existing file is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


class NotWrittenError(UserError):
    """Files that could not be written; the message says whether existing ones are unchanged."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names the file in errors of a block that writes it: of a full disk Python gives no name.

    Raises:
        NotWrittenError: in the place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise NotWrittenError(f"{path}: can't be written ({error.strerror or error})") from error


@contextmanager
def in_use(lock: Path, what: str | Path) -> Iterator[None]:
    """Locks a file while the block runs, so that no other process writes `what` meanwhile.

    The file says who has locked it: host, process, since when.  The kernel unlocks it when the
    process ends, however it ends.  A file system without locks gets a warning.  A folder that is
    made for the lock, and stays empty, is removed.

    Raises:
        InUseError: another process has locked it; names that process.
    """
    made = not lock.parent.exists()
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = lock.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its holder may have removed the file since it was opened.
            if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                break
        except BlockingIOError:
            file.seek(0)
            raise InUseError(
                f"{what} is in use by {file.read() or 'another process'}; wait for its end, or "
                "name another place"
            ) from None
        except OSError as error:
            print(f"warning: {what}: not locked ({error.strerror})", file=sys.stderr)
            break
        file.close()
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    with writing(lock):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}")
        file.flush()
        os.fsync(file.fileno())  # for other hosts to read
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        file.close()
        if made:
            with suppress(OSError):  # it is not empty
                lock.parent.rmdir()


def user_cache() -> Path | None:
    """The package's directory in the user's cache, which they alone can open; None without one.

    That is `befm_jax` in XDG_CACHE_HOME, or in `~/.cache`.  None where it can't be made, or belongs
    to somebody else.
    """
    home = Path(os.environ.get("HOME", ""))
    own = Path(os.environ.get("XDG_CACHE_HOME", home / ".cache")) / "befm_jax"
    if not own.is_absolute():
        return None
    try:
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A link and what it leads to, both.
        if {own.lstat().st_uid, own.stat().st_uid} != {os.geteuid()}:
            return None
        own.chmod(0o700)
    except OSError:
        return None
    return own


# Prefixes of temporary folders: of new files, and of old ones while they are exchanged.
_WRITING, _REPLACED = ".writing-", ".replaced-"


class _StuckError(Exception):
    """An exchange of files that could be neither finished nor undone."""


@contextmanager
def atomic_directory(
    directory: Path, replaces: Callable[[str], bool] = lambda name: False
) -> Iterator[Path]:
    """A temporary folder whose files are moved to `directory` when the block ends without error.

    Creates `directory`.  Files of the same names are replaced, and files for whose names `replaces`
    is true are removed; the others stay.  If moving fails half-way, the old files are restored.
    After a power failure `config.json` is missing (it is removed first and moved last), so that a
    mix of old and new files does not load.  The next writer removes the temporary folders of a
    killed one, but for old files that it had moved.  Files get the permissions of the umask.

    Raises:
        NotWrittenError: a file can't be written (the disk is full, say).
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(f"{_WRITING}*"):
            _remove_if_left(left)
        for left in directory.glob(f"{_REPLACED}*"):
            if not _renamed(left, _WRITING).exists():
                with suppress(OSError):  # it holds old files
                    left.rmdir()
        folder = Path(tempfile.mkdtemp(prefix=_WRITING, dir=directory))
        lock = _locked(folder)
        old = _renamed(folder, _REPLACED)
        old.mkdir()
        keep = False
        try:
            yield folder
            new = {path.name for path in folder.iterdir()}
            _apply_umask(folder)
            before = {
                path.name
                for path in directory.iterdir()
                if path.name in new or (path.is_file() and replaces(path.name))
            }
            _exchange(directory, folder, old, _config_last(new), _config_last(before)[::-1])
        except _StuckError as error:
            keep = True
            with suppress(OSError):  # so that the next writer leaves it
                folder = folder.rename(_renamed(folder, ".new-"))
            raise NotWrittenError(
                f"{directory}: half exchanged ({error}); missing old files are in {old.name}, "
                f"missing new ones in {folder.name}"
            ) from error
        finally:
            if lock is not None:
                os.close(lock)
            if not keep:
                for path in (folder, old):
                    shutil.rmtree(path, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise NotWrittenError(
            f"{directory}: can't be written ({reason}); existing files are unchanged"
        ) from error


def _renamed(folder: Path, prefix: str) -> Path:
    """The sibling of a temporary folder with another prefix."""
    return folder.with_name(prefix + folder.name.partition("-")[2])


def _apply_umask(folder: Path) -> None:
    """Gives files the mode of a newly created one: safetensors writes 0600 whatever the umask."""
    example = folder / ".mode"
    example.touch()
    mode = example.stat().st_mode
    example.unlink()
    for path in folder.rglob("*"):
        # Some file systems have one mode for all files, and no chmod.
        if path.is_file() and path.stat().st_mode != mode:
            path.chmod(mode)


def _locked(folder: Path) -> int | None:
    """A descriptor with a lock on a folder; None if another process has it, or locks don't work.

    The kernel releases it with the process, which distinguishes a living writer from a dead one.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_if_left(folder: Path) -> None:
    """Removes a temporary folder whose writer has died."""
    with suppress(FileNotFoundError):  # another process removed it
        lock = _locked(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _config_last(names: set[str]) -> list[str]:
    return sorted(names, key=lambda name: (name.endswith("config.json"), name))


def _exchange(directory: Path, folder: Path, old: Path, new: list[str], before: list[str]) -> None:
    """Moves the files `before` out and those of `new` in; undoes that on failure."""
    moved: list[tuple[Path, Path]] = []
    try:
        for source, target, names in ((directory, old, before), (folder, directory, new)):
            for name in names:
                os.replace(source / name, target / name)
                moved.append((source / name, target / name))
    except BaseException:  # KeyboardInterrupt too
        try:
            for source, target in reversed(moved):
                os.replace(target, source)
        except OSError as error:
            raise _StuckError(error.strerror or error) from error
        raise
