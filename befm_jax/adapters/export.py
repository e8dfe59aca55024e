"""Exports a tuned model: its adapter in PEFT's format, or merged weights for transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from befm_jax.adapters import base as bases
from befm_jax.adapters import chat_template, peft
from befm_jax.errors import UserError
from befm_jax.llama import config as llama_config
from befm_jax.llama import generation_config, hf
from befm_jax.llama.config import LlamaConfig
from befm_jax.llama.model import Params
from befm_jax.llama.tokenizer import Tokenizer
from befm_jax.models import RUN_FILE, HubError, ResolvedModel, directory_of


def model(
    directory: str | Path,
    config: LlamaConfig,
    params: Params,
    tokenizer: Tokenizer,
    *,
    source: Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
    gather: Callable[[Any], np.ndarray] = jax.device_get,
) -> None:
    """Writes, atomically, a model that transformers and `befm_jax.load` read.

    Weights in files of at most `max_shard_bytes` with an index, with an adapter merged; the
    `config.json`; the tokenizer with its chat template; and a `generation_config.json`, copied from
    the `source` directory where it has one.  `gather`: see `hf.save`.

    Raises:
        AdapterError: the adapter's base is quantised.
        NotWrittenError: the disk is full, or a file can't be written.
    """

    def beside(folder: Path) -> None:
        tokenizer.save(folder)
        if source is not None and (source / generation_config.FILE).is_file():
            generation_config.copy(source, folder)
        else:
            ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.stop_ids)}
            (folder / generation_config.FILE).write_text(json.dumps(ends), encoding="utf-8")

    hf.save(directory, config, params, max_shard_bytes, beside, gather)


def adapter(
    resolved: ResolvedModel, directory: str | Path, base: str = "", force_base: bool = False
) -> dict[str, str]:
    """Writes the adapter of a resolved model in PEFT's format; returns what is known of its base.

    `base` is the base model's name in the config (a hub id, say); by default the name that the
    model was loaded by.  `force_base` accepts another base than the one it was trained on.

    Returns `adapter_base`, the outcome of `base.check`, and `named`: why it is not known whether
    the adapter fits a base of that name, or "".

    Raises:
        AdapterError: the model has no adapter, it can't be read, or it is of another base, or for
            other shapes than those of `base`.
        NotWrittenError: a file can't be written.
    """
    if resolved.adapter is None:
        raise peft.AdapterError(f"{resolved.name}: has no adapter to export")
    check_out(Path(directory), resolved)
    stored = hf.open_model(resolved.directory)
    loaded = peft.load(resolved.adapter, stored.config)
    outcome = bases.check(resolved.adapter, stored, resolved.name, force_base)
    named = _check_named(resolved.adapter, base, force_base) if base else ""
    known = chat_template.read(resolved.adapter)
    peft.save(
        directory,
        loaded,
        base or resolved.name,
        None if known is None else known[0],
        peft.base_of(resolved.adapter)[0],
    )
    return {"adapter_base": outcome, "named": named}


def _check_named(adapter: Path, base: str, force: bool) -> str:
    """Compares an adapter with the base of a name, by its `config.json`; a local one by weights.

    Returns why there is nothing to compare with, or "".  Raises AdapterError where they differ.
    """
    try:
        directory = directory_of(base, "base", ["config.json"])
        config = llama_config.read(directory)
    except (HubError, FileNotFoundError) as error:
        return str(error)
    try:
        peft.load(adapter, config)
    except peft.AdapterError as error:
        raise peft.AdapterError(f"the adapter does not fit {base}: {error}") from error
    if Path(base).is_dir():
        bases.check(adapter, hf.open_model(directory), base, force)
    return ""


def check_out(directory: Path, resolved: ResolvedModel) -> None:
    """Raises UserError if `directory` is a file, an input of the export or a training run."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: is a file; give a directory")
    own = {resolved.directory.resolve()}
    if resolved.adapter is not None:
        own.add(resolved.adapter.resolve())
    if directory.resolve() in own:
        raise UserError(f"{directory}: contains the exported model; give another directory")
    if (directory / RUN_FILE).is_file():
        raise UserError(f"{directory}: is a training run; give another directory")
