"""The processes of one run, on one host or many: joining, barriers, preemption, exiting together.

An entry point's `main` is run by `run`, calls `start` before any use of devices, and runs its
training steps within `stopping_at_steps`.  Everything works with a single process too.

Barriers, broadcasts and heartbeats are those of jax's coordination service, which runs in process
0.  Where a process is lost, or not all join, jax aborts the others (exit code 134) with a message.
Two things are implemented here, since jax 0.10.2 does less.  Its preemption service polls for
SIGTERM once a second, and during compilation or evaluation nothing happens before the next step, if
there is one.  And a process with an error waits at exit for the others to shut down, while they
wait for it in a collective.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar

from befm_jax.distributed import rendezvous
from befm_jax.errors import InUseError, UserError, printable

# Exit codes, as documented in launch/README.md: the launchers act on these.
ERROR, MISTAKE, RESUME = 1, 2, 75
# Signals that stop a run once its state is saved.
STOPPING = (signal.SIGTERM, signal.SIGINT)

# Seconds without a heartbeat after which jax considers a process lost.
HEARTBEAT_TIMEOUT = 60
FOREVER = 1000 * 60 * 60 * 24 * 365  # milliseconds
# Keys of the coordination service's store: a process received SIGTERM; a process had an error.
STOP, END = "befm/stop", "befm/end"

Value = TypeVar("Value")


class PreemptedError(Exception):
    """The run stopped on SIGTERM, and its state is saved."""


class _Progress:
    """This process's position in the run, and the position at which the run is to stop.

    A position counts events that all processes have in the same order: entering a loop of steps,
    ending a step, leaving the loop.  The lock is held while processes exchange positions.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.position = 0
        self.in_steps = False
        self.stop_at: int | None = None

    def advance(self, in_steps: bool) -> bool:
        """Advances by one position; returns whether that is where to stop."""
        with self.lock:
            self.position += 1
            self.in_steps = in_steps
            return self.position == self.stop_at


_progress = _Progress()
_client: Any = None  # jax's DistributedRuntimeClient; None in a run of one process
_index, _count = 0, 1
_keys = itertools.count()
_threads: list[threading.Thread] = []
_closing = threading.Lock()


def start(
    coordinator: str | None,
    processes: int | None,
    process_id: int | None,
    *,
    join_within: int = rendezvous.JOIN_WITHIN,
) -> None:
    """Joins the processes of this run; to be called before any use of devices.

    The arguments are the flags of the same names: `coordinator` is HOST:PORT of process 0.
    Without them the metadata of Slurm, GKE and TPU VMs are used; without these, or where
    `processes` is 1, the run has a single process and uses no network.  If the others have not
    joined after `join_within` seconds, jax aborts the process.

    Raises:
        UserError: the flags contradict each other.
        InUseError: the port of process 0, which this is, is in use.
        RuntimeError: the host name of process 0 does not resolve in `join_within` seconds.
    """
    global _client, _index, _count
    place = rendezvous.place_from(coordinator, processes, process_id, join_within)
    if place is None:
        return
    import jax
    from jax._src import distributed  # the key-value store has no public name

    address, _count, _index = place
    if is_first():
        _check_port(address)
    # jax's own message names no address.
    _log(f"process {_index} of {_count}: joining the others at {address}, for {join_within} s")
    jax.config.update("jax_enable_preemption_service", False)  # it would handle SIGTERM
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        *place, initialization_timeout=join_within, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT
    )
    _client = distributed.global_state.client
    for function in (_await_stop, _await_end):
        _threads.append(threading.Thread(target=function, daemon=True))
        _threads[-1].start()


def _check_port(address: str) -> None:
    """Raises InUseError where somebody listens on the port: jax would abort, or crash."""
    try:
        socket.create_server(("", int(address.rpartition(":")[2]))).close()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise InUseError(f"process 0 can't listen at {address} ({reason}); name another") from error


def is_first() -> bool:
    """Whether this is process 0, which writes the run's files."""
    return _index == 0


def count() -> int:
    """The number of processes of the run."""
    return _count


def barrier(name: str) -> None:
    """Waits until all processes reach this barrier; `name` identifies it in errors."""
    if _client is not None:
        _client.wait_at_barrier(f"befm/{next(_keys)}/{name}", FOREVER)


def broadcast(name: str, value: Value) -> Value:
    """Process 0's value, on all processes; it must survive a round trip through JSON."""
    received: Value = all_gatherer(f"{next(_keys)}/{name}")(value)[0]
    return received


def all_gatherer(name: str) -> Callable[[Any], list[Any]]:
    """A function from a value that JSON keeps to every process's; all must call it equally often.

    Nothing of it touches a device, so a thread may call it beside the training loop.
    """
    numbers = itertools.count()

    def all_gather(value: Any) -> list[Any]:
        if _client is None:
            return [value]
        number = next(numbers)
        key = f"befm/{name}/{number}"
        _client.key_value_set(f"{key}/{_index}", json.dumps(value))
        _client.wait_at_barrier(key, FOREVER)
        if _index == 0 and number:  # the values before this were read by whoever is here
            _client.key_value_delete(f"befm/{name}/{number - 1}")
        texts = {int(at.rsplit("/", 1)[1]): text for at, text in _client.key_value_dir_get(key)}
        return [json.loads(texts[index]) for index in range(_count)]

    return all_gather


