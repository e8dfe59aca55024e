"""The training loop of one phase: from its last checkpoint, or from the start, to its last step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from befm_jax.config import Config
from befm_jax.data.mixture import Mixture
from befm_jax.distributed import processes
from befm_jax.llama.model import Params
from befm_jax.models import CHECKPOINTS
from befm_jax.training import restarts
from befm_jax.training import step as steps
from befm_jax.training.checkpoint import Checkpoints
from befm_jax.training.metrics import Log, Watch
from befm_jax.training.setup import Setup


def run(
    settings: Config,
    setup: Setup,
    mixture: Mixture,
    validation: Mixture | None,
    params: Params,
    inputs: Mapping[str, str],
    watch: Watch,
) -> Any:
    """Trains a phase to its last step; returns its adapter, or all parameters.

    `validation`: the people whose loss is measured at every checkpoint; `params`: the model's
    parameters before training; `inputs`: hashes of what is learnt from beside the batches (see
    `restarts.check_same_inputs`).

    Raises:
        ConfigError: the inputs are not those that the last checkpoint was made from.
        NonFiniteLossError: see `Log.step`.
        PreemptedError: the run was requested to stop, and its state is saved.
    """
    workdir, phase = Path(settings.workdir), setup.phase
    base = None if setup.base is None else params
    best = validation is not None and settings.checkpoints.use == "best"
    saved = Checkpoints(workdir / CHECKPOINTS / phase, settings.checkpoints.keep, best)
    inputs = {"data": mixture.fingerprint, **inputs}
    restarts.check_same_inputs(workdir, phase, inputs, go_on=saved.last is not None)
    state = saved.restore(setup.state)
    if state is None:
        state = setup.fresh(params)
    start = int(state.step)
    if start:
        print(f"{phase}: going on from the checkpoint of step {start}")
    if start < mixture.steps:
        print(f"{phase}: {setup.step.wait(setup.place(mixture[start][0]))}")
    validate = _validation(setup, validation, base)
    # Compiling takes some processes longer than others; CPU collectives wait 30 s for each other.
    processes.barrier(f"{phase} is compiled")
    log = Log(workdir, setup, mixture.steps, start, watch)
    try:
        with processes.stopping_at_steps():
            batches = mixture.ahead(start, mixture.steps)
            for number in range(start + 1, mixture.steps + 1):
                # An implicit transfer would make the host wait for the devices, or copy an array
                # again at every step.  Orbax makes some of its own, for checkpoints.
                with jax.transfer_guard("disallow"):
                    with log.timed("data"):
                        batch, source = next(batches)
                        on_devices = setup.place(batch)
                    with log.profiled(number), log.timed("device"):
                        state, metrics = setup.step(state, base, on_devices)
                    log.step(number, metrics, source)
                stop = processes.stop_requested()
                due = number % settings.checkpoints.every == 0 or number == mixture.steps
                if stop or due:
                    log.settle()
                    # Which step is best must not depend on where a run is stopped: nothing is
                    # measured that an uninterrupted run would not measure.  Without a need for the
                    # loss, saving starts before it is measured.
                    with log.timed("checkpoint"):
                        loss = validate(state.trained) if due and best else None
                        saved.save(number, state, loss)
                        loss = validate(state.trained) if due and not best else loss
                    log.checkpoint(number, loss)
                if stop:
                    raise processes.PreemptedError(f"{phase}: saved at step {number}")
            # After these steps SIGTERM ends the run at once: nothing may still be being saved.
            saved.settle()
        if best:
            best_checkpoint = saved.restore_best(setup.state.trained)
            if best_checkpoint is not None:
                step, trained = best_checkpoint
                print(f"{phase}: step {step} has the least loss on validation people")
                return trained
    finally:
        try:
            log.close()
        finally:
            saved.close()
    return state.trained


def _validation(
    setup: Setup, validation: Mixture | None, base: Params | None
) -> Callable[[Any], float | None]:
    """The loss on validation people, as a function of what is trained."""
    if validation is None:
        return lambda trained: None
    loss = steps.make_loss(setup.model, setup.combine)
    batch = setup.place(validation[0][0])
    return lambda trained: float(jax.device_get(loss(trained, base, batch)))
