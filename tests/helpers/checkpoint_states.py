"""States whose every bit follows from their step, on any mesh; and processes that save and read.

Run as a script it is one process of a pod (see launch/local_pod.py).
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from befm_jax.distributed import processes
from befm_jax.training import optimizer as optimizers
from befm_jax.training import step as steps
from befm_jax.training.checkpoint import Checkpoints
from befm_jax.training.step import State

AXES = ("data", "fsdp", "tensor")
OPTIMIZER = optimizers.adamw(1e-3)
TRAINED = {
    "layers/self_attn/q_proj": {
        "a": (jax.ShapeDtypeStruct((3, 8, 24), jnp.float32), P(None, None, ("fsdp", "tensor"))),
        "b": (jax.ShapeDtypeStruct((3, 16, 8), jnp.bfloat16), P(None, "tensor", None)),
    },
    "norm": {"scale": (jax.ShapeDtypeStruct((7,), jnp.float32), P())},
}


def mesh_of(*shape):
    """A mesh over as many devices as are needed of those that there are."""
    count = int(np.prod(shape))
    return jax.sharding.Mesh(np.array(jax.devices()[:count]).reshape(shape), AXES)


def is_pair(node):
    return isinstance(node, tuple) and isinstance(node[0], jax.ShapeDtypeStruct)


def abstract(mesh) -> State:
    """The state as shapes, dtypes and shardings over a mesh."""
    trained = jax.tree.map(lambda pair: pair[0], TRAINED, is_leaf=is_pair)
    cut = jax.tree.map(lambda pair: NamedSharding(mesh, pair[1]), TRAINED, is_leaf=is_pair)
    shardings = steps.state_shardings(OPTIMIZER, trained, cut, NamedSharding(mesh, P()))
    shapes = jax.eval_shape(partial(steps.init_state, optimizer=OPTIMIZER, seed=0), trained)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def bits(step: int) -> list[np.ndarray]:
    """The leaves of the state of a step, in order, keys as integers: random bits, NaNs too."""
    random = np.random.default_rng(step)

    def draw(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        size = int(np.prod(leaf.shape)) * leaf.dtype.itemsize
        drawn = np.frombuffer(random.bytes(size), np.uint8)
        return drawn.view(leaf.dtype).reshape(leaf.shape)

    return [draw(leaf) for leaf in jax.tree.leaves(abstract(mesh_of(1, 1, 1)))]


def state(step: int, mesh) -> State:
    """The state of a step, over a mesh."""
    like = abstract(mesh)

    def put(leaf, drawn):
        found = jax.make_array_from_callback(drawn.shape, leaf.sharding, lambda index: drawn[index])
        keys = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.wrap_key_data(found) if keys else found

    leaves = [
        put(leaf, drawn) for leaf, drawn in zip(jax.tree.leaves(like), bits(step), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def check(found: State, step: int, mesh) -> None:
    """Holds that a state is that of a step bit by bit, and on the devices it should be on."""
    wanted = jax.tree.leaves(abstract(mesh))
    assert jax.tree.structure(found) == jax.tree.structure(abstract(mesh))
    for leaf, like, drawn in zip(jax.tree.leaves(found), wanted, bits(step), strict=True):
        assert leaf.dtype == like.dtype
        assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        for shard in leaf.addressable_shards:
            assert np.asarray(shard.data).tobytes() == drawn[shard.index].tobytes()


def main() -> None:
    """One process: goes on from a step over a mesh of all, then saves further ones."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process_id", type=int)
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--expect", type=int, help="the step to go on from")
    parser.add_argument("--save", type=int, nargs="*", default=[])
    parser.add_argument("--elsewhere", action="store_true", help="a folder a process, not shared")
    flags = parser.parse_args()
    processes.start(flags.coordinator, flags.processes, flags.process_id)
    mesh = mesh_of(2, 2, 2)
    directory = flags.directory
    if flags.elsewhere and flags.process_id:
        directory = directory.with_name("elsewhere")
    saved = Checkpoints(directory, keep=2, best=True)
    try:
        found = saved.restore(abstract(mesh))
        assert saved.last == flags.expect, saved.last
        if flags.expect is None:
            assert found is None
        else:
            check(found, flags.expect, mesh)
        for step in flags.save:
            saved.save(step, state(step, mesh), loss=abs(step - 20.5))
    finally:
        saved.close()
    best = saved.restore_best(abstract(mesh).trained)
    print("last", saved.last, "best", best and best[0])
    # A second phase of the same run, in the same processes.
    again = Checkpoints(directory / "next", keep=1)
    for step in flags.save:
        again.save(step, state(step, mesh))
    again.close()
    sys.stdout.flush()


if __name__ == "__main__":
    processes.run(main)
