"""Loading a checkpoint: befm_jax against transformers' from_pretrained.

A checkpoint of Llama 3.2's shape, bf16, random, is made for the run and loaded in `--dtype`:
float32, in which CPUs compute, or bfloat16, as it is stored.  Each load is a process of its own;
the two sides take turns.  `call` is how long the call took; `ready` ends when every byte of every
weight has been read once by the same NumPy reduction: where nothing is converted from_pretrained
maps the file, and returns before it has read it.  `peak` is the process's largest resident memory,
imports included.
Cold: the files were dropped from the page cache before; warm: they were in it.  Right before the
clock starts another process takes four times the checkpoint's size in memory and gives it back: on
a virtual machine, memory that was not used for a while costs whoever touches it first several times
as much as reading does.

Then eight processes load the model over a mesh of eight, from a cold cache: `asked` is what a
process wanted of the files, `disk` what the system read from the disk for it; it reads ahead, of
what a neighbour is about to want too, so that of `disk` the sum counts.  Last, one process loads
the model in int8.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (NumPy knows bfloat16 by it)
import numpy as np
from bench_report import Bench, Goal, Ratio

WIDTH, FEED_FORWARD, VOCABULARY, HEADS, KEY_VALUE_HEADS = 2048, 8192, 128_256, 32, 8
PROCESSES = 8
# What Python, JAX and the imports are allowed, on both sides of the comparison of memory.
OVERHEAD = 600_000_000
# NumPy asks for huge pages, as it will for the buffers that are read into.
USE_MEMORY = "import sys, numpy; numpy.empty(int(sys.argv[1]), numpy.uint8)[::4096] = 1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--gigabytes", type=float, default=2.5, help="size of the checkpoint")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="what to load it in"
    )
    parser.add_argument("--rounds", type=int, default=5, help="loads of each side and condition")
    parser.add_argument(
        "--directory", type=Path, help="where to make it (default: a temporary one)"
    )


def run(arguments: argparse.Namespace) -> Bench:
    """Makes the checkpoint, loads it in every way, and compares."""
    with tempfile.TemporaryDirectory(dir=arguments.directory) as made:
        directory = Path(made)
        layers = max(1, round((arguments.gigabytes * 1e9 - 525e6) / 121.6e6))
        size = _child("make", directory, layers)["bytes"]
        for side in ("ours", "peer"):  # what is read from disk for the first time: libraries
            _child(side, directory, arguments.dtype)
        runs: dict[str, list[dict[str, Any]]] = {}
        for _ in range(arguments.rounds):
            for condition in ("cold", "warm"):
                for side in ("ours", "peer"):
                    if condition == "cold":
                        _forget(directory)
                    runs.setdefault(f"{side} {condition}", []).append(
                        _child(side, directory, arguments.dtype)
                    )
        _forget(directory)
        shares = _eight_processes(directory)
        rounded = _child("int8", directory)
    ratio = {
        f"{condition}, {until}": Ratio.of(
            *([one[until] for one in runs[f"{side} {condition}"]] for side in ("ours", "peer"))
        )
        for condition in ("cold", "warm")
        for until in ("ready", "call")
    }
    held = size * np.dtype(arguments.dtype).itemsize // 2
    peak = max(one["peak"] for name, each in runs.items() if "ours" in name for one in each)
    goals = [
        # From a cold cache the disk decides, and its rate moves more than the two sides differ:
        # that ratio is reported and held to nothing.
        Goal("time against the peer, warm, ready", 1 / ratio["warm, ready"].median, 1.0, "times"),
        Goal("peak memory", peak / 1e6, (1.15 * held + OVERHEAD) / 1e6, "MB"),
        Goal(
            "largest share of one process of eight",
            max(share["asked"] for share in shares) / size * 100,
            100 / PROCESSES * 1.05,
            "%",
        ),
        Goal(
            "read from the disk by the eight together",
            sum(share["disk"] for share in shares) / size * 100,
            105.0,
            "%",
        ),
        Goal("peak memory, int8", rounded["peak"] / 1e6, (0.65 * size + OVERHEAD) / 1e6, "MB"),
    ]
    return Bench(
        "load: befm_jax against transformers",
        {
            "layers": layers,
            "bytes stored": f"{size:,}",
            "loaded as": f"{arguments.dtype} ({held:,} bytes)",
            "rounds": arguments.rounds,
        },
        runs | {"int8": [rounded]},
        ratio,
        goals,
        [
            f"{what} by each of {PROCESSES} processes: "
            + ", ".join(f"{share[what]:,}" for share in shares)
            for what in ("asked", "disk")
        ],
    )


def _child(what: str, directory: Path, *more: Any) -> dict[str, Any]:
    """Runs one of `CHILDREN` in a process of its own; returns its figures."""
    return _figures(_start(what, directory, *more))


def _figures(child: subprocess.Popen[str]) -> dict[str, Any]:
    """What a child printed last; ends the benchmark with what it said if it failed."""
    printed, said = child.communicate()
    if child.returncode:
        sys.exit(said)
    figures: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return figures


def _start(what: str, directory: Path, *more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, what, str(directory), *map(str, more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
    )


def _forget(directory: Path) -> None:
    """Drops a checkpoint's files from the page cache."""
    for path in directory.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _eight_processes(directory: Path) -> list[dict[str, Any]]:
    """What each process of eight read, loading over a mesh of one device a process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = [_start("share", directory, address, number) for number in range(PROCESSES)]
    return [_figures(one) for one in started]


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _timed(directory: Path, load: Callable[[], list[np.ndarray]]) -> dict[str, Any]:
    """Times a call that returns all weights, and the reading of every one of their bytes."""
    stored = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    subprocess.run([sys.executable, "-c", USE_MEMORY, str(4 * stored)], check=True)
    since = time.perf_counter()
    arrays = load()
    call = time.perf_counter() - since
    for array in arrays:
        np.bitwise_xor.reduce(array.reshape(-1).view(np.uint64))
    return {"call": call, "ready": time.perf_counter() - since, "peak": _peak()}


def _ours(directory: Path, dtype: str | None, quantize: str = "no") -> dict[str, Any]:
    import jax

    from befm_jax import llama

    jax.devices()

    def load() -> list[np.ndarray]:
        _, params = llama.load(directory, dtype=dtype, quantize=quantize)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]

    return _timed(directory, load)


def _peer(directory: Path, dtype: str) -> dict[str, Any]:
    import torch
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    def load() -> list[np.ndarray]:
        model = LlamaForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
        return [weight.data.view(torch.uint8).numpy() for weight in model.parameters()]

    return _timed(directory, load)


def _share(directory: Path, address: str, number: str) -> dict[str, Any]:
    import jax

    from befm_jax import llama
    from befm_jax.distributed import mesh as meshes
    from befm_jax.llama import weights

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, PROCESSES, int(number))
    read = 0
    read_into = weights.read_into

    def counted(target: np.ndarray, tensor: Any, index: Any) -> None:
        nonlocal read
        read_into(target, tensor, index)
        read += target.nbytes

    weights.read_into = counted
    mesh, before = meshes.make_mesh(fsdp=PROCESSES), _from_disk()
    llama.load(directory, meshes.over(mesh))
    return {"asked": read, "disk": _from_disk() - before}


def _from_disk() -> int:
    """Bytes that the system has read from disks for this process."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def _make(directory: Path, layers: str) -> dict[str, Any]:
    import jax.numpy as jnp

    from befm_jax import llama
    from befm_jax.llama import model
    from befm_jax.llama.config import LlamaConfig, RopeScaling

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=int(layers),
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        head_dim=WIDTH // HEADS,
        rope_scaling=RopeScaling("llama3", 32.0),
        tie_word_embeddings=True,
    )
    random = np.random.default_rng(0)

    def drawn(leaf: Any) -> Any:
        # bf16 numbers between 0.01 and 0.03, straight from random bits.
        bits = random.integers(0x3C00, 0x3D00, leaf.shape, np.uint16)
        return jnp.asarray(bits).view(jnp.bfloat16)

    import jax

    params = jax.tree.map(drawn, model.shapes(config))
    llama.save(directory, config, params, max_shard_bytes=1_000_000_000)
    return {"bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params))}


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    "make": _make,
    "ours": _ours,
    "peer": _peer,
    "share": _share,
    "int8": lambda directory: _ours(directory, None, "int8"),
}

if __name__ == "__main__":
    print(json.dumps(CHILDREN[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])))
