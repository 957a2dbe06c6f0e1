"""Whether every configuration that can be chosen for a shape gives the reference configuration's bits.

The configurations of a case are what `choose_config` takes, everything `candidate_configs` lists, and what the tuned
table has for the weights. Each multiplies the same inputs, of every kind in `matmul_bits`, to fp32, twice, into memory
that held something else; and the chosen one to the operands' type, which must be the fp32 product rounded once. As a
twin the reference configuration runs with half the leaves, another order, whose bits must differ.
"""

import dataclasses
import functools
import json
import random
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import gpu_pool
from benchmarks.matmul_bits import KINDS, count_differences, make_inputs, poison, reference_config
from benchmarks.matmul_shapes import layers
from benchmarks.matmul_speed import compile_for
from tbik_jax.pallas_kernels.common.rounding import round_to
from tbik_jax.pallas_kernels.tree_matmul import tuned
from tbik_jax.pallas_kernels.tree_matmul.config import fits
from tbik_jax.pallas_kernels.tree_matmul.mosaic_gpu import (
    MosaicConfig,
    candidate_configs,
    choose_config,
    tree_matmul_mosaic_gpu,
)

F32 = jnp.float32
_LAYER_MS = (1, 5, 17, 64, 100, 129, 256, 300, 1000, 2048, 4100)
_MOST_ELEMENTS = 2**27  # of a product
_TRITON = "triton"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A product whose configurations are compared.

    Attributes:
        m: Rows.
        k: Length of the contraction.
        n: Columns.
        leaves: Leaves that k is cut into.
        transpose_rhs: Whether w is stored [n, k].
        dtype: "bfloat16" or "float16".
        seed: Of the inputs.
        skip: Configurations that ended a worker before, as `config_name` has them.
        most: Configurations to compare at most; a random sample of them.
        triton: Whether the portable kernel is compared too.
        interpret: On the CPU.
    """

    m: int
    k: int
    n: int
    leaves: int
    transpose_rhs: bool
    dtype: str
    seed: int
    skip: tuple[str, ...] = ()
    most: int | None = None
    triton: bool = False
    interpret: bool = False

    @property
    def name(self) -> str:
        layout = "[n, k]" if self.transpose_rhs else "[k, n]"
        return f"configs m={self.m} k={self.k} n={self.n} {layout} leaves={self.leaves} {self.dtype}"


def random_cases(count: int, seed: int) -> list[Case]:
    """Shapes that the kernel covers, drawn at random: leaves that 64 divides and others, few rows and many."""
    draw = random.Random(seed)
    cases = []
    for index in range(count):
        leaves = draw.choice((1, 2, 4, 8))
        step = 64 if index % 2 else 16
        case = Case(
            m=min(4100, round(2 ** draw.uniform(0, 12.1))),
            k=leaves * step * draw.randint(1, max(1, 6144 // leaves // step)),
            n=16 * draw.choice((draw.randint(1, 32), draw.randint(1, 384), 8 * draw.randint(1, 48))),
            leaves=leaves,
            transpose_rhs=draw.random() < 0.5,
            dtype=draw.choice(("bfloat16", "float16")),
            seed=draw.randrange(2**31),
        )
        cases.append(case)
    return cases


def layer_cases(seed: int, every: int = 1) -> list[Case]:
    """Qwen3's layers at each TP, each with one number of rows, in bfloat16 and float16 in turn."""
    draw = random.Random(seed)
    cases = []
    for index, layer in enumerate(layers()[::every]):
        m = draw.choice(_LAYER_MS)
        case = Case(
            m=min(m, _MOST_ELEMENTS // layer.n),
            k=layer.k,
            n=layer.n,
            leaves=layer.leaves,
            transpose_rhs=layer.transpose_rhs,
            dtype=("bfloat16", "float16")[index % 2],
            seed=draw.randrange(2**31),
        )
        cases.append(case)
    return cases


def tiny_cases() -> list[Case]:
    """What the interpreter can do in a moment."""
    common: dict[str, Any] = {"seed": 0, "interpret": True, "most": 3}
    return [
        Case(m=17, k=512, n=64, leaves=8, transpose_rhs=False, dtype="bfloat16", **common),
        Case(m=3, k=128, n=48, leaves=2, transpose_rhs=True, dtype="float16", **common),
    ]


def configs_of(case: Case) -> list[MosaicConfig]:
    """The configurations of a case, the reference first and the chosen one second."""
    size = (case.m, case.n, case.k, case.leaves)
    others = [*candidate_configs(*size, transpose_rhs=case.transpose_rhs), *_tuned(case)]
    others = [c for c in dict.fromkeys(others) if config_name(c) not in case.skip]
    if case.most is not None and case.most < len(others):
        others = random.Random(case.seed).sample(others, case.most)
    first = reference_config(case.k, case.leaves)
    return list(dict.fromkeys([first, _chosen(case), *others]))


def _tuned(case: Case) -> list[MosaicConfig]:
    path = tuned.table_path(jax.devices()[0].device_kind)
    table = tuned.read_table(path) if path.is_file() else {}
    entries = table.get((case.k, case.n, case.leaves, case.transpose_rhs), ())
    configs = [MosaicConfig(**config) for _, config in entries if config is not None]
    return [config for config in configs if fits(config, case.m, case.leaves)]  # nor are others ever chosen


def config_name(config: MosaicConfig) -> str:
    """A configuration as text that tells it from others."""
    return json.dumps(dataclasses.asdict(config))


def check_configs(case: Case) -> list[dict[str, Any]]:
    """A job: compares the configurations of a case, and returns one record as `check_tree_matmul` keeps them."""
    start, failures = time.perf_counter(), []
    programs: dict[str, Callable[..., Any]] = {}
    for config in configs_of(case):
        name = config_name(config)
        gpu_pool.note(name)
        try:
            programs[name] = _compile(case, config, F32)
        except Exception as error:  # the others are still compared
            failures.append(f"{name} does not compile: {type(error).__name__}: {error}"[:600])
    if case.triton and _TRITON not in case.skip:
        gpu_pool.note(_TRITON)
        programs[_TRITON] = _compile_triton(case)
    dtype = jnp.dtype(case.dtype)
    reference = config_name(reference_config(case.k, case.leaves))
    rounded = _compile(case, _chosen(case), dtype)
    checks, payloads, notes = len(failures), 0, {}
    for kind in KINDS:
        x, w = _compile_inputs(case, kind)(jnp.int32(case.seed))
        gpu_pool.note(reference)
        expected = programs[reference](x, w)
        if kind == "normal" and _twin_must_differ(case):
            checks, notes["twin"] = checks + 1, _twin(case, (x, w), expected)
            if not notes["twin"]:
                failures.append(f"twin: {case.leaves // 2} leaves gave the bits of {case.leaves}")
        names = [name for name in programs for _ in range(2)]  # twice: a race need not show at once
        found = [(name, _differences(case, programs[name], (x, w), expected, name)) for name in names]
        name = config_name(_chosen(case))
        found.append(
            (f"{name} to {dtype}", _differences(case, rounded, (x, w), round_to(expected, dtype), name))
        )
        checks += len(found)
        for name, (count, real) in found:
            if count:
                payloads += not real
                only = "" if real else ", in nothing but the payload of NaNs"
                failures.append(f"{kind}: {name}: {count} of {case.m * case.n} differ{only}")
    return [
        {
            "name": case.name,
            "checks": checks,
            "failed": len(failures),
            "seconds": round(time.perf_counter() - start, 1),
            "configs": len(programs),
            "payload_only": payloads,
            "seed": case.seed,
            **notes,
            "failures": failures[:50],
        }
    ]


def _twin_must_differ(case: Case) -> bool:
    """Whether there are other orders, and so many long sums that equal bits cannot be chance."""
    return case.leaves > 1 and case.k // case.leaves >= 64 and case.m * case.n >= 4096


def _twin(case: Case, inputs: tuple[Any, ...], expected: jax.Array) -> int:
    other = dataclasses.replace(case, leaves=case.leaves // 2)
    config = reference_config(other.k, other.leaves)
    return _differences(case, _compile(other, config, F32), inputs, expected, "twin")[0]


def _chosen(case: Case) -> MosaicConfig:
    return choose_config(case.m, case.n, case.k, case.leaves, transpose_rhs=case.transpose_rhs)


def _operands(case: Case) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    w = (case.n, case.k) if case.transpose_rhs else (case.k, case.n)
    return jax.ShapeDtypeStruct((case.m, case.k), case.dtype), jax.ShapeDtypeStruct(w, case.dtype)


def _compile(case: Case, config: MosaicConfig, out_dtype: Any) -> Callable[..., Any]:
    product = functools.partial(
        tree_matmul_mosaic_gpu,
        leaves=case.leaves,
        out_dtype=out_dtype,
        transpose_rhs=case.transpose_rhs,
        config=config,
        interpret=case.interpret,
    )
    return compile_for(product, _operands(case))


def _compile_triton(case: Case) -> Callable[..., Any]:
    from tbik_jax.pallas_kernels.tree_matmul.triton import tree_matmul_triton  # needs jax_triton

    product = functools.partial(
        tree_matmul_triton, leaves=case.leaves, out_dtype=F32, transpose_rhs=case.transpose_rhs
    )
    return compile_for(product, _operands(case))


def _compile_inputs(case: Case, kind: str) -> Callable[..., Any]:
    def make(seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, w = make_inputs(kind, case.m, case.k, case.n, jnp.dtype(case.dtype), seed)
        return x, w.T if case.transpose_rhs else w

    return compile_for(make, (jax.ShapeDtypeStruct((), jnp.int32),))


def _differences(
    case: Case, program: Callable[..., Any], inputs: tuple[Any, ...], expected: jax.Array, name: str
) -> tuple[int, int]:
    """Runs a program into poisoned memory and counts what differs, and what of that is more than a NaN's payload."""
    gpu_pool.note(name)
    poison, differ = _helpers(expected.shape, expected.dtype)
    jax.block_until_ready(poison()).delete()
    unequal, real = differ(jax.block_until_ready(program(*inputs)), expected)
    return int(unequal), int(real)


@functools.lru_cache(maxsize=2)  # of one case
def _helpers(shape: tuple[int, ...], dtype: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    out = jax.ShapeDtypeStruct(shape, dtype)
    return compile_for(functools.partial(poison, shape, dtype), ()), compile_for(
        count_differences, (out, out)
    )
