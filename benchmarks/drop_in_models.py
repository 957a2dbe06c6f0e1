"""Models of libraries that nobody here wrote, as functions of rows: for `drop_in_speed.py` and its tests.

Each is made of its library's own layers: attention, norms, embeddings, convolutions, losses. Equinox and Haiku are
imported where they are needed; they are packages of the tests.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How large a model is, and how many rows it gets.

    Attributes:
        rows: of the batch.
        length: tokens of a row.
        width: of the residual stream.
        heads: of attention.
        layers: blocks.
        vocabulary: of the language model.
        image: edge of an image.
        channels: of a ResNet's four groups.
        dtype: of parameters and inputs.
    """

    rows: int
    length: int
    width: int
    heads: int
    layers: int
    vocabulary: int
    image: int
    channels: tuple[int, int, int, int]
    dtype: str


SMALL = Size(
    rows=9,
    length=12,
    width=64,
    heads=4,
    layers=1,
    vocabulary=50,
    image=32,
    channels=(8, 16, 16, 32),
    dtype="float32",
)
#: As large as the blocks of a model of about a billion parameters.
REALISTIC = Size(
    rows=8,
    length=512,
    width=2048,
    heads=16,
    layers=2,
    vocabulary=32000,
    image=224,
    channels=(64, 128, 256, 512),
    dtype="bfloat16",
)


@dataclasses.dataclass(frozen=True)
class Model:
    """`forward(parameters, x)` maps rows to rows, [B, ...] to [B, ...]."""

    library: str
    forward: Callable[[Any, jax.Array], jax.Array]
    parameters: Any
    x: jax.Array


def flax_nnx(size: Size) -> Model:
    """`nnx.MultiHeadAttention`, `LayerNorm` and `Linear` in pre-norm blocks."""
    width, dtype = size.width, jnp.dtype(size.dtype)

    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            options = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
            self.norms = nnx.List([nnx.LayerNorm(width, **options) for _ in range(2)])
            self.attention = nnx.MultiHeadAttention(size.heads, width, decode=False, **options)
            self.up = nnx.Linear(width, 4 * width, **options)
            self.down = nnx.Linear(4 * width, width, **options)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = x + self.attention(self.norms[0](x))
            return x + self.down(jax.nn.gelu(self.up(self.norms[1](x))))

    def make() -> nnx.List[Block]:
        rngs = nnx.Rngs(0)
        return nnx.List([Block(rngs) for _ in range(size.layers)])

    graph, shapes = nnx.split(nnx.eval_shape(make))

    def forward(state: Any, x: jax.Array) -> jax.Array:
        for block in nnx.merge(graph, state):
            x = block(x)
        return x

    return Model("flax.nnx", forward, _filled(shapes, size), _hidden(size))


def flax_linen(size: Size) -> Model:
    """A causal language model of Linen's `Embed`, attention, `LayerNorm` and `Dense`; optax's loss of each token."""
    options = {"dtype": jnp.dtype(size.dtype), "param_dtype": jnp.dtype(size.dtype)}

    class LanguageModel(linen.Module):
        @linen.compact
        def __call__(self, tokens: jax.Array) -> jax.Array:
            embed = linen.Embed(size.vocabulary, size.width, **options)
            x, mask = embed(tokens), linen.make_causal_mask(tokens)
            for _ in range(size.layers):
                attention = linen.MultiHeadDotProductAttention(size.heads, **options)
                x = x + attention(linen.LayerNorm(**options)(x), mask=mask)
                y = linen.Dense(4 * size.width, **options)(linen.LayerNorm(**options)(x))
                x = x + linen.Dense(size.width, **options)(linen.gelu(y))
            return embed.attend(linen.LayerNorm(**options)(x))

    model = LanguageModel()
    tokens = jax.random.randint(jax.random.key(1), (size.rows, size.length), 0, size.vocabulary)
    parameters = _filled(jax.eval_shape(model.init, jax.random.key(0), tokens), size)

    def forward(parameters: Any, tokens: jax.Array) -> jax.Array:
        logits = model.apply(parameters, tokens)
        logits = logits[:, :-1].astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])

    return Model("flax.linen", forward, parameters, tokens)


