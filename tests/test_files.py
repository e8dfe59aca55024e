"""Directories that are written all or nothing."""

import subprocess
import sys

from befm_jax import files

WRITE_AND_WAIT = """
import sys
from pathlib import Path
from befm_jax import files
with files.atomic_directory(Path(sys.argv[1])) as folder:
    (folder / "config.json").write_text("{}")
    print("writing", flush=True)
    sys.stdin.read()
"""


def folders(directory):
    return [path.name for path in directory.iterdir() if path.name.startswith(".writing-")]


def test_what_a_killed_writer_left_is_removed_by_the_next_and_a_living_ones_work_is_not(tmp_path):
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITE_AND_WAIT, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout.readline() == "writing\n"
    [its_own] = folders(tmp_path)
    with files.atomic_directory(tmp_path) as folder:
        (folder / "notes.txt").write_text("kept")
    assert folders(tmp_path) == [its_own]
    writer.kill()
    writer.wait()
    assert folders(tmp_path) == [its_own]
    with files.atomic_directory(tmp_path) as folder:
        (folder / "config.json").write_text("{}")
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".re")) == [
        "config.json",
        "notes.txt",
    ]
