"""Similarity of texts: ROUGE by rouge-score, chrF by sacrebleu; both need the extra `text`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float64

from befm_jax.errors import UserError

NAMES = ("rouge1", "rougeL", "chrf")
_Score = Callable[[str, Sequence[str]], float]


def scores(
    name: str, texts: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> Float64[np.ndarray, " I"]:
    """Each item's score: the mean over its texts, each compared with all its references.

    Args:
        name: "rouge1" or "rougeL" (F, stemmed, the best reference; 0 to 1; Lin 2004), or "chrf"
            (chrF2, 0 to 100; Popovic 2015).
        texts: the texts of each item, at least one.
        references: the reference texts of each item, at least one.

    Raises:
        UserError: the packages of the extra `text` are not installed.
    """
    score = _chrf() if name == "chrf" else _rouge(name)
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


def _not_installed(name: str, package: str) -> UserError:
    return UserError(f"{name}: needs {package}; install it with pip install 'befm_jax[text]'")
