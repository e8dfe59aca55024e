"""The registry of tasks, and a user's own task of their own table in a file of their own."""

import inspect
import re

import numpy as np
import pytest

from befm_jax import tasks
from befm_jax.data import games
from befm_jax.data.rows import SPLITS
from befm_jax.errors import DataError
from befm_jax.respondents import baselines
from befm_jax.tasks import Task, sources
from befm_jax.tasks.wording import DEFAULT, Template, Wording

EXAMPLE = inspect.cleandoc(tasks.__doc__.split("runs:\n")[1])
FILE = """
from befm_jax.tasks import Task, register

def items(row, wording, rng):
    yield from ()
"""


@pytest.fixture(autouse=True)
def _registries():
    """Leave no task or game of a test behind for another."""
    registries = (tasks._REGISTRY, games._REGISTRY)
    before = [dict(registry) for registry in registries]
    yield
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)


def written(tmp_path, code, name="mine.py"):
    path = tmp_path / name
    path.write_text(code)
    return path


class TestOwnTask:
    """The example in the package's docstring, run as a user would."""

    def test_it_is_short(self):
        assert len(EXAMPLE.splitlines()) <= 30

    def test_from_a_table_to_figures(self, tmp_path):
        (task,) = tasks.select([str(written(tmp_path, EXAMPLE))])
        assert tasks.get("commute") is task
        table = tmp_path / "ways.csv"
        ways = ("Bus", "Bike", "Car", "bike", "[Car]", "Walk")
        table.write_text(
            "id,way,city\n" + "".join(f"{n},{ways[n % 6]},City {n % 2}\n" for n in range(600))
        )
        rows = task.read(table)
        assert rows.left_out.counts == {"outside Bus, Bike, Car": 100}
        assert len(rows.rows) == 500
        made = {}
        for split in SPLITS[1:]:
            rng = np.random.default_rng(0)
            part = rows.part(split, 0)
            made[split] = [i for row in part.rows for i in task.items(row, DEFAULT, rng)]
        assert sum(map(len, made.values())) == 500
        assert not {i.id for i in made["train"]} & {i.id for i in made["test"]}
        # A respondent that only knows the training people, asked about the others.
        fitted = baselines.fit("training_people", made["train"], task.average)
        shares = sum(item.target for item in made["train"]) / len(made["train"])
        responses = list(fitted.respond(made["test"], task.how))
        assert [response.item for response in responses] == [item.id for item in made["test"]]
        for response in responses:
            np.testing.assert_allclose(response.weights, shares)
        np.testing.assert_allclose(shares, [0.2, 0.4, 0.4], atol=0.05)
        (example,) = made["train"][0].examples("commute")
        assert example.messages[-1].text in ("[Bus]", "[Bike]", "[Car]")
        assert "How do you travel to work?" in example.messages[0].text

    def test_loading_it_again_is_no_conflict(self, tmp_path):
        path = written(tmp_path, EXAMPLE)
        first = tasks.load_file(path)
        second = tasks.load_file(path)
        assert [task.name for task in first] == [task.name for task in second] == ["commute"]
        assert tasks.names()[-1] == "commute"


class TestFiles:
    def test_tasks_at_module_level_are_found_and_games_may_stand_beside_them(self, tmp_path):
        code = FILE + (
            "import dataclasses\n"
            "from befm_jax.data import games\n"
            "games.register(dataclasses.replace(games.get('bomb'), id='bomb_again'))\n"
            "OWN = Task('own', items, needs='plays', measures=('accuracy',))\n"
        )
        (task,) = tasks.load_file(written(tmp_path, code))
        assert task.name == "own"
        assert "bomb_again" in games.ids()

    @pytest.mark.parametrize(
        ("code", "says"),
        [
            ("x = 1\n", r"mine\.py: no task in it: call register\(Task"),
            ("x = 1\ny = 1 / 0\n", r"mine\.py:2: ZeroDivisionError"),
            ("x = (\n", r"mine\.py:1: SyntaxError"),
            (
                FILE + "register(Task('games', items, 'plays', ()))\n",
                r"mine\.py:6: task 'games' is already",
            ),
        ],
    )
    def test_a_bad_file_is_an_error_with_its_line_and_registers_nothing(self, tmp_path, code, says):
        before = tasks.names(), games.ids()
        first = (
            "import dataclasses\nfrom befm_jax.data import games\n"
            "games.register(dataclasses.replace(games.get('bomb'), id='left'))\n"
        )
        with pytest.raises(DataError, match=says):
            tasks.load_file(written(tmp_path, code))
        with pytest.raises(DataError):
            tasks.load_file(written(tmp_path, first + code))
        assert (tasks.names(), games.ids()) == before

    def test_a_file_that_is_not_there_is_an_error(self):
        with pytest.raises(DataError, match=r"nowhere\.py: no such file of tasks"):
            tasks.select("nowhere.py")


