"""Tables, examples, recorded answers and results with bytes changed: read, or refused in words.

Never another exception, and never a hang: a person gets a line that names the file.
"""

import json
import random

import pytest

from befm_jax.data import choices, examples, games
from befm_jax.data.responses import Response, ResponseFile, Sampled
from befm_jax.errors import DataError
from befm_jax.evals import results
from befm_jax.evaluate import how_recorded
from befm_jax.respondents.recorded import Recorded
from befm_jax.tasks import sources
from befm_jax.tasks.games import item_of
from tests.helpers import made_up_results
from tests.helpers.damage import damaged

GAMES = games.select("bomb,public_goods")
ITEMS = [item_of(game) for game in GAMES]
TRAINED_ON = {"sources": [{"fingerprint": "ab", "sketch": "00ff", "split_seed": 0}]}
MUTATIONS = 40


def read_choices(path):
    return choices.describe(choices.part(choices.read(path, GAMES), "train"))


def read_answers(path):
    recorded = Recorded(path)
    how_recorded(recorded)
    sources.trained_on(recorded.describe()["respondent"] or {}, path)
    return list(recorded.respond([item for item in ITEMS if recorded.serves(item)], Sampled()))


def read_beside(path):
    path.with_suffix("").write_text("game,participant,choice\nbomb,0,5\n")
    return read_answers(path.with_suffix(""))


def responses(folder):
    path = folder / "made.jsonl"
    file = ResponseFile(path, {"model": "m", "trained_on": TRAINED_ON}, Sampled(7))
    for item in ITEMS:
        counts = [3, *[1] * (len(item.answers) - 1)]
        file.append(Response.from_counts(item.id, counts, 2, 1, ("x",), 0.5))
    return path.read_text()


def figures(folder):
    made_up_results.made_up().write(folder)
    return (folder / "results.json").read_text()


PLAYS = range(30)
CHAT = [
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"user": "q", "assistant": "a", "weight": 2},
]
ALPACA = {"instruction": "q", "input": "i", "output": "a", "history": [["x", "y"]], "system": "s"}
BESIDE = {"model": {"trained_on": TRAINED_ON}, "answers": {"mode": "sampled", "n": 5, "seed": 0}}
FILES = {
    "moblab.csv": (
        "UserID,bomb,PG,sex\n" + "".join(f"{n},{n},{n % 21},f\n" for n in PLAYS),
        read_choices,
    ),
    "tidy.csv": (
        "game,participant,choice,weight\n" + "".join(f'bomb,{n},{n},"0.{n}"\n' for n in PLAYS),
        read_choices,
    ),
    "bars.csv": (
        "game,choice,count\n" + "".join(f"bomb,{n},{n}\n" for n in PLAYS),
        read_choices,
    ),
    "alpaca.json": (json.dumps([ALPACA, ALPACA]), examples.read),
    "chat.jsonl": ("\n".join(map(json.dumps, CHAT)), examples.read),
    "examples.csv": ('system,user,answer,weight\ns,"q\nr",a,2\n', examples.read),
    "shares.csv": (
        "game,choice,probability\n" + "".join(f"bomb,{n},0.1\n" for n in range(9)),
        read_answers,
    ),
    "drawn.csv": (
        "game,participant,choice\n" + "".join(f"bomb,{n},{n}\n" for n in range(9)),
        read_answers,
    ),
    "texts.jsonl": (
        "".join(json.dumps({"game": "bomb", "text": f"[{n}]"}) + "\n" for n in range(4)),
        read_answers,
    ),
    "responses.jsonl": (responses, read_answers),
    "drawn.csv.json": (json.dumps(BESIDE), read_beside),
    "results.json": (figures, results.read),
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_read_or_refused_in_words(tmp_path, name):
    made, read = FILES[name]
    content = (made if isinstance(made, str) else made(tmp_path)).encode()
    path = tmp_path / name
    path.write_bytes(content)
    read(path)
    refusals = []
    for seed in range(MUTATIONS):
        path.write_bytes(damaged(content, random.Random(f"{name} {seed}"), "json" in name))
        try:
            read(path)
        except DataError as error:
            refusals.append(str(error))
    assert 0 < len(refusals) < MUTATIONS
    assert [line for line in refusals if path.with_suffix("").name not in line] == []
