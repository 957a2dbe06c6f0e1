"""The Triton kernel on the CPU: its order in Triton's interpreter, and what the compiler makes of it for three GPUs.

Bits of a GPU need a GPU: `tests/gpu/test_gpu_bits.py` compares them with the other kernel's.
"""

import dataclasses
import functools
import re
import sys

import jax
import jax.extend.backend
import jax.numpy as jnp
import numpy as np
import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import interpreter

from tbik_jax.pallas_kernels.common.rounding import round_to
from tbik_jax.pallas_kernels.common.tree import tree_join
from tbik_jax.pallas_kernels.tree_matmul import triton as ours
from tbik_jax.pallas_kernels.tree_matmul.operands import check_operands
from tbik_jax.pallas_kernels.tree_matmul.triton import TritonConfig, choose_config, tree_matmul_triton
from tests import orders
from tests.helpers import DTYPES, assert_same_bits, cancelling, differing, normal, wide

BF16, F16, F32 = DTYPES["bfloat16"], DTYPES["float16"], DTYPES["float32"]
TYPES = {"bfloat16": tl.bfloat16, "float16": tl.float16, "float32": tl.float32}
SMALL = TritonConfig(split=1, block_m=16, block_n=32, block_k=16, warps=4, stages=2)


def numpy_dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
    """The interpreter's dot as a chain in ascending k; its own has NumPy's order, and takes bfloat16 for integers."""

    def values(handle):
        return handle.data.view(BF16 if handle.dtype.scalar == tl.bfloat16 else handle.data.dtype).astype(F32)

    a, b, total = values(a), values(b), acc.data
    for k in range(a.shape[1]):
        total = total + a[:, k, None] * b[k]
    return interpreter.TensorHandle(total, tl.float32)


def nearest(data, source, target, rounding_mode, convert=interpreter._convert_float):
    """The interpreter's conversion, but that rounds to bfloat16; its own cuts off. For the compiler see below."""
    if (source, target) == (tl.float32, tl.bfloat16):
        return data.astype(BF16).view(np.uint16)
    return convert(data, source, target, rounding_mode)


@pytest.fixture(autouse=True)
def arithmetic_of_the_gpu(monkeypatch):
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", numpy_dot)
    monkeypatch.setattr(interpreter, "_convert_float", nearest)


def pointer(array):
    """An array of NumPy's as a kernel argument."""
    kind = tl.pointer_type(TYPES[array.dtype.name])
    return tl.tensor(interpreter.TensorHandle(np.array([array.ctypes.data], np.uint64), kind), kind)


def run_kernel(x, w, out, grid, leaf, constants):
    """The kernel in Triton's interpreter, program by program. Its own launcher needs torch."""
    kernel = interpreter.InterpretedFunction(ours.tree_matmul_kernel.fn).rewrite()
    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(ours, "_leaf", interpreter.InterpretedFunction(ours._leaf.fn))
        scope = interpreter._patch_lang(kernel)
        try:
            builder.set_grid_dim(*grid, 1)
            for program in np.ndindex(grid):
                builder.set_grid_idx(*program, 0)
                kernel(pointer(x), pointer(w), len(x), leaf, pointer(out), **constants)
        finally:
            scope.restore()


