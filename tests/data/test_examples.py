"""Examples and their file layouts."""

import csv
import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from befm_jax import files
from befm_jax.data import examples
from befm_jax.data.items import Example, Message
from befm_jax.errors import DataError

COLUMNS = {"system": "role", "user": "question", "answer": "response", "weight": "people"}

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
EXAMPLES = st.lists(
    st.builds(
        Example.of,
        system=TEXT,
        user=TEXT.filter(str.strip),
        answer=TEXT.filter(bool),
        weight=st.floats(min_value=1e-6, max_value=1e9),
    ),
    min_size=1,
    max_size=6,
)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def error_of(call, *arguments) -> str:
    with pytest.raises(DataError) as caught:
        call(*arguments)
    return str(caught.value)


class TestRoundTrip:
    @given(EXAMPLES)
    def test_chat_gives_back_what_was_written(self, tmp_path_factory, made):
        path = tmp_path_factory.mktemp("chat") / "a.jsonl"
        examples.write_chat(path, made)
        assert examples.read(path) == made

    @given(EXAMPLES)
    def test_every_layout_holds_the_same(self, tmp_path_factory, made):
        folder = tmp_path_factory.mktemp("layouts")
        turns = [[*(m.text for m in one.messages), one.weight] for one in made]
        turns = [turn if len(turn) == 4 else ["", *turn] for turn in turns]
        names = ("system", "instruction", "output", "weight")
        alpaca = [dict(zip(names, turn, strict=True)) for turn in turns]
        (folder / "a.json").write_text(json.dumps(alpaca))
        with (folder / "a.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            writer.writerow(COLUMNS.values())
            writer.writerows([*turn[:3], repr(turn[3])] for turn in turns)
        assert examples.read(folder / "a.json") == made
        assert examples.read(folder / "a.csv", COLUMNS) == made


def test_alpaca_joins_instruction_and_input_with_a_line_end(tmp_path):
    records = [
        {"instruction": "Add.", "input": "1 + 1", "output": "2", "system": None, "id": 7},
        {"instruction": "Say hello.", "input": "", "output": "Hello", "system": "Be kind."},
    ]
    path = write(tmp_path / "a.json", json.dumps(records))
    assert examples.read(path) == [
        Example.of("", "Add.\n1 + 1", "2"),
        Example.of("Be kind.", "Say hello.", "Hello"),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_byte_order_marks_make_no_difference(tmp_path, end, mark):
    lines = ['{"user": "q", "assistant": "a"}', "", '{"user": "r", "assistant": "b", "weight": 2}']
    expected = [Example.of("", "q", "a"), Example.of("", "r", "b", 2.0)]
    assert examples.read(write(tmp_path / "a.jsonl", mark + end.join(lines) + end)) == expected
    table = mark + end.join(["user,answer,weight", "q,a,1", "r,b,2"])
    assert examples.read(write(tmp_path / "a.csv", table)) == expected
    alpaca = mark + end.join(["[", '{"instruction": "q", "output": "a"}', "]", ""])
    assert examples.read(write(tmp_path / "a.json", alpaca)) == expected[:1]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"user": "q"}, "assistant: missing"),
        ({"assistant": "a"}, "user: missing"),
        ({"user": 1, "assistant": "a"}, "user: expected text, not a number"),
        ({"user": " ", "assistant": "a"}, "user: blank"),
        ({"user": "q", "assistant": ""}, "assistant: empty"),
        ({"user": "q", "assistant": "a", "weight": 0}, "weight: 0.0 is not"),
        ({"user": "q", "assistant": "a", "weight": float("nan")}, "weight: nan is not"),
        ({"user": "q", "assistant": "a", "weight": 10**400}, "is not a number"),
        ({"user": "q", "assistant": "a", "weight": True}, "weight: True is not a number"),
        ({"user": "q", "assistant": "a", "weight": None}, "weight: None is not a number"),
        ({"user": "q", "assistant": "\ud800"}, "assistant: not valid Unicode"),
        ({"user": "q\0", "assistant": "a"}, "user: not valid Unicode text, or it holds a NUL"),
        (["q", "a"], "expected an object with user, assistant, not a list"),
    ],
)
def test_a_malformed_record_is_named_by_line_and_field(tmp_path, record, says):
    good = {"user": "q", "assistant": "a"}
    path = write(tmp_path / "a.jsonl", f"{json.dumps(good)}\n{json.dumps(record)}\n")
    assert error_of(examples.read, path).startswith(f"{path}:2: ")
    assert says in error_of(examples.read, path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", "", "the file is empty"),
        ("a.json", "[]", "no examples"),
        ("a.json", "{}", "one JSON list"),
        ("a.json", "[\n{]", "a.json:2: not JSON"),
        ("a.json", "[" * 100_000, "not JSON that can be read"),
        ("a.json", '[{"instruction": "q"}]', "record 1: output: missing; the record has"),
        (
            "a.json",
            '[{"instruction": "q", "output": "a", "history": [["x", "y"]]}]',
            "record 1: history",
        ),
        ("a.jsonl", "{\n", "a.jsonl:1: not JSON"),
        ("a.jsonl", "\n \n", "the file is empty"),
        ("a.csv", "user,answer\n", "no examples"),
        ("a.csv", "question,anwser\nq,a\n", "for user: unknown column 'user'"),
        ("a.csv", "user,anwser\nq,a\n", "did you mean 'anwser' or"),
        ("a.csv", "user,answer\nq\n", "a.csv:2: 1 cells where the header has 2"),
        ("a.csv", 'user,answer\n"q\nr",a\nx,y,z\n', "a.csv:4: 3 cells"),
        ("a.csv", 'user,answer\nq,"a\n', "a.csv:2: not a CSV row"),
        ("a.csv", "user,answer,user\nq,a,b\n", "column named twice: 'user'"),
        ("a.csv", "user,answer,weight\nq,a,many\n", "a.csv:2: weight: 'many' is not a number"),
        ("a.csv", b"user,answer\nq,\xff\n", "a.csv:2: not UTF-8 text (byte 0xff)"),
        ("a.csv", b"user,answer\nq,\0\n", "NUL bytes"),
        ("a.txt", "q", "unknown layout '.txt'"),
    ],
)
def test_a_malformed_file_says_what_is_wrong(tmp_path, name, content, says):
    assert says in error_of(examples.read, write(tmp_path / name, content))


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    assert "no such file" in error_of(examples.read, tmp_path / "a.json")
    assert "cannot be read" in error_of(examples.read_alpaca, tmp_path)


