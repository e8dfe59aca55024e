"""Recorded answers: five layouts of a file, read as a respondent and written by a simulation."""

import builtins
import csv
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import wasserstein_distance

from befm_jax import tasks
from befm_jax.data import choices, games
from befm_jax.data.choices import Plays
from befm_jax.data.items import AnswerSet, FreeText, Item, Message
from befm_jax.data.responses import Exact, Response, ResponseFile, Sampled
from befm_jax.errors import DataError
from befm_jax.respondents.recorded import Recorded, write_choices, write_distribution
from befm_jax.tasks.games import GAMES, item_of

ASK = (Message("user", "?"),)
DICTATOR, BANKER, GOODS, PUSH = map(
    item_of, ("dictator", "trust_banker", "public_goods", "push_pull")
)
TENTHS = Item("tenths", ASK, AnswerSet.numbers([0, 0.1, 0.25]))
WAYS = Item("ways", ASK, AnswerSet.labels("Bus", "Bike"))
FREE = Item("free", ASK, FreeText())
IN_THE_STUDY = {
    "dictator": "Dictator",
    "ultimatum_proposer": "Proposer",
    "ultimatum_responder": "Responder",
    "trust_investor": "Investor",
    "trust_banker": "Banker",
    "public_goods": "Public Goods",
    "bomb": "Bomb",
}
CHOICES = "game,participant,choice\n"
SHARES = "game,choice,probability\n"


