"""What a device can do at the most, measured: matrix products and memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Side of the square matrices, and bytes that are copied: large enough to hide what starting costs.
_SIDES = {"cpu": 1024, "gpu": 8192}
_BYTES = {"cpu": 1 << 28, "gpu": 1 << 32}
_TIMES = 10


def matmul_peak(device: str, dtype: Any) -> float:
    """Flops a second of the best of a few large matrix products; an addition counts too."""
    side = _SIDES[device]
    left, right = (
        jax.random.normal(jax.random.key(number), (side, side), jnp.dtype(dtype))
        for number in range(2)
    )
    return 2 * side**3 / _best(jax.jit(jnp.matmul), left, right)


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written ones together, of the best of a few large copies."""
    numbers = jnp.zeros(_BYTES[device] // 4, jnp.float32)
    return 2 * numbers.nbytes / _best(jax.jit(lambda array: array + 1), numbers)


def _best(compute: Callable[..., Any], *given: Any) -> float:
    """Seconds of the quickest of a few calls, after one that compiles."""
    jax.block_until_ready(compute(*given))
    found = []
    for _ in range(_TIMES):
        since = time.perf_counter()
        jax.block_until_ready(compute(*given))
        found.append(time.perf_counter() - since)
    return min(found)
