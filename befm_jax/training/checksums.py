"""Checksummed folders: whether every file in them is as it was written.

`SUMS.json`, written last, has the size and SHA-256 of every other file, metadata of the folder, and
a checksum of itself.  Any truncation or change is detected, of `SUMS.json` too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from befm_jax import files

FILE = "SUMS.json"


class ChecksumError(Exception):
    """A folder that is not as it was written; the message names the file, without the folder."""


def write(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Writes the checksums of a folder whose files are all written, and syncs them to disk.

    `metadata` is stored beside the checksums, as JSON.
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
    content = {"metadata": dict(metadata), "files": files}
    # No byte after the closing brace: truncated anywhere, it is no JSON.
    text = json.dumps({**content, "sum": _sum(content)}, indent=1)
    with (folder / FILE).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def verify(folder: Path, contents: bool) -> dict[str, Any]:
    """The metadata of a folder that is as it was written.  Checks only sizes unless `contents`.

    Raises:
        ChecksumError: a file is missing, `SUMS.json` included, or not as it was written.
    """
    try:
        sums = files.parse_json((folder / FILE).read_text(encoding="utf-8"))
        content = {"metadata": sums["metadata"], "files": sums["files"]}
        intact = sums["sum"] == _sum(content)
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
    metadata: dict[str, Any] = content["metadata"]
    return metadata


def _digest(file: Any) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _sum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
