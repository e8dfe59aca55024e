"""The Llama architecture (Touvron et al., arXiv 2302.13971; Llama 3, arXiv 2407.21783) in Linen.

Qwen3's dense models (arXiv 2505.09388) differ by the norms on query and key heads alone.

Parameters follow Hugging Face's names and layout, layers stacked on a leading axis:

    embed_tokens/weight                    [V, D]
    layers/input_layernorm/weight          [L, D]
    layers/self_attn/{q,k,v,o}_proj/weight [L, out, in]  (and `bias` where the config has one)
    layers/self_attn/{q,k}_norm/weight     [L, h]         (Qwen3)
    layers/post_attention_layernorm/weight [L, D]
    layers/mlp/{gate,up,down}_proj/weight  [L, out, in]
    norm/weight                            [D]
    lm_head/weight                         [V, D]        (absent where embeddings are tied)

Profiles and HLO name operations by module (`layers/self_attn/q_proj`), as Linen does by itself, and
by the scopes `embed`, `rotary`, `attention` and `unembed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from befm_jax.llama import rope
from befm_jax.llama.config import LlamaConfig
from befm_jax.llama.linear import ShardingRules, dot, parts, placed

Attention = Callable[..., tuple[Array, Any]]
Params = dict[str, Any]

_INIT = nn.initializers.normal(0.02)


class Linear(nn.Module):
    """`y = x W^T (+ b)` with `W` stored `[out, in]`, in the dtype of the input."""

    features: int
    use_bias: bool = False
    layout: ShardingRules | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        """The product, by `linear.dot`."""
        weight = self.param("weight", _INIT, (self.features, x.shape[-1]))
        y = dot(x, weight, cut=parts(self.layout, "feed_forward") > 1)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.astype(x.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467), in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """`x` over its root mean square, times the learnt scale; the dtype of `x`."""
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normal = (wide * jax.lax.rsqrt(mean_square + self.epsilon)).astype(x.dtype)
        return normal * weight.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


class SelfAttention(nn.Module):
    """Projections and rotary positions; which slots a slot sees is up to `attention`."""

    config: LlamaConfig
    layout: ShardingRules | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotary: tuple[Array, Array],
        attention: Attention,
        state: Any,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The attention output projected to the model's width, and the attention's new state."""
        config = self.config
        batch, length, _ = x.shape

        def heads(name: str, count: int) -> Array:
            width = count * config.head_dim
            y = Linear(width, config.attention_bias, self.layout, name=name)(x)
            y = y.reshape(batch, length, count, config.head_dim)
            return placed(self.layout, y, "rows", "slots", "each_head", None)

        query = heads("q_proj", config.num_attention_heads)
        key = heads("k_proj", config.num_key_value_heads)
        if config.qk_norm:
            query = RMSNorm(config.rms_norm_eps, name="q_norm")(query)
            key = RMSNorm(config.rms_norm_eps, name="k_norm")(key)
        query, key = rope.rotate(query, *rotary), rope.rotate(key, *rotary)
        value = heads("v_proj", config.num_key_value_heads)
        with jax.named_scope("attention"):
            attended, state = attention(query, key, value, state)
        output = Linear(config.hidden_size, config.attention_bias, self.layout, name="o_proj")
        return output(attended.reshape(batch, length, -1)), state


