"""The matmuls of Qwen3 at the local sizes of each tensor-parallel degree: what speed is measured and tuned on."""

import dataclasses

from tbik_jax.pallas_kernels.tree_matmul.plan import plan_contraction

TPS = (1, 2, 4, 8)
MS = tuple(2**i for i in range(14))  # 1 to 8192 rows
LAYERS = ("o_proj", "down_proj", "qkv", "gate_up", "lm_head")

_HEAD_DIM, _KV_HEADS, _VOCABULARY = 128, 8, 151936
_MODELS = {  # hidden size, intermediate size, query heads
    "1.7B": (2048, 6144, 16),
    "8B": (4096, 12288, 32),
    "32B": (5120, 25600, 64),
}
MODELS = tuple(_MODELS)
_ROW = ("o_proj", "down_proj")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One matmul of a model as one rank sees it.

    Attributes:
        layer: Its name, one of `LAYERS`.
        model: Of Qwen3.
        tp: Ranks that share it.
        k: Length of this rank's contraction.
        n: This rank's columns.
        leaves: This rank's leaves.
        transpose_rhs: Whether the weights are stored [N, K]: the model keeps the checkpoint's layout where K is whole.
    """

    layer: str
    model: str
    tp: int
    k: int
    n: int
    leaves: int
    transpose_rhs: bool = False

    @property
    def row_parallel(self) -> bool:
        """Whether tensor parallelism cuts K."""
        return self.layer in _ROW


def layers(
    names: tuple[str, ...] = LAYERS, models: tuple[str, ...] = MODELS, tps: tuple[int, ...] = TPS
) -> list[Layer]:
    """The layers of `names`, each of `models` at each of `tps`; lm_head of 8B alone."""
    return [
        _layer(name, model, tp)
        for name in names
        for model in models
        for tp in tps
        if name != "lm_head" or model == "8B"
    ]


def _layer(name: str, model: str, tp: int) -> Layer:
    hidden, intermediate, heads = _MODELS[model]
    sizes = {  # global K and N
        "o_proj": (heads * _HEAD_DIM, hidden),
        "down_proj": (intermediate, hidden),
        "qkv": (hidden, (heads + 2 * _KV_HEADS) * _HEAD_DIM),
        "gate_up": (hidden, 2 * intermediate),
        "lm_head": (hidden, _VOCABULARY),
    }
    k, n = sizes[name]
    row = name in _ROW
    plan = plan_contraction(k=k, n=n, dtype="bfloat16", role="row" if row else "column")
    return Layer(
        layer=name,
        model=model,
        tp=tp,
        k=k // tp if row else k,
        n=n if row else n // tp,
        leaves=plan.local_leaves(tp) if row else plan.leaves,
        transpose_rhs=not row,
    )
