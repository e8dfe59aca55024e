"""Compiles forest attention for TPUs that are not attached; run as a script, in its own process.

`python tpu_programs.py v5e` compiles for one chip, `v5e:4x4` a sharded program for that slice; the
last line printed is JSON, a list of what each program needs.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from befm_jax.llama import attention_tpu

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# Rows, slots, heads, key heads, width: layers of 8B models, and of 1B ones (width 64).
SHAPES = [(1, 8192, 32, 8, 128), (8, 2048, 32, 8, 64)]
COLLECTIVES = r"\b(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\b"


def both_ways(query, key, value, end, gradient):
    """What a training step runs of attention."""
    mixed, log_sum_exp = attention_tpu.forward(query, key, value, end)
    gradients = attention_tpu.backward(query, key, value, end, mixed, log_sum_exp, gradient)
    return mixed, log_sum_exp, *gradients


def arguments(shape, dtype, place):
    """Abstract arguments of `both_ways`; `place` gives the sharding of an array by its rank."""
    rows, slots, heads, key_heads, width = shape
    query, key = (rows, slots, heads, width), (rows, slots, key_heads, width)
    shapes = [query, key, key, (rows, slots), query]
    dtypes = [dtype, dtype, dtype, jnp.int32, dtype]
    return [
        jax.ShapeDtypeStruct(of, kind, sharding=place(len(of)))
        for of, kind in zip(shapes, dtypes, strict=True)
    ]


def for_chip(chip):
    """What each of `SHAPES` needs on one chip."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip])
    place = SingleDeviceSharding(topology.devices[0])
    found = []
    for shape in SHAPES:
        given = arguments(shape, jnp.bfloat16, lambda _: place)
        memory = jax.jit(both_ways).lower(*given).compile().memory_analysis()
        found.append(
            {
                "rows": shape[0],
                "slots": shape[1],
                "heads": shape[2],
                "temporary_bytes": memory.temp_size_in_bytes,
                "argument_bytes": memory.argument_size_in_bytes,
            }
        )
    return found


def for_slice(name):
    """A program sharded over (data, fsdp) by rows and over tensor by heads."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    devices = mesh_utils.create_device_mesh(
        (2, 2, 4), topology.devices, allow_split_physical_axes=True
    )
    mesh = Mesh(devices, ("data", "fsdp", "tensor"))
    by_rows = PartitionSpec(("data", "fsdp"), None)
    by_head = PartitionSpec(("data", "fsdp"), None, "tensor", None)
    figures = PartitionSpec(("data", "fsdp"), "tensor", None)
    sharded = jax.shard_map(
        both_ways,
        mesh=mesh,
        in_specs=(by_head, by_head, by_head, by_rows, by_head),
        out_specs=(by_head, figures, by_head, by_head, by_head),
        check_vma=False,
    )
    given = arguments(
        (16, 2048, 32, 8, 128),
        jnp.bfloat16,
        lambda rank: NamedSharding(mesh, by_head if rank == 4 else PartitionSpec(("data", "fsdp"))),
    )
    program = jax.jit(sharded).lower(*given).compile()
    replicated = 4  # rows are the same for all of `tensor`
    whole = sum(
        int(np.prod(of.shape)) * of.dtype.itemsize * (replicated if of.ndim == 2 else 1)
        for of in given
    )
    return [
        {
            "collectives": sorted(set(re.findall(COLLECTIVES, program.as_text()))),
            "argument_bytes": program.memory_analysis().argument_size_in_bytes,
            "whole_bytes": whole,
        }
    ]


if __name__ == "__main__":
    asked = sys.argv[1]
    print(json.dumps(for_slice(asked) if ":" in asked else for_chip(asked)))
