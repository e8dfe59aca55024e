"""Plans: memory, time and traffic of a run on a topology over a mesh, and the ranking of meshes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from befm_jax import config
from befm_jax.config import Config
from befm_jax.distributed import mesh as meshes
from befm_jax.distributed.mesh import AnyMesh, Layout, ShardingError
from befm_jax.inference import sample
from befm_jax.llama import flops
from befm_jax.llama.config import LlamaConfig
from befm_jax.planning import formula, hlo, programs, workload
from befm_jax.planning.topology import Topology
from befm_jax.planning.workload import Workload

Sizes = dict[str, int]
# Slots of the shared prompt of a planned sampler.
_PROMPT = 512


@dataclass(frozen=True)
class PerChip:
    """Bytes per chip.

    `trained`: adapter and optimiser state (of a full fine-tuning run, the optimiser state alone).
    `activations`: the rest of the peak: hidden states, gathered weights, gradients, the program.
    """

    parameters: int
    trained: int
    activations: int
    peak_bytes: int
    capacity_bytes: int


@dataclass(frozen=True)
class SamplerPlan:
    """The plan of decoding for `participants` at a time; `seconds`: lower bounds per token.

    Weights are sharded over `tensor` as far as the model allows, participants over `data`.  Where
    memory allows, the layers' weights are there twice (`decode.weights_for_decoding`).
    """

    mesh: Sizes
    fits: bool
    participants: int
    peak_bytes: int
    capacity_bytes: int
    collective_bytes: dict[str, float]
    seconds: dict[str, float]
    bound: str
    tokens_per_second: float


@dataclass(frozen=True)
class Plan:
    """The plan of a config's run on a topology, sharded over one mesh.

    `estimate`: whether memory and traffic are by formula, not from the compiler.  `operations`:
    FLOPs of a step, over all chips; `needed` is without recomputation.  `bytes_read`: from a chip's
    memory in a step, weights alone.  `collective_bytes`: sent by a chip in a step.  `seconds`:
    lower bounds of a step by resource: `compute` (at the chip's peak), `memory`, `network` (all
    links busy), `between_slices`.  `bound` is the largest, `step_seconds_floor` its time.
    `step_seconds` has compute at `utilisation` of the peak instead.
    """

    topology: str
    mesh: Sizes
    fits: bool
    estimate: bool
    per_chip: PerChip
    workload: Workload
    operations: dict[str, float]
    bytes_read: float
    collective_bytes: dict[str, float]
    seconds: dict[str, float]
    bound: str
    step_seconds_floor: float
    utilisation: float
    step_seconds: float
    hours: float
    tokens_per_second: float
    observations_per_second: float
    compile_seconds: float
    sampler: SamplerPlan | None = None

    @property
    def all_fits(self) -> bool:
        """Whether the step fits, and the sampler where it was planned."""
        return self.fits and (self.sampler is None or self.sampler.fits)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON fields."""
        return asdict(self)


def make(
    settings: Config,
    on: Topology,
    sizes: Sizes,
    *,
    utilisation: float = 0.4,
    observations: tuple[float, float] | None = None,
    sampler: bool = False,
    compile_it: bool = True,
    text: Path | None = None,
) -> Plan:
    """The plan of a config's run on a topology over a mesh of `sizes` (slices, data, fsdp, tensor).

    `observations`: their number and slots each, in place of the config's data.  `compile_it`:
    whether the step is compiled; otherwise memory and traffic are those of `planning.formula`.
    `text`: a directory to which the compiled step's HLO is written.

    Raises:
        ShardingError: the model can't be sharded over the mesh.
        ConfigError: the config's model has no known shape.
        TopologyError: the compiler is not available.
    """
    shape = workload.shape_of(settings)
    mesh: AnyMesh
    if compile_it:
        mesh = meshes.make_mesh(**sizes, devices=on.devices())
    else:
        mesh = AbstractMesh(tuple(sizes.values()), meshes.AXES)
    shared = Layout(mesh).parts("rows")
    work = (
        workload.from_data(settings, shared, shape)
        if observations is None
        else workload.from_figures(settings, shared, *observations)
    )
    given = programs.abstract(settings, shape, mesh)
    held = programs.bytes_held(given)
    chunks = programs.vocabulary_chunks(shape, mesh, work)
    if isinstance(mesh, Mesh):
        compiled = programs.compile_step(given, work)
        peak, seconds = compiled.peak, compiled.seconds
        fits = compiled.fits and peak <= on.chip.memory
        if text and compiled.text:
            text.mkdir(parents=True, exist_ok=True)
            name = "-".join(f"{axis}{size}" for axis, size in sizes.items())
            (text / f"step-{name}.txt").write_text(compiled.text)
        sent = hlo.traffic(compiled.text, on.chips, on.slices, chunks) if compiled.text else None
    else:
        peak, seconds, sent = formula.memory(settings, shape, sizes, work, *held), 0.0, None
        fits = peak <= on.chip.memory
    if sent is None:
        by_kind, far = formula.traffic(settings, shape, sizes, work)
        near = sum(by_kind.values()) - far
    else:
        by_kind = sent.by_kind()
        near, far = sum(sent.within.values()), sum(sent.between.values())
    counted = flops.training(
        shape,
        slots=work.computed,
        pairs=work.pairs,
        reads=work.reads,
        rank=settings.lora.rank if settings.trained == "adapter" else 0,
        targets=config.names(settings.lora.targets),
        remat=settings.model.remat,
    )
    read = _weights_read(settings, shape, sizes, work, chunks)
    limits = {
        "compute": counted.done / on.chips / on.chip.operations,
        "memory": read / on.chip.bandwidth,
        "network": near / on.chip.network,
        "between_slices": far / on.chip.between_slices,
    }
    bound = max(limits, key=lambda name: limits[name])
    step = max(limits["compute"] / utilisation, *limits.values())
    return Plan(
        topology=str(on),
        mesh=sizes,
        fits=fits,
        estimate=not compile_it,
        per_chip=PerChip(*held, max(0, peak - sum(held)), peak, int(on.chip.memory)),
        workload=work,
        operations={"needed": counted.needed, "done": counted.done, **asdict(counted)},
        bytes_read=read,
        collective_bytes=by_kind,
        seconds=limits,
        bound=bound,
        step_seconds_floor=limits[bound],
        utilisation=utilisation,
        step_seconds=step,
        hours=work.steps * step / 3600,
        tokens_per_second=work.used / step,
        observations_per_second=work.observations / step,
        compile_seconds=seconds,
        sampler=plan_sampler(settings, on, shape) if sampler and compile_it else None,
    )


