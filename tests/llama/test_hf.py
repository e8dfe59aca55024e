"""Model directories that are whole, and what is said of those that are not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig

from befm_jax import files
from befm_jax.llama import config as llama_config
from befm_jax.llama import hf, weights
from befm_jax.llama.config import UnsupportedModelError
from tests.helpers.small import SMALL, small_model


@pytest.fixture
def sharded(tmp_path):
    """A good directory in several shards."""
    _, params = small_model()
    hf.save(tmp_path, SMALL, params, max_shard_bytes=8_000)
    return tmp_path


def edited(path, change):
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shard", [8_000, 10**9])
def test_saving_and_loading_give_back_every_bit(tmp_path, dtype, shard):
    _, params = small_model()
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    hf.save(tmp_path, SMALL, params, max_shard_bytes=shard)
    config, back = hf.load(tmp_path)
    assert config == SMALL
    for path, leaf in flax.traverse_util.flatten_dict(params).items():
        found = flax.traverse_util.flatten_dict(back)[path]
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, leaf)
    assert bool(list(tmp_path.glob("*index.json"))) == (shard == 8_000)


def test_saving_over_an_older_export_leaves_no_stale_shard(sharded):
    _, params = small_model(seed=1)
    hf.save(sharded, SMALL, params)
    assert [path.name for path in sharded.glob("*.safetensors")] == ["model.safetensors"]
    np.testing.assert_array_equal(hf.load(sharded)[1]["norm"]["weight"], params["norm"]["weight"])


WRITE_WITH_LITTLE_ROOM = """
import resource, signal, sys
from tests.helpers.small import SMALL, small_model
from transformers import AutoConfig
from befm_jax.errors import UserError
from befm_jax.llama import hf
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, params = small_model(seed=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    hf.save(sys.argv[1], SMALL, params, max_shard_bytes=int(sys.argv[2]))
except UserError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("shard", [8_000, 10**9])
def test_a_failed_save_leaves_the_old_files_as_they_were(sharded, shard):
    """In a process whose files may not grow beyond 10 kB: writing really fails half-way."""
    before = {path.name: path.read_bytes() for path in sharded.iterdir()}
    root = str(Path(__file__).resolve().parents[2])
    printed = subprocess.run(
        [sys.executable, "-c", WRITE_WITH_LITTLE_ROOM, str(sharded), str(shard)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([root, *sys.path])},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert printed.startswith(f"{sharded}: can't be written (")
    assert "existing files are unchanged" in printed
    assert {path.name: path.read_bytes() for path in sharded.iterdir()} == before


def test_a_model_larger_than_the_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    _, params = small_model()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    room = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    with pytest.raises(files.NotWrittenError, match=f"needs {size:,} bytes, 1,000 are free"):
        hf.save(tmp_path, SMALL, params)
    assert list(tmp_path.iterdir()) == []


def test_a_cast_on_loading(sharded):
    leaves = jax.tree.leaves(hf.load(sharded, dtype=jnp.bfloat16)[1])
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}


class TestDamage:
    """Each kind of damage has an error that names the file and what is wrong with it."""

    def refused(self, directory, error, *words):
        with pytest.raises(error) as caught:
            hf.load(directory)
        for word in words:
            assert word in str(caught.value)

    def test_no_directory(self, tmp_path):
        self.refused(tmp_path / "none", FileNotFoundError, "no such model directory")

    def test_no_config(self, tmp_path):
        self.refused(tmp_path, FileNotFoundError, "config.json")

    def test_config_that_is_no_json(self, sharded):
        (sharded / "config.json").write_text("{")
        self.refused(sharded, UnsupportedModelError, "config.json", "JSON")

    def test_no_weights_but_a_pickle(self, sharded):
        for path in [*sharded.glob("*.safetensors"), sharded / hf.INDEX]:
            path.unlink()
        (sharded / "pytorch_model.bin").write_bytes(b"\x80\x02")
        self.refused(sharded, hf.CheckpointError, "pytorch_model.bin", "never read")

    def test_a_missing_shard(self, sharded):
        gone = sorted(sharded.glob("*.safetensors"))[1]
        gone.unlink()
        self.refused(sharded, FileNotFoundError, gone.name)

    def test_a_truncated_shard(self, sharded):
        cut = sorted(sharded.glob("*.safetensors"))[0]
        cut.write_bytes(cut.read_bytes()[:-100])
        self.refused(sharded, hf.CheckpointError, cut.name)

    def test_an_index_that_is_none(self, sharded):
        for content, words in (("[]", "JSON object"), ('{"weight_map": [3]}', "weight_map")):
            (sharded / hf.INDEX).write_text(content)
            self.refused(sharded, hf.CheckpointError, hf.INDEX, words)

    def test_a_tensor_that_the_index_puts_in_the_wrong_file(self, sharded):
        files = sorted(path.name for path in sharded.glob("*.safetensors"))

        def swap(index):
            index["weight_map"]["model.norm.weight"] = next(
                name for name in files if name != index["weight_map"]["model.norm.weight"]
            )

        edited(sharded / hf.INDEX, swap)
        self.refused(sharded, hf.CheckpointError, "model.norm.weight")

    def change_tensors(self, directory, change):
        _, params = small_model()
        hf.save(directory, SMALL, params)
        tensors = load_file(directory / hf.SINGLE)
        change(tensors)
        save_file(tensors, directory / hf.SINGLE)

    def test_a_missing_tensor(self, tmp_path):
        self.change_tensors(tmp_path, lambda tensors: tensors.pop("model.norm.weight"))
        self.refused(tmp_path, hf.CheckpointError, "lacks model.norm.weight")

    def test_more_layers_than_are_stored(self, sharded):
        edited(sharded / "config.json", lambda config: config.update(num_hidden_layers=10_000))
        self.refused(sharded, hf.CheckpointError, "lacks model.layers.10.", "more")

    def test_an_unknown_tensor(self, tmp_path):
        extra = {"model.layers.0.self_attn.q_norm.weight": np.ones(3, np.float32)}
        self.change_tensors(tmp_path, lambda tensors: tensors.update(extra))
        self.refused(tmp_path, hf.CheckpointError, "q_norm")

    def test_a_wrong_shape(self, tmp_path):
        wrong = {"model.layers.1.mlp.up_proj.weight": np.ones((3, 32), np.float32)}
        self.change_tensors(tmp_path, lambda tensors: tensors.update(wrong))
        self.refused(tmp_path, hf.CheckpointError, "layers.1.mlp.up_proj", "[3, 32]", "[48, 32]")

    def test_a_wrong_dtype(self, tmp_path):
        wrong = {"model.norm.weight": np.ones(32, np.int32)}
        self.change_tensors(tmp_path, lambda tensors: tensors.update(wrong))
        self.refused(tmp_path, hf.CheckpointError, "model.norm.weight", "I32", "BF16")


def resaved(directory, change=None, **fields):
    """A tied small model in one file, whose tensors and config are changed; and its parameters."""
    model, params = small_model(tie_word_embeddings=True)
    hf.save(directory, model.config, params)
    tensors = load_file(directory / hf.SINGLE)
    save_file(change(tensors) if change else tensors, directory / hf.SINGLE)
    edited(directory / "config.json", lambda config: config.update(fields))
    return params


EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NEVER_READ = {"model.rotary_emb.inv_freq": np.ones(8, np.float32)}


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {HEAD if name == EMBEDDINGS else name: t for name, t in tensors.items()},
        lambda tensors: tensors | {HEAD: tensors[EMBEDDINGS]},
        lambda tensors: {name.removeprefix("model."): t for name, t in tensors.items()},
        lambda tensors: tensors | NEVER_READ,
        lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8)},
    ],
    ids=["head alone", "head twice", "no prefix", "inv_freq", "inv_freq of a layer"],
)
def test_other_layouts_of_a_tied_model_are_the_same_model(tmp_path, change):
    params = resaved(tmp_path, change)
    config, back = hf.load(tmp_path)
    assert config.tie_word_embeddings
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_a_head_that_differs_from_the_embeddings_it_should_be_tied_to_is_used(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(weights, "_READ_AT_ONCE", 1000)  # several chunks, the last of which differs
    other = np.random.default_rng(0).standard_normal((97, 32)).astype(np.float32)

    def with_head(tensors):
        other[:90] = tensors[EMBEDDINGS][:90]
        return tensors | {HEAD: other}

    params = resaved(tmp_path, with_head)
    config, back = hf.load(tmp_path)
    assert not config.tie_word_embeddings
    np.testing.assert_array_equal(back["lm_head"]["weight"], other)
    np.testing.assert_array_equal(back["embed_tokens"]["weight"], params["embed_tokens"]["weight"])
    assert hf.abstract(tmp_path)[0] == config
    save_file(
        load_file(tmp_path / hf.SINGLE) | {HEAD: np.ones((3, 32), np.float32)},
        tmp_path / hf.SINGLE,
    )
    with pytest.raises(hf.CheckpointError, match=r"lm_head\.weight has shape \[3, 32\]"):
        hf.load(tmp_path)


class TestFingerprint:
    """The same model, however it is saved, and no other."""

    def of(self, directory):
        return hf.fingerprint(hf.open_model(directory))

    def test_it_is_the_same_in_other_files_and_in_a_wider_dtype(self, tmp_path):
        _, params = small_model()
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        hf.save(tmp_path / "one", SMALL, params)
        hf.save(tmp_path / "shards", SMALL, params, max_shard_bytes=8_000)
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        hf.save(tmp_path / "wide", SMALL, wide)
        edited(tmp_path / "wide" / "config.json", lambda config: config.update(bos_token_id=3))
        assert len({self.of(tmp_path / name) for name in ("one", "shards", "wide")}) == 1

    def test_a_change_of_any_matrix_or_constant_makes_another(self, tmp_path):
        found = set()
        resaved(tmp_path)
        tensors = load_file(tmp_path / hf.SINGLE)
        for name in tensors:
            save_file(tensors | {name: tensors[name] * np.float32(1.001)}, tmp_path / hf.SINGLE)
            found.add(self.of(tmp_path))
        save_file(tensors, tmp_path / hf.SINGLE)
        for change in (
            {}, {"rope_theta": 20_000.0}, {"rms_norm_eps": 1e-6}, {"rope_scaling": None}
        ):  # fmt: skip
            edited(tmp_path / "config.json", lambda config, change=change: config.update(change))
            found.add(self.of(tmp_path))
        assert len(found) == len(tensors) + 4


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "gpt2"),
        ("model_type", "qwen3_moe"),
        ("hidden_act", "gelu"),
        ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("quantization_config", {"quant_method": "fp8"}),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0}),
        ("rope_scaling", {"type": "dynamic", "factor": 4.0}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 4.0}),
        ("num_key_value_heads", 3),
        ("head_dim", 5),
        ("head_dim", 160),
        ("vocab_size", None),
        ("vocab_size", -1),
        ("model_type", ["llama"]),
        ("layer_types", 3),
        ("num_attention_heads", 0),
        ("num_key_value_heads", "2"),
        ("head_dim", "8"),
        ("rms_norm_eps", "x"),
        ("rope_theta", "abc"),
        ("rope_parameters", "x"),
        ("rope_parameters", {"full_attention": {"rope_type": "default"}}),
        ("rope_parameters", {"rope_type": "linear", "factor": "2"}),
        ("partial_rotary_factor", 0.5),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("eos_token_id", "a"),
        ("tie_word_embeddings", "yes"),
        ("num_hidden_layers", 10**6),
        ("hidden_size", 10**309),
        ("head_dim", 0),
        ("eos_token_id", 10**30),
        ("rms_norm_eps", 10**309),
        ("rms_norm_eps", 1.0),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", 10**309),
        ("rope_theta", 1e300),
        ("rope_theta", 1.0),
        ("rope_scaling", {"rope_type": "linear", "factor": 10**309}),
        ("rope_scaling", {"rope_type": "linear", "factor": 0.5}),
        ("rope_scaling", LLAMA3 | {"high_freq_factor": 1.0}),
        ("rope_scaling", LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 1.0}),
        ("rope_scaling", LLAMA3 | {"original_max_position_embeddings": 10**309}),
        ("rope_scaling", LLAMA3 | {"rope_theta": 0}),
    ],
)
def test_a_config_that_can_not_be_run_exactly_is_refused_by_field(field, value):
    fields = llama_config.to_hugging_face(SMALL, "float32")
    del fields["rope_scaling"]
    named = "rope|partial_rotary" if field.startswith("rope") else field
    with pytest.raises(UnsupportedModelError, match=named):
        llama_config.from_hugging_face(fields | {field: value})


