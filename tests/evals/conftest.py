"""The real choices, for tests of measures and of resampling."""

import csv

import numpy as np
import pytest

SPANS = {
    "dictator": 100,
    "ultimatum_1": 100,
    "ultimatum_2": 100,
    "trust_1": 100,
    "trust_3": 150,
    "PG": 20,
    "bomb": 100,
}


@pytest.fixture(scope="session")
def real_counts(moblab_csv):
    counts = {game: np.zeros(span + 1, np.int64) for game, span in SPANS.items()}
    with moblab_csv.open() as file:
        for row in csv.DictReader(file):
            for game, span in SPANS.items():
                choice = float(row[game] or "nan")
                if choice.is_integer() and 0 <= choice <= span:
                    counts[game][int(choice)] += 1
    return counts
