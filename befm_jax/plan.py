"""Says what a run needs of hardware that is not here: does it fit, how long, what limits it.

    python -m befm_jax.plan --config configs/70b_tpu.py
    python -m befm_jax.plan --config configs/70b_tpu.py --topology v5e:16x16 --json plan.json
    python -m befm_jax.plan --config configs/8b_tpu.py --search

The real training step is compiled for the topology by the compiler that the pod would use, which
says what memory it needs.  Operations are counted from the model's shape, traffic between chips is
read from the compiled program; held against the chip's figures they give the shortest time that a
step can take, and what limits it.  GPUs are estimated by formula, and the plan says so.
Exits with 1 where the run does not fit.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from befm_jax import cli, config, hlo, json_files, operations, parallel, topology
from befm_jax.adapters import lora
from befm_jax.config import Config, ConfigError
from befm_jax.data.forest import Forest, Reads
from befm_jax.data.pipeline import Batch
from befm_jax.llama import config as llama_config
from befm_jax.llama.config import LlamaConfig
from befm_jax.llama.model import Llama
from befm_jax.llama.published import PUBLISHED
from befm_jax.parallel import Layout, ShardingError
from befm_jax.topology import Topology
from befm_jax.training import optimizer as optimizers
from befm_jax.training import step as steps

FLAGS = flags.FLAGS
_EXCEEDED = re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm")
_UNITS = {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


@dataclass(frozen=True)
class PerChip:
    """Bytes a chip: what it holds all the time, the most that it needs at once, what it has.

    `activations` is what the peak has beyond the rest: hidden states, gathered weights, gradients.
    """

    parameters: int
    trained: int
    activations: int
    peak_bytes: int
    capacity_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a run of a config needs on a topology, cut over one mesh.

    `estimate`: memory by formula instead of the compiler's word.  `seconds`: of a step, by what
    would limit it if nothing else did: `compute` (at the chip's peak), `memory` (weights read),
    `network` (bytes between chips).  `bound` is the longest, `step_seconds_floor` its time.
    """

    topology: str
    mesh: dict[str, int]
    fits: bool
    estimate: bool
    per_chip: PerChip
    operations: dict[str, float]
    collective_bytes: dict[str, float]
    seconds: dict[str, float]
    bound: str
    step_seconds_floor: float
    step_seconds: float
    utilisation: float
    steps: int
    hours: float
    tokens_per_second: float
    observations_per_second: float
    compile_seconds: float

    def describe(self) -> str:
        """The plan for a reader."""
        chip, gb = self.per_chip, 1e9
        mesh = " x ".join(f"{name} {size}" for name, size in self.mesh.items() if size > 1)
        verdict = (
            f"fits: {chip.peak_bytes / gb:.1f} of {chip.capacity_bytes / gb:.1f} GB a chip"
            if self.fits
            else f"does NOT fit: {chip.peak_bytes / gb:.1f} GB a chip, of "
            f"{chip.capacity_bytes / gb:.1f} GB: "
            f"{(chip.peak_bytes - chip.capacity_bytes) / gb:.1f} GB too much"
        )
        how = "estimated by formula" if self.estimate else f"compiled in {self.compile_seconds:.0f} s"
        sent = ", ".join(f"{name} {size / gb:.2f}" for name, size in self.collective_bytes.items())
        times = ", ".join(f"{name} {each:.3f}" for name, each in self.seconds.items())
        return "\n".join(
            [
                f"{self.topology}, mesh {mesh or 'of one device'}: {verdict} ({how})",
                f"  a chip holds: parameters {chip.parameters / gb:.2f} GB, adapter and optimiser "
                f"{chip.trained / gb:.3f} GB, activations at the peak {chip.activations / gb:.2f} GB",
                f"  a step: {self.operations['needed'] / 1e12:,.1f} T operations needed, "
                f"{self.operations['done'] / 1e12:,.1f} T done; sent by a chip, GB: "
                f"{sent or 'nothing'}",
                f"  seconds a step at the least: {times}: bound by {self.bound}",
                f"  at {self.utilisation:.0%} of the peak: {self.step_seconds:.2f} s a step, "
                f"{self.tokens_per_second:,.0f} tokens and {self.observations_per_second:,.1f} "
                f"observations a second; {self.steps:,} steps in {self.hours:.1f} hours",
            ]
        )


def make(
    settings: Config,
    on: Topology,
    sizes: dict[str, int],
    *,
    micro_batches: int = 1,
    utilisation: float = 0.4,
    observations: float = 0.0,
) -> Plan:
    """Plans one run of a config on a topology, cut by `sizes` (slices, data, fsdp, tensor).

    A step is `micro_batches` of `data.rows` full rows; `observations` are those of the whole data.

    Raises:
        ShardingError: the model or the rows can't be cut so.
        TopologyError: the compiler for it can't be had.
    """
    shape = shape_of(settings)
    rows = settings.data.rows
    shared = sizes["slices"] * sizes["data"] * sizes["fsdp"]
    if rows % shared:
        raise ShardingError(
            f"data.rows is {rows}, which {shared} devices (slices x data x fsdp) can't share evenly"
        )
    if on.is_tpu:
        mesh = parallel.make_mesh(**sizes, devices=on.devices())
        memory, sent, seconds = _compiled(settings, shape, mesh, micro_batches)
    else:
        mesh = _stand_ins(sizes)
        memory, sent, seconds = _estimated(settings, shape, mesh), {}, 0.0
    parameters, trained = _held(settings, shape, mesh)
    slots = micro_batches * rows * settings.data.slots
    counted = operations.training(
        shape,
        slots=slots,
        pairs=slots * (settings.data.slots + 1) / 2,
        reads=slots,
        rank=settings.lora.rank if settings.trained == "adapter" else 0,
        targets=config.names(settings.lora.targets),
        remat=settings.model.remat,
    )
    limits = {
        "compute": counted.done / on.chips / on.chip.operations,
        "memory": _weights_read(settings, parameters, sizes, micro_batches) / on.chip.bandwidth,
        "network": sum(sent.values())
        / (on.chip.between_slices if sizes["slices"] > 1 and not on.is_tpu else on.chip.network),
    }
    bound = max(limits, key=lambda name: limits[name])
    step_seconds = max(limits["compute"] / utilisation, limits["memory"], limits["network"])
    per_step = settings.data.observations_per_step or observations
    number = settings.optimizer.epochs * (
        math.ceil(observations / per_step) if observations and per_step else 1
    )
    capacity = int(on.chip.memory)
    return Plan(
        topology=str(on),
        mesh=sizes,
        fits=memory <= capacity,
        estimate=not on.is_tpu,
        per_chip=PerChip(
            parameters, trained, max(0, memory - parameters - trained), memory, capacity
        ),
        operations={"needed": counted.needed, "done": counted.done, **asdict(counted)},
        collective_bytes=sent,
        seconds=limits,
        bound=bound,
        step_seconds_floor=limits[bound],
        step_seconds=step_seconds,
        utilisation=utilisation,
        steps=number,
        hours=number * step_seconds / 3600,
        tokens_per_second=slots / step_seconds,
        observations_per_second=per_step / step_seconds,
        compile_seconds=seconds,
    )
