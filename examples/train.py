"""Trains a small Qwen3 on this project's own documentation, on any mesh, and prints fingerprints of what came of it.

    python examples/train.py --mesh fsdp=2,tp=2 --steps 100

The loss history and the parameters have the same fingerprint on every mesh of 1 to 8 devices, and with `--checkpoint`
however often the run is interrupted and goes on, on whatever mesh. With `--numerics plain` they have not. Without GPUs
it runs on eight virtual CPU devices.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import optax
import typer
from flax import nnx
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

import tbik_jax
from tbik_jax.mesh import mesh_label
from tbik_jax.models import Qwen3, Qwen3Config
from tbik_jax.optimizers import clip_by_global_norm, mixed_precision

ROOT = Path(__file__).parent.parent

# ---------------------------------------------------------------------------------------------------------------------
# The data: bytes of Markdown, cut at random places that step and seed alone decide.


def text() -> np.ndarray:
    """The documentation as bytes, int32 [n]."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return np.frombuffer(b"\n".join(file.read_bytes() for file in files), np.uint8).astype(np.int32)


def batch(data: np.ndarray, step: int, seed: int, rows: int, width: int) -> dict[str, np.ndarray]:
    """`rows` runs of `width` bytes, and a weight for each that is predicted."""
    starts = np.random.default_rng((seed, step)).integers(0, len(data) - width, rows)
    tokens = data[starts[:, None] + np.arange(width)]
    return {"tokens": tokens, "weights": np.ones((rows, width - 1), np.float32)}


# ---------------------------------------------------------------------------------------------------------------------
# The model and its loss. A loss function returns each token's loss and weight; the mean is taken in tree order.

CONFIG = Qwen3Config(
    vocab_size=256,  # bytes
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=16,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    tie_word_embeddings=True,
)


def loss_fn(model: tbik_jax.TrainingModel, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of each next byte."""
    return -model.logprobs(batch["tokens"]), batch["weights"]


def optimizer(model: Qwen3, mesh: jax.sharding.Mesh, learning_rate: float) -> nnx.Optimizer:
    """AdamW in float32 with float32 master weights."""
    tx = optax.chain(clip_by_global_norm(1.0, mesh=mesh), optax.adamw(learning_rate))
    return nnx.Optimizer(model, mixed_precision(tx, master=True), wrt=nnx.Param)


# ---------------------------------------------------------------------------------------------------------------------


def main(
    mesh: Annotated[str, typer.Option(help="axes, e.g. fsdp=2,tp=2; powers of two")] = "tp=1",
    steps: Annotated[
        int, typer.Option(min=1, help="of training, counted from the beginning of the run")
    ] = 100,
    numerics: Annotated[str, typer.Option(help="invariant, or plain for XLA's own reductions")] = "invariant",
    rows: Annotated[int, typer.Option(min=1, help="of a batch")] = 8,
    width: Annotated[int, typer.Option(min=2, help="bytes of a row")] = 64,
    microbatches: Annotated[int, typer.Option(help="passes that a batch is cut into; change no bit")] = 1,
    learning_rate: Annotated[float, typer.Option(help="of AdamW")] = 3e-3,
    seed: Annotated[int, typer.Option(help="of the parameters and the data")] = 0,
    checkpoint: Annotated[
        Path | None, typer.Option(help="folder: save there, and go on from its last step")
    ] = None,
    save_every: Annotated[int, typer.Option(min=1, help="steps between checkpoints")] = 50,
) -> None:
    """Trains, and prints loss, fingerprints and the mesh."""
    console = Console()
    try:
        run = Run(mesh, numerics, seed, learning_rate, microbatches, rows, width)
        if checkpoint is not None:
            run.restore(checkpoint, console)
        with Progress(
            *Progress.get_default_columns(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[loss]}"),
            console=console,
        ) as bar:
            task = bar.add_task(
                f"{numerics}, {mesh_label(run.mesh)}",
                total=steps,
                completed=len(run.losses),
                loss="compiling",
            )
            for step in run.steps(steps):
                loss = float(run.losses[-1])
                bar.update(task, advance=1, loss=f"loss {loss:.4f}")
                if step % 10 == 0 or step == steps:
                    console.print(f"step {step:5d}  loss {loss:.6f}")
                if checkpoint is not None and (step % save_every == 0 or step == steps):
                    run.save(checkpoint, step)
    except ValueError as error:
        console.print(f"[red]error:[/red] {error}", soft_wrap=True)
        sys.exit(2)
    console.print(f"mesh                  {mesh_label(run.mesh)}, numerics {numerics}")
    console.print(
        f"loss history          {tbik_jax.fingerprint([np.asarray(run.losses, np.float32)])}", soft_wrap=True
    )
    console.print(
        f"parameters            {tbik_jax.fingerprint(jax.tree.leaves(nnx.state(run.model)))}", soft_wrap=True
    )


class Run:
    """Model, optimiser and losses so far."""

    def __init__(
        self,
        mesh: str,
        numerics: str,
        seed: int,
        learning_rate: float,
        microbatches: int,
        rows: int,
        width: int,
    ):
        self.mesh = parse_mesh(mesh)
        self.model = tbik_jax.shard_model(Qwen3(CONFIG, rngs=nnx.Rngs(seed)), self.mesh)
        self.optimizer = optimizer(self.model, self.mesh, learning_rate)
        self.losses: list[float] = []
        self._step = tbik_jax.train_step(
            loss_fn, mesh=self.mesh, numerics=numerics, microbatches=microbatches
        )
        self._data, self._cut = text(), (seed, rows, width)
        self._options: dict[str, Any] = {
            "numerics": numerics,
            "seed": seed,
            "learning_rate": learning_rate,
            "rows": rows,
            "width": width,
            "text": tbik_jax.fingerprint([self._data]),
        }

    def steps(self, last: int) -> Iterator[int]:
        """Trains up to step `last`, and says after each which one it was."""
        for step in range(len(self.losses) + 1, last + 1):
            self.losses.append(
                float(self._step(self.model, self.optimizer, batch(self._data, step, *self._cut)))
            )
            yield step

    def restore(self, folder: Path, console: Console) -> None:
        """Goes on from the last whole checkpoint, if there is one."""
        if not tbik_jax.checkpoint_steps(folder):
            return
        found = tbik_jax.restore_checkpoint(
            folder, model=self.model, optimizer=self.optimizer, mesh=self.mesh
        )
        for name, value in self._options.items():
            if found.extra.get(name) != value:
                raise ValueError(
                    f"{folder} was trained with {name}={found.extra.get(name)}, not {value}; use another folder"
                )
        self.losses = list(found.extra["losses"])
        console.print(f"goes on from step {found.step} of {folder}")

    def save(self, folder: Path, step: int) -> None:
        """Writes a checkpoint."""
        extra = self._options | {"losses": self.losses}
        tbik_jax.save_checkpoint(
            folder, step, model=self.model, optimizer=self.optimizer, extra=extra, keep=2
        )


def parse_mesh(text: str) -> jax.sharding.Mesh:
    """The mesh that "data=2,tp=4" names."""
    try:
        sizes = {name.strip(): int(size) for name, size in (part.split("=") for part in text.split(","))}
        return tbik_jax.make_mesh(**sizes)
    except TypeError as error:
        raise ValueError(f"--mesh {text}: {error}") from None
    except ValueError as error:
        wrong = "not enough" in str(error) or "too many" in str(error) or "invalid literal" in str(error)
        raise ValueError(f"--mesh {text} is no list such as data=2,tp=4" if wrong else str(error)) from None


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # virtual ones; GPUs are used where there are any
    typer.run(main)