def interpreted(x, w, leaves, out_dtype=F32, *, transpose_rhs=False, config=SMALL):
    """`tree_matmul_triton` with the interpreter in place of the GPU. Elements that nobody writes show as -77."""
    (m, k), n = x.shape, w.shape[0 if transpose_rhs else 1]
    check_operands(x, w, leaves, jnp.dtype(out_dtype), transpose_rhs)
    ours._check_config(config, k, leaves)
    out = np.full((config.split, m, n), -77, out_dtype if config.split == 1 else F32)
    grid = -(-m // config.block_m) * -(-n // config.block_n), config.split
    run_kernel(x, w, out, grid, k // leaves, ours._constants(n, k, leaves, transpose_rhs, config))
    return out[0] if config.split == 1 else np.asarray(round_to(tree_join(list(jnp.asarray(out))), out_dtype))


def operands(m, n, k, dtype=BF16, *, transpose_rhs=False, make=normal):
    rng = np.random.default_rng([m, n, k])
    x, w = make(rng, (m, k), dtype), normal(rng, (k, n), dtype)
    return x, np.ascontiguousarray(w.T) if transpose_rhs else w


@pytest.mark.parametrize("transpose_rhs", [False, True])
@pytest.mark.parametrize(
    ("leaves", "split"), [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (8, 2), (8, 4), (4, 4), (8, 8)]
)
def test_adds_in_the_order_of_the_contract(leaves, split, transpose_rhs):
    x, w = operands(20, 48, 32 * leaves, transpose_rhs=transpose_rhs, make=wide)
    config = dataclasses.replace(SMALL, split=split)
    out = interpreted(x, w, leaves, transpose_rhs=transpose_rhs, config=config)
    expected = orders.matmul(x, w.T if transpose_rhs else w, leaves)
    assert_same_bits(out, expected)
    # twin: the neighbouring numbers of leaves are other orders
    for other in {1, 2, 4, 8} - {leaves}:
        if x.shape[1] % (16 * other) == 0:
            assert differing(out, orders.matmul(x, w.T if transpose_rhs else w, other)) > 0


@pytest.mark.parametrize("split", [1, 8])
@pytest.mark.parametrize("make", [normal, wide, cancelling])
@pytest.mark.parametrize(
    ("block_m", "block_n", "block_k"), [(16, 16, 16), (64, 32, 16), (16, 64, 32), (32, 128, 32)]
)
def test_tiles_never_show_in_the_bits(block_m, block_n, block_k, make, split):
    x, w = operands(37, 80, 256, make=make)
    config = TritonConfig(split=split, block_m=block_m, block_n=block_n, block_k=block_k, warps=4, stages=1)
    assert_same_bits(interpreted(x, w, 8, config=config), orders.matmul(x, w, 8))


def test_another_order_of_the_leaves_would_be_seen():
    x, w = operands(20, 48, 256, make=wide)
    parts = [orders.matmul(x[:, i : i + 32], w[i : i + 32], 1) for i in range(0, 256, 32)]
    out = interpreted(x, w, 8)
    assert_same_bits(out, orders.tree_join(parts))
    assert differing(out, functools.reduce(np.add, parts)) > 0
    assert differing(out, orders.tree_join(parts[::2] + parts[1::2])) > 0


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize(
    ("m", "n", "k", "leaves", "dtype", "out_dtype", "transpose_rhs"),
    [
        (1, 16, 32, 2, BF16, BF16, False),
        (1, 144, 128, 8, BF16, F16, True),
        (17, 48, 96, 2, F16, F16, False),
        (33, 32, 64, 4, F16, BF16, True),
        (300, 16, 32, 2, BF16, F32, False),
    ],
)
def test_covers_ragged_shapes_and_every_type(m, n, k, leaves, dtype, out_dtype, transpose_rhs, split):
    x, w = operands(m, n, k, dtype, transpose_rhs=transpose_rhs)
    config = dataclasses.replace(SMALL, split=split)
    out = interpreted(x, w, leaves, out_dtype, transpose_rhs=transpose_rhs, config=config)
    expected = orders.round_to(orders.matmul(x, w.T if transpose_rhs else w, leaves), out_dtype)
    assert_same_bits(out, expected)


def test_infinities_and_nans_stay_in_their_rows_and_columns():
    x, w = operands(20, 48, 128)
    x[3, 5], x[4, 70], x[5, :2] = np.inf, np.nan, (np.inf, -np.inf)
    w[:2, 7] = 1, 1
    w[9, 11] = -np.inf
    with np.errstate(invalid="ignore"):
        out, expected = interpreted(x, w, 8), orders.matmul(x, w, 8)
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(out), nan)
    assert_same_bits(np.where(nan, 0, out), np.where(nan, 0, expected))
    assert nan[4].all() and nan[5].any() and np.isinf(expected[3]).any() and np.isinf(expected[0, 11])
    assert np.isfinite(expected[0, :11]).all()


def test_subnormal_products_are_kept():
    x, w = operands(5, 16, 32)
    x, w = x * BF16(2.0**-70), w * BF16(2.0**-70)
    out = interpreted(x, w, 2)
    assert (np.abs(out) < np.finfo(F32).tiny).all() and (out != 0).any()
    assert_same_bits(out, orders.matmul(x, w, 2))


def test_rows_and_ranks():
    x, w = operands(37, 48, 256)
    whole = interpreted(x, w, 8)
    for m in (1, 16, 17):
        assert_same_bits(interpreted(x[:m], w, 8), whole[:m])
    halves = [interpreted(np.ascontiguousarray(x[:, s]), w[s], 4) for s in (slice(0, 128), slice(128, 256))]
    assert_same_bits(halves[0] + halves[1], whole)


def compiled(n, k, leaves, config, capability=80, *, transpose_rhs=False, **constants):
    """The kernel compiled as `jax_triton` would, here for a GPU that is not here."""
    constants = ours._constants(n, k, leaves, transpose_rhs, config) | constants
    names = {"x_ptr": "*bf16", "w_ptr": "*bf16", "m": "i32", "leaf": "i32", "out_ptr": "*bf16"}
    kernel = ours.tree_matmul_kernel
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("ptr")}
    source = ASTSource(kernel, names | dict.fromkeys(constants, "constexpr"), constants, aligned)
    options = {"num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))


def adds(kernel):
    return kernel.asm["ttir"].count("arith.addf")


@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("m", [1, 4096])
def test_compiles_to_the_adds_of_the_contract(capability, m):
    config = choose_config(m, 4096, 4096, 8)
    kernel = compiled(4096, 4096, 8, config, capability)
    ptx = kernel.asm["ptx"]
    per_thread = config.block_m * config.block_n // (32 * config.warps)
    levels = (8 // config.split).bit_length() - 1
    assert adds(kernel) == levels
    assert len(re.findall(r"\badd\.rn\.f32", ptx)) == per_thread * levels
    assert not re.findall(r"\b(fma|mad|mul)\.[a-z.]*f32|\.ftz|\.tf32", ptx)
    assert "cvt.rn.bf16x2.f32" in ptx  # to nearest even
    assert re.search(r"wgmma\.mma_async\S+\.f32\.bf16|mma\.sync\S+\.f32\.bf16", ptx)
    assert kernel.metadata.shared <= ours._SMEM_BYTES


@pytest.mark.usefixtures("fresh_cache")
def test_a_leaf_of_one_step_starts_from_zero():
    config = dataclasses.replace(SMALL, block_k=16)
    assert adds(compiled(64, 32, 2, config)) == 1
    # twin: of a leaf whose length it knows the compiler makes one chain with its sibling
    assert adds(compiled(64, 32, 2, config, leaf=16)) == 0


@pytest.fixture
def jax_triton(monkeypatch):
    """The kernels that jax_triton compiles, on a machine whose JAX may know no GPU.

    Stand-ins take the place of what JAX's CUDA plugin keeps a kernel in.
    """
    kernels = []

    class Kernel:
        def __init__(self, name, warps, ctas, shared, ptx, ttir, capability):
            kernels.append(self)
            self.name, self.warps, self.shared, self.ptx = name, warps, shared, ptx

    class Call:
        def __init__(self, kernel, grid_x, grid_y, grid_z, parameters):
            kernel.grid, kernel.parameters = (grid_x, grid_y, grid_z), parameters

        def to_proto(self, name, metadata):
            return name.encode()

    stand_ins = {
        "TritonKernel": Kernel,
        "TritonKernelCall": Call,
        "create_array_parameter": lambda zeroed, alignment: alignment,
        "create_scalar_parameter": lambda value, kind: (value, kind),
        "get_compute_capability": None,
        "get_serialized_metadata": None,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(jax._src.lib.gpu_triton, name, value, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # as the import of jax_triton does too, for good
    monkeypatch.setattr("jax_triton.triton_lib._COMPILED_KERNEL_CACHE", {})
    return kernels


@pytest.mark.parametrize(("m", "n", "split"), [(1, 1024, 8), (64, 4096, 2), (3000, 1024, 1), (3000, 4096, 1)])
@pytest.mark.parametrize("transpose_rhs", [False, True])
def test_lowers_to_one_kernel_through_jax_triton(jax_triton, monkeypatch, m, n, split, transpose_rhs):
    monkeypatch.setattr(ours, "_compute_capability", lambda: 80)
    config = choose_config(m, n, 1024, 8)
    x = jax.ShapeDtypeStruct((m, 1024), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((n, 1024) if transpose_rhs else (1024, n), jnp.bfloat16)
    product = functools.partial(
        tree_matmul_triton, leaves=8, out_dtype=jnp.bfloat16, transpose_rhs=transpose_rhs
    )
    text = jax.jit(product).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    assert config.split == split
    assert text.count("custom_call @triton_kernel_call") == 1
    assert "dot_general" not in text and "transpose" not in text and "stablehlo.pad" not in text
    assert text.count("stablehlo.add ") == split - 1
    assert text.count("reduce_precision") == (split > 1)
    (kernel,) = jax_triton
    assert kernel.grid == (-(-m // config.block_m) * -(-n // config.block_n), split, 1)
    assert kernel.warps == config.warps
    assert ".target sm_80" in kernel.ptx
    rows = [] if m == 1 else [(m, "i32")]  # jax_triton makes a constant of a one
    assert kernel.parameters == [16, 16, *rows, (128, "i32"), 16]


@pytest.mark.parametrize("leaves", [1, 2, 4, 8])
@pytest.mark.parametrize("k", [128, 384, 1536, 4096, 12288])
@pytest.mark.parametrize("n", [16, 4096, 18992])
def test_choose_config_gives_what_check_config_takes(n, k, leaves):
    for m in (1, 16, 17, 64, 65, 300, 4096):
        config = choose_config(m, n, k, leaves)
        ours._check_config(config, k, leaves)
        assert config == choose_config(m, n, k, leaves)
        registers = (
            config.block_m * config.block_n // 32 // config.warps * (leaves // config.split).bit_length()
        )
        assert registers <= 128


def test_choose_config_spreads_the_leaves_where_tiles_are_few():
    assert [choose_config(1, n, 4096, 8).split for n in (512, 2048, 4096, 16384)] == [8, 4, 2, 1]
    assert choose_config(64, 1024, 4096, 1).split == 1
    assert choose_config(4096, 4096, 4096, 8).block_m == 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"leaves": 3}, "leaves=3"),
        ({"leaves": 8, "k": 192}, "k=192"),
        ({"n": 40}, "n=40 a multiple of 16"),
        ({"w_k": 128}, "K=64 and w"),
        ({"dtype": F32}, "x is float32"),
        ({"w_dtype": F16}, "w is float16"),
        ({"out_dtype": np.int32}, "out_dtype=int32"),
        ({"config": dataclasses.replace(SMALL, split=2)}, "split=2"),
        ({"config": dataclasses.replace(SMALL, block_k=48)}, "block_k=48"),
        ({"config": dataclasses.replace(SMALL, block_k=128)}, "leaf of 64"),
        ({"config": dataclasses.replace(SMALL, block_n=24)}, "16 x 24"),
        ({"config": dataclasses.replace(SMALL, warps=3)}, "3 warps"),
        ({"config": dataclasses.replace(SMALL, stages=100)}, "use 1 to 64"),
        ({}, r"compute capability 8.x or 9.x and the default device is .*use backend='reference'"),
    ],
)
def test_refuses_what_it_does_not_cover(change, message):
    case = {"m": 8, "n": 32, "k": 64, "leaves": 1, "dtype": BF16, "out_dtype": F32, "config": None} | change
    x = jnp.zeros((case["m"], case["k"]), case["dtype"])
    w = jnp.zeros((case.get("w_k", case["k"]), case["n"]), case.get("w_dtype", case["dtype"]))
    with jax.default_device(jax.devices("cpu")[0]), pytest.raises(ValueError, match=message):
        tree_matmul_triton(x, w, leaves=case["leaves"], out_dtype=case["out_dtype"], config=case["config"])


def test_refuses_sizes_whose_offsets_do_not_fit():
    x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((8, 64), (64, 2**24)))
    with pytest.raises(ValueError, match=f"n={2**24} and k=64 must be below"):
        jax.eval_shape(functools.partial(tree_matmul_triton, leaves=1, out_dtype=jnp.bfloat16), x, w)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [("8.0", 80), ("8.9", 89), ("9.0", 90), ("10.0", None), ("12.0", None), ("7.5", None)],
)
def test_takes_the_devices_whose_bits_are_known(monkeypatch, capability, expected):
    @dataclasses.dataclass
    class Device:
        compute_capability: str
        platform: str = "gpu"

    monkeypatch.setattr(jax.extend.backend, "get_default_device", lambda: Device(capability))
    if expected:
        assert ours._compute_capability() == expected
    else:
        with pytest.raises(ValueError, match=re.escape(f"({capability})")):
            ours._compute_capability()


def test_a_jax_triton_that_does_not_load_is_one_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    with pytest.raises(ValueError, match=r"does not load with jax .*jax-triton==0\.3\.1.*triton==3\.6\.0"):
        ours._import_jax_triton()
