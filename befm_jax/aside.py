"""Directories written all or nothing: aside first, then moved into place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from befm_jax.errors import UserError


class NotWrittenError(UserError):
    """Files that could not be written; what was in the directory before is as it was."""


@contextmanager
def written(directory: Path) -> Iterator[Path]:
    """A folder to write in; its files move into `directory` when the block ends without error.

    `directory` is made if need be.  The `config.json` moves last: where it is, the rest is whole.

    Raises:
        NotWrittenError: a file can't be written (the disk is full, say).
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".writing-", dir=directory))
        try:
            yield aside
            for path in sorted(aside.iterdir(), key=lambda one: one.name.endswith("config.json")):
                os.replace(path, directory / path.name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise NotWrittenError(
            f"{directory}: can't be written ({reason}); what was there before is as it was"
        ) from error
