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
# # Training on any mesh
#
# Training adds up more than inference does: the gradient of a weight is a sum over all tokens of the batch, which data
# and fsdp axes cut, and the gradient of an activation is a sum over a dimension that tp cuts. With ordinary numerics
# the loss curve is that of one mesh. Here it is the same on all of them, and a run may move from one mesh to another
# in the middle.

# %%
import math
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import tbik_jax
from tbik_jax.mesh import mesh_label
from tbik_jax.models import Qwen3, Qwen3Config
from tbik_jax.optimizers import clip_by_global_norm, mixed_precision

jax.config.update("jax_num_cpu_devices", 8)  # concerns the CPU alone; GPUs are used where there are any
devices = len(jax.devices())
print(f"{devices} x {jax.devices()[0].device_kind}")

config = Qwen3Config(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=16,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=True,
)

# %% [markdown]
# ## Something to learn
#
# Rows of counting, `a, a + s, a + 2s, ...` modulo 128 with a step `s` of 1 to 4: from two tokens the third follows. A
# batch is a function of the step's number alone.

# %%
ROWS, WIDTH, STEPS = 8, 16, 24  # 128 tokens a batch are eight leaves of 16, the smallest that there are


def batch(step):
    """Tokens, and a weight for each that is predicted: 1 from the third on."""
    rng = np.random.default_rng(step)
    start, stride = rng.integers(0, config.vocab_size, (ROWS, 1)), rng.integers(1, 5, (ROWS, 1))
    tokens = (start + stride * np.arange(WIDTH)) % config.vocab_size
    weights = np.ones((ROWS, WIDTH - 1), np.float32)
    weights[:, 0] = 0
    return {"tokens": tokens.astype(np.int32), "weights": weights}


def loss_fn(model, batch):
    """Each token's loss and its weight; the mean over the batch is taken in tree order."""
    return -model.logprobs(batch["tokens"]), batch["weights"]


# %% [markdown]
# The loop is Flax's and optax's. `train_step` is the compiled step, `clip_by_global_norm` the one whose norm is a
# tree, and `mixed_precision` keeps float32 master weights beside the model's bfloat16.


# %%
class Run:
    """A training run on one mesh."""

    def __init__(self, sizes, numerics):
        self.mesh = tbik_jax.make_mesh(**sizes)
        self.model = tbik_jax.shard_model(Qwen3(config, rngs=nnx.Rngs(0)), self.mesh)
        tx = optax.chain(clip_by_global_norm(1.0, mesh=self.mesh), optax.adamw(1e-2))
        self.optimizer = nnx.Optimizer(self.model, mixed_precision(tx, master=True), wrt=nnx.Param)
        self.step = tbik_jax.train_step(loss_fn, mesh=self.mesh, numerics=numerics, remat=False)

    def train(self, first, last):
        """The losses of steps first .. last - 1."""
        losses = [float(self.step(self.model, self.optimizer, batch(step))) for step in range(first, last)]
        return np.asarray(losses, np.float32)

    def fingerprint(self):
        """Over the bits of parameters, moments, master weights and step count."""
        return tbik_jax.fingerprint(jax.tree.leaves(nnx.state((self.model, self.optimizer))))


large = next(
    sizes
    for sizes in ({"data": 2, "fsdp": 2, "tp": 2}, {"fsdp": 2, "tp": 2}, {"tp": 2}, {"tp": 1})
    if math.prod(sizes.values()) <= devices
)
meshes = [{"tp": 1}, large] if devices > 1 else [large]
folder = tempfile.TemporaryDirectory()  # for a checkpoint, see below
runs, losses = {}, {}
for numerics in ("invariant", "plain"):
    for sizes in meshes:
        run = Run(sizes, numerics)
        key = numerics, mesh_label(run.mesh)
        half = run.train(0, STEPS // 2)
        if key == ("invariant", "1 device"):
            tbik_jax.save_checkpoint(folder.name, STEPS // 2, model=run.model, optimizer=run.optimizer)
        runs[key], losses[key] = run, np.concatenate([half, run.train(STEPS // 2, STEPS)])
        print(f"{numerics:9}  {key[1]:20}  last loss {losses[key][-1]:.7f}  state {run.fingerprint()[:16]}")

# %% [markdown]
# The losses of every step, and the whole state after the last one with moments and master weights: how many different
# ones are there?

# %%
counts = {}
for name in ("invariant", "plain"):
    keys = [key for key in runs if key[0] == name]
    counts[name] = (
        len({losses[key].tobytes() for key in keys}),
        len({runs[key].fingerprint() for key in keys}),
    )
    print(f"{name:9}  {len(keys)} meshes, {counts[name][0]} loss curves, {counts[name][1]} final states")
assert counts["invariant"] == (1, 1)
assert counts["plain"] == (len(meshes),) * 2

# %%
figure, panels = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained")
for (numerics, mesh), loss in losses.items():
    style = {"plain": {"color": "C0", "linewidth": 4, "alpha": 0.4}, "invariant": {"color": "C1"}}[numerics]
    style |= {"label": f"{numerics}, {mesh}", "linestyle": "-" if mesh == "1 device" else ":"}
    panels[0].plot(loss, **style)
    if mesh != "1 device":
        panels[1].plot(np.abs(loss - losses[numerics, "1 device"]), color=style["color"], marker=".")
panels[0].set_ylabel("loss")
panels[1].set_ylabel("|loss - loss on 1 device|")
panels[1].set_yscale("symlog", linthresh=1e-6)
panels[1].set_ylim(bottom=-2e-7)
for panel in panels:
    panel.set_xlabel("step")
    panel.grid(alpha=0.3)
panels[0].legend(fontsize=8)
plt.show()

# %% [markdown]
# On the left all curves lie on each other: so small a model learns alike with both numerics. On the right is how far a
# mesh is from one device. What plain numerics have lost at the first steps the optimiser carries on, so a run cannot
# be repeated, nor a change be told from noise, on another number of GPUs.
#
# ## Moving in the middle
#
# The run on one device saved a checkpoint after half of the steps. The other mesh takes it up and trains the other
# half. It ends where the run that never moved did, to the last bit of the optimiser's state.

# %%
never_moved = runs["invariant", "1 device"].fingerprint()
moved = runs["invariant", mesh_label(tbik_jax.make_mesh(**large))]
found = tbik_jax.restore_checkpoint(
    folder.name, model=moved.model, optimizer=moved.optimizer, mesh=moved.mesh
)
assert moved.fingerprint() != never_moved  # it is back at half
rest = moved.train(found.step, STEPS)
print(f"1 device up to step {found.step}, then {mesh_label(moved.mesh)}: ", end="")
print(f"last loss {rest[-1]:.7f}  state {moved.fingerprint()[:16]}")
assert np.array_equal(rest, losses["invariant", "1 device"][found.step :])
assert moved.fingerprint() == never_moved
folder.cleanup()

# %% [markdown]
# `examples/train.py` is the same as a program, with progress and checkpoints, and the page *training* of the
# documentation says what a loss function may do.