def written(tmp_path, content, name="answers.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def responses_of(path, *items, how=None):
    how = how or Exact()
    return {r.item: r for r in Recorded(path).respond(items, how)}


def of_person(person, game):
    (item,) = tasks.games.person(Plays(person, {game: 0}), None, None)
    return item


def response_of(path, item, how=None):
    return responses_of(path, item, how=how)[item.id]


class TestChoices:
    def test_they_come_back_as_they_were_written(self, tmp_path):
        path = tmp_path / "new folder" / "choices.csv"
        asked = [DICTATOR, GOODS]
        sampled = [
            Response.from_counts("public_goods", GOODS.answers.one(20)),
            Response.from_counts(
                "dictator",
                DICTATOR.answers.one(0) + 2 * DICTATOR.answers.one(50),
                1,
                1,
                ("[50]", "none", "[0]", "[101]", "[50]"),
            ),
        ]
        write_choices(path, asked, sampled)
        # In the order of the draws, where their texts are known.
        assert path.read_text() == CHOICES + (
            "dictator,0,50\ndictator,1,\ndictator,2,0\ndictator,3,\ndictator,4,50\n"
            "public_goods,0,20\n"
        )
        back = responses_of(path, *asked)
        assert not Recorded(path).exact
        dictator = back["dictator"]
        assert (dictator.draws, dictator.unread, dictator.exact) == (5, 2, False)
        np.testing.assert_array_equal(dictator.weights, sampled[1].weights)
        np.testing.assert_array_equal(back["public_goods"].weights, sampled[0].weights)

    def test_without_texts_they_are_in_the_order_of_the_answers(self, tmp_path):
        path = tmp_path / "choices.csv"
        items = [PUSH, TENTHS, WAYS]
        write_choices(
            path,
            items,
            [
                Response.from_counts("push_pull", [1, 2], 1),
                Response.from_counts("tenths", [0, 1, 1]),
                Response.from_counts("ways", [0, 1]),
            ],
        )
        assert path.read_text() == CHOICES + (
            "push_pull,0,0\npush_pull,1,1\npush_pull,2,1\npush_pull,3,\n"
            "tenths,0,0.1\ntenths,1,0.25\nways,0,Bike\n"
        )
        back = responses_of(path, *items)
        assert back["push_pull"].weights.tolist() == [1, 2]
        assert back["tenths"].weights.tolist() == [0, 1, 1]
        assert back["ways"].weights.tolist() == [0, 1]

    @pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
    @pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
    def test_line_ends_marks_and_further_columns_do_not_matter(self, tmp_path, newline, mark):
        lines = [
            "participant,choice, game ,note",
            'a, 33 ,dictator,"x, y"',
            "",
            "b,,dictator,",
            "c,7.0,dictator,",
        ]
        response = response_of(written(tmp_path, mark + newline.join(lines).encode()), DICTATOR)
        assert (response.weights[33], response.weights[7], response.unread) == (1, 1, 1)

    def test_what_can_not_be_used_is_counted_and_kept(self, tmp_path):
        rows = ("5", "21", "-1", "2.5", "", "half", "nan")
        content = CHOICES + "".join(f"public_goods,{n},{cell}\n" for n, cell in enumerate(rows))
        response = response_of(written(tmp_path, content), GOODS)
        assert (response.draws, response.unread, response.weights.sum()) == (7, 3, 1)
        assert response.outside == pytest.approx(6 / 7)
        assert response.texts == rows[1:]

    def test_columns_and_games_in_capitals_and_semicolons_are_read(self, tmp_path):
        content = "Game;PARTICIPANT;Choice\r\nPush_Pull;0;Push\r\nPUSH_PULL;1;Pull\r\n"
        recorded = Recorded(written(tmp_path, content.replace("PUSH_PULL", "Push_Pull")))
        assert recorded.unasked([PUSH]) == []
        ((response),) = recorded.respond([PUSH], Exact())
        assert response.weights.tolist() == [1, 1]

    def test_columns_of_weights_are_named(self, tmp_path):
        path = written(tmp_path, "game,participant,choice,w,pspwght\npush_pull,0,1,2,3\n")
        assert Recorded(path).weights == ["pspwght"]
        assert Recorded(written(tmp_path, CHOICES + "push_pull,0,1\n")).weights == []

    def test_names_are_read_like_values(self, tmp_path):
        content = CHOICES + "".join(
            f"push_pull,{n},{cell}\n" for n, cell in enumerate(["Push", "pull", "[Pull]", "0", "1"])
        )
        assert response_of(written(tmp_path, content), PUSH).weights.tolist() == [2, 3]

    def test_free_text_is_kept(self, tmp_path):
        path = written(tmp_path, CHOICES + 'free,0,"So, so"\nfree,1,x\n')
        response = response_of(path, FREE)
        assert (response.weights, response.draws) == (None, 2)
        assert response.texts == ("So, so", "x")


class TestDistribution:
    def test_it_comes_back_as_it_was_written_with_the_mass_of_the_whole_model(self, tmp_path):
        path = tmp_path / "distribution.csv"
        rng = np.random.default_rng(0)
        mass = rng.dirichlet(np.ones(len(BANKER.answers))) * 0.9
        exact = [
            Response.from_mass("trust_banker", mass),
            Response.from_mass("dictator", DICTATOR.answers.one(7)),
        ]
        write_distribution(path, [DICTATOR, BANKER], exact)
        lines = path.read_text().splitlines()
        assert lines[0] == "game,choice,probability"
        assert lines[8] == "dictator,7,1.0"
        probabilities = [
            float(line.rsplit(",", 1)[1]) for line in lines if line.startswith("trust_banker")
        ]
        np.testing.assert_allclose(probabilities, mass, rtol=1e-14)
        back = responses_of(path, DICTATOR, BANKER)
        assert Recorded(path).exact
        for response in exact:
            np.testing.assert_allclose(back[response.item].weights, response.weights, rtol=1e-14)
            assert back[response.item].outside == pytest.approx(response.outside, abs=1e-12)
            assert back[response.item].exact

    def test_mass_on_what_is_not_allowed_is_outside(self, tmp_path):
        path = written(tmp_path, SHARES + "dictator,10,0.5\ndictator,101,0.3\ndictator,0.5,0.1\n")
        response = response_of(path, DICTATOR)
        assert response.weights[10] == 1
        assert response.outside == pytest.approx(0.5)

    def test_names_are_read_like_values(self, tmp_path):
        path = written(tmp_path, SHARES + "push_pull,[push],0.25\npush_pull,1,0.25\n")
        assert response_of(path, PUSH).weights.tolist() == [0.5, 0.5]

    def test_it_is_answered_as_it_is_whatever_was_asked_for(self, tmp_path):
        shares = written(tmp_path, SHARES + "push_pull,0,1\n", "shares.csv")
        draws = written(tmp_path, CHOICES + "push_pull,0,1\n", "draws.csv")
        assert response_of(shares, PUSH, Sampled(50)).exact
        assert response_of(draws, PUSH, Exact()).draws == 1

    @pytest.mark.parametrize(
        ("responses", "says"),
        [
            ([Response.from_counts("push_pull", [1, 1])], "belongs in a choices.csv"),
            ([Response.from_mass("push_pull", [0.1, 0.1, 0.1])], "3 weights, but 2 answers"),
            ([Response("push_pull", None, True)], "free text"),
            ([], "no response to it"),
        ],
    )
    def test_what_does_not_fit_is_not_written(self, tmp_path, responses, says):
        path = tmp_path / "distribution.csv"
        with pytest.raises(ValueError, match=says):
            write_distribution(path, [PUSH], responses)
        assert not path.exists()

    def test_nor_is_an_exact_response_as_choices(self, tmp_path):
        with pytest.raises(ValueError, match=r"belongs in a distribution\.csv"):
            write_choices(tmp_path / "c.csv", [PUSH], [Response.from_mass("push_pull", [1, 0])])


class TestTexts:
    ODD = 'Well\u2028"[Push]", \ud800'

    def test_each_line_is_a_draw_that_the_items_answer_set_reads(self, tmp_path):
        lines = [
            {"game": "push_pull", "text": self.ODD},
            {"item": "push_pull", "text": "No. I pull."},
            {"game": "push_pull", "text": "[Jump]"},
            {"game": "push_pull", "text": "I can't\u2028say"},
            {"game": "push_pull", "text": None},
            {"item": "dictator", "text": "[$33]", "model": "another column"},
        ]
        text = "\n\n".join(
            json.dumps(line, ensure_ascii=number > 0) for number, line in enumerate(lines[1:])
        )
        path = written(tmp_path, json.dumps(lines[0]) + "\n" + text, "answers.jsonl")
        push = responses_of(path, PUSH, DICTATOR)["push_pull"]
        assert push.weights.tolist() == [1, 1]
        assert (push.draws, push.unread) == (5, 2)
        assert push.texts == ("[Jump]", "I can't\u2028say", "")
        assert response_of(path, DICTATOR).weights[33] == 1
        assert Recorded(path).layout == "texts"
        # What was read goes into a file of responses as it is.
        file = ResponseFile(tmp_path / "responses.jsonl", {}, Exact())
        for response in Recorded(path).respond([PUSH, DICTATOR], Exact()):
            file.append(response)

    def test_free_text_is_kept_and_what_never_came_is_counted(self, tmp_path):
        lines = [{"item": "free", "text": self.ODD}, {"item": "free", "text": None}]
        path = written(tmp_path, "\n".join(map(json.dumps, lines)), "answers.jsonl")
        response = response_of(path, FREE)
        assert response.texts == (self.ODD,)
        assert (response.draws, response.unread, response.outside) == (2, 1, 0.5)

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ("{", r"jsonl:2: not JSON"),
            ("[1]", r"jsonl:2: line is a list; it must be a JSON object"),
            ('{"text": "x"}', r"jsonl:2: item is None; it must be an item's id"),
            ('{"item": 3, "text": "x"}', r"jsonl:2: item is 3"),
            ('{"item": "x"}', r"jsonl:2: text is missing; it must be a text or null"),
            ('{"item": "x", "text": 5}', r"jsonl:2: text is 5"),
        ],
    )
    def test_a_damaged_line_is_an_error_with_its_number(self, tmp_path, line, says):
        path = written(tmp_path, '{"item": "x", "text": "y"}\n' + line, "answers.jsonl")
        with pytest.raises(DataError, match=says):
            Recorded(path)


