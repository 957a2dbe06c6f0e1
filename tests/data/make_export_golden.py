"""Makes golden_export.json: the files that transformers itself writes for the tiny models of tests/checkpoints.py.

Like make_golden.py it is run by hand, in an environment with torch. The file here was made with

    Python 3.11, torch 2.13.0 (CPU), transformers 5.17.0, numpy 2.4.6, ml_dtypes 0.6.0, safetensors 0.8.0

    python tests/data/make_export_golden.py

and so holds what Hugging Face made of weights that `tbik_jax/synthetic.py` makes again. By case (tied, untied) and by
`max_shard_size`, after Qwen3ForCausalLM.from_pretrained(...).save_pretrained(...):

    config          the Hugging Face config that the weights were made of
    saved_config    config.json as transformers wrote it
    files           SHA-256 of every safetensors file and of the index, by name

    python tests/data/make_export_golden.py --compare ORIGINAL EXPORTED

says instead whether transformers makes the same config, parameters and logits of two folders, bit for bit, and exits
with 1 if not. So a checkpoint can be compared with what `export_hugging_face` makes of it after `load`.
"""

import argparse
import hashlib
import importlib.util
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent
DTYPES = ("bfloat16", "float32")
SHARD_SIZES = {"single": "5GB", "sharded": "30KB"}
#: Fields that say nothing of what the model computes; `_name_or_path` is the folder.
IGNORED = ("_name_or_path", "bos_token_id", "max_window_layers", "pad_token_id")


def configs() -> dict[str, dict[str, Any]]:
    """TINY and UNTIED of tests/checkpoints.py, which needs jax."""
    spec = importlib.util.spec_from_file_location("synthetic", HERE.parents[1] / "tbik_jax" / "synthetic.py")
    assert spec is not None and spec.loader is not None
    synthetic = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(synthetic)
    sys.modules["synthetic"] = synthetic
    tiny = synthetic.small_config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=16,
        head_dim=16,
        max_position_embeddings=64,
    )
    return {"tied": tiny, "untied": {**tiny, "tie_word_embeddings": False}}


def golden(config: dict[str, Any], dtype: str, folder: Path) -> dict[str, Any]:
    """One case, in a folder of its own."""
    original = sys.modules["synthetic"].write_checkpoint(folder / "original", config, dtype=dtype)
    model = Qwen3ForCausalLM.from_pretrained(original, dtype="auto")
    case: dict[str, Any] = {"config": config, "files": {}}
    for name, size in SHARD_SIZES.items():
        saved = folder / name
        model.save_pretrained(saved, max_shard_size=size)
        files = sorted(path for path in saved.iterdir() if path.name.startswith("model"))
        case["files"][name] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
        case["saved_config"] = json.loads((saved / "config.json").read_text())
    return case


def compare(original: Path, exported: Path) -> bool:
    """Prints what differs."""
    first, second = (Qwen3ForCausalLM.from_pretrained(path, dtype="auto") for path in (original, exported))
    mine, theirs = first.state_dict(), second.state_dict()
    ids = torch.arange(48).reshape(2, 24) * 7 % first.config.vocab_size
    with torch.no_grad():
        logits = first(ids).logits, second(ids).logits
    fields = [{k: v for k, v in m.config.to_dict().items() if k not in IGNORED} for m in (first, second)]
    checks = {
        "config": fields[0] == fields[1],
        "dtype": first.dtype == second.dtype,
        "parameters": mine.keys() == theirs.keys()
        and all(torch.equal(mine[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in mine),
        "logits": bool(torch.isfinite(logits[0]).all()) and torch.equal(*logits),
    }
    for name, equal in checks.items():
        print(f"{name}: {'equal' if equal else 'DIFFERENT'}")
    return all(checks.values())


def main() -> None:
    """Writes the file, or compares two folders."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("ORIGINAL", "EXPORTED"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if args.compare:
        sys.exit(0 if compare(*args.compare) else 1)
    cases = {}
    for name, config in configs().items():
        for dtype in DTYPES:
            with tempfile.TemporaryDirectory() as folder:
                cases[f"{name}-{dtype}"] = golden(config, dtype, Path(folder))
    versions = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    file = HERE / "golden_export.json"
    file.write_text(json.dumps({"versions": versions, "cases": cases}, indent=1, sort_keys=True) + "\n")
    print(f"{file.name}: {file.stat().st_size} bytes, {', '.join(cases)}")


if __name__ == "__main__":
    main()
