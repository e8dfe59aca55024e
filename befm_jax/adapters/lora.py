"""LoRA (Hu et al., arXiv 2106.09685) as a functional transform of the parameter tree.

    adapter = lora.init(key, params, rank=16)
    logits  = model.apply({"params": lora.attach(params, adapter)}, ...)
    merged  = lora.merge(lora.attach(params, adapter))

`attach` replaces the target weights by `LoraKernel`s, which implement `llama.linear.Kernel`.  An
adapter is a pytree of float32 arrays, whatever the dtype of the base: differentiate with respect to
it, and the base gets no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from befm_jax.adapters.spec import ALL_LINEAR, AdapterError, LoraSpec, PerLayer
from befm_jax.llama.linear import dot
from befm_jax.llama.model import Params

__all__ = [
    "ALL_LINEAR", "Adapter", "AdapterError", "LoraKernel", "LoraSpec",
    "attach", "init", "init_from", "merge",
]  # fmt: skip


@partial(jax.tree_util.register_dataclass, data_fields=["weights"], meta_fields=["spec"])
@dataclass
class Adapter:
    """Trained matrices by the path of their linear, and the spec.

    `weights["layers/self_attn/q_proj"]` is `{"a": [L, R, in], "b": [L, out, R]}`, float32, with
    R the largest rank of this linear in any layer.  Where a layer's rank is smaller (0: no
    adapter there), the last rows of `a` and columns of `b` are zero.  So are their gradients, so
    that training with AdamW keeps them zero.
    """

    weights: dict[str, dict[str, Array]]
    spec: LoraSpec

    def per_layer(self, path: str) -> PerLayer:
        """Ranks and scalings of one linear.

        Raises:
            AdapterError: the arrays' rank is not the spec's.
        """
        a, b = self.weights[path]["a"], self.weights[path]["b"]
        per_layer = self.spec.per_layer(path, a.shape[0])
        rank = max(per_layer.ranks)
        if rank == 0 or (rank, rank) != (a.shape[1], b.shape[2]):
            raise AdapterError(
                f"{path}: the arrays are of rank {a.shape[1]} and {b.shape[2]}, the spec says "
                f"{rank or 'that there is no adapter'}"
            )
        return per_layer


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "a", "b", "scaling", "dropout_key"],
    meta_fields=["dropout"],
)
@dataclass
class LoraKernel:
    """A weight `[out, in]` plus `scaling * b @ a`, never materialised: a `llama.linear.Kernel`.

    `base` stays the first field: flax checks the shape of the first leaf alone.  With layers
    stacked, every field has a leading axis `L`.  `dropout_key` is None outside training.
    """

    base: Any
    a: Float[Array, "R D"]
    b: Float[Array, "F R"]
    scaling: Float[Array, ""]
    dropout_key: Array | None = None
    dropout: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight: `[out, in]`, or `[L, out, in]` with layers stacked."""
        return tuple(self.base.shape)

    def dense(self) -> Float[Array, "... F D"]:
        """The merged matrix, with a leading axis `L` where stacked.

        The sum is taken in float32 and cast to the dtype of the base.

        Raises:
            AdapterError: the base is quantised.
        """
        if not isinstance(self.base, jax.Array | np.ndarray):
            raise AdapterError(
                f"the base is a {type(self.base).__name__}: an adapter is merged into the original "
                "weights, not into quantised ones; load the model without quantising it"
            )
        scaling = self.scaling.reshape((*self.scaling.shape, 1, 1))
        update = jnp.matmul(self.b, self.a, precision=jax.lax.Precision.HIGHEST) * scaling
        return (jnp.asarray(self.base, jnp.float32) + update).astype(self.base.dtype)

    def project(self, x: Float[Array, "... D"], cut: bool = False) -> Float[Array, "... F"]:
        """`x` times the base, plus the low-rank update; in the dtype of `x`.

        `cut`: whether the base is sharded.  `x` is flattened to rows first, which makes the
        low-rank products faster on CPU.
        """
        rows = x.reshape(-1, x.shape[-1])
        dropped = rows
        if self.dropout_key is not None:
            keep = jax.random.bernoulli(self.dropout_key, 1 - self.dropout, rows.shape)
            dropped = jnp.where(keep, rows / (1 - self.dropout), 0).astype(x.dtype)
        # Highest precision has no effect on bfloat16, except that XLA on GPU merges products of one
        # input only if their precision is equal, for which it would concatenate every weight and
        # its `a` in memory, in every layer of every step.
        narrow = jax.lax.dot_general(
            dropped,
            self.a.astype(x.dtype),
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
        )
        # Scaled after the second product.  Before it, a CPU is faster (1 to 10 %), but XLA needs
        # 1.6 GB more for a step of 70B over two slices of v5e, which does not fit.
        update = dot(narrow, self.b) * self.scaling.astype(x.dtype)
        return (dot(rows, self.base, cut) + update).reshape(*x.shape[:-1], -1)


