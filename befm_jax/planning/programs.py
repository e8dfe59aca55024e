"""The programs of a run, compiled without arrays for devices that need not be here."""

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
# The compiler's two ways to say that a program does not fit: what it needs, what there is.
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
    """What the compiler says of a program.

    `peak`: bytes a device that it needs at once.  `fits`: whether it was compiled; otherwise there
    is no `text`.
    """

    peak: int
    fits: bool
    text: str
    seconds: float


def abstract(settings: Config, shape: LlamaConfig, mesh: AnyMesh) -> Setup:
    """What a run of a config trains over a mesh; nothing is made.

    Raises:
        ShardingError: the model can't be cut over the mesh.
        AdapterError: the adapter does not fit the model.
    """
    dtype, quantize = jnp.dtype(settings.model.dtype), settings.model.quantize == "int8"
    params = meshes.abstract_parameters(shape, mesh, dtype, quantize)
    return setup.of(settings, shape, params, mesh, _SCHEDULE)


def bytes_held(given: Setup) -> tuple[int, int]:
    """Bytes a device of the model, and of what is trained and its optimiser.

    Where everything is trained, the second are those of the optimiser alone.
    """
    if given.base is not None:
        return held(given.base), held(given.state)
    model = held(given.state.trained)
    return model, held(given.state) - model


def compile_step(given: Setup, work: Workload) -> Compiled:
    """The training step of a run, by the compiler of the mesh's devices."""
    size = (work.micro_batches, work.rows, work.slots)
    place = meshes.batch_sharding(given.mesh)
    whole: Any = jax.ShapeDtypeStruct(size, jnp.int32, sharding=place)
    weight: Any = jax.ShapeDtypeStruct(size, jnp.float32, sharding=place)
    batch = Batch(Forest(whole, whole, whole, whole), Reads(whole, whole, whole, weight, weight))
    return _compile(lambda: given.step.lower(batch))


def compile_sampler(
    settings: Config, shape: LlamaConfig, mesh: Mesh, given: Setup, prompt: int, memory: float
) -> Compiled:
    """The loop that draws answers for as many participants as are asked together.

    `prompt`: slots of the prompt that they share; `memory`: bytes that a device has.  As in a run
    the weights stand there twice where there is room for that, and the peak has both.
    """
    layout = Layout(mesh)
    dtype = jnp.dtype(settings.model.dtype)
    model = Llama(shape, dtype, layout=layout)
    of_asked, of_answers = decode.placements(layout)
    seats = BatchSlots.dealt(
        np.zeros(sample.AT_A_TIME, np.int32), layout.parts("rows"), layout.parts("rows_to_draw")
    )
    people, heads, width = seats.size, shape.num_key_value_heads, shape.head_dim

    def cache(rows: int, slots: int, place: Any) -> tuple[KeysValues, ...]:
        made = jax.eval_shape(
            lambda: kv_cache.capacity((rows, heads, width, slots), dtype, int8=False)
        )
        one: KeysValues = jax.tree.map(lambda leaf: _shape(leaf, place), made)
        return (one,) * shape.num_hidden_layers

    def whole(dtype: Any, *sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=of_asked.keys)

    asked = decode.Asked(
        cache(1, prompt, of_asked.prefix),
        whole(jnp.int32, 1),
        jax.tree.map(lambda leaf: whole(leaf.dtype, *leaf.shape), seats.rows(1, people)),
        whole(_key().dtype, people),
    )
    answers = decode.Answers(
        whole(jnp.int32),
        whole(jnp.bool_, people),
        whole(jnp.int32, people, sample.FIRST_ROOM),
        cache(people, sample.FIRST_ROOM, of_answers.suffix),
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
    over, number = whole(jnp.bool_, people), whole(jnp.int32)
    compiled = _compile(lambda: run.lower(weights, asked, answers, over, number, number))
    return replace(compiled, peak=compiled.peak + twice * stacked)


def vocabulary_chunks(shape: LlamaConfig, mesh: AnyMesh, work: Workload) -> int:
    """How often a micro-batch's loop over the vocabulary's projection turns."""
    at_once = columns_at_once(shape.vocab_size, work.rows, work.slots, Layout(mesh))
    return math.ceil(work.reads / work.micro_batches / work.rows / at_once)


def held(tree: Any) -> int:
    """Bytes a device of a tree of shapes with shardings."""
    found = 0
    for leaf in jax.tree.leaves(tree):
        part = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
        found += math.prod(part) * _bytes(leaf.dtype)
    return found


def exceeded(message: str) -> tuple[int, int] | None:
    """Bytes that a compiler says a program needs, and those there are; None if it says neither."""
    for form in _EXCEEDED:
        found = form.search(message)
        if found:
            needed, unit, there, other = found.groups()
            return int(float(needed) * _UNITS[unit]), int(float(there) * _UNITS[other])
    return None


def _compile(lower: Any) -> Compiled:
    since = time.perf_counter()
    try:
        compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        found = exceeded(str(error))
        if found is None:
            raise
        return Compiled(found[0], False, "", time.perf_counter() - since)
    memory = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return Compiled(peak, True, compiled.as_text(), time.perf_counter() - since)


def _shape(leaf: Any, sharding: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _key() -> Any:
    return jax.eval_shape(lambda: jax.random.key(0))


def _bytes(dtype: Any) -> int:
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else jnp.dtype(dtype).itemsize
