"""Says what a run needs of hardware that is not here: does it fit, how long, what limits it.

    python -m befm_jax.plan --config configs/70b_tpu.py
    python -m befm_jax.plan --config configs/70b_tpu.py --topology v5e:16x16 --json plan.json
    python -m befm_jax.plan --config configs/70b_tpu.py --mesh fsdp=64 --mesh data=4,fsdp=16
    python -m befm_jax.plan --config configs/8b_tpu.py --search 3 --sampler

The real training step is compiled for the topology by the compiler that the pod would use, which
says what memory it needs.  Flops are counted from the model's shape, traffic between chips is
read from the compiled program; held against the chip's figures they give the shortest time that a
step can take, and what limits it.  Where that compiler is not installed, GPUs are estimated by
formula, and the plan says so.  Exits with 1 where nothing fits.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags
from ml_collections import config_flags

from befm_jax import cli, config, files
from befm_jax.config import Config, ConfigError
from befm_jax.planning import topology
from befm_jax.planning.topology import CompilerAbsentError, Topology

if TYPE_CHECKING:
    from befm_jax.planning.plans import Plan, Sizes

FLAGS = flags.FLAGS


def main() -> None:
    """Plans what the flags say, prints it, writes the JSON."""
    import jax

    # What is compiled for devices that are not here can't be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    settings: Config = FLAGS.config
    config.validate(settings)
    wanted = FLAGS.topology or settings.mesh.topology
    if not wanted:
        raise ConfigError("mesh.topology is empty: say what to plan for, --topology v5p:4x4x4")
    on = topology.parse(wanted)
    plans = made(settings, on, asked(settings, on))
    for plan in plans:
        print(described(plan))
    if FLAGS.json:
        best, *others = [plan.as_dict() for plan in plans]
        files.write_object(Path(FLAGS.json), best | {"others": others})
    if not plans[0].all_fits:
        sys.exit(1)


def asked(settings: Config, on: Topology) -> list[Sizes]:
    """The meshes to plan: those of the flags, the config's, or what a search finds promising.

    The config's mesh goes for another topology too where it has as many chips.

    Raises:
        ConfigError: a mesh of another form or size, or nothing that could be searched.
    """
    from befm_jax.distributed.mesh import ShardingError
    from befm_jax.planning import plans, workload

    if FLAGS.search:
        if FLAGS.mesh:
            raise ConfigError("--mesh and --search: give one of them")
        found = list(plans.mesh_sizes(on, workload.shape_of(settings)))
        if not found:
            raise ConfigError(f"no mesh of {on} divides the model")
        by_formula = [
            plans.make(settings, on, sizes, **_figures(), compile_it=False) for sizes in found
        ]
        promising = [plan.mesh for plan in plans.ranked(by_formula)][: FLAGS.search]
        print(f"{len(found)} meshes by formula; the {len(promising)} most promising follow")
        return promising
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
        # Of another size than the config's: all that it says of this one is `tensor`.
        return [read_mesh(f"tensor={mesh.tensor}", on)]


def read_mesh(text: str, on: Topology) -> Sizes:
    """`data=4,fsdp=16,tensor=1` as sizes; 0 is what is left, and so is `fsdp` where it is not said.

    Raises:
        ConfigError: an unknown axis, or no number.
        ShardingError: a product that is not the number of chips.
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
    """The plans of some meshes, best first; GPUs by formula where they can't be compiled for."""
    from befm_jax.planning import plans

    try:
        on.devices()
        compiles = True
    except CompilerAbsentError as error:
        if on.is_tpu:
            raise
        print(f"note: estimated by formula: {error}", file=sys.stderr)
        if FLAGS.sampler or FLAGS.text:
            print("note: by formula there is neither --sampler nor --text", file=sys.stderr)
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
            for sizes in meshes
        ]
    )


