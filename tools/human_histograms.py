"""Make the embedded human reference: how many people chose what in each game.

    python tools/human_histograms.py ../shared/data/moblab/joint.csv

reads the MobLab table, checks it as `befm_jax.data.choices` does, and writes one histogram a game.
"""

import argparse
import json
import sys
from pathlib import Path

from befm_jax.data import choices, games
from befm_jax.errors import DataError

OUT = Path(__file__).resolve().parents[1] / "befm_jax" / "data" / "reference"

SOURCE = "MobLab, first choices in seven games"
CITATION = (
    "Choices on the teaching platform MobLab, described in Y. Xie, Q. Mei, W. Yuan, M. O. Jackson, "
    "'Using Large Language Models to Categorize Strategic Situations and Decipher Motivations "
    "Behind Human Behaviors' (arXiv 2503.15752), and in Q. Mei, Y. Xie, W. Yuan, M. O. Jackson, "
    "'A Turing test of whether AI chatbots are behaviorally similar to humans' (PNAS 2024). "
    "Counted from a copy of the table public at github.com/yutxie/llm-behavioral-codes, commit "
    "6dca70b, data/MobLab."
)
LEFT_OUT = (
    "The whole table is said to have 82,057 choices; some participants are left out, whole, from "
    "the copy that was counted. Nothing but counts is kept: no participant, no pairs of choices."
)


def main() -> None:
    """Read the table named on the command line and write the reference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("table", type=Path, help="the MobLab table, joint.csv")
    parser.add_argument("--out", type=Path, default=OUT / choices.REFERENCE_FILE)
    arguments = parser.parse_args()

    with_reference = [game for game in map(games.get, games.ids()) if game.reference]
    try:
        counted = choices.read(arguments.table, with_reference)
    except DataError as error:
        sys.exit(str(error))
    arguments.out.write_text(render(counted, with_reference), encoding="utf-8")
    print(choices.describe(counted))
    print(f"wrote {arguments.out}")


def render(counted: choices.Choices, counted_games: list[games.Game]) -> str:
    """The reference as JSON, one line a game: "values" are the first and the last, step 1."""
    head = {
        "source": SOURCE,
        "citation": CITATION,
        "left_out": LEFT_OUT,
        "excluded": dict(counted.left_out.counts),
        "fingerprint": counted.fingerprint,
        "made_by": "tools/human_histograms.py",
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    histograms = []
    counts = choices.histograms(counted, counted_games)
    for game in counted_games:
        histogram = {
            "game": game.id,
            "unit": game.answers.unit,
            "people": int(counts[game.id].sum()),
            "values": [int(game.values[0]), int(game.values[-1])],
            "counts": counts[game.id].tolist(),
        }
        histograms.append(f"  {json.dumps(game.reference)}: {json.dumps(histogram)}")
    return "\n".join(["{", *lines, ' "histograms": {', ",\n".join(histograms), " }", "}"]) + "\n"


if __name__ == "__main__":
    main()
