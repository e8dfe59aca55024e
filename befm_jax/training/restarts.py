"""The working directory of a run: started, resumed, and how often that went without progress.

Launchers restart a command after any end but success and a user's mistake.  What ends a run each
time, such as a model that is too large for a host, would be paid for again and again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from befm_jax import config, files
from befm_jax.config import Config, ConfigError
from befm_jax.distributed import processes
from befm_jax.errors import UserError
from befm_jax.models import CHECKPOINTS, RUN_FILE
from befm_jax.training.outputs import BASE

CONFIG, RESTARTS, INPUTS = "config.json", "restarts.json", "inputs.json"
# So many restarts, one after the other, may end with nothing new saved.
PATIENCE = 20


class NoProgressError(UserError):
    """A run that was restarted again and again, and never saved anything more."""


def start_or_resume(settings: Config) -> None:
    """Makes the working directory, or goes on in it if it holds a run of the same config.

    A directory in which nothing was trained yet takes any config: a typo is not for ever.  Of
    several processes the first writes, and all check that they see it.

    Raises:
        ConfigError: the config is another than the run's, or not seen by all processes.
        NoProgressError: see `count_restart`.
    """
    workdir = Path(settings.workdir)
    saved = workdir / CONFIG
    trained = (workdir / BASE, workdir / CHECKPOINTS, workdir / RUN_FILE)
    # The others look only once it exists: a shared file system may cache that it did not.
    if processes.is_first():
        if saved.is_file() and any(path.exists() for path in trained):
            config.check_same(settings, saved)
        config.save(settings, saved)
    processes.barrier("the working directory exists")
    if not saved.is_file():
        raise ConfigError(
            f"workdir is {settings.workdir!r}, which this host does not share with that of the "
            "first process; it must be a directory that all hosts mount"
        )
    # In all processes: each may have been started with a config of its own.
    config.check_same(settings, saved)
    count_restart(workdir, trained)


def count_restart(workdir: Path, saved: Iterable[Path]) -> None:
    """Counts restarts without progress; the first process keeps the number in `restarts.json`.

    Progress is a change of the config, of the number of processes, of which of the paths `saved`
    exist, or of the checkpoints.

    Raises:
        NoProgressError: in the first process, after PATIENCE restarts without progress.
    """
    if not processes.is_first():
        return
    checkpoints = [path for path in workdir.glob("checkpoints/*/*") if path.name.isdigit()]
    existing = [path for path in saved if path.exists()]
    progress = {
        "config": hashlib.sha256((workdir / CONFIG).read_bytes()).hexdigest(),
        "processes": processes.count(),
        "saved": sorted(str(path.relative_to(workdir)) for path in (*existing, *checkpoints)),
    }
    path = workdir / RESTARTS
    before = files.read_object(path) if path.is_file() else {}
    counted = before.get("times", 0) if before.get("progress") == progress else 0
    if not isinstance(counted, int):
        raise UserError(f"{path}: times is {counted!r:.40}; it must be a whole number")
    times = counted + 1
    if times > PATIENCE:
        raise NoProgressError(
            f"{workdir}: started {PATIENCE} times, and ended each time before anything more was "
            "saved. See in the log what ended it (memory?), or whether checkpoints.every is too "
            f"many steps for how often it is stopped; then delete {path} and start it again"
        )
    files.write_object(path, {"times": times, "progress": progress})


def end(workdir: Path) -> None:
    """Forgets the restarts of a run that was finished."""
    if processes.is_first():
        (workdir / RESTARTS).unlink(missing_ok=True)


def check_same_inputs(workdir: Path, phase: str, inputs: Mapping[str, str], go_on: bool) -> None:
    """Refuses to go on where files changed behind the paths of an unchanged config.

    `inputs` are hashes of what a phase learns from; the first process keeps them in `inputs.json`.

    Raises:
        ConfigError: the phase goes on from a checkpoint of other inputs, or this process has not
            read the same as the first.
    """
    of_first: dict[str, str] = processes.broadcast(f"{phase} inputs", dict(inputs))
    unlike = [name for name in inputs if of_first.get(name) != inputs[name]]
    if unlike:
        raise ConfigError(
            f"{phase}: the {' and the '.join(unlike)} that this host reads are not those of the "
            "first process; all hosts must read the same files"
        )
    path = workdir / INPUTS
    kept = files.read_object(path, ConfigError) if path.is_file() else {}
    before = kept.get(phase, {})
    if not isinstance(before, dict):
        raise ConfigError(f"{path}: {phase} is {before!r:.40}; it must be a JSON object")
    changed = [name for name in inputs if before.get(name) != inputs[name]]
    if go_on and changed:
        raise ConfigError(
            f"{workdir}: the {' and the '.join(changed)} changed since this run began ({phase}). "
            "Give another --workdir, or delete that one"
        )
    processes.barrier(f"{phase} inputs")
    if processes.is_first():
        files.write_object(path, kept | {phase: dict(inputs)})
