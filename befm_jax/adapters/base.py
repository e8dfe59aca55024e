"""The base model that an adapter was trained on, known by its fingerprint.

On other weights of the same shapes an adapter runs, and answers with noise.
"""

from __future__ import annotations

from pathlib import Path

from befm_jax.adapters import peft
from befm_jax.adapters.spec import AdapterError
from befm_jax.llama import hf
from befm_jax.llama.hf import StoredModel


def check(directory: str | Path, model: StoredModel, name: str, force: bool = False) -> str:
    """Compares an adapter's base with a model of this name; returns the outcome as a text.

    Adapters that were not written here have no fingerprint, and names are compared, without their
    owners and folders.

    Raises AdapterError where fingerprints differ, unless `force`, or a file is damaged.
    """
    trained_on, named = peft.base_of(directory)
    if trained_on is None:
        if named and _last(named) == _last(name):
            return "the one that the adapter names"
        names = f"names {named!r}" if named else "does not say which one"
        return f"unknown: the model is {name}; the adapter {names}"
    found = hf.fingerprint(model)
    if trained_on == found:
        return "the one that the adapter was trained on"
    if not force:
        raise AdapterError(
            f"{Path(directory) / peft.BASE_FILE}: the adapter was trained on another base (named "
            f"{named!r}, fingerprint {trained_on[:12]}…) than {name} ({found[:12]}…), so that its "
            "numbers mean nothing there. Use that base, or keep this one with --force_base"
        )
    return f"forced: the adapter was trained on another one (fingerprint {trained_on})"


def _last(name: str) -> str:
    """The last part of a path or a hub id, without a revision."""
    return Path(name).name.partition("@")[0].lower()
