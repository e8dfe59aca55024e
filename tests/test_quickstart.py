"""The commands of README and docs, run as a newcomer runs them, and what the first one promises."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import golden
import numpy as np
import pytest

from befm_jax import config
from befm_jax.evals import results

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs" / "examples"
PAGES = ("README.md", "docs/tasks.md", "docs/elsewhere.md")
# Further options of `train`: a run that comes to its end in half a minute.
SHORT = (
    "--config.optimizer.epochs=2", "--config.model.scratch.steps=20",
    "--config.model.scratch.width=32", "--config.model.scratch.layers=1",
    "--config.evaluation.participants=50", "--config.evaluation.resamples=100",
    "--config.evaluation.people=5",
)  # fmt: skip
# What the suite sets for its own programs, as a newcomer has it.
UNTOUCHED = {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
# Runs a module, and says how much memory that took.  What a parent learns from the system of its
# children's memory counts the parent's own, as it was when they were forked.
WITH_PEAK = """
import runpy, sys
del sys.argv[0]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    print(open("/proc/self/status").read())
"""


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    """A folder in which the first command has run; its run, and what it printed."""
    folder = tmp_path_factory.mktemp("newcomer")
    for path in EXAMPLES.iterdir():
        shutil.copy(path, folder)
    ran = subprocess.run(
        [sys.executable, "-c", WITH_PEAK, "befm_jax.train", "--config", "quickstart"],
        cwd=folder, env=environment(folder), check=True, capture_output=True, text=True,
    )  # fmt: skip
    return folder / "runs" / "quickstart", ran.stdout


def environment(folder):
    return os.environ | UNTOUCHED | {
        "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT),
    }  # fmt: skip


def quickly(folder):
    """As the suite's own programs: quickly compiled is what counts, after the first command."""
    return environment(folder) | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def test_the_quickstart_ends_near_people_it_has_not_seen(newcomer):
    """Mean Wasserstein at most 2.0, exact and sampled; half a percent outside; under 3 GB."""
    run, printed = newcomer
    found = results.read(run / "results.json")
    assert found.figure("games", "wasserstein", "base").value > 8
    for which in ("tuned", "tuned, sampled"):
        whole, *by_game = found.select("games", "wasserstein", which)
        assert len(by_game) == 7
        assert whole.value <= 2.0
        assert whole.outside <= 0.005
        assert min(one.ends_after_answer for one in by_game) >= 0.99
        if which == "tuned":
            assert max(one.outside for one in by_game) <= 0.005
    stored = golden.read("losses")["base"]
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    taught = [one["loss"] for one in losses if one["phase"] == "base" and "loss" in one]
    np.testing.assert_allclose(taught[:20], stored[:20], rtol=1e-3, err_msg=golden.MEANS["losses"])
    kibibytes = int(re.findall(r"VmHWM:\s+(\d+) kB", printed)[-1])
    assert kibibytes * 1024 < 3e9
    assert all((run / name).is_file() for name in ("report.html", "populations.png"))


def commands(page):
    """The lines of a page's shell blocks that call the command, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("befm ")]


def test_every_documented_command_runs_in_order(newcomer):
    """Those of README, tasks and elsewhere that need no hub; runs after the first are short."""
    run, _ = newcomer
    folder = run.parents[1]
    asked = [line for page in PAGES for line in commands(page)]
    assert asked[0] == "befm train --config quickstart"
    done = 0
    for line in asked[1:]:
        if "meta-llama" in line:
            continue
        module, *arguments = shlex.split(line)[1:]
        short = SHORT if module == "train" else ("--resamples=100",) * (module == "evaluate")
        ran = subprocess.run(
            [sys.executable, "-m", f"befm_jax.{module}", *arguments, *short],
            cwd=folder, env=quickly(folder), check=False, capture_output=True, text=True,
        )  # fmt: skip
        assert ran.returncode == 0, f"{line}\n{ran.stdout}\n{ran.stderr}"
        done += 1
    assert done >= 10
    assert "commute" in results.read(folder / "runs" / "commute" / "results.json").tasks
    assert "survey/next" in results.read(folder / "people" / "results.json").tasks
    assert (folder / "merged" / "README.md").is_file()


def documented():
    """Every documented call of a command of ours: the page, the command, its arguments."""
    called = re.compile(r"(?:python -m befm_jax\.|\bbefm |python (?=launch/))([\w./]+) (.*)")
    for page in (ROOT / "README.md", ROOT / "launch" / "README.md", *(ROOT / "docs").glob("*.md")):
        blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        lines = [line.split("  #")[0] for line in "".join(blocks).replace("\\\n", " ").splitlines()]
        for line in lines:
            if "configs/NAME.py" in line:
                continue
            # A launcher's command comes after its own arguments.
            for part in line.split(" -- "):
                if match := called.search(part.split(" > ")[0]):
                    yield page.name, match[1], shlex.split(match[2])


def test_every_documented_option_and_config_field_is_there():
    """Also of commands that need a hub, a cloud or an accelerator, and can't be run here."""
    helps, unknown, calls = {}, [], 0
    for page, command, arguments in documented():
        if command == "lm_harness":  # its options are lm-eval's
            continue
        program = [command] if command.startswith("launch/") else ["-m", f"befm_jax.{command}"]
        # A launcher that has commands of its own takes one first.
        program += [] if arguments[0].startswith("-") else arguments[:1]
        if tuple(program) not in helps:
            helps[tuple(program)] = subprocess.run(
                [sys.executable, *program, "--help"], cwd=ROOT, check=False,
                capture_output=True, text=True,
            ).stdout  # fmt: skip
        config.check_arguments(arguments)
        options = [one.partition("=")[0] for one in arguments if one.startswith("--")]
        unknown += [
            (page, command, option)
            for option in options
            if not option.startswith("--config")
            and not re.search(rf"--(\[no\])?{option[2:]}\b", helps[tuple(program)])
        ]
        calls += 1
    assert calls > 20
    assert unknown == []
