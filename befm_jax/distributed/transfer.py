"""Arrays between hosts and devices, and numbers between the processes of a run.

What is said of several processes holds for one, too: then nothing goes over a network.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from befm_jax.distributed import mesh as meshes


def put_global(tree: Any, sharding: Sharding) -> Any:
    """Host arrays on the devices of a sharding.

    Every process has them whole, and hands over what its own devices hold.
    """
    # What `jax.device_put` is to `jax.transfer_guard`: a transfer that the caller requests.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(
            lambda whole: jax.make_array_from_callback(
                whole.shape, sharding, lambda index: whole[index]
            ),
            tree,
        )


def put_rows(batch: Any, mesh: meshes.AnyMesh) -> Any:
    """A batch `[M, B, ...]` on the devices of a mesh; each process has the rows of its own alone.

    They are the `places` of `mesh.row_shard`, in that order.
    """
    sharding, places = meshes.batch_sharding(mesh), meshes.row_shard(mesh).places
    rows = meshes.Layout(mesh).parts("rows")
    number = {place: at for at, place in enumerate(places)}

    def put(own: Any) -> Any:
        def on_device(index: Any) -> Any:
            at = number[index[1].start or 0]
            return own[:, at : at + 1]

        return jax.make_array_from_callback((own.shape[0], rows, own.shape[2]), sharding, on_device)

    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(put, batch)


def place(tree: Any, placed: Any) -> Any:
    """Arrays, on one device or on the host, where a tree of shardings wants them.

    What stands there already is not copied.  Every process has to have the others whole.
    """

    def move(leaf: Any, sharding: Sharding) -> Any:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        return put_global(np.asarray(leaf), sharding)

    return jax.tree.map(move, tree, placed)


def gather(tree: Any) -> Any:
    """Arrays whole on the host, in every process; all processes must ask for them together."""

    def whole(leaf: Any) -> Any:
        spread = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        if not spread or leaf.is_fully_replicated:
            return jax.device_get(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(whole, tree)


def all_agree(holds: bool) -> bool:
    """Whether something holds in every process; all must ask together."""
    if jax.process_count() == 1:
        return holds
    return bool(multihost_utils.process_allgather(np.asarray(holds)).all())
