"""Examples and their file layouts."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from befm_jax.data import examples
from befm_jax.data.examples import Example
from befm_jax.errors import DataError

COLUMNS = {"system": "role", "user": "question", "answer": "response", "weight": "people"}

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
EXAMPLES = st.lists(
    st.builds(
        Example,
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
    def test_alpaca_gives_back_what_was_written(self, tmp_path_factory, made):
        path = tmp_path_factory.mktemp("alpaca") / "a.json"
        examples.write_alpaca(path, made)
        assert examples.read(path) == made

    @given(EXAMPLES)
    def test_chat_gives_back_what_was_written(self, tmp_path_factory, made):
        path = tmp_path_factory.mktemp("chat") / "a.jsonl"
        examples.write_chat(path, made)
        assert examples.read(path) == made

    @given(EXAMPLES)
    def test_csv_gives_back_what_was_written(self, tmp_path_factory, made):
        path = tmp_path_factory.mktemp("csv") / "a.csv"
        examples.write_csv(path, made, COLUMNS)
        assert examples.read(path, COLUMNS) == made

    @given(EXAMPLES)
    def test_merging_keeps_the_total_weight_of_every_example(self, made):
        merged = examples.merge(made + made)
        assert len({(e.system, e.user, e.answer) for e in made}) == len(merged)
        for example in merged:
            same = [e.weight for e in made if (e.system, e.user, e.answer) == key(example)]
            assert example.weight == pytest.approx(2 * sum(same))


def key(example: Example) -> tuple[str, str, str]:
    return example.system, example.user, example.answer


def test_merging_keeps_first_appearance_and_its_meta():
    first = Example("", "a", "1", meta={"row": "first"})
    merged = examples.merge(
        [first, Example("", "b", "1"), Example("", "a", "1", 2.0, {"row": "x"})]
    )
    assert [(e.user, e.weight) for e in merged] == [("a", 3.0), ("b", 1.0)]
    assert merged[0].meta == {"row": "first"}


def test_alpaca_joins_instruction_and_input_with_a_line_end(tmp_path):
    records = [
        {"instruction": "Add.", "input": "1 + 1", "output": "2", "system": None, "id": 7},
        {"instruction": "Say hello.", "input": "", "output": "Hello", "system": "Be kind."},
    ]
    path = write(tmp_path / "a.json", json.dumps(records))
    assert examples.read(path) == [
        Example("", "Add.\n1 + 1", "2", meta={"id": "7"}),
        Example("Be kind.", "Say hello.", "Hello"),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_byte_order_marks_make_no_difference(tmp_path, end, mark):
    lines = ['{"user": "q", "assistant": "a"}', "", '{"user": "r", "assistant": "b", "weight": 2}']
    expected = [Example("", "q", "a"), Example("", "r", "b", 2.0)]
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
        ({"user": "q", "assistant": ""}, "answer: empty"),
        ({"user": "q", "assistant": "a", "weight": 0}, "weight: 0.0 is not"),
        ({"user": "q", "assistant": "a", "weight": float("nan")}, "weight: nan is not"),
        ({"user": "q", "assistant": "a", "weight": 10**400}, "is not a number"),
        ({"user": "q", "assistant": "a", "weight": True}, "weight: True is not a number"),
        ({"user": "q", "assistant": "a", "weight": None}, "weight: None is not a number"),
        ({"user": "q", "assistant": "\ud800"}, "answer: not valid Unicode"),
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
    assert examples.read(path, both) == [Example("", "q", "a")]
    assert "did you mean 'answer'" in error_of(examples.read, path, {"answr": "response"})
    assert "no column is named for answer" in error_of(examples.read, path, {"user": "question"})
    assert "for system: unknown column 'role'" in error_of(
        examples.read, path, {**both, "system": "role"}
    )
    assert "named for two fields" in error_of(
        examples.read, path, {"user": "question", "answer": "question"}
    )
    assert "for .csv files" in error_of(examples.read, tmp_path / "a.json", both)


def test_csv_refuses_to_lose_a_system_message_or_a_weight(tmp_path):
    both = {"user": "question", "answer": "response"}
    for example in (Example("Be kind.", "q", "a"), Example("", "q", "a", 2.0)):
        with pytest.raises(DataError, match=r"example 1 has a (system|weight)"):
            examples.write_csv(tmp_path / "a.csv", [example], both)


@pytest.mark.parametrize("parts", [2, 3, 9])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_shares_together_are_the_file(tmp_path, name, parts):
    made = [Example("", f"question {n}", f"{n}", weight=n + 0.5) for n in range(7)]
    path = tmp_path / name
    if name == "a.csv":
        examples.write_csv(path, made, {"user": "user", "answer": "answer", "weight": "weight"})
    else:
        {"a.json": examples.write_alpaca, "a.jsonl": examples.write_chat}[name](path, made)
    for part in range(parts):
        assert examples.read(path, share=examples.Share(part, parts)) == made[part::parts]


def test_a_share_looks_at_its_own_records_and_names_their_lines(tmp_path):
    lines = ['{"user": "a", "assistant": "1"}', "", "{}", '{"user": "b", "assistant": "2"}']
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    assert [one.user for one in examples.read(path, share=examples.Share(0, 2))] == ["a", "b"]
    with pytest.raises(DataError, match=r"a\.jsonl:3: user: missing"):
        examples.read(path, share=examples.Share(1, 2))
    empty = write(tmp_path / "empty.json", "[]")
    with pytest.raises(DataError, match="no examples in it"):
        examples.read(empty, share=examples.Share(1, 2))
