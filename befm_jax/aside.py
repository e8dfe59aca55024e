"""Directories written all or nothing: aside first, then exchanged for what was there."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from befm_jax.errors import UserError


class NotWrittenError(UserError):
    """Files that could not be written; the message says what became of those that were there."""


# What a folder is called while it is written.
_WRITING = ".writing-"


class _StuckError(Exception):
    """An exchange that could be neither finished nor undone."""


@contextmanager
def written(
    directory: Path, replaces: Callable[[str], bool] = lambda name: False
) -> Iterator[Path]:
    """A folder to write in; its files take their place when the block ends without error.

    `directory` is made if need be.  Files of the same names are replaced, and so is every file
    whose name `replaces` takes for one of an older version; the others stay.  Where an exchange
    fails half-way, the old files are put back.  Where the power fails, `config.json` is not there
    (it goes first and comes last), so that nobody takes the mix for a whole; what a writer that
    was killed had written aside is removed by the next.

    Raises:
        NotWrittenError: a file can't be written (the disk is full, say).
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(f"{_WRITING}*"):
            _remove_if_left(left)
        folder = Path(tempfile.mkdtemp(prefix=_WRITING, dir=directory))
        lock = _locked(folder)
        old = Path(tempfile.mkdtemp(prefix=".replaced-", dir=directory))
        keep = False
        try:
            yield folder
            new = {path.name for path in folder.iterdir()}
            before = {
                path.name
                for path in directory.iterdir()
                if path.name in new or (path.is_file() and replaces(path.name))
            }
            _exchange(directory, folder, old, _config_last(new), _config_last(before)[::-1])
        except _StuckError as error:
            keep = True
            with suppress(OSError):  # so that the next writer leaves it
                folder = folder.rename(folder.with_name(folder.name.replace(_WRITING, ".new-", 1)))
            raise NotWrittenError(
                f"{directory}: half exchanged ({error}); what is missing of the old files is in "
                f"{old.name}, of the new ones in {folder.name}"
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
            f"{directory}: can't be written ({reason}); what was there before is as it was"
        ) from error


def _locked(folder: Path) -> int | None:
    """A lock on a folder for as long as this process lives, or None: another's, or not to be had.

    The kernel ends it with the process, however that ends, so that what a living one writes can be
    told from what a dead one left.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_if_left(folder: Path) -> None:
    """Removes a folder that nobody is writing any more."""
    with suppress(FileNotFoundError):  # another process removed it
        lock = _locked(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _config_last(names: set[str]) -> list[str]:
    return sorted(names, key=lambda name: (name.endswith("config.json"), name))


def _exchange(directory: Path, folder: Path, old: Path, new: list[str], before: list[str]) -> None:
    """Moves the files of `before` out and those of `new` in; the other way round on failure."""
    moved: list[tuple[Path, Path]] = []
    try:
        for source, target, names in ((directory, old, before), (folder, directory, new)):
            for name in names:
                os.replace(source / name, target / name)
                moved.append((source / name, target / name))
    except BaseException:  # an interruption by the keyboard, too
        try:
            for source, target in reversed(moved):
                os.replace(target, source)
        except OSError as error:
            raise _StuckError(error.strerror or error) from error
        raise
