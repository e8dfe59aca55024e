"""The step over a mesh against the step on one device; what is cut over what."""

import dataclasses
from types import SimpleNamespace

import flax.traverse_util
import jax
import numpy as np
import pytest

from befm_jax import config
from befm_jax.adapters import lora
from befm_jax.config import Config
from befm_jax.data.pipeline import lay_out
from befm_jax.distributed import mesh as meshes
from befm_jax.distributed import transfer
from befm_jax.distributed.mesh import Layout, ShardingError
from befm_jax.llama import int8
from befm_jax.training import optimizer, setup
from befm_jax.training import step as steps
from tests.helpers.collective_order import beside_loops
from tests.helpers.small import random_paths, small_model

# Of shapes that divide by eight.
FIELDS = {
    "vocab_size": 96, "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 8,
    "head_dim": 8,
}  # fmt: skip
# Each axis alone, all of them, and two slices (slices, data, fsdp, tensor): every mesh takes long.
SHAPES = [(1, 1, 1, 8), (1, 1, 8, 1), (1, 8, 1, 1), (1, 2, 2, 2), (2, 1, 2, 2)]


def mesh_of(shape):
    slices, data, fsdp, tensor = shape
    return meshes.make_mesh(data, fsdp, tensor, slices)


def placed(params, mesh, config):
    """Parameters on a mesh; an int8 kernel's scale is cut as its outputs are."""
    shardings = meshes.parameter_shardings(config, mesh)
    flat = flax.traverse_util.flatten_dict(params)
    for path, leaf in flat.items():
        sharding = shardings[path]
        if isinstance(leaf, int8.Int8Kernel):
            rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*sharding.spec[:-1]))
            flat[path] = int8.Int8Kernel(
                jax.device_put(leaf.values, sharding), jax.device_put(leaf.scale, rows)
            )
        else:
            flat[path] = jax.device_put(leaf, sharding)
    return flax.traverse_util.unflatten_dict(flat)


@pytest.fixture(scope="module")
def case():
    """A model, its adapter, a batch of two micro-batches of eight rows."""
    model, params = small_model(4, **FIELDS)
    adapter = lora.init(jax.random.key(0), params, rank=2)
    for number, weight in enumerate(adapter.weights.values()):
        weight["b"] = 0.05 * jax.random.normal(jax.random.key(number), weight["b"].shape)
    batch, _ = lay_out(random_paths(5, 160, 96), slots=40, parts=8, seed=0)
    assert batch.forest.tokens.shape[:2] >= (2, 8)
    return model, params, adapter, batch


def gradient(model, base, trained, batch):
    """Loss and gradient, and the program that finds them; without a base of every parameter."""
    combine = steps.train_all if base is None else steps.train_adapter
    run = jax.jit(
        lambda *given: steps.value_and_gradient(model, combine, *given, jax.random.key(0))
    )
    program = run.lower(base, trained, batch).compile()
    return *program(base, trained, batch), program.as_text()


@pytest.fixture(scope="module")
def alone(case):
    """Loss and gradient on one device, by the kind of base."""
    model, params, adapter, batch = case
    return {
        kind: gradient(model, base, adapter, batch)[:2]
        for kind, base in (("plain", params), ("int8", int8.quantize(params)))
    }


def over(case, shape, kind):
    """The model over a mesh, its base, its adapter and the batch."""
    model, params, adapter, batch = case
    mesh = mesh_of(shape)
    return (
        dataclasses.replace(model, layout=Layout(mesh)),
        placed(int8.quantize(params) if kind == "int8" else params, mesh, model.config),
        jax.device_put(adapter, meshes.adapter_shardings(adapter, mesh)),
        jax.device_put(batch, meshes.batch_sharding(mesh)),
    )


@pytest.mark.parametrize(
    ("shape", "kind"),
    [*((shape, "plain") for shape in SHAPES), ((1, 1, 8, 1), "int8"), ((1, 2, 2, 2), "int8")],
    ids=str,
)
def test_loss_and_gradient_over_a_mesh_are_those_of_one_device(case, alone, shape, kind):
    loss, slopes, program = gradient(*over(case, shape, kind))
    assert_equal(loss, slopes, alone[kind])
    assert beside_loops(program) == []
    # Nobody gets the embeddings of all rows, where rows are cut.
    everything = ",".join(map(str, (*case[-1].forest.tokens.shape[1:], FIELDS["hidden_size"])))
    assert (f"f32[{everything}]" in program) == (shape == (1, 1, 1, 8))


def assert_equal(loss, slopes, alone):
    """Loss and gradient are, to rounding, those of one device."""
    expected_loss, expected = alone
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    for one, other in zip(jax.tree.leaves(slopes), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert np.abs(one - other).max() <= 1e-5 * max(np.abs(other).max(), 1e-6)


@pytest.mark.parametrize(
    ("shape", "tied"), [((1, 1, 8, 1), False), ((1, 2, 2, 2), True), ((2, 1, 2, 2), False)], ids=str
)
def test_so_are_those_of_every_parameter(case, shape, tied):
    model, params = small_model(4, **FIELDS, tie_word_embeddings=tied)
    batch, mesh = case[-1], mesh_of(shape)
    loss, slopes, program = gradient(
        dataclasses.replace(model, layout=Layout(mesh)),
        None,
        placed(params, mesh, model.config),
        jax.device_put(batch, meshes.batch_sharding(mesh)),
    )
    assert_equal(loss, slopes, gradient(model, None, params, batch)[:2])
    assert beside_loops(program) == []


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (1, 1, 8, 1), (1, 2, 2, 2)], ids=str)
def test_large_rounded_weights_go_in_parts_where_they_are_whole(case, alone, shape, monkeypatch):
    """No part is looked for on another device."""
    monkeypatch.setattr(int8, "_BLOCK", 1000)
    monkeypatch.setattr(int8, "_MANY_ROWS", 10**6)
    parts, calls = int8._by_blocks, []
    monkeypatch.setattr(int8, "_by_blocks", lambda *of: calls.append(of) or parts(*of))
    jax.clear_caches()  # programs with blocks of another size
    loss, slopes, program = gradient(*over(case, shape, "int8"))
    assert_equal(loss, slopes, alone["int8"])
    assert beside_loops(program) == []
    assert bool(calls) == (shape == (1, 8, 1, 1))


