"""The Slurm script: its directives, its dry run, and what follows each end of a run.

Stand-ins for srun and scontrol record their words; the run itself is a real process.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "slurm_gpu.sbatch"
AWKWARD = ["two words", "it's", '"', "", "$(x) $HOME `x`", "a;b|c&d", "*", "\\n", "é"]
SRUN = '#!/bin/sh\necho "srun" >>"{log}"\nshift 2\nexec "$@"\n'
SCONTROL = '#!/bin/sh\necho "scontrol $*" >>"{log}"\n'


def start(path: Path, *command: str, **variables: str) -> subprocess.Popen[str]:
    """The script as Slurm runs it, in job 7."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (path / name).write_text(text.format(log=path / "calls"))
        (path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        **variables,
    }
    return subprocess.Popen(
        ["bash", str(SCRIPT), *command],
        cwd=path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def run(path: Path, *command: str, **variables: str) -> tuple[int, list[str], str]:
    """Exit code, what was called, and stderr."""
    running = start(path, *command, **variables)
    _, err = running.communicate(timeout=60)
    return running.returncode, (path / "calls").read_text().splitlines(), err


def ending_with(*codes: int) -> list[str]:
    """A command whose n-th run ends with the n-th code."""
    code = (
        "import pathlib, sys; count = pathlib.Path('runs'); count.touch();"
        "n = len(count.read_text()); count.write_text('x' * (n + 1));"
        f"sys.exit({list(codes)}[n])"
    )
    return [sys.executable, "-c", code]


def test_slurm_is_asked_for_what_the_comments_say() -> None:
    lines = SCRIPT.read_text().splitlines()
    directives = [line.split()[1] for line in lines if line.startswith("#SBATCH ")]
    # Directives count only before the first command.
    assert lines[1 : 1 + len(directives)] == [f"#SBATCH {each}" for each in directives]
    # One process for each GPU, all GPUs of the node visible: how jax.distributed counts on Slurm.
    assert "--ntasks-per-node=8" in directives
    assert "--gpus-per-node=8" in directives
    # Without B: the signal goes to the processes.
    assert "--signal=TERM@300" in directives
    assert {"--requeue", "--open-mode=append"} <= set(directives)


def test_a_dry_run_prints_the_commands_with_every_word_whole() -> None:
    result = subprocess.run(
        ["bash", str(SCRIPT), "--dry-run", "--", "python", *AWKWARD],
        capture_output=True,
        text=True,
        timeout=60,
        env={k: v for k, v in os.environ.items() if not k.startswith("SLURM")},
    )
    assert result.returncode == 0, result.stderr
    run_line, requeue_line = result.stdout.splitlines()
    assert shlex.split(run_line) == [
        *("srun", "--kill-on-bad-exit=0", "--wait=600", "python", *AWKWARD),
    ]
    assert requeue_line == "scontrol requeue JOB"


def test_words_reach_the_processes_whole(tmp_path: Path) -> None:
    code = f"import sys; sys.exit(0 if sys.argv[1:] == {AWKWARD!r} else 9)"
    assert run(tmp_path, sys.executable, "-c", code, *AWKWARD)[:2] == (0, ["srun"])


@pytest.mark.parametrize(
    ("codes", "code", "calls"),
    [
        ([0], 0, ["srun"]),
        ([2], 2, ["srun"]),
        ([75], 75, ["srun", "scontrol requeue 7"]),
        ([1, 0], 0, ["srun"] * 2),
        ([1, 137, 75], 75, ["srun"] * 3 + ["scontrol requeue 7"]),
        ([134, 137, 1, 134, 0], 0, ["srun"] * 5),
        ([*[1] * 10, 4, 0], 4, ["srun"] * 11),
    ],
    ids=["done", "mistake", "saved", "error then done", "errors then saved", "lost", "errors"],
)
def test_each_end_is_met_as_the_exit_codes_promise(
    tmp_path: Path, codes: list[int], code: int, calls: list[str]
) -> None:
    assert run(tmp_path, *ending_with(*codes))[:2] == (code, calls)


def test_retries_can_be_chosen(tmp_path: Path) -> None:
    assert run(tmp_path, *ending_with(1, 1), RETRIES="0")[:2] == (1, ["srun"])


def test_a_job_that_was_requeued_often_enough_stays_out_of_the_queue(tmp_path: Path) -> None:
    code, calls, err = run(tmp_path, *ending_with(75), REQUEUES="5", SLURM_RESTART_COUNT="5")
    assert (code, calls) == (75, ["srun"])
    assert "requeued 5 times" in err


def test_a_cancelled_job_does_not_come_back(tmp_path: Path) -> None:
    # Slurm tells the processes and, where it ends the job itself, this shell too.
    code = (
        "import pathlib, signal, sys, time;"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75));"
        "pathlib.Path('ready').write_text(str(__import__('os').getpid())); time.sleep(60)"
    )
    running = start(tmp_path, sys.executable, "-c", code)
    ready = tmp_path / "ready"
    while not (ready.exists() and ready.read_text()):
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    os.kill(int(ready.read_text()), signal.SIGTERM)
    running.communicate(timeout=60)
    assert running.returncode == 75
    assert (tmp_path / "calls").read_text().splitlines() == ["srun"]


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [([], "give the command to run"), (["true"], "no Slurm job here")],
)
def test_mistakes_are_named_and_end_with_2(arguments: list[str], wrong: str) -> None:
    result = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={k: v for k, v in os.environ.items() if not k.startswith("SLURM")},
    )
    assert result.returncode == 2
    assert wrong in result.stderr
