"""What a run leaves in its working directory, written once by however many processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from befm_jax import checksums
from befm_jax.adapters import export, peft
from befm_jax.adapters.lora import Adapter
from befm_jax.config import Config
from befm_jax.distributed import processes, transfer
from befm_jax.llama import hf
from befm_jax.llama.config import LlamaConfig
from befm_jax.llama.model import Params
from befm_jax.llama.tokenizer import Tokenizer
from befm_jax.models import RUN_FILE, ResolvedModel, damage_named, write_run

BASE, ADAPTER, TUNED = "base", "adapter", "tuned"


def write_tuned(
    settings: Config,
    trained: Params | Adapter,
    base: ResolvedModel,
    base_fingerprint: str,
    shape: LlamaConfig,
    tokenizer: Tokenizer,
    trained_on: Mapping[str, Any],
) -> None:
    """Writes what was trained of a base model, and `run.json`, which makes the run a model.

    All of it with checksums, which `models.resolve_model` verifies.

    An adapter goes to `adapter/` in PEFT's format, with the base's fingerprint, every parameter to
    `tuned/`; `trained_on`: see `models.write_run`.
    """
    workdir = Path(settings.workdir)
    if isinstance(trained, Adapter):
        on_host = transfer.gather(trained)
        if processes.is_first():
            peft.save(
                workdir / ADAPTER, on_host, base.name, tokenizer.rendered_hash(), base_fingerprint
            )
        made_here = not settings.model.path
        model, adapter = BASE if made_here else base.pinned, ADAPTER
    else:
        write_model(workdir / TUNED, shape, trained, tokenizer, base.directory)
        model, made_here, adapter = TUNED, True, None
    if processes.is_first():
        write_run(
            workdir,
            model=model,
            made_here=made_here,
            adapter=adapter,
            dtype=settings.model.dtype,
            quantize=settings.model.quantize,
            trained_on=trained_on,
        )
        with damage_named(workdir):
            checksums.add(workdir, [RUN_FILE, adapter or TUNED])


def write_model(
    directory: Path,
    shape: LlamaConfig,
    params: Params,
    tokenizer: Tokenizer,
    source: Path | None = None,
) -> None:
    """Writes a whole model from the first process, which gathers it tensor by tensor.

    `source`: see `export.model`.
    """
    if processes.is_first():
        export.model(directory, shape, params, tokenizer, source=source, gather=transfer.gather)
    else:
        hf.help_save(shape, params, transfer.gather)
    processes.barrier(f"{directory.name} is written")
