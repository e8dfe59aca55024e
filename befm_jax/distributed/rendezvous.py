"""How the processes of a run find each other: by flags, or by what the machine says."""

from __future__ import annotations

import os
import re

from befm_jax.errors import UserError

# Seconds that processes wait for each other at the start: hosts may come up minutes apart.
JOIN_WITHIN = 300


def place_from(
    coordinator: str | None, processes: int | None, process_id: int | None, join_within: int
) -> tuple[str, int, int] | None:
    """HOST:PORT of process 0, how many processes there are, which this is; None for a run of one.

    Raises:
        UserError: the flags contradict each other.
        RuntimeError: the machine names a process 0 that has no address in `join_within` seconds.
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
            "together (--processes=1 alone: no others, whatever the machine says)"
        )
    if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\[\]/]+):[0-9]{1,5}", coordinator):
        raise UserError(
            f"--coordinator={coordinator}: not HOST:PORT of process 0, such as 10.0.0.1:8476"
        )
    if not 0 <= process_id < processes:
        raise UserError(
            f"--process_id={process_id} of --processes={processes}: they count from 0, so it is at "
            f"most {processes - 1}"
        )
    return coordinator, processes, process_id


def _detected(join_within: int) -> tuple[str, int, int] | None:
    """The same by what Slurm, GKE or a TPU VM says, in jax's reading of it."""
    from jax._src import clusters

    # Slurm and GKE set variables; a VM's metadata are read where there are TPU chips.
    kinds = (clusters.SlurmCluster, clusters.GkeTpuCluster, clusters.GceTpuCluster)
    cluster = next((kind for kind in kinds if kind.is_env_present()), None)
    if cluster is None or cluster.get_process_count() == 1:
        return None
    port = os.environ.get("JAX_COORDINATOR_PORT")
    coordinator = cluster.get_coordinator_address(join_within, port)
    return coordinator, cluster.get_process_count(), cluster.get_process_id()