class TestResponses:
    def file(self, tmp_path, *responses):
        path = tmp_path / "responses.jsonl"
        file = ResponseFile(path, {"model": "made up"}, Sampled(7))
        for response in responses:
            file.append(response)
        return path

    def test_they_are_answered_as_they_are(self, tmp_path):
        recorded = Response.from_counts("push_pull", [3, 1], 2, 1, ("x",), 0.5)
        path = self.file(tmp_path, recorded, Response("free", None, False, texts=("so",)))
        found = responses_of(path, PUSH, FREE)
        assert found["push_pull"].weights.tolist() == [3, 1]
        assert found["push_pull"].ends_after_answer == 0.5
        assert found["free"].texts == ("so",)
        described = Recorded(path).describe()
        assert described["respondent"] == {"model": "made up"}
        assert described["how"]["n"] == 7
        assert not Recorded(path).exact

    def test_another_schema_is_named(self, tmp_path):
        head = {"schema": "befm_jax.responses/9", "respondent": {}, "how": {}}
        with pytest.raises(DataError, match=r"schema is 'befm_jax\.responses/9'; it must be"):
            Recorded(written(tmp_path, json.dumps(head) + "\n", "responses.jsonl"))

    def test_another_kind_of_item_is_an_error(self, tmp_path):
        path = self.file(tmp_path, Response.from_counts("dictator", [3, 1]))
        with pytest.raises(DataError, match="2 weights; the item has 101 answers"):
            response_of(path, DICTATOR)
        path = self.file(tmp_path, Response.from_counts("free", [3, 1]))
        with pytest.raises(DataError, match="2 weights; the item has free text"):
            response_of(path, FREE)


