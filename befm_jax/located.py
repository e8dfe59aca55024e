"""Where the files of a model are: what `--model` and `--adapter` name, resolved, nothing loaded.

A name is a training run's directory, a Hugging Face directory, or a hub id.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from befm_jax import hub, json_files
from befm_jax.errors import UserError

RUN_FILE = "run.json"


@dataclass(frozen=True)
class Located:
    """A model's files.

    `directory`: the base model's.  `name`: what the base is called elsewhere, a hub id (without a
    revision) or an absolute path.  `adapter`: the adapter's directory, or None.  `run`: the fields
    of the run that it is of (see `write_run`), or empty.
    """

    directory: Path
    name: str
    adapter: Path | None = None
    run: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pinned(self) -> str:
        """The name by which these very files are found again: a hub id with its commit."""
        commit = hub.commit(self.directory)
        return self.name if commit is None or Path(self.name).is_dir() else f"{self.name}@{commit}"


def locate(model: str | Path, adapter: str | Path | None = None) -> Located:
    """Finds the files of a run or a model, downloading what a hub id names.

    Raises:
        FileNotFoundError: neither a directory nor of the form of a hub id.
        HubError: the hub does not give it out.
        UserError: a damaged run, or a run that has an adapter of its own beside `adapter`.
    """
    run_file = Path(model) / RUN_FILE
    if not run_file.is_file():
        return _with_adapter(str(model), adapter, {})
    run = json_files.read_object(run_file)
    lacking = {"model", "made_here", "adapter", "dtype", "quantize", "trained_on"} - set(run)
    if lacking:
        raise UserError(f"{run_file}: lacks {', '.join(sorted(lacking))}; was it cut off?")
    if adapter is not None and run["adapter"]:
        raise UserError(f"{model} is a run with an adapter of its own; leave --adapter out")
    base = str(Path(model) / run["model"]) if run["made_here"] else str(run["model"])
    return _with_adapter(base, Path(model) / run["adapter"] if run["adapter"] else adapter, run)


def _with_adapter(base: str, adapter: str | Path | None, run: Mapping[str, Any]) -> Located:
    name = base.partition("@")[0] if hub.is_hub_id(base) else str(Path(base).resolve())
    found = None if adapter is None else hub.directory(adapter, "adapter")
    return Located(hub.directory(base), name, found, run)


def write_run(
    directory: Path,
    *,
    model: str,
    made_here: bool,
    adapter: str | None,
    dtype: str,
    quantize: str,
    trained_on: Mapping[str, Any],
) -> None:
    """Marks a directory as a run that `locate` takes.

    `model` is a path within the directory if `made_here`, else a path or a hub id; `adapter` a
    path within it, or None; `dtype` is what the layers computed in and `quantize` what the base
    was rounded to ("no" or "int8"); `trained_on` says which people it has seen: `fingerprint` and
    `table` of their source (an empty table: the embedded reference), `split_seed`, and further
    `examples`.
    """
    fields = {
        "model": model,
        "made_here": made_here,
        "adapter": adapter,
        "dtype": dtype,
        "quantize": quantize,
        "trained_on": dict(trained_on),
    }
    json_files.write_object(directory / RUN_FILE, fields)
