"""What a phase of a run trains, on what, and where every part of it stands; nothing is made yet.

A run makes what is described here (`fresh`); a plan only compiles for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from befm_jax import config
from befm_jax.adapters import lora
from befm_jax.config import Config
from befm_jax.distributed import mesh as meshes
from befm_jax.distributed.mesh import AnyMesh
from befm_jax.llama.config import LlamaConfig
from befm_jax.llama.model import Llama, Params
from befm_jax.training import optimizer as optimizers
from befm_jax.training import step as steps


@dataclass(frozen=True)
class Setup:
    """A phase of a run over a mesh; `base` and `state` are abstract and say where arrays stand.

    `base` is what is frozen (None where everything is trained), `state` what is trained and its
    optimiser's moments.
    """

    mesh: AnyMesh
    model: Llama
    base: Any
    state: steps.State
    combine: steps.Combine
    optimizer: optax.GradientTransformation
    rates: optax.Schedule

    def step(self) -> Any:
        """The jitted optimiser step; see `steps.make_train_step`."""
        return steps.make_train_step(self.model, self.optimizer, self.combine, self.shardings)

    @property
    def shardings(self) -> steps.State:
        """The sharding of every part of the state."""
        placed: steps.State = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        return placed

    def fresh(self, start: Callable[..., Any], *given: Any, seed: int) -> steps.State:
        """The state before the first step, made where it stands.

        `start(*given)` is what is trained; it is traced.
        """

        def make(*given: Any) -> steps.State:
            return steps.init_state(start(*given), self.optimizer, seed)

        made: steps.State = jax.jit(make, out_shardings=self.shardings)(*given)
        return made


def of(settings: Config, shape: LlamaConfig, params: Params, mesh: AnyMesh, steps: int) -> Setup:
    """What a config tunes of a model: an adapter, or every parameter.

    `params` are abstract and say where they stand (`hf.abstract`, `meshes.abstract_parameters`);
    `steps` is the length of the schedule.

    Raises:
        ShardingError: the adapter can't be cut over the mesh.
        AdapterError: the adapter does not fit the model.
    """
    wanted = settings.optimizer
    rates = optimizers.schedule(wanted.learning_rate, steps, wanted.warmup_fraction)
    model = Llama(
        shape,
        dtype=jnp.dtype(settings.model.dtype),
        remat=settings.model.remat,
        layout=meshes.layout_over(mesh),
    )
    if settings.trained == "all":
        return _everything(settings, model, mesh, rates)
    adapter = jax.eval_shape(partial(fresh_adapter, settings, params))
    placed = meshes.adapter_shardings(adapter, mesh)
    return _setup(settings, model, mesh, rates, params, adapter, placed)


def from_nothing(settings: Config, shape: LlamaConfig, mesh: AnyMesh, steps: int) -> Setup:
    """How a small model from nothing is taught: every parameter, in float32.

    Raises:
        ShardingError: the model can't be cut over the mesh.
    """
    model = Llama(
        shape, jnp.dtype("float32"), settings.model.remat, layout=meshes.layout_over(mesh)
    )
    rates = optimizers.schedule(settings.model.scratch.learning_rate, steps, 0.1)
    return _everything(settings, model, mesh, rates)


def _everything(settings: Config, model: Llama, mesh: AnyMesh, rates: optax.Schedule) -> Setup:
    trained = meshes.abstract_parameters(model.config, mesh, jnp.float32)
    placed = jax.tree.map(lambda leaf: leaf.sharding, trained)
    return _setup(settings, model, mesh, rates, None, trained, placed)


def fresh_adapter(settings: Config, params: Params) -> lora.Adapter:
    """The adapter that a config asks for, before the first step; only shapes of `params` count."""
    wanted = settings.lora
    return lora.init(
        jax.random.key(settings.seed),
        params,
        rank=wanted.rank,
        alpha=wanted.alpha,
        rslora=wanted.rslora,
        dropout=wanted.dropout,
        targets=config.names(wanted.targets),
    )


def fresh_parameters(params: Params) -> Params:
    """Every parameter, to be trained: in float32, the dtype that small updates need."""
    copies: Params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    return copies


def _setup(
    settings: Config,
    model: Llama,
    mesh: AnyMesh,
    rates: optax.Schedule,
    base: Any,
    trained: Any,
    placed: Any,
) -> Setup:
    wanted = settings.optimizer
    optimizer = optimizers.adamw(rates, wanted.weight_decay, wanted.clip_norm)
    start = partial(steps.init_state, optimizer=optimizer, seed=settings.seed)
    shardings = steps.state_shardings(optimizer, trained, placed, meshes.everywhere(mesh))
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(start, trained),
        shardings,
    )
    combine = steps.train_all if base is None else steps.train_adapter
    return Setup(mesh, model, base, state, combine, optimizer, rates)
