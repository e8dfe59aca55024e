"""Compiles forest attention for eight H100 where no GPU is, and prints a line of JSON a program.

Its own program, since the platform must be settled before jax is imported.
"""

import json
import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import jax_plugins.xla_cuda12
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from befm_jax.llama import attention_gpu

# What XLA asks of a card when there is one; figures of NVIDIA's H100 SXM5 80 GB.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

ROWS = ("data", "fsdp")
HEADS, FIGURE, END = P(ROWS, None, "tensor", None), P(ROWS, "tensor", None), P(ROWS, None)
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")

PROGRAMS = {
    "8B, 2048": (2048, 32, 8, 128, "bfloat16"),
    "8B, 4096": (4096, 32, 8, 128, "bfloat16"),
    "8B, 8192": (8192, 32, 8, 128, "bfloat16"),
    "8B, 8000": (8000, 32, 8, 128, "bfloat16"),
    "70B": (4096, 64, 8, 128, "bfloat16"),
    "3B": (4096, 24, 8, 128, "bfloat16"),
    "1B": (4096, 32, 8, 64, "bfloat16"),
    "8B in float32": (2048, 32, 8, 128, "float32"),
    "1B in float32": (2048, 32, 8, 64, "float32"),
}


def main():
    assert jax_plugins.xla_cuda12
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x8", target_config=H100
    )
    mesh = Mesh(np.array(topology.devices).reshape(2, 2, 2), (*ROWS, "tensor"))

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def mapped(function, takes, gives):
        return jax.jit(
            jax.shard_map(function, mesh=mesh, in_specs=takes, out_specs=gives, check_vma=False)
        )

    forward = mapped(attention_gpu.forward, (HEADS, HEADS, HEADS, END), (HEADS, FIGURE))
    backward = mapped(
        attention_gpu.backward,
        (HEADS, HEADS, HEADS, END, HEADS, FIGURE, HEADS),
        (HEADS, HEADS, HEADS),
    )
    # Newer jax reads from the mesh for which card Triton is to compile.
    with jax.set_mesh(mesh):
        for name, (slots, heads, key_heads, width, dtype) in PROGRAMS.items():
            query = array((8, slots, heads, width), dtype, HEADS)
            key = array((8, slots, key_heads, width), dtype, HEADS)
            end = array((8, slots), jnp.int32, END)
            figure = array((8, heads, slots), jnp.float32, FIGURE)
            for direction, function, arguments in (
                ("forward", forward, (query, key, key, end)),
                ("backward", backward, (query, key, key, end, query, figure, query)),
            ):
                program = function.lower(*arguments).compile()
                text = program.as_text()
                found = {
                    "name": name,
                    "direction": direction,
                    "slots": slots,
                    "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
                    "collectives": [word for word in COLLECTIVES if word in text],
                    "by_triton": "forest_attention" in text and "triton" in text.lower(),
                }
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
