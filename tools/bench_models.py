"""Random checkpoints for benchmarks, in Hugging Face's form, that both sides load.

Shapes: `tiny` is the quickstart's (2 layers of width 256), `100m` has a hundred million
parameters, `8b` is Llama 3.1 8B.  Of `8b` only the config is written: each side draws its own
weights on the device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp

from befm_jax.adapters import export, lora, peft
from befm_jax.errors import UserError
from befm_jax.llama import config as llama_config
from befm_jax.llama import hf, model, tiny
from befm_jax.llama.config import LlamaConfig, RopeScaling
from befm_jax.llama.model import Params
from befm_jax.llama.tokenizer import Tokenizer
from befm_jax.respondents.engine import fitting_tokenizer

SHAPES: dict[str, LlamaConfig] = {
    # The vocabulary of `tiny` is its tokenizer's.
    "tiny": LlamaConfig(
        vocab_size=0,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    ),
    "100m": LlamaConfig(
        vocab_size=16_384,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
    ),
    "8b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rope_scaling=RopeScaling("llama3", 8.0),
    ),
}
# Learnt pieces of the tokenizer, beside bytes, numbers and special tokens.
PIECES = {"tiny": 600, "100m": 8000, "8b": 8000}
# What layers compute in, and weights are held in, by default on each device.
DTYPES = {"cpu": "float32", "gpu": "bfloat16"}
ADAPTER = "adapter"
RANK = 16


@dataclass(frozen=True)
class Where:
    """Where both sides run, on which shape, and what they compute in."""

    device: str
    shape: str
    dtype: str

    def as_settings(self) -> dict[str, str]:
        """For the head of a table."""
        return dataclasses.asdict(self)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `where` reads, and how often the sides take turns."""
    parser.add_argument("--device", choices=tuple(DTYPES), default="cpu", help="where both run")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="default: tiny; 8b on a GPU")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: float32; bfloat16 on a GPU"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns that each side takes")


def where(arguments: argparse.Namespace) -> Where:
    """What the options say, with the device's defaults.

    Raises:
        UserError: no such device here, or a shape that is not for it.
    """
    device = arguments.device
    shape = arguments.shape or ("tiny" if device == "cpu" else "8b")
    if device == "gpu" and not Path("/dev/nvidiactl").exists():
        raise UserError("--device gpu: there is no NVIDIA GPU here")
    if device == "cpu" and shape == "8b":
        raise UserError("--shape 8b: its weights are drawn on a GPU; add --device gpu")
    return Where(device, shape, arguments.dtype or DTYPES[device])


def make(directory: Path, at: Where, texts: list[str]) -> Tokenizer:
    """Writes a checkpoint with a tokenizer of these texts, and returns the tokenizer.

    The adapter beside it, of rank 16 on all linears, has a `B` that is not zero: with zeros, as
    training starts, half of all gradients are zero and would agree whatever they are.
    """
    tokenizer = tiny.train_tokenizer(texts, PIECES[at.shape])
    config = with_tokenizer(SHAPES[at.shape], tokenizer)
    if at.shape == "8b":
        directory.mkdir(parents=True, exist_ok=True)
        fields = llama_config.to_hugging_face(config, at.dtype)
        (directory / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        tokenizer.save(directory)
    else:
        params = tiny.init_params(config, seed=0, embedding_scale=0.3)
        dtype = jnp.dtype(at.dtype)
        export.model(
            directory, config, jax.tree.map(lambda leaf: leaf.astype(dtype), params), tokenizer
        )
    _write_adapter(directory, config, tokenizer)
    return tokenizer


def with_tokenizer(config: LlamaConfig, tokenizer: Tokenizer) -> LlamaConfig:
    """A shape with the ids of a tokenizer, and its vocabulary where the shape has none."""
    return dataclasses.replace(
        config,
        vocab_size=config.vocab_size or tokenizer.vocab_size,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.stop_ids,
    )


def link(directory: Path, checkpoint: Path) -> Tokenizer:
    """Puts a checkpoint's files into a folder, an adapter as `make` writes it beside them."""
    for file in checkpoint.iterdir():
        (directory / file.name).symlink_to(file.resolve())
    config = llama_config.read(directory)
    tokenizer = fitting_tokenizer(directory, config)
    _write_adapter(directory, config, tokenizer)
    return tokenizer


def _write_adapter(directory: Path, config: LlamaConfig, tokenizer: Tokenizer) -> None:
    adapter = lora.init(jax.random.key(0), model.shapes(config), rank=RANK)
    for number, weight in enumerate(adapter.weights.values()):
        drawn = jax.random.normal(jax.random.key(number), weight["b"].shape)
        weight["b"] = 0.01 * drawn
    peft.save(directory / ADAPTER, adapter, str(directory), tokenizer.template_hash)


def has_weights(directory: Path) -> bool:
    """Whether both sides load the same weights, so that their results can be compared."""
    return any(directory.glob("*.safetensors"))


def load(directory: Path, dtype: str) -> tuple[LlamaConfig, Params]:
    """Config and parameters: those of the files, or drawn on the device where there are none."""
    if has_weights(directory):
        return hf.load(directory)
    config = llama_config.read(directory)
    return config, _drawn(config, jnp.dtype(dtype))


def _drawn(config: LlamaConfig, dtype: Any) -> Params:
    """Normal weights of standard deviation 0.02, one layer of one parameter at a time."""

    def draw(key: Any, shape: tuple[int, ...], norm: bool) -> Any:
        if norm:
            return jnp.ones(shape, dtype)
        return (0.02 * jax.random.normal(key, shape, dtype)).astype(dtype)

    def stacked(key: Any, shape: tuple[int, ...], norm: bool) -> Any:
        keys = jax.random.split(key, shape[0])
        return jax.lax.map(lambda one: draw(one, shape[1:], norm), keys)

    flat = {}
    for number, (path, leaf) in enumerate(
        flax.traverse_util.flatten_dict(model.shapes(config)).items()
    ):
        make_one = stacked if path[0] == "layers" else draw
        drawn = jax.jit(make_one, static_argnums=(1, 2))
        flat[path] = drawn(jax.random.key(number), leaf.shape, path[-2].endswith("norm"))
    tree: Params = flax.traverse_util.unflatten_dict(flat)
    return tree
