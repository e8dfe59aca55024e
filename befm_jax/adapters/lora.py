"""LoRA (Hu et al., arXiv 2106.09685) as a functional transform of the parameter tree.

    adapter = lora.init(key, params, rank=16)
    logits  = model.apply({"params": lora.attach(params, adapter)}, ...)
    merged  = lora.merge(lora.attach(params, adapter))

`attach` replaces the chosen weights by `LoraKernel`s, which stand in for them in every matrix
product; the model is not told.  An adapter is a pytree of float32 arrays whatever the base is
stored in: differentiate with respect to it and the base gets no gradient.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from befm_jax.errors import UserError
from befm_jax.llama.config import LINEARS
from befm_jax.llama.linear import dot
from befm_jax.llama.model import Params

ALL_LINEAR = LINEARS


class AdapterError(UserError):
    """An adapter that can't be used as it is, or not with this model; the message says why."""


@dataclass(frozen=True)
class LoraSpec:
    """What an adapter is, beside its arrays.

    `alpha` over `rank` (or over its square root with `rslora`: Kalajdzievski, arXiv 2312.03732)
    scales the update.  `dropout` is the rate at which the input of `A` is dropped in training.

    Dropout is per slot of a forest: observations that share a prefix share its mask too, so it is
    a coarser noise than in ordinary fine-tuning, where each observation draws its own.  It is off
    by default.
    """

    rank: int
    alpha: float
    rslora: bool = False
    dropout: float = 0.0
    targets: tuple[str, ...] = ALL_LINEAR

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout}")
        if not self.targets:
            raise ValueError(f"targets is empty; choose from {', '.join(ALL_LINEAR)}")
        for target in self.targets:
            if target not in ALL_LINEAR:
                near = difflib.get_close_matches(target, ALL_LINEAR, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(
                    f"targets: no linear is called {target!r}{hint} ({', '.join(ALL_LINEAR)})"
                )

    @property
    def scaling(self) -> float:
        """The factor on the low-rank update."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@partial(jax.tree_util.register_dataclass, data_fields=["weights"], meta_fields=["spec"])
@dataclass
class Adapter:
    """Trained matrices by the path of the linear they belong to, and the spec.

    `weights["layers/self_attn/q_proj"]` is `{"a": [L, R, in], "b": [L, out, R]}`, float32.
    """

    weights: dict[str, dict[str, Array]]
    spec: LoraSpec


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "a", "b", "scaling", "dropout_key"],
    meta_fields=["dropout"],
)
@dataclass
class LoraKernel:
    """A weight `[out, in]` plus `scaling * b @ a`, never formed: a leaf of attached parameters.

    `base` stays the first field: flax checks the shape of the first leaf alone.  With layers
    stacked, every field has a leading axis `L`.  `dropout_key` is None outside training.
    """

    base: Any
    a: Float[Array, "R D"]
    b: Float[Array, "F R"]
    scaling: Float[Array, ""]
    dropout_key: Array | None = None
    dropout: float = 0.0

    def project(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        """`x` times the base, plus the low-rank update; in the dtype of `x`.

        `x` is flattened to rows first: on CPU the thin products are faster so.
        """
        rows = x.reshape(-1, x.shape[-1])
        dropped = rows
        if self.dropout_key is not None:
            keep = jax.random.bernoulli(self.dropout_key, 1 - self.dropout, rows.shape)
            dropped = jnp.where(keep, rows / (1 - self.dropout), 0).astype(x.dtype)
        update = dot(dot(dropped, self.a), self.b) * self.scaling.astype(x.dtype)
        return (dot(rows, self.base) + update).reshape(*x.shape[:-1], -1)


def init(
    key: Array,
    params: Params,
    *,
    rank: int = 8,
    alpha: float | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    targets: Sequence[str] = ALL_LINEAR,
) -> Adapter:
    """A fresh adapter for the chosen linears: `A` uniform in ±1/sqrt(in), `B` zero, as in PEFT.

    With `B` zero the attached model equals the base exactly.  `alpha` defaults to twice the rank.

    Raises:
        ValueError: a target that the model has not, or a rank, alpha or dropout out of range.
    """
    spec = LoraSpec(rank, 2.0 * rank if alpha is None else alpha, rslora, dropout, tuple(targets))
    weights = {}
    for path, base in _linears(params, spec.targets).items():
        *stack, features, width = base.shape
        key, used = jax.random.split(key)
        bound = 1 / math.sqrt(width)
        weights[path] = {
            "a": jax.random.uniform(used, (*stack, rank, width), jnp.float32, -bound, bound),
            "b": jnp.zeros((*stack, features, rank), jnp.float32),
        }
    return Adapter(weights, spec)


def attach(params: Params, adapter: Adapter, dropout_key: Array | None = None) -> Params:
    """The parameter tree with `LoraKernel`s in place of the adapter's linears; nothing is copied.

    `dropout_key` turns on the spec's dropout, drawn anew for every linear and layer; leave it out
    for scoring and sampling.

    Raises:
        AdapterError: the adapter has a linear that is not in `params`, or of another shape.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    spec = adapter.spec
    for number, (path, weight) in enumerate(sorted(adapter.weights.items())):
        name = f"{path}/weight"
        if name not in flat:
            raise AdapterError(f"the adapter has {path}, which the model has not")
        base = flat[name]
        stack = base.shape[:-2]
        found = (*weight["b"].shape[:-1], weight["a"].shape[-1])
        if found != base.shape:
            raise AdapterError(
                f"{path}: the adapter is for {list(found)} (layers, out, in), the model has "
                f"{list(base.shape)}"
            )
        keys = None
        if dropout_key is not None and spec.dropout > 0:
            key = jax.random.fold_in(dropout_key, number)
            keys = jax.random.split(key, stack) if stack else key
        flat[name] = LoraKernel(
            base=base,
            a=weight["a"],
            b=weight["b"],
            scaling=jnp.full(stack, spec.scaling, jnp.float32),
            dropout_key=keys,
            dropout=spec.dropout,
        )
    tree: Params = flax.traverse_util.unflatten_dict(flat, sep="/")
    return tree


def merge(params: Params) -> Params:
    """Plain arrays again: every `LoraKernel` becomes `base + scaling * b @ a`.

    The sum is taken in float32 and stored in the dtype of the base.
    """

    def plain(leaf: Any) -> Any:
        if not isinstance(leaf, LoraKernel):
            return leaf
        scaling = leaf.scaling.reshape((*leaf.scaling.shape, 1, 1))
        update = jnp.matmul(leaf.b, leaf.a, precision=jax.lax.Precision.HIGHEST) * scaling
        return (leaf.base.astype(jnp.float32) + update).astype(leaf.base.dtype)

    merged: Params = jax.tree.map(plain, params, is_leaf=lambda leaf: isinstance(leaf, LoraKernel))
    return merged


def _linears(params: Params, targets: Sequence[str]) -> dict[str, Any]:
    """Path -> weight of the linears whose last name is among `targets`."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    found = {
        path.removesuffix("/weight"): leaf
        for path, leaf in sorted(flat.items())
        if path.endswith("/weight") and path.split("/")[-2] in targets
    }
    absent = set(targets) - {path.split("/")[-1] for path in found}
    if absent:
        raise ValueError(f"targets match nothing in the model: {', '.join(sorted(absent))}")
    return found
