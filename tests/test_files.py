"""Directories that are written all or nothing; tables and what spreadsheets leave in them; JSON."""

import io
import random
import subprocess
import sys
import zipfile

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
        "a;b\r\n1;2\r\n3;4\r\n",
        "a|b\n1|2\n3|4\n",
        "\na\tb\n1\t2\n3\t4\n",
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


def test_records_have_the_names_that_are_asked_for_whatever_the_case(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("GAME,Choice,choice\nbomb,3,4\n")
    records = files.records(path, ("game", "choice"))
    assert list(records) == [(2, {"game": "bomb", "Choice": "3", "choice": "4"})]
    with pytest.raises(DataError, match="no column 'CHOICE'; found 'game', 'Choice', 'choice'"):
        list(files.records(path, ("game", "CHOICE")))


def test_a_very_wide_header_is_read_in_a_moment_and_named_in_short(tmp_path):
    # With a look through the whole list for each name it would take minutes.
    names = [f"column {number}" for number in range(100_000)]
    header, _ = read(",".join(names))
    assert header == names
    with pytest.raises(DataError, match="column named twice: 'column 0'"):
        read(",".join([*names, "column 0"]))
    path = tmp_path / "wide.csv"
    path.write_text(",".join(names))
    with pytest.raises(DataError, match=r"found 'column 0', .*100,000 in all") as caught:
        list(files.records(path, ("game",)))
    assert len(str(caught.value)) < 1000


def a_spreadsheet():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b"\xef\xbb\xbf\n", "the file is empty"),
        (a_spreadsheet(), "a spreadsheet .* export it as CSV"),
        (bytes.fromhex("d0cf11e0a1b11ae1"), "an old spreadsheet"),
        (b"\x1f\x8b\x08\x00", "gzip; decompress it"),
        (b"PAR1\x15\x04", "Parquet; give its name the suffix"),
        ("a,b\n1,2\n".encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        ("a,b\n1,2\n".encode("utf-16-le"), "t.csv:1: holds NUL bytes"),
        ("a,b\n1,\u00e9\n".encode("latin-1"), r"t.csv:2: not UTF-8 text \(byte 0xe9\); save it as"),
    ],
)
def test_what_is_no_text_is_refused_with_what_to_do(tmp_path, content, says):
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        files.table(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' * 100_000, "not valid JSON"),
        (b"9" * 5000, "not valid JSON"),
        (b"[1]", "holds a list; it must be a JSON object"),
    ],
)
def test_a_damaged_json_object_is_named_by_its_file(tmp_path, content, says):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"a.json: {says}"):
        files.read_object(path, DataError)
    with pytest.raises(DataError, match="cannot be read"):
        files.read_object(tmp_path, DataError)


def test_a_damaged_parquet_file_is_read_or_refused_in_a_line(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra 'tables'")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    columns = {" game": [b"bomb", b"dictator"], "choice": [5.0, None]}
    parquet.write_table(pyarrow.table(columns), path)
    header, rows = files.table(path)
    assert (header, list(rows)) == (
        ["game", "choice"],
        [(1, ["bomb", "5.0"]), (2, ["dictator", ""])],
    )
    content, refusals = path.read_bytes(), []
    for seed in range(100):
        rng = random.Random(seed)
        place = rng.randrange(len(content))
        path.write_bytes(content[:place] + rng.randbytes(1) + content[place + 1 :])
        try:
            list(files.table(path)[1])
        except DataError as error:
            refusals.append(str(error))
    assert refusals
    assert [line for line in refusals if not line.startswith(f"{path}: ") or "\n" in line] == []
    parquet.write_table(pyarrow.table({}), path)
    with pytest.raises(DataError, match="no header"):
        files.table(path)
