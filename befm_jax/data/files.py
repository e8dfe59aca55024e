"""Text and tables from files that nobody has checked: read whole, decoded, cut into rows."""

import codecs
import csv
import io
from collections.abc import Iterator
from pathlib import Path

from befm_jax.data.errors import DataError


def read_bytes(path: str | Path) -> bytes:
    """The content of a file.

    Raises:
        DataError: the file is absent, not a file, not readable, or empty.
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


def decode(content: bytes, path: str | Path) -> str:
    """The UTF-8 text of a file's content, without its byte-order mark; line ends as they are.

    Raises:
        DataError: the content is binary or in another encoding.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 text (byte {content[error.start]:#04x}); save it as UTF-8"
        ) from None
    if "\0" in text:
        raise DataError(f"{path}: holds NUL bytes, so it is no text file; save it as UTF-8 text")
    return text


def read_table(text: str, path: str | Path) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """The header of a CSV text, and its rows, each with the number of its first line.

    Blank lines are passed over; rows keep whatever number of cells they have. Names in the header
    are stripped of spaces.

    Raises:
        DataError: no header, a column named twice, or (while iterating) broken quoting.
    """
    rows = _rows(text, path)
    _, header = next(rows, (0, []))
    header = [name.strip() for name in header]
    if not any(header):
        raise DataError(f"{path}:1: no header; the first line names the columns")
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path}:1: column named twice: {', '.join(map(repr, twice))}")
    return header, rows


def _rows(text: str, path: str | Path) -> Iterator[tuple[int, list[str]]]:
    # strict: without it a quote that is never closed swallows the rest of the file as one cell.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not a CSV row ({error}); check its quotes") from None
