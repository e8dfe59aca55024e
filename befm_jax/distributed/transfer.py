"""Transfers of arrays between hosts and devices, and a vote of all processes.

All functions work with one process too, without network traffic.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from befm_jax.distributed import mesh as meshes


def put_global(tree: Any, sharding: Sharding) -> Any:
    """Global arrays with a sharding, from host arrays that are equal in every process."""
    # What `jax.device_put` is to `jax.transfer_guard`: a transfer that the caller requests.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(
            lambda array: jax.make_array_from_callback(
                array.shape, sharding, lambda index: array[index]
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
    """Arrays with a tree of shardings; those that have it already are not copied.

    The others must be complete in every process, on one device or on the host.
    """

    def move(leaf: Any, sharding: Sharding) -> Any:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        return put_global(np.asarray(leaf), sharding)

    return jax.tree.map(move, tree, placed)


def gather(tree: Any) -> Any:
    """Complete arrays on the host of every process; a collective call."""

    def to_host(leaf: Any) -> Any:
        is_global = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        if not is_global or leaf.is_fully_replicated:
            return jax.device_get(leaf)
        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.tree.map(to_host, tree)


def all_agree(holds: bool) -> bool:
    """Whether `holds` is true in every process; a collective call."""
    if jax.process_count() == 1:
        return holds
    return bool(multihost_utils.process_allgather(np.asarray(holds)).all())
