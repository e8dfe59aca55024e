"""Which axis of which array is cut over which devices: one mesh, one table.

The mesh has four axes: `slice` (rows of a batch, over the network between TPU slices), `data` (rows
of a batch), `fsdp` (rows of a batch; parameters are cut and gathered layer by layer) and `tensor`
(heads and feed-forward width; parameters stay cut).

Parameters are cut along the rows in which they are stored wherever that can be: a process then
reads one run of bytes a layer.  Two kinds are cut along columns, of which the disk gives whole
pages (4 kB), whatever the width that is wanted: the inputs of `o_proj` and `down_proj`, which
`tensor` cuts, and embeddings.  Those are looked up without being gathered: every device looks up
its own columns for the rows of all, and what goes through the network are activations of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import (
    AbstractMesh,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)
from jaxtyping import Array

from befm_jax.adapters.lora import Adapter
from befm_jax.errors import UserError
from befm_jax.llama import int8, model
from befm_jax.llama.config import LlamaConfig

AXES = ("slice", "data", "fsdp", "tensor")
# Logical axis -> mesh axes that cut it, major first.
RULES: Mapping[str, tuple[str, ...]] = {
    # Parameters (`llama.model.logical_axes`) and adapters.
    "layers": (),
    "norm": (),
    "words": (),
    "width": (),
    "rank": (),
    "vocabulary": ("tensor", "fsdp"),
    "embedding_width": ("tensor", "fsdp"),
    "heads": ("tensor", "fsdp"),
    "key_value_heads": ("tensor", "fsdp"),
    "feed_forward": ("tensor", "fsdp"),
    "output_width": ("fsdp",),
    "input_heads": ("tensor",),
    "input_feed_forward": ("tensor",),
    # What is computed: forests, hidden states, heads, caches, logits.
    "micro_batches": (),
    "rows": ("slice", "data", "fsdp"),
    "rows_to_embed": ("slice", "data"),
    "slots": (),
    "features": (),
    "each_head": ("tensor",),
    "each_feed_forward": ("tensor",),
    "each_word": ("tensor",),
}
# What compilers are asked for, by platform.  On v5p and v6e the gathers of weights otherwise run by
# themselves, with nothing computed meanwhile; v5e fuses them with products in any case.
_COMPILER_OPTIONS: Mapping[str, dict[str, str]] = {
    "tpu": {
        "xla_enable_async_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
        "xla_tpu_overlap_compute_collective_tc": "true",
    },
}

# What says where arrays stand: a mesh of devices, or of as many as there would be.
AnyMesh = Mesh | AbstractMesh


class ShardingError(UserError):
    """A mesh that the model can't be cut over; names the parameter, the axis and the sizes."""


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    slices: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over all devices, or over those given, laid out as their network is.

    Raises:
        ShardingError: the axes do not multiply to the number of devices, or one is below 1.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = (slices, data, fsdp, tensor)
    if min(shape) < 1:
        raise ShardingError(f"a mesh's axes are at least 1, not {', '.join(map(str, shape))}")
    if math.prod(shape) != len(devices):
        sizes = " x ".join(f"{name} {size}" for name, size in zip(AXES, shape, strict=True))
        raise ShardingError(
            f"a mesh of {sizes} needs {math.prod(shape)} devices, not {len(devices)}"
        )
    if devices[0].platform != "tpu":
        return Mesh(np.asarray(devices).reshape(shape), AXES)
    if slices == 1:
        laid_out = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        laid_out = mesh_utils.create_hybrid_device_mesh(
            (1, *shape[1:]), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(laid_out, AXES)


@dataclass(frozen=True)
class Layout:
    """A mesh, and what the table says of arrays on it; axes are given by their logical names.

    None in the place of a name: an axis of one entry, or one that is nowhere cut.
    """

    mesh: AnyMesh

    @property
    def compiler_options(self) -> dict[str, str] | None:
        """What programs over these devices are compiled with, for `jax.jit`."""
        platform = self.mesh.devices.flat[0].platform if isinstance(self.mesh, Mesh) else ""
        return _COMPILER_OPTIONS.get(platform)

    def spec(self, *names: str | None) -> PartitionSpec:
        """The mesh axes that cut each axis.

        Raises KeyError for a name that the table has not: nothing is laid out by default.
        """
        cuts = [() if name is None else RULES[name] for name in names]
        # An axis that nothing cuts is None; of one name alone the tuple is left out.
        return PartitionSpec(*(cut if len(cut) > 1 else (*cut, None)[0] for cut in cuts))

    def sharding(self, *names: str | None) -> NamedSharding:
        """The sharding of an array with these axes."""
        return NamedSharding(self.mesh, self.spec(*names))

    def parts(self, name: str) -> int:
        """Into how many parts an axis is cut."""
        return math.prod(self.mesh.shape[axis] for axis in RULES[name])

    def constrain(self, x: Array, *names: str | None) -> Array:
        """`x`, cut as the table says: a hint where the compiler would choose otherwise."""
        return jax.lax.with_sharding_constraint(x, self.sharding(*names))

    def on_each_device(
        self,
        function: Callable[..., Any],
        taken: Sequence[Sequence[str | None]],
        given: Any,
    ) -> Callable[..., Any]:
        """`function` on every device's own parts, which need nothing of one another.

        `taken`: the axes of each argument; `given`: the axes of the result, or of each result in
        a tuple of tuples.
        """
        several = bool(given) and isinstance(given[0], tuple)
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=tuple(self.spec(*names) for names in taken),
            out_specs=tuple(self.spec(*names) for names in given) if several else self.spec(*given),
            check_vma=False,
        )


