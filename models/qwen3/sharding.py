"""How Qwen3's parameters and cache are cut over the mesh axes fsdp and tp."""

import dataclasses

from jax.sharding import Mesh, PartitionSpec

Axes = tuple[str | None, ...]

#: The config field that sets the dimension which tp cuts.
_CUT_OVER_TP = {
    "embedding_vd": "vocab_size",
    "qkv_weight_kghd": "num_key_value_heads",
    "o_weight_kqhd": "num_key_value_heads",
    "gate_up_weight_cfd": "intermediate_size",
    "down_weight_fd": "intermediate_size",
    "lm_head_weight_vd": "vocab_size",
}


@dataclasses.dataclass(frozen=True)
class Qwen3Sharding:
    """Mesh axis of each dimension. A field is named like the parameter; its suffix spells the dimensions.

    v vocabulary, d hidden (of a scale: the normalised size), k KV head, g the queries of a KV head and then its key and
    its value, q the queries of a KV head, h head_dim, c gate and up, f intermediate.

    Column-parallel weights (qkv, gate_up, lm_head) end in the d that they contract, [N, K] as in a Hugging Face
    checkpoint. With few rows a GPU wants narrow tiles: in that layout their segments of 128 bytes along K stay whole,
    and a shard of N that is no multiple of a tile costs nothing. Row-parallel weights (o, down) are [K, N].
    """

    embedding_vd: Axes = ("tp", "fsdp")
    qkv_weight_kghd: Axes = ("tp", None, None, "fsdp")
    o_weight_kqhd: Axes = ("tp", None, None, "fsdp")
    gate_up_weight_cfd: Axes = (None, "tp", "fsdp")
    down_weight_fd: Axes = ("tp", "fsdp")
    lm_head_weight_vd: Axes = ("tp", "fsdp")
    scale_d: Axes = (None,)

    def partition_spec(self, name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
        """The spec of a parameter on a mesh with the axes fsdp and tp.

        A dimension that the fsdp axis does not divide stays whole on each fsdp rank: that costs memory and no bits.

        Args:
            name: of the field.
            shape: global shape.
            mesh: with all of its axes.

        Raises:
            ValueError: tp does not divide its dimension.
        """
        axes = []
        for dim, axis in enumerate(getattr(self, name)):
            divides = axis is None or shape[dim] % mesh.shape[axis] == 0
            if axis == "tp" and not divides:
                possible = [str(t) for t in (1, 2, 4, 8) if shape[dim] % t == 0]
                raise ValueError(
                    f"{_CUT_OVER_TP[name]}={shape[dim]} cannot be cut over tp={mesh.shape['tp']} ({name} {shape}); "
                    f"use tp={' or '.join(possible)}"
                )
            axes.append(axis if divides else None)
        return PartitionSpec(*axes)


QWEN3_SHARDING = Qwen3Sharding()
#: Cache of a layer [batch, positions, KV heads, head_dim].
CACHE_SPEC = PartitionSpec(("data", "fsdp"), None, "tp", None)
