"""Teaches a tiny Qwen3 to add by GRPO, rollouts on one mesh and the trainer on another, and measures the gap.

    python examples/rl_grpo.py --rollout-mesh tp=4 --train-mesh fsdp=4
    python examples/rl_grpo.py --numerics invariant,batch_invariant,plain --seeds 3 --log rl.jsonl --plot rl.png

The task needs no download: "3+4=" is to be continued by "7" and a line feed. A few supervised steps come first, then
the model's own samples are its data. Every step compares the rollout's log-probability of every sampled token with the
train step's: with invariant numerics they are the same bits, and the run ends with an error if one is not. Rewards and
parameters have the same fingerprint on every pair of meshes. Without GPUs it runs on eight virtual CPU devices.
"""

import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import typer
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TextColumn, TimeElapsedColumn

import tbik_jax
from tbik_jax import rl
from tbik_jax.mesh import mesh_label
from tbik_jax.models import Qwen3, Qwen3Config
from tbik_jax.optimizers import clip_by_global_norm, mixed_precision
from tbik_jax.steps import NUMERICS

# ---------------------------------------------------------------------------------------------------------------------
# The task: sums of two digits, in ASCII.

END = ord("\n")
WIDTH = 16  # tokens of a row; the longest is "9+9=18\n"
NEW_TOKENS = 4


def problems(rng: np.random.Generator, count: int) -> list[str]:
    """Prompts such as "3+4="."""
    return [f"{a}+{b}=" for a, b in rng.integers(0, 10, (count, 2))]


def answer(prompt: str) -> str:
    """What is to follow, with the end token."""
    a, b = prompt.rstrip("=").split("+")
    return f"{int(a) + int(b)}\n"


def encode(text: str) -> np.ndarray:
    """ASCII codes, int32."""
    return np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int32)


def reward(prompt: np.ndarray, tokens: np.ndarray) -> float:
    """1 for the right sum, 0 for anything else."""
    right = encode(answer("".join(map(chr, prompt))))
    return float(np.array_equal(tokens, right))