def described(plan: Plan) -> str:
    """A plan for a reader."""
    chip, work, gb = plan.per_chip, plan.workload, 1e9
    how = "estimated by formula" if plan.estimate else f"compiled in {plan.compile_seconds:.0f} s"
    sent = [f"{kind} {size / gb:.2f}" for kind, size in plan.collective_bytes.items()]
    times = ", ".join(f"{name} {each:.3f}" for name, each in plan.seconds.items() if each)
    lines = [
        f"{plan.topology}, mesh {_mesh(plan.mesh)}: "
        f"{_verdict(plan.fits, chip.peak_bytes, chip.capacity_bytes)} ({how})",
        f"  a chip holds: parameters {chip.parameters / gb:.2f} GB, adapter and optimiser "
        f"{chip.trained / gb:.2f} GB, activations at the peak {chip.activations / gb:.2f} GB",
        f"  a step: {work.micro_batches} x {work.rows} rows of {work.slots} slots, "
        f"{work.used:,.0f} of {work.computed:,} slots used by {work.observations:,.0f}",
        f"  observations; from {work.source}",
        f"  {plan.operations['needed'] / 1e12:,.0f} T operations needed, "
        f"{plan.operations['done'] / 1e12:,.0f} T done; {plan.bytes_read / gb:,.0f} GB of weights "
        f"read by a chip; sent by a chip, GB: {', '.join(sent) or 'nothing'}",
        f"  seconds a step at the least: {times}: bound by {plan.bound}",
        f"  with {plan.utilisation:.0%} of the peak: {plan.step_seconds:.2f} s a step, "
        f"{plan.tokens_per_second:,.0f} tokens and {plan.observations_per_second:,.1f} "
        f"observations a second; {work.steps:,} steps in {plan.hours:.2f} hours",
    ]
    if plan.sampler:
        one = plan.sampler
        lines.append(
            f"  sampling, {one.participants:,} participants at a time over a mesh "
            f"{_mesh(one.mesh)}: {_verdict(one.fits, one.peak_bytes, one.capacity_bytes)}; at most "
            f"{one.tokens_per_second:,.0f} tokens a second, bound by {one.bound}"
        )
    return "\n".join(lines)


def _verdict(fits: bool, peak: int, capacity: int) -> str:
    if fits:
        return f"fits: {peak / 1e9:.1f} of {capacity / 1e9:.1f} GB a chip"
    return (
        f"does NOT fit: {peak / 1e9:.1f} GB a chip, of {capacity / 1e9:.1f} GB: "
        f"{(peak - capacity) / 1e9:.1f} GB too much"
    )


def _mesh(sizes: Sizes) -> str:
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "of one"


def _figures() -> dict:
    """What the flags say of time and data, for `plans.make`."""
    told = (FLAGS.observations, FLAGS.slots_per_observation)
    if (told[0] is None) != (told[1] is None):
        raise ConfigError("--observations and --slots_per_observation go together")
    return {
        "utilisation": FLAGS.utilisation,
        "observations": None if told[0] is None else told,
    }


def define_flags() -> None:
    """Defines the command line."""
    config_flags.DEFINE_config_file("config", None, "a file with get_config(), such as configs/*")
    flags.DEFINE_string(
        "topology", None, "v5p:4x4x4, 2*v5e:16x16 (two slices), h100:8; else the config's"
    )
    flags.DEFINE_multi_string(
        "mesh", None, "data=4,fsdp=16,tensor=1; repeated, several are ranked; else the config's"
    )
    flags.DEFINE_integer(
        "search", 0, "rank all meshes by formula, and plan this many of the best", lower_bound=0
    )
    flags.DEFINE_bool("sampler", False, "plan the drawing of answers too")
    flags.DEFINE_float(
        "utilisation", 0.4, "share of the peak that products reach, for hours", 0.01, 1.0
    )
    flags.DEFINE_float("observations", None, "plan for so many instead of the config's data", 1)
    flags.DEFINE_float("slots_per_observation", None, "slots that each of them takes", 1)
    flags.DEFINE_string("text", None, "write the compiled steps as text to this directory")
    flags.DEFINE_string("json", None, "write the plan (the best, and the others) to this file")
    flags.mark_flag_as_required("config")


def _in_its_own_environment() -> None:
    """Starts over where a variable that JAX and the compilers read as they load is not set."""
    if any(os.environ.get(name) != value for name, value in topology.ENVIRONMENT.items()):
        os.environ.update(topology.ENVIRONMENT)
        os.execv(sys.executable, [sys.executable, "-m", "befm_jax.plan", *sys.argv[1:]])


if __name__ == "__main__":
    _in_its_own_environment()
    define_flags()
    cli.run(main, __doc__ or "")
