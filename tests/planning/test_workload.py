"""What a step is, from the config's data, against the batches that training would make of it."""

import jax
import numpy as np
import pytest

from befm_jax import train
from befm_jax.config import Config, ConfigError, Data, Model
from befm_jax.data.items import Message
from befm_jax.distributed import mesh as meshes
from befm_jax.llama.published import PUBLISHED
from befm_jax.planning import workload
from befm_jax.tasks import sources

NAME = "meta-llama/Llama-3.1-8B-Instruct"
SHAPE = PUBLISHED[NAME]


def config_of(**data):
    return Config(model=Model(path=NAME), data=Data(**data))


def brute_pairs(forest):
    """Pairs of a token and what it sees, counted one by one."""
    slots = np.arange(forest.end.shape[-1])
    sees = (slots[None, :] <= slots[:, None]) & (slots[:, None] <= forest.end[..., None, :])
    padding = (forest.parent < 0) & (forest.end == slots)
    return int((sees & ~padding[..., None]).sum())


@pytest.mark.parametrize("per_step", [0, 300])
def test_a_step_is_that_of_the_batches(per_step):
    settings = config_of(slots=512, rows_per_step=per_step)
    found = workload.from_data(settings, 2, SHAPE)
    learnt = [source.part("train") for source in sources.configured("all", "", "")]
    families = sources.families(learnt, per_step, by_observation=False)
    mesh = meshes.make_mesh(data=2, devices=jax.devices()[:2])
    batches = train.mixture_of(settings, families, workload.Pieces(), mesh)
    assert found.steps == batches.steps
    first = [batches[step] for step in range(min(4, batches.steps))]
    assert found.used == np.mean([source.report.slots_used for _, source in first])
    assert found.pairs == np.mean([brute_pairs(batch.forest) for batch, _ in first])
    assert found.computed == max(batch.forest.tokens.size for batch, _ in first)
    # As training reads them: each micro-batch as far as its fullest row.
    reads = [
        sum(len(rows) * max(len(set(row[row >= 0].tolist())) for row in rows)
            for rows in batch.reads.column)
        for batch, _ in first
    ]  # fmt: skip
    assert found.reads == np.mean(reads)


def test_told_figures_fill_rows():
    settings = config_of(slots=2048, rows_per_step=512)
    found = workload.from_figures(settings, 8, 10_000, 128)
    assert (found.micro_batches, found.rows, found.slots) == (4, 8, 2048)
    assert found.steps == 3 * 20
    assert found.pairs == 512 * 128 * 129 / 2


def test_rows_are_as_many_as_devices_share_evenly():
    assert workload.from_data(config_of(slots=512), 4, SHAPE).rows == 4
    assert workload.from_figures(config_of(slots=1024), 4, 10_000, 128).rows == 4


def test_a_model_that_is_not_known_is_an_error_that_names_those_that_are():
    with pytest.raises(ConfigError, match=r"model\.path is 'me/mine'.*Llama-3\.1-70B-Instruct"):
        workload.shape_of(Config(model=Model(path="me/mine")))
    assert workload.shape_of(Config(model=Model(path=f"{NAME}@main"))) == SHAPE


def test_pieces_are_about_as_many_as_tokens():
    """Words that are one token each, cut as Llama 3's tokenizer cuts text: 17 pieces."""
    text = "The quick brown fox jumps over the lazy dog, and 1234 people watched."
    messages = (Message("user", text), Message("assistant", text))
    ((ids, ((start, stop),)),) = workload.Pieces().encode_batch([(messages, ())])
    assert stop == len(ids)
    assert abs(stop - start - 1 - 17) <= 1
