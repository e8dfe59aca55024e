"""Make the embedded survey reference: how people of each sex and age band answered the Big Five.

    python tools/questionnaire_counts.py ../shared/data/bigfive/bigfive_data.csv

reads OpenPsychometrics' table, checks it as `befm_jax.data.questionnaires` does, and writes one
line of counts a cell.
"""

import argparse
import json
import sys
from pathlib import Path

from befm_jax.data import questionnaires
from befm_jax.errors import DataError

OUT = Path(__file__).resolve().parents[1] / "befm_jax" / "data" / "reference"

HEAD = {
    "source": "OpenPsychometrics, Big Five by sex and age band",
    "citation": (
        "Answers to the 50 Big Five markers of the International Personality Item Pool, collected "
        "by openpsychometrics.org, as distributed with github.com/yutxie/ChatGPT-Behavioral, "
        "commit 69ec557. Visitors of a web page, of whom some are left out of the copy that was "
        "counted. Nothing but counts is kept: no person, no pairs of answers."
    ),
    "made_by": "tools/questionnaire_counts.py",
}
# A smaller cell says more of its people than of people like them.
FEWEST = 20


def main() -> None:
    """Read the table named on the command line and write the reference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("table", type=Path, help="bigfive_data.csv")
    parser.add_argument("--out", type=Path, default=OUT / questionnaires.REFERENCE_FILE)
    arguments = parser.parse_args()
    try:
        rows = questionnaires.read(arguments.table)
    except DataError as error:
        sys.exit(str(error))
    cells = {
        cell.name: [counts.tolist() for counts in cell.counts.values()]
        for cell in questionnaires.counted(rows).rows
        if max(counts.sum() for counts in cell.counts.values()) >= FEWEST
    }
    head = HEAD | {
        "form": rows.rows[0].form,
        "fingerprint": rows.fingerprint,
        "excluded": dict(rows.left_out.counts),
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    listed = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(cells[name])}" for name in sorted(cells)
    )
    text = "\n".join(["{", *lines, ' "cells": {', listed, " }", "}"]) + "\n"
    arguments.out.write_text(text, encoding="utf-8")
    print(f"wrote {len(cells)} cells to {arguments.out}")


if __name__ == "__main__":
    main()
