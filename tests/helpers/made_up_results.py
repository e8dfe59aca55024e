"""Results of three tasks and three respondents, with text that nobody should trust."""

import numpy as np

from befm_jax.data.items import AnswerSet, FreeText, Item, Message
from befm_jax.data.responses import Exact, Response, Sampled
from befm_jax.evals.evaluate import evaluate
from befm_jax.evals.results import Results
from befm_jax.tasks import Task

EVIL = "<script>alert('x')</script> & $\\frac{"
FIRST_PROMPT = f"<|begin_of_text|>How much?\n\n{EVIL}<|eot_id|>"
ASKED = (Message("user", "How much?"),)


def _items_of(row, wording, rng):
    """A made-up question <b>of</b> a game."""


GAMES = Task(
    "games", _items_of, "histograms", ("wasserstein", "mean_difference", "log_score"), "game"
)
SURVEY = Task(
    f"survey {EVIL}", _items_of, "questionnaires", ("accuracy", "spearman"), groups=("sex",)
)
PAPERS = Task("papers", _items_of, "papers", ("rouge1",))


def games(seed: int, sampled: bool = False, inside: float = 0.99):
    """Three histograms and a respondent's answers to two and a half of them."""
    rng = np.random.default_rng(seed)
    items, responses = [], {}
    for name, length in (("bomb", 101), ("banker", 151), ("goods", 21)):
        answers = AnswerSet.numbers(range(length), EVIL)
        counts = np.random.default_rng(9).multinomial(200, np.full(length, 1 / length))
        title = {"title": EVIL} if name == "bomb" else {}
        items.append(Item(name, ASKED, answers, counts, {"game": name}, title))
        shares = rng.dirichlet(np.ones(length))
        responses[name] = (
            Response.from_counts(name, rng.multinomial(90, shares), 7, 3, ends_after_answer=0.625)
            if sampled
            else Response.from_mass(name, shares * inside)
        )
    items.append(Item("unplayed", ASKED, answers, None, {"game": "unplayed"}))
    return items, responses


def survey():
    """Forty people's answers to one question, and what somebody says of each."""
    rng = np.random.default_rng(0)
    answers = AnswerSet.labels("never", "sometimes", "always", values=(0, 1, 2))
    items, responses = [], {}
    for person in range(40):
        sex = "fm"[person % 2]
        key = f"p{person}"
        target = answers.one(rng.integers(3))
        items.append(Item(key, ASKED, answers, target, {"person": key, "sex": sex}))
        responses[key] = Response.from_mass(key, rng.dirichlet(np.ones(3)) * 0.9)
    return items, responses


def made_up() -> Results:
    """Three respondents of one task, one of the two others; the base answers mostly outside."""
    found = Results(
        people={
            "games": {
                "source": f"a table, {EVIL}",
                "split": "test",
                "fingerprint": "f00d",
                "left_out": {f"out of range {EVIL}": 31},
            }
        },
        main="tuned",
        beside={"uniform": "Every answer equally likely."},
        extra={"train": {"steps": 120, "loss": list(range(50)), EVIL: {"numpy": "2"}}},
    )
    described = {
        "name": EVIL,
        "layers": 4,
        "first_prompt": {"item": "bomb", "text": FIRST_PROMPT},
    }
    for name, own in (
        ("base", games(0, inside=0.4)),
        ("tuned", games(1)),
        ("tuned, sampled", games(1, sampled=True)),
    ):
        items, responses = own
        uniform = {
            item.id: Response(item.id, np.full(len(item.answers), 1 / len(item.answers)), True)
            for item in items
        }
        sampled = "sampled" in name
        found.add(
            evaluate(
                GAMES, items, responses, respondent=name, beside={"uniform": uniform}, resamples=60
            ),
            described if name == "tuned" else {},
            Sampled(n=100) if sampled else Exact(),
            warning=f"may have seen these people {EVIL}" if name == "base" else "",
        )
    items, responses = survey()
    found.add(
        evaluate(SURVEY, items, responses, respondent="tuned", resamples=60), described, Exact()
    )
    paper = Item("paper", ASKED, FreeText(), ("people give half",))
    text = Response("paper", None, False, draws=1, texts=(f"people give {EVIL}",))
    found.add(
        evaluate(PAPERS, [paper], {"paper": text}, respondent="tuned", resamples=60),
        described,
        Sampled(n=1),
    )
    return found
