"""Sealed folders: whether every byte of every file in them is the one that was written.

The seal is a file of its own, written last: the size and SHA-256 of every other file, what the
writer says of the folder, and the seal's own sum.  Whatever is cut off or changed shows, the seal
itself included.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FILE = "SUMS.json"


class ChecksumError(Exception):
    """A folder that is not as it was sealed; the message says in what, without the folder."""


def write(folder: Path, said: Mapping[str, Any]) -> None:
    """Seals a folder whose files are all there, and has them on disk before it returns.

    `said` is kept in the seal, as JSON.
    """
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )

    def sum_of(name: str) -> list[Any]:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            return [os.fstat(file.fileno()).st_size, _digest(file)]

    with ThreadPoolExecutor() as pool:
        files = dict(zip(names, pool.map(sum_of, names), strict=True))
    content = {"said": dict(said), "files": files}
    # Not a byte after the closing brace: cut off anywhere, it is no JSON.
    text = json.dumps({**content, "sum": _sum(content)}, indent=1)
    with (folder / FILE).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def verify(folder: Path, contents: bool) -> dict[str, Any]:
    """What was said when a folder was sealed.  Looks at sizes alone unless `contents`.

    Raises:
        ChecksumError: there is no seal, or a file is missing or not as it was.
    """
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        content = {"said": found["said"], "files": found["files"]}
        intact = found["sum"] == _sum(content)
    except FileNotFoundError:
        raise ChecksumError(f"{FILE} is missing") from None
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise ChecksumError(f"{FILE} is not as it was written")

    def compare(name: str) -> None:
        size, digest = content["files"][name]
        try:
            with (folder / name).open("rb") as file:
                actual = os.fstat(file.fileno()).st_size
                if actual != size:
                    raise ChecksumError(f"{name} has {actual:,} of {size:,} bytes")
                if contents and _digest(file) != digest:
                    raise ChecksumError(f"{name} is not as it was written")
        except FileNotFoundError:
            raise ChecksumError(f"{name} is missing") from None

    with ThreadPoolExecutor() as pool:
        list(pool.map(compare, content["files"]))
    said: dict[str, Any] = content["said"]
    return said


def _digest(file: Any) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _sum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
