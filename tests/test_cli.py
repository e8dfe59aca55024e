"""The command and what it starts with; where compiled programs are kept, and where not."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from befm_jax import cli

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import collections
import jax
from befm_jax import cli

seen = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: seen.update([event.split("/")[-1]]))
cli.keep_compiled_programs()
jax.jit(lambda x: x * 3 + 1)(2.0).block_until_ready()
print(seen["cache_hits"])
"""


def hits(**variables):
    """Compiles a program that takes no time to compile; how often a kept one was read instead."""
    given = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT, env=given | {"JAX_PLATFORMS": "cpu", **variables},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(found.stdout)


def kept(directory):
    return len(list(directory.rglob("*-cache")))


def test_programs_are_kept_in_the_users_cache_directory_and_read_back(tmp_path):
    assert hits(XDG_CACHE_HOME=str(tmp_path)) == 0
    assert kept(tmp_path / "befm_jax" / "compiled") > 0
    assert hits(XDG_CACHE_HOME=str(tmp_path)) == kept(tmp_path)


def test_jaxs_own_variables_say_where_and_whether(tmp_path):
    users, named = tmp_path / "users", tmp_path / "named"
    where = {"XDG_CACHE_HOME": str(users), "JAX_COMPILATION_CACHE_DIR": str(named)}
    assert hits(**where, JAX_ENABLE_COMPILATION_CACHE="0") == 0
    assert kept(tmp_path) == 0
    assert hits(**where, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="60") == 0
    assert kept(tmp_path) == 0
    assert hits(**where) == 0
    assert kept(named) > 0
    assert not users.exists()


@pytest.mark.parametrize("named", ["", "cache"])
def test_models_and_programs_are_not_read_from_the_working_directory(named, tmp_path):
    code = (
        "from befm_jax import files; from huggingface_hub import constants; "
        "print(constants.HF_HUB_CACHE, files.user_cache(), sep='\\n')"
    )
    given = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=given | {"XDG_CACHE_HOME": named, "HOME": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for path in found.stdout.splitlines():
        assert path.startswith(f"{tmp_path}/.cache/")


def befm(*arguments):
    return subprocess.run(
        [sys.executable, "-c", "from befm_jax import cli; cli.befm()", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_befm_lists_its_commands_and_runs_them():
    listed = befm("--help").stdout
    for module in cli.COMMANDS:
        assert re.search(rf"^  {module} +[A-Z].*\w", listed, re.MULTILINE)
    assert re.fullmatch(r"befm_jax \d+\.\d+\.\d+\n", befm("--version").stdout)
    unknown = befm("evalute", "--out", "x")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("error: unknown command 'evalute': did you mean 'evaluate'?")
    mistaken = befm("evaluate", "--ot", "x")
    assert mistaken.returncode == 2
    assert mistaken.stderr.startswith("befm evaluate: starting\nerror: Unknown command line flag")
    flags = befm("evaluate", "--help")
    assert (flags.returncode, flags.stderr) == (0, "")
    assert "--participants: simulated participants per game\n    (default: '1000')" in flags.stdout
    assert "--[no]overwrite: " in flags.stdout


def test_the_package_imports_little_and_lists_its_names():
    code = "import sys, befm_jax; print(dir(befm_jax)); sys.exit('jax' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert {"Engine", "load"} <= set(ast.literal_eval(ran.stdout))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs befm_jax[tpu]")
def test_without_a_tpu_its_library_is_silent():
    given = {name: value for name, value in os.environ.items() if name[:4] not in ("JAX_", "TPU_")}
    ran = subprocess.run(
        [sys.executable, "-c", "import befm_jax, jax; print(jax.default_backend())"],
        cwd=ROOT, env=given, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert (ran.stdout == "tpu\n") or (ran.stderr == "")


@pytest.mark.slow
@pytest.mark.parametrize("module", cli.COMMANDS)
def test_an_entry_point_starts_without_pytorch(module):
    """It takes three seconds to import, where it is installed, and nothing here needs it."""
    code = f"import sys, befm_jax.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
