"""How the processes of a run find each other: by flags, or by what the machine says."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from befm_jax.distributed.process_group import ERROR, leave, say
from befm_jax.errors import UserError

# Seconds that processes wait for each other at the start: hosts may come up minutes apart.
JOIN_WITHIN = 300


class NotJoinedError(Exception):
    """The processes of the run did not find each other; the message says who waited for whom."""


class Place(NamedTuple):
    """Which process of how many this is, and HOST:PORT of process 0."""

    coordinator: str
    processes: int
    process_id: int

    @property
    def host(self) -> str:
        """The host name or address of process 0."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port on which process 0 listens."""
        return int(self.coordinator.rpartition(":")[2])


def place_from(
    coordinator: str | None, processes: int | None, process_id: int | None, join_within: int
) -> Place | None:
    """Who is who, as jax.distributed.initialize takes it; None for a run of one process."""
    flags = {"coordinator": coordinator, "processes": processes, "process_id": process_id}
    missing = [f"--{name}" for name, value in flags.items() if value is None]
    if len(missing) == len(flags):
        return _detected(join_within)
    if processes == 1 and process_id in (None, 0):
        return None
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing: --coordinator, --processes and --process_id go "
            "together (--processes=1 alone: no others, whatever the machine says)"
        )
    assert coordinator is not None
    assert processes is not None
    assert process_id is not None
    if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\[\]/]+):[0-9]{1,5}", coordinator):
        raise UserError(
            f"--coordinator={coordinator}: not HOST:PORT of process 0, such as 10.0.0.1:8476"
        )
    if not 0 <= process_id < processes:
        raise UserError(
            f"--process_id={process_id} of --processes={processes}: they count from 0, so it is at "
            f"most {processes - 1}"
        )
    return Place(coordinator, processes, process_id)


def _detected(join_within: int) -> Place | None:
    """Who is who by what Slurm, GKE or a TPU VM says, in jax's reading of it."""
    from jax._src import clusters

    # Slurm and GKE are told by variables; a VM's metadata are asked where there are TPU chips.
    for cluster in (clusters.SlurmCluster, clusters.GkeTpuCluster, clusters.GceTpuCluster):
        if not cluster.is_env_present():
            continue
        processes = cluster.get_process_count()
        if processes == 1:
            return None
        try:
            coordinator = cluster.get_coordinator_address(
                join_within, os.environ.get("JAX_COORDINATOR_PORT")
            )
        except RuntimeError as error:
            raise NotJoinedError(f"{error} (within {join_within} s)") from None
        return Place(coordinator, processes, cluster.get_process_id())
    return None


def find_coordinator(place: Place, until: float) -> None:
    """Waits for process 0 to listen; as process 0, sees that it can.

    jax itself would not say what is wrong, and would end the process by abort.
    """
    if place.process_id == 0:
        try:
            socket.create_server(("", place.port)).close()
        except (OSError, OverflowError) as error:
            raise NotJoinedError(f"process 0 can't listen on port {place.port}: {error}") from None
        return
    while True:
        try:
            socket.create_connection((place.host, place.port), timeout=5).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > until:
                raise NotJoinedError(
                    f"process {place.process_id} of {place.processes}: no answer from "
                    f"process 0 at {place.coordinator} ({error}); is it started, and "
                    "can this host reach it?"
                ) from None
        time.sleep(0.2)


@contextmanager
def giving_up(place: Place, until: float) -> Iterator[None]:
    """Ends this process where the block has not ended in time: some process did not come."""
    joined = threading.Event()

    def watch() -> None:
        if not joined.wait(max(until - time.monotonic(), 0)):
            say(
                f"error: process {place.process_id} of {place.processes}: not all of them came to "
                f"{place.coordinator} in time; is each started, with a --process_id of its own?"
            )
            leave(ERROR)

    threading.Thread(target=watch, daemon=True).start()
    yield
    joined.set()
