"""How often a run was begun without getting further.

Launchers run a command again after any end but success and a mistake.  What ends a run each time,
such as a model that is too large for a host, would be paid for again and again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from befm_jax import files
from befm_jax.distributed import processes
from befm_jax.errors import UserError

FILE = "sittings.json"
# So many sittings, one after the other, may end with nothing new saved.
PATIENCE = 20


class NoProgressError(UserError):
    """A run that was begun again and again, and never came to save anything more."""


def begin(workdir: Path, config: Path, saved: Iterable[Path]) -> None:
    """Counts this sitting of a run; the first process keeps the number in `sittings.json`.

    It is compared with the sitting before it: the file `config`, the number of processes, which of
    the paths `saved` are there, and which checkpoints.

    Raises:
        NoProgressError: in the first process, where PATIENCE sittings have found what this finds.
    """
    if not processes.is_first():
        return
    steps = [path for path in workdir.glob("checkpoints/*/*") if path.name.isdigit()]
    there = [path for path in saved if path.exists()]
    found = {
        "config": hashlib.sha256(config.read_bytes()).hexdigest(),
        "processes": processes.count(),
        "saved": sorted(str(path.relative_to(workdir)) for path in (*there, *steps)),
    }
    path = workdir / FILE
    before = files.read_object(path) if path.is_file() else {}
    times = before["times"] + 1 if before.get("found") == found else 1
    if times > PATIENCE:
        raise NoProgressError(
            f"{workdir}: begun {PATIENCE} times, and ended each time before anything more was "
            "saved. See in the log what ended it (memory?), or whether checkpoints.every is too "
            f"many steps for how often it is stopped; then delete {path} and go on"
        )
    files.write_object(path, {"times": times, "found": found})


def end(workdir: Path) -> None:
    """The run went well to its end: what comes now is counted anew."""
    if processes.is_first():
        (workdir / FILE).unlink(missing_ok=True)
