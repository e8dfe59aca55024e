"""How the processes of a run find each other: by flags, or by the cluster's metadata."""

from __future__ import annotations

import os
import re

from befm_jax.errors import UserError

# Seconds that processes wait for each other at the start: hosts may boot minutes apart.
JOIN_WITHIN = 300


def place_from(
    coordinator: str | None, processes: int | None, process_id: int | None, join_within: int
) -> tuple[str, int, int] | None:
    """HOST:PORT of process 0, the number of processes, this one's index; None for a single process.

    Raises:
        UserError: the flags contradict each other.
        RuntimeError: the host name of process 0 does not resolve in `join_within` seconds.
    """
    flags = {"coordinator": coordinator, "processes": processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in flags.items() if value is None]
    if len(missing) == len(flags):
        return _detected(join_within)
    if processes == 1 and process_id in (None, 0):
        return None
    if coordinator is None or processes is None or process_id is None:
        raise UserError(
            f"{' and '.join(missing)} missing: --coordinator, --processes and --process_id go "
            "together (--processes=1 alone: a single process, whatever the cluster's metadata)"
        )
    port = re.fullmatch(r"(?:\[[0-9a-fA-F:]+\]|[^:\[\]/]+):([0-9]{1,5})", coordinator)
    if port is None or not 0 < int(port[1]) < 1 << 16:
        raise UserError(
            f"--coordinator is {coordinator}; it must be HOST:PORT of process 0, such as "
            "10.0.0.1:8476"
        )
    if not 0 <= process_id < processes:
        raise UserError(
            f"--process_id is {process_id}; with --processes={processes} it must be 0 to "
            f"{processes - 1}"
        )
    return coordinator, processes, process_id


def _detected(join_within: int) -> tuple[str, int, int] | None:
    """`place_from` by the metadata of Slurm, GKE or a TPU VM, as jax reads it."""
    from jax._src import clusters

    # Slurm and GKE set environment variables; a VM's metadata are read where there are TPU chips.
    kinds = (clusters.SlurmCluster, clusters.GkeTpuCluster, clusters.GceTpuCluster)
    cluster = next((kind for kind in kinds if kind.is_env_present()), None)
    if cluster is None or cluster.get_process_count() == 1:
        return None
    port = os.environ.get("JAX_COORDINATOR_PORT")
    coordinator = cluster.get_coordinator_address(join_within, port)
    return coordinator, cluster.get_process_count(), cluster.get_process_id()