class MLP(nn.Module):
    """SwiGLU feed-forward (Shazeer, arXiv 2002.05202)."""

    config: LlamaConfig
    layout: ShardingRules | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """`down(silu(gate(x)) * up(x))`."""
        width, bias = self.config.intermediate_size, self.config.mlp_bias

        def widened(name: str) -> Array:
            y = Linear(width, bias, self.layout, name=name)(x)
            return placed(self.layout, y, "rows", "slots", "each_feed_forward")

        gate, up = widened("gate_proj"), widened("up_proj")
        down = Linear(x.shape[-1], bias, self.layout, name="down_proj")
        return down(nn.silu(gate) * up)


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    config: LlamaConfig
    layout: ShardingRules | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotary: tuple[Array, Array],
        attention: Attention,
        state: Any,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The layer's output and its attention's new state."""
        epsilon = self.config.rms_norm_eps
        normal = RMSNorm(epsilon, name="input_layernorm")(x)
        attend = SelfAttention(self.config, self.layout, name="self_attn")
        attended, state = attend(normal, rotary, attention, state)
        x = placed(self.layout, x + attended, "rows", "slots", "features")
        normal = RMSNorm(epsilon, name="post_attention_layernorm")(x)
        x = x + MLP(self.config, self.layout, name="mlp")(normal)
        return placed(self.layout, x, "rows", "slots", "features"), state


class Embedding(nn.Module):
    """Token embeddings, also the vocabulary projection where the two are tied."""

    vocab_size: int
    width: int
    layout: ShardingRules | None = None

    def setup(self) -> None:
        """Declares the one parameter."""
        self.weight = self.param("weight", _INIT, (self.vocab_size, self.width))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The tokens' rows, in the stored dtype."""
        tokens = placed(self.layout, tokens, "rows_to_embed", "slots")
        x = jnp.take(self.weight, tokens, axis=0)
        x = placed(self.layout, x, "rows_to_embed", "slots", "embedding_width")
        # Rows are exchanged within `fsdp` first, then columns within `tensor`: requested both at
        # once, the compiler all-gathers the array.
        return placed(self.layout, x, "rows", "slots", "each_embedding_width")

    def project(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """`x` times the transposed embeddings."""
        return dot(x, self.weight)


class Llama(nn.Module):
    """A Llama model as pure functions of its parameters.

    `dtype` is what the layers compute in; `remat` recomputes each layer in the backward pass
    instead of keeping its activations; `layout` shards activations over devices.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    remat: bool = False
    layout: ShardingRules | None = None

    def setup(self) -> None:
        """Declares the parts under Hugging Face's names."""
        config = self.config
        layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            out_axes=0,
            length=config.num_hidden_layers,
        )
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, self.layout)
        self.layers = scanned(config, self.layout)
        self.norm = RMSNorm(config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.vocab_size)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        attention: Attention,
        state: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Final hidden states, normalised, and the attention's state stacked over layers."""
        with jax.named_scope("embed"):
            x = self.embed_tokens(tokens).astype(self.dtype)
            x = placed(self.layout, x, "rows", "slots", "features")
        with jax.named_scope("rotary"):
            rotary = rope.tables(positions, self.config)
        x, state = self.layers(x, rotary, attention, state)
        return self.norm(x), state

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Vocabulary logits of hidden states, float32."""
        tied = self.config.tie_word_embeddings
        with jax.named_scope("unembed"):
            logits = self.embed_tokens.project(hidden) if tied else self.lm_head(hidden)
            between = (None,) * (logits.ndim - 2)
            logits = placed(self.layout, logits, "rows", *between, "each_logit")
            return logits.astype(jnp.float32)

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], attention: Attention
    ) -> Float[Array, "B T V"]:
        """Logits at every position."""
        return self.logits(self.hidden(tokens, positions, attention)[0])


def hidden_states(
    model: Llama,
    params: Params,
    tokens: ArrayLike,
    positions: ArrayLike,
    attention: Attention,
    state: Any = None,
) -> tuple[Float[Array, "B T D"], Any]:
    """`Llama.hidden` as a function of the parameters."""
    hidden: Any = model.apply(
        {"params": params}, tokens, positions, attention, state, method=Llama.hidden
    )
    return hidden


class Unstacked(NamedTuple):
    """Parameters with one tree a layer; `shared` are those outside of the layers."""

    shared: Params
    layers: tuple[Params, ...]


def unstack(params: Params) -> Unstacked:
    """The parameters unstacked, layer by layer."""
    shared = {name: leaf for name, leaf in params.items() if name != "layers"}
    stacked = params["layers"]
    count = jax.tree.leaves(stacked)[0].shape[0]

    def layer(number: int) -> Params:
        params_of_layer: Params = jax.tree.map(lambda leaf: leaf[number], stacked)
        return params_of_layer

    return Unstacked(shared, tuple(layer(number) for number in range(count)))


def hidden_states_unstacked(
    model: Llama,
    params: Unstacked,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    attention: Attention,
    states: Sequence[Any],
) -> tuple[Float[Array, "B T D"], tuple[Any, ...]]:
    """`hidden_states` with unrolled layers, and a state for each.

    A scan over layers takes their states as one array and returns another: all of a cache is copied
    for every token.  Here each layer has its own state, which is updated in place.
    """
    config = model.config
    embedding = Embedding(config.vocab_size, config.hidden_size, model.layout)
    with jax.named_scope("embed"):
        x: Any = embedding.apply({"params": params.shared["embed_tokens"]}, tokens)
        x = placed(model.layout, x.astype(model.dtype), "rows", "slots", "features")
    with jax.named_scope("rotary"):
        rotary = rope.tables(positions, config)
    new_states = []
    for layer, state in zip(params.layers, states, strict=True):
        x, state = Layer(config, model.layout).apply({"params": layer}, x, rotary, attention, state)
        new_states.append(state)
    x = RMSNorm(config.rms_norm_eps).apply({"params": params.shared["norm"]}, x)
    return x, tuple(new_states)


def vocabulary_logits(
    model: Llama, params: Params, hidden: Float[Array, "... D"]
) -> Float[Array, "... V"]:
    """`Llama.logits` as a function of the parameters."""
    logits: Any = model.apply({"params": params}, hidden, method=Llama.logits)
    return logits


# The logical axes of each parameter, by its module's name; stacked layers come before them.
# `befm_jax.distributed.mesh` has the mesh axes over which each of them is sharded.
_WEIGHT_AXES: dict[str, tuple[str, ...]] = {
    "embed_tokens": ("embedding_rows", "embedding_width"),
    "lm_head": ("vocabulary", "width"),
    "q_proj": ("heads", "width"),
    "k_proj": ("key_value_heads", "width"),
    "v_proj": ("key_value_heads", "width"),
    "o_proj": ("output_width", "input_heads"),
    "gate_proj": ("feed_forward", "width"),
    "up_proj": ("feed_forward", "width"),
    "down_proj": ("output_width", "input_feed_forward"),
    "input_layernorm": ("norm",),
    "post_attention_layernorm": ("norm",),
    "q_norm": ("norm",),
    "k_norm": ("norm",),
    "norm": ("norm",),
}


def logical_axes(path: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a parameter's axes: `("layers", "heads", "width")` for a query projection.

    Raises KeyError for a module without an entry: there is no default sharding.
    """
    axes = _WEIGHT_AXES[path[-2]]
    if path[-1] == "bias":
        axes = axes[:1]
    return ("layers", *axes) if path[0] == "layers" else axes


def shapes(config: LlamaConfig) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s (float32), without allocating anything."""
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def identity(query: Array, key: Array, value: Array, state: Any) -> tuple[Array, Any]:
        return query, state

    def init(tokens: Array) -> Params:
        variables: Any = Llama(config).init(jax.random.key(0), tokens, tokens, identity)
        return dict(variables["params"])

    tree: Params = jax.eval_shape(init, token)
    return tree