@pytest.mark.parametrize("shape", [(1, 4, 2, 1), (1, 2, 2, 2)], ids=str)
def test_nothing_else_of_a_step_or_of_a_validation_starts_beside_a_loop(case, shape):
    """The optimiser's norms, and the loss by itself."""
    model, base, adapter, batch = over(case, shape, "plain")
    rule = optimizer.adamw(1e-3)
    where = steps.state_shardings(
        rule, adapter, meshes.adapter_shardings(adapter, mesh_of(shape)),
        meshes.everywhere(mesh_of(shape)),
    )  # fmt: skip
    state = jax.device_put(steps.init_state(adapter, rule, 0), where)
    step = steps.make_train_step(model, rule, steps.train_adapter, where)
    loss = steps.make_loss(model, steps.train_adapter)
    for lowered in (step.lower(state, base, batch), loss.lower(adapter, base, batch)):
        program = lowered.compile().as_text()
        assert "all-reduce" in program
        assert beside_loops(program) == []


def test_collectives_that_wait_for_no_loop_are_seen(case, monkeypatch):
    """What two processes of a CPU would take for one another, if `linear.after` did nothing."""
    monkeypatch.setattr(Layout, "needs_order", False)
    *_, program = gradient(*over(case, (1, 1, 8, 1), "plain"))
    assert beside_loops(program)


def test_chips_of_another_number_of_slices_are_said_with_the_remedy(monkeypatch):
    chips = [SimpleNamespace(platform="tpu", slice_index=number // 4) for number in range(8)]
    meshes.check_slices(2, chips)
    with pytest.raises(ShardingError, match=r"the 8 chips here are in 2: .*mesh\.slices=2"):
        meshes.check_slices(1, chips)
    meshes.check_slices(2, jax.devices())  # nothing but TPUs has slices of its own
    # Before anything else is said of the mesh: eight chips are what one slice has too few of.
    monkeypatch.setattr(jax, "devices", lambda: chips)
    with pytest.raises(ShardingError, match=r"mesh\.slices=2"):
        setup.mesh_of(Config(mesh=config.Mesh(data=4)))


def test_a_trees_shardings_are_those_that_it_is_loaded_and_trained_with(case):
    model, params, adapter, _ = case
    mesh = mesh_of((1, 2, 2, 2))
    base = placed(int8.quantize(params), mesh, model.config)
    cut = jax.device_put(adapter, meshes.adapter_shardings(adapter, mesh))
    attached = lora.attach(base, cut)
    found = jax.tree.leaves(meshes.shardings(attached, mesh))
    leaves = jax.tree.leaves(attached)
    stand = [leaf.sharding for leaf in leaves]
    # All but the layers' scalings, which no device has yet but the first.
    elsewhere = [number for number, one in enumerate(found) if stand[number] != one]
    assert {leaves[number].shape for number in elsewhere} == {(model.config.num_hidden_layers,)}
    moved = jax.tree.leaves(transfer.place(attached, meshes.shardings(attached, mesh)))
    assert [leaf.sharding for leaf in moved] == found
    assert all(moved[n] is leaves[n] for n in range(len(leaves)) if n not in elsewhere)


@pytest.mark.parametrize(
    ("fields", "devices", "expected"),
    [
        ({}, 8, (1, 1, 1, 8)),
        ({"num_key_value_heads": 2}, 8, (1, 4, 1, 2)),
        ({"vocab_size": 98}, 8, (1, 4, 1, 2)),
        ({"vocab_size": 97}, 8, (1, 8, 1, 1)),
        ({}, 6, (1, 3, 1, 2)),
        ({}, 1, (1, 1, 1, 1)),
    ],
    ids=str,
)
def test_answering_cuts_heads_as_far_as_the_model_allows(fields, devices, expected):
    model, _ = small_model(**FIELDS | fields)
    mesh = meshes.answering_mesh(model.config, jax.devices()[:devices])
    assert mesh.devices.shape == expected
    assert list(mesh.devices.flat) == jax.devices()[:devices]
    meshes.parameter_shardings(model.config, mesh)


def test_sampling_takes_a_training_meshs_devices_in_their_order_without_fsdp():
    model, _ = small_model(**FIELDS)
    trained = mesh_of((2, 1, 2, 2))
    mesh = meshes.sampling_mesh(model.config, trained)
    assert mesh.devices.shape == (2, 1, 1, 4)
    assert list(mesh.devices.flat) == list(trained.devices.flat)
    kept = mesh_of((1, 4, 1, 2))
    assert meshes.sampling_mesh(model.config, kept) is kept
