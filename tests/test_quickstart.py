"""The promise of the README's first screen, run as a newcomer runs it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import golden
import numpy as np

from befm_jax.evals import results

ROOT = Path(__file__).resolve().parents[1]
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


def test_the_quickstart_ends_near_people_it_has_not_seen(tmp_path):
    """Mean Wasserstein at most 2.0, exact and sampled; half a percent outside; under 3 GB."""
    ran = subprocess.run(
        [sys.executable, "-c", WITH_PEAK, "befm_jax.train", "--config", "configs/quickstart.py",
         "--workdir", str(tmp_path)],
        cwd=ROOT, env=os.environ | UNTOUCHED | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    found = results.read(tmp_path / "results.json")
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
    losses = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    taught = [one["loss"] for one in losses if one["phase"] == "base" and "loss" in one]
    np.testing.assert_allclose(taught[:20], stored[:20], rtol=1e-3, err_msg=golden.MEANS["losses"])
    kibibytes = int(re.findall(r"VmHWM:\s+(\d+) kB", ran.stdout)[-1])
    assert kibibytes * 1024 < 3e9
    assert all((tmp_path / name).is_file() for name in ("report.html", "populations.png"))
