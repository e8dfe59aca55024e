"""Resolves names of models (`--model`, `--adapter`) to their files, without loading them.

A name is a training run's directory, a Hugging Face directory, or a hub id: `owner/name` or
`owner/name@revision` (a branch, a tag or a commit).  The access token comes from the environment
(`HF_TOKEN`) or from `hf auth login`; `HF_HUB_OFFLINE=1` uses the local cache alone.  Only
safetensors, JSON and tokenizer files are downloaded: never pickles, never code.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from befm_jax import checksums, files
from befm_jax.errors import NoModelError, UserError

RUN_FILE, CHECKPOINTS = "run.json", "checkpoints"
# Dtypes of activations, and quantisations of a base.
DTYPES = ("float32", "bfloat16")
QUANTIZE = ("no", "int8")
_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?")
_ALLOWED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")
# Subdirectories and these files have the same weights in other formats, or earlier checkpoints.
_IGNORED = ("*/*", "consolidated*")


class HubError(UserError):
    """A model or adapter that can't be downloaded from the hub; the message says what to do."""


def is_hub_id(name: str | Path) -> bool:
    """Whether a name is a hub id: `owner/name`, and nothing of that name is on disk."""
    return _ID.fullmatch(str(name)) is not None and not Path(name).exists()


def directory_of(name: str | Path, kind: str = "model", patterns: Sequence[str] = _ALLOWED) -> Path:
    """The local directory of a model or an adapter (`kind`, for messages), downloaded if necessary.

    `patterns`: those of the files that are downloaded.

    Raises:
        NoModelError: neither a directory nor a hub id.
        HubError: no such repository or revision, no permission, or offline and not in the cache.
    """
    if str(name) and Path(name).is_dir():
        return Path(name)
    if not is_hub_id(name):
        shown = str(name) or "(an empty name)"
        raise NoModelError(
            f"{shown}: no such {kind} directory, nor a hub id (owner/name or owner/name@revision)"
        )
    # Imported here: most runs never need the hub.
    from huggingface_hub import errors, snapshot_download

    repository, _, revision = str(name).partition("@")
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=list(patterns),
                ignore_patterns=list(_IGNORED),
            )
        )
    except errors.GatedRepoError as error:
        reason = "it is gated: request access on its page, then set HF_TOKEN"
        raise _refused(name, kind, reason) from error
    except errors.RepositoryNotFoundError as error:
        reason = "it does not exist, or it is private and HF_TOKEN has no access"
        raise _refused(name, kind, reason) from error
    except errors.RevisionNotFoundError as error:
        raise _refused(name, kind, f"it has no revision {revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        reason = "it is not in the local cache, and the hub can't be reached"
        raise _refused(name, kind, reason) from error
    except Exception as error:  # the client's network libraries raise their own types
        raise _refused(name, kind, f"the download failed ({error})") from error


def _refused(name: str | Path, kind: str, reason: str) -> HubError:
    return HubError(f"{name}: no such {kind} directory; as a hub id: {reason}")


def commit_of(directory: Path) -> str | None:
    """The commit of a snapshot directory in the hub's cache; None for other directories."""
    in_cache = directory.parent.name == "snapshots" and directory.parent.parent.name.startswith(
        "models--"
    )
    return directory.name if in_cache else None


@dataclass(frozen=True)
class ResolvedModel:
    """A model's files.

    `directory`: the base model's.  `name`: the base's hub id (without a revision) or absolute path.
    `adapter`: the adapter's directory, or None.  `run`: the fields of its run (see `write_run`), or
    empty.
    """

    directory: Path
    name: str
    adapter: Path | None = None
    run: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pinned(self) -> str:
        """The name of exactly these files: a hub id with its commit, or a path."""
        commit = commit_of(self.directory)
        return self.name if commit is None or Path(self.name).is_dir() else f"{self.name}@{commit}"


# Field of a run file -> (predicate, what the error says it must be)
_RUN_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda value: isinstance(value, str), "a text"),
    "made_here": (lambda value: isinstance(value, bool), "true or false"),
    "adapter": (lambda value: value is None or isinstance(value, str), "a text or null"),
    "dtype": (lambda value: value in DTYPES, f"one of {', '.join(DTYPES)}"),
    "quantize": (lambda value: value in QUANTIZE, f"one of {', '.join(QUANTIZE)}"),
    "trained_on": (lambda value: isinstance(value, dict), "an object"),
}