class TestParquet:
    @pytest.mark.parametrize(
        ("columns", "text"),
        [
            (
                {"game": ["dictator"] * 3, "participant": [0, 1, 2], "choice": [5.0, None, 101.0]},
                CHOICES + "dictator,0,5\ndictator,1,\ndictator,2,101\n",
            ),
            (
                {"game": ["push_pull"] * 2, "choice": ["Push", "Pull"], "probability": [0.1, 0.3]},
                SHARES + "push_pull,Push,0.1\npush_pull,Pull,0.3\n",
            ),
        ],
    )
    def test_it_says_what_the_csv_says(self, tmp_path, columns, text):
        pyarrow = pytest.importorskip("pyarrow", reason="needs the extra 'tables'")
        parquet = pytest.importorskip("pyarrow.parquet")
        path = tmp_path / "answers.parquet"
        parquet.write_table(pyarrow.table(columns), path)
        item = DICTATOR if "participant" in columns else PUSH
        one, other = (response_of(p, item) for p in (path, written(tmp_path, text)))
        np.testing.assert_array_equal(one.weights, other.weights)
        assert (one.exact, one.draws, one.unread) == (other.exact, other.draws, other.unread)
        assert one.outside == pytest.approx(other.outside)

    def test_what_is_none_is_an_error(self, tmp_path):
        pytest.importorskip("pyarrow", reason="needs the extra 'tables'")
        with pytest.raises(DataError, match="not a Parquet file"):
            Recorded(written(tmp_path, CHOICES, "answers.parquet"))

    def test_without_pyarrow_the_extra_is_named(self, tmp_path, monkeypatch):
        imported = builtins.__import__

        def without(name, *rest):
            if name.split(".")[0] == "pyarrow":
                raise ImportError(name)
            return imported(name, *rest)

        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.raises(DataError, match=r"pip install 'befm_jax\[tables\]'"):
            Recorded(written(tmp_path, "x", "answers.parquet"))