def parameter_shardings(
    config: LlamaConfig, mesh: AnyMesh | None
) -> dict[tuple[str, ...], Sharding]:
    """The sharding of every parameter by its path; without a mesh all stand on one device.

    Raises:
        ShardingError: an axis of a parameter does not divide by the mesh axis that cuts it.
    """
    shapes = flax.traverse_util.flatten_dict(model.shapes(config))
    if mesh is None:
        return dict.fromkeys(shapes, SingleDeviceSharding(jax.local_devices()[0]))
    layout = Layout(mesh)
    found: dict[tuple[str, ...], Sharding] = {}
    for path, leaf in shapes.items():
        names = model.logical_axes(path)
        for name, size in zip(names, leaf.shape, strict=True):
            _divides(layout, "/".join(path), name, size)
        found[path] = layout.sharding(*names)
    heads = config.num_key_value_heads
    if heads % layout.parts("each_head"):
        raise ShardingError(
            f"the model has {heads} key-value heads, which do not divide by the mesh's tensor of "
            f"{layout.parts('each_head')}"
        )
    return found


def adapter_shardings(adapter: Adapter, mesh: AnyMesh) -> Adapter:
    """The sharding of every matrix of an adapter: `a` as its kernel's inputs, `b` as its outputs.

    `adapter` may be abstract: only its shapes count.

    Raises:
        ShardingError: an axis does not divide by the mesh axis that cuts it.
    """
    layout = Layout(mesh)
    found: dict[str, Any] = {}
    for path, weight in adapter.weights.items():
        layers, outputs, inputs = model.logical_axes((*path.split("/"), "weight"))
        _divides(layout, path, outputs, weight["b"].shape[1])
        _divides(layout, path, inputs, weight["a"].shape[2])
        found[path] = {
            "a": layout.sharding(layers, "rank", inputs),
            "b": layout.sharding(layers, outputs, "rank"),
        }
    return Adapter(found, adapter.spec)


def abstract_parameters(
    config: LlamaConfig, mesh: AnyMesh | None, dtype: Any, quantize: bool = False
) -> model.Params:
    """Parameters as `jax.ShapeDtypeStruct`s that say where each part stands; nothing is made.

    Raises:
        ShardingError: the model can't be cut over the mesh.
    """
    shardings = parameter_shardings(config, mesh)
    flat = flax.traverse_util.flatten_dict(model.shapes(config))
    for path, leaf in flat.items():
        sharding = shardings[path]
        flat[path] = jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)
        if quantize and int8.is_quantized(path):
            by_row = sharding
            if isinstance(sharding, NamedSharding):
                by_row = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:-1]))
            values: Any = jax.ShapeDtypeStruct(leaf.shape, jnp.int8, sharding=sharding)
            scale: Any = jax.ShapeDtypeStruct(leaf.shape[:-1], jnp.float32, sharding=by_row)
            flat[path] = int8.Int8Kernel(values, scale)
    tree: model.Params = flax.traverse_util.unflatten_dict(flat)
    return tree


def batch_sharding(mesh: AnyMesh) -> NamedSharding:
    """Of a batch's arrays `[M, B, N]`: every device has rows of its own."""
    return Layout(mesh).sharding("micro_batches", "rows", "slots")


def _divides(layout: Layout, what: str, name: str, size: int) -> None:
    parts = layout.parts(name)
    if size % parts:
        raise ShardingError(
            f"{what}: {name} has {size} entries, which do not divide by the "
            f"mesh's {' x '.join(RULES[name])} of {parts}"
        )
