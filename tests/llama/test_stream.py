"""Loading in slices: every device gets its own part, and nothing is read that nobody holds."""

import dataclasses
import json
from collections import Counter

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from befm_jax.distributed import mesh as meshes
from befm_jax.llama import hf, int8, stream, weights
from befm_jax.llama.config import LlamaConfig
from tests.helpers.small import SMALL, small_model

# Of shapes that divide by eight.
FIELDS = {
    "vocab_size": 96, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip
MESHES = [
    {"fsdp": 8}, {"tensor": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 8},
]  # fmt: skip


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A checkpoint in several files, and its parameters."""
    directory = tmp_path_factory.mktemp("stored")
    model, params = small_model(**FIELDS)
    hf.save(directory, model.config, params, max_shard_bytes=30_000)
    return directory, params


@pytest.fixture
def read_bytes(monkeypatch):
    """Counts what is really read, by tensor."""
    counted = Counter()
    read_into = weights.read_into

    def count(target, tensor, index):
        read_into(target, tensor, index)
        counted[tensor.name] += target.nbytes

    monkeypatch.setattr(weights, "read_into", count)
    return counted


def flat(params):
    return flax.traverse_util.flatten_dict(params)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_every_device_holds_its_own_part(stored, mesh, dtype):
    directory, params = stored
    made = meshes.make_mesh(**mesh)
    _, loaded = hf.load(directory, meshes.over(made), dtype=dtype)
    for path, leaf in flat(loaded).items():
        expected = flat(params)[path].astype(dtype or jnp.float32)
        np.testing.assert_array_equal(leaf, expected)
        assert leaf.dtype == expected.dtype
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(expected)[shard.index])
        names = jax.tree.leaves(tuple(leaf.sharding.spec))
        parts = leaf.size // leaf.addressable_shards[0].data.size
        assert parts == np.prod([made.shape[name] for name in names], initial=1)


@pytest.mark.parametrize("mesh", [None, {"fsdp": 8}, {"tensor": 8}, {"fsdp": 2, "tensor": 4}])
def test_rounding_while_reading_equals_rounding_afterwards(stored, mesh, monkeypatch):
    monkeypatch.setattr(stream, "_CHUNK_BYTES", 10_000)
    directory, params = stored
    made = meshes.make_mesh(**mesh) if mesh else None
    _, loaded = hf.load(directory, meshes.over(made), quantize="int8")
    expected = jax.jit(int8.quantize)(params)
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)
    kernel = loaded["layers"]["mlp"]["down_proj"]["weight"]
    assert kernel.values.dtype == jnp.int8
    assert kernel.scale.sharding.is_fully_replicated or kernel.scale.sharding.spec[-1] == "fsdp"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", [None, {"fsdp": 4, "tensor": 2}], ids=str)
def test_as_on_an_accelerator_layers_are_put_into_place_chunk_by_chunk(
    stored, monkeypatch, dtype, mesh
):
    """Where the host's memory can't be kept, whatever the size of a chunk."""
    directory, params = stored
    made = meshes.make_mesh(**mesh) if mesh else None
    monkeypatch.setattr(stream.Parameter, "made_on_host", False)
    monkeypatch.setattr(stream, "_JOB_BYTES", 700)
    sizes = set()
    for limit in (1, 20_000, 10**9):
        monkeypatch.setattr(stream, "_CHUNK_BYTES", limit)
        parameters = hf.parameters(hf.open_model(directory), meshes.over(made), dtype)
        sizes |= {len(rows) for one in parameters if one.stacked for rows in one.chunks()}
        _, loaded = hf.load(directory, meshes.over(made), dtype)
        for path, leaf in flat(loaded).items():
            expected = flat(params)[path].astype(dtype)
            np.testing.assert_array_equal(leaf, expected)
            assert leaf.dtype == expected.dtype
            for shard in leaf.addressable_shards:
                np.testing.assert_array_equal(shard.data, np.asarray(expected)[shard.index])
    assert {1, 6} < sizes


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_layers_of_several_dtypes_are_held_exactly(tmp_path, monkeypatch, on_host, dtype):
    model, params = small_model(**FIELDS)
    hf.save(tmp_path, model.config, params)
    tensors = load_file(tmp_path / hf.SINGLE)
    for layer, other in ((1, jnp.bfloat16), (4, np.float16)):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        tensors[name] = np.asarray(tensors[name]).astype(other)
    save_file(tensors, tmp_path / hf.SINGLE)
    if not on_host:
        monkeypatch.setattr(stream.Parameter, "made_on_host", False)
        monkeypatch.setattr(stream, "_CHUNK_BYTES", 20_000)
    _, loaded = hf.load(tmp_path, meshes.over(meshes.make_mesh(tensor=8)), dtype)
    found = loaded["layers"]["mlp"]["up_proj"]["weight"]
    assert found.dtype == (dtype or jnp.float32)
    for layer in range(6):
        stored = tensors[f"model.layers.{layer}.mlp.up_proj.weight"].astype(np.float32)
        np.testing.assert_array_equal(found[layer], stored.astype(found.dtype))
    planned = sum(read.nbytes for read in hf.reads(hf.open_model(tmp_path)))
    assert planned == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("stored_as", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("held_as", ["float32", "bfloat16", "float16"])
def test_the_hosts_conversions_are_those_of_jax(stored_as, held_as):
    drawn = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, 1e-40, 65504.0, 3.389e38], np.float32)
    with np.errstate(over="ignore"):
        source = np.asarray(np.concatenate([drawn, special]).astype(jnp.dtype(stored_as)))
        target = np.empty(source.shape, jnp.dtype(held_as))
        stream._convert(source, target)
    expected = np.asarray(jnp.asarray(source).astype(held_as))
    # XLA's CPU arithmetic may take a denormal for zero; copying bits does not.
    usual = np.abs(source.astype(np.float32)) > 1e-30
    usual |= source == 0
    np.testing.assert_array_equal(target[usual], expected[usual])


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_each_of_eight_processes_would_read_its_eighth(stored, mesh):
    """And together they read every byte: replicas aside, nothing twice."""
    checkpoint = hf.open_model(stored[0])
    made = meshes.make_mesh(**mesh)
    whole = sum(tensor.nbytes for found in checkpoint.tensors.values() for tensor in found)
    norms = sum(
        tensor.nbytes
        for path, found in checkpoint.tensors.items()
        if path[-2].endswith("norm")
        for tensor in found
    )
    everything = sum(read.nbytes for read in hf.reads(checkpoint, meshes.over(made)))
    assert everything == whole
    for device in jax.devices():
        mine = sum(read.nbytes for read in hf.reads(checkpoint, meshes.over(made), [device]))
        assert mine == (whole - norms) * mesh.get("data", 1) // 8 + norms


def test_what_is_read_is_what_was_planned(stored, read_bytes):
    directory, _ = stored
    for mesh in (None, meshes.make_mesh(tensor=8), meshes.make_mesh(data=4, fsdp=2)):
        read_bytes.clear()
        hf.load(directory, meshes.over(mesh))
        planned = Counter()
        for read in hf.reads(hf.open_model(directory), meshes.over(mesh)):
            planned[read.tensor.name] += read.nbytes
        assert read_bytes == planned
        assert sum(planned.values()) == sum(leaf.nbytes for leaf in flat(stored[1]).values())


def test_on_cpu_the_memory_read_into_is_the_parameter(stored, monkeypatch):
    """No second copy: XLA takes the buffer as it is."""
    buffers = []
    aligned = stream._aligned
    monkeypatch.setattr(stream, "_aligned", lambda *of: buffers.append(aligned(*of)) or buffers[-1])
    _, loaded = hf.load(stored[0])
    mine = {buffer.ctypes.data for buffer in buffers}
    assert {leaf.unsafe_buffer_pointer() for leaf in flat(loaded).values()} == mine


def test_a_mesh_that_does_not_divide_the_model_is_refused_by_name(stored):
    directory, _ = stored
    with pytest.raises(meshes.ShardingError, match="needs 6 devices, not 8"):
        meshes.make_mesh(fsdp=3, tensor=2)
    mesh = meshes.make_mesh(fsdp=1, tensor=5, devices=jax.devices()[:5])
    with pytest.raises(
        meshes.ShardingError,
        match=r"embed_tokens/weight: embedding_width has 32 .* tensor x fsdp of 5",
    ):
        hf.load(directory, meshes.over(mesh))
    mesh = meshes.make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    with pytest.raises(
        meshes.ShardingError, match=r"lm_head/weight: vocabulary has 98 .* tensor x fsdp of 4"
    ):
        meshes.parameter_shardings(dataclasses.replace(SMALL, vocab_size=98), mesh)


@pytest.mark.parametrize("quantize", [None, "no"])
def test_weights_are_not_rounded_unless_asked(stored, quantize):
    directory, params = stored
    _, loaded = hf.load(directory, quantize=quantize)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_an_unknown_way_to_quantize_is_refused(stored):
    with pytest.raises(ValueError, match="int4"):
        hf.load(stored[0], quantize="int4")


def test_a_file_that_shrinks_after_it_was_opened_is_named(stored, tmp_path):
    model, params = small_model(**FIELDS)
    hf.save(tmp_path, model.config, params)
    checkpoint = hf.open_model(tmp_path)
    file = tmp_path / hf.SINGLE
    file.write_bytes(file.read_bytes()[:-3000])
    for mesh in (None, meshes.make_mesh(tensor=8)):
        with pytest.raises(weights.CheckpointError, match=r"model\.safetensors: ends within"):
            stream.load(hf.parameters(checkpoint, meshes.over(mesh)), "load")


LLAMA_70B = LlamaConfig(
    vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80,
    num_attention_heads=64, num_key_value_heads=8, head_dim=128,
)  # fmt: skip


def sparse_checkpoint(directory, config, files=30):
    """A bf16 checkpoint with the right headers and no data: files are holes of the right size."""
    shapes = flat(hf.model.shapes(config))
    names = [
        (name, leaf.shape[1:] if path[0] == "layers" else leaf.shape)
        for path, leaf in shapes.items()
        for name in hf._names(path, config)
    ]
    weight_map = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for name, shape in names[number::files]:
            size = 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            at += size
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (directory / file).open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.truncate(8 + len(text) + at)
    (directory / hf.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    fields = hf.llama_config.to_hugging_face(config, "bfloat16")
    (directory / "config.json").write_text(json.dumps(fields))


def test_a_70b_checkpoint_is_opened_and_planned_without_reading_it(tmp_path, read_bytes):
    sparse_checkpoint(tmp_path, LLAMA_70B)
    on_disk = sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir())
    assert on_disk < 5_000_000
    checkpoint = hf.open_model(tmp_path)
    assert checkpoint.config == LLAMA_70B
    whole = sum(tensor.nbytes for found in checkpoint.tensors.values() for tensor in found)
    assert whole == 2 * 70_553_706_496  # the parameters of Llama 3.1 70B
    for mesh in ({"fsdp": 8}, {"tensor": 8}, {"fsdp": 2, "tensor": 4}):
        made = meshes.make_mesh(**mesh)
        for process in jax.devices():
            mine = hf.reads(checkpoint, meshes.over(made), [process])
            assert whole / 8 <= sum(read.nbytes for read in mine) <= 1.001 * whole / 8
            assert {read.tensor.name for read in mine} == {
                tensor.name for found in checkpoint.tensors.values() for tensor in found
            }
    assert not read_bytes


def test_a_config_of_another_shape_than_the_weights_is_refused(stored):
    directory, _ = stored
    path = directory / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"intermediate_size": 64}))
    try:
        with pytest.raises(hf.CheckpointError, match=r"down_proj.*\[32, 48\].*\[32, 64\]"):
            hf.open_model(directory)
    finally:
        path.write_text(before)
    assert SMALL.intermediate_size == 48
