"""Compiles the programs for 1 to 8 H200s on a machine that has none, and says what they consist of.

    make gpu-compiler
    python -m benchmarks.gpu_programs --models 8B 32B --meshes tp=8 "data=3 tp=2" --out programs.json

XLA compiles for the H200 as `_H200` describes it, so every pass over the program is that of the GPU: what XLA fuses,
copies, gathers and adds up can be read off, and whether weights, caches and temporaries fit is known. Left out are what
needs the GPU: its driver turns Mosaic's kernels into machine code when a program is loaded, and nothing here runs.
Exits with 1 if a program does not compile, or leaves a sum, a product or the rounding of a function to XLA.
"""

import argparse
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before JAX looks for devices: whatever is here is not used, nor the libraries that would run what is compiled.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if importlib.util.find_spec("jax_plugins") is None:
    sys.path.append(str(Path(sys.prefix) / "gpu-compiler"))  # see the Makefile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import tbik_jax
from benchmarks.hlo import COLLECTIVES, launched, ordered_by_xla, rounded_by_xla
from benchmarks.matmul_speed import dump
from benchmarks.train_task import next_token_loss
from tbik_jax import SamplingParams, synthetic
from tbik_jax.bench.environment import environment
from tbik_jax.buckets import bucket, capacity_bucket
from tbik_jax.layers import Parallel
from tbik_jax.loading import parameter_shardings
from tbik_jax.mesh import AXES, BATCH_AXES, mesh_label
from tbik_jax.models import Qwen3, Qwen3Config
from tbik_jax.pallas_kernels.rope.api import rope_tables
from tbik_jax.sampling import sampling_arrays
from tbik_jax.steps import DecodeState, Steps, check_plans, fsdp_dimensions, make_numerics

PROGRAMS = ("decode", "prefill", "score", "gradient")
_MEMORY = 139.8  # GiB of an H200, as JAX sees it
_H200 = """
gpu_device_info {
  name: "NVIDIA H200" device_vendor: "NVIDIA Corporation" model_str: "NVIDIA H200"
  platform_version: "Compute Capability 9.0a"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 device_address_bits: 64
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 4800000000000 device_memory_size: 150109945856 l2_cache_size: 52428800
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""


def main(argv: list[str]) -> int:
    args = _arguments(argv)
    data: dict[str, Any] = {
        "environment": environment(),
        "arguments": {name: value for name, value in vars(args).items() if name != "out"},
        "programs": [],
    }
    failed = False
    for name in args.models:
        for sizes in args.meshes:
            for row in compiled_programs(name, sizes, args):
                failed |= bool(row.get("error") or row.get("left_to_xla"))
                data["programs"].append(row)
                print(json.dumps(row), flush=True)
                if args.out:
                    args.out.write_text(dump(data))
    return 1 if failed else 0


def h200s(count: int) -> list[jax.Device]:
    """Devices to compile for: `count` H200s of one host.

    Raises:
        SystemExit: the compiler is not installed; says how to install it.
    """
    try:
        described = topologies.get_topology_desc(
            platform="cuda", topology_name="h200", topology=f"1x1x{count}", target_config=_H200
        )
    except NotImplementedError:
        raise SystemExit(
            "error: XLA's compiler for NVIDIA GPUs is not installed; run: make gpu-compiler"
        ) from None
    return list(described.devices)


def compiled_programs(name: str, sizes: dict[str, int], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Compiles one program after the other, and yields what it consists of, or the error.

    Args:
        name: of a published size.
        sizes: of the mesh.
        args: of the command line.

    Raises:
        SystemExit: the compiler is not installed, or the model does not go onto such a mesh; with one line.
    """
    devices = h200s(math.prod(sizes.values()))
    jax.config.update("jax_default_device", devices[0])  # what the ops choose their kernels by
    try:
        mesh = tbik_jax.make_mesh(**sizes, devices=devices)
        lowerings = _Lowerings(name, mesh, args.layers)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    row: dict[str, Any] = {"model": name, "mesh": mesh_label(mesh)}
    row["layers"] = lowerings.config.num_hidden_layers
    calls = [("decode", {"rows": batch, "context": args.context}) for batch in args.batches]
    calls += [
        (program, {"rows": args.rows, "width": args.tokens}) for program in ("prefill", "score", "gradient")
    ]
    for program, shape in calls:
        if program not in args.programs:
            continue
        began = time.perf_counter()
        try:
            found = _facts(getattr(lowerings, program)(**shape).compile())
        except Exception as error:  # recorded; the others are worth compiling
            found = {"error": f"{type(error).__name__}: {error}"[:1000]}
        yield row | {"program": program} | shape | found | {"seconds": round(time.perf_counter() - began, 1)}


