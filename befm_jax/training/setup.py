"""What a phase of a run trains: shapes, dtypes and shardings of all its arrays, and its step.

A run allocates what is described here (`Setup.fresh`); a plan only compiles for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from befm_jax import config
from befm_jax.adapters import lora
from befm_jax.config import Config, ConfigError
from befm_jax.data.pipeline import Batch
from befm_jax.distributed import mesh as meshes
from befm_jax.distributed import processes, transfer
from befm_jax.distributed.mesh import AnyMesh
from befm_jax.llama.config import LlamaConfig
from befm_jax.llama.model import Llama, Params
from befm_jax.training import optimizer as optimizers
from befm_jax.training import step as steps
from befm_jax.training.ahead import StepAhead


@dataclass(frozen=True)
class Setup:
    """One phase of a run over a mesh; arrays are abstract (`jax.ShapeDtypeStruct`s).

    Attributes:
        phase: "base" or "tune", which names its checkpoints and metrics.
        base: the frozen parameters; None where every parameter is trained.
        state: what is trained and its optimizer's moments.
        start: the state before the first step, as a traceable function of the model's parameters.
        rates: the learning rate of every step.
    """

    phase: str
    mesh: AnyMesh
    model: Llama
    base: Params | None
    state: steps.State
    start: Callable[[Params], steps.State]
    combine: steps.Combine
    optimizer: optax.GradientTransformation
    rates: optax.Schedule

    @cached_property
    def step(self) -> StepAhead:
        """The optimizer step (`steps.make_train_step`), which can be compiled ahead of its use."""
        train_step = steps.make_train_step(self.model, self.optimizer, self.combine, self.shardings)
        return StepAhead(train_step, self.state, self.base)

    @property
    def shardings(self) -> steps.State:
        """The sharding of every array of the state."""
        shardings: steps.State = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        return shardings

    def fresh(self, params: Params) -> steps.State:
        """The state before the first step, allocated with its shardings.

        `params` are those of the model, of which an adapter needs the shapes only.
        """
        state: steps.State = jax.jit(self.start, out_shardings=self.shardings)(params)
        return state

    def place(self, batch: Batch) -> Batch:
        """A batch on the devices of the mesh; every process transfers the rows of its own."""
        on_devices: Batch = transfer.put_rows(batch, self.mesh)
        return on_devices


def mesh_of(settings: Config) -> Mesh:
    """The run's mesh: over all devices, or over the first of one machine's where it is smaller.

    Raises ShardingError where the config's sizes or slices do not fit the devices.
    """
    mesh, devices = settings.mesh, jax.devices()
    meshes.check_slices(mesh.slices, devices)
    sizes = (mesh.slices, mesh.data, mesh.fsdp, mesh.tensor)
    if processes.count() == 1 and 0 not in sizes:
        devices = devices[: math.prod(sizes)]
    return meshes.make_mesh(**meshes.filled(*sizes, devices=len(devices)), devices=devices)


def sharding_of(phase: str, mesh: Mesh) -> dict[str, Any]:
    """The arguments of a `Mixture` that say which rows of its batches this process encodes."""
    shard = meshes.row_shard(mesh)
    return {
        "parts": len(shard.places),
        "shard_index": shard.index,
        "shard_count": shard.count,
        "all_gather": processes.all_gatherer(phase),
    }


def of(settings: Config, shape: LlamaConfig, params: Params, mesh: AnyMesh, steps: int) -> Setup:
    """The setup that tunes a model as configured: an adapter, or every parameter.

    `params` are abstract and carry their shardings (`hf.abstract`, `meshes.abstract_parameters`);
    `steps` is the length of the schedule.

    Raises:
        ConfigError: rows are longer than the model has positions.
        ShardingError: the adapter can't be sharded over the mesh.
        AdapterError: the adapter does not fit the model.
    """
    if settings.data.slots > shape.max_position_embeddings:
        raise ConfigError(
            f"data.slots is {settings.data.slots}; it must be at most "
            f"{shape.max_position_embeddings}, the model's positions (max_position_embeddings in "
            "its config.json), since one conversation may fill a row"
        )
    rates = optimizers.schedule(
        settings.optimizer.learning_rate, steps, settings.optimizer.warmup_fraction
    )
    model = Llama(
        shape,
        dtype=jnp.dtype(settings.model.dtype),
        remat=settings.model.remat,
        layout=meshes.layout_over(mesh),
    )
    frozen = None if settings.trained == "all" else params
    return _setup("tune", settings, model, mesh, rates, frozen)


def from_nothing(settings: Config, shape: LlamaConfig, mesh: AnyMesh, steps: int) -> Setup:
    """The setup that teaches a small model from nothing: every parameter, in float32.

    Raises:
        ShardingError: the model can't be sharded over the mesh.
    """
    model = Llama(
        shape, jnp.dtype("float32"), settings.model.remat, layout=meshes.layout_over(mesh)
    )
    rates = optimizers.schedule(settings.model.scratch.learning_rate, steps, 0.1)
    return _setup("base", settings, model, mesh, rates, None)


def _setup(
    phase: str,
    settings: Config,
    model: Llama,
    mesh: AnyMesh,
    rates: optax.Schedule,
    base: Params | None,
) -> Setup:
    """Trains an adapter of the abstract parameters `base`, or without them every parameter."""
    begin: Callable[[Params], Any] = _in_float32
    combine: steps.Combine = steps.train_all
    if base is None:
        trained = meshes.abstract_parameters(model.config, mesh, jnp.float32)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, trained)
    else:
        begin, combine = partial(_fresh_adapter, settings), steps.train_adapter
        trained = jax.eval_shape(begin, base)
        shardings = meshes.adapter_shardings(trained, mesh)
    optimizer = optimizers.adamw(
        rates, settings.optimizer.weight_decay, settings.optimizer.clip_norm
    )
    init = partial(steps.init_state, optimizer=optimizer, seed=settings.seed)
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(init, trained),
        steps.state_shardings(optimizer, trained, shardings, meshes.everywhere(mesh)),
    )

    def start(params: Params) -> steps.State:
        return init(begin(params))

    return Setup(phase, mesh, model, base, state, start, combine, optimizer, rates)


def _fresh_adapter(settings: Config, params: Params) -> lora.Adapter:
    """The adapter that is configured, before the first step; only shapes of `params` count."""
    return lora.init(
        jax.random.key(settings.seed),
        params,
        rank=settings.lora.rank,
        alpha=settings.lora.alpha,
        rslora=settings.lora.rslora,
        dropout=settings.lora.dropout,
        targets=config.names(settings.lora.targets),
    )


def _in_float32(params: Params) -> Params:
    """Parameters to be trained in the dtype that small updates need."""
    copies: Params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    return copies
