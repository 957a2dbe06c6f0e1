"""Tree-ordered matmul for Hopper GPUs, in Pallas Mosaic GPU.

The product is the one `reference.py` specifies. One kernel serves every case: persistent CTAs walk the output tiles,
one warpgroup of a CTA streams boxes of x and w into a ring of shared-memory stages with TMA, and the others
("consumers") multiply, each owning `tile_m` rows of the CTA's tile.

* The consumers run the leaves of a tile one after the other, each in a fresh accumulator, and merge them with a binary
  counter: a finished subtree is added to the complete one on its left, or waits for its right sibling. It waits in
  registers as long as they suffice (`MosaicConfig.group`), then in shared memory, or in a scratch of the CTA's own in
  global memory (`Home`). The sums move while the tensor cores multiply for the next leaf.
* Few tiles do not fill the GPU. Then `MosaicConfig.split` CTAs of one cluster take a part of the leaves each, and every
  CTA adds up the parts of its share of the columns, in the same tree (`Exchange`).
* The last round of tiles may leave most CTAs idle. Then `MosaicConfig.last_split` CTAs of one cluster take a part of
  the leaves of one tile of that round, though each has had tiles of its own before.
* `MosaicConfig.multicast` CTAs of one cluster, one above the other, load each tile of w once for both.

Every configuration does the same adds on the same leaves, so it shows in the bits as little as the tile does.

Ragged shapes need no padding in memory: TMA reads zeros outside of an array and writes nothing there. `Ring` has the
one complication.
"""

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.extend.backend
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..common.activation import silu
from .config import (
    RESIDENT_CLUSTERS,
    MosaicConfig,
    candidate_configs,
    check_config,
    choose_config,
    gate_config,
    reads_transposed,
)
from .mosaic_leaves import LeafLoop
from .mosaic_problem import Place, Problem, Ref, named_buffer, names_of, swizzle_of, tiling
from .mosaic_sums import LINE, Exchange, Value, columns_of, homes_of
from .operands import check_batch, check_operands

__all__ = ["MosaicConfig", "candidate_configs", "choose_config", "tree_matmul_mosaic_gpu"]

_PRODUCER_REGISTERS = 24