def plan_sampler(settings: Config, on: Topology, shape: LlamaConfig) -> SamplerPlan:
    """The plan of sampling on a topology, with weights sharded over `tensor` alone."""
    mesh = meshes.answering_mesh(shape, on.devices(), on.slices)
    sizes = dict(zip(("slices", "data", "fsdp", "tensor"), mesh.devices.shape, strict=True))
    given = programs.abstract(settings, shape, mesh)
    compiled = programs.compile_sampler(settings, shape, mesh, given, _PROMPT, on.chip.memory)
    # One token: the decoding loop's trip count depends on data, and is taken as 1.
    sent = hlo.traffic(compiled.text, on.chips, on.slices) if compiled.text else None
    counted = flops.decoding(shape, tokens=sample.AT_A_TIME, pairs=sample.AT_A_TIME * _PROMPT)
    limits = {
        "compute": counted.done / on.chips / on.chip.operations,
        "memory": programs.bytes_held(given)[0] / on.chip.bandwidth,
        "network": (sum(sent.within.values()) if sent else 0.0) / on.chip.network,
    }
    bound = max(limits, key=lambda name: limits[name])
    return SamplerPlan(
        mesh=sizes,
        fits=compiled.fits and compiled.peak <= on.chip.memory,
        participants=sample.AT_A_TIME,
        peak_bytes=compiled.peak,
        capacity_bytes=int(on.chip.memory),
        collective_bytes=sent.by_kind() if sent else {},
        seconds=limits,
        bound=bound,
        tokens_per_second=sample.AT_A_TIME / limits[bound],
    )


def mesh_sizes(on: Topology, shape: LlamaConfig) -> Iterator[Sizes]:
    """Every mesh of a topology over which the model can be sharded."""
    chips = on.chips // on.slices
    for tensor in _divisors(chips):
        for fsdp in _divisors(chips // tensor):
            sizes = {
                "slices": on.slices,
                "data": chips // tensor // fsdp,
                "fsdp": fsdp,
                "tensor": tensor,
            }
            try:
                meshes.parameter_shardings(shape, AbstractMesh(tuple(sizes.values()), meshes.AXES))
            except ShardingError:
                continue
            yield sizes


def ranked(plans: Sequence[Plan]) -> list[Plan]:
    """Plans sorted: those that fit first, then by step time, network time and peak memory."""

    def order(plan: Plan) -> tuple[float, ...]:
        network = plan.seconds["network"] + plan.seconds["between_slices"]
        return (not plan.fits, plan.step_seconds, network, plan.per_chip.peak_bytes)

    return sorted(plans, key=order)


def _weights_read(
    settings: Config, shape: LlamaConfig, sizes: Sizes, work: Workload, chunks: int
) -> float:
    """Bytes of weights that a chip reads in a step, gathered ones included.

    Once forward, once backward, once more with remat; those of the vocabulary projection twice for
    each of its `chunks`.
    """
    width = jnp.dtype(settings.model.dtype).itemsize
    stored = 1 if settings.model.quantize == "int8" else width
    linears = sum(out * into for out, into in flops.linear_shapes(shape).values())
    layers = shape.num_hidden_layers * linears * stored / sizes["tensor"]
    head = shape.vocab_size * shape.hidden_size * width / sizes["tensor"]
    return work.micro_batches * ((2 + settings.model.remat) * layers + 2 * chunks * head)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
