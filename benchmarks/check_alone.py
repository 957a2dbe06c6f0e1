"""Whether a row that a GPU decodes alone has the bits that it has in company, over thousands of tokens.

    python -m benchmarks.check_alone --sizes 1.7B 0.6B --out benchmarks/results/check_alone.json

Alone other kernels run, some of whose CTAs wait for one another (`rest_of_layer`). A sampled row is generated twice
alone, and with a greedy one, which is generated alone too. Random weights of real shapes, all layers. Exits with 1 if
a bit differs. `--sizes small` tries it on the CPU.
"""

import argparse
import hashlib
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generate_speed import sharded_model
from benchmarks.matmul_speed import dump
from tbik_jax import SamplingParams, generate, make_mesh
from tbik_jax.bench.environment import environment
from tbik_jax.mesh import resolve_mesh

_LENGTHS = (700, 50)  # of the prompts
_SAMPLING = (SamplingParams(temperature=0.7, seed=1), SamplingParams())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["1.7B", "0.6B"], help="published sizes, or 'small'")
    parser.add_argument("--new-tokens", type=int, default=6000, help="of a row alone")
    parser.add_argument("--in-company", type=int, default=700, help="of two rows together")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    report: dict[str, Any] = {"environment": environment(), "rows": []}
    for size in args.sizes:
        report["rows"] += compare(size, args.new_tokens, min(args.in_company, args.new_tokens))
        if args.out:
            args.out.write_text(dump(report))
    equal = all(row["same_bits"] for row in report["rows"])
    print("ok" if equal else "FAILED", flush=True)
    return int(not equal)


def compare(size: str, new: int, company: int) -> list[dict[str, Any]]:
    """Hashes of tokens and log-probabilities, whole and of the first `company` tokens, and whether they are equal."""
    model = sharded_model(size, resolve_mesh(make_mesh()))
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 1000, length) for length in _LENGTHS]
    rows: list[dict[str, Any]] = []
    for what, chosen, count in (
        ("sampled, alone", [0], new),
        ("sampled, alone again", [0], new),
        ("both", [0, 1], company),
        ("greedy, alone", [1], new),
    ):
        began = time.perf_counter()
        out = generate(
            model,
            [prompts[i] for i in chosen],
            max_new_tokens=count,
            sampling=[_SAMPLING[i] for i in chosen],
            eos_id=None,
        )
        each = list(zip(out.tokens, out.logprobs, strict=True))
        row = {
            "size": size,
            "what": what,
            "tokens": [len(tokens) for tokens, _ in each],
            "whole": [_hash(*one) for one in each],
            "first": [_hash(tokens[:company], logprobs[:company]) for tokens, logprobs in each],
            "seconds": round(time.perf_counter() - began, 1),
        }
        rows.append(row)
        print(row, flush=True)
    once, again, both, greedy = rows
    once["same_bits"] = again["same_bits"] = once["whole"] == again["whole"]
    both["same_bits"] = both["first"] == once["first"] + greedy["first"]
    greedy["same_bits"] = both["first"][1:] == greedy["first"] != once["first"]
    return rows


def _hash(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(each).tobytes() for each in arrays)).hexdigest()[:16]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
