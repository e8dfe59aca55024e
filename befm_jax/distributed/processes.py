"""Several processes of one run, on one host or many: joining, agreeing, stopping, ending together.

An entry point's `main` is run by `run`, calls `start` before anything touches a device, and puts
its training steps into `stopping_at_steps`.  The rest works in one process as in many.

What is promised: a process that dies ends the run on all hosts at once, a host that is gone after
LOST_AFTER seconds, with a message that names it and exit code 75; an error that one process meets
ends all with its code; SIGTERM to any process makes all save after the same step, and end with 75.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn, TypeVar

from befm_jax.distributed import rendezvous
from befm_jax.distributed.process_group import (
    ERROR,
    LOST_AFTER,
    MISTAKE,
    RESUME,
    Group,
    hold_aborts,
    leave,
    say,
)
from befm_jax.distributed.rendezvous import NotJoinedError
from befm_jax.errors import UserError

STOP = "befm/stop"  # set when SIGTERM has reached a process

Value = TypeVar("Value")


class PreemptedError(Exception):
    """The run was asked to stop, and its state is saved."""


class _Course:
    """Where this process is in the run, and where the run is to stop.

    A position counts what all processes do in the same order: entering a loop of steps, ending a
    step, leaving the loop.  All agree on a position to stop at: the next at which state is saved
    and that nobody has passed.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._position = 0
        self._in_steps = False
        self._frozen = False
        self._stop_at: int | None = None

    @property
    def in_steps(self) -> bool:
        return self._in_steps

    def advance(self, in_steps: bool) -> bool:
        """Goes on by one position; whether that is where to stop.

        Waits while a stop is being agreed on.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._frozen or self._stop_at is not None)
            self._position += 1
            self._in_steps = in_steps
            return self._position == self._stop_at

    def freeze(self) -> tuple[int, bool]:
        """Stays at this position until `stop_at`; returns it, and whether it is among steps."""
        with self._changed:
            self._frozen = True
            return self._position, self._in_steps

    def stop_at(self, places: Iterable[tuple[int, bool]]) -> bool:
        """Goes on, to stop at what follows from where all processes are; whether that is here."""
        # Among steps the next position is the next to have its state saved; outside of them
        # nothing is unsaved.
        furthest, in_steps = max(places)
        with self._changed:
            self._stop_at = furthest + in_steps
            self._changed.notify_all()
            return self._position == self._stop_at


_course = _Course()
_group: Group | None = None


def start(
    coordinator: str | None,
    processes: int | None,
    process_id: int | None,
    *,
    join_within: int = rendezvous.JOIN_WITHIN,
) -> None:
    """Joins the processes of this run, and takes charge of SIGTERM.  Before any use of devices.

    The arguments are the flags of the same names: `coordinator` is HOST:PORT of process 0.
    Without them Slurm, GKE and TPU VMs say who is who; where nothing does, or `processes` is 1,
    this is a run of one process, and no network is touched.  `join_within` is in seconds.

    Raises:
        UserError: the flags contradict each other.
        NotJoinedError: the others were not there in time.
    """
    global _group
    _listen_for_sigterm()
    until = time.monotonic() + join_within
    place = rendezvous.place_from(coordinator, processes, process_id, join_within)
    if place is None:
        return
    import jax
    from jax._src import distributed  # the key-value store has no public name

    rendezvous.find_coordinator(place, until)
    hold_aborts()
    # jax's own counts steps alone, and does not know what lies outside of them.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    with rendezvous.giving_up(place, until):
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process_id,
            # Where nobody comes, jax ends the process by abort: `giving_up` does before, in words.
            initialization_timeout=join_within + 60,
            # For a process that is there and does nothing.  One that is gone is missed before.
            heartbeat_timeout_seconds=2 * LOST_AFTER,
        )
        client = distributed.global_state.client
        group = Group(client, place.host, place.process_id, place.processes)
    _group = group
    group.watch(_hear_stop, group)


def is_first() -> bool:
    """Whether this is process 0: the one that writes what is written once."""
    return _group is None or _group.index == 0


def count() -> int:
    """How many processes the run has."""
    return 1 if _group is None else _group.count


def barrier(name: str) -> None:
    """Waits until all processes are here; `name` tells one meeting from another in errors."""
    if _group is not None:
        _group.wait(_group.next_key(name))


def broadcast(name: str, value: Value) -> Value:
    """Process 0's value, on all processes; it must be one that JSON keeps as it is."""
    if _group is None:
        return value
    key = _group.next_key(name)
    if _group.index == 0:
        _group.put(key, json.dumps(value))
    agreed: Value = json.loads(_group.get(key))
    return agreed


