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
        answer=TEXT.filter(str.strip),
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
        {"instruction": "", "input": "1 + 1", "output": "2"},
    ]
    path = write(tmp_path / "a.json", json.dumps(records))
    assert examples.read(path) == [
        Example.of("", "Add.\n1 + 1", "2"),
        Example.of("Be kind.", "Say hello.", "Hello"),
        Example.of("", "1 + 1", "2"),
    ]


ASKED = [
    {"user": "q", "assistant": "a"},
    {"instruction": "q", "output": "a", "history": []},
    {"instruction": "", "input": "q", "output": "a"},
    {"prompt": "q", "completion": "a"},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
]


@pytest.mark.parametrize("record", ASKED)
@pytest.mark.parametrize("system", ["", "s"])
def test_a_record_of_any_layout_is_a_question_and_its_answer(tmp_path, record, system):
    record = {**record, "system": system, "weight": 2, "id": 7}
    line = json.dumps(record)
    for name, text in (("a.jsonl", line), ("a.json", f"[{line}]"), ("b.json", f"{line}\n{line}")):
        assert set(examples.read(write(tmp_path / name, text))) == {
            Example.of(system, "q", "a", 2.0)
        }


def test_every_reply_of_a_conversation_is_learnt(tmp_path):
    said = [("system", "s"), ("user", "q"), ("assistant", "ab"), ("user", "r"), ("assistant", "c")]
    told = tuple(Message(*one) for one in said)
    openai = [{"role": role, "content": text} for role, text in said]
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    records = [
        {"messages": openai},
        {"conversations": [{"from": names[role], "value": text} for role, text in said]},
        {"system": "s", "instruction": "r", "output": "c", "history": [["q", "ab"]]},
        {"messages": openai[1:], "system": "s"},
    ]
    lines = "\n".join(map(json.dumps, records))
    found = examples.read(write(tmp_path / "a.jsonl", lines))
    assert found == [Example(told, ((2, 0, 2), (4, 0, 1)))] * 4
    openai[2]["weight"] = 0  # OpenAI's way of saying that a reply is not learnt
    (found,) = examples.read(write(tmp_path / "a.jsonl", json.dumps({"messages": openai})))
    assert found == Example(told)


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
        ({"text": "q"}, "has text; a record may have user, assistant; instruction, input, output"),
        ({"user": 1, "assistant": "a"}, "user: expected text, not a number"),
        ({"user": " ", "assistant": "a"}, "user: blank"),
        ({"user": "q", "assistant": ""}, "assistant: blank"),
        ({"user": "q", "assistant": " \n"}, "assistant: blank"),
        ({"user": "q", "assistant": "a", "weight": 0}, "weight: 0.0 is not"),
        ({"user": "q", "assistant": "a", "weight": float("nan")}, "weight: nan is not"),
        ({"user": "q", "assistant": "a", "weight": 10**400}, "is not a number"),
        ({"user": "q", "assistant": "a", "weight": True}, "weight: True is not a number"),
        ({"user": "q", "assistant": "a", "weight": None}, "weight: None is not a number"),
        ({"user": "q", "assistant": "\ud800"}, "assistant: not valid Unicode"),
        ({"user": "q\0", "assistant": "a"}, "user: not valid Unicode text, or it holds a NUL"),
        (["q", "a"], "expected an object with fields, not a list"),
        ({"prompt": "q"}, "completion: missing"),
        ({"prompt": "q", "completion": "a", "label": False}, "label: false, so its answer is not"),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, "history: ['x'] is not a pair"),
        ({"messages": "q"}, "messages: expected a list, not text"),
        ({"messages": []}, "messages: no assistant's reply"),
        ({"messages": ["q"]}, "messages: message 1: expected an object, not text"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "tool", "content": "a"}]},
            "messages: message 2: role is 'tool'; it must be one of system, user",
        ),
        ({"messages": [{"role": "assistant"}]}, "message 1: content: missing"),
        (
            {"messages": [{"role": "assistant", "content": None}]},
            "content: expected text, not null",
        ),
        ({"conversations": [{"from": "gpt", "value": " "}]}, "assistant: blank"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 2}]}, "weight is 2; it"),
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
        ("a.json", "{}", "record 1: has no fields; a record may have user, assistant;"),
        ("a.json", "7", "expected a JSON list of records, not a number"),
        (
            "a.json",
            '{"prompt": "q", "completion": "a"}\n{"prompt": 1}',
            "a.json:2: prompt: expected",
        ),
        ("a.json", "[\n{]", "a.json:2: not JSON"),
        ("a.json", "[" * 100_000, "not JSON that can be read"),
        ("a.json", '[{"instruction": "q"}]', "record 1: output: missing; the record has"),
        ("a.jsonl", "{\n", "a.jsonl:1: not JSON"),
        ("a.jsonl", "\n \n", "the file is empty"),
        ("a.csv", "user,answer\n", "no examples"),
        ("a.csv", "question,anwser\nq,a\n", "for user: unknown column 'user'"),
        ("a.csv", "user,anwser\nq,a\n", "did you mean 'anwser' or"),
        ("a.csv", "user,answer\nq\n", "a.csv:2: 1 cells where the header has 2"),
        ("a.csv", 'user,answer\n"q\nr",a\nx,y,z\n', "a.csv:4: 3 cells"),
        ("a.csv", 'user,answer\nq,"a\n', "a.csv:2: not a CSV row"),
        ("a.csv", 'user,answer\nq," "\n', "a.csv:2: assistant: blank"),
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
    assert "cannot be read" in error_of(examples.read_json, tmp_path)


def test_columns_in_capitals_and_long_documents_are_read(tmp_path):
    text = "x" * 200_000
    path = write(tmp_path / "a.csv", f"USER;Answer\n{text};a\n")
    assert examples.read(path) == [Example.of("", text, "a")]


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
        rows = examples.JsonLines(path)
        assert [row.messages[-1].text for row in rows] == ["[0]", "[1]", "[2]"]
        assert rows[-1] == rows[2]
        assert [one.messages[-1].text for one in rows[1:]] == ["[1]", "[2]"]
        assert files.lines(path)[1].tolist() == [1, 4, 5]


def test_a_malformed_line_far_down_a_chat_file_is_an_error_before_it_is_reached(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [LINE % number for number in range(3000)]
    lines[2500] = '{"user": "a?"}'
    path.write_text("\n".join(lines))
    rows = examples.JsonLines(path)

    def wait_for_the_error():
        for _ in range(1000):
            rows[0]
            time.sleep(0.01)

    with pytest.raises(DataError, match=r"a.jsonl:2501: assistant: missing"):
        wait_for_the_error()
    lines[10] = lines[2500]
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"a.jsonl:11: assistant: missing"):
        examples.JsonLines(path)
