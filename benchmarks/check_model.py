"""Whether a Qwen3 of real width has one set of bits on a GPU, for any batch, chunk and cache, and computes the model.

    python -m benchmarks.check_model --size 1.7B --layers 4 --out benchmarks/results/check_model.json

Random weights, prompts of one to some thousand tokens, greedy and sampled:

* generate: each prompt in the whole batch, in smaller ones and alone, with other chunks and in longer caches;
* score: teacher-forced log-probabilities of the same tokens in other chunks, against `generate`'s;
* states: hidden states after each layer and logits against plain numerics', relative to their size: not bits, but that
  the kernels compute the model;
* twin: plain numerics in the same comparisons, which must differ.

Exits with 1 if a promise is broken. `--size small` tries it on the CPU.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import tbik_jax
from benchmarks.matmul_speed import dump
from tbik_jax import SamplingParams, synthetic
from tbik_jax.bench.environment import environment
from tbik_jax.mesh import resolve_mesh
from tbik_jax.models import Qwen3, Qwen3Config
from tbik_jax.models.qwen3.modules import init_cache
from tbik_jax.pallas_kernels.rope.api import rope_tables
from tbik_jax.steps import Engine

_LENGTHS = (1, 5, 64, 129, 300, 513, 777, 1400)
#: Relative to the largest value of a layer; bfloat16 has 8 bits, and a model of random weights spreads a rounding.
_STATES_LIMIT = 0.1


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="1.7B", help="published size, or 'small'")
    parser.add_argument("--layers", type=int, default=4, help="of the model; the full depth compiles longer")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--limit", type=float, default=150, help="seconds after which nothing new begins")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    check = Check(args)
    check.states()
    check.generate()
    failed = [record for record in check.records if not record["ok"]]
    print(f"{'FAILED' if failed else 'ok'}: {len(check.records)} checks, {len(failed)} failed", flush=True)
    return int(bool(failed))


class Check:
    """A model, prompts, and what was found."""

    def __init__(self, args: argparse.Namespace):
        raw = synthetic.small_config() if args.size == "small" else synthetic.qwen3_config(args.size)
        config = Qwen3Config.from_dict(raw | {"num_hidden_layers": args.layers})
        self.model = Qwen3(config, rngs=nnx.Rngs(0))
        rng = np.random.default_rng(1)
        lengths = [min(n, 90) for n in _LENGTHS] if args.size == "small" else _LENGTHS
        self.prompts = [rng.integers(0, config.vocab_size, n).tolist() for n in lengths]
        self.sampling = [SamplingParams(temperature=0.8 * (i % 2), seed=i) for i in range(len(self.prompts))]
        self.args = args
        self.records: list[dict[str, Any]] = []
        self.head = {"environment": environment(), "size": args.size, "layers": args.layers}
        self.end = time.monotonic() + args.limit

    def record(self, name: str, test: Callable[[], dict[str, Any]]) -> None:
        """Runs a check, whose result says whether it is ok; an exception fails it alone."""
        began = time.monotonic()
        try:
            found = test() if began < self.end else {"ok": False, "error": "out of time"}
        except Exception as error:
            found = {"ok": False, "error": f"{type(error).__name__}: {error}"[:800]}
        self.records.append({"name": name, **found, "seconds": round(time.monotonic() - began, 1)})
        print(json.dumps(self.records[-1]), flush=True)
        if self.args.out:  # at every step: a run that is ended from outside keeps what it has
            self.args.out.write_text(dump(self.head | {"checks": self.records}))

    def states(self) -> None:
        """Hidden states and logits of both numerics."""

        def test() -> dict[str, Any]:
            ours, plain = (self._states(numerics) for numerics in ("invariant", "plain"))
            errors = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, plain, strict=True)]
            return {"ok": max(errors) < _STATES_LIMIT, "relative": [round(e, 5) for e in errors]}

        self.record("states against plain numerics", test)

    def _states(self, numerics: str) -> list[np.ndarray]:
        mesh, config = resolve_mesh(tbik_jax.make_mesh()), self.model.config
        engine = Engine.create(self.model, mesh, numerics)
        rows = [np.asarray(p, np.int32)[:40] for p in self.prompts[-2:]]
        tokens, lengths = np.stack(rows), np.asarray([40, 25], np.int32)
        place = jax.NamedSharding(mesh, jax.P())
        tables = rope_tables(128, config.head_dim, config.rope_theta)
        arrays = jax.device_put((tokens, lengths, tables), place)
        cache = init_cache(engine.steps.cache_shapes(2, 128))
        taps, logits = engine.steps.hidden_states(engine.parameters, cache, *arrays)
        return [np.asarray(x.astype(jnp.float32))[:, :25] for x in [*taps, logits]]

    def generate(self) -> None:
        """Everything against the whole batch."""
        whole = self._run("invariant", range(len(self.prompts)), {})
        plain = self._run("plain", range(len(self.prompts)), {})
        for name, indices, options in (
            ("again", range(8), {}),
            ("the first half, chunks of 200", range(4), {"prefill_chunk": 200}),
            ("backwards, chunks of 512", range(7, -1, -1), {"prefill_chunk": 512}),
            ("a long one alone", [7], {}),
            ("a long one alone, chunks of 64", [6], {"prefill_chunk": 64}),
            ("one token alone, a longer cache", [0], {"max_new_tokens": 600}),
            ("layers as a scan", [4], {"scan_layers": True}),
        ):
            self.record(name, lambda i=indices, o=options: self._same(self._run("invariant", i, o), whole, i))
        for chunk in (None, 100):
            self.record(f"score, chunks of {chunk}", lambda c=chunk: self._score(whole, c))

        def twin() -> dict[str, Any]:
            found = self._same(self._run("plain", [7], {}), plain, [7])
            return {"ok": not found["ok"], "differ": found["differ"]}

        self.record("twin: a long one alone, plain numerics", twin)

    def _run(self, numerics: Any, indices: Any, options: dict[str, Any]) -> Any:
        return tbik_jax.generate(
            self.model,
            [self.prompts[i] for i in indices],
            mesh=tbik_jax.make_mesh(),
            sampling=[self.sampling[i] for i in indices],
            numerics=numerics,
            **{"max_new_tokens": self.args.new_tokens, **options},
        )

    def _same(self, out: Any, whole: Any, indices: Any) -> dict[str, Any]:
        differ = 0
        for i, tokens, logprobs in zip(indices, out.tokens, out.logprobs, strict=True):
            n = len(whole.tokens[i])
            differ += int((tokens[:n] != whole.tokens[i]).sum())
            differ += int((logprobs[:n].view(np.uint32) != whole.logprobs[i].view(np.uint32)).sum())
        return {"ok": differ == 0, "differ": differ}

    def _score(self, whole: Any, chunk: int | None) -> dict[str, Any]:
        sequences = [p + t.tolist() for p, t in zip(self.prompts, whole.tokens, strict=True)]
        scores = tbik_jax.score(self.model, sequences, mesh=tbik_jax.make_mesh(), chunk=chunk)
        found = [s[len(p) - 1 :] for s, p in zip(scores, self.prompts, strict=True)]
        return self._same(dataclasses.replace(whole, logprobs=found), whole, range(len(found)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
