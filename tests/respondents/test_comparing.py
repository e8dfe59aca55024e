"""Respondents compared with people: what is recorded of those whom the baselines know."""

import pytest

from befm_jax.data import games
from befm_jax.data.responses import Exact
from befm_jax.evals.results import Results
from befm_jax.respondents import baselines, comparing
from befm_jax.tasks import sources


@pytest.mark.parametrize(
    ("split", "learnt", "known"),
    [
        ("test", "train", []),
        ("all", "all", ["median", "mode", "pooled", "training_people"]),
        ("all", "train", ["median", "mode", "pooled", "training_people"]),
        ("train", "train", ["median", "mode", "pooled", "training_people"]),
    ],
)
def test_baselines_that_are_fitted_on_the_compared_people_are_named(split, learnt, known):
    (everybody,) = sources.select("games", [games.get("public_goods")])
    results = Results()
    comparing.compare(
        results,
        everybody.part(split),
        everybody.part(learnt),
        [("uniform", baselines.fit("uniform", [], "game"), Exact())],
        resamples=20,
        seed=0,
    )
    assert results.people["games"]["in_sample"] == known
    # Those, and those alone, reproduce the compared people.
    (figure,) = results.select("games", "wasserstein", where={})
    assert (figure.beside["training_people"] < 1e-9) == (split == learnt)