class _Lowerings:
    """The programs of a model on a mesh, lowered from shapes alone."""

    def __init__(self, name: str, mesh: Mesh, layers: int | None):
        raw = synthetic.small_config() if name == "small" else synthetic.qwen3_config(name)
        self.config = Qwen3Config.from_dict(raw | ({"num_hidden_layers": layers} if layers else {}))
        self._mesh, self._ranks = mesh, mesh.shape["data"] * mesh.shape["fsdp"]
        check_plans(self.config, jnp.bfloat16)
        model = nnx.eval_shape(lambda: Qwen3(self.config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
        self._graphdef, state = nnx.split(model)
        shardings = parameter_shardings(state, mesh)
        leaves, self._treedef = jax.tree.flatten(state)
        self._parameters = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
            for x, sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
        ]
        parallel = Parallel(
            numerics=make_numerics("invariant", mesh), fsdp_dims=fsdp_dimensions(state, shardings, mesh)
        )
        specs = tuple(each.spec for each in jax.tree.leaves(shardings))
        self._steps = Steps(
            self._graphdef,
            self._treedef,
            specs,
            self.config,
            jnp.dtype(jnp.bfloat16),
            mesh,
            parallel,
            scan_layers=False,
        )

    def _like(self, tree: Any, spec: P | None = None) -> Any:
        sharding = NamedSharding(self._mesh, spec or P())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding), tree)

    def _rows(self, count: int, width: int) -> tuple[int, Any, Any]:
        """Rows of all ranks, their tokens, and their lengths."""
        size = -(-count // self._ranks) * self._ranks
        arrays = np.zeros((size, width), np.int32), np.zeros((size,), np.int32)
        return size, *self._like(arrays, P(BATCH_AXES))

    def _tables(self, capacity: int) -> Any:
        return self._like(rope_tables(capacity, self.config.head_dim, self.config.rope_theta))

    def decode(self, rows: int, context: int) -> Any:
        """The decode loop of greedy and sampled rows, from `context` positions on."""
        room = bucket(96)
        size, capacity = self._rows(rows, 1)[0], capacity_bucket(context + room)
        state = DecodeState.start(np.zeros((size,), np.int32), np.full((size,), context), room)
        state = jax.tree.map(lambda x, spec: self._like(x, spec), state, self._steps.state_spec)
        sampling = sampling_arrays([SamplingParams()] * size, self.config.vocab_size)
        return self._steps.decode[False].lower(
            self._parameters,
            self._steps.cache_shapes(size, capacity),
            state,
            self._like(np.int32(0)),
            self._like(sampling, P(BATCH_AXES)),
            self._like(np.asarray([-1], np.int32)),
            self._tables(capacity),
        )

    def prefill(self, rows: int, width: int) -> Any:
        """A pass over prompts."""
        size, tokens, lengths = self._rows(rows, width)
        capacity = capacity_bucket(width)
        cache = self._steps.cache_shapes(size, capacity)
        start, tables = self._like(np.int32(0)), self._tables(capacity)
        return self._steps.prefill.lower(self._parameters, cache, tokens, lengths, start, tables)

    def score(self, rows: int, width: int) -> Any:
        """Log-probabilities of given tokens."""
        size, tokens, lengths = self._rows(rows, width)
        capacity = capacity_bucket(width)
        cache = self._steps.cache_shapes(size, capacity)
        start, tables = self._like(np.int32(0)), self._tables(capacity)
        return self._steps.score.lower(self._parameters, cache, tokens, tokens, lengths, start, tables)

    def gradient(self, rows: int, width: int) -> Any:
        """Loss and gradient of next tokens."""
        size, tokens, _ = self._rows(rows, width)
        weights = self._like(np.zeros((size, width - 1), np.float32), P(BATCH_AXES))

        def run(leaves: list[jax.Array], batch: dict[str, jax.Array]) -> Any:
            model = nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))
            return tbik_jax.value_and_grad(next_token_loss, mesh=self._mesh)(model, batch)

        jitted = jax.jit(run, compiler_options=tbik_jax.training.COMPILER_OPTIONS)
        return jitted.lower(self._parameters, {"tokens": tokens, "weights": weights})


def _facts(compiled: Any) -> dict[str, Any]:
    """What a program consists of, and the GiB that a device needs for it."""
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    kernels, others = launched(hlo)
    bytes_ = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }
    gib = {name: round(size / 2**30, 3) for name, size in bytes_.items()}
    return {
        "kernels": kernels,
        "xla": {name: n for name, n in others.items() if name not in COLLECTIVES},
        "collectives": {name: n for name, n in others.items() if name in COLLECTIVES},
        "gib": gib,
        "fits": sum(gib.values()) < _MEMORY,
        "left_to_xla": [line.strip()[:200] for line in ordered_by_xla(hlo) + rounded_by_xla(hlo)],
    }


def _sizes(text: str) -> dict[str, int]:
    sizes = {name: int(size) for name, size in (part.split("=") for part in text.split())}
    if not set(sizes) <= set(AXES) or not 1 <= math.prod(sizes.values()) <= 8:
        raise ValueError(text)
    return sizes


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["8B"])
    parser.add_argument(
        "--meshes", nargs="+", type=_sizes, default=[{"tp": 8}], help='each such as "data=2 tp=4"'
    )
    parser.add_argument("--programs", nargs="+", default=PROGRAMS, choices=PROGRAMS)
    parser.add_argument("--layers", type=int, help="fewer than the model has, to compile sooner")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32], help="rows of decoding")
    parser.add_argument("--context", type=int, default=1024, help="positions before the first decoded one")
    parser.add_argument("--rows", type=int, default=8, help="of prefill, score and gradient")
    parser.add_argument("--tokens", type=int, default=2048, help="of each such row")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
