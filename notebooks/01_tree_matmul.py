# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Why the order of a sum matters, and a tree that fixes it
#
# A tensor-parallel layer cuts a matrix product along K. Each rank adds up its part, and the ranks add up theirs. How
# many ranks there are decides who meets whom, and floating-point addition is not associative: so the number of GPUs is
# in the result. This notebook shows where that comes from, and one order of adding that every number of ranks can
# keep.
#
# It runs as it stands on a laptop, on eight virtual CPU devices, and on a machine with GPUs.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import PartitionSpec as P

import tbik_jax

jax.config.update("jax_num_cpu_devices", 8)  # concerns the CPU alone; GPUs are used where there are any
sizes = [tp for tp in (1, 2, 4, 8) if tp <= len(jax.devices())]
print(f"{len(jax.devices())} x {jax.devices()[0].device_kind}, so tp = {sizes}")

# %% [markdown]
# ## Addition rounds
#
# Three numbers suffice. In float32 there is no room for a 1 next to 100 million:

# %%
a, b, c = np.float32(1e8), np.float32(-1e8), np.float32(1)
print("(a + b) + c =", (a + b) + c)
print("a + (b + c) =", a + (b + c))
assert (a + b) + c != a + (b + c)

# %% [markdown]
# A long sum loses a little at every add, and another little in every other order. Here are the same 4096 numbers,
# added one after the other in 2000 orders:

# %%
rng = np.random.default_rng(0)
terms = rng.standard_normal(4096).astype(np.float32)
exact = float(np.sum(terms.astype(np.float64)))
orders = np.stack([rng.permutation(terms) for _ in range(2000)], axis=1)
sums = np.add.accumulate(orders, axis=0)[-1]  # adds row after row, in float32

figure, panel = plt.subplots(figsize=(8, 3), layout="constrained")
values, counts = np.unique(sums.astype(np.float64), return_counts=True)
panel.bar((values - exact) * 1e6, counts, width=0.7e6 * np.diff(values).min())
panel.axvline(0, color="black", linewidth=1)
panel.set_xlabel("sum in float32 minus the exact sum, millionths")
panel.set_ylabel("orders")
plt.show()
print(f"{len(values)} different sums from {sums.size} orders of the same numbers")
assert len(values) > 20

# %% [markdown]
# None of them is wrong. But a greedy decoder takes the largest logit, and where two are close the order decides which
# that is; from that token on the texts are different ones.
#
# ## What tensor parallelism does to the order
#
# `x @ w` with K cut over t ranks, as JAX users write it: `jnp.dot` on each rank, then `lax.psum`.


# %%
def plain(x, w):
    """x [M, K/tp] @ w [K/tp, N], added over tp."""
    return jax.lax.psum(jnp.dot(x, w), "tp")


def over_ranks(function, tp):
    """`function` on a mesh of `tp` devices, with K cut over them."""
    mesh = tbik_jax.make_mesh(tp=tp)
    cut = (P(None, "tp"), P("tp", None))
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=cut, out_specs=P(), check_vma=False))


def bits(x):
    """The integers behind floats, so that a comparison sees the sign of a zero and NaN too."""
    x = np.asarray(x)
    return x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def compare(outs):
    """Elements whose bits are not those of tp=1, for every tp."""
    return {tp: int((bits(out) != bits(outs[1])).sum()) for tp, out in outs.items()}


K, N = 1024, 256
x = jnp.asarray(rng.standard_normal((8, K)), jnp.bfloat16)
w = jnp.asarray(rng.standard_normal((K, N)) / np.sqrt(K), jnp.bfloat16)
plain_outs = {tp: over_ranks(plain, tp)(x, w) for tp in sizes}
print("plain: elements that differ from tp=1, of", x.shape[0] * N, ":", compare(plain_outs))
assert all(count > 0 for tp, count in compare(plain_outs).items() if tp > 1)

# %% [markdown]
# ## The tree
#
# Cut K into eight **leaves**, whatever the number of ranks. Add up each leaf in ascending k, in float32. Let the
# leaves meet in a balanced binary tree, neighbours first, and round once at the end. A rank of tp=4 has two
# neighbouring leaves, which is a whole subtree: what it adds by itself is a piece of the same tree, and so is what the
# ranks add afterwards. The colours are the ranks; grey sums are made between ranks.


# %%
COLORS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C9")  # C7 is a grey too