def equinox(size: Size) -> Model:
    """Equinox' `MultiheadAttention`, `LayerNorm` and `MLP`, written for one row and mapped by `jax.vmap`."""
    import equinox as eqx

    class Block(eqx.Module):
        norms: list[eqx.nn.LayerNorm]
        attention: eqx.nn.MultiheadAttention
        mlp: eqx.nn.MLP

        def __init__(self, key: jax.Array) -> None:
            of_attention, of_mlp = jax.random.split(key)
            width = size.width
            self.norms = [eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width)]
            self.attention = eqx.nn.MultiheadAttention(size.heads, width, key=of_attention)
            self.mlp = eqx.nn.MLP(width, width, 4 * width, 1, jax.nn.gelu, key=of_mlp)

        def __call__(self, x: jax.Array) -> jax.Array:
            y = jax.vmap(self.norms[0])(x)
            x = x + self.attention(y, y, y)
            return x + jax.vmap(self.mlp)(jax.vmap(self.norms[1])(x))

    def make(key: jax.Array) -> list[Block]:
        return [Block(each) for each in jax.random.split(key, size.layers)]

    shapes = eqx.filter_eval_shape(make, jax.random.key(0))
    parameters, rest = eqx.partition(shapes, lambda x: isinstance(x, jax.ShapeDtypeStruct))

    def forward(parameters: Any, x: jax.Array) -> jax.Array:
        for block in eqx.combine(parameters, rest):
            x = jax.vmap(block)(x)
        return x

    return Model("equinox", forward, _filled(parameters, size), _hidden(size))


def haiku_resnet(size: Size) -> Model:
    """`hk.nets.ResNet` with the blocks of ResNet-18, all of it Haiku's: convolutions, batch norms, pooling."""
    import haiku as hk

    def call(images: jax.Array) -> jax.Array:
        return _resnet(hk, size)(images, is_training=False)

    # Only with is_training do batch norms make their averages.
    def train(images: jax.Array) -> jax.Array:
        return _resnet(hk, size)(images, is_training=True)

    images = jax.random.normal(
        jax.random.key(1), (size.rows, size.image, size.image, 3), jnp.dtype(size.dtype)
    )
    init = hk.transform_with_state(train).init
    shapes, of_state = jax.eval_shape(init, jax.random.key(0), images)
    parameters = _filled(shapes, size)
    state = jax.tree_util.tree_map_with_path(_average, of_state)
    model = hk.without_apply_rng(hk.transform_with_state(call))

    def forward(parameters: Any, images: jax.Array) -> jax.Array:
        return model.apply(parameters, state, images)[0]

    return Model("dm-haiku", forward, parameters, images)


def _resnet(hk: Any, size: Size) -> Any:
    return hk.nets.ResNet(
        blocks_per_group=(2, 2, 2, 2) if size.image > 32 else (1, 1, 1, 1),
        num_classes=1000 if size.image > 32 else 10,
        bottleneck=False,
        channels_per_group=size.channels,
        logits_config={"w_init": hk.initializers.VarianceScaling()},  # zeros by default
        use_projection=(size.channels[0] != 64, True, True, True),
    )


MODELS: dict[str, Callable[[Size], Model]] = {
    "nnx transformer": flax_nnx,
    "equinox transformer": equinox,
    "linen language model": flax_linen,
    "haiku resnet": haiku_resnet,
}


def gradient(model: Model) -> Callable[[Any, jax.Array], Any]:
    """The gradient of the sum of a model's squared outputs in its parameters."""

    def loss(parameters: Any, x: jax.Array) -> jax.Array:
        out = model.forward(parameters, x).astype(jnp.float32)
        return (out * out).sum()

    return jax.grad(loss)


def _hidden(size: Size) -> jax.Array:
    shape = size.rows, size.length, size.width
    return jax.random.normal(jax.random.key(1), shape, jnp.dtype(size.dtype))


def _filled(shapes: Any, size: Size) -> Any:
    """Random parameters of the shapes that a library asks for: about 1 for vectors, fan-in scaled for the rest.

    Libraries' own initialisers take long to compile, a ResNet's a minute.
    """
    rng = np.random.default_rng(0)

    def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.standard_normal(x.shape, np.float32)
        fan_in = math.prod(x.shape[:-1])
        return jnp.asarray(1 + 0.1 * values if x.ndim == 1 else values / fan_in**0.5, size.dtype)

    return jax.tree.map(fill, shapes)


def _average(path: Any, x: jax.ShapeDtypeStruct) -> np.ndarray:
    """A moving average of batch norm: means of 0, variances of 1. It lies on no device."""
    return (np.ones if "var_ema" in str(path) else np.zeros)(x.shape, x.dtype)
