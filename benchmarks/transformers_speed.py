"""Speed of Hugging Face transformers' `generate` on Qwen3 at real shapes, to stand beside `generate_speed`.

    python -m benchmarks.transformers_speed --model 8B --out benchmarks/results/transformers_speed.json

Random weights in bfloat16 on one GPU, greedy, no end token. A decode step is the difference of two runs of different
lengths over the difference of their lengths; the prompt has `--context` tokens. Two ways: a dynamic cache without
compiling, and a static cache, for which transformers compiles the step by itself. Needs torch and transformers.
"""

import argparse
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

from tbik_jax import synthetic

_SHORT = 8  # new tokens of the run that is subtracted


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="8B")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--static-batches", nargs="*", type=int, default=[1, 32])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--limit", type=float, default=200, help="seconds after which nothing new begins")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    end = time.monotonic() + args.limit
    import torch  # an optional tool of this script alone
    import transformers

    config = transformers.AutoConfig.for_model(**synthetic.qwen3_config(args.model))
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    data: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "model": args.model,
        "context": args.context,
        "attention": model.config._attn_implementation,
        "rows": [],
    }
    ways = [("dynamic", batch) for batch in args.batches] + [("static", b) for b in args.static_batches]
    for cache, batch in ways:
        if time.monotonic() > end:
            break
        row: dict[str, Any] = {"cache": cache, "batch": batch}
        try:
            row |= _step(torch, model, batch, cache, args)
        except Exception as error:  # recorded; the rest is worth measuring
            row["error"] = f"{type(error).__name__}: {error}"[:500]
        data["rows"].append(row)
        print(json.dumps(row), flush=True)
        if args.out:
            args.out.write_text(json.dumps(data, indent=1) + "\n")
    return 0


def _step(torch: Any, model: Any, batch: int, cache: str, args: argparse.Namespace) -> dict[str, Any]:
    ids = torch.randint(model.config.vocab_size, (batch, args.context), device="cuda")
    common = {
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if cache == "static":
        common["cache_implementation"] = "static"

    def seconds(new: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(ids, max_new_tokens=new, min_new_tokens=new, **common)
        torch.cuda.synchronize()
        if out.shape[1] != args.context + new:
            raise RuntimeError(f"{out.shape[1] - args.context} tokens came instead of {new}")
        return time.perf_counter() - began

    first = seconds(_SHORT + args.steps)  # compiles, where anything is compiled
    differences = [seconds(_SHORT + args.steps) - seconds(_SHORT) for _ in range(2)]
    return {"ms": round(1000 * min(differences) / args.steps, 3), "first_s": round(first, 1)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
