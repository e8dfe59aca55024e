"""Directories that are written all or nothing; tables and what spreadsheets leave in them."""

import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from befm_jax import files
from befm_jax.errors import DataError, UserError

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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "notes.txt"]


def test_old_files_that_a_killed_writer_had_moved_are_kept(tmp_path):
    (tmp_path / ".replaced-a").mkdir()
    (tmp_path / ".replaced-b").mkdir()
    (tmp_path / ".replaced-b" / "config.json").write_text("{}")
    with files.atomic_directory(tmp_path) as folder:
        (folder / "notes.txt").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".replaced-b", "notes.txt"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_every_file_of_a_directory_follows_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        with files.atomic_directory(tmp_path) as folder:
            save_file({"x": np.zeros(3)}, folder / "model.safetensors")  # 0600 by itself
            (folder / "more").mkdir()
            (folder / "more" / "template").write_text("x")
    finally:
        os.umask(before)
    for name in ("model.safetensors", "more/template"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask
    assert list((tmp_path / "more").iterdir()) == [tmp_path / "more" / "template"]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "{", "[1,]"])
def test_a_json_text_that_can_not_be_read_is_an_error_of_its_file(tmp_path, text):
    with pytest.raises(ValueError, match=r"line 1|nested too deeply"):
        files.parse_json(text)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json: not valid JSON"):
        files.read_object(tmp_path / "x.json")


def read(text):
    header, rows = files.read_table(text, "t.csv")
    return header, list(rows)


@pytest.mark.parametrize(
    "text",
    [
        "a,b\n1,2\n\n3,4\n",
        "a,b,,\r\n1,2,,\r\n\r\n3,4,,\r\n",
        "a,b, \n1,2, \n\n3,4\n",
        "sep=,\na,b\n1,2\n3,4\n",
        "sep=;\r\na;b;;\r\n1;2;;\r\n3;4;;\r\n",
        "sep=\t\na\tb\n1\t2\n3\t4\n",
    ],
)
def test_what_excel_leaves_in_a_table_is_understood(text):
    header, rows = read(text)
    assert header == ["a", "b"]
    assert [cells for _, cells in rows] == [["1", "2"], ["3", "4"]]
    # The numbers are those of the lines of the file.
    lines = text.splitlines()
    assert [lines[line - 1][0] for line, _ in rows] == ["1", "3"]


def test_a_cell_in_a_column_without_a_name_is_kept():
    _, rows = read("a,b,,\n1,2,,x\n1,2,,,\n1\n")
    assert [cells for _, cells in rows] == [["1", "2", "", "x"], ["1", "2", "", "", ""], ["1"]]


def test_an_error_names_the_line_of_the_header():
    with pytest.raises(DataError, match=r"t\.csv:2: column named twice: 'a'"):
        read("sep=,\na,a\n")
    with pytest.raises(DataError, match=r"t\.csv:1: no header"):
        read(",,\n1,2,3\n")


def test_records_are_cells_by_column(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("b, a ,c\n 1 ,2,3\n")
    assert list(files.records(path, ("a", "b"))) == [(2, {"a": "2", "b": "1", "c": "3"})]
    with pytest.raises(DataError, match=r"t\.csv:1: no column 'd', 'e'; found 'b', 'a', 'c'"):
        next(files.records(path, ("a", "d", "e")))
