"""How arrays are sharded over devices: one mesh, one table of logical axes.

The mesh has four axes: `slice` (rows of a batch, over the network between TPU slices), `data` (rows
of a batch), `fsdp` (rows of a batch; parameters are sharded and gathered layer by layer) and
`tensor` (heads and feed-forward width; parameters stay sharded).

Parameters are sharded along their rows wherever possible: a process then reads one contiguous range
per layer.  Two kinds are sharded along columns, which reads full pages (4 kB) for any width: the
inputs of `o_proj` and `down_proj`, over `tensor`, and embeddings.  Embeddings are not gathered:
every device looks up its own columns for all rows, and the network carries activations.
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
# Logical axis -> the mesh axes that it is sharded over, major first.
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
    # Inputs and activations: forests, hidden states, heads, caches, logits.
    "micro_batches": (),
    "rows": ("slice", "data", "fsdp"),
    "rows_to_embed": ("slice", "data"),
    "slots": (),
    "features": (),
    "each_head": ("tensor",),
    "each_feed_forward": ("tensor",),
    "each_logit": ("tensor",),
    "each_embedding_width": ("tensor",),
    # Sampling: prompts are replicated over data-parallel devices, rows are sharded for the draw.
    "prompts": (),
    "rows_to_draw": ("slice", "data", "fsdp", "tensor"),
}
# Compiler options by platform.  On v5p and v6e the all-gathers of weights otherwise do not overlap
# with compute; v5e fuses them with products in any case.
_COMPILER_OPTIONS: Mapping[str, dict[str, str]] = {
    "tpu": {
        "xla_enable_async_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
        "xla_tpu_overlap_compute_collective_tc": "true",
    },
}

# A mesh of devices, or an abstract one.
AnyMesh = Mesh | AbstractMesh


class ShardingError(UserError):
    """A mesh that the model can't be sharded over; names the parameter, the axis and the sizes."""


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    tensor: int = 1,
    slices: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over all devices, or over `devices`, in the order of their network topology.

    Raises:
        ShardingError: the axis sizes do not multiply to the number of devices, or one is below 1.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = (slices, data, fsdp, tensor)
    if min(shape) < 1:
        raise ShardingError(
            f"the mesh's axes are {', '.join(map(str, shape))}; they must be at least 1"
        )
    if math.prod(shape) != len(devices):
        sizes = " x ".join(f"{name} {size}" for name, size in zip(AXES, shape, strict=True))
        raise ShardingError(
            f"a mesh of {sizes} needs {math.prod(shape)} devices, not {len(devices)}"
        )
    if devices[0].platform != "tpu":
        return Mesh(np.asarray(devices).reshape(shape), AXES)
    if slices == 1:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        array = mesh_utils.create_hybrid_device_mesh(
            (1, *shape[1:]), (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(array, AXES)


def check_slices(slices: int, devices: Sequence[Any]) -> None:
    """Raises ShardingError if these chips are in another number of TPU slices."""
    actual = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform == "tpu" and actual != slices:
        raise ShardingError(
            f"mesh.slices is {slices}, but the {len(devices)} chips here are in {actual}: give "
            f"--config.mesh.slices={actual}"
        )


def filled(slices: int, data: int, fsdp: int, tensor: int, devices: int) -> dict[str, int]:
    """The axis sizes of a mesh over `devices` devices, for `make_mesh`; 0 is all that are left.

    Raises:
        ShardingError: two axes are 0, the others do not divide the devices, or do not multiply to
            their number.
    """
    sizes = {"slices": slices, "data": data, "fsdp": fsdp, "tensor": tensor}
    open_axes = [name for name, size in sizes.items() if size == 0]
    text = " x ".join(f"{name} {size}" for name, size in sizes.items())
    if len(open_axes) > 1:
        raise ShardingError(f"mesh {text}: only one axis can be 0, for all devices that are left")
    product = math.prod(size for size in sizes.values() if size)
    if open_axes:
        if devices % product:
            raise ShardingError(
                f"mesh {text}: {devices} devices do not divide by {product}, so that "
                f"{open_axes[0]} can't be 0"
            )
        sizes[open_axes[0]] = devices // product
    elif product != devices:
        raise ShardingError(f"mesh {text}: needs {product} devices, there are {devices}")
    return sizes


def in_words(mesh: AnyMesh) -> str:
    """`data 4 x fsdp 16`: the axes larger than 1."""
    sizes = [f"{name} {size}" for name, size in mesh.shape.items() if size > 1]
    return " x ".join(sizes) or "one device"


def devices_in_words(devices: Iterable[jax.Device]) -> str:
    """`4 x TPU v5 lite (tpu)`: the number and kind of at least one device."""
    first, *others = devices
    return f"{1 + len(others)} x {first.device_kind} ({first.platform})"


def layout_over(mesh: AnyMesh) -> Layout | None:
    """The layout of a model over a mesh; None for one device."""
    return Layout(mesh) if mesh.size > 1 else None


def everywhere(mesh: AnyMesh) -> NamedSharding:
    """The replicated sharding: for scalars and small models."""
    return Layout(mesh).sharding()


@dataclass(frozen=True)
class Layout:
    """Shardings over a mesh by `RULES`; implements `llama.linear.ShardingRules`.

    Axes are given by their logical names; None is an axis that is not sharded.
    """

    mesh: AnyMesh

    @property
    def compiler_options(self) -> dict[str, str] | None:
        """The `compiler_options` of `jax.jit` for programs over this mesh."""
        return _COMPILER_OPTIONS.get(self._platform)

    @property
    def needs_order(self) -> bool:
        """Whether collectives need a data dependency on the loop before them (`linear.after`)."""
        return self._platform == "cpu"

    @property
    def _platform(self) -> str:
        """The devices' platform; empty for an abstract mesh."""
        return self.mesh.devices.flat[0].platform if isinstance(self.mesh, Mesh) else ""

    def spec(self, *names: str | None) -> PartitionSpec:
        """The partition spec of an array with these axes.

        Raises KeyError for a name that is not in the table: there is no default.
        """
        mesh_axes = [() if name is None else RULES[name] for name in names]
        # None for no mesh axis, a plain name for one.
        return PartitionSpec(*(axes if len(axes) > 1 else (*axes, None)[0] for axes in mesh_axes))

    def sharding(self, *names: str | None) -> NamedSharding:
        """The sharding of an array with these axes."""
        return NamedSharding(self.mesh, self.spec(*names))

    def parts(self, name: str) -> int:
        """The number of shards along an axis."""
        return math.prod(self.mesh.shape[axis] for axis in RULES[name])

    def constrain(self, x: Array, *names: str | None) -> Array:
        """`x` with the sharding constraint of these axes."""
        return jax.lax.with_sharding_constraint(x, self.sharding(*names))

    def on_each_device(
        self,
        function: Callable[..., Any],
        in_axes: Sequence[Sequence[str | None]],
        out_axes: Any,
    ) -> Callable[..., Any]:
        """`function` under `jax.shard_map`.

        `in_axes`: the axes of each argument; `out_axes`: the axes of the result, or of each result
        in a tuple of tuples.
        """
        several = bool(out_axes) and isinstance(out_axes[0], tuple)
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=tuple(self.spec(*names) for names in in_axes),
            out_specs=tuple(self.spec(*names) for names in out_axes)
            if several
            else self.spec(*out_axes),
            check_vma=False,
        )


def parameter_shardings(
    config: LlamaConfig, mesh: AnyMesh | None
) -> dict[tuple[str, ...], Sharding]:
    """The sharding of every parameter by its path; without a mesh all are on one device.

    Raises:
        ShardingError: an axis of a parameter does not divide by the mesh axes of its sharding.
    """
    shapes = flax.traverse_util.flatten_dict(model.shapes(config))
    if mesh is None:
        return dict.fromkeys(shapes, SingleDeviceSharding(jax.local_devices()[0]))
    layout = Layout(mesh)
    by_path: dict[tuple[str, ...], Sharding] = {}
    for path, leaf in shapes.items():
        names = model.logical_axes(path)
        for name, size in zip(names, leaf.shape, strict=True):
            _check_divides(layout, "/".join(path), name, size)
        by_path[path] = layout.sharding(*names)
    heads = config.num_key_value_heads
    if heads % layout.parts("each_head"):
        raise ShardingError(
            f"the model has {heads} key-value heads, which do not divide by the mesh's tensor of "
            f"{layout.parts('each_head')}"
        )
    return by_path


def over(mesh: AnyMesh | None) -> Callable[[LlamaConfig], dict[tuple[str, ...], Sharding]]:
    """`parameter_shardings` over a mesh, as a function of the config: for `llama.hf.load`."""
    return lambda config: parameter_shardings(config, mesh)


def adapter_shardings(adapter: Adapter, mesh: AnyMesh) -> Adapter:
    """The sharding of every matrix of an adapter: `a` as its kernel's inputs, `b` as its outputs.

    `adapter` may be abstract: only its shapes are used.

    Raises:
        ShardingError: an axis does not divide by the mesh axes of its sharding.
    """
    layout = Layout(mesh)
    by_path: dict[str, dict[str, Any]] = {}
    for path, weight in adapter.weights.items():
        layers, outputs, inputs = model.logical_axes((*path.split("/"), "weight"))
        _check_divides(layout, path, outputs, weight["b"].shape[1])
        _check_divides(layout, path, inputs, weight["a"].shape[2])
        by_path[path] = {
            "a": layout.sharding(layers, "rank", inputs),
            "b": layout.sharding(layers, outputs, "rank"),
        }
    return Adapter(by_path, adapter.spec)


def abstract_parameters(
    config: LlamaConfig, mesh: AnyMesh | None, dtype: Any, quantize: bool = False
) -> model.Params:
    """Parameters as `jax.ShapeDtypeStruct`s with their shardings; allocates nothing.

    Raises:
        ShardingError: the model can't be sharded over the mesh.
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
    """The sharding of a batch's arrays `[M, B, N]`, by rows."""
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


def _check_divides(layout: Layout, what: str, name: str, size: int) -> None:
    parts = layout.parts(name)
    if size % parts:
        raise ShardingError(
            f"{what}: {name} has {size} entries, which do not divide by the "
            f"mesh's {' x '.join(RULES[name])} of {parts}"
        )


def shardings(params: Mapping[str, Any], mesh: AnyMesh) -> dict[str, Any]:
    """The sharding of every array of a parameter tree, including those of kernels.

    Parameters may be abstract.  Divisibility is not checked: see `parameter_shardings`.
    """
    layout = Layout(mesh)
    flat = flax.traverse_util.flatten_dict(params)
    tree: dict[str, Any] = flax.traverse_util.unflatten_dict(
        {path: of_leaf(layout, model.logical_axes(path), leaf) for path, leaf in flat.items()}
    )
    return tree


def of_leaf(layout: Layout, names: Sequence[str], leaf: Any) -> Any:
    """The sharding of each array of a leaf whose axes have these names, the matrix's last.

    An int8 kernel's scale is sharded as its outputs; an adapter's `a` as its kernel's inputs, its
    `b` as the outputs.
    """
    sharding: Callable[..., Any] = layout.sharding
    if isinstance(leaf, LoraKernel):
        *stack, outputs, inputs = names
        return LoraKernel(
            of_leaf(layout, names, leaf.base),
            sharding(*stack, "rank", inputs),
            sharding(*stack, outputs, "rank"),
            sharding(*stack),
            None if leaf.dropout_key is None else sharding(*stack),
            leaf.dropout,
        )
    if isinstance(leaf, int8.Int8Kernel):
        return int8.Int8Kernel(sharding(*names), sharding(*names[:-1]))
    return sharding(*names)


def answering_mesh(config: LlamaConfig, devices: Sequence[Any], slices: int = 1) -> Mesh:
    """The mesh for scoring and sampling: `tensor` as large as the model allows, `data` the rest.

    Under `fsdp` every drawn token would gather the weights of all layers.
    """
    within = len(devices) // slices
    tensor = _most_tensor(config, within)
    return make_mesh(data=within // tensor, tensor=tensor, slices=slices, devices=devices)


def sampling_mesh(config: LlamaConfig, mesh: Mesh) -> Mesh:
    """The mesh for sampling with a model over `mesh`: the same devices, in the same order.

    A mesh without `fsdp` is returned unchanged.
    """
    if mesh.shape["fsdp"] == 1:
        return mesh
    slices = mesh.shape["slice"]
    tensor = _most_tensor(config, mesh.size // slices)
    return Mesh(mesh.devices.reshape(slices, -1, 1, tensor), AXES)


def _most_tensor(config: LlamaConfig, devices: int) -> int:
    """The largest divisor of `devices` that is a valid `tensor` axis for a model."""
    for tensor in range(devices, 1, -1):
        if devices % tensor == 0:
            try:
                parameter_shardings(config, AbstractMesh((1, 1, 1, tensor), AXES))
            except ShardingError:
                continue
            return tensor
    return 1
