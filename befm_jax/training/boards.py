"""Weights & Biases, by option: the figures of `metrics.jsonl` on a page of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from befm_jax.config import Config
from befm_jax.errors import UserError


@contextmanager
def opened(project: str | None, settings: Config) -> Iterator[Any]:
    """A run of a project of Weights & Biases, or its going on where the working directory has one.

    None without a project.  The working directory has to be there.  What the service needs is said
    by its own variables (`WANDB_API_KEY`, `WANDB_MODE=offline`).

    Raises:
        UserError: the package is not installed, or the service refuses (no key, no network).
    """
    if project is None:
        yield None
        return
    try:
        import wandb
    except ImportError as error:
        raise UserError("--wandb needs a package: pip install 'befm_jax[wandb]'") from error
    try:
        run = wandb.init(
            project=project,
            config=dataclasses.asdict(settings),
            dir=settings.workdir,
            resume="auto",
        )
    except wandb.errors.Error as error:
        raise UserError(f"--wandb {project}: {error}") from error
    for phase in ("base", "tune"):
        run.define_metric(f"{phase}/step")
        run.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
    try:
        yield run
    finally:
        run.finish()
