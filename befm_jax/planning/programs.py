"""The programs of a run, compiled ahead of time for devices that need not be attached."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from befm_jax.adapters import lora
from befm_jax.config import Config
from befm_jax.data.forest import Forest, Reads
from befm_jax.data.pipeline import Batch
from befm_jax.distributed import mesh as meshes
from befm_jax.distributed.mesh import AnyMesh, Layout
from befm_jax.inference import decode, kv_cache, sample
from befm_jax.inference.batching import BatchSlots
from befm_jax.inference.kv_cache import KeysValues
from befm_jax.inference.next_token import Sampling, next_token
from befm_jax.llama.config import LlamaConfig
from befm_jax.llama.log_probs import columns_at_once
from befm_jax.llama.model import Llama, unstack
from befm_jax.planning.workload import Workload
from befm_jax.training import setup
from befm_jax.training.setup import Setup

_SIZE = r"([\d.]+)([KMGT]?)B?"
# The compiler's two messages for a program that does not fit: bytes needed, bytes available.
_EXCEEDED = (
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
    re.compile(rf"memory required for .*? \({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
)
_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}
# Steps of a schedule that is compiled and never run.
_SCHEDULE = 1000
# Stop tokens of a sampler that is compiled and never run.
_STOPS = (0,)


@dataclass(frozen=True)
class Compiled:
    """A compiled program's memory and text.

    `peak`: bytes per device.  `fits`: whether it compiled; otherwise `text` is empty.
    """

    peak: int
    fits: bool
    text: str
    seconds: float


def abstract(settings: Config, shape: LlamaConfig, mesh: AnyMesh) -> Setup:
    """The training setup of a config over a mesh, with abstract arrays.

    Raises:
        ShardingError: the model can't be sharded over the mesh.
        AdapterError: the adapter does not fit the model.
    """
    dtype, quantize = jnp.dtype(settings.model.dtype), settings.model.quantize == "int8"
    params = meshes.abstract_parameters(shape, mesh, dtype, quantize)
    return setup.of(settings, shape, params, mesh, _SCHEDULE)


def bytes_held(given: Setup) -> tuple[int, int]:
    """Bytes per device of the model, and of the adapter with its optimiser state.

    In full fine-tuning, the second are those of the optimiser state alone.
    """
    if given.base is not None:
        return held(given.base), held(given.state)
    model = held(given.state.trained)
    return model, held(given.state) - model


def compile_step(given: Setup, work: Workload) -> Compiled:
    """Compiles the training step of a run for the mesh's devices."""
    size = (work.micro_batches, work.rows, work.slots)
    sharding = meshes.batch_sharding(given.mesh)
    ints: Any = jax.ShapeDtypeStruct(size, jnp.int32, sharding=sharding)
    weight: Any = jax.ShapeDtypeStruct(size, jnp.float32, sharding=sharding)
    batch = Batch(Forest(ints, ints, ints, ints), Reads(ints, ints, ints, weight, weight))
    return _compile(lambda: given.step.lower(batch))


def compile_sampler(
    settings: Config, shape: LlamaConfig, mesh: Mesh, given: Setup, prompt: int, memory: float
) -> Compiled:
    """Compiles the decoding loop for a full batch of participants.

    `prompt`: slots of the shared prompt; `memory`: bytes per device.  As in a run, the layers'
    weights are unstacked where memory allows a copy, which the peak includes.
    """
    layout = Layout(mesh)
    dtype = jnp.dtype(settings.model.dtype)
    model = Llama(shape, dtype, layout=layout)
    of_asked, of_state = decode.placements(layout)
    batch = BatchSlots.dealt(
        np.zeros(sample.AT_A_TIME, np.int32), layout.parts("rows"), layout.parts("rows_to_draw")
    )
    people, heads, width = batch.size, shape.num_key_value_heads, shape.head_dim

    def cache(rows: int, slots: int, sharding: Any) -> tuple[KeysValues, ...]:
        empty = jax.eval_shape(
            lambda: kv_cache.capacity((rows, heads, width, slots), dtype, int8=False)
        )
        layer: KeysValues = jax.tree.map(lambda leaf: _shape(leaf, sharding), empty)
        return (layer,) * shape.num_hidden_layers

    def replicated(dtype: Any, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=of_asked.keys)

    asked = decode.DecodeInputs(
        cache(1, prompt, of_asked.prefix),
        replicated(jnp.int32, 1),
        jax.tree.map(lambda leaf: replicated(leaf.dtype, *leaf.shape), batch.rows(1, people)),
        replicated(_key().dtype, people),
    )
    state = decode.DecodeState(
        replicated(jnp.int32),
        replicated(jnp.bool_, people),
        replicated(jnp.int32, people, sample.FIRST_ROOM),
        cache(people, sample.FIRST_ROOM, of_state.suffix),
    )
    params = given.state.trained
    if given.base is not None:
        params = lora.attach(given.base, given.state.trained)
    placed = meshes.shardings(params, mesh)
    params = jax.tree.map(_shape, params, placed)
    stacked, weights = held(params["layers"]), params
    twice = 2 * stacked <= memory - held(params)
    if twice:
        by_layer = decode.placed_unstacked(shape.num_hidden_layers, placed)
        weights = jax.tree.map(_shape, jax.eval_shape(unstack, params), by_layer)

    def draw(logits: Any, keys: Any) -> Any:
        return next_token(logits, keys, Sampling())

    run: Any = decode.programs(model, draw, _STOPS, int8=False).go_on
    over, number = replicated(jnp.bool_, people), replicated(jnp.int32)
    compiled = _compile(lambda: run.lower(weights, asked, state, over, number, number))
    return replace(compiled, peak=compiled.peak + twice * stacked)


def vocabulary_chunks(shape: LlamaConfig, mesh: AnyMesh, work: Workload) -> int:
    """The trip count of a micro-batch's loop over the vocabulary projection."""
    at_once = columns_at_once(shape.vocab_size, work.rows, work.slots, Layout(mesh))
    return math.ceil(work.reads / work.micro_batches / work.rows / at_once)


def held(tree: Any) -> int:
    """Bytes per device of a tree of abstract arrays with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shard = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        total += math.prod(shard) * _bytes(leaf.dtype)
    return total


def exceeded(message: str) -> tuple[int, int] | None:
    """Bytes needed and available, from a compiler's out-of-memory message; None for others."""
    for pattern in _EXCEEDED:
        match = pattern.search(message)
        if match:
            needed, unit, available, other = match.groups()
            return int(float(needed) * _UNITS[unit]), int(float(available) * _UNITS[other])
    return None


def _compile(lower: Any) -> Compiled:
    start = time.perf_counter()
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = exceeded(str(error))
        if sizes is None:
            raise
        return Compiled(sizes[0], False, "", time.perf_counter() - start)
    memory = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return Compiled(peak, True, compiled.as_text(), time.perf_counter() - start)


def _shape(leaf: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _bytes(dtype: Any) -> int:
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else jnp.dtype(dtype).itemsize