def draw_tree(panel, tp):
    """The tree over eight leaves; a node has the colour of the rank that computes it."""
    at = {(0, i): float(i) for i in range(8)}
    for level in (1, 2, 3):
        for i in range(8 >> level):
            at[level, i] = (at[level - 1, 2 * i] + at[level - 1, 2 * i + 1]) / 2
            for child in (2 * i, 2 * i + 1):
                panel.plot(
                    [at[level, i], at[level - 1, child]],
                    [level, level - 1],
                    color="0.6",
                    linewidth=1,
                    zorder=1,
                )
    for (level, i), across in at.items():
        leaves = 8 // tp  # of a rank
        inside = (1 << level) <= leaves
        color = COLORS[i * (1 << level) // leaves] if inside else "0.75"
        panel.scatter(across, level, s=130, color=color, zorder=2)
    panel.set_title(f"tp={tp}", fontsize=10)
    panel.set_ylim(-0.4, 3.4)
    panel.axis("off")


figure, panels = plt.subplots(1, 4, figsize=(12, 2.4), layout="constrained")
for panel, tp in zip(panels, (1, 2, 4, 8), strict=True):
    draw_tree(panel, tp)
plt.show()

# %% [markdown]
# `tree_matmul` adds up the leaves of a rank and their subtree, and hands out float32; `tree_psum` is the rest of the
# tree, over ranks, and rounds once.


# %%
def invariant(x, w, ranks):
    """x [M, K/tp] @ w [K/tp, N], added over tp in the tree of eight leaves."""
    part = tbik_jax.tree_matmul(x, w, leaves=8 // ranks, out_dtype=jnp.float32)
    return tbik_jax.tree_psum(part, "tp", out_dtype=x.dtype)


invariant_outs = {tp: over_ranks(partial(invariant, ranks=tp), tp)(x, w) for tp in sizes}
print("invariant: elements that differ from tp=1:", compare(invariant_outs))
assert not any(compare(invariant_outs).values())

# %%
figure, panel = plt.subplots(figsize=(8, 3), layout="constrained")
places = np.arange(len(sizes))
for shift, (name, outs) in zip(
    (-0.2, 0.2), {"plain": plain_outs, "invariant": invariant_outs}.items(), strict=True
):
    shares = [100 * count / (x.shape[0] * N) for count in compare(outs).values()]
    bars = panel.bar(places + shift, shares, width=0.4, label=name)
    panel.bar_label(bars, [f"{share:.0f} %" for share in shares], fontsize=9)
panel.set_xticks(places, [f"tp={tp}" for tp in sizes])
panel.set_ylabel("elements with other bits\nthan tp=1, %")
panel.margins(y=0.15)
panel.legend()
plt.show()

# %% [markdown]
# ## It is not less exact
#
# A value goes through fewer adds in a tree of eight sums than in one long chain, so nothing is lost in exchange for
# the bits. Largest errors against float64, before the last rounding to bfloat16:

# %%
reference = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
errors = {
    "jnp.dot": jnp.dot(x, w, preferred_element_type=jnp.float32),
    "one leaf": tbik_jax.tree_matmul(x, w, leaves=1, out_dtype=jnp.float32),
    "eight leaves": tbik_jax.tree_matmul(x, w, leaves=8, out_dtype=jnp.float32),
}
errors = {name: float(np.abs(np.asarray(out, np.float64) - reference).max()) for name, out in errors.items()}
for name, error in errors.items():
    print(f"{name:13} {error:.1e}")
assert errors["eight leaves"] <= errors["one leaf"]

# %% [markdown]
# ## The batch does not matter either
#
# An ordinary product also picks its tiles, and with them its order, by the number of rows. The order of `tree_matmul`
# depends on K and the number of leaves; rows are not part of it. So a row has the same bits alone as among others:

# %%
x32, w32 = (jnp.asarray(value, jnp.float32) for value in (x, w))
alone, among = tbik_jax.tree_matmul(x32[:1], w32), tbik_jax.tree_matmul(x32, w32)[:1]
print("tree_matmul, a row alone and among eight:", int((bits(alone) != bits(among)).sum()), "elements differ")
assert np.array_equal(bits(alone), bits(among))
alone, among = jnp.dot(x32[:1], w32), jnp.dot(x32, w32)[:1]
print("jnp.dot, the same:                       ", int((bits(alone) != bits(among)).sum()), "elements differ")

# %% [markdown]
# What else in a model adds up (norms, softmax, attention, gradients) has one order as well; the page *numerics* of the
# documentation states them all. The next notebook puts them together.
