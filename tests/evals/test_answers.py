"""Answers, and the files that hold them."""

import numpy as np
import pytest

from befm_jax.data import games
from befm_jax.errors import DataError
from befm_jax.evals.answers import Answers, read_answers, write_choices, write_distribution


def written(tmp_path, content):
    path = tmp_path / "answers.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_distribution_is_normalised_and_what_it_lacks_is_outside():
    answers = Answers.from_distribution([0.2, 0.6])
    np.testing.assert_allclose(answers.weights, [0.25, 0.75])
    assert answers.exact
    assert answers.outside == pytest.approx(0.2)
    assert answers.total is None


def test_counts_keep_what_was_left_out():
    answers = Answers.from_counts([3, 4], unparsed=2, out_of_set=1)
    assert (answers.total, answers.unparsed, answers.out_of_set) == (10, 2, 1)
    assert answers.outside == pytest.approx(0.3)
    np.testing.assert_allclose(answers.distribution, [3 / 7, 4 / 7])


def test_answers_can_not_be_changed_from_outside():
    mine = np.array([0.5, 0.5])
    answers = Answers(mine, exact=True, outside=0.0, total=None)
    mine[0] = 7
    assert answers.weights[0] == 0.5
    with pytest.raises(ValueError, match="read-only"):
        answers.weights[0] = 7


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": [[0.5, 0.5]]}, "weights: shape"),
        ({"weights": [1.0]}, "weights: shape"),
        ({"weights": [1.5, -0.5]}, "not negative"),
        ({"weights": [np.nan, 1.0]}, "finite"),
        ({"weights": [0.0, 0.0]}, "at least one must be positive"),
        ({"weights": [0.4, 0.4]}, "sum to 0.8"),
        ({"outside": 1.5}, "outside: 1.5"),
        ({"ends_after_answer": 1.01}, "ends_after_answer: 1.01"),
        ({"total": 5}, "exact answers have none"),
        ({"exact": False, "weights": [0.5, 0.5], "total": 1}, "whole numbers"),
        ({"exact": False, "weights": [1, 1], "total": 3}, "total: 3, but 2"),
        ({"exact": False, "weights": [1, 1], "total": None}, "total: None, but 2"),
        ({"exact": False, "weights": [1, 1], "total": 4, "unparsed": 2}, "2 of 4 are outside"),
        ({"exact": False, "weights": [3, 1], "total": 3, "unparsed": -1}, "not negative"),
    ],
)
def test_answers_that_contradict_themselves_are_refused(fields, message):
    right = {"weights": [0.5, 0.5], "exact": True, "outside": 0.0, "total": None}
    with pytest.raises(ValueError, match=message):
        Answers(**{**right, **fields})


def test_more_mass_than_one_is_refused():
    with pytest.raises(ValueError, match=r"sums to 1\.1"):
        Answers.from_distribution([0.5, 0.6])


def test_answers_that_are_all_outside_can_be_held_but_have_no_distribution():
    for answers in (Answers.from_counts([0, 0], unparsed=3), Answers.from_distribution([0, 0])):
        assert answers.empty
        assert answers.outside == 1
        assert not answers.distribution.any()


def test_choices_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "choices.csv"
    write_choices(path, {"dictator": [0, 50, 50, None, 101], "public_goods": [20]})
    assert path.read_text().splitlines()[:3] == [
        "game,participant,choice",
        "dictator,0,0",
        "dictator,1,50",
    ]
    back = read_answers(path)
    assert list(back) == ["dictator", "public_goods"]
    dictator = back["dictator"]
    assert (dictator.total, dictator.unparsed, dictator.out_of_set) == (5, 1, 1)
    assert not dictator.exact
    assert (dictator.weights[0], dictator.weights[50], dictator.weights.sum()) == (1, 2, 3)
    assert back["public_goods"].weights[20] == 1


def test_distributions_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "distribution.csv"
    rng = np.random.default_rng(0)
    length = len(games.get("trust_banker").values)
    answers = {
        "trust_banker": Answers.from_distribution(rng.dirichlet(np.ones(length)) * 0.9),
        "dictator": Answers.from_distribution(np.eye(101)[7]),
    }
    write_distribution(path, answers)
    back = read_answers(path)
    for game, answer in answers.items():
        np.testing.assert_allclose(back[game].weights, answer.weights, rtol=1e-14)
        assert back[game].outside == pytest.approx(answer.outside, abs=1e-12)
        assert back[game].exact


def test_sampled_or_ill_fitting_answers_are_not_written_as_distributions(tmp_path):
    path = tmp_path / "distribution.csv"
    with pytest.raises(ValueError, match="write_choices"):
        write_distribution(path, {"dictator": Answers.from_counts(np.ones(101))})
    with pytest.raises(ValueError, match="2 weights, but 101 choices"):
        write_distribution(path, {"dictator": Answers.from_distribution([0.5, 0.5])})
    assert not path.exists()


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_marks_and_further_columns_do_not_matter(tmp_path, newline, mark):
    lines = [
        "participant,choice, game ,note",
        'a, 33 ,dictator,"x, y"',
        "",
        "b,,dictator,",
        "c,7.0,dictator,",
    ]
    answers = read_answers(written(tmp_path, mark + newline.join(lines).encode()))["dictator"]
    assert (answers.weights[33], answers.weights[7], answers.unparsed) == (1, 1, 1)


def test_choices_that_are_not_whole_or_not_allowed_are_counted(tmp_path):
    content = "game,participant,choice\n" + "".join(
        f"public_goods,{number},{choice}\n" for number, choice in enumerate([5, 21, -1, 2.5, ""])
    )
    answers = read_answers(written(tmp_path, content))["public_goods"]
    assert (answers.total, answers.out_of_set, answers.unparsed) == (5, 3, 1)
    assert answers.outside == pytest.approx(0.8)


def test_mass_on_choices_that_are_not_allowed_is_outside(tmp_path):
    content = "game,choice,probability\ndictator,10,0.5\ndictator,101,0.3\ndictator,0.5,0.1\n"
    answers = read_answers(written(tmp_path, content))["dictator"]
    assert answers.weights[10] == 1
    assert answers.outside == pytest.approx(0.5)


CHOICES = "game,participant,choice\n"
SHARES = "game,choice,probability\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\xff\xfe\x00x", "UTF-8"),
        (CHOICES, "no rows"),
        ("participant,choice\n0,1\n", "no column 'game'; found participant, choice"),
        ("game,choice\ndictator,1\n", "'participant'.*'probability'"),
        (CHOICES + "dictator,0,5\ndictator,1,half\n", ":3: choice 'half' is not a number"),
        (CHOICES + "dictator,0,nan\n", ":2: choice 'nan' is not a number"),
        (CHOICES + "dictater,0,5\n", ":2: .*'dictater'.*'?dictator"),
        (CHOICES + "dictator,0\n", ":2: 2 cells, but 3 columns"),
        (SHARES + "dictator,0,0.5\ndictator,1,-0.1\n", ":3: probability -0.1 is negative"),
        (SHARES + "dictator,0,0.5\ndictator,1,0.6\n", r"dictator sum to 1\.1"),
        (SHARES + "dictator,0,0.5\ndictator,0,0.1\n", ":3: dictator has the choice 0 twice"),
        (SHARES + "dictator,,0.5\n", ":2: choice '' is not a number"),
        (SHARES + "dictator,0,lots\n", ":2: probability 'lots' is not a number"),
    ],
)
def test_bad_files_are_refused_with_the_place_and_the_reason(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read_answers(written(tmp_path, content))


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_answers(tmp_path / "nowhere.csv")
