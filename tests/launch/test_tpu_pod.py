"""The TPU launcher: what gcloud is told, word for word, and what follows each end of a run.

The cloud can't be had here.  Its part is played by a recording stand-in for gcloud whose hosts are
directories: the remote commands, tpu_worker.sh and the runs themselves are real processes.
"""

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
POD, WORKER = LAUNCH / "tpu_pod.sh", LAUNCH / "tpu_worker.sh"

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "flock", "setsid", "git"))),
    reason="needs bash, flock, setsid and git, one of which is absent here",
)

TARGET = ["--name", "behave", "--zone", "us-east5-a"]
RUN = ["run", *TARGET, "--type", "v5p-128"]
AWKWARD = ["two words", "it's", '"', "", "$(x) $HOME `x`", "a;b|c&d", "*", "\\n", "new\nline", "é"]

# gcloud, and the pip and uv of the hosts.  `state` is what `list` says next, the last for good.
GCLOUD = """#!{python}
import json, os, pathlib, subprocess, sys
cloud = pathlib.Path(os.environ["CLOUD"])
words = sys.argv[1:]
with (cloud / "calls").open("a") as calls:
    calls.write(json.dumps(words) + "\\n")
verb = words[3]
hosts = sorted((cloud / "hosts").glob("*"))
def flag(name):
    return next(w.split("=", 1)[1] for w in words if w.startswith("--" + name + "="))
if verb == "list":
    states = json.loads((cloud / "states").read_text())
    print(states[0])
    (cloud / "states").write_text(json.dumps(states[1:] or states))
elif verb == "scp":
    for host in hosts:
        (host / words[5].split(":")[1]).write_bytes(pathlib.Path(words[4]).read_bytes())
elif verb == "ssh":
    command = flag("command")
    lost = cloud / "lost"
    if lost.exists() and command.endswith("wait") and int(lost.read_text()):
        lost.write_text(str(int(lost.read_text()) - 1))
        sys.exit(255)
    chosen = hosts if flag("worker") == "all" else hosts[:1]
    failed = 0
    for host in chosen:
        environment = {{**os.environ, "HOME": str(host)}}
        done = subprocess.run(["bash", "-c", command], cwd=host, env=environment)
        failed = failed or done.returncode
    sys.exit(failed)
elif verb == "delete" and (cloud / "undeletable").exists():
    sys.exit(1)
"""


class Cloud:
    """A directory that plays two hosts and the service that lends them."""

    def __init__(self, path: Path, states: list[str]) -> None:
        self.path = path
        for host in ("0", "1"):
            (path / "hosts" / host).mkdir(parents=True)
        (path / "states").write_text(json.dumps(states))
        binaries = path / "bin"
        binaries.mkdir()
        for name, text in (
            ("gcloud", GCLOUD.format(python=sys.executable)),
            ("python3", "#!/bin/sh\nexit 0\n"),
        ):
            (binaries / name).write_text(text)
            (binaries / name).chmod(0o755)
        self.environment = {
            **os.environ,
            "CLOUD": str(path),
            "PATH": f"{binaries}:{os.environ['PATH']}",
        }

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(POD), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
        )

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        running = self.start(*arguments)
        out, err = running.communicate(timeout=120)
        return subprocess.CompletedProcess(arguments, running.returncode, out, err)

    def verbs(self) -> list[str]:
        """What gcloud was asked to do: its verb, for ssh the last word of the remote command."""
        told = []
        for line in (self.path / "calls").read_text().splitlines():
            words = json.loads(line)
            command = words[-1].removeprefix("--command=") if words[3] == "ssh" else ""
            known = ("install", "start", "follow", "wait", "stop", "chmod")
            told.append(next((verb for verb in known if verb in command), words[3]))
        return told

    def host(self, index: int) -> Path:
        return self.path / "hosts" / str(index)


ATTEMPT = ["scp", "install", "start", "follow", "wait"]


def python(code: str) -> list[str]:
    return ["--", sys.executable, "-c", code]


