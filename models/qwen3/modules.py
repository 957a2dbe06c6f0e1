"""Qwen3 as Flax NNX modules, written functionally: state goes in and comes out.

The modules run inside `jax.shard_map`: each parameter is this rank's part, as `sharding.py` cuts it, and every
collective is called from `parallel` or `numerics`. `positions` and `lengths` are absolute, so prefill, a chunk of it
and a decode step are the same call.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ...layers.base import LayerRest, Parallel, Stream, Turns
from ...layers.turns import ParallelInTurns, alone, alternate
from .config import Qwen3Config
from .sharding import CACHE_SPEC


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, each [B, S, K, H]; entry s is absolute position s."""

    k: jax.Array
    v: jax.Array


#: One entry a layer, or one entry whose arrays have a leading layer dimension.
Cache = tuple[LayerCache, ...] | LayerCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Tokens of a forward pass.

    Attributes:
        tokens: int32 [B, T].
        positions: int32 [B, T], absolute and consecutive in a row.
        lengths: int32 [B]; positions from a row's length on are padding and are written to the cache as zeros.
        cos: float32 [S, H/2], `rope_tables` for the whole cache.
        sin: float32 [S, H/2].
    """

    tokens: jax.Array
    positions: jax.Array
    lengths: jax.Array
    cos: jax.Array
    sin: jax.Array

    def halves(self) -> list["Batch"]:
        """The first half of the positions, and the second."""
        tokens, positions = (jnp.split(x, 2, axis=1) for x in (self.tokens, self.positions))
        return [
            dataclasses.replace(self, tokens=t, positions=p) for t, p in zip(tokens, positions, strict=True)
        ]


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype: jax.typing.DTypeLike) -> nnx.Param:
    return nnx.Param((jax.random.normal(rngs.params(), shape) * fan_in**-0.5).astype(dtype))


class RmsNorm(nnx.Module):
    """RMSNorm over the last axis: the hidden size, or a head of queries or keys."""

    def __init__(self, size: int, eps: float, dtype: jax.typing.DTypeLike):
        self.eps = eps
        self.scale_d = nnx.Param(jnp.ones((size,), dtype))

    def __call__(self, stream: Stream, parallel: Parallel) -> tuple[jax.Array, jax.Array]:
        """The residual stream, and that normalised."""
        return parallel.norm(stream, self.scale(parallel), eps=self.eps)

    def column_parallel(
        self, stream: Stream, w: jax.Array, parallel: Parallel, *, gated: bool = False
    ) -> tuple[Stream, jax.Array]:
        """The residual stream, and the product of it, normalised, and a column-parallel weight [N/tp, D]."""
        return parallel.norm_column_parallel(stream, self.scale(parallel), w, eps=self.eps, gated=gated)

    def scale(self, parallel: Parallel) -> jax.Array:
        """The scale [D] as this rank uses it."""
        return parallel.weight("scale_d", self.scale_d[...])


class Attention(nnx.Module):
    """Grouped-query attention with normalised queries and keys.

    Queries, key and value of a KV head lie side by side in one weight, so that a cut over KV heads is one matmul. It is
    stored [N, K], as every column-parallel weight is: see `sharding.py`.
    """

    def __init__(self, config: Qwen3Config, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        d, k, q, h = config.hidden_size, config.num_key_value_heads, config.queries_per_kv, config.head_dim
        self.qkv_weight_kghd = _normal(rngs, (k, q + 2, h, d), d, dtype)
        self.o_weight_kqhd = _normal(rngs, (k, q, h, d), k * q * h, dtype)
        self.q_norm = RmsNorm(h, config.rms_norm_eps, dtype)
        self.k_norm = RmsNorm(h, config.rms_norm_eps, dtype)

    def queries(
        self, stream: Stream, norm: RmsNorm, batch: Batch, cache: LayerCache | None, parallel: Parallel
    ) -> tuple[Stream, jax.Array, LayerCache]:
        """The residual stream, queries [B, T, N, H] of its norm, and the cache with keys and values.

        Without a cache the keys are those of the batch, from position 0 on.
        """
        ops = parallel.numerics
        weight = parallel.weight("qkv_weight_kghd", self.qkv_weight_kghd[...])
        kv_heads, g, h, d = weight.shape
        stream, qkv = norm.column_parallel(stream, weight.reshape(kv_heads * g * h, d), parallel)
        qkv = qkv.reshape(*qkv.shape[:2], kv_heads, g, h)
        if cache is None:
            cache = LayerCache(*(jnp.zeros((*qkv.shape[:2], kv_heads, h), qkv.dtype) for _ in range(2)))
        q, k, v = ops.qk_norm_rope_cache(
            qkv,
            self.q_norm.scale(parallel),
            self.k_norm.scale(parallel),
            batch.cos,
            batch.sin,
            batch.positions,
            batch.lengths,
            cache.k,
            cache.v,
            eps=self.q_norm.eps,
        )
        return stream, q, LayerCache(k, v)

    def attend(self, q: jax.Array, batch: Batch, cache: LayerCache, parallel: Parallel) -> jax.Array:
        """What the queries [B, T, N, H] find in the cache, [B, T, N * H]."""
        return parallel.numerics.attention(q, cache.k, cache.v, batch.positions).reshape(*q.shape[:2], -1)

    def out_weight(self, parallel: Parallel) -> jax.Array:
        """[N * H, D]."""
        weight = parallel.weight("o_weight_kqhd", self.o_weight_kqhd[...])
        return weight.reshape(-1, weight.shape[-1])


class Mlp(nnx.Module):
    """SwiGLU feed-forward; gate and up in one weight."""

    def __init__(self, config: Qwen3Config, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        self.gate_up_weight_cfd = _normal(rngs, (2, f, d), d, dtype)
        self.down_weight_fd = _normal(rngs, (f, d), f, dtype)

    def hidden(self, stream: Stream, norm: RmsNorm, parallel: Parallel) -> tuple[Stream, jax.Array]:
        """The residual stream, and SwiGLU [B, T, F] of its norm."""
        return norm.column_parallel(stream, self.gate_up_weight(parallel), parallel, gated=True)

    def gate_up_weight(self, parallel: Parallel) -> jax.Array:
        """[2F, D], gates first."""
        weight = parallel.weight("gate_up_weight_cfd", self.gate_up_weight_cfd[...])
        return weight.reshape(-1, weight.shape[-1])

    def down_weight(self, parallel: Parallel) -> jax.Array:
        """[F, D]."""
        return parallel.weight("down_weight_fd", self.down_weight_fd[...])


class Layer(nnx.Module):
    """A decoder layer.

    Its last residual add is left to the norm behind it, which reads the sum anyway.
    """

    def __init__(self, config: Qwen3Config, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.input_norm = RmsNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.attention = Attention(config, dtype, rngs)
        self.post_attention_norm = RmsNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = Mlp(config, dtype, rngs)

    def __call__(
        self, stream: Stream, batch: Batch, cache: LayerCache | None, parallel: Parallel
    ) -> tuple[Stream, LayerCache]:
        """The residual stream and what is to be added to it, in and out."""
        box = [cache]
        stream = alone(self.turns(stream, batch, box, parallel))
        assert box[0] is not None
        return stream, box[0]

    def turns(
        self, stream: Stream, batch: Batch, cache: list[LayerCache | None], parallel: Parallel
    ) -> Turns[Stream]:
        """The same in turns, with others in between: the cache is the only entry of a list, and is put there.

        Attention is a turn of its own behind the cache's, and each sum over tp ends one and takes one.
        """
        stream, q = self.write(stream, batch, cache, parallel)
        q = yield q, q
        assert cache[0] is not None
        heads = self.attention.attend(q, batch, cache[0], parallel)
        heads = yield heads, heads
        later = parallel.put_off(stream, lambda: self._rest(heads, parallel))
        if later is not None:
            return later
        attended = yield from parallel.row_parallel(heads, self.attention.out_weight(parallel))
        stream, hidden = self.mlp.hidden(
            stream._replace(pending=attended), self.post_attention_norm, parallel
        )
        hidden = yield hidden, hidden
        added = yield from parallel.row_parallel(hidden, self.mlp.down_weight(parallel))
        return stream._replace(pending=added)

    def _rest(self, heads: jax.Array, parallel: Parallel) -> LayerRest:
        """What is left to be done behind attention."""
        return LayerRest(
            heads,
            self.attention.out_weight(parallel),
            self.post_attention_norm.scale(parallel),
            self.mlp.gate_up_weight(parallel),
            self.mlp.down_weight(parallel),
            self.post_attention_norm.eps,
        )

    def write(
        self, stream: Stream, batch: Batch, cache: list[LayerCache | None], parallel: Parallel
    ) -> tuple[Stream, jax.Array]:
        """Puts keys and values into the cache; returns the residual stream and queries [B, T, N, H]."""
        stream, q, cache[0] = self.attention.queries(stream, self.input_norm, batch, cache[0], parallel)
        return stream, q


class Qwen3(nnx.Module):
    """Qwen3ForCausalLM.

    Attributes:
        config: sizes and constants.
    """

    def __init__(self, config: Qwen3Config, *, dtype: jax.typing.DTypeLike = jnp.bfloat16, rngs: nnx.Rngs):
        """Random parameters of variance 1 / fan-in; `tbik_jax.load` reads a checkpoint.

        Args:
            config: sizes and constants.
            dtype: of the parameters and activations: bfloat16, float16 or float32.
            rngs: with the stream `params`.
        """
        check_dtype(dtype)
        d, v = config.hidden_size, config.vocab_size
        self.config = config
        self.embedding_vd = _normal(rngs, (v, d), d, dtype)
        self.layers = nnx.List([Layer(config, dtype, rngs) for _ in range(config.num_hidden_layers)])
        self.final_norm = RmsNorm(d, config.rms_norm_eps, dtype)
        if not config.tie_word_embeddings:
            self.lm_head_weight_vd = _normal(rngs, (v, d), d, dtype)

    @property
    def dtype(self) -> jnp.dtype:
        """Of the parameters and activations."""
        return self.embedding_vd[...].dtype

    def __call__(
        self,
        batch: Batch,
        cache: Cache,
        parallel: Parallel,
        *,
        stacked: Any = None,
        taps: list[jax.Array] | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Runs the decoder inside `shard_map`.

        Args:
            batch: tokens and positions.
            cache: as `init_cache` makes it, holding the positions before the batch's.
            parallel: numerics and mesh.
            stacked: `stacked_layers()`, if the layers are to run as a scan over one compiled layer; the cache is
                stacked then too. The bits are the same.
            taps: if given, receives the hidden states [B, T, D] after the embedding and after each layer.

        Returns:
            Normalised hidden states [B, T, D], and the cache with the batch's positions.
        """
        stream = self._embedded(batch, parallel)
        outputs = [stream.x]
        if isinstance(cache, tuple):
            layer_caches = []
            for layer, layer_cache in zip(self.layers, cache, strict=True):
                stream, layer_cache = layer(stream, batch, layer_cache, parallel)
                outputs.extend([] if taps is None else [parallel.total(stream)])
                layer_caches.append(layer_cache)
            cache = tuple(layer_caches)
        else:

            def step(x: jax.Array, layer_and_cache: Any) -> tuple[jax.Array, Any]:
                layer = nnx.merge(nnx.graphdef(self.layers[0]), layer_and_cache[0])
                stream, layer_cache = layer(Stream(x), batch, layer_and_cache[1], parallel)
                # All layers are one program, and nothing is pending before the first.
                x = parallel.total(stream)
                return x, (layer_cache, None if taps is None else x)

            x, (cache, each) = lax.scan(step, stream.x, (stacked, cache))
            stream = Stream(x)
            outputs.extend([] if taps is None else each)
        if taps is not None:
            taps.extend(outputs)
        return self.final_norm(stream, parallel)[1], cache

    def prefill_in_turns(
        self, batch: Batch, cache: tuple[LayerCache, ...], parallel: ParallelInTurns
    ) -> tuple[LayerCache, ...]:
        """Fills the cache as `__call__` does, one half of the positions behind the other in every layer.

        Args:
            batch: tokens and positions [B, T], T even.
            cache: an entry a layer.
            parallel: numerics and mesh.

        Returns:
            The cache with the batch's positions.
        """
        caches: list[list[LayerCache | None]] = [[each] for each in cache]
        halves = [self._cache_in_turns(each, caches, parallel) for each in batch.halves()]
        # The second half is behind by an attention: each computes while what the other gave to a sum is on its way.
        order = [0] + [0, 0, 1, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1] * len(cache)
        alternate(halves, order)
        return tuple(each for [each] in caches if each is not None)

    def _cache_in_turns(
        self, batch: Batch, caches: list[list[LayerCache | None]], parallel: Parallel
    ) -> Turns[None]:
        """Writes keys and values of the batch to every layer's cache."""
        stream = self._embedded(batch, parallel)
        for layer, cache in zip(self.layers[:-1], caches[:-1], strict=True):
            stream = yield from layer.turns(stream, batch, cache, parallel)
        *_, last = self.layers
        last.write(stream, batch, caches[-1], parallel)

    def _embedded(self, batch: Batch, parallel: Parallel) -> Stream:
        table = parallel.weight("embedding_vd", self.embedding_vd[...])
        return Stream(parallel.numerics.embedding(batch.tokens, table))

    def stacked_layers(self) -> Any:
        """The layers' parameters with a leading layer dimension: for one compiled layer instead of many.

        It copies the parameters, so it suits small models and compilers that are slow (XLA on the CPU).
        """
        return jax.tree.map(lambda *each: jnp.stack(each), *(nnx.state(layer) for layer in self.layers))

    def logits(self, hidden: jax.Array, parallel: Parallel) -> jax.Array:
        """Logits float32 [..., V/tp] of this rank's part of the vocabulary, from hidden states [..., D]."""
        return parallel.numerics.column_parallel(hidden, self.head_weight(parallel), out_dtype=jnp.float32)

    def head_weight(self, parallel: Parallel) -> jax.Array:
        """This rank's part of the vocabulary's weights, [V/tp, D]."""
        if self.config.tie_word_embeddings:
            return parallel.weight("embedding_vd", self.embedding_vd[...])
        return parallel.weight("lm_head_weight_vd", self.lm_head_weight_vd[...])

    def hidden(
        self, batch: Batch, parallel: Parallel, *, stacked: Any = None, remat: bool = True
    ) -> jax.Array:
        """Runs the decoder over whole sequences without a cache, inside `shard_map`; for training.

        Args:
            batch: tokens and positions, from 0 on.
            parallel: numerics and mesh.
            stacked: `stacked_layers()`, if the layers are to run as a scan over one compiled layer.
            remat: whether the backward pass computes a layer's values again instead of keeping them; no bit changes.

        Returns:
            Normalised hidden states [B, T, D].
        """

        def run(index: int, state: Any, stream: Stream) -> Stream:
            layer = nnx.merge(nnx.graphdef(self.layers[index]), state)
            return layer(stream, batch, None, parallel)[0]

        if remat:
            run = jax.checkpoint(run, static_argnums=(0,))
        stream = self._embedded(batch, parallel)
        if stacked is not None:

            def step(x: jax.Array, state: Any) -> tuple[jax.Array, None]:
                return parallel.total(run(0, state, Stream(x))), None

            return self.final_norm(Stream(lax.scan(step, stream.x, stacked)[0]), parallel)[1]
        for index, layer in enumerate(self.layers):
            stream = run(index, nnx.state(layer), stream)
        return self.final_norm(stream, parallel)[1]


