"""Responses: what contradicts itself is refused; the file goes on where it was cut off."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from befm_jax.data.items import AnswerSet, FreeText, Item, Message
from befm_jax.data.responses import (
    Exact,
    Response,
    ResponseFile,
    Sampled,
    how_as_dict,
    how_from_dict,
    read_responses,
)
from befm_jax.errors import DataError

ANSWERS = AnswerSet.labels("Push", "Pull")
HOW = Sampled(4, seed=2)
# What ends a line elsewhere, quotes, half a character, a NUL, a word from right to left.
ODD = "a\u2028b\u2029c\x85d\x0be\r\nf \"g\" 'h' \\ \ud800 \udfff \0 \x1b[31m שלום 🙂 \ufeff"


def item(id, answers=ANSWERS):
    return Item(id, (Message("user", f"{id}?"),), answers)


ITEMS = [item(f"i{number}") for number in range(6)]


class Counting:
    """A respondent that keeps what it was asked, and may be killed at some item."""

    name = "counting"

    def __init__(self, dies_at=None):
        self.asked = []
        self.dies_at = dies_at

    def respond(self, items, how):
        for one in items:
            if one.id == self.dies_at:
                raise KeyboardInterrupt
            self.asked.append(one.id)
            yield Response.from_counts(one.id, [3, 0], 1, 0, (ODD,))

    def describe(self):
        return {"model": "made up", "sizes": (1, 2)}


def opened(path, respondent=None, how=HOW):
    return ResponseFile(path, (respondent or Counting()).describe(), how)


def complete(path, respondent, items=ITEMS, how=HOW):
    return list(opened(path, respondent, how).complete(respondent, items, how))


class TestResponse:
    def test_a_distribution_is_normalised_and_what_it_lacks_is_outside(self):
        response = Response.from_mass("i", [0.2, 0.6], 0.5)
        np.testing.assert_allclose(response.weights, [0.25, 0.75])
        assert response.exact
        assert response.outside == pytest.approx(0.2)
        assert response.ends_after_answer == 0.5

    def test_counts_keep_what_was_left_out(self):
        response = Response.from_counts("i", [3, 4], unread=2, not_allowed=1)
        assert (response.draws, response.unread, response.exact) == (10, 2, False)
        assert response.outside == pytest.approx(0.3)
        np.testing.assert_allclose(response.shares, [3 / 7, 4 / 7])

    def test_all_outside_can_be_held_but_has_no_shares(self):
        for response in (Response.from_counts("i", [0, 0], 3), Response.from_mass("i", [0, 0])):
            assert response.empty
            assert response.outside == 1
            assert not response.shares.any()
        with pytest.raises(ValueError, match="free text has no shares"):
            _ = Response("i", None, False, texts=("so",)).shares

    def test_it_can_not_be_changed_from_outside(self):
        mine = np.array([0.5, 0.5])
        response = Response("i", mine, True)
        mine[0] = 7
        assert response.weights[0] == 0.5
        with pytest.raises(ValueError, match="read-only"):
            response.weights[0] = 7

    @pytest.mark.parametrize(
        ("fields", "says"),
        [
            ({"weights": [[0.5, 0.5]]}, "shape"),
            ({"weights": [1.0]}, "shape"),
            ({"weights": [1.5, -0.5]}, "not negative"),
            ({"weights": [np.nan, 1.0]}, "finite"),
            ({"weights": [0.0, 0.0]}, "all 0, but only 0"),
            ({"weights": [0.4, 0.4]}, r"sums to 0\.8"),
            ({"outside": 1.5}, "outside is 1.5"),
            ({"ends_after_answer": -0.1}, "ends_after_answer is -0.1"),
            ({"exact": False, "weights": [0.5, 0.5], "draws": 1}, "whole numbers"),
            ({"exact": False, "weights": [1, 1], "draws": 3}, "2 of 3 draws"),
            ({"exact": False, "weights": [1, 1], "draws": 4, "outside": 0.25}, "2 of 4 draws"),
        ],
    )
    def test_what_contradicts_itself_is_refused(self, fields, says):
        right = {"item": "i", "weights": [0.5, 0.5], "exact": True}
        with pytest.raises(ValueError, match=says):
            Response(**{**right, **fields})

    def test_more_mass_than_one_negative_counts_and_no_draws_are_refused(self):
        with pytest.raises(ValueError, match=r"sums to 1\.1"):
            Response.from_mass("i", [0.5, 0.6])
        with pytest.raises(ValueError, match="not negative"):
            Response.from_counts("i", [3, 1], unread=-1)
        with pytest.raises(ValueError, match="no draws"):
            Response.from_counts("i", [0, 0])


class TestHow:
    @pytest.mark.parametrize(
        ("fields", "says"),
        [
            ({"n": 0}, "n is 0; it must be at least 1"),
            ({"seed": -1}, "seed is -1"),
            ({"temperature": -0.1}, "temperature is -0.1"),
            ({"temperature": float("inf")}, "temperature is inf"),
            ({"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
            ({"top_k": -1}, "top_k is -1"),
            ({"max_tokens": 0}, "max_tokens is 0"),
        ],
    )
    def test_a_field_out_of_range_is_an_error(self, fields, says):
        with pytest.raises(DataError, match=says):
            Sampled(**fields)

    @pytest.mark.parametrize("how", [Exact(), Sampled(7, seed=3, temperature=1, top_p=0.5)])
    def test_it_comes_back_from_a_file(self, how):
        assert how_from_dict(json.loads(json.dumps(how_as_dict(how)))) == how

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"n": "many"}, "n is 'many'; it must be a whole number"),
            ({"n": 7.5}, "n is 7.5; it must be a whole number"),
            ({"temperature": [1]}, r"temperature is \[1\]; it must be a number"),
            ({"seed": True}, "seed is True"),
            ({"top_p": 2}, "top_p is 2; it must be above 0"),
        ],
    )
    def test_settings_of_other_types_are_refused(self, settings, says):
        assert how_from_dict({"unknown": 1}) == Sampled()
        with pytest.raises(DataError, match=says):
            how_from_dict(settings)

    def test_the_default_draws_from_the_models_own_distribution(self):
        assert how_as_dict(Exact()) == {"mode": "exact"}
        found = how_as_dict(Sampled())
        assert (found["temperature"], found["top_k"], found["top_p"]) == (1.0, 0, 1.0)


HEAD = '{"schema": "befm_jax.responses/1", "respondent": %s, "how": {}}'
LINE = (
    '{"item": "x", "weights": null, "exact": %s, "outside": 0, "draws": %s, "unread": 0, '
    '"texts": [], "ends_after_answer": null}'
)


class TestFile:
    def same(self, one, other):
        found, expected = dict(vars(one)), dict(vars(other))
        np.testing.assert_equal(found.pop("weights"), expected.pop("weights"))
        assert found == expected

    def test_what_is_there_is_not_asked_again(self, tmp_path):
        path = tmp_path / "responses.jsonl"
        first = Counting()
        complete(path, first, ITEMS[:2])
        again = Counting()
        found = complete(path, again)
        assert first.asked == ["i0", "i1"]
        assert again.asked == ["i2", "i3", "i4", "i5"]
        assert [response.item for response in found] == [one.id for one in ITEMS]
        last = Counting()
        complete(path, last)
        assert last.asked == []

    def test_a_run_that_was_interrupted_goes_on(self, tmp_path):
        path = tmp_path / "responses.jsonl"
        with pytest.raises(KeyboardInterrupt):
            complete(path, Counting(dies_at="i3"))
        again = Counting()
        complete(path, again)
        assert again.asked == ["i3", "i4", "i5"]

    def test_cut_anywhere_it_is_completed_to_the_same_file(self, tmp_path):
        path = tmp_path / "responses.jsonl"
        complete(path, Counting())
        whole = path.read_bytes()
        head = whole.index(b"\n") + 1
        ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
        for cut in {*range(head, len(whole), 37), *ends, *(end - 1 for end in ends[1:])}:
            path.write_bytes(whole[:cut])
            respondent = Counting()
            complete(path, respondent)
            kept = sum(end <= cut for end in ends) - 1
            assert respondent.asked == [one.id for one in ITEMS[kept:]]
            assert path.read_bytes() == whole

    def test_a_last_line_without_its_end_is_read_where_it_is_whole(self, tmp_path):
        path = tmp_path / "responses.jsonl"
        complete(path, Counting())
        content = path.read_bytes().rstrip(b"\n")
        _, whole = read_responses(path)
        for cut in (0, 1, 5):
            path.write_bytes(content[: len(content) - cut])
            assert list(read_responses(path)[1]) == list(whole)[: len(whole) - (cut > 0)]

    def test_killed_while_it_answers_it_goes_on(self, tmp_path):
        path = tmp_path / "responses.jsonl"
        code = (
            "import os, signal, sys\n"
            "from befm_jax.data.items import AnswerSet, Item, Message\n"
            "from befm_jax.data.responses import Response, ResponseFile, Sampled\n"
            "class Dying:\n"
            "    def respond(self, items, how):\n"
            "        for one in items:\n"
            "            if one.id == 'i2':\n"
            "                os.kill(os.getpid(), signal.SIGKILL)\n"
            "            yield Response.from_counts(one.id, [3, 0], 1)\n"
            "answers = AnswerSet.labels('Push', 'Pull')\n"
            "items = [Item(f'i{n}', (Message('user', f'i{n}?'),), answers) for n in range(6)]\n"
            "how = Sampled(4, seed=2)\n"
            "file = ResponseFile(sys.argv[1], {'model': 'made up', 'sizes': (1, 2)}, how)\n"
            "list(file.complete(Dying(), items, how))\n"
        )
        killed = subprocess.run([sys.executable, "-c", code, str(path)], timeout=120, check=False)
        assert killed.returncode == -signal.SIGKILL
        again = Counting()
        complete(path, again)
        assert again.asked == ["i2", "i3", "i4", "i5"]

    def test_another_respondent_or_way_of_asking_is_refused(self, tmp_path):
        path = tmp_path / "responses.jsonl"
        complete(path, Counting())
        before = path.read_bytes()
        for how in (Exact(), Sampled(5, seed=2), dataclasses.replace(HOW, temperature=0.7)):
            with pytest.raises(DataError, match="written for another how; name another file"):
                opened(path, how=how)
        with pytest.raises(DataError, match="written for another respondent;"):
            ResponseFile(path, {"model": "another"}, HOW)
        with pytest.raises(DataError, match="another respondent and another how"):
            ResponseFile(path, {"model": "another"}, Exact())
        assert path.read_bytes() == before

    def test_a_file_without_a_response_is_begun_again(self, tmp_path):
        path = tmp_path / "responses.jsonl"
        opened(path, how=Exact())
        complete(path, Counting())
        assert read_responses(path)[0]["how"] == how_as_dict(HOW)

    def test_an_item_that_was_asked_otherwise_is_not_taken_for_asked(self, tmp_path):
        path = tmp_path / "responses.jsonl"
        complete(path, Counting())
        reworded = dataclasses.replace(ITEMS[0], prompt=(Message("user", "Otherwise?"),))
        again = Counting()
        with pytest.raises(DataError, match=f"item {ITEMS[0].id} was asked otherwise"):
            complete(path, again, [reworded, *ITEMS[1:]])
        assert again.asked == []

    def test_odd_texts_survive(self, tmp_path):
        path = tmp_path / "responses.jsonl"
        complete(path, Counting())
        head, found = read_responses(path)
        assert head["respondent"] == {"model": "made up", "sizes": [1, 2]}
        assert head["how"]["mode"] == "sampled"
        assert [response.texts for response in found.values()] == [(ODD,)] * len(ITEMS)
        path.read_bytes().decode("ascii")

    @given(st.lists(st.text(st.characters(codec=None)), max_size=3))
    def test_any_text_survives(self, tmp_path_factory, texts):
        path = tmp_path_factory.mktemp("texts") / "responses.jsonl"
        response = Response("i", None, False, 0.0, len(texts), 0, tuple(texts))
        opened(path).append(response)
        self.same(read_responses(path)[1]["i"], response)

    @pytest.mark.parametrize(
        "response",
        [
            Response.from_mass("i", [0.1, 0.2], 0.3),
            Response.from_counts("i", [3, 0], 2, 1, ("x",), 0.25),
            Response("i", None, False, 0.5, 2, 1, ("so",)),
        ],
    )
    def test_every_field_comes_back(self, tmp_path, response):
        path = tmp_path / "responses.jsonl"
        opened(path).append(response)
        self.same(opened(path).responses["i"], response)

    def test_items_need_ids_of_their_own(self, tmp_path):
        respondent = Counting()
        with pytest.raises(DataError, match="two items have the id 'i1'"):
            complete(tmp_path / "responses.jsonl", respondent, [ITEMS[1], item("i1", FreeText())])
        assert respondent.asked == []

    @pytest.mark.parametrize(
        ("damage", "says"),
        [
            (lambda lines: [lines[0], "{", *lines[1:]], r"jsonl:2: not a response"),
            (lambda lines: [*lines, "[]"], r"jsonl:8: not a response"),
            (lambda lines: [*lines, '{"item": "x"}'], r"jsonl:8: not a response \('weights'\)"),
            (lambda lines: lines[1:], r"jsonl:1: schema is None"),
            (lambda lines: ['{"schema": "other/1"}'], "schema is 'other/1'"),
            (lambda lines: ['[["schema", "befm_jax.responses/1"]]'], "jsonl:1: not a response"),
            (lambda lines: [lines[0].replace('"how"', '"hw"')], "jsonl:1: how is None; it must be"),
            (lambda lines: [HEAD % '"me"'], "jsonl:1: respondent is 'me'; it must be a JSON obj"),
            (lambda lines: [*lines, lines[1]], "jsonl:8: .*a second one to 'i0'"),
            (lambda lines: [*lines, "[" * 100_000], "jsonl:8: not a response"),
            (lambda lines: [*lines, LINE % ('"false"', 0)], "jsonl:8: .*exact is 'false'"),
            (lambda lines: [*lines, LINE % ("false", "1e999")], "jsonl:8: .*draws is inf"),
        ],
    )
    def test_a_damaged_file_is_an_error_with_the_line(self, tmp_path, damage, says):
        path = tmp_path / "responses.jsonl"
        complete(path, Counting())
        lines = damage(path.read_text().splitlines())
        path.write_text("\n".join(lines) + "\n")
        with pytest.raises(DataError, match=says):
            opened(path)
        with pytest.raises(DataError, match=says):
            read_responses(path)

    def test_a_response_is_on_disk_before_the_next_is_asked_for(self, tmp_path):
        path = tmp_path / "responses.jsonl"
        respondent = Counting()
        for number, response in enumerate(
            opened(path, respondent).complete(respondent, ITEMS, HOW), 1
        ):
            lines = path.read_text().splitlines()
            assert len(lines) == 1 + number
            assert json.loads(lines[-1])["item"] == response.item

    def test_its_permissions_are_those_of_other_files(self, tmp_path):
        path = tmp_path / "responses.jsonl"
        opened(path)
        other = tmp_path / "other"
        other.touch()
        assert os.stat(path).st_mode == os.stat(other).st_mode


def test_in_a_notebook_a_response_is_a_line_and_a_small_picture():
    response = Response.from_mass("<game>", [0.5, 0.25, 0.0])
    assert repr(response) == (
        "<Response to <game>: exact, 25.00% outside the answer set, 0 unreadable>"
    )
    page = response._repr_html_()
    assert page.startswith("&lt;Response to &lt;game&gt;: exact")
    bars = ElementTree.fromstring(page.split("<br>")[1])
    assert [float(bar.get("height")) for bar in bars] == [1.0, 0.5, 0.0]
    assert [bar[0].text for bar in bars] == [
        "answer 0: 66.67%",
        "answer 1: 33.33%",
        "answer 2: 0.00%",
    ]
    nothing = Response.from_counts("q", [0, 0], unread=1200)
    assert nothing._repr_html_().endswith(
        "1,200 draws, 100.00% outside the answer set, 1,200 unreadable&gt;"
    )
