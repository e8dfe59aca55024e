"""Similarity of texts: ROUGE by rouge-score, chrF by sacrebleu, BLEURT by its own package.

ROUGE and chrF need the extra `text`.  BLEURT needs the package `bleurt`
(github.com/google-research/bleurt) and, in the environment variable `BLEURT_CHECKPOINT`, the folder
of a checkpoint.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float64

from befm_jax.errors import UserError

NAMES = ("rouge1", "rougeL", "chrf", "bleurt")
CHECKPOINT = "BLEURT_CHECKPOINT"
_Score = Callable[[str, Sequence[str]], float]


def scores(
    name: str, texts: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> Float64[np.ndarray, " I"]:
    """Each item's score: the mean over its texts, each compared with all its references.

    Args:
        name: "rouge1" or "rougeL" (F, stemmed, the best reference; 0 to 1; Lin 2004), "chrf"
            (chrF2, 0 to 100; Popovic 2015), or "bleurt" (the best reference; Sellam et al., ACL
            2020).
        texts: the texts of each item, at least one.
        references: the reference texts of each item, at least one.

    Raises:
        UserError: the packages of the extra `text` are not installed.
    """
    score = {"chrf": _chrf, "bleurt": _bleurt}.get(name, lambda: _rouge(name))()
    return np.array(
        [
            np.mean([score(text, item_references) for text in item_texts])
            for item_texts, item_references in zip(texts, references, strict=True)
        ]
    )


def _rouge(name: str) -> _Score:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise _not_installed(name, "rouge-score") from None
    scorer = RougeScorer([name], use_stemmer=True)
    return lambda text, references: scorer.score_multi(list(references), text)[name].fmeasure


def _chrf() -> _Score:
    try:
        import sacrebleu
    except ImportError:
        raise _not_installed("chrf", "sacrebleu") from None
    return lambda text, references: sacrebleu.sentence_chrf(text, list(references)).score


def without(name: str) -> str:
    """What a measure lacks that nobody is expected to have; "" where it can be computed."""
    if name != "bleurt" or (os.environ.get(CHECKPOINT) and importlib.util.find_spec("bleurt")):
        return ""
    return f"it needs the package bleurt, and {CHECKPOINT}: the folder of a checkpoint"


def _bleurt() -> _Score:
    scorer = _bleurt_scorer(os.environ[CHECKPOINT])
    return lambda text, references: max(
        scorer.score(references=list(references), candidates=[text] * len(references))
    )


@lru_cache(maxsize=1)
def _bleurt_scorer(checkpoint: str) -> Any:
    from bleurt import score

    return score.BleurtScorer(checkpoint)


def _not_installed(name: str, package: str) -> UserError:
    return UserError(f"{name}: needs {package}; install it with pip install 'befm_jax[text]'")
