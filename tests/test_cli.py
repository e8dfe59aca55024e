"""What an entry point starts with; where compiled programs are kept, read back and not kept."""

import os
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
        "from befm_jax import cli; from huggingface_hub import constants; "
        "print(constants.HF_HUB_CACHE, cli._users_cache(), sep='\\n')"
    )
    given = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=given | {"XDG_CACHE_HOME": named, "HOME": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    for path in found.stdout.splitlines():
        assert path.startswith(f"{tmp_path}/.cache/")


def test_programs_are_kept_in_the_home_where_no_cache_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    directory = cli._users_cache()
    assert directory == tmp_path / "home" / ".cache" / "befm_jax" / "compiled"
    assert directory.stat().st_mode & 0o777 == 0o700
    # An older version's, which others may read.
    directory.chmod(0o755)
    assert cli._users_cache().stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("home", ["", "relative", None])
def test_without_a_home_no_program_is_kept_and_nothing_comes_into_the_working_directory(
    home, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    if home is not None:
        monkeypatch.setenv("HOME", home)
    assert cli._users_cache() is None
    assert list(tmp_path.iterdir()) == []


def test_programs_of_another_user_are_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "befm_jax").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert cli._users_cache() is None


@pytest.mark.parametrize("module", ["train", "simulate", "evaluate", "plan"])
def test_an_entry_point_starts_without_pytorch(module):
    """It takes three seconds to import, where it is installed, and nothing here needs it."""
    code = f"import sys, befm_jax.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
