"""The hyperparameters of an adapter: which linears it is on, with which ranks and scalings.

The rules are those of PEFT 0.21.  Linears are identified by their path in the parameter tree
(`layers/self_attn/q_proj`, all layers at once) and matched under Hugging Face's names
(`model.layers.3.self_attn.q_proj`, layer by layer).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import flax.traverse_util
import numpy as np
import regex

from befm_jax.errors import UserError
from befm_jax.llama.config import LINEARS

ALL_LINEAR = LINEARS
UNSUPPORTED = ("lm_head", "embed_tokens")
# Modules without parameters (of their own, where embeddings are tied): a pattern that matches one
# of them is an error in PEFT.
_NOT_IN_THE_TREE = ("rotary_emb", "layers/mlp/act_fn", "lm_head")
# From this many targets on, PEFT shortens names, to which layers_to_transform then applies.
_SHORTENED_FROM = 20
# Names and patterns in a field, at most: four for every linear of the largest Llama.
_MOST = 4096
# Seconds for one match of a pattern, which takes microseconds unless it backtracks without end.
_MATCH_SECONDS = 1.0
# The largest scaling in float32.
LARGEST_ALPHA = float(np.finfo(np.float32).max)


class AdapterError(UserError):
    """An adapter that can't be used, or not with this model; the message says why."""


class PerLayer(NamedTuple):
    """One linear's rank (0: no adapter) and the scaling of its update, for every layer."""

    ranks: tuple[int, ...]
    scalings: tuple[float, ...]


