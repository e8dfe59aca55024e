"""Sides for tests of how sides take turns: they write down when they are asked."""

import os
import time
from pathlib import Path


class Echo:
    """Appends to a file what it is asked."""

    def __init__(self, name, diary):
        self._name, self._diary = name, Path(diary)

    def _write(self, what):
        with self._diary.open("a") as file:
            file.write(f"{self._name} {what}\n")
        print("a library says something")
        return {
            "seconds": 2.0,
            "platform": os.environ["JAX_PLATFORMS"],
            "flags": os.environ["XLA_FLAGS"],
            "at": time.time(),
        }

    def prepare(self):
        return self._write("prepares")

    def round(self):
        return self._write("runs")


class Failing:
    """Fails in its first round."""

    def prepare(self):
        return {"seconds": 0.0}

    def round(self):
        raise ValueError("the disk is full of cats")
