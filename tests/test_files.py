"""Directories that are written all or nothing; tables and what spreadsheets leave in them."""

import gzip
import subprocess
import sys

import pytest

from befm_jax import files
from befm_jax.errors import DataError

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


def test_a_table_may_be_in_gzip(tmp_path):
    path = tmp_path / "t.csv.gz"
    path.write_bytes(gzip.compress(b"a,b\n1,2\n"))
    header, rows = files.table(path)
    assert (header, list(rows)) == (["a", "b"], [(2, ["1", "2"])])
    whole = path.read_bytes()
    for damaged in (b"a,b\n1,2\n", whole[:-9], whole[:12] + b"\xff\xff" + whole[14:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"t\.csv\.gz: not a gzip file"):
            files.table(path)
