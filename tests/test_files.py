"""Files written all or nothing, locks; tables and what spreadsheets leave in them; JSON."""

import errno
import fcntl
import gzip
import io
import os
import random
import resource
import socket
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from befm_jax import files
from befm_jax.errors import DataError, InUseError, UserError

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


HOLD = """
import sys
from pathlib import Path
from befm_jax import files
with files.in_use(Path(sys.argv[1]), "the run"):
    print("holds", flush=True)
    sys.stdin.read()
"""


def holder(lock):
    """A process that holds the lock until its standard input is closed, or it is killed."""
    running = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert running.stdout.readline() == "holds\n"
    return running


def test_a_lock_says_who_has_it_and_is_let_go_by_the_kernel(tmp_path):
    lock = tmp_path / "run" / ".lock"
    first = holder(lock)
    who = rf"the run is in use by process {first.pid} on {socket.gethostname()} since 20\d\d-"
    with pytest.raises(InUseError, match=who), files.in_use(lock, "the run"):
        pass
    first.kill()
    first.wait()
    assert lock.exists()  # nobody's
    second = holder(lock)
    with pytest.raises(InUseError, match=f"process {second.pid} "), files.in_use(lock, "the run"):
        pass
    second.communicate("")
    assert not lock.exists()
    with files.in_use(lock, "the run"):
        pass
    with files.in_use(tmp_path / "new" / ".lock", "another"):
        pass
    assert not (tmp_path / "new").exists()


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, capsys):
    def unsupported(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with files.in_use(tmp_path / ".lock", "the run"):
        assert capsys.readouterr().err == "warning: the run: not locked (No locks available)\n"


def test_a_full_disk_is_one_line_that_names_the_file_and_the_old_one_stays(tmp_path):
    path = tmp_path / "figures.csv"
    path.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(
            files.NotWrittenError, match=r"figures\.csv: can't be written \(File too"
        ):
            files.write(path, b"x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_cache_is_in_the_home_where_none_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    directory = files.user_cache()
    assert directory == tmp_path / "home" / ".cache" / "befm_jax"
    assert directory.stat().st_mode & 0o777 == 0o700
    # An older version's, which others may read.
    directory.chmod(0o755)
    assert files.user_cache().stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("home", ["", "relative", None])
def test_without_a_home_there_is_no_cache_and_nothing_comes_into_the_working_directory(
    home, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    if home is not None:
        monkeypatch.setenv("HOME", home)
    assert files.user_cache() is None
    assert list(tmp_path.iterdir()) == []


def test_a_cache_of_another_user_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "befm_jax").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert files.user_cache() is None


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
        (b"\x1f\x8b\x08\x00", "gzip; .* decompress it"),
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


def test_rows_without_a_header_are_all_there(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('a,a\n\n"two\nlines",2\n3\n')
    assert list(files.csv_rows(path)) == [
        (1, ["a", "a"]), (3, ["two\nlines", "2"]), (5, ["3"]),
    ]  # fmt: skip


def test_lines_of_json_are_objects(tmp_path):
    path = tmp_path / "t.jsonl"
    # U+2028 ends a line elsewhere; a pair of halves is one character.
    path.write_bytes(b'\xef\xbb\xbf{"a": "1\xe2\x80\xa8"}\r\n\r\n{"a": "\\ud83d\\ude00"}\n')
    assert list(files.json_records(path)) == [(1, {"a": "1\u2028"}), (3, {"a": "\U0001f600"})]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"a": ', "not JSON"),
        ("[1]", "holds a list; it must be a JSON object"),
        ('{"a": ["\\u0000"]}', "holds a NUL or half a character"),
        ('{"a": {"b": "\\ud83d"}}', "holds a NUL or half a character"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_line_that_is_no_object_is_named(tmp_path, line, says):
    path = tmp_path / "t.jsonl"
    path.write_text('{"a": 1}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"t\.jsonl:2: {says}"):
        list(files.json_records(path))


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
