"""Say what a checkpoint holds, tensor by tensor, without loading it.

    python tools/checkpoint.py /models/Llama-3.1-8B-Instruct [--tensors] [--fsdp 8 --tensor 2]

Takes a directory of safetensors (a model or an adapter), a training run (its base) or a hub id;
reads headers alone.  With a mesh it also says what each device would hold.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import Counter
from pathlib import Path

from befm_jax.errors import UserError, printable
from befm_jax.llama import weights
from befm_jax.llama.weights import Tensor
from befm_jax.models import resolve_model


def main() -> None:
    """Prints the contents of the directory named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", help="a directory or a hub id (owner/name or owner/name@revision)")
    parser.add_argument("--tensors", action="store_true", help="one line a tensor, not a kind")
    parser.add_argument("--fsdp", type=int, default=1, help="devices on the mesh's fsdp axis")
    parser.add_argument("--tensor", type=int, default=1, help="devices on its tensor axis")
    arguments = parser.parse_args()
    if min(arguments.fsdp, arguments.tensor) < 1:
        parser.error("--fsdp and --tensor are at least 1")
    devices = arguments.fsdp * arguments.tensor
    # Devices to lay the mesh over, none of which holds anything; set before JAX starts.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    try:
        directory = resolve_model(arguments.name).directory
        adapter = directory / "adapter_model.safetensors"
        if adapter.is_file():
            stored = weights.open_file(adapter)
        else:
            stored = list(weights.open_directory(directory).values())
        print(contents(stored, each=arguments.tensors))
        if (directory / "config.json").is_file():
            print(as_model(directory, arguments.fsdp, arguments.tensor))
    except (UserError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)


def contents(stored: list[Tensor], each: bool) -> str:
    """A table: tensors, shapes, dtypes and bytes; layers of one kind as one line unless `each`."""
    kinds: dict[tuple[str, str, tuple[int, ...]], list[Tensor]] = {}
    for tensor in stored:
        name = tensor.name if each else _without_layer(tensor.name)
        kinds.setdefault((name, tensor.dtype, tensor.shape), []).append(tensor)
    rows = [("tensor", "count", "shape", "dtype", "bytes")]
    for (name, dtype, shape), found in kinds.items():
        size = sum(tensor.nbytes for tensor in found)
        rows.append((name, f"{len(found):,}", "x".join(map(str, shape)), dtype, f"{size:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{row[0].ljust(widths[0])}  "
        + "  ".join(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    sizes: Counter[Path] = Counter()
    for tensor in stored:
        sizes[tensor.file] += tensor.nbytes
    lines += ["", *(f"{file.name}: {size:,} bytes" for file, size in sorted(sizes.items()))]
    numbers = sum(math.prod(tensor.shape) for tensor in stored)
    lines.append(f"in all {len(stored):,} tensors, {numbers:,} numbers, {sizes.total():,} bytes")
    return "\n".join(map(printable, lines))


def as_model(directory: Path, fsdp: int, tensor: int) -> str:
    """Whether the tensors are those of the config, and what each device of a mesh would hold."""
    from befm_jax.distributed import mesh as meshes
    from befm_jax.llama import hf

    checkpoint = hf.open_model(directory)
    config = checkpoint.config
    lines = [
        f"a whole {config.model_type}: {config.num_hidden_layers} layers of width "
        f"{config.hidden_size}, vocabulary {config.vocab_size:,}"
    ]
    if fsdp * tensor > 1:
        mesh = meshes.make_mesh(fsdp=fsdp, tensor=tensor)
        largest = max(
            sum(read.nbytes for read in hf.reads(checkpoint, meshes.over(mesh), [device]))
            for device in mesh.devices.flat
        )
        lines.append(f"over fsdp {fsdp} x tensor {tensor}: {largest:,} bytes a device at most")
    return "\n".join(lines)


def _without_layer(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


if __name__ == "__main__":
    main()