class TestWhoIsAsked:
    def test_persons_items_are_answered_by_their_game_if_it_is_asked_plainly(self, tmp_path):
        path = written(tmp_path, CHOICES + "push_pull,0,Pull\n")
        mine = of_person("7", "push_pull")
        assert response_of(path, mine).weights.tolist() == [0, 1]
        other = item_of("push_pull", id="7/push_pull", labels={"person": "7"})
        assert not Recorded(path).serves(other)  # whose prompt may be another one

    def test_answers_to_other_words_are_no_answers(self, tmp_path):
        path = tmp_path / "responses.jsonl"
        (response,) = Recorded(written(tmp_path, CHOICES + "push_pull,0,1\n")).respond(
            [PUSH], Exact()
        )
        kept = ResponseFile(path, {}, Sampled(1))
        kept.append(replace(response, asked=PUSH.fingerprint))
        assert response_of(path, PUSH).draws == 1
        reworded = replace(PUSH, prompt=(Message("user", "Push or pull?"),))
        with pytest.raises(DataError, match="push_pull was asked in other words"):
            response_of(path, reworded)

    def test_an_items_own_answers_come_first(self, tmp_path):
        path = written(tmp_path, CHOICES + "push_pull,0,Pull\n7/push_pull,0,Push\n")
        mine = of_person("7", "push_pull")
        found = responses_of(path, mine, PUSH)
        assert [r.weights.tolist() for r in found.values()] == [[1, 0], [0, 1]]

    def test_what_is_missing_and_what_is_left_is_said(self, tmp_path):
        recorded = Recorded(written(tmp_path, CHOICES + "dictater,0,5\npush_pull,0,1\n"))
        assert recorded.serves(PUSH)
        assert not recorded.serves(DICTATOR)
        assert recorded.unasked([PUSH, DICTATOR]) == ["dictater"]
        with pytest.raises(DataError, match="unknown item 'dictator': did you mean 'dictater'"):
            list(recorded.respond([PUSH, DICTATOR], Exact()))

    def test_its_name_and_origin(self, tmp_path):
        path = written(tmp_path, CHOICES + "push_pull,0,1\n", "gpt.csv")
        assert Recorded(path).name == "gpt"
        assert Recorded(path, "GPT").name == "GPT"
        described = Recorded(path).describe()
        assert described["layout"] == "choices"
        assert described["answers"] == str(path)
        assert len(described["sha256"]) == 64
        assert (described["respondent"], described["how"]) == (None, None)

    def test_what_simulate_wrote_beside_a_table_says_whose_answers_they_are(self, tmp_path):
        path = written(tmp_path, CHOICES + "push_pull,0,1\n")
        made = {"model": {"trained_on": {"split_seed": 3}}, "answers": {"mode": "sampled"}}
        written(tmp_path, json.dumps(made), "answers.csv.json")
        described = Recorded(path).describe()
        assert described["respondent"] == made["model"]
        assert described["how"] == made["answers"]
        for damaged, says in (
            ("[]", "holds a list"),
            ("[" * 100_000, "not valid JSON"),
            ('{"model": "tuned"}', "model is 'tuned'; it must be a JSON object"),
            ('{"answers": [1]}', r"answers is \[1\]; it must be a JSON object"),
        ):
            written(tmp_path, damaged, "answers.csv.json")
            with pytest.raises(DataError, match=rf"csv\.json: {says}"):
                Recorded(path)

    def test_a_table_that_was_changed_is_not_the_one_that_the_file_beside_it_describes(
        self, tmp_path
    ):
        path = written(tmp_path, CHOICES + "push_pull,0,1\ndictator,0,50\n")
        made = {"model": {"name": "tuned"}, "fingerprint": Recorded(path).fingerprint}
        written(tmp_path, json.dumps(made), "answers.csv.json")
        # Saved again by another program: other line ends, numbers and order.
        path.write_text(CHOICES.replace("\n", "\r\n") + "Dictator,0,50.0\r\npush_pull,0,1\r\n")
        assert Recorded(path).describe()["respondent"] == made["model"]
        path.write_text(CHOICES + "push_pull,0,1\ndictator,0,51\n")
        with pytest.raises(DataError, match=r"answers that answers\.csv\.json describes"):
            Recorded(path)