def tree_matmul_mosaic_gpu(
    x: jax.Array,
    w: jax.Array,
    *,
    leaves: int,
    out_dtype: jax.typing.DTypeLike,
    transpose_rhs: bool = False,
    transpose_lhs: bool = False,
    gated: bool = False,
    config: MosaicConfig | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Multiplies x and w in tree order on a Hopper GPU.

    Args:
        x: [M, K], bfloat16 or float16, any M >= 1; [K, M] with `transpose_lhs`. Or [B, M, K]: B products in one launch.
        w: [K, N], or [N, K] with `transpose_rhs`, of x's type; N a multiple of 16. With B products [B, K, N] or
            [B, N, K].
        leaves: 1, 2, 4 or 8 equal slices of K, each a multiple of 16 long.
        out_dtype: bfloat16, float16 or float32; the total is rounded to it once.
        transpose_rhs: Whether w is [N, K]. It is read as it lies, not transposed in memory.
        transpose_lhs: Whether x is [K, M]. It is read as it lies, too, but for few rows or columns or short leaves
            (`reads_transposed`), where it is transposed in memory first.
        gated: Whether the product is F columns of gates and then F of values, and the result their SwiGLU, [M, F]: each
            of both rounded to `out_dtype`, then as `swiglu` has it. With one leaf and w [N, K].
        config: The tiling; `choose_config`'s by default.
        interpret: Run on the CPU with the kernel's threads and barriers, slowly. Shows order and synchronisation, not
            the bits of a GPU.

    Returns:
        [M, N] in `out_dtype`, or [M, N / 2] with `gated`; [B, M, N] for B products.

    Raises:
        ValueError: If a shape, a type, `leaves`, `config` or the device is not covered.
    """
    batch = check_batch(x, w)
    if batch is not None and (transpose_lhs or gated):
        raise ValueError(
            f"transpose_lhs={transpose_lhs} and gated={gated} take two matrices, not {batch} of each"
        )
    rows = jax.ShapeDtypeStruct(x.shape[:-3:-1] if transpose_lhs else x.shape[-2:], x.dtype)
    columns = jax.ShapeDtypeStruct(w.shape[-2:], w.dtype)
    m, n, k = check_operands(rows, columns, leaves, jnp.dtype(out_dtype), transpose_rhs)
    if transpose_lhs and not reads_transposed(m, n, k, leaves, transpose_rhs=transpose_rhs):
        x, transpose_lhs = x.T, False
    if gated and (n % 32 or jnp.dtype(out_dtype) != x.dtype):
        raise ValueError(
            f"the gated product of {x.dtype} has {n // 2} columns in {jnp.dtype(out_dtype)}; "
            f"it needs a multiple of 16 columns and out_dtype={x.dtype}"
        )
    stored: dict[str, Any] = {"transpose_rhs": transpose_rhs, "transpose_lhs": transpose_lhs}
    config = config or choose_config(m, n, k, leaves, **stored, batch=batch or 1)
    config = gate_config(config, m) if gated else config
    check_config(config, m=m, n=n, k=k, leaves=leaves, itemsize=jnp.dtype(out_dtype).itemsize, **stored)
    problem = Problem(
        m=m,
        n=n,
        k=k,
        leaves=leaves,
        dtype=x.dtype,
        out_dtype=jnp.dtype(out_dtype),
        transpose_rhs=transpose_rhs,
        transpose_lhs=transpose_lhs,
        config=config,
        resident=_interpreted_clusters(config) if interpret else _resident_clusters(config.cluster),
        interpret=interpret,
        batch=batch,
    )
    if interpret and config.cluster == 8 and problem.tiles > 1:
        raise ValueError(
            f"the interpreter cannot run a cluster of 8 over {problem.tiles} tiles (see _interpreted_clusters); use a "
            "smaller split or one tile"
        )
    return _run(x, w, problem)


@functools.partial(jax.jit, static_argnums=2)
def _run(x: jax.Array, w: jax.Array, problem: Problem) -> jax.Array:
    config, clusters = problem.config, problem.clusters
    out_type = [jax.ShapeDtypeStruct((*problem.lead, problem.m, problem.columns), problem.out_dtype)]
    in_global = config.global_blocks(problem.leaves)
    if in_global:
        lines = (config.block // LINE, config.tile_m, LINE)
        shape = (clusters * config.cluster, in_global, config.consumers, *lines)
        out_type.append(jax.ShapeDtypeStruct(shape, jnp.float32))
    if problem.joins:
        out_type.append(Exchange.parts(config, clusters))

    arrive_in_pair = functools.partial(plgpu.ClusterBarrier, collective_axes=("pair",))
    scratch: dict[str, Any] = {
        "x": named_buffer(*problem.x_ring.names()),
        "w": named_buffer(*problem.w_ring.names()),
        "full": plgpu.Barrier(
            num_arrivals=(1 + config.gated + problem.x_copies) * config.boxes, num_barriers=config.stages
        ),
        "empty": arrive_in_pair(num_arrivals=config.consumers, num_barriers=config.stages),
    }
    saved: tuple[Any, ...] = ()
    in_shared = config.shared_blocks(problem.leaves)
    if in_shared:
        layout = tiling(swizzle_of(config.block, 4), 4)
        saved = (plgpu.SMEM((in_shared, *problem.block_shape), jnp.float32, transforms=layout),)
    if problem.shares:
        scratch["saved_and_out"] = plgpu.RefUnion(*saved, *problem.out_ring.names())
    else:
        scratch["out"] = named_buffer(*problem.out_ring.names())
        if saved:
            scratch["saved"] = saved[0]
    if problem.joins:
        scratch |= Exchange.barriers(config)
    kernel = plgpu.kernel(
        functools.partial(_kernel, problem),
        out_type=out_type,
        scratch_types=scratch,
        grid=(clusters,),
        grid_names=("cluster",),
        cluster=(config.multicast, config.split * config.last_split),
        cluster_names=("pair", "part"),
        num_threads=config.consumers + 1,
        thread_name="wg",
        kernel_name="tree_matmul",
        # Where memory passes from one thread or proxy to another, the kernel says so itself.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams(inline_mgpu="ignore") if problem.interpret else None,
    )
    x = problem.with_leaves(x, axis=0 if problem.transpose_lhs else 1)
    return kernel(x, problem.with_leaves(w, axis=1 if problem.transpose_rhs else 0))[0]


def _kernel(
    problem: Problem, x_gmem: Ref, w_gmem: Ref, out_gmem: Ref, *in_global: Ref, **scratch: Ref
) -> None:
    wg, consumers = lax.axis_index("wg"), problem.config.consumers
    smem = types.SimpleNamespace(**scratch)

    def set_registers(count: int, action: Literal["decrease", "increase"]) -> None:
        if consumers > 1:  # with one consumer a thread has all the registers it can address from the start
            plgpu.set_max_registers(count, action=action)

    @pl.when(wg == consumers)
    def _() -> None:
        set_registers(_PRODUCER_REGISTERS, "decrease")
        _produce(problem, x_gmem, w_gmem, smem)

    @pl.when(wg < consumers)
    def _() -> None:
        set_registers((512 - _PRODUCER_REGISTERS) // consumers // 8 * 8, "increase")
        _consume(problem, smem, out_gmem, in_global)


def _produce(problem: Problem, x_gmem: Ref, w_gmem: Ref, smem: types.SimpleNamespace) -> None:
    """Streams the stages of this CTA's tiles, each as soon as the consumers have freed its slot.

    One warp copies w and another x: a barrier takes an arrival from each thread that announces a copy, and 32 are
    quicker than a whole warpgroup's 128.
    """
    config, stages = problem.config, jnp.int32(problem.config.stages)
    part = lax.axis_index("part")
    first_step = part * problem.part_steps if config.last_split == 1 else jnp.int32(0)
    # Not a constant to the compiler: unrolled, the loop would need more registers than these warps have.
    part_steps = lax.optimization_barrier(jnp.int32(problem.part_steps))

    def wait_until_empty(slot: jax.Array) -> None:
        plgpu.barrier_wait(smem.empty.at[slot])

    def stream(copy: Callable[[jax.Array, int, tuple[Any, ...], Place], None]) -> None:
        def run(first_step: jax.Array, steps: jax.Array, place: Place, count: jax.Array) -> jax.Array:
            def step(i: jax.Array, count: jax.Array) -> jax.Array:
                slot = lax.rem(count, stages)
                pl.when(count >= stages)(lambda: wait_until_empty(slot))
                for box in range(config.boxes):
                    copy(slot, box, problem.depths(first_step + i, box), place)
                return count + 1

            return lax.fori_loop(0, steps, step, count)

        count = problem.walk(functools.partial(run, first_step, part_steps), jnp.int32(0))
        if problem.cut_tiles:
            steps = problem.cut_leaves * problem.leaf_steps
            trips = jnp.where(problem.has_cut_tile(), steps, 0)
            count = run(part * steps, trips, problem.cut_place(), count)
        # No barrier may go away while an arrival is pending: see the last use of every slot freed.
        lax.fori_loop(
            jnp.maximum(count - stages, 0), count, lambda i, _: wait_until_empty(lax.rem(i, stages)), None
        )

    def copy_x(slot: jax.Array, box: int, ks: tuple[Any, ...], place: Place) -> None:
        ring = names_of(smem.x, len(problem.x_ring.names()))[-1]
        if problem.transpose_lhs:
            for wg in range(config.consumers):
                src = x_gmem.at[*ks, pl.ds(place.row + wg * config.tile_m, config.tile_m)]
                plgpu.copy_gmem_to_smem(src, ring.at[slot, box, wg], smem.full.at[slot])
            return
        src = x_gmem.at[*place.product, pl.ds(place.row, problem.x_rows), *ks]
        dst = ring.at[pl.ds(problem.x_start(slot, box), problem.x_rows)]
        plgpu.copy_gmem_to_smem(src, dst, smem.full.at[slot])

    def copy_w(slot: jax.Array, box: int, ks: tuple[Any, ...], place: Place) -> None:
        columns = pl.ds(place.column, config.half)
        dst = names_of(smem.w, len(problem.w_ring.names()))[-1].at[slot, box]
        axes = "pair" if config.multicast > 1 else None
        copy = functools.partial(plgpu.copy_gmem_to_smem, barrier=smem.full.at[slot], collective_axes=axes)
        if config.gated:  # gates, and then the values beside them
            copy(w_gmem.at[columns, *ks], dst.at[pl.ds(0, config.half)])
            values = pl.ds(problem.columns + place.column, config.half)
            copy(w_gmem.at[values, *ks], dst.at[pl.ds(config.half, config.half)])
        else:
            index = (columns, *ks) if problem.transpose_rhs else (*ks, columns)
            copy(w_gmem.at[*place.product, *index], dst)

    @plgpu.warp_map
    def _(warp: jax.Array) -> None:
        pl.when(warp == 0)(lambda: stream(copy_w))
        pl.when(warp == 1)(lambda: stream(copy_x))


def _consume(
    problem: Problem, smem: types.SimpleNamespace, out_gmem: Ref, in_global: tuple[Ref, ...]
) -> None:
    """Multiplies, merges and stores this warpgroup's rows of every tile."""
    wg, config = lax.axis_index("wg"), problem.config
    x_src = names_of(smem.x, len(problem.x_ring.names()))[0]
    w_src = names_of(smem.w, len(problem.w_ring.names()))[0]
    out_names = len(problem.out_ring.names())
    if problem.shares:
        saved, *out_smem = names_of(smem.saved_and_out, 1 + out_names)
    else:
        saved, out_smem = getattr(smem, "saved", None), list(names_of(smem.out, out_names))
    homes = homes_of(problem, saved, in_global)
    exchange = Exchange(problem, smem, in_global) if config.split > 1 else None

    def multiply(acc: Ref, count: jax.Array) -> jax.Array:
        """Adds one stage's product to acc, in the background, and returns the stage's slot."""
        slot = lax.rem(count, jnp.int32(config.stages))
        plgpu.barrier_wait(smem.full.at[slot])
        for box in range(config.boxes):
            a = problem.x_window(x_src, slot, box, wg)
            b = w_src.at[slot, box]
            plgpu.wgmma(acc, a, b.transpose((1, 0)) if problem.transpose_rhs else b)
        return slot

    loop = LeafLoop(
        multiply=multiply,
        free=lambda slot: plgpu.barrier_arrive(smem.empty.at[slot]),
        products=config.boxes,
        steps=problem.leaf_steps,
        shape=(config.tile_m, config.tile_n),
        block=config.block,
    )

    def finish(value: Value, place: Place, tiles: jax.Array) -> None:
        if config.gated:
            value = _gate(value, problem.out_dtype)
        if exchange is not None:
            value = exchange.join(value, tiles)
            place = place._replace(column=place.column + lax.axis_index("part") * config.out_columns)
        _store(problem, value, out_smem, out_gmem, place)

    def climb(level: int, held: "_Held") -> None:
        """Merges a complete subtree with its left sibling, or lets it wait for its right one."""
        if level == problem.levels:
            finish(held.value, held.place, held.tiles)
            return

        def wait() -> None:
            if problem.shares:  # the last tile's output has to leave this memory
                pl.when(held.group == 0)(lambda: plgpu.wait_smem_to_gmem(0, wait_read_only=True))
            for home, block in zip(homes[level], held.value, strict=True):
                home.keep(block)

        def merge() -> None:
            merged = [home.take() + block for home, block in zip(homes[level], held.value, strict=True)]
            climb(level + 1, dataclasses.replace(held, value=merged))

        lax.cond((held.group >> level) & 1 == 1, merge, wait)

    def tile_at_once(place: Place, carry: tuple[jax.Array, jax.Array]) -> Any:
        count, tiles = carry
        finish(loop.group(count, problem.group, lambda: None), place, tiles)
        return count + problem.part_steps, tiles + 1

    def tile_in_groups(place: Place, carry: tuple[jax.Array, jax.Array, "_Held"]) -> Any:
        count, tiles, held = carry

        def group(index: jax.Array, carry: tuple[jax.Array, "_Held"]) -> tuple[jax.Array, "_Held"]:
            count, held = carry

            def begun() -> None:
                # The last group's sum climbs the tree, and maybe leaves, while the tensor cores have this one's work.
                pl.when(count > 0)(lambda: climb(0, held))

            value = loop.group(count, problem.group, begun)
            held = _Held(value=value, group=index, place=place, tiles=tiles)
            return count + problem.group * problem.leaf_steps, held

        # A loop, not unrolled: the code of eight leaves would not stay in the instruction cache.
        groups = lax.optimization_barrier(
            jnp.int32(problem.part_leaves // problem.group)
        )  # as with a leaf's steps
        count, held = lax.fori_loop(0, groups, group, (count, held))
        return count, tiles + 1, held

    def cut_tile(count: jax.Array, begun: Callable[[], None]) -> None:
        # Code of its own, which runs once: the loop over the whole tiles stays as short, and as quick to fetch.
        value = loop.group(count, problem.cut_leaves, begun)
        place = problem.cut_place()
        value = Exchange(problem, smem, in_global).join_once(value)
        place = place._replace(column=place.column + lax.axis_index("part") * config.out_columns)
        _store(problem, value, out_smem, out_gmem, place)

    zero = lax.optimization_barrier(jnp.int32(0))
    if not config.overlap:
        count, tiles = problem.walk(tile_at_once, (zero, zero))
        held = None
    else:
        none = columns_of(jnp.zeros((config.tile_m, config.tile_n), jnp.float32), config.block)
        nothing = _Held(none, zero, Place(zero, zero, (zero,) * len(problem.lead)), zero)
        count, tiles, held = problem.walk(tile_in_groups, (zero, zero, nothing))

    def end() -> None:
        if held is not None:
            pl.when(count > 0)(lambda: climb(0, held))

    if problem.cut_tiles:
        lax.cond(problem.has_cut_tile(), lambda: cut_tile(count, end), end)
    else:
        end()
    if exchange is not None:
        exchange.drain(tiles)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["value", "group", "place", "tiles"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class _Held:
    """A group's sum that has not climbed yet: its place in the tile, the tile, and how many tiles came before."""

    value: Value
    group: jax.Array
    place: Place
    tiles: jax.Array


def _gate(value: Value, dtype: Any) -> Value:
    """SwiGLU of the first half of the columns, the gates, and the second."""
    rounded = [block.astype(dtype).astype(jnp.float32) for block in value]
    count = len(rounded) // 2
    return [silu(gate) * up for gate, up in zip(rounded[:count], rounded[count:], strict=True)]


def _store(problem: Problem, value: Value, out_smem: list[Ref], out_gmem: Ref, place: Place) -> None:
    """Rounds a warpgroup's rows once and stores them through shared memory, block by block."""
    wg = lax.axis_index("wg")
    row = place.row + wg * problem.config.tile_m
    staged, src = out_smem[0], out_smem[-1]  # the warpgroups' name and TMA's
    _, slots, height, width = problem.out_ring.shape
    blocks = [block for wide in value for block in columns_of(wide.astype(problem.out_dtype), width)]
    for i, block in enumerate(blocks):
        slot = i % slots
        # Wait for the last copy out of this slot. The last tile's last copy may be that, or else one of the two last.
        pending = slots - 1 if i or len(blocks) % slots == 0 else 0
        plgpu.wait_smem_to_gmem(pending, wait_read_only=True)
        staged.at[wg, slot][...] = block
        plgpu.commit_smem()
        across = pl.ds(place.column + i * width, width)
        dst = out_gmem.at[*place.product, pl.ds(row, height), across]
        plgpu.copy_smem_to_gmem(src.at[wg, slot], dst)


def _interpreted_clusters(config: MosaicConfig) -> int:
    """Two clusters, so that they share out the tiles; one where the threads of two could wait for each other forever.

    XLA's CPU client runs at most 32 computations at a time on a device, and each of these is one: the launch, every
    warpgroup, and the two warps of each producer. A cluster of 8 has one too many: it is for a single small tile.
    """
    return 2 if 1 + 2 * config.cluster * (config.consumers + 3) <= 32 else 1


def _resident_clusters(size: int) -> int:
    """Clusters of `size` CTAs that the default device, which must be a Hopper GPU, runs at once."""
    device = jax.extend.backend.get_default_device()
    capability = str(getattr(device, "compute_capability", "none"))
    if not capability.startswith("9."):
        raise ValueError(
            f"mosaic_gpu needs a Hopper GPU (compute capability 9.x) and the default device is {device} "
            f"({capability}); use backend='reference' there"
        )
    sms = getattr(device, "core_count", RESIDENT_CLUSTERS[1])
    return RESIDENT_CLUSTERS[size] if sms == RESIDENT_CLUSTERS[1] else max(1, sms // size * 7 // 8)
