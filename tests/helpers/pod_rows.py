"""One process of several: writes which observations its devices are handed in an epoch.

    python pod_rows.py OUT --coordinator HOST:PORT --processes N --process_id I

`OUT/I.json` is a list of `[step, token, observations]`, read back from the devices.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np

from befm_jax.distributed import mesh as meshes
from befm_jax.distributed import processes, transfer
from tests.helpers.small import mixture_of, real_paths


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
    conversations = real_paths(observations=200)
    shard = meshes.row_shard(mesh)
    mixture = mixture_of(
        conversations,
        slots=768,
        epochs=1,
        rows_per_step=-(-len(conversations) // 4),
        parts=len(shard.places),
        shard_index=shard.index,
        shard_count=shard.count,
        all_gather=processes.all_gatherer("rows"),
    )
    read = []
    for step in range(4):
        batch, _ = mixture[step]
        reads = transfer.put_rows(batch, mesh).reads
        mine = zip(
            *(jax.tree.map(lambda shard: np.asarray(shard.data), each.addressable_shards)
              for each in (reads.token, reads.observations)),
            strict=True,
        )  # fmt: skip
        for token, observations in mine:
            pairs = zip(token.ravel().tolist(), observations.ravel().tolist(), strict=True)
            read += [[step, one, count] for one, count in pairs if count]
    (flags.out / f"{flags.process_id}.json").write_text(json.dumps(read))


processes.run(main)
