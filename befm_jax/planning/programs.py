"""The programs of a run, compiled without arrays for devices that need not be here."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from befm_jax import config, parallel
from befm_jax.adapters import lora
from befm_jax.config import Config
from befm_jax.data.forest import Forest, Reads
from befm_jax.data.pipeline import Batch
from befm_jax.inference import decode, kv_cache, sample
from befm_jax.inference.edges import columns_at_once
from befm_jax.inference.kv_cache import KeysValues, Rows
from befm_jax.inference.next_token import Sampling, next_token
from befm_jax.llama.config import LlamaConfig
from befm_jax.llama.model import Llama
from befm_jax.parallel import AnyMesh, Layout
from befm_jax.planning.workload import Workload
from befm_jax.training import optimizer as optimizers
from befm_jax.training import step as steps

_SIZE = r"([\d.]+)([KMGT]?)B?"
# The compiler's two ways to say that a program does not fit: what it needs, what there is.
_EXCEEDED = (
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
    re.compile(rf"memory required for .*? \({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
)
_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}
# Stop tokens of a sampler that is compiled and never run.
_STOPS = (0,)


@dataclass(frozen=True)
class Abstract:
    """What a training step takes, as shapes that say where each part stands.

    `base` is what is frozen (None where everything is trained), `state` what is trained and its
    optimiser's moments.
    """

    state: steps.State
    base: Any
    combine: steps.Combine
    optimizer: Any

    @property
    def parameters(self) -> int:
        """Bytes a device of the model."""
        return held(self.state.trained if self.base is None else self.base)

    @property
    def trained(self) -> int:
        """Bytes a device of what is trained (an adapter) and of the optimiser."""
        model = held(self.state.trained) if self.base is None else 0
        return held(self.state) - model


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


def abstract(settings: Config, shape: LlamaConfig, mesh: AnyMesh) -> Abstract:
    """The state and the base of a run over a mesh; nothing is made.

    Raises:
        ShardingError: the model can't be cut over the mesh.
        AdapterError: the adapter does not fit the model.
    """
    everywhere = Layout(mesh).sharding()
    chosen = settings.optimizer
    rates = optimizers.schedule(chosen.learning_rate, 1000, chosen.warmup_fraction)
    optimizer = optimizers.adamw(rates, chosen.weight_decay, chosen.clip_norm)
    base: Any = parallel.abstract_parameters(
        shape, mesh, jnp.dtype(settings.model.dtype), settings.model.quantize == "int8"
    )
    if settings.trained == "adapter":
        wanted = settings.lora
        spec = lora.LoraSpec(
            wanted.rank,
            wanted.alpha,
            wanted.rslora,
            wanted.dropout,
            tuple(config.names(wanted.targets)),
        )
        trained: Any = jax.eval_shape(lambda key: lora.init_from(key, base, spec), _key())
        shardings: Any = parallel.adapter_shardings(trained, mesh)
        combine: steps.Combine = steps.train_adapter
    else:
        trained = parallel.abstract_parameters(shape, mesh, jnp.float32)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, trained)
        base, combine = None, steps.train_all
    placed = steps.state_shardings(optimizer, trained, shardings, everywhere)
    state = jax.eval_shape(lambda trained: steps.init_state(trained, optimizer, 0), trained)
    return Abstract(jax.tree.map(_shape, state, placed), base, combine, optimizer)


def compile_step(
    settings: Config, shape: LlamaConfig, mesh: Mesh, given: Abstract, work: Workload
) -> Compiled:
    """The training step of a run, by the compiler of the mesh's devices."""
    layout = Layout(mesh)
    model = Llama(shape, jnp.dtype(settings.model.dtype), settings.model.remat, layout)
    size = (work.micro_batches, work.rows, work.slots)
    place = parallel.batch_sharding(mesh)
    whole: Any = jax.ShapeDtypeStruct(size, jnp.int32, sharding=place)
    weight: Any = jax.ShapeDtypeStruct(size, jnp.float32, sharding=place)
    batch = Batch(Forest(whole, whole, whole, whole, weight), Reads(whole, whole))
    step: Any = steps.make_train_step(model, given.optimizer, given.combine)
    return _compile(lambda: step.lower(given.state, given.base, batch))


def compile_sampler(
    settings: Config, shape: LlamaConfig, mesh: Mesh, given: Abstract, prompt: int
) -> Compiled:
    """The loop that draws answers for as many participants as are asked together.

    `prompt`: slots of the prompt that they share.
    """
    layout = Layout(mesh)
    dtype = jnp.dtype(settings.model.dtype)
    model = Llama(shape, dtype, layout=layout)
    people, heads, width = sample.AT_A_TIME, shape.num_key_value_heads, shape.head_dim

    def cache(rows: int, slots: int, who: str | None) -> tuple[KeysValues, ...]:
        place = layout.sharding(who, "each_head", None, None)
        made = jax.eval_shape(lambda: kv_cache.room((rows, heads, width, slots), dtype, int8=False))
        one: KeysValues = jax.tree.map(lambda leaf: _shape(leaf, place), made)
        return (one,) * shape.num_hidden_layers

    def of_people(dtype: Any, *more: int) -> Any:
        place = layout.sharding("rows", *(None for _ in more))
        return jax.ShapeDtypeStruct((people, *more), dtype, sharding=place)

    number: Any = jax.ShapeDtypeStruct((), jnp.int32)
    numbers = of_people(jnp.int32)
    lanes: Any = jax.ShapeDtypeStruct((1, people), jnp.int32)
    lengths: Any = jax.ShapeDtypeStruct((1,), jnp.int32)
    asked = decode.Asked(
        cache(1, prompt, None),
        lengths,
        Rows(numbers, lanes, numbers),
        of_people(_key().dtype),
    )
    answers = decode.Answers(
        number,
        of_people(jnp.bool_),
        of_people(jnp.int32, sample.FIRST_ROOM),
        cache(people, sample.FIRST_ROOM, "rows"),
    )
    params = given.state.trained
    if given.base is not None:
        params = jax.tree.map(
            lambda leaf: leaf if isinstance(leaf, jax.ShapeDtypeStruct) else _shape(leaf),
            lora.attach(given.base, given.state.trained),
        )

    def draw(logits: Any, keys: Any) -> Any:
        return next_token(logits, keys, Sampling())

    run: Any = decode.programs(model, draw, _STOPS, int8=False).go_on
    return _compile(lambda: run.lower(params, asked, answers, number, number))


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