def test_what_two_fields_say_of_rotation_must_be_the_same():
    fields = llama_config.to_hugging_face(SMALL, "float32") | {"rope_scaling": LLAMA3}
    expected = llama_config.from_hugging_face(fields)
    same = {name: int(value) if name == "factor" else value for name, value in LLAMA3.items()}
    assert llama_config.from_hugging_face(fields | {"rope_parameters": same}) == expected
    for other in (
        {"rope_type": "default"},
        LLAMA3 | {"rope_theta": 500_000.0},
        LLAMA3 | {"factor": 4.0},
    ):
        with pytest.raises(UnsupportedModelError, match="rope_scaling and rope_parameters"):
            llama_config.from_hugging_face(fields | {"rope_parameters": other})
    with pytest.raises(UnsupportedModelError, match="rope_scaling: rope type is 'yarn'"):
        llama_config.from_hugging_face(
            fields | {"rope_scaling": {"rope_type": "yarn"}, "rope_parameters": LLAMA3}
        )


def test_heads_wider_than_nothing_are_needed():
    fields = llama_config.to_hugging_face(SMALL, "float32") | {"head_dim": None}
    with pytest.raises(UnsupportedModelError, match="head_dim is 0"):
        llama_config.from_hugging_face(fields | {"num_attention_heads": 64})


