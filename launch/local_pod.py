"""Runs N real processes of one command on this machine: a pod in miniature, on CPUs.

    python launch/local_pod.py --processes 4 -- python -m befm_jax.train --config configs/x.py

Each process gets `--coordinator 127.0.0.1:PORT --processes N --process_id I` appended (a flag that
the command already holds is left alone), JAX_PLATFORMS=cpu and, with `--devices-per-process K`,
K virtual devices.  Every line of output is prefixed with the process's number.

As soon as one process fails, or this program gets SIGTERM or SIGINT, everything is over within
`--grace` seconds.  After a failure the others get SIGTERM, and SIGKILL when the grace is over.
Exit code 75 means that the run was stopped, its state is saved and every process is about to end:
the others get the whole grace without SIGTERM.  A signal is passed on to all.  The exit code is
that of the first process that failed (of several at once: one that was killed), 128 + n if signal n
ended it; 0 if all ended well.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

RESUME = 75
DEVICES = "--xla_force_host_platform_device_count"
# XLA's pool of threads has this size; a collective of a virtual device waits for the others in one
# of them, several can wait at a time, and with none left to run in they would wait for ever.
THREADS = "NPROC"
# By default XLA starts collectives of one program in another order on each virtual device; where
# cores are few, devices then wait for each other until XLA aborts the process.
IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the pod and returns its exit code."""
    options, command = parse(sys.argv[1:] if arguments is None else arguments)
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: received.append(number))
    port = free_port()
    environment = worker_environment(os.environ, options.devices_per_process)
    processes = [
        subprocess.Popen(
            worker_command(command, port, options.processes, index),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            # A group of its own: Ctrl-C reaches only this program, which passes it on once, also
            # to what the process has started.
            start_new_session=True,
        )
        for index in range(options.processes)
    ]
    readers = forward_output(processes)
    code = supervise(processes, options.grace, received)
    for reader in readers:
        reader.join(timeout=5)
    return code


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the command after `--`; ends with exit code 2 where they are wrong."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s --processes N [--devices-per-process K] [--grace SECONDS] -- CMD ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=positive, required=True, metavar="N")
    parser.add_argument("--devices-per-process", type=positive, metavar="K")
    parser.add_argument(
        "--grace", type=float, default=60.0, metavar="SECONDS", help="default: %(default)s"
    )
    split = list(arguments).index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:split])
    command = list(arguments[split + 1 :])
    if not command:
        parser.error("give the command to run after --")
    if shutil.which(command[0]) is None:
        parser.error(f"{command[0]!r}: there is no such program")
    return options, command


def positive(text: str) -> int:
    """A whole number of at least one, for argparse."""
    if not re.fullmatch(r"[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def free_port() -> int:
    """A loopback port that was free a moment ago: nothing reserves it until process 0 listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def worker_command(command: Sequence[str], port: int, processes: int, index: int) -> list[str]:
    """The command of process `index`, with the flags that it does not hold already."""
    flags = {
        "--coordinator": f"127.0.0.1:{port}",
        "--processes": str(processes),
        "--process_id": str(index),
    }
    full = list(command)
    for flag, value in flags.items():
        if not any(word == flag or word.startswith(f"{flag}=") for word in command):
            full += [flag, value]
    return full


def worker_environment(ours: Mapping[str, str], devices: int | None) -> dict[str, str]:
    """CPU only, output as it comes, and `devices` virtual devices where they were asked for."""
    environment = {**ours, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    if devices is not None:
        given = ours.get("XLA_FLAGS", "").split()
        kept = [flag for flag in given if not flag.startswith((DEVICES, IN_ORDER))]
        environment.setdefault(THREADS, str(max(os.cpu_count() or 1, 4 * devices)))
        environment["XLA_FLAGS"] = " ".join([*kept, f"{DEVICES}={devices}", f"{IN_ORDER}=false"])
    return environment


def forward_output(processes: Sequence[subprocess.Popen[str]]) -> list[threading.Thread]:
    """Copies the processes' output line by line, prefixed, stdout to stdout, stderr to stderr."""
    lock = threading.Lock()

    def copy(source: IO[str], target: IO[str], prefix: str) -> None:
        for line in source:
            with lock:
                target.write(f"{prefix} {line.rstrip()}\n")
                target.flush()

    readers = []
    for index, process in enumerate(processes):
        for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            assert source is not None
            reader = threading.Thread(target=copy, args=(source, target, f"[{index}]"), daemon=True)
            reader.start()
            readers.append(reader)
    return readers


def supervise(processes: Sequence[subprocess.Popen[str]], grace: float, received: list[int]) -> int:
    """Waits for the end of all, ends all where one fails, and returns the pod's exit code.

    `received` is filled by the signal handlers: numbers of signals to pass on.
    """
    started = time.monotonic()
    running = dict(enumerate(processes))
    first_failure = 0
    deadline = float("inf")
    while running:
        while received:
            number = received.pop(0)
            say(f"{name_of(number)}: passed on to {plural(len(running))}, {ending(grace)}")
            send(running, number)
            deadline = min(deadline, time.monotonic() + grace)
        codes = {index: process.poll() for index, process in running.items()}
        running = {index: running[index] for index, code in codes.items() if code is None}
        failed = [(index, code) for index, code in codes.items() if code]
        if failed and not first_failure:
            # A process that is killed makes others fail, or jax abort them, and may do so within
            # one look: it is the one to name.
            index, code = min(failed, key=lambda one: one[1] > 0 or one[1] == -signal.SIGABRT)
            first_failure = code if code > 0 else 128 - code
            ended = f"process {index} {how_it_ended(code)} after {time.monotonic() - started:.1f} s"
            say(f"{ended}; {plural(len(running))} left, {ending(grace)}")
            if deadline == float("inf") and code != RESUME:
                send(running, signal.SIGTERM)
            deadline = min(deadline, time.monotonic() + grace)
        if running and time.monotonic() > deadline:
            say(f"killing what is left after {grace:g} s: process " + ", ".join(map(str, running)))
            send(running, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.05)
    return first_failure


def send(running: Mapping[int, subprocess.Popen[str]], number: int) -> None:
    """Sends a signal to the processes and to what they have started."""
    for process in running.values():
        with contextlib.suppress(ProcessLookupError):  # it ended since it was last looked at
            os.killpg(process.pid, number)


def how_it_ended(code: int) -> str:
    """A return code of subprocess in words."""
    if code < 0:
        return f"was ended by {name_of(-code)}"
    note = " (run the same command again to go on)" if code == RESUME else ""
    return f"ended with exit code {code}{note}"


def name_of(number: int) -> str:
    """SIGTERM for 15."""
    return signal.Signals(number).name


def plural(count: int) -> str:
    """A count of processes in words."""
    return f"{count} process" if count == 1 else f"{count} processes"


def ending(grace: float) -> str:
    """What will happen, and by when."""
    return f"over in at most {grace:g} s"


def say(text: str) -> None:
    """A line of this program's own, on stderr."""
    print(f"local_pod: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
