"""Writes the rows of a table as a data set on disk: python -m befm_jax.data.builders KIND TABLE."""

from __future__ import annotations

import argparse
import sys

from befm_jax.data import builders
from befm_jax.errors import UserError, printable


def main(arguments: list[str]) -> int:
    """Builds what the arguments say, prints what was read and where it is; the exit status."""
    parser = argparse.ArgumentParser("python -m befm_jax.data.builders", description=__doc__)
    parser.add_argument("kind", choices=builders.KINDS, help="what kind of rows the table has")
    parser.add_argument("table", help="the table, as the tasks read it")
    parser.add_argument("--out", required=True, help="the folder of data sets")
    parser.add_argument(
        "--games", default="all", help="of plays: the games that are kept (ids, all, .py files)"
    )
    given = parser.parse_args(arguments)
    try:
        folder = builders.build(given.kind, given.table, given.out, given.games)
        rows = builders.read(folder, given.kind)
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    print(f"{len(rows.rows):,} rows from {printable(rows.source)}")
    print("\n".join([*rows.left_out.lines(), printable(str(folder))]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
