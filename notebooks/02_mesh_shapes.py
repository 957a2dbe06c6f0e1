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
# # One prompt, many meshes
#
# The same weights, the same prompt, temperature 0. On one device, on two, on eight, alone or in a batch: one answer or
# several? This notebook asks a Qwen3 with ordinary numerics and with invariant ones, and looks at where answers part.
#
# The model is small and its weights are random, so the text means nothing; how its probabilities move is what matters
# here. For a real one take `tbik_jax.load("path-or-hub-id")`.

# %%
import math

import jax
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import tbik_jax
from tbik_jax.divergence import judge
from tbik_jax.mesh import mesh_label
from tbik_jax.models import Qwen3, Qwen3Config

jax.config.update("jax_num_cpu_devices", 8)  # concerns the CPU alone; GPUs are used where there are any
devices = len(jax.devices())
print(f"{devices} x {jax.devices()[0].device_kind}")

config = Qwen3Config(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=16,
    max_position_embeddings=512,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=False,
)
model = Qwen3(config, rngs=nnx.Rngs(0))  # bfloat16
prompt = [3, 1, 4, 1, 5, 9, 2, 6]
NEW_TOKENS = 88

# %% [markdown]
# ## Meshes and batches
#
# Meshes have three axes: `tp` cuts every layer, `data` and `fsdp` share out the batch. The prompt is asked alone, or
# as the first of four. Configurations that this machine has no devices for are left out.

# %%
others = np.random.default_rng(0).integers(0, config.vocab_size, (3, len(prompt))).tolist()
cases = [
    (sizes, batch)
    for sizes, batch in (
        ({"tp": 1}, [prompt]),
        ({"tp": 1}, [prompt, *others]),
        ({"tp": 2}, [prompt]),
        ({"tp": 8}, [prompt]),
        ({"data": 3, "tp": 2}, [prompt, *others]),
    )
    if math.prod(sizes.values()) <= devices
]
meshes = [tbik_jax.make_mesh(**sizes) for sizes, _ in cases]
labels = [f"{mesh_label(mesh)}, batch {len(batch)}" for mesh, (_, batch) in zip(meshes, cases, strict=True)]


def outputs(numerics):
    """(tokens, log-probabilities) of the prompt in every configuration."""
    found = []
    for mesh, (_, batch) in zip(meshes, cases, strict=True):
        out = tbik_jax.generate(model, batch, mesh=mesh, max_new_tokens=NEW_TOKENS, numerics=numerics)
        found.append((out.tokens[0], out.logprobs[0]))
    return found


results = {numerics: outputs(numerics) for numerics in ("plain", "invariant")}

# %% [markdown]
# ## How many answers?

# %%
for numerics, found in results.items():
    verdict = judge([found])
    print(
        f"{numerics:9}  {verdict.distinct[0]} distinct outputs of {verdict.configurations}, "
        f"the probability of a token differs by up to {verdict.divergence:.1e}"
    )
assert judge([results["invariant"]]).same_bits
assert devices == 1 or not judge([results["plain"]]).same_bits

# %% [markdown]
# Not only the tokens: with invariant numerics their log-probabilities are the same bits as well, as a hash over both
# shows. Another machine with this kind of device and these versions prints the same one.

# %%
for label, pair in zip(labels, results["invariant"], strict=True):
    print(f"{label:26} {tbik_jax.fingerprint(list(pair))[:16]}")

# %% [markdown]
# ## Where the answers part
#
# Every row is a configuration, every column a position; a colour is a token. Up to the first token that is another
# one, all rows are alike. After it the model continues another text, so nothing comes back together.

# %%
figure, panels = plt.subplots(2, 1, figsize=(11, 4), layout="constrained", sharex=True)
for panel, (numerics, found) in zip(panels, results.items(), strict=True):
    tokens = np.stack([tokens for tokens, _ in found])
    panel.imshow(
        tokens, aspect="auto", cmap="nipy_spectral", interpolation="nearest", vmin=0, vmax=config.vocab_size
    )
    for row, line in enumerate(tokens != tokens[0]):
        if line.any():
            panel.plot([line.argmax() - 0.5] * 2, [row - 0.5, row + 0.5], color="white", linewidth=3)
    panel.set_title(numerics, fontsize=10)
    panel.set_yticks(range(len(labels)), labels, fontsize=8)
panels[-1].set_xlabel("new token")
plt.show()

# %% [markdown]
# The white bars are where a row leaves the first one. Long before, the probabilities are already different. This is
# the difference of each token's log-probability from the first configuration's, as far as the tokens before are the
# same:

# %%
figure, panels = plt.subplots(1, 2, figsize=(11, 3.4), layout="constrained", sharey=True)
for panel, (numerics, found) in zip(panels, results.items(), strict=True):
    first_tokens, first = found[0]
    for label, (tokens, logprobs) in zip(labels[1:], found[1:], strict=True):
        apart = np.flatnonzero(tokens != first_tokens)
        shared = apart[0] if apart.size else len(tokens)
        panel.plot(np.abs(logprobs - first)[:shared], marker=".", linewidth=0.7, label=label)
    panel.set_yscale("symlog", linthresh=1e-4)
    panel.set_ylim(bottom=-2e-5)
    panel.set_title(numerics, fontsize=10)
    panel.set_xlabel("new token")
    panel.grid(alpha=0.3)
panels[0].set_ylabel(f"|log p - log p of ({labels[0]})|")
panels[1].legend(fontsize=7, ncols=2)
plt.show()

# %% [markdown]
# ## How little it takes
#
# An answer parts where the two best tokens are close. Here are the plain rows' first other tokens: what each
# configuration took there, and how probable it was.

# %%
first_tokens, first = results["plain"][0]
for label, (tokens, logprobs) in zip(labels[1:], results["plain"][1:], strict=True):
    apart = np.flatnonzero(tokens != first_tokens)
    if apart.size:
        at = apart[0]
        print(
            f"{label:26} token {at:3}: {tokens[at]:3} with p={np.exp(logprobs[at]):.4f}, "
            f"where {labels[0]} took {first_tokens[at]:3} with p={np.exp(first[at]):.4f}"
        )
    else:
        print(f"{label:26} the same tokens")

# %% [markdown]
# ## A sampled answer is no different
#
# Noise comes from (seed, position, vocabulary id) alone. So temperature 1 is as reproducible as temperature 0:

# %%
sampling = tbik_jax.SamplingParams(temperature=1.0, seed=7)
prints = []
for mesh, (_, batch) in list(zip(meshes, cases, strict=True))[1:]:
    out = tbik_jax.generate(model, batch, mesh=mesh, max_new_tokens=NEW_TOKENS, sampling=sampling)
    prints.append(tbik_jax.fingerprint([out.tokens[0], out.logprobs[0]])[:16])
print(prints)
assert len(set(prints)) == 1

# %% [markdown]
# And teacher forcing, the whole sequence in one pass and nothing generated, gives the same bits again. That is what
# reinforcement learning needs (`04_on_policy_rl`):

# %%
tokens, logprobs = results["invariant"][0]
again = tbik_jax.score(model, [[*prompt, *tokens.tolist()]], mesh=meshes[-1])[0][len(prompt) - 1 :]
print(
    "score and generate agree on",
    int((again.view(np.int32) == logprobs.view(np.int32)).sum()),
    "of",
    len(again),
)
assert np.array_equal(again.view(np.int32), logprobs.view(np.int32))
