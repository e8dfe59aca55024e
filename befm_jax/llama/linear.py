"""The model's one matrix product, and how its arrays are sharded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@runtime_checkable
class Kernel(Protocol):
    """A parameter leaf that replaces a weight matrix and implements its matrix product.

    It is a pytree of arrays; with layers stacked, each of them has a leading axis `L`.
    """

    def project(self, x: Float[Array, "... D"], cut: bool = False) -> Float[Array, "... F"]:
        """`x` times the transposed matrix; `cut`: whether the matrix is sharded."""

    def dense(self) -> Float[Array, "*L F D"]:
        """The matrix that this kernel represents."""


def dot(
    x: Float[Array, "... D"], kernel: Float[Array, "F D"] | Kernel, cut: bool = False
) -> Float[Array, "... F"]:
    """`x` times a kernel stored `[out, in]`, in the dtype of `x`.

    The kernel is an array or a `Kernel`: adapters and quantised weights enter the model here.
    `cut`: whether the kernel is sharded.  float32 products have full float32 precision on every
    backend, so that scores are comparable across backends.
    """
    if isinstance(kernel, Kernel):
        return kernel.project(x, cut)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, kernel.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())), precision=precision
    )


class ShardingRules(Protocol):
    """How arrays are sharded, by logical axis names (implemented by `distributed.mesh.Layout`)."""

    @property
    def mesh(self) -> Any:
        """The mesh, concrete or abstract."""

    @property
    def compiler_options(self) -> dict[str, str] | None:
        """The `compiler_options` of `jax.jit` for programs over this mesh."""

    @property
    def needs_order(self) -> bool:
        """Whether collectives need a data dependency on the loop before them (see `after`)."""

    def sharding(self, *names: str | None) -> jax.sharding.NamedSharding:
        """The sharding of an array with these axes."""

    def constrain(self, x: Array, *names: str | None) -> Array:
        """`x` with the sharding constraint of these axes."""

    def parts(self, name: str) -> int:
        """The number of shards along an axis."""

    def on_each_device(
        self, function: Callable[..., Any], in_axes: Sequence[Sequence[str | None]], out_axes: Any
    ) -> Callable[..., Any]:
        """`function` under `jax.shard_map`, for arguments and results with these axes."""


def placed(layout: ShardingRules | None, x: Array, *names: str | None) -> Array:
    """`x` with the sharding constraint of these axes; `x` itself without a layout."""
    return x if layout is None else layout.constrain(x, *names)


def after(
    layout: ShardingRules | None, x: Array, done: Float[Array, "*D"], *names: str | None
) -> Array:
    """`x` with a data dependency on `done`, so that collectives on `x` start after `done`.

    On CPUs alone.  XLA's CPU runtime starts a collective that does not depend on a loop while the
    loop runs (`execution_graph.h`: a collective waits for another's start, not for its end), at a
    different moment in each process; gloo matches messages by order alone, and confuses them with
    the loop's.  The gradient of `x` does not wait.  `done` must not be empty.
    """
    if layout is None or not layout.needs_order:
        return x
    # Never true, not for NaN either, but the compiler can't fold it (a test checks that).
    never = jax.lax.stop_gradient(done[(0,) * done.ndim]) > jnp.inf
    # Without the constraint the compiler would gather `x` before it selects.
    return layout.constrain(jnp.where(never, jnp.zeros((), x.dtype), x), *names)


def parts(layout: ShardingRules | None, name: str) -> int:
    """The number of shards along an axis; 1 without a layout."""
    return 1 if layout is None else layout.parts(name)


def sharding(layout: ShardingRules | None, *names: str | None) -> jax.sharding.NamedSharding | None:
    """The sharding of a result with these axes; None, the compiler's choice, without a layout."""
    return None if layout is None else layout.sharding(*names)


def compiler_options(layout: ShardingRules | None) -> dict[str, str] | None:
    """The `compiler_options` of `jax.jit` for programs over a layout's mesh."""
    return None if layout is None else layout.compiler_options