# What a host's process does at its n-th start, n counted on "shared storage" of its own.
def at_each_start(*codes: int) -> str:
    return (
        "import os, pathlib, sys\n"
        "count = pathlib.Path(os.environ['HOME'], 'starts')\n"
        "n = len(count.read_text()) if count.exists() else 0\n"
        "count.write_text('x' * (n + 1))\n"
        "print('start', n, flush=True)\n"
        f"sys.exit({list(codes)}[n])"
    )


def dry(*arguments: str) -> list[list[str]]:
    result = subprocess.run(
        ["bash", str(POD), *arguments], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    # Lines end where their quotes are closed.
    words, whole = [], ""
    for line in result.stdout.splitlines():
        whole += line
        try:
            words.append(shlex.split(whole))
            whole = ""
        except ValueError:
            whole += "\n"
    assert not whole
    return words


def test_a_dry_run_prints_the_commands_as_recorded() -> None:
    lines = dry(*RUN, "--project", "p", "--spot", "--delete", "--dry-run", "--", "python", "-V")
    where = ["--zone=us-east5-a", "--project=p"]
    qr = ["gcloud", "compute", "tpus", "queued-resources"]
    everywhere = ["--node=all", "--worker=all"]
    worker = "bash befm_jax/launch/tpu_worker.sh"
    assert lines[0][:3] == ["bash", "-o", "pipefail"]
    assert lines[0][-3:] == ["pack", str(LAUNCH.parent), "befm_jax.tgz"]
    assert lines[1:] == [
        [*qr, "list", *where, "--filter=name~/behave$", "--format=value(state.state)"],
        [
            *(*qr, "create", "behave", *where, "--node-id=behave", "--accelerator-type=v5p-128"),
            *("--runtime-version=v2-alpha-tpuv5", "--spot"),
        ],
        [*qr, "scp", "befm_jax.tgz", "behave:befm_jax.tgz", *where, *everywhere],
        [
            *(*qr, "ssh", "behave", *where, *everywhere),
            "--command=mkdir -p befm_run && if flock -n befm_run/lock true; then "
            "rm -rf befm_jax befm_environment && mkdir befm_jax && "
            f"tar -xzf befm_jax.tgz -C befm_jax && {worker} install; fi",
        ],
        [*qr, "ssh", "behave", *where, *everywhere, f"--command={worker} start python -V"],
        [*qr, "ssh", "behave", *where, "--node=0", "--worker=0", f"--command={worker} follow"],
        [*qr, "ssh", "behave", *where, *everywhere, f"--command={worker} wait"],
        [*qr, "delete", "behave", *where, "--force", "--quiet"],
    ]


def test_a_dry_run_runs_nothing(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, ["ACTIVE"])
    assert cloud.run(*RUN, "--dry-run", "--", "python").returncode == 0
    assert not (tmp_path / "calls").exists()


def test_every_word_of_the_command_survives_both_shells() -> None:
    lines = dry(*RUN, "--dry-run", "--", "python", *AWKWARD)
    (start,) = [words[-1] for words in lines if "tpu_worker.sh start" in words[-1]]
    assert shlex.split(start.removeprefix("--command="))[3:] == ["python", *AWKWARD]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--type", "v5litepod-256"], ["--runtime-version=v2-alpha-tpuv5-lite"]),
        (["--type", "v6e-64"], ["--runtime-version=v2-alpha-tpuv6e"]),
        (["--type", "v4-128"], ["--runtime-version=tpu-ubuntu2204-base"]),
        (["--runtime", "mine"], ["--runtime-version=mine"]),
        (["--slices", "2"], ["--node-count=2", "--node-prefix=behave"]),
        (["--create", "--reserved", "--create", "--network=n"], ["--reserved", "--network=n"]),
    ],
)
def test_options_of_the_slice_reach_the_request(options: list[str], expected: list[str]) -> None:
    (create,) = [w for w in dry(*RUN, *options, "--dry-run", "--", "x") if "create" in w]
    assert set(expected) <= set(create)
    assert ("--node-id=behave" in create) == ("--slices" not in options)


def test_flags_for_ssh_reach_ssh_and_scp() -> None:
    lines = dry(*RUN, "--ssh", "--tunnel-through-iap", "--dry-run", "--", "x")
    for words in lines[1:]:
        assert ("--tunnel-through-iap" in words) == bool({"ssh", "scp"} & set(words))


