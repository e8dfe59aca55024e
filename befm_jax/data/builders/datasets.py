"""The builders: `befm_games`, `befm_surveys`, `befm_literature` and `befm_jsonl`.

    BefmSurveys(table="bigfive.csv", config="questionnaires", data_dir="data",
                file_format="array_record").download_and_prepare()

Nothing is downloaded: a builder reads a table that its user has.  Their configs are kinds of rows
(`builders.KINDS`); a feature is a field of the row, as a text or as JSON.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from befm_jax.data.builders import KINDS, SPLIT
from befm_jax.data.builders.row_texts import texts_of


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A data set from a table.

    Args:
        table: the path of the table.
        games: for choices in games, whose are kept.
        options: as of TensorFlow Datasets' builders; `config` is the kind of rows.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, table: str = "", games: str = "all", **options: Any) -> None:
        self._table, self._games = table, games
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        # Not dataset_info_from_configs, which wants the files of a package folder.
        row = KINDS[self.builder_config.name].row
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.builder_config.description,
            features=tfds.features.FeaturesDict(
                {field.name: tfds.features.Text() for field in fields(row)}
            ),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        kind = self.builder_config.name
        rows = KINDS[kind].read(self._table, self._games)
        self.info.metadata.update(
            kind=kind,
            source=rows.source,
            fingerprint=rows.fingerprint,
            sketch=rows.sketch,
            left_out={"counts": rows.left_out.counts, "examples": rows.left_out.examples},
        )
        return {SPLIT: self._generate_examples(rows.rows)}

    def _generate_examples(self, rows: Any) -> Iterator[tuple[int, dict[str, str]]]:
        for number, row in enumerate(rows):
            yield number, texts_of(row)


def _configs(data_set: str) -> list[tfds.core.BuilderConfig]:
    return [
        tfds.core.BuilderConfig(name=name, description=(kind.row.__doc__ or "").partition("\n")[0])
        for name, kind in KINDS.items()
        if kind.data_set == data_set
    ]


class BefmGames(_Builder):
    """Choices in games, one row a person."""

    BUILDER_CONFIGS: ClassVar = _configs("befm_games")


class BefmSurveys(_Builder):
    """Answers to questionnaires, one row a person."""

    BUILDER_CONFIGS: ClassVar = _configs("befm_surveys")


class BefmLiterature(_Builder):
    """Papers, one row a paper."""

    BUILDER_CONFIGS: ClassVar = _configs("befm_literature")


class BefmJsonl(_Builder):
    """Logs and conversations, one row a person."""

    BUILDER_CONFIGS: ClassVar = _configs("befm_jsonl")


BUILDERS = {
    builder.name: builder for builder in (BefmGames, BefmSurveys, BefmLiterature, BefmJsonl)
}
