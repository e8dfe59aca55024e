"""Topologies as people write them."""

import pytest

from befm_jax.distributed.hardware import CHIPS
from befm_jax.planning import topology
from befm_jax.planning.topology import TopologyError


@pytest.mark.parametrize(
    ("text", "chips", "slices", "is_tpu"),
    [
        ("v5p:4x4x4", 64, 1, True),
        ("2*v5e:16x16", 512, 2, True),
        ("v6e:8x8", 64, 1, True),
        ("h100:8", 8, 1, False),
        ("2*a100:8", 16, 2, False),
    ],
)
def test_a_topology_is_read_and_written_alike(text, chips, slices, is_tpu):
    found = topology.parse(text)
    assert (found.chips, found.slices, found.is_tpu) == (chips, slices, is_tpu)
    assert str(found) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5p", "it must be of the form"),
        ("v5p:4x4x4:8", "it must be of the form"),
        ("tpu9:4x4", "no chip 'tpu9'"),
        ("v9:4x4", "known: v5e, v5p"),
        ("v5p:4x4", "a shape of 3 sizes"),
        ("v5e:4x0", "above 0"),
        ("0*v5e:4x4", "above 0"),
        ("h100:2x4", "a shape of 1 sizes"),
    ],
)
def test_another_form_is_refused_with_what_would_be_right(text, said):
    with pytest.raises(TopologyError, match=said):
        topology.parse(text)


def test_every_gpu_has_what_its_compiler_asks_for():
    for chip in CHIPS.values():
        if not topology.parse(f"{chip.name}:{'x'.join('2' * topology.dimensions(chip))}").is_tpu:
            assert f"device_memory_size: {chip.memory:.0f}" in topology._target(chip)
