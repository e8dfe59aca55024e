"""The processes of one run: how they hear of each other's end, and end together.

Each process holds a connection to process 0, its lifeline.  The kernel closes it when a process
ends, however it ends, and finds out about a host that is gone by keepalive probes, even while the
interpreter is busy.  Process 0 tells all others.  What processes agree on goes through the
key-value store and the barriers of jax's coordination service, which process 0 hosts too.

jax by itself ends a process whose peer was lost by abort(): exit code 134, which says neither who
was lost nor that the run can go on, and is the code of any crash in native code.  A callback of
Python's can't take its place (jaxlib 0.10.2 fails to convert its argument and aborts likewise), and
the loss of process 0 breaks jax's connections together with ours.  So the thread that aborts is
held for some seconds (see `hold_aborts`), and a thread of this module is first.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

# Exit codes, as launch/README.md promises them: the launchers act on these.
ERROR, MISTAKE, RESUME = 1, 2, 75

# Seconds after which a host that does not answer counts as lost.
LOST_AFTER = 30
# Seconds that process 0 waits for the others to end, after it told them to.
PATIENCE = 10
# Length of what a process says first at its lifeline: the run's password, and its number.
GREETING = 40
FOREVER = 1000 * 60 * 60 * 24 * 365  # milliseconds


class End(NamedTuple):
    """Why the run ends on all processes; the first one that process 0 hears of counts."""

    code: int
    process: int  # that met an error, and says which; or that was lost
    lost: bool


def hold_aborts() -> None:
    """Makes abort() wait for 6 seconds, in the thread that called it, before it ends the process.

    The handler is libc's `sleep`, called with the signal's number, 6: async-signal-safe, and no
    interpreter lock is needed, whatever the aborting thread holds.  A crash for other reasons ends
    as it would have, those seconds later.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def leave(code: int) -> NoReturn:
    """Ends this process now, whatever its threads do; what was printed is out."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def say(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)


class Group:
    """This process among the others, `count` in all, connected to the coordination service."""

    def __init__(self, client: Any, coordinator: str, index: int, count: int) -> None:
        """Waits for all, exchanges the names of their hosts, and begins to watch over them.

        `client` is jax's DistributedRuntimeClient, `coordinator` the host name of process 0.
        """
        self.index, self.count = index, count
        self._client = client
        self._met = 0
        self._threads: list[threading.Thread] = []
        self._closing = False
        self._end: End | None = None
        self._decided = threading.Event()
        self._deciding, self._leaving, self._finishing = (threading.Lock() for _ in range(3))
        self.put(f"befm/host/{index}", socket.gethostname())
        self._hosts = [self.get(f"befm/host/{process}") for process in range(count)]
        self._lifelines = self._accept() if index == 0 else {0: self._connect(coordinator)}
        self._listeners = [self.watch(self._listen, process) for process in self._lifelines]

    def name(self, process: int) -> str:
        """A process in words."""
        return f"process {process} of {self.count} ({self._hosts[process]})"

    # --- agreeing

    def put(self, key: str, value: str) -> None:
        """Sets a key of the store, once for all processes: a value that is there stays.

        Raises jax's JaxRuntimeError where process 0 can't be reached.
        """
        try:
            self._client.key_value_set(key, value)
        except Exception as error:
            if "ALREADY_EXISTS" not in str(error):
                raise

    def get(self, key: str) -> str:
        """The value of a key, as soon as a process has set it; raises like `put`."""
        value: str = self._client.blocking_key_value_get(key, FOREVER)
        return value

    def next_key(self, name: str) -> str:
        """A key for something that all processes do together, in the same order."""
        self._met += 1
        return f"befm/meeting/{self._met}/{name}"

    def wait(self, barrier: str) -> None:
        """Waits until all processes are here; each barrier serves once."""
        self._client.wait_at_barrier(barrier, FOREVER)

    # --- ending

    def watch(self, function: Callable[..., None], *arguments: Any) -> threading.Thread:
        """Runs a function beside the program; `close` ends what it waits for, and waits for it."""
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def close(self) -> None:
        """Waits for all to come here, and disconnects; from here on each ends by itself.

        A second thread that comes here waits for ever: the first one ends the process.
        """
        import jax

        self._finishing.acquire()
        self.wait("befm/finish/1")
        # Nobody hangs up before everybody has stopped to mind.
        self._closing = True
        self.wait("befm/finish/2")
        for connection in self._lifelines.values():
            with suppress(OSError):  # the other side was first
                connection.shutdown(socket.SHUT_RDWR)
        jax.distributed.shutdown()
        # A thread that is still in native code when the interpreter goes would abort it.
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout=5)

    def fail(self, code: int, text: str) -> NoReturn:
        """Ends all processes with a code, and says why; or with an error that came before."""
        end = End(code, self.index, lost=False)
        if self.index == 0:
            self._decide(end)
        else:
            self._tell(0, end)
            self._decided.wait(PATIENCE)
        self._leave(self._end or end, text)

    def _decide(self, end: End) -> bool:
        """Takes this end for that of all, unless there is one; process 0 tells them."""
        with self._deciding:
            if self._end is not None:
                return False
            self._end = end
            if self.index == 0:
                for process in self._lifelines:
                    self._tell(process, end)
            self._decided.set()
            return True

    def _leave(self, end: End, text: str = "") -> NoReturn:
        """Ends this process with its own error, of which `text` speaks, or with another's."""
        self._leaving.acquire()  # for ever: another thread waits here until the process is gone
        if end.lost:
            say(
                f"{self.name(end.process)} was lost, so all end; run the same command again to go "
                "on from the last checkpoint"
            )
        elif end.process == self.index:
            say(text)
        else:
            say(f"{self.name(end.process)} met an error and says which; all end with it")
        if self.index == 0:
            # jax aborts the others when its host goes, so they go first.
            until = time.monotonic() + PATIENCE
            for thread in self._listeners:
                if thread is not threading.current_thread():
                    thread.join(timeout=max(until - time.monotonic(), 0))
        leave(end.code)

    # --- lifelines

    def _accept(self) -> dict[int, socket.socket]:
        """As process 0: the connections of all others."""
        password = secrets.token_hex(16)
        with _server(0) as server:
            self.put("befm/lifeline", f"{server.getsockname()[1]} {password}")
            found: dict[int, socket.socket] = {}
            while len(found) < self.count - 1:
                connection, _ = server.accept()
                connection.settimeout(LOST_AFTER)
                try:
                    greeting = connection.recv(GREETING, socket.MSG_WAITALL)
                except OSError:
                    greeting = b""
                if secrets.compare_digest(greeting[: len(password)], password.encode()):
                    found[int(greeting[len(password) :])] = _kept_alive(connection)
                else:  # somebody else's, who scans ports
                    connection.close()
        return found

    def _connect(self, coordinator: str) -> socket.socket:
        port, password = self.get("befm/lifeline").split()
        connection = socket.create_connection((coordinator, int(port)), LOST_AFTER)
        connection.sendall(f"{password}{self.index}".ljust(GREETING).encode())
        return _kept_alive(connection)

    def _tell(self, process: int, end: End) -> None:
        with suppress(OSError):  # that process is gone, which the thread at its lifeline notices
            self._lifelines[process].sendall(f"{json.dumps(end)}\n".encode())

    def _listen(self, process: int) -> None:
        """Hears at the lifeline of a process of errors and of its end."""
        with suppress(OSError):  # unreachable for too long
            for line in self._lifelines[process].makefile():
                self._hear(End(*json.loads(line)))
        if not self._closing:
            self._hear(End(RESUME, process, lost=True))

    def _hear(self, end: End) -> None:
        if self._decide(end) and end.process != self.index:
            self._leave(end)


def _server(port: int) -> socket.socket:
    """A listening socket, for both versions of IP where there are both."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _kept_alive(connection: socket.socket) -> socket.socket:
    """The connection, which fails when the other host has not answered for LOST_AFTER seconds."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE"  # macOS
    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, idle), LOST_AFTER // 3)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, LOST_AFTER // 6)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    return connection
