"""Runs of several real processes: how they find each other, stop together and end together."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from befm_jax.distributed import processes, rendezvous
from befm_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

# A run whose every step is a collective operation; the first argument says what goes wrong in it.
WORKER = """
import argparse, hashlib, os, signal, time
from befm_jax.distributed import processes
from befm_jax.errors import InUseError, UserError

parser = argparse.ArgumentParser()
parser.add_argument("what")
parser.add_argument("--coordinator")
parser.add_argument("--processes", type=int)
parser.add_argument("--process_id", type=int)
parser.add_argument("--join_within", type=int, default=60)
flags = parser.parse_args()
kind, _, who = flags.what.partition(":")

def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)

def wait_for_the_agreement():
    while processes._progress.stop_at is None:
        time.sleep(0.05)

processes.HEARTBEAT_TIMEOUT = 10

def main():
    if kind == "interrupted":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(100)
    processes.start(
        flags.coordinator, flags.processes, flags.process_id, join_within=flags.join_within
    )
    import jax
    import numpy
    from jax.experimental import multihost_utils
    me = str(jax.process_index())
    processes.barrier("all are here")
    first = processes.broadcast("who is first", me)
    seen = (jax.process_count(), processes.count(), processes.is_first())
    print("joined", me, *seen, first, flush=True)
    if kind == "missing":
        raise UserError("no such table")
    if kind == "native":
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in which no Python runs here
    if kind in ("busy", "gone", "frozen"):
        if me == who:
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGSTOP if kind == "frozen" else signal.SIGKILL)
        while kind == "busy":
            sum(range(10**8))  # one call, in which no other thread gets the interpreter
        time.sleep(1000)
    if kind == "late" and me == who:
        wait_for_the_agreement()
    with processes.stopping_at_steps():
        for step in range(1, 6 if kind in ("done", "after") else 10**6):
            if kind == "late" and me != who:
                sigterm()
            try:
                multihost_utils.process_allgather(numpy.array(step))
            except Exception as error:
                if kind == "killed":  # as a checkpoint that could not be written
                    raise UserError("not written") from error
                raise
            if step == 3 and me == who:
                if kind == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if kind == "mistake":
                    raise UserError("that is wrong")
                if kind == "in_use":
                    raise InUseError("the run is in use by another")
                if kind == "error":
                    raise KeyError("a bug")
                if kind == "sigterm":
                    sigterm()
                if kind == "sigint":
                    os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            if processes.stop_requested():
                sigterm()  # once more, while it saves
                time.sleep(0.3)
                print("saved", step, flush=True)
                raise processes.PreemptedError(f"step {step} is saved")
        if kind == "after" and me != who:
            wait_for_the_agreement()
    if kind == "after":
        sigterm()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    print("done", flush=True)

