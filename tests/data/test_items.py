"""Items: answer sets and how texts and cells are read by them, examples, items."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from befm_jax.data import games
from befm_jax.data.items import AnswerSet, Example, FreeText, Item, Message, Parsed
from befm_jax.errors import DataError

MONEY = AnswerSet.numbers(range(101), "dollars")
TENTHS = AnswerSet.numbers([0, 0.1, 0.25, 1.5], "euros")
ACTIONS = AnswerSet.labels("Push", "Pull", values=(0, 1))
WAYS = AnswerSet.labels("Bus", "Bike", "Bike and bus")
OPTIONS = AnswerSet.letters(4)
SEVERAL = AnswerSet.letters(4, several=True)
ALL = (MONEY, TENTHS, ACTIONS, WAYS, OPTIONS, SEVERAL)
ASK = (Message("user", "?"),)
NO_ANSWER, OUTSIDE = Parsed(None, "no answer"), Parsed(None, "outside the answer set")


class TestForms:
    def test_positions_names_and_values(self):
        assert MONEY.written[33] == "[33]"
        assert (MONEY.names[33], MONEY.values[33], MONEY.position(33)) == ("33", 33.0, 33)
        assert (len(MONEY), MONEY.in_words) == (101, "0 to 100 dollars")
        assert TENTHS.written == ("[0]", "[0.1]", "[0.25]", "[1.5]")
        assert TENTHS.position(0.25) == 2
        assert (ACTIONS.position(1), ACTIONS.in_words) == (1, "Push, Pull")
        assert WAYS.values is None
        assert WAYS.position(2) == 2

    def test_several_letters_are_all_sets_but_the_empty_one(self):
        expected = {
            "".join(letters)
            for size in range(1, 5)
            for letters in itertools.combinations("ABCD", size)
        }
        assert set(SEVERAL.names) == expected
        assert len(SEVERAL) == 15
        assert list(SEVERAL.names[:5]) == ["A", "B", "C", "D", "AB"]
        assert OPTIONS.names == ("A", "B", "C", "D")

    def test_one_observation(self):
        assert MONEY.one(7).sum() == MONEY.one(7)[7] == 1
        for position in (None, -1, 101, 1.5):
            with pytest.raises((ValueError, TypeError)):
                MONEY.one(position)

    @pytest.mark.parametrize("answers", ALL)
    def test_the_request_ends_with_a_form_that_is_read_back(self, answers):
        assert answers.request.endswith(".")
        assert answers.parse(answers.request).position is not None

    def test_requests(self):
        assert MONEY.request == (
            "Answer with exactly one whole number of dollars from 0 to 100, written in square "
            "brackets, such as [33]."
        )
        assert "exactly one number of euros from 0 to 1.5," in TENTHS.request
        assert OPTIONS.request.endswith("such as [A].")
        assert "all right options" in SEVERAL.request
        assert SEVERAL.request.endswith("such as [AB].")

    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (lambda: AnswerSet.numbers([3], "coins"), "two answers or more"),
            (lambda: AnswerSet.numbers([]), "two answers or more"),
            (lambda: AnswerSet.numbers([1, 0]), "must ascend"),
            (lambda: AnswerSet.numbers([1, 1]), "written twice"),
            (lambda: AnswerSet.numbers([0, float("nan")]), "must be finite"),
            (lambda: AnswerSet.numbers([0, float("inf")]), "must be finite"),
            (lambda: AnswerSet.numbers(["zero", 1]), "must be numbers"),
            (lambda: AnswerSet.labels("a", "A"), "written twice"),
            (lambda: AnswerSet.labels("a"), "two answers or more"),
            (lambda: AnswerSet.labels("a", "b[c]"), "no brackets"),
            (lambda: AnswerSet.labels("a", "1b"), "starts with a letter"),
            (lambda: AnswerSet.labels("a", ""), "starts with a letter"),
            (lambda: AnswerSet.labels("a", "b", values=(1,)), "1 values for 2 answers"),
            (lambda: AnswerSet.labels("a", "b", values=(1, 0)), "must ascend"),
            (lambda: AnswerSet.letters(1), "2 to 26"),
            (lambda: AnswerSet.letters(27), "2 to 26"),
            (lambda: AnswerSet.letters(9, several=True), "2 to 8"),
        ],
    )
    def test_ill_formed_sets_are_refused(self, make, says):
        with pytest.raises(DataError, match=says):
            make()

    def test_what_is_not_in_the_set_has_no_position(self):
        with pytest.raises(DataError, match="101 is not in the answer set, 0 to 100 dollars"):
            MONEY.position(101)
        with pytest.raises(DataError, match=r"0\.2 is not in the answer set"):
            TENTHS.position(0.2)


class TestParse:
    @given(st.sampled_from([*ALL, *(games.get(id).answers for id in games.ids())]), st.data())
    def test_every_answer_is_read_back_from_how_it_is_written(self, answers, data):
        position = data.draw(st.integers(0, len(answers) - 1))
        assert answers.parse(answers.written[position]) == Parsed(position)
        assert answers.parse(f"Well: {answers.written[position]}!") == Parsed(position)

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("[33]", 33),
            ("[$33]", 33),
            ("I thought of [20], but give **[ 33 ]**.", 33),
            ("[33.0]", 33),
            ("[33 dollars]", 33),
            ("Of my $100: [33] [sic]", 33),
            ("33", 33),
            ("$33 of 100", 33),
            ("20-30", 20),
            ("For GPT4 and v1.5, 33.", 33),
            ("[0]", 0),
            ("10, 20", 10),
        ],
    )
    def test_numbers(self, text, value):
        assert MONEY.parse(text) == Parsed(value)

    @pytest.mark.parametrize(
        ("text", "position"),
        [("[0.25]", 2), ("0.1 euros", 1), ("[.25]", None), ("[1.50]", 3), ("[0.10]", 1)],
    )
    def test_decimals(self, text, position):
        assert TENTHS.parse(text).position == position

    def test_thousands_may_have_commas(self):
        assert AnswerSet.numbers(range(2001), "dollars").parse("[$1,500]") == Parsed(1500)

    @pytest.mark.parametrize("text", ["[101]", "[-1]", "-5", "[33.5]", "33.5", "9" * 5000])
    def test_a_number_outside_the_set_is_not_confused_with_no_answer(self, text):
        assert MONEY.parse(text) == OUTSIDE

    @pytest.mark.parametrize(
        ("text", "value"),
        [("[101]", 100), ("[$-5]", 0), ("33.4", 33), ("33.6", 34), ("9" * 5000, 100), ("no", None)],
    )
    def test_of_the_nearest_a_number_that_is_not_in_the_set_is_read_as_the_nearest(
        self, text, value
    ):
        answers = dataclasses.replace(MONEY, nearest=True)
        assert answers.parse(text).position == value
        assert answers.parse("[33]") == MONEY.parse("[33]")

    def test_answers_may_be_written_without_brackets_or_with_a_dollar_sign(self):
        dollars = AnswerSet(("[$0]", "[$1]"), (0.0, 1.0), kind="numbers")
        letters = AnswerSet(("A", "B", "AB"), kind="letters")
        assert (dollars.names, letters.names) == (("0", "1"), ("A", "B", "AB"))
        for answers in (dollars, letters):
            for position, written in enumerate(answers.written):
                assert answers.parse(written) == Parsed(position)
                assert answers.parse_cell(answers.names[position]) == Parsed(position)

    @pytest.mark.parametrize("text", ["", "none", "[ ]", "half of it", "٣٣"])
    def test_no_number_is_no_answer(self, text):
        assert MONEY.parse(text) == NO_ANSWER

    @pytest.mark.parametrize(
        ("text", "parsed"),
        [
            ("[Push]", Parsed(0)),
            ("I will not push, so [PULL] [1]", Parsed(1)),
            ("Push? No: pull.", Parsed(1)),
            ("pushing", NO_ANSWER),
            ("[Jump], not push", OUTSIDE),
            ("1", NO_ANSWER),
        ],
    )
    def test_labels(self, text, parsed):
        assert ACTIONS.parse(text) == parsed

    def test_a_label_that_begins_with_another_is_read_whole(self):
        assert WAYS.parse("I take bike and bus") == Parsed(2)
        assert WAYS.parse("I take my bike") == Parsed(1)

    @pytest.mark.parametrize(
        ("text", "name"),
        [
            ("[B]", "B"),
            ("[b]", "B"),
            ("The answer is C.", "C"),
            ("A good question, so D", "D"),
            ("[BD]", "BD"),
            ("[D, B]", "BD"),
            ("[b and d]", "BD"),
            ("[A & C]", "AC"),
            ("Not [A] but [C,A,B]", "ABC"),
            ("Right are B and D", "BD"),
            ("B, D", "BD"),
            ("[BB]", "B"),
            ("BD", "BD"),
            (" **DB**.", "BD"),
        ],
    )
    def test_letters(self, text, name):
        assert SEVERAL.names[SEVERAL.parse(text).position] == name
        single = OPTIONS.parse(text)
        assert single == (Parsed("ABCD".index(name)) if len(name) == 1 else OUTSIDE)

    @pytest.mark.parametrize("text", ["[E]", "[AE]", "[none]", "[1]"])
    def test_letters_that_are_no_options_are_outside(self, text):
        assert SEVERAL.parse(text) == OUTSIDE

    @pytest.mark.parametrize("text", ["", "a good day", "because", "42"])
    def test_no_letter_is_no_answer(self, text):
        assert SEVERAL.parse(text) == NO_ANSWER

    @given(st.text())
    def test_any_text_can_be_parsed(self, text):
        for answers in ALL:
            parsed = answers.parse(text)
            assert (parsed.position is None) == (parsed.reason != "")

    @pytest.mark.parametrize("begin", ["[", "[$", "[3", "[3 dollars", "A", "3"])
    @pytest.mark.parametrize("space", [" ", "0", "a", ", ", " and "])
    def test_a_very_long_text_is_read_in_a_moment(self, begin, space):
        for answers in ALL:
            answers.parse(begin + space * 100_000 + "!")


class TestCells:
    @given(st.sampled_from([*ALL, *(games.get(id).answers for id in games.ids())]), st.data())
    def test_names_brackets_and_values_are_read(self, answers, data):
        position = data.draw(st.integers(0, len(answers) - 1))
        name = answers.names[position]
        for cell in (
            name,
            answers.written[position],
            f" {name.upper()} ",
            answers.value_of(position),
        ):
            assert answers.parse_cell(cell) == Parsed(position)
            assert answers.read_cell(cell) == position

    @pytest.mark.parametrize(
        ("answers", "cell", "reason"),
        [
            (MONEY, "", "no answer"),
            (MONEY, "[ ]", "no answer"),
            (MONEY, "half", "not a number"),
            (MONEY, "33 dollars", "not a number"),
            (MONEY, "1_0", "not a number"),
            (MONEY, "٣", "not a number"),
            (MONEY, "nan", "not finite"),
            (MONEY, "1e999", "not finite"),
            (MONEY, "33.5", "not a whole number"),
            (MONEY, "101", "outside 0 to 100 dollars"),
            (TENTHS, "0.2", "outside 0 to 1.5 euros"),
            (ACTIONS, "jump", "outside Push, Pull"),
            (ACTIONS, "2", "outside Push, Pull"),
            (WAYS, "", "no answer"),
        ],
    )
    def test_a_cell_is_an_answer_or_has_a_reason(self, answers, cell, reason):
        assert answers.parse_cell(cell) == Parsed(None, reason)
        with pytest.raises(DataError, match=reason):
            answers.read_cell(cell)

    def test_values_stand_for_named_answers(self):
        assert [ACTIONS.parse_cell(cell).position for cell in ("0", "1.0", "pull")] == [0, 1, 1]
        five = AnswerSet.labels("Low", "High", values=(1, 5))
        assert [five.parse_cell(cell).position for cell in ("1", "5", "0")] == [0, 1, None]
        assert (five.value_of(1), WAYS.value_of(1), TENTHS.value_of(2)) == ("5", "Bike", "0.25")


class TestExample:
    def test_one_question_and_its_answer(self):
        example = Example.of("Be brief.", "How?", "[So]", 3.0)
        assert [message.role for message in example.messages] == ["system", "user", "assistant"]
        assert example.weight == 3.0
        assert len(Example.of("", "How?", "[So]").messages) == 2

    TALK = (Message("user", "How?"), Message("assistant", "So and so"))

    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (lambda talk: Example(()), "none"),
            (lambda talk: Example(talk[:1]), "the last one is learnt"),
            (lambda talk: Example(talk[::-1]), "the last one is learnt"),
            (lambda talk: Example((talk[0], Message("assistant", " \n"))), "blank"),
            (lambda talk: Example((Message("robot", "?"), talk[1])), "role: 'robot'"),
            (lambda talk: Example((Message("user", "\ud800"), talk[1])), "not valid Unicode"),
            (lambda talk: Example((Message("user", "a\0b"), talk[1])), "NUL"),
            (lambda talk: Example(talk, ((1, 0, 10),)), "not in the conversation"),
            (lambda talk: Example(talk, ((2, 0, 1),)), "not in the conversation"),
            (lambda talk: Example(talk, ((1, 2, 2),)), "not in the conversation"),
            (lambda talk: Example(talk, ((1, 0, 3), (1, 2, 5))), "must not overlap"),
            (lambda talk: Example(talk, ((1, 0, 3), (0, 0, 1))), "must be in order"),
            (lambda talk: Example(talk, weight=0.0), "weight: 0.0"),
            (lambda talk: Example(talk, weight=float("nan")), "weight: nan"),
            (lambda talk: Example.of("", " \n", "[1]"), "user: blank"),
        ],
    )
    def test_what_can_not_be_learnt_is_refused(self, make, says):
        with pytest.raises(DataError, match=says):
            make(self.TALK)

    def test_spans_may_touch_and_reach_any_message(self):
        spans = ((0, 0, 2), (0, 2, 4), (1, 3, 9))
        assert Example(self.TALK, spans).spans == spans


class TestItem:
    def test_a_histogram_gives_an_example_an_answer_weighted_by_how_many(self):
        item = Item("i", ASK, ACTIONS, np.array([3.0, 0.0]))
        (example,) = item.examples("games")
        assert example.messages == (*ASK, Message("assistant", "[Push]"))
        assert (example.weight, example.family) == (3.0, "games")

    def test_free_text_gives_an_example_a_reference(self):
        item = Item("i", ASK, FreeText(), ("so", "or so"))
        assert [example.messages[-1].text for example in item.examples()] == ["so", "or so"]
        assert list(Item("i", ASK, ACTIONS).examples()) == []

    def test_the_target_can_not_be_changed_from_outside(self):
        mine = np.array([1.0, 2.0])
        item = Item("i", ASK, ACTIONS, mine)
        mine[0] = 9
        assert item.target.tolist() == [1.0, 2.0]
        with pytest.raises(ValueError, match="read-only"):
            item.target[0] = 9

    @pytest.mark.parametrize(
        ("fields", "says"),
        [
            ({"id": ""}, "an id is needed"),
            ({"prompt": ()}, "must end with a user's message"),
            ({"prompt": (Message("assistant", "!"),)}, "must end with a user's message"),
            ({"target": np.ones(3)}, "for 2 answers"),
            ({"target": np.array([np.nan, 1])}, "for 2 answers"),
            ({"target": np.array([-1.0, 1])}, "none is below 0"),
            ({"answers": FreeText(), "target": np.ones(2)}, "reference texts"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, fields, says):
        with pytest.raises(DataError, match=says):
            Item(**{"id": "i", "prompt": ASK, "answers": ACTIONS, **fields})
