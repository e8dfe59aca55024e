"""The training step: pure functions over token forests, one compiled program.

The loss of a forest is `-sum(weight * log p(token | slot and ancestors)) / sum(observations)`
over its reads: to float rounding the mean over learnt tokens of supervised fine-tuning on the same
observations as separate sequences, where no family is scaled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from befm_jax.adapters import lora
from befm_jax.data.forest import Forest, Reads
from befm_jax.data.pipeline import Batch
from befm_jax.llama import linear
from befm_jax.llama.log_probs import log_likelihood
from befm_jax.llama.model import Llama, Params

# (frozen base, trained parameters, key of their dropout or None) -> the model's parameters
Combine = Callable[[Any, Any, Array | None], Params]


class State(flax.struct.PyTreeNode):
    """Everything that changes from step to step, and is saved in checkpoints."""

    step: Array
    trained: Any
    moments: optax.OptState
    key: Array


class Metrics(NamedTuple):
    """Scalars of one step: mean loss per answer token, gradient norm before clipping."""

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]


def train_adapter(base: Params, adapter: lora.Adapter, key: Array | None) -> Params:
    """`Combine` for LoRA: the base is frozen, the adapter is trained."""
    return lora.attach(base, adapter, key if adapter.spec.dropout else None)


def train_all(base: None, params: Params, key: Array | None) -> Params:
    """`Combine` for training every parameter: nothing is frozen."""
    del base, key
    return params


def init_state(trained: Any, optimizer: optax.GradientTransformation, seed: int) -> State:
    """The state before the first step."""
    return State(jnp.zeros((), jnp.int32), trained, optimizer.init(trained), jax.random.key(seed))


def state_shardings(
    optimizer: optax.GradientTransformation, trained: Any, shardings: Any, replicated: Any
) -> State:
    """The sharding of every array of a state: moments are sharded as the parameters they belong to.

    `trained` is abstract, `shardings` its tree of shardings; `replicated` is that of scalars.
    """
    moments = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, trained),
        shardings,
        transform_non_params=lambda _: replicated,
    )
    return State(replicated, shardings, moments, replicated)


def value_and_gradient(
    model: Llama, combine: Combine, base: Any, trained: Any, batch: Batch, key: Array
) -> tuple[Float[Array, ""], Any]:
    """Mean loss of a batch and its gradient with respect to `trained`.

    Micro-batches are scanned; sums are carried and divided once by the observations, so the result
    does not depend on how the rows are divided into micro-batches.
    """

    def micro_loss(trained: Any, forest: Forest, reads: Reads, number: Array) -> Array:
        params = combine(base, trained, jax.random.fold_in(key, number))
        return -log_likelihood(model, params, forest, reads)

    def accumulate(carry: tuple[Array, Any], micro: tuple[Forest, Reads, Array]) -> Any:
        loss, gradient = jax.value_and_grad(micro_loss)(trained, *micro)
        return jax.tree.map(jnp.add, carry, (loss, gradient)), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trained))
    numbers = jnp.arange(batch.forest.tokens.shape[0])
    total, _ = jax.lax.scan(accumulate, zero, (batch.forest, batch.reads, numbers))
    count = _observations_read(model, batch, total[0])
    loss, gradient = jax.tree.map(lambda leaf: leaf / count.astype(leaf.dtype), total)
    return loss, gradient


def _observations_read(model: Llama, batch: Batch, loss: Float[Array, ""]) -> Float[Array, ""]:
    """Summed over devices after the loss is (`linear.after`)."""
    axes = ("micro_batches", "rows", "slots")
    count = jnp.asarray(batch.reads.observations)
    return jnp.sum(linear.after(model.layout, count, loss, *axes))


def make_train_step(
    model: Llama,
    optimizer: optax.GradientTransformation,
    combine: Combine,
    shardings: State | None = None,
) -> Callable[[State, Any, Batch], tuple[State, Metrics]]:
    """One jitted optimiser step `(state, base, batch) -> (state, metrics)`; donates the state.

    `shardings`: those of the state, before the step and after it (see `state_shardings`).
    """

    def train_step(state: State, base: Any, batch: Batch) -> tuple[State, Metrics]:
        with jax.named_scope("loss"):
            key = jax.random.fold_in(state.key, state.step)
            loss, gradient = value_and_gradient(model, combine, base, state.trained, batch, key)
        with jax.named_scope("optimizer"):
            updates, moments = optimizer.update(gradient, state.moments, state.trained)
            trained = optax.apply_updates(state.trained, updates)
            metrics = Metrics(loss, optax.tree.norm(gradient))
        return state.replace(step=state.step + 1, trained=trained, moments=moments), metrics

    options = linear.compiler_options(model.layout)
    # The metrics are replicated, as the step's number is.
    out = None if shardings is None else (shardings, shardings.step)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out, compiler_options=options)


def make_loss(model: Llama, combine: Combine) -> Callable[[Any, Any, Batch], Float[Array, ""]]:
    """The jitted mean loss `(trained, base, batch) -> loss`, without dropout or gradient."""

    def loss(trained: Any, base: Any, batch: Batch) -> Array:
        params = combine(base, trained, None)

        def add(total: Array, micro: tuple[Forest, Reads]) -> tuple[Array, None]:
            return total - log_likelihood(model, params, *micro), None

        total, _ = jax.lax.scan(add, jnp.zeros(()), (batch.forest, batch.reads))
        return total / _observations_read(model, batch, total)

    return jax.jit(loss, compiler_options=linear.compiler_options(model.layout))