def init(
    key: Array,
    params: Params,
    *,
    rank: int = 8,
    alpha: float | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    targets: Sequence[str] | str = ALL_LINEAR,
) -> Adapter:
    """A new adapter of one rank on the target linears, named as in `LoraSpec`; see `init_from`.

    `alpha` defaults to twice the rank.
    """
    targets = targets if isinstance(targets, str) else tuple(targets)
    alpha = 2.0 * rank if alpha is None else alpha
    return init_from(key, params, LoraSpec(rank, alpha, rslora, dropout, targets))


def init_from(key: Array, params: Params, spec: LoraSpec) -> Adapter:
    """A new adapter of a spec: `A` uniform in ±1/sqrt(in), `B` zero, as in PEFT.

    With `B` zero the attached model equals the base exactly.  Only the shapes of `params` are used.

    Raises:
        AdapterError: the spec does not fit the model; see `LoraSpec.plan`.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    weights = {}
    for path, (ranks, _) in sorted(spec.plan(params).items()):
        layers, features, width = flat[f"{path}/weight"].shape
        rank = max(ranks)
        key, subkey = jax.random.split(key)
        bound = 1 / math.sqrt(width)
        a = jax.random.uniform(subkey, (layers, rank, width), jnp.float32, -bound, bound)
        in_rank = np.arange(rank) < np.array(ranks)[:, None]
        weights[path] = {
            "a": jnp.where(in_rank[:, :, None], a, 0),
            "b": jnp.zeros((layers, features, rank), jnp.float32),
        }
    return Adapter(weights, spec)


def attach(params: Params, adapter: Adapter, dropout_key: Array | None = None) -> Params:
    """The parameter tree with `LoraKernel`s in place of the adapter's linears; nothing is copied.

    `dropout_key` turns on the spec's dropout, with an independent mask for every linear and layer;
    leave it out for scoring and sampling.

    Raises:
        AdapterError: a linear of the adapter is not in `params`, has another shape, or has an
            adapter already.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    spec = adapter.spec
    for number, (path, weight) in enumerate(sorted(adapter.weights.items())):
        name = f"{path}/weight"
        if name not in flat:
            raise AdapterError(f"the adapter has {path}, which the model lacks")
        base = flat[name]
        if isinstance(base, LoraKernel):
            raise AdapterError(f"{path} has an adapter already; merge that one first")
        shape = (*weight["b"].shape[:-1], weight["a"].shape[-1])
        if shape != base.shape:
            raise AdapterError(
                f"{path}: the adapter is for {list(shape)} (layers, out, in), the model has "
                f"{list(base.shape)}"
            )
        keys = None
        if dropout_key is not None and spec.dropout > 0:
            key = jax.random.fold_in(dropout_key, number)
            keys = jax.random.split(key, base.shape[0])
        flat[name] = LoraKernel(
            base=base,
            a=weight["a"],
            b=weight["b"],
            scaling=jnp.array(adapter.per_layer(path).scalings, jnp.float32),
            dropout_key=keys,
            dropout=spec.dropout,
        )
    tree: Params = flax.traverse_util.unflatten_dict(flat, sep="/")
    return tree


def merge(params: Params) -> Params:
    """The parameter tree with every `LoraKernel` replaced by its `dense` matrix.

    Raises:
        AdapterError: a base is quantised.
    """

    def plain(leaf: Any) -> Any:
        return leaf.dense() if isinstance(leaf, LoraKernel) else leaf

    merged: Params = jax.tree.map(plain, params, is_leaf=lambda leaf: isinstance(leaf, LoraKernel))
    return merged
