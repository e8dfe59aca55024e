"""What can't be used of a table is counted; what is drawn is what the table holds."""

from collections import Counter

import bench_data
import pytest

from befm_jax.errors import DataError


def test_a_questionnaire_is_an_example_an_answer(questionnaires):
    data = bench_data.bigfive(questionnaires, sample=10, seed=0)
    assert Counter(one.messages[-1].text for one in data.examples) == {
        "[4]": 50,
        "[2]": 49,
        "[5]": 50,
    }
    assert len({one.messages[0].text for one in data.examples}) == 1
    texts = [[message.text for message in one.messages] for one in data.examples]
    who = [user for _, user, answer in texts if answer == "[2]"]
    assert all("25" in user and "male" in user and "RO" in user for user in who)
    assert not any("I am E1." in user for user in who)
    assert "3 of 3 respondents" in data.said
    assert "missing: 1" in data.said
    assert "above 100: 1" in data.said


def test_a_sample_of_respondents_is_whole_people(questionnaires):
    data = bench_data.bigfive(questionnaires, sample=1, seed=0)
    assert len({one.messages[-1].text for one in data.examples}) == 1
    assert len(data.examples) in (49, 50)


def test_abstracts_are_learnt_after_their_titles(tmp_path):
    folder = tmp_path / "literature_aer"
    folder.mkdir()
    head = "journal,year,title,abstract,url\n"
    (folder / "aer_2020_2026.csv").write_text(
        f'{head}A,2020,One,"Text, of one.",u\nA,2020,Two,,u\n'
    )
    (folder / "aej_2020_2026.csv").write_text(f"{head}B,2021,Three,Text of three.,u\n")
    data = bench_data.literature(tmp_path, sample=5, seed=0)
    found = {one.messages[0].text: one.messages[-1].text for one in data.examples}
    assert found == {"One": "Text, of one.", "Three": "Text of three."}
    assert "title or abstract: 1)" in data.said


@pytest.mark.parametrize("name", list(bench_data.READERS))
def test_a_table_that_is_not_there_is_named(tmp_path, name):
    with pytest.raises(DataError, match=r"--shared names the folder that holds \w+/\w+\.[ct]sv"):
        bench_data.READERS[name](tmp_path, 1, 0)


def test_the_real_table_is_read_whole(moblab_csv):
    data = bench_data.moblab(moblab_csv.parents[1], 0, 0)
    assert sum(one.weight for one in data.examples) == 65_596
    assert len({one.messages[-2].text for one in data.examples}) == 7


def test_observations_drawn_one_by_one_follow_the_weights():
    examples = bench_data.game_examples()
    drawn = bench_data.one_by_one(examples, 3000, seed=0)
    assert {one.weight for one in drawn} == {1.0}
    for game in bench_data.seven_games():
        total = sum(one.weight for one in examples)
        share = sum(one.weight for one in examples if one.messages[:-1] == game.prompt()) / total
        found = sum(one.messages[:-1] == game.prompt() for one in drawn) / len(drawn)
        assert found == pytest.approx(share, abs=0.04)
