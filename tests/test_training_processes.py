"""The same run in one, two and four real processes."""

import json
from collections import Counter

import pytest

from tests.helpers.pods import losses, pod, start_pod, write_config
from tests.helpers.small import real_paths


def tokens_read():
    """Every observation of `real_paths`, by the tokens that are learnt."""
    wanted = Counter()
    for one in real_paths(observations=200):
        for start, stop in one.learnt:
            for token in one.ids[start:stop]:
                wanted[token] += round(one.observations)
    return wanted


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_read_every_example_exactly_once_an_epoch(tmp_path, processes):
    pod(processes, "-m", "tests.helpers.pod_rows", str(tmp_path))
    read = [json.loads((tmp_path / f"{index}.json").read_text()) for index in range(processes)]
    found = Counter()
    for mine in read:
        for _, token, observations in mine:
            found[token] += round(observations)
    assert found == tokens_read()
    assert {step for mine in read for step, *_ in mine} == set(range(4))
    # Everyone is handed a part of it, and nobody all of it.
    shares = [sum(observations for *_, observations in mine) for mine in read]
    assert min(shares) > 0
    assert max(shares) < found.total()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    config = write_config(folder)
    pod(1, "-m", "befm_jax.train", f"--config={config}", f"--workdir={folder / 'run'}")
    return config, losses(folder / "run")


@pytest.mark.parametrize(
    ("processes", "mesh"),
    [
        (2, ()),
        (2, ("--config.mesh.data=1", "--config.mesh.tensor=2")),
        (4, ("--config.mesh.data=2", "--config.mesh.fsdp=2")),
    ],
)
def test_losses_do_not_depend_on_the_number_of_processes(tmp_path, alone, processes, mesh):
    config, expected = alone
    ran = pod(
        processes, "-m", "befm_jax.train", f"--config={config}", f"--workdir={tmp_path}", *mesh
    )
    assert f"{processes} devices of {processes} processes" in ran.stdout
    assert len(expected) > 8
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-5)
    # Only the first process says anything; the transport does by itself.
    said = [line for line in ran.stdout.splitlines() if "[Gloo]" not in line]
    assert said
    assert all(line.startswith("[0]") for line in said)


def test_a_process_that_was_started_with_another_config_is_refused(tmp_path):
    config = write_config(tmp_path)
    # Each process adds its own number to the seed.
    script = tmp_path / "train.py"
    script.write_text(
        "import runpy, sys\n"
        "sys.argv.append('--config.seed=' + sys.argv[sys.argv.index('--process_id') + 1])\n"
        "runpy.run_module('befm_jax.train', run_name='__main__', alter_sys=True)\n"
    )
    running = start_pod(2, str(script), f"--config={config}", f"--workdir={tmp_path / 'run'}")
    _, err = running.communicate(timeout=300)
    assert running.returncode == 2
    assert "holds a run of another config: seed was 0, now 1" in err
