"""AdamW with warm-up and cosine decay, and clipping by global norm (optax)."""

from __future__ import annotations

import optax


def schedule(peak: float, steps: int, warmup_fraction: float) -> optax.Schedule:
    """Linear warm-up over a fraction of the steps, then cosine decay to zero.

    The first step's rate is above 0: warm-up runs from `peak / w` to `peak` over `w` steps.
    """
    warmup = max(1, round(warmup_fraction * steps))
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / warmup,
        peak_value=peak,
        warmup_steps=warmup - 1,
        decay_steps=max(steps, warmup),
    )


def adamw(
    learning_rate: optax.Schedule | float, weight_decay: float = 0.0, clip_norm: float = 1.0
) -> optax.GradientTransformation:
    """AdamW (betas 0.9 and 0.999) behind clipping to `clip_norm`; moments in float32."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=weight_decay),
    )