processes.run(main)
"""

Ended = tuple[int, str, str]  # exit code, standard output, standard error


def started(what: str, *flags: str, **variables: str) -> "subprocess.Popen[str]":
    given = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, what, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=given | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)} | variables,
    )


def ended(running: list["subprocess.Popen[str]"]) -> list[Ended]:
    """What became of processes that end by themselves, long before this limit."""
    found = []
    try:
        for process in running:
            out, err = process.communicate(timeout=100)
            found.append((process.returncode, out, err))
    finally:
        for process in running:
            process.kill()
    return found


def free_port(ports: Iterable[int] = (0,)) -> int:
    """The first of these ports that nobody listens on; 0 stands for any."""
    for port in ports:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise AssertionError("no port is free")


def started_of(count: int, what: str) -> list["subprocess.Popen[str]"]:
    """The processes of a run, started by flags."""
    address = f"--coordinator=127.0.0.1:{free_port()}"
    return [
        started(what, address, f"--processes={count}", f"--process_id={process}")
        for process in range(count)
    ]


def run_of(count: int, what: str) -> list[Ended]:
    """How the processes of a run ended that were started by flags."""
    return ended(started_of(count, what))


def codes(found: list[Ended]) -> list[int]:
    return [code for code, _, _ in found]


def said(found: list[Ended]) -> str:
    return "".join(err for _, _, err in found)


def test_flags_make_one_run_which_all_processes_end_well() -> None:
    found = run_of(2, "done")
    assert codes(found) == [0, 0], said(found)
    for process, (_, out, err) in enumerate(found):
        assert f"joined {process} 2 2 {process == 0} 0\n" in out
        assert out.endswith("\ndone\n")
        assert "terminate" not in err


def test_slurm_s_variables_make_one_run() -> None:
    # Under Slurm jax takes a port that follows from the job's number.  Drawn by chance, so that
    # suites side by side do not meet.
    port = free_port(random.sample(range(61440, 65536), 100))
    running = [
        started(
            "done",
            SLURM_JOB_ID=str(port - 61440),
            SLURM_STEP_NODELIST="localhost",
            SLURM_NTASKS="2",
            SLURM_PROCID=str(process),
            SLURM_LOCALID=str(process),
        )
        for process in range(2)
    ]
    found = ended(running)
    assert codes(found) == [0, 0], said(found)
    for process, (_, out, _) in enumerate(found):
        assert f"joined {process} 2 2 {process == 0} 0\n" in out


def again(code: int) -> bool:
    """Whether launchers run the command again after this end of a process."""
    return code not in (0, processes.MISTAKE)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_killed_at_a_step_ends_all_as_to_be_run_again(lost: int) -> None:
    # The others first hear of it by a failing collective, and would say that a person can mend it.
    found = run_of(3, f"killed:{lost}")
    assert found[lost][0] == -signal.SIGKILL
    assert all(again(code) for code in codes(found)), said(found)


@pytest.mark.parametrize("what", ["gone:0", "gone:1", "busy:0", "busy:1"])
def test_a_process_killed_outside_of_steps_is_missed_by_its_heartbeat(what: str) -> None:
    lost = int(what[-1])
    found = run_of(2, what)
    assert found[lost][0] == -signal.SIGKILL
    code, _, err = found[1 - lost]
    assert code == -signal.SIGABRT, err
    assert "another task died" in err
    if lost:  # without process 0 nobody can say more
        assert re.search(r"stopped sending heartbeats\):\n1\n", err)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_process_that_hangs_is_missed_by_its_heartbeat(frozen: int) -> None:
    running = started_of(2, f"frozen:{frozen}")
    _, err = running[1 - frozen].communicate(timeout=100)
    running[frozen].kill()
    ended(running[frozen : frozen + 1])
    assert running[1 - frozen].returncode == -signal.SIGABRT, err
    assert "Terminating process because the JAX distributed service detected fatal errors" in err


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_mistake_that_one_process_meets_ends_all_with_2(culprit: int) -> None:
    found = run_of(2, f"mistake:{culprit}")
    assert codes(found) == [2, 2], said(found)
    assert "error: that is wrong" in found[culprit][2].splitlines()
    assert f"process {culprit} of 2 failed, see its message" in found[1 - culprit][2]


def test_a_mistake_that_all_meet_is_named_without_a_stack_trace() -> None:
    found = run_of(3, "missing")
    assert codes(found) == [2, 2, 2], said(found)
    assert "error: no such table" in said(found).splitlines()
    assert "Traceback" not in said(found)


@pytest.mark.parametrize("culprit", [0, 1])
def test_an_exception_in_one_process_ends_all_with_1(culprit: int) -> None:
    found = run_of(2, f"error:{culprit}")
    assert codes(found) == [1, 1], said(found)
    assert "KeyError: 'a bug'" in found[culprit][2]
    assert f"process {culprit} of 2 failed, see its message" in found[1 - culprit][2]


@pytest.mark.parametrize("what", ["sigterm:0", "sigterm:1", "sigint:1", "late:0"])
def test_sigterm_at_one_process_saves_the_same_step_on_all_and_ends_with_75(what: str) -> None:
    found = run_of(2, what)
    assert codes(found) == [processes.RESUME] * 2, said(found)
    steps = [re.findall(r"saved (\d+)", out) for _, out, _ in found]
    assert steps[0] == steps[1]
    assert len(steps[0]) == 1
    if what.startswith("late"):
        assert steps[0] == ["1"]
    assert f"SIG{'INT' if what == 'sigint:1' else 'TERM'} at process" in said(found)
    for _, _, err in found:
        assert f"stopped: step {steps[0][0]} is saved; run the same command again" in err


@pytest.mark.parametrize("first", [0, 1])
def test_sigterm_after_the_last_step_ends_those_too_that_are_still_in_it(first: int) -> None:
    found = run_of(2, f"after:{first}")
    assert codes(found) == [processes.RESUME] * 2, said(found)
    assert "nothing is unsaved" in found[first][2]
    assert "the last step is saved" in found[1 - first][2]


def test_sigterm_to_a_pod_that_compiles_ends_it_at_once() -> None:
    pod = [sys.executable, str(ROOT / "launch" / "local_pod.py"), "--processes", "2", "--"]
    running = subprocess.Popen(
        [*pod, sys.executable, "-c", WORKER, "native"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)},
    )
    assert running.stdout is not None
    for _ in range(2):
        while "joined" not in running.stdout.readline():
            pass
    running.send_signal(signal.SIGTERM)
    ((code, _, err),) = ended([running])
    assert code == processes.RESUME, err
    assert err.count("nothing is unsaved") == 2
    assert "killing" not in err


def test_one_process_alone_stops_and_ends_as_many_do() -> None:
    kinds = ("sigterm:0", "mistake:0", "error:0", "in_use:0", "interrupted:0")
    at_a_step, mistake, exception, in_use, interrupted = ended([started(kind) for kind in kinds])
    assert at_a_step[0] == processes.RESUME, at_a_step[2]
    assert "joined 0 1 1 True 0\nsaved 3\n" in at_a_step[1]
    assert "stopped: step 3 is saved" in at_a_step[2]
    assert mistake[0] == 2
    assert mistake[2].splitlines()[-1] == "error: that is wrong"
    assert exception[0] == 1
    assert exception[2].splitlines()[-1] == "KeyError: 'a bug'"
    assert in_use == (1, in_use[1], "error: the run is in use by another\n")
    assert interrupted[0] == processes.RESUME
    assert "SIGINT at process 0 of 1" in interrupted[2]
    assert "stopped: nothing is unsaved" in interrupted[2]


def test_a_step_outside_of_the_loop_is_an_error_of_the_program() -> None:
    with pytest.raises(RuntimeError, match="outside of stopping_at_steps"):
        processes.stop_requested()


@pytest.mark.parametrize(
    ("flags", "wrong"),
    [
        (("a:1", None, 0), "--processes missing"),
        ((None, 2, None), "--coordinator and --process_id missing"),
        (("a", 2, 0), "--coordinator is a; it must be HOST:PORT"),
        (("http://a:1", 2, 0), "--coordinator is http://a:1; it must be HOST:PORT"),
        (("a:65536", 2, 0), "--coordinator is a:65536; it must be HOST:PORT"),
        (("a:1", 2, 2), "--process_id is 2; with --processes=2 it must be 0 to 1"),
    ],
)
def test_flags_that_contradict_each_other_are_named(
    flags: tuple[str | None, int | None, int | None], wrong: str
) -> None:
    with pytest.raises(UserError, match=re.escape(wrong)):
        rendezvous.place_from(*flags, join_within=1)


@pytest.mark.parametrize("coordinator", ["a.b-c:80", "10.0.0.1:80", "[::1]:80"])
def test_a_coordinator_is_a_name_or_an_address(coordinator: str) -> None:
    assert rendezvous.place_from(coordinator, 2, 1, join_within=1) == (coordinator, 2, 1)


@pytest.mark.parametrize("alone", [0, 1])
def test_where_a_process_never_comes_the_others_say_where_they_waited(alone: int) -> None:
    address = f"127.0.0.1:{free_port()}"
    flags = [f"--coordinator={address}", "--processes=2", f"--process_id={alone}"]
    ((code, _, err),) = ended([started("done", *flags, "--join_within=2")])
    assert code == -signal.SIGABRT, err
    assert f"process {alone} of 2: joining the others at {address}, for 2 s" in err
    assert "Deadline Exceeded" in err


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        flags = [f"--coordinator={address}", "--processes=2", "--process_id=0"]
        ((code, _, err),) = ended([started("done", *flags)])
    assert code == processes.ERROR  # run again: it may be that of a run that is about to end
    assert err.startswith(f"error: process 0 can't listen at {address} (Address already in use)")
    assert "Traceback" not in err


@pytest.fixture
def tpu_vm(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A machine with TPU chips, and the attributes that its metadata server gives, to be filled."""
    attributes: dict[str, str] = {"tpu-env": ""}

    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = attributes.get(self.path.rsplit("/", 1)[1])
            self.send_response(404 if found is None else 200)
            self.end_headers()
            self.wfile.write((found or "").encode())

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in [*os.environ]:
        if name.startswith(("SLURM", "TPU_", "MEGASCALE")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    yield attributes
    server.shutdown()


def test_a_tpu_vm_s_metadata_say_which_host_of_the_slice_it_is(tpu_vm: dict[str, str]) -> None:
    tpu_vm["agent-worker-number"] = "2"
    tpu_vm["worker-network-endpoints"] = "x:0:127.0.0.1,x:1:127.0.0.2,x:2:127.0.0.3,x:3:127.0.0.4"
    found = rendezvous.place_from(None, None, None, join_within=1)
    assert found == ("127.0.0.1:8482", 4, 2)


def test_a_tpu_vm_alone_is_a_run_of_one(tpu_vm: dict[str, str]) -> None:
    tpu_vm["agent-worker-number"] = "0"
    tpu_vm["worker-network-endpoints"] = "x:0:127.0.0.1"
    assert rendezvous.place_from(None, None, None, join_within=1) is None


def test_gke_s_variables_count_hosts_over_slices(
    tpu_vm: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {
        "TPU_WORKER_HOSTNAMES": "a-0,a-1",
        "TPU_WORKER_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8081",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert rendezvous.place_from(None, None, None, join_within=1) == ("localhost:8482", 4, 3)
    assert rendezvous.place_from(None, 1, None, join_within=1) is None  # asked to be alone
