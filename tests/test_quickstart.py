"""The promise of the README's first screen, run as a newcomer runs it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
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


def test_the_quickstart_ends_near_people_it_has_not_seen(tmp_path):
    """Mean Wasserstein at most 2.0, exact and sampled; half a percent outside; under 3 GB."""
    ran = subprocess.run(
        [sys.executable, "-c", WITH_PEAK, "befm_jax.train", "--config", "configs/quickstart.py",
         "--workdir", str(tmp_path)],
        cwd=ROOT, env=os.environ | {"XLA_FLAGS": "", "XDG_CACHE_HOME": str(tmp_path / "cache")},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())

    def task(which):
        return results[which]["tasks"]["game_behavior"]

    assert task("base")["metrics"]["wasserstein"]["value"] > 8
    for which in ("tuned", "tuned_sampled"):
        assert len(task(which)["groups"]) == 7
        assert task(which)["metrics"]["wasserstein"]["value"] <= 2.0
        assert task(which)["outside_mass"]["value"] <= 0.005
        assert task(which)["ends_after_answer"]["min"] >= 0.99
    assert task("tuned")["outside_mass"]["max"] <= 0.005
    kibibytes = int(re.findall(r"VmHWM:\s+(\d+) kB", ran.stdout)[-1])
    assert kibibytes * 1024 < 3e9
    assert all((tmp_path / name).is_file() for name in ("report.html", "games.png"))
