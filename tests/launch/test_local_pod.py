"""A pod of real, tiny processes: what each is given, and how the pod ends when one of them does."""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

IN_ORDER = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "local_pod.py"

TELL = "import json, os, sys; print(json.dumps([sys.argv[1:], dict(os.environ)]))"
# Says that it is ready, then sleeps; SIGTERM ends it with 75 after what a save would take.
SAVES = """
import signal, sys, time
def save(*_):
    print("saving", flush=True)
    time.sleep(0.3)
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
print("ready", flush=True)
time.sleep(60)
"""
STUBBORN = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
other_ignores_it = pathlib.Path(sys.argv[1])
if sys.argv[-1] == "0":
    while not other_ignores_it.exists():
        time.sleep(0.01)
    sys.exit(3)
other_ignores_it.touch()
time.sleep(60)
"""


JAX = """
import argparse
import jax
from jax.experimental import multihost_utils

parser = argparse.ArgumentParser()
parser.add_argument("--coordinator")
parser.add_argument("--processes", type=int)
parser.add_argument("--process_id", type=int)
flags = parser.parse_args()
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(flags.coordinator, flags.processes, flags.process_id)
ids = multihost_utils.process_allgather(jax.numpy.array(10 + flags.process_id))
print("ids", ids.tolist(), "devices", jax.local_device_count(), jax.device_count())
"""


def pod(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def told(result: subprocess.CompletedProcess[str]) -> dict[int, tuple[list[str], dict[str, str]]]:
    """What the processes of TELL said of their arguments and environment, by prefix."""
    lines = [line.split(" ", 1) for line in result.stdout.splitlines()]
    return {int(prefix.strip("[]")): json.loads(text) for prefix, text in lines}


def test_each_process_gets_its_own_id_and_all_the_same_coordinator() -> None:
    result = pod("--processes", "3", "--", sys.executable, "-c", TELL, "a b", "$(x); 'y'")
    assert result.returncode == 0, result.stderr
    by_process = told(result)
    assert sorted(by_process) == [0, 1, 2]
    coordinators = set()
    for index, (arguments, environment) in by_process.items():
        assert arguments[:2] == ["a b", "$(x); 'y'"]
        assert arguments[2] == "--coordinator"
        coordinators.add(arguments[3])
        assert arguments[4:] == ["--processes", "3", "--process_id", str(index)]
        assert environment["JAX_PLATFORMS"] == "cpu"
    (coordinator,) = coordinators
    host, port = coordinator.split(":")
    assert host == "127.0.0.1"
    assert 1024 <= int(port) <= 65535


def test_flags_that_the_command_holds_are_left_alone() -> None:
    own = ["--coordinator=host:1", "--process_id", "7"]
    result = pod("--processes", "1", "--", sys.executable, "-c", TELL, *own)
    assert told(result)[0][0] == [*own, "--processes", "1"]


def test_the_flags_make_one_jax_cluster_of_the_processes() -> None:
    result = pod(
        *("--processes", "2", "--devices-per-process", "3", "--", sys.executable, "-c", JAX),
    )
    assert result.returncode == 0, result.stderr
    for index in (0, 1):
        assert f"[{index}] ids [10, 11] devices 3 6" in result.stdout.splitlines()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", f"--xla_force_host_platform_device_count=2 {IN_ORDER}"),
        (
            "--xla_cpu_x=1 --xla_force_host_platform_device_count=8",
            f"--xla_cpu_x=1 --xla_force_host_platform_device_count=2 {IN_ORDER}",
        ),
    ],
)
def test_virtual_devices_replace_a_count_and_keep_other_flags(before: str, after: str) -> None:
    result = pod(
        *("--processes", "1", "--devices-per-process", "2", "--", sys.executable, "-c", TELL),
        XLA_FLAGS=before,
    )
    assert told(result)[0][1]["XLA_FLAGS"] == after


def test_both_streams_keep_apart_and_are_prefixed_line_by_line() -> None:
    code = "import sys; print('one\\ntwo'); print('three', end=''); print('no', file=sys.stderr)"
    result = pod("--processes", "2", "--", sys.executable, "-c", code)
    for index in "01":
        ours = [line for line in result.stdout.splitlines() if line.startswith(f"[{index}]")]
        assert ours == [f"[{index}] one", f"[{index}] two", f"[{index}] three"]
        assert f"[{index}] no" in result.stderr.splitlines()


def test_one_failure_ends_the_others_and_says_which_it_was(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\n"
        f"ready = pathlib.Path({str(tmp_path / 'ready')!r})\n"
        "if sys.argv[-1] == '1':\n"
        "    while len(list(ready.parent.glob('ready*'))) < 2: time.sleep(0.05)\n"
        "    sys.exit(3)\n"
    )
    last_words = SAVES.replace('print("ready"', "ready.with_name('ready' + sys.argv[-1]).touch()#")
    result = pod("--processes", "3", "--", sys.executable, "-c", code + last_words)
    assert result.returncode == 3
    assert "process 1 ended with exit code 3" in result.stderr
    assert "2 processes left, over in at most 60 s" in result.stderr
    assert "[0] saved" in result.stdout  # told to end, not killed
    assert "[2] saved" in result.stdout


def test_a_killed_process_counts_as_128_and_its_signal() -> None:
    code = "import os, sys, time;os.kill(os.getpid(), 9) if sys.argv[-1] == '0' else time.sleep(60)"
    result = pod("--processes", "2", "--", sys.executable, "-c", code)
    assert result.returncode == 128 + 9
    assert "process 0 was ended by SIGKILL" in result.stderr


def test_who_was_lost_is_named_though_another_has_ended_for_it(capsys) -> None:
    module = runpy.run_path(str(SCRIPT))
    noticed = subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])
    lost = subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    noticed.wait()
    lost.wait()
    assert module["supervise"]([noticed, lost], 5.0, []) == 128 + 9
    assert "process 1 was ended by SIGKILL" in capsys.readouterr().err


def test_what_ignores_sigterm_is_killed_when_the_grace_is_over(tmp_path: Path) -> None:
    script = [sys.executable, "-c", STUBBORN, str(tmp_path / "ignored")]
    result = pod("--processes", "2", "--grace", "1", "--", *script)
    assert result.returncode == 3
    assert "killing what is left after 1 s: process 1" in result.stderr


def test_exit_code_75_gives_the_others_time_to_save_without_a_signal() -> None:
    # Process 0 has saved first; process 1 needs longer, and SIGTERM would end it with -15.
    code = (
        "import sys, time;"
        "time.sleep(0 if sys.argv[-1] == '0' else 1);"
        "print('saved', flush=True); sys.exit(75)"
    )
    result = pod("--processes", "2", "--", sys.executable, "-c", code)
    assert result.returncode == 75
    assert "[1] saved" in result.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_to_all_and_all_save(number: signal.Signals) -> None:
    running = start("--processes", "2", "--", sys.executable, "-c", SAVES)
    assert running.stdout is not None
    ready = {running.stdout.readline().strip() for _ in range(2)}
    assert ready == {"[0] ready", "[1] ready"}
    running.send_signal(number)
    out, err = running.communicate(timeout=50)
    assert running.returncode == 75
    assert out.count("saving") == 2
    assert out.count("saved") == 2
    assert f"{number.name}: passed on to 2 processes" in err


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["--processes", "0", "--", "true"], "'0' is not a whole number of at least 1"),
        (["--processes", "2"], "after --"),
        (["--processes", "1", "--", "no-such-program-here"], "no-such-program-here"),
    ],
)
def test_mistakes_are_named_and_end_with_2(arguments: list[str], wrong: str) -> None:
    result = pod(*arguments)
    assert result.returncode == 2
    assert wrong in result.stderr
    assert "Traceback" not in result.stderr
