"""Checksummed folders: whether every file in them is as it was written.

`SUMS.json` has the size and SHA-256 of files in its folder, metadata of the folder, and a checksum
of itself.  Any truncation or change is detected, of `SUMS.json` too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from befm_jax import files

FILE = "SUMS.json"
# Files from this size on are hashed once, and again only where size or time of change differ.
LARGE = 1 << 26


class ChecksumError(Exception):
    """A folder that is not as it was written; the message names the file, without the folder."""


def write(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Writes the checksums of a folder whose files are all written, and syncs them to disk.

    `metadata` is stored beside the checksums, as JSON.
    """
    _write(folder, metadata, _sums(folder, folder.rglob("*")))


def add(folder: Path, within: Iterable[str]) -> None:
    """Updates the checksums of some files, and of all files directly in some subfolders.

    Raises:
        ChecksumError: `SUMS.json` is there, and damaged.
    """
    paths = list(within)
    kept: dict[str, Any] = {"metadata": {}, "files": {}}
    if (folder / FILE).is_file():
        kept = _read(folder)
    others = {name: entry for name, entry in kept["files"].items() if not _is_within(name, paths)}
    parts = [folder / path for path in paths]
    # Folders within are what is left of a writer that was killed.
    found = [file for part in parts for file in (part.iterdir() if part.is_dir() else [part])]
    _write(folder, kept["metadata"], others | _sums(folder, found))


def has(folder: Path, path: str) -> bool:
    """Whether a file or a subfolder has checksums; False without `SUMS.json`.

    Raises:
        ChecksumError: `SUMS.json` is damaged.
    """
    return (folder / FILE).is_file() and any(
        _is_within(name, [path]) for name in _read(folder)["files"]
    )


def verify(folder: Path, contents: bool) -> dict[str, Any]:
    """The metadata of a folder that is as it was written.  Checks only sizes unless `contents`.

    Raises:
        ChecksumError: a file is missing, `SUMS.json` included, or not as it was written.
    """
    sums = _read(folder)
    with ThreadPoolExecutor() as pool:
        list(
            pool.map(
                lambda name: _compare(folder, name, sums["files"][name], contents), sums["files"]
            )
        )
    metadata: dict[str, Any] = sums["metadata"]
    return metadata


def verify_once(folder: Path, within: Iterable[str]) -> None:
    """Checks that some files, and all in some subfolders, are as they were written.

    Large files are not hashed again while size and time of change are those of the last time, which
    the user's cache remembers.

    Raises:
        ChecksumError: as `verify`, or a path without checksums.
    """
    entries, paths = _read(folder)["files"], list(within)
    for path in paths:
        if not any(_is_within(name, [path]) for name in entries):
            raise ChecksumError(f"{path} has no checksum")
    cache = files.user_cache()

    def compare(name: str) -> None:
        file, (size, digest) = folder / name, entries[name]
        seen = None
        if cache is not None and size >= LARGE and file.is_file():
            key = f"{file.resolve()} {file.stat().st_mtime_ns} {digest}"
            seen = cache / "verified" / hashlib.sha256(key.encode()).hexdigest()
        _compare(folder, name, entries[name], contents=seen is None or not seen.exists())
        if seen is not None:
            seen.parent.mkdir(exist_ok=True)
            seen.touch()

    with ThreadPoolExecutor() as pool:
        list(pool.map(compare, (name for name in entries if _is_within(name, paths))))


def _compare(folder: Path, name: str, entry: tuple[int, str], contents: bool) -> None:
    """Raises ChecksumError unless a file has its size and, with `contents`, its SHA-256."""
    size, digest = entry
    try:
        with (folder / name).open("rb") as file:
            actual = os.fstat(file.fileno()).st_size
            if actual != size:
                raise ChecksumError(f"{name} has {actual:,} of {size:,} bytes")
            if contents and _digest(file) != digest:
                raise ChecksumError(f"{name} is not as it was written")
    except FileNotFoundError:
        raise ChecksumError(f"{name} is missing") from None


def _is_within(name: str, paths: Iterable[str]) -> bool:
    return any(name == path or name.startswith(f"{path}/") for path in paths)


def _sums(folder: Path, paths: Iterable[Path]) -> dict[str, Any]:
    """The size and SHA-256 of those paths that are files, by name, after they are synced."""
    names = sorted(path.relative_to(folder).as_posix() for path in paths if path.is_file())

    def sum_of(name: str) -> list[Any]:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            return [os.fstat(file.fileno()).st_size, _digest(file)]

    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(sum_of, names), strict=True))


def _read(folder: Path) -> dict[str, Any]:
    """`metadata` and `files` of a `SUMS.json`.

    Raises:
        ChecksumError: it is missing, or not as it was written.
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
    return content


def _write(folder: Path, metadata: Mapping[str, Any], sums: Mapping[str, Any]) -> None:
    content = {"metadata": dict(metadata), "files": dict(sums)}
    # No byte after the closing brace: truncated anywhere, it is no JSON.
    text = json.dumps({**content, "sum": _sum(content)}, indent=1)
    temporary = folder / f".{FILE}"
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / FILE)


def _digest(file: Any) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _sum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