def test_another_models_answers_have_the_distance_that_raw_numbers_give(moblab_csv, tmp_path):
    """From texts and a table to a figure, against scipy on the numbers as they are in the files."""
    path = moblab_csv.parents[1] / "baselines" / "gpt4o_default_prompt.json"
    if not path.exists():
        pytest.skip("needs GPT-4o's answers at ../shared/data/baselines, absent here")
    answered = json.loads(path.read_text())["choices"]
    lines = [
        json.dumps({"game": game, "text": f"I choose [{choice}]."})
        for game, title in IN_THE_STUDY.items()
        for choice in answered[title]
    ]
    recorded = Recorded(written(tmp_path, "\n".join(lines), "gpt4o.jsonl"))
    chosen = [games.get(name) for name in IN_THE_STUDY]
    with moblab_csv.open(newline="") as file:
        table = list(csv.DictReader(file))
    people = choices.counted(choices.read(moblab_csv, chosen), chosen)
    distances = []
    for game, row in zip(chosen, people.rows, strict=True):
        (item,) = GAMES.items(row, None, None)
        (response,) = recorded.respond([item], Exact())
        found = wasserstein_distance(game.values, game.values, response.weights, item.target)
        raw = [float(person[game.reference]) for person in table if person[game.reference]]
        assert found == pytest.approx(
            wasserstein_distance(answered[IN_THE_STUDY[game.id]], raw), rel=1e-9
        )
        distances.append(100 * found / game.span)
    assert np.mean(distances) == pytest.approx(22.975, abs=5e-4)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"\xff\xfe\x00x", "UTF-8"),
        (CHOICES, "has no answers"),
        ("participant,choice\n0,1\n", r"csv:1: no column 'game'; found 'participant', 'choice'"),
        ("game,choice\ndictator,1\n", r"csv:1: .*'participant'.*'probability'"),
        (CHOICES + "dictator,0\n", r"csv:2: 2 cells, but 3 columns"),
        (SHARES + "dictator,0,0.5\ndictator,1,-0.1\n", r"csv:3: probability is -0\.1; it must"),
        (SHARES + "dictator,0,0.5\ndictator,1,0.6\n", r"dictator sum to 1\.1; they must"),
        (
            SHARES + "dictator,0,0.5\ndictator,0.0,0.1\n",
            r"csv:3: dictator has the choice 0.0 twice",
        ),
        (SHARES + "dictator,0,0.5\ndictator,[0],0.1\n", r"csv:3: dictator has the choice \[0\] tw"),
        (SHARES + "dictator,200,0.5\ndictator,200,0.1\n", r"csv:3: dictator has the choice 200 tw"),
        (SHARES + "dictator,,0.5\n", r"csv:2: choice '' is no answer"),
        (SHARES + "dictator,half,0.5\n", r"csv:2: choice 'half' is not a number"),
        (SHARES.replace(",", ";") + "dictator;0;0,5\n", r"csv:2: .* not a number; write 0\.5"),
        (SHARES + "dictator,0,lots\n", r"csv:2: probability 'lots' is not a number"),
        (SHARES + "dictator,0,nan\n", r"csv:2: probability 'nan' is not a number"),
        (SHARES + "dictator,0,\n", r"csv:2: probability '' is not a number"),
    ],
)
def test_bad_files_are_refused_with_the_place_and_the_reason(tmp_path, content, says):
    with pytest.raises(DataError, match=says):
        response_of(written(tmp_path, content), DICTATOR)


def test_probabilities_are_of_no_free_text(tmp_path):
    with pytest.raises(DataError, match="the item asks for free text"):
        response_of(written(tmp_path, SHARES + "free,so,1\n"), FREE)


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        Recorded(tmp_path / "nowhere.csv")


def test_answers_are_read_without_jax():
    code = (
        "import sys, befm_jax.respondents.recorded, befm_jax.respondents.baselines;"
        "sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
