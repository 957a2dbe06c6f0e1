"""Steps of GRPO at real shapes, invariant beside plain by turns: seconds a phase, and how far apart both are.

    python -m benchmarks.rl_speed --model 0.6B --rollout-mesh tp=2 --train-mesh fsdp=2 --out rl_speed.json
    python -m benchmarks.rl_speed --model 0.6B --rollout-mesh tp=1 --train-mesh tp=1 --apart

Weights, prompts and rewards are random: neither speed nor bits depend on their sense. A step hands the weights over,
samples `--prompts` groups of `--group` continuations of exactly `--new` tokens, and trains on them once. Every sampled
token's log-probability is compared. The first step of each numerics compiles and is not counted. `--dry` runs a tiny
model on the CPU.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

import tbik_jax
from benchmarks.matmul_speed import dump
from tbik_jax import rl, synthetic
from tbik_jax.bench.environment import environment
from tbik_jax.models import Qwen3, Qwen3Config
from tbik_jax.optimizers import clip_by_global_norm, mixed_precision

PHASES = ("hand_over_s", "rollout_s", "train_s")


def main(argv: list[str]) -> int:
    args = _arguments(argv)
    trainer = _mesh(args.train_mesh, jax.devices())
    rest = jax.devices()[trainer.devices.size :] if args.apart else jax.devices()
    tasks = {name: _Task(name, args, trainer, _mesh(args.rollout_mesh, rest)) for name in args.numerics}
    data: dict[str, Any] = {
        "environment": environment(),
        "arguments": {name: value for name, value in vars(args).items() if name != "out"},
        "rows": [],
    }
    for step in range(args.steps + 1):
        for task in tasks.values():
            row = task.step(step)
            data["rows"].append(row)
            print(json.dumps(row), flush=True)
            data |= _medians(data["rows"])
            if args.out is not None:  # at every step: a run that is ended from outside keeps what it has
                args.out.write_text(dump(data))
    print(json.dumps({key: data.get(key) for key in ("median_s", "time_against_plain")}))
    return int(any(row["different"] for row in data["rows"] if row["numerics"] == "invariant"))


def _medians(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Median seconds of each phase, of the steps that compile nothing, and invariant's over plain's."""
    timed: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["step"] > 0:
            timed.setdefault(row["numerics"], []).append(row)
    phases = *PHASES, "step_s"
    median = {
        name: {phase: round(statistics.median(row[phase] for row in mine), 4) for phase in phases}
        for name, mine in timed.items()
    }
    found: dict[str, Any] = {"median_s": median}
    if {"invariant", "plain"} <= set(median):
        ratios = {phase: round(median["invariant"][phase] / median["plain"][phase], 4) for phase in phases}
        found["time_against_plain"] = ratios
    return found


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="0.6B")
    parser.add_argument("--layers", type=int, help="fewer, to compile sooner")
    parser.add_argument("--rollout-mesh", default="tp=2", help="axes with commas")
    parser.add_argument("--train-mesh", default="fsdp=2")
    parser.add_argument("--apart", action="store_true", help="let the meshes share no device")
    parser.add_argument("--prompts", type=int, default=4, help="of a step")
    parser.add_argument("--group", type=int, default=8, help="samples of a prompt")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--steps", type=int, default=3, help="counted steps")
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--scan-layers", action="store_true", help="of the trainer: compiles one layer")
    parser.add_argument("--numerics", nargs="+", default=["invariant", "plain"])
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--dry", action="store_true", help="a tiny model, for a try on the CPU")
    args = parser.parse_args(argv)
    if args.dry:
        args.prompts, args.group, args.prompt, args.new, args.steps = 2, 4, 8, 8, 1
    return args


def _mesh(text: str, devices: list[jax.Device]) -> Mesh:
    sizes = {name: int(size) for name, size in (part.split("=") for part in text.split(","))}
    return tbik_jax.make_mesh(**sizes, devices=devices)


class _Task:
    """A run with one numerics; all begin with the same weights."""

    def __init__(self, numerics: Any, args: argparse.Namespace, trainer: Mesh, rollout: Mesh):
        self.numerics, self.args, self.mesh = numerics, args, rollout
        raw = synthetic.small_config() if args.dry else synthetic.qwen3_config(args.model)
        raw |= {"num_hidden_layers": args.layers} if args.layers else {}
        self.model = tbik_jax.shard_model(Qwen3(Qwen3Config.from_dict(raw), rngs=nnx.Rngs(0)), trainer)
        tx = optax.chain(clip_by_global_norm(1.0, mesh=trainer), optax.adamw(1e-5))
        self.optimizer = nnx.Optimizer(self.model, mixed_precision(tx, master=True), wrt=nnx.Param)
        self._step = tbik_jax.train_step(
            rl.GrpoLoss(),
            mesh=trainer,
            numerics=numerics,
            microbatches=args.microbatches,
            scan_layers=True if args.scan_layers else None,
            has_aux=True,
        )

    def step(self, index: int) -> dict[str, Any]:
        """Seconds of each phase, and the divergence."""
        args, times = self.args, [time.perf_counter()]
        policy = rl.hand_over(self.model, self.mesh)
        jax.block_until_ready(nnx.state(policy))
        times.append(time.perf_counter())
        rng = np.random.default_rng(index)
        prompts = rng.integers(0, self.model.config.vocab_size, (args.prompts, args.prompt))
        rollout = rl.sample_groups(
            policy,
            list(prompts),
            group_size=args.group,
            step=index,
            mesh=self.mesh,
            max_new_tokens=args.new,
            numerics=self.numerics,
        )
        del policy
        times.append(time.perf_counter())
        rewards = rollout.rewards(lambda prompt, tokens: float(tokens.sum() % 2))
        batch = rollout.batch(self.model, rl.group_advantages(rewards))
        _, aux = self._step(self.model, self.optimizer, batch)
        report = rl.divergence(batch, aux["logprobs"])
        jax.block_until_ready(nnx.state(self.model))
        times.append(time.perf_counter())
        return {
            "numerics": self.numerics,
            "step": index,
            **dict(zip(PHASES, np.diff(times).round(4).tolist(), strict=True)),
            "step_s": round(times[-1] - times[0], 4),
            "tokens": report.tokens,
            "different": report.different,
            "max_abs": report.max_abs,
            "min_ratio": report.min_ratio,
            "max_ratio": report.max_ratio,
            "kl": report.kl,
        }


if __name__ == "__main__":
    if "--dry" in sys.argv:
        jax.config.update("jax_num_cpu_devices", 8)
    sys.exit(main(sys.argv[1:]))
