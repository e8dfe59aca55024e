"""Runs of two processes that are killed and started again end as one that was left alone.

`pytest tests/test_survival.py --kills 10` kills as often as that; the suite does so twice.
"""

import json
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.pods import losses, pod, start_pod, write_config, write_game_config

COMMAND = ("-m", "befm_jax.train")
# Each process holds a part of what is trained, and writes its own of a checkpoint.
MESH = ("--config.mesh.data=1", "--config.mesh.fsdp=0")


def trained(workdir: Path) -> bytes:
    return (workdir / "adapter" / "adapter_model.safetensors").read_bytes()


def arguments(config, workdir):
    return (*COMMAND, f"--config={config}", f"--workdir={workdir}", *MESH)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("undisturbed")
    # An epoch has 14 steps, with a checkpoint every third: at most 12 go by before the next kill.
    config = write_config(folder, epochs=1 + request.config.getoption("--kills"))
    pod(2, *arguments(config, folder / "run"))
    return config, folder / "run"


def wait_for(running: subprocess.Popen, happens) -> bool:
    """Waits until something happens; False where the run ends before."""
    until = time.monotonic() + 300
    while running.poll() is None:
        if happens():
            return True
        assert time.monotonic() < until, "nothing happened in five minutes"
        time.sleep(0.002)
    return False


def logged(workdir: Path) -> int:
    """The last step in the log; 0 where there is none."""
    path = workdir / "metrics.jsonl"
    steps = re.findall(r'"step": (\d+), "loss"', path.read_text()) if path.is_file() else []
    return int(steps[-1]) if steps else 0


def workers(running: subprocess.Popen) -> list[int]:
    """The processes of a pod that are alive."""
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    return [int(child) for child in children]


def test_killed_at_random_moments_it_ends_as_if_nothing_had_happened(
    tmp_path, undisturbed, request
):
    config, expected = undisturbed
    kills = request.config.getoption("--kills")
    draw = random.Random(11)
    checkpoints = tmp_path / "checkpoints" / "tune"
    happened = []
    for number in range(kills):
        running = start_pod(2, "--grace=20", *arguments(config, tmp_path))
        while_saving = number % 2 == 1
        from_here = logged(tmp_path) + draw.randrange(2, 12)

        def due(while_saving=while_saving, from_here=from_here):
            saving = any(checkpoints.glob("*.orbax-checkpoint-tmp*"))
            return logged(tmp_path) >= from_here and (saving or not while_saving)

        assert wait_for(running, due), running.communicate()
        time.sleep(0 if while_saving else draw.random() * 0.2)
        victim = draw.randrange(2)
        subprocess.run(["kill", "-KILL", str(workers(running)[victim])], check=True)
        _, err = running.communicate(timeout=120)
        assert running.returncode != 0
        assert f"process {victim} was ended by SIGKILL" in err
        happened.append((logged(tmp_path), "saving" if while_saving else "a step", victim))
    ran = pod(2, *arguments(config, tmp_path))
    print("killed after steps", happened)
    assert "tune: going on from the checkpoint of step" in ran.stdout
    assert losses(tmp_path) == losses(expected)
    assert sorted(losses(tmp_path)) == list(range(1, len(losses(expected)) + 1))
    assert trained(tmp_path) == trained(expected)


def test_killed_outside_of_tuning_it_ends_as_if_nothing_had_happened(tmp_path, request):
    """With a game, its report, every parameter trained and the best checkpoint taken."""
    config = write_game_config(tmp_path)
    command = (*COMMAND, f"--config={config}", *MESH)
    pod(2, *command, f"--workdir={tmp_path / 'undisturbed'}")
    workdir = tmp_path / "disturbed"
    moments = {
        "the base is taught": lambda: logged(workdir) >= 5,
        "the base is written": lambda: any(workdir.glob("base/.writing-*")),
        "the tuned model is written": lambda: any(workdir.glob("tuned/.writing-*")),
    }
    if request.config.getoption("--kills") < len(moments):
        del moments["the base is written"]
    for victim, (moment, happens) in enumerate(moments.items()):
        running = start_pod(2, "--grace=20", *command, f"--workdir={workdir}")
        assert wait_for(running, happens), (moment, running.communicate())
        subprocess.run(["kill", "-KILL", str(workers(running)[victim % 2])], check=True)
        running.communicate(timeout=120)
        assert running.returncode != 0, moment
    pod(2, *command, f"--workdir={workdir}")
    for model in ("base", "tuned"):
        assert not list((workdir / model).glob(".writing-*"))
        one, other = (
            (folder / model / "model.safetensors").read_bytes()
            for folder in (workdir, tmp_path / "undisturbed")
        )
        assert one == other
    one, other = (
        json.loads((folder / "results.json").read_text())
        for folder in (workdir, tmp_path / "undisturbed")
    )
    assert one["figures"] == other["figures"]
    assert (workdir / "report.html").is_file()


def test_after_sigterm_no_step_is_lost_in_as_many_processes_or_in_one(tmp_path, undisturbed):
    config, expected = undisturbed
    workdir = tmp_path / "run"
    running = start_pod(2, *arguments(config, workdir))
    assert wait_for(running, lambda: logged(workdir) >= 5)
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=120)
    assert running.returncode == 75, out + err
    saved = max(int(path.name) for path in (workdir / "checkpoints" / "tune").iterdir())
    assert saved == logged(workdir) >= 5
    assert f"tune: saved at step {saved}" in err
    copied = shutil.copytree(workdir, tmp_path / "copied")
    for processes, folder in ((2, workdir), (1, copied)):
        ran = pod(processes, *arguments(config, folder))
        assert f"tune: going on from the checkpoint of step {saved}" in ran.stdout
    assert losses(workdir) == losses(expected)
    assert trained(workdir) == trained(expected)
    assert losses(copied) == pytest.approx(losses(expected), rel=1e-5)
