"""One process of several: writes which observations its devices are handed in an epoch.

    python pod_rows.py OUT --coordinator HOST:PORT --processes N --process_id I

`OUT/I.json` is a list of `[step, tokens of a path, observations]`, read back from the devices.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np

from befm_jax.data.pipeline import ForestBatches
from befm_jax.distributed import mesh as meshes
from befm_jax.distributed import processes, transfer
from befm_jax.distributed.mesh import Layout
from tests.helpers.small import real_paths


def paths_of(tokens, parent, weight):
    """Paths that end in a row of a forest, and how many observations do there."""
    ending = weight.astype(float)
    for slot, above in enumerate(parent):
        if weight[slot] > 0 and weight[above] > 0:
            ending[above] -= weight[slot]
    for slot in np.flatnonzero(ending > 0.5).tolist():
        path, at = [], slot
        while at >= 0:
            path.append(int(tokens[at]))
            at = int(parent[at])
        yield path[::-1], round(ending[slot])


def main():
    """Goes through an epoch as the training loop does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process_id", type=int)
    flags = parser.parse_args()
    processes.start(flags.coordinator, flags.processes, flags.process_id)
    mesh = meshes.make_mesh(data=flags.processes)
    batches = ForestBatches(
        real_paths(observations=200), slots=384, rows=2, epochs=1, observations_per_step=64,
        parts=Layout(mesh).parts("rows"),
    )  # fmt: skip
    read = []
    for step in range(batches.steps):
        forest = transfer.put_global(batches[step][0], meshes.batch_sharding(mesh)).forest
        mine = zip(
            *(jax.tree.map(lambda shard: np.asarray(shard.data), each.addressable_shards)
              for each in (forest.tokens, forest.parent, forest.weight)),
            strict=True,
        )  # fmt: skip
        for arrays in mine:
            for row in zip(*(array.reshape(-1, 384) for array in arrays), strict=True):
                read += [[step, *found] for found in paths_of(*row)]
    (flags.out / f"{flags.process_id}.json").write_text(json.dumps(read))


main()