def supervised_batch(rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    """Problems with their answers; weights are 1 where the next token belongs to the answer."""
    tokens = np.zeros((rows, WIDTH), np.int32)
    weights = np.zeros((rows, WIDTH - 1), np.float32)
    for i, prompt in enumerate(problems(rng, rows)):
        row = encode(prompt + answer(prompt))
        tokens[i, : len(row)] = row
        weights[i, len(prompt) - 1 : len(row) - 1] = 1
    return {"tokens": tokens, "weights": weights}


# ---------------------------------------------------------------------------------------------------------------------
# The model, its losses and its optimiser. What is compiled is kept, so that seeds share it.

CONFIG = Qwen3Config(
    vocab_size=128,  # ASCII
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=16,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=True,
)


def supervised_loss(
    model: tbik_jax.TrainingModel, batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of each token of the answers."""
    return -model.logprobs(batch["tokens"]), batch["weights"]


@functools.cache
def train_step(mesh: Mesh, numerics: str, loss: Any, has_aux: bool) -> Any:
    """The compiled step."""
    return tbik_jax.train_step(loss, mesh=mesh, numerics=numerics, has_aux=has_aux)


@functools.cache
def transform(mesh: Mesh, learning_rate: float) -> optax.GradientTransformation:
    """AdamW in float32 with float32 master weights, behind clipping in tree order."""
    tx = optax.chain(clip_by_global_norm(1.0, mesh=mesh), optax.adamw(learning_rate, weight_decay=0.0))
    return mixed_precision(tx, master=True)


# ---------------------------------------------------------------------------------------------------------------------
# One run.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Of a run, as on the command line."""

    rollout_mesh: Mesh
    train_mesh: Mesh
    prompts: int
    group_size: int
    warmup: int
    steps: int
    learning_rate: float


class Run:
    """Trainer and rollout of one seed and one numerics."""

    def __init__(self, settings: Settings, numerics: Any, seed: int):
        self.settings, self.numerics, self.seed = settings, numerics, seed
        self.model = tbik_jax.shard_model(Qwen3(CONFIG, rngs=nnx.Rngs(seed)), settings.train_mesh)
        self.rewards: list[float] = []

    def _optimizer(self, learning_rate: float) -> nnx.Optimizer:
        return nnx.Optimizer(self.model, transform(self.settings.train_mesh, learning_rate), wrt=nnx.Param)

    def warm_up(self) -> float:
        """Supervised steps; the last one's loss."""
        optimizer = self._optimizer(3e-3)
        step = train_step(self.settings.train_mesh, self.numerics, supervised_loss, False)
        loss = np.float32(np.nan)
        for index in range(self.settings.warmup):
            rng = np.random.default_rng((self.seed, 0, index))
            rows = self.settings.prompts * self.settings.group_size
            loss = step(self.model, optimizer, supervised_batch(rng, rows))
        return float(loss)

    def reinforce(self) -> Iterator[dict[str, Any]]:
        """GRPO steps; what there is to log of each."""
        optimizer = self._optimizer(self.settings.learning_rate)
        step = train_step(self.settings.train_mesh, self.numerics, rl.GrpoLoss(), True)
        for index in range(self.settings.steps):
            times = [time.perf_counter()]
            model = rl.hand_over(self.model, self.settings.rollout_mesh)
            jax.block_until_ready(nnx.state(model))
            times.append(time.perf_counter())
            rollout = self._rollout(model, index)
            del model  # else two copies of it are there when the next one is handed over
            times.append(time.perf_counter())
            rewards = rollout.rewards(reward)
            batch = rollout.batch(self.model, rl.group_advantages(rewards), width=WIDTH)
            loss, aux = step(self.model, optimizer, batch)
            report = rl.divergence(batch, aux["logprobs"])
            times.append(time.perf_counter())
            self.rewards.append(float(rewards.mean()))
            yield {
                "numerics": self.numerics,
                "seed": self.seed,
                "step": index + 1,
                "reward": self.rewards[-1],
                "loss": float(loss),
                "entropy": rollout.entropy,
                "max_abs": report.max_abs,
                "min_ratio": report.min_ratio,
                "max_ratio": report.max_ratio,
                "kl": report.kl,
                "tokens": report.tokens,
                "different": report.different,
                **dict(
                    zip(
                        ("hand_over_s", "rollout_s", "train_s"), np.diff(times).round(4).tolist(), strict=True
                    )
                ),
            }
            if self.numerics == "invariant":  # what differs has been logged
                report.check()

    def _rollout(self, model: Qwen3, index: int) -> rl.Rollout:
        rng = np.random.default_rng((self.seed, 1, index))
        return rl.sample_groups(
            model,
            [encode(prompt) for prompt in problems(rng, self.settings.prompts)],
            group_size=self.settings.group_size,
            sampling=tbik_jax.SamplingParams(temperature=1.0, seed=self.seed),
            step=index,
            mesh=self.settings.rollout_mesh,
            max_new_tokens=NEW_TOKENS,
            eos_id=END,
            numerics=self.numerics,
        )

    def fingerprints(self) -> tuple[str, str]:
        """Of the rewards and of the parameters."""
        rewards = tbik_jax.fingerprint([np.asarray(self.rewards, np.float32)])
        return rewards, tbik_jax.fingerprint(jax.tree.leaves(nnx.state(self.model)))


# ---------------------------------------------------------------------------------------------------------------------


def main(
    rollout_mesh: Annotated[str, typer.Option(help="axes, e.g. tp=4")] = "tp=4",
    train_mesh: Annotated[str, typer.Option(help="axes, e.g. fsdp=2,tp=2; powers of two")] = "fsdp=4",
    apart: Annotated[bool, typer.Option(help="let the meshes share no device")] = False,
    numerics: Annotated[
        str, typer.Option(help="invariant, batch_invariant, plain; several with commas")
    ] = "invariant",
    seeds: Annotated[int, typer.Option(min=1, help="runs with the seeds 0, 1, ...")] = 1,
    prompts: Annotated[int, typer.Option(min=1, help="of a step")] = 16,
    group_size: Annotated[int, typer.Option(min=2, help="samples of a prompt")] = 8,
    warmup: Annotated[int, typer.Option(min=0, help="supervised steps")] = 20,
    steps: Annotated[int, typer.Option(min=1, help="of GRPO")] = 50,
    learning_rate: Annotated[float, typer.Option(min=0, help="of AdamW in GRPO")] = 1e-3,
    log: Annotated[Path | None, typer.Option(help="file: one JSON object a step")] = None,
    plot: Annotated[Path | None, typer.Option(help="image: success rate and divergence against step")] = None,
) -> None:
    """Trains with each numerics and seed, and prints how far rollout and trainer were apart."""
    console = Console()
    records: list[dict[str, Any]] = []
    try:
        trainer = parse_mesh("--train-mesh", train_mesh, jax.devices())
        rest = jax.devices()[trainer.devices.size :] if apart else jax.devices()
        settings = Settings(
            rollout_mesh=parse_mesh("--rollout-mesh", rollout_mesh, rest),
            train_mesh=trainer,
            prompts=prompts,
            group_size=group_size,
            warmup=warmup,
            steps=steps,
            learning_rate=learning_rate,
        )
        console.print(f"rollout on {mesh_label(settings.rollout_mesh)}, trainer on {mesh_label(trainer)}")
        names = kinds(numerics)
        for option, file in (("--log", log), ("--plot", plot)):
            check_new(option, file)
        for seed in range(seeds):
            for name in names:
                follow(Run(settings, name, seed), console, log, records)
    except (ValueError, OSError, FloatingPointError, rl.DivergenceError) as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(2)
    if plot is not None:
        draw(records, plot)


def kinds(text: str) -> list[str]:
    """The numerics that "invariant,plain" names."""
    names = [name.strip().replace("-", "_") for name in text.split(",")]
    for name in names:
        if name not in NUMERICS or names.count(name) > 1:
            raise ValueError(
                f"--numerics {text}: {name!r} is unknown or there twice; use {', '.join(NUMERICS)}"
            )
    return names


def check_new(option: str, file: Path | None) -> None:
    """Refuses, before anything is computed, a file that cannot be written or is there already."""
    if file is None:
        return
    if file.exists():
        raise ValueError(f"{option} {file}: it exists already; name another file, or remove it")
    if not file.parent.is_dir():
        raise ValueError(f"{option} {file}: there is no folder {file.parent}")
    formats = plt.figure().canvas.get_supported_filetypes()
    plt.close()
    if option == "--plot" and file.suffix.removeprefix(".") not in formats:
        raise ValueError(f"--plot {file} is no image; use one of {', '.join(sorted(formats))}")


def follow(run: Run, console: Console, log: Path | None, records: list[dict[str, Any]]) -> None:
    """Does a run, shows its progress, prints what came of it and adds to the records."""
    columns = (*Progress.get_default_columns(), TimeElapsedColumn(), TextColumn("{task.fields[state]}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(
            f"{run.numerics}, seed {run.seed}", total=run.settings.steps, state="supervised warm-up"
        )
        loss = run.warm_up()
        after = f": loss {loss:.4f} after the warm-up" if run.settings.warmup else ""
        console.print(f"[bold]{run.numerics}, seed {run.seed}[/bold]{after}")
        for record in run.reinforce():
            records.append(record)
            if log is not None:
                with log.open("a") as file:
                    file.write(json.dumps({k: finite(v) for k, v in record.items()}) + "\n")
            bar.update(task, advance=1, state=f"reward {record['reward']:.3f}  KL {record['kl']:.1e}")
            if record["step"] % 10 == 0 or record["step"] in (1, run.settings.steps):
                console.print(line(record), soft_wrap=True)
    rewards, parameters = run.fingerprints()
    console.print(f"  rewards {rewards[:16]}, parameters {parameters[:16]}")


def finite(value: Any) -> Any:
    """As JSON has it: it knows no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def line(record: dict[str, Any]) -> str:
    """A step in words."""
    return (
        f"  step {record['step']:3d}  reward {record['reward']:.3f}  entropy {record['entropy']:.3f}  "
        f"max |dlogp| {record['max_abs']:.1e}  ratio {record['min_ratio']:.6f} .. {record['max_ratio']:.6f}  "
        f"KL {record['kl']:.1e}  s: rollout {record['rollout_s']:.2f}, hand-over {record['hand_over_s']:.2f}, "
        f"train {record['train_s']:.2f}"
    )


def draw(records: list[dict[str, Any]], file: Path) -> None:
    """Success rate, KL and largest difference against step: a thin line a seed, a thick one their mean."""
    figure, panels = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    names = list(dict.fromkeys(record["numerics"] for record in records))
    titles = {
        "reward": "success rate of the samples",
        "kl": "KL(rollout || trainer), nats a token",
        "max_abs": "largest |log p_rollout - log p_train|",
    }
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        for color, name in enumerate(names):
            of_seed: dict[int, list[float]] = {}
            for record in records:
                if record["numerics"] == name:
                    of_seed.setdefault(record["seed"], []).append(record[key])
            curves = np.asarray(list(of_seed.values()))
            steps = np.arange(1, curves.shape[1] + 1)
            panel.plot(steps, curves.T, color=f"C{color}", linewidth=0.6, alpha=0.5)
            panel.plot(steps, curves.mean(axis=0), color=f"C{color}", linewidth=1.8, label=name)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("step of GRPO")
        panel.grid(alpha=0.3)
        if key != "reward":
            panel.set_yscale("symlog", linthresh=1e-7 if key == "kl" else 1e-4)
            panel.set_ylim(bottom=-1e-8 if key == "kl" else -1e-5)
    panels[0].legend(fontsize=9)
    figure.savefig(file, dpi=90)
    plt.close(figure)


def parse_mesh(option: str, text: str, devices: list[jax.Device]) -> Mesh:
    """The mesh that "data=2,tp=4" names, on the first of these devices."""
    pairs = [part.split("=") for part in text.split(",")]
    if not all(len(pair) == 2 and pair[1].strip().isdigit() for pair in pairs):
        raise ValueError(f"{option} {text} is no list such as data=2,tp=4")
    sizes = {name.strip(): int(size) for name, size in pairs}
    if len(sizes) < len(pairs):
        raise ValueError(f"{option} {text} names an axis twice")
    unknown = set(sizes) - {"data", "fsdp", "tp"}
    if unknown:
        raise ValueError(f"{option} {text}: axis {min(unknown)} is unknown; use data, fsdp and tp")
    return tbik_jax.make_mesh(**sizes, devices=devices)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # virtual ones; GPUs are used where there are any
    typer.run(main)
