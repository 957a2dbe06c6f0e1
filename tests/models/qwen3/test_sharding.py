"""The sharding table: it knows every parameter, cuts what tp and fsdp may cut, and refuses the rest."""

import dataclasses
import functools
import math

import jax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tbik_jax import make_mesh, synthetic
from tbik_jax.models import Qwen3, Qwen3Config
from tbik_jax.models.qwen3.sharding import CACHE_SPEC, QWEN3_SHARDING, Qwen3Sharding
from tests.checkpoints import TINY, UNTIED, parameters

SIZES = ("0.6B", "1.7B", "4B", "8B", "14B", "32B")
LETTERS = {  # of a field's suffix -> the dimension, from the config
    "v": lambda c: c.vocab_size,
    "d": lambda c: c.hidden_size,
    "k": lambda c: c.num_key_value_heads,
    "g": lambda c: c.queries_per_kv + 2,
    "q": lambda c: c.queries_per_kv,
    "h": lambda c: c.head_dim,
    "c": lambda c: 2,
    "f": lambda c: c.intermediate_size,
}


@functools.cache
def shapes(config: Qwen3Config) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters, none of them allocated."""
    abstract = nnx.eval_shape(lambda: Qwen3(config, rngs=nnx.Rngs(0)))
    return {name: leaf.shape for name, leaf in parameters(abstract).items()}


def published(size: str, layers: int = 1) -> Qwen3Config:
    """A published config with one layer, whose shapes are those of all the others."""
    config = Qwen3Config.from_dict(synthetic.qwen3_config(size))
    return dataclasses.replace(config, num_hidden_layers=layers)


def shard_shape(field: str, shape: tuple[int, ...], mesh: Mesh) -> tuple[int, ...]:
    spec = QWEN3_SHARDING.partition_spec(field, shape, mesh)
    return NamedSharding(mesh, spec).shard_shape(shape)


def field_of(name: str) -> str:
    return name.rsplit(".", 1)[-1]


# --- the table -------------------------------------------------------------------------------------------


def test_the_table_holds_the_fields_of_the_module_and_no_others() -> None:
    used = {field_of(name) for name in shapes(Qwen3Config.from_dict(UNTIED))}
    assert used == {field.name for field in dataclasses.fields(Qwen3Sharding)}
    tied = {field_of(name) for name in shapes(Qwen3Config.from_dict(TINY))}
    assert used - tied == {"lm_head_weight_vd"}


@pytest.mark.parametrize("size", SIZES)
def test_suffixes_spell_the_dimensions(size: str) -> None:
    config = published(size)
    for name, shape in shapes(config).items():
        field = field_of(name)
        assert len(getattr(QWEN3_SHARDING, field)) == len(shape)
        if field != "scale_d":  # d is the normalised size there, which two norms take from head_dim
            assert shape == tuple(LETTERS[letter](config) for letter in field.rsplit("_", 1)[1]), name


@pytest.mark.parametrize("size", ["0.6B", "32B"])
def test_all_layers_have_one_shape(size: str) -> None:
    one, two = shapes(published(size)), shapes(published(size, layers=2))
    for name, shape in one.items():
        if name.startswith("layers.0."):
            assert two[name.replace("layers.0.", "layers.1.")] == two[name] == shape


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        QWEN3_SHARDING.scale_d = ("tp",)


def test_each_axis_cuts_a_parameter_once_at_most() -> None:
    for field in dataclasses.fields(Qwen3Sharding):
        axes = [axis for axis in getattr(QWEN3_SHARDING, field.name) if axis]
        assert sorted(axes) == ([] if field.name == "scale_d" else ["fsdp", "tp"]), field.name


# --- published sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_tp_cuts_every_published_size_evenly(size: str, tp: int) -> None:
    mesh = make_mesh(tp=tp)
    for name, shape in shapes(published(size)).items():
        local = shard_shape(field_of(name), shape, mesh)
        parts = 1 if len(shape) == 1 else tp
        assert math.prod(local) * parts == math.prod(shape), name
        if len(shape) > 1:
            cut = [dim for dim in range(len(shape)) if local[dim] != shape[dim]]
            expected = [field_of(name).rsplit("_", 1)[1].index(letter) for letter in cut_letters(name)]
            assert cut == (expected if tp > 1 else [])


def cut_letters(name: str) -> str:
    """Vocabulary, KV heads or intermediate: what tensor parallelism may cut."""
    letters = [letter for letter in "vkf" if letter in field_of(name).rsplit("_", 1)[1]]
    assert len(letters) == 1
    return letters[0]


@pytest.mark.parametrize(("fsdp", "tp"), [(2, 1), (2, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("size", SIZES)
def test_fsdp_cuts_what_tp_leaves(size: str, fsdp: int, tp: int) -> None:
    mesh = make_mesh(fsdp=fsdp, tp=tp)
    for name, shape in shapes(published(size)).items():
        parts = 1 if len(shape) == 1 else fsdp * tp
        assert math.prod(shard_shape(field_of(name), shape, mesh)) * parts == math.prod(shape), name


def test_the_shapes_of_8b_on_8_ranks() -> None:
    """Spelled out, so that the tests above cannot agree on a mistake."""
    local = {
        field_of(name): shard_shape(field_of(name), shape, make_mesh(fsdp=2, tp=4))
        for name, shape in shapes(published("8B")).items()
        if len(shape) > 1
    }
    assert local == {
        "embedding_vd": (37984, 2048),
        "qkv_weight_kghd": (2, 6, 128, 2048),
        "o_weight_kqhd": (2, 4, 128, 2048),
        "gate_up_weight_cfd": (2, 3072, 2048),
        "down_weight_fd": (3072, 2048),
        "lm_head_weight_vd": (37984, 2048),
    }


def test_the_cache_is_cut_over_rows_and_kv_heads() -> None:
    sharding = NamedSharding(make_mesh(data=2, fsdp=2, tp=2), CACHE_SPEC)
    assert sharding.shard_shape((8, 64, 8, 128)) == (2, 64, 4, 128)


# --- what does not divide --------------------------------------------------------------------------------


@pytest.mark.parametrize("fsdp", [3, 5, 6, 7])
def test_a_dimension_that_fsdp_does_not_divide_stays_whole(fsdp: int) -> None:
    mesh = make_mesh(fsdp=fsdp)
    for name, shape in shapes(Qwen3Config.from_dict(UNTIED)).items():
        assert shard_shape(field_of(name), shape, mesh) == shape, name


def test_fsdp_is_decided_for_each_parameter() -> None:
    mesh = make_mesh(fsdp=3)
    assert QWEN3_SHARDING.partition_spec("down_weight_fd", (128, 96), mesh) == PartitionSpec("tp", "fsdp")
    assert QWEN3_SHARDING.partition_spec("down_weight_fd", (128, 64), mesh) == PartitionSpec("tp", None)


@pytest.mark.parametrize(
    ("field", "shape", "tp", "words"),
    [
        ("qkv_weight_kghd", (4, 4, 16, 64), 8, ("num_key_value_heads=4", "tp=8", "use tp=1 or 2 or 4")),
        ("o_weight_kqhd", (2, 4, 16, 64), 4, ("num_key_value_heads=2", "tp=4", "use tp=1 or 2")),
        ("embedding_vd", (1001, 64), 2, ("vocab_size=1001", "tp=2", "use tp=1")),
        ("lm_head_weight_vd", (1004, 64), 8, ("vocab_size=1004", "tp=8", "use tp=1 or 2 or 4")),
        ("gate_up_weight_cfd", (2, 36, 64), 8, ("intermediate_size=36", "tp=8", "use tp=1 or 2 or 4")),
        ("down_weight_fd", (38, 64), 4, ("intermediate_size=38", "tp=4", "use tp=1 or 2")),
    ],
)
def test_tp_that_does_not_divide_is_refused_with_the_remedy(
    field: str, shape: tuple[int, ...], tp: int, words: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match=".*".join(words)) as error:
        QWEN3_SHARDING.partition_spec(field, shape, make_mesh(tp=tp))
    assert field in str(error.value) and str(error.value).endswith(words[-1])


def test_every_field_that_tp_cuts_has_such_an_error() -> None:
    mesh = make_mesh(tp=8)
    for field in dataclasses.fields(Qwen3Sharding):
        axes = getattr(QWEN3_SHARDING, field.name)
        if "tp" in axes:
            with pytest.raises(ValueError, match="=12 cannot be cut over tp=8"):
                QWEN3_SHARDING.partition_spec(field.name, (12,) * len(axes), mesh)


def test_a_mesh_of_axes_in_another_order_gives_the_same_specs() -> None:
    devices = jax.devices()
    mesh = make_mesh(fsdp=2, tp=4)
    other = Mesh(mesh.devices.transpose(2, 0, 1), ("tp", "data", "fsdp"))
    assert len(devices) == 8
    for name, shape in shapes(published("0.6B")).items():
        spec = QWEN3_SHARDING.partition_spec(field_of(name), shape, mesh)
        assert QWEN3_SHARDING.partition_spec(field_of(name), shape, other) == spec
