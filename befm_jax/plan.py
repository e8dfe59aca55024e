"""Plans a run on hardware that is not attached: does it fit, how long, what is the bottleneck.

    befm plan --config 70b_tpu
    befm plan --config 70b_tpu --topology v5e:16x16 --json plan.json
    befm plan --config 70b_tpu --mesh fsdp=64 --mesh data=4,fsdp=16
    befm plan --config 8b_tpu --search 3 --sampler

The real training step is compiled for the topology by the pod's own compiler, which reports its
memory.  FLOPs are counted from the model's shape, and traffic between chips is read from the
compiled program; with the chip's peak figures they give a lower bound of the step time and its
bottleneck.  Where the compiler is not installed, GPUs are estimated by formula, with a note.  Exits
with 1 if nothing fits.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import config_flags
from tqdm import tqdm

from befm_jax import cli, config, files
from befm_jax.config import Config, ConfigError
from befm_jax.planning import topology
from befm_jax.planning.topology import CompilerAbsentError, Topology

if TYPE_CHECKING:
    from befm_jax.planning.plans import Plan, Sizes

FLAGS = flags.FLAGS


def main() -> None:
    """Makes the plans of the flags, prints them and writes the JSON."""
    import jax

    # Programs for devices that are not attached can't be read back from the cache.
    jax.config.update("jax_enable_compilation_cache", False)
    settings: Config = FLAGS.config
    config.validate(settings)
    name = FLAGS.topology or settings.mesh.topology
    if not name:
        raise ConfigError("mesh.topology is empty; give the topology, --topology v5p:4x4x4")
    on = topology.parse(name)
    plans = made(settings, on, asked(settings, on))
    for plan in plans:
        print(described(plan))
    if FLAGS.json:
        best, *others = [plan.as_dict() for plan in plans]
        files.write_object(Path(FLAGS.json), best | {"others": others})
    if not plans[0].all_fits:
        sys.exit(1)


def asked(settings: Config, on: Topology) -> list[Sizes]:
    """The meshes to plan: those of the flags, the config's, or the best of a search.

    The config's mesh is used for another topology too if it has as many chips.

    Raises:
        ConfigError: a mesh of another form or size, or no mesh to search.
    """
    from befm_jax.distributed.mesh import ShardingError
    from befm_jax.planning import plans, workload

    if FLAGS.search:
        if FLAGS.mesh:
            raise ConfigError("--mesh and --search: give one of them")
        candidates = list(plans.mesh_sizes(on, workload.shape_of(settings)))
        if not candidates:
            raise ConfigError(f"no mesh of {on} divides the model")
        by_formula = [
            plans.make(settings, on, sizes, **_figures(), compile_it=False)
            for sizes in tqdm(candidates, desc="by formula", unit="mesh")
        ]
        best = [plan.mesh for plan in plans.ranked(by_formula)][: FLAGS.search]
        print(f"{len(candidates)} meshes by formula; the {len(best)} best follow")
        return best
    if FLAGS.mesh:
        return [read_mesh(text, on) for text in FLAGS.mesh]
    mesh = settings.mesh
    text = f"data={mesh.data},fsdp={mesh.fsdp},tensor={mesh.tensor}"
    if not FLAGS.topology or FLAGS.topology == mesh.topology:
        if mesh.slices != on.slices:
            raise ConfigError(f"mesh.slices is {mesh.slices}, and {on} has {on.slices}")
        return [read_mesh(text, on)]
    try:
        return [read_mesh(text, on)]
    except ShardingError:
        # Another size than the config's, of which only `tensor` applies.
        return [read_mesh(f"tensor={mesh.tensor}", on)]


def read_mesh(text: str, on: Topology) -> Sizes:
    """The sizes of `data=4,fsdp=16,tensor=1`; 0 (the default of `fsdp`) is all that are left.

    Raises:
        ConfigError: an unknown axis, or a size that is not a number.
        ShardingError: the product is not the number of chips.
    """
    from befm_jax.distributed import mesh as meshes

    given: Sizes = {}
    for entry in config.names(text):
        name, _, size = entry.partition("=")
        if name not in ("data", "fsdp", "tensor") or not size.isdecimal():
            raise ConfigError(f"--mesh {text}: {entry!r} is not of the form data=4 (fsdp, tensor)")
        given[name] = int(size)
    sizes = {"data": 1, "fsdp": int(0 in given.values()), "tensor": 1} | given
    return meshes.filled(on.slices, **sizes, devices=on.chips)


def made(settings: Config, on: Topology, meshes: list[Sizes]) -> list[Plan]:
    """The plans of some meshes, best first; GPUs by formula if their compiler is not installed."""
    from befm_jax.planning import plans

    try:
        on.devices()
        compiles = True
    except CompilerAbsentError as error:
        if on.is_tpu:
            raise
        print(f"note: estimated by formula: {error}", file=sys.stderr)
        if FLAGS.sampler or FLAGS.text:
            print("note: --sampler and --text need the compiler", file=sys.stderr)
        compiles = False
    return plans.ranked(
        [
            plans.make(
                settings,
                on,
                sizes,
                **_figures(),
                sampler=FLAGS.sampler,
                compile_it=compiles,
                text=Path(FLAGS.text) if FLAGS.text else None,
            )
            for sizes in tqdm(meshes, desc="compiled" if compiles else "by formula", unit="mesh")
        ]
    )


def described(plan: Plan) -> str:
    """A plan as text."""
    chip, work, gb = plan.per_chip, plan.workload, 1e9
    how = "estimated by formula" if plan.estimate else f"compiled in {plan.compile_seconds:.0f} s"
    sent = [f"{kind} {size / gb:.2f}" for kind, size in plan.collective_bytes.items()]
    times = ", ".join(f"{name} {time:.3f}" for name, time in plan.seconds.items() if time)
    lines = [
        f"{plan.topology}, mesh {_mesh(plan.mesh)}: "
        f"{_verdict(plan.fits, chip.peak_bytes, chip.capacity_bytes)} ({how})",
        f"  per chip: parameters {chip.parameters / gb:.2f} GB, adapter and optimiser "
        f"{chip.trained / gb:.2f} GB, activations at the peak {chip.activations / gb:.2f} GB",
        f"  per step: {work.micro_batches} x {work.rows} rows of {work.slots} slots, "
        f"{work.used:,.0f} of {work.computed:,} slots used by {work.observations:,.0f}",
        f"  observations; from {work.source}",
        f"  {plan.operations['needed'] / 1e12:,.0f} TFLOPs needed, "
        f"{plan.operations['done'] / 1e12:,.0f} with recomputation; {plan.bytes_read / gb:,.0f} GB "
        f"of weights read per chip; sent per chip, GB: {', '.join(sent) or 'nothing'}",
        f"  seconds per step, lower bounds: {times}: bound by {plan.bound}",
        f"  at {plan.utilisation:.0%} of the peak: {plan.step_seconds:.2f} s per step, "
        f"{plan.tokens_per_second:,.0f} tokens and {plan.observations_per_second:,.1f} "
        f"observations per second; {work.steps:,} steps in {plan.hours:.2f} hours",
    ]
    if plan.sampler:
        sampler = plan.sampler
        fits = _verdict(sampler.fits, sampler.peak_bytes, sampler.capacity_bytes)
        lines.append(
            f"  sampling, {sampler.participants:,} participants at a time over a mesh "
            f"{_mesh(sampler.mesh)}: {fits}; at most {sampler.tokens_per_second:,.0f} tokens per "
            f"second, bound by {sampler.bound}"
        )
    return "\n".join(lines)


def _verdict(fits: bool, peak: int, capacity: int) -> str:
    if fits:
        return f"fits: {peak / 1e9:.1f} of {capacity / 1e9:.1f} GB per chip"
    return (
        f"does NOT fit: {peak / 1e9:.1f} GB per chip, of {capacity / 1e9:.1f} GB: "
        f"{(peak - capacity) / 1e9:.1f} GB too much"
    )


def _mesh(sizes: Sizes) -> str:
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "of one"


def _figures() -> dict:
    """The arguments of `plans.make` from the flags."""
    observations = (FLAGS.observations, FLAGS.slots_per_observation)
    if (observations[0] is None) != (observations[1] is None):
        raise ConfigError("--observations and --slots_per_observation go together")
    return {
        "utilisation": FLAGS.utilisation,
        "observations": None if observations[0] is None else observations,
    }


def define_flags() -> None:
    """Defines the command line."""
    config_flags.DEFINE_config_file(
        "config", None, "a .py file with get_config(), or a config's name"
    )
    flags.DEFINE_string(
        "topology", None, "v5p:4x4x4, 2*v5e:16x16 (two slices) or h100:8; default: the config's"
    )
    flags.DEFINE_multi_string(
        "mesh", None, "data=4,fsdp=16,tensor=1; may be repeated; default: the config's"
    )
    flags.DEFINE_integer(
        "search", 0, "rank all meshes by formula, and plan this many of the best", lower_bound=0
    )
    flags.DEFINE_bool("sampler", False, "plan sampling too")
    flags.DEFINE_float(
        "utilisation", 0.4, "assumed fraction of peak FLOPs, for the step time", 0.01, 1.0
    )
    flags.DEFINE_float(
        "observations", None, "number of observations, instead of the config's data", 1
    )
    flags.DEFINE_float("slots_per_observation", None, "slots per observation", 1)
    flags.DEFINE_string("text", None, "write the compiled steps' HLO to this directory")
    flags.DEFINE_string("json", None, "write the best plan, and the others, to this file")
    flags.mark_flag_as_required("config")


def _in_its_own_environment() -> None:
    """Re-executes where environment variables that JAX reads at import are not set."""
    if any(os.environ.get(name) != value for name, value in topology.ENVIRONMENT.items()):
        os.environ.update(topology.ENVIRONMENT)
        os.execv(sys.executable, [sys.executable, "-m", "befm_jax.plan", *sys.argv[1:]])


if __name__ == "__main__":
    _in_its_own_environment()
    cli.starting("plan")
    define_flags()
    cli.run(main, __doc__ or "")
