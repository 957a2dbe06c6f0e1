"""One Qwen3 on one device and on four: the same bits with invariant numerics, others with plain ones.

Run it with `python examples/same_bits.py`. A checkpoint: `tbik_jax.load("path-or-hub-id", mesh=mesh)`.
"""

import jax
import numpy as np
from flax import nnx

import tbik_jax
from tbik_jax.models import Qwen3, Qwen3Config

jax.config.update("jax_num_cpu_devices", 8)  # eight virtual devices; GPUs are used where there are any

config = Qwen3Config(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=32,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=True,
)
params = Qwen3(config, rngs=nnx.Rngs(0))
prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
for numerics in ("invariant", "plain"):
    outs = [
        tbik_jax.generate(
            params, prompts, mesh=tbik_jax.make_mesh(tp=tp), max_new_tokens=16, numerics=numerics
        )
        for tp in (1, 4)
    ]
    same = all(np.array_equal(a, b) for a, b in zip(outs[0].logprobs, outs[1].logprobs, strict=True))
    print(f"{numerics}: log-probabilities on 1 and on 4 devices are {'equal' if same else 'different'}")