class TestRegistry:
    def test_a_misspelt_name_names_the_near_ones(self):
        with pytest.raises(DataError, match="unknown task 'game': did you mean 'games'"):
            tasks.select("game")
        with pytest.raises(DataError, match=r"no tasks selected; there are: .*, games,"):
            tasks.select(" , ")

    def test_what_names_begin_with_is_all_of_them(self):
        surveys = [name for name in tasks.names() if name.startswith("survey/")]
        assert [task.name for task in tasks.select("survey")] == surveys
        assert [task.name for task in tasks.select("games")] == ["games"]  # a task of this name

    def test_each_is_chosen_once_in_the_order_asked(self):
        chosen = tasks.select("games/person, games,games/person")
        assert [task.name for task in chosen] == ["games/person", "games"]
        assert all(isinstance(task, Task) for task in chosen)


class TestWording:
    WORDING = Wording({"w": Template("You are {{ who }}.", "{{ what }}?")})

    def test_fields_are_filled_in(self):
        system, user = self.WORDING("w", who="<me>", what="So")
        assert (system.text, user.text) == ("You are <me>.", "So?")

    @pytest.mark.parametrize(
        ("name", "template", "says"),
        [
            ("w", "{{ what }}", "'who' is undefined"),
            ("v", "", "unknown wording 'v'"),
            ("bad", "{{ what", "wording 'bad'"),
            ("bad", "{{ what.__class__.__mro__ }}", "wording 'bad'"),
        ],
    )
    def test_what_can_not_be_filled_in_is_an_error(self, name, template, says):
        wording = Wording({**self.WORDING.templates, "bad": Template("", template)})
        with pytest.raises(DataError, match=says):
            wording(name, what="So")


class TestWordingOfOnesOwn:
    def test_its_texts_replace_those_of_the_package(self, tmp_path):
        (tmp_path / "mine.toml").write_text(
            '["survey/answer"]\nsystem = "Be {{ about.Sex }}."\nuser = "{{ statement }}?"\n'
        )
        (source,) = sources.select("survey/groups", [], wording=str(tmp_path / "mine.toml"))
        item = source.items(most=1)[0]
        assert [message.text for message in item.prompt] == [
            "Be female.",
            "I am the life of the party.?",
        ]
        ours = DEFAULT.templates
        assert source.wording.templates["survey/traits"] == ours["survey/traits"]

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("[", "not valid TOML"),
            (
                '["survey/anser"]\nuser = "x"',
                "unknown wording 'survey/anser': did you mean 'survey/answer'",
            ),
            ('["survey/answer"]\nsystem = "x"', "survey/answer: it must have a user's text"),
            ('["survey/answer"]\nuser = 3', "survey/answer: system and user must be texts"),
            ('user = "x"', "user: it must have a user's text"),
        ],
    )
    def test_a_bad_file_is_an_error_with_its_entry(self, tmp_path, text, says):
        path = tmp_path / "bad.toml"
        path.write_text(text)
        with pytest.raises(DataError, match=re.escape(str(path)) + ".*" + re.escape(says)):
            Wording.read(path)


def test_everything_is_what_the_package_has_data_of_and_what_a_model_learnt():
    spec = sources.everything({})
    assert {"games", "survey/groups", "knowledge/choice", "sensitivity", "play/dilemma"} <= {
        *spec.split(",")
    }
    assert "=" not in spec
    assert len(sources.select(spec, [games.get("bomb")])) == len(spec.split(","))
    learnt = {"sources": [{"task": "games", "table": "people.csv"},
                          {"task": "survey/next", "table": "bigfive.csv"}]}  # fmt: skip
    assert {*sources.everything(learnt).split(",")} - {*spec.split(",")} == {
        *("games=people.csv", "survey/next=bigfive.csv")
    }


def test_a_check_of_the_question_is_nothing_to_learn_from():
    with pytest.raises(DataError, match="sensitivity: nobody's answers are known to learn from"):
        sources.families(sources.select("sensitivity", [games.get("bomb")]), 0, False)