def test_swish_is_silu():
    fields = llama_config.to_hugging_face(SMALL, "float32")
    assert llama_config.from_hugging_face(fields | {"hidden_act": "swish"}) == SMALL


# Number of parameters as their makers count them (embeddings once where they are tied).
KNOWN = {
    "Llama 3.1 8B": (8_030_261_248, (4096, 14_336, 32, 32, 8, 128, 128_256), {}),
    "Llama 3.1 70B": (70_553_706_496, (8192, 28_672, 80, 64, 8, 128, 128_256), {}),
    "Llama 3.1 405B": (405_853_388_800, (16_384, 53_248, 126, 128, 8, 128, 128_256), {}),
    "Llama 3.2 1B": (
        1_235_814_400, (2048, 8192, 16, 32, 8, 64, 128_256), {"tie_word_embeddings": True},
    ),
    "Llama 3.2 3B": (
        3_212_749_824, (3072, 8192, 28, 24, 8, 128, 128_256), {"tie_word_embeddings": True},
    ),
    "Qwen3 4B": (
        4_022_468_096, (2560, 9728, 36, 32, 8, 128, 151_936),
        {"tie_word_embeddings": True, "model_type": "qwen3"},
    ),
}  # fmt: skip
SHAPE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size",
)  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_every_size_has_the_parameters_that_it_is_known_for(name):
    parameters, shape, more = KNOWN[name]
    fields = {"model_type": "llama", **dict(zip(SHAPE, shape, strict=True)), **more}
    config = llama_config.from_hugging_face(fields)
    assert sum(leaf.size for leaf in jax.tree.leaves(hf.model.shapes(config))) == parameters


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"num_key_value_heads": None}, {"num_key_value_heads": 8}, {"rms_norm_eps": 1e-5}],
    ids=str,
)
def test_what_a_config_leaves_out_is_what_transformers_takes(family, fields):
    given = {
        "model_type": family, "vocab_size": 64, "hidden_size": 256, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 64, **fields,
    }  # fmt: skip
    ours = llama_config.from_hugging_face(given)
    theirs = AutoConfig.for_model(**given)
    for name in ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings",
                 "tie_word_embeddings", "attention_bias"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