def test_column_mappings_are_checked(tmp_path):
    path = write(tmp_path / "a.csv", "question,response\nq,a\n")
    both = {"user": "question", "answer": "response"}
    assert examples.read(path, both) == [Example.of("", "q", "a")]
    assert "did you mean 'answer'" in error_of(examples.read, path, {"answr": "response"})
    assert "no column is named for answer" in error_of(examples.read, path, {"user": "question"})
    assert "for system: unknown column 'role'" in error_of(
        examples.read, path, {**both, "system": "role"}
    )
    assert "named for two fields" in error_of(
        examples.read, path, {"user": "question", "answer": "question"}
    )
    assert "for .csv files" in error_of(examples.read, tmp_path / "a.json", both)


def test_chat_refuses_what_it_can_not_hold(tmp_path):
    turns = (Message("user", "q"), Message("assistant", "a")) * 2
    for example in (Example(turns), Example(turns[:2], ((1, 0, 1),))):
        with pytest.raises(DataError, match="this layout holds one question and its answer"):
            examples.write_chat(tmp_path / "a.jsonl", [example])


def test_a_file_is_a_family_of_its_examples(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"user": "q", "assistant": "a"}\n')
    family = examples.family(path)
    assert [list(family.examples(row, None)) for row in family.rows] == [[Example.of("", "q", "a")]]
    other = examples.family(write(tmp_path / "b.jsonl", '{"user": "q", "assistant": "b"}\n'))
    assert family.fingerprint != other.fingerprint


LINE = '{"user": "a?", "assistant": "[%d]"}'


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_a_chat_file_are_found_whatever_ends_them_and_however_it_is_read(
    tmp_path, monkeypatch, end
):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + end.join([LINE % 0, "", "  ", LINE % 1, LINE % 2]).encode())
    for size in (1, 2, 7, 1 << 20):
        monkeypatch.setattr(files, "_CHUNK", size)
        rows = examples.ChatFile(path)
        assert [row.messages[-1].text for row in rows] == ["[0]", "[1]", "[2]"]
        assert rows[-1] == rows[2]
        assert [one.messages[-1].text for one in rows[1:]] == ["[1]", "[2]"]
        assert files.lines(path)[1].tolist() == [1, 4, 5]


def test_a_malformed_line_far_down_a_chat_file_is_an_error_before_it_is_reached(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [LINE % number for number in range(3000)]
    lines[2500] = '{"user": "a?"}'
    path.write_text("\n".join(lines))
    rows = examples.ChatFile(path)

    def wait_for_the_error():
        for _ in range(1000):
            rows[0]
            time.sleep(0.01)

    with pytest.raises(DataError, match=r"a.jsonl:2501: assistant: missing"):
        wait_for_the_error()
    lines[10] = lines[2500]
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"a.jsonl:11: assistant: missing"):
        examples.ChatFile(path)
