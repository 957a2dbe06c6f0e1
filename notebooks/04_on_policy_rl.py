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
# # On-policy, to the last bit
#
# In reinforcement learning one program samples (tensor-parallel, with a cache, a token at a time) and another trains
# (FSDP, whole sequences, with gradients). Both compute the probability of every sampled token. If they disagree, the
# importance ratio `p_train / p_rollout` is not 1 although nothing was updated in between, and the gradient is that of
# another policy than the one that acted.
#
# Here a small Qwen3 learns by GRPO, with the rollout on one mesh and the trainer on another, and every token's two
# probabilities are compared at every step.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import tbik_jax
from tbik_jax import rl
from tbik_jax.mesh import mesh_label
from tbik_jax.models import Qwen3, Qwen3Config
from tbik_jax.optimizers import clip_by_global_norm, mixed_precision

jax.config.update("jax_num_cpu_devices", 8)  # concerns the CPU alone; GPUs are used where there are any
devices = len(jax.devices())
rollout_mesh = tbik_jax.make_mesh(tp=next(tp for tp in (4, 2, 1) if tp <= devices))
train_mesh = tbik_jax.make_mesh(fsdp=min(2, devices))
print(f"{devices} x {jax.devices()[0].device_kind}: ", end="")
print(f"rollout on {mesh_label(rollout_mesh)}, trainer on {mesh_label(train_mesh)}")

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
# ## The task
#
# Eight prompts of four tokens, eight samples each, eight new tokens a sample. The reward is the share of even tokens,
# which is about one half at first.

# %%
PROMPTS, GROUP, NEW_TOKENS, WIDTH, STEPS = 8, 8, 8, 16, 16


def prompts(step):
    """Token ids, a function of the step alone."""
    return np.random.default_rng(step).integers(0, config.vocab_size, (PROMPTS, 4)).tolist()


def reward(prompt, tokens):
    """The share of even tokens."""
    return float(np.mean(tokens % 2 == 0))


# %% [markdown]
# ## The loop
#
# `hand_over` moves the weights to the rollout's mesh, `sample_groups` samples, `GrpoLoss` is the clipped policy loss,
# and `divergence` compares: it takes the log-probabilities that the train step itself computed, so nothing extra is
# run.


# %%
def train(numerics):
    """Reward, divergence and the tokens' log ratios of every step."""
    model = tbik_jax.shard_model(Qwen3(config, rngs=nnx.Rngs(0)), train_mesh)
    tx = optax.chain(clip_by_global_norm(1.0, mesh=train_mesh), optax.adamw(1e-2, weight_decay=0.0))
    optimizer = nnx.Optimizer(model, mixed_precision(tx, master=True), wrt=nnx.Param)
    step = tbik_jax.train_step(rl.GrpoLoss(), mesh=train_mesh, numerics=numerics, remat=False, has_aux=True)
    history = []
    for index in range(STEPS):
        policy = rl.hand_over(model, rollout_mesh)
        rollout = rl.sample_groups(
            policy,
            prompts(index),
            group_size=GROUP,
            step=index,
            mesh=rollout_mesh,
            max_new_tokens=NEW_TOKENS,
            numerics=numerics,
        )
        rewards = rollout.rewards(reward)
        batch = rollout.batch(model, rl.group_advantages(rewards), width=WIDTH)
        _, aux = step(model, optimizer, batch)
        sampled = batch["weights"] > 0
        log_ratio = (np.asarray(aux["logprobs"], np.float64) - batch["rollout_logprobs"])[sampled]
        history.append((rewards.mean(), rl.divergence(batch, aux["logprobs"]), log_ratio))
    return history


history = {numerics: train(numerics) for numerics in ("plain", "invariant")}

# %% [markdown]
# ## How far apart are rollout and trainer?

# %%
for numerics, steps in history.items():
    reports = [report for _, report, _ in steps]
    tokens, different = (sum(getattr(report, name) for report in reports) for name in ("tokens", "different"))
    low, high = min(report.min_ratio for report in reports), max(report.max_ratio for report in reports)
    print(
        f"{numerics:9}  {different} of {tokens} tokens with other bits, ratios {low:.4f} .. {high:.4f}, "
        f"mean KL {np.mean([report.kl for report in reports]):.1e}, reward {steps[0][0]:.2f} -> {steps[-1][0]:.2f}"
    )

for _, report, _ in history["invariant"]:
    report.check()  # raises DivergenceError, with the first token, if a bit differs
    assert (report.different, report.min_ratio, report.max_ratio, report.kl) == (0, 1.0, 1.0, 0.0)
assert all(report.different > 0 for _, report, _ in history["plain"])

# %% [markdown]
# A ratio of 1 here means the number 1: not one bit differs on any token of any step. No correction, truncation or
# importance weight for "training-inference mismatch" is needed, because there is none.

# %%
figure, panels = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
for numerics, steps in history.items():
    color = {"plain": "C0", "invariant": "C1"}[numerics]
    panels[0].plot([reward for reward, _, _ in steps], color=color, label=numerics)
    panels[1].plot([report.kl for _, report, _ in steps], color=color, marker=".", label=numerics)
    ratios = np.exp(np.concatenate([log_ratio for _, _, log_ratio in steps]))
    panels[2].hist(ratios, bins=np.linspace(0.95, 1.05, 81), color=color, alpha=0.7, label=numerics)
panels[0].set_title("reward", fontsize=10)
panels[1].set_title("KL(rollout || trainer), nats a token", fontsize=10)
panels[1].set_yscale("symlog", linthresh=1e-6)
panels[1].set_ylim(bottom=-2e-7)
panels[2].set_title("p_train / p_rollout of all sampled tokens", fontsize=10)
panels[2].set_yscale("log")
for panel in panels[:2]:
    panel.set_xlabel("step")
    panel.grid(alpha=0.3)
panels[0].legend(fontsize=9)
plt.show()
assert history["invariant"][-1][0] > history["invariant"][0][0]

# %% [markdown]
# On a task of a few tokens the difference harms nothing: both runs learn. What it does to long chains of thought, to
# mixtures of experts and to off-by-a-little policies is what papers on the mismatch are about; the page *rl* of the
# documentation lists what would break the guarantee, and how each shows itself.