@pytest.mark.parametrize(
    ("verb", "last"),
    [
        ("logs", ["--command=bash befm_jax/launch/tpu_worker.sh follow"]),
        ("stop", ["--command=bash befm_jax/launch/tpu_worker.sh stop"]),
        ("status", ["--format=value(state.state)"]),
        ("delete", ["--force", "--quiet"]),
    ],
)
def test_the_other_verbs_are_one_command_each(verb: str, last: list[str]) -> None:
    (words,) = dry(verb, *TARGET, "--dry-run")
    assert words[-len(last) :] == last


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["run", "--zone", "z", "--type", "v5p-8", "--", "x"], "--name: lower-case letters"),
        ([*RUN, "--name", "a b;c", "--", "x"], "not 'a b;c'"),
        (["run", "--name", "a", "--type", "v5p-8", "--", "x"], "--zone is missing"),
        ([*RUN], "give the command to run after --"),
        ([*RUN, "--type", "h100", "--", "x"], "not 'h100'"),
        ([*RUN, "--env-file", "no such file", "--", "x"], "can't read 'no such file'"),
        ([*RUN, "--retries", "many", "--", "x"], "--retries: a whole number, not 'many'"),
        ([*RUN, "python", "-V"], "python: unknown option"),
        ([*RUN, "--zone"], "--zone: unknown option or without its value"),
        (["delete", *TARGET, "--", "x"], "delete takes no command"),
    ],
)
def test_mistakes_are_named_and_end_with_2(arguments: list[str], wrong: str) -> None:
    result = subprocess.run(
        ["bash", str(POD), *arguments], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2
    assert wrong in result.stderr
    assert result.stdout == ""


def test_a_slice_that_is_there_is_used_and_left(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path / "a cloud", ["ACTIVE"])
    secrets = tmp_path / "my env"
    secrets.write_text("TOKEN='a b'\n")
    tell = "import json, os, sys; print(json.dumps([os.environ['TOKEN'], *sys.argv[1:]]))"
    result = cloud.run(
        *(*RUN, "--env-file", str(secrets), *python(tell), *AWKWARD),
    )
    assert result.returncode == 0, result.stderr
    assert cloud.verbs() == ["list", "scp", "install", "scp", "chmod", "start", "follow", "wait"]
    assert json.loads(result.stdout) == ["a b", *AWKWARD]
    assert "still there, and paid for" in result.stderr
    for index in (0, 1):
        host = cloud.host(index)
        assert (host / "befm_jax" / "launch" / "tpu_worker.sh").is_file()
        assert stat.S_IMODE((host / "befm_environment").stat().st_mode) == 0o600
        assert json.loads((host / "befm_run" / "log").read_text()) == ["a b", *AWKWARD]


def test_after_a_preemption_the_slice_is_made_anew_and_the_same_command_run_again(
    tmp_path: Path,
) -> None:
    states = ["", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDING", "SUSPENDED", "", "ACTIVE"]
    cloud = Cloud(tmp_path, states)
    result = cloud.run(
        *(*RUN, "--poll", "0", "--retries", "0", "--delete", *python(at_each_start(75, 0)))
    )
    assert result.returncode == 0, result.stderr
    assert cloud.verbs() == [
        *("list", "create", "list", "list", *ATTEMPT),
        *("list", "list", "delete", "list", "create", "list", *ATTEMPT),
        "delete",
    ]
    assert "start 0" in result.stdout
    assert "start 1" in result.stdout


def test_hosts_that_vanish_with_their_slice_are_no_failure(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, ["ACTIVE", "SUSPENDED", "SUSPENDED", "", "ACTIVE"])
    (tmp_path / "lost").write_text("1")
    result = cloud.run(*(*RUN, "--poll", "0", "--retries", "0", *python(at_each_start(0, 0, 0))))
    assert result.returncode == 0, result.stderr
    assert cloud.verbs() == [
        "list",
        *ATTEMPT,
        "list",
        "list",
        "delete",
        "list",
        "create",
        "list",
        *ATTEMPT,
    ]


def test_hosts_that_can_not_be_reached_count_as_failures(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, ["ACTIVE"])
    (tmp_path / "lost").write_text("9")
    result = cloud.run(*(*RUN, "--poll", "0", "--retries", "1", *python(at_each_start(0, 0, 0))))
    assert result.returncode == 1
    assert cloud.verbs() == ["list", *ATTEMPT, "list", "list", *ATTEMPT, "list"]
    assert "can't be reached" in result.stderr


def test_a_mistake_is_not_tried_again(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, ["ACTIVE"])
    result = cloud.run(*RUN, "--poll", "0", "--delete", *python(at_each_start(2, 0)))
    assert result.returncode == 2
    assert cloud.verbs() == ["list", *ATTEMPT, "delete"]


def test_an_error_is_tried_again_as_often_as_asked_then_handed_on(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, ["ACTIVE"])
    result = cloud.run(*(*RUN, "--poll", "0", "--retries", "1", *python(at_each_start(7, 8, 0))))
    assert result.returncode == 8
    assert cloud.verbs() == ["list", *ATTEMPT] * 2


def test_an_error_on_one_host_outweighs_preempted_processes_on_others(tmp_path: Path) -> None:
    code = "import os, sys; sys.exit(75 if os.environ['HOME'].endswith('0') else 9)"
    cloud = Cloud(tmp_path, ["ACTIVE"])
    result = cloud.run(*RUN, "--poll", "0", "--retries", "0", *python(code))
    assert result.returncode == 9


def test_a_request_that_fails_is_shown_and_counts(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, ["FAILED"])
    (tmp_path / "undeletable").touch()
    result = cloud.run(*RUN, "--poll", "0", "--retries", "1", "--", "x")
    assert result.returncode == 1
    assert cloud.verbs() == ["list", "describe", "delete"] * 2


SAVES = """
import pathlib, signal, sys, time
def save(*_):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
pathlib.Path("ready").touch()
time.sleep(60)
"""


def until(path: Path) -> None:
    """Waits for a file that a process makes."""
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} did not come")


def test_a_run_that_is_stopped_saves_and_is_not_resumed(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, ["ACTIVE"])
    running = cloud.start(*RUN, "--poll", "0", *python(SAVES))
    for index in (0, 1):
        until(cloud.host(index) / "befm_jax" / "ready")
    assert cloud.run("stop", *TARGET).returncode == 0
    out, err = running.communicate(timeout=120)
    assert running.returncode == 75, err
    assert "saved" in out
    assert cloud.verbs().count("start") == 1


def worker(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (home / "befm_jax").mkdir(parents=True, exist_ok=True)
    return subprocess.run(
        ["bash", str(WORKER), *words],
        capture_output=True,
        text=True,
        timeout=90,
        env={**os.environ, "HOME": str(home)},
    )


def test_a_second_start_leaves_the_running_command_alone(tmp_path: Path) -> None:
    worker(tmp_path, "start", sys.executable, "-c", SAVES)
    until(tmp_path / "befm_jax" / "ready")
    assert "already running" in worker(tmp_path, "start", "touch", "second").stdout
    worker(tmp_path, "stop")
    assert worker(tmp_path, "wait").stdout.startswith("exit stopped ")
    assert not (tmp_path / "befm_jax" / "second").exists()


def test_a_command_whose_host_went_down_is_lost(tmp_path: Path) -> None:
    worker(tmp_path, "start", sys.executable, "-c", SAVES)
    until(tmp_path / "befm_jax" / "ready")
    os.killpg(int((tmp_path / "befm_run" / "group").read_text()), 9)
    assert worker(tmp_path, "wait").stdout.startswith("exit lost ")


def test_a_finished_run_is_done_even_if_it_was_to_be_stopped(tmp_path: Path) -> None:
    worker(tmp_path, "start", "true")
    assert worker(tmp_path, "wait").stdout.startswith("exit 0 ")
    assert "nothing is running" in worker(tmp_path, "stop").stdout
    assert worker(tmp_path, "wait").stdout.startswith("exit 0 ")
