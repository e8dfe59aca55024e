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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
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

from befm_jax.adapters.lora import Adapter, LoraKernel
from befm_jax.errors import UserError
from befm_jax.llama import int8, model
from befm_jax.llama.config import LlamaConfig

AXES = ("slice", "data", "fsdp", "tensor")
# Logical axis -> mesh axes that cut it, major first.
RULES: Mapping[str, tuple[str, ...]] = {
    # Parameters (`llama.model.logical_axes`) and adapters.
    "layers": (),
    "norm": (),
    "embedding_rows": (),
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
    "each_logit": ("tensor",),
    "each_embedding_width": ("tensor",),
    # Sampling: every device that shares rows keeps the prompts of all, and draws for some.
    "prompts": (),
    "rows_to_draw": ("slice", "data", "fsdp", "tensor"),
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


def check_slices(slices: int, devices: Sequence[Any]) -> None:
    """Raises ShardingError where these chips are of another number of TPU slices."""
    found = {getattr(device, "slice_index", 0) for device in devices}
    if devices[0].platform == "tpu" and len(found) != slices:
        raise ShardingError(
            f"mesh.slices is {slices}, but the {len(devices)} chips here are of {len(found)}: give "
            f"--config.mesh.slices={len(found)}"
        )


def filled(slices: int, data: int, fsdp: int, tensor: int, devices: int) -> dict[str, int]:
    """The sizes of a mesh over so many devices, for `make_mesh`; 0 stands for all that are left.

    Raises:
        ShardingError: two axes are 0, the others do not divide the devices, or do not multiply to
            their number; says what they are.
    """
    sizes = {"slices": slices, "data": data, "fsdp": fsdp, "tensor": tensor}
    open_axes = [name for name, size in sizes.items() if size == 0]
    said = " x ".join(f"{name} {size}" for name, size in sizes.items())
    if len(open_axes) > 1:
        raise ShardingError(
            f"mesh {said}: only one axis can be 0, which stands for all devices that are left"
        )
    product = math.prod(size for size in sizes.values() if size)
    if open_axes:
        if devices % product:
            raise ShardingError(
                f"mesh {said}: {devices} devices do not divide by {product}, so that nothing fits "
                f"in the place of {open_axes[0]} 0"
            )
        sizes[open_axes[0]] = devices // product
    elif product != devices:
        raise ShardingError(f"mesh {said}: needs {product} devices, there are {devices}")
    return sizes


def in_words(mesh: AnyMesh) -> str:
    """`data 4 x fsdp 16`: the axes that cut anything."""
    sizes = [f"{name} {size}" for name, size in mesh.shape.items() if size > 1]
    return " x ".join(sizes) or "one device"


def devices_in_words(devices: Iterable[jax.Device]) -> str:
    """`4 x TPU v5 lite (tpu)`: the number and kind of these devices, one at least."""
    first, *others = devices
    return f"{1 + len(others)} x {first.device_kind} ({first.platform})"


def layout_over(mesh: AnyMesh) -> Layout | None:
    """The layout of a model over a mesh; None where all is on one device."""
    return Layout(mesh) if mesh.size > 1 else None


def everywhere(mesh: AnyMesh) -> NamedSharding:
    """Of what every device holds whole: scalars, small models."""
    return Layout(mesh).sharding()


@dataclass(frozen=True)
class Layout:
    """A mesh, and what the table says of arrays on it; axes are given by their logical names.

    None in the place of a name: an axis of one entry, or one that is nowhere cut.
    """

    mesh: AnyMesh

    @property
    def compiler_options(self) -> dict[str, str] | None:
        """What programs over these devices are compiled with, for `jax.jit`."""
        return _COMPILER_OPTIONS.get(self._platform)

    @property
    def needs_order(self) -> bool:
        """Whether what devices send must wait, by the data, for the loop before it."""
        return self._platform == "cpu"

    @property
    def _platform(self) -> str:
        """Of the devices; of an abstract mesh, which has none, the empty string."""
        return self.mesh.devices.flat[0].platform if isinstance(self.mesh, Mesh) else ""

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


def over(mesh: AnyMesh | None) -> Callable[[LlamaConfig], dict[tuple[str, ...], Sharding]]:
    """`parameter_shardings` of any config over a mesh: what `llama.hf` is handed."""
    return lambda config: parameter_shardings(config, mesh)


def adapter_shardings(adapter: Adapter, mesh: AnyMesh) -> Adapter:
    """The sharding of every matrix of an adapter: `a` as its kernel's inputs, `b` as its outputs.

    `adapter` may be abstract: only its shapes count.

    Raises:
        ShardingError: an axis does not divide by the mesh axis that cuts it.
    """
    layout = Layout(mesh)
    found: dict[str, dict[str, Any]] = {}
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


@dataclass(frozen=True)
class RowShard:
    """Which rows of a batch this process has on its devices.

    `index` of `count` shards of a step's rows of data; `places`: of the rows of a micro-batch, as
    many as devices share, those of this process.
    """

    index: int
    count: int
    places: tuple[int, ...]


@lru_cache(maxsize=8)
def row_shard(mesh: AnyMesh) -> RowShard:
    """This process's shard; all rows are one shard where processes hold some of them together."""
    total = Layout(mesh).parts("rows")
    places: dict[int, set[int]] = {}
    where: Any = batch_sharding(mesh).devices_indices_map((1, total, 1))
    for device, index in where.items():
        places.setdefault(device.process_index, set()).add(index[1].start or 0)
    shards = sorted({tuple(sorted(held)) for held in places.values()})
    if len({len(shard) for shard in shards}) > 1 or sum(map(len, shards)) > total:
        return RowShard(0, 1, tuple(range(total)))
    own = tuple(sorted(places[jax.process_index()]))
    return RowShard(shards.index(own), len(shards), own)


def _divides(layout: Layout, what: str, name: str, size: int) -> None:
    parts = layout.parts(name)
    if size % parts:
        raise ShardingError(
            f"{what}: {name} has {size} entries, which do not divide by the "
            f"mesh's {' x '.join(RULES[name])} of {parts}"
        )


def shardings(params: Mapping[str, Any], mesh: AnyMesh) -> dict[str, Any]:
    """The sharding of every array of a parameter tree, those of adapters and kernels too.

    The weights may be abstract, and may stand in the layers' stack or, layer by layer, outside.
    Whether they divide is not looked at: `parameter_shardings` says.
    """
    layout = Layout(mesh)
    flat = flax.traverse_util.flatten_dict(params)
    found: dict[str, Any] = flax.traverse_util.unflatten_dict(
        {path: of_leaf(layout, model.logical_axes(path), leaf) for path, leaf in flat.items()}
    )
    return found


def of_leaf(layout: Layout, names: Sequence[str], leaf: Any) -> Any:
    """The sharding of each array of a leaf whose axes have these names, last those of the matrix.

    An int8 kernel's scale stands where its outputs do; `a` of an adapter as the inputs of its
    kernel, `b` as the outputs.
    """
    cut: Callable[..., Any] = layout.sharding
    if isinstance(leaf, LoraKernel):
        *stack, outputs, inputs = names
        return LoraKernel(
            of_leaf(layout, names, leaf.base),
            cut(*stack, "rank", inputs),
            cut(*stack, outputs, "rank"),
            cut(*stack),
            None if leaf.dropout_key is None else cut(*stack),
            leaf.dropout,
        )
    if isinstance(leaf, int8.Int8Kernel):
        return int8.Int8Kernel(cut(*names), cut(*names[:-1]))
    return cut(*names)


def answering_mesh(config: LlamaConfig, devices: Sequence[Any], slices: int = 1) -> Mesh:
    """The mesh for scoring and sampling: `tensor` as large as the model allows, `data` the rest.

    Under `fsdp` every token that is drawn would gather the weights of all layers.
    """
    within = len(devices) // slices
    tensor = _most_tensor(config, within)
    return make_mesh(data=within // tensor, tensor=tensor, slices=slices, devices=devices)


def sampling_mesh(config: LlamaConfig, mesh: Mesh) -> Mesh:
    """The mesh that a model over `mesh` draws answers on: the same devices, in the same order.

    One without `fsdp` is taken as it is.
    """
    if mesh.shape["fsdp"] == 1:
        return mesh
    slices = mesh.shape["slice"]
    tensor = _most_tensor(config, mesh.size // slices)
    return Mesh(mesh.devices.reshape(slices, -1, 1, tensor), AXES)


def _most_tensor(config: LlamaConfig, devices: int) -> int:
    """Over how many of so many devices, or a divisor of that, `tensor` can cut a model."""
    for tensor in range(devices, 1, -1):
        if devices % tensor == 0:
            try:
                parameter_shardings(config, AbstractMesh((1, 1, 1, tensor), AXES))
            except ShardingError:
                continue
            return tensor
    return 1
