"""Data sets on disk: rows that were read and checked once, in the format of TensorFlow Datasets.

    python -m befm_jax.data.builders questionnaires bigfive.csv --out data

writes `data/befm_surveys/questionnaires/1.0.0`, an `array_record` file with one row a person, and
what was left out of the table, by reason.  Where a task reads a table, it takes this folder as
well, with the same rows, splits and items.  TensorFlow is not needed; `pip install
'befm_jax[tfds]'` is, by what builds and reads data sets alone.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from befm_jax.data import (
    bomb_risk,
    choices,
    gambles,
    literature,
    logs,
    matrix_games,
    questionnaires,
    rounds,
)
from befm_jax.data import games as library
from befm_jax.data.builders.row_texts import row_of
from befm_jax.data.rows import LeftOut, Rows, of_person
from befm_jax.errors import DataError, unknown

# The one split of a data set: people are split after reading, by seed.
SPLIT = "rows"


@dataclass(frozen=True)
class Kind:
    """Rows of one kind.

    Attributes:
        data_set: the data set that has them.
        row: their class.
        read: reads them from a table, given the games for choices in games.
        in_split: `Rows.within`.
    """

    data_set: str
    row: type
    read: Callable[[str, str], Rows[Any]]
    in_split: Callable[[Any, str, int], Any] = of_person


def _of_table(read: Callable[[str | Path], Rows[Any]]) -> Callable[[str, str], Rows[Any]]:
    return lambda table, games: read(table)


def _plays(table: str, games: str) -> Rows[choices.Plays]:
    return choices.by_person(choices.read(table, library.select(games)))


KINDS = {
    "plays": Kind("befm_games", choices.Plays, _plays),
    "rounds": Kind("befm_games", rounds.Played, _of_table(rounds.read), rounds.in_split),
    "matrix_games": Kind(
        "befm_games", matrix_games.Player, _of_table(matrix_games.read), matrix_games.in_split
    ),
    "bomb_risk": Kind("befm_games", bomb_risk.Opened, _of_table(bomb_risk.read)),
    "gambles": Kind("befm_games", gambles.Problem, _of_table(gambles.read)),
    "questionnaires": Kind(
        "befm_surveys", questionnaires.Questionnaire, _of_table(questionnaires.read)
    ),
    "workflows": Kind("befm_literature", literature.Paper, _of_table(literature.read_workflows)),
    "abstracts": Kind("befm_literature", literature.Paper, _of_table(literature.read_abstracts)),
    "logs": Kind("befm_jsonl", logs.Log, _of_table(logs.read)),
}


def build(kind: str, table: str, out: str | Path, games: str = "all") -> Path:
    """Writes the rows of a table as a data set, and returns its folder.

    Args:
        kind: one of `KINDS`.
        table: a path that the reader of this kind takes.
        out: the folder of data sets.
        games: the games whose choices are kept, for "plays": ids, "all" or `.py` files.

    Raises:
        DataError: an unknown kind, a table that can't be read, or a data set that is there already.
    """
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    tfds()
    from befm_jax.data.builders.datasets import BUILDERS

    builder = BUILDERS[KINDS[kind].data_set](
        table=table, games=games, config=kind, data_dir=str(out), file_format="array_record"
    )
    folder = Path(builder.data_path)
    if folder.exists():
        raise DataError(f"{folder}: there is a data set already; give another --out, or delete it")
    # Nothing is downloaded, but TensorFlow Datasets makes a folder for it, and says that it does.
    with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_dir=downloads)
    return folder


def is_data_set(path: str | Path) -> bool:
    """Whether a path is the folder of a data set, not a table."""
    return (Path(path) / "dataset_info.json").is_file()


def read(path: str | Path, *kinds: str) -> Rows[Any]:
    """The rows of a data set, as they were read from its table; each is decoded when it is wanted.

    Args:
        path: the folder that `build` returned.
        kinds: those of which it may be.

    Raises:
        DataError: a data set of another kind, of another program, or a damaged one.
    """
    try:
        builder = tfds().builder_from_directory(str(path))
        found = dict(builder.info.metadata or {})
        kind = found["kind"]
        if kind not in kinds:
            raise DataError(f"{path}: a data set of {kind}; it must be one of {' or '.join(kinds)}")
        return Rows(
            _Stored(path, builder.as_data_source(SPLIT), KINDS[kind].row),
            found["source"],
            found["fingerprint"],
            found["sketch"],
            LeftOut(**found["left_out"]),
            within=KINDS[kind].in_split,
        )
    except DataError:
        raise
    # What TensorFlow Datasets raises of a damaged folder is of many kinds.
    except Exception as error:
        raise DataError(
            f"{path}: not a data set that befm_jax wrote, or damaged "
            f"({type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.80})"
        ) from None


def tfds() -> Any:
    """The module `tensorflow_datasets`.

    Raises:
        DataError: it or `array_record` is not installed.
    """
    try:
        import array_record  # noqa: F401
        import tensorflow_datasets
    except ImportError:
        raise DataError("data sets on disk need pip install 'befm_jax[tfds]'") from None
    return tensorflow_datasets


class _Stored(Sequence[Any]):
    """The rows of a data source, decoded when they are wanted."""

    def __init__(self, path: str | Path, source: Any, kind: type) -> None:
        self._path, self._source, self._kind = path, source, kind

    def __len__(self) -> int:
        return len(self._source)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        """One row, or those of a slice.

        Raises:
            DataError: a damaged row.
        """
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        try:
            fields = self._source[at]
            return row_of(self._kind, {name: text.decode() for name, text in fields.items()})
        except Exception as error:
            raise DataError(
                f"{self._path}: row {at + 1} is damaged ({type(error).__name__})"
            ) from None
