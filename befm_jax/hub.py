"""From a name to a directory: a local path as it is, a Hugging Face hub id by its snapshot.

`owner/name` or `owner/name@revision` (a branch, a tag or a commit).  The access token comes from
the environment (`HF_TOKEN`) or from `hf auth login`; `HF_HUB_OFFLINE=1` takes what was downloaded
before.  Only safetensors, JSON and tokenizer files are fetched: never pickles, never code.
"""

from __future__ import annotations

import re
from pathlib import Path

from befm_jax.errors import UserError

_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?")
_WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")
# Folders and copies hold other layouts of the same weights, or earlier states of them.
_UNWANTED = ("*/*", "consolidated*")


class HubError(UserError):
    """A model or adapter that the hub does not give out; the message says what to do."""


def is_hub_id(name: str | Path) -> bool:
    """Whether a name is a hub id: `owner/name`, and nothing of that name is on disk."""
    return _ID.fullmatch(str(name)) is not None and not Path(name).exists()


def directory(name: str | Path, kind: str = "model") -> Path:
    """The local directory of a model or an adapter (`kind`, for messages), downloaded if need be.

    Raises:
        FileNotFoundError: neither a directory nor of the form of a hub id.
        HubError: no such repository or revision, no permission, or offline and not in the cache.
    """
    if str(name) and Path(name).is_dir():
        return Path(name)
    if not is_hub_id(name):
        shown = str(name) or "(an empty name)"
        raise FileNotFoundError(
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
                allow_patterns=list(_WANTED),
                ignore_patterns=list(_UNWANTED),
            )
        )
    except errors.GatedRepoError as error:
        reason = "it is gated: ask for access on its page, then set HF_TOKEN to a token of yours"
        raise _refused(name, kind, reason) from error
    except errors.RepositoryNotFoundError as error:
        reason = "the hub has none of that name, or it is private and HF_TOKEN has no access"
        raise _refused(name, kind, reason) from error
    except errors.RevisionNotFoundError as error:
        raise _refused(name, kind, f"the hub has it, but no revision {revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        reason = "it is not in the local cache, and the hub can't be reached"
        raise _refused(name, kind, reason) from error
    except Exception as error:  # whatever network library the client uses, it raises its own
        raise _refused(name, kind, f"the hub did not give it out ({error})") from error


def _refused(name: str | Path, kind: str, reason: str) -> HubError:
    return HubError(f"{name}: no such {kind} directory; and as a hub id: {reason}")


def commit(directory: Path) -> str | None:
    """The commit that a directory of the hub's cache is a snapshot of; None for others."""
    in_cache = directory.parent.name == "snapshots" and directory.parent.parent.name.startswith(
        "models--"
    )
    return directory.name if in_cache else None
