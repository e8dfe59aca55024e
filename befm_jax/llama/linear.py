"""The one matrix product of the model, and the one word on where arrays stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@runtime_checkable
class Kernel(Protocol):
    """A leaf of the parameters that stands in for a weight matrix and knows its own product.

    It is a pytree of arrays; with layers stacked, each of them has a leading axis `L`.
    """

    def project(self, x: Float[Array, "... D"], cut: bool = False) -> Float[Array, "... F"]:
        """`x` times the transposed matrix; `cut`: whether that is cut over devices."""

    def dense(self) -> Float[Array, "*L F D"]:
        """The matrix that this kernel stands for."""


def dot(
    x: Float[Array, "... D"], kernel: Float[Array, "F D"] | Kernel, cut: bool = False
) -> Float[Array, "... F"]:
    """`x` times a kernel stored `[out, in]`, in the dtype of `x`.

    `cut`: whether the kernel is cut over devices.

    The kernel is an array, or an object that stands for one (`Kernel`): adapters and quantised
    weights come in that way, and the model does not know.  float32 products are full float32 on
    every backend, so that scores mean the same everywhere.
    """
    if isinstance(kernel, Kernel):
        return kernel.project(x, cut)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, kernel.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())), precision=precision
    )


class Layout(Protocol):
    """How arrays are sharded, by the names of their axes (`befm_jax.distributed.mesh.Layout`)."""

    @property
    def mesh(self) -> Any:
        """The devices, or as many as there would be."""

    @property
    def compiler_options(self) -> dict[str, str] | None:
        """What programs over these devices are compiled with, for `jax.jit`."""

    @property
    def needs_order(self) -> bool:
        """Whether what devices send must wait, by the data, for the loop before it (`after`)."""

    def sharding(self, *names: str | None) -> jax.sharding.NamedSharding:
        """The sharding of an array with these axes."""

    def constrain(self, x: Array, *names: str | None) -> Array:
        """`x`, cut along its axes."""

    def parts(self, name: str) -> int:
        """Into how many parts an axis is cut."""

    def on_each_device(
        self, function: Callable[..., Any], taken: Sequence[Sequence[str | None]], given: Any
    ) -> Callable[..., Any]:
        """`function` on every device's own parts."""


def placed(layout: Layout | None, x: Array, *names: str | None) -> Array:
    """`x`, cut over the devices of a layout; on one device as it is."""
    return x if layout is None else layout.constrain(x, *names)


def after(layout: Layout | None, x: Array, done: Float[Array, "*D"], *names: str | None) -> Array:
    """`x`, cut as before, but only once `done` is there: what is sent for `x` is sent after it.

    On CPUs alone.  XLA's runtime there starts a collective that does not depend on a loop while the
    loop runs (`execution_graph.h`: collectives wait for the start of one another, not for the end),
    each process at a moment of its own; gloo knows messages by their order, and takes that of the
    loop for the other.  The gradient of `x` does not wait.  `done` has an entry at least.
    """
    if layout is None or not layout.needs_order:
        return x
    # Never true, for not-a-number either; the compiler does not know (tests look whether it does).
    never = jax.lax.stop_gradient(done[(0,) * done.ndim]) > jnp.inf
    # Cut as it was: the compiler would otherwise gather `x` first, and choose then.
    return layout.constrain(jnp.where(never, jnp.zeros((), x.dtype), x), *names)


def parts(layout: Layout | None, name: str) -> int:
    """Into how many parts an axis is cut; on one device it is whole."""
    return 1 if layout is None else layout.parts(name)


def sharding(layout: Layout | None, *names: str | None) -> jax.sharding.NamedSharding | None:
    """The sharding of a program's result with these axes; on one device the compiler's choice."""
    return None if layout is None else layout.sharding(*names)


def compiler_options(layout: Layout | None) -> dict[str, str] | None:
    """What programs over the devices of a layout are compiled with."""
    return None if layout is None else layout.compiler_options
