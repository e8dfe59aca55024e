"""Which axis of which array is cut over which devices: one mesh, one table.

The mesh has three axes: `data` (rows of a batch), `fsdp` (rows of a batch; parameters are cut and
gathered layer by layer) and `tensor` (heads and feed-forward width; parameters stay cut).

Parameters are cut along the rows in which they are stored wherever that can be: a process then
reads one run of bytes a layer.  Only the inputs of `o_proj` and `down_proj`, which `tensor` cuts,
are columns; of those the disk gives whole pages (4 kB), whatever the width that is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from befm_jax.errors import UserError
from befm_jax.llama import model
from befm_jax.llama.config import LlamaConfig

AXES = ("data", "fsdp", "tensor")
# Logical axis of a parameter (`llama.model.logical_axes`) -> mesh axes that cut it, major first.
RULES: Mapping[str, tuple[str, ...]] = {
    "layers": (),
    "norm": (),
    "width": (),
    "vocabulary": ("tensor", "fsdp"),
    "heads": ("tensor", "fsdp"),
    "key_value_heads": ("tensor", "fsdp"),
    "feed_forward": ("tensor", "fsdp"),
    "output_width": ("fsdp",),
    "input_heads": ("tensor",),
    "input_feed_forward": ("tensor",),
}


class ShardingError(UserError):
    """A mesh that the model can't be cut over; names the parameter, the axis and the sizes."""


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over all devices, or over those given.

    Raises:
        ShardingError: the axes do not multiply to the number of devices, or one is below 1.
    """
    devices = jax.devices() if devices is None else devices
    shape = (data, fsdp, tensor)
    if min(shape) < 1:
        raise ShardingError(f"a mesh's axes are at least 1, not {', '.join(map(str, shape))}")
    if math.prod(shape) != len(devices):
        sizes = " x ".join(f"{name} {size}" for name, size in zip(AXES, shape, strict=True))
        raise ShardingError(
            f"a mesh of {sizes} needs {math.prod(shape)} devices, not {len(devices)}"
        )
    return Mesh(np.asarray(devices).reshape(shape), AXES)


def parameter_shardings(config: LlamaConfig, mesh: Mesh | None) -> dict[tuple[str, ...], Sharding]:
    """The sharding of every parameter by its path; without a mesh all stand on one device.

    Raises:
        ShardingError: an axis of a parameter does not divide by the mesh axis that cuts it.
    """
    found: dict[tuple[str, ...], Sharding] = {}
    for path, leaf in flax.traverse_util.flatten_dict(model.shapes(config)).items():
        if mesh is None:
            found[path] = SingleDeviceSharding(jax.local_devices()[0])
            continue
        names = model.logical_axes(path)
        for name, size in zip(names, leaf.shape, strict=True):
            parts = math.prod(mesh.shape[axis] for axis in RULES[name])
            if size % parts:
                raise ShardingError(
                    f"{'/'.join(path)}: {name} has {size} entries, which do not divide by the "
                    f"mesh's {' x '.join(RULES[name])} of {parts}"
                )
        # An axis that nothing cuts is None; of one name alone the tuple is left out.
        cut = [(RULES[name] if len(RULES[name]) > 1 else (*RULES[name], None)[0]) for name in names]
        found[path] = NamedSharding(mesh, PartitionSpec(*cut))
    return found