def resolve_model(model: str | Path, adapter: str | Path | None = None) -> ResolvedModel:
    """The files of a run or a model, downloaded for a hub id.

    Of a run every file that is read is checked to be as the run wrote it.

    Raises:
        NoModelError: neither a directory nor a hub id, or a run that has not come to its end.
        HubError: the download failed.
        UserError: a damaged run, whose field is named; both `adapter` and a run with its own.
    """
    directory = Path(model)
    if not (directory / RUN_FILE).is_file():
        config = directory / "config.json"
        if config.is_file() and "workdir" in files.read_object(config):
            raise NoModelError(
                f"{model}: a training run without a tuned model yet: {_progress(directory)}; give "
                "its command again, which goes on to the end"
            )
        return _with_adapter(str(model), adapter, {})
    run = _read_run(directory)
    if adapter is not None and run["adapter"]:
        raise UserError(f"{model} is a run with its own adapter; leave --adapter out")
    base = str(directory / run["model"]) if run["made_here"] else str(run["model"])
    return _with_adapter(base, directory / run["adapter"] if run["adapter"] else adapter, run)


def _read_run(directory: Path) -> dict[str, Any]:
    """The fields of a run, whose files are verified; a note where they have no checksums.

    Raises UserError for a file that is damaged, or a field that can't be.
    """
    verified = (directory / checksums.FILE).is_file()
    if verified:
        with damage_named(directory):
            checksums.verify_once(directory, [RUN_FILE])
    else:
        print(
            f"note: {directory}: its files can't be verified, {checksums.FILE} is missing",
            file=sys.stderr,
        )
    file = directory / RUN_FILE
    run = files.read_object(file)
    missing = sorted(set(_RUN_FIELDS) - set(run))
    if missing:
        raise UserError(f"{file}: lacks {', '.join(missing)}; is it truncated?")
    for name, (is_valid, requirement) in _RUN_FIELDS.items():
        if not is_valid(run[name]):
            raise UserError(f"{file}: {name} is {run[name]!r:.80}; it must be {requirement}")
    made_here = [run["model"]] if run["made_here"] else []
    if verified:
        with damage_named(directory):
            checksums.verify_once(directory, [*made_here, *filter(None, [run["adapter"]])])
    return run


@contextmanager
def damage_named(directory: Path) -> Iterator[None]:
    """Turns a ChecksumError of a run's files into a UserError that says what to do."""
    try:
        yield
    except checksums.ChecksumError as error:
        raise UserError(
            f"{directory}/{error}; restore it from a copy (or, where it was changed on purpose, "
            f"delete {directory / checksums.FILE})"
        ) from error


def _progress(directory: Path) -> str:
    """The last checkpoint of a run, in words."""
    for phase in ("tune", "base"):
        saved = (directory / CHECKPOINTS / phase).glob("*")
        steps = [int(path.name) for path in saved if path.name.isdecimal()]
        if steps:
            return f"its last checkpoint is that of step {max(steps)} ({phase})"
    return "it has no checkpoint"


def _with_adapter(base: str, adapter: str | Path | None, run: Mapping[str, Any]) -> ResolvedModel:
    name = base.partition("@")[0] if is_hub_id(base) else str(Path(base).resolve())
    adapter_directory = None if adapter is None else directory_of(adapter, "adapter")
    return ResolvedModel(directory_of(base), name, adapter_directory, run)


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
    """Writes a run's `run.json`, which `resolve_model` reads.

    `model` is a path within the directory if `made_here`, else a path or a hub id; `adapter` a
    path within it, or None; `dtype` the dtype of activations and `quantize` the quantisation of the
    base ("no" or "int8"); `trained_on` identifies the training people: `fingerprint` and `table` of
    their source (an empty table: the embedded reference), `split_seed`, and further `examples`.
    """
    fields = {
        "model": model,
        "made_here": made_here,
        "adapter": adapter,
        "dtype": dtype,
        "quantize": quantize,
        "trained_on": dict(trained_on),
    }
    files.write_object(directory / RUN_FILE, fields)
