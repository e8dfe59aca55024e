"""Exports a tuned model: its adapter in PEFT's format, or merged weights for transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from befm_jax.adapters import chat_template, peft
from befm_jax.errors import UserError
from befm_jax.llama import generation_config, hf
from befm_jax.llama.config import LlamaConfig
from befm_jax.llama.model import Params
from befm_jax.llama.tokenizer import Tokenizer
from befm_jax.models import RUN_FILE, ResolvedModel


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
    resolved: ResolvedModel, config: LlamaConfig, directory: str | Path, base: str = ""
) -> None:
    """Writes the adapter of a resolved model in PEFT's format.

    `base` is the base model's name in the config (a hub id, say); by default the name that the
    model was loaded by.

    Raises:
        AdapterError: the model has no adapter, or it can't be read.
        NotWrittenError: a file can't be written.
    """
    if resolved.adapter is None:
        raise peft.AdapterError(f"{resolved.name}: has no adapter to export")
    check_out(Path(directory), resolved)
    known = chat_template.read(resolved.adapter)
    peft.save(
        directory,
        peft.load(resolved.adapter, config),
        base or resolved.name,
        None if known is None else known[0],
    )


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
