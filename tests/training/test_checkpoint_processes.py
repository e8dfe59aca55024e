"""Checkpoints of a run of two real processes, and from one number of processes to another."""

import re
import subprocess
import sys
from pathlib import Path

from befm_jax import checksums
from befm_jax.training.checkpoint import Checkpoints
from tests.helpers.checkpoint_states import abstract, check, mesh_of, state

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent / "helpers" / "checkpoint_states.py"
POD = HERE.parents[1] / "launch" / "local_pod.py"


def two_processes(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes of four devices each, over one mesh of eight."""
    return subprocess.run(
        [
            *(sys.executable, str(POD), "--processes", "2", "--devices-per-process", "4"),
            *(
                "--grace",
                "5",
                "--",
                sys.executable,
                str(HERE.parent / "helpers" / "checkpoint_states.py"),
            ),
            *("--directory", str(directory), *arguments),
        ],
        capture_output=True,
        text=True,
        timeout=180,
    )


def test_from_one_process_to_two_and_back(tmp_path, capsys):
    """From one device to eight on two processes, past a damaged one, to one process of eight."""
    run = tmp_path / "run"
    saved = Checkpoints(run, keep=2)
    for step in (10, 20):
        saved.save(step, state(step, mesh_of(1, 1, 1)), loss=float(step))
    saved.close()
    (run / "20" / checksums.FILE).write_text("{")

    result = two_processes(run, "--expect", "10", "--save", "20", "30", "40")
    assert result.returncode == 0, result.stderr
    for index in (0, 1):
        assert f"[{index}] last 40 best 20" in result.stdout.splitlines()
    warning = f"[0] warning: {run / '20'}: this checkpoint is damaged ({checksums.FILE} is not as"
    assert result.stderr.count("warning: ") == 1
    assert warning in result.stderr
    assert sorted(path.name for path in run.iterdir()) == ["20", "20.damaged", "30", "40", "next"]

    for directory in (run, run / "next"):
        again = Checkpoints(directory, keep=2, best=True)
        assert again.last == 40
        check(again.restore(abstract(mesh_of(1, 8, 1))), 40, mesh_of(1, 8, 1))
    assert capsys.readouterr().err == ""


def test_a_folder_that_not_all_processes_see_is_an_error_on_all(tmp_path):
    saved = Checkpoints(tmp_path / "run", keep=1)
    saved.save(5, state(5, mesh_of(1, 1, 1)))
    saved.close()
    result = two_processes(tmp_path / "run", "--expect", "5", "--elsewhere")
    assert result.returncode == 2
    # Each names its own folder, unless it ends before because the other one was first.
    assert re.search(
        r"error: .*(run/5: damaged as process 1 sees it|"
        r"elsewhere/5: damaged as process 1 sees it \(SUMS\.json is missing\))",
        result.stderr,
    )
    for index in (0, 1):
        assert re.search(rf"^\[{index}\] (error: |process . of 2 failed)", result.stderr, re.M)