@contextmanager
def stopping_at_steps() -> Iterator[None]:
    """Around a loop that calls `asked_to_stop` after every step, saves, and writes it all.

    Outside of it nothing is unsaved, so SIGTERM ends the run at once, with RESUME.  Raises
    PreemptedError at its end where the stop that was agreed on lies there.
    """
    _course.advance(in_steps=True)
    yield
    if _course.advance(in_steps=False):
        raise PreemptedError("the last step is saved")


def asked_to_stop() -> bool:
    """Whether to save and raise PreemptedError now: at the same call on all processes.

    To be called once per step, by all, within `stopping_at_steps`.  True after SIGTERM reached
    any of them.
    """
    if not _course.in_steps:
        raise RuntimeError("asked_to_stop() outside of stopping_at_steps()")
    return _course.advance(in_steps=True)


def run(main: Callable[[], None]) -> None:
    """Runs an entry point, and ends this process, or returns where all of it went well.

    What a person can mend (UserError, OSError) is printed without a stack trace and exits with 2;
    PreemptedError exits with 75.  With several processes any error ends all of them, with the code
    of the one that met it first, which alone prints it.
    """
    code = 0
    try:
        try:
            main()
        except PreemptedError as preempted:
            say(f"stopped: {preempted}; run the same command again to go on")
            code = RESUME
        if _group is not None:
            _group.close()
    except (UserError, OSError) as error:
        _await_verdict(error)
        _fail(MISTAKE, f"error: {error}")
    except NotJoinedError as error:
        _fail(ERROR, f"error: {error}")
    except BaseException as error:
        if _group is None:
            raise
        _await_verdict(error)
        _fail(_code_of(error), traceback.format_exc().rstrip())
    if code:
        sys.exit(code)


def _fail(code: int, text: str) -> NoReturn:
    """Ends all processes; in a run of one, by an ordinary exit."""
    if _group is not None:
        _group.fail(code, text)
    say(text)
    sys.exit(code)


def _code_of(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return ERROR


# What jax says of faults of this process's own; any other may come of a peer that is gone.
OWN_FAULTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "NOT_FOUND")


def _await_verdict(error: BaseException) -> None:
    """Where an error may come of a lost process: waits until it would be known to be lost.

    Does not return if it is, or if another process has met an error.
    """
    causes: list[BaseException] = []
    cause = error.__cause__ or error.__context__
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    if _group is None or (isinstance(error, UserError) and not causes):
        return
    import jax

    by_jax = [one for one in (error, *causes) if isinstance(one, jax.errors.JaxRuntimeError)]
    of_others = any(not str(one).startswith(OWN_FAULTS) for one in by_jax)
    # The end of a process is known at once, that of a host is not.
    time.sleep(LOST_AFTER + 5 if of_others else 2)


def _listen_for_sigterm() -> None:
    """Has SIGTERM acted upon by a thread: Python's own handlers wait while native code runs."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    threading.Thread(target=_hear_sigterm, args=(reader,), daemon=True).start()


def _hear_sigterm(reader: int) -> None:
    while True:
        if signal.SIGTERM in os.read(reader, 64):
            break
    # Further ones change nothing: a save that has begun is finished.
    if _group is not None:
        say(f"SIGTERM at {_group.name(_group.index)}: all stop after the same step")
        with suppress(Exception):  # process 0 is gone: everything ends for another reason
            _group.put(STOP, "")
    elif _course.stop_at([_course.freeze()]):
        say("stopped by SIGTERM, nothing is unsaved; run the same command again to go on")
        leave(RESUME)
    else:
        say("SIGTERM: the state is saved after this step, and the run ends")


def _hear_stop(group: Group) -> None:
    """Waits for SIGTERM at any process, and agrees with all on where to stop."""
    try:
        group.get(STOP)
        position, in_steps = _course.freeze()
        group.put(f"{STOP}/{group.index}", f"{position} {int(in_steps)}")
        told = [group.get(f"{STOP}/{process}").split() for process in range(group.count)]
        if _course.stop_at((int(position), bool(int(among))) for position, among in told):
            group.close()
            say("stopped by SIGTERM, nothing is unsaved; run the same command again to go on")
            leave(RESUME)
    except Exception:
        return  # disconnected: the run is over, or ends by an error that others speak of
