"""Similarity of texts: by hand, and with the packages absent."""

import sys

import pytest

from befm_jax.errors import UserError
from befm_jax.evals import text_measures


def test_rouge_is_the_f_of_shared_stemmed_words():
    # Three of four words, three of three; stemmed, "games" is "game".
    found = text_measures.scores("rouge1", [["people play many games"]], [["people play game"]])
    assert found == pytest.approx([2 * 0.75 * 1 / 1.75])
    # In another order the longest common subsequence is shorter.
    found = text_measures.scores("rougeL", [["b a"]], [["a b"]])
    assert found == pytest.approx([0.5])


@pytest.mark.parametrize("name", ["rouge1", "rougeL", "chrf"])
def test_the_nearest_reference_counts_and_texts_are_averaged(name):
    full = 100.0 if name == "chrf" else 1.0
    found = text_measures.scores(
        name, [["a cat", "qqq"], ["a dog"]], [["a cat", "xyz"], ["it was"]]
    )
    assert found[0] == pytest.approx(full / 2)
    assert found[1] < found[0]


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("rougeL", "rouge_score.rouge_scorer", "rouge-score"), ("chrf", "sacrebleu", "sacrebleu")],
)
def test_what_is_not_installed_is_named(monkeypatch, name, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"{package}.*befm_jax\\[text\\]"):
        text_measures.scores(name, [["a"]], [["a"]])