@dataclass(frozen=True)
class LoraSpec:
    """The fields of PEFT's `LoraConfig` that determine an adapter's function.

    `targets` (PEFT: `target_modules`) is a tuple of names, each short (`q_proj`), with parts of
    its path (`self_attn.q_proj`) or full (`model.layers.0.self_attn.q_proj`); or a string: a
    regular expression that a full name must match, or "all-linear".  `exclude_modules` excludes
    linears in the same way.  `layers_to_transform` restricts the layers, except for targets given
    by their full names; `layers_pattern` is the module name before a layer's number.

    `alpha` over the rank (over its square root with `rslora`: Kalajdzievski, arXiv 2312.03732)
    scales the update.  `rank_pattern` and `alpha_pattern` are pairs of a regular expression for
    the end of a name and the value that replaces `rank` or `alpha` there; the first match wins.

    `dropout` is the rate at which the input of `A` is dropped in training, per slot of a forest:
    observations that share a prefix share its mask too, which is coarser noise than in ordinary
    fine-tuning, where each observation has its own.

    Raises:
        AdapterError: a value out of range, an invalid regular expression, too many names, or
            fields that PEFT does not accept together.
    """

    rank: int
    alpha: float
    rslora: bool = False
    dropout: float = 0.0
    targets: tuple[str, ...] | str = ALL_LINEAR
    exclude_modules: tuple[str, ...] | str = ()
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.targets, str) and self.targets.lower() == "all-linear":
            object.__setattr__(self, "targets", ALL_LINEAR)
        if self.rank < 1:
            raise AdapterError(f"rank is {self.rank}; it must be at least 1")
        if not abs(self.alpha) <= LARGEST_ALPHA:
            raise AdapterError(f"alpha is {self.alpha}; it must be finite in float32")
        if not 0 <= self.dropout < 1:
            raise AdapterError(f"dropout is {self.dropout}; it must be in [0, 1)")
        if not self.targets:
            raise AdapterError(
                f"targets (target_modules) is empty; choose from {', '.join(ALL_LINEAR)}"
            )
        for key, rank in self.rank_pattern:
            if rank < 1:
                raise AdapterError(f"rank_pattern: {key!r} is {rank}; it must be at least 1")
        for key, alpha in self.alpha_pattern:
            if not abs(alpha) <= LARGEST_ALPHA:
                raise AdapterError(
                    f"alpha_pattern: {key!r} is {alpha}; it must be finite in float32"
                )
        for field, listed in (
            ("target_modules", self.targets),
            ("exclude_modules", self.exclude_modules),
            ("rank_pattern", self.rank_pattern),
            ("alpha_pattern", self.alpha_pattern),
            ("layers_to_transform", self.layers_to_transform or ()),
            ("layers_pattern", self.layers_pattern),
        ):
            if len(listed) > _MOST and not isinstance(listed, str):
                raise AdapterError(f"{field} has {len(listed):,} entries, more than {_MOST:,}")
        if isinstance(self.targets, str) and (self.layers_to_transform or self.layers_pattern):
            name = "layers_pattern" if self.layers_pattern else "layers_to_transform"
            raise AdapterError(f"{name} needs a list of target_modules, not a pattern")
        if self.layers_pattern and self.layers_to_transform is None:
            raise AdapterError("layers_pattern needs layers_to_transform, which is missing")
        for field, pattern in self._patterns():
            try:
                _compiled(pattern)
            except (regex.error, RecursionError) as error:
                raise AdapterError(
                    f"{field}: {pattern!r:.80} is not a regular expression ({error})"
                ) from error

    def per_layer(self, path: str, layers: int) -> PerLayer:
        """Ranks and scalings of the linear at `path` in a model of `layers` layers."""
        return _per_layer(self, path, layers)

    def plan(self, params: Any) -> dict[str, PerLayer]:
        """`per_layer` of every linear of the model that gets an adapter, by path.

        `params` is a parameter tree, or its shapes.

        Raises:
            AdapterError: a target, a pattern's key or a layer that matches nothing in the model,
                or a target that matches something else than a linear of the layers.
        """
        flat = flax.traverse_util.flatten_dict(params, sep="/")
        linears = {
            path.removesuffix("/weight"): leaf.shape
            for path, leaf in sorted(flat.items())
            if path.startswith("layers/") and path.endswith("/weight") and len(leaf.shape) == 3
        }
        depth = next(iter(linears.values()))[0]
        parts = [path.split("/") for path in flat]
        others = {"/".join(each[:count]) for each in parts for count in range(1, len(each))}
        others = (others | set(_NOT_IN_THE_TREE)) - set(linears)
        self._check_layers(depth)
        self._check_targets(set(_names(linears, depth)), set(_names(others, depth)) | {"model"})
        plan = {path: self.per_layer(path, depth) for path in linears}
        adapted = [
            module_name(path, layer)
            for path, (ranks, _) in plan.items()
            for layer, rank in enumerate(ranks)
            if rank
        ]
        if not adapted:
            if isinstance(self.targets, str) and not self.exclude_modules:
                raise AdapterError(f"target_modules: {self.targets!r} matches no linear")
            raise AdapterError(
                "target_modules, exclude_modules and layers_to_transform together leave no linear"
            )
        for field in ("rank_pattern", "alpha_pattern"):
            for key, _ in getattr(self, field):
                if not any(_match(field, _at_end(key), name) for name in adapted):
                    raise AdapterError(f"{field}: {key!r} matches no linear that has an adapter")
        return {path: layers for path, layers in plan.items() if any(layers.ranks)}

    def covers(self, name: str) -> bool:
        """Whether the module of this name gets an adapter: PEFT's `check_target_module_exists`."""
        excluded = self.exclude_modules
        if isinstance(excluded, str):
            if excluded and _match("exclude_modules", excluded, name, whole=True):
                return False
        elif _ends_with_any(name, excluded):
            return False
        if isinstance(self.targets, str):
            return _match("target_modules", self.targets, name, whole=True) is not None
        if self.layers_to_transform is None or name in self.targets:
            return _ends_with_any(name, self.targets)
        return _ends_with_any(name, self.targets) and self._layer(name) in self.layers_to_transform

    def _layer(self, name: str) -> int | None:
        before = [_before_layer(pattern) for pattern in self.layers_pattern]
        for pattern in before or [_ANY_LAYER]:
            match = _match("layers_pattern", pattern, name)
            if match:
                return int(match["index"])
        return None

    def _patterns(self) -> Iterable[tuple[str, str]]:
        """Field and regular expression of every pattern in the spec."""
        for field, value in (
            ("target_modules", self.targets),
            ("exclude_modules", self.exclude_modules),
        ):
            if isinstance(value, str):
                yield field, value
        for key, _ in self.rank_pattern:
            yield "rank_pattern", _at_end(key)
        for key, _ in self.alpha_pattern:
            yield "alpha_pattern", _at_end(key)
        for pattern in self.layers_pattern:
            yield "layers_pattern", _before_layer(pattern)

    def _check_layers(self, depth: int) -> None:
        for layer in self.layers_to_transform or ():
            if not 0 <= layer < depth:
                raise AdapterError(
                    f"layers_to_transform has {layer}; the model has layers 0 to {depth - 1}"
                )

    def _check_targets(self, linears: set[str], others: set[str]) -> None:
        supported = ", ".join(sorted({name.split(".")[-1] for name in linears}))
        names = linears | others
        for target in () if isinstance(self.targets, str) else self.targets:
            if not any(_ends_with_any(name, (target,)) for name in names):
                known = names if "." in target else {name.split(".")[-1] for name in linears}
                near = difflib.get_close_matches(target, sorted(known), n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise AdapterError(
                    f"target_modules: no linear is called {target!r}{hint} ({supported})"
                )
        for name in sorted(others):
            if self.covers(name):
                short = name.split(".")[-1]
                why = f"LoRA on {short} is not supported" if short in UNSUPPORTED else "no linear"
                raise AdapterError(
                    f"target_modules matches {name}: {why}; adapters are for the linears of the "
                    f"layers ({supported})"
                )
        if isinstance(self.targets, tuple) and self.layers_to_transform is not None:
            full_names = sorted(set(self.targets) & names)
            if full_names and len(set(self.targets)) >= _SHORTENED_FROM:
                raise AdapterError(
                    f"target_modules has the full name {full_names[0]} beside layers_to_transform; "
                    f"with {_SHORTENED_FROM} targets or more PEFT shortens such names, which "
                    "changes what they match: leave layers_to_transform out"
                )


def module_name(path: str, layer: int) -> str:
    """Hugging Face's name of a linear: `model.layers.3.self_attn.q_proj`."""
    stem, *rest = path.split("/")
    return ".".join(["model", stem, str(layer), *rest])


def _names(paths: Iterable[str], depth: int) -> Iterable[str]:
    """Hugging Face's names of the modules at these paths, in every layer."""
    for path in paths:
        if path == "lm_head":
            yield path
        elif path.startswith("layers/"):
            yield from (module_name(path, layer) for layer in range(depth))
        else:
            yield f"model.{path}"
            if path == "layers":
                yield from (f"model.layers.{layer}" for layer in range(depth))


@lru_cache(maxsize=1024)
def _per_layer(spec: LoraSpec, path: str, layers: int) -> PerLayer:
    ranks, scalings = [], []
    for layer in range(layers):
        name = module_name(path, layer)
        if not spec.covers(name):
            ranks.append(0)
            scalings.append(0.0)
            continue
        rank = _by_pattern(spec, "rank_pattern", name, spec.rank)
        alpha = _by_pattern(spec, "alpha_pattern", name, spec.alpha)
        ranks.append(rank)
        scalings.append(alpha / (math.sqrt(rank) if spec.rslora else rank))
    return PerLayer(tuple(ranks), tuple(scalings))


def _by_pattern(spec: LoraSpec, field: str, name: str, otherwise: Any) -> Any:
    """The value of the first key that matches (PEFT's `get_pattern_key`)."""
    pattern: tuple[tuple[str, Any], ...] = getattr(spec, field)
    matching = (value for key, value in pattern if _match(field, _at_end(key), name))
    return next(matching, otherwise)


def _ends_with_any(name: str, targets: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


_ANY_LAYER = r".*?\.[^.]*\.(?P<index>\d+)\."


def _before_layer(pattern: str) -> str:
    return rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\."


def _at_end(key: str) -> str:
    return rf"(.*\.)?({key})$"


def _match(field: str, pattern: str, name: str, whole: bool = False) -> Any:
    """The match of a field's pattern at the beginning of a name, or of the whole; None without one.

    `regex` reads what PEFT's `re` does, and stops a pattern that backtracks without end, for which
    AdapterError is raised.
    """
    compiled = _compiled(pattern)
    try:
        return (compiled.fullmatch if whole else compiled.match)(name, timeout=_MATCH_SECONDS)
    except TimeoutError:
        raise AdapterError(f"{field}: {pattern!r:.80} takes too long to match {name}") from None


@lru_cache(maxsize=2 * _MOST)
def _compiled(pattern: str) -> Any:
    return regex.compile(pattern)