def cache_shapes(
    config: Qwen3Config, batch: int, capacity: int, dtype: jax.typing.DTypeLike, mesh: Mesh, *, stacked: bool
) -> Cache:
    """Shapes and shardings of a cache on a mesh, as a tree like it.

    Args:
        config: of the model.
        batch: rows, all ranks together; a multiple of data * fsdp.
        capacity: positions.
        dtype: of the keys and values.
        mesh: with all of its axes.
        stacked: one entry with a leading layer dimension.
    """
    shape = (batch, capacity, config.num_key_value_heads, config.head_dim)
    full = (config.num_hidden_layers, *shape) if stacked else shape
    return jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(full, dtype, sharding=NamedSharding(mesh, spec)),
        cache_spec(config, stacked=stacked),
    )


def init_cache(shapes: Cache) -> Cache:
    """A cache of zeros of these `cache_shapes`; each array is one of its own, since the steps donate them."""
    return jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype, device=each.sharding), shapes)


def cache_spec(config: Qwen3Config, *, stacked: bool) -> Cache:
    """The `PartitionSpec`s of a cache, as a tree like it."""
    spec: Any = PartitionSpec(None, *CACHE_SPEC) if stacked else CACHE_SPEC
    each = LayerCache(spec, spec)
    return each if stacked else (each,) * config.num_hidden_layers


def check_dtype(dtype: jax.typing.DTypeLike) -> None:
    """Raises `ValueError` for a dtype that the numerics do not cover."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"dtype {name} is not supported; use bfloat16, float16 or float32")
