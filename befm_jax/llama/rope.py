"""Rotary position embedding (Su et al., arXiv 2104.09864) with Llama 3.1's frequency scaling."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from befm_jax.llama.config import LlamaConfig


def frequencies(config: LlamaConfig) -> Float[np.ndarray, " h/2"]:
    """The rotary frequency of each pair of features, in radians per position, float32.

    Rounded to float32 at each step, as in the models' training: at position 1,000 a difference of
    one ulp shows in the logits.  The power alone is taken in float64, since NumPy's float32 power
    is not correctly rounded.
    """
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    power = np.power(np.float64(config.rope_theta), exponent.astype(np.float64))
    inverse = np.float32(1) / power.astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return inverse
    if scaling.kind == "linear":
        return inverse / np.float32(scaling.factor)
    # PyTorch divides a scalar by a tensor as a product with the reciprocal: two roundings.
    wavelength = np.float32(2 * np.pi) * (np.float32(1) / inverse)
    original = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    periods = np.float32(original) * (np.float32(1) / wavelength)
    ramp = (periods - np.float32(low)) / np.float32(high - low)
    between = (1 - ramp) * inverse / np.float32(scaling.factor) + ramp * inverse
    scaled = np.where(wavelength > original / low, inverse / np.float32(scaling.factor), inverse)
    medium = (wavelength <= original / low) & (wavelength >= original / high)
    return np.where(medium, between, scaled).astype(np.float32)


def tables(
    positions: Int[Array, "B T"], config: LlamaConfig
) -> tuple[Float[Array, "B T h/2"], Float[Array, "B T h/2"]]:
    """Rotary tables: the cosines and sines of every position's angles, float32."""
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies(config)[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T H h"], cos: Float[Array, "B T h/2"], sin: Float[Array, "B T h/2"]
) -> Float[Array, "B T H h"]:
    """`x` with feature pairs `(i, i + h/2)` rotated by their position's angle, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