class Disk:
    """`os.replace` as a disk does it that fails at the n-th move, or from there on."""

    def __init__(self, fails_at, for_good=False):
        self.moves, self.fails_at, self.for_good = 0, fails_at, for_good
        self._replace = os.replace

    def __call__(self, source, target):
        self.moves += 1
        if self.moves == self.fails_at or (self.for_good and self.moves > self.fails_at):
            raise OSError(5, "Input/output error")
        self._replace(source, target)


def test_a_move_that_fails_half_way_is_undone(sharded, monkeypatch):
    """Whichever move it is: the old model stays whole."""
    (sharded / "model_ema.safetensors").write_bytes(b"not ours")
    before = {path.name: path.read_bytes() for path in sharded.iterdir()}
    _, params = small_model(seed=1)
    counted = Disk(fails_at=0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted)
        shutil.copytree(sharded, sharded / "copy")
        hf.save(sharded / "copy", SMALL, params, max_shard_bytes=10_000)
        shutil.rmtree(sharded / "copy")
    assert counted.moves > 20
    for number in range(1, counted.moves + 1):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", Disk(number))
            with pytest.raises(files.NotWrittenError, match=r"Input/output error.*are unchanged"):
                hf.save(sharded, SMALL, params, max_shard_bytes=10_000)
        assert {path.name: path.read_bytes() for path in sharded.iterdir()} == before
    hf.save(sharded, SMALL, params, max_shard_bytes=10**9)
    weights = {path.name for path in sharded.iterdir()} - {"config.json"}
    assert weights == {"model_ema.safetensors", "model.safetensors"}
    np.testing.assert_array_equal(hf.load(sharded)[1]["norm"]["weight"], params["norm"]["weight"])


def test_a_disk_that_dies_between_two_moves_leaves_nothing_that_loads(sharded, monkeypatch):
    """No mix of two models is taken for one, and nothing of either is lost."""
    _, params = small_model(seed=1)
    kept = shutil.copytree(sharded, sharded.with_name("kept"))
    for number in range(2, 8):
        shutil.rmtree(sharded)
        shutil.copytree(kept, sharded)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", Disk(number, for_good=True))
            with pytest.raises(files.NotWrittenError, match=r"half exchanged.*\.replaced-"):
                hf.save(sharded, SMALL, params, max_shard_bytes=10**9)
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            hf.load(sharded)
        saved = {path.name for path in sharded.rglob("*.safetensors")}
        assert saved >= {path.name for path in kept.glob("*.safetensors")}