@contextmanager
def stopping_at_steps() -> Iterator[None]:
    """A context for a loop that calls `stop_requested` after every step; nothing is left unsaved.

    Outside of it nothing is unsaved, so SIGTERM exits at once, with RESUME.  Raises PreemptedError
    at its end if that is the position where all processes stop.
    """
    _progress.advance(in_steps=True)
    yield
    if _progress.advance(in_steps=False):
        raise PreemptedError("the last step is saved")


def stop_requested() -> bool:
    """Whether to save and raise PreemptedError now: at the same call on all processes.

    To be called once per step, by all processes.  True after any of them received SIGTERM.

    Raises:
        RuntimeError: called outside of `stopping_at_steps`.
    """
    if not _progress.in_steps:
        raise RuntimeError("stop_requested() outside of stopping_at_steps()")
    return _progress.advance(in_steps=True)


def run(main: Callable[[], None]) -> None:
    """Runs an entry point; exits this process, or returns on success.

    PreemptedError exits with 75.  Errors that a user can fix (UserError, OSError) are printed
    without a stack trace and exit with 2 (InUseError with 1: another time it may be free), any
    other error with its stack trace and 1.  With several processes an error ends all of them, with
    the exit code of the first.  SIGTERM and SIGINT end a run once its state is saved.
    """
    _listen_for_signals()
    code = 0
    try:
        try:
            main()
        except PreemptedError as preempted:
            _log(f"stopped: {preempted}; run the same command again to resume")
            code = RESUME
        _disconnect()
    except BaseException as error:
        if isinstance(error, InUseError):
            _fail(ERROR, f"error: {error}")
        if isinstance(error, (UserError, OSError)):
            _fail(MISTAKE, f"error: {printable(str(error))}", error.__cause__ or error.__context__)
        if _client is None:
            raise
        _fail(ERROR, traceback.format_exc().rstrip())
    if code:
        sys.exit(code)


def _fail(code: int, text: str, cause: BaseException | None = None) -> NoReturn:
    """Prints `text` and ends all processes; a single process by an ordinary exit."""
    _log(text)
    if _client is None:
        sys.exit(code)
    if cause is not None:
        # The error may be a consequence of a lost process (such as a checkpoint that can't be
        # written), which no user can fix: then jax aborts this one as soon as it notices.
        time.sleep(HEARTBEAT_TIMEOUT + 10)
    with suppress(Exception):  # another process was first, or process 0 is gone
        _client.key_value_set(END, f"{code} {_index}")
    time.sleep(10)  # for `_await_end`, which knows who was first
    _leave(code)


def _await_end() -> None:
    """Waits for an error in any process, and exits with its code."""
    with suppress(Exception):  # disconnected: the run is over, or process 0 is gone
        code, index = map(int, _client.blocking_key_value_get(END, FOREVER).split())
        if index != _index:
            _log(f"process {index} of {_count} failed, see its message; all processes exit")
        if _index in (0, index):
            time.sleep(1)  # the others receive it before they miss this process
        _leave(code)


def _await_stop() -> None:
    """Waits for SIGTERM at any process, and sets the position where all stop."""
    with suppress(Exception):  # as above
        _client.blocking_key_value_get(STOP, FOREVER)
        _stop()


def _disconnect() -> None:
    """A barrier of all processes, and the shutdown of jax.distributed; then each exits by itself.

    A second thread that calls this blocks for ever: the first one exits the process.
    """
    if _client is None:
        return
    import jax

    _closing.acquire()
    # Another process may still be evaluating, for longer than the timeout of jax's own barrier.
    _client.wait_at_barrier("befm/disconnect", FOREVER)
    jax.distributed.shutdown()
    # A thread that is in native code at the interpreter's exit would abort it.
    for thread in _threads:
        if thread is not threading.current_thread():
            thread.join(timeout=5)


def _leave(code: int) -> NoReturn:
    """Exits this process at once, without waiting for its threads; flushes its output."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _listen_for_signals() -> None:
    """Handles SIGTERM and SIGINT in a thread: Python's own handlers wait while native code runs."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as of what a script starts behind it
            signal.signal(number, lambda number, frame: None)
    threading.Thread(target=_await_signal, args=(reader,), daemon=True).start()


def _await_signal(reader: int) -> None:
    received: list[int] = []
    while not received:
        received = [number for number in os.read(reader, 64) if number in STOPPING]
    # Further signals have no effect: a save in progress is finished.
    name = signal.Signals(received[0]).name
    _log(f"{name} at process {_index} of {_count}: the run stops once its state is saved")
    if _client is None:
        _stop()
        return
    with suppress(Exception):  # another process was first, or process 0 is gone
        _client.key_value_set(STOP, "")


def _stop() -> None:
    """Sets the next position at which nothing is unsaved: outside of steps, the current one."""
    with _progress.lock:
        positions = [(_progress.position, _progress.in_steps)]
        if _client is not None:
            _client.key_value_set(f"{STOP}/{_index}", json.dumps(positions[0]))
            keys = [f"{STOP}/{index}" for index in range(_count)]
            positions = [json.loads(_client.blocking_key_value_get(key, FOREVER)) for key in keys]
        furthest, in_steps = max(positions)
        _progress.stop_at = furthest + in_steps
        here = _progress.position == _progress.stop_at
    if here:
        _disconnect()
        _log("stopped: nothing is unsaved; run the same command again to resume")
        _leave(RESUME)
